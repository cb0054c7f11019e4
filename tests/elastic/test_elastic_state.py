"""What Horovod is told before each generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from horoyolo.elastic.state import DEFAULT_CYCLE_MS, set_one_of_two

AGAIN_AND_AGAIN = """
import json, os, sys, time
import torch
import horovod.torch as hvd
from horoyolo.elastic.state import set_one_of_two

waits_s = []
for _ in range(3):
    os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"  # as the launcher gives it to every generation
    set_one_of_two(os.environ, float(sys.argv[1]))
    hvd.init()
    for step in range(6):
        began_s = time.perf_counter()
        hvd.allreduce(torch.ones(1), name="one")
        if step:
            waits_s.append(time.perf_counter() - began_s)
    hvd.shutdown()
print(json.dumps(sorted(waits_s)))
"""


@pytest.mark.parametrize("cycle_time_ms", [DEFAULT_CYCLE_MS, 30.0])
def test_horovod_begins_again_with_the_cycle_that_was_asked_for(cycle_time_ms):
    pytest.importorskip("horovod.torch", reason="Horovod is not installed (scripts/setup.sh builds it)")
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    env |= {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", AGAIN_AND_AGAIN, str(cycle_time_ms)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    waits_s = json.loads(done.stdout.splitlines()[-1])
    median_ms = waits_s[len(waits_s) // 2] * 1e3
    assert (median_ms > 15) == (cycle_time_ms == 30.0), waits_s


def test_a_cycle_that_the_user_set_goes_before_ours():
    env = {"HOROVOD_CYCLE_TIME": "7", "HOROVOD_FUSION_THRESHOLD": "0"}
    set_one_of_two(env, 10.0)
    assert env == {"HOROVOD_CYCLE_TIME": "7"}
    env = {"HOROVOD_FUSION_THRESHOLD": "0"}
    set_one_of_two(env, DEFAULT_CYCLE_MS)
    assert env == {"HOROVOD_FUSION_THRESHOLD": "0"}

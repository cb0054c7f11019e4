"""A real Slurm on the hosts of a lab: slurmctld on the first, a slurmd on each, so that jobs run in the lab's own network and processes.

Each node has four CPUs and two stand-ins for GPUs (character devices), whatever the machine has. There is no authentication and no cgroup:
this is for tests. The configuration appears as /etc/slurm on the lab's hosts only, so srun and sbatch there need no environment.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from netlab import START_S, Lab, LabError, find_program, wait_until

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "sbatch": "slurm-client", "scontrol": "slurm-client"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
CPUS, GPUS = 4, 2

# /run of each host is its own, so the nodes' files may have the same names.
SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=node1
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
TmpFS=/run/slurm/tmp
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1
MpiDefault=none
SlurmdTimeout=20
KillWait=5
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={nodes} CPUs={cpus} Gres=gpu:{gpus}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
GRES_CONF = "Name=gpu File=/run/slurm/gpu[0-{last}]\n"
# Nothing here uses a cgroup, but slurmd loads the plug-in all the same. Version 1 leaves the machine's cgroups alone, of whatever kind they are.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
NODE_SETUP = """\
mkdir -p /run/slurm/state /run/slurm/spool /run/slurm/tmp
for number in $(seq 0 {last}); do [ -e /run/slurm/gpu$number ] || mknod /run/slurm/gpu$number c 1 3; done
"""


def missing() -> str:
    """What this machine lacks for Slurm in a lab, in one line; empty when nothing."""
    absent = sorted({package for program, package in PROGRAMS.items() if not find_program(program)})
    return f"{', '.join(absent)} (scripts/setup_lab.sh installs them)" if absent else ""


@dataclass
class Slurm:
    """The Slurm of a lab; ``up`` starts it. Jobs are submitted on node1."""

    lab: Lab

    @property
    def folder(self) -> Path:
        """Configuration and logs: slurmctld.log and a NODE.log each."""
        return self.lab.folder / "slurm"

    def up(self) -> None:
        """Start the daemons and wait until every node is idle. Raises LabError with the end of the controller's log when they are not."""
        lack = missing()
        if lack:
            raise LabError(f"no Slurm on this machine; it lacks {lack}")
        conf = SLURM_CONF.format(folder=self.folder, nodes=",".join(self.lab.hosts), cpus=CPUS, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(GRES_CONF.format(last=GPUS - 1))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        for host in self.lab.hosts:
            self.lab.run(host, ["sh", "-ec", NODE_SETUP.format(last=GPUS - 1)], cwd="/", check=True)
        self.lab.run("node1", [find_program("slurmctld")], cwd="/", check=True)
        for host in self.lab.hosts:
            self.lab.run(host, [find_program("slurmd"), "-N", host], cwd="/", check=True)
        deadline_s = time.monotonic() + START_S
        while (states := self.node_states()) != dict.fromkeys(self.lab.hosts, "idle"):
            if time.monotonic() > deadline_s:
                raise LabError(f"nodes are {states}; slurmctld says:\n{(self.folder / 'slurmctld.log').read_text()[-1500:]}")
            time.sleep(0.2)

    def down(self) -> None:
        """Cancel all jobs and end the daemons."""
        self.run(["scancel", "--user=root"])
        wait_until(lambda: not self.run(["squeue", "--noheader"]).stdout, "the end of all jobs")
        self.run(["scontrol", "shutdown"], check=True)
        wait_until(lambda: not self._daemons(), "the end of Slurm's daemons")

    def run(self, argv: Sequence[str], **options: Any) -> CompletedProcess[str]:
        """Run a program on node1, with the options of ``Lab.run``: ``slurm.run(["srun", "-N2", "hostname"])``."""
        return self.lab.run("node1", argv, **options)

    def sbatch(self, script: str | Path, *options: str, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> int:
        """Submit a script file; its job id. Raises LabError when Slurm refuses it."""
        done = self.lab.run("node1", ["sbatch", "--parsable", *options, str(script)], env=env, cwd=cwd, check=True)
        return int(done.stdout.strip().partition(";")[0])

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of ``scontrol show job``: JobState, ExitCode, Restarts, Reason, BatchHost, NodeList, ..."""
        done = self.lab.run("node1", ["scontrol", "--oneliner", "show", "job", str(job_id)], check=True)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def wait_job(self, job_id: int, states: Sequence[str] = ENDED, timeout: float = 120) -> dict[str, str]:
        """Wait until a job is in one of some states, by default until it has ended; its fields. A requeued job is PENDING and has not
        ended. Raises LabError when it takes longer."""
        deadline_s = time.monotonic() + timeout
        while (job := self.job(job_id))["JobState"] not in states:
            if time.monotonic() > deadline_s:
                raise LabError(f"after {timeout:.0f} s job {job_id} is {job['JobState']} ({job['Reason']}), not {' or '.join(states)}")
            time.sleep(0.2)
        return job

    def node_states(self) -> dict[str, str]:
        """Node -> state as sinfo puts it: idle, allocated, down, ..."""
        done = self.run(["sinfo", "--noheader", "--Node", "--format=%N %T"])
        return dict(line.split() for line in done.stdout.splitlines())

    def _daemons(self) -> list[int]:
        found = []
        for pid in (pid for host in self.lab.hosts for pid in self.lab.processes(host)):
            with contextlib.suppress(OSError):  # it has just ended
                if Path(f"/proc/{pid}/comm").read_text().startswith("slurm"):
                    found.append(pid)
        return found

"""What hooks tell of a run."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from horoyolo.engine.hooks import STEP_COLUMNS
from horoyolo.engine.watch import TellUnreadable


def test_a_file_that_can_not_be_read_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    hook = TellUnreadable()
    with caplog.at_level(logging.WARNING, "horoyolo"):
        for failed in (["a.jpg"], [], ["a.jpg", "b.jpg", "b.jpg"]):
            hook.after_step(None, SimpleNamespace(failed=failed))  # type: ignore[arg-type]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["a.jpg", "b.jpg"]


def test_steps_csv_has_the_columns_that_scripts_rely_on() -> None:
    assert ",".join(STEP_COLUMNS) == (
        "step,epoch,update,images,batch_crc,box_loss,obj_loss,cls_loss,loss,lr,data_s,forward_s,backward_s,exchange_wait_s,wire_bytes,workers"
    )

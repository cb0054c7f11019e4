"""What hooks tell of a run."""

from __future__ import annotations

from horoyolo.engine.hooks import STEP_COLUMNS


def test_steps_csv_has_the_columns_that_scripts_rely_on() -> None:
    assert ",".join(STEP_COLUMNS) == (
        "step,epoch,update,images,batch_crc,box_loss,obj_loss,cls_loss,loss,lr,data_s,forward_s,backward_s,exchange_wait_s,wire_bytes,workers"
    )

"""``horoyolo val``: scores weights on a data set, over as many workers as were started."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horoyolo.config import InputError
from horoyolo.data.dataset import EvalDataset
from horoyolo.data.loader import build_eval_loader, choose_num_workers, ending
from horoyolo.data.scan import scan_split
from horoyolo.data.spec import load_data_spec
from horoyolo.distributed.comm import open_comm
from horoyolo.engine.device import numerics_for, pick_device
from horoyolo.engine.evaluate import evaluate
from horoyolo.files import write_json
from horoyolo.model.weights import model_from_weights
from horoyolo.report.logs import start_logs

DEFAULT_IMG = 640


def validate(
    weights: str,
    data: str,
    split: str,
    single_cls: bool,
    img: int | None,
    batch: int,
    device: str,
    precision: str,
    num_workers: int,
    json_files: Sequence[Path],
) -> dict[str, Any]:
    """Scores ``weights`` on a split of ``data``, prints a table, writes the metrics to ``json_files`` and gives them.

    ``img`` None: the size the weights were trained at, where their file says it, else 640. Raises InputError for what can't be used.
    """
    model, meta = model_from_weights(weights)
    spec = load_data_spec(data, single_cls)
    if model.num_classes != len(spec.classes):
        has = f"{data} has {len(spec.classes)}{' with --single-cls' * single_cls}"
        wanted = "weights trained for these classes are wanted" + (", or --single-cls" if model.num_classes == 1 else "")
        raise InputError(f"{weights} knows {model.num_classes} classes, {has}: {wanted}")
    comm = open_comm()
    start_logs(comm.rank(), comm.size())
    numerics = numerics_for(pick_device(device, comm.local_rank()), precision)
    scanned = scan_split(spec, split)
    img = img or int(meta.get("img") or DEFAULT_IMG)
    if img % max(model.strides):
        raise InputError(f"--img {img}: a multiple of {max(model.strides)}, the largest stride, is wanted")
    dataset, num_workers = EvalDataset(scanned, img, max(model.strides)), choose_num_workers(num_workers, comm.local_size())
    loader = build_eval_loader(dataset, batch * comm.size(), comm, num_workers)
    model = model.to(numerics.device, memory_format=numerics.memory_format)  # type: ignore[call-overload]
    with ending(loader):
        metrics, _ = evaluate(model, loader, scanned, numerics, comm)
    if comm.rank() == 0:
        print("\n".join(table(metrics)))
        for path in json_files:
            write_json(path, metrics)
    comm.barrier()
    comm.close()
    return metrics


def table(metrics: dict[str, Any]) -> list[str]:
    """The metrics as lines: all classes, each of them, then the sizes of boxes that there are."""
    head = f"{'class':>20}{'images':>10}{'instances':>12}{'precision':>12}{'recall':>10}{'mAP50':>10}{'mAP50-95':>10}"
    rows = {"all": metrics, **metrics["per_class"]}
    sizes = {size: row for size, row in metrics["by_size"].items() if row["instances"]}
    return [
        head,
        *(
            f"{name:>20}{row['images']:>10}{row['instances']:>12}{row['precision']:>12.3f}{row['recall']:>10.3f}"
            f"{row['map50']:>10.3f}{row['map50_95']:>10.3f}"
            for name, row in rows.items()
        ),
        *(f"{f'{size} boxes':>20}{'':>10}{row['instances']:>12}{'':>32}{row['map50_95']:>10.3f}" for size, row in sizes.items()),
    ]

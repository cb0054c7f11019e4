"""A worker that scores its share of made-up detections and prints the metrics; also the home of these detections."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch

from horoyolo.distributed.comm import open_comm
from horoyolo.engine.evaluate import CocoEvaluator


@dataclass
class Scene:
    """What scoring needs of a split."""

    labels: list[np.ndarray]
    shapes_hw: np.ndarray
    names: dict[int, str]

    def __len__(self) -> int:
        return len(self.labels)


def scene(seed: int, images: int = 12, classes: int = 4) -> tuple[Scene, np.ndarray]:
    """A split with labels of all classes but the last, and detections near them, beside them and of the wrong class."""
    rng = np.random.default_rng(seed)
    labels, detections = [], []
    shapes_hw = rng.integers(100, 400, (images, 2))
    for image, (height, width) in enumerate(shapes_hw):
        wh = rng.uniform(0.05, 0.4, (rng.integers(0, 9), 2))
        xy = rng.uniform(0.3, 0.7, wh.shape)
        classes_here = rng.integers(0, classes - 1, (len(wh), 1))
        labels.append(np.hstack([classes_here, xy, wh]).astype(np.float32))
        for row in labels[-1]:
            for _ in range(rng.integers(0, 3)):
                box = row[1:] + rng.normal(0, 0.02, 4)
                x, y, w, h = box * [width, height, width, height]
                label = row[0] if rng.random() < 0.8 else rng.integers(0, classes)
                detections.append([image, x - w / 2, y - h / 2, w, h, rng.random(), label])
    return Scene(labels, shapes_hw, {i: f"class {i}" for i in range(classes)}), np.array(detections)


def main() -> None:
    comm = open_comm()
    split, detections = scene(seed=0)
    evaluator = CocoEvaluator(split)  # type: ignore[arg-type]
    for image in range(comm.rank(), len(split), comm.size()):
        rows = torch.from_numpy(detections[detections[:, 0] == image])
        evaluator.process(image, torch.cat([rows[:, 1:3], rows[:, 1:3] + rows[:, 3:5]], 1), rows[:, 5], rows[:, 6])
    print(json.dumps(evaluator.evaluate(comm)), flush=True)
    comm.barrier()
    comm.close()


if __name__ == "__main__":
    main()

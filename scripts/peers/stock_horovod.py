"""The peer that the exchange is measured against: the same model and step through Horovod's own ``DistributedOptimizer``.

    horovodrun -np 2 --gloo python scripts/peers/stock_horovod.py --cfg yolov5s --img 320 --images 4 --steps 20

NCHW only: ``DistributedOptimizer`` refuses the gradients of channels_last models. The loss is a stand-in that reaches every parameter. The
first worker prints one line of JSON: the median and all times of a step in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import horovod.torch as hvd
import torch

from horoyolo.model.yolo import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cfg", default="yolov5s")
    parser.add_argument("--img", type=int, default=320, help="side of the images in pixels")
    parser.add_argument("--images", type=int, default=4, help="images a worker and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not counted")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(0)
    model = build_model(args.cfg, 80).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.937, nesterov=True)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), op=hvd.Sum)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    images = torch.rand(args.images, 3, args.img, args.img)

    times_s = []
    for _ in range(args.warmup + args.steps):
        start_s = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            heads = model(images)
        sum(head.float().square().mean() for head in heads).backward()
        optimizer.step()
        times_s.append(time.perf_counter() - start_s)
    times_s = times_s[args.warmup :]
    if hvd.rank() == 0:
        print(json.dumps({"peer": "stock_horovod", "workers": hvd.size(), "median_step_s": statistics.median(times_s), "steps_s": times_s}))
    hvd.shutdown()


if __name__ == "__main__":
    main()

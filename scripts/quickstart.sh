#!/usr/bin/env bash
# From a fresh machine to a trained detector: sets up, makes a synthetic data set, trains YOLOv5n on two Horovod workers of this machine,
# validates, predicts, and prints the mAP and where the pictures are. Results go to runs/quickstart-N.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
. .venv/bin/activate

started=$SECONDS
number=1
while [ -e "runs/quickstart-$number" ]; do number=$((number + 1)); done
out=runs/quickstart-$number

echo "1/4 synthetic data set"
horoyolo data synth --out "$out/data" --images 160
workers=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')   # NCCL wants a GPU for each
echo "2/4 training on $workers workers"
horoyolo launch -np "$workers" -- train --data "$out/data/data.yaml" --cfg yolov5n --img 256 --batch 16 --epochs 25 --project "$out" --name train \
    --set optim.nominal_batch=16 --set hyp.lr0=0.02 --set evaluate_every=5
echo "3/4 validation"
horoyolo val --weights "$out/train/weights/best.pt" --data "$out/data/data.yaml" --json "$out/val.json"
echo "4/4 prediction"
horoyolo predict --weights "$out/train/weights/best.pt" --source "$out/data/images/val" --out "$out/predict"

python - "$out" <<'PY'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
metrics = json.loads((out / "val.json").read_text())
print(f"mAP50 {metrics['map50']:.3f}, mAP50-95 {metrics['map50_95']:.3f} on {metrics['images']} images")
print("plots:", *sorted(map(str, (out / "train/plots").glob("*.png"))), sep="\n  ")
print("annotated images:", out / "predict")
PY
echo "quickstart took $((SECONDS - started)) s after set-up"

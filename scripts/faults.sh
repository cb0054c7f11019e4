#!/usr/bin/env bash
# Faults done to an elastic training on three hosts of a lab: a table of what was expected and what happened. Needs root and scripts/setup_lab.sh.
#   scripts/faults.sh                           all rows, about twenty minutes
#   scripts/faults.sh --rows 1 2 7 --repeat 3 --json faults.json --keep DIR
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$here/tests/faults/matrix.py" "$@"

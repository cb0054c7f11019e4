#!/usr/bin/env bash
# Sets this checkout up and runs the linter, the type checker and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
scripts/setup_lab.sh
. .venv/bin/activate
ruff check .
mypy
python -m pytest "$@"

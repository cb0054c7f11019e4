#!/usr/bin/env bash
# Makes this checkout ready to train: system packages, a virtual environment in .venv, pinned requirements, Horovod. Safe to run again.
# PYTHON names the interpreter to use (default: python3.11 or python3).
set -euo pipefail
cd "$(dirname "$0")/.."

started=$SECONDS
step() { printf '[setup %3ds] %s\n' "$((SECONDS - started))" "$*"; }

# 1. System packages: a C++ compiler and Open MPI to build Horovod, venv to make the environment.
packages=()
command -v g++ >/dev/null || packages+=(g++)
command -v make >/dev/null || packages+=(make)
command -v mpicxx >/dev/null && command -v mpirun >/dev/null || packages+=(openmpi-bin libopenmpi-dev)
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ]; then
    packages+=(python3 python3-venv python3-dev)
    python=python3
elif ! "$python" -c 'import ensurepip, sys, sysconfig, os; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' 2>/dev/null; then
    packages+=(python3-venv python3-dev)
fi
if [ "${#packages[@]}" -gt 0 ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "setup: missing system packages: ${packages[*]}" >&2
        echo "setup: install them (as root: apt-get install ${packages[*]}), then run this again" >&2
        exit 1
    fi
    step "installing system packages: ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setup: Python 3.10 or newer is wanted, $python is older" >&2; exit 1; }

# 2. The virtual environment and the pinned requirements, again only when they changed.
if [ ! -x .venv/bin/python ]; then
    step "making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
. .venv/bin/activate
wanted=$(sha256sum scripts/requirements.txt setup.cfg | sha256sum | cut -c1-16)
if [ "$(cat .venv/horoyolo-requirements 2>/dev/null || true)" != "$wanted" ]; then
    step "installing requirements"
    pip install -q -r scripts/requirements.txt
    step "installing horoyolo, from this checkout"
    pip install -q --no-deps --no-build-isolation -e .
    echo "$wanted" >.venv/horoyolo-requirements
fi

# 3. Horovod, built against the torch just installed, or taken from the cache.
wheel=$(PYTHON=python scripts/build_horovod.sh)
if [ "$(cat .venv/horoyolo-horovod 2>/dev/null || true)" != "$wheel" ]; then
    step "installing Horovod: $(basename "$wheel")"
    pip install -q --no-deps --force-reinstall "$wheel"
    echo "$wheel" >.venv/horoyolo-horovod
fi
step "ready: . .venv/bin/activate"

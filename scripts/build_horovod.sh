#!/usr/bin/env bash
# Builds the Horovod wheel for the torch of the active Python and prints the wheel's path on standard output.
# The wheel is tied to torch, Python and the build options; it is cached under a key made of all of them.
set -euo pipefail

version=0.28.1
python=${PYTHON:-python}
cache_root=${HOROYOLO_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/horoyolo}

say() { printf '%s\n' "$*" >&2; }

options="HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITH_MPI=1"

# With a CUDA build of torch and nvcc at hand, NCCL comes from the wheel that torch itself uses.
cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
nvcc=$(PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" command -v nvcc || true)
if [ -n "$cuda" ] && [ -z "$nvcc" ]; then
    say "torch is a CUDA build, but there is no nvcc: Horovod is built without NCCL, and what GPUs hold will go through the CPU"
elif [ -n "$cuda" ]; then
    nccl=$("$python" -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0])')
    [ -e "$nccl/lib/libnccl.so" ] || ln -s libnccl.so.2 "$nccl/lib/libnccl.so"
    cuda_home=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}
    options="$options HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$nccl/lib"
    options="$options HOROVOD_CUDA_HOME=$cuda_home HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-80,90}"
fi

key=$("$python" - "$version" "$options" <<'PY'
import hashlib, platform, sys, sysconfig, torch
parts = [*sys.argv[1:], torch.__version__, sysconfig.get_config_var("SOABI"), platform.machine()]
print(hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16])
PY
)
cache="$cache_root/horovod-$version-$key"
mkdir -p "$cache"
find_wheel() { find "$cache" -maxdepth 1 -name 'horovod-*.whl' | head -n 1; }
wheel=$(find_wheel)
if [ -n "$wheel" ]; then
    printf '%s\n' "$wheel"
    exit 0
fi

exec 9>"$cache/lock"
flock 9   # two checkouts set up at once: the second waits and finds the wheel
wheel=$(find_wheel)
if [ -z "$wheel" ]; then
    say "building Horovod $version from source (about 3 minutes on 2 cores; log: $cache/build.log)"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    (
        cd "$work"
        "$python" -m pip download -q --no-deps --no-build-isolation --no-binary :all: "horovod==$version"
        tar -xzf "horovod-$version.tar.gz"
        cd "horovod-$version"
        # The release asks for C++14; the headers of torch since 2.1 need C++17.
        sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' CMakeLists.txt horovod/torch/CMakeLists.txt
        # shellcheck disable=SC2086 # one word an option
        env $options MAKEFLAGS="-j$(nproc)" "$python" -m pip wheel --no-build-isolation --no-deps -w "$work/wheels" .
    ) >"$cache/build.log" 2>&1 || { tail -n 20 "$cache/build.log" >&2; say "Horovod did not build: see $cache/build.log"; exit 1; }
    mv "$work"/wheels/horovod-*.whl "$cache/"   # only a whole wheel ever has its final name
    wheel=$(find_wheel)
fi
printf '%s\n' "$wheel"

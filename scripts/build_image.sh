#!/usr/bin/env bash
# Builds an image of docker/ with buildah, where there is neither a container daemon nor a hub: Debian comes from debootstrap, and the build reaches
# package registries as this machine does (pip's settings, apt's sources, local folders of wheels), of which nothing stays in the image. As root.
#   scripts/build_image.sh                 docker/Dockerfile.cpu
#   scripts/build_image.sh --gpu           docker/Dockerfile, with the CUDA toolkit of this machine (CUDA_HOME) in place of NVIDIA's image
#   ... --test                             train in the image, on CPUs: on two workers, then from a launcher on two hosts that it reaches over ssh
#   ... --out FILE                         keep the image as an archive for `docker load` or `podman load`
#   ... --store DIR                        keep layers in DIR, so that the next build starts from them; otherwise nothing is left behind
#   ... --mirror URL                       Debian mirror; default: the first of this machine's own sources
set -euo pipefail
self=$(realpath "$0")
words=("$@")
cd "$(dirname "$self")/.."

suite=bookworm
kind=cpu test='' out='' store='' mirror=''
while [ $# -gt 0 ]; do
    case $1 in
    --gpu) kind=gpu ;;
    --test) test=yes ;;
    --out | --store | --mirror)
        [ -n "${2:-}" ] || { echo "build_image: $1 wants a value" >&2; exit 2; }
        declare "${1#--}=$2"
        shift
        ;;
    *) echo "build_image: unknown argument $1; known are --gpu --test --out FILE --store DIR --mirror URL" >&2; exit 2 ;;
    esac
    shift
done
[ "$(id -u)" = 0 ] || { echo "build_image: run this as root, which debootstrap and buildah's chroot isolation need" >&2; exit 1; }

# In namespaces of its own: whatever this script mounts or starts ends with it.
if [ -z "${HOROYOLO_IMAGE_NAMESPACES:-}" ]; then
    exec env HOROYOLO_IMAGE_NAMESPACES=yes unshare --mount --propagation private --pid --fork --kill-child --mount-proc "$self" "${words[@]}"
fi

started=$SECONDS
step() { printf '[image %4ds] %s\n' "$((SECONDS - started))" "$*"; }
fail() { printf 'build_image: %s\n' "$*" >&2; exit 1; }

packages=()
for program in buildah debootstrap; do command -v "$program" >/dev/null || packages+=("$program"); done
if [ -n "$test" ] && ! command -v ip >/dev/null; then packages+=(iproute2); fi
if [ "${#packages[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null || fail "install ${packages[*]}, then run this again"
    step "installing system packages: ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

work=$(mktemp -d -t horoyolo-image-XXXXXX)
store=$(realpath -m "${store:-$work/store}")
mkdir -p "$store"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-overlay}
builder=(buildah --root "$store" --runroot "$work/run")
end() {
    "${builder[@]}" rm --all >/dev/null 2>&1 || true
    umount "$store/overlay" 2>/dev/null || true   # the storage driver mounts its own folder
    rm -rf --one-file-system "$work"
}
trap end EXIT
trap 'exit 1' INT TERM

# 1. How this machine reaches its registries: files for the build's secrets, and folders to mount (source, tab, target).
settings=$work/settings
mkdir "$settings" "$work/wheels"
python3 -m pip config list | python3 docker/pip_settings.py "$settings" "$work/wheels" >"$work/mounts"
{
    echo 'Dir::Etc::sourceparts "-";'   # no other sources than those below
    apt-config dump | grep -E '^Acquire::(http|https|Check-Valid-Until|Check-Date|Languages)' || true
} >"$settings/apt.conf"
# shellcheck disable=SC2016 # variables of apt-get
own_sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' | grep " $suite" | sort -u || true)
mirror=${mirror:-$(awk -v suite="$suite" '$3 == suite && $4 == "main" {print $2; exit}' <<<"$own_sources")}
[ -n "$mirror" ] || fail "this machine has no apt sources of Debian $suite: name a mirror with --mirror URL"
printf '%s\n' "${own_sources:-deb $mirror $suite main}" >"$settings/sources.list"
if [ "$kind" = gpu ]; then
    toolkit=$(realpath "${CUDA_HOME:-/usr/local/cuda}")
    [ -x "$toolkit/bin/nvcc" ] || fail "no nvcc in $toolkit: CUDA_HOME names the CUDA toolkit to compile with"
    mkdir "$work/cuda"
    printf '%s\t%s\n' "$toolkit" "$work/cuda/toolkit" >>"$work/mounts"
fi

# Runs a command that sees these folders, read-only. It alone does: nothing that cleans up can reach into them.
with_folders() {
    # shellcheck disable=SC2016 # variables of the inner shell
    unshare --mount --propagation private bash -euc '
        while IFS=$'"'\t'"' read -r source target; do
            mkdir -p "$target"
            mount --bind "$source" "$target"
            mount -o remount,bind,ro "$target"
        done <"$1"
        shift
        exec "$@"' with_folders "$work/mounts" "$@"
}

# 2. The base: Debian and nothing else, without what came from this machine.
base=localhost/debian:$suite
if ! "${builder[@]}" inspect --type image "$base" >/dev/null 2>&1; then
    step "Debian $suite by debootstrap"
    root=$work/rootfs
    debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$work/log" 2>&1 || { tail -n 5 "$work/log" >&2; fail "debootstrap failed"; }
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/etc/{apt/sources.list,resolv.conf,hostname}
    container=$("${builder[@]}" from scratch)
    "${builder[@]}" add -q "$container" "$root" / >/dev/null
    "${builder[@]}" commit -q --rm "$container" "$base" >/dev/null
    rm -rf --one-file-system "$root"
fi

# 3. The image.
image=localhost/horoyolo:$kind
arguments=(--build-arg "BASE_IMAGE=$base" --build-context "wheels=$work/wheels")
for file in "$settings"/*; do arguments+=(--secret "id=$(basename "$file"),src=$file"); done
case $kind in
cpu) arguments+=(-f docker/Dockerfile.cpu) ;;
gpu) arguments+=(-f docker/Dockerfile --build-context "cuda=$work/cuda" --build-arg CUDA_FOLDER=/toolkit) ;;
esac
step "building $image"
with_folders "${builder[@]}" bud --pull-never --layers --format docker -t "$image" "${arguments[@]}" . >"$work/log" 2>&1 ||
    { tail -n 40 "$work/log" >&2; fail "$image did not build"; }
grep -A 14 'Available Frameworks' "$work/log" || true   # what Horovod was built with, where the Dockerfile asks
step "built $image: $("${builder[@]}" images --format '{{.Size}}' "$image")"

# 4. What must hold of it.
container=$("${builder[@]}" from --pull-never "$image")
inside() { "${builder[@]}" run "$@"; }
[ "$(inside "$container" -- id -un)" = horoyolo ] || fail "the image does not run as horoyolo but as $(inside "$container" -- id -un)"
root=$("${builder[@]}" mount "$container")
left=$(cd "$root" && find . -xdev \( -path './etc/apt/sources.list*' -type f -o -path ./etc/apt/apt.conf -o -path ./etc/pip.conf -o -path ./run/wheels \
    -o -path ./run/ca.crt -o -name 'ssh_host_*_key*' -o -name 'id_rsa*' -o -name 'id_ed25519*' -o -path './usr/bin/g++*' \))
[ -z "$left" ] || fail "this should not be in the image: $left"
if [ -n "$out" ]; then
    "${builder[@]}" push -q "$image" "docker-archive:$work/image.tar:horoyolo:$kind"
    mv "$work/image.tar" "$out"
    step "$out: $(du -h "$out" | cut -f 1)"
fi
[ -n "$test" ] || exit 0

# 5. Two workers in one container.
entry=/etc/horoyolo/entrypoint.sh
training=(train --data runs/data/data.yaml --cfg yolov5n --img 64 --batch 8 --epochs 1 --device cpu --workers 0 --project runs)
check_run() {   # name of the run; its folder is written by the user of the image
    [ -s "$runs/$1/weights/last.pt" ] || fail "no weights in the run folder"
    [ "$(tail -n 1 "$runs/$1/steps.csv" | awk -F , '{print $NF}')" = 2 ] || fail "the run had not two workers: $(tail -n 1 "$runs/$1/steps.csv")"
    [ "$(stat -c %u "$runs/$1/weights/last.pt")" = 1000 ] || fail "the weights belong to $(stat -c %U "$runs/$1/weights/last.pt")"
}
runs=$work/runs keys=$work/keys
install -d -o 1000 -g 1000 "$runs"
install -d -o 1000 -g 1000 -m 700 "$keys"
step "two workers in one container"
inside -v "$runs:/home/horoyolo/runs" "$container" -- "$entry" horoyolo data synth --out runs/data --images 20
# Horovod crashes at its start where the name of its own host does not resolve. Docker sees to that; chroot isolation does not.
inside --hostname localhost -v "$runs:/home/horoyolo/runs" "$container" -- "$entry" horoyolo launch -np 2 -- "${training[@]}" --name one-container
check_run one-container

# 6. As in compose.yaml: a launcher and two workers, each with its own network and name, and the job's key in a volume.
inside -v "$keys:/home/horoyolo/.ssh" "$container" -- "$entry" keys
subnet=10.213.77
printf '127.0.0.1 localhost\n%s.1 launcher\n%s.2 worker-1\n%s.3 worker-2\n' "$subnet" "$subnet" "$subnet" >"$work/hosts"
declare -A holder   # process id that keeps a host's network namespace
host_up() {   # name, last number of its address
    unshare --net sleep infinity &
    holder[$1]=$!
    until [ "$(readlink "/proc/${holder[$1]}/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    on "$1" ip link set lo up
    if [ "$1" = launcher ]; then
        on launcher ip link add eth0 type bridge   # its own interface is the switch
    else
        on launcher ip link add "$1" type veth peer name eth0 netns "${holder[$1]}"
        on launcher ip link set "$1" master eth0 up
    fi
    on "$1" ip address add "$subnet.$2/24" dev eth0
    on "$1" ip link set eth0 up
}
on() { nsenter --net="/proc/${holder[$1]}/ns/net" -- "${@:2}"; }
in_container() {   # host, words for the entry point
    local own
    own=$("${builder[@]}" from --pull-never "$image")
    on "$1" "${builder[@]}" run --no-hosts --hostname "$1" -v "$runs:/home/horoyolo/runs" -v "$keys:/home/horoyolo/.ssh:ro" -v "$work/hosts:/etc/hosts:ro" \
        "$own" -- "$entry" "${@:2}"
}
step "a launcher and two workers, over ssh"
number=1
for name in launcher worker-1 worker-2; do
    host_up "$name" "$number"
    number=$((number + 1))
    if [ "$name" != launcher ]; then in_container "$name" worker >"$work/$name.log" 2>&1 & fi
done
for name in worker-1 worker-2; do
    for _ in $(seq 100); do
        if on launcher bash -c "</dev/tcp/$subnet.$((${name#worker-} + 1))/2222" 2>/dev/null; then continue 2; fi
        sleep 0.1
    done
    fail "no sshd on $name: $(tail -n 3 "$work/$name.log")"
done
in_container launcher horoyolo launch --hosts worker-1:1,worker-2:1 -np 2 --nic eth0 -- "${training[@]}" --name three-containers
check_run three-containers
step "passed"

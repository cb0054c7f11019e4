#!/usr/bin/env bash
# 16 workers on 4 hosts, gpu1:4,gpu2:4,gpu3:4,gpu4:4, by horovodrun.
# Written by `horoyolo launch --script`; runs by itself. `horoyolo launch` does the same, and besides passes on signals, returns the
# workers' own exit status (horovodrun and mpirun have but one for every failure) and leaves no worker behind.
set -euo pipefail

# horovodrun has the other hosts enter the folder it is started in, by a shell, unquoted: / needs no quotes.
cd /

environment=(
    # gradients come in large buckets already: fusing them would be one copy more
    HOROVOD_FUSION_THRESHOLD=0
    # how long workers wait for the one that starts last
    HOROVOD_GLOO_TIMEOUT_SECONDS=120
    # keep freed memory instead of getting it anew from the kernel at each step
    MALLOC_ARENA_MAX=1
    MALLOC_MMAP_THRESHOLD_=1073741824
    MALLOC_TOP_PAD_=67108864
    MALLOC_TRIM_THRESHOLD_=4294967296
    NCCL_DEBUG=WARN
    # a worker that waits gives its core to those that compute
    OMPI_MCA_mpi_yield_when_idle=1
    # programs of the same Python first, and before them an ssh that notices dead hosts
    PATH=/opt/horoyolo/launch/bin:/opt/horoyolo/bin:/usr/local/bin:/usr/bin:/bin
)
# horovodrun shows all of its environment on ssh's command line; of this shell's it gets no more than ssh needs.
for name in SSH_AUTH_SOCK; do
    [ -z "${!name+set}" ] || environment+=("$name=${!name}")
done

command=(
    horovodrun
    # workers
    -np 16
    # how many of them each host takes
    -H gpu1:4,gpu2:4,gpu3:4,gpu4:4
    # how workers talk: Gloo, over TCP
    --gloo
    # by which interface; it has the same name on all hosts
    --network-interfaces eth0
    # check the hosts anew; what horovodrun noted in the last hour may be wrong by now
    --disable-cache
    # what horovodrun would not hand on as it is
    env
    # where workers run
    -C /home/ann/blood
    # what each of them runs
    /opt/horoyolo/bin/python -m horoyolo train
    --data data/blood.yaml
    --cfg yolov5s
    --batch 128
    --epochs 100
    --sync-bn
)

exec env -i "${environment[@]}" "${command[@]}"

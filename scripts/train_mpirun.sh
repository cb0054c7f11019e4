#!/usr/bin/env bash
# 16 workers on 4 hosts, gpu1:4,gpu2:4,gpu3:4,gpu4:4, by mpirun.
# Written by `horoyolo launch --script`; runs by itself. `horoyolo launch` does the same, and besides passes on signals, returns the
# workers' own exit status (horovodrun and mpirun have but one for every failure) and leaves no worker behind.
set -euo pipefail

cd /home/ann/blood

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
# What the launcher itself needs of this shell's environment; workers get none of it from other hosts.
for name in SSH_AUTH_SOCK HOME USER LOGNAME TMPDIR "${!SLURM_@}"; do
    [ -z "${!name+set}" ] || environment+=("$name=${!name}")
done

command=(
    mpirun
    # workers
    -np 16
    # how many of them each host takes
    -H gpu1:4,gpu2:4,gpu3:4,gpu4:4
    # a worker has several threads: don't bind it to one core
    -bind-to none
    # fill one host after the other
    -map-by slot
    # MPI's own messages over TCP: its InfiniBand transports are known to crash beside NCCL's
    -mca pml ob1
    -mca btl '^openib'
    # log in without questions, and notice a dead host within seconds
    -mca plm_rsh_args '-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=3 -o ServerAliveCountMax=2'
    # by which interface they talk; it has the same name on all hosts
    -mca btl_tcp_if_include eth0
    -mca oob_tcp_if_include eth0
    # variables that workers on other hosts get, and no others
    -x NCCL_SOCKET_IFNAME=eth0
    # where workers run
    -wdir /home/ann/blood
    # variables that workers on other hosts get, and no others
    -x HOROVOD_FUSION_THRESHOLD
    -x HOROVOD_GLOO_TIMEOUT_SECONDS
    -x MALLOC_ARENA_MAX
    -x MALLOC_MMAP_THRESHOLD_
    -x MALLOC_TOP_PAD_
    -x MALLOC_TRIM_THRESHOLD_
    -x NCCL_DEBUG
    -x OMPI_MCA_mpi_yield_when_idle
    -x PATH
    # what each of them runs
    /opt/horoyolo/bin/python -m horoyolo train
    --data data/blood.yaml
    --cfg yolov5s
    --batch 128
    --epochs 100
    --sync-bn
)

exec env -i "${environment[@]}" "${command[@]}"

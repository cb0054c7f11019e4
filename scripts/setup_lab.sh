#!/usr/bin/env bash
# Installs what the lab of tests/lab needs besides scripts/setup.sh: several hosts on one machine, and a real Slurm on them. Safe to run again.
# Where it can't install, it names what is missing and succeeds: the tests that need the lab are then skipped, and say so.
set -euo pipefail

packages=()
need() { command -v "$1" >/dev/null || packages+=("$2"); }   # program, Debian package
PATH=$PATH:/usr/sbin:/sbin
need ip iproute2
need nsenter util-linux
need ssh openssh-client
need sshd openssh-server
need rsync rsync
need slurmctld slurmctld
need slurmd slurmd
need srun slurm-client
[ "${#packages[@]}" -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup_lab: missing for the lab: ${packages[*]}; tests that need them will be skipped" >&2
    echo "setup_lab: to run them, as root: apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 0
fi

# The lab starts its own daemons in its own namespaces; the packages must start none on this machine, now or at the next boot.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"   # 101: action not allowed
    chmod +x "$policy"
fi
echo "setup_lab: installing ${packages[*]}"
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; } || {
    echo "setup_lab: apt-get could not install ${packages[*]}; tests that need them will be skipped" >&2
    exit 0
}
if command -v systemctl >/dev/null; then
    for package in "${packages[@]}"; do
        case $package in
            openssh-server) systemctl disable -q ssh.service ;;
            slurmctld) systemctl disable -q slurmctld.service munge.service ;;
            slurmd) systemctl disable -q slurmd.service ;;
        esac
    done
fi 2>/dev/null || true

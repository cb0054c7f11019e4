#!/bin/bash
# What a container of this image runs:
#   keys         makes the job's key pair in ~/.ssh, unless it is there, and ends
#   worker       an sshd on port 2222 in the foreground, for mpirun and horovodrun
#   COMMAND ...  that command
# The image holds no keys. A job's key is mounted at ~/.ssh (a volume, or the secret that the MPI operator mounts); containers with the
# same key reach each other and nobody else: it is what a launcher shows, what sshd accepts, and the host key of every worker.
set -euo pipefail

state=$HOME/.sshd   # made anew at each start, since ~/.ssh may be read-only and somebody else's

find_key() { find "$HOME/.ssh" -maxdepth 1 \( -name id_ed25519 -o -name id_rsa \) 2>/dev/null | sort | head -n 1; }

prepare_ssh() {   # the file of the job's private key
    install -d -m 700 "$state"
    install -m 600 "$1" "$state/key"
    local public
    public=$(ssh-keygen -y -f "$state/key")
    printf '%s\n' "$public" >"$state/authorized_keys"
    printf '* %s\n' "$public" >"$state/known_hosts"
}

case ${1:-} in
keys)
    if [ -z "$(find_key)" ]; then
        ssh-keygen -q -t ed25519 -N '' -C horoyolo-job -f "$HOME/.ssh/id_ed25519"
    fi
    ;;
worker)
    key=$(find_key)
    if [ -z "$key" ]; then
        echo "worker: no key of a job in $HOME/.ssh (id_ed25519 or id_rsa): mount one there; 'keys' as the command makes one" >&2
        exit 2
    fi
    prepare_ssh "$key"
    exec /usr/sbin/sshd -D -e -f /etc/horoyolo/sshd_config -h "$state/key"
    ;;
*)
    key=$(find_key)
    if [ -n "$key" ]; then prepare_ssh "$key"; fi
    exec "$@"
    ;;
esac

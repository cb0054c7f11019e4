#!/usr/bin/env bash
# Several hosts on this machine, to try a cluster without one. Needs root; scripts/setup_lab.sh installs what it needs.
#   scripts/lab.sh up 3                      three hosts: node1, node2, node3, each with its own network, processes and sshd
#   scripts/lab.sh exec node1 CMD...         run a program on a host; from there ssh node2 works
#   scripts/lab.sh shape node2 200mbit       slow link (unshape);  cut node3 (heal): host gone;  status;  slurm up;  down
set -euo pipefail
lab=$(dirname "$0")/../tests/lab/labctl.py
python=$(dirname "$0")/../.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$lab" "$@"

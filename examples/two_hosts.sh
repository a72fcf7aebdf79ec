#!/bin/sh
# Train one model on two hosts: run this on both, with the number of the host and the address of the first one.
#
#   sh examples/two_hosts.sh 0 192.0.2.1 runs/two     # on the first host, which has the address 192.0.2.1
#   sh examples/two_hosts.sh 1 192.0.2.1 runs/two     # on the second host
#
# Each host starts one rank. The folder must be on storage that both hosts share.
set -eu
exec torchrun --nnodes 2 --nproc-per-node 1 --node-rank "$1" --master-addr "$2" --master-port "${MASTER_PORT:-29500}" \
  "$(dirname "$0")/own_loop.py" "$3"

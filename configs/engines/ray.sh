#!/bin/bash
# One dataset on a Ray cluster:   bash configs/engines/ray.sh
#
# An actor per GPU (per core where the cluster has no GPU), as long as there is work. Nodes may come and go: a new one
# gets actors within seconds, the units of a lost one go to others. Every node needs this package
# (pip install 'builder[ray]') and must see OUT, the checkpoint and the real crops under the same paths.
#
# The cluster, where there is none yet:
#   first machine:  ray start --head --port=6379
#   each other one: ray start --address=FIRST:6379
# On SLURM: start those two commands by srun on the machines of an allocation (see Ray's documentation), or use
# configs/engines/slurm-array.sh, which needs no cluster.

set -euo pipefail
: "${ADDRESS:=auto}"                # auto: the cluster that this machine belongs to; else HOST:PORT of the head
: "${OUT:=$PWD}"
: "${COUNT:=100000}"
: "${CONFIG:=sdxl-full}"
: "${NAME:=ray}"

# --workers N would use at most N devices of the cluster.
builder shards --config "$CONFIG" --count "$COUNT" --name "$NAME" --out "$OUT" --engine ray --address "$ADDRESS"

# Meanwhile, from any machine that sees OUT:  builder status "$NAME" --out "$OUT"

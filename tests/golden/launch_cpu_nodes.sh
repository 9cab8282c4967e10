#!/bin/sh
# smollm2-135m: 3 cpu rank(s) on 3 nodes, written by qdist
# node 0, node0: rank 0
# node 1, node1: rank 1
# node 2, node2: rank 2
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
# A node starts its own ranks only, once it has met the others.
cat >&2 <<END
This run is on 3 nodes. Start it from one of them, over ssh,
  qdist launch --resume --run "$run" --hosts hosts.toml
or on each with the run's token in QDIST_TOKEN, or in a file that QDIST_TOKEN_FILE names, R from 0,
  qdist launch --resume --run "$run" --nnodes 3 --node-rank R --rendezvous FIRST_NODE:29400
END
exit 2

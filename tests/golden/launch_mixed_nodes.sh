#!/bin/sh
# llama-7b: 4 cuda rank(s) on 2 nodes, written by qdist
# node 0, node0: ranks 0 to 2 on GPUs 0 to 2
# node 1, node1: rank 3 on GPU 0
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
# A node starts its own ranks only, once it has met the others.
cat >&2 <<END
This run is on 2 nodes. Start it from one of them, over ssh,
  qdist launch --resume --run "$run" --hosts hosts.toml
or on each with the run's token in QDIST_TOKEN, or in a file that QDIST_TOKEN_FILE names, R from 0,
  qdist launch --resume --run "$run" --nnodes 2 --node-rank R --rendezvous FIRST_NODE:29400
END
exit 2

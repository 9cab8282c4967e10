#!/bin/sh
# smollm2-135m: 2 cpu rank(s), written by qdist
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
export OMP_NUM_THREADS=4
export TOKENIZERS_PARALLELISM=false
export DS_ACCELERATOR=cpu
export CUDA_VISIBLE_DEVICES=''
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}"
exec '/opt/my venv/bin/python' -m torch.distributed.run --standalone --nproc-per-node 2 \
  -m qdist.runtime.worker "$run" --digest DIGEST

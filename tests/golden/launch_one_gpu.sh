#!/bin/sh
# llama-7b: 1 cuda rank(s), written by qdist
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
export OMP_NUM_THREADS=8
export TOKENIZERS_PARALLELISM=false
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export PYTORCH_ALLOC_CONF=expandable_segments:True
exec '/opt/my venv/bin/python' -m torch.distributed.run --standalone --nproc-per-node 1 \
  -m qdist.runtime.worker "$run" --digest DIGEST

#!/bin/sh
# llama-7b: 1 cuda rank(s), written by qdist
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
# What other launchers say of ranks, in the shell that this is started from, is not of this run.
unset $(env | sed -nE 's/^((PET|TORCHELASTIC|TORCH_ELASTIC|ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|OMPI|PMI|PMIX|MV2|MPI)_[A-Za-z0-9_]*|RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|NODE_RANK|CROSS_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|LOCAL_SIZE|CROSS_SIZE|ROLE_NAME|MASTER_ADDR|MASTER_PORT|FORK_LAUNCHED|NPROC|PYTHONINSPECT)=.*/\1/p')
export QDIST_AGENT=$$
export OMP_NUM_THREADS=8
export TOKENIZERS_PARALLELISM=false
export PYTHONSAFEPATH=1
export CUDA_DEVICE_ORDER=PCI_BUS_ID
export PYTORCH_ALLOC_CONF=expandable_segments:True
exec '/opt/my venv/bin/python' -P -m qdist.host.launch.agent 1 "$run" --digest DIGEST

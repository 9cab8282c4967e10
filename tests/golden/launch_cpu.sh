#!/bin/sh
# smollm2-135m: 2 cpu rank(s), written by qdist
run=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
# What other launchers say of ranks, in the shell that this is started from, is not of this run.
unset $(env | sed -nE 's/^((PET|TORCHELASTIC|TORCH_ELASTIC|ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG|OMPI|PMI|PMIX|MV2|MPI)_[A-Za-z0-9_]*|RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|NODE_RANK|CROSS_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|LOCAL_SIZE|CROSS_SIZE|ROLE_NAME|MASTER_ADDR|MASTER_PORT|FORK_LAUNCHED|NPROC|PYTHONINSPECT)=.*/\1/p')
export QDIST_AGENT=$$
export OMP_NUM_THREADS=4
export TOKENIZERS_PARALLELISM=false
export PYTHONSAFEPATH=1
export DS_ACCELERATOR=cpu
export CUDA_VISIBLE_DEVICES=''
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.tcache_count=0}"
exec '/opt/my venv/bin/python' -P -m qdist.host.launch.agent 2 "$run" --digest DIGEST

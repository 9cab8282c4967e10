#!/bin/bash
#SBATCH --job-name=mine
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --constraint=a100
#SBATCH --no-kill
#SBATCH --output=mine-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Only this script hears of the time limit, early enough for a checkpoint.
#SBATCH --signal=B:TERM@120
module load cuda
set -u
run=/data/runs/mine
start=(/home/me/mine.toml --gpus=1 --steps=100 '--set=lora.targets=q_proj,v_proj')
# Nodes that join must know the token. It is in the environment alone, where command lines do not show it.
QDIST_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export QDIST_TOKEN
unset QDIST_TOKEN_FILE

saved() { find "$run/checkpoints" -path '*/step_*/DONE' 2>/dev/null | sort; }

# A job that starts again under its number goes on with its run.
if [ -e "$run/plan.json" ]; then start=(--resume); fi
before=$(saved)

stopping=
srun --export=ALL --ntasks-per-node=1 --cpus-per-task=64 --no-kill --kill-on-bad-exit=0 --wait=0 \
  '/opt/my venv/bin/python' -P -m qdist launch "${start[@]}" --run "$run" --nnodes 2:4 &
step=$!
# Without a run directory there is nothing to save.
trap 'stopping=1; touch "$run/stop" || kill "$step"' TERM
wait "$step"
code=$?
if [ -n "$stopping" ] && [ "$code" -gt 128 ]; then
  wait "$step"
  code=$?
fi

# A run that has saved nothing since the last start would be started for ever.
if [ -n "$stopping" ] && [ ! -e "$run/result.json" ] && [ "$(saved)" != "$before" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

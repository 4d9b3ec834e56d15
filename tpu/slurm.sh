#!/usr/bin/env bash
# A run of jaxdyn on a SLURM cluster's GPUs, one task for each GPU:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 tpu/slurm.sh rl --preset quickstart \
#       --output /shared/runs/first
#
# jax.distributed finds its coordinator and its processes from SLURM, and process i of a node takes
# the node's GPU i: every task must see all of them, hence no binding. When time runs out, the
# processes get SIGTERM, save, and the job is queued again under its id; the same command goes on
# from the newest checkpoint.
#SBATCH --job-name=jaxdyn
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpu-bind=none
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@180
set -euo pipefail

if (($# == 0)) || [[ $1 == -* ]]; then
  echo "slurm.sh: wanted a command of jaxdyn: sbatch tpu/slurm.sh rl --output DIRECTORY" >&2
  exit 2
fi
for program in srun "${JAXDYN:=jaxdyn}"; do # JAXDYN: where it is, when not on PATH
  command -v "$program" >/dev/null || { echo "slurm.sh: no $program on PATH" >&2 && exit 2; }
done

requeue() {
  trap '' USR1
  scancel --signal=TERM "$SLURM_JOB_ID" # the tasks, not this script
  wait "$tasks" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1

export JAXDYN_DISTRIBUTED=${JAXDYN_DISTRIBUTED:-auto} PYTHONFAULTHANDLER=1
# One task that ends badly ends them all: the others would wait for it for ever.
srun --kill-on-bad-exit=1 --output="${SLURM_JOB_NAME:-jaxdyn}-$SLURM_JOB_ID-%t.log" \
  --open-mode=append "$JAXDYN" "$@" &
tasks=$!
wait "$tasks"

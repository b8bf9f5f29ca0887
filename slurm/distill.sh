#!/usr/bin/env bash
# Score mined pairs on Slurm:  sbatch --array=0-7 slurm/distill.sh --config configs/distill.yaml teacher=... data=... scores=...
# An array of jobs of one GPU each, which share a cache and need not know of each other: any of them may be cancelled and
# started again, also while a fine-tuning waits for the scores. For the rest see slurm/pretrain.sh.
#SBATCH --array=0-7
#SBATCH --job-name=quintet-distill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# exec: Slurm signals this process, which the other script then is.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" distill "$@"

#!/usr/bin/env bash
# Evaluate on Slurm:  sbatch slurm/evaluate.sh model=... data=... output=... precision=bf16
# One GPU. For the rest see slurm/pretrain.sh.
#SBATCH --job-name=quintet-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# exec: Slurm signals this process, which the other script then is.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" evaluate "$@"

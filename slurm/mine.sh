#!/usr/bin/env bash
# Mine hard negatives on Slurm:  sbatch slurm/mine.sh --config configs/mine.yaml model=... data=... output=...
# A job that ends too early goes on at its next start where it stopped. For the rest see slurm/pretrain.sh.
#SBATCH --job-name=quintet-mine
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# exec: Slurm signals this process, which the other script then is.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" mine "$@"

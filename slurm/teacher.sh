#!/usr/bin/env bash
# Train a teacher on Slurm:  sbatch slurm/teacher.sh --config configs/teacher.yaml data=... run_dir=...
# For the rest see slurm/pretrain.sh.
#SBATCH --job-name=quintet-teacher
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

# exec: Slurm signals this process, which the other script then is.
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" teacher "$@"

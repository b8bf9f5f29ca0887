#!/usr/bin/env bash
# Fine-tune on Slurm:  sbatch slurm/finetune.sh --config configs/finetune/small.yaml scores=... run_dir=...
# For the rest see slurm/pretrain.sh.
#SBATCH --job-name=quintet-finetune
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
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" finetune "$@"

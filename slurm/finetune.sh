#!/usr/bin/env bash
# Fine-tune on Slurm:  sbatch slurm/finetune.sh --config configs/finetune/small.yaml scores=... run_dir=...
# Everything that slurm/pretrain.sh says and does, for the other stage; submit it from the checkout.
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

# exec: Slurm's warning goes to this process, which the other script then is.
QUINTET_STAGE=finetune exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/pretrain.sh" "$@"

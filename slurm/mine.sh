#!/usr/bin/env bash
# Mine hard negatives on Slurm:  sbatch slurm/mine.sh --config configs/mine.yaml model=... data=... output=...
# Everything that slurm/pretrain.sh says and does, for the other stage; submit it from the checkout.
#SBATCH --job-name=quintet-mine
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

# exec: Slurm's signals go to this process, which the other script then is.
QUINTET_STAGE=mine exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/pretrain.sh" "$@"

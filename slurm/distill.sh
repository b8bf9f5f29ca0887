#!/usr/bin/env bash
# Score mined pairs on Slurm:  sbatch slurm/distill.sh teacher=... data=... scores=... precision=bf16
# One worker a GPU; several such jobs share one cache, and each may be cancelled and started again at any time. For the
# rest see slurm/pretrain.sh; submit it from the checkout.
#SBATCH --job-name=quintet-distill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

# exec: Slurm's warning goes to this process, which the other script then is.
QUINTET_STAGE=distill exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/pretrain.sh" "$@"

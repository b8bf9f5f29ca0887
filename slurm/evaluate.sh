#!/usr/bin/env bash
# Evaluate on Slurm:  sbatch slurm/evaluate.sh model=... data=... output=... precision=bf16
# One GPU. All ranks share the texts of a larger evaluation, which goes on where it stopped:
#   sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh model=... tasks=[beir,miracl] output=... precision=bf16
# For the rest see slurm/pretrain.sh.
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

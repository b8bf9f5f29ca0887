#!/usr/bin/env bash
# Pre-train on Slurm:  sbatch slurm/pretrain.sh --config configs/pretrain/small.yaml data=... run_dir=...
# Submit it from the checkout. Options of sbatch given before the script win over those below, as --nodes=4 or
# --time=8:00:00; account and partition go there, or into SBATCH_ACCOUNT and SBATCH_PARTITION. One task a GPU.
# With --dry-run at the end of the line it says what each node would run; `bash slurm/pretrain.sh --dry-run` says it at once.
#SBATCH --job-name=quintet-pretrain
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
exec bash "${SLURM_SUBMIT_DIR:-.}/slurm/stage.sh" pretrain "$@"

#!/usr/bin/env bash
# Pre-train on Slurm:  sbatch slurm/pretrain.sh --config configs/pretrain/small.yaml data=... run_dir=...
# Options of sbatch given on its command line win over the ones below; account and partition go there or into
# SBATCH_ACCOUNT and SBATCH_PARTITION. Modules and variables of a site go into slurm/site.env.
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

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
stage=${QUINTET_STAGE:-pretrain} # slurm/finetune.sh is this script with another one

# Every rank meets at the first node: by its name, or by its address where the name does not resolve.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
if ! getent hosts "$first_node" >/dev/null; then
    first_node=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR="$first_node" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" OMP_WAIT_POLICY=PASSIVE
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch by itself

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
    "$SLURM_NTASKS ranks, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), quintet $stage $*"

# In the background, because bash runs a trap only between commands. Slurm warns this script alone (B: above), so the
# script tells the ranks; a signal also ends `wait` too early, which then has to wait again.
srun --kill-on-bad-exit=1 quintet "$stage" "$@" &
step=$!
trap 'signalled=1; kill -USR1 "$step" 2>/dev/null || true' USR1
trap 'signalled=1; kill -TERM "$step" 2>/dev/null || true' TERM INT
signalled=1 code=0
while [ -n "$signalled" ]; do
    signalled=
    wait "$step" && code=0 || code=$?
done

# 75 says: stopped after a complete checkpoint, start me again. Nothing else is worth a second start.
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"

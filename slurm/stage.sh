#!/usr/bin/env bash
# What the other scripts here run once Slurm has started them: one stage of Quintet on all tasks of the job.
#
#   bash slurm/stage.sh STAGE [--dry-run] [--config FILE] [key=value ...]
#
# A job that was warned of its end and has left a complete checkpoint (exit code 75), or that has lost a node, is put back
# into the queue, at most QUINTET_MAX_RESTARTS times. With --dry-run it only says what each node would run, inside a job
# or outside. Modules, interfaces and the like go into slurm/site.env: see slurm/site.env.example.
set -euo pipefail
stage=$1
shift

cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
max_restarts=${QUINTET_MAX_RESTARTS:-100}
read -ra srun_options <<<"${QUINTET_SRUN_OPTIONS:-}"

dry_run='' arguments=()
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then dry_run=1; else arguments+=("$argument"); fi
done

# header KEY: what the stage's own script asks Slurm for
header() { sed -n "s/^#SBATCH --$1=//p" "slurm/$stage.sh"; }

if [ -n "$dry_run" ] && [ -z "${SLURM_JOB_ID:-}" ]; then
    SLURM_JOB_ID=0 SLURM_JOB_NUM_NODES=$(header nodes) SLURM_CPUS_PER_TASK=$(header cpus-per-task)
    SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * $(header ntasks-per-node)))
    nodes=$(seq --format='node%g' "$SLURM_JOB_NUM_NODES")
elif [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "slurm/$stage.sh: not inside a Slurm job; submit it with sbatch, or say what it would run with --dry-run" >&2
    exit 2
else
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
fi

# Every rank meets at the first node: by its name, or by its address where the name does not resolve.
first_node=${nodes%%$'\n'*}
if [ "$SLURM_JOB_ID" != 0 ] && ! getent hosts "$first_node" >/dev/null; then
    first_node=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
fi
export MASTER_ADDR="$first_node" MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it over from sbatch by itself
command=(srun --kill-on-bad-exit=1 "${srun_options[@]}" quintet "$stage" "${arguments[@]}")

if [ -n "$dry_run" ]; then
    printf 'job: %s tasks on %s nodes, MASTER_ADDR=%s MASTER_PORT=%s\n' \
        "$SLURM_NTASKS" "$SLURM_JOB_NUM_NODES" "$MASTER_ADDR" "$MASTER_PORT"
    while read -r node; do
        printf '%s: %s x OMP_NUM_THREADS=%s' "$node" $((SLURM_NTASKS / SLURM_JOB_NUM_NODES)) "$OMP_NUM_THREADS"
        printf ' %q' "${command[@]:2}"
        printf '\n'
    done <<<"$nodes"
    exit
fi

restarts=${SLURM_RESTART_COUNT:-0}
echo "job $SLURM_JOB_ID, start $((restarts + 1)): $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST)," \
    "$SLURM_NTASKS ranks, commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), quintet $stage ${arguments[*]}"

# In the background, because bash runs a trap only between commands. Slurm warns this script alone (--signal=B:), so the
# script tells the ranks; a signal also ends `wait` too early, which then has to wait again.
"${command[@]}" &
step=$!
trap 'signalled=1; kill -USR1 "$step" 2>/dev/null || true' USR1
# TERM is Slurm's, of a job that is cancelled, or preempted: whether it comes again is Slurm's to say.
trap 'signalled=1 ended=1; kill -TERM "$step" 2>/dev/null || true' TERM INT
signalled=1 ended='' code=0
while [ -n "$signalled" ]; do
    signalled=
    wait "$step" && code=0 || code=$?
done

# requeue WHY: put this job back into the queue, unless it was there too often
requeue() {
    if ((restarts < max_restarts)); then
        echo "job $SLURM_JOB_ID: $1, requeued (restart $((restarts + 1)) of $max_restarts)"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "job $SLURM_JOB_ID: $1 after $restarts restarts, the most that QUINTET_MAX_RESTARTS allows;" \
            "submit it again to go on" >&2
    fi
}

# can_start NODE: whether a step of this job starts there
can_start() { timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" true </dev/null >/dev/null 2>&1; }

# The nodes on which nothing starts any more; Slurm itself notices minutes later. This script runs on the first: where not
# even that one answers, the question was wrong, not the node.
lost_nodes() {
    local node
    while read -r node; do
        can_start "$node" || printf '%s ' "$node"
    done < <(can_start "${nodes%%$'\n'*}" && echo "$nodes")
}

# 75 says: stopped after a complete checkpoint, start me again. So does a lost node, whose ranks end the others with an
# error. Nothing else is worth a second start.
if [ -z "$ended" ]; then
    case $code in
        75) requeue "stopped with a checkpoint" ;;
        0 | 2 | 3 | 4) ;;
        *)
            lost=$(lost_nodes)
            if [ -n "$lost" ]; then requeue "lost ${lost% }"; fi
            ;;
    esac
fi
exit "$code"

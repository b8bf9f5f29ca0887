#!/usr/bin/env bash
# The whole recipe on Slurm, from shards to an evaluated model: submits one job a stage, each after the one before it
# has succeeded, and prints their numbers.
#
#   bash slurm/pipeline.sh RUNS --size small --pairs SHARDS --labelled SHARDS [options]
#
#   RUNS               a folder that all nodes see: every output is in it
#   --size NAME        configs/pretrain/NAME.yaml and configs/finetune/NAME.yaml
#   --pairs DATA       weakly supervised pairs, packed
#   --labelled DATA    labelled pairs, packed
#   --teacher MODEL    a re-ranker; without it one is trained on the mined pairs, with configs/teacher.yaml
#   --workers N        distillation workers of one GPU each; 8 unless given
#   --evaluate DATA    what the models are scored on: JSONL files, BEIR folders
#   --sbatch OPTION    for every job, as --sbatch --account=mine; may be repeated
#   --dry-run          print the sbatch lines only
#
# pretrain -> filter -> pretrain on what is kept -> mine -> [teacher] -> distill -> finetune -> evaluate. A job that ends
# with an error leaves those after it pending (DependencyNeverSatisfied): mend it, submit its line again, and the rest
# with the new number; every stage goes on where it stopped.
set -euo pipefail

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d' >&2
    exit 2
}
fail() {
    echo "pipeline.sh: $1" >&2
    exit 2
}

runs='' size='' pairs='' labelled='' teacher='' evaluate='' workers=8 dry_run='' options=()
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry_run=1 ;;
        --size | --pairs | --labelled | --teacher | --workers | --evaluate | --sbatch)
            [ $# -gt 1 ] || fail "$1: a value must follow"
            if [ "$1" = --sbatch ]; then options+=("$2"); else printf -v "${1#--}" %s "$2"; fi
            shift
            ;;
        -*) fail "$1: not an option; bash slurm/pipeline.sh without anything lists them" ;;
        *)
            [ -z "$runs" ] || fail "$1: RUNS is $runs already"
            runs=$1
            ;;
    esac
    shift
done
[ -n "$runs" ] || usage
for required in size pairs labelled; do
    [ -n "${!required}" ] || fail "--$required must be given; bash slurm/pipeline.sh without anything says what it is"
done
[[ $workers =~ ^[1-9][0-9]*$ ]] || fail "--workers $workers: must be a number above 0"
cd "$(dirname "$0")/.."
for recipe in "configs/pretrain/$size.yaml" "configs/finetune/$size.yaml"; do
    [ -f "$recipe" ] || fail "--size $size: there is no $recipe"
done
# shellcheck source=/dev/null
if [ -f slurm/site.env ]; then . slurm/site.env; fi

# submit NAME AFTER SCRIPT [argument ...]: sets job_NAME; AFTER is a list of numbers, or empty
submit() {
    local name=$1 after=$2 number command
    command=(sbatch --parsable "--job-name=quintet-$name" ${after:+"--dependency=afterok:$after"} "${options[@]}")
    [ "$3" != distill ] || command+=("--array=0-$((workers - 1))")
    command+=("slurm/$3.sh" "${@:4}")
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        printf '\n'
        number="<$name>"
    else
        number=$("${command[@]}")
        number=${number%%;*} # on a federated cluster its name follows
        printf '%-12s job %s\n' "$name" "$number"
    fi
    printf -v "job_$name" %s "$number"
}

job_pretrain='' job_filter='' job_again='' job_mine='' job_teacher='' job_distill='' job_finetune=''
pretrain=(--config "configs/pretrain/$size.yaml") finetune=(--config "configs/finetune/$size.yaml")
submit pretrain '' pretrain "${pretrain[@]}" "data=$pairs" "run_dir=$runs/pretrained"
submit filter "$job_pretrain" filter --config configs/filter.yaml "model=$runs/pretrained" "data=$pairs" "output=$runs/kept"
submit again "$job_filter" pretrain "${pretrain[@]}" "data=$runs/kept" "run_dir=$runs/filtered"
submit mine "$job_again" mine --config configs/mine.yaml "model=$runs/filtered" "data=$labelled" "output=$runs/mined"
before_distill=$job_mine
if [ -z "$teacher" ]; then
    teacher=$runs/teacher/model
    submit teacher "$job_mine" teacher --config configs/teacher.yaml "data=$runs/mined" "run_dir=$runs/teacher"
    before_distill=$job_teacher
fi
submit distill "$before_distill" distill --config configs/distill.yaml "teacher=$teacher" "data=$runs/mined" "scores=$runs/scores"
submit finetune "$job_distill" finetune "${finetune[@]}" "model.path=$runs/filtered/model" "data=$runs/mined" \
    "scores=$runs/scores" "run_dir=$runs/finetuned"
if [ -n "$evaluate" ]; then
    submit evaluate "$job_finetune" evaluate "model=$runs/finetuned" "data=$evaluate" "output=$runs/evaluated" precision=bf16
fi

#!/usr/bin/env bash
# The whole recipe on real text, for two CPU cores: collect, pretrain, filter, pretrain on what was kept, mine, train a
# teacher, distill, finetune without and with the teacher, and a table after every training. Everything lands in
# demo-full/. A second start goes on where the first one stopped; remove the folder to start over.
#
# NOT YET RUN AS A WHOLE: its stages from filter on, its time and its table are unmeasured, so there is no make target.
#
#   PATH="$PWD/.venv/bin:$PATH" bash demo-full.sh
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" WANDB_MODE="${WANDB_MODE:-disabled}"
both_cores=2
configs=configs/full out=demo-full
models=()  # those scored so far, in order, as NAME=results.json

title() { printf '\n== %s (%d min %02d s since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# run STAGE FILE [key=value ...]: one command in one process on both cores, unless the file is there already
run() {
    [ -e "$2" ] || OMP_NUM_THREADS=$both_cores quintet "${1%%-*}" --config "$configs/$1.yaml" "${@:3}"
}

# train STAGE FOLDER [key=value ...]: two DeepSpeed ranks; a run that is there goes on, a finished one says so
train() {
    [ -e "$2/model/config.json" ] || deepspeed --num_accelerators 2 --no_python --no_local_rank \
        quintet "${1%%-*}" --config "$configs/$1.yaml" run_dir="$2" "${@:3}"
}

# score NAME MODEL [key=value ...]: held-out nDCG@10 by source of all models so far
score() {
    run evaluate "$out/scores/$1/results.json" model="$2" output="$out/scores/$1" "${@:3}" >/dev/null
    models+=("$1=$out/scores/$1/results.json")
    python benchmarks/compare.py --by-source "${models[@]}"
}

title 'collect: real pairs out of wheels, a reference model, and a student cut out of it'
run collect $out/pairs/SOURCES.json
run collect-reference $out/e5-small
run collect-student $out/student
run collect-teacher $out/teacher-start
title 'pack: shards in the student'"'"'s tokens, and held-out pairs'
run pack $out/shards/index.json
title 'evaluate: the student untrained, BM25, and the reference'
score untrained $out/student
score multilingual-e5-small $out/e5-small bm25=false
title 'pretrain: two DeepSpeed ranks, one pool of negatives over both'
train pretrain $out/pretrained
score pretrained $out/pretrained bm25=false
title 'filter: pairs whose own passage is found among random ones'
run filter $out/kept/index.json
title 'pretrain: on what was kept'
train pretrain-kept $out/filtered
score filtered $out/filtered bm25=false
title 'mine: hard negatives'
run mine $out/mined/index.json
title 'teacher: a cross-encoder, from the reference'
train teacher $out/teacher
title 'distill: its scores of every mined pair'
OMP_NUM_THREADS=$both_cores quintet distill --config $configs/distill.yaml  # what has a score is not scored again
title 'finetune: on hard negatives, without the teacher, and with it'
train finetune $out/finetuned-alone scores= missing_scores=contrastive
score finetuned-alone $out/finetuned-alone bm25=false
train finetune $out/finetuned
score finetuned $out/finetuned bm25=false
title 'done: demo-full/finetuned/model opens in sentence-transformers'

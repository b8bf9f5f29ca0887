#!/usr/bin/env bash
# The whole recipe on real text, for two CPU cores: collect, pretrain, filter, pretrain on what was kept, mine, train a
# teacher, distill, finetune without and with the teacher, and a table after every training. Everything lands in
# demo-full/. A second start goes on where the first one stopped; remove the folder to start over.
#
#   bash demo-full.sh        as `make demo-full` calls it
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" WANDB_MODE="${WANDB_MODE:-disabled}"
configs=configs/full out=demo-full
# bf16 is several times faster on a processor with AMX, and slower than fp32 on one without any bf16.
if grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then precision=bf16; else precision=fp32; fi
models=()  # those scored so far, in order, as NAME=results.json

title() { printf '\n== %s (%d min %02d s since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# run STAGE FILE [key=value ...]: one command, unless the file is there already
run() { [ -e "$2" ] || quintet "${1%%-*}" --config "$configs/$1.yaml" "${@:3}"; }

# train STAGE FOLDER [key=value ...]: a run that is there goes on
train() { run "$1" "$2/model/config.json" run_dir="$2" precision=$precision "${@:3}"; }

# score NAME MODEL [key=value ...]: held-out nDCG@10 by source of all models so far
score() {
    local folder="$out/tables/$1"
    run evaluate "$folder/results.json" model="$2" output="$folder" precision=$precision bm25=false "${@:3}" >/dev/null
    models+=("$1=$folder/results.json")
    python benchmarks/compare.py --by-source "${models[@]}"
}

title 'collect: real pairs out of wheels, a reference model, and a student cut out of it'
run collect $out/pairs/SOURCES.json
run collect-reference $out/e5-small/config.json
run collect-student $out/student/config.json
run collect-guide $out/guide/config.json
title "pack: shards in the student's tokens, and held-out pairs"
run pack $out/shards/index.json
title 'evaluate: the student untrained, BM25, and the reference'
score untrained $out/student bm25=true
score multilingual-e5-small $out/e5-small
title 'pretrain: contrast in the batch, and the embeddings of the reference'
train pretrain $out/pretrained
score pretrained $out/pretrained
title 'filter: pairs whose own passage is found among random ones'
run filter $out/kept/index.json precision=$precision
title 'pretrain: on what was kept'
train pretrain-kept $out/filtered
score filtered $out/filtered
title 'mine: hard negatives'
run mine $out/mined/index.json precision=$precision
title 'teacher: a cross-encoder, from the reference'
train teacher $out/teacher
title 'distill: its scores of every mined pair'
quintet distill --config $configs/distill.yaml precision=$precision  # what has a score is not scored again
title 'finetune: on hard negatives, without the teacher, and with it'
train finetune $out/finetuned-alone scores= missing_scores=contrastive
score finetuned-without-teacher $out/finetuned-alone
train finetune $out/finetuned
score finetuned-with-teacher $out/finetuned
title 'done: demo-full/finetuned/model opens in sentence-transformers'

#!/usr/bin/env bash
# The whole recipe on real text, for two CPU cores: collect, pretrain, filter, pretrain on what was kept, mine, train a
# teacher, distill, finetune without and with the teacher, and a table after every training. A second start goes on
# where the first one stopped; remove the folder to start over.
#
#   bash demo-full.sh          in demo-full/, with configs/full: as `make demo-full` calls it
#   bash demo-full.sh best     in demo-best/, with configs/best, two hours: benchmarks/quality.md
#   bash demo-full.sh gpu      in demo-gpu/, with configs/gpu: all layers and larger batches, minutes on one GPU
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" WANDB_MODE="${WANDB_MODE:-disabled}"
name="${1:-full}"
out="demo-$name"
[ -d "configs/$name" ] || { echo "demo-full.sh: configs/$name is not there; give best, gpu, or nothing" >&2; exit 2; }
# bf16 is several times faster on a GPU and on a processor with AMX.
if nvidia-smi -L >/dev/null 2>&1 || grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then precision=bf16; else precision=fp32; fi
models=()  # those scored so far, in order, as NAME=results.json

title() { printf '\n== %s (%d min %02d s since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

# run STAGE FILE [key=value ...]: one command, unless the file is there already
run() {
    local config="configs/$name/$1.yaml"
    [ -f "$config" ] || config="configs/full/$1.yaml"
    [ -e "$2" ] || quintet "${1%%-*}" --config "$config" "${@:3}"
}

# train STAGE FOLDER [key=value ...]: a run that is there goes on
train() { run "$1" "$2/model/config.json" run_dir="$2" precision=$precision "${@:3}"; }

# score NAME MODEL [key=value ...]: held-out nDCG@10 by source of all models so far
score() {
    local folder="$out/tables/$1"
    run evaluate "$folder/results.json" model="$2" data="$out/shards/holdout.jsonl" output="$folder" \
        precision=$precision bm25=false "${@:3}" >/dev/null
    models+=("$1=$folder/results.json")
    python benchmarks/compare.py --by-source "${models[@]}"
}

title 'collect: real pairs out of wheels, a reference model, and a student cut out of it'
run collect "$out/pairs/SOURCES.json" output="$out/pairs"
run collect-reference "$out/e5-small/config.json" output="$out/e5-small"
run collect-student "$out/student/config.json" output="$out/student" keep_vocab="[$out/pairs/*.jsonl]"
run collect-guide "$out/guide/config.json" output="$out/guide" keep_vocab="[$out/pairs/*.jsonl]"
title "pack: shards in the student's tokens, and held-out pairs"
run pack "$out/shards/index.json" input="$out/pairs/*.jsonl" output="$out/shards" tokenizer="$out/student"
title 'evaluate: the student untrained, BM25, and the reference'
score untrained "$out/student" bm25=true
score multilingual-e5-small "$out/e5-small"
title 'pretrain: contrast in the batch, and the embeddings of the reference'
train pretrain "$out/pretrained" data="$out/shards" model.path="$out/student" loss.guide.path="$out/guide"
score pretrained "$out/pretrained"
title 'filter: pairs whose own passage is found among random ones'
run filter "$out/kept/index.json" model="$out/pretrained" data="$out/shards" output="$out/kept" precision=$precision
title 'pretrain: on what was kept'
train pretrain-kept "$out/filtered" data="$out/kept" model.path="$out/pretrained/model" loss.guide.path="$out/guide"
score filtered "$out/filtered"
title 'mine: hard negatives for a part of the pairs, the first shard of each source'
run mine "$out/mined/index.json" model="$out/filtered" data="$out/shards/*-000000.tar" output="$out/mined" \
    precision=$precision
title 'teacher: a cross-encoder, from the reference'
train teacher "$out/teacher" data="$out/mined" model.path="$out/guide"
title 'distill: its scores of every mined pair'
quintet distill teacher="$out/teacher/model" data="$out/mined" scores="$out/scores" precision=$precision
title 'finetune: on hard negatives, without the teacher, and with it'
tuned=(data="$out/mined" model.path="$out/filtered/model" loss.guide.path="$out/guide")
train finetune "$out/finetuned-alone" "${tuned[@]}" scores= missing_scores=contrastive
score finetuned-without-teacher "$out/finetuned-alone"
train finetune "$out/finetuned" "${tuned[@]}" scores="$out/scores"
score finetuned-with-teacher "$out/finetuned"
title "done: $out/finetuned/model opens in sentence-transformers"

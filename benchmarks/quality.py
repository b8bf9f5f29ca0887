"""Does each stage of the recipe help on real text? Three seeds, means and spreads, on held-out pairs.

    python -m benchmarks.quality [noise] [finetune] [--seeds 3] [--jobs 2]

noise: the passages of 30% of the collected pairs are exchanged. A model is trained on that, filters it, and a second
model is trained for as many steps on what is kept. The planted pairs are known, so precision and recall are, too.

finetune: what demo-full.sh left in demo-full/ is fine-tuned for the same steps on random negatives, on mined ones, and
on mined ones with the teacher; the teacher puts the first results of the last one in order.

Every step is a command that a user types, run in a process of its own, two seeds side by side. What is finished in the
work folder is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import DEMO
from trainer.device import has_fast_bf16

SHARE, STEPS = 0.3, 80
POOL = (
    2_000  # a sixtieth of the corpus: E5's million was a thousandth of its own, and near duplicates are as rare there
)
PAIRS_A_SOURCE = 60_000
RERANKED, RERANKED_QUERIES = 20, 600
METRIC = "ndcg_at_10"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=["noise", "finetune", []], help="which; both when none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at the same time, one thread each")
    parser.add_argument("--work", type=Path, default=Path("demo/quality"), help="folder for data and models")
    arguments = parser.parse_args()
    where = common.environment()
    for name in arguments.names or EXPERIMENTS:
        lab = Lab(arguments.work / name)
        prepare, run = EXPERIMENTS[name]
        prepare(lab)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            rows = list(pool.map(partial(run, lab), range(arguments.seeds)))
        result = {"settings": SETTINGS[name], "seeds": rows, "tables": [summary(name, rows)], "targets": []}
        common.show(name, result)
        print(f"written: {common.save(f'quality-{name}', result, where).relative_to(common.ROOT)}")


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds of every number, with the smallest and the largest."""
    lines = []
    for label in rows[0]:
        values = [row[label] for row in rows]
        lines.append({"what": label, "mean": statistics.mean(values), "smallest": min(values), "largest": max(values)})
    return common.table(f"{name}: held-out nDCG@10 and shares, {len(rows)} seeds", lines)


# --- does the filter help? ------------------------------------------------------------------------------------------


def collect_and_pack(lab: Lab) -> None:
    """Collected pairs as shards, with a tokenizer and a held-out set."""
    pairs, shards = lab.path("pairs"), lab.path("shards")
    if not (pairs / "SOURCES.json").exists():
        lab.run("collect", "--config", "configs/tiny/collect.yaml", f"output={pairs}")
    if not (shards / "index.json").exists():
        lab.run(
            *("pack", "--config", "configs/tiny/pack.yaml", f"input={pairs}/*.jsonl", f"output={shards}"),
            f"limit={PAIRS_A_SOURCE}",
        )


def noise(lab: Lab, seed: int) -> dict[str, float]:
    """Train on noisy pairs; filter them with that model; train anew on what is kept, for the same steps."""
    noisy, kept = lab.path(f"noisy-{seed}"), lab.path(f"kept-{seed}")
    if not (noisy / "index.json").exists():
        from data import mixture
        from data.noise import plant

        plant(mixture.load(str(lab.path("shards"))), noisy, SHARE, seed)
    first = pretrain(lab, f"on-noisy-{seed}", noisy, seed)
    if not kept.exists():
        lab.run("filter", f"model={first}", f"data={noisy}", f"output={kept}", f"pool_size={POOL}", f"seed={seed}")
    second = pretrain(lab, f"on-kept-{seed}", kept, seed)
    held_out = lab.path("shards") / "holdout.jsonl"
    return {
        **lab.scores("trained on noisy pairs", first, held_out),
        **lab.scores("trained on what the filter kept", second, held_out),
        **found(noisy, kept),
    }


def pretrain(lab: Lab, name: str, data: Path, seed: int) -> Path:
    """The demo's model, on some shards."""
    return lab.train(
        name,
        *("pretrain", "--config", "configs/tiny/pretrain.yaml", f"data={data}", f"seed={seed}", f"steps={STEPS}"),
        f"tokenizer={lab.path('shards')}/tokenizer",
    )


def found(noisy: Path, kept: Path) -> dict[str, float]:
    """Of the pairs that the filter dropped, how many were planted, and how many of the planted were dropped."""
    (planted, pairs), (planted_kept, pairs_kept) = planted_of(noisy), planted_of(kept)
    dropped = pairs - pairs_kept
    return {
        "kept": pairs_kept / pairs,
        "noise found: precision": (planted - planted_kept) / max(1, dropped),
        "noise found: recall": (planted - planted_kept) / planted,
        "clean pairs kept": (pairs_kept - planted_kept) / (pairs - planted),
    }


def planted_of(folder: Path) -> tuple[int, int]:
    """Planted pairs and all pairs in a folder of shards."""
    from data import mixture, scan
    from data.noise import is_planted

    data = mixture.load(str(folder))
    tables = (table for unit in scan.units(data, 1) for _, table in scan.tables(data, unit, ["id"]))
    counts = [(int(is_planted(table).sum()), len(table)) for table in tables]
    return sum(planted for planted, _ in counts), sum(rows for _, rows in counts)


# --- do mined negatives and the teacher help? -----------------------------------------------------------------------


def need_full(lab: Lab) -> None:
    """What `make demo-full` leaves, and the same pairs with random negatives."""
    if not (DEMO / "scores").is_dir():
        sys.exit(f"{DEMO}/scores: not there; run `make demo-full` first, its models and data are used here")
    if not lab.path("random").exists():
        places = (f"model={DEMO}/filtered", f"data={DEMO}/shards/*-000000.tar", f"output={lab.path('random')}")
        lab.run("mine", "--config", f"{CONFIGS}/mine.yaml", *places, "random_negatives=3")


def finetune(lab: Lab, seed: int) -> dict[str, float]:
    """The same model, pairs and steps, with random negatives, with mined ones, and with the teacher's judgement."""
    alone = ("scores=", "missing_scores=contrastive")
    kinds = {
        "random negatives": (f"data={lab.path('random')}", *alone),
        "mined negatives": (f"data={DEMO}/mined", *alone),
        "mined negatives and the teacher": (f"data={DEMO}/mined", f"scores={DEMO}/scores"),
    }
    precision = f"precision={'bf16' if has_fast_bf16('cpu') else 'fp32'}"
    held_out, rows = DEMO / "shards" / "holdout.jsonl", {}
    for kind, settings in kinds.items():
        run = lab.train(
            f"{kind.replace(' ', '-')}-{seed}",
            *("finetune", "--config", f"{CONFIGS}/finetune.yaml", f"model.path={DEMO}/filtered/model", *settings),
            *(f"loss.guide.path={DEMO}/guide", f"seed={seed}", precision),
        )
        rows |= lab.scores(kind, run, held_out, precision)
    few = (precision, f"limit={RERANKED_QUERIES}", f"seed={seed}")
    teacher = (f"rerank={DEMO}/teacher/model", f"rerank_depth={RERANKED}")
    return rows | lab.scores("the same, some queries", run, held_out, *few, *teacher)


CONFIGS = "configs/full"
EXPERIMENTS = {"noise": (collect_and_pack, noise), "finetune": (need_full, finetune)}
SETTINGS: dict[str, dict[str, Any]] = {
    "noise": {"planted": SHARE, "steps": STEPS, "pool": POOL, "pairs a source": PAIRS_A_SOURCE},
    "finetune": {"reranked": RERANKED, "queries reranked": RERANKED_QUERIES},
}


# --- running stages ------------------------------------------------------------------------------------------------


class Lab:
    """A folder of data and models, and the commands that make them, each in one process of one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def train(self, name: str, *words: str) -> Path:
        """A run folder, trained to the end."""
        run = self.path(name)
        if not (run / "model").exists():
            self.run(*words, f"run_dir={run}", "eval.data=[]", "wandb.mode=disabled")
        return run

    def scores(self, label: str, run: Path, data: Path, *words: str) -> dict[str, float]:
        """nDCG@10 of a run by source."""
        output = self.path("scores") / f"{run.name} {label}".replace(" ", "-")
        if not (output / "results.json").exists():
            self.run("evaluate", f"model={run}", f"data={data}", f"output={output}", "bm25=false", *words)
        (result,) = json.loads((output / "results.json").read_text()).values()
        found = {label: result}
        if "reranked" in result:
            found[f"{label}, the first {RERANKED} as the teacher orders them"] = result["reranked"]
        return {
            f"{name}: {source}": values[METRIC]
            for name, scores in found.items()
            for source, values in scores["by_source"].items()
        }

    def run(self, *words: str) -> None:
        """A stage."""
        command = ["quintet", *words]
        print(f"$ {' '.join(command)}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (self.folder / "log.txt").open("a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}; {self.folder / 'log.txt'} says why")


if __name__ == "__main__":
    main()

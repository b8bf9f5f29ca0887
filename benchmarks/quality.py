"""Does each stage of the recipe help on real text? Three seeds, means and spreads, on held-out pairs.

    python -m benchmarks.quality [noise] [negatives] [--seeds 3] [--work FOLDER]

noise: the passages of 30% of the collected pairs are exchanged. A model is trained on that, filters it, and a second
model is trained for as many steps on what is kept. The planted pairs are known, so precision and recall are, too.

negatives: a model trained on clean pairs mines; then it goes on with mined and, for the same steps, with random
negatives of the same pairs.

Every step is a command that a user types, run in a process of its own. What is finished in the work folder is not
done again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

SHARE, STEPS, POOL = 0.3, 80, 20_000
TUNING = 60  # steps of fine-tuning
PAIRS_A_SOURCE = 60_000
METRIC = "ndcg_at_10"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=["noise", "negatives", []], help="which; both when none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo/quality"), help="folder for data and models")
    arguments = parser.parse_args()
    where = common.environment()
    lab = Lab(arguments.work)
    lab.prepare()
    experiments = {"noise": noise, "negatives": negatives}
    for name in arguments.names or experiments:
        rows = [experiments[name](lab, seed) for seed in range(arguments.seeds)]
        result = {"settings": settings(arguments.seeds), "seeds": rows, "tables": [summary(name, rows)], "targets": []}
        common.show(name, result)
        print(f"written: {common.save(f'quality-{name}', result, where).relative_to(common.ROOT)}")


def settings(seeds: int) -> dict[str, Any]:
    """What was run, beside the recipes in configs/tiny."""
    return {
        "seeds": seeds,
        "planted": SHARE,
        "steps": STEPS,
        "fine-tuning steps": TUNING,
        "pool": POOL,
        "pairs a source": PAIRS_A_SOURCE,
    }


def summary(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds of every number, with the smallest and the largest."""
    lines = []
    for label in rows[0]:
        values = [row[label] for row in rows]
        lines.append({"what": label, "mean": statistics.mean(values), "smallest": min(values), "largest": max(values)})
    return common.table(f"{name}: held-out nDCG@10 and shares, {len(rows)} seeds", lines)


# --- the experiments -----------------------------------------------------------------------------------------------


def noise(lab: Lab, seed: int) -> dict[str, float]:
    """Train on noisy pairs; filter them with that model; train anew on what is kept, for the same steps."""
    noisy, kept = lab.path(f"noisy-{seed}"), lab.path(f"kept-{seed}")
    if not (noisy / "index.json").exists():
        from data import mixture
        from data.noise import plant

        plant(mixture.load(str(lab.path("shards"))), noisy, SHARE, seed)
    first = lab.pretrain(f"on-noisy-{seed}", noisy, seed)
    if not kept.exists():
        lab.ranks("filter", f"model={first}", f"data={noisy}", f"output={kept}", f"pool_size={POOL}", f"seed={seed}")
    second = lab.pretrain(f"on-kept-{seed}", kept, seed)
    return {
        **lab.scores("trained on noisy pairs", first),
        **lab.scores("trained on what the filter kept", second),
        **found(noisy, kept),
    }


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


def negatives(lab: Lab, seed: int) -> dict[str, float]:
    """Go on from one model with mined and with random negatives."""
    base = lab.pretrain(f"base-{seed}", lab.path("shards"), seed)
    found = lab.scores("before fine-tuning", base)
    for kind, random in (("mined", 0), ("random", 7)):
        mined = lab.path(f"{kind}-{seed}")
        if not mined.exists():
            lab.ranks(
                *("mine", f"model={base}", f"data={lab.path('shards')}", f"output={mined}"),
                *("negatives=7", f"random_negatives={random}", f"seed={seed}"),
            )
        tuned = lab.train(
            f"on-{kind}-{seed}",
            *("finetune", "--config", "configs/tiny/finetune.yaml", f"data={mined}", f"model.path={base}"),
            *("scores=", "missing_scores=contrastive", f"steps={TUNING}", f"warmup_steps={TUNING // 10}"),
            f"seed={seed}",
        )
        found |= lab.scores(f"fine-tuned with {kind} negatives", tuned)
    return found


# --- running stages ------------------------------------------------------------------------------------------------


class Lab:
    """A folder of data and models, and the commands that make them, on two ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def prepare(self) -> None:
        """Collected pairs as shards, with a tokenizer and a held-out set."""
        pairs, shards = self.path("pairs"), self.path("shards")
        if not (pairs / "SOURCES.json").exists():
            self.run("collect", "--config", "configs/tiny/collect.yaml", f"output={pairs}")
        if not (shards / "index.json").exists():
            self.run(
                *("pack", "--config", "configs/tiny/pack.yaml", f"input={pairs}/*.jsonl", f"output={shards}"),
                f"limit={PAIRS_A_SOURCE}",
            )

    def pretrain(self, name: str, data: Path, seed: int) -> Path:
        """The demo's model, on some shards."""
        return self.train(
            name,
            *("pretrain", "--config", "configs/tiny/pretrain.yaml", f"data={data}", f"seed={seed}", f"steps={STEPS}"),
            f"tokenizer={self.path('shards')}/tokenizer",
        )

    def train(self, name: str, *words: str) -> Path:
        """A run folder, trained to the end."""
        run = self.path(name)
        if not (run / "model").exists():
            self.ranks(*words, f"run_dir={run}", "eval.data=[]", "wandb.mode=disabled")
        return run

    def scores(self, label: str, run: Path) -> dict[str, float]:
        """Held-out nDCG@10 of a run by source."""
        output, data = run / "results.json", self.path("shards") / "holdout.jsonl"
        if not output.exists():
            self.run("evaluate", f"model={run}", f"data={data}", f"output={run}", "bm25=false")
        (result,) = json.loads(output.read_text()).values()
        return {f"{label}: {source}": values[METRIC] for source, values in result["by_source"].items()}

    def ranks(self, *words: str) -> None:
        """A stage on two ranks of one thread each."""
        launch = ["deepspeed", "--num_accelerators", "2", "--no_python", "--no_local_rank"]
        self._call([*launch, "quintet", *words], threads=1)

    def run(self, *words: str) -> None:
        """A stage in one process of two threads."""
        self._call(["quintet", *words], threads=2)

    def _call(self, command: list[str], threads: int) -> None:
        print(f"$ {' '.join(command)}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.folder / "log.txt").open("a") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}; {self.folder / 'log.txt'} says why")


if __name__ == "__main__":
    main()

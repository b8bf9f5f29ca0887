"""Stage `teacher`: a cross-encoder trained on mined groups, for `quintet distill`.

It is the run of trainer/train.py with the objective `ranking` and the defaults of SimLM's re-ranker (arXiv 2207.02578).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from data.pairing import PairTemplate
from data.settings import key
from trainer import train


@dataclass(frozen=True, kw_only=True)
class EvalConfig(train.EvalConfig):
    data: str | list[str] = key([], help="mined shards that are not trained on; empty: no evaluation")
    limit: int = key(2_000, help="groups of each source at most, drawn with a fixed seed; 0: all", low=0)


@dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    objective: str = key("ranking", help="what is learned", choices=("ranking",))
    template: PairTemplate = key(PairTemplate(), help="the two texts that the teacher reads")
    max_length: int = key(192, help="tokens of query and passage together, the passage is cut", low=4)
    max_query_length: int = key(0, help="tokens of the query, the rest is cut; 0: half of max_length", low=0)
    batch_size: int = key(64, help="global batch in queries, each with its own passages", low=2)
    steps: int = key(20_000, help="optimizer steps", low=1)
    lr: float = key(3e-5, help="peak learning rate", above=0)
    negatives: int = key(15, help="hard negatives of each query in a batch: other ones in every epoch", low=1)
    eval: EvalConfig = key(EvalConfig(), help="evaluation in training: accuracy and MRR on held-out groups")

    def check(self) -> list[str]:
        return super().check() + _unused(self)


def run(config: Config) -> None:
    """Train a teacher, or go on with the run in config.run_dir. Raises what `train.run` raises."""
    train.run(config)


def _unused(config: Config) -> list[str]:
    """Keys of other objectives that are set, which would do nothing."""
    names = ("prompts", "temperature", "loss", "teacher_fingerprint", "missing_scores", "alpha")
    defaults = {field.name: field.default for field in fields(train.Config)}
    changed = [name for name in names if getattr(config, name) != defaults[name]]
    return [f"{name}: the training of a teacher has no use for it; leave it out" for name in changed]

"""Stage `finetune`: training on labelled pairs with hard negatives and a teacher's scores.

It is the run of trainer/train.py with other defaults: those of E5's fine-tuning (arXiv 2212.03533) where they are
published.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key
from trainer import train


@dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    objective: str = key("distillation", help="what is learned", choices=("distillation",))
    max_length: int = key(192, help="tokens of a text, the rest is cut", low=4)
    batch_size: int = key(256, help="global batch in pairs: every query sees all its passages", low=2)
    steps: int = key(10_000, help="optimizer steps", low=1)
    lr: float = key(2e-5, help="peak learning rate", above=0)
    warmup_steps: int = key(400, help="steps of linear warm-up; linear decay follows", low=0)
    negatives: int = key(7, help="hard negatives of each pair in a batch: other ones in every epoch", low=0)


def run(config: Config) -> None:
    """Fine-tune, or go on with, the run in config.run_dir. Raises what `train.run` raises."""
    train.run(config)

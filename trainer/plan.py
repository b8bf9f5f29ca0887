"""Stage `plan`: what a recipe would take on a cluster, before anybody pays for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.settings import key
from trainer import train
from trainer.cards import CARDS


@dataclass(frozen=True, kw_only=True)
class ModelConfig(train.ModelConfig):
    path: str = key("", help="model folder or hub id, for its sizes alone; `random`: the sizes below")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    device: str = key("h100", help="accelerator; cpu needs `measured`", choices=(*CARDS, "cpu"))
    gpus: list[int] = key([1, 8, 64, 256, 1024], help="numbers of GPUs (of ranks on cpu) to plan for", low=1)
    per_node: int | None = key(None, help="of them in a node; null: as the device is usually sold", low=1)
    memory_gib: float | None = key(None, help="of one; null: the device's", above=0)
    bf16_tflops: float | None = key(None, help="peak of dense bf16 products, TFLOP/s; null: the device's", above=0)
    fp32_tflops: float | None = key(None, help="the same of fp32 products, without TF32; null: the device's", above=0)
    memory_gbs: float | None = key(None, help="bandwidth of its memory, GB/s; null: the device's", above=0)
    node_gbs: float | None = key(None, help="what one sends to others in its node, GB/s; null: the device's", above=0)
    network_gbs: float | None = key(
        None, help="what a node sends to others, GB/s; null: that of the maker's own machines", above=0
    )
    price: float | None = key(None, help="of one GPU for an hour, in any currency; null: no costs", low=0)


@dataclass(frozen=True, kw_only=True)
class TextsConfig:
    query_tokens: float = key(12.0, help="median tokens of a query, prefix included", above=0)
    passage_tokens: float = key(70.0, help="median tokens of a passage, prefix included; cut at max_length", above=0)


@dataclass(frozen=True, kw_only=True)
class Config(train.Config):
    run_dir: str = key("", help="of the recipe; not used")
    data: str | list[str] = key([], help="of the recipe; not read")
    model: ModelConfig = key(ModelConfig(), help="the encoder")
    cluster: ClusterConfig = key(ClusterConfig(), help="what it would run on")
    texts: TextsConfig = key(TextsConfig(), help="lengths of texts: lognormal, sigma 0.6 for queries, 0.9 for passages")
    measure: str = key("", help="take 20 steps on this machine and write the rates found to this file; no plan")
    measured: list[str] = key(
        [], help="files that `measure` wrote, for 1, 2, ... ranks a node; none: shares of the device's data sheet"
    )
    output: str = key("", help="file for the whole plan as JSON")

    def check(self) -> list[str]:
        """What `train.Config` finds, with the objective that the recipe's keys speak of, and what cannot be planned."""
        objective = "distillation" if self.scores else "contrastive"
        problems = super(Config, replace(self, objective=objective)).check()
        if not self.model.path and not self.measure:
            problems.append("model.path: must be given: a recipe (--config FILE) names it; or measure=FILE")
        if self.cluster.device == "cpu" and not self.measured and not self.measure:
            problems.append(
                "cluster.device=cpu: nothing is known about it; first quintet plan measure=FILE, then measured=[FILE]"
            )
        if not self.cluster.gpus:
            problems.append("cluster.gpus=[]: give numbers of GPUs, such as [8,64]")
        for gpus in self.cluster.gpus:
            if self.batch_size % gpus:
                problems.append(
                    f"cluster.gpus={gpus}: does not divide batch_size={self.batch_size}; give one that does"
                )
        return problems


def run(config: Config) -> None:
    """Print what the recipe takes for every number of GPUs; or, with `measure`, what this machine reaches.

    With `measure` a collective: every rank of a job calls it.

    Raises:
        UserError: a model whose sizes are not known here, a device without the recipe's precision, a file that cannot
            be read or written.
    """
    from trainer import planning

    if config.measure:
        planning.measure(config)
    else:
        planning.plan(config)

"""What a training run may be told, whatever its objective. The loop itself is trainer/loop.py.

This is the stage `pretrain`; `finetune` (trainer/finetune.py) and `teacher` have the same keys with other defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.rules import Prompts
from data.settings import key, unresolved
from trainer.events import problems as tensorboard_problems
from trainer.monitor import WandbConfig
from trainer.remote import problems as mirror_problems
from trainer.spot import CHOICES


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str = key(help="model folder or hub id; `random` for random weights with the sizes below")
    architecture: str = key("xlm-roberta", help="random: transformers' name of the architecture")
    hidden_size: int = key(384, help="random: size of an embedding", low=1)
    layers: int = key(12, help="random: number of layers", low=1)
    heads: int = key(12, help="random: attention heads", low=1)
    intermediate_size: int = key(1536, help="random: width of the feed-forward part", low=1)
    max_positions: int = key(512, help="random: longest text, in tokens", low=8)
    dropout: float | None = key(
        None, help="dropout of hidden states and attention; null: the model's own", low=0, high=0.9
    )
    pooling: str = key("mean", help="how token vectors become one", choices=("mean", "cls", "last"))
    freeze_positions: bool | None = key(None, help="keep position embeddings fixed; null: unless the model is random")
    attention: str = key(
        "auto",
        help="packed: no padding at all, without attention dropout (CUDA); auto: packed where it runs",
        choices=("auto", "packed", "padded"),
    )
    compile: bool | None = key(
        None, help="run the backbone's layers through torch.compile; null: on a GPU, packed, below ZeRO-3"
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    data: str | list[str] = key([], help="held-out sets: JSONL files or BEIR folders; empty: no evaluation")
    every_steps: int = key(0, help="steps between evaluations; 0: only after the last step", low=0)
    limit: int = key(2_000, help="rows of each set used in training, seeded; 0: all", low=0)


@dataclass(frozen=True, kw_only=True)
class GuideConfig:
    path: str = key("", help="model that judges candidates, with this model's tokenizer; empty: none")
    margin: float | None = key(
        0.0, help="hide a candidate that it finds closer than the positive by more than this; null: never"
    )
    weight: float = key(0.0, help="of the mean 1 - cosine between each embedding and the guide's; 0: none", low=0)


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig:
    sizes: list[int] = key([], help="lengths of shorter embeddings, cut from the whole one, that are trained as well")
    weights: list[float] = key([], help="weight of each, beside 1 for the whole embedding; empty: 1 each")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    distill: str = key("kl", help="distance to the teacher in distillation", choices=("kl", "margin_mse"))
    both_directions: bool = key(False, help="passages look for their query too; the mean of both losses")
    same_tower: bool = key(False, help="other rows' queries are candidates too")
    margin: float | None = key(
        None, help="hide a candidate whose similarity exceeds the positive's by more than this; null: never"
    )
    teacher_margin: float | None = key(
        None, help="hide a hard negative whose teacher logit exceeds the positive's by more than this; null: never"
    )
    guide: GuideConfig = key(GuideConfig(), help="another model's judgement on candidates, or its embeddings")
    matryoshka: MatryoshkaConfig = key(MatryoshkaConfig(), help="embeddings that may be cut")


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    factor: float = key(
        7.0, help="robust standard deviations above the median of recent losses that make a spike; 0: never look", low=0
    )
    window: int = key(100, help="recent losses of the same source that a loss is compared with", low=10)
    action: str = key(
        "warn",
        help="rollback: end with code 75; the next start goes back and passes over the batches around the spike",
        choices=("warn", "rollback"),
    )
    skip_steps: int = key(200, help="rollback: batches passed over, half of them before the spike", low=2)


@dataclass(frozen=True, kw_only=True)
class Config:
    run_dir: str = key(help="folder of the run; a run that is there goes on")
    data: str | list[str] = key(help="shard folders, globs, or a mixture file")
    objective: str = key("contrastive", help="what is learned", choices=("contrastive", "distillation", "ranking"))
    model: ModelConfig = key(help="the encoder")
    tokenizer: str = key("", help="tokenizer folder or hub id; empty: the model's own")
    prompts: Prompts = key(Prompts(), help="prefixes of the two sides")
    max_length: int = key(128, help="tokens of a text, the rest is cut", low=4)
    seed: int = key(0, help="of weights, data order and dropout", low=0)

    batch_size: int = key(32_768, help="global batch in pairs: every query sees all its passages", low=2)
    steps: int = key(30_000, help="optimizer steps", low=1)
    lr: float = key(2e-4, help="peak learning rate", above=0)
    warmup_steps: int = key(1_000, help="steps of linear warm-up; linear decay follows", low=0)
    weight_decay: float = key(0.01, help="AdamW's decay of matrices", low=0)
    betas: tuple[float, float] = key((0.9, 0.999), help="AdamW's averages")
    eps: float = key(1e-8, help="AdamW's epsilon", above=0)
    max_grad_norm: float = key(1.0, help="clip the global gradient norm; 0: never", low=0)
    temperature: float = key(0.01, help="divisor of the similarities", above=0)
    negatives: int = key(0, help="hard negatives of each pair in a batch: other ones in every epoch", low=0)
    loss: LossConfig = key(LossConfig(), help="terms beyond the recipe, all off")

    scores: str = key("", help="distillation: folder of the score cache that `quintet distill` fills")
    teacher_fingerprint: str = key("", help="whose scores, where the folder has those of several teachers")
    missing_scores: str = key(
        "error",
        help="error; contrastive: those rows go without the teacher; wait: for a worker that is running",
        choices=("error", "contrastive", "wait"),
    )
    scores_wait_minutes: float = key(60.0, help="wait: longest wait for a batch's scores", above=0)
    alpha: float = key(0.2, help="distillation: weight of the contrastive term, beside 1 for the teacher's", low=0)

    zero_stage: int = key(1, help="DeepSpeed ZeRO stage; one rank alone runs 0", choices=(0, 1, 2, 3))
    precision: str = key("fp32", help="of the encoder's matrix products: fp32, or bf16 by autocast")
    tf32: bool = key(True, help="allow TF32 in fp32 matrix products of the encoder (CUDA)")
    deterministic: bool = key(False, help="take only kernels that give the same bits each time (CUDA); slower")
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 10 GiB of activations on a GPU, 2048 on a CPU", low=1
    )
    memory_budget_gib: float | None = key(
        None,
        help="activations kept between the passes, by rank, in GiB; null: half of what is free, 4/5 on a GPU",
        low=0,
    )

    lanes: int = key(64, help="parts of every source that are read side by side; a multiple of the ranks", low=1)
    homogeneous: bool = key(True, help="take each global batch from one source")
    source_power: float = key(1.0, help="a source without a weight counts as its size to this power", low=0)
    shuffle_blocks: int = key(8, help="blocks of a lane that are shuffled together", low=1)
    data_workers: int = key(1, help="threads that prepare batches ahead", low=1)
    damaged: str = key("strict", help="damaged shards: strict stops, skip counts", choices=("strict", "skip"))
    max_bad_records: int = key(1_000, help="skip: damaged records, over all ranks, before the run stops", low=0)
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")

    save_every_steps: int = key(1_000, help="steps between checkpoints; 0: by time alone", low=0)
    save_every_minutes: float = key(30.0, help="minutes between checkpoints; 0: by steps alone", low=0)
    keep_last: int = key(2, help="newest checkpoints to keep", low=1)
    keep_every: int = key(0, help="also keep every checkpoint of a multiple of so many steps; 0: none", low=0)
    fresh: bool = key(False, help="start at step 0 even when there is a checkpoint")
    mirror: str = key(
        "",
        help="folder in object storage (s3://bucket/run) for copies of the run; an empty run_dir is filled from it",
    )
    preemption: str = key(
        "none", help="whose notices that a spot machine ends stop the run with a checkpoint", choices=CHOICES
    )
    max_skipped_steps: int = key(10, help="non-finite steps in a row before the run stops", low=1)
    spike: SpikeConfig = key(SpikeConfig(), help="losses far above those before them")
    check_weights_every: int = key(
        100, help="steps between comparisons of the ranks' weights (ZeRO 0-2), also made at every save; 0: never", low=0
    )
    start_timeout_minutes: float = key(2.0, help="longest wait for the ranks to find each other", above=0)
    step_timeout_minutes: float = key(10.0, help="a rank that makes no step for so long is ended (124)", above=0)
    timeout_minutes: float = key(30.0, help="the same for opening, saving, evaluating and the first step", above=0)

    log_every: int = key(10, help="steps between log lines", low=1)
    eval: EvalConfig = key(EvalConfig(), help="evaluation in training")
    wandb: WandbConfig = key(WandbConfig(), help="mirror of the curves")
    tensorboard: bool = key(False, help="write the curves to run_dir/tensorboard too")
    peak_tflops: float | None = key(
        None,
        help="peak of a rank's device, for perf/mfu; null: of dense bf16 products, where the card is known",
        above=0,
    )
    device: str = key("auto", help="auto: CUDA when there is one", choices=("auto", "cpu", "cuda"))
    config_yaml: str = unresolved()

    def check(self) -> list[str]:
        problems = []
        if self.precision not in ("fp32", "bf16"):
            reason = " (at temperature 0.01 its range overflows, and its loss scaling cannot span the two passes)"
            why = reason if self.precision == "fp16" else ""
            problems.append(f"precision={self.precision}: not supported{why}; use bf16 or fp32")
        if self.warmup_steps >= self.steps:
            problems.append(f"warmup_steps={self.warmup_steps}: not below steps={self.steps}; lower it")
        if self.batch_size % self.lanes:
            problems.append(
                f"batch_size={self.batch_size}: not a multiple of lanes={self.lanes}; every batch takes equally many "
                "pairs from each lane, change one of them"
            )
        if self.model.path == "random" and not self.tokenizer:
            problems.append("tokenizer: model.path=random needs one; give a folder (quintet pack --train-tokenizer)")
        if self.model.path == "random" and self.model.hidden_size % self.model.heads:
            problems.append(
                f"model.hidden_size={self.model.hidden_size}: not a multiple of model.heads={self.model.heads}"
            )
        if self.spike.action == "rollback" and not self.spike.factor:
            problems.append("spike.action=rollback: spike.factor=0 finds no spike; give a factor, or action=warn")
        problems += mirror_problems(self.mirror) + tensorboard_problems(self.tensorboard)
        return problems + _objective_problems(self) + _loss_problems(self.loss)


def _objective_problems(config: Config) -> list[str]:
    """What does not go with the objective."""
    problems, objective = [], config.objective
    if objective != "contrastive" and not config.negatives:
        problems.append(f"negatives=0: {objective} compares a positive with its hard negatives; give 1 or more")
    if objective == "ranking" and config.wandb.examples:
        problems.append(
            f"wandb.examples={config.wandb.examples}: {objective} searches nothing that could be shown; set 0"
        )
    if objective == "distillation" and not config.scores and config.missing_scores != "contrastive":
        problems.append(
            "scores: give the score cache of `quintet distill`, or train without: missing_scores=contrastive"
        )
    if objective != "distillation" and config.scores and config.loss.teacher_margin is None:
        problems.append(f"scores={config.scores}: {objective} has no use for a teacher; use `quintet finetune`")
    if config.loss.teacher_margin is not None and not config.scores:
        problems.append(f"loss.teacher_margin={config.loss.teacher_margin}: needs a teacher's scores; give scores")
    return problems


def _loss_problems(loss: LossConfig) -> list[str]:
    sizes, weights = loss.matryoshka.sizes, loss.matryoshka.weights
    problems = []
    if any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
        problems.append(f"loss.matryoshka.sizes={sizes}: give different numbers of 1 or more")
    if weights and (len(weights) != len(sizes) or min(weights) <= 0):
        problems.append(f"loss.matryoshka.weights={weights}: give a number above 0 for each of sizes={sizes}, or none")
    if loss.guide.weight and not loss.guide.path:
        problems.append(f"loss.guide.weight={loss.guide.weight:g}: needs a guide; give loss.guide.path")
    return problems


def run(config: Config) -> None:
    """Train, or go on with, the run in config.run_dir.

    Raises:
        UserError, DataError, NumericError, Stopped: see data/errors.py.
    """
    from trainer.loop import fit

    fit(config)

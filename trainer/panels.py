"""The dashboard as data: which metrics stand together, in which section. Names are those of monitor.METRICS."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A line plot of some metrics; log: its values have a logarithmic axis."""

    title: str
    metrics: tuple[str, ...]
    log: bool = False

    @property
    def axis(self) -> str:
        """Steps; or time, of a stage that takes none."""
        timed = self.metrics[0].partition("/")[0] in ("work", "distill", "filter", "mine")
        return "work/seconds" if timed else "train/step"


@dataclass(frozen=True)
class Section:
    name: str
    panels: tuple[Panel, ...]


def _panel(title: str, *metrics: str, log: bool = False) -> Panel:
    return Panel(title, metrics, log)


SECTIONS = (
    Section(
        "Learning",
        (
            _panel("Loss", "train/loss", "train/loss_contrastive", "train/loss_ranking"),
            _panel("Own passage first in the pool", "train/acc_top1"),
            _panel("Similarities", "train/pos_sim", "train/neg_sim"),
            _panel("Gradient norm before clipping", "train/grad_norm", log=True),
            _panel("Learning rate", "train/lr"),
            _panel("Passes over the data", "train/epoch"),
        ),
    ),
    Section(
        "Retrieval quality",
        (
            _panel("nDCG@10", "eval/*/ndcg_at_10"),
            _panel("MRR@10", "eval/*/mrr_at_10"),
            _panel("Recall@100", "eval/*/recall_at_100"),
            _panel("Best answer is right", "eval/*/accuracy_at_1"),
            _panel("Tasks and benchmarks", "eval/*/score"),
        ),
    ),
    Section(
        "Throughput",
        (
            _panel("Pairs a second", "perf/samples_per_s", "perf/samples_per_s_per_gpu"),
            _panel("Tokens a second", "perf/tokens_per_s"),
            _panel(
                "Where a step's time goes",
                *("perf/step_s", "perf/data_s", "perf/meet_s", "perf/encode_s", "perf/loss_s", "perf/gather_s"),
                *("perf/backward_s", "perf/optimizer_s", "perf/other_s"),
            ),
            _panel("Waiting for data", "perf/data_wait_frac"),
            _panel("Share of the device's peak", "perf/mfu"),
            _panel("Hours to go", "perf/eta_h"),
        ),
    ),
    Section(
        "Data health",
        (
            _panel("Left out", "data/samples_bad", "data/batches_passed_over", "train/skipped_steps", "train/spikes"),
            _panel("Padding", "data/padding_frac"),
            _panel("Tokens of the fullest rank, above the mean", "data/token_spread"),
            _panel("A store was asked again", "data/retries"),
            _panel("Kept by the filter", "filter/*/kept_frac"),
            _panel("Too few negatives mined", "mine/*/short"),
            _panel("Own passage first, as the miner sees it", "mine/*/positive_first"),
        ),
    ),
    Section(
        "Checkpoints and restarts",
        (
            _panel("Time of a checkpoint", "ckpt/save_s", "ckpt/stall_s"),
            _panel("Newest checkpoint", "ckpt/last_step", "ckpt/mirrored_step"),
            _panel("Size", "ckpt/bytes"),
            _panel("Failures", "ckpt/failures", "ckpt/mirror_failures"),
            _panel("Starts after the first", "run/restarts"),
            _panel("Share of the time in steps", "run/goodput"),
            _panel("Time of an evaluation", "perf/eval_s"),
        ),
    ),
    Section(
        "Distillation",
        (
            _panel("Distance to the teacher", "train/loss_distill"),
            _panel("Distance to the guide", "train/loss_guide"),
            _panel("Pairs with a teacher's scores", "data/scored_frac"),
            _panel("Pairs trained without", "data/samples_unscored"),
            _panel("Pairs of a worker", "distill/pairs", "distill/found", "distill/scored"),
            _panel("Scores a second", "distill/pairs_per_s"),
        ),
    ),
    Section(
        "System",
        (
            _panel("Peak memory of a rank", "perf/mem_gib"),
            _panel("Progress of other stages", "work/*/done"),
            _panel("Pace of other stages", "work/*/per_s"),
            _panel("Busy cores by machine", "node/*/cpu_frac"),
            _panel("Memory in use by machine", "node/*/mem_frac"),
        ),
    ),
)
# Metrics that need no panel: axes, constants, and numbers that only tell runs apart.
WITHOUT = (
    *("train/step", "train/samples_seen", "train/logit_scale"),
    *("data/batch_hash", "run/attempt", "run/time", "work/seconds", "filter/*/pairs", "mine/*/records"),
)

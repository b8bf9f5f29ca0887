"""What a run says about itself: metrics.jsonl (the record), W&B and TensorBoard (its mirrors), and lines to read.

The record is written first, by rank 0. A mirror can neither stop nor slow a run: its calls wait in a bounded queue
for a thread of their own, and after a few errors it is switched off with one warning. Only numbers, names and the
public configuration ever leave; no text of the data does, but for examples that were asked for. The only door to wandb.
"""

from __future__ import annotations

import contextlib
import logging
import math
import netrc
import os
import re
import shlex
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import Stopped
from data.settings import key
from trainer.events import EventFile
from trainer.journal import Journal
from trainer.mirror import Mirror, one_line

log = logging.getLogger("quintet")


@dataclass(frozen=True)
class Metric:
    unit: str
    help: str


# Every name that may be logged. A sample is a pair. Units: "1" is a plain number, "frac" is between 0 and 1.
METRICS: dict[str, Metric] = {
    "train/loss": Metric("nat", "loss of the step: mean over the global batch"),
    "train/loss_contrastive": Metric("nat", "its InfoNCE part, unweighted"),
    "train/loss_distill": Metric("nat", "its distance to the teacher; rows without scores count as 0"),
    "train/loss_guide": Metric("1", "mean 1 - cosine between embeddings and the guide's"),
    "train/loss_ranking": Metric("nat", "listwise softmax of a cross-encoder over a query's own passages"),
    "train/acc_top1": Metric("frac", "queries whose own passage scores highest in the pool"),
    "train/pos_sim": Metric("1", "mean similarity of a query and its passage"),
    "train/neg_sim": Metric("1", "mean similarity of a query and its negatives"),
    "train/grad_norm": Metric("1", "global norm of the gradient, before clipping"),
    "train/lr": Metric("1", "learning rate of the step"),
    "train/logit_scale": Metric("1", "1 / temperature"),
    "train/step": Metric("step", "optimizer steps done, the axis of every curve"),
    "train/samples_seen": Metric("sample", "pairs trained on since step 0"),
    "train/epoch": Metric("1", "passes over the data, as a fraction"),
    "train/skipped_steps": Metric("step", "updates left out for a non-finite loss or gradient since the start"),
    "train/spikes": Metric("1", "loss spikes since the start"),
    "perf/samples_per_s": Metric("sample/s", "pairs a second over all ranks"),
    "perf/samples_per_s_per_gpu": Metric("sample/s", "the same, by rank"),
    "perf/tokens_per_s": Metric("token/s", "tokens a second over all ranks, without padding"),
    "perf/step_s": Metric("s", "mean time of a step"),
    "perf/data_wait_frac": Metric("frac", "share of the time spent waiting for batches"),
    "perf/data_s": Metric("s", "time of a step in which there was no batch"),
    "perf/meet_s": Metric("s", "time of a step in which ranks wait for each other before it and deal the batch"),
    "perf/encode_s": Metric("s", "time of a step in the forward passes of the encoder"),
    "perf/loss_s": Metric("s", "time of a step in the loss and its gradients"),
    "perf/gather_s": Metric("s", "the part of it in which ranks exchange embeddings and their gradients"),
    "perf/backward_s": Metric("s", "time of a step in backward passes and replays"),
    "perf/optimizer_s": Metric("s", "time of a step in gradient reduction and the optimizer"),
    "perf/other_s": Metric("s", "time of a step outside of these parts"),
    "perf/eval_s": Metric("s", "time of an evaluation"),
    "perf/mfu": Metric("frac", "useful arithmetic as a share of the device's peak"),
    "perf/mem_gib": Metric("GiB", "peak memory of a rank"),
    "perf/eta_h": Metric("h", "time to the last step at the present rate"),
    "data/samples_bad": Metric("sample", "records left out as bad since the start"),
    "data/batches_passed_over": Metric("1", "batches left out after loss spikes since the start"),
    "data/samples_unscored": Metric("sample", "pairs trained without scores that a teacher should have given"),
    "data/scored_frac": Metric("frac", "pairs with scores of the teacher for all their passages"),
    "data/padding_frac": Metric("frac", "share of padding among the tokens computed"),
    "data/token_spread": Metric("frac", "tokens of the rank that had most in the last step, above the mean"),
    "data/retries": Metric("1", "times that a store was asked again in this start, over all ranks"),
    "ckpt/save_s": Metric("s", "time from the beginning of a save until the checkpoint is complete"),
    "ckpt/stall_s": Metric("s", "the part of it in which no step was taken"),
    "ckpt/bytes": Metric("byte", "size of the checkpoint"),
    "ckpt/last_step": Metric("step", "step of the newest complete checkpoint"),
    "ckpt/failures": Metric("1", "saves that failed since the start"),
    "ckpt/mirrored_step": Metric("step", "step of the newest complete checkpoint in the mirror"),
    "ckpt/mirror_failures": Metric("1", "copies to the mirror that failed in this start"),
    "data/batch_hash": Metric("1", "says which records the last step had: equal for equal sets of records"),
    "eval/*/ndcg_at_10": Metric("frac", "nDCG@10"),
    "eval/*/mrr_at_10": Metric("frac", "MRR@10"),
    "eval/*/recall_at_100": Metric("frac", "Recall@100"),
    "eval/*/accuracy_at_1": Metric("frac", "queries whose best answer is relevant"),
    "eval/*/score": Metric("frac", "main figure of a task of MTEB, or the mean of a benchmark's"),
    "run/attempt": Metric("1", "how many times the run was started; marks steps repeated after a restart"),
    "run/restarts": Metric("1", "starts after the first"),
    "run/goodput": Metric("frac", "share of the time since this start that went into steps"),
    "run/time": Metric("s", "wall clock, seconds since 1970"),
    "node/*/cpu_frac": Metric("frac", "busy share of a machine's cores; machines are numbered by their lowest rank"),
    "node/*/mem_frac": Metric("frac", "share of its memory in use"),
    "work/seconds": Metric("s", "time since this start, the axis of the stages that take no steps"),
    "work/*/done": Metric("1", "texts, pairs or records that rank 0 is done with, by the phase of a stage"),
    "work/*/per_s": Metric("1/s", "how many in a second, on rank 0"),
    "distill/pairs": Metric("pair", "pairs that a worker has met in this start"),
    "distill/found": Metric("pair", "those of them that had a score"),
    "distill/scored": Metric("pair", "those that it has scored"),
    "distill/pairs_per_s": Metric("pair/s", "scores a second"),
    "filter/*/pairs": Metric("pair", "pairs that were judged, of a source or of all"),
    "filter/*/kept_frac": Metric("frac", "share of them that is kept"),
    "mine/*/records": Metric("record", "records of a source"),
    "mine/*/short": Metric("record", "those for which too few negatives were found"),
    "mine/*/positive_first": Metric("frac", "those whose own passage scored above all others but known answers"),
}


def registered(name: str) -> bool:
    """Whether a metric may be logged: by its name, or with its middle as the star of a pattern."""
    head, _, rest = name.partition("/")
    return name in METRICS or ("/" in rest and f"{head}/*/{rest.rpartition('/')[2]}" in METRICS)


@dataclass(frozen=True, kw_only=True)
class WandbPlace:
    """Where the curves are mirrored. The key comes from WANDB_API_KEY or `wandb login`, never from here."""

    mode: str = key(
        "auto",
        help="auto: online when a key is there and the server answers, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = key("quintet", help="project that the run belongs to")
    entity: str = key("", help="user or team; empty: the key's own")
    group: str = key("", help="experiment that ties several runs together")
    name: str = key("", help="name of the run; empty: the name of the run folder")
    tags: list[str] = key([], help="tags of the run")


@dataclass(frozen=True, kw_only=True)
class StageWandbConfig(WandbPlace):
    """Of a stage that takes no training steps: it is mirrored when that is asked for."""

    mode: str = key(
        "disabled",
        help="auto: online when a key is there and the server answers, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )


@dataclass(frozen=True, kw_only=True)
class WandbConfig(WandbPlace):
    """Of a training."""

    examples: int = key(
        0, help="held-out queries of a set shown with what they found: the only texts that are sent; 0: none", low=0
    )


class Monitor:
    """All outlets behind one call. On ranks other than 0 every method does nothing."""

    def __init__(
        self,
        run_dir: str | Path,
        wandb: WandbPlace,
        *,
        config: Mapping[str, Any],
        job_type: str,
        run_id: str,
        attempt: int = 1,
        steps: int,
        first_step: int = 0,
        tensorboard: bool = False,
        axis: str = "train/step",
        console: bool = True,
        rank: int = 0,
    ) -> None:
        """Args:
        config: the public configuration, plain data, shown beside the curves.
        job_type: the stage, such as `pretrain`.
        run_id, attempt: who the run is and the how-manieth start this is (runfolder.begin).
        steps, first_step: where the bar ends and where this attempt begins.
        tensorboard: mirror the curves to run_dir/tensorboard too.
        axis: the metric that `log` gives a place to; console: whether lines or a bar are shown.
        """
        self._rank = rank
        if rank:
            return
        self._attempt = attempt
        self._journal = Journal(Path(run_dir) / "metrics.jsonl")
        self._console = Console(job_type, steps, first_step) if console else None
        self._axis = axis
        self._mirrors: list[Mirror] = []
        folder = Path(run_dir).resolve()
        if not _disabled(wandb):
            given = {"id": run_id, "job_type": job_type, "config": {**redacted(config), "attempt": attempt}}
            self._mirrors.append(Mirror(lambda: WandbRun(folder, wandb, given, axis), abandon=_end_helpers))
        if tensorboard:
            self._mirrors.append(Mirror(lambda: EventFile(folder, first_step), name="TensorBoard"))

    def log(self, step: float, values: Mapping[str, float]) -> None:
        """Record a logged step, or moment: a line of metrics.jsonl, its mirrors, and a line or a bar's text."""
        if self._rank:
            return
        unknown = [name for name in values if not registered(name)]
        assert not unknown, f"not in METRICS: {unknown}"
        row = {self._axis: step, **{name: _number(value) for name, value in values.items()}}
        row |= {"run/attempt": self._attempt, "run/restarts": self._attempt - 1, "run/time": time.time()}
        self._journal.write(row)
        self._send("logging", lambda run: run.log(row))
        if self._console:
            self._console.show(int(step), row)

    def tick(self, step: int) -> None:
        """Move the bar; cheap enough for every step."""
        if not self._rank and self._console:
            self._console.tick(step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show rows of one kind, texts included, in W&B. No other outlet gets them."""
        if not self._rank:
            self._send("a table", lambda run: run.table(step, name, rows))

    def alert(self, title: str, text: str) -> None:
        """Tell about trouble that does not end the run: a warning in the log, an alert in W&B."""
        if not self._rank:
            log.warning("%s: %s", title, text)
            self._send("an alert", lambda run: run.alert(title, text, "WARN"))

    def end(self, exit_code: int, reason: str) -> None:
        """Alert W&B to how the run ends; the command line itself says what went wrong."""
        if self._rank:
            return
        titles = {0: ("finished", "INFO"), Stopped.exit_code: ("stopped", "INFO")}
        title, level = titles.get(exit_code, (f"failed with {exit_code}", "ERROR"))
        if not exit_code and self._console:
            log.info("%s: %s", title, reason)
        self._send("an alert", lambda run: run.alert(title, reason, level))

    def abandon(self, exit_code: int, reason: str, limit_seconds: float = 3.0) -> None:
        """Send what can be sent before a process ends that hangs; called by another thread than the one that hangs."""
        if self._rank:
            return
        self._send("an alert", lambda run: run.alert("stalled", reason, "ERROR"))
        for mirror in self._mirrors:
            mirror.finish(exit_code, limit_seconds)

    def finish(self, exit_code: int, *, limit_seconds: float = 30.0) -> None:
        """Close all outlets. A mirror gets `limit_seconds` to send what it holds; what it could not stays on disk."""
        if self._rank:
            return
        if self._console:
            self._console.close()
        self._journal.close()
        for mirror in self._mirrors:
            mirror.finish(exit_code, limit_seconds)

    def _send(self, what: str, call: Callable[[Any], object]) -> None:
        for mirror in self._mirrors:
            mirror.send(what, call)


def _number(value: Any) -> float | int:
    """A plain number out of a number of Python, numpy or torch."""
    plain = value.item() if hasattr(value, "item") else value
    assert isinstance(plain, int | float), f"{plain!r} is no number"
    return plain


class WandbRun:
    """A run of wandb, online when that was asked for or is possible, else offline. All its calls may fail or block."""

    def __init__(self, run_dir: Path, config: WandbPlace, given: Mapping[str, Any], axis: str) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else wandb calls home, even when offline
        mode = _resolve_mode(config.mode)
        try:
            self._run = _init(run_dir, config, given, mode)
        except Exception as error:
            _forget()
            if mode == "offline":
                raise
            log.warning("W&B did not start online (%s); it goes on offline", one_line(error))
            mode = "offline"
            self._run = _init(run_dir, config, given, mode)
        if mode == "offline":
            # All segments of the run: W&B joins them by their id, in the order of their start.
            self.hint = (
                f"W&B was offline; send the curves with: wandb sync {shlex.quote(str(run_dir))}/wandb/offline-run-*"
            )
        else:
            self.hint = f"W&B: {self._run.url}"
            log.info(self.hint)
        self._run.define_metric(axis, hidden=True)
        for prefix in sorted({name.partition("/")[0] for name in METRICS}):
            best = {"summary": "last,max"} if prefix == "eval" else {}
            self._run.define_metric(f"{prefix}/*", step_metric=axis, **best)

    def log(self, row: Mapping[str, float]) -> None:
        # No step is passed: W&B drops what goes back, and after a restart steps do; the axis is train/step.
        self._run.log(dict(row))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        columns: list[Any] = list(rows[0])
        made = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self._run.log({name: made, "train/step": step})

    def alert(self, title: str, text: str, level: str) -> None:
        self._run.alert(title=title, text=text, level=level)

    def finish(self, exit_code: int) -> None:
        try:
            if exit_code == Stopped.exit_code:
                self._run.mark_preempting()  # shown as to be continued, not as failed
            self._run.finish(exit_code=exit_code)
        finally:
            _forget(exit_code)


def _forget(exit_code: int = 1) -> None:
    """End W&B's service in this process, and with it its exit hook, which would wait without a limit."""
    import wandb

    with contextlib.suppress(Exception):  # the service may be gone already
        wandb.teardown(exit_code)


def _init(run_dir: Path, config: WandbPlace, given: Mapping[str, Any], mode: str) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",  # the run's own logs stay where they are
        silent=True,
        disable_code=True,
        disable_git=True,  # the address of a remote may carry a token
        save_code=False,
        init_timeout=20.0,
        finish_timeout=20.0,
    )
    return wandb.init(
        dir=str(run_dir),
        mode=mode,  # type: ignore[arg-type]
        project=config.project,
        entity=config.entity or None,
        group=config.group or None,
        name=config.name or run_dir.name,
        tags=list(config.tags) or None,
        resume="allow",
        settings=settings,
        **given,
    )


def _disabled(config: WandbPlace) -> bool:
    return config.mode == "disabled" or (config.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled")


def _resolve_mode(mode: str) -> str:
    """online or offline. WANDB_MODE speaks where the configuration says auto; online needs a key and an answer."""
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", mode)
    if mode == "offline":
        return mode
    base_url, has_key = server()
    if not has_key:
        if mode == "online":
            log.warning("wandb.mode=online: no key for %s; it goes on offline (`wandb login` sets one)", base_url)
        return "offline"
    if answers(base_url):
        return "online"
    log.warning("W&B at %s does not answer; it goes on offline", base_url)
    return "offline"


def server() -> tuple[str, bool]:
    """The address of W&B's server, as W&B's own settings and variables say, and whether there is a key for it."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return settings.base_url, bool(settings.api_key) or _has_key(settings.base_url)


def own_entity() -> str:
    """The user or team that runs go to when none is named, as the server says."""
    import wandb

    return str(wandb.Api().default_entity)


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(base_url).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def answers(base_url: str, timeout_seconds: float = 5.0) -> bool:
    """Whether something that speaks HTTP is there; any status will do."""
    try:
        urllib.request.urlopen(f"{base_url.rstrip('/')}/healthz", timeout=timeout_seconds).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _end_helpers() -> None:
    """Kill W&B's own processes below this one: the call that waits for them fails, and nothing waits at exit."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name().startswith("wandb-"):
                child.kill()


_SECRET_NAME = re.compile("key|token|secret|passw|credential", re.IGNORECASE)


def redacted(value: Any) -> Any:
    """Plain data in which every value of a secret-looking environment variable is replaced by ***.

    The second guard: what is given here should hold no secret in the first place.
    """
    secrets = [text for name, text in os.environ.items() if _SECRET_NAME.search(name) and len(text) >= 8]
    return _replace(value, sorted(secrets, key=len, reverse=True))


def _replace(value: Any, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _replace(inner, secrets) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace(inner, secrets) for inner in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
    return value


# What a line shows, in this order: metric, label, how the number is written.
_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("train/loss", "loss", "{:.4f}".format),
    ("train/acc_top1", "acc", "{:.3f}".format),
    ("train/pos_sim", "pos", "{:.3f}".format),
    ("train/neg_sim", "neg", "{:.3f}".format),
    ("train/grad_norm", "gnorm", "{:.3g}".format),
    ("train/lr", "lr", "{:.3g}".format),
    ("perf/samples_per_s", "samples/s", "{:.0f}".format),
    ("perf/tokens_per_s", "tok/s", "{:.0f}".format),
    ("perf/data_wait_frac", "wait", "{:.1%}".format),
    ("perf/mem_gib", "mem", "{:.2f}GiB".format),
    ("perf/eta_h", "eta", lambda hours: _hours(hours)),
    ("ckpt/save_s", "save", "{:.1f}s".format),
    ("ckpt/stall_s", "stall", "{:.1f}s".format),
)
_LINE_BYTES = 200


def line(step: int, steps: int, row: Mapping[str, float]) -> str:
    """One plain `key=value` line of a logged step, of about 200 bytes at most."""
    parts = [f"step={step}/{steps}"]
    parts += [f"{label}={write(row[name])}" for name, label, write in _SHOWN if name in row]
    if row.get("train/skipped_steps"):
        parts.append(f"skipped={row['train/skipped_steps']:.0f}")
    if row.get("train/spikes"):
        parts.append(f"spikes={row['train/spikes']:.0f}")
    evals = [f"{name}={value:.4f}" for name, value in row.items() if name.startswith("eval/")]
    while evals and len(" ".join(parts)) + len(evals[0]) < _LINE_BYTES:
        parts.append(evals.pop(0))
    return " ".join(parts) + (f" more={len(evals)}" if evals else "")


def _hours(hours: float) -> str:
    if not math.isfinite(hours):
        return "?"
    minutes = math.ceil(hours * 60)
    return f"{minutes // 60}h{minutes % 60:02d}m"


class Console:
    """A bar on a terminal; a plain line for each logged step elsewhere, so that log files stay small and greppable."""

    def __init__(self, title: str, steps: int, first_step: int) -> None:
        self._steps = steps
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(title, total=steps, completed=first_step, text="")
            self._bar.start()

    def tick(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, row: Mapping[str, float]) -> None:
        text = line(step, self._steps, row)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text.partition(" ")[2])
        else:
            log.info(text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _bar() -> Any:
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=RichConsole(stderr=True), refresh_per_second=4)


def summary(title: str, rows: Sequence[tuple[str, object]]) -> None:
    """Print a small table of facts to stdout, the same on a terminal and in a file."""
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)]), flush=True)

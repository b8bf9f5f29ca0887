"""launcher.cli: the table of commands, their help, their messages and their exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import errors
from launcher import cli, config

_STUB = '''
"""A stage that does what its key says."""
from __future__ import annotations
import logging, os, signal
from dataclasses import dataclass
from data import errors
from data.settings import key

@dataclass(frozen=True, kw_only=True)
class Config:
    act: str = key("done", help="what to do")
    steps: int = key(3, help="optimizer steps", low=1)
    objective: str = key("none", help="what is learned")
    fresh: bool = key(False, help="start over")
    out: str = key(help="a folder")
    note: str | None = key(None, help="kept apart")
    mode: str = key(" a", help="how", choices=(" a", "b"))

def run(config: Config) -> None:
    if config.act == "log":
        logging.getLogger("quintet").info("on we go")
        logging.getLogger("quintet").warning("mind the gap")
    elif config.act == "interrupt":
        raise KeyboardInterrupt
    elif config.act == "sigint":
        os.kill(os.getpid(), signal.SIGINT)
    elif config.act == "bug":
        raise RuntimeError("a fault of ours")
    elif config.act == "flood":
        print("x" * 1_000_000)
    elif config.act == "thread":
        import atexit, threading, torch
        table = torch.ones(64, 64)
        atexit.register(print, "at the end")
        threading.Thread(target=lambda: [torch.mm(table, table) for _ in iter(int, 1)], daemon=True).start()
    elif config.act != "done":
        raise getattr(errors, config.act)(f"{config.act} it is")
    print(config.steps, config.objective, config.fresh, config.out)
'''


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command `stub`, and `preset` of the same module, which sets objective=preset."""
    (tmp_path / "stub_stage.py").write_text(_STUB, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.STAGES, "stub", cli.Stage("stub_stage", "does as told", "quintet stub out=x"))
    preset = cli.Stage("stub_stage", "does as told", "quintet preset out=x", {"objective": "preset"})
    monkeypatch.setitem(cli.STAGES, "preset", preset)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def logger_as_before() -> object:
    """The logger of the process as other tests know it."""
    logger = logging.getLogger("quintet")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def _python(program: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own that knows the stub command."""
    start = (
        f"import sys; sys.path.insert(0, {os.getcwd()!r})\n"
        "from launcher import cli\n"
        "cli.STAGES['stub'] = cli.Stage('stub_stage', 'does as told', 'quintet stub out=x')\n"
    )
    command = [sys.executable, "-c", start + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def test_help_lists_every_command_with_its_line_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], []):
        assert cli.main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"{name} " in shown and stage.line in shown for name, stage in cli.STAGES.items())
        assert "Example: quintet " in shown


def test_help_needs_neither_torch_nor_omegaconf_and_less_than_half_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = _python(
        "cli.main(['--help'])\nsys.exit(' '.join({'torch', 'numpy', 'omegaconf', 'rich'} & set(sys.modules)) or 0)"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    # time of the processor, which a busy machine does not stretch
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version_is_that_of_the_package_and_names_the_commit(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parent.parent
    setup = (root / "setup.cfg").read_text(encoding="utf-8")
    version = next(line.split("=")[1].strip() for line in setup.splitlines() if line.startswith("version"))
    assert cli.main(["--version"]) == 0
    told, _, commit = capsys.readouterr().out.strip().partition(" (commit ")
    assert told == f"quintet {version}"
    if (root / ".git").exists():
        head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True).strip()
        assert commit in (f"{head})", f"{head}+changes)")


@pytest.mark.parametrize(("word", "mend"), [("pretain", "did you mean pretrain?"), ("zzz", "quintet --help")])
def test_an_unknown_command_ends_with_2_and_a_suggestion(
    word: str, mend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([word, "steps=3"]) == 2
    message = capsys.readouterr().err
    assert word in message
    assert mend in message


def test_help_of_a_command_lists_its_keys_with_defaults_bounds_and_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["stub", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.strip().split("  ", 1) for line in lines if "=" in line and line.startswith("  "))
    explained = {left: right.strip() for left, right in rows.items()}
    assert explained["steps=3"] == "optimizer steps (int, at least 1)"
    assert explained["out="] == "a folder (str)"
    assert explained["fresh=false"] == "start over (bool)"
    assert explained["note=null"] == "kept apart (str | null)"
    assert explained["mode=' a'"] == "how ( a | b)"
    assert lines[-1] == "Example: quintet stub out=x"


@pytest.mark.parametrize("name", [name for name in cli.STAGES if name not in ("stub", "preset")])
def test_the_example_of_each_command_gives_its_mandatory_keys_and_no_unknown_one(name: str) -> None:
    stage = cli.STAGES[name]
    words = shlex.split(stage.example)
    words = words[words.index(name) + 1 :]
    options, overrides = cli._parse(name, words)
    files, given = options.config, {word.split("=")[0] for word in overrides if "=" in word}
    keys = {key.name: key for key in config.describe(importlib.import_module(stage.module).Config)}
    mappings = {key.name for key in keys.values() if str(key.type).startswith("dict[")}
    assert {name for name in given if name not in keys and name.rpartition(".")[0] not in mappings} == set()
    if not files:
        assert {key.name for key in keys.values() if key.mandatory} <= given


def test_files_and_words_reach_the_stage_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("steps: 4\nout: a\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("out: b\n", encoding="utf-8")
    assert cli.main(["stub", "--config", "a.yaml", "objective=x", "--config=b.yaml", "--fresh", "--", "--out=c"]) == 0
    assert capsys.readouterr().out == "4 x True c\n"


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_rank_that_a_launcher_appends_is_tolerated(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stub", "out=x", *words]) == 0
    assert cli.main(["stub", *words, "out=x"]) == 0
    assert capsys.readouterr().err == ""


def test_a_command_may_set_keys_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preset", "out=x"]) == 0
    assert "preset" in capsys.readouterr().out
    assert cli.main(["preset", "out=x", "objective=other"]) == 2
    assert "objective=other" in capsys.readouterr().err
    assert cli.main(["preset", "--help"]) == 0
    assert "objective" not in capsys.readouterr().out


def test_the_printed_configuration_can_be_read_back_and_nothing_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stub", "out=x", "act=bug", "steps=7", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7\n" in printed
    (tmp_path / "printed.yaml").write_text(printed, encoding="utf-8")
    assert cli.main(["stub", "--config", "printed.yaml", "act=done"]) == 0
    assert capsys.readouterr().out == "7 none False x\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [("UserError", 2), ("DataError", 3), ("NumericError", 4), ("Stopped", 75), ("WatchdogError", 124)],
)
def test_each_foreseen_end_has_its_code_and_one_message_without_a_traceback(
    error: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stub", "out=x", f"act={error}"]) == code
    assert capsys.readouterr().err == f"quintet stub: {error} it is\n"
    assert cli.main(["stub", "out=x", f"act={error}", "--debug"]) == code
    assert f"errors.{error}: {error} it is" in capsys.readouterr().err


def test_a_thread_that_is_still_in_torch_spoils_no_exit_code() -> None:
    """Left to Python the process aborts: 134, "terminate called without an active exception"."""
    result = _python("sys.exit(cli.main())", "stub", "out=x", "act=thread")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "3 none False x\nat the end\n"


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    result = _python("sys.exit(cli.main(['stub', 'out=x', 'act=bug']))")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "a fault of ours" in result.stderr


def test_all_problems_of_a_configuration_are_told_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stub", "steps=0", "stepz=3"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("quintet stub: 3 problems in the configuration:\n")
    assert all(key in message for key in ("steps=0", "stepz", "out: must be given"))


def test_a_missing_value_of_an_option_ends_with_2() -> None:
    result = _python("sys.exit(cli.main(['stub', 'out=x', '--config']))")
    assert result.returncode == 2
    assert "--config" in result.stderr


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_rank_0_alone_tells_what_is_wrong_with_the_configuration(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)  # an earlier job of this process may have left its own
    monkeypatch.setenv(variable, "3")
    assert cli.main(["stub", "steps=0"]) == 2
    assert capsys.readouterr().err == ""
    assert cli.main(["stub", "out=x", "--print-config"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(variable, "0")
    assert cli.main(["stub", "steps=0"]) == 2
    assert "steps=0" in capsys.readouterr().err


def test_another_rank_names_itself_in_what_only_it_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["stub", "out=x", "act=DataError"]) == 3
    assert capsys.readouterr().err == "[rank 3] quintet stub: DataError it is\n"


def test_the_log_is_plain_on_rank_0_and_warnings_with_the_rank_on_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["stub", "out=x", "act=log"])
    assert capsys.readouterr().err == "on we go\nmind the gap\n"
    monkeypatch.setenv("RANK", "2")
    cli.main(["stub", "out=x", "act=log"])
    assert capsys.readouterr().err == "[rank 2] mind the gap\n"


def test_ctrl_c_ends_with_130_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stub", "out=x", "act=interrupt"]) == 130
    assert capsys.readouterr().err == "quintet stub: interrupted\n"
    result = _python("sys.exit(cli.main(['stub', 'out=x', 'act=sigint']))")
    assert (result.returncode, result.stderr) == (130, "quintet stub: interrupted\n")


def test_a_reader_that_goes_away_causes_no_traceback(tmp_path: Path) -> None:
    out, into = os.pipe()
    os.close(out)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from launcher import cli; "
    program += (
        "cli.STAGES['stub'] = cli.Stage('stub_stage', '', ''); sys.exit(cli.main(['stub', 'out=x', 'act=flood']))"
    )
    result = subprocess.run([sys.executable, "-c", program], stdout=into, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(into)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "quintet"
    result = subprocess.run([str(script), "--version"], capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith("quintet ")


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    codes = {name: getattr(errors, name).exit_code for name in ("UserError", "ConfigError", "DataError")}
    assert (errors.EXIT_DONE, codes) == (0, {"UserError": 2, "ConfigError": 2, "DataError": 3})
    assert [error.exit_code for error in (errors.NumericError, errors.Stopped, errors.WatchdogError)] == [4, 75, 124]


def test_search_takes_the_model_and_the_texts_without_their_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "runs/mine", "top_k=3", "passages.txt", "--print-config"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert {"model: runs/mine", "input: passages.txt", "top_k: 3"} <= set(printed)


def test_a_word_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "runs/mine", "passages.txt", "more.txt", "--print-config"]) == 2
    assert "more.txt" in capsys.readouterr().err

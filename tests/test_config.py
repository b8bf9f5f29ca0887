"""launcher.config: what a Config is filled with, and that every mistake is found, named and mended at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data.errors import ConfigError
from data.settings import key, unresolved
from launcher import config

WriteYaml = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class Section:
    query: str = key("query: ", help="before every query")
    every_steps: int = key(0, help="steps between evaluations", low=0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run_dir: str = key(help="folder of the run")
    data: str | list[str] = key(help="shards")
    steps: int = key(100, help="optimizer steps", low=1, high=1000)
    lr: float = key(2e-4, help="peak learning rate", above=0)
    fresh: bool = key(False, help="start over")
    limit: int | None = key(None, help="at most", low=3)
    languages: list[str] = key([], help="BCP-47")
    betas: tuple[float, float] = key((0.9, 0.999), help="averages")
    columns: dict[str, str] = key({"query": "query"}, help="column map")
    unit: Literal["step", "epoch"] = key("step", help="of steps")
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    stages: tuple[int, ...] = key((0, 1), help="of ZeRO", choices=(0, 1, 2, 3))
    prompts: Section = key(Section(query="q: "), help="prompts")
    text: str = unresolved()

    def check(self) -> list[str]:
        return [f"lr={self.lr}: too high for steps={self.steps}; lower it"] if self.lr * self.steps > 1 else []


GIVEN = ["run_dir=run", "data=shards"]


@pytest.fixture
def write(tmp_path: Path) -> WriteYaml:
    """Write a YAML file and return its path."""

    def to(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return to


def problems(*overrides: str, files: tuple[Path, ...] = (), fixed: dict[str, str] | None = None) -> list[str]:
    """What the loader complains about, with the mandatory keys given."""
    with pytest.raises(ConfigError) as error:
        config.load(Recipe, files, [*GIVEN, *overrides], fixed=fixed)
    return list(error.value.problems)


# Values


def test_defaults_are_those_of_the_dataclass() -> None:
    loaded = config.load(Recipe, [], GIVEN)
    assert dataclasses.replace(loaded, text="") == Recipe(run_dir="run", data="shards")
    assert loaded.prompts.query == "q: "  # the parent's default wins over the section's own


def test_later_files_win_over_earlier_ones_and_overrides_over_files(write: WriteYaml) -> None:
    first = write("steps: 5\nlr: 0.1\nprompts:\n  query: a\n  every_steps: 7\n", "first.yaml")
    second = write("steps: 6\nprompts: {query: b}\n", "second.yaml")
    loaded = config.load(Recipe, [first, second], [*GIVEN, "steps=7", "steps=8"])
    assert (loaded.steps, loaded.lr, loaded.prompts) == (8, 0.1, Section(query="b", every_steps=7))


def test_a_file_wins_over_what_it_includes_relative_to_itself(write: WriteYaml, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write("steps: 1\nlr: 0.1\nunit: epoch\n", "shared/base.yaml")
    write("include: base.yaml\nlr: 0.2\n", "shared/middle.yaml")
    recipe = write("include: [shared/middle.yaml]\nsteps: 3\n")
    loaded = config.load(Recipe, [recipe], GIVEN)
    assert (loaded.steps, loaded.lr, loaded.unit) == (3, 0.2, "epoch")


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("steps=32", "steps", 32),
        ("--steps=32", "steps", 32),
        ("--run-dir=a/b", "run_dir", "a/b"),
        ("steps=1_000", "steps", 1000),
        ("lr=1e-4", "lr", 1e-4),  # text in YAML 1.1
        ("betas=[0, 1]", "betas", (0.0, 1.0)),
        ("--fresh", "fresh", True),
        ("fresh=true", "fresh", True),
        ("limit=null", "limit", None),
        ("limit=4", "limit", 4),
        ("data=[a, b]", "data", ["a", "b"]),
        ("data=a=b", "data", "a=b"),
        ("data=no", "data", "no"),  # a word on the command line is the text it is
        ("data='[a]'", "data", "[a]"),
        ("betas=[0.5, 1]", "betas", (0.5, 1.0)),
        ("stages=[1,3]", "stages", (1, 3)),
        ("columns.passage=body", "columns", {"query": "query", "passage": "body"}),
        ("columns={passage: body}", "columns", {"query": "query", "passage": "body"}),
        ("unit=epoch", "unit", "epoch"),
        ("prompts.query=Query:  ", "prompts", Section(query="Query:  ")),  # blanks count
        ("prompts.query=", "prompts", Section(query="")),
    ],
)
def test_an_override_is_read_as_the_type_its_key_wants(override: str, name: str, value: object) -> None:
    found = getattr(config.load(Recipe, [], [*GIVEN, override]), name)
    assert found == value
    assert type(found) is type(value)


def test_yaml_numbers_and_texts_are_read_as_the_type_their_key_wants(write: WriteYaml) -> None:
    recipe = write("lr: 1e-4\nrun_dir: 2026-01-01\ndata: 007\ncolumns: {query: 'no'}\nfresh: on\nprompts:\n")
    loaded = config.load(Recipe, [recipe])
    assert (loaded.lr, loaded.run_dir, loaded.data) == (1e-4, "2026-01-01", "007")
    assert (loaded.columns, loaded.fresh, loaded.prompts) == ({"query": "no"}, True, Section(query="q: "))


def test_interpolations_stand_for_other_keys_and_for_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS_OF_TEST", "12")
    words = ["prompts.every_steps=${steps}", "steps=${oc.env:STEPS_OF_TEST}", "data=[${run_dir}/a, b]"]
    loaded = config.load(Recipe, [], ["run_dir=run", words[0], words[1], "data=${run_dir}/${unit}"])
    assert (loaded.steps, loaded.prompts.every_steps, loaded.data) == (12, 12, "run/step")
    assert config.load(Recipe, [], ["run_dir=run", "data=['${run_dir}/a', b]"]).data == ["run/a", "b"]
    assert config.load(Recipe, [], [*GIVEN, "steps=${oc.env:UNSET_IN_TEST,7}"]).steps == 7


_TRAPS = st.sampled_from(["no", "on", "y", "null", "~", "1e3", "0123", "1:30", "", " a", "#b", "- c", "a: b"])

_TEXTS = _TRAPS | st.text(st.characters(exclude_categories=["C", "Zl", "Zp"], exclude_characters="$"))


@given(
    st.builds(
        Recipe,
        run_dir=_TEXTS,
        data=_TEXTS | st.lists(_TEXTS),
        steps=st.integers(1, 1000),
        lr=st.floats(1e-300, 1e-3, exclude_min=True),
        fresh=st.booleans(),
        limit=st.none() | st.integers(3),
        languages=st.lists(_TRAPS),
        columns=st.dictionaries(st.sampled_from(["query", "on", "no"]), _TEXTS, min_size=1),
        prompts=st.builds(Section, query=_TEXTS),
    )
)
def test_the_stored_text_gives_the_same_configuration_again(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, columns={"query": "query", **recipe.columns})
    values = dataclasses.asdict(recipe)
    del values["text"]
    values["betas"], values["stages"] = list(recipe.betas), list(recipe.stages)
    once = _load_text(yaml.safe_dump(values, allow_unicode=True))
    assert dataclasses.replace(once, text="") == recipe
    assert _load_text(once.text) == once


def _load_text(text: str) -> Recipe:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return config.load(Recipe, [file.name])


# Mistakes


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("stepz=3", ["stepz", "did you mean steps?"]),
        ("promts.query=x", ["promts.query", "did you mean prompts.query?"]),
        ("every_steps=3", ["every_steps", "did you mean prompts.every_steps?"]),
        ("--frehs", ["frehs", "did you mean fresh?"]),
        ("--confg", ["--confg: no such option", "did you mean --config?"]),
        ("zzz=3", ["zzz", "--help lists the keys"]),
        ("prompts=3", ["prompts=3", "is a section", "prompts.query", "prompts.every_steps"]),
        ("a.b", ["a.b: has no value; write a.b=VALUE"]),
        ("--steps", ["--steps: has no value; write steps=VALUE"]),
        ("recipe.yaml", ["--config recipe.yaml"]),
        ("steps=many", ["steps=many", "whole number"]),
        ("steps=1.5", ["steps=1.5", "whole number"]),
        ("steps=1e2", ["steps=1e2", "write 100"]),
        ("steps=0123", ["steps=0123", "83"]),
        ("steps=", ["steps=", "whole number"]),
        ("steps=[1]", ["steps=[1]", "whole number"]),
        ("lr=fast", ["lr=fast", "number"]),
        ("lr=on", ["lr=on", "number"]),
        ("lr=.nan", ["lr=.nan", "number"]),
        ("lr=1e999", ["lr=1e999", "finite"]),
        ("fresh=1", ["fresh=1", "true or false"]),
        ("languages=de", ["languages=de", "a list of text"]),
        ("languages=[de", ["languages=[de", "YAML"]),
        ("languages=[no]", ["languages=[no]", "false", "quotes"]),
        ("betas=[1]", ["betas=[1]", "2"]),
        ("columns=3", ["columns=3", "mapping"]),
        ("unit=day", ["unit=day", "step, epoch"]),
        ("precision=bf61", ["precision=bf61", "fp32, bf16", "did you mean bf16?"]),
        ("stages=[1, 4]", ["stages=[1, 4]", "0, 1, 2, 3"]),
        ("steps=0", ["steps=0", "at least 1"]),
        ("steps=1001", ["steps=1001", "at most 1000"]),
        ("lr=0", ["lr=0", "above 0"]),
        ("limit=2", ["limit=2", "at least 3"]),
        ("data=${oc.env:UNSET_IN_TEST}", ["data=", "UNSET_IN_TEST", "not set", "export"]),
        ("data=${rundir}", ["data=${rundir}", "no key rundir"]),
        ("data=${data}", ["data=${data}", "ecursive"]),
        ("data=${oops", ["data=${oops", "interpolation"]),
        ("steps=${run_dir}", ["steps=${run_dir}", "whole number"]),
        ("run_dir=???", ["run_dir", "must be given", "folder of the run"]),
        ("lr=0.5", ["lr=0.5", "too high"]),  # the Config's own check
    ],
)
def test_each_mistake_on_the_command_line_has_one_message_with_key_value_and_mend(
    override: str, names: list[str]
) -> None:
    (problem,) = problems(override)
    assert all(name in problem for name in names), problem


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("run_dir: on\n", ["run_dir=on", "true", "quotes", "recipe.yaml:1"]),
        ("data: no\n", ["data=no", "false", "'no'", "recipe.yaml:1"]),
        ("lr: 1\nsteps: 0123\n", ["steps=0123", "83", "recipe.yaml:2"]),
        ("steps: 1:30\n", ["steps=1:30", "90"]),
        ("lr: 010\n", ["lr=010", "8"]),
        ("languages: [de, no]\n", ["languages=[de, no]", "quotes"]),
        ("columns: {query: yes}\n", ["columns={query: yes}", "quotes"]),
        ("run_dir:\n", ["run_dir=", "text"]),
        ("precision: off\n", ["precision=off", "quotes"]),
        ("steps: 1\nprompts:\n  qurey: x\n", ["prompts.qurey", "prompts.query", "recipe.yaml:3"]),
        ("steps: 1\nsteps: 2\n", ["steps", "given twice", "line 1", "recipe.yaml:2"]),
        ("prompts:\n  query: a\nprompts:\n  query: b\n", ["prompts", "given twice"]),
        ("include: base.yaml\n", ["base.yaml", "no such file", "recipe.yaml:1"]),
        ("include: recipe.yaml\n", ["recipe.yaml", "includes itself"]),
        ("include: 3.5: x\n", ["recipe.yaml:1:13", "YAML"]),
        ("include: {a: b}\n", ["include={a: b}", "file name"]),
        ("a: [\n", ["recipe.yaml:2:1", "invalid YAML"]),
        ("a:\n\tb: 1\n", ["recipe.yaml:2:1", "invalid YAML"]),
        ("- a\n", ["recipe.yaml", "no mapping"]),
        ("a: 1\n---\nb: 2\n", ["recipe.yaml", "YAML"]),
        ("columns: {[a]: b}\n", ["columns=", "no plain text"]),
        ("data: !!python/object/apply:os.system ['exit 1']\n", ["data=", "tag", "recipe.yaml:1"]),
        ("data: !mine x\n", ["data=", "!mine"]),
    ],
)
def test_each_mistake_in_a_file_is_named_with_its_place(write: WriteYaml, text: str, names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(Recipe, [write("run_dir: r\ndata: d\n", "given.yaml"), write(text)])
    about = [problem for problem in error.value.problems if not problem.endswith("did you mean data?")]
    assert any(all(name in problem for name in names) for problem in about), error.value.problems


def test_unreadable_files_are_named(write: WriteYaml, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"run_dir: caf\xe9\n")
    found = problems(files=(tmp_path / "none.yaml", tmp_path, tmp_path / "latin.yaml"))
    assert [problem.split(":")[0] for problem in found] == [str(tmp_path / name) for name in _UNREADABLE]
    assert "no such file" in found[0]
    assert "UTF-8" in found[2]


_UNREADABLE = ("none.yaml", "", "latin.yaml")


def test_all_problems_of_files_and_overrides_are_listed_at_once(
    write: WriteYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET_IN_TEST", raising=False)
    recipe = write("stepz: 3\nsteps: 0123\nlanguages: no\nlr: ${oc.env:UNSET_IN_TEST}\n")
    with pytest.raises(ConfigError) as error:
        config.load(Recipe, [recipe, "none.yaml"], ["precision=fp16", "limit=1", "a.b"])
    beginnings = {problem.split("=")[0].split(":")[0] for problem in error.value.problems}
    expected = {"stepz", "steps", "languages", "lr", "none.yaml", "precision", "limit", "a.b", "run_dir", "data"}
    assert beginnings == expected
    assert len(error.value.problems) == len(expected)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("word", ["data=[a", "data", "--data"])
def test_a_key_whose_value_cannot_be_read_is_not_also_called_missing(word: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.load(Recipe, [], ["run_dir=r", word])
    (problem,) = error.value.problems
    assert problem.startswith(word)


def test_a_key_that_the_command_sets_cannot_be_given_another_value() -> None:
    (problem,) = problems("unit=epoch", fixed={"unit": "step"})
    assert "unit=epoch" in problem
    assert config.load(Recipe, [], [*GIVEN, "unit=step"], fixed={"unit": "step"}).unit == "step"
    assert config.load(Recipe, [], GIVEN, fixed={"unit": "epoch"}).unit == "epoch"


# Secrets


def test_a_secret_of_the_environment_is_used_but_never_written(
    write: WriteYaml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "s3cr3t")
    recipe = write("run_dir: runs\ndata: ${oc.env:KEY_OF_TEST}\nprompts: {query: 'of ${data}'}\nlanguages: [x]\n")
    overrides = ["languages=['${prompts.query}', '${run_dir}']"]
    loaded = config.load(Recipe, [recipe], overrides)
    assert (loaded.data, loaded.prompts.query, loaded.languages) == ("s3cr3t", "of s3cr3t", ["of s3cr3t", "runs"])
    shown = config.render(Recipe, [recipe], overrides)
    assert "s3cr3t" not in loaded.text + shown + repr(loaded.text)
    assert "${oc.env:KEY_OF_TEST}" in loaded.text


@pytest.mark.parametrize("name", ["steps", "precision", "lr", "betas"])
def test_a_wrong_value_out_of_the_environment_is_not_shown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TEST", "s3cr3t")
    (problem,) = problems(f"{name}=${{oc.env:KEY_OF_TEST}}")
    assert "s3cr3t" not in problem
    assert "KEY_OF_TEST" in problem


def test_the_rendered_configuration_resolves_what_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = yaml.safe_load(config.render(Recipe, [], ["run_dir=runs/a", "data=${run_dir}/shards", "steps=5"]))
    assert (shown["data"], shown["steps"], shown["prompts"]["query"]) == ("runs/a/shards", 5, "q: ")
    assert "text" not in shown


# Help


def test_description_lists_every_key_with_what_help_shows() -> None:
    rows = {row.name: row for row in config.describe(Recipe)}
    assert list(rows)[:3] == ["run_dir", "data", "steps"]
    assert "text" not in rows
    assert rows["run_dir"].mandatory
    assert (rows["steps"].default, rows["steps"].low, rows["steps"].high) == (100, 1, 1000)
    assert (rows["prompts.query"].default, rows["prompts.query"].help) == ("q: ", "before every query")
    assert rows["precision"].choices == ("fp32", "bf16")

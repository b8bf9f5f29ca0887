"""Sources, weights and the messages about mixture files."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from pairs import pairs, write_shards

from data import mixture
from data.errors import ConfigError, UserError
from data.shards import load_index, read_block, write_index


def put(folder: Path, records: int, source: str, **options: object) -> Path:
    write_shards(folder, pairs(records, source=source, seed=len(source)), source=source, **options)  # type: ignore[arg-type]
    return folder


def mixture_file(folder: Path, text: str) -> str:
    path = folder / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def sizes(found: mixture.Mixture) -> dict[str, int]:
    return {source.name: source.records for source in found.sources}


# Folders


def test_folders_are_divided_into_their_sources_and_equal_names_are_joined(tmp_path: Path) -> None:
    put(tmp_path / "one", 20, "news")
    put(tmp_path / "two", 30, "wiki")
    put(tmp_path / "three", 12, "news", kind="plain")
    found = mixture.load([str(tmp_path / name) for name in ("two", "one", "three")])
    assert sizes(found) == {"news": 32, "wiki": 30}
    assert found.records == 62
    assert [source.weight for source in found.sources] == [32, 30]
    assert found.homogeneous


def test_alpha_flattens_the_weights(tmp_path: Path) -> None:
    put(tmp_path / "a", 9, "a")
    put(tmp_path / "b", 16, "b")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [source.weight for source in mixture.load(folders, alpha=0.5).sources] == [3, 4]
    assert [source.weight for source in mixture.load(folders, alpha=0).sources] == [1, 1]


def test_the_order_is_the_same_wherever_the_folders_lie_and_whatever_their_order(tmp_path: Path) -> None:
    a, b = put(tmp_path / "a", 20, "a"), put(tmp_path / "b", 30, "b")
    order = mixture.load([str(a), str(b)]).order(8, lanes=4)
    shutil.copytree(tmp_path / "b", tmp_path / "deep" / "down" / "b")
    moved = mixture.load([str(tmp_path / "deep" / "down" / "b"), str(a)]).order(8, lanes=4)
    moved.check(order.state())
    for step in range(10):
        assert moved.global_batch(step).tolist() == order.global_batch(step).tolist()


def test_other_records_are_another_order(tmp_path: Path) -> None:
    order = mixture.load(str(put(tmp_path, 20, "a"))).order(8, lanes=4)
    write_shards(tmp_path, pairs(20, source="a", seed=99), source="a")
    with pytest.raises(UserError, match=r"sources\.a\.fingerprint"):
        mixture.load(str(tmp_path)).order(8, lanes=4).check(order.state())


def test_records_are_numbered_shard_by_shard_and_row_by_row(tmp_path: Path) -> None:
    records = pairs(50, source="a")
    write_shards(tmp_path, records, source="a", kind="plain", shard_bytes=10_240)
    source = mixture.load(str(tmp_path)).sources[0]
    assert len(source.index.shards) > 2
    assert len(source.blocks) == len(source.starts) - 1
    ids = []
    for (shard, block), start in zip(source.blocks, source.starts, strict=False):
        assert start == len(ids)
        ids += read_block(source.index, int(shard), int(block)).table["id"].to_pylist()
    assert ids == [record.id for record in records]
    first = source.index.shards[0].records
    assert source.locate(first + 2) == (f"record {first + 2} of source a ({tmp_path}/a-000001.tar, record 2 in it)")


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a", 20, "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"a-000000\.tar is named twice"):
        mixture.load([str(tmp_path / "a"), str(tmp_path / "link")])
    text = "sources: {x: {shards: a}, y: {shards: a/a-000000.tar}}"
    with pytest.raises(UserError, match="for source x and for source y; name it once"):
        mixture.load(mixture_file(tmp_path, text))


def test_no_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no shards"):
        mixture.load([])
    write_index(tmp_path, [])
    with pytest.raises(UserError, match="no records there"):
        mixture.load(str(tmp_path))


def test_what_an_index_leaves_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 20, "a", kind="plain")
    shard = tmp_path / "a-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b'{"query":', b'{"Query":', 3))
    (tmp_path / "index.json").unlink()
    with caplog.at_level(logging.WARNING, "quintet"):
        found = mixture.load(str(tmp_path), policy="skip")
    assert sizes(found) == {"a": 17}
    assert found.bad == {"missing query": 3}
    assert "leaves out bad samples: 3 missing query" in caplog.text


@pytest.mark.parametrize(("homogeneous", "told"), [(True, ["small"]), (False, [])])
def test_a_source_smaller_than_its_part_of_a_batch_is_told(
    tmp_path: Path, homogeneous: bool, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path / "a", 10, "small")
    put(tmp_path / "b", 90, "large")
    found = mixture.load([str(tmp_path / "a"), str(tmp_path / "b")], homogeneous=homogeneous)
    with caplog.at_level(logging.WARNING, "quintet"):
        found.order(64, lanes=8)
    assert [message.split(":")[0] for message in caplog.messages] == [f"source {name}" for name in told]


# Mixture files


def test_a_file_names_sources_with_weights_flags_and_paths_beside_it(tmp_path: Path) -> None:
    put(tmp_path / "shards" / "a", 20, "whatever")
    put(tmp_path / "shards" / "b", 12, "other")
    put(tmp_path / "shards" / "c", 8, "other")
    text = """
        homogeneous: false
        sources:
          questions: {shards: shards/a, weight: 3, instruction: Find the answer}
          bitext: {shards: ["shards/b", "shards/c/*.tar"], weight: 0.5, symmetric: true}
    """
    found = mixture.load(mixture_file(tmp_path, text))
    assert sizes(found) == {"bitext": 20, "questions": 20}
    bitext, questions = found.sources
    assert (bitext.weight, bitext.symmetric, bitext.instruction) == (0.5, True, "")
    assert (questions.weight, questions.symmetric, questions.instruction) == (3, None, "Find the answer")
    assert not found.homogeneous
    order = found.order(8, lanes=4, seed=7, shuffle_blocks=2)
    assert (order.seed, order.shuffle_blocks, order.homogeneous) == (7, 2, False)
    assert order.shares == pytest.approx({"bitext": 0.143, "questions": 0.857})


@pytest.mark.parametrize(
    ("flag", "was", "now"),
    [
        ("symmetric: true", "symmetric", "True -> absent"),
        ("instruction: Find it", "instruction", "Find it -> absent"),
        ("in_batch_negatives: false", "in_batch_negatives", "False -> absent"),
        ("scores: false", "scores", "False -> absent"),
    ],
)
def test_a_flag_that_changes_between_starts_is_refused_with_its_name(
    tmp_path: Path, flag: str, was: str, now: str
) -> None:
    put(tmp_path / "a", 20, "a")
    flagged = mixture.load(mixture_file(tmp_path, f"sources: {{a: {{shards: a, {flag}}}}}"))
    plain = mixture.load(mixture_file(tmp_path, "sources: {a: {shards: a}}")).order(8, lanes=4)
    assert getattr(flagged.sources[0], was) not in (None, "")
    order = flagged.order(8, lanes=4)
    order.check(order.state())
    assert order.global_batch(3).tolist() == plain.global_batch(3).tolist()
    with pytest.raises(UserError, match=rf"sources\.a\.{was} {now}"):
        plain.check(order.state())
    with pytest.raises(UserError, match=rf"sources\.a\.{was} absent -> "):
        order.check(plain.state())


def test_flags_that_say_the_default_are_no_change(tmp_path: Path) -> None:
    put(tmp_path / "a", 20, "a")
    plain = mixture.load(mixture_file(tmp_path, "sources: {a: {shards: a}}")).order(8, lanes=4)
    spelled = "sources: {a: {shards: a, instruction: '', in_batch_negatives: true, scores: true}}"
    mixture.load(mixture_file(tmp_path, spelled)).order(8, lanes=4).check(plain.state())


def test_a_file_says_alpha_and_the_caller_the_default(tmp_path: Path) -> None:
    put(tmp_path / "a", 9, "a")
    put(tmp_path / "b", 16, "b")
    sources = "sources: {x: {shards: a}, y: {shards: b}}"
    assert [s.weight for s in mixture.load(mixture_file(tmp_path, sources), alpha=0.5).sources] == [3, 4]
    own = mixture.load(mixture_file(tmp_path, f"alpha: 1\nhomogeneous: true\n{sources}"), alpha=0.5, homogeneous=False)
    assert [s.weight for s in own.sources] == [9, 16]
    assert own.homogeneous


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = """
        homogenous: true
        alpha: much
        sources:
          a: {shard: x, weight: -1}
          b: {shards: [x, 3], symetric: yes, instruction: 4, scores: none, in_batch_negatives: 0}
          c: nothing
          7: {shards: x}
    """
    with pytest.raises(ConfigError) as error:
        mixture.load(mixture_file(tmp_path, text))
    problems = error.value.problems
    expected = [
        "homogenous: there is no such key; did you mean 'homogeneous'?",
        "alpha='much': give a number of 0 or more",
        "sources.a.shard: there is no such key; did you mean 'shards'?",
        "sources.a.shards=None: give a folder",
        "sources.a.weight=-1: give a number",
        "sources.b.symetric: there is no such key; did you mean 'symmetric'?",
        "sources.b.shards=['x', 3]: give a folder",
        "sources.b.in_batch_negatives=0: give true or false",
        "sources.b.scores='none': give true or false",
        "sources.b.instruction=4: give a text",
        "sources.c: give {shards: folder}, not 'nothing'",
        "the name 7 is no text",
        "sources.b: has no weight but sources.a has",
        "alpha: has no effect beside weights",
    ]
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert problem.startswith(str(tmp_path / "mix.yaml"))
        assert text in problem
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [", "not YAML"),
        ("- a", "a mixture is a mapping"),
        ("", "a mixture is a mapping"),
        ("alpha: 1", "name at least one source"),
        ("sources: {}", "name at least one source"),
        ("sources:\n  a: {shards: x}\n  b: {shards: y}\n  a: {shards: z}", "the key 'a' stands twice"),
        ("sources: {a: {shards: !!python/object/apply:os.system [touch canary]}}", "not YAML"),
        ("sources: {a: {shards: x, weight: .nan}}", "give a number of 0 or more"),
        ("sources: {a: {shards: x, weight: yes}}", "give a number of 0 or more"),
    ],
)
def test_a_file_that_is_no_mixture_is_refused(
    tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        mixture.load(mixture_file(tmp_path, text))
    assert message in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_a_missing_file_and_a_file_beside_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        mixture.load(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="stands alone"):
        mixture.load(["mix.yml", "shards"])


def test_a_pipe_in_a_file_is_refused_unless_allowed(tmp_path: Path) -> None:
    path = mixture_file(tmp_path, f"sources: {{a: {{shards: 'pipe:touch {tmp_path}/canary'}}}}")
    with pytest.raises(UserError, match="pipe"):
        mixture.load(path)
    assert not (tmp_path / "canary").exists()


def test_sources_of_weight_0_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path / "a", 20, "a")
    put(tmp_path / "b", 3, "b")
    text = "sources: {a: {shards: a, weight: 1}, b: {shards: b, weight: 0}}"
    order = mixture.load(mixture_file(tmp_path, text)).order(8, lanes=4)
    assert order.shares == {"a": 1, "b": 0}
    assert {int(i) >> 40 for step in range(20) for i in order.global_batch(step)} == {0}


def test_indexes_agree_with_load_index(tmp_path: Path) -> None:
    put(tmp_path, 20, "a")
    source = mixture.load(str(tmp_path)).sources[0]
    assert source.index.fingerprint == load_index(str(tmp_path)).fingerprint
    assert np.diff(source.starts).tolist() == [8, 8, 4]

"""Bytes that nobody meant: readers give what is sound or one of our errors, never a crash, a hang or all the memory.

Some hundred examples of each as a test; `python tests/test_fuzz.py MINUTES` goes on with new ones until time is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import pairs, write_shards

from data import index as indexes
from data.errors import ConfigError, DataError, UserError
from data.scores import BadSegment, ScoreWriter, read_segment
from data.shards import build_index, read_block
from launcher import config
from trainer import evaluate, train

TEACHER = "0" * 32
MOST_MEGABYTES = 300  # that reading a few kilobytes may add to this process
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "120")),
    deadline=20_000,  # a hang, not a slow machine
    suppress_health_check=list(HealthCheck),
    database=None,
)


class Sound:
    """Valid files of each kind, to be spoiled."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.tars = []
        for kind in ("plain", "block"):
            index = write_shards(self.folder / kind, pairs(8), kind=kind, block_records=4)
            self.tars.append(Path(index.path(0)).read_bytes())
        self.index = json.loads((self.folder / "plain" / "index.json").read_bytes())
        writer = ScoreWriter(self.folder / "scores", TEACHER)
        writer.add(np.arange(9), np.arange(9) + 5, np.linspace(-3, 3, 9, dtype=np.float32))
        segment = writer.flush()
        assert segment is not None
        self.segment = segment.read_bytes()


SOUND = Sound()


def peak() -> float:
    """Megabytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Memory:
    """What the process held at most before a test."""

    before = 0.0


@pytest.fixture(autouse=True)
def memory() -> None:
    Memory.before = peak()


def grown() -> float:
    """Megabytes by which the process has grown in this test."""
    return peak() - Memory.before


@st.composite
def spoiled(draw: st.DrawFn, sound: tuple[bytes, ...]) -> bytes:
    """A valid file after some flips, cuts, holes, insertions, removals, and numbers where numbers may stand."""
    content = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(1, 4))):
        at = int(draw(st.floats(0, 1, exclude_max=True)) * max(1, len(content)))
        what = draw(st.sampled_from(["flip", "cut", "zero", "insert", "remove", "number", "bytes"]))
        length = draw(st.integers(1, 2000))
        if what == "flip" and content:
            content[min(at, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif what == "cut":
            del content[at:]
        elif what == "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif what == "insert":
            content[at:at] = draw(st.binary(max_size=600))
        elif what == "remove":
            del content[at : at + length]
        elif what == "number":
            number = draw(st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 10 * 2**30]))
            raw = number.to_bytes(8, "little", signed=number < 2**63) if number < 2**63 else bytes(8)
            content[at : at + 8] = raw
        else:
            piece = draw(st.binary(min_size=1, max_size=64))
            content[at : at + len(piece)] = piece
    return bytes(content)


@given(content=spoiled(tuple(SOUND.tars)), mended=st.booleans())
@FUZZ
def test_a_shard_of_any_bytes_is_read_or_refused(content: bytes, mended: bool) -> None:
    """Hashes keep most damage out. Here the index is made of the damaged file, so that what is behind them is met."""
    if mended:
        content = with_checksums(content)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "pairs-000000.tar").write_bytes(content)
        for policy in ("strict", "skip"):
            try:
                index = build_index(name, policy=policy)
                for shard, info in enumerate(index.shards):
                    for block in range(len(info.blocks)):
                        read_block(index, shard, block, policy=policy)
            except (DataError, UserError):
                continue
    assert grown() < MOST_MEGABYTES


def with_checksums(content: bytes) -> bytes:
    """The same with right checksums where tar headers may stand, so that what they say is believed."""
    found = bytearray(content)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_index(draw: st.DrawFn) -> bytes:
    """An index of which one to three values, at any depth, are others."""
    whole: Any = json.loads(json.dumps(SOUND.index))
    for _ in range(draw(st.integers(1, 3))):
        at = whole
        while True:
            keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and draw(st.booleans()):
                at = at[key]
                continue
            at[key] = draw(VALUES | st.sampled_from([2**62, -1, "../../etc/passwd", "a\0b", 10 * 2**30]))
            break
    try:
        return orjson.dumps(whole)
    except (TypeError, orjson.JSONEncodeError):
        return json.dumps(whole).encode()


@given(content=changed_index() | spoiled((orjson.dumps(SOUND.index),)))
@FUZZ
def test_an_index_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    try:
        index = indexes.decode(content, str(SOUND.folder / "plain"), "index.json")
    except DataError:
        return
    for shard, info in enumerate(index.shards):
        assert Path(index.path(shard)).parent == SOUND.folder / "plain", "a name leads out of the folder"
        for block in range(len(info.blocks)):
            read_block(index, shard, block, policy="skip")
    assert grown() < MOST_MEGABYTES


@given(content=spoiled((SOUND.segment,)))
@FUZZ
def test_a_segment_of_scores_of_any_bytes_is_read_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        file.write(content)
        file.flush()
        try:
            rows = read_segment(Path(file.name), TEACHER)
        except BadSegment:
            return
        assert np.isfinite(rows.logit).all()
    assert grown() < MOST_MEGABYTES


KEYS = ["data", "batch_size", "lr", "betas", "model.path", "loss.guide.path", "eval.data", "include", "x.y", ""]
VALUE_TEXTS = ["1", "null", "on", "0123", "1e-4", "[1,", "{a: b}", "${oc.env:HOME}", "${", "${steps}", "&a [*a]"]
VALUE_TEXTS += ["!!python/object/apply:os.system [touch canary]"]


@given(
    text=st.text(max_size=80)
    | st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUE_TEXTS)), max_size=4).map(
        lambda rows: "\n".join(f"{key}: {value}" for key, value in rows)
    ),
    words=st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUE_TEXTS) | st.text(max_size=12)).map("=".join)
        | st.text(max_size=12),
        max_size=3,
    ),
    kind=st.sampled_from([train.Config, evaluate.Config]),
)
@FUZZ
def test_a_configuration_of_any_text_is_loaded_or_refused(text: str, words: list[str], kind: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "config.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(ConfigError):
            config.load(kind, [file], words)
        assert not Path("canary").exists()
    assert grown() < MOST_MEGABYTES


def test_aliases_that_would_grow_without_end_are_refused(tmp_path: Path) -> None:
    """Some lines of YAML that stand for ten thousand million values, or for a list that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    for text in ("\n".join([*lines, "data: *a9"]), "data: &a [*a]", "data: " + "[" * 10_000):
        (tmp_path / "bomb.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"bomb\.yaml"):
            config.load(train.Config, [tmp_path / "bomb.yaml"])
    assert grown() < MOST_MEGABYTES


def test_a_member_that_says_it_has_ten_gigabytes_costs_no_memory(tmp_path: Path) -> None:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("000.json")
        member.size = 10 * 2**30
        archive.addfile(member)  # the header alone
    (tmp_path / "pairs-000000.tar").write_bytes(buffer.getvalue()[:1024])
    index = build_index(tmp_path, policy="skip")
    problems = [read_block(index, 0, block, policy="skip").problems for block in range(len(index.shards[0].blocks))]
    assert index.records == 0
    assert not any(not found for found in problems)
    assert grown() < 100


TARGETS: dict[str, Callable[[], None]] = {
    "shards": test_a_shard_of_any_bytes_is_read_or_refused,
    "index": test_an_index_of_any_bytes_is_read_or_refused,
    "scores": test_a_segment_of_scores_of_any_bytes_is_read_or_refused,
    "config": test_a_configuration_of_any_text_is_loaded_or_refused,
}


def main(minutes: float) -> None:
    """Rounds of all targets until the time is over; the first failure ends it with the example."""
    end, rounds = time.monotonic() + 60 * minutes, 0
    Memory.before = peak()
    while time.monotonic() < end:
        for target in TARGETS.values():
            target()
        rounds += 1
    examples = rounds * FUZZ.max_examples
    print(f"{minutes:g} minutes: {examples:,} examples of each of {', '.join(TARGETS)}; {grown():.0f} MB more memory")


if __name__ == "__main__":
    main(float(sys.argv[1]))

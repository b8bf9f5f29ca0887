"""Damage is found, named and contained: no half sample, no guess, no crash, the same outcome every time."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
import webdataset
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import pairs, write_shards

from data import blocks, tar
from data.errors import DataError
from data.index import Index, decode, encode
from data.records import REASONS
from data.shards import CAUSES, build_index, cause, load_index, read_block, verify

RECORDS = 12
PER_BLOCK = 4


def whole(folder: Path, kind: str = "plain") -> tuple[Index, Path, bytearray]:
    """A small shard of three blocks, its index, and its bytes to be damaged."""
    index = write_shards(folder, pairs(RECORDS), kind=kind, block_records=PER_BLOCK)
    assert [block.records for block in index.shards[0].blocks] == [PER_BLOCK] * 3
    path = Path(index.path(0))
    return index, path, bytearray(path.read_bytes())


def headers(content: bytes | bytearray) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [member.offset for member in archive]


def read(index: Index) -> tuple[list[str], list[str]]:
    """The queries that are left under `skip`, and the problems."""
    found: list[str] = []
    problems: list[str] = []
    for shard, info in enumerate(index.shards):
        for number in range(len(info.blocks)):
            block = read_block(index, shard, number, policy="skip")
            assert block.good == block.table.num_rows <= block.records == info.blocks[number].records
            assert block.problems or block.good == block.records
            found += block.table["query"].to_pylist()
            problems += block.problems
    return found, problems


def read_strictly(folder: Path) -> int:
    index = load_index(folder)
    return sum(read_block(index, 0, number).good for number in range(len(index.shards[0].blocks)))


QUERIES = [record.query for record in pairs(RECORDS)]


def check(folder: Path, left: list[int], causes: list[str], where: str) -> None:
    """Under `skip` the records of these numbers are left and these causes counted; `strict` stops at the first."""
    index = load_index(folder, policy="skip")
    found, problems = read(index)
    assert found == [QUERIES[number] for number in left]
    assert [cause(problem) for problem in problems] == causes
    assert read(load_index(folder, policy="skip")) == (found, problems)
    assert set(causes) <= CAUSES
    with pytest.raises(DataError) as stopped:
        read_strictly(folder)
    assert stopped.value.exit_code == 3
    assert str(stopped.value).startswith(f"{causes[0]}: {index.path(0)}")
    assert where in str(stopped.value)


# A tar that is cut


def test_a_cut_at_a_member_boundary_is_found_against_the_index(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[6]
    path.write_bytes(content[:at])
    check(tmp_path, [0, 1, 2, 3, 4, 5], ["cut at a member boundary", "lost behind a cut"], f"offset {at}")


def test_a_cut_at_a_block_boundary_is_found_against_the_index(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[4]
    path.write_bytes(content[:at])
    check(tmp_path, [0, 1, 2, 3], ["lost behind a cut", "lost behind a cut"], f"offset {at}")


def test_a_cut_in_a_header_is_found(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[6]
    path.write_bytes(content[: at + 100])
    check(tmp_path, [0, 1, 2, 3, 4, 5], ["cut in a header", "lost behind a cut"], f"offset {at}")


@pytest.mark.parametrize("extra", [512, 530])
def test_a_cut_in_data_leaves_no_half_sample(tmp_path: Path, extra: int) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[6]
    path.write_bytes(content[: at + extra])
    check(tmp_path, [0, 1, 2, 3, 4, 5], ["cut in data", "lost behind a cut"], f"offset {at}")


@pytest.mark.parametrize(("extra", "name"), [(0, "lost behind a cut"), (99, "cut in a header"), (999, "cut in data")])
def test_a_cut_arrow_block_is_lost_as_a_whole(tmp_path: Path, extra: int, name: str) -> None:
    _, path, content = whole(tmp_path, "block")
    at = headers(content)[1]
    path.write_bytes(content[: at + extra])
    check(tmp_path, [0, 1, 2, 3], [name, "lost behind a cut"], f"offset {at}")


def test_a_missing_end_of_archive_loses_nothing_and_is_told(tmp_path: Path) -> None:
    index, path, content = whole(tmp_path)
    last = index.shards[0].blocks[-1]
    path.write_bytes(content[: last.offset + last.bytes])
    assert read(load_index(tmp_path, policy="skip")) == (QUERIES, [])
    with pytest.raises(DataError, match=r"wrong size: .*pairs-000000\.tar: \d+ bytes, \d+ in the index"):
        load_index(tmp_path)
    with pytest.raises(DataError, match=f"cut at a member boundary: .*, offset {last.offset + last.bytes}"):
        build_index(tmp_path)


# A tar that is damaged inside: webdataset reads the first three of these without an error, and loses samples


def test_a_flipped_header_byte_costs_one_sample(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[5]
    content[at + 3] ^= 4
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, 4, *range(6, 12)], ["damaged header"], f"offset {at}")


def test_a_flipped_size_does_not_lead_the_reader_astray(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)[5]
    content[at + 130] = ord("7")
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, 4, *range(6, 12)], ["damaged header"], f"offset {at}")


def test_a_zeroed_member_costs_one_sample(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    start, end = headers(content)[5:7]
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, 4, *range(6, 12)], ["zero hole"], f"offset {start}")


def test_a_zeroed_payload_costs_one_sample(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    start, end = headers(content)[5:7]
    content[start + 512 : end] = bytes(end - start - 512)
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, 4, *range(6, 12)], ["zeroed member"], f"offset {start}, 000000-00000005.json")


def test_a_zero_hole_costs_what_it_covers(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = headers(content)
    start, end = at[2] + 512, at[6] + 512
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    # Member 2 keeps its header; members 3 (to the end of the first block), 4, 5 and 6 are gone.
    left = [0, 1, *range(7, 12)]
    check(tmp_path, left, ["zeroed member", "zero hole", "zero hole"], f"offset {at[2]}")


def test_a_flipped_bit_that_no_structure_shows_condemns_its_block_only(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    at = content.index(b"q0.5")
    content[at + 3] ^= 1  # q0.5 becomes q0.4: still JSON, still a record
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, *range(8, 12)], ["changed payload"], f"offset {headers(content)[4]}")


def test_a_flipped_bit_condemns_its_arrow_block_only(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path, "block")
    content[headers(content)[1] + 2000] ^= 16
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, *range(8, 12)], ["changed payload"], f"offset {headers(content)[1]}")


def test_a_flipped_header_byte_condemns_its_arrow_block_only(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path, "block")
    at = headers(content)[1]
    content[at + 3] ^= 1
    path.write_bytes(content)
    check(tmp_path, [0, 1, 2, 3, *range(8, 12)], ["damaged header"], f"offset {at}")


# A file that is something else


@pytest.mark.parametrize("kind", ["plain", "block"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda content: b"", "empty file"),
        (lambda content: b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", "HTML page instead of a tar"),
        (lambda content: b"\n <html>" + b"x" * 30_000, "HTML page instead of a tar"),
        (gzip.compress, "compressed instead of a tar"),
    ],
)
def test_another_file_in_a_shards_place_is_named(
    tmp_path: Path, kind: str, change: Callable[[bytes], bytes], name: str
) -> None:
    _, path, content = whole(tmp_path, kind)
    path.write_bytes(change(bytes(content)))
    check(tmp_path, [], [name] * 3, "")
    (tmp_path / "index.json").unlink()
    with pytest.raises(DataError, match=name):
        load_index(tmp_path)


def test_a_missing_shard_is_named_and_its_records_keep_their_numbers(tmp_path: Path) -> None:
    _, path, _ = whole(tmp_path)
    path.unlink()
    check(tmp_path, [], ["missing shard"] * 3, "")
    assert load_index(tmp_path, policy="skip").records == RECORDS
    assert verify(load_index(tmp_path, policy="skip")) == [f"missing shard: {path}"]


def test_a_folder_in_a_shards_place_is_unreadable(tmp_path: Path) -> None:
    for kind in ("plain", "block"):
        _, path, _ = whole(tmp_path / kind, kind)
        path.unlink()
        path.mkdir()
        check(tmp_path / kind, [], ["unreadable shard"] * 3, "")


def test_a_block_of_other_records_than_the_index_says_is_refused(tmp_path: Path) -> None:
    for kind in ("plain", "block"):
        index, _, _ = whole(tmp_path / kind, kind)
        text = encode(index).replace(f",{PER_BLOCK},".encode(), f",{PER_BLOCK - 1},".encode())
        text = text.replace(b'"records":12', b'"records":9').replace(b":3", b":2")
        (tmp_path / kind / "index.json").write_bytes(text)
        with pytest.raises(DataError, match=f"records differ from the index: .*{PER_BLOCK} found, 3 in the index"):
            read_block(load_index(tmp_path / kind), 0, 0)


def test_arrow_members_of_other_columns_or_with_nulls_are_refused(tmp_path: Path) -> None:
    sound = blocks.table([("a", "b", "", "", "", (), "", False)] * 20, "s")
    nulls = sound.set_column(0, sound.schema.field(0), pa.array(["a", None] * 10))
    inner = sound.set_column(5, sound.schema.field(5), pa.array([["a", None]] * 20))
    for table, message in (
        (sound.drop_columns(["lang"]), "the columns are"),
        (sound.rename_columns(["q", *sound.column_names[1:]]), "the columns are"),
        (nulls, "null values"),
        (inner, "null values"),
    ):
        with pytest.raises(blocks.BadBlock, match=message):
            blocks.decode(pa.py_buffer(blocks.encode(table)))
    with pytest.raises(blocks.BadBlock, match="not a sound Arrow stream"):
        blocks.decode(pa.py_buffer(b"\x80\x04\x95pickle"))


# What an index is built of


def plain_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))


def json(number: int, **change: object) -> bytes:
    return orjson.dumps({"query": f"q{number}", "passage": f"p{number}"} | change)


LONG = b'{"query": "q", "passage": "' + b"x" * 10_000_000 + b'"}'
WRONG = [
    ([("b.json", b'{"query": "q1"}')], "missing passage", "b.json"),
    ([("b.json", b'{"passage": "q1"}')], "missing query", "b.json"),
    ([("b.json", json(1, query=["q"]))], "wrong type", "b.json"),
    ([("b.json", b"[1, 2]")], "not an object", "b.json"),
    ([("b.json", b'{"query": "q\xff", "passage": "p"}')], "invalid UTF-8", "b.json"),
    ([("b.json", b'{"query": "q", "passage": "p"')], "invalid JSON", "b.json"),
    ([("b.json", b"")], "invalid JSON", "b.json"),
    ([("b.json", bytes(40))], "zeroed member", "b.json"),
    ([("b.json", json(1, passage=" "))], "empty text", "b.json"),
    ([("b.json", LONG)], "text too long", "b.json"),
    ([("b.json", json(1, negatives=None))], "null list", "b.json"),
    ([("b.json", json(1, negatives=[None]))], "wrong type", "b.json"),
    ([("a.json", json(1))], "duplicate key", "a.json"),
    ([("b.pickle", b"cos\nsystem\n(S'touch canary'\ntR.")], "pickle member", "b.pickle"),
    ([("b.tokens.pth", b"x")], "pickle member", "b.tokens.pth"),
    ([("a.txt", b"x")], "unexpected member", "a.txt"),
    ([("b.arrow", b"x")], "unexpected member", "b.arrow"),
    ([("b", b"x")], "unexpected member", ", b"),
]


@pytest.mark.parametrize(("extra", "name", "where"), WRONG, ids=[f"{case[1]} {case[2]}" for case in WRONG])
def test_each_wrong_member_has_its_own_cause_and_costs_only_itself(
    tmp_path: Path, extra: list[tuple[str, bytes]], name: str, where: str
) -> None:
    plain_tar(tmp_path / "s-000000.tar", [("a.json", json(0)), *extra, ("c.json", json(2)), ("d.json", json(3))])
    with pytest.raises(DataError) as stopped:
        load_index(tmp_path)
    assert str(stopped.value).startswith(f"{name}: {tmp_path}/s-000000.tar, offset 1024, ")
    assert where in str(stopped.value)
    index = load_index(tmp_path, policy="skip")
    assert read(index) == (["q0", "q2", "q3"], [])
    assert index.shards[0].bad == {name: 1}
    with pytest.raises(DataError, match=f"{name}: .*s-000000.tar: 1 left out"):
        load_index(tmp_path)


def test_interleaved_keys_are_found(tmp_path: Path) -> None:
    members = [("a.json", json(0)), ("b.json", json(1)), ("a.txt", b"x"), ("c.json", json(2))]
    plain_tar(tmp_path / "s-000000.tar", members)
    with pytest.raises(DataError, match=r"interleaved keys: .*offset 2048, a\.txt"):
        load_index(tmp_path)
    assert read(load_index(tmp_path, policy="skip")) == (["q0", "q1", "q2"], [])


def test_a_member_that_is_no_file_is_unexpected_and_folders_are_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s-000000.tar", "w") as archive:
        for name, kind in (("dir", tarfile.DIRTYPE), ("b.json", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("../../c.json")
        info.size = len(json(1))
        archive.addfile(info, io.BytesIO(json(1)))
    index = load_index(tmp_path, policy="skip")
    assert (read(index)[0], index.shards[0].bad) == (["q1"], {"unexpected member": 1})


def test_damage_is_found_while_indexing_too(tmp_path: Path) -> None:
    _, path, content = whole(tmp_path)
    (tmp_path / "index.json").unlink()
    at = headers(content)
    content[at[2] + 3] ^= 1
    content[at[5] : at[6]] = bytes(at[6] - at[5])
    path.write_bytes(content[: at[9] + 530])
    with pytest.raises(DataError, match=f"damaged header: .*offset {at[2]};"):
        load_index(tmp_path)
    index = load_index(tmp_path, policy="skip")
    assert index.shards[0].bad == {"damaged header": 1, "zero hole": 1, "cut in data": 1}
    assert read(index) == ([QUERIES[number] for number in (0, 1, 3, 4, 6, 7, 8)], [])


@pytest.mark.parametrize(
    ("content", "name"),
    [(b"not a tar at all\n" * 100, "not a tar"), (bytes(10_240), "no records"), (b"short", "not a tar")],
)
def test_a_file_without_a_record_gives_a_shard_without_records(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / "s-000000.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*s-000000.tar"):
        load_index(tmp_path)
    index = load_index(tmp_path, policy="skip")
    assert (index.records, index.shards[0].bad) == (0, {name: 1})


def test_a_declared_size_is_not_believed(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.json")
    info.size = 10_000_000_000
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "s-000000.tar").write_bytes(info.tobuf(form) + bytes(512))
        tracemalloc.start()
        with pytest.raises(DataError, match=r"cut in data|unsupported member"):
            build_index(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


def _sealed(header: bytearray) -> bytes:
    """A header whose checksum is right."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        (slice(124, 136), b"not a number", "damaged header"),
        (slice(124, 136), b"-0000000001\0", "damaged header"),
        (slice(156, 157), b"L", "unsupported member"),  # a long name of 10 MB
    ],
)
def test_a_header_with_a_right_sum_and_wrong_content_is_refused(field: slice, value: bytes, cause: str) -> None:
    info = tarfile.TarInfo("a.json")
    info.size = 10_000_000
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[field] = value
    (fault, *_) = tar.walk(memoryview(_sealed(header) + bytes(10_000_384)))
    assert isinstance(fault, tar.Fault)
    assert fault.cause == cause


@pytest.mark.parametrize(("kind", "place"), [("block", 600), ("block", 0), ("plain", 124)])
def test_a_block_that_its_own_index_vouches_for_and_nobody_can_read_is_named(
    tmp_path: Path, kind: str, place: int
) -> None:
    """Its hash is that of the index, so it was written so: in the payload, in Arrow's header, in a plain one's size."""
    index, path, content = whole(tmp_path, kind)
    span = index.shards[0].blocks[0]
    content[span.offset + place : span.offset + place + 8] = b"7" * 8
    path.write_bytes(content)
    damaged = xxhash.xxh3_64_hexdigest(content[span.offset : span.offset + span.bytes])
    file = tmp_path / "index.json"
    file.write_bytes(file.read_bytes().replace(span.xxh3.encode(), damaged.encode()))
    _, problems = read(load_index(tmp_path, policy="skip"))
    assert len(problems) == 1
    assert problems[0].startswith("unreadable block: ")


def test_a_damaged_archive_is_walked_in_linear_time() -> None:
    content = memoryview(b"\1" * 20_000_000)
    started = time.process_time()
    faults = list(tar.walk(content))
    assert faults == [tar.Fault("damaged header", 0, len(content))]
    assert time.process_time() - started < 5


# Whatever happens to the bytes


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytearray], bytes]:
    """One flip, cut, hole, insertion or removal, at a place given as a fraction."""
    kind = draw(st.sampled_from(["flip", "cut", "hole", "insert", "remove"]))
    place, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 3000))
    bit = draw(st.integers(0, 7))

    def apply(content: bytearray) -> bytes:
        at = int(place * len(content))
        if kind == "flip":
            content[at] ^= 1 << bit
        elif kind == "cut":
            del content[at:]
        elif kind == "hole":
            content[at : at + length] = bytes(len(content[at : at + length]))
        elif kind == "insert":
            content[at:at] = bytes([bit]) * length
        else:
            del content[at : at + length]
        return bytes(content)

    return apply


@pytest.fixture(scope="module", params=["plain", "block", "foreign"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A shard of ours of either kind, or one of webdataset's, which has two headers a member."""
    folder = tmp_path_factory.mktemp("sound")
    if request.param != "foreign":
        _, path, content = whole(folder, request.param)
        return path, bytes(content)
    path = folder / "pairs-000000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number, record in enumerate(pairs(RECORDS)):
            writer.write({"__key__": f"{number:03d}", "json": {"query": record.query, "passage": record.passage}})
    assert b"mtime=" in path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.indexing.PLAIN_BLOCK_RECORDS", PER_BLOCK)
        build_index(folder)
    return path, path.read_bytes()


@given(change=damage())
@settings(max_examples=150, deadline=None)
def test_any_damage_gives_the_right_records_or_a_problem(
    sound: tuple[Path, bytes], change: Callable[[bytearray], bytes]
) -> None:
    path, content = sound
    path.write_bytes(change(bytearray(content)))
    found, problems = read(load_index(path.parent, policy="skip"))
    assert [query for query in QUERIES if query in set(found)] == found
    assert len(found) == RECORDS or problems
    assert {cause(problem) for problem in problems} <= CAUSES
    try:
        assert read_strictly(path.parent) == RECORDS
    except DataError as error:
        assert path.name in str(error)  # noqa: PT017 - both outcomes are right


@given(change=damage())
@settings(max_examples=150, deadline=None)
def test_indexing_a_damaged_shard_gives_an_index_that_reads_back(
    sound: tuple[Path, bytes], change: Callable[[bytearray], bytes]
) -> None:
    path, content = sound
    folder = path.parent / "again"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(change(bytearray(content)))
    index = build_index(folder, policy="skip")
    found, problems = read(index)
    assert len(found) == index.records
    assert problems == []
    assert decode(encode(index), index.folder, "index.json") == index
    assert set(index.shards[0].bad) <= CAUSES


@given(content=st.binary(max_size=3000) | st.lists(st.sampled_from([bytes(512), b"x" * 512, b"\0"])).map(b"".join))
def test_a_walk_accounts_for_every_byte(content: bytes) -> None:
    offset = 0
    for item in tar.walk(memoryview(content), archive=False):
        assert item.offset == offset
        assert item.end > offset
        offset = item.end
    assert offset == len(content)


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_in_the_index_is_refused_or_means_nothing_worse(
    sound: tuple[Path, bytes], place: float, value: int
) -> None:
    path, content = sound
    path.write_bytes(content)
    text = bytearray((path.parent / "index.json").read_bytes())
    text[int(place * len(text))] = value
    try:
        index = decode(bytes(text), str(path.parent), "index.json")
    except DataError:
        return
    found, problems = read(index)
    assert problems or found in (QUERIES, [])


def test_every_reason_of_a_bad_record_is_a_cause() -> None:
    assert REASONS | tar.CAUSES <= CAUSES

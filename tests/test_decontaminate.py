"""What overlaps with evaluation data is found, exactly, and what is left out is counted."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import blocks, mixture, ngrams, scan
from data.errors import DataError, UserError
from data.packing import as_records
from data.records import Record, normalise
from data.shards import ShardWriter, write_index
from launcher.cli import main
from trainer import contamination, decontaminate, overlap, sets
from trainer.contamination import REASONS, Rule

# --- the rule, word by word ----------------------------------------------------------------------------------------

_ALONE = re.compile("[\u3005\u3007\u3400-\u9fff\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
_INVISIBLE = re.compile("[\ufe00-\ufe0f]")


def _units(text: str) -> list[str]:
    """The units of a text, character by character."""
    found: list[str] = []
    grows = False
    for character in unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()):
        category = unicodedata.category(character)
        if category == "Cf" or _INVISIBLE.match(character):
            continue
        if category[0] not in "LNM":
            grows = False
        elif _ALONE.match(character):
            found.append(character)
            grows = False
        elif grows:
            found[-1] += character
        else:
            found.append(character)
            grows = True
    return found


def _overlaps(training: str, evaluation: str, rule: Rule) -> bool:
    """Whether a training text has a run of an evaluation text's units."""
    theirs, ours = _units(training), _units(evaluation)
    factor = rule.characters if 2 * sum(bool(_ALONE.match(unit)) for unit in ours) > len(ours) else 1
    if not ours or len(ours) < rule.shortest * factor:
        return bool(ours) and theirs == ours
    length = min(rule.ngram * factor, len(ours))
    wanted = {tuple(ours[start : start + length]) for start in range(len(ours) - length + 1)}
    return any(tuple(theirs[start : start + length]) in wanted for start in range(len(theirs) - length + 1))


def _reasons(record: Record, queries: list[str], pairs: list[tuple[str, str]], rule: Rule) -> set[str]:
    """Why a record is said to overlap with one evaluation set, by comparing it with every text of the set."""
    sides = (normalise(record.query), normalise(record.passage))
    answers = [answer for _, answer in pairs]
    equal = {
        "query": any(normalise(query) in sides for query in queries),
        "passage": any(normalise(answer) in sides for answer in answers),
        "pair": any((normalise(q), normalise(a)) in (sides, sides[::-1]) for q, a in pairs),
        "query_ngram": any(_overlaps(side, query, rule) for side in sides for query in queries),
        "passage_ngram": any(_overlaps(side, answer, rule) for side in sides for answer in answers),
    }
    return {reason for reason, found in equal.items() if found}


# --- units and runs ------------------------------------------------------------------------------------------------

ALPHABET = ["a", "B", "é", "e\u0301", "ß", "ﬁ", "İ", " ", "-", "'", "1", "½", "\n", "\x1e", "\u00ad", "\u200b", "🙂"]
ALPHABET += ["\ufe0f", "\u0301", "温", "度", "あ", "ー", "ｶ", "ﾞ", "ก", "ิ", "ກ", "ក", "က", "한", "ف", "\u200c", "अ", "ि"]
TEXTS = st.lists(st.lists(st.sampled_from(ALPHABET), max_size=12).map("".join), max_size=6)


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_units_are_those_of_a_reading_character_by_character(texts: list[str]) -> None:
    found = ngrams.units(texts)
    expected = [_units(text) for text in texts]
    flat = [unit for text in expected for unit in text]
    assert found.counts.tolist() == [len(text) for text in expected]
    assert found.alone.tolist() == [bool(_ALONE.match(unit)) for unit in flat]
    _same_partition(found.hashes.tolist(), flat)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.sampled_from("ab"), max_size=8).map(" ".join), min_size=1, max_size=5))
def test_runs_have_the_same_hash_when_and_only_when_their_units_are_the_same(texts: list[str]) -> None:
    found = ngrams.units(texts)
    flat = [unit for text in texts for unit in _units(text)]
    owners = [number for number, text in enumerate(texts) for _ in _units(text)]
    for length in (1, 2, 3, 5, 100):
        starts = range(max(len(flat) - length + 1, 0))
        hashes = found.runs(length)
        assert len(hashes) == len(starts)
        _same_partition(hashes.tolist(), [tuple(flat[start : start + length]) for start in starts])
        texts_of, inside = found.inside(np.array(starts, np.int64), length)
        assert texts_of.tolist() == [owners[start] for start in starts]
        assert inside.tolist() == [owners[start] == owners[start + length - 1] for start in starts]
    _same_partition(found.whole().tolist(), [tuple(_units(text)) for text in texts])


def _same_partition(hashes: list[int], items: list[Any]) -> None:
    """Equal items have equal hashes, and others have others."""
    assert len(set(zip(hashes, items, strict=True))) == len(set(hashes)) == len(set(items))


def test_a_run_has_the_same_hash_wherever_it_stands() -> None:
    filler = " ".join(f"w{number}" for number in range(40_000))
    far = ngrams.units([filler, "the river and the stone"])
    near = ngrams.units(["The RIVER, and the stone!"])
    assert far.runs(5)[-1] == near.runs(5)[0] == near.whole()[0]
    assert [len(piece) for _, piece in ngrams.pieces([filler, filler, "a", ""])] == [1, 1, 2]


# --- records against evaluation sets ---------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b", "c", "温", "度", "B", "c."])
SHORT = st.lists(WORDS, min_size=1, max_size=7).map(" ".join)
PAIRS = st.lists(st.tuples(SHORT, SHORT), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(PAIRS, PAIRS, PAIRS, st.sampled_from([Rule(3, 2, 2), Rule(2, 2, 1), Rule(4, 1, 1), Rule(5, 3, 2)]))
def test_hits_are_those_of_comparing_every_record_with_every_text(
    training: list[tuple[str, str]], first: list[tuple[str, str]], second: list[tuple[str, str]], rule: Rule
) -> None:
    data = [_set(name, rows) for name, rows in (("first", first), ("second", second))]
    wanted, _ = contamination.prepare(contamination.gather(data), rule)
    records = [Record(*pair) for pair in training]
    rows = [(query, passage, "", "", "", (), "", False) for query, passage in training]
    found: dict[tuple[int, int], set[str]] = {}
    for _, _, hits in wanted.find(blocks.table(rows, "s")):
        for hit in hits:
            words = [reason for bit, reason in enumerate(REASONS) if int(hit["reasons"]) >> bit & 1]
            found.setdefault((int(hit["record"]), int(hit["set"])), set()).update(words)
    for number, record in enumerate(records):
        for of, pairs in enumerate((first, second)):
            expected = _reasons(record, [query for query, _ in pairs], pairs, rule)
            assert found.get((number, of), set()) == expected, (record, pairs)


def _set(name: str, rows: list[tuple[str, str]]) -> sets.RetrievalSet:
    """A set as the reader makes one of a JSONL file."""
    path = Path(name)
    records = [Record(normalise(query), normalise(passage)) for query, passage in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "_records", lambda _: (records, ()))
        return sets._pairs(path, name)


# --- the stage -------------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
CHINESE = "请问在客厅里面怎样才能设定暖气的温度以及晚上自动关闭的时间呢谢谢"
RECORDS = {
    "web": [
        Record("how tall is the tower", "It is 330 metres tall.", id="equal pair"),
        Record("It is 330 metres tall.", "How tall is the tower", id="turned, other case"),
        Record("somewhere", "before " + LONG.upper().replace(" ", ", ") + " after", id="n-gram of an answer"),
        Record("nothing", "one two three four five six seven eight nine ten eleven twelve", id="twelve words"),
        Record("nothing to see", "of no interest", id="clean"),
        Record("what is the tower", "how tall is the tower of wood", id="short text inside of another"),
    ],
    "chat": [
        Record("你好", CHINESE[3:31], id="characters"),
        Record("你好", CHINESE[3:28], id="25 characters"),
        Record("which words do we look for here", "answer of a beir document", id="beir"),
    ],
}
EXPECTED = {
    ("web", "questions"): {
        "equal pair": {"query", "passage", "pair", "query_ngram", "passage_ngram"},
        "turned, other case": {"passage", "query_ngram", "passage_ngram"},
        "n-gram of an answer": {"passage_ngram"},
    },
    ("chat", "questions"): {"characters": {"passage_ngram"}},
    ("chat", "beir"): {"beir": {"query", "query_ngram"}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two sources with tokens, one JSONL file and one BEIR folder."""
    root = tmp_path_factory.mktemp("decontaminate")
    for source, records in RECORDS.items():
        _write(root / "shards" / source, source, records)
    rows = [("how tall is the tower", "It is 330 metres tall."), ("long", LONG), ("暖气", CHINESE)]
    lines = [json.dumps({"query": query, "passage": passage}) for query, passage in rows]
    (root / "questions.jsonl").write_text("\n".join(lines))
    beir = root / "beir"
    (beir / "qrels").mkdir(parents=True)
    documents = [{"_id": "d1", "text": "an answer"}, {"_id": "d2", "text": "answer of a beir document"}]
    (beir / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (beir / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": "which words do we look for here"}))
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq1\tlost\t1\n")
    return root


def _write(folder: Path, source: str, records: list[Record]) -> None:
    with ShardWriter(folder, source, block_records=2, token_dtype="uint16") as writer:
        for number, record in enumerate(records):
            writer.write(record, ([number], [number, len(record.passage)], []))
    write_index(folder, writer.close(), {"fingerprint": "f", "max_tokens": 9})


def _config(place: Path, output: Path | str = "", **changes: Any) -> decontaminate.Config:
    data = [str(place / "shards" / source) for source in RECORDS]
    against = [str(place / "questions.jsonl"), str(place / "beir")]
    return decontaminate.Config(data=data, against=against, output=str(output), workers=1, **changes)


def test_the_report_counts_records_by_source_set_and_reason(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decontaminate.run(_config(place, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["overlap.json"]
    report = json.loads((tmp_path / "out" / "overlap.json").read_text())
    for source in RECORDS:
        assert report["training"][source] == {"records": len(RECORDS[source]), "unreadable": 0}
        for name in ("questions", "beir"):
            by_record = EXPECTED.get((source, name), {})
            counts = Counter(reason for reasons in by_record.values() for reason in reasons)
            counts["any"] = len(by_record)
            found = report["overlap"][source].get(name, {})
            assert {key: count for key, count in found.items() if count} == {k: n for k, n in counts.items() if n}
    assert report["evaluation"]["questions"] | {"notes": []} == {
        "queries": 3,
        "passages": 3,
        "found": {"query": 1, "passage": 1, "pair": 1, "query_ngram": 1, "passage_ngram": 3},
        "notes": [],
    }
    # d2 is judged to be no answer: that it stands in the training data gives nothing away
    assert report["evaluation"]["beir"]["passages"] == 1
    assert report["evaluation"]["beir"]["found"]["passage"] == 0
    examples = {(each["id"], each["set"], each["reason"]) for each in report["examples"]}
    assert examples == {(i, s, r) for (_, s), by in EXPECTED.items() for i, reasons in by.items() for r in reasons}
    assert {each["found"] for each in report["examples"] if each["id"] == "characters"} == {"passages[2]"}
    assert "tower" not in json.dumps(report["examples"])
    printed = capsys.readouterr().out
    assert re.search(r"^web +questions +1 +2 +1 +2 +3 +3$", printed, re.MULTILINE)
    assert "3 of 4 pairs of a source and an evaluation set overlap" in printed


def test_what_is_dropped_is_listed_and_the_rest_is_written_with_its_tokens(place: Path, tmp_path: Path) -> None:
    config = _config(place, tmp_path / "out", drop=["pair", "passage_ngram"], texts=True)
    decontaminate.run(config)
    gone = {"web": ["equal pair", "turned, other case", "n-gram of an answer"], "chat": ["characters"]}
    data = mixture.load(str(tmp_path / "out"))
    tables = [scan.read(data, unit) for unit in scan.units(data, 100)]
    kept = {table["source"][0].as_py(): table for table in tables}
    for source, records in RECORDS.items():
        numbers = [number for number, record in enumerate(records) if record.id not in gone[source]]
        assert [record.id for record in as_records(kept[source])] == [records[number].id for number in numbers]
        assert kept[source]["query_tokens"].to_pylist() == [[number] for number in numbers]
        assert kept[source]["passage_tokens"].to_pylist() == [[n, len(records[n].passage)] for n in numbers]
    lines = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["source"], line["id"]) for line in lines] == [(s, i) for s in ("chat", "web") for i in gone[s]]
    for line in lines:
        assert set(line["reasons"]["questions"]) == EXPECTED[line["source"], "questions"][line["id"]]
        assert RECORDS[line["source"]][line["record"]].passage == line["passage"]
    report = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert report["dropped"]["web"] == {
        "kept": 3,
        "dropped": 3,
        "query": 1,
        "passage": 2,
        "pair": 1,
        "query_ngram": 2,
        "passage_ngram": 3,
    }
    example = next(each for each in report["examples"] if each["id"] == "characters")
    assert example["text"] == CHINESE


def test_several_processes_write_the_same_bytes_as_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workers in (1, 2):
        config = _config(place, tmp_path / str(workers), drop=["query"])
        decontaminate.run(decontaminate.Config(**{**vars(config), "workers": workers}))
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "12")
    assert one == two
    assert len(one) == 5


def test_plain_shards_stay_plain_and_records_without_an_id_are_told_by_number(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "plain", "web", kind="plain", block_records=2) as writer:
        for number in range(5):
            writer.write(Record(f"query {number}", f"passage {number}"))
    write_index(tmp_path / "plain", writer.close())
    (tmp_path / "test.jsonl").write_text('{"query": "query 3", "passage": "other"}')
    words = [f"data={tmp_path}/plain", f"against={tmp_path}/test.jsonl", f"output={tmp_path}/out", "drop=[query]"]
    assert main(["decontaminate", *words]) == 0
    data = mixture.load(str(tmp_path / "out"))
    assert data.sources[0].index.shards[0].kind == "plain"
    (unit,) = scan.units(data, 100)
    assert scan.read(data, unit)["query"].to_pylist() == ["query 0", "query 1", "query 2", "query 4"]
    assert json.loads((tmp_path / "out" / "dropped.jsonl").read_text())["record"] == 3


def test_damaged_blocks_stop_or_are_counted(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path / "web", "web", block_records=2) as writer:
        for record in RECORDS["web"]:
            writer.write(record)
    (shard,) = writer.close()
    write_index(tmp_path / "web", [shard])
    file = tmp_path / "web" / shard.file
    content = bytearray(file.read_bytes())
    content[shard.blocks[1].offset + 1000] ^= 1
    file.write_bytes(content)
    values = {**vars(_config(place)), "data": str(tmp_path / "web")}
    with pytest.raises(DataError):
        decontaminate.run(decontaminate.Config(**values))
    output = str(tmp_path / "out")
    decontaminate.run(decontaminate.Config(**{**values, "damaged": "skip", "output": output, "drop": ["query"]}))
    report = json.loads((tmp_path / "out" / "overlap.json").read_text())
    assert report["training"]["web"] == {"records": 4, "unreadable": 2}
    assert report["dropped"]["web"]["kept"] + report["dropped"]["web"]["dropped"] == 4
    assert "2 damaged records" in capsys.readouterr().out


def test_nothing_is_written_when_nothing_would_be_kept(place: Path, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text('{"query": "clean", "passage": "x"}')
    _write(tmp_path / "web", "web", [Record("clean", "pair")])
    values = {"data": str(tmp_path / "web"), "against": str(tmp_path / "all.jsonl"), "workers": 1}
    with pytest.raises(UserError, match="none would be kept"):
        decontaminate.run(decontaminate.Config(**values, output=str(tmp_path / "out"), drop=["query"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "web"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"drop": ["query", "ngram"], "output": "o"}, ["drop=ngram"]),
        ({"drop": ["query"]}, ["give output=FOLDER"]),
        ({"ngram": 5, "shortest": 6}, ["shortest=6"]),
        ({"drop": list(REASONS), "output": "o"}, []),
    ],
)
def test_contradicting_keys_are_told(values: dict[str, Any], words: list[str]) -> None:
    problems = decontaminate.Config(data="d", against="a", **values).check()
    assert len(problems) == len(words)
    for problem, word in zip(problems, words, strict=True):
        assert word in problem


def test_the_marks_of_outputs_are_told_apart(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no overlap\.json"):
        decontaminate.run(_config(place, tmp_path / "out", overwrite=True))
    assert overlap.REPORT == "overlap.json"

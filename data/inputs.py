"""Which files the names, globs and folders given as `input` stand for."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from data.errors import UserError
from data.index import SOURCE_NAME
from data.records import text_hash

_log = logging.getLogger("quintet")

PACKED = (".gz", ".zst")
_FORMATS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_READ = ".jsonl[.gz|.zst], .json, .csv, .tsv, .parquet, .arrow, datasets folders and BEIR folders are read"


def find(names: str | Sequence[str]) -> list[str]:
    """The files that names, globs and folders stand for, each once, in the order of the names.

    Raises:
        UserError: there is no such file, a glob matches nothing, a folder holds nothing to read, or a name is of
            no known kind.
    """
    files = [file for name in ([names] if isinstance(names, str) else names) for file in _expand(name)]
    once = list(dict.fromkeys(files))
    if len(once) < len(files):
        _log.warning("input: %d files are named more than once and read once", len(files) - len(once))
    return once


def format_of(file: str) -> str:
    """How a file is read: lines, json, csv, parquet, arrow or beir (relevance judgements); "" for other files."""
    path = Path(file)
    if path.suffix == ".tsv" and path.parent.name == "qrels":
        return "beir"
    return _FORMATS.get((path.with_suffix("") if path.suffix in PACKED else path).suffix.lower(), "")


def source_of(file: str) -> str:
    """The source that records of a file belong to when nothing names one: the file's name without ending and number.

    Names that say nothing (data, train, part, a mere number) give way to the folder's.
    """
    path = Path(file).absolute()
    if format_of(file) == "beir":
        return _plain_name(path.parent.parent.name)
    stem = (path.with_suffix("") if path.suffix in PACKED else path).stem
    stem = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", stem)
    return _plain_name(path.parent.name if stem in ("", "data", "train", "part") else stem)


def _plain_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+@-]", "_", name).lstrip("_.+@-")[:80] or "pairs"


def safe_source(name: str) -> str:
    """A source name that can be part of a file's name; two names stay two."""
    return name if SOURCE_NAME.fullmatch(name) else f"{_plain_name(name)}-{text_hash(name) & 0xFFFFFF:06x}"


def _expand(name: str) -> list[str]:
    if "://" in name:
        raise UserError(f"input={name}: addresses are not read; fetch it first and name the file")
    if os.path.isdir(name):
        return _folder(Path(name))
    if os.path.exists(name):
        if not format_of(name):
            raise UserError(f"input={name}: not a known kind of file; {_READ}")
        return [name]
    if not glob.has_magic(name):
        raise UserError(f"input={name}: there is no such file or folder")
    found = [file for match in sorted(glob.glob(name, recursive=True)) for file in _expand(match)]
    if not found:
        raise UserError(f"input={name}: no file matches")
    return found


def _folder(folder: Path) -> list[str]:
    """The files of a folder that hold rows. Raises UserError when there are none."""
    special = _dataset(folder) or _beir(folder)
    if special:
        return special
    found, ignored = _walk(folder)
    if not found:
        raise UserError(f"input={folder}: the folder holds nothing to read; {_READ}")
    if ignored:
        _log.info("input=%s: %d other files are left alone: %s", folder, len(ignored), ", ".join(ignored[:5]))
    return found


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Files with rows and other files. Beside row files a .json file is taken for a description of them."""
    found: list[str] = []
    ignored: list[str] = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():
            special = _dataset(path) or _beir(path)
            inner = (special, []) if special else _walk(path)
            found, ignored = found + inner[0], ignored + inner[1]
        else:
            (found if format_of(str(path)) else ignored).append(str(path))
    lists = [file for file in found if format_of(file) == "json"]
    if 0 < len(lists) < len(found):
        found, ignored = [file for file in found if file not in lists], ignored + lists
    return found, ignored


def _dataset(folder: Path) -> list[str]:
    """The Arrow files of a folder made by `datasets.save_to_disk`, or nothing when it is no such folder."""
    if (folder / "dataset_dict.json").is_file():
        splits = _described(folder / "dataset_dict.json").get("splits") or []
        if "train" not in splits:
            raise UserError(f"input={folder}: has no split train but {', '.join(splits)}; name one: {folder}/SPLIT")
        return _dataset(folder / "train")
    if not (folder / "state.json").is_file():
        return []
    state = _described(folder / "state.json")
    if state.get("_indices_data_files"):
        raise UserError(f"input={folder}: saved with an index of rows; call flatten_indices() before save_to_disk()")
    return [str(folder / str(file["filename"])) for file in state.get("_data_files") or []]


def _described(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise UserError(f"input={path.parent}: {path.name} cannot be read ({error})") from None
    return value if isinstance(value, dict) else {}


def _beir(folder: Path) -> list[str]:
    """The relevance file of a BEIR folder's training split, or nothing when it is no such folder."""
    if not ((folder / "qrels").is_dir() and sibling(folder, "corpus") and sibling(folder, "queries")):
        return []
    if (folder / "qrels" / "train.tsv").is_file():
        return [str(folder / "qrels" / "train.tsv")]
    splits = sorted(path.name for path in (folder / "qrels").glob("*.tsv"))
    raise UserError(f"input={folder}: has no qrels/train.tsv but {', '.join(splits)}; name one: {folder}/qrels/FILE")


def sibling(folder: Path, stem: str) -> str:
    """STEM.jsonl of a BEIR folder, packed or not; "" when there is none."""
    return next((str(path) for end in ("", *PACKED) if (path := folder / f"{stem}.jsonl{end}").is_file()), "")

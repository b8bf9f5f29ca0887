"""Held-out text from domains that the training wheels do not have: to steer by, never to train on.

    python -m benchmarks.outofdomain FOLDER [--without pairs/*.jsonl]

Writes one JSONL file {query, passage, source, lang} for each set below, ready for `quintet evaluate`, and SOURCES.json
with versions and hashes. Wheels come from pip, Debian packages from `apt-get download` (so it needs Debian or Ubuntu),
both into the folder that `quintet collect` caches in; nothing is installed. The same packages give the same bytes.

    catalogs   sentences of Plone, Tryton and JupyterLab -> the English originals
    game       texts of the strategy game Freeciv, history and story -> the English originals
    help       titles of GNOME's user guide -> how each page begins, one language
    manuals    what a command or a function does, in a line -> how its manual describes it, one language
    questions  Debian's frequently asked questions and small talk -> answers, one language
    api        methods of Google's web services -> their documentation, English
    glosses    words of WordNet -> their definitions, English
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import orjson
import yaml

from data import sources, wheels
from data.catalogs import read_mo, read_po
from data.languages import bcp47, written_in_own_script
from data.records import normalise, text_hash
from data.texts import clean, html_to_text, num_letters, num_words


class Row(NamedTuple):
    """A row as it is found. A set takes equally many rows of each `group`, as far as there are."""

    query: str
    passage: str
    source: str
    lang: str
    group: str


# --- packages ------------------------------------------------------------------------------------------------------

CACHE = Path("~/.cache/quintet").expanduser()
PAPERS: list[dict[str, str]] = []


def wheel(package: str) -> wheels.Wheel:
    """The wheel of a package, fetched when the cache does not have it."""
    found = wheels.Wheel(wheels.fetch(package, CACHE / "wheels"))
    PAPERS.append({name: str(value) for name, value in found.describe().items()})
    return found


def debian(package: str, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    """(match, content) of the files in a Debian package whose path, without the leading dot, matches; .gz unpacked."""
    folder = CACHE / "debs"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=folder, check=True)
    file = max(folder.glob(f"{package}_*.deb"))
    PAPERS.append({"name": package, "file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()})
    command = ["dpkg-deb", "--fsys-tarfile", str(file)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as unpacked,
        tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive,
    ):
        for member in archive:
            found = re.fullmatch(pattern, member.name.removeprefix("."))
            if found and member.isfile():
                content = archive.extractfile(member).read()  # type: ignore[union-attr]
                yield found, gzip.decompress(content) if member.name.endswith(".gz") else content


# --- the sets ------------------------------------------------------------------------------------------------------

_PACKS = ("ar-SA", "de-DE", "es-ES", "fr-FR", "ja-JP", "ko-KR", "pl-PL", "pt-BR", "ru-RU", "zh-CN")


def catalogs() -> Iterator[Row]:
    for package in ("plone.app.locales", *(f"jupyterlab-language-pack-{tag}" for tag in _PACKS)):
        for pair in sources.gettext_catalogs(wheel(package)):
            if not pair.drop:
                yield Row(pair.query, pair.passage, package.partition("-language")[0], pair.lang, pair.lang)
    for found, content in wheel("trytond").members(r"trytond/.*/locale/(?P<lang>\w+)\.po"):
        for entry in read_po(content.decode()):
            lang = bcp47(found["lang"])
            if not entry.fuzzy:
                yield Row(clean(entry.translation), clean(entry.english), "trytond", lang, lang)


def game() -> Iterator[Row]:
    for found, content in debian("freeciv-data", r"/usr/share/locale/(?P<lang>[^/]+)/LC_MESSAGES/freeciv-\w+\.mo"):
        lang = bcp47(found["lang"])
        try:
            entries = list(read_mo(content))
        except UnicodeDecodeError:  # a few are in older encodings
            continue
        for entry in entries:
            english = re.sub(r"^\?[^:]*:", "", entry.english)  # its mark for the sense of a short word
            yield Row(clean(entry.translation), clean(english), "freeciv", lang, lang)


_MALLARD = "{http://projectmallard.org/1.0/}"


def help() -> Iterator[Row]:
    pages = {}
    for found, content in debian("gnome-user-docs", r"/usr/share/help/(?P<lang>[^/]+)/gnome-help/(?P<page>.*)\.page"):
        page = ElementTree.fromstring(content)
        texts = [page.find(_MALLARD + "title"), page.find(f"{_MALLARD}info/{_MALLARD}desc")]
        texts += page.findall(_MALLARD + "p")[:1]
        pages[found["lang"], found["page"]] = [normalise("".join(one.itertext())) for one in texts if one is not None]
    for (locale, name), (title, *texts) in pages.items():
        english = pages.get(("C", name), [])
        translated = [text for text in texts if locale == "C" or text not in english]
        lang = "en" if locale == "C" else bcp47(locale)
        if title not in english[:1] or locale == "C":
            yield Row(title, " ".join(translated), "gnome-help", lang, lang)


_TONGUES = "cs da de el es fi fr hu id it ja nb nl pl pt-br ro ru sr sv tr uk vi zh"


def manuals() -> Iterator[Row]:
    pattern = r"/usr/share/man/(?:(?P<lang>[^/]+)/)?man\d/[^/]+\.gz"
    for package in ("manpages", "manpages-dev", *(f"manpages-{tongue}" for tongue in _TONGUES.split())):
        for found, content in debian(package, pattern):
            summary, begin = _manual(content.decode(errors="replace"))
            lang = bcp47(found["lang"] or "en")
            yield Row(summary, begin, "manpages", lang, lang)


_FONT = re.compile(r"\\f(?:\(..|\[[^]]*\]|.)|\\[,/&%:]|\\s[-+]?\d+")
_ROFF = {r"\-": "-", r"\(bu": "", r"\(aq": "'", r"\(lq": "“", r"\(rq": "”", r"\ ": " ", r"\~": " ", r"\e": "\\"}


def _manual(source: str) -> tuple[str, str]:
    """What stands behind the dash of the first section, and the first paragraph of prose in the others."""
    sections = re.split(r"(?m)^\.S[Hh]\b.*$", source)[1:]
    if not sections:
        return "", ""
    name = _plain(sections[0])
    for paragraph in re.split(r"(?m)^\.(?:PP|LP|P|TP|IP|sp|nf|SS|Pp)\b.*$", "\n.PP\n".join(sections[1:])):
        text = _plain(paragraph)
        lines = [line for line in paragraph.strip().splitlines() if not line.startswith('.\\"')]
        if (
            lines
            and lines[0][:1] not in (".", "'", "\\")
            and num_words(text) >= 10
            and not re.search(r"[\[{|=#]", text)
        ):
            return re.split(r" [-–—] ", name, maxsplit=1)[-1] if re.search(r" [-–—] ", name) else "", text
    return "", ""


def _plain(roff: str) -> str:
    """The text of a few lines: comments and requests out, arguments of requests for a font kept."""
    lines = []
    for line in roff.splitlines():
        found = re.match(r"[.']\s*(\\\"|[A-Za-z]*)\s*(.*)", line)
        if not found:
            lines.append(line)
        elif found[1] in ("B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "R", "SM"):
            lines.append(found[2].replace('"', "").replace(" (", "("))
    text = _FONT.sub("", " ".join(lines))
    for escape, character in _ROFF.items():
        text = text.replace(escape, character)
    return normalise(re.sub(r"\\\[u([0-9A-F]{4})\]", lambda code: chr(int(code[1], 16)), text))


_CHATS = (
    "bengali bn chinese zh-Hans dutch nl english en french fr german de hebrew he hindi hi indonesian id italian it "
    "japanese ja korean ko marathi mr oriya or persian fa portuguese pt russian ru spanish es swedish sv tamil ta "
    "telugu te thai th traditionalchinese zh-Hant turkish tr ukrainian uk urdu ur"
)


def questions() -> Iterator[Row]:
    for tongue in ("", "-de", "-fr", "-it", "-ja", "-ko", "-nl", "-pt", "-ru", "-zh-cn"):
        lang = bcp47(tongue[1:] or "en")
        for _, content in debian(f"debian-faq{tongue}", r"/usr/share/doc/debian/FAQ/.*\.html"):
            for question, answer in _answers(content.decode()):
                yield Row(question, answer, "debian-faq", lang, f"faq {lang}")
    words = _CHATS.split()
    tags = dict(zip(words[::2], words[1::2], strict=True))
    for found, content in wheel("chatterbot-corpus").members(r"chatterbot_corpus/data/(?P<language>\w+)/.*\.yml"):
        lang = tags.get(found["language"], "")
        for talk in yaml.safe_load(content).get("conversations") or [] if lang else []:
            if isinstance(talk, list) and len(talk) > 1 and "?" in str(talk[0]).replace("？", "?").replace("؟", "?"):
                yield Row(clean(str(talk[0])), clean(str(talk[1])), "chatterbot", lang, f"chat {lang}")


def _answers(page: str) -> Iterator[tuple[str, str]]:
    """(heading, how the text below it begins) of a page of DocBook's HTML."""
    body = page.partition('<div class="navfooter">')[0]
    for part in re.split(r"<h[2-4]\b[^>]*>", body)[1:]:
        heading, _, rest = re.split(r"(</h[2-4]>)", part, maxsplit=1) if "</h" in part else ("", "", "")
        text = html_to_text(re.sub(r"(?s)<pre.*?</pre>", " ", rest))
        yield re.sub(r"^[\w.]*\d\.\s*", "", html_to_text(heading)), " ".join(text.split()[:80])


def api() -> Iterator[Row]:
    for found, document in wheel("google-api-python-client").members(r".*/documents/(?P<name>.*)\.json", orjson.loads):
        todo = list(document.get("resources", {}).values())
        while todo:
            resource = todo.pop()
            todo += resource.get("resources", {}).values()
            for method in resource.get("methods", {}).values():
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method["id"].partition(".")[2]).replace(".", " ").lower()
                query = f"{document.get('title', found['name'])}: {words}"
                yield Row(query, clean(method.get("description", "")), "google", "en", found["name"].partition(".")[0])


def glosses() -> Iterator[Row]:
    for found, content in debian("wordnet-base", r"/usr/share/wordnet/data\.(?P<part>noun|verb|adj|adv)"):
        for line in content.decode().splitlines():
            head, _, gloss = line.partition(" | ")
            if not head.startswith(" "):
                fields = head.split()
                count = int(fields[3], 16)
                lemmas = [re.sub(r"\(.*?\)$", "", lemma).replace("_", " ") for lemma in fields[4 : 4 + 2 * count : 2]]
                yield Row(", ".join(lemmas[:3]), gloss.partition('; "')[0].strip(), "wordnet", "en", found["part"])


SETS: dict[str, tuple[Callable[[], Iterator[Row]], int]] = {
    "catalogs": (catalogs, 2000),
    "game": (game, 2000),
    "help": (help, 2000),
    "manuals": (manuals, 2000),
    "questions": (questions, 1500),
    "api": (api, 1500),
    "glosses": (glosses, 1500),
}


# --- choosing ------------------------------------------------------------------------------------------------------


def good(row: Row) -> bool:
    """Whether a row says something on both sides, in the script of its language."""
    query, passage = row.query.casefold(), row.passage.casefold()
    enough = num_words(row.passage) >= 4 and num_letters(row.passage) >= 10 and num_letters(row.query) >= 3
    local = written_in_own_script(row.query, row.lang) if row.lang else False
    return enough and local and query not in passage and passage not in query


def choose(rows: Iterable[Row], count: int, known: frozenset[int]) -> list[Row]:
    """`count` rows at most, equally many of each group, without twins and texts that are known; by hash, so that the
    order in which they were found does not matter.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(set(filter(good, rows)), key=lambda row: (text_hash(f"{row.query}\0{row.passage}"), row)):
        if not {text_hash(row.query), text_hash(row.passage)} & known:
            groups[row.group].append(row)
    turns = [
        (place, group, row) for group, members in groups.items() for place, row in enumerate(members) if place < count
    ]
    chosen, queries = [], set()
    for _, _, row in sorted(turns, key=lambda turn: turn[:2]):
        if row.query not in queries and len(chosen) < count:
            queries.add(row.query)
            chosen.append(row)
    return chosen


def texts(patterns: Iterable[str]) -> frozenset[int]:
    """Hashes of every query and passage in the files."""
    hashes: set[int] = set()
    for file in [file for pattern in patterns for file in sorted(glob.glob(pattern))]:
        with open(file, "rb") as lines:
            for line in lines:
                row = orjson.loads(line)
                hashes.update((text_hash(row["query"]), text_hash(row["passage"])))
    return frozenset(hashes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", nargs="*", default=[], help="JSONL files or globs of pairs that training sees")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    known = texts(arguments.without)
    for name, (rows, count) in SETS.items():
        chosen = choose(rows(), count, known)
        with (arguments.folder / f"{name}.jsonl").open("wb") as file:
            for row in chosen:
                fields = {"query": row.query, "passage": row.passage, "source": row.source, "lang": row.lang}
                file.write(orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE))
        languages = {row.lang for row in chosen}
        words = [
            sum(map(num_words, column)) / max(1, len(chosen))
            for column in zip(*(row[:2] for row in chosen), strict=True)
        ]
        print(
            f"{name}: {len(chosen):,} rows, {len(languages)} languages, words {words[0]:.1f} -> {words[1]:.1f}",
            flush=True,
        )
    (arguments.folder / "SOURCES.json").write_text(json.dumps(PAPERS, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())

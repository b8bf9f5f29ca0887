"""What is read out of each wheel: one function a layout, each a generator of pairs.

A source is a function that takes an Origin (a wheel, or the running environment) and yields Pair. It decides which
texts belong together; data.collect then judges every pair alike (length, language, duplicates). docs/collect.md
shows how to add one.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import orjson

from data.catalogs import Entry, read_mo, read_po
from data.docstrings import read_docstrings
from data.languages import bcp47
from data.texts import clean, html_to_text, num_words
from data.wheels import MEMBER_BYTES

# Kinds of pair. Each is a source of its own in training, so that a batch holds one kind, and in evaluation.
TITLES = "titles"  # a label and what it stands for, in one language
TRANSLATIONS = "translations"  # a sentence and its English original
API = "api"  # an operation of a web service and its documentation, English
DOCSTRINGS = "docstrings"  # the summary of a docstring and the prose after it, English
KINDS = (TITLES, TRANSLATIONS, API, DOCSTRINGS)


class Pair(NamedTuple):
    """A pair as it is found: clean texts, `lang` of the query, `id` unique within the origin and the kind.

    `drop` is the reason why the pair must not be used, when the source can tell.
    """

    kind: str
    query: str
    passage: str
    lang: str
    id: str
    drop: str = ""


class Origin(Protocol):
    """What a source reads from: data.wheels.Wheel or data.docstrings.Installed."""

    name: str
    version: str
    problems: list[str]

    @property
    def licence(self) -> str: ...

    def members(self, pattern: str, parse: Callable[[bytes], Any] = ...) -> Iterator[tuple[re.Match[str], Any]]: ...

    def describe(self) -> dict[str, Any]: ...

    def licence_texts(self) -> Iterator[tuple[str, str]]: ...


Texts = dict[tuple[str, ...], str]

_COMPONENT_FILE = r"homeassistant/components/(?P<component>[^/]+)/(?:manifest|translations/(?P<locale>[^/]+))\.json"


def homeassistant(origin: Origin) -> Iterator[Pair]:
    """Labels with their descriptions, and sentences with their English originals, of Home Assistant's components."""
    files = origin.members(_COMPONENT_FILE, orjson.loads)
    for component, group in itertools.groupby(files, key=lambda file: file[0]["component"]):
        trees = {found["locale"]: tree for found, tree in group if isinstance(tree, dict)}
        manifest = trees.pop(None, {})
        product = str(manifest.get("name") or component.replace("_", " ").title())
        texts = {locale: dict(_leaves(tree)) for locale, tree in trees.items()}
        english = texts.get("en", {})
        originals = {text.casefold() for text in english.values()}
        for locale in sorted(texts, key=lambda name: (name != "en", name)):
            yield from _titles(component, product, locale, texts[locale], originals)
            yield from _translations(component, locale, texts[locale], english, originals)


def _leaves(tree: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of keys, clean text) of every text in nested dicts, in the file's order."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    while todo:
        path, node = todo.pop()
        if isinstance(node, dict):
            todo += [((*path, key), child) for key, child in reversed(node.items())]
        elif isinstance(node, str):
            yield path, clean(node)


def _titles(component: str, product: str, locale: str, texts: Texts, originals: set[str]) -> Iterator[Pair]:
    """Every description of one file with the label it belongs to, put behind the name of the product.

    A bare label says little: "Host" has 242 English descriptions. The product's name makes a question of it.
    """
    product = texts.get(("title",), "") or clean(product)
    lang = bcp47(locale)
    for path, description in texts.items():
        label = _label(path, texts)
        if label:
            query = label if product.casefold() in label.casefold() else f"{product}: {label}"
            drop = _unusable(label + description) or _untranslated(description, lang, originals)
            yield Pair(TITLES, query, description, lang, f"{component}/{locale}/{'.'.join(path)}", drop)


def _label(path: tuple[str, ...], texts: Texts) -> str:
    """The label that the text at `path` describes, or "" when it describes none."""
    if path[-1] == "description":
        return texts.get((*path[:-1], "title")) or texts.get((*path[:-1], "name")) or ""
    if len(path) >= 2 and path[-2] == "data_description":
        return texts.get((*path[:-2], "data", path[-1])) or ""
    return ""


def _translations(component: str, locale: str, texts: Texts, english: Texts, originals: set[str]) -> Iterator[Pair]:
    lang = bcp47(locale)
    if lang.partition("-")[0] == "en":
        return
    for path, text in texts.items():
        original = english.get(path)
        if original:
            drop = _unusable(text + original) or _untranslated(text, lang, originals)
            yield Pair(TRANSLATIONS, text, original, lang, f"{component}/{locale}/{'.'.join(path)}", drop)


def _unusable(text: str) -> str:
    return "unresolved reference" if "[%key" in text else ""


def _untranslated(text: str, lang: str, originals: set[str]) -> str:
    return "not translated" if lang.partition("-")[0] != "en" and text.casefold() in originals else ""


_CATALOG = r"(?P<catalog>(?:.*/)?(?P<locale>[^/]+)/LC_MESSAGES/[^/]+)"


def gettext_catalogs(origin: Origin) -> Iterator[Pair]:
    """Sentences with their English originals out of gettext catalogues.

    The text form is read where there is one: it marks the guesses (`fuzzy`) that some packages compile as if they
    were translations. A compiled catalogue is read only where the text form is missing.
    """
    done = set()
    for found, entries in origin.members(_CATALOG + r"\.po", lambda content: list(read_po(content.decode("utf-8")))):
        done.add(found["catalog"])
        yield from _messages(found["catalog"], found["locale"], entries)
    for found, entries in origin.members(_CATALOG + r"\.mo", lambda content: list(read_mo(content))):
        if found["catalog"] not in done:
            yield from _messages(found["catalog"], found["locale"], entries)


def _messages(catalog: str, locale: str, entries: list[Entry]) -> Iterator[Pair]:
    lang = bcp47(locale)
    if lang.partition("-")[0] == "en":
        return
    english = [clean(entry.english) for entry in entries]
    originals = {clean(text).casefold() for entry in entries for text in (entry.msgid, entry.plural)}
    for number, (entry, original) in enumerate(zip(entries, english, strict=True)):
        text = clean(entry.translation)
        drop = "marked as a guess" if entry.fuzzy else _untranslated(text, lang, originals)
        yield Pair(TRANSLATIONS, text, original, lang, f"{catalog}#{number}", drop)


_SERVICE = r"botocore/data/(?P<service>[^/]+)/(?P<version>[^/]+)/service-2\.json(?P<gzip>\.gz)?"
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def botocore(origin: Origin) -> Iterator[Pair]:
    """Operations of web services, as "service: operation in words", with their documentation; newest versions only."""
    files = origin.members(_SERVICE, _service)
    for service, group in itertools.groupby(files, key=lambda file: file[0]["service"]):
        *_, (_, model) = group
        name = str(model["metadata"].get("serviceId", service))
        for operation, facts in model["operations"].items():
            if isinstance(facts, dict) and isinstance(facts.get("documentation"), str):
                query = f"{name}: {_CAMEL.sub(' ', operation)}"
                yield Pair(API, query, html_to_text(facts["documentation"]), "en", f"{service}/{operation}")


def _service(content: bytes) -> dict[str, Any]:
    """The JSON of a service, gzipped or not; raises ValueError when it is not one or unpacks beyond MEMBER_BYTES."""
    if content[:2] == b"\x1f\x8b":
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MEMBER_BYTES + 1)
    if len(content) > MEMBER_BYTES:
        raise ValueError(f"unpacks to more than {MEMBER_BYTES >> 20} MiB")
    model = orjson.loads(content)
    if not (isinstance(model, dict) and all(isinstance(model.get(part), dict) for part in ("metadata", "operations"))):
        raise ValueError("not a service model")
    return model


_MODULE = r"(?!.*(?:^|/)_?tests?/)(?!.*/(?:test_[^/]*|conftest)\.py$).*\.py"


def docstrings(origin: Origin) -> Iterator[Pair]:
    """Summaries of docstrings with the prose after them, out of every module that is no test."""
    for found, texts in origin.members(_MODULE, read_docstrings):
        for text in texts:
            drop = "" if 3 <= num_words(text.summary) <= 60 else "no summary"
            yield Pair(DOCSTRINGS, text.summary, text.body, "en", f"{found[0]}:{text.line}", drop)

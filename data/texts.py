"""Clean the texts that software carries: markup, placeholders and invisible characters out, words kept."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from data.records import normalise

GAP = "\u2026"  # stands where software puts a value in

_LINK = re.compile(r"\[([^\[\]]*)\]\s*\([^()]*\)|【([^【】]*)】\s*\([^()]*\)")
_BLOCK_TAG = re.compile(r"</?(?:br|p|div|li|ul|ol|tr|td|th|table|h[1-6]|hr|pre|dl|dt|dd)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_CODE = re.compile(r"(?<!`)(`{1,3})(?!`)([^`]{1,500}?)\1(?!`)")
# between letters or digits a star is an operator: 2**3
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9*])(\*{1,3})(?=[^\s*])([^*\n]*?[^\s*])\1(?![A-Za-z0-9*])")
_LINE_MARK = re.compile(r"(?m)^[ \t]*(?:#{1,6}|[-*>])[ \t]+")
_PLACEHOLDER = re.compile(
    r"%\([^()]*\)[-+#0]?\d*(?:\.\d+)?[A-Za-z]"  # %(name)s
    r"|(?<!\d)%[sd]"  # %s, also in %sGiB; not in 100%sure
    r"|%(?:\d+\$)?[-+#0]?\d*(?:\.\d+)?[sdrifgxc](?![A-Za-z])"  # %1$d, %.2f
    r"|\{\$.{0,200}?\$\}|\{\{.{0,200}?\}\}|\{%.{0,200}?%\}"  # {$ name $}, {{ name }}, {% tag %}
    r"|[$#]?\{[^{}\"']{0,80}\}"  # {name}, ${name}
)
_GAPS = re.compile(rf"{GAP}(?:[\s.]*{GAP})+")
# soft hyphen, zero-width space, direction marks, byte-order mark; not the joiners that Persian and Indic spelling needs
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
_WIDE = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def clean(text: str) -> str:
    """`text` as a reader sees it: no tags, entities, Markdown or invisible characters, normalised white space.

    A placeholder such as `{name}` or `%(count)d` becomes GAP: its name is code, the same in every language, and
    would let a translation be found by it.
    """
    text = without_links(text)
    if "<" in text:
        text = _TAG.sub("", _BLOCK_TAG.sub(" ", text))
    if "%" in text or "{" in text:
        text = _GAPS.sub(GAP, _PLACEHOLDER.sub(GAP, text)).replace("%%", "%")
    text = without_marks(_LINE_MARK.sub(" ", text))
    if "&" in text:
        text = html.unescape(text)
    return normalise(_INVISIBLE.sub("", text))


def without_links(text: str) -> str:
    """`text` with Markdown links replaced by the words they stand on."""
    return _LINK.sub(lambda found: found[1] or found[2] or " ", text)


def without_marks(text: str) -> str:
    """`text` without the back-ticks and stars that mark code and emphasis in Markdown and reStructuredText."""
    if "`" in text:
        text = _CODE.sub(r"\2", text)
    return _EMPHASIS.sub(r"\2", text) if "*" in text else text


def num_words(text: str) -> int:
    """Words by blanks without gaps, or half the characters of scripts that set none, whichever is more."""
    return max(len(text.replace(GAP, " ").split()), len(_WIDE.findall(text)) // 2)


def num_letters(text: str) -> int:
    """How many characters of `text` are letters."""
    return sum(map(str.isalpha, text))


def html_to_text(markup: str) -> str:
    """The text of an HTML fragment, with blanks between blocks."""
    reader = _TextOfHtml()
    reader.feed(markup)
    reader.close()
    return normalise("".join(reader.parts))


class _TextOfHtml(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.parts.append(_between(tag))

    def handle_endtag(self, tag: str) -> None:
        self.parts.append(_between(tag))


def _between(tag: str) -> str:
    return "" if tag in ("a", "b", "i", "em", "strong", "code", "span") else " "

"""Stage `search`: embed texts once, then rank them for every question, in the terminal or on a local page."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data.errors import UserError
from data.settings import key

if TYPE_CHECKING:
    from trainer.finder import Finder, Found
    from trainer.sets import Document

_SHOWN = 300  # characters of a passage on the screen
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet search`."""

    model: str = key(help="model folder, run folder, or hub id")
    input: str = key(help="what is searched: text file (one a line), JSONL with text or passage, or BEIR folder")
    query: str | list[str] = key([], help="questions; none: asked for, one a line")
    compare: str | None = key(None, help="another model, whose results are shown beside the first one's")
    top_k: int = key(5, help="passages shown for each question", low=1)
    serve: bool = key(False, help="ask on a page in the browser instead of in the terminal")
    host: str = key("127.0.0.1", help="address of that page; another than this machine's own opens it to the network")
    port: int = key(8000, help="port of that page; 0: any that is free", low=0, high=65535)
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (bf16: 2048) on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))

    def check(self) -> list[str]:
        """One message for each combination that cannot be."""
        problems = []
        if self.compare == self.model:
            problems.append(f"compare={self.compare}: that is the model itself; name another, or leave it out")
        if self.serve and self.query:
            problems.append(f"query={self.query}: with serve=true the page asks for questions; leave one of them out")
        if not all(question.strip() for question in self.questions):
            problems.append("query: a question is empty; write one, or leave query out to be asked for it")
        return problems

    @property
    def questions(self) -> Sequence[str]:
        return [self.query] if isinstance(self.query, str) else self.query


def run(config: Config) -> None:
    """Show the best passages of the input for every question, with their scores (inner products).

    Raises:
        UserError: missing model or input, nothing to search in, or a port that cannot be had.
        NumericError: a model gives vectors with NaN or infinity.
    """
    from trainer import sets

    if not config.serve:
        passages = sets.corpus(config.input)
        _answer(config, _finders(config, passages), passages)
        return

    from trainer import searchpage

    with searchpage.listen(config.host, config.port) as socket:  # before the work: a port may be taken
        passages = sets.corpus(config.input)
        page = searchpage.Page(_finders(config, passages), passages, config.input, config.top_k, config.host)
        searchpage.serve(page, socket)


def _finders(config: Config, passages: Sequence[Document]) -> list[Finder]:
    from trainer.device import pick_device
    from trainer.embed import Embedder, load_model
    from trainer.finder import index

    device = pick_device(config.device)
    names = [config.model, *([config.compare] if config.compare else [])]
    models = [load_model(name, device) for name in names]  # both, before the work on the first
    texts = [passage.text for passage in passages]
    return [
        index(name, Embedder(model, device, config.precision, config.tokens_per_chunk), texts)
        for name, model in zip(names, models, strict=True)
    ]


# --- in the terminal -----------------------------------------------------------------------------------------------


def _answer(config: Config, finders: Sequence[Finder], passages: Sequence[Document]) -> None:
    for question in config.questions or _asked():
        found = [finder(question, config.top_k) for finder in finders]
        print(f"\n{_printable(question)}")
        for finder, own, other in zip(finders, found, reversed(found), strict=True):
            if len(finders) > 1:
                shared = len(set(own.numbers) & set(other.numbers))
                print(f"\n{finder.name}: {shared} of {len(own.numbers)} are among the other's, too")
            _print_best(own, passages, other.numbers if len(finders) > 1 else ())
        sys.stdout.flush()


def _asked() -> Iterator[str]:
    """Questions from the standard input, up to its end; on a terminal with a prompt."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "question (Ctrl-D ends): "
        with contextlib.suppress(ImportError):  # some builds of Python come without it
            import readline  # noqa: F401  # gives input() arrow keys and a history
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"query: the standard input is no UTF-8 ({error.reason})") from None
        if question:
            yield question


def _print_best(found: Found, passages: Sequence[Document], elsewhere: Sequence[int]) -> None:
    """A line for every passage: place, score, place in the other model's results if there, labels if any, text."""
    best = [passages[number] for number in found.numbers]
    labels = [" ".join(filter(None, (passage.lang, passage.source))) for passage in best]
    width = max(map(len, labels))
    for place, (number, score) in enumerate(zip(found.numbers, found.scores, strict=True), start=1):
        columns = [f"{place:3d}", f"{score:.3f}"]
        if elsewhere:
            columns.append(f"={elsewhere.index(number) + 1:<3d}" if number in elsewhere else " " * 4)
        if width:
            columns.append(f"{labels[place - 1]:{width}}")
        text = best[place - 1].text
        columns.append(text[:_SHOWN] + ("…" if len(text) > _SHOWN else ""))
        print(_printable("  ".join(columns)))


def _printable(text: str) -> str:
    """Without control characters, which would steer the terminal instead of being shown on it."""
    return _CONTROLS.sub("\ufffd", text)

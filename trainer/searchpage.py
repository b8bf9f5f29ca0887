"""The page of `quintet search serve=true`: a small web server that answers questions, for this machine alone.

GET /          the page (searchpage.html, whole: it loads nothing from anywhere)
GET /about     what is searched, with which models, and questions to begin with
POST /search   {"query": TEXT} -> the nearest passages of each model; an error is {"error": MESSAGE}

A page of another site that is open in the same browser cannot use it: requests must name this server as their host
(a foreign name that was made to point here does not), must be JSON (which other sites may not send unasked), and
no answer allows them to be read from elsewhere. Passages are data of others: they reach the page as JSON and the screen
as text, and the page may run no script but its own.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import ipaddress
import logging
import re
import socket
import unicodedata
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data.errors import NumericError, UserError
from trainer.finder import Finder, Found
from trainer.sets import Document

log = logging.getLogger("quintet")

LONGEST_QUERY = 2000  # characters; the page's input field knows it, too
_LARGEST_BODY = 32_768  # bytes: the longest query, each letter an escaped pair of twelve bytes, and its frame
_WAITING = 32  # requests at a time: one is computed, the rest wait
_EXAMPLES, _SCRIPTS = 10, 6
_EXAMPLE_LETTERS = range(8, 61)


@dataclass(frozen=True, eq=False)
class Page:
    """What the page shows: one or two models over the same passages of `input`, `top_k` of them for a question."""

    finders: Sequence[Finder]
    passages: Sequence[Document]
    input: str
    top_k: int
    host: str = "127.0.0.1"

    @cached_property
    def about(self) -> dict[str, Any]:
        return {
            "models": [finder.name for finder in self.finders],
            "input": self.input,
            "passages": len(self.passages),
            "top_k": self.top_k,
            "longest": LONGEST_QUERY,
            "local": is_local(self.host),
            "examples": [{"text": text, "lang": lang} for text, lang in examples(self.passages)],
        }

    def answer(self, query: str) -> dict[str, Any]:
        return {"query": query, "results": [self._shown(finder(query, self.top_k)) for finder in self.finders]}

    def _shown(self, found: Found) -> dict[str, Any]:
        hits = []
        for number, score in zip(found.numbers, found.scores, strict=True):
            passage = self.passages[number]
            labels = {"text": passage.text, "lang": passage.lang, "source": passage.source, "id": passage.id}
            hits.append({"number": number, "score": score, **labels})
        seconds = {"embedding": found.embedding, "searching": found.searching}
        return {"hits": hits, "mean": found.mean, "seconds": seconds}


def examples(passages: Sequence[Document]) -> list[tuple[str, str]]:
    """Up to ten (question, its language) to begin with: in six scripts first, then in other languages.

    The question of a passage's own record, where it has one, else the passage itself; short ones only. Where no
    language is known the script stands for it. Frequent ones come first.
    """
    firsts: dict[tuple[str, str], tuple[str, str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for passage in passages:
        text = " ".join((passage.query or passage.text).split())
        script = _script(text)
        if len(text) in _EXAMPLE_LETTERS and script:
            kind = (script, passage.lang or script)
            counts[kind] += 1
            firsts.setdefault(kind, (text, passage.lang))
    kinds = [kind for kind, _ in counts.most_common()]
    leaders = [kind for place, kind in enumerate(kinds) if kind[0] not in {script for script, _ in kinds[:place]}]
    chosen = sorted(kinds, key=lambda kind: kind not in leaders[:_SCRIPTS])
    return [firsts[kind] for kind in chosen[:_EXAMPLES]]


def _script(text: str) -> str:
    """The script of a text's first letter, as Unicode's names have it: LATIN, CYRILLIC, CJK; "" without a letter."""
    letter = next(filter(str.isalpha, text), "")
    return unicodedata.name(letter, "").partition(" ")[0] if letter else ""


# --- the server ----------------------------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections, which wait until `serve` takes them. Raises UserError where it cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            other = port + 1 if 1023 < port < 65535 else 8000
            mend = f"take another, such as port={other}, or port=0 for any that is free"
            raise UserError(f"port={port}: cannot be had on {host} ({reason}); {mend}") from None
        raise UserError(f"host={host}: no address of this machine ({reason}); use 127.0.0.1 or 0.0.0.0") from None
    return listening


def serve(page: Page, listening: socket.socket) -> None:
    """Answer until Ctrl-C (KeyboardInterrupt) or a signal."""
    port = listening.getsockname()[1]
    if not is_local(page.host):
        log.warning(
            "host=%s: whoever reaches this machine may ask and read the passages; there is no login and no encryption",
            page.host,
        )
    page.answer("the first question also pays for what is made once")
    shown = f"[{page.host}]" if ":" in page.host else page.host
    log.info("open http://%s:%d/ in a browser; Ctrl-C ends", shown, port)
    server(page).run(sockets=[listening])


def server(page: Page) -> uvicorn.Server:
    """The web server, not yet running: plain asyncio and h11, whatever else is installed."""
    settings = uvicorn.Config(
        application(page),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_WAITING,
        timeout_graceful_shutdown=2,
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    return uvicorn.Server(settings)


def application(page: Page) -> ASGIApp:
    """The three addresses, behind the checks and with the headers that every answer has."""
    html = Path(__file__).with_suffix(".html").read_bytes()
    worker = ThreadPoolExecutor(1, "search")  # one question at a time, in one thread: torch's own threads belong to it

    async def show(request: Request) -> Response:
        return Response(html, media_type="text/html; charset=utf-8")

    async def about(request: Request) -> Response:
        return _json(page.about)

    async def search(request: Request) -> Response:
        query = _query(await _body(request))
        return _json(await asyncio.get_running_loop().run_in_executor(worker, page.answer, query))

    routes = [Route("/", show), Route("/about", about), Route("/search", search, methods=["POST"])]
    handlers: dict[Any, Any] = {HTTPException: _refused, NumericError: _failed, Exception: _failed}
    return _guarded(Starlette(routes=routes, exception_handlers=handlers), page.host, _policy(html))


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, 'send JSON: {"query": "..."} with content-type: application/json')
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _LARGEST_BODY:
            raise HTTPException(413, f"the request has more than {_LARGEST_BODY:,} bytes; ask a shorter question")
    return body


def _query(body: bytes) -> str:
    try:
        query = orjson.loads(body)["query"]
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        query = None
    if not isinstance(query, str):
        raise HTTPException(400, 'no question in it; send JSON: {"query": "..."}')
    if not query.strip():
        raise HTTPException(400, "the question is empty")
    if len(query) > LONGEST_QUERY:
        raise HTTPException(400, f"the question has {len(query):,} characters; {LONGEST_QUERY:,} are taken at most")
    return query


def _json(content: object, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


async def _refused(request: Request, error: HTTPException) -> Response:
    answer = _json({"error": error.detail}, error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> Response:
    told = str(error) if isinstance(error, NumericError) else "the search failed; the terminal shows why"
    return _json({"error": told}, 500)


# --- who may ask ---------------------------------------------------------------------------------------------------


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    return host == "localhost" or _is_address(host, loopback=True)


def _is_address(host: str, *, loopback: bool = False) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or not loopback


def is_addressed(header: str, host: str) -> bool:
    """Whether a Host header names a server that listens on `host`.

    A site whose name is made to resolve to this machine (DNS rebinding) names itself. Names that only this machine
    has, and bare addresses, cannot be made to. The port is free: it may have been forwarded.
    """
    try:
        named = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if is_local(host):
        return is_local(named)
    return is_local(named) or _is_address(named) or named in (host.lower(), socket.gethostname().lower())


def _policy(html: bytes) -> bytes:
    """The Content-Security-Policy: the page's own script and style by their hashes, and talk with this server alone."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(content).digest())
        for tag, content in re.findall(rb"<(script|style)>(.*?)</\1>", html, re.DOTALL)
    }
    return b"; ".join(
        [
            b"default-src 'none'",
            b"script-src 'sha256-%s'" % hashes[b"script"],
            b"style-src 'sha256-%s'" % hashes[b"style"],
            b"connect-src 'self'",
            b"img-src data:",
            b"base-uri 'none'",
            b"form-action 'none'",
            b"frame-ancestors 'none'",
            b"require-trusted-types-for 'script'",
        ]
    )


def _guarded(app: ASGIApp, host: str, policy: bytes) -> ASGIApp:
    headers = [
        (b"content-security-policy", policy),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cache-control", b"no-store"),
    ]

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if is_addressed(named, host):
            await app(scope, receive, send_on)
        else:
            refusal = _json({"error": f"this server does not answer for {named!r}; use its own address"}, 421)
            await refusal(scope, receive, send_on)

    return guarded

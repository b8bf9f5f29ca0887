"""`quintet search serve=true`: a real server and a real browser; what they show is an exact search in numpy."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tiny
import torch

from data.errors import NumericError, UserError
from launcher import cli
from trainer import searchpage, sets
from trainer.embed import Embedder, encode_texts
from trainer.encoder import open_model
from trainer.finder import index
from trainer.searchpage import Page
from trainer.sets import Document

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator
    from playwright.sync_api import Page as Tab

HOSTILE = "<img src=x onerror=alert(1)>"
HEBREW = "הגדרת הטמפרטורה בחדר השינה"
LONG = "the quick brown fox " * 40
ROWS = [
    {"query": "lazy dogs", "passage": "the lazy dog", "lang": "en", "source": "dogs"},
    {"query": "Wo ist die Heizung?", "passage": "die Heizung im Wohnzimmer", "lang": "de", "source": "heat"},
    {"query": HOSTILE, "passage": f"{HOSTILE}<script>alert(2)</script>", "lang": "gd"},
    {"query": "טמפרטורה בחדר", "passage": HEBREW, "lang": "he"},
    {"query": "温度の設定はどこですか", "passage": "温度を設定します", "lang": "ja"},
    {"query": "x", "passage": "Indique a temperatura desejada", "lang": "pt"},
    {"query": "x", "passage": LONG},
    {"query": "x", "passage": "Выберите устройство для подключения", "lang": "ru"},
]
PROMPTS = [("query: ", "passage: "), ("Query: ", "")]
TOP = 5


@dataclass(frozen=True)
class Served:
    page: Page
    port: int
    folders: tuple[Path, Path]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, body: bytes | dict[str, Any] | None, path: str = "/search", **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and JSON of the answer to a POST, or without a body to a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = json.dumps(body) if isinstance(body, dict) else body
        given = {
            "Content-Type": "application/json",
            **{name.replace("_", "-").title(): text for name, text in headers.items()},
        }
        connection.request("GET" if body is None else "POST", path, sent, given)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content.decode()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over eight passages with two models that have prompts of their own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    passages = sets.corpus(str(folder / "rows.jsonl"))
    folders = tiny.bert(folder / "first"), tiny.xlmr(folder / "second")
    for path, (query, passage) in zip(folders, PROMPTS, strict=True):
        settings = {"query_prompt": query, "passage_prompt": passage}
        (path / "quintet.json").write_text(json.dumps(settings), encoding="utf-8")
    texts = [passage.text for passage in passages]
    finders = [index(path.name, Embedder(open_model(path), torch.device("cpu")), texts) for path in folders]
    page = Page(finders, passages, "rows.jsonl", TOP)
    listening = searchpage.listen("127.0.0.1", 0)
    server = searchpage.server(page)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield Served(page, listening.getsockname()[1], folders)
    server.should_exit = True
    thread.join(timeout=30)
    listening.close()


def _exact(folder: Path, prompts: tuple[str, str], question: str) -> tuple[list[int], np.ndarray]:
    """The passages by falling inner product in float64, and all scores."""
    model = open_model(folder)
    passages = encode_texts(model, [row["passage"].strip() for row in ROWS], prompts[1]).numpy().astype(np.float64)
    scores = passages @ encode_texts(model, [question], prompts[0])[0].numpy()
    return np.argsort(-scores, kind="stable").tolist(), scores


# --- the server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Wie stelle ich die Heizung ein?", "  温度を\n設定します ", HOSTILE])
def test_each_model_answers_with_its_own_prompts_as_an_exact_search_does(served: Served, question: str) -> None:
    status, _, answer = served.ask({"query": question})
    assert (status, answer["query"]) == (200, question)
    for folder, prompts, found in zip(served.folders, PROMPTS, answer["results"], strict=True):
        order, scores = _exact(folder, prompts, " ".join(question.split()))
        assert [hit["number"] for hit in found["hits"]] == order[:TOP]
        assert [hit["score"] for hit in found["hits"]] == pytest.approx(scores[order[:TOP]], abs=1e-5)
        assert found["mean"] == pytest.approx(scores.mean(), abs=1e-5)
        for hit in found["hits"]:
            row = ROWS[hit["number"]]
            assert hit["text"] == " ".join(row["passage"].split())
            assert (hit["lang"], hit["source"]) == (row.get("lang", ""), row.get("source", ""))
        assert all(seconds > 0 for seconds in found["seconds"].values())


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b"{", {}, 400, "no question in it"),
        (b"[]", {}, 400, "no question in it"),
        (b'"query"', {}, 400, "no question in it"),
        (b'{"query": 7}', {}, 400, "no question in it"),
        (b'{"query": "\\ud800"}', {}, 400, "no question in it"),
        (b'{"query": "\xff"}', {}, 400, "no question in it"),
        ({"query": " \n"}, {}, 400, "is empty"),
        ({"query": "a" * 2001}, {}, 400, "2,001 characters; 2,000"),
        (b" " * 40_000, {}, 413, "more than 32,768 bytes"),
        ({"query": "a"}, {"content_type": "text/plain"}, 415, "send JSON"),
        ({"query": "a"}, {"path": "/about"}, 405, "Method Not Allowed"),
        ({"query": "a"}, {"path": "/../etc/passwd"}, 404, "Not Found"),
        (None, {"path": "/search"}, 405, "Method Not Allowed"),
    ],
)
def test_a_bad_request_gets_a_message_in_json(
    served: Served, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    got, _, answer = served.ask(body, **headers)
    assert got == status
    assert message in answer["error"]


def test_the_longest_question_is_taken_however_it_is_escaped(served: Served) -> None:
    assert served.ask({"query": "\U0001f600" * 2000})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "8.8.8.8", "[::1"])
def test_a_name_that_is_not_this_servers_is_refused(served: Served, host: str) -> None:
    for body, path in ((None, "/"), (None, "/about"), ({"query": "dog"}, "/search")):
        status, _, answer = served.ask(body, path, host=host)
        assert status in (400, 421)
        assert "hits" not in str(answer)
        assert "first" not in str(answer)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9000", "LOCALHOST", "[::1]:80"])
def test_this_machines_own_names_are_taken_with_any_port(served: Served, host: str) -> None:
    assert served.ask(None, "/about", host=host)[0] == 200


def test_on_the_network_addresses_and_the_machines_name_are_taken_and_other_names_are_not() -> None:
    for host in ("0.0.0.0", "gpu-box"):
        assert searchpage.is_addressed("192.168.1.7:8000", host)
        assert searchpage.is_addressed(f"{socket.gethostname()}:8000", host)
        assert searchpage.is_addressed("localhost", host)
        assert not searchpage.is_addressed("evil.example", host)
    assert searchpage.is_addressed("gpu-box:8000", "gpu-box")


def test_other_sites_may_neither_read_nor_frame_it_and_no_foreign_script_may_run(served: Served) -> None:
    for body, path in ((None, "/"), (None, "/about"), (b"{", "/search"), (None, "/nothing")):
        _, headers, _ = served.ask(body, path, origin="https://evil.example")
        assert not [name for name in headers if name.lower().startswith("access-control")]
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_other_address(served: Served) -> None:
    _, _, html = served.ask(None, "/")
    assert not [word for word in ("http:", "https:", "//cdn", "@import", "innerHTML", "url(") if word in html]


@pytest.mark.parametrize(
    ("error", "message"), [(NumericError("its weights are broken"), "its weights are broken"), (ValueError("x"), "the")]
)
def test_a_failure_is_told_in_json(
    served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(page: Page, query: str) -> None:
        raise error

    monkeypatch.setattr(Page, "answer", fail)
    status, headers, answer = served.ask({"query": "dog"})
    assert (status, "content-security-policy" in headers) == (500, True)
    assert message in answer["error"]


def test_examples_come_from_scripts_first_then_from_languages_and_frequent_ones_first() -> None:
    def texts(lang: str, text: str, times: int) -> list[Document]:
        return [Document(str(number), f"{text} {number}", lang=lang) for number in range(times)]

    passages = [
        *texts("en", "an English text", 5),
        *texts("de", "ein deutscher Text", 4),
        *texts("ru", "русский текст", 3),
        *texts("", "נוסח בעברית", 2),
        *texts("fr", "x" * 61, 9),
        Document("0", "the passage", lang="el", query="η  ερώτηση εδώ"),
        Document("1", "12345678"),
    ]
    assert searchpage.examples(passages) == [
        ("an English text 0", "en"),
        ("русский текст 0", "ru"),
        ("נוסח בעברית 0", ""),
        ("η ερώτηση εδώ", "el"),
        ("ein deutscher Text 0", "de"),
    ]


def test_a_port_that_is_taken_is_named_with_the_mend(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model={served.folders[0]}", "input=missing.txt", "serve=true", f"port={served.port}"]
    assert cli.main(["search", *words]) == 2
    message = capsys.readouterr().err
    assert f"port={served.port}: cannot be had on 127.0.0.1 (Address already in use)" in message
    assert "port=0 for any that is free" in message


def test_an_address_of_another_machine_is_refused() -> None:
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError, match=r"use 127\.0\.0\.1 or 0\.0\.0\.0"):
            searchpage.listen(host, 0)


def test_ctrl_c_ends_the_page_with_130_and_another_host_than_this_one_gets_a_warning(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("one text\nanother text\n", encoding="utf-8")
    statuses, listen = [], searchpage.listen

    def listening(host: str, port: int) -> socket.socket:
        made = listen(host, port)
        threading.Thread(target=visit, args=(made.getsockname()[1],), daemon=True).start()
        return made

    def visit(port: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")  # answered once the passages are embedded
        statuses.append(connection.getresponse().status)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(searchpage, "listen", listening)
    words = [f"model={served.folders[0]}", f"input={tmp_path / 'texts.txt'}", "serve=true", "port=0"]
    assert cli.main(["search", *words, "host=0.0.0.0", "device=cpu"]) == 130
    assert statuses == [200]
    told = capsys.readouterr().err
    assert "host=0.0.0.0: whoever reaches this machine may ask" in told
    assert told.endswith("quintet search: interrupted\n")


# --- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tab(served: Served, browser: Browser) -> Iterator[Tab]:
    """The page in a window of a desktop; at the end nothing may have gone wrong or been asked of anyone else."""
    yield from _opened(served, browser, 1280, "light")


def _opened(served: Served, browser: Browser, width: int, scheme: Any) -> Iterator[Tab]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    wrong: list[str] = []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: request.url.startswith(f"{served.address}/") or wrong.append(request.url))
    tab.goto(served.address)
    yield tab
    context.close()
    assert wrong == []


def _asked(tab: Tab, question: str) -> list[Locator]:
    """Type a question; the columns once its answer is there."""
    tab.get_by_role("searchbox", name="Question, in any language").fill("")
    tab.get_by_text("Type a question;").wait_for()
    tab.get_by_role("searchbox").fill(question)
    tab.locator("#results section").first.wait_for()
    return tab.get_by_role("region").all()


def test_what_is_typed_is_answered_in_the_order_of_an_exact_search(served: Served, tab: Tab) -> None:
    question = "Wie stelle ich die Heizung ein?"
    columns = _asked(tab, question)
    assert len(columns) == 2
    tops = []
    orders = [_exact(*place, question) for place in zip(served.folders, PROMPTS, strict=True)]
    for column, (order, scores) in zip(columns, orders, strict=True):
        items = column.locator("ol > li").all()
        assert [item.locator(".text").text_content() for item in items] == [
            " ".join(ROWS[number]["passage"].split()) for number in order[:TOP]
        ]
        assert [item.locator(".score").text_content() for item in items] == [
            f"score {scores[number]:.3f}" for number in order[:TOP]
        ]
        tops.append([item.bounding_box()["y"] for item in items])
    assert tops[0] == tops[1]  # results of one place stand side by side
    first, second = (order[:TOP] for order, _ in orders)
    for place, number in enumerate(first):
        item = columns[0].locator("ol > li").nth(place)
        marks = [f"also #{second.index(number) + 1} in B"] if number in second else []
        assert item.locator(".also").all_text_contents() == marks
    shared = len(set(first) & set(second))
    assert f"{shared} of {TOP} are found by both models" in tab.get_by_role("status").inner_text()


def test_passages_are_text_whatever_stands_in_them(tab: Tab) -> None:
    columns = _asked(tab, HOSTILE)
    shown = {text for column in columns for text in column.locator(".text").all_text_contents()}
    assert ROWS[2]["passage"] in shown
    assert tab.locator("main img, main script").count() == 0
    assert tab.get_by_role("button", name=HOSTILE).count() == 1


def test_an_example_is_asked_with_one_click_and_texts_run_in_their_own_direction(served: Served, tab: Tab) -> None:
    tab.get_by_role("button", name="טמפרטורה בחדר").click()
    tab.locator("#results section").first.wait_for()
    assert tab.get_by_role("searchbox").input_value() == "טמפרטורה בחדר"
    assert tab.get_by_role("searchbox").evaluate(_DIRECTION) == "rtl"
    number = ROWS.index(next(row for row in ROWS if row["passage"] == HEBREW))
    place = served.folders[0], PROMPTS[0]
    question = next(row["query"] for row in ROWS if number in _exact(*place, row["query"])[0][:TOP])
    texts = _asked(tab, question)[0].locator(".text").all()
    directions = {text.text_content(): text.evaluate(_DIRECTION) for text in texts}
    assert directions.pop(HEBREW) == "rtl"
    assert set(directions.values()) == {"ltr"}


_DIRECTION = "element => getComputedStyle(element).direction"


def test_it_is_used_from_the_keyboard(tab: Tab) -> None:
    field = tab.get_by_role("searchbox")
    tab.get_by_text("Type a question;").wait_for()
    field.blur()
    tab.keyboard.press("/")
    tab.keyboard.type("the quick brown fox")
    tab.keyboard.press("Enter")
    tab.locator("#results section").first.wait_for()
    more = tab.get_by_role("button", name="Show all").first
    more.focus()
    tab.keyboard.press("Enter")
    assert tab.get_by_role("button", name="Show less").first.get_attribute("aria-expanded") == "true"
    field.focus()
    tab.keyboard.press("Escape")
    tab.get_by_text("Type a question;").wait_for()
    assert field.input_value() == ""
    assert tab.locator("#results section").count() == 0


def test_an_error_is_told_and_the_next_question_answered(
    served: Served, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with browser.new_page() as tab:
        tab.goto(served.address)
        tab.get_by_text("Type a question;").wait_for()
        with monkeypatch.context() as patch:
            patch.setattr(Page, "answer", lambda page, query: 1 / 0)
            tab.get_by_role("searchbox").fill("dog")
            tab.get_by_text("the search failed; the terminal shows why").wait_for()
        tab.keyboard.press("Enter")
        tab.locator("#results section").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desktop_and_is_legible_by_day_and_night(
    served: Served, browser: Browser, width: int, scheme: str
) -> None:
    for tab in _opened(served, browser, width, scheme):
        columns = _asked(tab, "fox")
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        left, right = (column.bounding_box() for column in columns)
        assert (left["y"] == right["y"]) == (width == 1280)
        assert (left["x"] == right["x"]) == (width == 390)
        for selector in (".text", ".facts bdi", "h2", "h2 .key", ".also", "#status", "footer p", "form button"):
            assert tab.locator(selector).first.evaluate(_CONTRAST) >= 4.5, selector
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (scheme == "light")


# the ratio of WCAG 2 between an element's colour and the first background behind it
_CONTRAST = """element => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const own = getComputedStyle(element).color;
  while (parts(getComputedStyle(element).backgroundColor)[3] === 0) element = element.parentElement;
  const both = [light(own), light(getComputedStyle(element).backgroundColor)].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
}"""

"""A cloud's notices, from real HTTP servers that answer as its metadata service does."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import spot
from trainer.preempt import StopRequest
from trainer.spot import BASE_URL, Watch, noticed

# Shortened from the clouds' own documents.
AZURE_OTHER = {"DocumentIncarnation": 1, "Events": [{"EventId": "A1", "EventType": "Freeze", "Resources": ["vm1"]}]}
AZURE_PREEMPT = {"DocumentIncarnation": 2, "Events": [{"EventId": "B2", "EventType": "Preempt", "Resources": ["vm1"]}]}
AWS_NOTICE = {"action": "terminate", "time": "2026-11-26T08:22:00Z"}


class Service(http.server.BaseHTTPRequestHandler):
    """The metadata services of all three clouds; each refuses a request that lacks what it asks for."""

    taken = False  # whether the machine is taken back
    down = False
    asked: list[str] = []  # noqa: RUF012 - replaced by each test

    def do_PUT(self) -> None:
        lives = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        right = self.path == "/latest/api/token" and lives.isdigit()
        self._answer(200 if right else 400, b"TOKEN" if right else b"")

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.down:
            self._answer(500, b"")
        elif self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "TOKEN":
                self._answer(401, b"")
            else:
                self._answer(200, json.dumps(AWS_NOTICE).encode()) if self.taken else self._answer(404, b"Not Found")
        elif self.path == "/computeMetadata/v1/instance/preempted":
            right = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if right else 403, b"TRUE" if self.taken else b"FALSE")
        elif self.path == "/metadata/scheduledevents?api-version=2020-07-01":
            right = self.headers.get("Metadata") == "true"
            body = json.dumps(AZURE_PREEMPT if self.taken else AZURE_OTHER).encode()
            self._answer(200 if right else 400, body)
        else:
            self._answer(400, b"")

    def _answer(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    class Here(Service):
        asked: list[str] = []  # noqa: RUF012

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        monkeypatch.setenv(BASE_URL, f"http://127.0.0.1:{server.server_port}")
        yield Here
        server.shutdown()
        thread.join()


CLOUDS = [cloud for cloud in spot.CHOICES if cloud != "none"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_told_from_a_machine_that_may_stay(cloud: str, service: type[Service]) -> None:
    assert not noticed(cloud)
    service.taken = True
    assert noticed(cloud)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_becomes_a_request_to_stop(
    cloud: str, service: type[Service], tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()
    with StopRequest(tmp_path) as stop:

        def tell(reason: str) -> None:
            stop.ask(reason)
            told.set()

        with Watch(cloud, tell, poll_seconds=0.01):
            while len(service.asked) < 3:
                assert not told.wait(0.01)
            assert not stop.requested
            service.taken = True
            assert told.wait(30)
        assert (stop.requested, stop.reason) == (True, "spot notice")
    assert [record.getMessage() for record in caplog.records] == [
        f"preemption={cloud}: the cloud takes this machine back"
    ]


def test_a_service_that_fails_is_told_once_and_asked_on(
    service: type[Service], caplog: pytest.LogCaptureFixture
) -> None:
    told = threading.Event()
    service.down = True
    with Watch("gcp", lambda reason: told.set(), poll_seconds=0.01):
        while len(service.asked) < 5:
            assert not told.wait(0.01)
        service.down, service.taken = False, True
        assert told.wait(30)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith("preemption=gcp: its metadata service gives no answer (HTTPError)")


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"Events": [{}]}', b"\xff", b'{"Events": null}'])
def test_an_answer_that_makes_no_sense_is_no_notice(
    answer: bytes, service: type[Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "do_GET", lambda handler: handler._answer(200, answer))
    for cloud in CLOUDS:
        with contextlib.suppress(*spot.UNCLEAR):
            assert not noticed(cloud)


def test_no_proxy_is_asked(service: type[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert not noticed("gcp")


def test_without_a_cloud_nothing_is_asked(service: type[Service]) -> None:
    with Watch("none", lambda reason: None, poll_seconds=0.0):
        pass
    assert service.asked == []

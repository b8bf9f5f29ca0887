"""The dashboard: every panel shows what is logged, and what it would send is what the panels say."""

from __future__ import annotations

import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pages import typed

from launcher import cli
from trainer import dashboard, monitor
from trainer.monitor import METRICS
from trainer.panels import SECTIONS, WITHOUT

SHOWN = [metric for section in SECTIONS for panel in section.panels for metric in panel.metrics]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-settings"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monitor._forget()  # wandb keeps the settings that it has first met in a process
    yield
    monitor._forget()


def test_every_metric_has_one_panel_or_is_said_to_need_none() -> None:
    assert sorted([*SHOWN, *WITHOUT]) == sorted(METRICS)


def test_sections_are_those_that_users_look_for() -> None:
    names = [section.name for section in SECTIONS]
    wanted = ["Learning", "Retrieval quality", "Throughput", "Data health", "Checkpoints and restarts"]
    assert names == [*wanted, "Distillation", "System"]


def test_the_view_that_would_be_saved_has_the_panels() -> None:
    pytest.importorskip("wandb_workspaces")
    spec = json.loads(_spec(dashboard.Config(group="tuning")))
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [section.name for section in SECTIONS]
    for made, section in zip(sections, SECTIONS, strict=True):
        for plot, panel in zip(made["panels"], section.panels, strict=True):
            config = plot["config"]
            assert (config["chartTitle"], config["xAxis"]) == (panel.title, panel.axis)
            if any("*" in metric for metric in panel.metrics):
                assert config["useMetricRegex"]
                assert re.search(config["metricRegex"], panel.metrics[0].replace("*", "held/lang/de"))
                assert not re.search(config["metricRegex"], "train/loss")
            else:
                assert config["metrics"] == list(panel.metrics)
    filters = json.dumps(spec["section"]["runSets"][0])
    assert '"group"' in filters
    assert '"tuning"' in filters


def _spec(config: dashboard.Config) -> str:
    text: str = dashboard._workspace(config, "me")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return text


def test_the_panels_of_stages_without_steps_are_over_time() -> None:
    timed = {metric for section in SECTIONS for p in section.panels if p.axis == "work/seconds" for metric in p.metrics}
    assert timed == {metric for metric in SHOWN if metric.startswith(("work/", "distill/", "filter/", "mine/"))}


def test_the_panels_are_printed_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dashboard", "print=true"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [metric for section in printed for panel in section["panels"] for metric in panel["metrics"]] == SHOWN


def test_without_a_key_or_a_server_it_is_said_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    assert cli.main(["dashboard"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("no key", "http://127.0.0.1:9", "wandb login", "print=true"))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    assert cli.main(["dashboard"]) == 2
    assert "does not answer" in capsys.readouterr().err


class _Server(http.server.BaseHTTPRequestHandler):
    """As much of W&B's server as saving a view asks for; what it is sent is kept."""

    sent: ClassVar[list[dict[str, Any]]] = []
    refuses = False

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.sent.append(asked)
        viewer = {"id": "VXNlcjox", "entity": "me", "username": "me", "name": "me", "email": "", "flags": "{}"}
        viewer |= {"admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}, "deletedAt": None}
        data: dict[str, Any] = {"viewer": viewer, "serverInfo": {"features": []}}
        if "upsertView" in asked["query"]:
            data["upsertView"] = {"view": {"id": "Vmlldzox", "name": "nw-abc-v"}, "inserted": True}
        self._answer({"errors": [{"message": "no such project"}]} if self.refuses else {"data": data})

    def _answer(self, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Server]]:
    handler = type("Handler", (_Server,), {"sent": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{made.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
        yield handler
        made.shutdown()


def test_a_view_is_sent_to_the_server_and_its_address_printed(
    server: type[_Server], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    (words,) = typed("quintet dashboard")
    assert cli.main([*words[1:], "name=Curves"]) == 0, capsys.readouterr().err
    (saved,) = [asked["variables"] for asked in server.sent if "upsertView" in asked["query"]]
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == ("me", "mine", "Curves")
    assert all(f'"chartTitle":"{panel.title}"' in saved["spec"] for section in SECTIONS for panel in section.panels)
    assert "/me/mine?nw=abc" in capsys.readouterr().out


def test_a_refusal_of_the_server_is_one_message(
    server: type[_Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    monkeypatch.setattr(server, "refuses", True)
    assert cli.main(["dashboard", "entity=me", "project=mine"]) == 2
    message = capsys.readouterr().err
    assert "project=mine entity=me" in message
    assert "Traceback" not in message

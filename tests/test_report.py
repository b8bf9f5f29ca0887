"""The report: what it draws is what was logged, it loads nothing, and nothing in a run folder can act in it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from playwright.sync_api import Browser, Page
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from data.errors import NumericError
from launcher.cli import main
from trainer import charts, closeup, report, reporting, reportpage, runlog
from trainer.journal import Journal
from trainer.monitor import registered

ROOT = Path(__file__).resolve().parent.parent
NONE_PUBLISHED: dict[str, Any] = {"families": {}, "tables": {}}
HOSTILE = '</script><img src=x onerror="document.title=\'taken\'"><a href="https://example.com">%{x}</a>'


def _row(step: int, attempt: int = 1, **more: float) -> dict[str, Any]:
    """What the loop logs at a step, of made-up values that are all different."""
    row = {
        "train/step": step,
        "train/loss": 5.0 / step,
        "train/loss_contrastive": 4.0 / step,
        "train/loss_distill": 1.0 / step,
        "train/acc_top1": 1 - 1 / step,
        "train/pos_sim": 0.5 + step / 1_000,
        "train/neg_sim": 0.5 - step / 1_000,
        "train/lr": step * 1e-5,
        "train/grad_norm": 1.0 + step / 7,
        "train/samples_seen": step * 8,
        "perf/samples_per_s": 1_000.0 + step,
        "perf/step_s": 2.0 + step / 100,
        "perf/data_wait_frac": 0.125,
        "perf/encode_s": 0.5,
        "perf/loss_s": 0.25,
        "perf/backward_s": 0.75,
        "perf/optimizer_s": 0.125,
        "perf/mem_gib": 3.0,
        "data/padding_frac": 0.1,
        "data/samples_bad": 0,
        "run/attempt": attempt,
        "run/time": 1_000_000.0 + 3 * step,
        **more,
    }
    assert all(registered(name) for name in row)
    return row


def _scores(ndcg: float) -> dict[str, Any]:
    by_lang = {"en": {"ndcg_at_10": ndcg, "queries": 7}, "de": {"ndcg_at_10": ndcg / 2, "queries": 9}}
    entry = {"ndcg_at_10": ndcg, "mrr_at_10": 0.5, "queries": 16, "passages": 20, "by_lang": by_lang}
    sources = {"titles": {"ndcg_at_10": ndcg / 4, "queries": 8}, HOSTILE: {"ndcg_at_10": ndcg / 8, "queries": 8}}
    return entry | {"by_source": sources}


def _write(folder: Path, rows: Sequence[dict[str, Any]], config: str = "", **files: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"objective: contrastive\nsteps: 60\n{config}", encoding="utf-8")
    journal = Journal(folder / "metrics.jsonl")
    for row in rows:
        journal.write(row)
    journal.close()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _held_out(path: Path) -> Path:
    texts = tiny.TEXTS
    rows = [
        {"query": f"{texts[n]} {n}", "passage": f"{texts[-n]} secret {n}", "source": HOSTILE, "lang": "en"}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was started twice, evaluated, and exported."""
    folder = tmp_path_factory.mktemp("report")
    data = _held_out(folder / "holdout.jsonl")
    rows = [_row(step) for step in (10, 20, 30, 40)] + [_row(step, 2) for step in (30, 40, 50, 60)]
    rows += [{"train/step": step, "eval/holdout/ndcg_at_10": step / 100, "run/attempt": 2} for step in (30, 60)]
    rows += [{"train/step": 60, "ckpt/stall_s": 6.0, "ckpt/save_s": 9.0, "run/attempt": 2}]
    rows[1]["train/grad_norm"] = math.inf
    scores = _scores(0.8) | {"bm25": _scores(0.4)}
    run = _write(folder / "run", rows, f"eval: {{data: '{data}'}}\n", results={"holdout": scores}, exit={"code": 0})
    tiny.bert(run / "model")
    report.run(report.Config(runs=str(run), device="cpu"))
    return run


class Opened:
    """A report in a browser, with all that it said and asked for."""

    def __init__(self, browser: Browser, file: Path) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri(), timeout=120_000)
        self.page.wait_for_selector("html[data-drawn]", timeout=120_000)

    def drawn(self, chart: str) -> list[dict[str, Any]]:
        """The traces that plotly holds."""
        keep = "({x, y, name, meta, visible, stackgroup}) => ({x, y, name, meta, visible, stackgroup})"
        return self.page.evaluate(f"document.getElementById('chart-{chart}').data.map({keep})")


@pytest.fixture(scope="module")
def opened(browser: Browser, run_folder: Path) -> Opened:
    return Opened(browser, run_folder / "report.html")


@pytest.fixture(scope="module")
def hostile(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Two runs whose every name is an attack."""
    folder = tmp_path_factory.mktemp("hostile")
    row = _row(10, **{f"eval/{HOSTILE}/ndcg_at_10": 0.5})
    config = f"model: {{path: {json.dumps(HOSTILE)}}}\nlr: 0.5\n"
    facts = {"environment": {"cpu": HOSTILE, "versions": {HOSTILE: HOSTILE}}, "exit": {"code": 1, "reason": HOSTILE}}
    names = ("<img src=x onerror=\"document.title='taken'\">", "plain")
    runs = [
        _write(
            folder / name, [row], config if name != "plain" else "lr: 0.5\n", results={HOSTILE: _scores(0.5)}, **facts
        )
        for name in names
    ]
    output = folder / "page.html"
    data = str(_held_out(folder / "pairs.jsonl"))
    tiny.bert(runs[1] / "model")
    report.run(report.Config(runs=[str(run) for run in runs], output=str(output), data=data, texts=True, device="cpu"))
    return Opened(browser, output)


# --- in the browser ---------------------------------------------------------------------------------------------


def test_the_page_says_nothing_to_the_console_and_asks_for_nothing(opened: Opened, run_folder: Path) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("data:", "blob:"))] == [
        (run_folder / "report.html").as_uri()
    ]


@pytest.mark.parametrize(
    ("chart", "metrics"),
    [
        ("loss", ["train/loss"]),
        ("loss-parts", ["train/loss_contrastive", "train/loss_distill"]),
        ("similarity", ["train/pos_sim", "train/neg_sim"]),
        ("throughput", ["perf/samples_per_s"]),
        ("grad-norm", ["train/grad_norm"]),
        ("held-out-ndcg-at-10", ["eval/holdout/ndcg_at_10"]),
    ],
)
def test_what_is_drawn_is_what_was_logged(opened: Opened, run_folder: Path, chart: str, metrics: list[str]) -> None:
    wanted: dict[int, dict[str, Any]] = {}
    for line in (run_folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["run/attempt"] == 2 or row["train/step"] < 30:
            wanted.setdefault(row["train/step"], {}).update(row)
    for trace, metric in zip(opened.drawn(chart), metrics, strict=True):
        values = {step: row[metric] for step, row in sorted(wanted.items()) if metric in row}
        assert trace["x"] == list(values)
        assert trace["y"] == [None if value == "Infinity" else value for value in values.values()]


def test_a_restart_is_marked_on_the_curves(opened: Opened) -> None:
    shapes = opened.page.evaluate("document.getElementById('chart-loss').layout.shapes")
    assert [(shape["x0"], shape["label"]["text"]) for shape in shapes] == [(30, "start 2")]


def test_the_parts_of_a_step_add_up_to_its_time(opened: Opened) -> None:
    parts = {trace["name"]: trace for trace in opened.drawn("step-time-0")}
    assert all(trace["stackgroup"] for trace in parts.values())
    assert parts["data"]["y"][0] == pytest.approx(0.125 * 2.1)
    assert parts["checkpoint"]["y"] == pytest.approx([0.1] * 6)  # 6 s for the 60 steps before
    whole = np.sum([trace["y"] for name, trace in parts.items() if name != "checkpoint"], axis=0)
    assert whole == pytest.approx([2.0 + step / 100 for step in (10, 20, 30, 40, 50, 60)])


def test_no_button_sends_a_chart_anywhere(opened: Opened) -> None:
    titles = opened.page.evaluate("[...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)")
    assert set(titles) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert opened.page.locator("a:not([href^='#'])").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_width_and_follows_the_colour_scheme(opened: Opened, width: int, scheme: str) -> None:
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    opened.page.wait_for_function(
        "(width) => [...document.querySelectorAll('.main-svg')].every((one) => one.clientWidth <= width)", arg=width
    )
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) / 3
    colour = opened.page.evaluate("document.getElementById('chart-loss').layout.font.color")
    assert (brightness > 128, colour) == ((True, "#1b1f24") if scheme == "light" else (False, "#e6e9ed"))


def test_the_button_switches_between_light_and_dark(opened: Opened) -> None:
    opened.page.emulate_media(color_scheme="dark")
    before = opened.page.evaluate("document.getElementById('chart-loss').layout.font.color")
    opened.page.click("#theme")
    after = opened.page.evaluate("document.getElementById('chart-loss').layout.font.color")
    opened.page.click("#theme")
    assert (before, after) == ("#e6e9ed", "#1b1f24")


def test_on_paper_the_page_is_light(opened: Opened) -> None:
    opened.page.emulate_media(media="print", color_scheme="dark")
    opened.page.wait_for_function("() => document.getElementById('chart-loss').layout.font.color === '#000'")
    assert not opened.page.locator("#theme").is_visible()
    opened.page.emulate_media(media="screen", color_scheme="light")


def test_every_chart_says_in_words_what_it_shows(opened: Opened) -> None:
    assert opened.page.evaluate("document.documentElement.lang") == "en"
    for figure in opened.page.query_selector_all("figure"):
        plot = figure.query_selector(".plot")
        assert plot is not None
        described = opened.page.query_selector(f"#{plot.get_attribute('aria-describedby')}")
        assert described is not None
        assert len(described.inner_text()) > 20
        assert plot.get_attribute("aria-label")
    levels = opened.page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((one) => one.tagName).join(' ')")
    assert levels.startswith("H1 H2")
    assert levels.count("H1") == 1


def test_nothing_out_of_a_run_folder_acts_in_the_page(hostile: Opened) -> None:
    assert hostile.said == []
    assert len([url for url in hostile.asked if not url.startswith(("data:", "blob:"))]) == 1
    assert hostile.page.title() == "Training report: 2 runs"
    assert hostile.page.locator("img, a[href^='http'], svg a").count() == 0
    words = hostile.page.evaluate("document.body.innerText")
    assert words.count("</script><img src=x") >= 4  # shown as it is
    legend = hostile.page.evaluate("document.querySelector('#chart-loss .legendtext').textContent")
    assert legend == "<img src=x onerror=\"document.title='taken'\">"


def test_a_run_has_one_colour_and_its_button_hides_it_everywhere(hostile: Opened) -> None:
    colours = {
        (trace["meta"]["run"], colour)
        for chart in ("loss", "accuracy", "throughput")
        for trace, colour in zip(
            hostile.drawn(chart),
            hostile.page.evaluate(f"document.getElementById('chart-{chart}').data.map((one) => one.line.color)"),
            strict=True,
        )
    }
    assert colours == {(0, charts.COLOURS[0]), (1, charts.COLOURS[1])}
    hostile.page.click("button[data-run='1']")
    hidden = [trace.get("visible") for chart in ("loss", "throughput") for trace in hostile.drawn(chart)]
    assert hidden == [None, "legendonly"] * 2
    hostile.page.click("button[data-run='1']")


def test_only_keys_that_differ_are_compared(hostile: Opened) -> None:
    table = hostile.page.locator("table", has_text="Keys that differ").first
    assert table.locator("tbody th").all_inner_texts() == ["model.path"]


def test_a_model_of_nan_is_named(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    broken = {name: torch.full_like(weight, torch.nan) for name, weight in weights.items()}
    save_file(broken, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError, match="gives vectors with NaN or infinity; its weights are broken"):
        closeup.look(str(tmp_path / "model"), str(run_folder.parent / "holdout.jsonl"), 6, torch.device("cpu"))


# --- texts, numbers and embeddings ------------------------------------------------------------------------------


def test_texts_are_shown_only_when_asked_for(run_folder: Path, tmp_path: Path) -> None:
    assert "secret 3" not in (run_folder / "report.html").read_text(encoding="utf-8")
    output = tmp_path / "with.html"
    assert main(["report", f"runs={run_folder}", f"output={output}", "texts=true", "device=cpu"]) == 0
    assert "secret 3" in output.read_text(encoding="utf-8")


def test_similarities_are_those_of_the_exported_model(run_folder: Path) -> None:
    look = closeup.look(str(run_folder / "model"), str(run_folder.parent / "holdout.jsonl"), 6, torch.device("cpu"))
    tokenizer, model = (
        AutoTokenizer.from_pretrained(run_folder / "model"),
        AutoModel.from_pretrained(run_folder / "model"),
    )

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():
            hidden = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        return (hidden / hidden.norm()).double().numpy()

    queries = np.stack([embed(f"query: {text}") for text in look.queries])
    passages = np.stack([embed(f"passage: {text}") for text in look.passages])
    similarity = queries @ passages.T
    assert (look.edges[0], look.edges[-1]) == pytest.approx((similarity.min(), similarity.max()), abs=1e-5)
    assert (look.positives.sum(), look.negatives.sum()) == (6, 30)
    middles = (look.edges[:-1] + look.edges[1:]) / 2
    width = look.edges[1] - look.edges[0]
    assert middles @ look.positives / 6 == pytest.approx(np.diagonal(similarity).mean(), abs=width)


def test_histograms_leave_out_what_answers_a_query() -> None:
    similarity = np.array([[0.9, 0.1, 0.8], [0.2, 0.7, 0.0], [0.9, 0.3, 0.6]])
    right = np.eye(3, dtype=bool)
    right[0, 2] = right[2, 0] = True  # the same query twice
    edges, positives, negatives = closeup.histograms(similarity, right)
    assert (edges[0], positives.sum(), negatives.sum()) == (0.0, 3, 4)
    assert negatives[-1] == 0
    assert positives[-1] == 1


def test_the_map_has_the_two_axes_of_most_variance() -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 6)) @ np.diag([5, 4, 1, 1, 0.5, 0.1]) + 3
    plane, shares = closeup.principal_plane(vectors)
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    wanted = (vectors - vectors.mean(axis=0)) @ axes[:, [-1, -2]]
    assert np.abs(plane) == pytest.approx(np.abs(wanted))
    assert shares == pytest.approx(tuple(values[[-1, -2]] / values.sum()))
    assert closeup.principal_plane(np.ones((4, 3)))[1] == (0.0, 0.0)


def test_thinning_keeps_the_lowest_the_highest_and_what_is_no_number() -> None:
    values = np.random.default_rng(0).normal(size=30_000).tolist()
    values[12_345], values[20_000], values[777] = 99.0, -99.0, math.nan
    kept = charts.thin(values)
    assert len(kept) <= charts.POINTS + 1
    assert {0, 777, 12_345, 20_000, 29_999} <= set(kept)
    assert kept == sorted(set(kept))
    assert charts.thin(values[: charts.POINTS]) == list(range(charts.POINTS))


def test_a_run_of_fifty_thousand_logged_steps_stays_small_and_says_so(tmp_path: Path) -> None:
    rows = ({"train/step": step, "train/loss": 1 / step, "perf/step_s": 1.0} for step in range(1, 50_001))
    log = runlog.RunLog(tmp_path, "long", rows=list(rows))
    content = reporting.compose([log], ["none"], NONE_PUBLISHED)
    assert max(len(trace["x"]) for chart in content.charts for trace in chart.traces) <= charts.POINTS
    captions = {chart.name: chart.caption for chart in content.charts}
    assert "Of 50,000 points those are drawn" in captions["loss"]
    assert "One logged step in 100 is drawn" in captions["step-time-0"]


def _tables(log: runlog.RunLog, published: dict[str, Any]) -> dict[str, reportpage.Table]:
    blocks = [block for section in reporting.compose([log], [""], published).sections for block in section.blocks]
    return {block.caption.partition(" ")[0]: block for block in blocks if isinstance(block, reportpage.Table)}


def test_published_figures_stand_beside_ours() -> None:
    whole = {"type": "benchmark", "score": 0.5, "by_type": {"STS": 0.25}, "missing": []}
    results = {"scifact": {"ndcg_at_10": 0.625}, "MTEB": whole, "BEIR": whole | {"missing": ["NQ"]}, "odd": [1]}
    lines = {"mean": {"e5": [1, None, 3]}, "STS": {"me5": 66.6}, "Retrieval": {"e5": 1}}
    published = {"families": {"e5": "E5", "me5": "mE5", "other": "Other"}, "tables": {"BEIR": lines, "MTEB": lines}}
    published["tables"]["SciFact"] = {"mean": {"e5": 72.0}}
    tables = _tables(runlog.RunLog(Path("x"), "ours", results=results), published)
    assert tables["Beside"].head == ["benchmark", "", "ours", "E5", "mE5"]
    assert tables["Beside"].rows == [
        ["MTEB", "mean", "50.0", "1 / – / 3", ""],
        ["MTEB", "STS", "25.0", "", "66.6"],
        ["SciFact", "mean", "62.5", "72.0", ""],
    ]
    assert tables["Main"].rows == [["MTEB", "benchmark", "", "0.500"], ["BEIR", "benchmark", "", "0.500"]]
    assert "Beside" not in _tables(runlog.RunLog(Path("x"), "ours", results=results), NONE_PUBLISHED)


def test_the_exchange_of_embeddings_is_taken_out_of_the_loss() -> None:
    row = {"train/step": 1, "perf/step_s": 2.0, "perf/loss_s": 0.75, "perf/gather_s": 0.5, "perf/meet_s": 0.125}
    _, parts = charts.step_parts(runlog.RunLog(Path("x"), "x", rows=[row]))
    assert parts == {"meet": [0.125], "gather": [0.5], "loss": [0.25], "other": [1.125]}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (725, "12 min 5 s"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert reporting.duration(seconds) == text


# --- what is missing or broken ----------------------------------------------------------------------------------


def test_what_is_missing_is_said_and_what_is_broken_does_no_harm(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text("- no mapping\n", encoding="utf-8")
    broken = _write(tmp_path / "broken", [], results={"holdout": {"by_lang": 3, "by_source": [], "ndcg_at_10": "x"}})
    (broken / "metrics.jsonl").write_text("{}\nnot json\n", encoding="utf-8")
    for name, text in (("environment", "[]"), ("run", '{"attempt": "x"}'), ("exit", "{"), ("evaluation", "3")):
        (broken / f"{name}.json").write_text(text, encoding="utf-8")
    (broken / "model").mkdir()
    output = tmp_path / "page.html"
    words = ["report", f"runs=[{bare},{broken}]", f"output={output}", f"data={_held_out(tmp_path / 'h.jsonl')}"]
    assert main([*words, "device=cpu"]) == 0
    shown = output.read_text(encoding="utf-8")
    for sentence in (
        "bare: no step was logged yet.",
        "broken: 2 lines of metrics.jsonl cannot be read.",
        "bare, broken: not measured on held-out data in training",
        "bare: no results.json",
        "bare: config.yaml is missing or cannot be read.",
        "bare: no histogram and no map of embeddings, since the run folder has no model/",
        "broken: no histogram and no map of embeddings, since that failed: ",
        "environment.json is missing",
    ):
        assert sentence in shown, sentence


def test_a_run_without_held_out_data_or_embeddings_says_why(run_folder: Path, tmp_path: Path) -> None:
    log = runlog.read(run_folder)
    config = report.Config(runs="x", device="cpu")
    reasons = [
        (log.config | {"eval": {"data": []}}, config, "had no held-out data; name some with data=FILE"),
        (log.config | {"eval": {"data": ["gone.jsonl"]}}, config, "gone.jsonl is not here"),
        (log.config | {"objective": "ranking"}, config, "a cross-encoder scores pairs of texts"),
        (log.config, report.Config(runs="x", pairs=0), "since pairs=0."),
    ]
    for settings, wanted, reason in reasons:
        other = runlog.RunLog(run_folder, "run", config=settings)
        assert reason in str(report._closeup(other, wanted, torch.device("cpu")))


def test_patterns_name_several_runs_and_wrong_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run-10", "run-2"):
        _write(tmp_path / name, [_row(10)])
    (tmp_path / "shards").mkdir()
    assert [folder.name for folder in report._folders(str(tmp_path / "*"))] == ["run-2", "run-10"]
    for words, message in (
        ([f"runs={tmp_path / 'none'}"], "there is no such run folder"),
        ([f"runs={tmp_path / 'shards'}"], "no run folder: it has neither metrics.jsonl nor config.yaml"),
        (["runs=[]"], "runs=[]: nothing to report on"),
        ([f"runs={tmp_path / 'run-2'}", "data=gone.jsonl"], "data=gone.jsonl: no such file"),
        ([f"runs={tmp_path / 'run-2'}", "output=/proc/none/x.html"], "output=/proc/none/x.html: cannot be written"),
    ):
        assert main(["report", *words, "device=cpu"]) == 2
        assert message in capsys.readouterr().err

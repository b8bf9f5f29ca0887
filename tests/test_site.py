"""The documentation as a site: built without a warning, complete, and without a fetch from anywhere else."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT

CONFIG = ROOT / "mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", CONFIG, "--site-dir", folder]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def _leaves(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            yield from _leaves(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation() -> None:
    nav = set(_leaves(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["nav"]))
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - nav
    assert not missing, "add these pages to `nav` in mkdocs.yml"


def test_the_readme_is_the_first_page_and_files_outside_docs_come_along(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="quickstart.html"' in first
    assert 'href="benchmarks/index.html"' in first
    assert "configs/mixtures/me5-pretrain.yaml" in (site / "recipes.html").read_text(encoding="utf-8")
    mixture = "configs/mixtures/me5-pretrain.yaml"
    assert (site / mixture).read_bytes() == (ROOT / mixture).read_bytes()
    assert not (site / "hooks.py").exists()


def test_the_pages_can_be_searched(site: Path) -> None:
    assert "reduce-scatter" in (site / "search/search_index.json").read_text(encoding="utf-8")


def test_no_page_loads_anything_from_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*?\ssrc=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]*?\srel=[\"']?(?:stylesheet|preconnect|preload|icon)[^>]*", text)
        assert not [where for where in loaded if "//" in where], page.name
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8")


def test_the_site_goes_into_an_ignored_folder() -> None:
    folder = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["site_dir"]
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_links_of_the_pages_lead_to_a_page_and_a_heading() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            name, _, heading = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {_anchor(title) for title in titles}, f"{page.name}: {target}"


def _anchor(title: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)(?:::(\w+))?`", text):
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert not name or f"\ndef {name}(" in source, f"{file}::{name}"
    for path in re.findall(
        r"`((?:configs|data|launcher|trainer|slurm|benchmarks|tests)/[\w./-]+\.(?:py|sh|yaml|md))`", text
    ):
        assert (ROOT / path).is_file(), path

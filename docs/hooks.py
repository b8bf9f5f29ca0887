"""What mkdocs does beside its own: the README as the first page, and links that leave docs/ kept whole.

A page outside docs/ that one of ours links to becomes a page of the site; any other file is copied beside them; a link
to a folder becomes its text. All of it goes by the links that are there: nothing has to be listed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# [text](file#heading); not an address, and not a heading of the same page
_LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:)([^)\s#]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and all that its links and those of other pages lead to."""
    waiting = [Path("README.md"), *(Path("docs") / file.src_uri for file in files.documentation_pages())]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / path).is_file():
            continue
        seen.add(path)
        if path.parts[0] != "docs":
            files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
        if path.suffix == ".md":
            links = _LINK.findall((ROOT / path).read_text(encoding="utf-8"))
            waiting += [_target(path, link) for _, link, _ in links]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are from where the page stands in the site. Who looks for a message finds its entry first."""
    here = page.file.src_uri
    if here == "troubleshooting.md":
        page.meta["search"] = {"boost": 5}
    path = Path("README.md") if here == "index.md" else Path(here)
    if (ROOT / "docs" / here).is_file():
        path = Path("docs") / here

    def linked(found: re.Match[str]) -> str:
        text, link, heading = found.groups()
        target = _target(path, link)
        if (ROOT / target).is_dir():
            return text
        return f"[{text}]({os.path.relpath(_place(target), PurePosixPath(here).parent)}{heading})"

    return _LINK.sub(linked, markdown)


def _target(page: Path, link: str) -> Path:
    """The file that a page links to, from the root of the project."""
    return Path(os.path.normpath(page.parent / link))


def _place(path: Path) -> str:
    """Where a file of the project stands in the site."""
    if path == Path("README.md"):
        return "index.md"
    return path.relative_to("docs").as_posix() if path.parts[0] == "docs" else path.as_posix()

"""Stage `report`: one HTML file about one or several runs, for whoever was not there."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import QuintetError, UserError
from data.settings import key

if TYPE_CHECKING:
    import torch

    from trainer.closeup import Closeup
    from trainer.runlog import RunLog

_log = logging.getLogger("quintet")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet report`."""

    runs: str | list[str] = key(help="run folders, or patterns such as runs/*")
    output: str = key("", help="HTML file to write; empty: report.html in the first run folder")
    data: str = key("", help="held-out pairs for histograms and map; empty: the first of the run's own eval.data")
    pairs: int = key(500, help="held-out pairs that the exported model embeds for them; 0: none", low=0, high=2_000)
    texts: bool = key(False, help="show texts of the held-out data in the map; else only source and language")
    device: str = key("auto", help="where to embed; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))


def run(config: Config) -> None:
    """Read the run folders and write the page, whole or not at all.

    Raises:
        UserError: a folder that is no run folder, or an output that cannot be written.
    """
    from trainer import published, reporting, reportpage, runlog
    from trainer.device import pick_device
    from trainer.runfolder import write_text

    if config.data and not Path(config.data).exists():
        raise UserError(f"data={config.data}: no such file or folder; give a JSONL file of pairs or a BEIR folder")
    folders, device = _folders(config.runs), pick_device(config.device)
    logs = [runlog.read(folder, name) for folder, name in zip(folders, runlog.names_of(folders), strict=True)]
    closeups = [_closeup(log, config, device) for log in logs]
    content = reporting.compose(logs, closeups, published.load(), texts=config.texts)
    output = Path(config.output) if config.output else folders[0] / "report.html"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, reportpage.render(content))
    except OSError as error:
        raise UserError(f"output={output}: cannot be written: {error.strerror or error}; name another file") from None
    _log.info("the report of %d run%s is in %s", len(logs), "" if len(logs) == 1 else "s", output)


def _folders(runs: str | Sequence[str]) -> list[Path]:
    """The run folders that are named, each once."""
    from trainer.runlog import is_run, natural

    found: dict[Path, None] = {}
    for entry in [runs] if isinstance(runs, str) else runs:
        folder = Path(entry)
        if folder.is_dir():
            if not is_run(folder):
                raise UserError(f"runs={entry}: no run folder: it has neither metrics.jsonl nor config.yaml")
            found[folder] = None
            continue
        matches = [path for path in map(Path, glob.glob(entry)) if path.is_dir() and is_run(path)]
        if not matches:
            raise UserError(
                f"runs={entry}: there is no such run folder; `quintet runs root=FOLDER` lists those below it"
            )
        found |= dict.fromkeys(sorted(matches, key=lambda path: natural(str(path))))
    if not found:
        raise UserError("runs=[]: nothing to report on; give run folders")
    return list(found)


def _closeup(log: RunLog, config: Config, device: torch.device) -> Closeup | str:
    """What the exported model makes of held-out pairs; a sentence where that cannot be had."""
    from trainer import closeup

    data = config.data or _own_data(log.config)
    reason = _hindrance(log, config.pairs, data)
    if not reason:
        _log.info("%s: embedding %d held-out pairs of %s", log.name, config.pairs, data)
        try:
            return closeup.look(str(log.folder / "model"), data, config.pairs, device)
        except (QuintetError, OSError, ValueError, KeyError) as error:  # a model of a stranger fails in many ways
            reason = f"that failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    return f"{log.name}: no histogram and no map of embeddings, since {reason}."


def _hindrance(log: RunLog, pairs: int, data: str) -> str:
    """Why there is nothing to embed or to embed it with; empty when there is."""
    if not pairs:
        return "pairs=0"
    if log.stage == "teacher":
        return "a cross-encoder scores pairs of texts and gives no embeddings"
    if not (log.folder / "model").is_dir():
        return "the run folder has no model/ (the end of a run writes it, and so does quintet export)"
    if not data:
        return "the run had no held-out data; name some with data=FILE"
    return "" if Path(data).exists() else f"{data} is not here; name held-out pairs with data=FILE"


def _own_data(config: dict[str, Any]) -> str:
    """The first of eval.data, if any."""
    section = config.get("eval")
    data = section.get("data") if isinstance(section, dict) else None
    first = data[0] if isinstance(data, list) and data else data
    return first if isinstance(first, str) else ""

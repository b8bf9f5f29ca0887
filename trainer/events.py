"""The curves of a run as TensorBoard reads them: a mirror of metrics.jsonl. The only door to tensorboard."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


def problems(wanted: bool) -> list[str]:
    """Why it cannot be had."""
    if not wanted or importlib.util.find_spec("tensorboard"):
        return []
    return ["tensorboard=true: it is not installed; pip install 'quintet[tensorboard]'"]


class EventFile:
    """What trainer/mirror.py calls: every metric is a scalar under its own name. Texts of the data never get here.

    first_step: where this start begins; what an earlier one has logged after it is passed over by readers.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / FOLDER
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        self.hint = f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder))}"

    def log(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "train/step":
                self._writer.add_scalar(name, value, int(row["train/step"]))

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: a table holds texts."""

    def alert(self, title: str, text: str, level: str) -> None:
        """Nothing: TensorBoard has no alerts, and the log has this one."""

    def finish(self, exit_code: int) -> None:
        self._writer.close()

"""The mean of several checkpoints of a run: often a better model than the last of them (arXiv 2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data.errors import UserError


def average(folders: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of every weight over model folders, summed in float64 and rounded once to fp32.

    Raises:
        UserError: the folders do not hold the same weights.
    """
    first, *others = weights = [_Weights(folder) for folder in folders]
    for other in others:
        if other.shapes() != first.shapes():
            raise UserError(f"{other.folder}: not the same weights as {first.folder}; average checkpoints of one model")
    return {name: _mean([each.read(name) for each in weights]) for name in first.places}


class _Weights:
    """The weights of a model folder, in one safetensors file or several, read one by one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]
        self.places = {name: file for file in files for name in list(file.keys())}

    def shapes(self) -> dict[str, list[int]]:
        return {name: file.get_slice(name).get_shape() for name, file in self.places.items()}

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self.places[name].get_tensor(name)
        return tensor


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).float()

"""What a training checkpoint holds: the model as a transformers folder, and AdamW's state by parameter name.

    step-00001000/model/        config.json, tokenizer, our settings, model*.safetensors (fp32)
                  optimizer/    moments-00000.safetensors ...: exp_avg/<name>, exp_avg_sq/<name>

Tensors are whole and named, not cut by rank, so a run goes on at any world size and ZeRO stage, and nothing is
pickled. The writing is shared: every tensor has one rank that writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.errors import UserError
from trainer import distributed
from trainer.engine import MOMENTS, Engine

_PREFIX = "backbone."


def take(engine: Engine, tokenizer: Any, describe: Callable[[Path], None]) -> Callable[[Path], list[Path]]:
    """Copy this rank's part of a checkpoint to the host, a collective; return what writes it below a folder.

    That is local, and may run in a thread beside the training: it returns the files that it has written.
    `describe` adds to the model's folder what its readers must know beside the backbone.
    """
    owners = _owners(engine.shapes)
    weights = {name.removeprefix(_PREFIX): (name, engine.weight, ()) for name in engine.shapes}
    state = {f"{key}/{name}": (name, engine.moment, (key,)) for name in engine.trained() for key in MOMENTS}
    own_weights, own_state = _owned(owners, weights), _owned(owners, state)

    def write(folder: Path) -> list[Path]:
        rank = distributed.rank()
        files = [
            _save(folder / "model" / _weights_file(rank), own_weights),
            _save(folder / "optimizer" / f"moments-{rank:05d}.safetensors", own_state),
        ]
        if rank == 0:
            _describe(folder / "model", engine, tokenizer, owners)
            describe(folder / "model")
            # Hidden is what another rank is just writing there: safetensors gives a file its name when it is whole.
            found = (file for file in (folder / "model").iterdir() if not file.name.startswith("."))
            files += [file for file in found if file.suffix != ".safetensors"]
        return [file for file in files if file.is_file()]

    return write


def size(parameters: int) -> int:
    """Bytes of a checkpoint of so many parameters, about: fp32 weights and moments."""
    return 4 * (1 + len(MOMENTS)) * parameters


def moments(folder: Path) -> Callable[[str, str], Tensor]:
    """Open a checkpoint's optimizer state: (parameter name, moment) -> the whole tensor, read when asked for.

    Raises:
        UserError: a file is none of safetensors, though the manifest vouches for it.
    """
    try:
        files = [safe_open(file, "pt") for file in sorted((folder / "optimizer").glob("*.safetensors"))]
    except SafetensorError as error:
        mend = "remove this checkpoint, and the run goes on from the one before it"
        raise UserError(f"{folder / 'optimizer'}: cannot be opened: {error}; {mend}") from None
    place = {key: file for file in files for key in list(file.keys())}

    def read(name: str, key: str) -> Tensor:
        tensor: Tensor = place[f"{key}/{name}"].get_tensor(f"{key}/{name}")
        return tensor

    return read


def _owners(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Which rank writes each parameter: the largest first, each to the rank that has the least so far."""
    load, owners = [0] * distributed.world(), {}
    for name, shape in sorted(shapes.items(), key=lambda item: (-math.prod(item[1]), item[0])):
        owners[name] = load.index(min(load))
        load[owners[name]] += math.prod(shape)
    return owners


def _owned(
    owners: Mapping[str, int], tensors: Mapping[str, tuple[str, Callable[..., Tensor], tuple[str, ...]]]
) -> dict[str, Tensor]:
    """Read every tensor, since some reads are collectives, and hold on to those that this rank writes."""
    own = {}
    for key, (name, read, arguments) in tensors.items():
        tensor = read(name, *arguments)
        if owners[name] == distributed.rank():
            own[key] = tensor.contiguous()
    return own


def _save(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if tensors:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    return file


def _weights_file(rank: int) -> str:
    """transformers' own names: one file, or parts counted from 1."""
    world = distributed.world()
    return "model.safetensors" if world == 1 else f"model-{rank + 1:05d}-of-{world:05d}.safetensors"


def _describe(folder: Path, engine: Engine, tokenizer: Any, owners: Mapping[str, int]) -> None:
    """Write everything of a transformers folder that is not a tensor."""
    backbone: Any = engine.module.backbone
    backbone.config.architectures = [type(backbone).__name__]  # that of the model it was opened from may lack the head
    backbone.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if distributed.world() > 1:
        weight_map = {name.removeprefix(_PREFIX): _weights_file(rank) for name, rank in owners.items()}
        total = 4 * sum(math.prod(shape) for shape in engine.shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

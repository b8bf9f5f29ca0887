"""Checks of `quintet doctor` on a configuration: its data, tokenizer and model, and what they need of this machine."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import QuintetError
from launcher.checks import Row, bad, guarded, of_error, ok, warn

if TYPE_CHECKING:
    from data.mixture import Source

TRAINED = ("pretrain", "finetune", "teacher")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ROWS_OF_DAMAGE = 5
_GIB = 2**30


@dataclass
class Opened:
    """What earlier checks leave to later ones: the data's sources, the model's size, bytes that a rank may take."""

    sources: tuple[Source, ...] = ()
    parameters: int = 0
    free: float = 0.0


def rows(stage: str, config: Any, *, ranks: int, ranks_here: int, deep: bool) -> list[Row]:
    """Everything that a run of this configuration opens, opened once, here and offline.

    Args:
        ranks, ranks_here: those of the job, and of them those that share this machine.
        deep: also read every shard and compare its hash.
    """
    opened = Opened()
    found = guarded("device", device, config, ranks_here, opened)  # first: the model will take its part
    if _reads_shards(config):
        found += guarded("data", data, config, deep, opened)
    found += guarded("model", model, stage, config, opened)
    if stage not in TRAINED:
        return found
    if config.eval.data and stage != "teacher":  # whose sets are opened with its model
        found += guarded("eval", held_out, config)
    found += guarded("lanes", lanes, config, ranks)
    if opened.parameters and opened.free:
        found += guarded("memory", memory, opened.parameters, config.zero_stage, ranks, opened.free)
    if opened.parameters:
        found += guarded("disk", disk, config.run_dir, opened.parameters, config.keep_last)
    return found


# --- data --------------------------------------------------------------------------------------------------------


def _reads_shards(config: Any) -> bool:
    return hasattr(config, "data") and hasattr(config, "damaged")


def data(config: Any, deep: bool, opened: Opened) -> list[Row]:
    """The shards against their index: sizes always, hashes when asked for. `opened` gets the mixture."""
    from data import mixture
    from data.shards import verify

    unseen = _elsewhere(config.data)
    if unseen:
        mend = "the run copies them first; check where they are kept, or give a local copy"
        return [warn("data", f"{unseen[0]}: not on this machine, so not looked at", mend)]
    unindexed = _unindexed(config.data)
    if unindexed:
        found = f"{unindexed[0]}: no index.json, so nothing to compare with; the first run reads all of it to make one"
        return [warn("data", found, f"quintet pack --index input={unindexed[0]}")]
    # `skip`, whatever the configuration says: all damage is told, not the first alone
    try:
        sources = mixture.load(config.data, policy="skip").sources
        problems = [problem for source in sources for problem in verify(source.index, hashes=deep)]
    except QuintetError as error:
        return of_error("data", error, "give folders of shards, which `quintet pack` writes, or a mixture file")
    opened.sources = sources
    if problems:
        return _damage(problems, config.damaged == "skip")
    shards = sum(len(source.index.shards) for source in sources)
    records = sum(source.records for source in sources)
    compared = "sizes and hashes" if deep else "sizes"
    return [ok("data", f"{records:,} records of {len(sources)} sources in {shards} shards, {compared} as in the index")]


def _damage(problems: Sequence[str], tolerated: bool) -> list[Row]:
    mend = "fetch or pack the shard again, or train without its damaged records: damaged=skip"
    if tolerated:
        mend = "fetch or pack the shard again; damaged=skip leaves its damaged records out"
    found = [*problems[:_ROWS_OF_DAMAGE]]
    if len(problems) > len(found):
        found.append(f"and {len(problems) - len(found)} more")
    return [(warn if tolerated else bad)("data", problem, mend) for problem in found]


def _specs(given: str | list[str]) -> list[str]:
    """Every location that the key `data` stands for, those in a mixture file included; [] where that is unreadable."""
    import yaml

    specs = [given] if isinstance(given, str) else list(given)
    if len(specs) != 1 or not specs[0].endswith((".yaml", ".yml")):
        return specs
    try:
        sources = yaml.safe_load(Path(specs[0]).read_text(encoding="utf-8"))["sources"].values()
        shards = [entry["shards"] for entry in sources]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []  # opening it tells what is wrong
    named = [spec for entry in shards for spec in (entry if isinstance(entry, list) else [entry])]
    return [spec if "://" in spec or os.path.isabs(spec) else str(Path(specs[0]).parent / spec) for spec in named]


def _elsewhere(given: str | list[str]) -> list[str]:
    """Locations that would be copied first, or whose command would be run."""
    from data import fetch

    return [spec for spec in _specs(given) if fetch.scheme(spec, allow_pipe=True) not in fetch.LOCAL]


def _unindexed(given: str | list[str]) -> list[str]:
    """Folders with shards and no index, which opening them would write. Braces stand for anything here."""
    from data import fetch
    from data.index import INDEX_NAME

    found = [path for spec in _specs(given) for path in glob.glob(re.sub(r"\{.*\}", "*", fetch.local_path(spec)))]
    folders = sorted({Path(path) if os.path.isdir(path) else Path(path).parent for path in found})
    return [str(folder) for folder in folders if any(folder.glob("*.tar")) and not (folder / INDEX_NAME).exists()]


# --- model -------------------------------------------------------------------------------------------------------


def model(stage: str, config: Any, opened: Opened) -> list[Row]:
    """Open the model and its tokenizer as the stage does, offline. `opened` gets the number of parameters."""
    absent = [name for name in _models(stage, config) if _HUB_ID.fullmatch(name) and not _is_cached(name)]
    if absent:
        mend = f"hf download {absent[0]}, where there is a network; HF_HOME names the folder of the cache"
        return [bad("model", f"{absent[0]}: no such folder, and not in the cache of the hub", mend)]
    if stage in TRAINED:
        module = _trained(config, opened)
    elif stage == "distill":
        from trainer.crossencoder import open_teacher

        module = open_teacher(config.teacher).encoder
    else:
        import torch

        from trainer.embed import load_model

        module = load_model(config.model, torch.device("cpu")).encoder
    opened.parameters = sum(parameter.numel() for parameter in module.parameters())
    return [ok("model", f"{_models(stage, config)[0]}: {opened.parameters:,} parameters; its tokenizer opens, too")]


def _models(stage: str, config: Any) -> list[str]:
    """The folders and hub ids that a stage opens, its model first."""
    if stage in TRAINED:
        return [name for name in (config.model.path, config.tokenizer, config.loss.guide.path) if name]
    return [config.teacher if stage == "distill" else config.model]


def _is_cached(name: str) -> bool:
    """Whether a folder is there, or the hub's cache has something under that id."""
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return os.path.exists(name) or any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _trained(config: Any, opened: Opened) -> Any:
    """What a run would train, opened with what it needs beside: a guide, a teacher's scores; a teacher's own sets."""
    import torch

    from data.mixture import Mixture
    from data.tokens import load_tokenizer
    from trainer.tasks import open_task

    tokenizer = load_tokenizer(config.tokenizer or config.model.path)
    return open_task(config, Mixture(opened.sources), tokenizer, config.model.path, torch.device("cpu")).module


def held_out(config: Any) -> list[Row]:
    """The sets that an encoder is evaluated on in training."""
    from trainer import sets

    found = sets.load(config.eval.data, limit=config.eval.limit)
    return [ok("eval", ", ".join(f"{each.name}: {len(each.queries):,} queries" for each in found))]


# --- what they need ----------------------------------------------------------------------------------------------


def lanes(config: Any, ranks: int) -> list[Row]:
    """The lanes of the data can be dealt evenly to the ranks."""
    if config.lanes % ranks:
        fitting = [count for count in range(1, config.lanes + 1) if config.lanes % count == 0]
        found = f"lanes={config.lanes} cannot be dealt evenly to {ranks} ranks"
        return [
            bad("lanes", found, f"start one of {', '.join(map(str, fitting))} ranks, or change lanes and batch_size")
        ]
    pairs = f"{config.batch_size // ranks:,} of {config.batch_size:,} pairs"
    return [ok("lanes", f"{ranks} x {config.lanes // ranks} of {config.lanes} lanes, with {pairs}")]


def device(config: Any, ranks_here: int, opened: Opened) -> list[Row]:
    """The device that the configuration chooses is there. `opened` gets what a rank may take of its memory."""
    import psutil

    from trainer.device import free_memory, pick_device

    chosen = pick_device(config.device)
    available = psutil.virtual_memory().available / ranks_here
    opened.free = free_memory(chosen) if chosen.type == "cuda" else float(available)
    return [ok("device", f"{chosen.type}, {opened.free / _GIB:.1f} GiB free for a rank")]


def memory(parameters: int, zero_stage: int, ranks: int, free: float) -> list[Row]:
    """Weights, gradients and optimizer state against what a rank may take; activations come on top."""
    from trainer.build import state_bytes

    needed = state_bytes(parameters, zero_stage, ranks)
    found = f"{needed / _GIB:.2f} GiB a rank for weights, gradients and optimizer, {free / _GIB:.2f} GiB are free"
    mend = (
        "a higher zero_stage and more ranks share the state; else a smaller model, fewer ranks here, or another device"
    )
    if needed > free:
        return [bad("memory", found, mend)]
    if needed > 0.8 * free:
        return [warn("memory", f"{found}: little is left for activations", mend)]
    return [ok("memory", found)]


def disk(run_dir: str, parameters: int, keep_last: int) -> list[Row]:
    """Room for the checkpoints that are kept and the one that is being written, less those that are there."""
    from trainer import snapshot

    there = Path(run_dir).expanduser().absolute()
    present = len(list(there.glob("checkpoints/step-*")))
    existing = next(folder for folder in (there, *there.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return [bad("disk", f"{existing}: cannot be written", "give another run_dir, or the right to write there")]
    size, free = snapshot.size(parameters), shutil.disk_usage(existing).free
    count = max(keep_last + 1 - present, 1)
    found = f"{count} checkpoints of {size / _GIB:.2f} GiB to come, {free / _GIB:.2f} GiB free at {existing}"
    if free < count * size:
        return [bad("disk", found, "free some space, lower keep_last, or choose a run_dir on another disk")]
    return [ok("disk", found)]


def configuration(config_class: type, files: Sequence[str], words: Sequence[str], fixed: Any) -> tuple[Any, list[Row]]:
    """The configuration, or None, and the rows that say what is wrong with it."""
    from launcher import config

    try:
        loaded: Any = config.load(config_class, files, words, fixed=fixed)
    except QuintetError as error:
        return None, of_error("config", error)
    return loaded, [ok("config", "every key is known and within its bounds")]

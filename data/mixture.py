"""Which sources are trained on and in what proportion: shard folders, or a YAML file that names them.

    homogeneous: true              # one source a batch (the default); false mixes them in every batch
    alpha: 0.5                     # weights are records ** alpha (default 1) where no source says its weight
    sources:
      stackexchange:
        shards: [shards/stack-a, "shards/stack-b/*.tar"]     # relative to this file
        weight: 3                  # in every source or in none
        symmetric: false           # stands for the records' own flag
        instruction: Find ...      # for records that have none
        in_batch_negatives: false  # a query sees its own passage and hard negatives alone (default true)
        scores: false              # not asked of the teacher: the contrastive term alone (default true)

Every folder given directly is divided into the sources that its index names.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data.errors import ConfigError, UserError
from data.index import Index
from data.order import Order, OrderSource
from data.shards import Policy, load_index

log = logging.getLogger("quintet")

_KEYS = ("homogeneous", "alpha", "sources")
_SOURCE_KEYS = ("shards", "weight", "symmetric", "instruction", "in_batch_negatives", "scores")
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, eq=False)
class Source:
    """The records of a source, numbered shard by shard, row by row.

    Attributes:
        name: its name in the mixture.
        index: its shards, and no others.
        weight: its share of the training records, relative to the other sources' weights.
        symmetric: stands for the records' own flag, when not None.
        instruction: for records that have none.
        in_batch_negatives: whether other records' passages are negatives of these; else only their own.
        scores: whether a teacher is asked for scores of these.
    """

    name: str
    index: Index
    weight: float
    symmetric: bool | None = None
    instruction: str = ""
    in_batch_negatives: bool = True
    scores: bool = True

    @property
    def flags(self) -> dict[str, Any]:
        """What of the above is not the default."""
        names = ("symmetric", "instruction", "in_batch_negatives", "scores")
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in names if getattr(self, name) != defaults[name]}

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """int64 [blocks, 2]: the shard's number and the block's number in it."""
        pairs = [(s, b) for s, shard in enumerate(self.index.shards) for b in range(len(shard.blocks))]
        return np.array(pairs, np.int64).reshape(-1, 2)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64 [blocks + 1]: the first record of every block, then the number of records."""
        sizes = [block.records for shard in self.index.shards for block in shard.blocks]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])

    @property
    def records(self) -> int:
        """Number of records."""
        return self.index.records

    def locate(self, record: int) -> str:
        """A record for a message: its source, number, shard and place there."""
        block = int(np.searchsorted(self.starts, record, side="right")) - 1
        shard = int(self.blocks[block, 0])
        first = int(self.starts[np.searchsorted(self.blocks[:, 0], shard)])
        return f"record {record} of source {self.name} ({self.index.path(shard)}, record {record - first} in it)"


@dataclass(frozen=True, eq=False)
class Mixture:
    """Sources in the order of their names, which is the order of their numbers."""

    sources: tuple[Source, ...]
    homogeneous: bool = True

    @property
    def records(self) -> int:
        """Number of records of all sources."""
        return sum(source.records for source in self.sources)

    @property
    def bad(self) -> dict[str, int]:
        """Samples that the indexes leave out, by cause: they were bad when their shards were indexed."""
        causes = Counter[str]()
        for source in self.sources:
            for shard in source.index.shards:
                causes.update(shard.bad)
        return dict(sorted(causes.items()))

    def order(self, batch_size: int, *, lanes: int = 64, seed: int = 0, shuffle_blocks: int = 4) -> Order:
        """The order in which the records come; the arguments are those of `Order`, and so are the errors."""
        sources = tuple(OrderSource(s.name, s.starts, s.weight, s.index.fingerprint, s.flags) for s in self.sources)
        order = Order(sources, batch_size, lanes, seed, self.homogeneous, shuffle_blocks)
        _warn_of_repeats(order)
        return order


def load(
    data: str | Sequence[str],
    *,
    homogeneous: bool = True,
    alpha: float = 1.0,
    allow_pipe: bool = False,
    policy: Policy = "strict",
) -> Mixture:
    """Open the sources that `data` names.

    Args:
        data: shard folders, globs, URLs, or lists of them, or one mixture file (.yaml, .yml).
        homogeneous, alpha: what holds where no mixture file says otherwise.
        allow_pipe, policy: as in `load_index`.

    Raises:
        UserError: nothing there, a bad mixture file (all its mistakes at once), or the same shard named twice.
        DataError: a damaged index or shard, as `load_index` says.
    """
    specs = [data] if isinstance(data, str) else list(data)
    files = [spec for spec in specs if spec.endswith(_SUFFIXES)]
    if not specs:
        raise UserError("data=[]: names no shards; give shard folders, globs or a mixture file")
    if not files:
        mixture = _direct(specs, load_index(specs, allow_pipe=allow_pipe, policy=policy), homogeneous, alpha)
    elif len(specs) == 1:
        mixture = _from_file(Path(files[0]), homogeneous, alpha, allow_pipe, policy)
    else:
        raise UserError(
            f"data={specs}: a mixture file stands alone; name the other shards as sources inside {files[0]}"
        )
    _refuse_repeats(mixture)
    if mixture.bad:
        causes = ", ".join(f"{count} {cause}" for cause, count in mixture.bad.items())
        log.warning("data=%s: the index leaves out bad samples: %s", data, causes)
    return mixture


def _direct(specs: list[str], index: Index, homogeneous: bool, alpha: float) -> Mixture:
    """The sources that an index names, weighted by their sizes."""
    if not index.records:
        raise UserError(f"data={specs}: no records there; look for the shards elsewhere, or pack them again")
    sources = []
    for name in sorted(index.sources):
        part = Index(index.folder, tuple(s for s in index.shards if s.source == name), index.tokenizer)
        if part.records:
            sources.append(Source(name, part, part.records**alpha))
        else:
            log.warning("source %s: left out, it has no records in %s", name, specs)
    return Mixture(tuple(sources), homogeneous)


def _from_file(path: Path, homogeneous: bool, alpha: float, allow_pipe: bool, policy: Policy) -> Mixture:
    content = _read(path)
    problems = _problems(content)
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    homogeneous, alpha = content.get("homogeneous", homogeneous), content.get("alpha", alpha)
    sources = []
    for name, entry in sorted(content["sources"].items()):
        specs = [_beside(path, spec) for spec in _listed(entry["shards"])]
        index = load_index(specs, allow_pipe=allow_pipe, policy=policy)
        weight = entry.get("weight", index.records**alpha)
        flags = {key: entry[key] for key in _SOURCE_KEYS[2:] if key in entry}
        sources.append(Source(name, index, weight, **flags))
    return Mixture(tuple(sources), homogeneous)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        repeated = _repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data={path}: cannot be read ({error}); give a mixture file or shard folders") from None
    except yaml.YAMLError as error:
        raise UserError(f"data={path}: not YAML; correct it ({error})") from None
    if repeated:
        raise UserError(f"{path}: the key {repeated[0]!r} stands twice in one place; keep one of them")
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mixture is a mapping with the key `sources`; see configs/mixtures")
    return content


def _repeated_keys(node: yaml.Node | None) -> list[str]:
    """Keys that stand twice in one mapping: YAML would silently keep the last."""
    if isinstance(node, yaml.SequenceNode):
        return [key for item in node.value for key in _repeated_keys(item)]
    if not isinstance(node, yaml.MappingNode):
        return []
    names = [key.value for key, _ in node.value]
    repeated = [name for n, name in enumerate(names) if name in names[:n]]
    return repeated + [key for _, item in node.value for key in _repeated_keys(item)]


def _problems(content: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the content of a mixture file."""
    problems = _unknown(content, _KEYS, "")
    if not isinstance(content.get("homogeneous", True), bool):
        problems.append(f"homogeneous={content['homogeneous']!r}: give true or false")
    if not _is_number(content.get("alpha", 1.0)):
        problems.append(f"alpha={content['alpha']!r}: give a number of 0 or more")
    sources = content.get("sources")
    if not isinstance(sources, dict) or not sources:
        return [*problems, "sources: name at least one source, as `name: {shards: folder}`"]
    for name, entry in sources.items():
        problems += _source_problems(name, entry)
    weighted = [name for name, entry in sources.items() if isinstance(entry, dict) and "weight" in entry]
    if weighted and len(weighted) < len(sources):
        missing = next(name for name in sources if name not in weighted)
        problems.append(
            f"sources.{missing}: has no weight but sources.{weighted[0]} has; give all of them one, or none"
        )
    if weighted and "alpha" in content:
        problems.append("alpha: has no effect beside weights; leave out one of them")
    return problems


def _source_problems(name: object, entry: object) -> list[str]:
    if not isinstance(name, str) or not name:
        return [f"sources: the name {name!r} is no text; put it in quotes"]
    if not isinstance(entry, dict):
        return [f"sources.{name}: give {{shards: folder}}, not {entry!r}"]
    problems = _unknown(entry, _SOURCE_KEYS, f"sources.{name}.")
    shards = entry.get("shards")
    if not shards or not all(isinstance(spec, str) and spec for spec in _listed(shards)):
        problems.append(f"sources.{name}.shards={shards!r}: give a folder, glob or URL, or a list of them")
    if not _is_number(entry.get("weight", 1.0)):
        problems.append(f"sources.{name}.weight={entry['weight']!r}: give a number of 0 or more")
    for flag in ("symmetric", "in_batch_negatives", "scores"):
        if not isinstance(entry.get(flag, True), bool):
            problems.append(f"sources.{name}.{flag}={entry[flag]!r}: give true or false")
    if not isinstance(entry.get("instruction", ""), str):
        problems.append(f"sources.{name}.instruction={entry['instruction']!r}: give a text")
    return problems


def _unknown(mapping: Mapping[str, Any], known: Sequence[str], prefix: str) -> list[str]:
    problems = []
    for name in mapping:
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}"
            problems.append(f"{prefix}{name}: there is no such key; {mend}")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _listed(shards: Any) -> list[Any]:
    return shards if isinstance(shards, list) else [shards]


def _beside(path: Path, spec: str) -> str:
    """A path relative to the mixture file's folder; URLs and pipes stay as they are."""
    return spec if "://" in spec or spec.startswith("pipe:") else os.path.join(path.parent, os.path.expanduser(spec))


def _refuse_repeats(mixture: Mixture) -> None:
    """A shard that is named twice would be read twice an epoch without anyone noticing."""
    seen: dict[str, str] = {}
    for source in mixture.sources:
        for number in range(len(source.index.shards)):
            path = os.path.realpath(source.index.path(number))
            if path in seen:
                raise UserError(
                    f"data: {path} is named twice, for source {seen[path]} and for source {source.name}; name it once"
                )
            seen[path] = source.name


def _warn_of_repeats(order: Order) -> None:
    """Say which sources are smaller than what a batch takes from them."""
    for source in order.sources:
        share = order.shares[source.name]
        taken = order.batch_size if order.homogeneous and share else order.batch_size * share
        if taken > source.records:
            log.warning(
                "source %s: a batch takes %d of its %d records, so it repeats some, and equal texts are no negatives; "
                "lower batch_size, or set homogeneous=false and give the source a small weight",
                source.name,
                round(taken),
                source.records,
            )

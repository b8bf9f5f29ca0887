"""How a stage declares its configuration: frozen dataclasses whose fields carry their own help.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        run_dir: str = key(help="folder of the run")                    # no default: mandatory
        steps: int = key(30_000, help="optimizer steps", low=1)
        precision: str = key("fp32", help="matrix products", choices=("fp32", "bf16"))
        prompts: Prompts = key(Prompts(), help="texts put before each side")

launcher.config reads these declarations; nothing here knows OmegaConf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

_MANDATORY = object()


def key(
    default: Any = _MANDATORY,
    *,
    help: str,
    choices: Sequence[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
) -> Any:
    """Declare one configuration key.

    Args:
        default: its default; a key without one is mandatory. Mutable defaults are copied for each instance.
        help: one line, with the unit where there is one.
        choices: the only values allowed, when not empty.
        low, high: inclusive bounds; `above` is an exclusive lower bound.
    """
    metadata = {"help": help, "choices": tuple(choices), "low": low, "above": above, "high": high}
    if default is _MANDATORY:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def unresolved() -> Any:
    """Declare the field that receives the configuration as the user wrote it, as YAML text.

    It is stored with the run: interpolations such as `${oc.env:WANDB_API_KEY}` stay unresolved in it, so no
    secret reaches the run folder. It is no key: it cannot be set and is not shown.
    """
    return dataclasses.field(default="", repr=False, compare=False, metadata={"hidden": True})

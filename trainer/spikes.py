"""Finds loss spikes: a loss far above those that came just before it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

# A normal distribution's standard deviation is so many times its median absolute deviation.
_NORMAL = 1.4826
# Losses that hardly differ would make a spike of every ripple: the deviation counts as at least this.
LEAST_DEVIATION = 0.05


@dataclass(frozen=True)
class Spike:
    """A loss, and what it is compared with: median and robust deviation of the losses before it."""

    loss: float
    median: float
    deviation: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4g}, where {self.median:.4g} is usual and {self.deviation:.2g} the deviation"


@dataclass
class SpikeDetector:
    """Compares each loss with the last `window` of the same source, and tells of the first one of a spike.

    A loss is high when it lies more than `factor` robust standard deviations above the median. Seven is the distance
    in the spike score of OLMo 2 (arXiv 2501.00656), which takes mean and standard deviation over 1,000 steps; median
    and median absolute deviation are not moved by the spike itself, so a shorter window does. Batches of one source are
    compared with each other, since the losses of two sources may be far apart. High losses enter the window too: a
    level that stays becomes the usual one.

    What it says is a function of the losses alone, and `state` is all it remembers: a resumed run decides the same.
    """

    factor: float
    window: int
    _recent: dict[str, deque[float]] = field(default_factory=dict)
    _high: set[str] = field(default_factory=set)

    def observe(self, loss: float, source: str = "") -> Spike | None:
        """Take in the loss of a step; a spike when it is high and the one before it of this source was not.

        A loss that is not finite is another matter, and passed over here.
        """
        if not math.isfinite(loss):
            return None
        recent = self._recent.setdefault(source, deque(maxlen=self.window))
        spike = self._judge(loss, recent)
        recent.append(loss)
        known = source in self._high
        (self._high.add if spike else self._high.discard)(source)
        return None if known else spike

    def _judge(self, loss: float, recent: deque[float]) -> Spike | None:
        if len(recent) < self.window:
            return None
        middle = median(recent)
        deviation = max(_NORMAL * median(abs(other - middle) for other in recent), LEAST_DEVIATION)
        return Spike(loss, middle, deviation) if loss > middle + self.factor * deviation else None

    def state(self) -> dict[str, Any]:
        """What it remembers, as plain data for a checkpoint's manifest."""
        return {"recent": {name: list(losses) for name, losses in self._recent.items()}, "high": sorted(self._high)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`; of a longer window the newest losses are kept."""
        self._recent = {name: deque(losses, maxlen=self.window) for name, losses in state["recent"].items()}
        self._high = set(state["high"])

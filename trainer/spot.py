"""A cloud's notice that it takes a spot machine back, from its metadata service, as a request to stop.

The services answer on addresses of the machine itself, so no key is needed and nothing leaves it. What they say beside
the notice is neither kept nor logged.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from types import TracebackType
from typing import Self

log = logging.getLogger("quintet")

# AWS warns 2 minutes before and asks to be asked every 5 s; Google and Azure warn 30 s before.
POLL_SECONDS = 5.0
_TIMEOUT_SECONDS = 2.0
_MOST_BYTES = 1 << 20
# Where tests put a service of their own.
BASE_URL = "QUINTET_METADATA_URL"
_LINK_LOCAL = "http://169.254.169.254"
_GOOGLE = "http://metadata.google.internal"

# What a service that is not there, fails, or talks nonsense leads to.
UNCLEAR = (OSError, HTTPException, ValueError, KeyError, TypeError)

Ask = Callable[..., bytes]


def _aws(ask: Ask) -> bool:
    """https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: 404 until then."""
    token = ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT").decode()
    try:
        said = json.loads(ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise
    return said["action"] in ("hibernate", "stop", "terminate")


def _gcp(ask: Ask) -> bool:
    """https://cloud.google.com/compute/docs/instances/create-use-preemptible: FALSE until then."""
    return ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip().upper() == b"TRUE"


def _azure(ask: Ask) -> bool:
    """https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events: an event of the type Preempt."""
    found = json.loads(ask("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"}))
    return any(event["EventType"] == "Preempt" for event in found["Events"])


_CLOUDS: Mapping[str, tuple[str, Callable[[Ask], bool]]] = {
    "aws": (_LINK_LOCAL, _aws),
    "gcp": (_GOOGLE, _gcp),
    "azure": (_LINK_LOCAL, _azure),
}
CHOICES = ("none", *_CLOUDS)


def noticed(cloud: str) -> bool:
    """Whether the cloud has said that it takes this machine back. Raises one of UNCLEAR when it cannot be told."""
    base, look = _CLOUDS[cloud]
    base = os.environ.get(BASE_URL, base)
    # A proxy would be asked about itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(path: str, headers: Mapping[str, str], method: str = "GET") -> bytes:
        request = urllib.request.Request(base + path, headers=dict(headers), method=method)
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
            content: bytes = response.read(_MOST_BYTES)
            return content

    return look(ask)


class Watch:
    """While entered, a thread looks for the notice and hands it to `tell` once.

    Args:
        cloud: one of CHOICES; "none" watches nothing.
        tell: called in the thread with the reason, a word for messages.
    """

    def __init__(self, cloud: str, tell: Callable[[str], None], *, poll_seconds: float = POLL_SECONDS) -> None:
        self._cloud, self._tell, self._poll_seconds = cloud, tell, poll_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spot notices", daemon=True)

    def __enter__(self) -> Self:
        if self._cloud != "none":
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()  # the thread may be in a request; it ends by itself

    def _watch(self) -> None:
        warned = False
        while not self._over.is_set():
            try:
                if noticed(self._cloud):
                    log.warning("preemption=%s: the cloud takes this machine back", self._cloud)
                    self._tell("spot notice")
                    return
            except UNCLEAR as error:
                if not warned:
                    what = "its metadata service gives no answer (%s); is this machine there? Asking on"
                    log.warning(f"preemption=%s: {what}", self._cloud, type(error).__name__)
                warned = True
            self._over.wait(self._poll_seconds)

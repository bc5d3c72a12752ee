"""Prints the newest recorded microseconds of every implementation, one table a device.

python benchmarks/report.py [results/FILE.json ...]

Where `peers/` has figures for the device, how many times faster than the best peer stands beside.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import best, peers_of
from rich.console import Console
from rich.table import Table

from jaxmoe import benchmark

RESULTS = Path(__file__).parent / "results"
_KEY = ("layer", "format", "dtype", "compute", "implementation", "mode")


def newest(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[int, dict[str, Any]]]:
    """Rows by what `_KEY` names and T; later rows replace earlier ones."""
    table: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        table.setdefault(tuple(row[name] for name in _KEY), {})[row["T"]] = row
    return table


def report(rows: Sequence[dict[str, Any]]) -> Table:
    """One line an implementation, one column a number of tokens."""
    counts = sorted({row["T"] for row in rows})
    devices = list(dict.fromkeys(row["device"] for row in rows))
    peers = [peer for device in devices for peer in peers_of(device)]
    title = ", ".join(devices) + ": µs" + (" (times faster than the best peer)" if peers else "")
    table = Table(title=title, title_justify="left")
    for name in _KEY:
        table.add_column("x" if name == "dtype" else name)
    for t in counts:
        table.add_column(f"T={t}", justify="right")
    for key, by_tokens in sorted(newest(rows).items()):
        table.add_row(*key, *(_cell(by_tokens[t], peers) if t in by_tokens else "" for t in counts))
    return table


def _cell(row: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> str:
    us = row["us"]
    text = f"{us:,.1f}" if us < 100 else f"{us:,.0f}"
    rival = best(peers, row)
    return text if rival is None else f"{text} ({rival / us:.2f}×)"


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    for path in paths:
        if rows := benchmark.read_rows(path):
            Console().print(report(rows))
        else:
            sys.exit(f"{path}: no rows")


if __name__ == "__main__":
    main()

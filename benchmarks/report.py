"""Prints the newest recorded microseconds of every implementation, one table a device.

python benchmarks/report.py [results/FILE.json ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxmoe import benchmark

RESULTS = Path(__file__).parent / "results"


def newest(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[int, dict[str, Any]]]:
    """Rows by (layer, format, dtype, implementation) and T; later rows replace earlier ones."""
    table: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = (row["layer"], row["format"], row["dtype"], row["implementation"])
        table.setdefault(key, {})[row["T"]] = row
    return table


def report(rows: Sequence[dict[str, Any]]) -> Table:
    """One line an implementation, one column a number of tokens."""
    counts = sorted({row["T"] for row in rows})
    title = ", ".join(dict.fromkeys(row["device"] for row in rows))
    table = Table(title=f"{title}: µs", title_justify="left")
    for name in ("layer", "format", "x", "implementation"):
        table.add_column(name)
    for t in counts:
        table.add_column(f"T={t}", justify="right")
    for key, by_tokens in sorted(newest(rows).items()):
        times = [f"{by_tokens[t]['us']:,.0f}" if t in by_tokens else "" for t in counts]
        table.add_row(*key, *times)
    return table


def main() -> None:
    paths = [Path(p) for p in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    for path in paths:
        if rows := benchmark.read_rows(path):
            Console().print(report(rows))
        else:
            sys.exit(f"{path}: no rows")


if __name__ == "__main__":
    main()

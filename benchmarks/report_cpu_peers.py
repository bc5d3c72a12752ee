"""The figures of `run_cpu_peers.py`: a table, a plot, and what the documents say of them.

    python benchmarks/report_cpu_peers.py benchmarks/results/peers/FILE.json [--documents]

Of each layer and format the rows of the newest run that has it: times of different runs are never
compared. How many times longer than jaxmoe (W4A16) another library takes stands beside its time.
`--documents` renews the parts of README.md and docs/performance.md between `<!-- cpu peers -->`
and `<!-- end of cpu peers -->`. The plot needs matplotlib: pip install 'jaxmoe[bench]'.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import require_keys
from rich.console import Console
from rich.table import Table

from jaxmoe import benchmark

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "peers"
LIBRARIES = ("vllm", "llama.cpp", "ik_llama.cpp", benchmark.BASELINE)
"""Whose rows are not jaxmoe's."""

README_LAYER = "qwen3-30b-a3b"
README_TOKENS = (1, 8, 64, 512)
_FORMATS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}
_NAMES = {"vllm": "vLLM"}
_KEYS = ("date", "device", "backend", "implementation", "layer", "format", "compute", "T", "us",
         "error", "gbps", "bandwidth_gbps")  # fmt: skip
_BLOCK = re.compile(
    r"<!-- cpu peers(?:: (?P<file>\S+))? -->\n(?P<text>.*?)<!-- end of cpu peers -->\n", re.DOTALL
)

Rows = Sequence[Mapping[str, Any]]


def read(path: os.PathLike[str] | str) -> list[dict[str, Any]]:
    """The rows of a file of one device, of the newest run of each layer and format.

    Raises:
      ValueError: there are none, a row lacks a key, or they are of several devices.
    """
    rows = benchmark.read_rows(path)
    require_keys(rows, _KEYS, path)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    if len(devices) != 1:
        raise ValueError(
            f"{os.fspath(path)}: must hold rows of one device, got {', '.join(devices) or 'none'}"
        )
    date = {(row["layer"], row["format"]): row["date"] for row in rows}
    return [row for row in rows if row["date"] == date[row["layer"], row["format"]]]


def ours(row: Mapping[str, Any]) -> bool:
    """Whether a row is jaxmoe's."""
    return row["implementation"] not in LIBRARIES


def ratio(rows: Rows, row: Mapping[str, Any]) -> float | None:
    """How many times longer a library takes than jaxmoe with W4A16; None where there is no such."""
    same = ("layer", "format", "T")
    us = [
        r["us"]
        for r in rows
        if ours(r) and r["compute"] == "w4a16" and all(r[key] == row[key] for key in same)
    ]
    return row["us"] / min(us) if us and not ours(row) else None


def cell(rows: Rows, row: Mapping[str, Any] | None) -> str:
    """Milliseconds, with the ratio of another library."""
    if row is None:
        return "–"
    ms = row["us"] / 1e3
    text = f"{ms:.3g}" if ms < 100 else f"{ms:,.0f}"
    factor = ratio(rows, row)
    if factor is None:
        return text
    return f"{text} ({factor:,.0f}×)" if factor >= 9.95 else f"{text} ({factor:.1f}×)"


def select(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _kinds(rows: Rows) -> list[tuple[str, str]]:
    """Implementations with their arithmetic, jaxmoe's first."""
    found = dict.fromkeys((r["implementation"], r["compute"]) for r in rows)
    order = {name: n for n, name in enumerate(LIBRARIES)}
    return sorted(found, key=lambda kind: order.get(kind[0], -1))


def _lines(rows: Rows) -> Iterable[tuple[tuple[str, str, str, str], list[str]]]:
    """Layer, format, implementation and arithmetic, and a cell for each T."""
    counts = sorted({row["T"] for row in rows})
    for layer, weight_format in dict.fromkeys((r["layer"], r["format"]) for r in rows):
        of = select(rows, layer=layer, format=weight_format)
        for name, compute in _kinds(of):
            by_tokens = {r["T"]: r for r in select(of, implementation=name, compute=compute)}
            yield (
                (layer, weight_format, name, compute),
                [cell(rows, by_tokens.get(t)) for t in counts],
            )


def table(rows: Rows) -> Table:
    """What the terminal shows."""
    title = f"{rows[0]['device']}: ms (times longer than jaxmoe)"
    made = Table("layer", "format", "implementation", "compute", title=title, title_justify="left")
    for t in sorted({row["T"] for row in rows}):
        made.add_column(f"T={t}", justify="right")
    for key, cells in _lines(rows):
        made.add_row(*key, *cells)
    return made


def _markdown(head: Sequence[str], left: int, body: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def _notes(rows: Rows) -> str:
    """Errors and versions, as a paragraph."""

    def span(of: Rows) -> str:
        low, high = (f"{f(r['error'] for r in of):.1e}" for f in (min, max))
        return (low if low == high else f"{low} to {high}").replace("e-0", "e-")

    errors = [
        f"{span(select(rows, implementation=name, compute=compute))} (`{name}`, {compute})"
        for name, compute in _kinds(rows)
    ]
    found = dict.fromkeys(r["backend"] for r in rows if r["implementation"] in LIBRARIES[:-1])
    text = f"Errors against float64: {', '.join(errors)}. {'; '.join(found)}"
    return textwrap.fill(text.rstrip(". ") + ".", 120, break_on_hyphens=False)


def _head(weight_format: str, name: str, compute: str) -> str:
    if name == benchmark.BASELINE:
        return "`jax.lax.ragged_dot`, bf16 weights"
    shown = _NAMES.get(name, name) if name in LIBRARIES else f"jaxmoe (`{name}`, {compute})"
    return f"{shown}, {_FORMATS[weight_format]}"


def readme(rows: Rows, image: str) -> str:
    """The README's part: one layer."""
    rows = [r for r in select(rows, layer=README_LAYER) if r["T"] in README_TOKENS]
    if not rows:
        raise ValueError(f"no rows of {README_LAYER} at T = {', '.join(map(str, README_TOKENS))}")
    formats = list(dict.fromkeys(r["format"] for r in rows))
    columns = [
        (weight_format, name, compute)
        for weight_format in formats
        for name, compute in _kinds(select(rows, format=weight_format))
        if name != benchmark.BASELINE or weight_format == formats[0]  # bf16 in both
    ]
    counts = sorted({row["T"] for row in rows})

    def line(weight_format: str, name: str, compute: str) -> list[str]:
        cells = []
        for t in counts:
            wanted = {"format": weight_format, "implementation": name, "compute": compute, "T": t}
            text = cell(rows, next(iter(select(rows, **wanted)), None))
            cells.append(text if name in LIBRARIES else f"**{text}**")
        return [_head(weight_format, name, compute), *cells]

    head = ["", *(f"T = {t}" for t in counts)]
    body = [line(*column) for column in columns]
    return (
        f"One {README_LAYER} layer on {rows[0]['device']}, milliseconds, medians of one "
        "interleaved run with cold weights; in brackets\n"
        "how many times longer than jaxmoe's w4a16:\n\n"
        f"{_markdown(head, 1, body)}\n{_notes(rows)}\n"
        "All layers: `docs/performance.md`; how it is measured: `benchmarks/README.md`.\n\n"
        f"![Times of the expert MLP on this CPU beside other libraries]({image})\n"
    )


def performance(rows: Rows) -> str:
    """The part of docs/performance.md: every row."""
    counts = sorted({row["T"] for row in rows})
    head = ["layer", "format", "implementation", "compute", *(f"T = {t}" for t in counts)]
    body = [[*key, *cells] for key, cells in _lines(rows)]
    return (
        f"{rows[0]['device']}, milliseconds (times longer than jaxmoe's w4a16).\n\n"
        f"{_markdown(head, 4, body)}\n"
        f"{_notes(rows)}\n"
    )


def renew(document: Path, file: str, text: str) -> None:
    """Puts a text made of the rows of `file` between the document's marks.

    Raises:
      ValueError: it has no marks.
    """
    old = document.read_text(encoding="utf-8")
    block = f"<!-- cpu peers: {file} -->\n{text}<!-- end of cpu peers -->\n"
    new, count = _BLOCK.subn(lambda _: block, old)
    if count != 1:
        raise ValueError(f"{document}: must have one part between <!-- cpu peers --> marks")
    document.write_text(new, encoding="utf-8")


def documents(path: Path, root: Path = ROOT) -> dict[Path, str]:
    """What each document must say of the rows of a file."""
    rows = read(path)
    image = path.relative_to(root).with_suffix(".png").as_posix()
    return {
        root / "README.md": readme(rows, image),
        root / "docs" / "performance.md": performance(rows),
    }


def draw(rows: Rows, out: Path) -> None:
    """Writes a plot: time by T, one panel a layer."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    counts = sorted({row["T"] for row in rows})
    kinds = _kinds(rows)
    colour = {kind: f"C{n}" for n, kind in enumerate(kinds)}
    style = {"nvfp4": ("-", "o"), "mxfp4": ("--", "s")}
    figure = Figure(figsize=(max(8, 4 * len(layers) + 1), 4.6), layout="constrained")
    for axes, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for weight_format, (dash, marker) in style.items():
            of = select(rows, layer=layer, format=weight_format)
            for kind in _kinds(of):
                line = select(of, implementation=kind[0], compute=kind[1])
                line.sort(key=lambda row: row["T"])
                axes.plot([r["T"] for r in line], [r["us"] / 1e3 for r in line], linestyle=dash,
                          marker=marker, markersize=4, color=colour[kind])  # fmt: skip
            read = {r["T"]: r["us"] * r["gbps"] / r["bandwidth_gbps"] / 1e3 for r in of}
            axes.plot([*read], [*read.values()], color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=layer)
        axes.set_xticks(counts, map(str, counts), minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(which="major", linewidth=0.3)
    figure.axes[0].set_ylabel("ms for each call")
    handles = [Line2D([], [], color=colour[kind], label=" ".join(kind)) for kind in kinds]
    handles += [Line2D([], [], color="black", linestyle=dash, marker=marker, markersize=4, label=n)
                for n, (dash, marker) in style.items()]  # fmt: skip
    handles += [Line2D([], [], color="0.5", linestyle=":", label="reading the weights once")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(rows[0]["device"])
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, format="png")


def show(path: Path, *, renew_documents: bool) -> None:
    """Prints the table of a file of rows, draws the plot beside it, renews the documents."""
    rows = read(path)
    Console(width=160 if not sys.stdout.isatty() else None).print(table(rows))
    try:
        draw(rows, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}; pip install 'jaxmoe[bench]'")
    if renew_documents:
        for document, text in documents(path).items():
            renew(document, path.relative_to(ROOT).as_posix(), text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--documents", action="store_true", help="renew README.md and docs/")
    given = parser.parse_args(arguments)
    try:
        show(given.rows.resolve(), renew_documents=given.documents)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

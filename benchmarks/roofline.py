"""Draws recorded rows of one device under its roofs, as a PNG.

    python benchmarks/roofline.py results/nvidia-h100-80gb-hbm3.json -o roofline.png

x: FLOPs for each packed FP4 byte that a call touches, y: TFLOP/s. One marker a layer, one colour a
format and arithmetic; the newest row of each, of programs where there are any, else of CUDA graphs,
else of dispatched calls. `--implementation` draws one alone. The roofs are the ceilings of the
newest rows. Grey: the peers in `peers/` for that device, at the intensity of the same layer and T.
Needs matplotlib: pip install 'jaxmoe[bench]'.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import peers_of, require_keys

from jaxmoe import benchmark

_KEYS = ("device", "layer", "format", "compute", "implementation", "mode", "T", "us", "gbps",
         "tflops", "bandwidth_gbps", "peak_tflops")  # fmt: skip
_MODES = ("program", "graph", "dispatch")
_MARKERS = "osD^vP*X<>"
_GREYS = {"best kernel": "0.35", "JAX library": "0.6", "ragged_dot": "0.8"}


def read_device(
    path: os.PathLike[str] | str, implementations: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of a file with one device's measurements, of all implementations or of some.

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
    rows = [r for r in rows if not implementations or r["implementation"] in implementations]
    if not rows:
        raise ValueError(f"{os.fspath(path)}: no rows of {', '.join(implementations)}")
    return rows


def series(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows to draw by (layer, format, compute, implementation), in the order of T."""
    by_mode: dict[tuple[str, ...], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for row in rows:
        key = (row["layer"], row["format"], row["compute"], row["implementation"])
        by_mode.setdefault(key, {}).setdefault(row["mode"], {})[row["T"]] = row
    return {
        key: [of for _, of in sorted(next(modes[m] for m in _MODES if m in modes).items())]
        for key, modes in by_mode.items()
    }


def intensity(layer: benchmark.Layer, weight_format: str, tokens: int) -> float:
    """FLOPs for each packed byte of the experts that T tokens are expected to touch."""
    touched = benchmark.expected_experts(layer, tokens) * layer.expert_bytes(weight_format)
    return layer.flops(tokens) / touched


def draw(rows: Sequence[Mapping[str, Any]], peers: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes the plot of one device's rows and of its peers."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    lines = series(rows)
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    kinds = list(dict.fromkeys((row["format"], row["compute"]) for row in rows))
    marker = dict(zip(layers, _MARKERS, strict=False))
    colour = {kind: f"C{i}" for i, kind in enumerate(kinds)}
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots()
    known = [peer for peer in peers if peer["layer"] in marker]
    for peer in known:
        layer = benchmark.get_layer(peer["layer"])
        points = [
            (intensity(layer, peer["format"] or "mxfp4", int(t)), layer.flops(int(t)) / us / 1e6)
            for t, us in peer["us"].items()
        ]
        axes.plot(*zip(*points, strict=True), linestyle="", marker=marker[layer.name],
                  color=_GREYS.get(peer["name"], "0.5"), markersize=4)  # fmt: skip
    for (name, weight_format, compute, _), of in lines.items():
        x = [1e3 * row["tflops"] / row["gbps"] for row in of]
        axes.plot(x, [row["tflops"] for row in of], marker=marker[name], linewidth=0.7,
                  color=colour[weight_format, compute])  # fmt: skip
    left, right = axes.get_xlim()
    left = max(left, min(1e3 * row["tflops"] / row["gbps"] for row in rows) / 2)
    for compute in dict.fromkeys(row["compute"] for row in rows):
        row = next(r for r in reversed(rows) if r["compute"] == compute)
        bandwidth, peak = row["bandwidth_gbps"] / 1e3, row["peak_tflops"]
        corner = peak / bandwidth
        x = [left, corner, max(2 * corner, right)]
        axes.plot(x, [min(peak, bandwidth * at) for at in x], color="black", linewidth=1)
        axes.annotate(f"{compute}: {bandwidth:.2f} TB/s, {peak:.0f} TFLOP/s", (corner, peak),
                      xytext=(0, 4), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", title=rows[-1]["device"], ylabel="TFLOP/s",
             xlabel="FLOPs for each packed byte touched")  # fmt: skip
    axes.grid(which="both", linewidth=0.3)
    handles = [Line2D([], [], color="black", linestyle="", marker=marker[n], label=n)
               for n in layers]  # fmt: skip
    handles += [Line2D([], [], color=c, label=" ".join(kind)) for kind, c in colour.items()]
    handles += [Line2D([], [], color=_GREYS.get(n, "0.5"), linestyle="", marker="s", label=n)
                for n in dict.fromkeys(peer["name"] for peer in known)]  # fmt: skip
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    figure.savefig(out, dpi=150, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="default: beside the rows, as .png")
    parser.add_argument("--implementation", action="append", default=[], help="may be repeated")
    given = parser.parse_args(arguments)
    try:
        rows = read_device(given.rows, given.implementation)
        out = given.out or given.rows.with_suffix(".png")
        draw(rows, peers_of(rows[0]["device"]), out)
    except ValueError as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f"{error}: pip install 'jaxmoe[bench]'")
    print(out)


if __name__ == "__main__":
    main()

"""Rows of `results/` out of what `native/moe_mlp.cu` printed in mode `time`.

    python benchmarks/native_rows.py docs/evidence/sm90-h100-matrix.txt --family sm90
        --commit f123a1f --device "NVIDIA H100 80GB HBM3"
        --bandwidth 2980 --peak 782 --peak-fp8 1448

The first line of a layer, format and T counts: the tactic `auto`, if it was asked for first. The
mode of such rows is `graph`: replays of a CUDA graph, without JAX's dispatch. The ceilings are
those that `jaxmoe bench` prints on such a GPU, in GB/s and TFLOP/s.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmoe import benchmark

_LINE = re.compile(
    r"(?P<layer>\S+) +(?P<format>nvfp4|mxfp4)(?P<fp8>-fp8)? +T=(?P<T>\d+) +\S+ +"
    r"error (?P<error>\S+) +(?P<us>[\d.]+) us +(?P<gbps>\d+) GB/s +(?P<tflops>[\d.]+) TFLOP/s"
)


def rows(
    text: str, family: str, machine: benchmark.Machine, commit: str, date: str
) -> list[dict[str, Any]]:
    """One row for each layer, format and T of a log.

    Raises:
      ValueError: no line has a time.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in _LINE.finditer(text):
        compute = "w4a8" if line["fp8"] else "w4a16"
        tokens, us = int(line["T"]), float(line["us"])
        layer = benchmark.get_layer(line["layer"])
        floor = 1e6 * machine.floor(float(line["gbps"]) * us * 1e3, layer.flops(tokens), compute)
        found.setdefault(
            (layer.name, line["format"], compute, line["T"]),
            {
                "date": date,
                "commit": commit,
                "device": machine.device,
                "implementation": f"{family}_{compute}",
                "layer": layer.name,
                "format": line["format"],
                "compute": compute,
                "dtype": "bfloat16",
                "T": tokens,
                "mode": "graph",
                "us": us,
                "gbps": float(line["gbps"]),
                "tflops": float(line["tflops"]),
                "error": float(line["error"]),
                "floor_us": round(floor, 2),
                "floor_fraction": round(floor / us, 4),
                "bandwidth_gbps": machine.bandwidth / 1e9,
                "peak_tflops": machine.peak_of(compute) / 1e12,
            },
        )
    if not found:
        raise ValueError("no line has a layer, format, T and time: run mode `time`")
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--family", required=True, help="the library: sm80, sm90")
    parser.add_argument("--device", required=True, help="the GPU's name as JAX gives it")
    parser.add_argument("--commit", required=True, help="what was measured")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--bandwidth", type=float, required=True, help="GB/s")
    parser.add_argument("--peak", type=float, required=True, help="bf16 TFLOP/s")
    parser.add_argument("--peak-fp8", type=float, required=True, help="TFLOP/s")
    parser.add_argument("--json", type=Path, help="default: results/<device>.json")
    given = parser.parse_args(arguments)
    machine = benchmark.Machine(
        given.device, "gpu", given.bandwidth * 1e9, given.peak * 1e12, 0, given.peak_fp8 * 1e12
    )
    results = Path(__file__).parent / "results"
    out = given.json or results / f"{benchmark.device_slug(given.device)}.json"
    try:
        made = rows(given.log.read_text(), given.family, machine, given.commit, given.date)
        benchmark.append_rows(out, made)
    except (ValueError, OSError) as error:
        sys.exit(f"{given.log}: {error}")
    print(f"{len(made)} rows to {out}")


if __name__ == "__main__":
    main()

"""Measures `jaxmoe.prepare` on whole layers: seconds, and memory beyond the weights and the result.

    python benchmarks/prepare.py                       # two layers in both formats, this device
    python benchmarks/prepare.py --layer gpt-oss-20b --format mxfp4

A process each, since a device's peak of memory is that of the process. The first call compiles, the
second does not. Memory is counted in packed experts: `peak` is what the device's allocator says (a
CPU's says nothing), `temporary` what XLA plans for the larger of the two matrices' programs.
Required: the second call below a second on a GPU, and at most one expert of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import jaxmoe
from jaxmoe import benchmark, kernels
from jaxmoe.benchmark.data import random_experts
from jaxmoe.experts import CANONICAL, ExpertWeights
from jaxmoe.kernels.layouts import LAYOUTS

RESULTS = Path(__file__).parent / "results" / "prepare"
LAYERS = ("qwen3-30b-a3b", "deepseek-v3-ep8")


def measure(layer: benchmark.Layer, weight_format: str) -> dict[str, Any]:
    """One row: `prepare` of one layer for the variant that is selected here."""
    problem = benchmark.layer_problem(layer, weight_format, "bfloat16", "auto")
    chosen = kernels.select(problem)
    layout = str(chosen.layout)
    if layout == CANONICAL:
        raise ValueError(
            f"{chosen.variant} is selected here, which reads weights as they are: there is nothing "
            "to prepare; install a library with a kernel for this device"
        )
    device = jax.local_devices()[0]
    # Made on the host: the device's peak must be that of `prepare` and of nothing before.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        experts = random_experts(layer, weight_format, CANONICAL, seed=0)
    experts = jax.block_until_ready(jax.device_put(experts, device))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = jax.block_until_ready(jaxmoe.prepare(experts, chosen.variant))
        seconds.append(time.perf_counter() - start)
        held, peak = _memory(device)  # held: weights and result, as the allocator rounded them
        del result
    expert = layer.expert_bytes(weight_format)
    extra = None if held is None or peak is None else (peak - held) / expert
    return benchmark.origin(benchmark.device_name()) | {
        "implementation": chosen.variant,
        "layer": layer.name,
        "format": weight_format,
        "layout": layout,
        "first_s": _digits(seconds[0]),
        "second_s": _digits(seconds[1]),
        "expert_bytes": expert,
        "peak_experts": None if extra is None else _digits(extra),
        "temporary_experts": _digits(_temporary(experts, layout) / expert),
    }


def _memory(device: Any) -> tuple[int | None, int | None]:
    """Bytes in use, now and at most so far."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_in_use"), stats.get("peak_bytes_in_use")


def _temporary(experts: ExpertWeights, layout: str) -> int:
    """Bytes of the larger of the two matrices' temporaries."""
    sizes = []
    for w, gated in ((experts.gate_up, True), (experts.down, False)):
        compiled = LAYOUTS[layout].pack.lower(w, gated).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    return max(sizes)


def _digits(value: float) -> float:
    return float(f"{value:.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*benchmark.LAYERS, benchmark.TINY.name]
    parser.add_argument("--layer", action="append", choices=names)
    parser.add_argument("--format", action="append", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    parser.add_argument("--only", action="store_true", help="measure one case here, print its row")
    given = parser.parse_args()
    layers, formats = given.layer or LAYERS, given.format or ["nvfp4", "mxfp4"]
    if given.only:
        try:
            print(json.dumps(measure(benchmark.get_layer(layers[0]), formats[0])))
        except ValueError as error:
            sys.exit(str(error))
        return
    rows = []
    for layer in layers:
        for weight_format in formats:
            command = [sys.executable, __file__, "--only"]
            command += ["--layer", layer, "--format", weight_format]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                sys.exit(done.returncode)  # it has said why
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    columns = ("layer", "format", "layout", "first_s", "second_s", "peak_experts",
               "temporary_experts")  # fmt: skip
    table = Table(title=f"{rows[0]['device']}: prepare()", title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=120).print(table)
    given.results.mkdir(parents=True, exist_ok=True)
    benchmark.append_rows(given.results / f"{benchmark.device_slug(rows[0]['device'])}.json", rows)


if __name__ == "__main__":
    main()

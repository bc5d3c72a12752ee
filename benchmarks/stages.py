"""Times each kernel of a layer's call on a GPU (sort, gather, products, combine) and records rows.

    python benchmarks/stages.py                                   # four layers, NVFP4, four T
    python benchmarks/stages.py --layer mixtral-8x7b --format mxfp4 --tokens 64,4096

The times come from JAX's profiler. A kernel counts from the end of the one before, or from its own
start where that is later: the next kernel starts early and waits, and that wait is not its own. So
the stages add up to the call without the gaps between launches.
"""

from __future__ import annotations

import argparse
import functools
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

import jaxmoe
from jaxmoe import benchmark, kernels
from jaxmoe.benchmark.data import random_experts, random_tokens
from jaxmoe.cli._bench import parse_tokens

RESULTS = Path(__file__).parent / "results" / "stages"
LAYERS = ("qwen3-30b-a3b", "gpt-oss-120b", "mixtral-8x7b", "deepseek-v3-ep8")
_CALLS = 9  # that are traced; their medians are taken
_SETS = 3  # sets of weights in rotation: the smallest layer has 340 MB, far beyond an L2 cache


class Event(NamedTuple):
    """A kernel's run; times in nanoseconds."""

    start: float
    duration: float
    name: str


def stages(events: Sequence[Event], calls: int) -> list[dict[str, Any]]:
    """Median microseconds of each kernel of a call, in order.

    >>> stages([Event(0, 4000, "a_kernel"), Event(3000, 3000, "void n::b_kernel<1>(int)")], 1)
    [{'kernel': 'a_kernel', 'us': 4.0}, {'kernel': 'b_kernel', 'us': 2.0}]

    Args:
      events: kernels of several calls.
      calls: how many.

    Raises:
      ValueError: the calls were not all of the same kernels.
    """
    events = sorted(events)
    names = [_short(event.name) for event in events]
    count = len(events) // calls
    if not events or names != names[:count] * calls:
        raise ValueError(
            f"events must be the same kernels for each of {calls} calls, got {len(events)}: "
            + ", ".join(dict.fromkeys(names))
        )
    own, end = [], 0.0
    for event in events:
        until = event.start + event.duration
        own.append(max(0.0, until - max(event.start, end)) / 1e3)
        end = max(end, until)
    return [
        {"kernel": names[i], "us": float(f"{statistics.median(own[i::count]):.4g}")}
        for i in range(count)
    ]


def _short(name: str) -> str:
    """`gemm_kernel` of a C++ name, mangled or not; other names up to their arguments."""
    match = re.search(r"[a-z][a-z_]*_kernel", name)
    return match.group() if match else re.split(r"[<(]", name)[0].strip()


def traced(folder: str) -> list[Event]:
    """The kernels that a profiler's folder says ran on the first GPU.

    Raises:
      ValueError: it says nothing of a GPU.
    """
    for path in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name == "/device:GPU:0":
                return [
                    Event(event.start_ns, event.duration_ns, event.name)
                    for line in plane.lines
                    if line.name.startswith("Stream")
                    for event in line.events
                ]
    raise ValueError(
        "the profiler saw no GPU: stages are measured on a GPU, where JAX finds CUPTI (part of "
        "jax[cuda13])"
    )


def measure(layer: benchmark.Layer, weight_format: str, compute: str, counts: Sequence[int]) -> Any:
    """Yields (variant, compute, T, stages) for each T."""
    problem = benchmark.layer_problem(layer, weight_format, "bfloat16", compute)
    chosen = kernels.select(problem)
    sets = [random_experts(layer, weight_format, str(chosen.layout), s) for s in range(_SETS)]
    call = jax.jit(functools.partial(jaxmoe.moe_mlp, compute=compute))
    for t in counts:
        inputs = [random_tokens(layer, t, "bfloat16", seed) for seed in range(_SETS)]

        def run(
            number: int, sets: Any = sets, inputs: Sequence[tuple[jax.Array, ...]] = inputs
        ) -> None:
            x, ids, weights = inputs[number % _SETS]
            call(x, sets[number % _SETS], ids, weights).block_until_ready()

        for number in range(_SETS):
            run(number)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for number in range(_CALLS):
                    run(number)
            yield chosen.variant, chosen.compute, t, stages(traced(folder), _CALLS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="append", choices=[*benchmark.LAYERS])
    parser.add_argument("--format", action="append", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--compute", default="auto")
    parser.add_argument("--tokens", default="1,64,1024,16384", type=parse_tokens)
    arguments = parser.parse_args()
    device = jax.local_devices()[0]
    if device.platform != "gpu":
        sys.exit(
            f"stages are measured on a GPU, and JAX's first device here is a {device.platform}"
        )
    rows = []
    table = Table(title=f"{device.device_kind}: µs of each kernel", title_justify="left")
    for column in ("layer", "format", "variant", "T", "sum", "kernels"):
        table.add_column(column, justify="right" if column in ("T", "sum") else "left")
    for layer in arguments.layer or LAYERS:
        for weight_format in arguments.format or ["nvfp4"]:
            results = measure(
                benchmark.LAYERS[layer], weight_format, arguments.compute, arguments.tokens
            )
            for variant, compute, t, found in results:
                rows.append(
                    benchmark.origin(device.device_kind)
                    | {"implementation": variant, "layer": layer, "format": weight_format}
                    | {"compute": compute, "dtype": "bfloat16", "T": t, "stages": found}
                )
                total = sum(stage["us"] for stage in found)
                parts = ", ".join(f"{stage['kernel']} {stage['us']:,.1f}" for stage in found)
                table.add_row(layer, weight_format, variant, str(t), f"{total:,.1f}", parts)
    Console(width=160).print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    benchmark.append_rows(RESULTS / f"{benchmark.device_slug(device.device_kind)}.json", rows)


if __name__ == "__main__":
    main()

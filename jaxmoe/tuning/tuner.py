"""The autotuner: measure the tactics of a layer, keep what is clearly faster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from jaxmoe import capability
from jaxmoe.capability.table import SMEM_LIMIT
from jaxmoe.tuning import tables
from jaxmoe.tuning.key import Key, bucket

if TYPE_CHECKING:
    from jaxmoe.benchmark import Layer

MARGIN = 0.02
"""Part of the library's own time that a tactic must save to be preferred: beyond the noise."""

_GIB = 2**30


class TuningError(Exception):
    """There is nothing to choose from, or nothing to measure with; the message says the way out."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for one problem.

    Args:
      key: the problem.
      tactic: the winner; "" for the library's own choice.
      seconds: median time of one layer by tactic, the library's own choice under "".
      refused: tactics that cannot run this problem, with the reason.
    """

    key: Key
    tactic: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]


def tune(
    layer: Layer,
    weight_format: str,
    tokens: Sequence[int],
    *,
    dtype: Any = jnp.bfloat16,
    compute: str = "auto",
    implementation: str | None = None,
    path: os.PathLike[str] | str | None = None,
    budget: float = 0.3,
    memory_limit: int = 6 * _GIB,
    margin: float = MARGIN,
    report: Callable[[Tuned], None] | None = None,
) -> list[Tuned]:
    """Measures every tactic of a layer's `moe_mlp` on this device and records the winners.

    >>> from jaxmoe import benchmark, tuning
    >>> found = tuning.tune(benchmark.get_layer("qwen3-30b-a3b"), "nvfp4", [1, 64],
    ...                     report=print)                                        # doctest: +SKIP

    Weights are random, and rotate so that they are not in the cache when they are used again;
    routings are random, all experts equally likely. The library's own choice is always a candidate
    and keeps its place unless another tactic is faster by more than `margin`. A tactic is left out
    where the device has too little shared memory for it, where the kernel refuses the problem, and
    where its numbers are not those of the library's own choice.

    Functions that are traced later use the winners. A function that is compiled already keeps what
    it was compiled with; `jax.clear_caches()` forgets it.

    Args:
      layer: sizes; SwiGLU, no biases.
      weight_format: `nvfp4` or `mxfp4`.
      tokens: numbers `T`, each rounded up to one of `BUCKETS`, which is what is measured.
      dtype: dtype of the activations.
      compute: as for `moe_mlp`.
      implementation: as for `moe_mlp`; None tunes the variant that would be selected.
      path: file to add the entries to; None is the user's cache, `cache_path()`. It is written
        after each T, so that little is lost if the run is stopped.
      budget: seconds of measuring for each tactic and T.
      memory_limit: bytes that weights may take.
      margin: part of the library's own time that a tactic must save.
      report: called with each result as it is found.

    Returns:
      A `Tuned` for each T, in ascending order.

    Raises:
      ValueError: a T is below 1, or `path` holds something else.
      TuningError: the selected variant has no tactics, or the target is not this machine.
      MemoryLimitError: not even one set of weights fits.
    """
    from jaxmoe import kernels  # which reads the tables, and so imports this package
    from jaxmoe.benchmark import layer_problem
    from jaxmoe.tuning import measurement

    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens must be numbers of at least 1, got {list(tokens)}")
    path = tables.cache_path() if path is None else Path(path)
    tables.read(path)  # a file that cannot take entries fails before anything is measured
    if capability.current_override().target is not None:
        raise TuningError(
            f"tuning measures on the device that is here, and override forces the target "
            f"{capability.current_override().target}; call tune outside that block"
        )
    problem = layer_problem(layer, weight_format, dtype, compute)
    resolution = kernels.select(problem, implementation)
    tactics = kernels.tactics(resolution.variant, resolution.compute)
    if not tactics:
        raise TuningError(
            f"{resolution.selected}, which runs {weight_format} weights on {resolution.target}, "
            "has no tactics to choose from: there is nothing to tune. The variants of the native "
            "libraries have tactics; `jaxmoe explain` says why none of them was selected"
        )
    limit = SMEM_LIMIT.get(resolution.target.sm or 0, 0)
    too_large = {
        tactic: f"takes {size} bytes of shared memory; {resolution.target} has {limit}"
        for tactic, size in tactics.items()
        if size > limit
    }
    candidates = [tactic for tactic in tactics if tactic not in too_large]
    counts = sorted({bucket(t) for t in tokens})
    bench = measurement.Bench(layer, resolution, counts[0], memory_limit)
    found = []
    for count in counts:
        seconds, refused = bench.measure(count, candidates, budget)
        key = Key.of(resolution).at(count)
        result = Tuned(key, fastest(seconds, margin), seconds, {**too_large, **refused})
        tables.store(path, [_entry(result, kernels.build_id(resolution.variant))])
        found.append(result)
        if report is not None:
            report(result)
    return found


def fastest(seconds: Mapping[str, float], margin: float = MARGIN) -> str:
    """The tactic to take; "", the library's own choice, unless another saves more than `margin`.

    >>> fastest({"": 100e-6, "wgmma64": 99e-6}), fastest({"": 100e-6, "wgmma64": 90e-6})
    ('', 'wgmma64')

    Args:
      seconds: time by tactic; "" is among them.
      margin: part of the time of "".
    """
    best = min(seconds, key=lambda tactic: seconds[tactic])
    return best if seconds[best] < seconds[""] * (1 - margin) else ""


def _entry(result: Tuned, build: str) -> tables.Entry:
    def microseconds(tactic: str) -> float:
        return float(f"{result.seconds[tactic] * 1e6:.4g}")

    return tables.Entry(
        key=result.key,
        build=build,
        tactic=result.tactic,
        us=microseconds(result.tactic),
        default_us=microseconds(""),
    )

"""Loads a checkpoint folder and generates from it: seconds, memory and tokens/s, as recorded rows.

    python benchmarks/synthetic_checkpoint.py qwen3-30b-a3b-nvfp4 qwen3-noise
    python benchmarks/generate.py qwen3-noise
    python benchmarks/generate.py qwen3-noise --batch 1 --profile  # also each kernel

Files are dropped from the page cache before they are read (`--warm` leaves them there). Prompts are
random tokens, each row's its own; the likeliest token is drawn. The floor of a step is the time to
read once what it needs, at the bandwidth that `jaxmoe bench` measures: every matrix, the experts
that a random choice would touch, and the cache at its mean length.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from stages import Event, traced

from jaxmoe import benchmark, models
from jaxmoe.benchmark.machine import measure_machine
from jaxmoe.checkpoint import open_folder

RESULTS = Path(__file__).parent / "results" / "generate"
_STRIDE = 16  # tokens drawn in one device call
_PROFILED = 2  # device calls


class HostMemory:
    """Watches the process' own memory (mapped files are not counted) while a block runs.

    Attributes:
      grown: bytes by which the peak exceeds the start.
    """

    def __enter__(self) -> HostMemory:
        self._before = self._peak = self._now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.01):
            self._peak = max(self._peak, self._now())

    @property
    def grown(self) -> int:
        return self._peak - self._before

    @staticmethod
    def _now() -> int:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["RssAnon"].split()[0])


def _drop(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path, *, warm: bool) -> tuple[models.Decoder, dict[str, Any]]:
    """The model, and what its loading took."""
    with open_folder(folder) as source:
        files, model_type = source.files, source.config["model_type"]
    if not warm:
        for file in files:
            _drop(file)
    size = sum(file.stat().st_size for file in files)
    jax.block_until_ready(jax.numpy.zeros(1))  # the runtime's own memory is no part of loading
    with HostMemory() as host:
        start = time.perf_counter()
        model = models.load_pretrained(folder)
        jax.block_until_ready(nnx.state(model))
        seconds = time.perf_counter() - start
    held, peak = _device_memory()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    return model, {
        "model": f"{model_type}, {len(model.layers)} layers",
        "kernels": _kernels(model),
        "file_bytes": size,
        "weight_bytes": weights,
        "cold": not warm,
        "load_s": _digits(seconds),
        "load_gbps": _digits(size / seconds / 1e9),
        "load_host_bytes": host.grown,
        "load_device_bytes": held,
        "load_device_peak_bytes": peak,
    }


def _device_memory() -> tuple[int | None, int | None]:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_in_use"), stats.get("peak_bytes_in_use")


def _moes(model: models.Decoder) -> list[Any]:
    blocks = (model.layers[index] for index in range(len(model.layers)))
    return [block.moe for block in blocks if block.moe is not None]


def _kernels(model: models.Decoder) -> dict[str, int]:
    """How many layers' experts each kernel variant runs."""
    return dict(collections.Counter(str(moe.explain(model.dtype).selected) for moe in _moes(model)))


def step_bytes(model: models.Decoder, batch: int, context: int) -> float:
    """Bytes that a decoding step must read: weights, touched experts, and the cache."""

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    total = float(size(nnx.state(model)))
    if model.head is not None:
        total -= size(nnx.state(model.embed))  # of which only some rows are read
    for moe in _moes(model):
        untouched = (1 - moe.top_k / moe.num_experts) ** batch
        total -= untouched * size([nnx.state(moe)[name] for name in ("gate_up", "down")])
    cache: Any = jax.eval_shape(lambda: model.init_cache(batch, context))
    return total + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


def _parts(
    model: models.Decoder, batch: int, prompt: int, new: int, room: int, seed: int
) -> Iterator[list[list[int]]]:
    vocab = model.architecture.vocab_size
    prompts = np.random.default_rng(seed).integers(0, vocab, (batch, prompt)).tolist()
    return models.generate_tokens(
        model,
        prompts,
        max_new_tokens=new,
        sampling=models.Sampling(temperature=0),
        stride=_STRIDE,
        max_length=room,
    )


def _room(model: models.Decoder, prompt: int, new: int) -> int:
    return min(model.architecture.max_length, -(-(prompt + new) // 64) * 64)


def compile_all(model: models.Decoder, batches: Sequence[int], prompt: int, new: int) -> float:
    """Seconds until what each batch needs is compiled, side by side."""
    room = _room(model, prompt, new)
    start = time.perf_counter()
    with ThreadPoolExecutor(len(batches)) as threads:
        list(threads.map(lambda b: list(_parts(model, b, prompt, _STRIDE, room, 0)), batches))
    return time.perf_counter() - start


def measure(
    model: models.Decoder, batch: int, prompt: int, new: int, bandwidth: float
) -> dict[str, Any]:
    """Prefill and decoding of one batch whose programs are compiled."""
    room = _room(model, prompt, new)
    arrivals = []
    start = time.perf_counter()
    for part in _parts(model, batch, prompt, new, room, 1):
        arrivals.append(time.perf_counter())
        assert [len(row) for row in part] == [_STRIDE] * batch
    draw = statistics.median(b - a for a, b in itertools.pairwise(arrivals))
    prefill = arrivals[0] - start - draw
    floor = step_bytes(model, batch, prompt + new // 2) / bandwidth
    step = draw / _STRIDE
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "prefill_tokens_per_s": _digits(batch * prompt / prefill),
        "decode_tokens_per_s": _digits(batch / step),
        "step_ms": _digits(step * 1e3),
        "floor_ms": _digits(floor * 1e3),
        "floor_fraction": _digits(floor / step),
        "bandwidth_gbps": _digits(bandwidth / 1e9),
        "device_peak_bytes": _device_memory()[1],
    }


def by_kernel(events: Sequence[Event], steps: int) -> list[tuple[str, float, float]]:
    """(kernel, runs in a step, microseconds in a step), the longest first.

    >>> by_kernel([Event(0, 2000, "a_fusion_12"), Event(9, 4000, "a_fusion"), Event(5, 1, "b")], 1)
    [('a_fusion', 2.0, 6.0), ('b', 1.0, 0.001)]
    """
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0])
    for event in events:
        entry = total[_name(event.name)]
        entry[0] += 1 / steps
        entry[1] += event.duration / 1e3 / steps
    rows = [(name, count, us) for name, (count, us) in total.items()]
    return sorted(rows, key=lambda row: -row[2])


def _name(name: str) -> str:
    """A kernel's name without the number that XLA appends; of C++ names the last words."""
    if match := re.search(r"[a-z][a-z0-9_]*_kernel", name):
        return match.group()
    return re.sub(r"(_\d+)+$", "", name)[:70]


def profile(model: models.Decoder, batch: int, prompt: int, new: int, console: Console) -> None:
    """Prints which kernels the steps of decoding consist of."""
    room = _room(model, prompt, new)
    parts = _parts(model, batch, prompt, (2 + _PROFILED) * _STRIDE, room, 2)
    next(parts)
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # behind the draw that was dispatched ahead
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            list(parts)
        rows = by_kernel(traced(folder), _PROFILED * _STRIDE)
    busy = sum(us for _, _, us in rows)
    table = Table(title=f"batch {batch}: kernels of a step, {busy:,.0f} µs", title_justify="left")
    for column in ("kernel", "runs", "µs", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for name, count, us in rows[:30]:
        table.add_row(name, f"{count:.1f}", f"{us:,.1f}", f"{us / busy:.1%}")
    console.print(table)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, action="append", help="default 1 and 64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help=f"a multiple of {_STRIDE}, at least 3")
    parser.add_argument("--warm", action="store_true", help="leave files in the page cache")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the rows")
    given = parser.parse_args(arguments)
    if given.new % _STRIDE or given.new < 3 * _STRIDE:
        sys.exit(f"--new must be a multiple of {_STRIDE}, at least {3 * _STRIDE}, got {given.new}")
    console = Console(width=120)
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / f"{benchmark.device_slug(benchmark.device_name())}.json"

    def record(row: dict[str, Any]) -> None:
        console.print(row)
        benchmark.append_rows(path, [benchmark.origin(benchmark.device_name()) | row])

    model, loaded = load(given.folder, warm=given.warm)
    record(loaded)
    about = {"model": loaded["model"], "kernels": loaded["kernels"]}
    batches = given.batch or (1, 64)
    about["compile_s"] = _digits(compile_all(model, batches, given.prompt, given.new))
    bandwidth = measure_machine(megabytes=64, matrix_size=256).bandwidth
    for batch in batches:
        record(about | measure(model, batch, given.prompt, given.new, bandwidth))
        if given.profile:
            profile(model, batch, given.prompt, given.new, console)


if __name__ == "__main__":
    main()

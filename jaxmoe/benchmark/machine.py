"""What this machine can do at best, measured in the same run: the ceilings of the floor column."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

_CACHE = 32 * 2**20  # bytes, where the system does not say


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device and its ceilings.

    Args:
      device: its name, with the number of usable cores for a CPU.
      platform: `cpu`, `gpu` or `tpu`.
      bandwidth: best read bandwidth seen, bytes/s.
      peak: best rate of a large matrix product seen, FLOP/s.
      cache_bytes: size of the last-level cache.
    """

    device: str
    platform: str
    bandwidth: float
    peak: float
    cache_bytes: int

    def floor(self, weight_bytes: float, flops: float) -> float:
        """Seconds below which nothing that reads these bytes and does these products can be."""
        return max(weight_bytes / self.bandwidth, flops / self.peak)


def measure_machine(*, megabytes: int = 256, matrix_size: int | None = None) -> Machine:
    """Measures the default device; takes about a second.

    >>> measure_machine(megabytes=8, matrix_size=128).platform in ("cpu", "gpu", "tpu")
    True

    Bandwidth is that of reading (a dot product of a long vector with itself, on every core), the
    peak that of a square matrix product by XLA, the better of float32 and bfloat16.

    Args:
      megabytes: size of what is read, in MiB; far beyond the cache for a meaningful figure.
      matrix_size: rows of the square matrices; 2048 on a CPU, 8192 elsewhere.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    size = matrix_size or (2048 if on_cpu else 8192)
    read = _host_bandwidth if on_cpu else _device_bandwidth
    return Machine(
        device=_cpu_name() if on_cpu else device.device_kind,
        platform=device.platform,
        bandwidth=read(megabytes * 2**20),
        peak=max(_matmul_rate(size, dtype) for dtype in (jnp.float32, jnp.bfloat16)),
        cache_bytes=cache_bytes(device.platform),
    )


def cache_bytes(platform: str) -> int:
    """Size of the last-level cache of this machine's CPU, or 64 MiB: other devices do not say."""
    return _last_level_cache() if platform == "cpu" else 64 * 2**20


def _best(f: Callable[[], object], repetitions: int = 5) -> float:
    f()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def _host_bandwidth(size: int) -> float:
    cores = _num_cores()
    parts = np.array_split(np.ones(size // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return size / _best(lambda: list(pool.map(lambda p: np.dot(p, p), parts)))


def _device_bandwidth(size: int) -> float:
    size *= 4
    x = jnp.ones((1024, size // 4096), jnp.float32)
    total = jax.jit(lambda x: jnp.max(x, axis=1))
    return size / _best(lambda: total(x).block_until_ready())


def _matmul_rate(size: int, dtype: jnp.dtype) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / _best(lambda: product(a, a).block_until_ready(), repetitions=3)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        name = match.group(1).strip()
    return f"{name}, {_num_cores()} cores"


def _last_level_cache() -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
            sizes.append(int(match.group(1)) * units[match.group(2)])
    return max(sizes, default=_CACHE)

"""What this machine can do at best, measured in the same run: the ceilings of the floor column."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import _processor

_CACHE = 32 * 2**20  # bytes, where the system does not say
_DEVICE_CACHE = 128 * 2**20  # no GPU here has a larger L2: 50 MB on an H100, 126 MB on a B200
_LAUNCHES = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device and its ceilings.

    Args:
      device: its name, with the number of usable cores for a CPU.
      platform: `cpu`, `gpu` or `tpu`.
      bandwidth: best read bandwidth seen, bytes/s.
      peak: best rate of a large matrix product seen, FLOP/s.
      cache_bytes: size of the last-level cache.
      peak_fp8: the same of float8 matrices; None where it was not measured.
    """

    device: str
    platform: str
    bandwidth: float
    peak: float
    cache_bytes: int
    peak_fp8: float | None = None

    def peak_of(self, compute: str) -> float:
        """The ceiling of an arithmetic: that of float8 for `w4a8` where it is known."""
        return self.peak_fp8 if compute == "w4a8" and self.peak_fp8 else self.peak

    def floor(self, weight_bytes: float, flops: float, compute: str = "w4a16") -> float:
        """Seconds below which nothing that reads these bytes and does these products can be."""
        return max(weight_bytes / self.bandwidth, flops / self.peak_of(compute))


def device_name() -> str:
    """Name of the default device, with the number of usable cores for a CPU.

    >>> bool(device_name())
    True
    """
    device = jax.local_devices()[0]
    return _processor.name() if device.platform == "cpu" else device.device_kind


def measure_machine(*, megabytes: int = 256, matrix_size: int | None = None) -> Machine:
    """Measures the default device; takes a few seconds.

    >>> measure_machine(megabytes=8, matrix_size=128).platform in ("cpu", "gpu", "tpu")
    True

    Bandwidth is that of reading: on a CPU a dot product of a long vector with itself, on every
    core; elsewhere maxima of rows, eight times as many bytes, for the best of three row lengths.
    The peak is that of a square matrix product by XLA of random numbers in bfloat16, on a CPU the
    better of that and float32. Elsewhere than on a CPU several launches are timed together, so
    that none waits for the host.

    Args:
      megabytes: size of what is read, in MiB; far beyond the cache for a meaningful figure.
      matrix_size: rows of the square matrices; 2048 on a CPU, 8192 elsewhere.
    """
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    size = matrix_size or (2048 if on_cpu else 8192)
    read = _host_bandwidth if on_cpu else _device_bandwidth
    launches = 1 if on_cpu else _LAUNCHES
    dtypes = (jnp.float32, jnp.bfloat16) if on_cpu else (jnp.bfloat16,)
    return Machine(
        device=device_name(),
        platform=device.platform,
        bandwidth=read(megabytes * 2**20),
        peak=max(_matmul_rate(size, dtype, launches) for dtype in dtypes),
        cache_bytes=cache_bytes(device.platform),
        peak_fp8=None if on_cpu else _matmul_rate(size, jnp.float8_e4m3fn, launches),
    )


def cache_bytes(platform: str) -> int:
    """Size of the last-level cache of this machine's CPU, or 64 MiB: other devices do not say."""
    return _last_level_cache() if platform == "cpu" else _DEVICE_CACHE


def _best(f: Callable[[], object], repetitions: int = 5) -> float:
    f()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)


def _host_bandwidth(size: int) -> float:
    cores = _processor.num_cores()
    parts = np.array_split(np.ones(size // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        return size / _best(lambda: list(pool.map(lambda p: np.dot(p, p), parts)))


def _device_bandwidth(size: int) -> float:
    size *= 8
    x = jnp.arange(size // 4, dtype=jnp.int32)
    # How well XLA's reduction does depends on the shape.
    return max(size / _best_launch(_row_maxima, x, length) for length in (2048, 8192, 32768))


@functools.partial(jax.jit, static_argnums=1)
def _row_maxima(x: jax.Array, length: int) -> jax.Array:
    return x.reshape(-1, length).max(axis=1)


def _matmul_rate(size: int, dtype: Any, launches: int) -> float:
    # Of random numbers: a GPU at its power limit multiplies constants faster.
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    return 2 * size**3 / _best_launch(_product, a, launches=launches, repetitions=3)


@jax.jit
def _product(a: jax.Array) -> jax.Array:
    # Both with K last, the only order in which Hopper multiplies float8.
    wide = jnp.bfloat16 if a.dtype.itemsize == 1 else a.dtype
    return jax.lax.dot_general(a, a, (((1,), (1,)), ((), ())), preferred_element_type=wide)


def _best_launch(
    f: Callable[..., jax.Array], *args: Any, launches: int = _LAUNCHES, repetitions: int = 5
) -> float:
    """Seconds of one of several launches, which run on the device one after the other."""
    return (
        _best(lambda: jax.block_until_ready([f(*args) for _ in range(launches)]), repetitions)
        / launches
    )


def _last_level_cache() -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "": 1}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()):
            sizes.append(int(match.group(1)) * units[match.group(2)])
    return max(sizes, default=_CACHE)

"""What every implementation computes: weights, tokens and routings in a folder, and the oracle.

NumPy alone, because the libraries to compare live in other environments than jaxmoe. Weights are
raw bits in canonical order (two elements a byte along K, the even one in the low nibble; scales
unswizzled) without a global scale, which not every library has.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

BLOCK_SIZE: Mapping[str, int] = MappingProxyType({"nvfp4": 16, "mxfp4": 32})
_ARRAYS = ("gate_up", "gate_up_scale", "down", "down_scale", "x", "expert_ids", "weights")
_ROWS = 512  # of a matrix that the oracle decodes at once


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer with as many tokens as are ever asked for; T tokens are the first T.

    Args:
      folder: where the arrays lie.
      layer: name of the layer.
      weight_format: `nvfp4` or `mxfp4`.
      num_experts: `E`.
      top_k: `k`.
      hidden_size: `H`.
      intermediate_size: `I`.
      weight_sets: how many copies of the weights are in rotation.
      threads: how many threads an implementation may use.
      memory: bytes that temporaries may take.
    """

    folder: Path
    layer: str
    weight_format: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    weight_sets: int
    threads: int
    memory: int

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the arrays that the properties below name, and this description beside them."""
        for name in _ARRAYS:
            np.save(self.folder / f"{name}.npy", arrays[name])
        text = json.dumps(dataclasses.asdict(self) | {"folder": str(self.folder)})
        (self.folder / "problem.json").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: os.PathLike[str] | str) -> Problem:
        """What `write` wrote."""
        text = (Path(folder) / "problem.json").read_text(encoding="utf-8")
        return cls(**json.loads(text) | {"folder": Path(folder)})

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @cached_property
    def gate_up(self) -> np.ndarray:
        """`uint8[E, 2I, H/2]`, gate rows first."""
        return self._array("gate_up")

    @cached_property
    def gate_up_scale(self) -> np.ndarray:
        """`uint8[E, 2I, H/block]`, bits of e4m3 (NVFP4) or e8m0 (MXFP4)."""
        return self._array("gate_up_scale")

    @cached_property
    def down(self) -> np.ndarray:
        """`uint8[E, H, I/2]`."""
        return self._array("down")

    @cached_property
    def down_scale(self) -> np.ndarray:
        """`uint8[E, H, I/block]`."""
        return self._array("down_scale")

    @cached_property
    def x(self) -> np.ndarray:
        """`float32[T, H]`, each value one of bfloat16."""
        return self._array("x")

    @cached_property
    def expert_ids(self) -> np.ndarray:
        """`int32[routings, T, k]`."""
        return self._array("expert_ids")

    @cached_property
    def weights(self) -> np.ndarray:
        """`float32[routings, T, k]`."""
        return self._array("weights")

    @property
    def routings(self) -> int:
        """Routings in rotation."""
        return len(self.expert_ids)


def _minifloat(codes: np.ndarray, mantissa_bits: int, bias: int) -> np.ndarray:
    """Value of exponent | mantissa, with subnormals."""
    exponent, mantissa = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    significand = mantissa + ((exponent > 0) << mantissa_bits)
    return np.ldexp(significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)


def _pairs() -> np.ndarray:
    """`float64[256, 2]`: the two e2m1 numbers in a byte."""
    codes = np.arange(16)
    values = np.where(codes & 8, -1.0, 1.0) * _minifloat(codes & 7, 1, 1)
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1)


_PAIRS = _pairs()
_SCALE = {
    "nvfp4": _minifloat(np.arange(128), 3, 7),
    "mxfp4": np.ldexp(1.0, np.arange(256) - 127),
}


def decode(packed: np.ndarray, scale: np.ndarray, weight_format: str) -> np.ndarray:
    """`float64[N, K]` from `uint8[N, K/2]` and the bits of scales `uint8[N, K/block]`."""
    values = _PAIRS[packed].reshape(*scale.shape, BLOCK_SIZE[weight_format])
    return (values * _SCALE[weight_format][scale][..., None]).reshape(len(packed), -1)


def oracle(problem: Problem, rows: Sequence[int]) -> np.ndarray:
    """`float64[len(rows), H]`: the layer at some of the tokens, with the first routing."""
    x = np.asarray(problem.x[rows], np.float64)
    ids, weights = problem.expert_ids[0][rows], problem.weights[0][rows].astype(np.float64)

    def product(x: np.ndarray, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
        parts = [
            x @ decode(packed[n : n + _ROWS], scale[n : n + _ROWS], problem.weight_format).T
            for n in range(0, len(packed), _ROWS)
        ]
        return np.concatenate(parts, axis=1)

    def expert(e: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, choice = np.nonzero(ids == e)
        gate_up = product(x[tokens], problem.gate_up[e], problem.gate_up_scale[e])
        gate, up = np.split(gate_up, 2, axis=1)
        h = gate / (1 + np.exp(-gate)) * up
        y = product(h, problem.down[e], problem.down_scale[e])
        return tokens, y * weights[tokens, choice][:, None]

    result = np.zeros(x.shape)
    with ThreadPoolExecutor(problem.threads) as pool:
        for tokens, y in pool.map(expert, np.unique(ids)):
            result[tokens] += y
    return result


def use_huge_pages(address: int, size: int) -> None:
    """Moves memory to pages of 2 MiB, as `jaxmoe.prepare` does with what it makes, if it can be."""
    page = 2 << 20
    begin, end = -(-address // page) * page, (address + size) // page * page
    if begin < end:
        collapse = 25  # MADV_COLLAPSE of Linux
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(collapse))


class NotOfferedError(Exception):
    """The library has nothing that computes this problem, for the reason given."""

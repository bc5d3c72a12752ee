"""Stands in for `jaxmoe.checkpoint.open_folder`: unquantised safetensors folders only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe import checkpoint
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.experts import ExpertWeights
from jaxmoe.quantization import quantize as quantize_array


class Folder:
    """A folder of plain tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        except OSError as error:
            raise CheckpointError(
                path / "config.json", f"cannot be opened: {error.strerror}"
            ) from error
        self.tensors: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            self.tensors.update(checkpoint.load(file))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            raise CheckpointError(self.path, f"holds no tensor {name!r}")
        return np.asarray(self.tensors[name])

    def linear(self, prefix: str) -> np.ndarray:
        return self.tensor(f"{prefix}.weight")

    def experts(
        self,
        prefix: str,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        *,
        num_experts: int,
        dtype: Any = jnp.bfloat16,
        quantize: str | None = None,
    ) -> ExpertWeights:
        bias: Any = (None, None)
        if f"{prefix}.gate_up_proj" in self:
            gate_up = self.tensor(f"{prefix}.gate_up_proj").swapaxes(1, 2)
            down = self.tensor(f"{prefix}.down_proj").swapaxes(1, 2)
            if f"{prefix}.gate_up_proj_bias" in self:
                gate_up = np.concatenate([gate_up[:, 0::2], gate_up[:, 1::2]], 1)
                rows = self.tensor(f"{prefix}.gate_up_proj_bias").astype(np.float32)
                rows = np.concatenate([rows[:, 0::2], rows[:, 1::2]], 1)
                bias = (rows, self.tensor(f"{prefix}.down_proj_bias").astype(np.float32))
        else:
            gate, up, down = (
                np.stack([self.linear(f"{prefix}.{e}.{name}") for e in range(num_experts)])
                for name in names
            )
            gate_up = np.concatenate([gate, up], 1)
        weights: list[Any] = [
            jnp.asarray(w, jnp.float32 if quantize else dtype) for w in (gate_up, down)
        ]
        if quantize:
            weights = [quantize_array(w, quantize) for w in weights]
        return ExpertWeights(*weights, *(None if b is None else jnp.asarray(b) for b in bias))


@contextlib.contextmanager
def open_folder(path: str | os.PathLike[str]) -> Iterator[Folder]:
    """Opens a folder with config.json and safetensors files."""
    yield Folder(Path(path))

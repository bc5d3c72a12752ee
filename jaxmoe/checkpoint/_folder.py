"""A Hugging Face folder: its configuration and its weights, whatever their storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxmoe._quantize import quantize as quantize_matrix
from jaxmoe.checkpoint import _experts
from jaxmoe.checkpoint._experts import LoadedExperts
from jaxmoe.checkpoint._file import quantized_formats
from jaxmoe.checkpoint._safetensors import CheckpointError, Entry, Header
from jaxmoe.checkpoint._scheme import Scheme, own_scheme, read_scheme
from jaxmoe.checkpoint._shards import Shard, open_shards, read_json
from jaxmoe.checkpoint._storage import (
    FLOATS,
    Storage,
    StorageError,
    check_parts,
    read_input_scale,
    read_weight,
)
from jaxmoe.experts import ExpertWeights
from jaxmoe.formats import BFLOAT16, Format, get_format
from jaxmoe.quantization import QuantizedTensor

Weight = QuantizedTensor | np.ndarray


def open_folder(path: os.PathLike[str] | str) -> Folder:
    """Opens a folder with `config.json` and safetensors files, as Hugging Face lays them out.

    >>> import json, pathlib, tempfile, numpy as np
    >>> import jaxmoe.checkpoint
    >>> path = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    >>> jaxmoe.checkpoint.save(path / "model.safetensors", {"norm.weight": np.ones(4, np.float32)})
    >>> with open_folder(path) as folder:
    ...     folder.names, folder.scheme, folder.tensor("norm.weight").shape
    (('norm.weight',), None, (4,))

    Only headers are read. Weights may be plain (F16, BF16, F32), ModelOpt NVFP4, MXFP4 or FP8,
    compressed-tensors `nvfp4-pack-quantized` or `mxfp4-pack-quantized`, gpt-oss MXFP4, FP8 with
    block scales (DeepSeek), or jaxmoe's own layout.

    Args:
      path: the folder.

    Returns:
      The open `Folder`, a context manager.

    Raises:
      CheckpointError: if files are missing or damaged, the weights are pickled, or they are
        quantised by a scheme that is not supported.
    """
    return Folder(Path(path))


class Folder:
    """An open checkpoint folder; made by `open_folder`.

    Attributes:
      path: the folder.
      config: what config.json holds.
      names: the names of all tensors, sorted.
      scheme: what is quantised, and how; None if nothing is.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise CheckpointError(path, "must be a folder with config.json and safetensors files")
        self.path = path
        self._files: list[Shard]
        self._shards: dict[str, Shard]
        self._files, self._shards = open_shards(path)
        try:
            self.config: dict[str, Any] = read_json(path / "config.json")
            separate = path / "hf_quant_config.json"
            scheme = read_scheme(
                path, self.config, read_json(separate) if separate.exists() else None
            )
            self.scheme: Scheme | None = scheme or self._own_scheme()
        except BaseException:
            self.close()
            raise
        self.names: tuple[str, ...] = tuple(sorted(self._shards))
        self._entries = {n: shard.header.entries[n] for n, shard in self._shards.items()}

    def _own_scheme(self) -> Scheme | None:
        formats: dict[str, None] = {}
        for shard in self._files:
            formats |= dict.fromkeys(quantized_formats(shard.path, shard.header).values())
        return own_scheme(tuple(formats)) if formats else None

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r}, {len(self.names)} tensors, {self.scheme or 'plain'})"

    def close(self) -> None:
        """Closes the files; arrays that were handed out stay valid."""
        for shard in self._files:
            shard.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files."""
        return tuple(shard.path for shard in self._files)

    def header(self, path: Path) -> Header:
        """What one of `files` holds."""
        return next(shard.header for shard in self._files if shard.path == path)

    def entry(self, name: str) -> Entry:
        """Dtype, shape and size of a tensor, from the header.

        Raises:
          CheckpointError: if there is no such tensor.
        """
        return self._entries[self._known(name)]

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._shards[self._known(name)].path

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as it is stored, mapped into memory: nothing is copied or converted.

        >>> folder.tensor("model.norm.weight").dtype                           # doctest: +SKIP
        dtype(bfloat16)

        Returns:
          A read-only array; `ml_dtypes` types for bf16 and 8-bit floats.

        Raises:
          CheckpointError: if there is no such tensor.
        """
        return self._shards[self._known(name)].map(name)

    def _known(self, name: str) -> str:
        if name not in self._shards:
            raise CheckpointError(self.path, f"holds no tensor {name!r}")
        return name

    def error(self, name: str, cause: str) -> CheckpointError:
        """An error about one tensor, which names its file."""
        return CheckpointError(self._shards[name].path, f"tensor {name!r} {cause}")

    def storage(self, module: str, ending: str = ".weight") -> Storage | None:
        """How the weight of a module is stored; None for a plain one.

        Args:
          module: the module's name.
          ending: what a plain weight's name has after the module's; "" for a fused tensor.

        Raises:
          CheckpointError: if there is no such weight, parts are missing or do not fit, or the
            configuration contradicts the tensors.
        """
        plain = module + ending
        storage = self._quantized_storage(module, ending)
        if storage is None:
            if plain not in self._shards:
                raise CheckpointError(self.path, f"holds no weight {plain!r}, plain or quantised")
            entry = self._entries[plain]
            if entry.dtype not in FLOATS:
                lacks = "scales" if self.scheme else "quantization_config in config.json"
                raise self.error(plain, f"is {entry} without {lacks}; it is not read as dense")
            return None
        if plain in self._shards and plain != module + storage.data:
            raise self.error(plain, f"stands beside {module + storage.data!r}; remove one of them")
        assert self.scheme is not None
        if pattern := self.scheme.excludes(module):
            raise self.error(
                module + storage.data,
                f"is quantised, but {self.scheme.source} excludes it by {pattern!r}",
            )
        try:
            check_parts(storage, module, self._entries, self.scheme.block)
        except StorageError as error:
            raise self._named(error) from error
        return storage

    def _quantized_storage(self, module: str, ending: str) -> Storage | None:
        """The scheme's storage that this module's tensors look like, by their names and dtypes."""
        likely: list[tuple[int, Storage]] = []
        for storage in self.scheme.storages if self.scheme else ():
            data = self._entries.get(module + storage.data)
            if data is None or (storage.data == ending and data.dtype in FLOATS):
                continue
            scale = self._entries.get(module + storage.scale)
            fits = (data.dtype == storage.data_dtype) + (
                scale is not None and scale.dtype in storage.scale_dtypes
            )
            likely.append((fits, storage))
        if likely:
            return max(likely, key=lambda candidate: candidate[0])[1]
        for storage in self.scheme.storages if self.scheme else ():
            if module + storage.scale in self._shards:
                raise self.error(
                    module + storage.scale, f"belongs to no {storage.name} weight {module!r}"
                )
        return None

    def _named(self, error: StorageError) -> CheckpointError:
        return self.error(error.tensor, str(error))

    def matrix(
        self,
        module: str,
        index: int | None = None,
        *,
        ending: str = ".weight",
        dtype: Any = BFLOAT16,
    ) -> Weight:
        """A weight in host memory: a `QuantizedTensor` of NumPy arrays, or an array.

        Args:
          module: the module's name.
          index: which matrix of a stack; None for the whole weight.
          ending: as for `storage`.
          dtype: of FP8, which is dequantised.

        Raises:
          CheckpointError: if the weight is not there, or damaged.
        """
        storage = self.storage(module, ending)
        if storage is None:
            return self._read(module + ending, index)
        assert self.scheme is not None
        try:
            return read_weight(
                storage, module, lambda name: self._read(name, index), self.scheme.block, dtype
            )
        except StorageError as error:
            raise self._named(error) from error

    def _read(self, name: str, index: int | None = None) -> np.ndarray:
        return self._shards[name].read(name, index)

    def linear(
        self, prefix: str, *, dtype: Any = BFLOAT16, quantize: str | Format | None = None
    ) -> QuantizedTensor | np.ndarray:
        """A module's weight `[N, K]` by the module's name, whatever its storage.

        >>> folder.linear("model.layers.0.self_attn.q_proj").shape             # doctest: +SKIP
        (4096, 2048)

        Args:
          prefix: the module's name; a plain weight is `<prefix>.weight`.
          dtype: of an FP8 weight, which is dequantised (product in f32, then rounded). Plain
            weights stay as they are stored.
          quantize: a format for weights that are not FP4; they are quantised by jaxmoe's rule.

        Returns:
          A read-only array mapped from the file for a plain weight, an array in `dtype` for FP8, a
          `QuantizedTensor` for FP4. Elements and block scales have the file's bits; a global scale
          that is stored as its reciprocal is the reciprocal, rounded once to f32.

        Raises:
          CheckpointError: if there is no such weight, parts are missing, their dtypes, shapes or
            values make no sense, or the configuration contradicts the tensors.
        """
        if quantize is None and self.storage(prefix) is None:
            return self.tensor(f"{prefix}.weight")
        weight = self.matrix(prefix, dtype=np.float32 if quantize else dtype)
        if isinstance(weight, np.ndarray):
            return weight if quantize is None else self.requantize(weight, quantize, prefix)
        return jax.tree.map(jnp.asarray, weight)

    def requantize(self, weight: np.ndarray, format: str | Format, module: str) -> QuantizedTensor:
        """Quantises a matrix of this folder; values that are not finite are an error.

        Raises:
          CheckpointError: if the matrix has such values, or no whole blocks.
        """
        size = get_format(format).block_size
        if size and weight.shape[-1] % size:
            raise CheckpointError(
                self.path,
                f"{module!r} of shape {list(weight.shape)} cannot be {get_format(format)}: its "
                f"last axis must be a multiple of {size}",
            )
        values = weight.astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(self.path, f"{module!r} has values that are not finite")
        return quantize_matrix(values, format, nonfinite="saturate")

    def input_scale(self, prefix: str) -> float | None:
        """The scale of a module's quantised activations, as a factor of the decoded value.

        Returns:
          ModelOpt's `input_scale`, or the reciprocal of `input_global_scale`; None if the
          checkpoint has none, so that the scale is found from the activations.

        Raises:
          CheckpointError: if it is not finite and positive.
        """
        storage = self._quantized_storage(prefix, ".weight")
        if storage is None or storage.input_scale is None:
            return None
        if prefix + storage.input_scale not in self._shards:
            return None
        try:
            return float(read_input_scale(storage, prefix, self._read))
        except StorageError as error:
            raise self._named(error) from error

    def experts(
        self,
        prefix: str,
        names: Sequence[str | None] = ("gate_proj", "up_proj", "down_proj"),
        *,
        num_experts: int,
        dtype: Any = BFLOAT16,
        quantize: str | Format | None = None,
        transposed: bool | None = None,
        interleaved: bool | None = None,
        sharding: Sharding | None = None,
    ) -> ExpertWeights:
        """The weights of all experts of a layer, stacked in jaxmoe's canonical order.

        >>> folder.experts("model.layers.0.mlp.experts", num_experts=128)      # doctest: +SKIP

        Experts are read and put where they belong. Where the device is the host, that is one at a
        time: the peak of memory is the result and that expert, once as read and once joined or on
        its way (measured: under three experts' bytes). Elsewhere threads read ahead of the device,
        as many experts each as fit into 16 MiB, but at least one. With `quantize`, each expert that
        is being read is there in f32 as well.

        Args:
          prefix: the name before the experts' numbers, `<prefix>.<e>.<name>.weight`, or before the
            fused tensors `<prefix>.gate_up_proj` and `<prefix>.down_proj` (also with `_blocks`,
            `_scales` and `_bias`).
          names: modules of the gate, up and down matrices; None for the gate of experts that have
            none. Mixtral has ("w1", "w3", "w2").
          num_experts: how many there must be.
          dtype: as for `linear`; plain weights are converted to it too.
          quantize: as for `linear`. Gate and up share their global scale.
          transposed: whether plain fused tensors are `[E, H, 2I]` and `[E, I, H]` instead of
            `[E, 2I, H]` and `[E, H, I]`; None goes by the config's model_type.
          interleaved: whether fused gate and up rows alternate; None goes by the model_type.
          sharding: of the experts' axis, over a mesh; each expert then goes to its devices alone,
            and experts of other hosts are not read. None puts all on the default device.

        Returns:
          The weights: FP4 as `QuantizedTensor`s, else arrays in `dtype`; biases in f32. FP4 weights
          of the checkpoint have its static input scales, the largest of all experts', and declare
          the arithmetic that it was made for (`scheme.compute`).

        Raises:
          CheckpointError: as for `linear`, or if experts are missing or differ in kind.
        """
        return self.load_experts(
            prefix,
            names,
            num_experts=num_experts,
            dtype=dtype,
            quantize=quantize,
            transposed=transposed,
            interleaved=interleaved,
            sharding=sharding,
        ).weights

    def load_experts(
        self,
        prefix: str,
        names: Sequence[str | None] = ("gate_proj", "up_proj", "down_proj"),
        *,
        num_experts: int,
        dtype: Any = BFLOAT16,
        quantize: str | Format | None = None,
        transposed: bool | None = None,
        interleaved: bool | None = None,
        sharding: Sharding | None = None,
    ) -> LoadedExperts:
        """As `experts`, with what else the checkpoint says and what had to be changed.

        >>> loaded = folder.load_experts("model.layers.0.mlp.experts",         # doctest: +SKIP
        ...                              num_experts=128)
        >>> loaded.report                                                      # doctest: +SKIP

        Returns:
          The weights, and the report of `unify_global_scale` if gate and up had different global
          scales.
        """
        return _experts.load(
            self, prefix, names, num_experts, dtype, quantize, transposed, interleaved, sharding
        )

"""The experts of a layer, read one by one and put where they belong."""

from __future__ import annotations

import abc
import bisect
import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxmoe.capability.table import COMPUTE
from jaxmoe.checkpoint._safetensors import CheckpointError
from jaxmoe.checkpoint._storage import GPT_OSS, Storage
from jaxmoe.experts import ExpertWeights, check_input_scale
from jaxmoe.formats import Format
from jaxmoe.quantization import QuantizedTensor, UnifyReport, unify_global_scale

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jaxmoe.checkpoint._folder import Folder, Weight

_LOG = logging.getLogger("jaxmoe")

# What is read ahead for a device that is not the host, by each of the threads: as many experts as
# fit into these bytes, but at least one.
_GROUP = 16 * 2**20
_THREADS = 6

_Read: TypeAlias = "tuple[list[np.ndarray], list[UnifyReport | None]]"

FUSED_ORDER = {
    "gpt_oss": (True, True),
    "llama4": (True, False),
    "llama4_text": (True, False),
    "qwen3_vl_moe": (True, False),
    "qwen3_vl_moe_text": (True, False),
}
"""Whether plain fused tensors are transposed and interleaved, for model types where they are."""


@dataclass(frozen=True)
class LoadedExperts:
    """The experts of one layer as a checkpoint has them.

    Args:
      weights: stacked, in canonical order. FP4 weights come with what the checkpoint declares: the
        arithmetic that they were made for, and static scales of the activations, each the largest
        of all experts' (also of those that are on other hosts).
      report: what the unification of gate's and up's global scales changed, one entry for each
        expert; None if they were equal. Zeros for experts of other hosts.
    """

    weights: ExpertWeights
    report: UnifyReport | None = None


def load(
    folder: Folder,
    prefix: str,
    names: Sequence[str | None],
    num_experts: int,
    dtype: Any,
    quantize: str | Format | None,
    transposed: bool | None,
    interleaved: bool | None,
    sharding: Sharding | None,
) -> LoadedExperts:
    """See `Folder.load_experts`."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    gate, up, down = names if len(names) == 3 else (None, None, None)
    if up is None or down is None:
        raise ValueError(f"names must be (gate or None, up, down), got {tuple(names)!r}")
    options = _Options(dtype, quantize)
    source: _Source
    if any(f"{prefix}.gate_up_proj{ending}" in folder for ending in ("", "_blocks", ".data")):
        order = FUSED_ORDER.get(str(folder.config.get("model_type")), (False, False))
        if f"{prefix}.gate_up_proj_blocks" in folder:
            order = FUSED_ORDER["gpt_oss"]
        source = _Fused(
            folder, prefix, num_experts, options,
            order[0] if transposed is None else transposed,
            order[1] if interleaved is None else interleaved,
        )  # fmt: skip
    else:
        source = _Separate(folder, prefix, num_experts, options, gate, up, down)
    return _stream(source, sharding)


def _stream(source: _Source, sharding: Sharding | None) -> LoadedExperts:
    count = source.num_experts
    if isinstance(sharding, NamedSharding) and any(axes is not None for axes in sharding.spec[1:]):
        raise ValueError(
            f"sharding must split the experts' axis alone, got {sharding.spec}; use "
            "NamedSharding(mesh, PartitionSpec(axis))"
        )
    max_error = np.zeros(count, np.float32)
    relative_l2 = np.zeros(count, np.float32)
    unified = False
    first, *others = _local_experts(sharding, count)
    example, report = source.expert(first)
    leaves, structure = jax.tree.flatten(example)
    kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
    stacks = _Stacks(count, leaves, sharding)

    def read(experts: Sequence[int]) -> tuple[list[np.ndarray], list[UnifyReport | None]]:
        """Some experts' leaves, stacked."""
        parts, reports = [], []
        for e in experts:
            expert, report = source.expert(e)
            leaves = jax.tree.leaves(expert)
            found = [(leaf.shape, leaf.dtype) for leaf in leaves]
            if (jax.tree.structure(expert), found) != (structure, kinds):
                raise CheckpointError(
                    source.folder.path,
                    f"expert {e} of {source.prefix!r} differs from expert {first} in its shapes, "
                    "formats or biases; all experts of a layer must be alike",
                )
            parts.append(leaves)
            reports.append(report)
        return [_stacked(part) for part in zip(*parts, strict=True)], reports

    reports = [(first, report)]
    stacks.put(first, [leaf[None] for leaf in leaves])
    size = sum(leaf.nbytes for leaf in leaves)
    del example, leaves
    for experts, (part, found) in _read_ahead(read, others, size, stacks.on_host):
        stacks.put(experts[0], part)
        del part
        reports += zip(experts, found, strict=True)
    for e, report in reports:
        if report is not None:
            unified = True
            max_error[e], relative_l2[e] = report.max_error, report.relative_l2
    weights = source.declare(jax.tree.unflatten(structure, stacks.result()), sharding)
    report = UnifyReport(max_error, relative_l2) if unified else None
    if report is not None:
        _LOG.warning("%s: %s: %s", source.folder.path, source.prefix, report)
    return LoadedExperts(weights, report)


def _stacked(leaves: Sequence[np.ndarray]) -> np.ndarray:
    return leaves[0][None] if len(leaves) == 1 else np.stack(leaves)


def _read_ahead(
    read: Callable[[Sequence[int]], _Read], experts: Sequence[int], size: int, on_host: bool
) -> Iterator[tuple[Sequence[int], _Read]]:
    """Yields (neighbouring experts, what `read` makes of them), in order.

    Where the device is the host: one expert at a time, which is read when it is asked for.
    Elsewhere several at a time, some of them read ahead by threads.

    Args:
      read: reads experts.
      experts: all of them, sorted.
      size: bytes of an expert.
      on_host: whether the device is the host.
    """
    if on_host:
        for e in experts:
            yield (e,), read((e,))
        return
    from concurrent.futures import ThreadPoolExecutor  # JAX has not loaded it

    most = 1 << max(0, (_GROUP // max(1, size)).bit_length() - 1)
    config: Any = jax.config
    device = config.jax_default_device  # which threads do not inherit

    def work(group: Sequence[int]) -> _Read:
        with jax.default_device(device):
            return read(group)

    pool = ThreadPoolExecutor(_THREADS)
    waiting: deque[tuple[Sequence[int], Future[_Read]]] = deque()
    try:
        for group in _groups(experts, most):
            waiting.append((group, pool.submit(work, group)))
            if len(waiting) > _THREADS:
                ready, future = waiting.popleft()
                yield ready, future.result()
                del future
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(experts: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """Neighbours, at most so many."""
    start = 0
    for i, e in enumerate(experts):
        if i - start == most or (i > start and e != experts[i - 1] + 1):
            yield experts[start:i]
            start = i
    if start < len(experts):
        yield experts[start:]


def _local_experts(sharding: Sharding | None, count: int) -> list[int]:
    return sorted(set().union(*_owned(sharding, (count,)).values()))


def _owned(sharding: Sharding | None, shape: tuple[int, ...]) -> dict[Any, range]:
    """The experts of each device of this host; None stands for the default device."""
    if sharding is None:
        return {None: range(shape[0])}
    return {
        device: range(shape[0]) if index is None else range(*index[0].indices(shape[0]))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


class _Stacks:
    """Arrays `[E, ...]` over the devices of a sharding, filled some experts at a time.

    Attributes:
      on_host: whether a device is the host.
    """

    def __init__(self, count: int, leaves: Sequence[np.ndarray], sharding: Sharding | None):
        self.shapes = [(count, *leaf.shape) for leaf in leaves]
        self.sharding = sharding
        self.parts: dict[Any, tuple[range, list[jax.Array]]] = {
            device: (
                owned,
                [jnp.zeros((len(owned), *a.shape), a.dtype, device=device) for a in leaves],
            )
            for device, owned in _owned(sharding, (count,)).items()
        }
        self.sent: list[Any] = []
        self.on_host = any(
            device.platform == "cpu" for _, a in self.parts.values() for device in a[0].devices()
        )

    def put(self, e: int, leaves: Sequence[np.ndarray]) -> None:
        """Puts experts from `e` on, leaves `[experts, ...]`, where they belong."""
        sent = []
        for device, (owned, buffers) in self.parts.items():
            start, stop = max(e, owned.start), min(e + len(leaves[0]), owned.stop)
            if start < stop:
                mine = [leaf[start - e : stop - e] for leaf in leaves]
                values, at = jax.device_put((mine, np.int32(start - owned.start)), device)
                buffers = _set(buffers, values, at)
                self.parts[device] = owned, buffers
                sent.append(buffers if self.on_host else values)
        # Awaited, so that the host holds no more than what was read ahead: at once where it is the
        # device, else while the next experts are on their way.
        jax.block_until_ready(sent if self.on_host else self.sent)
        self.sent = sent

    def result(self) -> list[jax.Array]:
        """The arrays."""
        columns = zip(*(buffers for _, buffers in self.parts.values()), strict=True)
        if self.sharding is None:  # as from jnp.asarray: not committed to the device
            return [column[0] for column in columns]
        return [
            jax.make_array_from_single_device_arrays(shape, self.sharding, list(column))
            for shape, column in zip(self.shapes, columns, strict=True)
        ]


@partial(jax.jit, donate_argnums=0)
def _set(buffers: list[jax.Array], values: list[jax.Array], at: jax.Array) -> list[jax.Array]:
    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        # As unsigned integers: XLA's CPU backend converts the whole of a narrow float array
        # otherwise.
        bits = jnp.dtype(f"uint{8 * buffer.dtype.itemsize}")
        old, new = (lax.bitcast_convert_type(array, bits) for array in (buffer, value))
        put = lax.dynamic_update_slice_in_dim(old, new, at, 0)
        return lax.bitcast_convert_type(put, buffer.dtype)

    return list(map(put, buffers, values))


@dataclass(frozen=True)
class _Options:
    dtype: Any
    quantize: str | Format | None


@dataclass(frozen=True)
class _Source(abc.ABC):
    """Where the experts of a layer come from."""

    folder: Folder
    prefix: str
    num_experts: int
    options: _Options

    @abc.abstractmethod
    def expert(self, e: int) -> tuple[ExpertWeights, UnifyReport | None]:
        """The weights of one expert, without the experts' axis, in host memory."""

    @abc.abstractmethod
    def storage(self) -> Storage | None:
        """How the experts are stored; None for plain ones."""

    def input_scales(self) -> tuple[float | None, float | None]:
        """The largest scales of the activations before the two products."""
        return None, None

    def declare(self, weights: ExpertWeights, sharding: Sharding | None) -> ExpertWeights:
        """Adds what the checkpoint says about arithmetic; nothing where weights were plain or FP8.

        One scale serves all experts of a layer, since a kernel quantises a token once for all of
        its experts: the largest, as vLLM and TensorRT-LLM take it, with which none saturates.
        """
        scheme, storage = self.folder.scheme, self.storage()
        if scheme is None or storage is None or storage.format is None:
            return weights
        known = scheme.compute in COMPUTE[weights.format.name]
        everywhere = None
        if isinstance(sharding, NamedSharding):
            everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        placed = []
        for scale, name in zip(self.input_scales(), ("gate and up", "down"), strict=True):
            if scale is not None:
                try:
                    check_input_scale(np.float32(scale), f"the input scale of {name}")
                except ValueError as error:
                    raise CheckpointError(self.folder.path, f"{self.prefix}: {error}") from error
            placed.append(None if scale is None else jax.device_put(np.float32(scale), everywhere))
        return dataclasses.replace(
            weights,
            gate_up_input_scale=placed[0],
            down_input_scale=placed[1],
            declared_compute=scheme.compute if known else None,
        )

    def assemble(
        self,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: np.ndarray | None,
        down_bias: np.ndarray | None,
        modules: Sequence[str],
    ) -> ExpertWeights:
        """One expert, after a look at its biases; `modules` begin and end with what to name."""
        for bias, weight, module in (
            (gate_up_bias, gate_up, modules[0]),
            (down_bias, down, modules[-1]),
        ):
            if bias is not None and bias.shape != (weight.shape[0],):
                raise CheckpointError(
                    self.folder.path,
                    f"the bias of {module!r} must have shape {[weight.shape[0]]}, got "
                    f"{list(bias.shape)}",
                )
        parts: dict[str, Any] = {
            "gate_up": self.finish(gate_up, modules[0]),
            "down": self.finish(down, modules[-1]),
            "gate_up_bias": gate_up_bias,
            "down_bias": down_bias,
        }
        return ExpertWeights(**parts)

    def finish(self, weight: Weight, module: str) -> Weight:
        """Quantises or converts a weight that is not FP4."""
        if isinstance(weight, QuantizedTensor):
            return weight
        if self.options.quantize is None:
            return weight.astype(self.options.dtype)
        quantized = self.folder.requantize(weight, self.options.quantize, module)
        return jax.tree.map(np.asarray, quantized)

    def read_dtype(self) -> Any:
        """The dtype for FP8 weights, which are rounded to a plain dtype only if they stay plain."""
        return self.options.dtype if self.options.quantize is None else np.float32


@dataclass(frozen=True)
class _Separate(_Source):
    """Modules `<prefix>.<e>.<name>`."""

    gate: str | None
    up: str
    down: str

    def __post_init__(self) -> None:
        names = self.folder.names  # sorted
        start, end = (bisect.bisect_left(names, self.prefix + mark) for mark in "./")
        present = {
            int(number)
            for name in names[start:end]
            for number in [name[len(self.prefix) + 1 :].partition(".")[0]]
            if number.isdecimal()
        }
        if missing := set(range(self.num_experts)) - present:
            raise CheckpointError(
                self.folder.path,
                f"holds no expert {self.prefix}.{min(missing)} ({len(present)} of "
                f"{self.num_experts} are there)",
            )
        if extra := present - set(range(self.num_experts)):
            raise CheckpointError(
                self.folder.path,
                f"holds {self.prefix}.{min(extra)}, but the layer has {self.num_experts} experts",
            )

    def _module(self, e: int, name: str) -> str:
        return f"{self.prefix}.{e}.{name}"

    def _bias(self, e: int, name: str) -> np.ndarray | None:
        bias = f"{self._module(e, name)}.bias"
        return self.folder.tensor(bias).astype(np.float32) if bias in self.folder else None

    def expert(self, e: int) -> tuple[ExpertWeights, UnifyReport | None]:
        names = [name for name in (self.gate, self.up) if name is not None]
        modules = [self._module(e, name) for name in (*names, self.down)]
        gate_up, report = self._gate_up(modules)  # gate and up alone are gone before down is read
        down = self._matrix(modules[-1])
        _check_fit(self.folder, gate_up, down, len(names), modules[-1])
        biases = [self._bias(e, name) for name in names]
        given = [bias for bias in biases if bias is not None]
        if len(given) not in (0, len(biases)):
            raise CheckpointError(
                self.folder.path,
                f"{modules[0]!r} and {modules[1]!r} must both have a bias, or none",
            )
        bias = np.concatenate(given) if given else None
        return self.assemble(gate_up, down, bias, self._bias(e, self.down), modules), report

    def _gate_up(self, modules: list[str]) -> tuple[Weight, UnifyReport | None]:
        upper = [self._matrix(module) for module in modules[:-1]]
        return (
            _join(self.folder, upper[0], upper[1], modules) if len(upper) == 2 else (upper[0], None)
        )

    def _matrix(self, module: str) -> Weight:
        weight = self.folder.matrix(module, dtype=self.read_dtype())
        if weight.ndim != 2:
            raise CheckpointError(
                self.folder.path, f"{module!r} must have 2 axes, got shape {list(weight.shape)}"
            )
        return weight

    def storage(self) -> Storage | None:
        return self.folder.storage(self._module(0, self.down))

    def input_scales(self) -> tuple[float | None, float | None]:
        upper = [name for name in (self.gate, self.up) if name is not None]
        return self._largest(upper), self._largest([self.down])

    def _largest(self, names: list[str]) -> float | None:
        modules = [self._module(e, name) for e in range(self.num_experts) for name in names]
        scales = [self.folder.input_scale(module) for module in modules]
        present = [scale for scale in scales if scale is not None]
        if present and len(present) < len(scales):
            _LOG.warning(
                "%s: %s: %d of %d activation scales are missing; the largest of the others is used",
                self.folder.path, self.prefix, len(scales) - len(present), len(scales),
            )  # fmt: skip
        return max(present, default=None)


@dataclass(frozen=True)
class _Fused(_Source):
    """Tensors `<prefix>.gate_up_proj` and `<prefix>.down_proj` with all experts."""

    transposed: bool
    interleaved: bool

    def storage(self) -> Storage | None:
        return self.folder.storage(f"{self.prefix}.down_proj", "")

    def expert(self, e: int) -> tuple[ExpertWeights, UnifyReport | None]:
        gate_up, down = (self._matrix(e, name) for name in ("gate_up_proj", "down_proj"))
        bias = self._bias(e, "gate_up_proj")
        if self.interleaved:
            gate_up = jax.tree.map(_apart, gate_up)
            bias = None if bias is None else _apart(bias)
        _check_fit(self.folder, gate_up, down, 2, f"{self.prefix}.down_proj")
        self._check_hidden(down)
        names = [f"{self.prefix}.{name}" for name in ("gate_up_proj", "down_proj")]
        return self.assemble(gate_up, down, bias, self._bias(e, "down_proj"), names), None

    def _matrix(self, e: int, name: str) -> Weight:
        module = f"{self.prefix}.{name}"
        storage = self.folder.storage(module, "")
        data = module + (storage.data if storage else "")
        entry = self.folder.entry(data)
        rank = 4 if storage is GPT_OSS else 3
        if len(entry.shape) != rank or entry.shape[0] != self.num_experts:
            raise self.folder.error(
                data, f"must have {rank} axes and {self.num_experts} experts, got {entry}"
            )
        weight = self.folder.matrix(module, e, ending="", dtype=self.read_dtype())
        if not self.transposed or storage is GPT_OSS:
            return weight
        if isinstance(weight, QuantizedTensor):
            raise self.folder.error(
                data, "is quantised along the wrong axis: this model stores weights transposed"
            )
        return np.ascontiguousarray(weight.T)

    def _bias(self, e: int, name: str) -> np.ndarray | None:
        bias = f"{self.prefix}.{name}_bias"
        if bias not in self.folder:
            return None
        entry = self.folder.entry(bias)
        if len(entry.shape) != 2 or entry.shape[0] != self.num_experts:
            raise self.folder.error(
                bias, f"must have 2 axes and {self.num_experts} experts, got {entry}"
            )
        return self.folder.tensor(bias)[e].astype(np.float32)

    def _check_hidden(self, down: Weight) -> None:
        config = self.folder.config
        hidden = config.get("hidden_size", (config.get("text_config") or {}).get("hidden_size"))
        if hidden is not None and down.shape[0] != hidden:
            raise CheckpointError(
                self.folder.path,
                f"{self.prefix}.down_proj gives {down.shape[0]} values, not hidden_size {hidden}; "
                f"pass transposed={not self.transposed} if the axes are the other way round",
            )


def _apart(rows: np.ndarray) -> np.ndarray:
    """Even rows (gate), then odd rows (up)."""
    return rows if rows.ndim == 0 else np.concatenate([rows[0::2], rows[1::2]])


def _join(
    folder: Folder, gate: Weight, up: Weight, modules: list[str]
) -> tuple[Weight, UnifyReport | None]:
    """Gate's rows, then up's, under one global scale."""
    kinds = [w.format if isinstance(w, QuantizedTensor) else None for w in (gate, up)]
    if kinds[0] != kinds[1] or gate.shape != up.shape:
        raise CheckpointError(
            folder.path,
            f"{modules[1]!r} is {kinds[1] or 'plain'}{list(up.shape)}, but {modules[0]!r} is "
            f"{kinds[0] or 'plain'}{list(gate.shape)}; they must be alike",
        )
    if not isinstance(gate, QuantizedTensor) or not isinstance(up, QuantizedTensor):
        return np.concatenate([gate, up]), None
    if gate.global_scale is None or gate.global_scale == up.global_scale:
        return QuantizedTensor(
            np.concatenate([gate.data, up.data]),
            np.concatenate([gate.scale, up.scale]),
            gate.global_scale,
            gate.format,
        ), None
    joined, report = unify_global_scale(gate, up)
    return jax.tree.map(np.asarray, joined), report


def _check_fit(folder: Folder, gate_up: Weight, down: Weight, parts: int, module: str) -> None:
    rows, hidden = gate_up.shape
    if rows % parts or tuple(down.shape) != (hidden, rows // parts):
        raise CheckpointError(
            folder.path,
            f"{module!r} must have shape {[hidden, rows // parts]} to go with gate and up rows "
            f"{[rows, hidden]}, got {list(down.shape)}",
        )

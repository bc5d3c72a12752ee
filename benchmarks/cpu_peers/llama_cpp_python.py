"""llama.cpp: the graph of its MoE feed-forward over the ggml libraries of `llama-cpp-python`.

    gate, up = MUL_MAT_ID(w, x, ids); h = SWIGLU(gate, up); y = sum over k of
    weights * MUL_MAT_ID(down, h, ids)

with the weights in a buffer that ggml's CPU backend offers for the type (MXFP4: repacked, eight
rows interleaved), else in a plain one. Activations are quantised to 8 bits in blocks of 32 inside
MUL_MAT_ID. Only the computation of the graph is timed, not its inputs' copies.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import time
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cpu_peers.problem import BLOCK_SIZE, NotOfferedError, Problem, use_huge_pages

_F32, _I32 = 0, 26
_TYPES = {"mxfp4": 39, "nvfp4": 40}  # enum ggml_type
_NODES = 2048  # of a graph: each choice of an expert adds one
_SCALES = {"mxfp4": 1, "nvfp4": 4}  # of one block


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_PROTOTYPES: Mapping[str, tuple[object, list[object]]] = MappingProxyType(
    {
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "ggml_nbytes": (c_size_t, [c_void_p]),
        "ggml_get_data": (c_void_p, [c_void_p]),
        "ggml_set_input": (None, [c_void_p]),
        "ggml_set_output": (None, [c_void_p]),
        "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
        "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
        "ggml_mul": (c_void_p, [c_void_p] * 3),
        "ggml_add": (c_void_p, [c_void_p] * 3),
        "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
        "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_gallocr_new": (c_void_p, [c_void_p]),
        "ggml_gallocr_free": (None, [c_void_p]),
        "ggml_gallocr_alloc_graph": (c_bool, [c_void_p, c_void_p]),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
        "ggml_backend_buffer_free": (None, [c_void_p]),
        "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
        "ggml_backend_buffer_get_size": (c_size_t, [c_void_p]),
        "ggml_backend_buft_name": (c_char_p, [c_void_p]),
        "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "ggml_backend_cpu_reg": (c_void_p, []),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    }
)


class _Ggml:
    """The functions of `_PROTOTYPES`, by their names without `ggml_`."""

    def __init__(self, folder: Path):
        libraries = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        ]
        for name, (result, arguments) in _PROTOTYPES.items():
            function = next(getattr(lib, name) for lib in libraries if hasattr(lib, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def context(self, tensors: int, graphs: int = 0) -> c_void_p:
        """Room for descriptions of tensors and graphs, without their data."""
        size = tensors * self.tensor_overhead()
        size += graphs * self.graph_overhead_custom(_NODES, False)
        return self.init(_InitParams(size, None, True))

    def buffer_types(self, device: c_void_p) -> list[c_void_p]:
        """What the CPU backend offers for weights, the plain one last."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), name)
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        found = []
        for buffer_type in extra or ():
            if buffer_type is None:
                break
            found.append(buffer_type)
        return [*found, self.backend_cpu_buffer_type()]


def blocks(packed: np.ndarray, scale: np.ndarray, weight_format: str) -> np.ndarray:
    """ggml's blocks, `uint8[N, bytes]`, from canonical `uint8[N, K/2]` and `uint8[N, K/block]`.

    The low nibbles of a block's bytes are its first half, the high ones its second; NVFP4 puts
    four such blocks together behind their four scales.
    """
    half = BLOCK_SIZE[weight_format] // 4  # bytes of half a block
    first, second = np.moveaxis(packed.reshape(*scale.shape, 2, half), -2, 0)
    nibbles = np.empty((*scale.shape, half, 2), np.uint8)
    nibbles[..., 0] = (first & 15) | (second << 4)
    nibbles[..., 1] = (first >> 4) | (second & 0xF0)
    together = _SCALES[weight_format]
    scales = scale.reshape(len(scale), -1, together)
    nibbles = nibbles.reshape(*scales.shape[:2], -1)
    return np.concatenate([scales, nibbles], axis=-1).reshape(len(packed), -1)


class LlamaCpp:
    """See the module."""

    name = "llama.cpp"
    compute = "w4a8"
    dtype = "float32"

    def __init__(self, problem: Problem):
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise NotOfferedError("llama-cpp-python is not installed there")
        self._problem = problem
        self._ggml = ggml = _Ggml(Path(spec.submodule_search_locations[0]) / "lib")
        self._backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self._backend, problem.threads)
        self._allocator = self._context = None
        i = problem.intermediate_size
        matrices = [
            self._blocks(problem.gate_up[:, :i], problem.gate_up_scale[:, :i]),
            self._blocks(problem.gate_up[:, i:], problem.gate_up_scale[:, i:]),
            self._blocks(problem.down, problem.down_scale),
        ]
        self._sets = [self._weights(matrices) for _ in range(problem.weight_sets)]
        self.weight_sets = len(self._sets)
        version = importlib.metadata.version("llama-cpp-python")
        self.version = f"llama-cpp-python {version}, {self._buffer_type}"

    def _blocks(self, packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
        weight_format = self._problem.weight_format
        return np.stack([blocks(p, s, weight_format) for p, s in zip(packed, scale, strict=True)])

    def _tensors(self) -> tuple[c_void_p, list[c_void_p]]:
        problem, ggml = self._problem, self._ggml
        h, i = problem.hidden_size, problem.intermediate_size
        context = ggml.context(5)
        kind = _TYPES[problem.weight_format]
        return context, [
            ggml.new_tensor_3d(context, kind, k, n, problem.num_experts)
            for k, n in ((h, i), (h, i), (i, h))
        ]

    def _supports(self, device: c_void_p, weight: c_void_p, k: int) -> bool:
        """Whether the backend multiplies by a weight in the buffer where it lies."""
        ggml = self._ggml
        context = ggml.context(3)
        x = ggml.new_tensor_3d(context, _F32, k, self._problem.top_k, 1)
        ids = ggml.new_tensor_2d(context, _I32, self._problem.top_k, 1)
        supported = ggml.backend_dev_supports_op(device, ggml.mul_mat_id(context, weight, x, ids))
        ggml.free(context)
        return supported

    def _weights(self, matrices: list[np.ndarray]) -> list[c_void_p]:
        """One set in the first buffer type that the backend can multiply from."""
        problem, ggml = self._problem, self._ggml
        h, i = problem.hidden_size, problem.intermediate_size
        device = ggml.backend_reg_dev_get(ggml.backend_cpu_reg(), 0)
        for buffer_type in ggml.buffer_types(device):
            context, tensors = self._tensors()
            buffer = ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type)
            if buffer and all(
                self._supports(device, tensor, k)
                for tensor, k in zip(tensors, (h, h, i), strict=True)
            ):
                break
            ggml.backend_buffer_free(buffer)
            ggml.free(context)
        else:
            raise NotOfferedError(f"its CPU backend does not multiply {problem.weight_format}")
        self._buffer_type = ggml.backend_buft_name(buffer_type).decode()
        for tensor, matrix in zip(tensors, matrices, strict=True):
            if ggml.nbytes(tensor) != matrix.nbytes:
                raise ValueError(f"must be {ggml.nbytes(tensor)} bytes, got {matrix.nbytes}")
            ggml.backend_tensor_set(tensor, matrix.ctypes.data, 0, matrix.nbytes)
        use_huge_pages(ggml.backend_buffer_get_base(buffer), ggml.backend_buffer_get_size(buffer))
        return tensors

    def begin(self, tokens: int) -> None:
        problem, ggml = self._problem, self._ggml
        if self._context is not None:
            ggml.gallocr_free(self._allocator)
            ggml.free(self._context)
        h, k = problem.hidden_size, problem.top_k
        nodes = 16 + 2 * k
        self._context = ggml.context(nodes * len(self._sets), len(self._sets))
        self._allocator = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        self._tokens = tokens
        self._graphs = [self._graph(weights, tokens, h, k) for weights in self._sets]

    def _graph(
        self, weights: list[c_void_p], tokens: int, h: int, k: int
    ) -> tuple[c_void_p, list[c_void_p], c_void_p]:
        ggml, context = self._ggml, self._context
        gate, up, down = weights
        x = ggml.new_tensor_3d(context, _F32, h, 1, tokens)
        ids = ggml.new_tensor_2d(context, _I32, k, tokens)
        shares = ggml.new_tensor_3d(context, _F32, 1, k, tokens)
        for tensor in (x, ids, shares):
            ggml.set_input(tensor)
        hidden = ggml.swiglu_split(
            context,
            ggml.mul_mat_id(context, gate, x, ids),
            ggml.mul_mat_id(context, up, x, ids),
        )
        y = ggml.mul(context, ggml.mul_mat_id(context, down, hidden, ids), shares)
        row = h * ctypes.sizeof(c_float)
        parts = [ggml.view_2d(context, y, h, tokens, k * row, n * row) for n in range(k)]
        graph = ggml.new_graph_custom(context, _NODES, False)
        for part in parts:  # before the sums, so that y is one piece of memory
            ggml.build_forward_expand(graph, part)
        total = parts[0]
        for part in parts[1:]:
            total = ggml.add(context, total, part)
        ggml.set_output(total)
        ggml.build_forward_expand(graph, total)
        return graph, [x, ids, shares], total

    def call(self, number: int) -> float:
        problem, ggml, tokens = self._problem, self._ggml, self._tokens
        graph, inputs, self._y = self._graphs[number % len(self._graphs)]
        if not ggml.gallocr_alloc_graph(self._allocator, graph):
            raise MemoryError("no memory for the graph")
        routing = number % problem.routings
        values = (
            problem.x[:tokens],
            problem.expert_ids[routing, :tokens],
            problem.weights[routing, :tokens],
        )
        for tensor, value in zip(inputs, values, strict=True):
            array = np.ascontiguousarray(value)
            ggml.backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
        start = time.perf_counter()
        status = ggml.backend_graph_compute(self._backend, graph)
        seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
        return seconds

    def output(self) -> np.ndarray:
        y = np.empty((self._tokens, self._problem.hidden_size), np.float32)
        if self._ggml.nbytes(self._y) != y.nbytes:
            raise ValueError("the graph's result must have T * H values")
        self._ggml.backend_tensor_get(self._y, y.ctypes.data, 0, y.nbytes)
        return y

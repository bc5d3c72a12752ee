"""What the libraries with ggml's C interface share: llama.cpp's own and those that forked from it.

A graph of the MoE feed-forward over weights in ggml's blocks. Activations are quantised to 8 bits
inside of its products. Only the computation of the graph is timed, not its inputs' copies.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cpu_peers.problem import BLOCK_SIZE, NotOfferedError, Problem, use_huge_pages

F32, I32 = 0, 26  # enum ggml_type
TYPES: Mapping[str, int] = MappingProxyType({"mxfp4": 39, "nvfp4": 40})
_NODES = 2048  # of a graph: each choice of an expert adds one or two
_SCALES = {"mxfp4": 1, "nvfp4": 4}  # of one block

Prototypes = Mapping[str, tuple[object, list[object]]]
"""Results and arguments of functions."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_PROTOTYPES: Prototypes = MappingProxyType(
    {
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "ggml_nbytes": (c_size_t, [c_void_p]),
        "ggml_set_input": (None, [c_void_p]),
        "ggml_set_output": (None, [c_void_p]),
        "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
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
        "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    }
)


class Ggml:
    """Functions of a library by their names without `ggml_`: those used here, and further ones.

    Args:
      libraries: files, each after those that it needs.
      prototypes: of the further functions.
    """

    def __init__(self, libraries: Sequence[Path], prototypes: Prototypes):
        loaded = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in libraries]
        for name, (result, arguments) in {**_PROTOTYPES, **prototypes}.items():
            found = [getattr(lib, name) for lib in loaded if hasattr(lib, name)]
            if not found:
                raise NotOfferedError(f"{libraries[-1].name} has no {name}: another version?")
            function = found[0]
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)

    def context(self, tensors: int, graphs: int = 0) -> c_void_p:
        """Room for descriptions of tensors and graphs, without their data."""
        size = tensors * self.tensor_overhead()
        size += graphs * self.graph_overhead_custom(_NODES, False)
        return self.init(_InitParams(size, None, True))


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


class GgmlExperts:
    """The part of an implementation that does not depend on which of the libraries it is.

    A subclass arranges `_sets`, each of the tensors gate, up and down, and has `_expand`.
    """

    compute = "w4a8"
    dtype = "float32"

    _sets: Sequence[Sequence[c_void_p]]

    def __init__(self, problem: Problem, ggml: Ggml):
        self._problem, self._ggml = problem, ggml
        self._backend = ggml.backend_cpu_init()
        ggml.backend_cpu_set_n_threads(self._backend, problem.threads)
        self._allocator = self._context = None

    @property
    def weight_sets(self) -> int:
        """Copies of the weights."""
        return len(self._sets)

    def _expand(
        self, graph: c_void_p, weights: Sequence[c_void_p], x: c_void_p, ids: c_void_p,
        shares: c_void_p,
    ) -> c_void_p:  # fmt: skip
        """The result `[T, H]`, from `x[T, 1, H]`, `ids[T, k]` and `shares[T, k, 1]`.

        What must stand in the graph in an order of its own is put there.
        """
        raise NotImplementedError

    def _matrices(self) -> list[np.ndarray]:
        """Gate, up and down in ggml's blocks, `uint8[E, N, bytes]`."""
        problem = self._problem
        i = problem.intermediate_size
        return [
            np.stack(
                [blocks(p, s, problem.weight_format) for p, s in zip(packed, scale, strict=True)]
            )
            for packed, scale in (
                (problem.gate_up[:, :i], problem.gate_up_scale[:, :i]),
                (problem.gate_up[:, i:], problem.gate_up_scale[:, i:]),
                (problem.down, problem.down_scale),
            )
        ]

    def _allocate(self, buffer_type: c_void_p) -> tuple[c_void_p, c_void_p, list[list[c_void_p]]]:
        """A context, a buffer (null if there is none) and the tensors of all sets in it."""
        problem, ggml = self._problem, self._ggml
        h, i = problem.hidden_size, problem.intermediate_size
        context = ggml.context(3 * problem.weight_sets)
        sets = [
            [
                ggml.new_tensor_3d(context, TYPES[problem.weight_format], k, n, problem.num_experts)
                for k, n in ((h, i), (h, i), (i, h))
            ]
            for _ in range(problem.weight_sets)
        ]
        return context, ggml.backend_alloc_ctx_tensors_from_buft(context, buffer_type), sets

    def _fill(self, buffer: c_void_p, sets: Sequence[Sequence[c_void_p]]) -> None:
        """Puts the weights into every set, on huge pages."""
        ggml = self._ggml
        matrices = self._matrices()
        for tensors in sets:
            for tensor, matrix in zip(tensors, matrices, strict=True):
                if ggml.nbytes(tensor) != matrix.nbytes:
                    raise ValueError(f"must be {ggml.nbytes(tensor)} bytes, got {matrix.nbytes}")
                ggml.backend_tensor_set(tensor, matrix.ctypes.data, 0, matrix.nbytes)
        use_huge_pages(ggml.backend_buffer_get_base(buffer), ggml.backend_buffer_get_size(buffer))

    def begin(self, tokens: int) -> None:
        ggml = self._ggml
        if self._context is not None:
            ggml.gallocr_free(self._allocator)
            ggml.free(self._context)
        nodes = 16 + 2 * self._problem.top_k
        self._context = ggml.context(nodes * len(self._sets), len(self._sets))
        self._allocator = ggml.gallocr_new(ggml.backend_cpu_buffer_type())
        self._tokens = tokens
        self._graphs = [self._graph(weights) for weights in self._sets]

    def _graph(self, weights: Sequence[c_void_p]) -> tuple[c_void_p, list[c_void_p], c_void_p]:
        ggml, context, tokens = self._ggml, self._context, self._tokens
        h, k = self._problem.hidden_size, self._problem.top_k
        inputs = [
            ggml.new_tensor_3d(context, F32, h, 1, tokens),
            ggml.new_tensor_2d(context, I32, k, tokens),
            ggml.new_tensor_3d(context, F32, 1, k, tokens),
        ]
        for tensor in inputs:
            ggml.set_input(tensor)
        graph = ggml.new_graph_custom(context, _NODES, False)
        y = self._expand(graph, weights, *inputs)
        ggml.set_output(y)
        ggml.build_forward_expand(graph, y)
        return graph, inputs, y

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

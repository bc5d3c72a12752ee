"""llama.cpp: the graph of its MoE feed-forward over the ggml libraries of `llama-cpp-python`.

    gate, up = MUL_MAT_ID(w, x, ids); h = SWIGLU(gate, up); y = sum over k of
    weights * MUL_MAT_ID(down, h, ids)

with the weights in a buffer that ggml's CPU backend offers for the type (MXFP4: repacked, eight
rows interleaved), else in a plain one. Activations are quantised in blocks of 32.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_float, c_int64, c_size_t, c_void_p
from pathlib import Path
from types import MappingProxyType

from cpu_peers.ggml import F32, I32, Ggml, GgmlExperts, Prototypes
from cpu_peers.problem import NotOfferedError, Problem

_PROTOTYPES: Prototypes = MappingProxyType(
    {
        "ggml_swiglu_split": (c_void_p, [c_void_p] * 3),
        "ggml_mul": (c_void_p, [c_void_p] * 3),
        "ggml_add": (c_void_p, [c_void_p] * 3),
        "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
        "ggml_backend_buft_name": (c_char_p, [c_void_p]),
        "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
        "ggml_backend_cpu_reg": (c_void_p, []),
    }
)


class LlamaCpp(GgmlExperts):
    """See the module."""

    name = "llama.cpp"

    def __init__(self, problem: Problem):
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.submodule_search_locations:
            raise NotOfferedError("llama-cpp-python is not installed there")
        folder = Path(spec.submodule_search_locations[0]) / "lib"
        libraries = [folder / f"lib{name}.so" for name in ("ggml-base", "ggml-cpu")]
        super().__init__(problem, Ggml(libraries, _PROTOTYPES))
        buffer_type = self._arrange()
        version = importlib.metadata.version("llama-cpp-python")
        self.version = f"llama-cpp-python {version}, {buffer_type}"

    def _arrange(self) -> str:
        """All sets in the first buffer type that the backend can multiply from: its name."""
        problem, ggml = self._problem, self._ggml
        h, i = problem.hidden_size, problem.intermediate_size
        device = ggml.backend_reg_dev_get(ggml.backend_cpu_reg(), 0)
        for buffer_type in self._buffer_types(device):
            context, buffer, sets = self._allocate(buffer_type)
            if buffer and all(
                self._supports(device, tensor, k)
                for tensor, k in zip(sets[0], (h, h, i), strict=True)
            ):
                break
            ggml.backend_buffer_free(buffer)
            ggml.free(context)
        else:
            raise NotOfferedError(f"its CPU backend does not multiply {problem.weight_format}")
        self._fill(buffer, sets)
        self._sets = sets
        return ggml.backend_buft_name(buffer_type).decode()

    def _buffer_types(self, device: c_void_p) -> list[c_void_p]:
        """What the CPU backend offers for weights, the plain one last."""
        ggml = self._ggml
        name = b"ggml_backend_dev_get_extra_bufts"
        address = ggml.backend_reg_get_proc_address(ggml.backend_cpu_reg(), name)
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        found = []
        for buffer_type in extra or ():
            if buffer_type is None:
                break
            found.append(buffer_type)
        return [*found, ggml.backend_cpu_buffer_type()]

    def _supports(self, device: c_void_p, weight: c_void_p, k: int) -> bool:
        """Whether the backend multiplies by a weight in the buffer where it lies."""
        ggml = self._ggml
        context = ggml.context(3)
        x = ggml.new_tensor_3d(context, F32, k, self._problem.top_k, 1)
        ids = ggml.new_tensor_2d(context, I32, self._problem.top_k, 1)
        supported = ggml.backend_dev_supports_op(device, ggml.mul_mat_id(context, weight, x, ids))
        ggml.free(context)
        return supported

    def _expand(
        self, graph: c_void_p, weights: Sequence[c_void_p], x: c_void_p, ids: c_void_p,
        shares: c_void_p,
    ) -> c_void_p:  # fmt: skip
        ggml, context = self._ggml, self._context
        h, k = self._problem.hidden_size, self._problem.top_k
        gate, up, down = weights
        hidden = ggml.swiglu_split(
            context,
            ggml.mul_mat_id(context, gate, x, ids),
            ggml.mul_mat_id(context, up, x, ids),
        )
        y = ggml.mul(context, ggml.mul_mat_id(context, down, hidden, ids), shares)
        row = h * ctypes.sizeof(c_float)
        parts = [ggml.view_2d(context, y, h, self._tokens, k * row, n * row) for n in range(k)]
        for part in parts:  # before the sums, so that y is one piece of memory
            ggml.build_forward_expand(graph, part)
        total = parts[0]
        for part in parts[1:]:
            total = ggml.add(context, total, part)
        return total

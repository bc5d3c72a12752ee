"""ik_llama.cpp: the graph of its MoE feed-forward, by a library that its user has built.

    h = MOE_FUSED_UP_GATE(up, gate, x, ids); y = MUL_MULTI_ADD(MUL_MAT_ID(down, h, ids), weights)

as its programs build it by default, with the weights repacked as they are with `-rtr`: MXFP4 in
eight interleaved rows. Activations are quantised in blocks of 32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_void_p
from pathlib import Path
from types import MappingProxyType

from cpu_peers.ggml import Ggml, GgmlExperts, Prototypes
from cpu_peers.problem import NotOfferedError, Problem

FOLDER = "ik_llama.cpp"
"""In the environment; the library there has its commit in its name, `libggml-COMMIT.so`."""

_SILU = 10  # enum ggml_unary_op
_PROTOTYPES: Prototypes = MappingProxyType(
    {
        "ggml_moe_up_gate": (c_void_p, [*[c_void_p] * 5, c_int]),
        "ggml_mul_multi_add": (c_void_p, [c_void_p] * 3),
        "ggml_type_name": (c_char_p, [c_int]),
        "iqk_repack_tensor": (None, [c_void_p]),
    }
)


class IkLlamaCpp(GgmlExperts):
    """See the module."""

    name = "ik_llama.cpp"

    def __init__(self, problem: Problem):
        if problem.weight_format != "mxfp4":
            raise NotOfferedError(f"ik_llama.cpp has no {problem.weight_format.upper()}")
        folder = Path(sys.prefix) / FOLDER
        library = next(folder.glob("libggml-*.so"), None)
        if library is None:
            raise NotOfferedError(
                f"there is no libggml-*.so in {folder}: build ik_llama.cpp, then run with "
                "--install --ik-llama and the folder of its clone"
            )
        super().__init__(problem, Ggml([library], _PROTOTYPES))
        types = self._arrange()
        self.version = f"ik_llama.cpp {library.stem.removeprefix('libggml-')}, {types}"

    def _arrange(self) -> str:
        """All sets, repacked: the names of the types that this has made of them."""
        ggml = self._ggml
        _, buffer, self._sets = self._allocate(ggml.backend_cpu_buffer_type())
        if not buffer:
            raise MemoryError("no memory for the weights")
        self._fill(buffer, self._sets)
        types = {}
        for tensor in (t for tensors in self._sets for t in tensors):
            ggml.iqk_repack_tensor(tensor)
            kind = c_int.from_address(tensor).value  # the first member of a ggml_tensor
            types[ggml.type_name(kind).decode()] = None
        return ", ".join(types)

    def _expand(
        self, graph: c_void_p, weights: Sequence[c_void_p], x: c_void_p, ids: c_void_p,
        shares: c_void_p,
    ) -> c_void_p:  # fmt: skip
        ggml, context = self._ggml, self._context
        gate, up, down = weights
        hidden = ggml.moe_up_gate(context, up, gate, x, ids, _SILU)
        return ggml.mul_multi_add(context, ggml.mul_mat_id(context, down, hidden, ids), shares)

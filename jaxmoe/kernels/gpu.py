"""The native GPU libraries: loading, lazy registration, self-test, and their custom calls.

A family is its name and its rows of the capability table; `csrc/` has the rest.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import jax

from jaxmoe.capability import TABLE
from jaxmoe.capability.requirements import build_option
from jaxmoe.kernels import judge, native
from jaxmoe.kernels.xla import MlpConfig


class Family:
    """One library, `jaxmoe._<name>`, with the operations that `kernels` dispatches to.

    Args:
      name: of the family.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = {row.variant: row for row in TABLE if row.family == name and row.never is None}
        self.moe_mlp_target = f"jaxmoe_moe_mlp_{name}_v1"
        self.grouped_matmul_target = f"jaxmoe_grouped_matmul_{name}_v1"
        # One handler serves all variants of a library.
        self._input_scales = any(row.input_scales for row in self.rows.values())

    @functools.cache  # noqa: B019 (families live as long as the process)
    def library(self) -> native.Library:
        """The native module, or None and a sentence that says why there is none.

        Loading it needs neither a GPU nor a CUDA installation.
        """
        return native.load(
            f"_{self.name}",
            f"build jaxmoe from source with nvcc and -C cmake.define.{build_option(self.name)}",
        )

    @functools.cache  # noqa: B019
    def _native(self) -> ModuleType:
        return native.register(self.library(), platform="CUDA", backend=None)

    def features(self) -> frozenset[str]:
        """Nothing beyond the SM, which the target knows."""
        return frozenset()

    def tactics(self, variant: str) -> Mapping[str, int]:
        """Kernels that a call can be told to take, with their bytes of shared memory.

        Some serve `moe_mlp` alone, or few tokens: they refuse the rest with their limits.
        """
        module, why = self.library()
        if module is None:
            raise RuntimeError(why)
        return module.manifest()["variants"][variant]["tactics"]

    def moe_mlp(
        self, config: MlpConfig, variant: str, *operands: Any, tactic: str = ""
    ) -> jax.Array:
        """One custom call for the whole expert MLP; the operands are those of `xla.moe_mlp`.

        `tactic` names the kernels; "" leaves the choice to the library, which knows the sizes.
        """
        return native.moe_mlp(
            self._native(),
            self.moe_mlp_target,
            config,
            variant,
            *operands,
            input_scales=self._input_scales,
            tactic=tactic,
        )

    def grouped_matmul(self, variant: str, *operands: Any, tactic: str = "") -> jax.Array:
        """One custom call for the grouped product; the operands are those of `xla.grouped_matmul`.

        `tactic` as in `moe_mlp`.
        """
        return native.grouped_matmul(
            self._native(),
            self.grouped_matmul_target,
            variant,
            *operands,
            input_scales=self._input_scales,
            tactic=tactic,
        )

    @functools.cache  # noqa: B019
    def self_test(self, variant: str) -> str:
        """Runs a tiny problem once; "" if the numbers are right, else what was wrong with them.

        "" also where no GPU of the family is here: then the program is only lowered for one.
        """
        device = self.device()
        if device is None:
            return ""
        row = self.rows[variant]

        def run() -> str:
            with jax.default_device(device):
                return next(filter(None, map(attempt, sorted(row.weight_formats))), "")

        def attempt(weight_format: str) -> str:
            try:
                off = judge.error(row, weight_format, judge.TINY, self.moe_mlp)
            except Exception as error:  # whatever it was, this variant does not work here
                return f"{type(error).__name__}: {error}"
            return judge.verdict(off, weight_format)

        # A variant is first selected while a caller's function is traced, perhaps for a mesh:
        # another thread knows nothing of either.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()

    def device(self) -> Any:
        """The first GPU of this process that the family's kernels run on, or None."""
        sms = {sm for row in self.rows.values() for sm in row.sms or ()}
        try:
            devices = jax.local_devices(backend="cuda")
        except RuntimeError:
            return None
        return next((d for d in devices if int(d.compute_capability.replace(".", "")) in sms), None)


_NAMES = dict.fromkeys(row.family for row in TABLE if row.platform == "cuda" and not row.never)
GPU_FAMILIES: Mapping[str, Family] = MappingProxyType({name: Family(name) for name in _NAMES})

"""The choice of a kernel: what is selected for every SM, format and arithmetic, and why not else.

The grids below were written by hand from the design document (section 5 says which kernels exist
where, 4.2 what `compute` and `implementation` mean, 4.3 what must be refused). They do not read
the table.
"""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import pickle
import time

import jax
import jax.numpy as jnp
import pytest

from jaxmoe import capability
from jaxmoe.capability import (
    TABLE,
    Problem,
    Reason,
    Resolution,
    Target,
    UnsupportedError,
    check_manifest,
    current_target,
    explain,
    override,
    resolve,
    select,
)
from jaxmoe.capability.table import ACTIVATIONS, KNOWN_SMS, SMEM_LIMIT

ROOT = pathlib.Path(__file__).parent.parent
AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c", "avx2"})
AVX512_VNNI = AVX512 | {"avx512_vnni"}
AVX512_BF16 = AVX512_VNNI | {"avx512vbmi", "avx512_bf16"}
EVERY_FEATURE = AVX512_BF16 | {"avx512_fp16", "amx_tile", "amx_bf16", "avx_vnni"}
CPU_VARIANTS = (
    "cpu_amx",
    "cpu_avx512_bf16",
    "cpu_avx512_vnni",
    "cpu_avx512",
    "cpu_avx_vnni",
    "cpu_avx2",
    "cpu_portable",
)
GPU_VARIANTS = (
    "sm80_w4a16",
    "sm90_w4a16",
    "sm90_w4a8",
    "sm100_w4a4",
    "sm100_w4a8",
    "sm120_w4a4",
    "sm120_w4a8",
    # Never chosen by AUTO, so that no grid below has them.
    "sm100_w4a4_emulated",
    "sm100_w4a8_emulated",
    "sm120_w4a4_emulated",
    "sm120_w4a8_emulated",
)
EMULATED = GPU_VARIANTS[-4:]


def problem(weight_format="nvfp4", compute="auto", declared=None, **fields) -> Problem:
    return Problem(
        **{
            "weight_format": weight_format,
            "compute": compute,
            "declared_compute": declared,
            "hidden_size": 2048,
            "intermediate_size": 768,
            "num_experts": 128,
            "top_k": 8,
            **fields,
        }
    )


def target(name: str, built=()) -> Target:
    return Target.from_name(name, features=EVERY_FEATURE, built=built)


def choice(*args, **kwargs) -> str:
    """The selected variant, or "-" where the request is refused."""
    try:
        return resolve(*args, **kwargs).selected
    except UnsupportedError:
        return "-"


def grid(text: str) -> list[tuple[str, str, str]]:
    """(row, column, cell) of a table in text."""
    head, *lines = [line.split() for line in text.strip().splitlines()]
    assert all(len(line) == len(head) for line in lines)
    return [
        (line[0], column, cell)
        for line in lines
        for column, cell in zip(head[1:], line[1:], strict=True)
    ]


# Every kernel of DESIGN 5 is built. Explicit arithmetic is strict: "-" is a refusal.
STRICT = """
target   nvfp4/w4a16  nvfp4/w4a8  nvfp4/w4a4  mxfp4/w4a16  mxfp4/w4a8  mxfp4/w4a4
sm_70    xla          -           -           xla          -           -
sm_75    xla          -           -           xla          -           -
sm_80    sm80_w4a16   -           -           sm80_w4a16   -           -
sm_86    sm80_w4a16   -           -           sm80_w4a16   -           -
sm_87    xla          -           -           xla          -           -
sm_89    sm80_w4a16   -           -           sm80_w4a16   -           -
sm_90    sm90_w4a16   -           -           sm90_w4a16   sm90_w4a8   -
sm_100   sm80_w4a16   -           sm100_w4a4  sm80_w4a16   sm100_w4a8  -
sm_101   xla          -           -           xla          -           -
sm_103   sm80_w4a16   -           sm100_w4a4  sm80_w4a16   sm100_w4a8  -
sm_107   xla          -           -           xla          -           -
sm_110   xla          -           -           xla          -           -
sm_120   sm80_w4a16   -           sm120_w4a4  sm80_w4a16   sm120_w4a8  -
sm_121   sm80_w4a16   -           sm120_w4a4  sm80_w4a16   sm120_w4a8  -
sm_130   xla          -           -           xla          -           -
unknown  xla          -           -           xla          -           -
cpu      cpu_amx      cpu_amx     -           cpu_amx      cpu_amx     -
tpu      xla          -           -           xla          -           -
rocm     xla          -           -           xla          -           -
"""

# compute="auto": what the checkpoint declares (the column), else the nearest more accurate.
AUTO = """
target   nvfp4/w4a16  nvfp4/w4a8  nvfp4/w4a4  mxfp4/w4a16  mxfp4/w4a8  mxfp4/w4a4
sm_70    xla          xla         xla         xla          xla         xla
sm_75    xla          xla         xla         xla          xla         xla
sm_80    sm80_w4a16   sm80_w4a16  sm80_w4a16  sm80_w4a16   sm80_w4a16  sm80_w4a16
sm_86    sm80_w4a16   sm80_w4a16  sm80_w4a16  sm80_w4a16   sm80_w4a16  sm80_w4a16
sm_87    xla          xla         xla         xla          xla         xla
sm_89    sm80_w4a16   sm80_w4a16  sm80_w4a16  sm80_w4a16   sm80_w4a16  sm80_w4a16
sm_90    sm90_w4a16   sm90_w4a16  sm90_w4a16  sm90_w4a16   sm90_w4a8   sm90_w4a8
sm_100   sm80_w4a16   sm80_w4a16  sm100_w4a4  sm80_w4a16   sm100_w4a8  sm100_w4a8
sm_101   xla          xla         xla         xla          xla         xla
sm_103   sm80_w4a16   sm80_w4a16  sm100_w4a4  sm80_w4a16   sm100_w4a8  sm100_w4a8
sm_107   xla          xla         xla         xla          xla         xla
sm_110   xla          xla         xla         xla          xla         xla
sm_120   sm80_w4a16   sm80_w4a16  sm120_w4a4  sm80_w4a16   sm120_w4a8  sm120_w4a8
sm_121   sm80_w4a16   sm80_w4a16  sm120_w4a4  sm80_w4a16   sm120_w4a8  sm120_w4a8
sm_130   xla          xla         xla         xla          xla         xla
unknown  xla          xla         xla         xla          xla         xla
cpu      cpu_amx      cpu_amx     cpu_amx     cpu_amx      cpu_amx     cpu_amx
tpu      xla          xla         xla         xla          xla         xla
rocm     xla          xla         xla         xla          xla         xla
"""

# Why each GPU variant does not run NVFP4 weights that declare w4a4, with no GPU library built.
# P platform, U unknown SM, S SM, F format, B not built, I instruction missing, J not in jaxmoe.
REASONS = """
variant        89  90  100  103  107  110  unknown  120  121  75  cpu  tpu  rocm
sm120_w4a4     S   S   S    S    U    U    U        B    B    S   P    P    P
sm120_w4a8     S   S   S    S    U    U    U        F    F    S   P    P    P
sm100_w4a4     S   S   B    B    U    U    U        S    S    S   P    P    P
sm100_w4a8     S   S   F    F    U    U    U        S    S    S   P    P    P
sm90_w4a8      S   F   S    S    U    U    U        S    S    S   P    P    P
sm90_w4a16     S   B   S    S    U    U    U        S    S    S   P    P    P
sm80_w4a16     B   B   B    B    U    U    U        B    B    S   P    P    P
trtllm_gen     S   S   J    J    U    U    U        S    S    S   P    P    P
cute_dsl       S   S   J    J    U    U    U        S    S    S   P    P    P
sm90_w4a4      S   I   S    S    U    U    U        S    S    S   P    P    P
sm120_generic  S   S   S    S    U    U    U        I    I    S   P    P    P
sm120_w4a4_emulated  S  B  S  S  U  U  U  S  S  S  P  P  P
sm120_w4a8_emulated  S  F  S  S  U  U  U  S  S  S  P  P  P
sm100_w4a4_emulated  S  B  S  S  U  U  U  S  S  S  P  P  P
sm100_w4a8_emulated  S  F  S  S  U  U  U  S  S  S  P  P  P
xla_w4a4       N   N   N    N    N    N    N        N    N    N   N    N    N
xla_w4a8       F   F   F    F    F    F    F        F    F    F   F    F    F
"""
LETTERS = {
    "P": Reason.PLATFORM_UNSUPPORTED,
    "U": Reason.SM_UNKNOWN,
    "S": Reason.SM_UNSUPPORTED,
    "F": Reason.FORMAT_UNSUPPORTED,
    "B": Reason.NOT_BUILT,
    "I": Reason.INSTRUCTION_MISSING,
    "J": Reason.NOT_IN_JAXMOE,
    "N": Reason.ONLY_BY_NAME,
}


class TestGrid:
    @pytest.mark.parametrize(("name", "column", "expected"), grid(STRICT))
    def test_explicit_compute(self, name, column, expected):
        weight_format, compute = column.split("/")
        everything = target(name, GPU_VARIANTS + CPU_VARIANTS)
        assert choice(problem(weight_format, compute), everything) == expected

    @pytest.mark.parametrize(("name", "column", "expected"), grid(STRICT))
    def test_explicit_compute_with_no_gpu_library(self, name, column, expected):
        weight_format, compute = column.split("/")
        if name != "cpu":
            expected = "xla" if compute == "w4a16" else "-"
        assert choice(problem(weight_format, compute), target(name, CPU_VARIANTS)) == expected

    @pytest.mark.parametrize(("name", "column", "expected"), grid(AUTO))
    def test_declared_compute(self, name, column, expected):
        weight_format, declared = column.split("/")
        everything = target(name, GPU_VARIANTS + CPU_VARIANTS)
        resolution = resolve(problem(weight_format, declared=declared), everything)
        compute = expected.split("_")[-1] if expected.startswith("sm") else "w4a16"
        assert resolution.selected == expected
        assert resolution.compute == compute
        assert resolution.degraded_from == (None if compute == declared else declared)
        assert resolution.selected_by == "auto"
        assert resolution.variant == expected

    @pytest.mark.parametrize("name", sorted({row[0] for row in grid(STRICT)}))
    @pytest.mark.parametrize(
        ("weight_format", "own"),
        [("mxfp8", "w8a16"), ("fp8", "w8a16"), ("bf16", "w16a16")],
    )
    def test_other_formats_run_on_xla_alone(self, name, weight_format, own):
        everything = target(name, GPU_VARIANTS + CPU_VARIANTS)
        for compute in ("auto", own):
            assert choice(problem(weight_format, compute), everything) == "xla"
        for compute in ("w4a16", "w4a8", "w4a4"):
            assert choice(problem(weight_format, compute), everything) == "-"

    @pytest.mark.parametrize(("variant", "name", "letter"), grid(REASONS))
    def test_reason(self, variant, name, letter):
        name = f"sm_{name}" if name.isdigit() else name
        resolution = resolve(problem(declared="w4a4"), target(name, CPU_VARIANTS))
        reasons = {r.variant: r.reason for r in resolution.rejected}
        assert reasons[variant] == LETTERS[letter]

    @pytest.mark.parametrize("name", sorted({row[0] for row in grid(STRICT)}))
    def test_auto_always_works(self, name):
        fields = {
            "op": ("moe_mlp", "grouped_matmul"),
            "weight_format": ("nvfp4", "mxfp4", "mxfp8", "fp8", "bf16"),
            "activation_dtype": ("float32", "bfloat16", "float16"),
            "activation": ("swiglu", "my_own"),
            "bias": (False, True),
            "hidden_size": (32, 7, 0),
        }
        for built in ((), GPU_VARIANTS + CPU_VARIANTS):
            for values in itertools.product(*fields.values()):
                ask = problem(**dict(zip(fields, values, strict=True)))
                assert resolve(ask, target(name, built)).selected_by == "auto"

    def test_every_combination_is_in_a_grid(self):
        # 12 SMs with a name in JAX's list, SMs without one, and the other platforms.
        targets = {row[0] for row in grid(STRICT)}
        assert targets == {row[0] for row in grid(AUTO)}
        assert {f"sm_{sm}" for sm in KNOWN_SMS | {107, 110}} <= targets
        columns = set(itertools.product(("nvfp4", "mxfp4"), ("w4a16", "w4a8", "w4a4")))
        assert {tuple(row[1].split("/")) for row in grid(STRICT)} == columns


REFUSALS = [
    ("cpu_avx2", {}, "sm_90", "PLATFORM_UNSUPPORTED", ["platform cpu", "sm_90"]),
    ("sm120_w4a4", {}, "thor", "SM_UNKNOWN", ["SM 120 or 121", "SM 110 (Thor)", "range"]),
    ("sm100_w4a4", {}, "vr200", "SM_UNKNOWN", ["SM 100 or 103", "107 (VR200)", "unknown"]),
    ("sm90_w4a16", {}, "unknown", "SM_UNKNOWN", ["SM 90", "not guessed", "override"]),
    ("sm120_w4a4", {}, "h100", "SM_UNSUPPORTED", ["120 or 121", "sm_90", "sm90_w4a16"]),
    ("trtllm_gen", {}, "rtx 5090", "SM_UNSUPPORTED", ["100 or 103", "120", "sm120_w4a4"]),
    ("trtllm_gen", {}, "b200", "NOT_IN_JAXMOE", ["100 and 103 only", "sm100_w4a4"]),
    ("cute_dsl", {}, "gb10", "SM_UNSUPPORTED", ["100 or 103", "121", "sm120_w4a8"]),
    ("cute_dsl", {}, "b300", "NOT_IN_JAXMOE", ["100 and 103 only", "sm100_w4a4"]),
    ("sm90_w4a4", {}, "h200", "INSTRUCTION_MISSING", ["W4A4 does not exist", "w4a16"]),
    ("sm120_generic", {}, "gb10", "INSTRUCTION_MISSING", ["plain sm_120", "sm_120f"]),
    ("sm120_w4a4", {"weight_format": "mxfp4"}, "sm_120", "FORMAT_UNSUPPORTED",
     ["requires nvfp4", "got mxfp4", "jaxmoe.quantize"]),
    ("sm120_w4a4", {}, "sm_120", "COMPUTE_UNSUPPORTED",
     ["computes w4a4", "declares w4a16", "compute='w4a4'"]),
    ("xla", {"compute": "w4a8"}, "sm_120", "COMPUTE_UNSUPPORTED",
     ["computes w4a16", "compute='w4a8'", "compute='w4a16'"]),
    ("cpu_avx512_bf16", {"activation_dtype": "float32"}, "cpu", "DTYPE_UNSUPPORTED",
     ["bfloat16", "float32", "cast x"]),
    ("cpu_avx2", {"activation": "my_own"}, "cpu", "ACTIVATION_UNSUPPORTED",
     ["swiglu_step", "my_own", "xla"]),
    ("cpu_avx2", {"hidden_size": 100}, "cpu", "SHAPE_UNALIGNED",
     ["hidden_size", "multiple of 32", "100", "128"]),
    ("cpu_avx2", {"intermediate_size": 48}, "cpu", "SHAPE_UNALIGNED",
     ["intermediate_size", "48", "64"]),
    ("sm90_w4a16", {"num_experts": 1025}, "h100", "TOO_MANY_EXPERTS",
     ["at most 1024 experts", "got 1025", "expert_offset"]),
    ("sm120_w4a4", {"compute": "w4a4"}, "rtx 5090", "NOT_BUILT",
     ["this build holds no sm120 library", "JAXMOE_CUDA_FAMILIES=sm120"]),
    ("sm100_w4a8", {"compute": "w4a8", "weight_format": "mxfp4"}, "b300", "NOT_BUILT",
     ["this build holds no sm100 library", "JAXMOE_CUDA_FAMILIES=sm100"]),
    ("sm120_w4a4_emulated", {"compute": "w4a4"}, "h100", "NOT_BUILT",
     ["this build holds no sm120_emulated library", "JAXMOE_EMULATE=sm120"]),
    ("sm120_w4a4_emulated", {"compute": "w4a4"}, "rtx 5090", "SM_UNSUPPORTED", ["requires SM 90"]),
    ("sm120_w4a8", {"compute": "w4a8"}, "gb10", "FORMAT_UNSUPPORTED",
     ["requires mxfp4 weights; got nvfp4", "MXFP4 × MXFP8 alone"]),
    ("sm120_w4a4", {"compute": "w4a4", "activation_dtype": "float16"}, "sm_120",
     "DTYPE_UNSUPPORTED", ["requires x of dtype bfloat16", "got float16"]),
    ("sm120_w4a4", {"compute": "w4a4", "intermediate_size": 80}, "sm_121", "SHAPE_UNALIGNED",
     ["intermediate_size to be a multiple of 32", "got 80", "pad to 96"]),
    ("sm100_w4a8", {"weight_format": "mxfp4", "compute": "w4a8", "hidden_size": 2080}, "b200",
     "SHAPE_UNALIGNED", ["hidden_size to be a multiple of 64", "got 2080", "pad to 2112"]),
    ("sm80_w4a16", {}, "rtx 4090", "NOT_BUILT",
     ["this build holds no sm80 library", "JAXMOE_CUDA_FAMILIES=sm80"]),
    ("sm90_w4a16", {}, "h100", "NOT_BUILT",
     ["this build holds no sm90 library", "JAXMOE_CUDA_FAMILIES=sm90"]),
    ("cpu_avx2", {}, "cpu", "NOT_BUILT", ["jaxmoe._cpu", "C++17 compiler"]),
    ("sm90_w4a8", {"weight_format": "mxfp4", "compute": "w4a8"}, "h100", "NOT_BUILT",
     ["this build holds no sm90 library", "JAXMOE_CUDA_FAMILIES=sm90"]),
    ("sm90_w4a8", {"compute": "w4a8"}, "h100", "FORMAT_UNSUPPORTED",
     ["requires mxfp4 weights; got nvfp4", "6 significant bits", "e4m3 has 4", "2.2 %"]),
    ("sm90_w4a8", {"weight_format": "mxfp4"}, "h100", "COMPUTE_UNSUPPORTED",
     ["computes w4a8 with mxfp4", "takes nothing less accurate", "compute='w4a8'"]),
    ("sm90_w4a8", {"weight_format": "mxfp4", "compute": "w4a8", "activation_dtype": "float32"},
     "h100", "DTYPE_UNSUPPORTED", ["bfloat16 or float16", "got float32"]),
    ("sm90_w4a16", {"activation_dtype": "float32"}, "h100", "DTYPE_UNSUPPORTED",
     ["bfloat16 or float16", "got float32", "cast x"]),
    ("sm90_w4a16", {"op": "grouped_matmul", "result_dtype": "float32"}, "h100",
     "DTYPE_UNSUPPORTED", ["x's dtype bfloat16", "preferred_element_type float32", "xla"]),
]  # fmt: skip


class TestSentences:
    """Every refusal names what was required, what came, and a way out."""

    def reason(self, variant, problem, target):
        with pytest.raises(UnsupportedError) as caught:
            resolve(problem, target, variant)
        (rejection,) = caught.value.resolution.rejected
        assert rejection.variant == variant
        assert rejection.detail in str(caught.value)
        return rejection.reason, rejection.detail

    @pytest.mark.parametrize(("variant", "fields", "name", "reason", "words"), REFUSALS)
    def test_refusal(self, variant, fields, name, reason, words):
        found, detail = self.reason(variant, problem(**fields), target(name))
        assert found is Reason[reason]
        for word in words:
            assert word in detail

    def test_missing_cpu_feature(self):
        avx2 = Target("cpu", features={"avx2", "fma", "f16c"}, built=CPU_VARIANTS)
        found, detail = self.reason("cpu_amx", problem(), avx2)
        assert found is Reason.CPU_FEATURE_MISSING
        assert "lacks amx_bf16, amx_tile, avx512_bf16, avx512_fp16, avx512_vnni" in detail
        assert "can run cpu_avx2, cpu_portable" in detail

    def test_failed_self_test(self):
        broken = Target("cpu", built=CPU_VARIANTS, disqualified={"cpu_portable": "NaN in row 3"})
        found, detail = self.reason("cpu_portable", problem(), broken)
        assert found is Reason.SELF_TEST_FAILED
        assert "NaN in row 3" in detail
        assert resolve(problem(), broken).selected == "xla"

    def test_bias_and_op_requirements(self):
        plain = dataclasses.replace(TABLE[0], bias=False, ops=frozenset({"moe_mlp"}))
        built = target("sm_120", [plain.variant])
        for fields, reason in (
            ({"bias": True}, Reason.BIAS_UNSUPPORTED),
            ({"op": "grouped_matmul"}, Reason.OP_UNSUPPORTED),
        ):
            ask = problem(compute="w4a4", **fields)
            with pytest.raises(UnsupportedError) as caught:
                resolve(ask, built, table=(plain, *TABLE[1:]))
            reasons = {r.variant: r.reason for r in caught.value.resolution.rejected}
            assert reasons[plain.variant] is reason
            assert resolve(ask, built).selected == plain.variant

    def test_every_reason_has_a_test(self):
        elsewhere = {
            Reason.CPU_FEATURE_MISSING,
            Reason.SELF_TEST_FAILED,
            Reason.BIAS_UNSUPPORTED,
            Reason.OP_UNSUPPORTED,
            Reason.ONLY_BY_NAME,  # in the grid, and TestOnlyByName
        }
        assert {Reason[reason] for *_, reason, _ in REFUSALS} | elsewhere == set(Reason)

    def test_hint_names_what_would_run(self):
        def hint(*args):
            with pytest.raises(UnsupportedError) as caught:
                resolve(*args)
            assert caught.value.resolution.hint in str(caught.value)
            return caught.value.resolution.hint

        h100 = target("h100", ["sm90_w4a16"])
        assert hint(problem(compute="w4a4"), h100) == (
            "with compute='auto', sm90_w4a16 runs it as w4a16"
        )
        assert hint(problem(), h100, "cutlass") == (
            "with implementation=None, sm90_w4a16 runs it as w4a16"
        )
        assert hint(problem(compute="w4a4"), h100, "xla") == (
            "with compute='auto', xla runs it as w4a16"
        )
        assert hint(problem(compute="w4a4"), h100, "cutlass") == (
            "with implementation=None and compute='auto', sm90_w4a16 runs it as w4a16"
        )
        assert "no variant" in hint(problem(activation_dtype="float64"), h100)


class TestRequest:
    cpu = Target("cpu", features=frozenset({"avx2", "fma", "f16c"}), built=frozenset(CPU_VARIANTS))

    def test_auto_takes_the_first_row_that_fits(self):
        features = [
            (EVERY_FEATURE, "bfloat16", "cpu_amx"),
            (EVERY_FEATURE, "float32", "cpu_amx"),
            (AVX512_BF16, "bfloat16", "cpu_avx512_bf16"),
            (AVX512_BF16, "float32", "cpu_avx512_vnni"),
            (AVX512_BF16 - {"avx512vbmi"}, "bfloat16", "cpu_avx512_vnni"),
            (AVX512 | {"avx512_bf16"}, "bfloat16", "cpu_avx512"),
            (AVX512 | {"avx_vnni"}, "bfloat16", "cpu_avx512"),
            (AVX512, "bfloat16", "cpu_avx512"),
            ({"avx2", "fma", "f16c", "avx_vnni"}, "bfloat16", "cpu_avx_vnni"),
            ({"avx_vnni", "fma", "f16c"}, "bfloat16", "cpu_portable"),
            ({"avx2", "fma", "f16c"}, "bfloat16", "cpu_avx2"),
            ({"avx2"}, "bfloat16", "cpu_portable"),
            ((), "float32", "cpu_portable"),
            (EVERY_FEATURE, "float16", "xla"),
        ]
        for available, dtype, expected in features:
            machine = Target("cpu", features=available, built=CPU_VARIANTS)
            assert choice(problem(activation_dtype=dtype), machine) == expected

    def test_single_name_is_strict(self):
        assert choice(problem(), self.cpu, "cpu_portable") == "cpu_portable"
        assert choice(problem(), self.cpu, "cpu_amx") == "-"

    def test_provider_and_family_names(self):
        assert choice(problem(), self.cpu, "cpu") == "cpu_avx2"
        blackwell = target("sm_120", GPU_VARIANTS)
        assert choice(problem(compute="w4a4"), blackwell, "cutlass") == "sm120_w4a4"
        assert choice(problem(compute="w4a4"), blackwell, "sm120") == "sm120_w4a4"
        assert choice(problem(), blackwell, "sm80") == "sm80_w4a16"
        # CUTLASS FP4 is {100, 103, 120, 121}.
        for name in ("sm_80", "sm_89", "sm_90", "sm_107", "sm_110", "cpu"):
            assert choice(problem(compute="w4a4"), target(name, GPU_VARIANTS), "cutlass") == "-"

    def test_sequence_takes_the_first_supported(self):
        assert choice(problem(), self.cpu, ["cutlass", "cpu_amx", "xla", "cpu"]) == "xla"
        assert choice(problem(), self.cpu, ["cpu", "xla"]) == "cpu_avx2"
        resolution = resolve(problem(), self.cpu, ("cpu_portable", "xla", "cpu_avx2"))
        assert resolution.selected == "cpu_portable"
        assert resolution.selected_by == "request"
        assert resolution.alternatives == ("xla", "cpu_avx2")

    def test_order_of_the_request_is_stronger_than_the_declared_compute(self):
        blackwell = target("sm_120", GPU_VARIANTS)
        resolution = resolve(problem(declared="w4a4"), blackwell, ["xla", "sm120_w4a4"])
        assert (resolution.selected, resolution.degraded_from) == ("xla", "w4a4")

    def test_all_fail_carries_every_reason(self):
        with pytest.raises(UnsupportedError) as caught:
            resolve(problem(), self.cpu, ["cpu_amx", "cutlass"])
        rejected = [r.variant for r in caught.value.resolution.rejected]
        assert rejected[0] == "cpu_amx"  # in the order of the request
        assert set(rejected[1:]) >= {"sm120_w4a4", "sm120_w4a8", "sm100_w4a4", "sm100_w4a8"}
        assert isinstance(caught.value, NotImplementedError)
        for variant in rejected:
            assert variant in str(caught.value)

    @pytest.mark.parametrize("name", ["trtllm_gen", "cute_dsl", "sm90_w4a4", "sm120_generic"])
    def test_rows_without_a_kernel_are_never_selected(self, name):
        for sm in (*KNOWN_SMS, 107, 110):
            machine = target(f"sm_{sm}", (name, *GPU_VARIANTS))
            for weight_format, compute in itertools.product(
                ("nvfp4", "mxfp4"), ("auto", "w4a16", "w4a8", "w4a4")
            ):
                assert choice(problem(weight_format, compute), machine, name) == "-"

    @pytest.mark.parametrize("op", ["moe_mlp", "grouped_matmul"])
    def test_w4a8_on_hopper_has_to_be_asked_for(self, op):
        hopper = target("h100", ["sm90_w4a8", "sm90_w4a16"])
        for weight_format in ("nvfp4", "mxfp4"):
            assert choice(problem(weight_format, op=op), hopper) == "sm90_w4a16"
        asked = resolve(problem("mxfp4", "w4a8", op=op), hopper)
        assert (asked.selected, asked.layout) == ("sm90_w4a8", "sm90_fragment_fp8")
        assert choice(problem("mxfp4", "w4a8", op=op), target("h100", ["sm90_w4a16"])) == "-"

    def test_auto_never_takes_less_accurate_arithmetic(self):
        blackwell = target("sm_120", ["sm120_w4a4", "sm120_w4a8"])
        assert choice(problem("nvfp4", declared="w4a8"), blackwell) == "xla"
        assert choice(problem("mxfp4"), blackwell) == "xla"

    @pytest.mark.parametrize("request_", ["cpu_avx", ["xla", "cutlas"]])
    def test_unknown_name(self, request_):
        with pytest.raises(ValueError, match=r"unknown; the names are .*cpu_avx2.*Did you mean"):
            resolve(problem(), self.cpu, request_)

    def test_empty_sequence(self):
        with pytest.raises(ValueError, match="at least one variant"):
            resolve(problem(), self.cpu, [])

    def test_grouped_matmul_has_no_activation(self):
        own = problem(activation="my_own")
        assert choice(own, self.cpu) == "xla"
        assert choice(dataclasses.replace(own, op="grouped_matmul"), self.cpu) == "cpu_avx2"

    def test_grouped_matmul_aligns_k_alone_to_32(self):
        odd = problem(op="grouped_matmul", hidden_size=96, intermediate_size=7)
        assert choice(odd, self.cpu) == "cpu_avx2"
        assert choice(dataclasses.replace(odd, hidden_size=7), self.cpu) == "xla"


class TestOnlyByName:
    """Emulated kernels, and W4A4 and W4A8 in plain JAX."""

    @pytest.mark.parametrize("name", sorted({row[0] for row in grid(STRICT)}))
    def test_auto_and_the_names_of_families_and_providers_pass_them_over(self, name):
        machine = target(name, GPU_VARIANTS + CPU_VARIANTS)
        able = {*EMULATED, "xla_w4a4", "xla_w4a8"}
        formats, computes = ("nvfp4", "mxfp4"), ("auto", "w4a16", "w4a8", "w4a4")
        for weight_format, compute in itertools.product(formats, computes):
            for request_ in (None, "cutlass", "sm120", "sm100", "xla", "cpu"):
                ask = problem(weight_format, compute, "w4a4")
                assert choice(ask, machine, request_) not in able

    def test_the_sentence_says_how_to_take_it_all_the_same(self):
        with pytest.raises(UnsupportedError) as caught:
            resolve(problem(compute="w4a4"), target("cpu"))
        detail = {r.variant: r.detail for r in caught.value.resolution.rejected}["xla_w4a4"]
        assert detail == (
            "AUTO never takes it, since it is for trying this arithmetic anywhere, and slower "
            "than W4A16: pass implementation='xla_w4a4'"
        )

    def test_its_own_name_takes_it(self):
        hopper, names = target("h100", EMULATED), ("cpu", "tpu", "rocm", "h100", "unknown")
        for variant in EMULATED:
            weight_format = "nvfp4" if "w4a4" in variant else "mxfp4"
            ask = problem(weight_format, variant.split("_")[1])
            found = resolve(ask, hopper, variant)
            assert (found.selected, found.layout) == (variant, "block_scaled_128x4")
            assert choice(ask, target("b200", EMULATED), variant) == "-"
        for name in names:
            assert choice(problem(compute="w4a4"), target(name), "xla_w4a4") == "xla_w4a4"
            assert choice(problem("mxfp4", "w4a8"), target(name), "xla_w4a8") == "xla_w4a8"
            assert choice(problem(), target(name), "xla_w4a4") == "-"  # nothing declared w4a4

    def test_names_that_nothing_answers_to_are_not_offered(self):
        names = capability.implementation_names()
        assert {"xla_w4a4", "sm120_w4a4_emulated", "sm120"} <= set(names)
        assert "sm120_emulated" not in names


class TestInputScales:
    @pytest.mark.parametrize(
        ("name", "weight_format", "compute", "variant", "words"),
        [
            ("rtx 5090", "nvfp4", "w4a4", None, "sm120_w4a4 quantises activations by them"),
            ("b200", "mxfp4", "w4a8", None, "sm100_w4a8 quantises activations by them"),
            ("cpu", "nvfp4", "w4a4", "xla_w4a4", "xla_w4a4 quantises activations by them"),
            ("h100", "nvfp4", "auto", None, "ignored: sm90_w4a16 reads activations as they are"),
            ("h100", "mxfp4", "w4a8", None, "sm90_w4a8 quantises activations by them"),
            ("cpu", "nvfp4", "auto", "xla", "ignored: xla reads activations as they are"),
            ("cpu", "nvfp4", "w4a8", "cpu_avx2", "ignored: cpu_avx2 finds the scales of"),
        ],
    )
    def test_explain_says_what_becomes_of_them(self, name, weight_format, compute, variant, words):
        machine = target(name, (*GPU_VARIANTS, *CPU_VARIANTS))
        ask = problem(weight_format, compute, input_scales=True)
        found = resolve(ask, machine, variant)
        assert found.input_scales.startswith(words)
        assert f"scales    static input scales: {words}" in str(found)
        assert "static input scales" in str(ask)
        assert Resolution.from_json(found.to_json()) == found
        without = resolve(dataclasses.replace(ask, input_scales=False), machine, variant)
        assert without.input_scales == ""
        assert "input scales" not in str(without)


class TestProblem:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"op": "matmul"}, "op must be one of moe_mlp"),
            ({"weight_format": "int4"}, "weight_format must be one of nvfp4"),
            ({"compute": "w4a2"}, "compute must be one of auto"),
            ({"declared_compute": "auto"}, "declared_compute must be one of w4a4"),
            ({"weight_format": "bf16", "declared_compute": "w4a4"}, "one of w16a16; got 'w4a4'"),
            ({"top_k": -1}, "top_k must not be negative; got -1"),
        ],
    )
    def test_bad_fields(self, fields, words):
        with pytest.raises(ValueError, match=words):
            problem(**fields)

    def test_dtype_objects_become_names(self):
        for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
            assert problem(activation_dtype=dtype) == problem()

    def test_hashable(self):
        assert len({problem(), problem(), problem("mxfp4")}) == 2
        machine = target("cpu", ["cpu_avx2"])
        same = Target("cpu", None, "cpu", set(EVERY_FEATURE), ["cpu_avx2"], {})
        assert machine == same
        assert hash(machine) == hash(same)
        assert hash(Target("cpu", disqualified={"a": "b"})) == hash(
            Target("cpu", disqualified=(("a", "b"),))
        )
        assert hash(resolve(problem(), machine)) == hash(resolve(problem(), same))


class TestTarget:
    @pytest.mark.parametrize(
        ("kind", "sm"),
        [
            ("Tesla V100-SXM2-16GB", 70),
            ("Tesla T4", 75),
            ("NVIDIA A100-SXM4-80GB", 80),
            ("NVIDIA A100 80GB PCIe", 80),
            ("NVIDIA A30", 80),
            ("NVIDIA A10", 86),
            ("NVIDIA L4", 89),
            ("NVIDIA L40S", 89),
            ("NVIDIA L40", 89),
            ("NVIDIA GeForce RTX 4090", 89),
            ("NVIDIA H100 80GB HBM3", 90),
            ("NVIDIA H200", 90),
            ("NVIDIA GH200 480GB", 90),
            ("NVIDIA B200", 100),
            ("NVIDIA GB200", 100),
            ("NVIDIA B300 SXM6 AC", 103),
            ("NVIDIA GB300", 103),
            ("NVIDIA VR200", 107),
            ("NVIDIA Thor", 110),
            ("NVIDIA GeForce RTX 5090", 120),
            ("NVIDIA RTX PRO 4500 Blackwell", 120),
            ("NVIDIA RTX PRO 5000 Blackwell", 120),
            ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 120),
            ("NVIDIA GB10", 121),
            # Names that contain another's, and one that nobody knows: no guess.
            ("NVIDIA A1000", None),
            ("NVIDIA RTX 6000 Ada Generation", None),
            ("NVIDIA RTX 123", None),
        ],
    )
    def test_device_names(self, kind, sm):
        assert Target.from_name(kind).sm == sm
        assert Target.from_name(kind).platform == "cuda"
        assert Target.from_abstract(abstract_device(kind)).sm == sm

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("sm_120", ("cuda", 120)),
            ("SM120", ("cuda", 120)),
            ("sm_90a", ("cuda", 90)),
            ("compute_120f", ("cuda", 120)),
            ("12.1", ("cuda", 121)),
            ("9.0", ("cuda", 90)),
            ("rtx 5090", ("cuda", 120)),
            ("RTX PRO 6000", ("cuda", 120)),
            ("gb10", ("cuda", 121)),
            ("thor", ("cuda", 110)),
            ("b300", ("cuda", 103)),
            ("unknown", ("cuda", None)),
            ("cpu", ("cpu", None)),
            ("TPU", ("tpu", None)),
            ("TPU v5e", ("tpu", None)),
            ("AMD Instinct MI300X", ("rocm", None)),
            ("gfx942", ("rocm", None)),
        ],
    )
    def test_names(self, name, expected):
        found = Target.from_name(name)
        assert (found.platform, found.sm) == expected

    @pytest.mark.parametrize("name", ["", "rtx", "12", "sm_9", "h1000", "gb100"])
    def test_unknown_name(self, name):
        with pytest.raises(ValueError, match=r"is unknown: name a platform \(cpu, cuda"):
            Target.from_name(name)

    @pytest.mark.parametrize(
        ("platform", "kind", "capability", "expected"),
        [
            ("gpu", "NVIDIA H100 80GB HBM3", "9.0", ("cuda", 90)),
            ("gpu", "NVIDIA GeForce RTX 3060", "8.6", ("cuda", 86)),
            ("gpu", "NVIDIA Thing", "12.1", ("cuda", 121)),
            ("gpu", "NVIDIA Thing", "13.0", ("cuda", 130)),
            ("cuda", "NVIDIA GB10", "12.1", ("cuda", 121)),
            ("gpu", "AMD Instinct MI300X", "gfx942", ("rocm", None)),
            ("rocm", "AMD Instinct MI300X", "gfx942", ("rocm", None)),
            ("tpu", "TPU v5 lite", None, ("tpu", None)),
            ("cpu", "cpu", None, ("cpu", None)),
            ("METAL", "Metal", None, ("metal", None)),
        ],
    )
    def test_from_device(self, platform, kind, capability, expected):
        class Device:
            pass

        device = Device()
        device.platform, device.device_kind = platform, kind
        if capability is not None:
            device.compute_capability = capability
        found = Target.from_device(device, features={"avx2"}, built={"xla"})
        assert (found.platform, found.sm) == expected
        assert found.device_kind == kind
        assert found.features == ({"avx2"} if platform == "cpu" else frozenset())
        assert found.built == {"xla"}
        assert choice(problem(), found) == "xla"

    def test_from_abstract_of_other_platforms(self):
        for kind, platform in (("cpu", "cpu"), ("TPU v5e", "tpu"), ("gfx942", "rocm")):
            assert Target.from_abstract(abstract_device(kind)).platform == platform

        class Strange:
            device_kind = "Tensor Widget 3"

        assert Target.from_abstract(Strange()).platform == "unknown"
        assert choice(problem(), Target.from_abstract(Strange())) == "xla"

    def test_this_machine(self):
        found = Target.from_device(jax.devices("cpu")[0], features={"avx2"})
        assert (found.platform, found.sm, found.features) == ("cpu", None, {"avx2"})

    def test_sm_without_cuda(self):
        with pytest.raises(ValueError, match=r"got sm=90 with platform 'cpu'"):
            Target("cpu", 90)


class TestResolution:
    def test_prints_an_aligned_table(self):
        text = str(resolve(problem(declared="w4a4"), target("rtx 5090")))
        assert "target    sm_120 (rtx 5090)" in text
        assert "selected  xla (w4a16, layout canonical" in text
        assert "degraded  from w4a4" in text
        lines = text.splitlines()
        rows = lines[lines.index("rejected") + 1 :]
        assert len({line.index(reason.name) for line in rows for reason in Reason
                    if reason.name in line.split()}) == 1  # fmt: skip
        assert all(len(line) <= 100 for line in rows)
        for row in TABLE:
            assert row.variant == "xla" or any(line.split()[0] == row.variant for line in rows)

    def test_explain_is_total(self):
        blackwell, hopper = target("rtx 5090", GPU_VARIANTS), target("h100")
        assert "selected  sm120_w4a4" in explain(problem(compute="w4a4"), blackwell)
        text = explain(problem(compute="w4a4"), hopper)
        assert "selected  none" in text
        assert "way out   with compute='auto', xla runs it as w4a16" in text
        assert "W4A4 does not exist on SM 90" in text

    @pytest.mark.parametrize("request_", [None, "xla", ["cutlass", "xla"]])
    def test_json_round_trip(self, request_):
        machine = Target.from_name(
            "cpu", features=AVX512, built=CPU_VARIANTS, disqualified={"cpu_avx512": "x"}
        )
        resolution = resolve(problem(declared="w4a4"), machine, request_)
        text = resolution.to_json(indent=2)
        assert Resolution.from_json(text) == resolution
        assert all(r["reason"] in Reason.__members__ for r in json.loads(text)["rejected"])

    def test_failure_round_trips_and_pickles(self):
        with pytest.raises(UnsupportedError) as caught:
            resolve(problem(compute="w4a4"), target("h100"))
        failed = caught.value.resolution
        assert Resolution.from_json(failed.to_json()) == failed
        with pytest.raises(UnsupportedError, match="w4a4"):
            _ = failed.variant
        copy = pickle.loads(pickle.dumps(caught.value))
        assert copy.resolution == failed
        assert str(copy) == str(caught.value)


class TestPurity:
    def test_resolve_asks_nothing_of_the_machine(self, monkeypatch):
        ask, machine = problem(declared="w4a4"), target("sm_120", GPU_VARIANTS)
        expected = resolve(ask, machine)

        def forbidden(*args, **kwargs):
            raise AssertionError("resolve must be pure")

        for name in ("devices", "local_devices", "default_backend"):
            monkeypatch.setattr(jax, name, forbidden)
        for name in ("time", "monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, forbidden)
        monkeypatch.setattr(os, "getenv", forbidden)
        monkeypatch.setattr(type(os.environ), "__getitem__", forbidden)
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", forbidden)
            found = resolve(ask, machine)
            refused = choice(problem(compute="w4a8"), machine)
        assert found == expected
        assert refused == "-"

    def test_override_does_not_reach_resolve(self):
        with override(target="sm_120", implementation="xla"):
            machine = target("cpu", CPU_VARIANTS)
            assert choice(problem(), machine) == "cpu_amx"


def abstract_device(kind: str, platform: str = "gpu"):
    device = jax.sharding.AbstractDevice
    if "platform" in device.__dataclass_fields__:
        return device(device_kind=kind, num_cores=None, platform=platform_of(kind, platform))
    return device(device_kind=kind, num_cores=None)  # JAX 0.8


def platform_of(kind: str, default: str) -> str:
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("TPU") else default


def abstract_mesh(kind: str):
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=abstract_device(kind))
    return jax.sharding.use_abstract_mesh(mesh)


class TestContext:
    def trace(self):
        """A jitted function and the targets and overrides that its traces saw."""
        seen = []

        @jax.jit
        def function(x):
            seen.append((current_target().name, capability.current_override().implementation))
            return x + 1

        return function, seen

    def test_change_of_override_retraces(self):
        function, seen = self.trace()
        x = jnp.ones(3)
        function(x)
        function(x)
        here = (Target.from_device(jax.devices()[0]).name, None)
        assert seen == [here]
        with override(target="sm_120"):
            function(x)
            function(x)
        assert seen[1:] == [("sm_120", None)]
        with override(target="sm_90"):
            function(x)
        assert seen[2:] == [("sm_90", None)]
        with override(implementation="xla"):
            function(x)
        assert seen[3:] == [(here[0], ("xla",))]
        with override(target="sm_120"):  # the first trace for it is still in the cache
            function(x)
        function(x)
        assert len(seen) == 4

    def test_blocks_nest_and_end(self):
        none = capability.current_override()
        with override(target="sm_120"):
            with override(implementation=["cutlass", "xla"]) as inner:
                assert inner.target == "sm_120"
                assert inner.implementation == ("cutlass", "xla")
                assert capability.current_override() == inner
            assert capability.current_override().implementation is None
        with pytest.raises(RuntimeError, match="inside"), override(target="sm_120"):
            raise RuntimeError("inside")
        assert capability.current_override() == none

    def test_order_override_then_abstract_mesh_then_device(self):
        function, seen = self.trace()
        x = jax.ShapeDtypeStruct((3,), jnp.float32)
        with abstract_mesh("NVIDIA GB10"):
            function.trace(x).lower(lowering_platforms=("cuda",))
            with override(target="sm_90"):
                function.trace(x).lower(lowering_platforms=("cuda",))
        function.trace(x).lower()
        names = [name for name, _ in seen]
        assert names == ["sm_121", "sm_90", Target.from_device(jax.devices()[0]).name]

    def test_target_given_whole_is_taken_as_it_is(self):
        whole = Target.from_name("gb10", built=["sm120_w4a4"])
        with override(target=whole):
            assert current_target(built={"cpu_avx2"}, features={"avx2"}) is whole
        with override(target="cpu"):
            found = current_target(built={"cpu_avx2"}, features={"avx2"})
            assert (found.built, found.features) == ({"cpu_avx2"}, {"avx2"})

    def test_mesh_of_local_devices(self):
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            found = current_target(features={"avx2"})
        assert found.platform == Target.from_device(jax.devices()[0]).platform

    def test_unlisted_kind_of_a_local_device(self, monkeypatch):
        class Device:
            platform, device_kind, compute_capability = "gpu", "NVIDIA RTX 123", "8.6"

        monkeypatch.setattr(jax, "local_devices", lambda *a, **k: [Device()])
        with abstract_mesh("NVIDIA RTX 123"):
            assert current_target().sm == 86
        with abstract_mesh("NVIDIA RTX 124"):
            assert current_target().sm is None

    def test_default_device(self):
        with jax.default_device(jax.devices("cpu")[0]):
            assert current_target().platform == "cpu"
        with jax.default_device("cpu"):
            assert current_target().platform == "cpu"

    def test_wrong_names_fail_at_once(self):
        with pytest.raises(ValueError, match="target 'sm_x' is unknown"), override(target="sm_x"):
            pass
        with (
            pytest.raises(ValueError, match="implementation 'x' is unknown"),
            override(implementation="x"),
        ):
            pass


class TestSelect:
    def test_call_is_stronger_than_override(self):
        info = {"built": CPU_VARIANTS, "features": AVX512}
        with override(target="cpu", implementation="cpu_portable"):
            assert select(problem(), **info).selected == "cpu_portable"
            assert select(problem(), "xla", **info).selected == "xla"
        with override(target="cpu"):
            assert select(problem(), **info).selected == "cpu_avx512"

    def test_degradation_is_logged_once(self, caplog, monkeypatch):
        monkeypatch.setattr(capability.context, "_logged", set())
        caplog.set_level(logging.INFO, "jaxmoe")
        with override(target="sm_120"):
            for _ in range(3):
                select(problem(declared="w4a4"))
            select(problem(declared="w4a16"))
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        message = record.getMessage()
        for word in ("nvfp4", "w4a4", "xla", "w4a16", "sm_120"):
            assert word in message
        with override(target="sm_90"):
            select(problem(declared="w4a4"))
        assert len(caplog.records) == 2


class TestManifest:
    rows = tuple(row for row in TABLE if row.family == "cpu")

    def manifest(self):
        f32 = {"avx2", "fma", "f16c"}
        avx512 = AVX512 - {"avx2"}
        return {
            "abi": 1,
            "library": "cpu",
            "layout": "panel32",
            "variants": {
                "cpu_amx": {
                    "features": sorted(EVERY_FEATURE - {"avx2", "avx_vnni"}),
                },
                "cpu_avx512_bf16": {"features": sorted(AVX512_BF16 - {"avx2"})},
                "cpu_avx512_vnni": {"features": sorted(AVX512_VNNI - {"avx2"})},
                "cpu_avx512": {"features": sorted(avx512)},
                "cpu_avx_vnni": {"features": sorted(f32 | {"avx_vnni"})},
                "cpu_avx2": {"features": sorted(f32)},
                "cpu_portable": {"features": []},
            },
            "formats": ["nvfp4", "mxfp4"],
            "activations": sorted(ACTIVATIONS),
            "ops": ["moe_mlp", "grouped_matmul"],
        }

    def test_agreement(self):
        assert check_manifest(self.manifest(), self.rows) == []

    def test_kernel_without_row(self):
        manifest = self.manifest()
        manifest["variants"]["cpu_sve"] = {"features": ["sve"]}
        (found,) = check_manifest(manifest, self.rows)
        assert "cpu_sve" in found
        assert "no such row" in found

    def test_row_without_kernel(self):
        manifest = self.manifest()
        del manifest["variants"]["cpu_avx2"]
        (found,) = check_manifest(manifest, self.rows)
        assert "cpu_avx2" in found
        assert "no such kernel" in found

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("layout", "panel16"),
            ("formats", ["nvfp4"]),
            ("formats", ["nvfp4", "mxfp4", "int4"]),
            ("activations", sorted(ACTIVATIONS - {"relu"})),
            ("ops", ["moe_mlp"]),
        ],
    )
    def test_differing_library(self, key, value):
        found = check_manifest({**self.manifest(), key: value}, self.rows)
        assert len(found) == len(self.rows)
        assert all(key in sentence and "in the table" in sentence for sentence in found)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("features", ["avx2"]), ("activation_dtypes", ["float32"]), ("smem_bytes", 4)],
    )
    def test_differing_variant(self, key, value):
        manifest = self.manifest()
        manifest["variants"]["cpu_avx2"][key] = value
        (found,) = check_manifest(manifest, self.rows)
        assert found.startswith(f"cpu_avx2: {key}")

    def test_rows_without_a_kernel_are_not_asked_for(self):
        rows = [row for row in TABLE if row.family == "sm120"]
        manifest = {
            "layout": "block_scaled_128x4",
            "formats": [],  # each variant states its own
            "activations": sorted(ACTIVATIONS),
            "variants": {
                "sm120_w4a4": {"sms": [120, 121], "smem_bytes": 97280, "formats": ["nvfp4"]},
                "sm120_w4a8": {"sms": [120, 121], "smem_bytes": 97280, "formats": ["mxfp4"]},
            },
        }
        assert check_manifest(manifest, rows) == []


class TestTable:
    def test_rows_are_well_formed(self):
        assert len({row.variant for row in TABLE}) == len(TABLE)
        assert TABLE[-1].variant == "xla"
        for row in TABLE:
            assert (row.sms is not None) == (row.platform == "cuda")
            assert hash(row) == hash(dataclasses.replace(row))
            assert row.deterministic

    def test_every_kernel_has_computed_somewhere_and_a_record_says_so(self):
        for row in TABLE:
            if row.never:
                assert (row.evidence, row.record) == ("none", "")
            else:
                assert row.evidence in ("hardware", "emulated")
                assert (ROOT / row.record).is_file()

    def test_shared_memory_fits_every_sm(self):
        for row in TABLE:
            for sm in row.sms or ():
                assert (row.smem_bytes or 0) <= SMEM_LIMIT[sm]

    def test_activations_are_those_of_the_package(self):
        from jaxmoe import activations

        assert set(activations.ACTIVATIONS) == ACTIVATIONS

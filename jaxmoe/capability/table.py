"""What each kernel variant can run: data only. `resolver.resolve` is the one reader.

Order is priority. A row states only what is known of its kernel; whether the kernel was compiled
into this installation is the `Target`'s to say. SM sets are lists, never ranges: a new SM belongs
to no row until someone has shown that a kernel runs there.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

OPS = ("moe_mlp", "grouped_matmul")

# Names of the arithmetic by weight format, from the least to the most accurate.
FP4_COMPUTE = ("w4a4", "w4a8", "w4a16")
COMPUTE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "nvfp4": FP4_COMPUTE,
        "mxfp4": FP4_COMPUTE,
        "mxfp8": ("w8a16",),
        "fp8": ("w8a16",),
        "bf16": ("w16a16",),
    }
)

ACTIVATIONS = frozenset(
    {
        "swiglu",
        "swiglu_step",
        "geglu",
        "geglu_tanh",
        "situ",
        "relu2",
        "silu",
        "gelu",
        "gelu_tanh",
        "relu",
        "identity",
    }
)

# What the names of a variant and of a library end with whose instructions are emulated.
EMULATED = "_emulated"

# SMs that the project knows, with or without a row. All others (107, 110, 130, ...) are refused
# by name.
KNOWN_SMS = frozenset({70, 75, 80, 86, 89, 90, 100, 103, 120, 121})
UNKNOWN_SM_NAMES: Mapping[int, str] = MappingProxyType({107: "VR200", 110: "Thor"})

# Opt-in shared memory of one thread block in bytes: 227 KiB on SM 90, 100 and 103, 99 KiB on
# SM 120 and 121 (CUTLASS `arch.h`), 163 KiB on SM 80 and 99 KiB on SM 86 and 89 (CUDA C++
# Programming Guide, "Compute Capabilities").
SMEM_LIMIT: Mapping[int, int] = MappingProxyType(
    {
        80: 166912,
        86: 101376,
        89: 101376,
        90: 232448,
        100: 232448,
        103: 232448,
        120: 101376,
        121: 101376,
    }
)

# Words of a device's name -> SM. The names are those of JAX's own list
# (`jax.experimental.pallas.triton.GpuVersion`) and of the GeForce RTX 5090, V100 and L40S.
DEVICE_SMS: Mapping[str, int] = MappingProxyType(
    {
        "v100": 70,
        "t4": 75,
        "a100": 80,
        "a30": 80,
        "a10": 86,
        "l4": 89,
        "l40": 89,
        "l40s": 89,
        "rtx 4090": 89,
        "h100": 90,
        "h200": 90,
        "gh200": 90,
        "b200": 100,
        "gb200": 100,
        "b300": 103,
        "gb300": 103,
        "vr200": 107,
        "thor": 110,
        "rtx 5090": 120,
        "rtx pro 4500": 120,
        "rtx pro 5000": 120,
        "rtx pro 6000": 120,
        "gb10": 121,
    }
)


class Reason(enum.Enum):
    """Why a variant cannot run a problem on a target. Closed: every refusal is one of these."""

    PLATFORM_UNSUPPORTED = "platform_unsupported"
    SM_UNKNOWN = "sm_unknown"
    SM_UNSUPPORTED = "sm_unsupported"
    INSTRUCTION_MISSING = "instruction_missing"
    NOT_IN_JAXMOE = "not_in_jaxmoe"
    ONLY_BY_NAME = "only_by_name"
    OP_UNSUPPORTED = "op_unsupported"
    FORMAT_UNSUPPORTED = "format_unsupported"
    COMPUTE_UNSUPPORTED = "compute_unsupported"
    DTYPE_UNSUPPORTED = "dtype_unsupported"
    ACTIVATION_UNSUPPORTED = "activation_unsupported"
    BIAS_UNSUPPORTED = "bias_unsupported"
    SHAPE_UNALIGNED = "shape_unaligned"
    TOO_MANY_EXPERTS = "too_many_experts"
    NOT_BUILT = "not_built"
    CPU_FEATURE_MISSING = "cpu_feature_missing"
    SELF_TEST_FAILED = "self_test_failed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel variant and everything it can run.

    Args:
      variant: name of the kernel variant, unique in the table.
      provider: who wrote the kernel's mainloop: `cpu`, `cutlass`, `jaxmoe`, `xla`, ...
      family: the native library that holds it (`jaxmoe._sm120`), or `cpu`, or `xla`.
      platform: XLA platform, or None for any.
      sms: the SMs it runs on, or None where the platform has none.
      arithmetic: pairs of weight format and compute.
      opt_in: arithmetic that `auto` never takes, whatever the weights declare.
      operands: what the matrix unit multiplies, in words.
      ops: the public functions it serves.
      activation_dtypes: dtypes of `x`.
      any_result: whether `grouped_matmul` gives a result of another dtype than x's.
      activations: names of its activation functions, or None for any.
      bias: whether it adds biases.
      alignment: `(K, N)`: contracted sizes are multiples of K, output sizes of N.
      max_experts: most experts in one call, or None.
      smem_bytes: most shared memory that one of its kernels takes, or None.
      features: CPU features that it needs.
      layout: the layout of prepared weights that it reads.
      input_scales: whether it quantises activations by the static scales of `ExpertWeights` where
        they are given; other rows ignore those.
      other_formats: why it takes no other weight format, for the refusal of one.
      deterministic: whether the same inputs give the same bits.
      evidence: how its numbers were checked: `hardware`; `emulated`, on another GPU with the
        missing instructions computed by others; `compiled`, not at all; `none` without a kernel.
      record: where the evidence is written down.
      only_by_name: why nothing but its own name selects it, neither AUTO nor the name of a family
        or provider; "" where they do.
      never: for a row with no kernel behind it, the reason and the sentence to answer with.
    """

    variant: str
    provider: str
    family: str
    platform: str | None
    arithmetic: frozenset[tuple[str, str]]
    operands: str
    layout: str
    other_formats: str = ""
    opt_in: frozenset[str] = frozenset()
    sms: frozenset[int] | None = None
    ops: frozenset[str] = frozenset(OPS)
    activation_dtypes: frozenset[str] = frozenset({"bfloat16", "float32"})
    any_result: bool = True
    activations: frozenset[str] | None = ACTIVATIONS
    bias: bool = True
    alignment: tuple[int, int] = (1, 1)
    max_experts: int | None = None
    smem_bytes: int | None = None
    features: frozenset[str] = frozenset()
    input_scales: bool = False
    deterministic: bool = True
    evidence: str = "none"
    record: str = ""
    only_by_name: str = ""
    never: tuple[Reason, str] | None = None

    @property
    def weight_formats(self) -> frozenset[str]:
        """The weight formats of `arithmetic`."""
        return frozenset(weight_format for weight_format, _ in self.arithmetic)

    def computes(self, weight_format: str) -> tuple[str, ...]:
        """The arithmetic it has for one weight format, least accurate first."""
        return tuple(c for c in COMPUTE[weight_format] if (weight_format, c) in self.arithmetic)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which `implementation` can ask for it."""
        if self.only_by_name:
            return (self.variant,)
        return (self.variant, self.provider, self.family)


def _arithmetic(compute: str, *weight_formats: str) -> frozenset[tuple[str, str]]:
    return frozenset((weight_format, compute) for weight_format in weight_formats)


_HALF = frozenset({"bfloat16", "float16"})
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c"})
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AVX512_BF16 = _AVX512_VNNI | {"avx512vbmi", "avx512_bf16"}
_W4A16 = _arithmetic("w4a16", "nvfp4", "mxfp4")


_W4A4, _W4A8 = _arithmetic("w4a4", "nvfp4"), _arithmetic("w4a8", "mxfp4")
_QUANTISED = (("w4a4", _W4A4, "NVFP4 × NVFP4"), ("w4a8", _W4A8, "MXFP4 × MXFP8"))
_LAYOUT = "block_scaled_128x4"


def _block_scaled(family: str, sms: tuple[int, ...], smem_bytes: tuple[int, int]) -> list[Row]:
    """The two variants of a Blackwell family."""
    return [
        Row(
            variant=f"{family}_{compute}",
            provider="cutlass",
            family=family,
            platform="cuda",
            sms=frozenset(sms),
            arithmetic=arithmetic,
            operands=f"{formats}, block-scaled MMA",
            other_formats=f"its matrix instruction multiplies {formats} alone",
            activation_dtypes=frozenset({"bfloat16"}),
            any_result=False,
            # CUTLASS grouped GEMM with device-side shapes checks nothing itself: TMA rows of FP4
            # are multiples of 16 bytes, of 32 where FP4 is spread over bytes beside FP8; 16-byte
            # rows of the bf16 output need N % 8.
            alignment=(k, 8),
            max_experts=1024,
            smem_bytes=smem,
            layout=_LAYOUT,
            input_scales=True,
            evidence="emulated",
            record="docs/evidence/blackwell-emulated.md",
        )
        for (compute, arithmetic, formats), smem, k in zip(
            _QUANTISED, smem_bytes, (32, 64), strict=True
        )
    ]


def _emulated(row: Row) -> Row:
    """The same kernel on Hopper."""
    return dataclasses.replace(
        row,
        variant=row.variant + EMULATED,
        family=row.family + EMULATED,
        sms=frozenset({90}),
        operands=f"{row.operands}, emulated on Hopper",
        only_by_name="it emulates another GPU's matrix instructions, to test its kernels",
    )


def _sm90(
    variant: str,
    arithmetic: frozenset[tuple[str, str]],
    operands: str,
    layout: str = "sm90_fragment",
    **fields: Any,
) -> Row:
    return Row(
        variant=variant,
        provider="jaxmoe",
        family="sm90",
        platform="cuda",
        sms=frozenset({90}),
        arithmetic=arithmetic,
        operands=operands,
        activation_dtypes=_HALF,
        any_result=False,
        alignment=(32, 8),
        layout=layout,
        **fields,
    )


def _cpu(
    variant: str,
    features: frozenset[str],
    dtypes: tuple[str, ...],
    operands: str,
) -> Row:
    return Row(
        variant=variant,
        provider="cpu",
        family="cpu",
        platform="cpu",
        arithmetic=_W4A16 | _arithmetic("w4a8", "nvfp4", "mxfp4"),
        opt_in=frozenset({"w4a8"}),
        operands=operands,
        activation_dtypes=frozenset(dtypes),
        alignment=(32, 1),
        features=features,
        layout="panel32",
        evidence="hardware",
        record="docs/evidence/cpu-kernels.md",
    )


def _elsewhere(variant: str, arithmetic: frozenset[tuple[str, str]], sentence: str) -> Row:
    return Row(
        variant=variant,
        provider=variant,
        family=variant,
        platform="cuda",
        sms=frozenset({100, 103}),
        arithmetic=arithmetic,
        operands="tcgen05 block-scaled MMA",
        ops=frozenset({"moe_mlp"}),
        activation_dtypes=_HALF,
        layout=variant,
        never=(Reason.NOT_IN_JAXMOE, sentence),
    )


_BLACKWELL = (
    *_block_scaled("sm120", (120, 121), (97280, 97280)),
    *_block_scaled("sm100", (100, 103), (223232, 227328)),
)

TABLE: tuple[Row, ...] = (
    *_BLACKWELL,
    _sm90(
        "sm90_w4a8",
        _W4A8,
        "MXFP4 × FP8 (e4m3, a power of two for each row), wgmma",
        layout="sm90_fragment_fp8",
        other_formats=(
            "an NVFP4 block scale is e4m3, and its product with e2m1 takes 6 significant bits of "
            "which e4m3 has 4, so that the weights would be rounded, by 2.2 % in relative L2"
        ),
        max_experts=1024,
        smem_bytes=231592,
        input_scales=True,
        evidence="hardware",
        record="docs/evidence/sm90-h100.md",
    ),
    _sm90(
        "sm90_w4a16",
        _W4A16,
        "weights scaled exactly to the activations' dtype, wgmma",
        max_experts=1024,
        smem_bytes=232448,
        evidence="hardware",
        record="docs/evidence/sm90-h100.md",
    ),
    Row(
        variant="sm80_w4a16",
        provider="jaxmoe",
        family="sm80",
        platform="cuda",
        sms=frozenset({80, 86, 89, 90, 100, 103, 120, 121}),
        arithmetic=_W4A16,
        operands="weights scaled exactly to the activations' dtype, mma.sync m16n8k16",
        activation_dtypes=_HALF,
        any_result=False,
        alignment=(32, 8),
        max_experts=1024,
        smem_bytes=100520,
        layout="sm90_fragment",  # a warp's A fragments of wgmma are those of mma.sync
        evidence="hardware",
        record="docs/evidence/sm80-h100.md",
    ),
    _elsewhere(
        "trtllm_gen",
        _W4A4 | _W4A8 | _arithmetic("w4a16", "mxfp4"),
        "trtllm-gen FP4 MoE kernels are SM 100 and 103 only (tcgen05 cubins of TensorRT-LLM), and "
        "jaxmoe ships none of them; its own kernels there are sm100_w4a4 and sm100_w4a8",
    ),
    _elsewhere(
        "cute_dsl",
        _W4A4,
        "CuTe DSL FP4 MoE kernels are SM 100 and 103 only (tcgen05), and jaxmoe ships none of "
        "them; its own kernels there are sm100_w4a4 and sm100_w4a8",
    ),
    _sm90(
        "sm90_w4a4",
        _arithmetic("w4a4", "nvfp4", "mxfp4"),
        "FP4 × FP4",
        never=(
            Reason.INSTRUCTION_MISSING,
            "W4A4 does not exist on SM 90: Hopper has no FP4 matrix instruction. Use compute="
            "'w4a16' (sm90_w4a16)",
        ),
    ),
    Row(
        variant="sm120_generic",
        provider="cutlass",
        family="sm120",
        platform="cuda",
        sms=frozenset({120, 121}),
        arithmetic=_W4A4 | _W4A8,
        operands="block-scaled MMA",
        layout=_LAYOUT,
        never=(
            Reason.INSTRUCTION_MISSING,
            "a build for plain sm_120 has no block-scaled MMA (ptxas rejects it): the family "
            "target sm_120f has, which sm120_w4a4 and sm120_w4a8 are built for",
        ),
    ),
    *map(_emulated, _BLACKWELL),
    _cpu(
        "cpu_amx",
        _AVX512_BF16 | {"avx512_fp16", "amx_tile", "amx_bf16"},
        ("bfloat16", "float32"),
        "weights scaled exactly to bf16, AMX tiles (f32 activations as three bf16 terms); few rows "
        "of bf16: 16-bit integers, VNNI; w4a8: 8-bit integers, few rows by VNNI, more in the tiles",
    ),
    _cpu(
        "cpu_avx512_bf16",
        _AVX512_BF16,
        ("bfloat16",),
        "weights scaled exactly to bf16, vdpbf16ps; few rows: 16-bit integers, VNNI; w4a8: 8-bit "
        "integers, VNNI",
    ),
    _cpu(
        "cpu_avx512_vnni",
        _AVX512_VNNI,
        ("bfloat16", "float32"),
        "bf16: 16-bit integers, VNNI; f32: AVX-512 FMA; w4a8: 8-bit integers, VNNI",
    ),
    _cpu(
        "cpu_avx512",
        _AVX512,
        ("bfloat16", "float32"),
        "f32 lanes, AVX-512 FMA; w4a8: 8-bit integers, byte multiplies",
    ),
    _cpu(
        "cpu_avx_vnni",
        _AVX2 | {"avx_vnni"},
        ("bfloat16", "float32"),
        "bf16: 16-bit integers, VNNI; f32: AVX2 FMA; w4a8: 8-bit integers, VNNI",
    ),
    _cpu(
        "cpu_avx2",
        _AVX2,
        ("bfloat16", "float32"),
        "f32 lanes, AVX2 FMA; few bf16 rows: 16-bit integers; w4a8: 8-bit integers",
    ),
    _cpu("cpu_portable", frozenset(), ("bfloat16", "float32"), "f32, plain C++"),
    *(
        Row(
            variant=f"xla_{compute}",
            provider="xla",
            family="xla",
            platform=None,
            arithmetic=arithmetic,
            operands=f"{formats}, weights and rows dequantised, XLA dot",
            activation_dtypes=frozenset({"bfloat16", "float16", "float32"}),
            activations=None,
            alignment=(32, 1),
            layout="canonical",
            input_scales=True,
            evidence="hardware",
            record="docs/accuracy.md",
            only_by_name="it is for trying this arithmetic anywhere, and slower than W4A16",
        )
        for compute, arithmetic, formats in _QUANTISED
    ),
    Row(
        variant="xla",
        provider="xla",
        family="xla",
        platform=None,
        arithmetic=_W4A16 | _arithmetic("w8a16", "mxfp8", "fp8") | _arithmetic("w16a16", "bf16"),
        operands="weights dequantised group by group, XLA dot",
        activation_dtypes=frozenset({"bfloat16", "float16", "float32"}),
        activations=None,
        layout="canonical",
        evidence="hardware",
        record="docs/evidence/cpu-kernels.md",
    ),
)

"""Writes the CUTLASS headers with which an SM 120 or SM 100 kernel computes on an H100.

    python csrc/emulation/overlay.py sm120 CUTLASS/include OVERLAY

The overlay holds copies of the few headers that issue instructions which SM 90 lacks, with those
instructions replaced by the functions of this folder, and FP4 tensor maps by maps of bytes. It
comes before CUTLASS in the include path. Kernels, tiles, schedules and arguments stay what they
are. Every place to patch must be found as often as expected: a CUTLASS that has changed there is an
error.
"""

import pathlib
import re
import sys


class Header:
    """A header of CUTLASS and the changes to it."""

    def __init__(self, root: pathlib.Path, name: str):
        self.name = name
        self.text = (root / name).read_text()

    def replace(self, pattern: str, replacement: str, count: int, within: str = "") -> None:
        """Replaces a regular expression everywhere, or inside the match of `within`."""
        begin, end = 0, len(self.text)
        if within:
            found = list(re.finditer(within, self.text, re.S))
            if len(found) != 1:
                self.fail(within, len(found), 1)
            begin, end = found[0].span()
        part, made = re.subn(pattern, replacement, self.text[begin:end], flags=re.S)
        if made != count:
            self.fail(pattern, made, count)
        self.text = self.text[:begin] + part + self.text[end:]

    def body(self, struct: str, function: str, code: str) -> None:
        """Gives a function another body: `code`, in place of everything it did on the device.

        An empty `struct` is for a function outside of any.
        """
        start = re.search(rf"{struct}\s*\{{", self.text) if struct else re.match("", self.text)
        if not start:
            self.fail(struct, 0, 1)
        match = re.compile(rf"\b{function}\([^{{;]*?\)\s*\{{").search(self.text, start.end())
        if not match or (
            struct and re.search(r"^(struct|class) ", self.text[start.end() : match.start()], re.M)
        ):
            self.fail(f"{struct} ... {function}", 0, 1)
        close, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self.text[close], 0)
            close += 1
        code = f"\n#if defined(__CUDA_ARCH__)\n{code}\n#endif\n"
        self.text = self.text[: match.end()] + code + self.text[close - 1 :]

    def include(self, header: str) -> None:
        self.replace("#pragma once", f'#pragma once\n#include "{header}"', 1)

    def fail(self, pattern: str, found: int, expected: int):
        sys.exit(
            f"overlay: {self.name} has {found} places that match\n  {pattern}\nwhere {expected} "
            "were expected: this CUTLASS is not 4.5; adapt csrc/emulation/overlay.py"
        )


def byte_maps(header: Header, copy: str, sites: int) -> None:
    """Tensor maps of FP4 describe the same bytes as uint8, half as many along K."""
    header.replace(
        rf"((?:TMA_[AB] = decltype\(|tma_load_[ab](?:_fallback)? = ){copy})"
        r"(?:<TmaInternalElement[AB]>)?\(",
        r"\1<uint8_t>(",
        sites,
    )
    header.replace(
        r"\n( *)for \(uint64_t& stride : prob_stride_A\) \{",
        r"\n\1if constexpr (cute::sizeof_bits_v<TmaInternalElementA> == 4) prob_shape_A[0] /= 2;"
        r"\n\1if constexpr (cute::sizeof_bits_v<TmaInternalElementB> == 4) prob_shape_B[0] /= 2;"
        r"\n\1for (uint64_t& stride : prob_stride_A) {",
        1,
    )


def packed_maps(header: Header, stage: str, sites: int) -> None:
    """Maps that spread FP4 over bytes become maps of packed rows."""
    layout = f"SmemLayoutA{{}}({stage}cute::Int<0>{{}})"
    header.replace(
        re.escape(layout), f"jaxmoe::emulation::copied_layout<IsF8F6F4>({layout})", sites
    )


def sm120(cutlass: pathlib.Path) -> list[Header]:
    mma = Header(cutlass, "cute/arch/mma_sm120.hpp")
    mma.include("emulation/mma.hpp")
    for shape, scale, multiply in (
        ("64_TN_VS<float_e2m1_t, float_e2m1_t", "ue4m3", "64<VS, jaxmoe::emulation::Scale::kE4m3>"),
        ("32_TN_VS<float_e2m1_t, float_e4m3_t", "ue8m0", "32"),
    ):
        mma.body(
            f"struct SM120_16x8x{shape}, float, float_{scale}_t, VS>",
            "fma",
            "const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};\n"
            "float d[4] = {c0, c1, c2, c3};\n"
            f"jaxmoe::emulation::mma_16x8x{multiply}(\n"
            "    d, a, b, jaxmoe::emulation::share_scales(sfa0, sfb0));\n"
            "d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];",
        )
    load = Header(cutlass, "cute/arch/copy_sm100.hpp")
    load.include("emulation/mma.hpp")
    load.body(
        "struct SM100_SU4_DU8x16_x4_LDSM_N",
        "copy",
        "jaxmoe::emulation::load_spread_matrices(\n"
        "    cast_smem_ptr_to_uint(&smem_src), dst0, dst1, dst2, dst3);",
    )
    mainloop = Header(cutlass, "cutlass/gemm/collective/sm120_blockscaled_mma_array_tma.hpp")
    mainloop.include("emulation/spread.hpp")
    byte_maps(mainloop, "make_tma_copy", 4)
    packed_maps(mainloop, "_,_,", 2)
    mainloop.replace(
        r"pipeline\.consumer_wait\(smem_pipe_read\);",
        """\\g<0>
    if constexpr (IsF8F6F4) {
      jaxmoe::emulation::spread_tile<size<0>(TileShape{}), size(TiledMma{})>(
          shared_tensors.smem_A.begin() + read_stage * (cute::cosize_v<SmemLayoutA> /
              DispatchPolicy::Stages), thread_idx, [] {
            cutlass::arch::NamedBarrier::sync(
                size(TiledMma{}), cutlass::arch::ReservedNamedBarriers::Sm120MainloopBarrier);
          });
    }""",
        2,
    )
    return [mma, load, mainloop]


def sm100(cutlass: pathlib.Path) -> list[Header]:
    # A kernel with another instruction that is not emulated does not compile: the assembler names
    # the function.
    config = Header(cutlass, "cute/config.hpp")
    config.replace(
        r"#if defined\(__CUDA_ARCH__\)\n#  define CUTE_INVALID_CONTROL_PATH\(x\) [^\n]*",
        "#if defined(__CUDA_ARCH__)\n"
        "extern __device__ void an_instruction_is_not_emulated();\n"
        "#  define CUTE_INVALID_CONTROL_PATH(x) an_instruction_is_not_emulated()",
        1,
    )
    memory = Header(cutlass, "cute/arch/tmem_allocator_sm100.hpp")
    memory.include("emulation/tcgen05.hpp")
    memory.body("class Allocator1Sm", "allocate", "jaxmoe::emulation::tensor_allocate(dst_ptr);")
    memory.body("class Allocator1Sm", "free", "")
    memory.body("class Allocator1Sm", "release_allocation_lock", "")

    copy = Header(cutlass, "cute/arch/copy_sm100.hpp")
    copy.include("emulation/tcgen05.hpp")
    copy.body(
        "struct SM100_UTCCP_4x32dp128bit_1cta",
        "copy",
        "jaxmoe::emulation::tensor_copy_scales(src_addr, dst_addr);",
    )
    # Loads by the name of their shape, the words that a lane gets of one repetition, and the most
    # repetitions: 32 lanes of one word, 16 lanes of eight.
    for shape, words, most in (("32dp32b", 1, 128), ("16dp256b", 4, 32)):
        repeats = 1
        while repeats <= most:
            count = words * repeats
            digits = len(str(count - 1))
            copy.body(
                f"struct SM100_TMEM_LOAD_{shape}{repeats}x",
                "copy",
                "\n".join(
                    f"dst{i:0{digits}} = jaxmoe::emulation::tensor_load_{shape}(src_addr, {i});"
                    for i in range(count)
                ),
            )
            repeats *= 2

    mma = Header(cutlass, "cute/arch/mma_sm100_umma.hpp")
    mma.include("emulation/tcgen05.hpp")
    for name, kind in (("MXF4", "kFp4"), ("MXF8F6F4", "kFp4Fp8")):
        mma.body(
            f"struct SM100_MMA_{name}_SS",
            "fma",
            f"jaxmoe::emulation::tensor_multiply<M, N, jaxmoe::emulation::Kind::{kind}>(\n"
            "    desc_a, desc_b, tmem_c, scaleC != 0, static_cast<uint32_t>(idescE >> 32),\n"
            "    tsfa_addr, tsfb_addr);",
        )

    barrier = Header(cutlass, "cutlass/arch/barrier.h")
    barrier.include("emulation/tcgen05.hpp")
    address = "cute::cast_smem_ptr_to_uint(smem_ptr)"
    barrier.body("", "umma_arrive", f"jaxmoe::emulation::tensor_commit({address});")
    barrier.body(
        "", "umma_arrive_multicast", f"jaxmoe::emulation::tensor_commit({address}, cta_mask);"
    )
    barrier.body("", "fence_view_async_tmem_load", "")
    barrier.body("", "fence_view_async_tmem_store", "")

    mainloop = Header(
        cutlass, "cutlass/gemm/collective/sm100_blockscaled_mma_array_warpspecialized.hpp"
    )
    mainloop.include("emulation/spread.hpp")
    byte_maps(mainloop, "make_tma_atom_[AB]_sm100", 6)
    packed_maps(mainloop, "_,_,_,", 3)
    # The whole warp copies scales.
    mainloop.replace(r"if \(cute::elect_one_sync\(\)\) (\{\s*copy\(tiled_copy_s2t_SFA)", r"\1", 2)
    return [config, memory, copy, mma, barrier, mainloop]


FAMILIES = {"sm100": sm100, "sm120": sm120}


def main(family: str, cutlass: str, overlay: str) -> None:
    for header in FAMILIES[family](pathlib.Path(cutlass)):
        path = pathlib.Path(overlay) / header.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != header.text:  # else nothing is built again
            path.write_text(header.text)


if __name__ == "__main__":
    main(*sys.argv[1:])

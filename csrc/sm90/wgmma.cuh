// wgmma with the weights in registers: D[64 x N] += A[64 x 16] B[16 x N], one warpgroup; 32 in
// place of 16 for e4m3.
#ifndef JAXMOE_CSRC_SM90_WGMMA_CUH_
#define JAXMOE_CSRC_SM90_WGMMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jaxmoe::sm90 {

struct E4m3 {};  // 8-bit floats with four bits of exponent and three of mantissa

// Orders register accesses of this warpgroup before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Low word of the descriptor of a K-major tile in shared memory, rows of 128 bytes, 128-byte
// swizzle; the high word (swizzle, 1024 bytes between groups of eight rows) is a constant of the
// instruction below. A step of 16 along K (32 of e4m3) adds 2.
__device__ __forceinline__ uint32_t swizzled_tile(uint32_t address) {
  return (address & 0x3ffff) >> 4 | 1u << 16;
}

#define JAXMOE_F2(d, i) "+f"(d[i]), "+f"(d[i + 1])
#define JAXMOE_F4(d, i) JAXMOE_F2(d, i), JAXMOE_F2(d, i + 2)
#define JAXMOE_F8(d, i) JAXMOE_F4(d, i), JAXMOE_F4(d, i + 4)
#define JAXMOE_F16(d, i) JAXMOE_F8(d, i), JAXMOE_F8(d, i + 8)
#define JAXMOE_F32(d, i) JAXMOE_F16(d, i), JAXMOE_F16(d, i + 16)
#define JAXMOE_F64(d, i) JAXMOE_F32(d, i), JAXMOE_F32(d, i + 32)

// The first N / 2 registers of d hold the tile; `accumulate` 0 overwrites it.
template <class T, int kN>
struct Wgmma;

#define JAXMOE_WGMMA(TYPE, SHAPE, TAIL, N, REGS, OUT, A, B, C, D, DESC, PRED)                      \
  template <>                                                                                      \
  struct Wgmma<TYPE, N> {                                                                          \
    template <int kSize>                                                                           \
    static __device__ __forceinline__ void run(float (&d)[kSize], const uint32_t (&a)[4],          \
                                               uint32_t b, int accumulate) {                       \
      static_assert(kSize >= N / 2, "accumulator too small");                                      \
      asm volatile("{\n.reg .pred p;\n.reg .b64 tile;\nsetp.ne.b32 p, %" PRED                      \
                   ", 0;\nmov.b64 tile, {%" DESC                                                   \
                   ", 0x40000040};\nwgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" OUT "}, {%" A \
                   ", %" B ", %" C ", %" D "}, tile, p, 1, 1" TAIL ";\n}\n"                        \
                   : REGS(d, 0)                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(accumulate));         \
    }                                                                                              \
  };
// The 16-bit types have an operand more: whether B is transposed.
#define JAXMOE_WGMMAS(N, ...)                                             \
  JAXMOE_WGMMA(__nv_bfloat16, "k16.f32.bf16.bf16", ", 0", N, __VA_ARGS__) \
  JAXMOE_WGMMA(__half, "k16.f32.f16.f16", ", 0", N, __VA_ARGS__)          \
  JAXMOE_WGMMA(E4m3, "k32.f32.e4m3.e4m3", "", N, __VA_ARGS__)

#define JAXMOE_OUT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
JAXMOE_WGMMAS(16, JAXMOE_F8, JAXMOE_OUT_16, "8", "9", "10", "11", "12", "13")
#undef JAXMOE_OUT_16
#define JAXMOE_OUT_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
JAXMOE_WGMMAS(32, JAXMOE_F16, JAXMOE_OUT_32, "16", "17", "18", "19", "20", "21")
#undef JAXMOE_OUT_32
#define JAXMOE_F24(d, i) JAXMOE_F16(d, i), JAXMOE_F8(d, i + 16)
#define JAXMOE_OUT_48                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23"
JAXMOE_WGMMAS(48, JAXMOE_F24, JAXMOE_OUT_48, "24", "25", "26", "27", "28", "29")
#undef JAXMOE_OUT_48
#define JAXMOE_OUT_64                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
JAXMOE_WGMMAS(64, JAXMOE_F32, JAXMOE_OUT_64, "32", "33", "34", "35", "36", "37")
#undef JAXMOE_OUT_64
#define JAXMOE_F40(d, i) JAXMOE_F32(d, i), JAXMOE_F8(d, i + 32)
#define JAXMOE_OUT_80                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39"
JAXMOE_WGMMAS(80, JAXMOE_F40, JAXMOE_OUT_80, "40", "41", "42", "43", "44", "45")
#undef JAXMOE_OUT_80
#define JAXMOE_F48(d, i) JAXMOE_F32(d, i), JAXMOE_F16(d, i + 32)
#define JAXMOE_OUT_96                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
JAXMOE_WGMMAS(96, JAXMOE_F48, JAXMOE_OUT_96, "48", "49", "50", "51", "52", "53")
#undef JAXMOE_OUT_96
#define JAXMOE_F56(d, i) JAXMOE_F32(d, i), JAXMOE_F16(d, i + 32), JAXMOE_F8(d, i + 48)
#define JAXMOE_OUT_112                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55"
JAXMOE_WGMMAS(112, JAXMOE_F56, JAXMOE_OUT_112, "56", "57", "58", "59", "60", "61")
#undef JAXMOE_OUT_112
#define JAXMOE_OUT_128                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
JAXMOE_WGMMAS(128, JAXMOE_F64, JAXMOE_OUT_128, "64", "65", "66", "67", "68", "69")
#undef JAXMOE_OUT_128
#define JAXMOE_F80(d, i) JAXMOE_F64(d, i), JAXMOE_F16(d, i + 64)
#define JAXMOE_OUT_160                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
JAXMOE_WGMMAS(160, JAXMOE_F80, JAXMOE_OUT_160, "80", "81", "82", "83", "84", "85")
#undef JAXMOE_OUT_160
#define JAXMOE_F96(d, i) JAXMOE_F64(d, i), JAXMOE_F32(d, i + 64)
#define JAXMOE_OUT_192                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
JAXMOE_WGMMAS(192, JAXMOE_F96, JAXMOE_OUT_192, "96", "97", "98", "99", "100", "101")
#undef JAXMOE_OUT_192
#define JAXMOE_F112(d, i) JAXMOE_F64(d, i), JAXMOE_F32(d, i + 64), JAXMOE_F16(d, i + 96)
#define JAXMOE_OUT_224                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, " \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
JAXMOE_WGMMAS(224, JAXMOE_F112, JAXMOE_OUT_224, "112", "113", "114", "115", "116", "117")
#undef JAXMOE_OUT_224
#define JAXMOE_F128(d, i) JAXMOE_F64(d, i), JAXMOE_F64(d, i + 64)
#define JAXMOE_OUT_256                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "     \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "     \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "     \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, "     \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "     \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, "     \
  "%98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
JAXMOE_WGMMAS(256, JAXMOE_F128, JAXMOE_OUT_256, "128", "129", "130", "131", "132", "133")
#undef JAXMOE_OUT_256

#define JAXMOE_F20(d, i) JAXMOE_F16(d, i), JAXMOE_F4(d, i + 16)
#define JAXMOE_OUT_40                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19"
JAXMOE_WGMMAS(40, JAXMOE_F20, JAXMOE_OUT_40, "20", "21", "22", "23", "24", "25")
#undef JAXMOE_OUT_40
#define JAXMOE_F28(d, i) JAXMOE_F16(d, i), JAXMOE_F8(d, i + 16), JAXMOE_F4(d, i + 24)
#define JAXMOE_OUT_56                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27"
JAXMOE_WGMMAS(56, JAXMOE_F28, JAXMOE_OUT_56, "28", "29", "30", "31", "32", "33")
#undef JAXMOE_OUT_56

#define JAXMOE_F60(d, i) \
  JAXMOE_F32(d, i), JAXMOE_F16(d, i + 32), JAXMOE_F8(d, i + 48), JAXMOE_F4(d, i + 56)
#define JAXMOE_OUT_120                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59"
JAXMOE_WGMMAS(120, JAXMOE_F60, JAXMOE_OUT_120, "60", "61", "62", "63", "64", "65")
#undef JAXMOE_OUT_120
#define JAXMOE_F72(d, i) JAXMOE_F64(d, i), JAXMOE_F8(d, i + 64)
#define JAXMOE_OUT_144                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71"
JAXMOE_WGMMAS(144, JAXMOE_F72, JAXMOE_OUT_144, "72", "73", "74", "75", "76", "77")
#undef JAXMOE_OUT_144
#define JAXMOE_F84(d, i) JAXMOE_F64(d, i), JAXMOE_F16(d, i + 64), JAXMOE_F4(d, i + 80)
#define JAXMOE_OUT_168                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, " \
  "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83"
JAXMOE_WGMMAS(168, JAXMOE_F84, JAXMOE_OUT_168, "84", "85", "86", "87", "88", "89")
#undef JAXMOE_OUT_168

#undef JAXMOE_WGMMAS
#undef JAXMOE_WGMMA
#undef JAXMOE_F20
#undef JAXMOE_F28
#undef JAXMOE_F80
#undef JAXMOE_F96
#undef JAXMOE_F112
#undef JAXMOE_F128
#undef JAXMOE_F24
#undef JAXMOE_F40
#undef JAXMOE_F48
#undef JAXMOE_F56
#undef JAXMOE_F60
#undef JAXMOE_F72
#undef JAXMOE_F84
#undef JAXMOE_F2
#undef JAXMOE_F4
#undef JAXMOE_F8
#undef JAXMOE_F16
#undef JAXMOE_F32
#undef JAXMOE_F64

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_WGMMA_CUH_

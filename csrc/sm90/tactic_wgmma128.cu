#include "sm90/gemm.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, 128, 2, 2, is_fp8(kFormat) ? 1 : 2,
                          is_fp8(kFormat) ? 6 : 3, 1, 1, is_fp8(kFormat) ? 0 : 8>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4, Format::kMxfp4Fp8>;

}  // namespace

const Tactic kWgmma128 = {"wgmma128", All::smem_bytes, true, All::run};

}  // namespace jaxmoe::sm90

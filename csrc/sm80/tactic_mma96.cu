#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kInterleaved, 96, 4, 4, 2, 1, 1, 4, 1>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kMma96 = {"mma96", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

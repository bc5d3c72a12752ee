#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kInterleaved, 128, 4, 4, 2, 1, 1, 3, 1>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kLarge = {"large", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

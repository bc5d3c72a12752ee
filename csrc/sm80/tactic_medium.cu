#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kContiguous, 64, 8, 1, 1, 1, 2, 3, 2>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kMedium = {"medium", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kContiguous, 32, 4, 2, 1, 2, 1, 3, 2>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kMma32 = {"mma32", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

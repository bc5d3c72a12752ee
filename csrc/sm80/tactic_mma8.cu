#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kContiguous, 8, 4, 1, 1, 2, 2, 4, 3>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

// A tactic of the Hopper library too.
const Tactic kMma8 = {"mma8", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

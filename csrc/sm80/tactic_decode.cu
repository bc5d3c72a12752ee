#include "sm80/gemm.cuh"

namespace jaxmoe::sm80 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, Order::kContiguous, 8, 1, 1, 1, 4, 2, 3, 5>;
using All = Instances<Config, GemmRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kDecode = {"decode", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm80

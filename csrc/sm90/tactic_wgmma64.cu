#include "sm90/gemm.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, 64, 2, 2, 2, 5, 1, 1>;

}  // namespace

const Tactic kWgmma64 = {"wgmma64", Instances<Config, GemmRun>::smem_bytes(), true,
                         Instances<Config, GemmRun>::run};

}  // namespace jaxmoe::sm90

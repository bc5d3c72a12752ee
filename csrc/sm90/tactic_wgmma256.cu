#include "sm90/gemm.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, 256, 2, 1, 1, 5, 2, 1>;

}  // namespace

const Tactic kWgmma256 = {"wgmma256", Instances<Config, GemmRun>::smem_bytes(), true,
                          Instances<Config, GemmRun>::run};

}  // namespace jaxmoe::sm90

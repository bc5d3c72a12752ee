#include "sm90/gemm.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = GemmConfig<T, kFormat, kEpilogue, 128, 2, 2, 1, 7, 1, 1>;

}  // namespace

const Tactic kWgmma128 = {"wgmma128", Instances<Config, GemmRun>::smem_bytes(), true,
                          Instances<Config, GemmRun>::run};

}  // namespace jaxmoe::sm90

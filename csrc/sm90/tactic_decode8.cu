#include "sm90/decode.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = DecodeConfig<T, kFormat, kEpilogue, 8, 4, 1, 2, 7, 4>;

}  // namespace

const Tactic kDecode8 = {"decode8", Instances<Config, DecodeRun>::smem_bytes(), false,
                         Instances<Config, DecodeRun>::run};

}  // namespace jaxmoe::sm90

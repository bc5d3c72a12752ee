#include "sm90/decode.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = DecodeConfig<T, kFormat, kEpilogue, 8, 4, 4, 1, 12, 1>;

}  // namespace

const Tactic kDecode = {"decode", Instances<Config, DecodeRun>::smem_bytes(), false,
                        Instances<Config, DecodeRun>::run};

}  // namespace jaxmoe::sm90

#include "sm90/decode.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = DecodeConfig<T, kFormat, kEpilogue, 8, 4, 4, 1, 12, 1>;
using All = Instances<Config, DecodeRun, GemmArgs, Format::kNvfp4, Format::kMxfp4>;

}  // namespace

const Tactic kDecode = {"decode", All::smem_bytes, false, All::run};

}  // namespace jaxmoe::sm90

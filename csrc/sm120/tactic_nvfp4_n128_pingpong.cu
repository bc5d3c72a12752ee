#include "sm120/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm120<Format::kNvfp4, 128, 128, true> {
  static constexpr const char* kName = "n128_pingpong";
};

}  // namespace

extern const Tactic kSm120Nvfp4N128Pingpong = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

#include "sm120/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm120<Format::kNvfp4, 32, 256> {
  static constexpr const char* kName = "n32";
};

}  // namespace

extern const Tactic kSm120Nvfp4N32 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

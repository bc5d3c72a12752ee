#include "sm120/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm120<Format::kNvfp4, 128, 128> {
  static constexpr const char* kName = "n128";
};

}  // namespace

extern const Tactic kSm120Nvfp4N128 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

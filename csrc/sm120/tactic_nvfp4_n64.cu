#include "sm120/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm120<Format::kNvfp4, 64, 128> {
  static constexpr const char* kName = "n64";
};

}  // namespace

extern const Tactic kSm120Nvfp4N64 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

#include "sm120/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm120<Format::kMxfp4, 32, 128> {
  static constexpr const char* kName = "n32";
};

}  // namespace

extern const Tactic kSm120Mxfp4N32 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

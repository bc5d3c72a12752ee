#include "sm100/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm100<Format::kMxfp4, 128> {
  static constexpr const char* kName = "n128";
};

}  // namespace

extern const Tactic kSm100Mxfp4N128 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

#include "sm100/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm100<Format::kNvfp4, 128> {
  static constexpr const char* kName = "n128";
};

}  // namespace

extern const Tactic kSm100Nvfp4N128 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

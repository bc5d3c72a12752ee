#include "sm100/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm100<Format::kNvfp4, 64> {
  static constexpr const char* kName = "n64";
};

}  // namespace

extern const Tactic kSm100Nvfp4N64 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

#include "sm100/config.cuh"

namespace jaxmoe::blackwell {
namespace {

struct Config : Sm100<Format::kNvfp4, 256> {
  static constexpr const char* kName = "n256";
};

}  // namespace

extern const Tactic kSm100Nvfp4N256 = GroupedGemm<Config>::kTactic;

}  // namespace jaxmoe::blackwell

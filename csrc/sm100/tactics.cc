#include "blackwell/gemm.h"

namespace jaxmoe::blackwell {

extern const Tactic kSm100Nvfp4N64, kSm100Nvfp4N128, kSm100Nvfp4N256, kSm100Mxfp4N64,
    kSm100Mxfp4N128, kSm100Mxfp4N256;

const Tactic* const kTactics[] = {
    &kSm100Nvfp4N64,  &kSm100Mxfp4N64,
#ifndef JAXMOE_FEW_INSTANCES
    &kSm100Nvfp4N128, &kSm100Nvfp4N256, &kSm100Mxfp4N128, &kSm100Mxfp4N256,
#endif
};
const int kNumTactics = sizeof(kTactics) / sizeof(kTactics[0]);

}  // namespace jaxmoe::blackwell

#include "blackwell/gemm.h"

namespace jaxmoe::blackwell {

extern const Tactic kSm120Nvfp4N32, kSm120Nvfp4N64, kSm120Nvfp4N128, kSm120Nvfp4N128Pingpong,
    kSm120Mxfp4N32, kSm120Mxfp4N64, kSm120Mxfp4N128;

const Tactic* const kTactics[] = {
    &kSm120Nvfp4N32, &kSm120Mxfp4N32,
#ifndef JAXMOE_FEW_INSTANCES
    &kSm120Nvfp4N64, &kSm120Nvfp4N128, &kSm120Nvfp4N128Pingpong, &kSm120Mxfp4N64, &kSm120Mxfp4N128,
#endif
};
const int kNumTactics = sizeof(kTactics) / sizeof(kTactics[0]);

}  // namespace jaxmoe::blackwell

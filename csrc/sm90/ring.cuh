// A ring of stages in shared memory between the warps that fill them and the warps that use them.
#ifndef JAXMOE_CSRC_SM90_RING_CUH_
#define JAXMOE_CSRC_SM90_RING_CUH_

#include <cstdint>

namespace jaxmoe::sm90 {

// One barrier of each kind for every stage.
struct Ring {
  uint64_t* full;   // weights and tokens are in
  uint64_t* empty;  // every consumer is through
  // Those of the cluster's other block are; only for a ring that both blocks fill.
  uint64_t* empty_there = nullptr;
};

// Position in the ring, and the parity of how often it has gone round.
template <int kStages>
struct Cursor {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) slot = 0, phase ^= 1;
  }
};

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_RING_CUH_

// Geometry of the packed weight layout "panel32".
//
// A matrix W[N, K] of one expert is cut into panels of 32 lanes (rows of W). Plain: lane l of panel
// p is row 32p + l. Gated, for W = [gate; up] of 2I rows: lanes 0..15 of panel p are gate rows
// 16p.., lanes 16..31 are up rows 16p... A panel is a strictly sequential run of superblocks of 64
// k, so that a thread streams it once:
//
//   [scales: 64/block rows of 32 bytes][codes: 8 groups of 32 lanes of one little-endian dword]
//
// The dword of (group g, lane l) holds k = 64s + 8g .. + 7, k = +0 in the lowest nibble: exactly
// four bytes of the canonical packed row. Rows and k beyond the matrix have zero codes and zero
// scales.
#ifndef JAXMOE_CSRC_CPU_LAYOUT_H_
#define JAXMOE_CSRC_CPU_LAYOUT_H_

#include <cstdint>

#include "cpu/types.h"

namespace jaxmoe::cpu {

inline constexpr int kPanelLanes = 32;
inline constexpr int kSuperblockK = 64;
inline constexpr int kCodeBytes = kSuperblockK * kPanelLanes / 2;  // 1024

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int block_size(Format format) { return format == Format::kNvfp4 ? 16 : 32; }
constexpr int scale_bytes(Format format) { return kSuperblockK / block_size(format) * kPanelLanes; }
constexpr int superblock_bytes(Format format) { return scale_bytes(format) + kCodeBytes; }

// The packed form of one expert's matrix.
struct PanelGeometry {
  int64_t panels = 0;
  int64_t superblocks = 0;  // of one panel
  int64_t panel_bytes = 0;
  int64_t expert_bytes = 0;

  PanelGeometry() = default;
  // `outputs` counts the rows that a panel shares out: I for a gated [2I, K] matrix, N for a plain
  // [N, K] one.
  PanelGeometry(Format format, int64_t outputs, int64_t k, bool gated)
      : panels(ceil_div(outputs, gated ? kPanelLanes / 2 : kPanelLanes)),
        superblocks(ceil_div(k, kSuperblockK)),
        panel_bytes(superblocks * superblock_bytes(format)),
        expert_bytes(panels * panel_bytes) {}

  int64_t padded_k() const { return superblocks * kSuperblockK; }
};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_LAYOUT_H_

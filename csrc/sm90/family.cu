// Which tactics the Hopper library has, and which of them runs where none is named.
#include <algorithm>

#include "sm80/tactics.h"
#include "sm90/tactics.h"

namespace jaxmoe::sm90 {
namespace {

// By the tokens of an expert, if all experts that can have one have as many; as measured on an H100
// (docs/performance.md).
const Tactic* product_tactic(Format format, int64_t rows, int64_t experts) {
  const int64_t mean = rows / std::max<int64_t>(1, std::min(rows, experts));
  const bool nvfp4 = format == Format::kNvfp4;
  if (rows <= (nvfp4 ? 4 : 16) && !is_fp8(format)) return &kDecode;
  if (mean <= 1 && nvfp4) return &sm80::kMma8;
  if (mean <= 48) return &kWgmma64;
  if (mean >= 100 && mean <= 160) return &kWgmma192;
  return mean < (is_fp8(format) ? 160 : 320) ? &kWgmma128 : &kWgmma256;
}

// Whether tiles of `strips` strips are several for each multiprocessor of an H100 and, where the
// time of a tile is that of its weights, cut both matrices without rest.
bool suits(Format format, const MlpShape& s, bool gated, int strips) {
  constexpr int64_t kTiles = 2 * 132;
  const int64_t up = num_strips(s.intermediate, gated), down = num_strips(s.hidden, false);
  const int64_t experts = std::min(s.experts, s.tokens * s.top_k);
  const bool divides = up % strips == 0 && down % strips == 0;
  return (divides || is_fp8(format)) && std::min(up, down) / strips * experts >= kTiles;
}

// One kernel is faster than four for a single token, as long as its weights are so few that latency
// is most of the time.
bool prefers_fused(Format format, const MlpShape& s, bool gated) {
  constexpr int64_t kMostBytes = int64_t{40} << 20;
  const int64_t expert = matrix_bytes(format, s.intermediate, s.hidden, gated) +
                         matrix_bytes(format, s.hidden, s.intermediate, false);
  return s.tokens == 1 && std::min(s.experts, s.top_k) * expert <= kMostBytes &&
         kFused.smem_bytes(format) > 0 && kFused.obstacle(s).empty();
}

const Tactic* mlp_tactic(Format format, const MlpShape& s, bool gated) {
  if (prefers_fused(format, s, gated)) return &kFused;
  const int64_t rows = s.tokens * s.top_k;
  if (s.tokens == 1 && rows <= 16 && !is_fp8(format)) return &kDecode;
  const Tactic* tactic = product_tactic(format, rows, s.experts);
  if (tactic != &kWgmma64 || !suits(format, s, gated, 8)) return tactic;
  return format == Format::kNvfp4 && rows < 3 * s.experts ? &sm80::kMma8 : &kWgmma64Tall;
}

}  // namespace

const Family kFamily = {
    {&kFused, &kDecode, &sm80::kMma8, &kWgmma64, &kWgmma64Tall, &kWgmma128, &kWgmma192, &kWgmma256},
    product_tactic,
    mlp_tactic,
    quantize_rows};

}  // namespace jaxmoe::sm90

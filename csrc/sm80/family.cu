// Which tactics the library has, and which of them runs where none is named.
#include <algorithm>

#include "sm80/tactics.h"

namespace jaxmoe::sm80 {
namespace {

// By the tokens of an expert, if all experts that can have one have as many; as measured on an H100
// (docs/performance.md). `mma8` is the fastest for few of them, but not with MXFP4 weights, and not
// where so few experts have any that its many small tiles do not fill the GPU evenly.
const Tactic* product_tactic(Format format, int64_t rows, int64_t experts) {
  const int64_t mean = rows / std::max<int64_t>(1, std::min(rows, experts));
  if (rows <= 16) return &kDecode;
  if (mean <= 5 && rows > 32 && format == Format::kNvfp4) return &kMma8;
  return mean <= 24 ? &kMma32 : mean < 256 ? &kMma64 : &kMma96;
}

const Tactic* mlp_tactic(Format format, const MlpShape& s, bool) {
  return product_tactic(format, s.tokens * s.top_k, s.experts);
}

}  // namespace

const Family kFamily = {{&kDecode, &kMma8, &kMma32, &kMma64, &kMma96}, product_tactic, mlp_tactic};

}  // namespace jaxmoe::sm80

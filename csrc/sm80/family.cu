// Which tactics the library has, and which of them runs where none is named.
#include <algorithm>

#include "sm80/tactics.h"

namespace jaxmoe::sm80 {
namespace {

// By the tokens of an expert, if all experts that can have one have as many; as measured on an H100
// (docs/performance.md).
const Tactic* product_tactic(Format, int64_t rows, int64_t experts) {
  const int64_t mean = rows / std::max<int64_t>(1, std::min(rows, experts));
  if (rows <= 16) return &kDecode;
  return mean <= 5 ? &kSmall : mean < 256 ? &kMedium : &kLarge;
}

const Tactic* mlp_tactic(Format format, const MlpShape& s, bool) {
  return product_tactic(format, s.tokens * s.top_k, s.experts);
}

}  // namespace

const Family kFamily = {{&kDecode, &kSmall, &kMedium, &kLarge}, product_tactic, mlp_tactic};

}  // namespace jaxmoe::sm80

#include <string>

#include "sm90/fused.cuh"
#include "sm90/tactic.cuh"

namespace jaxmoe::sm90 {
namespace {

template <class T, Format kFormat, Epilogue kEpilogue>
using Config = FusedConfig<T, kFormat, kEpilogue, 16, 12, 1>;

// NVFP4 takes more shared memory than MXFP4; nothing else matters to it.
using Layout = FusedLayout<Config<__nv_bfloat16, Format::kNvfp4, Epilogue::kSwiglu>>;

std::string obstacle(const MlpShape& s) {
  if (s.tokens > kFusedTokens || s.tokens * s.top_k > kFusedPairs) {
    return "takes at most " + std::to_string(kFusedTokens) + " tokens and " +
           std::to_string(kFusedPairs) + " pairs of a token and an expert, got " +
           std::to_string(s.tokens) + " tokens with top_k " + std::to_string(s.top_k);
  }
  const int tokens = static_cast<int>(s.tokens), top_k = static_cast<int>(s.top_k);
  constexpr int64_t kMaxHidden = kSmemLimit / 2;  // of one token; the sizes below are ints
  if (s.hidden > kMaxHidden || Layout::depth(tokens, top_k, static_cast<int>(s.hidden)) == 0) {
    return "keeps all tokens in shared memory, for which " + std::to_string(tokens) +
           " tokens of hidden_size " + std::to_string(s.hidden) + " are too much";
  }
  return "";
}

int smem_bytes(Format format) { return is_fp8(format) ? 0 : kSmemLimit; }

}  // namespace

const Tactic kFused = {"fused",
                       smem_bytes,
                       false,
                       nullptr,
                       Instances<Config, FusedRun, FusedArgs, Format::kNvfp4, Format::kMxfp4>::run,
                       obstacle};

}  // namespace jaxmoe::sm90

// Vocabulary of the CPU library: formats, dtypes, variants and activations, with the names that
// Python uses.
#ifndef JAXMOE_CSRC_CPU_TYPES_H_
#define JAXMOE_CSRC_CPU_TYPES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace jaxmoe::cpu {

enum class Format { kNvfp4, kMxfp4 };
inline constexpr int kNumFormats = 2;

enum class Dtype { kF32, kBf16 };

// What the experts' products multiply: activations as they are, or as blocks of 8-bit integers (see
// Int8Block).
enum class Compute { kW4a16, kW4a8 };
inline constexpr Compute kComputes[] = {Compute::kW4a16, Compute::kW4a8};

// From the last to the first: what a processor that can run several should.
enum class Variant { kPortable, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };
inline constexpr int kNumVariants = 7;

// Which kernels of a variant run: chosen by the rows of each expert, or one kind for all.
enum class Tactic {
  kAuto,
  kInteger,  // integers: of 16 bits, or of 8 where the arithmetic is w4a8
  kStream,   // weights decoded into registers
  kTiles,    // weights decoded into L1, for many rows
};
inline constexpr Tactic kNamedTactics[] = {Tactic::kInteger, Tactic::kStream, Tactic::kTiles};

enum class Activation {
  kSwiglu,
  kSwigluStep,
  kGeglu,
  kGegluTanh,
  kSitu,
  kRelu2,
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kIdentity,
};
inline constexpr int kNumActivations = 11;
inline constexpr int kMaxActivationParams = 3;

struct ActivationInfo {
  const char* name;
  bool gated;
  int num_params;
};

const ActivationInfo& activation_info(Activation activation);
const char* compute_name(Compute compute);
const char* format_name(Format format);
const char* variant_name(Variant variant);
const char* tactic_name(Tactic tactic);  // "" for kAuto

std::optional<Activation> parse_activation(std::string_view name);
std::optional<Compute> parse_compute(std::string_view name);
std::optional<Format> parse_format(std::string_view name);
std::optional<Variant> parse_variant(std::string_view name);
std::optional<Tactic> parse_tactic(std::string_view name);

// "a, b, c": the known names of each kind, for error messages.
std::string activation_names();
std::string compute_names();
std::string format_names();
std::string variant_names();

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_TYPES_H_

// SwiGLU experts on bf16 activations, in both formats, against a double-precision model of the
// packed bytes. Expert 0 takes every token and so the blocked kernels; expert 1 takes one token and
// so the streaming ones; expert 2 takes none. Then the same by each tactic, and all of it in both
// kinds of arithmetic: x has few bits, which 8-bit integers hold.
#include "cpu/self_test.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/layout.h"
#include "cpu/moe_mlp.h"

namespace jaxmoe::cpu {
namespace {

constexpr int kTokens = 40, kHidden = 288, kIntermediate = 64, kExperts = 3, kChoices = 2;
// bf16 activations and results: 2^-9 of each value at most, and less on average.
constexpr double kTolerance = 8e-3;

// Fixed numbers that look random (Numerical Recipes' linear congruential generator).
struct Sequence {
  uint32_t state = 1;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 16; }
};

double decode(Format format, const uint8_t* expert, const PanelGeometry& geometry, bool gated,
              int row, int rows, int k) {
  static constexpr double kMagnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int half = kPanelLanes / 2;
  const bool up = gated && row >= rows / 2;
  const int index = up ? row - rows / 2 : row;
  const int width = gated ? half : kPanelLanes;
  const int lane = index % width + (up ? half : 0);
  const uint8_t* superblock = expert + (index / width) * geometry.panel_bytes +
                              (k / kSuperblockK) * int64_t{superblock_bytes(format)};
  const int within = k % kSuperblockK;
  const int scale = superblock[within / block_size(format) * kPanelLanes + lane];
  const uint8_t pair =
      superblock[scale_bytes(format) + (within / 8 * kPanelLanes + lane) * 4 + within % 8 / 2];
  const int code = within % 2 ? pair >> 4 : pair & 15;
  const double value = code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code];
  return value * (format == Format::kNvfp4 ? std::ldexp(1 + (scale & 7) / 8.0, (scale >> 3) - 7)
                                           : std::ldexp(1.0, scale - 127));
}

// As Int8Block says; the values are of ordinary size.
void round_to_int8(std::vector<double>& h) {
  for (size_t begin = 0; begin < h.size(); begin += 16) {
    double largest = 0;
    for (size_t i = begin; i < begin + 16; ++i) largest = std::max(largest, std::abs(h[i]));
    int exponent = -125;
    while (std::nearbyint(std::ldexp(largest, -exponent)) > 127) ++exponent;
    for (size_t i = begin; i < begin + 16; ++i) {
      h[i] = std::ldexp(std::nearbyint(std::ldexp(h[i], -exponent)), exponent);
    }
  }
}

// One for each tactic.
std::vector<double> relative_errors(const Kernels& kernels, const std::vector<Tactic>& tactics,
                                    Format format, Compute compute) {
  const MoeMlpShape shape = {kTokens, kHidden, kIntermediate, kExperts, kChoices};
  const PanelGeometry up_geometry(format, kIntermediate, kHidden, true);
  const PanelGeometry down_geometry(format, kHidden, kIntermediate, false);
  Sequence random;
  const auto packed = [&](const PanelGeometry& geometry, int k) {
    std::vector<uint8_t> bytes(static_cast<size_t>(geometry.expert_bytes * kExperts));
    for (size_t i = 0; i < bytes.size(); ++i) {
      const int64_t offset = static_cast<int64_t>(i) % superblock_bytes(format);
      const int64_t first_k =
          static_cast<int64_t>(i) % geometry.panel_bytes / superblock_bytes(format) * kSuperblockK;
      if (offset < scale_bytes(format)) {  // normal scales between 2^-5 and 2^-2
        const uint32_t steps = random.next() % 3;
        bytes[i] = static_cast<uint8_t>(
            format == Format::kNvfp4 ? (2 + steps) << 3 | (steps * 2 + 1) : 122 + steps);
      } else if (first_k + (offset - scale_bytes(format)) / (4 * kPanelLanes) * 8 < k) {
        bytes[i] = static_cast<uint8_t>(random.next());
      }
    }
    return bytes;
  };
  const std::vector<uint8_t> gate_up = packed(up_geometry, kHidden);
  const std::vector<uint8_t> down = packed(down_geometry, kIntermediate);
  const float gate_up_global[kExperts] = {1.0f, 0.5f, 2.0f}, down_global[kExperts] = {0.5f, 1, 1};
  float params[3 * kExperts];
  for (int e = 0; e < kExperts; ++e) {
    params[e] = 1;
    params[kExperts + e] = 0;
    params[2 * kExperts + e] = INFINITY;
  }
  std::vector<uint16_t> x(kTokens * kHidden);
  std::vector<double> exact_x(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const float value = static_cast<float>(static_cast<int>(random.next() % 129) - 64) / 64;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    x[i] = static_cast<uint16_t>(bits >> 16);  // exact: at most eight significant bits
    exact_x[i] = value;
  }
  std::vector<int32_t> ids(kTokens * kChoices, -1);
  std::vector<float> weights(ids.size(), 0.75f);
  for (int t = 0; t < kTokens; ++t) ids[static_cast<size_t>(t) * kChoices] = 0;
  ids[1] = 1;

  MoeMlpArgs args;
  args.kernels = &kernels;
  args.format = format;
  args.compute = compute;
  args.activation = Activation::kSwiglu;
  args.dtype = Dtype::kBf16;
  args.shape = shape;
  std::vector<uint8_t> workspace(
      static_cast<size_t>(moe_mlp_workspace_bytes(kernels, compute, args.dtype, shape)) + 64, 0xff);
  args.x = x.data();
  args.gate_up = gate_up.data();
  args.gate_up_global = gate_up_global;
  args.down = down.data();
  args.down_global = down_global;
  args.activation_params = params;
  args.expert_ids = ids.data();
  args.weights = weights.data();
  args.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) &
                                           ~uintptr_t{63});
  std::vector<std::vector<uint16_t>> results;
  for (const Tactic tactic : tactics) {
    results.emplace_back(x.size(), uint16_t{0x7fc0});
    args.tactic = tactic;
    args.out = results.back().data();
    if (!moe_mlp(args, nullptr)) return std::vector<double>(tactics.size(), INFINITY);
  }

  std::vector<double> errors(tactics.size(), 0.0);
  double norm = 0;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<double> y(kHidden, 0.0);
    for (int j = 0; j < kChoices; ++j) {
      const int e = ids[static_cast<size_t>(t * kChoices + j)];
      if (e < 0) continue;
      const auto product = [&](int row) {
        double sum = 0;
        for (int k = 0; k < kHidden; ++k) {
          sum += exact_x[static_cast<size_t>(t * kHidden + k)] *
                 decode(format, gate_up.data() + e * up_geometry.expert_bytes, up_geometry, true,
                        row, 2 * kIntermediate, k);
        }
        return sum * gate_up_global[e];
      };
      std::vector<double> h;
      for (int i = 0; i < kIntermediate; ++i) {
        const double gate = product(i);
        h.push_back(gate / (1 + std::exp(-gate)) * product(kIntermediate + i));
      }
      if (compute == Compute::kW4a8) round_to_int8(h);
      for (int i = 0; i < kIntermediate; ++i) {
        for (int n = 0; n < kHidden; ++n) {
          y[static_cast<size_t>(n)] += 0.75 * h[static_cast<size_t>(i)] * down_global[e] *
                                       decode(format, down.data() + e * down_geometry.expert_bytes,
                                              down_geometry, false, n, kHidden, i);
        }
      }
    }
    for (int n = 0; n < kHidden; ++n) {
      const double want = y[static_cast<size_t>(n)];
      norm += want * want;
      for (size_t i = 0; i < results.size(); ++i) {
        const uint32_t bits = uint32_t{results[i][static_cast<size_t>(t * kHidden + n)]} << 16;
        float got;
        std::memcpy(&got, &bits, sizeof got);
        errors[i] += (got - want) * (got - want);
      }
    }
  }
  for (double& error : errors) error = std::sqrt(error / norm);
  return errors;
}

}  // namespace

std::string self_test(const Kernels& kernels) {
  for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
    for (const Compute compute : kComputes) {
      std::vector<Tactic> tactics = named_tactics(kernels, compute);
      tactics.insert(tactics.begin(), Tactic::kAuto);
      const std::vector<double> errors = relative_errors(kernels, tactics, format, compute);
      for (size_t t = 0; t < tactics.size(); ++t) {
        if (errors[t] <= kTolerance) continue;  // not for NaN
        const std::string by = t ? " and tactic " + std::string(tactic_name(tactics[t])) : "";
        return "a relative error of " + std::to_string(errors[t]) + " on " + format_name(format) +
               " weights with compute='" + compute_name(compute) + "'" + by + ", more than " +
               std::to_string(kTolerance);
      }
    }
  }
  return "";
}

}  // namespace jaxmoe::cpu

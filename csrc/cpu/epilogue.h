// What happens to a product c[row][32 lanes] before it leaves the L1 cache: scale, bias and
// activation after GEMM 1, the weighted sum over a token's experts after GEMM 2, and the
// conversions between f32 and bf16.
#ifndef JAXMOE_CSRC_CPU_EPILOGUE_H_
#define JAXMOE_CSRC_CPU_EPILOGUE_H_

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/vector_math.h"

namespace jaxmoe::cpu {

template <class Isa>
struct Epilogue {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using M = Math<Isa>;
  static constexpr int kWidth = Isa::kWidth;

  static void activate(const ActivationCall& call, float* c, int rows) {
    const F p0 = M::splat(call.params[0]), p1 = M::splat(call.params[1]),
            p2 = M::splat(call.params[2]);
    const F one = M::splat(1.0f), zero = M::splat(0.0f);
    switch (call.activation) {
      case Activation::kSwiglu:  // alpha, beta, limit
        return gated(call, c, rows, [=](F gate, F up) JAXMOE_LAMBDA {
          return M::swish(M::at_most(gate, p2), p0) * (M::clip(up, p2) + p1);
        });
      case Activation::kSwigluStep:  // limit
        return gated(call, c, rows, [=](F gate, F up) JAXMOE_LAMBDA {
          return M::at_most(M::swish(gate, one), p0) * M::clip(up, p0);
        });
      case Activation::kGeglu:
        return gated(call, c, rows, [=](F gate, F up) JAXMOE_LAMBDA { return M::gelu(gate) * up; });
      case Activation::kGegluTanh:
        return gated(call, c, rows,
                     [=](F gate, F up) JAXMOE_LAMBDA { return M::gelu_tanh(gate) * up; });
      case Activation::kSitu:  // gate bound, up bound
        return gated(call, c, rows, [=](F gate, F up) JAXMOE_LAMBDA {
          return (p0 * M::tanh(gate / p0) * M::sigmoid(gate)) * (p1 * M::tanh(up / p1));
        });
      case Activation::kRelu2:
        return plain(call, c, rows, [=](F x) JAXMOE_LAMBDA {
          const F positive = M::at_least(x, zero);
          return positive * positive;
        });
      case Activation::kSilu:
        return plain(call, c, rows, [=](F x) JAXMOE_LAMBDA { return M::swish(x, one); });
      case Activation::kGelu:
        return plain(call, c, rows, [](F x) JAXMOE_LAMBDA { return M::gelu(x); });
      case Activation::kGeluTanh:
        return plain(call, c, rows, [](F x) JAXMOE_LAMBDA { return M::gelu_tanh(x); });
      case Activation::kRelu:
        return plain(call, c, rows, [=](F x) JAXMOE_LAMBDA { return M::at_least(x, zero); });
      case Activation::kIdentity:
        return plain(call, c, rows, [](F x) JAXMOE_LAMBDA { return x; });
    }
  }

  static void combine(const CombineCall& call, const float* c, int rows) {
    constexpr int kAhead = 8;  // rows; their sums are anywhere in L2
    for (int r = 0; r < rows; ++r, c += kPanelLanes) {
      if (r + kAhead < rows) {
        const float* later = call.sums + call.tokens[r + kAhead] * call.stride;
        __builtin_prefetch(later, 1);
        __builtin_prefetch(later + kPanelLanes / 2, 1);
      }
      float* sum = call.sums + call.tokens[r] * call.stride;
      for (int lane = 0; lane < kPanelLanes; lane += kWidth) {
        const F y = M::load(c + lane) * call.product_scale + M::load(call.bias + lane);
        M::store(sum + lane, M::load(sum + lane) + y * call.weights[r]);
      }
    }
  }

  static void scale(float product_scale, const float* bias, float* c, int rows) {
    for (int r = 0; r < rows; ++r, c += kPanelLanes) {
      for (int lane = 0; lane < kPanelLanes; lane += kWidth) {
        M::store(c + lane, M::load(c + lane) * product_scale + M::load(bias + lane));
      }
    }
  }

  static void widen(const uint16_t* bf16, float* f32, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = static_cast<uint32_t>(bf16[i]) << 16;
      std::memcpy(f32 + i, &bits, sizeof(bits));
    }
  }

  static void narrow(const float* f32, uint16_t* bf16, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, f32 + i, sizeof(bits));
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      const uint32_t quiet_nan = (bits >> 16) | 0x40;
      bf16[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
    }
  }

 private:
  template <class Function>
  static JAXMOE_INLINE void gated(const ActivationCall& call, float* c, int rows,
                                  Function function) {
    for (int r = 0; r < rows; ++r, c += kPanelLanes) {
      const float scale =
          call.row_scale ? call.product_scale * call.row_scale[r] : call.product_scale;
      for (int lane = 0; lane < kPanelLanes / 2; lane += kWidth) {
        const int up_lane = lane + kPanelLanes / 2;
        const F gate = M::load(c + lane) * scale + M::load(call.bias + lane);
        const F up = M::load(c + up_lane) * scale + M::load(call.bias + up_lane);
        M::store(c + lane, function(gate, up));
      }
    }
  }

  template <class Function>
  static JAXMOE_INLINE void plain(const ActivationCall& call, float* c, int rows,
                                  Function function) {
    for (int r = 0; r < rows; ++r, c += kPanelLanes) {
      const float scale =
          call.row_scale ? call.product_scale * call.row_scale[r] : call.product_scale;
      for (int lane = 0; lane < kPanelLanes; lane += kWidth) {
        M::store(c + lane, function(M::load(c + lane) * scale + M::load(call.bias + lane)));
      }
    }
  }
};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_EPILOGUE_H_

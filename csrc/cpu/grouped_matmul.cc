#include "cpu/grouped_matmul.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/operand.h"
#include "cpu/routing.h"

namespace jaxmoe::cpu {
namespace {

constexpr int kMaxSegmentRows = 256;
constexpr int kMaxF32Rows = 128;
constexpr int64_t kMinParallelWork = int64_t{1} << 18;

class GroupedMatmulJob : public Job {
 public:
  GroupedMatmulJob(const GroupedMatmulArgs& args, const Kernels& kernels, int threads)
      : Job({zero_tasks(threads), gemm_tasks(threads)}),
        args_(args),
        kernels_(kernels),
        zero_tasks_(zero_tasks(threads)),
        gemm_tasks_(gemm_tasks(threads)),
        w_(args.format, args.n, args.k, false),
        rule_(segment_rule(kernels, args.compute, args.x_dtype,
                           /*fixed=*/args.out_dtype == Dtype::kBf16, args.tactic)) {
    cut_groups();
    schedule_.build(segments_, w_.panels);
  }

  void enter() const override {
    if (kernels_.enter) kernels_.enter();
  }
  void leave() const override {
    if (kernels_.leave) kernels_.leave();
  }

  void run(int phase, int64_t task, Scratch& scratch) override {
    if (phase == 0) {
      zero(0, covered_begin_, task);
      zero(covered_end_, args_.rows, task);
      return;
    }
    schedule_.for_each(task, gemm_tasks_, [&](int64_t segment, int64_t begin, int64_t end) {
      multiply(segments_[segment], begin, end, scratch);
    });
  }

 private:
  static int64_t zero_tasks(int threads) { return threads; }
  static int64_t gemm_tasks(int threads) { return threads == 1 ? 1 : int64_t{threads} * 8; }

  // Sizes are data: negative ones count as zero, and groups end where the rows end.
  void cut_groups() {
    rule_.max_rows_f32 = kMaxF32Rows;
    rule_.max_rows = kMaxSegmentRows;
    int64_t row = 0;
    covered_begin_ = covered_end_ = 0;
    bool any = false;
    for (int64_t group = 0; group < args_.num_groups; ++group) {
      const int64_t size =
          std::min<int64_t>(std::max(args_.group_sizes[group], 0), args_.rows - row);
      const int64_t expert = group - args_.group_offset;
      if (expert >= 0 && expert < args_.num_experts) {
        if (!any) covered_begin_ = row;
        any = true;
        append_segments(rule_, expert, row, size, 0, segments_);
        covered_end_ = row + size;
      }
      row += size;
    }
  }

  int64_t out_bytes() const { return args_.out_dtype == Dtype::kF32 ? 4 : 2; }
  uint8_t* out_row(int64_t row) const {
    return static_cast<uint8_t*>(args_.out) + row * args_.n * out_bytes();
  }

  void zero(int64_t begin, int64_t end, int64_t task) const {
    const int64_t count = end - begin;
    uint8_t* first = out_row(begin + count * task / zero_tasks_);
    uint8_t* last = out_row(begin + count * (task + 1) / zero_tasks_);
    std::fill(first, last, uint8_t{0});
  }

  void multiply(const Segment& segment, int64_t begin, int64_t end, Scratch& scratch) const {
    const Matrix x = {args_.x, args_.x_dtype, args_.k};
    const Operand a = gather(kernels_, rule_, segment, x, segment.first_row, nullptr, scratch);
    float* c = product_buffer(segment.rows, scratch);
    const float scale =
        args_.w_global[segment.expert] * kProductExponent[static_cast<int>(args_.format)];
    const uint8_t* packed = args_.w + segment.expert * w_.expert_bytes;
    float bias[kPanelLanes] = {};
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t column = panel * kPanelLanes;
      const int64_t count = std::min<int64_t>(kPanelLanes, args_.n - column);
      if (args_.bias) {
        std::copy_n(args_.bias + segment.expert * args_.n + column, count, bias);
        std::fill(bias + count, bias + kPanelLanes, 0.0f);
      }
      multiply_panel(kernels_, args_.format, packed + panel * w_.panel_bytes, w_, a, segment.rows,
                     c, scratch);
      kernels_.scale(scale, bias, c, segment.rows);
      for (int r = 0; r < segment.rows; ++r) {
        uint8_t* out = out_row(segment.first_row + r) + column * out_bytes();
        if (args_.out_dtype == Dtype::kF32) {
          std::memcpy(out, c + r * kPanelLanes, count * sizeof(float));
        } else {
          kernels_.narrow(c + r * kPanelLanes, reinterpret_cast<uint16_t*>(out), count);
        }
      }
    }
  }

  const GroupedMatmulArgs args_;
  const Kernels& kernels_;
  const int64_t zero_tasks_, gemm_tasks_;
  const PanelGeometry w_;
  SegmentRule rule_;
  int64_t covered_begin_, covered_end_;  // rows of the local groups
  std::vector<Segment> segments_;
  UnitSchedule schedule_;
};

}  // namespace

int64_t grouped_matmul_bytes(Format format, int64_t n, int64_t k) {
  return PanelGeometry(format, n, k, false).expert_bytes;
}

bool grouped_matmul(const GroupedMatmulArgs& args, Executor* executor) {
  const int64_t work = args.rows * args.n * args.k;
  const int available = executor ? std::max(executor->num_threads(), 1) : 1;
  const int threads = work < kMinParallelWork ? 1 : available;
  return execute(std::make_shared<GroupedMatmulJob>(args, *args.kernels, threads), executor,
                 threads);
}

}  // namespace jaxmoe::cpu

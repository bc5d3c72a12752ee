// Tokens sorted by expert, and the cut of an expert's rows into segments.
#ifndef JAXMOE_CSRC_CPU_ROUTING_H_
#define JAXMOE_CSRC_CPU_ROUTING_H_

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace jaxmoe::cpu {

// The form in which a kernel reads rows of activations.
enum class RowForm {
  kF32,
  kFixed,  // FixedBlock
  kInt8,   // Int8Block
  kTiles,  // TileRows
};

// Consecutive rows of one expert that go through one kernel together.
struct Segment {
  int64_t expert;
  int64_t first_row;  // in the order sorted by expert
  int rows;
  RowForm form;
  bool streamed;          // see Operand
  int tile_rows;          // of kTiles
  int64_t hidden_offset;  // of its first activation in the workspace, bytes
};

// Which kernel takes an expert's rows, and how it wants them cut.
struct SegmentRule {
  Tactic tactic = Tactic::kAuto;
  int max_integer_rows = 0;  // of an expert whose rows are integers ...
  int max_stream_rows = 0;   // ... or, if not, whose weights are streamed
  RowForm integer_form = RowForm::kFixed;
  RowForm stream_form = RowForm::kF32;
  RowForm tiles_form = RowForm::kF32;
  bool whole_tiles = false;    // see Kernels
  bool round_int8 = false;     // rows in other forms become the values of Int8Block first
  int max_rows_f32 = 0;        // of a segment; multiples of 16
  int max_rows = 0;            // of a segment in any other form
  int planes = 1;              // that hold an input exactly
  int64_t hidden_columns = 0;  // padded

  Tactic choose(int64_t rows) const;
  RowForm form(Tactic chosen) const;      // not of kAuto
  RowForm form_of_many() const;           // that experts with any number of rows may have
  int64_t row_bytes(RowForm rows) const;  // of one row's activations
  int64_t hidden_bytes(const Segment& segment) const;
  // Bytes for all activations, whatever the routing.
  int64_t hidden_bytes_bound(int64_t rows, int64_t experts) const;
};

// The rule for a table of kernels, inputs of this type, and results that may (or may not) have an
// error of 2^-16 of the largest of 16 inputs; w4a8 has one of its own. A named tactic must be one
// that the table has for this arithmetic.
SegmentRule segment_rule(const Kernels& kernels, Compute compute, Dtype dtype, bool fixed,
                         Tactic tactic);

// Appends the segments of an expert's rows; returns the workspace offset behind them.
int64_t append_segments(const SegmentRule& rule, int64_t expert, int64_t first_row, int64_t rows,
                        int64_t hidden_offset, std::vector<Segment>& segments);

// The (token, choice) pairs of a range of tokens whose expert is local, by ascending expert, then
// token, then choice.
struct SortedPairs {
  std::vector<int32_t> tokens;  // relative to the range
  std::vector<float> weights;
  std::vector<int64_t> expert_begin;  // [experts + 1]

  void sort(const int32_t* expert_ids, const float* pair_weights, int64_t num_tokens, int64_t top_k,
            int64_t expert_offset, int64_t num_experts);
};

// The (segment, panel) units of a GEMM, divided into tasks of about equal cost in contiguous runs,
// so that one hot expert and many small ones occupy all threads alike and each thread streams
// weights in order.
class UnitSchedule {
 public:
  void build(const std::vector<Segment>& segments, int64_t panels);

  // Calls visit(segment, first panel, end panel) for the share of `task` out of `tasks`.
  template <class Visit>
  void for_each(int64_t task, int64_t tasks, Visit visit) const {
    const Position begin = position(task, tasks), end = position(task + 1, tasks);
    for (int64_t s = begin.segment; s <= end.segment && s < num_segments(); ++s) {
      const int64_t first = s == begin.segment ? begin.panel : 0;
      const int64_t last = s == end.segment ? end.panel : panels_;
      if (first < last) visit(s, first, last);
    }
  }

 private:
  struct Position {
    int64_t segment, panel;
  };
  int64_t num_segments() const { return static_cast<int64_t>(cost_begin_.size()) - 1; }
  Position position(int64_t task, int64_t tasks) const;

  int64_t panels_ = 0;
  std::vector<int64_t> cost_begin_ = {0};  // prefix sums over segments
};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ROUTING_H_

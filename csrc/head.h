// The LM head on the CPU without logits: three GEMMs and the softmax between them, tile by tile in cache.
//
// Legend: N rows (scored tokens), H hidden, V vocabulary, r rank of an adapter on the head, K = H (+ r) inner size.
//
// The vocabulary is walked in tiles of kTile columns, rows in panels of as many rows as three vectors have lanes.
// For each (tile, panel), while both are in cache:
//
//   A^T [tile, panel] = W_tile X^T              logits, transposed: one lane a row, so sums need no shuffles
//   m  <- max(m, max_j z)                       running maximum of each row; what was summed before is rescaled
//   E^T = exp(z - m),  R += sum_{j != y} E      E[y] = 0: the target enters at the end, exactly
//   dX += E W_tile                              needs no loss; its rows are scaled later
//
// z = scale * cap(a). E is stored with the maximum it refers to (tile_shift), or thrown away. With the final maximum m
// and c = dL/dlogp, v = -c * scale / S:
//
//   logp = -log1p(R / e) as in epilogue.h      dX = v (E W - R g_y W[y])      dW = E^T (v X), row y: - v R g_y X
//
// Slabs of the vocabulary are independent tasks, merged in a fixed order. Their number is a constant, and no row's
// arithmetic depends on another row: results do not depend on N, on the batch around a row, or on the number of threads.
#pragma once

#include <cstdint>

#include "epilogue.h"

namespace dpo_fast {

enum class WeightType : int64_t { kF32, kBF16, kF16 };

// One factor pair of the logits: hidden states and weight, or the adapter's two halves.
struct HeadSource {
  const void* weight;  // [vocab, cols], row stride in elements
  WeightType type;
  int64_t stride, cols;
  const float* x;  // [rows, cols]
  float* dx;       // [rows, cols]: sum_j S (p - onehot)_j W[j], unscaled; or null
  float* grad;     // [vocab, cols]: written, or added to; or null
};

constexpr int kMaxSources = 2;

struct HeadProblem {
  HeadSource source[kMaxSources];
  int64_t num_sources;
  int64_t rows, vocab;
  const int64_t* target;  // [rows], each in [0, vocab)
  const float* bias;      // [vocab] or null
  float softcap;          // 0: none
  float scale;            // > 0
};

// Columns of the results, [kNumHeadColumns, rows]: those of epilogue.h and the target's slope cap'(a_y).
constexpr int64_t kTargetSlope = kNumColumns;
constexpr int64_t kNumHeadColumns = kNumColumns + 1;

// Sizes that follow from a problem and an instruction set.
struct HeadShape {
  int64_t panel, panels;        // rows of a panel, and their number
  int64_t tiles;                // of the vocabulary
  int64_t blocks[kMaxSources];  // of `width` inner columns
  int64_t width, all_blocks;
};

constexpr int64_t kTile = 240;     // columns of the vocabulary: a multiple of every kernel's height
constexpr int64_t kMaxSlabs = 16;  // independent parts of the vocabulary in the forward

bool head_available(LaneSet lanes);
HeadShape head_shape(const HeadProblem& problem, LaneSet lanes);

// Floats of stored probabilities with their shifts, for all rows.
int64_t head_stored_floats(const HeadShape& shape);
int64_t head_forward_scratch(const HeadProblem& problem, LaneSet lanes, int num_threads);   // bytes
int64_t head_backward_scratch(const HeadProblem& problem, LaneSet lanes, int num_threads);  // bytes

// Log-probs and sums into out [kNumHeadColumns, rows], dx where a source has one, probabilities into `stored` if not
// null. `scratch` has head_forward_scratch bytes, aligned to 64.
void head_forward(const HeadProblem& problem, float* out, float* stored, bool statistics, void* scratch, LaneSet lanes,
                  int num_threads);

struct HeadBackward {
  const float* v;       // [rows]: -dlogp * scale / S
  const float* shift;   // [rows], column kShift
  const float* rest;    // [rows], column kRest
  const float* slope;   // [rows], column kTargetSlope
  const float* stored;  // of the forward; null: computed again
  float* bias_grad;     // [vocab] or null
  bool accumulate;      // add to grad and bias_grad instead of writing them
};

void head_backward(const HeadProblem& problem, const HeadBackward& backward, void* scratch, LaneSet lanes,
                   int num_threads);

}  // namespace dpo_fast

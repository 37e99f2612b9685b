// The epilogue of the logits GEMM on the CPU: float32 logits, one row at a time, in place.
//
// With a the logits (plus bias), z = scale * cap(a), cap(a) = softcap * tanh(a / softcap), k the row's maximum of z
// and y the target:
//   E = exp(z - k)    R = sum_{j != y} E[j]    e = E[y]    S = R + e
//   logp = -log1p(R)              where z_y is the maximum: 1 - p = R / S is never rounded away
//          (z_y - k) - log(R + e) elsewhere: two numbers of one sign; e may underflow
//   row <- E * cap'(a), target entry -R * cap'(a_y)
#pragma once

#include <cstdint>

namespace dpo_fast {

// What is found out about each row: columns of a float32 matrix [kNumColumns, rows]. The last four are written only
// when statistics are asked for.
enum EpilogueColumn : int64_t {
  kLogp,
  kShift,  // maximum of the row: of a, or of z with a softcap
  kRest,   // R
  kTotal,  // S
  kEntropy,
  kMeanLogit,
  kIsTop1,  // 0 or 1
  kLogSumSquares,
  kNumColumns
};

struct EpilogueChunk {
  float* logits;  // [rows, vocab]
  int64_t rows, vocab, stride;
  const int64_t* target;  // [rows], each in [0, vocab)
  const float* bias;      // [vocab], or null
  float softcap;          // 0: none
  float scale;            // > 0
};

enum class LaneSet : int64_t { kScalar, kAvx2, kAvx512 };

bool lane_set_available(LaneSet lanes);

// Log-probs, sums and statistics of all rows into out [kNumColumns, rows]; `write` stores E in place.
void epilogue(const EpilogueChunk& chunk, float* out, bool write, bool statistics, LaneSet lanes, int num_threads);

// The stored chunk once more, from fresh logits and the shift and rest [rows] found by `epilogue`.
void exponentials(const EpilogueChunk& chunk, const float* shift, const float* rest, LaneSet lanes, int num_threads);

}  // namespace dpo_fast

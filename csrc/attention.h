// Attention of a packed row on the CPU: the segments of dpo_fast/layouts/segments.py, forward and backward, in fp32.
//
// Legend: L tokens, D head size, n queries and K keys of a segment, P rows of a panel (three vectors of lanes).
//
// A segment's keys and values of one head are copied together once. Queries go by panels, and scores are transposed:
//
//   S^T [K, P] = K (scale Q)^T     one lane a row, so that maximum and sum need no shuffles; masked entries are -inf
//   O [P, D]   = E V / sum E,      E = exp(S - max S),      lse = max S + log sum E
//
// The backward computes P = exp(S - lse) again, panel by panel:
//
//   dP^T = V dO^T,   dS = P * (dP - dO . O),   dQ = scale dS K,   dK += dS^T (scale Q),   dV += P^T dO
//
// Scores of one panel exist at a time, in cache. Sums run in an order that does not depend on threads.
#pragma once

#include <cstdint>

#include "epilogue.h"

namespace dpo_fast {

// As in Python: queries [start, start + length) see [prefix_start, prefix_start + prefix_length) and, causally, each
// other.
struct AttentionSegment {
  int64_t start, length, prefix_start, prefix_length;
};
static_assert(sizeof(AttentionSegment) == 32, "AttentionSegment is an int64 [4] row of the Python table");

// A tensor [heads, L, size] whose last dimension is contiguous.
template <typename T>
struct AttentionView {
  T* data;
  int64_t head_stride, row_stride;
  T* row(int64_t head, int64_t token) const { return data + head * head_stride + token * row_stride; }
};

struct AttentionProblem {
  AttentionView<const float> query, key, value;
  int64_t query_heads, kv_heads, length, size, value_size;  // D of queries and keys, D of values
  const AttentionSegment* segments;
  int64_t num_segments;
  float scale;
  int64_t window;  // positions a query sees, its own included; 0: all
};

struct AttentionForward {
  AttentionView<float> out;
  float* lse;  // [query_heads, L]
};

struct AttentionBackward {
  AttentionView<const float> out, dout;
  const float* lse;
  AttentionView<float> dquery, dkey, dvalue;  // the last two are added to
};

// Instruction set for these head sizes; kScalar: none serves them.
LaneSet attention_lanes(int64_t size, int64_t value_size);

int64_t attention_scratch_floats(const AttentionProblem& problem, LaneSet lanes, bool backward);  // of one thread

void attention_forward(const AttentionProblem& problem, const AttentionForward& forward, float* scratch, LaneSet lanes,
                       int num_threads);
void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, float* scratch,
                        LaneSet lanes, int num_threads);

}  // namespace dpo_fast

// The attention over threads, and the choice of lanes.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

// GCC's own intrinsics leave a register "undefined" on purpose and are then warned about (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_FAST_X86 1
#include "lanes_avx2.h"
#include "lanes_avx512.h"

namespace dpo_fast {

namespace lanes_avx2 {
#define LANES_FN AVX2_TARGET static
#define LANES_INLINE AVX2_INLINE
#include "lanes_math.h"

#include "attention_kernels.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx2

namespace lanes_avx512 {
#define LANES_FN AVX512_TARGET static
#define LANES_INLINE AVX512_INLINE
#include "lanes_math.h"

#include "attention_kernels.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx512

}  // namespace dpo_fast
#endif

namespace dpo_fast {
namespace {

struct Kernels {
  void (*forward)(const AttentionProblem&, const AttentionForward&, int64_t, int64_t, float*);
  void (*backward)(const AttentionProblem&, const AttentionBackward&, int64_t, int64_t, float*);
};

Kernels kernels_for(LaneSet lanes) {
#ifdef DPO_FAST_X86
  if (lanes == LaneSet::kAvx512) return {lanes_avx512::segment_forward, lanes_avx512::segment_backward};
  if (lanes == LaneSet::kAvx2) return {lanes_avx2::segment_forward, lanes_avx2::segment_backward};
#endif
  (void)lanes;
  return {};
}

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Segments whose gradients meet: a root with those that see a prefix of it.
std::vector<std::vector<int64_t>> families_of(const AttentionProblem& problem) {
  std::vector<std::vector<int64_t>> families;
  std::vector<int64_t> family_at(problem.length, -1);  // by a root's start
  for (int64_t i = 0; i < problem.num_segments; ++i) {
    const AttentionSegment& segment = problem.segments[i];
    if (segment.prefix_length == 0) {
      family_at[segment.start] = static_cast<int64_t>(families.size());
      families.push_back({i});
    } else {
      families[family_at[segment.prefix_start]].push_back(i);
    }
  }
  return families;
}

}  // namespace

LaneSet attention_lanes(int64_t size, int64_t value_size) {
  for (const LaneSet lanes : {LaneSet::kAvx512, LaneSet::kAvx2}) {
    const int64_t width = lanes == LaneSet::kAvx512 ? 32 : 16;
    if (lane_set_available(lanes) && size % width == 0 && value_size % width == 0) return lanes;
  }
  return LaneSet::kScalar;
}

int64_t attention_scratch_floats(const AttentionProblem& problem, LaneSet lanes, bool backward) {
  int64_t keys = 0;
  for (int64_t i = 0; i < problem.num_segments; ++i)
    keys = std::max(keys, problem.segments[i].prefix_length + problem.segments[i].length);
#ifdef DPO_FAST_X86
  float* const none = nullptr;
  const auto floats = [&](auto carved) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(carved.end) / 4); };
  if (lanes == LaneSet::kAvx512)
    return floats(lanes_avx512::carve(none, keys, problem.size, problem.value_size, backward));
  if (lanes == LaneSet::kAvx2) return floats(lanes_avx2::carve(none, keys, problem.size, problem.value_size, backward));
#endif
  (void)keys, (void)lanes, (void)backward;
  return 0;
}

void attention_forward(const AttentionProblem& problem, const AttentionForward& forward, float* scratch, LaneSet lanes,
                       int num_threads) {
  const Kernels kernels = kernels_for(lanes);
  const int64_t tasks = problem.num_segments * problem.query_heads;
  const int64_t floats = attention_scratch_floats(problem, lanes, false);
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
  for (int64_t task = 0; task < tasks; ++task)
    kernels.forward(problem, forward, task / problem.query_heads, task % problem.query_heads,
                    scratch + thread_index() * floats);
  (void)num_threads;
}

void attention_backward(const AttentionProblem& problem, const AttentionBackward& backward, float* scratch,
                        LaneSet lanes, int num_threads) {
  const Kernels kernels = kernels_for(lanes);
  const std::vector<std::vector<int64_t>> families = families_of(problem);
  const int64_t tasks = static_cast<int64_t>(families.size()) * problem.kv_heads;
  const int64_t floats = attention_scratch_floats(problem, lanes, true);
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
  for (int64_t task = 0; task < tasks; ++task)
    for (const int64_t index : families[task / problem.kv_heads])
      kernels.backward(problem, backward, index, task % problem.kv_heads, scratch + thread_index() * floats);
  (void)num_threads;
}

}  // namespace dpo_fast

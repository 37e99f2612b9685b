// Rows of the epilogue over threads, lanes chosen at run time.
#include <cmath>

// GCC's own intrinsics leave a register "undefined" on purpose and are then warned about (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "epilogue.h"
#include "lanes_scalar.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_FAST_X86 1
#include "lanes_avx2.h"
#include "lanes_avx512.h"
#endif

namespace dpo_fast {

namespace lanes_scalar {
#define LANES_FN static
#define LANES_INLINE SCALAR_INLINE
#include "lanes_math.h"

#include "logit_columns.h"

#include "epilogue_row.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_scalar

#ifdef DPO_FAST_X86
namespace lanes_avx2 {
#define LANES_FN AVX2_TARGET static
#define LANES_INLINE AVX2_INLINE
#include "lanes_math.h"

#include "logit_columns.h"

#include "epilogue_row.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx2

namespace lanes_avx512 {
#define LANES_FN AVX512_TARGET static
#define LANES_INLINE AVX512_INLINE
#include "lanes_math.h"

#include "logit_columns.h"

#include "epilogue_row.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx512
#endif

namespace {

using EpilogueFn = lanes_scalar::EpilogueFn;
using ExponentialFn = lanes_scalar::ExponentialFn;

EpilogueFn epilogue_for(LaneSet lanes, bool cap, bool write, bool statistics) {
#ifdef DPO_FAST_X86
  if (lanes == LaneSet::kAvx512) return lanes_avx512::pick_epilogue(cap, write, statistics);
  if (lanes == LaneSet::kAvx2) return lanes_avx2::pick_epilogue(cap, write, statistics);
#endif
  (void)lanes;
  return lanes_scalar::pick_epilogue(cap, write, statistics);
}

ExponentialFn exponential_for(LaneSet lanes, bool cap) {
#ifdef DPO_FAST_X86
  if (lanes == LaneSet::kAvx512) return lanes_avx512::pick_exponential(cap);
  if (lanes == LaneSet::kAvx2) return lanes_avx2::pick_exponential(cap);
#endif
  (void)lanes;
  return lanes_scalar::pick_exponential(cap);
}

}  // namespace

bool lane_set_available(LaneSet lanes) {
  if (lanes == LaneSet::kScalar) return true;
#ifdef DPO_FAST_X86
  // Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (lanes == LaneSet::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

// Rows are handed out one by one: a core slowed down by other work takes fewer. No value depends on the order.
void epilogue(const EpilogueChunk& chunk, float* out, bool write, bool statistics, LaneSet lanes, int num_threads) {
  const EpilogueFn run = epilogue_for(lanes, chunk.softcap != 0.0f, write, statistics);
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
  for (int64_t row = 0; row < chunk.rows; ++row) run(chunk, row, out);
  (void)num_threads;
}

void exponentials(const EpilogueChunk& chunk, const float* shift, const float* rest, LaneSet lanes, int num_threads) {
  const ExponentialFn run = exponential_for(lanes, chunk.softcap != 0.0f);
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
  for (int64_t row = 0; row < chunk.rows; ++row) run(chunk, shift, rest, row);
  (void)num_threads;
}

}  // namespace dpo_fast

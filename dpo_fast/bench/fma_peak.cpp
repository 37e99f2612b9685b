// The rate of fused multiply-adds that the processor reaches with everything in registers: no GEMM
// can be faster. Independent accumulators hide the latency of each other.
#include <cstdint>

#if defined(__AVX512F__)
typedef float lanes __attribute__((vector_size(64)));
#else
typedef float lanes __attribute__((vector_size(32)));
#endif

constexpr int kAccumulators = 12;

static float work(int64_t rounds) {
  lanes acc[kAccumulators], a = {}, b = {};
  a += 0.999f;
  b += 0.001f;
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int k = 0; k < kAccumulators; ++k) acc[k] = acc[k] * a + b;
  }
  lanes sum = {};
  for (const auto& x : acc) sum += x;
  return sum[0];
}

// Returns the FLOPs done; *sink keeps the work alive.
extern "C" double fma_peak(int64_t rounds, int num_threads, float* sink) {
  float total = 0.0f;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) reduction(+ : total)
  for (int t = 0; t < num_threads; ++t) total += work(rounds);
  *sink = total;
  return 2.0 * kAccumulators * (sizeof(lanes) / sizeof(float)) * static_cast<double>(rounds) * num_threads;
}

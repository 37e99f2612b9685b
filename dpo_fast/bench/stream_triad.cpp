// STREAM's triad a = b + s * c (McCalpin, https://www.cs.virginia.edu/stream/), the bandwidth that benchmarks/ema.py
// measures itself against. Arrays of fp32, one contiguous part a thread, ordinary or non-temporal stores.
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void part(float* a, const float* b, const float* c, float s, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) a[i] = b[i] + s * c[i];
}

void part_streaming(float* a, const float* b, const float* c, float s, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  const __m512 scale = _mm512_set1_ps(s);
  for (int64_t i = begin; i < end; i += 16)
    _mm512_stream_ps(a + i, _mm512_add_ps(_mm512_loadu_ps(b + i), _mm512_mul_ps(scale, _mm512_loadu_ps(c + i))));
  _mm_sfence();
#elif defined(__AVX__)
  const __m256 scale = _mm256_set1_ps(s);
  for (int64_t i = begin; i < end; i += 8)
    _mm256_stream_ps(a + i, _mm256_add_ps(_mm256_loadu_ps(b + i), _mm256_mul_ps(scale, _mm256_loadu_ps(c + i))));
  _mm_sfence();
#else
  part(a, b, c, s, begin, end);
#endif
}

}  // namespace

// n is a multiple of 16 * num_threads, and the arrays begin on boundaries of 64 bytes.
extern "C" void triad(float* a, const float* b, const float* c, float s, int64_t n, int num_threads, int streaming) {
#pragma omp parallel for num_threads(num_threads) schedule(static, 1)
  for (int t = 0; t < num_threads; ++t) {
    const int64_t begin = n / num_threads * t, end = n / num_threads * (t + 1);
    if (streaming) part_streaming(a, b, c, s, begin, end);
    else part(a, b, c, s, begin, end);
  }
}

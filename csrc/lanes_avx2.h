// Eight float lanes in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE AVX2_TARGET __attribute__((always_inline)) static inline

namespace dpo_fast::lanes_avx2 {

constexpr int64_t kLanes = 8;
using Lanes = __m256;

AVX2_INLINE __m256i first(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}

AVX2_INLINE Lanes set1(float value) { return _mm256_set1_ps(value); }
AVX2_INLINE Lanes load(const float* from) { return _mm256_loadu_ps(from); }
AVX2_INLINE Lanes load_bf16(const uint16_t* from) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
AVX2_INLINE Lanes load_f16(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
AVX2_INLINE void store(float* to, Lanes value) { _mm256_storeu_ps(to, value); }
AVX2_INLINE Lanes load_part(const float* from, int64_t count, Lanes fill) {
  const __m256i mask = first(count);
  return _mm256_blendv_ps(fill, _mm256_maskload_ps(from, mask), _mm256_castsi256_ps(mask));
}
AVX2_INLINE void store_part(float* to, int64_t count, Lanes value) { _mm256_maskstore_ps(to, first(count), value); }
AVX2_INLINE Lanes keep_part(Lanes a, int64_t count) { return _mm256_and_ps(a, _mm256_castsi256_ps(first(count))); }
AVX2_INLINE Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
AVX2_INLINE Lanes sub(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
AVX2_INLINE Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
AVX2_INLINE Lanes div(Lanes a, Lanes b) { return _mm256_div_ps(a, b); }
AVX2_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
AVX2_INLINE Lanes magnitude(Lanes a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
AVX2_INLINE Lanes with_sign(Lanes size, Lanes sign) {
  return _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
AVX2_INLINE Lanes maximum(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }  // b where one is NaN
AVX2_INLINE Lanes where_less(Lanes x, Lanes bound, Lanes yes, Lanes no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
}
// 2^n in two factors, each a normal number, so that results in the denormal range round once. The integer
// conversion of a NaN gives INT_MIN, whose halves make finite factors: NaN * finite stays NaN.
AVX2_INLINE Lanes scale_by_power(Lanes p, Lanes n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}
AVX2_INLINE Lanes round_to_integer(Lanes a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AVX2_INLINE float reduce_max(Lanes a) {
  alignas(32) float lane[kLanes];
  _mm256_store_ps(lane, a);
  float best = lane[0];
  for (int i = 1; i < kLanes; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}
AVX2_INLINE double reduce_add(Lanes a) {
  const __m256d sums = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                                     _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
  alignas(32) double lane[4];
  _mm256_store_pd(lane, sums);
  return (lane[0] + lane[1]) + (lane[2] + lane[3]);
}

}  // namespace dpo_fast::lanes_avx2

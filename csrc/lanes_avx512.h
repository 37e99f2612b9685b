// Sixteen float lanes in AVX-512F and DQ.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define AVX512_TARGET __attribute__((target("avx512f,avx512dq,fma")))
#define AVX512_INLINE AVX512_TARGET __attribute__((always_inline)) static inline

namespace dpo_fast::lanes_avx512 {

constexpr int64_t kLanes = 16;
using Lanes = __m512;

AVX512_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

AVX512_INLINE Lanes set1(float value) { return _mm512_set1_ps(value); }
AVX512_INLINE Lanes load(const float* from) { return _mm512_loadu_ps(from); }
AVX512_INLINE Lanes load_bf16(const uint16_t* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
AVX512_INLINE Lanes load_f16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
AVX512_INLINE void store(float* to, Lanes value) { _mm512_storeu_ps(to, value); }
AVX512_INLINE Lanes load_part(const float* from, int64_t count, Lanes fill) {
  return _mm512_mask_loadu_ps(fill, first(count), from);
}
AVX512_INLINE void store_part(float* to, int64_t count, Lanes value) {
  _mm512_mask_storeu_ps(to, first(count), value);
}
AVX512_INLINE Lanes keep_part(Lanes a, int64_t count) { return _mm512_maskz_mov_ps(first(count), a); }
AVX512_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
AVX512_INLINE Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
AVX512_INLINE Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
AVX512_INLINE Lanes div(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
AVX512_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
AVX512_INLINE Lanes magnitude(Lanes a) { return _mm512_abs_ps(a); }
AVX512_INLINE Lanes with_sign(Lanes size, Lanes sign) {
  return _mm512_or_ps(size, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
AVX512_INLINE Lanes maximum(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }  // b where one is NaN
AVX512_INLINE Lanes where_less(Lanes x, Lanes bound, Lanes yes, Lanes no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), no, yes);
}
AVX512_INLINE Lanes scale_by_power(Lanes p, Lanes n) { return _mm512_scalef_ps(p, n); }
AVX512_INLINE Lanes round_to_integer(Lanes a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
AVX512_INLINE float reduce_max(Lanes a) {
  alignas(64) float lane[kLanes];
  _mm512_store_ps(lane, a);
  float best = lane[0];
  for (int i = 1; i < kLanes; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}
AVX512_INLINE double reduce_add(Lanes a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

}  // namespace dpo_fast::lanes_avx512

// Eight lanes of ema_math.h in AVX2 and F16C. Same bits as the scalar code, element for element.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers (gcc bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include "ema_math.h"

#define EMA_AVX2 __attribute__((target("avx2,f16c")))
#define EMA_AVX2_INLINE EMA_AVX2 __attribute__((always_inline)) static inline

namespace dpo_fast::avx2 {

constexpr int kLanes = 8;
using Words = __m256i;  // 16 consecutive 16-bit elements

template <int64_t D>
struct Raw {
  using type = __m128i;
};
template <>
struct Raw<kF32> {
  using type = __m256i;
};
template <int64_t D>
using RawOf = typename Raw<D>::type;

template <int64_t D>
EMA_AVX2_INLINE RawOf<D> load(const char* data, int64_t i) {
  if constexpr (D == kF32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 4 * i));
  else return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 2 * i));
}

template <int64_t D>
EMA_AVX2_INLINE void store(char* data, int64_t i, RawOf<D> raw) {
  if constexpr (D == kF32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(data + 4 * i), raw);
  else _mm_storeu_si128(reinterpret_cast<__m128i*>(data + 2 * i), raw);
}

template <int64_t D>
EMA_AVX2_INLINE __m256 widen(RawOf<D> raw) {
  if constexpr (D == kF32) return _mm256_castsi256_ps(raw);
  else if constexpr (D == kBF16)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  else return _mm256_cvtph_ps(raw);
}

// The low halves of eight 32-bit lanes, all of them below 2^16.
EMA_AVX2_INLINE __m128i low_halves(__m256i lanes) {
  return _mm_packus_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
}

template <bool kStochastic>
EMA_AVX2_INLINE __m128i narrow_bf16(__m256i bits, __m256i random) {
  __m256i addend = random;
  if constexpr (!kStochastic) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    addend = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  }
  return low_halves(_mm256_srli_epi32(_mm256_add_epi32(bits, addend), 16));
}

EMA_AVX2_INLINE __m128i narrow_f16_stochastic(__m256i bits, __m256i random) {
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000));
  const __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(magnitude, _mm256_srli_epi32(random, 3)), 13);
  const __m256i normal = _mm256_sub_epi32(sum, _mm256_set1_epi32(kRebiasF16));
  const __m256 scaled = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(kTwo40));
  const __m256i small = _mm256_srli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(scaled), random), 16);
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(kMinNormalF16), magnitude);
  return low_halves(_mm256_or_si256(_mm256_blendv_epi8(normal, small, is_small), sign));
}

// Values of finite(): ema_math.h's narrow_finite.
template <int64_t D, bool kStochastic>
EMA_AVX2_INLINE RawOf<D> narrow(__m256 value, __m256i random) {
  if constexpr (D == kF32) return _mm256_castps_si256(value);
  else if constexpr (D == kBF16) return narrow_bf16<kStochastic>(_mm256_castps_si256(value), random);
  else if constexpr (kStochastic) return narrow_f16_stochastic(_mm256_castps_si256(value), random);
  else return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

// The blend, set up once a span.
struct Blend {
  __m256 weight;
  bool from_policy, copy;
};

EMA_AVX2_INLINE Blend prepare(const EmaBlend& b) {
  return {_mm256_set1_ps(b.weight), b.from_policy != 0, b.copy != 0};
}

// The branches are the same for every element of an update.
EMA_AVX2_INLINE __m256 blend_value(__m256 r, __m256 p, const Blend& b) {
  if (b.copy) return p;
  const __m256 base = b.from_policy ? p : r, other = b.from_policy ? r : p;
  return _mm256_sub_ps(base, _mm256_mul_ps(b.weight, _mm256_sub_ps(base, other)));
}

// Whether none of four vectors is beyond the finite values of a type.
template <int64_t D>
EMA_AVX2_INLINE bool all_finite(const __m256 values[4]) {
  const __m256 sign = _mm256_set1_ps(-0.0f), limit = _mm256_set1_ps(max_finite<D>());
  __m256 inside = _mm256_cmp_ps(_mm256_andnot_ps(sign, values[0]), limit, _CMP_LE_OQ);
#pragma GCC unroll 3
  for (int v = 1; v < 4; ++v)
    inside = _mm256_and_ps(inside, _mm256_cmp_ps(_mm256_andnot_ps(sign, values[v]), limit, _CMP_LE_OQ));
  return _mm256_movemask_ps(inside) == 0xFF;
}

// The same, asked of rounded bf16: a value beyond the finite ones rounds to the largest of them or beyond.
EMA_AVX2_INLINE bool all_below_max(__m256i a, __m256i b) {
  const __m256i most = _mm256_max_epu16(_mm256_add_epi16(a, a), _mm256_add_epi16(b, b));  // without signs
  const __m256i excess = _mm256_subs_epu16(most, _mm256_set1_epi16(static_cast<int16_t>(2 * kLargestBf16 - 1)));
  return _mm256_testz_si256(excess, excess);
}

using Bits = __m256i;
using Floats = __m256;

// What every draw of a span needs: the keys of all rounds, the step, and how the octets of a counter follow.
struct Drawer {
  __m256i k0[kPhiloxRounds], k1[kPhiloxRounds], step_lo, step_hi, turn[2];
};

EMA_AVX2_INLINE Drawer prepare_draw(const PhiloxKey& key) {
  Drawer drawer;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    drawer.k0[round] = _mm256_set1_epi64x(k0);
    drawer.k1[round] = _mm256_set1_epi64x(k1);
  }
  drawer.step_lo = _mm256_set1_epi64x(key.step_lo);
  drawer.step_hi = _mm256_set1_epi64x(key.step_hi);
  const __m128i none = _mm_set1_epi8(-1);  // shuffled to zeros
  const __m128i by1 = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1);
  const __m128i by2 = _mm_shuffle_epi8(by1, by1), by3 = _mm_shuffle_epi8(by2, by1);
  drawer.turn[0] = _mm256_set_m128i(by1, none);
  drawer.turn[1] = _mm256_set_m128i(by3, by2);
  return drawer;
}

// The words of four counters, one after the other.
struct Drawn {
  __m256i pair[2];
};
constexpr int kDrawnCounters = 4;

EMA_AVX2_INLINE Drawn draw(uint64_t counter, const Drawer& drawer) {
  // Four counters in 64-bit lanes: vpmuludq reads low halves only, so junk in the high halves never matters.
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i order = _mm256_setr_epi64x(0, 2, 1, 3);  // undone by the two unpacks below
  __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), order);
  __m256i c1 = _mm256_srli_epi64(c0, 32), c2 = drawer.step_lo, c3 = drawer.step_hi;
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i product0 = _mm256_mul_epu32(c0, m0), product1 = _mm256_mul_epu32(c2, m1);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), drawer.k0[round]);
    c1 = product1;
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), drawer.k1[round]);
    c3 = product0;
  }
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  return {{_mm256_unpacklo_epi64(first, second), _mm256_unpackhi_epi64(first, second)}};
}

// Random bits of 32 elements: all octets of counter `block` of a draw.
EMA_AVX2_INLINE void random_words(const Drawn& drawn, int block, const Drawer& drawer, Words random[2]) {
  const __m256i pair = drawn.pair[block >> 1];
  const __m256i own = block & 1 ? _mm256_permute2x128_si256(pair, pair, 0x11) : _mm256_permute2x128_si256(pair, pair, 0);
  random[0] = _mm256_xor_si256(own, _mm256_shuffle_epi8(own, drawer.turn[0]));
  random[1] = _mm256_xor_si256(own, _mm256_shuffle_epi8(own, drawer.turn[1]));
}

// Half of the words, eight, in 32 bits each.
EMA_AVX2_INLINE __m256i spread(Words words, bool second) {
  return _mm256_cvtepu16_epi32(second ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words));
}

// 16 bf16 as they lie in memory: those at even and those at odd places widen by one instruction each.
EMA_AVX2_INLINE Words load_words(const char* data, int64_t i) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 2 * i));
}
EMA_AVX2_INLINE void store_words(char* data, int64_t i, Words words) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data + 2 * i), words);
}
EMA_AVX2_INLINE __m256 widen_even(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
EMA_AVX2_INLINE __m256 widen_odd(Words words) {
  return _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xFFFF0000)));
}

// narrow_bf16 of both halves, put back in their places; random holds the bits in the order of the elements.
template <bool kStochastic>
EMA_AVX2_INLINE Words narrow_words(__m256 even, __m256 odd, Words random) {
  const __m256i e = _mm256_castps_si256(even), o = _mm256_castps_si256(odd);
  __m256i add_e = _mm256_and_si256(random, _mm256_set1_epi32(0xFFFF)), add_o = _mm256_srli_epi32(random, 16);
  if constexpr (!kStochastic) {
    const __m256i one = _mm256_set1_epi32(1), half = _mm256_set1_epi32(0x7FFF);
    add_e = _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(e, 16), one));
    add_o = _mm256_add_epi32(half, _mm256_and_si256(_mm256_srli_epi32(o, 16), one));
  }
  const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(e, add_e), 16);
  return _mm256_blend_epi16(low, _mm256_add_epi32(o, add_o), 0xAA);
}

}  // namespace dpo_fast::avx2

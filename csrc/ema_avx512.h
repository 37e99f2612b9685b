// Sixteen lanes of ema_math.h in AVX-512 (F, BW, VL, DQ). Same bits as the scalar code, element for element.
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

#define EMA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define EMA_AVX512_INLINE EMA_AVX512 __attribute__((always_inline)) static inline

namespace dpo_fast::avx512 {

constexpr int kLanes = 16;
using Words = __m512i;  // 32 consecutive 16-bit elements

template <int64_t D>
struct Raw {
  using type = __m256i;
};
template <>
struct Raw<kF32> {
  using type = __m512i;
};
template <int64_t D>
using RawOf = typename Raw<D>::type;

template <int64_t D>
EMA_AVX512_INLINE RawOf<D> load(const char* data, int64_t i) {
  if constexpr (D == kF32) return _mm512_loadu_si512(data + 4 * i);
  else return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 2 * i));
}

template <int64_t D>
EMA_AVX512_INLINE void store(char* data, int64_t i, RawOf<D> raw) {
  if constexpr (D == kF32) _mm512_storeu_si512(data + 4 * i, raw);
  else _mm256_storeu_si256(reinterpret_cast<__m256i*>(data + 2 * i), raw);
}

template <int64_t D>
EMA_AVX512_INLINE __m512 widen(RawOf<D> raw) {
  if constexpr (D == kF32) return _mm512_castsi512_ps(raw);
  else if constexpr (D == kBF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  else return _mm512_cvtph_ps(raw);
}

template <bool kStochastic>
EMA_AVX512_INLINE __m256i narrow_bf16(__m512i bits, __m512i random) {
  __m512i addend = random;
  if constexpr (!kStochastic) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    addend = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  }
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, addend), 16));
}

EMA_AVX512_INLINE __m256i narrow_f16_stochastic(__m512i bits, __m512i random) {
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x8000));
  __m512i out = _mm512_srli_epi32(_mm512_add_epi32(magnitude, _mm512_srli_epi32(random, 3)), 13);
  out = _mm512_sub_epi32(out, _mm512_set1_epi32(kRebiasF16));
  const __m512 scaled = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(kTwo40));
  const __m512i small = _mm512_srli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(scaled), random), 16);
  out = _mm512_mask_mov_epi32(out, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(kMinNormalF16)), small);
  return _mm512_cvtepi32_epi16(_mm512_or_si512(out, sign));
}

// Values of finite(): ema_math.h's narrow_finite.
template <int64_t D, bool kStochastic>
EMA_AVX512_INLINE RawOf<D> narrow(__m512 value, __m512i random) {
  if constexpr (D == kF32) return _mm512_castps_si512(value);
  else if constexpr (D == kBF16) return narrow_bf16<kStochastic>(_mm512_castps_si512(value), random);
  else if constexpr (kStochastic) return narrow_f16_stochastic(_mm512_castps_si512(value), random);
  else return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

// The blend, set up once a span.
struct Blend {
  __m512 weight;
  bool from_policy, copy;
};

EMA_AVX512_INLINE Blend prepare(const EmaBlend& b) {
  return {_mm512_set1_ps(b.weight), b.from_policy != 0, b.copy != 0};
}

// The branches are the same for every element of an update.
EMA_AVX512_INLINE __m512 blend_value(__m512 r, __m512 p, const Blend& b) {
  if (b.copy) return p;
  const __m512 base = b.from_policy ? p : r, other = b.from_policy ? r : p;
  return _mm512_sub_ps(base, _mm512_mul_ps(b.weight, _mm512_sub_ps(base, other)));
}

// Whether none of four vectors is beyond the finite values of a type.
template <int64_t D>
EMA_AVX512_INLINE bool all_finite(const __m512 values[4]) {
  const __m512 limit = _mm512_set1_ps(max_finite<D>());
  unsigned inside = 0xFFFF;
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) inside &= _mm512_cmp_ps_mask(_mm512_abs_ps(values[v]), limit, _CMP_LE_OQ);
  return inside == 0xFFFF;
}

// The same, asked of rounded bf16: a value beyond the finite ones rounds to the largest of them or beyond.
EMA_AVX512_INLINE bool all_below_max(__m512i a, __m512i b) {
  const __m512i most = _mm512_max_epu16(_mm512_add_epi16(a, a), _mm512_add_epi16(b, b));  // without signs
  return _mm512_cmplt_epu16_mask(most, _mm512_set1_epi16(static_cast<int16_t>(2 * kLargestBf16))) == 0xFFFFFFFF;
}

using Bits = __m512i;
using Floats = __m512;

// What every draw of a span needs: the keys of all rounds, the step, and how the octets of a counter follow.
struct Drawer {
  __m512i k0[kPhiloxRounds], k1[kPhiloxRounds], step_lo, step_hi, turn;
};

EMA_AVX512_INLINE Drawer prepare_draw(const PhiloxKey& key) {
  Drawer drawer;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
    drawer.k0[round] = _mm512_set1_epi64(k0);
    drawer.k1[round] = _mm512_set1_epi64(k1);
  }
  drawer.step_lo = _mm512_set1_epi64(key.step_lo);
  drawer.step_hi = _mm512_set1_epi64(key.step_hi);
  const __m128i none = _mm_set1_epi8(-1);  // shuffled to zeros
  const __m128i by1 = _mm_setr_epi8(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1);
  const __m128i by2 = _mm_shuffle_epi8(by1, by1), by3 = _mm_shuffle_epi8(by2, by1);
  drawer.turn = _mm512_inserti32x4(_mm512_castsi128_si512(none), by1, 1);
  drawer.turn = _mm512_inserti32x4(_mm512_inserti32x4(drawer.turn, by2, 2), by3, 3);
  return drawer;
}

// The words of eight counters, one after the other.
struct Drawn {
  __m512i quad[2];
};
constexpr int kDrawnCounters = 8;

EMA_AVX512_INLINE Drawn draw(uint64_t counter, const Drawer& drawer) {
  // Eight counters in 64-bit lanes: vpmuludq reads low halves only, so junk in the high halves never matters.
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // undone by the two unpacks below
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter)), order);
  __m512i c1 = _mm512_srli_epi64(c0, 32), c2 = drawer.step_lo, c3 = drawer.step_hi;
#pragma GCC unroll 8
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i product0 = _mm512_mul_epu32(c0, m0), product1 = _mm512_mul_epu32(c2, m1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, drawer.k0[round], 0x96);
    c1 = product1;
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, drawer.k1[round], 0x96);
    c3 = product0;
  }
  const __mmask16 high = 0xAAAA;
  const __m512i first = _mm512_mask_mov_epi32(c0, high, _mm512_slli_epi64(c1, 32));
  const __m512i second = _mm512_mask_mov_epi32(c2, high, _mm512_slli_epi64(c3, 32));
  return {{_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second)}};
}

// Random bits of 64 elements: all octets of counters 2 * block and 2 * block + 1 of a draw.
EMA_AVX512_INLINE void random_words(const Drawn& drawn, int block, const Drawer& drawer, Words random[2]) {
  const __m512i quad = drawn.quad[block >> 1];
  const __m512i first = block & 1 ? _mm512_shuffle_i32x4(quad, quad, 0xAA) : _mm512_shuffle_i32x4(quad, quad, 0x00);
  const __m512i second = block & 1 ? _mm512_shuffle_i32x4(quad, quad, 0xFF) : _mm512_shuffle_i32x4(quad, quad, 0x55);
  random[0] = _mm512_xor_si512(first, _mm512_shuffle_epi8(first, drawer.turn));
  random[1] = _mm512_xor_si512(second, _mm512_shuffle_epi8(second, drawer.turn));
}

// Half of the words, sixteen, in 32 bits each.
EMA_AVX512_INLINE __m512i spread(Words words, bool second) {
  return _mm512_cvtepu16_epi32(second ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words));
}

// 32 bf16 as they lie in memory: those at even and those at odd places widen by one instruction each.
EMA_AVX512_INLINE Words load_words(const char* data, int64_t i) { return _mm512_loadu_si512(data + 2 * i); }
EMA_AVX512_INLINE void store_words(char* data, int64_t i, Words words) { _mm512_storeu_si512(data + 2 * i, words); }
EMA_AVX512_INLINE __m512 widen_even(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
EMA_AVX512_INLINE __m512 widen_odd(Words words) {
  return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xFFFF0000)));
}

// narrow_bf16 of both halves, put back in their places; random holds the bits in the order of the elements.
template <bool kStochastic>
EMA_AVX512_INLINE Words narrow_words(__m512 even, __m512 odd, Words random) {
  const __m512i e = _mm512_castps_si512(even), o = _mm512_castps_si512(odd);
  __m512i add_e = _mm512_and_si512(random, _mm512_set1_epi32(0xFFFF)), add_o = _mm512_srli_epi32(random, 16);
  if constexpr (!kStochastic) {
    const __m512i one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(0x7FFF);
    add_e = _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(e, 16), one));
    add_o = _mm512_add_epi32(half, _mm512_and_si512(_mm512_srli_epi32(o, 16), one));
  }
  const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(e, add_e), 16);
  return _mm512_mask_mov_epi16(low, 0xAAAAAAAA, _mm512_add_epi32(o, add_o));
}

}  // namespace dpo_fast::avx512

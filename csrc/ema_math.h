// Arithmetic of one element of the EMA: the same bits on the CPU (every instruction set) and in CUDA.
//
// Each operation is rounded on its own (no fused multiply-add: the build sets -ffp-contract=off), because the torch and
// Triton paths must give the same bits. ema_element is the rule; the vectorised loops take its short form (blend_value, narrow_finite) for elements
// whose value is finite in the reference's type, and ema_element for the rare rest.
#pragma once

#include <cstdint>
#include <cstring>

#include "ema.h"

namespace dpo_fast {

constexpr uint32_t kNan = 0x7FC00000u;       // what a computed NaN is written as
constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kMaxBf16 = 0x7F7F0000u;   // fp32 bits of the largest finite bf16
constexpr uint32_t kLargestBf16 = kMaxBf16 >> 16;
constexpr uint32_t kMaxF16 = 0x477FE000u;    // fp32 bits of 65504
constexpr uint32_t kInfF16 = 0x477FF000u;    // fp32 bits of 65520: from here nearest fp16 is infinity
constexpr uint32_t kMinNormalF16 = 0x38800000u;  // fp32 bits of 2^-14
constexpr uint32_t kRebiasF16 = (127u - 15u) << 10;
constexpr float kTwo40 = 1099511627776.0f;   // 2^40: a subnormal fp16 in units of 2^-24, times 2^16

DPO_FAST_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

DPO_FAST_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// base - weight * (base - other).
DPO_FAST_HD float blend_value(float r, float p, const EmaBlend& blend) {
  const float base = blend.from_policy ? p : r, other = blend.from_policy ? r : p;
#if defined(__CUDA_ARCH__)
  const float value = __fsub_rn(base, __fmul_rn(blend.weight, __fsub_rn(base, other)));
#else
  const float value = base - blend.weight * (base - other);
#endif
  return blend.copy ? p : value;
}

DPO_FAST_HD float half_to_float(uint32_t half) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(half)));
  return value;
#else
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | kInfinity | ((magnitude & 0x3FFu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude + kRebiasF16) << 13));
  const float small = static_cast<float>(magnitude) * 5.9604644775390625e-08f;  // 2^-24, exact
  return float_of(sign | bits_of(small));
#endif
}

template <int64_t D>
DPO_FAST_HD float widen(uint32_t raw) {
  if (D == kF32) return float_of(raw);
  if (D == kBF16) return float_of(raw << 16);
  return half_to_float(raw);
}

// The largest finite value of a type.
template <int64_t D>
DPO_FAST_HD float max_finite() {
  return float_of(D == kF32 ? kInfinity - 1u : D == kBF16 ? kMaxBf16 : kMaxF16);
}

// value must be at most max_finite in magnitude. random: 16 random bits, read only when kStochastic.
template <int64_t D, bool kStochastic>
DPO_FAST_HD uint32_t narrow_finite(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  if (D == kF32) return bits;
  if (D == kBF16) return (bits + (kStochastic ? random : 0x7FFFu + ((bits >> 16) & 1u))) >> 16;
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= kMinNormalF16) {
    const uint32_t addend = kStochastic ? random >> 3 : 0xFFFu + ((magnitude >> 13) & 1u);
    return sign | (((magnitude + addend) >> 13) - kRebiasF16);
  }
  // Subnormal: the bits of the result are the value in units of 2^-24. 0.5f has exactly that unit in its last place.
  if (!kStochastic) return sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u);
  return sign | ((static_cast<uint32_t>(float_of(magnitude) * kTwo40) + random) >> 16);
}

// Any value: beyond max_finite it rounds to nearest in both modes, and a NaN keeps its leading bits.
template <int64_t D, bool kStochastic>
DPO_FAST_HD uint32_t narrow(float value, uint32_t random) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
  if (D == kF32 || magnitude <= bits_of(max_finite<D>())) return narrow_finite<D, kStochastic>(value, random);
  if (D == kBF16) return magnitude > kInfinity ? (bits >> 16) | 0x40u : narrow_finite<kBF16, false>(value, 0u);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > kInfinity) return sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu);
  return sign | (magnitude < kInfF16 ? 0x7BFFu : 0x7C00u);
}

// One element: raw storage of reference and policy in, raw storage of the reference out; master is updated if kShadow.
// A value that is not a number leaves the reference as it is where reference and policy are equal (the same infinity)
// or both NaN, and is written as the canonical NaN elsewhere.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
DPO_FAST_HD uint32_t ema_element(uint32_t ref, uint32_t policy, float& master, const EmaBlend& blend, uint32_t random) {
  const float p = widen<P>(policy);
  const float r = kShadow ? master : widen<R>(ref);
  float value = blend_value(r, p, blend);
  if (value != value) {
    const bool unchanged = p == r || (p != p && r != r);
    if (unchanged && !kShadow) return ref;
    value = unchanged ? r : float_of(kNan);
  }
  if (kShadow) master = value;
  return narrow<R, kStochastic>(value, random);
}

}  // namespace dpo_fast

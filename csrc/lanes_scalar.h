// One lane: the arithmetic of lanes_avx2.h and lanes_avx512.h in plain C++, for every other processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define SCALAR_INLINE static inline

namespace dpo_fast::lanes_scalar {

constexpr int64_t kLanes = 1;
using Lanes = float;

SCALAR_INLINE Lanes set1(float value) { return value; }
SCALAR_INLINE Lanes load(const float* from) { return *from; }
SCALAR_INLINE void store(float* to, Lanes value) { *to = value; }
// The partial forms are for tails shorter than kLanes, which do not exist here.
SCALAR_INLINE Lanes load_part(const float*, int64_t, Lanes fill) { return fill; }
SCALAR_INLINE void store_part(float*, int64_t, Lanes) {}
SCALAR_INLINE Lanes keep_part(Lanes, int64_t) { return 0.0f; }
SCALAR_INLINE Lanes add(Lanes a, Lanes b) { return a + b; }
SCALAR_INLINE Lanes sub(Lanes a, Lanes b) { return a - b; }
SCALAR_INLINE Lanes mul(Lanes a, Lanes b) { return a * b; }
SCALAR_INLINE Lanes div(Lanes a, Lanes b) { return a / b; }
SCALAR_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
SCALAR_INLINE Lanes magnitude(Lanes a) { return std::fabs(a); }
SCALAR_INLINE Lanes with_sign(Lanes size, Lanes sign) { return std::copysign(size, sign); }
// The larger; `b` where one is NaN.
SCALAR_INLINE Lanes maximum(Lanes a, Lanes b) { return a > b ? a : b; }
SCALAR_INLINE Lanes where_less(Lanes x, Lanes bound, Lanes yes, Lanes no) { return x < bound ? yes : no; }
// p * 2^n for an integer n in two factors, each a normal number, so that denormal results round once.
SCALAR_INLINE Lanes scale_by_power(Lanes p, Lanes n) {
  const int32_t whole = n == n ? static_cast<int32_t>(n) : 0, half = whole / 2;
  const int32_t bits[2] = {(half + 127) << 23, (whole - half + 127) << 23};
  float factor[2];
  std::memcpy(factor, bits, sizeof factor);
  return p * factor[0] * factor[1];
}
SCALAR_INLINE Lanes round_to_integer(Lanes a) { return std::nearbyint(a); }
SCALAR_INLINE float reduce_max(Lanes a) { return a; }
SCALAR_INLINE double reduce_add(Lanes a) { return a; }

}  // namespace dpo_fast::lanes_scalar

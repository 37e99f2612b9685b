// A run of consecutive elements of one tensor, in the enclosing namespace's lanes. No include guard: ema_cpu.cpp
// includes it once an instruction set, with EMA_TARGET defined (and EMA_SCALAR for no lanes at all).

template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_TARGET void span(const Span& s, const EmaBlend& b, const uint16_t* random) {
  int64_t i = 0;
#ifndef EMA_SCALAR
  const Blend lanes = prepare(b);
  for (; i + kLanes <= s.count; i += kLanes) {
    const auto p = widen<P>(load<P>(s.policy, i));
    const auto r = kShadow ? widen<kF32>(load<kF32>(s.shadow, i)) : widen<R>(load<R>(s.ref, i));
    const auto value = blend_value(r, p, lanes);
    Bits drawn{};
    if constexpr (kStochastic) drawn = load_random(random + i);
    if (finite<R>(value)) {
      if constexpr (kShadow) store<kF32>(s.shadow, i, narrow<kF32, false>(value, drawn));
      store<R>(s.ref, i, narrow<R, kStochastic>(value, drawn));
    } else {
      for (int64_t k = i; k < i + kLanes; ++k) span_element<R, P, kShadow, kStochastic>(s, k, b, random);
    }
  }
#endif
  for (; i < s.count; ++i) span_element<R, P, kShadow, kStochastic>(s, i, b, random);
}

inline SpanFn pick(int64_t ref_dtype, int64_t policy_dtype, bool shadow, bool stochastic) {
#define EMA_VARIANTS(R, P)                                 \
  {                                                        \
    {span<R, P, false, false>, span<R, P, false, true>}, { \
      span<R, P, true, false>, span<R, P, true, true>      \
    }                                                      \
  }
#define EMA_POLICIES(R) {EMA_VARIANTS(R, kF32), EMA_VARIANTS(R, kBF16), EMA_VARIANTS(R, kF16)}
  static constexpr SpanFn kTable[kNumDtypes][kNumDtypes][2][2] = {EMA_POLICIES(kF32), EMA_POLICIES(kBF16),
                                                                  EMA_POLICIES(kF16)};
#undef EMA_POLICIES
#undef EMA_VARIANTS
  return kTable[ref_dtype][policy_dtype][shadow][stochastic];
}

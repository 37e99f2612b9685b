// A run of consecutive elements of one tensor, in the enclosing namespace's lanes. No include guard: ema_cpu.cpp
// includes it once an instruction set, with EMA_TARGET defined (and EMA_SCALAR for no lanes at all).

#ifndef EMA_SCALAR
#define EMA_INLINE EMA_TARGET __attribute__((always_inline)) inline

// kLanes elements from i on; drawn is read only when kStochastic.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_INLINE void update_lanes(const Span& s, int64_t i, const EmaBlend& b, const Blend& lanes, Bits drawn) {
  const auto p = widen<P>(load<P>(s.policy, i));
  const auto r = kShadow ? widen<kF32>(load<kF32>(s.shadow, i)) : widen<R>(load<R>(s.ref, i));
  const auto value = blend_value(r, p, lanes);
  if (finite<R>(value)) {
    if constexpr (kShadow) store<kF32>(s.shadow, i, narrow<kF32, false>(value, drawn));
    store<R>(s.ref, i, narrow<R, kStochastic>(value, drawn));
  } else {
    span_elements<R, P, kShadow, kStochastic>(s, i, i + kLanes, b);
  }
}

// 2 * kLanes elements from i on. bf16 beside bf16 is never repacked: half the instructions of update_lanes.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_INLINE void update_words(const Span& s, int64_t i, const EmaBlend& b, const Blend& lanes, Words drawn) {
  if constexpr (R == kBF16 && P == kBF16 && !kShadow) {
    const Words ref = load_words(s.ref, i), policy = load_words(s.policy, i);
    const auto even = blend_value(widen_even(ref), widen_even(policy), lanes);
    const auto odd = blend_value(widen_odd(ref), widen_odd(policy), lanes);
    if (finite<R>(even) && finite<R>(odd)) store_words(s.ref, i, narrow_words<kStochastic>(even, odd, drawn));
    else span_elements<R, P, kShadow, kStochastic>(s, i, i + 2 * kLanes, b);
  } else {
    update_lanes<R, P, kShadow, kStochastic>(s, i, b, lanes, spread(drawn, false));
    update_lanes<R, P, kShadow, kStochastic>(s, i + kLanes, b, lanes, spread(drawn, true));
  }
}
#undef EMA_INLINE
#endif

template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_TARGET void span(const Span& s, const EmaBlend& b) {
  int64_t i = 0;
#ifndef EMA_SCALAR
  const Blend lanes = prepare(b);
  if constexpr (kStochastic) {
    i = std::min(s.count, static_cast<int64_t>(-s.position & 7));  // to the first element of a counter
    span_elements<R, P, kShadow, kStochastic>(s, 0, i, b);
    const Drawer drawer = prepare_draw(b.key);
    for (; i + 4 * kLanes <= s.count; i += 4 * kLanes) {
      Words drawn[2];
      draw((s.position + static_cast<uint64_t>(i)) >> 3, drawer, drawn);
      update_words<R, P, kShadow, kStochastic>(s, i, b, lanes, drawn[0]);
      update_words<R, P, kShadow, kStochastic>(s, i + 2 * kLanes, b, lanes, drawn[1]);
    }
  } else {
    for (; i + 2 * kLanes <= s.count; i += 2 * kLanes)
      update_words<R, P, kShadow, kStochastic>(s, i, b, lanes, Words{});
  }
#endif
  span_elements<R, P, kShadow, kStochastic>(s, i, s.count, b);
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

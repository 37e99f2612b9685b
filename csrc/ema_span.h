// A run of consecutive elements of one tensor, in the enclosing namespace's lanes. No include guard: ema_cpu.cpp
// includes it once an instruction set, with EMA_TARGET defined (and EMA_SCALAR for no lanes at all).

#ifndef EMA_SCALAR
#define EMA_INLINE EMA_TARGET __attribute__((always_inline)) inline

constexpr int64_t kBlock = 4 * kLanes;  // elements between two questions whether all is finite

// bf16 beside bf16 is never repacked: half the instructions of update_lanes. False, and nothing stored, if a value may
// be beyond the finite ones.
template <bool kStochastic>
EMA_INLINE bool update_words(const Span& s, int64_t i, const Blend& lanes, const Words random[2]) {
  Words out[2];
#pragma GCC unroll 2
  for (int w = 0; w < 2; ++w) {
    const Words ref = load_words(s.ref, i + w * 2 * kLanes), policy = load_words(s.policy, i + w * 2 * kLanes);
    const auto even = blend_value(widen_even(ref), widen_even(policy), lanes);
    const auto odd = blend_value(widen_odd(ref), widen_odd(policy), lanes);
    out[w] = narrow_words<kStochastic>(even, odd, random[w]);
  }
  if (!all_below_max(out[0], out[1])) return false;
  store_words(s.ref, i, out[0]);
  store_words(s.ref, i + 2 * kLanes, out[1]);
  return true;
}

// Any types. False, and nothing stored, if a value is beyond the finite ones.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_INLINE bool update_lanes(const Span& s, int64_t i, const Blend& lanes, const Words random[2]) {
  Floats values[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const int64_t at = i + v * kLanes;
    const Floats r = kShadow ? widen<kF32>(load<kF32>(s.shadow, at)) : widen<R>(load<R>(s.ref, at));
    values[v] = blend_value(r, widen<P>(load<P>(s.policy, at)), lanes);
  }
  if (!all_finite<R>(values)) return false;
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const int64_t at = i + v * kLanes;
    const Bits drawn = kStochastic ? spread(random[v >> 1], v & 1) : Bits{};
    if constexpr (kShadow) store<kF32>(s.shadow, at, narrow<kF32, false>(values[v], drawn));
    store<R>(s.ref, at, narrow<R, kStochastic>(values[v], drawn));
  }
  return true;
}

// Elements [i, i + kBlock); random is read only when kStochastic.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_INLINE void update_block(const Span& s, int64_t i, const EmaBlend& b, const Blend& lanes, const Words random[2]) {
  bool done;
  if constexpr (R == kBF16 && P == kBF16 && !kShadow) done = update_words<kStochastic>(s, i, lanes, random);
  else done = update_lanes<R, P, kShadow, kStochastic>(s, i, lanes, random);
  if (!done) span_elements<R, P, kShadow, kStochastic>(s, i, i + kBlock, b);
}
#undef EMA_INLINE
#endif

template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
EMA_TARGET void span(const Span& s, const EmaBlend& b) {
  int64_t i = 0;
#ifndef EMA_SCALAR
  const Blend lanes = prepare(b);
  if constexpr (kStochastic) {
    constexpr int64_t kDrawn = kDrawnCounters * kPerCounter;
    i = std::min(s.count, static_cast<int64_t>(-s.position & (kPerCounter - 1)));  // to a counter's first element
    span_elements<R, P, kShadow, kStochastic>(s, 0, i, b);
    const Drawer drawer = prepare_draw(b.key);
    for (; i + kDrawn <= s.count; i += kDrawn) {
      const Drawn drawn = draw((s.position + static_cast<uint64_t>(i)) / kPerCounter, drawer);
#pragma GCC unroll 4
      for (int block = 0; block < kDrawn / kBlock; ++block) {
        Words random[2];
        random_words(drawn, block, drawer, random);
        update_block<R, P, kShadow, kStochastic>(s, i + block * kBlock, b, lanes, random);
      }
    }
  } else {
    const Words unused[2] = {};
    for (; i + kBlock <= s.count; i += kBlock) update_block<R, P, kShadow, kStochastic>(s, i, b, lanes, unused);
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

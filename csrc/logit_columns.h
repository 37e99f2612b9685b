// From logits to what is exponentiated. Included once for each instruction set, after lanes_math.h.

struct Squash {
  Lanes scale, cap, inverse_cap;
};
LANES_INLINE Squash squash_of(float softcap, float scale) {
  return {set1(scale), set1(softcap), set1(softcap != 0.0f ? 1.0f / softcap : 0.0f)};
}

// A few columns: z = scale * cap(a); below = z - k; slope = cap'(a), with a softcap only.
struct Columns {
  Lanes z, below, slope;
};

template <bool kCap>
LANES_INLINE Columns columns_of(Lanes a, Lanes shift, const Squash& squash) {
  if constexpr (kCap) {
    const Tanh t = tanh_of(mul(a, squash.inverse_cap));
    const Lanes z = mul(mul(t.value, squash.cap), squash.scale);
    return {z, sub(z, shift), t.slope};
  } else {
    // The difference first: a scaled logit of some thousands would lose the digits that count.
    return {mul(a, squash.scale), mul(sub(a, shift), squash.scale), a};
  }
}

// What maxima and shifts are taken of: a; with a softcap z, which may be equal where a is not.
template <bool kCap>
LANES_INLINE Lanes ordered(Lanes a, const Squash& squash) {
  if constexpr (kCap) return columns_of<true>(a, a, squash).z;
  else return a;
}

LANES_INLINE float one(Lanes a) { return reduce_max(a); }  // of lanes that are all equal; NaN stays NaN

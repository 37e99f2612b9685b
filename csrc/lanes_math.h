// exp and tanh over lanes. Included once for each instruction set, inside its namespace, with LANES_INLINE defined.

// e^x for x <= 0 (up to 88 in fact), -inf included, within 2 ulp; NaN stays NaN. 0 below -104.
// x = n ln 2 + r, and e^r = 1 + r + r^2 q(r) with a least-maximum fit of q on |r| <= ln(2) / 2 (error 3e-9).
LANES_INLINE Lanes exp_of(Lanes x) {
  const Lanes clamped = maximum(set1(-104.0f), x);  // a NaN in x survives: maximum gives its second argument
  const Lanes n = round_to_integer(mul(clamped, set1(1.44269504f)));
  Lanes r = fma(n, set1(-0.693359375f), clamped);  // exact: the constant has 9 bits
  r = fma(n, set1(2.12194440e-4f), r);
  Lanes q = set1(0.0013814539f);
  q = fma(q, r, set1(0.008368745f));
  q = fma(q, r, set1(0.04166839f));
  q = fma(q, r, set1(0.16666521f));
  q = fma(q, r, set1(0.49999994f));
  const Lanes p = add(set1(1.0f), fma(q, mul(r, r), r));
  return scale_by_power(p, n);
}

// tanh and its slope from u = e^(-2|x|): the slope 4u / (1 + u)^2 keeps its digits where 1 - tanh^2 is rounded to 0.
struct Tanh {
  Lanes value, slope;
};
LANES_INLINE Tanh tanh_of(Lanes x) {
  const Lanes size = magnitude(x), one = set1(1.0f);
  const Lanes u = exp_of(mul(size, set1(-2.0f)));
  const Lanes denominator = add(one, u);
  const Lanes large = div(sub(one, u), denominator);
  // Where 1 - u would cancel: the Taylor polynomial, whose next term is below 1e-8 of the value.
  const Lanes s = mul(size, size);
  Lanes q = set1(62.0f / 2835.0f);
  q = fma(q, s, set1(-17.0f / 315.0f));
  q = fma(q, s, set1(2.0f / 15.0f));
  q = fma(q, s, set1(-1.0f / 3.0f));
  const Lanes small = fma(mul(q, s), size, size);
  const Lanes value = where_less(size, set1(0.25f), small, large);
  return {with_sign(value, x), div(mul(set1(4.0f), u), mul(denominator, denominator))};
}

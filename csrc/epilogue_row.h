// One row of the epilogue. Included once for each instruction set, inside its namespace and after lanes_math.h, with
// LANES_FN (functions) and LANES_INLINE (helpers) defined.
//
// The target's column is left out by walking the row as two segments, before and after it: no cancellation, no mask.

constexpr int64_t kBlock = 128 * kLanes;  // columns summed in float before they are added to a double

struct Row {
  float* logits;
  const float* bias;
  Squash squash;
  Lanes shift;
};

LANES_INLINE Lanes logits_at(const Row& row, int64_t j) {
  const Lanes a = load(row.logits + j);
  return row.bias ? add(a, load(row.bias + j)) : a;
}
LANES_INLINE Lanes logits_part(const Row& row, int64_t j, int64_t count) {
  const Lanes a = load_part(row.logits + j, count, set1(-INFINITY));
  return row.bias ? add(a, load_part(row.bias + j, count, set1(0.0f))) : a;
}

// Maximum over columns [begin, end). NaN is passed over: the sums will show it. A tail is filled with -inf, or with
// -cap after a softcap, which no column is below.
template <bool kCap>
LANES_FN float segment_max(const Row& row, int64_t begin, int64_t end) {
  Lanes best[4] = {set1(-INFINITY), set1(-INFINITY), set1(-INFINITY), set1(-INFINITY)};
  int64_t j = begin;
  for (; j + 4 * kLanes <= end; j += 4 * kLanes)
    for (int64_t i = 0; i < 4; ++i) best[i] = maximum(ordered<kCap>(logits_at(row, j + i * kLanes), row.squash), best[i]);
  for (; j + kLanes <= end; j += kLanes) best[0] = maximum(ordered<kCap>(logits_at(row, j), row.squash), best[0]);
  if (j < end) best[1] = maximum(ordered<kCap>(logits_part(row, j, end - j), row.squash), best[1]);
  return reduce_max(maximum(maximum(best[0], best[1]), maximum(best[2], best[3])));
}

struct Sums {
  double rest = 0, weighted = 0, squares = 0, z = 0;  // of E, E (z - k), E^2, z
};
struct LaneSums {
  Lanes rest, weighted, squares, z;
};

template <bool kStats>
LANES_INLINE void count_in(LaneSums& sums, Lanes e, const Columns& c) {
  sums.rest = add(sums.rest, e);
  if constexpr (kStats) {
    // E is 0 where z - k is -inf: a finite factor keeps 0 * -inf from becoming NaN, and lets NaN through.
    sums.weighted = fma(e, maximum(set1(-104.0f), c.below), sums.weighted);
    sums.squares = fma(e, e, sums.squares);
    sums.z = add(sums.z, c.z);
  }
}

template <bool kStats>
LANES_INLINE void flush(Sums& sums, LaneSums& lanes) {
  sums.rest += reduce_add(lanes.rest);
  if constexpr (kStats) {
    sums.weighted += reduce_add(lanes.weighted);
    sums.squares += reduce_add(lanes.squares);
    sums.z += reduce_add(lanes.z);
  }
  lanes = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
}

// E of columns [begin, end): summed, and stored as E * slope where asked.
template <bool kCap, bool kWrite, bool kStats>
LANES_FN void segment_exp(const Row& row, int64_t begin, int64_t end, Sums& sums) {
  LaneSums lanes{set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t j = begin;
  while (j + kLanes <= end) {
    const int64_t stop = j + kBlock < end ? j + kBlock : end;
    for (; j + kLanes <= stop; j += kLanes) {
      const Columns c = columns_of<kCap>(logits_at(row, j), row.shift, row.squash);
      const Lanes e = exp_of(c.below);
      count_in<kStats>(lanes, e, c);
      if constexpr (kWrite) store(row.logits + j, kCap ? mul(e, c.slope) : e);
    }
    flush<kStats>(sums, lanes);
  }
  if (j >= end) return;
  const int64_t count = end - j;
  Columns c = columns_of<kCap>(logits_part(row, j, count), row.shift, row.squash);
  const Lanes e = keep_part(exp_of(c.below), count);
  c.z = keep_part(c.z, count);
  count_in<kStats>(lanes, e, c);
  if constexpr (kWrite) store_part(row.logits + j, count, kCap ? mul(e, c.slope) : e);
  flush<kStats>(sums, lanes);
}

// Whether y is the row's argmax as torch has it: the first NaN if there is one, else the first maximum.
LANES_FN bool is_argmax(const Row& row, int64_t vocab, int64_t y) {
  int64_t best = 0;
  for (int64_t j = 0; j < vocab; ++j) {
    const float a = row.logits[j] + (row.bias ? row.bias[j] : 0.0f);
    const float top = row.logits[best] + (row.bias ? row.bias[best] : 0.0f);
    if (a != a) return j == y;
    if (a > top) best = j;
  }
  return best == y;
}

template <bool kCap>
LANES_FN float target_entry(float rest, const Columns& target) {
  return kCap ? -rest * one(target.slope) : -rest;
}

template <bool kCap, bool kWrite, bool kStats>
LANES_FN void epilogue_row(const EpilogueChunk& chunk, int64_t r, float* out) {
  Row row{chunk.logits + r * chunk.stride, chunk.bias, squash_of(chunk.softcap, chunk.scale), set1(0.0f)};
  const int64_t y = chunk.target[r], vocab = chunk.vocab;
  const Lanes at_target = set1(row.logits[y] + (row.bias ? row.bias[y] : 0.0f));
  const float before = segment_max<kCap>(row, 0, y), after = segment_max<kCap>(row, y + 1, vocab);
  const float own = one(ordered<kCap>(at_target, row.squash));
  const float others = before > after ? before : after;
  const float shift = own > others ? own : others;
  row.shift = set1(shift);
  // Of finite logits the segments' maxima tell; a NaN elsewhere shows in the sum.
  const bool by_hand = kStats && (own != own || !std::isfinite(shift));
  const bool top1 = by_hand ? is_argmax(row, vocab, y) : own > before && own >= after;

  Sums sums;
  segment_exp<kCap, kWrite, kStats>(row, 0, y, sums);
  segment_exp<kCap, kWrite, kStats>(row, y + 1, vocab, sums);
  const Columns target = columns_of<kCap>(at_target, row.shift, row.squash);
  const float below = one(target.below);
  const double e = one(exp_of(target.below)), rest = sums.rest, total = rest + e;
  const bool is_max = below == 0.0f;
  if constexpr (kWrite) row.logits[y] = target_entry<kCap>(static_cast<float>(rest), target);

  float* column = out + r;
  const int64_t step = chunk.rows;
  column[kLogp * step] = static_cast<float>(is_max ? -std::log1p(rest) : below - std::log(total));
  column[kShift * step] = shift;
  column[kRest * step] = static_cast<float>(rest);
  column[kTotal * step] = static_cast<float>(total);
  if constexpr (kStats) {
    const double weighted = sums.weighted + e * std::fmax(below, -104.0);
    const double log_total = is_max ? std::log1p(rest) : std::log(total);
    column[kEntropy * step] = static_cast<float>(log_total - weighted / total);
    column[kMeanLogit * step] = static_cast<float>((sums.z + one(target.z)) / static_cast<double>(vocab));
    column[kIsTop1 * step] = top1 && (by_hand || rest == rest);
    column[kLogSumSquares * step] = static_cast<float>(std::log(sums.squares + e * e) - 2.0 * log_total);
  }
}

// The stored row once more, from fresh logits and the shift and rest found before.
template <bool kCap>
LANES_FN void exponential_row(const EpilogueChunk& chunk, const float* shift, const float* rest, int64_t r) {
  Row row{chunk.logits + r * chunk.stride, chunk.bias, squash_of(chunk.softcap, chunk.scale), set1(shift[r])};
  const int64_t y = chunk.target[r];
  const Lanes at_target = set1(row.logits[y] + (row.bias ? row.bias[y] : 0.0f));
  const Columns target = columns_of<kCap>(at_target, row.shift, row.squash);
  Sums unused;
  segment_exp<kCap, true, false>(row, 0, y, unused);
  segment_exp<kCap, true, false>(row, y + 1, chunk.vocab, unused);
  row.logits[y] = target_entry<kCap>(rest[r], target);
}

using EpilogueFn = void (*)(const EpilogueChunk&, int64_t, float*);
using ExponentialFn = void (*)(const EpilogueChunk&, const float*, const float*, int64_t);

static EpilogueFn pick_epilogue(bool cap, bool write, bool stats) {
  static const EpilogueFn table[2][2][2] = {
      {{epilogue_row<false, false, false>, epilogue_row<false, false, true>},
       {epilogue_row<false, true, false>, epilogue_row<false, true, true>}},
      {{epilogue_row<true, false, false>, epilogue_row<true, false, true>},
       {epilogue_row<true, true, false>, epilogue_row<true, true, true>}}};
  return table[cap][write][stats];
}
static ExponentialFn pick_exponential(bool cap) { return cap ? exponential_row<true> : exponential_row<false>; }

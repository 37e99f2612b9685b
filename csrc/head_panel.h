// What happens to one tile of logits of one panel of rows, while it is in cache. Included once for each instruction set,
// after logit_columns.h and head_gemm.h.

// Which rows of the panel have their target at which column of the tile.
struct Hits {
  uint64_t rows[kTile];  // bit i: row i
  bool any;
};

LANES_FN void find_hits(const HeadProblem& problem, int64_t first, int64_t valid, int64_t start, int64_t count,
                        Hits& hits) {
  for (int64_t v = 0; v < count; ++v) hits.rows[v] = 0;
  hits.any = false;
  for (int64_t i = 0; i < valid; ++i) {
    const int64_t v = problem.target[first + i] - start;
    if (v < 0 || v >= count) continue;
    hits.rows[v] |= uint64_t{1} << i;
    hits.any = true;
  }
}

LANES_FN void add_bias(const float* bias, int64_t count, float* e) {
  for (int64_t v = 0; v < count; ++v)
    for (int64_t c = 0; c < kPanel; c += kLanes)
      store(e + v * kPanel + c, add(load(e + v * kPanel + c), set1(bias[v])));
}

// Maximum of each row over the tile, of a; NaN is passed over.
LANES_FN void tile_max(const float* e, int64_t count, float* most) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    Lanes even = set1(-INFINITY), odd = even;
    int64_t v = 0;
    for (; v + 2 <= count; v += 2) {
      even = maximum(load(e + v * kPanel + c), even);
      odd = maximum(load(e + (v + 1) * kPanel + c), odd);
    }
    if (v < count) even = maximum(load(e + v * kPanel + c), even);
    store(most + c, maximum(even, odd));
  }
}

// Moves the shift to the new maximum: factor[i] = exp(old - new) for what was summed against the old one.
template <bool kCap>
LANES_FN bool move_shift(const float* most, const Squash& squash, PanelState& state, float* factor) {
  bool moved = false;
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const Lanes old = load(state.shift + c);
    const Lanes now = maximum(ordered<kCap>(load(most + c), squash), old);
    const Lanes distance = kCap ? sub(old, now) : mul(sub(old, now), squash.scale);
    store(factor + c, where_less(old, now, exp_of(distance), set1(1.0f)));
    store(state.shift + c, now);
  }
  for (int64_t i = 0; i < kPanel; ++i) moved |= factor[i] != 1.0f;
  return moved;
}

// The largest logit before and after each row's target, for `is_top1`.
LANES_FN void note_order(const HeadProblem& problem, const float* e, const float* most, int64_t first, int64_t valid,
                         int64_t start, int64_t count, PanelState& state) {
  for (int64_t i = 0; i < valid; ++i) {
    const int64_t y = problem.target[first + i] - start;
    float before = y >= count ? most[i] : -INFINITY, after = y < 0 ? most[i] : -INFINITY;
    if (y >= 0 && y < count) {
      for (int64_t v = 0; v < y; ++v) before = e[v * kPanel + i] > before ? e[v * kPanel + i] : before;
      for (int64_t v = y + 1; v < count; ++v) after = e[v * kPanel + i] > after ? e[v * kPanel + i] : after;
    }
    state.before[i] = before > state.before[i] ? before : state.before[i];
    state.after[i] = after > state.after[i] ? after : state.after[i];
  }
}

LANES_FN Lanes without_hits(Lanes e, uint64_t rows, int64_t c) {
  alignas(64) float lane[kLanes];
  store(lane, e);
  for (int64_t i = 0; i < kLanes; ++i)
    if (rows >> (c + i) & 1) lane[i] = 0.0f;
  return load(lane);
}

struct TileSums {
  float rest[kPanel], weighted[kPanel], squares[kPanel], z[kPanel];
};

// E of the tile, in place: summed without the targets, which become 0, and times the softcap's slope.
template <bool kCap, bool kStats, bool kWrite>
LANES_FN void exponentiate(float* e, int64_t count, int64_t valid, const float* shifts, const Squash& squash,
                           const Hits& hits, TileSums& sums) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const Lanes at = load(shifts + c), shift = where_less(at, set1(-FLT_MAX), set1(0.0f), at);
    const int64_t part = valid - c < 0 ? 0 : valid - c;  // rows of these lanes that exist
    Lanes rest[2] = {set1(0.0f), set1(0.0f)}, weighted = rest[0], squares = rest[0], z = rest[0];
    for (int64_t v = 0; v < count; ++v) {
      float* at_v = e + v * kPanel + c;
      const Columns columns = columns_of<kCap>(load(at_v), shift, squash);
      Lanes value = exp_of(columns.below);
      if (part < kLanes) value = keep_part(value, part);
      if (hits.rows[v]) value = without_hits(value, hits.rows[v], c);
      rest[v & 1] = add(rest[v & 1], value);
      if constexpr (kStats) {
        // A finite factor keeps 0 * -inf from becoming NaN, and lets NaN through.
        weighted = fma(value, maximum(set1(-104.0f), columns.below), weighted);
        squares = fma(value, value, squares);
        z = add(z, columns.z);
      }
      if constexpr (kWrite) {
        Lanes stored = value;
        if constexpr (kCap) stored = mul(value, columns.slope);
        if (kCap && part < kLanes) stored = keep_part(stored, part);  // 0 * NaN: of rows that do not exist
        store(at_v, stored);
      }
    }
    store(sums.rest + c, add(rest[0], rest[1]));
    if constexpr (kStats) {
      store(sums.weighted + c, weighted);
      store(sums.squares + c, squares);
      store(sums.z + c, z);
    }
  }
}

// What was summed against the old shift, rescaled, plus the tile's share.
template <bool kCap, bool kStats>
LANES_FN void add_sums(const TileSums& sums, const float* old_shift, const float* factor, float scale,
                       PanelState& state) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const double f = factor[i];
    if constexpr (kStats) {
      const double distance = (kCap ? 1.0 : static_cast<double>(scale)) * (old_shift[i] - state.shift[i]);
      const double carried = state.rest[i] > 0.0 && f != 1.0 ? state.rest[i] * distance : 0.0;
      state.weighted[i] = f * (state.weighted[i] + carried) + sums.weighted[i];
      state.squares[i] = f * f * state.squares[i] + sums.squares[i];
      state.z[i] += sums.z[i];
    }
    state.rest[i] = f * state.rest[i] + sums.rest[i];
  }
}

// One tile [count] x panel in the forward; true if what was summed before must be rescaled by factor.
template <bool kCap, bool kStats, bool kWrite>
LANES_FN bool panel_forward(const HeadProblem& problem, int64_t first, int64_t start, int64_t count, float* e,
                            PanelState& state, float* at_target, float* factor) {
  const Squash squash = squash_of(problem.softcap, problem.scale);
  const int64_t valid = problem.rows - first < kPanel ? problem.rows - first : kPanel;
  Hits hits;
  find_hits(problem, first, valid, start, count, hits);
  if (problem.bias) add_bias(problem.bias + start, count, e);
  alignas(64) float most[kPanel], old_shift[kPanel];
  tile_max(e, count, most);
  if (hits.any)
    for (int64_t i = 0; i < valid; ++i) {
      const int64_t v = problem.target[first + i] - start;
      if (v >= 0 && v < count) at_target[first + i] = e[v * kPanel + i];
    }
  if constexpr (kStats) note_order(problem, e, most, first, valid, start, count, state);
  for (int64_t i = 0; i < kPanel; ++i) old_shift[i] = state.shift[i];
  const bool moved = move_shift<kCap>(most, squash, state, factor);
  alignas(64) TileSums sums;
  exponentiate<kCap, kStats, kWrite>(e, count, valid, state.shift, squash, hits, sums);
  add_sums<kCap, kStats>(sums, old_shift, factor, problem.scale, state);
  return moved;
}

// The tile once more, against the final shifts.
template <bool kCap>
LANES_FN void panel_again(const HeadProblem& problem, const float* shift, int64_t first, int64_t start, int64_t count,
                          float* e) {
  const Squash squash = squash_of(problem.softcap, problem.scale);
  const int64_t valid = problem.rows - first < kPanel ? problem.rows - first : kPanel;
  Hits hits;
  find_hits(problem, first, valid, start, count, hits);
  alignas(64) float shifts[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) shifts[i] = i < valid ? shift[first + i] : 0.0f;
  if (problem.bias) add_bias(problem.bias + start, count, e);
  alignas(64) TileSums unused;
  exponentiate<kCap, false, true>(e, count, valid, shifts, squash, hits, unused);
}

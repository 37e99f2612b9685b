// One segment and head of the attention. Included once for each instruction set, inside its namespace and after
// lanes_math.h, with LANES_FN and LANES_INLINE defined.

constexpr int64_t kPanel = 3 * kLanes;
constexpr int64_t kWidth = 2 * kLanes;               // columns of a head at a time
constexpr int64_t kKeyRows = kLanes == 16 ? 8 : 4;   // keys in registers, 3 vectors each
constexpr int64_t kSumRows = kLanes == 16 ? 12 : 6;  // rows of a sum in registers, 2 vectors each

static_assert(kPanel % kSumRows == 0, "panels are whole groups of rows");

// What a thread works in; each piece begins on a cache line.
struct Scratch {
  float *keys, *values, *dkeys, *dvalues;   // [K, D], [K, Dv]
  float *scores, *dscores;                  // [K, P]
  float *query_t, *dout_t, *query, *dout;   // [D, P], [Dv, P], [P, D], [P, Dv]
  float* end;
};

LANES_FN Scratch carve(float* at, int64_t keys, int64_t size, int64_t value_size, bool backward) {
  Scratch s{};
  const auto take = [&at](int64_t count) {
    float* piece = at;
    at += (count + 15) / 16 * 16;
    return piece;
  };
  s.keys = take(keys * size);
  s.values = take(keys * value_size);
  s.scores = take(keys * kPanel);
  s.query_t = take(size * kPanel);
  if (backward) {
    s.dkeys = take(keys * size);
    s.dvalues = take(keys * value_size);
    s.dscores = take(keys * kPanel);
    s.dout_t = take(value_size * kPanel);
    s.query = take(kPanel * size);
    s.dout = take(kPanel * value_size);
  }
  s.end = at;
  return s;
}

LANES_FN void copy_rows(const float* from, int64_t stride, int64_t rows, int64_t size, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < size; d += kLanes) store(to + i * size + d, load(from + i * stride + d));
}

// The segment's keys or values together: those of the prefix, then its own.
LANES_FN void gather(const AttentionView<const float>& x, int64_t head, const AttentionSegment& segment, int64_t size,
                     float* to) {
  copy_rows(x.row(head, segment.prefix_start), x.row_stride, segment.prefix_length, size, to);
  copy_rows(x.row(head, segment.start), x.row_stride, segment.length, size, to + segment.prefix_length * size);
}

LANES_FN void add_rows(const float* from, int64_t rows, int64_t size, float* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < size; d += kLanes)
      store(to + i * stride + d, add(load(to + i * stride + d), load(from + i * size + d)));
}

// `rows` rows of factor * x, transposed to [size, P]; lanes beyond them are 0.
LANES_FN void transpose_rows(const float* x, int64_t stride, int64_t rows, int64_t size, float factor, float* to) {
  for (int64_t d = 0; d < size; ++d)
    for (int64_t i = 0; i < kPanel; ++i) to[d * kPanel + i] = i < rows ? factor * x[i * stride + d] : 0.0f;
}

// out [kRows, P] = rows of keys times the panel.
template <int64_t kRows>
LANES_INLINE void score_rows(const float* keys, const float* panel, int64_t size, float* out) {
  Lanes acc[kRows][3];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = acc[r][2] = set1(0.0f);
  for (int64_t d = 0; d < size; ++d) {
    const float* x = panel + d * kPanel;
    const Lanes x0 = load(x), x1 = load(x + kLanes), x2 = load(x + 2 * kLanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const Lanes one = set1(keys[r * size + d]);
      acc[r][0] = fma(one, x0, acc[r][0]);
      acc[r][1] = fma(one, x1, acc[r][1]);
      acc[r][2] = fma(one, x2, acc[r][2]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int64_t c = 0; c < 3; ++c) store(out + r * kPanel + c * kLanes, acc[r][c]);
}

LANES_FN void score(const float* keys, const float* panel, int64_t count, int64_t size, float* out) {
  int64_t j = 0;
  for (; j + kKeyRows <= count; j += kKeyRows) score_rows<kKeyRows>(keys + j * size, panel, size, out + j * kPanel);
  for (; j < count; ++j) score_rows<1>(keys + j * size, panel, size, out + j * kPanel);
}

// out [kRows, kWidth] = (out if kAdd) + factor * sum over count terms t of e[t * step + r * row_step] * x[t].
template <int64_t kRows, bool kAdd>
LANES_INLINE void sum_rows(const float* e, int64_t step, int64_t row_step, const float* x, int64_t x_stride,
                           int64_t count, float* out, int64_t out_stride, const float* factor) {
  Lanes acc[kRows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
    acc[r][0] = kAdd ? load(out + r * out_stride) : set1(0.0f);
    acc[r][1] = kAdd ? load(out + r * out_stride + kLanes) : set1(0.0f);
  }
  for (int64_t t = 0; t < count; ++t) {
    const Lanes x0 = load(x + t * x_stride), x1 = load(x + t * x_stride + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
      const Lanes one = set1(e[t * step + r * row_step]);
      acc[r][0] = fma(one, x0, acc[r][0]);
      acc[r][1] = fma(one, x1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
    const Lanes by = set1(kAdd ? 1.0f : factor[r]);
    store(out + r * out_stride, kAdd ? acc[r][0] : mul(by, acc[r][0]));
    store(out + r * out_stride + kLanes, kAdd ? acc[r][1] : mul(by, acc[r][1]));
  }
}

// out [rows, size] = factor[i] * sum over keys j of e[j, i] * x[j].
LANES_FN void mix(const float* e, const float* x, int64_t keys, int64_t rows, int64_t size, const float* factor,
                  float* out, int64_t out_stride) {
  for (int64_t d = 0; d < size; d += kWidth) {
    int64_t i = 0;
    for (; i + kSumRows <= rows; i += kSumRows)
      sum_rows<kSumRows, false>(e + i, kPanel, 1, x + d, size, keys, out + i * out_stride + d, out_stride, factor + i);
    for (; i < rows; ++i)
      sum_rows<1, false>(e + i, kPanel, 1, x + d, size, keys, out + i * out_stride + d, out_stride, factor + i);
  }
}

// out [keys, size] += sum over rows i of e[j, i] * x[i].
LANES_FN void scatter(const float* e, const float* x, int64_t keys, int64_t rows, int64_t size, float* out) {
  for (int64_t d = 0; d < size; d += kWidth) {
    int64_t j = 0;
    for (; j + kSumRows <= keys; j += kSumRows)
      sum_rows<kSumRows, true>(e + j * kPanel, 1, kPanel, x + d, size, rows, out + j * size + d, size, nullptr);
    for (; j < keys; ++j)
      sum_rows<1, true>(e + j * kPanel, 1, kPanel, x + d, size, rows, out + j * size + d, size, nullptr);
  }
}

// Queries [start, start + rows) of a segment and the keys [first, last) that any of them sees.
struct Panel {
  int64_t start, rows, first, last;
};

LANES_FN Panel panel_at(const AttentionSegment& segment, int64_t window, int64_t start) {
  const int64_t rows = segment.length - start < kPanel ? segment.length - start : kPanel;
  const int64_t first = segment.prefix_length + start - window + 1;
  return {start, rows, window > 0 && first > 0 ? first : 0, segment.prefix_length + start + rows};
}

// Scores of the panel, [last - first, P]: -inf where a query does not see a key. Every query sees its own.
LANES_FN void masked_scores(const AttentionProblem& p, const AttentionSegment& segment, const Panel& panel,
                            const Scratch& s) {
  const int64_t position = segment.prefix_length + panel.start;  // of the first query
  score(s.keys + panel.first * p.size, s.query_t, panel.last - panel.first, p.size, s.scores);
  for (int64_t j = position + 1; j < panel.last; ++j)
    for (int64_t i = 0; i < j - position; ++i) s.scores[(j - panel.first) * kPanel + i] = -INFINITY;
  if (p.window == 0) return;
  for (int64_t j = panel.first; j <= position + panel.rows - 1 - p.window; ++j) {
    const int64_t from = j - position + p.window;  // the first query that is too far away
    for (int64_t i = from < 0 ? 0 : from; i < panel.rows; ++i) s.scores[(j - panel.first) * kPanel + i] = -INFINITY;
  }
}

// Scores to E in place; the sums and shifts of the lanes.
LANES_FN void exponentiate(float* scores, int64_t keys, float* shift, float* total) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    Lanes most = set1(-INFINITY), sum = set1(0.0f);
    for (int64_t j = 0; j < keys; ++j) most = maximum(load(scores + j * kPanel + c), most);
    for (int64_t j = 0; j < keys; ++j) {
      const Lanes e = exp_of(sub(load(scores + j * kPanel + c), most));
      store(scores + j * kPanel + c, e);
      sum = add(sum, e);
    }
    store(shift + c, most);
    store(total + c, sum);
  }
}

LANES_FN void segment_forward(const AttentionProblem& p, const AttentionForward& f, int64_t index, int64_t head,
                              float* scratch) {
  const AttentionSegment& segment = p.segments[index];
  const int64_t kv_head = head / (p.query_heads / p.kv_heads);
  const Scratch s = carve(scratch, segment.prefix_length + segment.length, p.size, p.value_size, false);
  gather(p.key, kv_head, segment, p.size, s.keys);
  gather(p.value, kv_head, segment, p.value_size, s.values);
  for (int64_t start = 0; start < segment.length; start += kPanel) {
    const Panel panel = panel_at(segment, p.window, start);
    const int64_t token = segment.start + start, keys = panel.last - panel.first;
    transpose_rows(p.query.row(head, token), p.query.row_stride, panel.rows, p.size, p.scale, s.query_t);
    masked_scores(p, segment, panel, s);
    alignas(64) float shift[kPanel], total[kPanel];
    exponentiate(s.scores, keys, shift, total);
    for (int64_t i = 0; i < panel.rows; ++i) {
      f.lse[head * p.length + token + i] = shift[i] + std::log(total[i]);
      total[i] = 1.0f / total[i];
    }
    mix(s.scores, s.values + panel.first * p.value_size, keys, panel.rows, p.value_size, total, f.out.row(head, token),
        f.out.row_stride);
  }
}

// Scores to P, and dP to dS, in place.
LANES_FN void differentiate(float* scores, float* dscores, int64_t keys, const float* lse, const float* delta) {
  for (int64_t c = 0; c < kPanel; c += kLanes) {
    const Lanes shift = load(lse + c), mean = load(delta + c);
    for (int64_t at = c; at < keys * kPanel; at += kPanel) {
      const Lanes probability = exp_of(sub(load(scores + at), shift));
      store(scores + at, probability);
      store(dscores + at, mul(probability, sub(load(dscores + at), mean)));
    }
  }
}

LANES_FN float dot(const float* a, const float* b, int64_t size) {
  Lanes sum = set1(0.0f);
  for (int64_t d = 0; d < size; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  return static_cast<float>(reduce_add(sum));
}

LANES_FN void panel_backward(const AttentionProblem& p, const AttentionBackward& b, const AttentionSegment& segment,
                             const Panel& panel, int64_t head, const Scratch& s) {
  const int64_t token = segment.start + panel.start, keys = panel.last - panel.first;
  transpose_rows(p.query.row(head, token), p.query.row_stride, panel.rows, p.size, p.scale, s.query_t);
  transpose_rows(b.dout.row(head, token), b.dout.row_stride, panel.rows, p.value_size, 1.0f, s.dout_t);
  for (int64_t i = 0; i < panel.rows; ++i)
    for (int64_t d = 0; d < p.size; d += kLanes)
      store(s.query + i * p.size + d, mul(set1(p.scale), load(p.query.row(head, token + i) + d)));
  copy_rows(b.dout.row(head, token), b.dout.row_stride, panel.rows, p.value_size, s.dout);
  alignas(64) float lse[kPanel] = {}, delta[kPanel] = {}, factor[kPanel];
  for (int64_t i = 0; i < panel.rows; ++i) {
    lse[i] = b.lse[head * p.length + token + i];
    delta[i] = dot(b.dout.row(head, token + i), b.out.row(head, token + i), p.value_size);
  }
  for (int64_t i = 0; i < kPanel; ++i) factor[i] = p.scale;
  masked_scores(p, segment, panel, s);
  score(s.values + panel.first * p.value_size, s.dout_t, keys, p.value_size, s.dscores);
  differentiate(s.scores, s.dscores, keys, lse, delta);
  scatter(s.scores, s.dout, keys, panel.rows, p.value_size, s.dvalues + panel.first * p.value_size);
  scatter(s.dscores, s.query, keys, panel.rows, p.size, s.dkeys + panel.first * p.size);
  mix(s.dscores, s.keys + panel.first * p.size, keys, panel.rows, p.size, factor, b.dquery.row(head, token),
      b.dquery.row_stride);
}

// All query heads of one head of keys. Nobody else may add to the rows of the segment or of its prefix meanwhile.
LANES_FN void segment_backward(const AttentionProblem& p, const AttentionBackward& b, int64_t index, int64_t kv_head,
                               float* scratch) {
  const AttentionSegment& segment = p.segments[index];
  const int64_t keys = segment.prefix_length + segment.length, group = p.query_heads / p.kv_heads;
  const Scratch s = carve(scratch, keys, p.size, p.value_size, true);
  gather(p.key, kv_head, segment, p.size, s.keys);
  gather(p.value, kv_head, segment, p.value_size, s.values);
  std::fill(s.dkeys, s.dkeys + keys * p.size, 0.0f);
  std::fill(s.dvalues, s.dvalues + keys * p.value_size, 0.0f);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t start = 0; start < segment.length; start += kPanel)
      panel_backward(p, b, segment, panel_at(segment, p.window, start), head, s);
  const int64_t own = segment.prefix_length;
  add_rows(s.dkeys, own, p.size, b.dkey.row(kv_head, segment.prefix_start), b.dkey.row_stride);
  add_rows(s.dvalues, own, p.value_size, b.dvalue.row(kv_head, segment.prefix_start), b.dvalue.row_stride);
  add_rows(s.dkeys + own * p.size, segment.length, p.size, b.dkey.row(kv_head, segment.start), b.dkey.row_stride);
  add_rows(s.dvalues + own * p.value_size, segment.length, p.value_size, b.dvalue.row(kv_head, segment.start),
           b.dvalue.row_stride);
}

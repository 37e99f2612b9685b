// Packing and the three products of the LM head. Included once for each instruction set, inside its namespace and after
// lanes_math.h, with LANES_FN and LANES_INLINE defined.
//
// Layouts, P = kPanel rows and B = kWidth inner columns at a time:
//   x packed     [panel][K][P]           lanes along rows
//   W packed     [block][kTile][B]       lanes along inner columns; both products with W read it
//   E            [panel][kTile][P]
//   dX           [panel][block][P][B]
//   v X packed   [block][rows][B]

constexpr int64_t kPanel = 3 * kLanes;
constexpr int64_t kWidth = 2 * kLanes;
constexpr int64_t kLogitRows = kLanes == 16 ? 8 : 4;  // rows of W in registers: 3 vectors each
constexpr int64_t kGradRows = kLanes == 16 ? 12 : 6;  // rows of dX or dW in registers: 2 vectors each
constexpr int64_t kInnerBlocks = 512 / kWidth;        // of K at a time, so that a panel of x stays near

static_assert(kTile % kLogitRows == 0 && kTile % kGradRows == 0 && kPanel % kGradRows == 0, "kernels tile exactly");

LANES_INLINE Lanes widened(const void* row, int64_t k, WeightType type) {
  if (type == WeightType::kF32) return load(static_cast<const float*>(row) + k);
  const uint16_t* half = static_cast<const uint16_t*>(row) + k;
  return type == WeightType::kBF16 ? load_bf16(half) : load_f16(half);
}

LANES_FN float widened_one(const void* row, int64_t k, WeightType type) {
  if (type == WeightType::kF32) return static_cast<const float*>(row)[k];
  alignas(64) uint16_t half[kLanes] = {static_cast<const uint16_t*>(row)[k]};
  alignas(64) float wide[kLanes];
  store(wide, type == WeightType::kBF16 ? load_bf16(half) : load_f16(half));
  return wide[0];
}

LANES_INLINE const void* weight_row(const HeadSource& source, int64_t row) {
  const int64_t size = source.type == WeightType::kF32 ? 4 : 2;
  return static_cast<const char*>(source.weight) + row * source.stride * size;
}

// Rows [start, start + count) of W, widened, with zeros up to the tile's and the last block's end.
LANES_FN void pack_weight(const HeadSource& source, int64_t blocks, int64_t start, int64_t count, float* packed) {
  for (int64_t v = 0; v < count; ++v) {
    const void* row = weight_row(source, start + v);
    for (int64_t block = 0; block < blocks; ++block) {
      float* to = packed + (block * kTile + v) * kWidth;
      const int64_t left = source.cols - block * kWidth;
      for (int64_t k = 0; k < kWidth; k += kLanes) {
        if (k + kLanes <= left) {
          store(to + k, widened(row, block * kWidth + k, source.type));
        } else {
          for (int64_t i = k; i < k + kLanes; ++i)
            to[i] = i < left ? widened_one(row, block * kWidth + i, source.type) : 0.0f;
        }
      }
    }
  }
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = (block * kTile + count) * kWidth; i < (block + 1) * kTile * kWidth; ++i) packed[i] = 0.0f;
}

// A panel of x with lanes along rows, zeros beyond the last row and column.
LANES_FN void pack_x(const HeadSource& source, int64_t blocks, int64_t rows, int64_t panel, float* packed) {
  const int64_t first = panel * kPanel, cols = source.cols;
  for (int64_t k = 0; k < blocks * kWidth; ++k)
    for (int64_t i = 0; i < kPanel; ++i)
      packed[k * kPanel + i] = k < cols && first + i < rows ? source.x[(first + i) * cols + k] : 0.0f;
}

// Rows [first, first + kPanel) of factor * x, lanes along inner columns; zeros beyond the last row and column.
LANES_FN void pack_scaled_x(const HeadSource& source, int64_t blocks, int64_t rows, int64_t first, const float* factor,
                            int64_t packed_rows, int64_t at, float* packed) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < kPanel; ++i) {
      float* to = packed + (block * packed_rows + at + i) * kWidth;
      const int64_t left = first + i < rows ? source.cols - block * kWidth : 0;
      const float* from = source.x + (first + i) * source.cols + block * kWidth;
      if (left >= kWidth) {
        for (int64_t k = 0; k < kWidth; k += kLanes) store(to + k, mul(set1(factor[i]), load(from + k)));
      } else {
        for (int64_t k = 0; k < kWidth; ++k) to[k] = k < left ? factor[i] * from[k] : 0.0f;
      }
    }
}

// out [kLogitRows, P] (+)= W rows @ x panel, over `blocks` blocks of K.
template <bool kFirst>
LANES_FN void logits_kernel(const float* w, const float* x, int64_t blocks, float* out) {
  Lanes acc[kLogitRows][3];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kLogitRows; ++r)
#pragma GCC unroll 3
    for (int64_t c = 0; c < 3; ++c) acc[r][c] = kFirst ? set1(0.0f) : load(out + r * kPanel + c * kLanes);
  for (int64_t block = 0; block < blocks; ++block, w += kTile * kWidth, x += kWidth * kPanel)
    for (int64_t k = 0; k < kWidth; ++k) {
      const Lanes x0 = load(x + k * kPanel), x1 = load(x + k * kPanel + kLanes), x2 = load(x + k * kPanel + 2 * kLanes);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kLogitRows; ++r) {
        const Lanes one = set1(w[r * kWidth + k]);
        acc[r][0] = fma(one, x0, acc[r][0]);
        acc[r][1] = fma(one, x1, acc[r][1]);
        acc[r][2] = fma(one, x2, acc[r][2]);
      }
    }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kLogitRows; ++r)
#pragma GCC unroll 3
    for (int64_t c = 0; c < 3; ++c) store(out + r * kPanel + c * kLanes, acc[r][c]);
}

// dx [kGradRows, B] += E rows^T @ W block, over `count` columns of the vocabulary.
LANES_FN void dx_kernel(const float* e, const float* w, int64_t count, float* dx) {
  Lanes acc[kGradRows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kGradRows; ++r) {
    acc[r][0] = load(dx + r * kWidth);
    acc[r][1] = load(dx + r * kWidth + kLanes);
  }
  for (int64_t v = 0; v < count; ++v) {
    const Lanes w0 = load(w + v * kWidth), w1 = load(w + v * kWidth + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kGradRows; ++r) {
      const Lanes one = set1(e[v * kPanel + r]);
      acc[r][0] = fma(one, w0, acc[r][0]);
      acc[r][1] = fma(one, w1, acc[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kGradRows; ++r) {
    store(dx + r * kWidth, acc[r][0]);
    store(dx + r * kWidth + kLanes, acc[r][1]);
  }
}

// out [kGradRows, B] = (out if not first) + E columns @ packed v X, over `panels` panels of rows.
LANES_FN void dw_kernel(const float* e, const float* x, int64_t panels, bool first, float* out, int64_t stride) {
  Lanes acc[kGradRows][2];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kGradRows; ++r) {
    acc[r][0] = first ? set1(0.0f) : load(out + r * stride);
    acc[r][1] = first ? set1(0.0f) : load(out + r * stride + kLanes);
  }
  for (int64_t panel = 0; panel < panels; ++panel, e += kTile * kPanel, x += kPanel * kWidth)
    for (int64_t i = 0; i < kPanel; ++i) {
      const Lanes x0 = load(x + i * kWidth), x1 = load(x + i * kWidth + kLanes);
#pragma GCC unroll 12
      for (int64_t r = 0; r < kGradRows; ++r) {
        const Lanes one = set1(e[r * kPanel + i]);
        acc[r][0] = fma(one, x0, acc[r][0]);
        acc[r][1] = fma(one, x1, acc[r][1]);
      }
    }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kGradRows; ++r) {
    store(out + r * stride, acc[r][0]);
    store(out + r * stride + kLanes, acc[r][1]);
  }
}

// The two tasks of the LM head that threads take one by one. Included once for each instruction set, after head_panel.h.

LANES_FN void tile_logits(const float* w, const float* x, int64_t blocks, int64_t count, float* e) {
  for (int64_t block = 0; block < blocks; block += kInnerBlocks) {
    const int64_t some = blocks - block < kInnerBlocks ? blocks - block : kInnerBlocks;
    const float* w_part = w + block * kTile * kWidth;
    const float* x_part = x + block * kWidth * kPanel;
    for (int64_t v = 0; v < count; v += kLogitRows) {
      if (block == 0) logits_kernel<true>(w_part + v * kWidth, x_part, some, e + v * kPanel);
      else logits_kernel<false>(w_part + v * kWidth, x_part, some, e + v * kPanel);
    }
  }
}

LANES_FN void pack_tile(const HeadProblem& problem, const HeadShape& shape, int64_t start, int64_t count, float* w) {
  for (int64_t s = 0; s < problem.num_sources; ++s) {
    pack_weight(problem.source[s], shape.blocks[s], start, count, w);
    w += shape.blocks[s] * kTile * kWidth;
  }
}

LANES_FN void pack_panel(const HeadProblem& problem, const HeadShape& shape, int64_t panel, float* x) {
  for (int64_t s = 0; s < problem.num_sources; ++s) {
    pack_x(problem.source[s], shape.blocks[s], problem.rows, panel, x);
    x += shape.blocks[s] * kWidth * kPanel;
  }
}

LANES_FN void rescale_dx(const float* factor, int64_t blocks, float* dx) {
  for (int64_t i = 0; i < kPanel; ++i) {
    if (factor[i] == 1.0f) continue;
    for (int64_t block = 0; block < blocks; ++block) {
      float* row = dx + (block * kPanel + i) * kWidth;
      for (int64_t k = 0; k < kWidth; k += kLanes) store(row + k, mul(load(row + k), set1(factor[i])));
    }
  }
}

// Columns [task.first_tile, task.last_tile) of the vocabulary for panels [task.first_panel, task.last_panel).
template <bool kCap, bool kStats, bool kWrite>
LANES_FN void forward_task(const HeadProblem& problem, const HeadShape& shape, const ForwardTask& task) {
  alignas(64) float factor[kPanel];
  float* own_e = task.thread_scratch + shape.all_blocks * kTile * kWidth;
  for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile) {
    const int64_t start = tile * kTile, count = problem.vocab - start < kTile ? problem.vocab - start : kTile;
    pack_tile(problem, shape, start, count, task.thread_scratch);
    for (int64_t panel = task.first_panel; panel < task.last_panel; ++panel) {
      const int64_t at = tile * shape.panels + panel;
      float* e = task.stored ? task.stored + at * kTile * kPanel : own_e;
      PanelState& state = task.states[panel];
      tile_logits(task.thread_scratch, task.x + panel * shape.all_blocks * kWidth * kPanel, shape.all_blocks, count, e);
      const bool moved = panel_forward<kCap, kStats, kWrite>(problem, panel * kPanel, start, count, e, state,
                                                             task.at_target, factor);
      if (task.stored_shift)
        for (int64_t i = 0; i < kPanel; ++i) task.stored_shift[at * kPanel + i] = state.shift[i];
      if (!task.dx) continue;
      float* dx = task.dx + (panel - task.wave_panel) * shape.all_blocks * kPanel * kWidth;
      if (tile == task.first_tile) {
        for (int64_t i = 0; i < shape.all_blocks * kPanel * kWidth; ++i) dx[i] = 0.0f;
      } else if (moved) {
        rescale_dx(factor, shape.all_blocks, dx);
      }
      for (int64_t block = task.first_dx_block; block < task.last_dx_block; ++block)
        for (int64_t i = 0; i < kPanel; i += kGradRows)
          dx_kernel(e + i, task.thread_scratch + block * kTile * kWidth, count, dx + (block * kPanel + i) * kWidth);
    }
  }
}

// What the target's logit is worth against the row's final shift, and any other logit in the order of the maximum.
template <bool kCap>
LANES_FN Target target_of(float a, float shift, float softcap, float scale) {
  const Squash squash = squash_of(softcap, scale);
  const Columns c = columns_of<kCap>(set1(a), set1(shift), squash);
  return {one(c.z), one(c.below), kCap ? one(c.slope) : 1.0f, one(ordered<kCap>(set1(a), squash)), one(exp_of(c.below))};
}

LANES_FN void add_row(const float* x, int64_t cols, float factor, float* to) {
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) store(to + k, fma(set1(factor), load(x + k), load(to + k)));
  for (; k < cols; ++k) to[k] += factor * x[k];
}

// dW of a tile's rows for one source: full register blocks straight into place, ragged ones through a small buffer.
LANES_FN void source_grad(const HeadSource& source, int64_t blocks, const float* e, const float* x, int64_t panels,
                          int64_t start, int64_t count, bool first) {
  alignas(64) float part[kGradRows * kWidth];
  for (int64_t block = 0; block < blocks; ++block) {
    const float* x_block = x + block * panels * kPanel * kWidth;
    const int64_t left = source.cols - block * kWidth;
    for (int64_t v = 0; v < count; v += kGradRows) {
      float* to = source.grad + (start + v) * source.cols + block * kWidth;
      const int64_t rows = count - v < kGradRows ? count - v : kGradRows, cols = left < kWidth ? left : kWidth;
      if (rows == kGradRows && cols == kWidth) {
        dw_kernel(e + v * kPanel, x_block, panels, first, to, source.cols);
        continue;
      }
      dw_kernel(e + v * kPanel, x_block, panels, true, part, kWidth);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < cols; ++k)
          to[r * source.cols + k] = part[r * kWidth + k] + (first ? 0.0f : to[r * source.cols + k]);
    }
  }
}

LANES_FN void tile_bias_grad(const float* e, const float* factor, int64_t panels, int64_t count, bool first,
                             float* grad) {
  for (int64_t v = 0; v < count; ++v) {
    Lanes sum = set1(0.0f);
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t c = 0; c < kPanel; c += kLanes)
        sum = fma(load(e + (panel * kTile + v) * kPanel + c), load(factor + panel * kPanel + c), sum);
    grad[v] = static_cast<float>(reduce_add(sum)) + (first ? 0.0f : grad[v]);
  }
}

// v * exp(stored shift - final shift) for the rows of a panel; 0 beyond the last row.
LANES_FN void panel_factors(const HeadProblem& problem, const HeadBackward& back, const float* stored_shift,
                            int64_t first, float* factor) {
  const float scale = problem.softcap != 0.0f ? 1.0f : problem.scale;
  alignas(64) float distance[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    const bool exists = first + i < problem.rows;
    factor[i] = exists ? back.v[first + i] : 0.0f;
    distance[i] = exists && stored_shift ? (stored_shift[i] - back.shift[first + i]) * scale : 0.0f;
  }
  for (int64_t c = 0; c < kPanel; c += kLanes)
    store(factor + c, mul(load(factor + c), exp_of(load(distance + c))));
}

// Gradients of columns [tile * kTile, ...) of the vocabulary from panels [first_panel, last_panel).
template <bool kCap>
LANES_FN void backward_task(const HeadProblem& problem, const HeadShape& shape, const HeadBackward& back,
                            const BackwardTask& task) {
  const int64_t start = task.tile * kTile, count = problem.vocab - start < kTile ? problem.vocab - start : kTile;
  const int64_t panels = task.last_panel - task.first_panel, rows = panels * kPanel;
  const bool first = !back.accumulate && task.first_panel == 0;
  const float* e = back.stored ? back.stored + (task.tile * shape.panels + task.first_panel) * kTile * kPanel : task.e;
  const float* shifts = back.stored ? back.stored + shape.tiles * shape.panels * kTile * kPanel : nullptr;
  if (!back.stored) pack_tile(problem, shape, start, count, task.w);
  alignas(64) float factor[kPanel];
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t whole = task.first_panel + panel, row = whole * kPanel;
    if (!back.stored) {
      float* again = task.e + panel * kTile * kPanel;
      tile_logits(task.w, task.x + whole * shape.all_blocks * kWidth * kPanel, shape.all_blocks, count, again);
      panel_again<kCap>(problem, back.shift, row, start, count, again);
    }
    const float* stored_shift = shifts ? shifts + (task.tile * shape.panels + whole) * kPanel : nullptr;
    panel_factors(problem, back, stored_shift, row, factor);
    float* known = task.factor + panel * kPanel;
    if (std::memcmp(known, factor, sizeof factor) == 0 && *task.packed) continue;
    std::memcpy(known, factor, sizeof factor);
    float* x = task.scaled_x;
    for (int64_t s = 0; s < problem.num_sources; ++s) {
      if (problem.source[s].grad)
        pack_scaled_x(problem.source[s], shape.blocks[s], problem.rows, row, factor, rows, panel * kPanel, x);
      x += shape.blocks[s] * rows * kWidth;
    }
  }
  *task.packed = true;
  const float* x = task.scaled_x;
  for (int64_t s = 0; s < problem.num_sources; ++s) {
    if (problem.source[s].grad) source_grad(problem.source[s], shape.blocks[s], e, x, panels, start, count, first);
    x += shape.blocks[s] * rows * kWidth;
  }
  if (back.bias_grad) tile_bias_grad(e, task.factor, panels, count, first, back.bias_grad + start);
  // The targets, in the order of the rows.
  for (int64_t i = task.first_panel * kPanel; i < task.last_panel * kPanel && i < problem.rows; ++i) {
    const int64_t y = problem.target[i];
    if (y < start || y >= start + count) continue;
    const float own = -back.v[i] * back.rest[i] * back.slope[i];
    for (int64_t s = 0; s < problem.num_sources; ++s) {
      const HeadSource& source = problem.source[s];
      if (source.grad) add_row(source.x + i * source.cols, source.cols, own, source.grad + y * source.cols);
    }
    if (back.bias_grad) back.bias_grad[y] += own;
  }
}

// Adds factor * W[y] to a row of dX.
LANES_FN void add_weight_row(const HeadSource& source, int64_t y, float factor, float* to) {
  const void* row = weight_row(source, y);
  int64_t k = 0;
  for (; k + kLanes <= source.cols; k += kLanes)
    store(to + k, fma(set1(factor), widened(row, k, source.type), load(to + k)));
  for (; k < source.cols; ++k) to[k] += factor * widened_one(row, k, source.type);
}

static HeadKernels kernels_of(bool cap, bool statistics, bool write) {
  static const ForwardFn forward[2][2][2] = {
      {{forward_task<false, false, false>, forward_task<false, false, true>},
       {forward_task<false, true, false>, forward_task<false, true, true>}},
      {{forward_task<true, false, false>, forward_task<true, false, true>},
       {forward_task<true, true, false>, forward_task<true, true, true>}}};
  return {forward[cap][statistics][write], cap ? backward_task<true> : backward_task<false>, pack_panel,
          cap ? target_of<true> : target_of<false>, add_weight_row};
}

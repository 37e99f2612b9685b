// The LM head over threads: tasks, the merge of slabs, and the choice of lanes.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

// GCC's own intrinsics leave a register "undefined" on purpose and are then warned about (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "head_kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define DPO_FAST_X86 1
#include "lanes_avx2.h"
#include "lanes_avx512.h"

namespace dpo_fast {

namespace lanes_avx2 {
#define LANES_FN AVX2_TARGET static
#define LANES_INLINE AVX2_INLINE
#include "lanes_math.h"

#include "logit_columns.h"

#include "head_gemm.h"

#include "head_panel.h"

#include "head_tasks.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx2

namespace lanes_avx512 {
#define LANES_FN AVX512_TARGET static
#define LANES_INLINE AVX512_INLINE
#include "lanes_math.h"

#include "logit_columns.h"

#include "head_gemm.h"

#include "head_panel.h"

#include "head_tasks.h"
#undef LANES_FN
#undef LANES_INLINE
}  // namespace lanes_avx512

}  // namespace dpo_fast
#endif

namespace dpo_fast {
namespace {

constexpr int64_t kGroupPanels = 12;                 // panels that share a packed tile of the weight
constexpr int64_t kWaveFloats = 16 * 1024 * 1024;    // of the slabs' dX at a time
constexpr int64_t kTasksPerThread = 3;               // so that a core slowed down by other work can take fewer

HeadKernels kernels_for(LaneSet lanes, const HeadProblem& problem, bool statistics, bool write) {
  const bool cap = problem.softcap != 0.0f;
#ifdef DPO_FAST_X86
  if (lanes == LaneSet::kAvx512) return lanes_avx512::kernels_of(cap, statistics, write);
  if (lanes == LaneSet::kAvx2) return lanes_avx2::kernels_of(cap, statistics, write);
#endif
  (void)lanes, (void)cap, (void)statistics, (void)write;
  return {};
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// A function of the sizes of the head alone, so that results are, too. Each slab has a dX of its own: fewer where it is
// wide.
int64_t slabs_of(const HeadShape& shape) {
  return std::min(shape.all_blocks * shape.width <= 1024 ? kMaxSlabs : kMaxSlabs / 2, shape.tiles);
}
int64_t panel_floats(const HeadShape& shape) { return shape.all_blocks * shape.width * shape.panel; }
int64_t tile_floats(const HeadShape& shape) { return shape.all_blocks * shape.width * kTile; }
int64_t e_floats(const HeadShape& shape) { return kTile * shape.panel; }

// Hands out pieces of scratch, each on a cache line of its own; from address 0 on it only counts.
struct Carver {
  uintptr_t at;
  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

bool wants_dx(const HeadProblem& problem) {
  for (int64_t s = 0; s < problem.num_sources; ++s)
    if (problem.source[s].dx) return true;
  return false;
}

int64_t wave_panels(const HeadProblem& problem, const HeadShape& shape) {
  if (!wants_dx(problem)) return std::max<int64_t>(1, shape.panels);
  return std::max<int64_t>(1, std::min(shape.panels, kWaveFloats / (slabs_of(shape) * panel_floats(shape))));
}

struct ForwardScratch {
  float *x, *at_target, *dx, *threads;
  PanelState* states;
  int64_t thread_floats;
  uintptr_t end;
};

ForwardScratch carve_forward(const HeadProblem& problem, const HeadShape& shape, int num_threads, void* scratch) {
  Carver carver{reinterpret_cast<uintptr_t>(scratch)};
  ForwardScratch found{};
  found.x = carver.take<float>(shape.panels * panel_floats(shape));
  found.at_target = carver.take<float>(problem.rows);
  found.states = carver.take<PanelState>(slabs_of(shape) * shape.panels);
  const int64_t dx = wants_dx(problem) ? slabs_of(shape) * wave_panels(problem, shape) * panel_floats(shape) : 0;
  found.dx = carver.take<float>(dx);
  found.thread_floats = (tile_floats(shape) + e_floats(shape) + 15) / 16 * 16;
  found.threads = carver.take<float>(num_threads * found.thread_floats);
  found.end = carver.at;
  return found;
}

struct BackwardScratch {
  float *x, *threads;
  int64_t group, thread_floats, scaled, factor, w;
  uintptr_t end;
};

BackwardScratch carve_backward(const HeadShape& shape, int num_threads, void* scratch) {
  Carver carver{reinterpret_cast<uintptr_t>(scratch)};
  BackwardScratch found{};
  found.group = std::max<int64_t>(1, std::min(kGroupPanels, shape.panels));
  found.x = carver.take<float>(shape.panels * panel_floats(shape));
  found.scaled = found.group * panel_floats(shape);
  found.factor = (found.group * shape.panel + 15) / 16 * 16;
  found.w = tile_floats(shape);
  found.thread_floats = (found.scaled + found.factor + found.w + found.group * e_floats(shape) + 15) / 16 * 16;
  found.threads = carver.take<float>(num_threads * found.thread_floats);
  found.end = carver.at;
  return found;
}

int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// One row from its slabs: sums against the common maximum, log-prob, statistics, dX.
class Merge {
 public:
  Merge(const HeadProblem& problem, const HeadShape& shape, const ForwardScratch& scratch, const HeadKernels& kernels,
        bool statistics, float* out)
      : problem_(problem), shape_(shape), scratch_(scratch), kernels_(kernels), statistics_(statistics), out_(out) {}

  void row(int64_t row, int64_t wave_panel) const {
    const int64_t panel = row / shape_.panel, lane = row % shape_.panel, slabs = slabs_of(shape_);
    float shift = -INFINITY;
    for (int64_t s = 0; s < slabs; ++s) shift = std::max(shift, state(s, panel).shift[lane]);
    const double unit = problem_.softcap != 0.0f ? 1.0 : problem_.scale;
    double factor[kMaxSlabs], rest = 0;
    for (int64_t s = 0; s < slabs; ++s) {
      const float own = state(s, panel).shift[lane];
      factor[s] = own == shift ? 1.0 : std::exp(unit * (static_cast<double>(own) - shift));
      rest += factor[s] * state(s, panel).rest[lane];
    }
    const Target target = kernels_.target(scratch_.at_target[row], shift, problem_.softcap, problem_.scale);
    const double total = rest + target.e;
    const double log_total = target.below == 0.0f ? std::log1p(rest) : std::log(total);
    set(kLogp, row, target.below == 0.0f ? -log_total : target.below - log_total);
    set(kShift, row, shift);
    set(kRest, row, rest);
    set(kTotal, row, total);
    set(kTargetSlope, row, target.slope);
    if (statistics_) add_statistics(row, panel, lane, factor, shift, target, total, log_total);
    add_dx(row, panel, lane, wave_panel, factor, -static_cast<float>(rest) * target.slope);
  }

 private:
  const PanelState& state(int64_t slab, int64_t panel) const { return scratch_.states[slab * shape_.panels + panel]; }
  void set(int64_t column, int64_t row, double value) const {
    out_[column * problem_.rows + row] = static_cast<float>(value);
  }
  float order(float a) const { return kernels_.target(a, 0.0f, problem_.softcap, problem_.scale).order; }

  void add_statistics(int64_t row, int64_t panel, int64_t lane, const double* factor, float shift, const Target& target,
                      double total, double log_total) const {
    const double unit = problem_.softcap != 0.0f ? 1.0 : problem_.scale;
    double weighted = target.e * std::max(static_cast<double>(target.below), -104.0);
    double squares = static_cast<double>(target.e) * target.e, z = 0;  // z has the target already
    float before = -INFINITY, after = -INFINITY;
    for (int64_t s = 0; s < slabs_of(shape_); ++s) {
      const PanelState& part = state(s, panel);
      const double moved = part.rest[lane] > 0.0 ? unit * (static_cast<double>(part.shift[lane]) - shift) : 0.0;
      weighted += factor[s] * (part.weighted[lane] + part.rest[lane] * moved);
      squares += factor[s] * factor[s] * part.squares[lane];
      z += part.z[lane];
      before = std::max(before, part.before[lane]);
      after = std::max(after, part.after[lane]);
    }
    set(kEntropy, row, log_total - weighted / total);
    set(kMeanLogit, row, z / static_cast<double>(problem_.vocab));
    const int64_t y = problem_.target[row];
    const bool above = y == 0 || target.order > order(before);
    set(kIsTop1, row, above && (y == problem_.vocab - 1 || target.order >= order(after)));
    set(kLogSumSquares, row, std::log(squares) - 2.0 * log_total);
  }

  void add_dx(int64_t row, int64_t panel, int64_t lane, int64_t wave_panel, const double* factor, float own) const {
    int64_t first = 0;
    for (int64_t n = 0; n < problem_.num_sources; first += shape_.blocks[n++]) {
      const HeadSource& source = problem_.source[n];
      if (!source.dx) continue;
      float* to = source.dx + row * source.cols;
      for (int64_t k = 0; k < source.cols; ++k) to[k] = 0.0f;
      for (int64_t s = 0; s < slabs_of(shape_); ++s) {
        const int64_t at = s * wave_panels(problem_, shape_) + panel - wave_panel;
        const float* from = scratch_.dx + at * panel_floats(shape_) + (first * shape_.panel + lane) * shape_.width;
        const float f = static_cast<float>(factor[s]);
        for (int64_t k = 0; k < source.cols; k += shape_.width, from += shape_.panel * shape_.width) {
          const int64_t some = std::min(shape_.width, source.cols - k);
          for (int64_t i = 0; i < some; ++i) to[k + i] += f * from[i];
        }
      }
      kernels_.add_weight_row(source, problem_.target[row], own, to);
    }
  }

  const HeadProblem& problem_;
  const HeadShape& shape_;
  const ForwardScratch& scratch_;
  const HeadKernels& kernels_;
  const bool statistics_;
  float* out_;
};

void clear(PanelState& state) {
  for (int64_t i = 0; i < kMaxPanel; ++i) {
    state.shift[i] = state.before[i] = state.after[i] = -INFINITY;
    state.rest[i] = state.weighted[i] = state.squares[i] = state.z[i] = 0.0;
  }
}

}  // namespace

bool head_available(LaneSet lanes) { return lanes != LaneSet::kScalar && lane_set_available(lanes); }

HeadShape head_shape(const HeadProblem& problem, LaneSet lanes) {
  const int64_t lane_count = lanes == LaneSet::kAvx512 ? 16 : 8;
  HeadShape shape{};
  shape.panel = 3 * lane_count;
  shape.width = 2 * lane_count;
  shape.panels = divided_up(problem.rows, shape.panel);
  shape.tiles = divided_up(problem.vocab, kTile);
  for (int64_t s = 0; s < problem.num_sources; ++s) {
    shape.blocks[s] = divided_up(problem.source[s].cols, shape.width);
    shape.all_blocks += shape.blocks[s];
  }
  return shape;
}

int64_t head_stored_floats(const HeadShape& shape) {
  return shape.tiles * shape.panels * (kTile * shape.panel + shape.panel);
}

int64_t head_forward_scratch(const HeadProblem& problem, LaneSet lanes, int num_threads) {
  return static_cast<int64_t>(carve_forward(problem, head_shape(problem, lanes), num_threads, nullptr).end);
}

int64_t head_backward_scratch(const HeadProblem& problem, LaneSet lanes, int num_threads) {
  return static_cast<int64_t>(carve_backward(head_shape(problem, lanes), num_threads, nullptr).end);
}

void head_forward(const HeadProblem& problem, float* out, float* stored, bool statistics, void* scratch, LaneSet lanes,
                  int num_threads) {
  const HeadShape shape = head_shape(problem, lanes);
  const ForwardScratch found = carve_forward(problem, shape, num_threads, scratch);
  const bool dx = wants_dx(problem);
  const HeadKernels kernels = kernels_for(lanes, problem, statistics, dx || stored);
  const int64_t slabs = slabs_of(shape), wave = wave_panels(problem, shape);
  const int64_t first_dx = problem.source[0].dx ? 0 : shape.blocks[0];
  const int64_t last_dx = problem.num_sources > 1 && !problem.source[1].dx ? shape.blocks[0] : shape.all_blocks;
  const Merge merge(problem, shape, found, kernels, statistics, out);
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < shape.panels; ++panel) {
      kernels.pack_panel(problem, shape, panel, found.x + panel * panel_floats(shape));
      for (int64_t s = 0; s < slabs; ++s) clear(found.states[s * shape.panels + panel]);
    }
    for (int64_t start = 0; start < shape.panels; start += wave) {
      const int64_t stop = std::min(start + wave, shape.panels);
      // More groups than needed for a good use of the packed weight only where threads would idle.
      const int64_t wanted = divided_up(kTasksPerThread * num_threads, slabs);
      const int64_t groups = std::max(divided_up(stop - start, kGroupPanels), std::min(wanted, stop - start));
#pragma omp for schedule(dynamic, 1)
      for (int64_t index = 0; index < groups * slabs; ++index) {
        const int64_t group = index / slabs, slab = index % slabs;
        ForwardTask task{};
        task.first_panel = start + (stop - start) * group / groups;
        task.last_panel = start + (stop - start) * (group + 1) / groups;
        task.first_tile = shape.tiles * slab / slabs;
        task.last_tile = shape.tiles * (slab + 1) / slabs;
        task.x = found.x;
        task.states = found.states + slab * shape.panels;
        task.at_target = found.at_target;
        task.stored = stored;
        task.stored_shift = stored ? stored + shape.tiles * shape.panels * e_floats(shape) : nullptr;
        task.dx = dx ? found.dx + slab * wave * panel_floats(shape) : nullptr;
        task.wave_panel = start;
        task.first_dx_block = first_dx;
        task.last_dx_block = last_dx;
        task.thread_scratch = found.threads + thread_index() * found.thread_floats;
        kernels.forward(problem, shape, task);
      }
#pragma omp for schedule(static)
      for (int64_t row = start * shape.panel; row < std::min(stop * shape.panel, problem.rows); ++row)
        merge.row(row, start);
    }
  }
}

void head_backward(const HeadProblem& problem, const HeadBackward& back, void* scratch, LaneSet lanes,
                   int num_threads) {
  const HeadShape shape = head_shape(problem, lanes);
  const BackwardScratch found = carve_backward(shape, num_threads, scratch);
  const HeadKernels kernels = kernels_for(lanes, problem, false, true);
#pragma omp parallel num_threads(num_threads)
  {
    if (!back.stored) {
#pragma omp for schedule(static)
      for (int64_t panel = 0; panel < shape.panels; ++panel)
        kernels.pack_panel(problem, shape, panel, found.x + panel * panel_floats(shape));
    }
    float* own = found.threads + thread_index() * found.thread_floats;
    for (int64_t start = 0; start < shape.panels; start += found.group) {
      bool packed = false;
#pragma omp for schedule(dynamic, 1)
      for (int64_t tile = 0; tile < shape.tiles; ++tile) {
        BackwardTask task{};
        task.first_panel = start;
        task.last_panel = std::min(start + found.group, shape.panels);
        task.tile = tile;
        task.x = found.x;
        task.scaled_x = own;
        task.factor = own + found.scaled;
        task.w = own + found.scaled + found.factor;
        task.e = task.w + found.w;
        task.packed = &packed;
        kernels.backward(problem, shape, back, task);
      }
    }
  }
}

}  // namespace dpo_fast

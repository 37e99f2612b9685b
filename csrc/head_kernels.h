// What the tasks of every instruction set share: plain structs, and the table of functions that the driver calls.
#pragma once

#include "head.h"

namespace dpo_fast {

constexpr int64_t kMaxPanel = 48;

// Running sums of one slab of the vocabulary for one panel of rows, against `shift`; targets left out.
struct alignas(64) PanelState {
  float shift[kMaxPanel];                      // running maximum
  float before[kMaxPanel], after[kMaxPanel];   // largest logit before and after the target, for is_top1
  double rest[kMaxPanel];                      // sum of E
  double weighted[kMaxPanel], squares[kMaxPanel], z[kMaxPanel];  // of E (z - shift), E^2, z: with statistics only
};

struct ForwardTask {
  int64_t first_panel, last_panel, first_tile, last_tile;
  const float* x;         // packed panels
  PanelState* states;     // of the slab, one a panel
  float* at_target;       // [rows]: the targets' logits
  float* stored;          // E of all (tile, panel), or null
  float* stored_shift;    // their shifts
  float* dx;              // of the slab, from panel wave_panel on, or null
  int64_t wave_panel;
  int64_t first_dx_block, last_dx_block;
  float* thread_scratch;  // packed weight, then one E
};

struct BackwardTask {
  int64_t first_panel, last_panel, tile;
  const float* x;   // packed panels; read only where probabilities are computed again
  float* w;         // packed weight, likewise
  float* e;         // one tile of all panels, likewise
  float* scaled_x;  // packed v x of all panels, with the factors below
  float* factor;    // [panels * panel]
  bool* packed;     // scaled_x holds something
};

struct Target {
  float z, below, slope, order, e;
};

using ForwardFn = void (*)(const HeadProblem&, const HeadShape&, const ForwardTask&);
using BackwardFn = void (*)(const HeadProblem&, const HeadShape&, const HeadBackward&, const BackwardTask&);
using PackFn = void (*)(const HeadProblem&, const HeadShape&, int64_t, float*);
using TargetFn = Target (*)(float, float, float, float);
using AddRowFn = void (*)(const HeadSource&, int64_t, float, float*);

struct HeadKernels {
  ForwardFn forward;
  BackwardFn backward;
  PackFn pack_panel;
  TargetFn target;
  AddRowFn add_weight_row;
};

}  // namespace dpo_fast

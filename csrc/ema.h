// Table and entry points of the exponential moving average of a model's weights (TR-DPO, arXiv 2404.09656).
#pragma once

#include <cstdint>

#include "philox.h"

namespace dpo_fast {

enum Dtype : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
constexpr int kNumDtypes = 3;

// One row a tensor: the layout of the int64 [rows, 8] tensor that Python builds once and reuses.
struct EmaRow {
  int64_t ref, policy, shadow;      // addresses; shadow 0 = none
  int64_t numel;
  int64_t position;                 // global position of element 0, for the random bits
  int64_t first_chunk;              // index of the tensor's first chunk in the map chunk -> row
  int64_t ref_dtype, policy_dtype;  // Dtype
};
static_assert(sizeof(EmaRow) == 64, "EmaRow is an int64 [8] row of the Python table");

// value = copy ? policy : base - weight * (base - other), where base is the policy if from_policy, else the reference,
// and other is the other one: torch.lerp's two forms, and the hard update. weight = alpha below 0.5 and 1 - alpha from
// there on, rounded to fp32 once, by the caller. The difference is taken from the base so that equal weights give
// base - (+0) = base, the sign of a zero included.
struct EmaBlend {
  float weight;
  int32_t from_policy, copy, stochastic;
  PhiloxKey key;
};

// The chunks of all tensors: chunk c is elements [(c - first_chunk) * chunk_size, ...) of row chunk_rows[c].
struct EmaTable {
  const EmaRow* rows;
  const int32_t* chunk_rows;
  int64_t num_rows, num_chunks, chunk_size;
};

enum class Isa { kScalar, kAvx2, kAvx512 };
bool ema_isa_available(Isa isa);
void ema_cpu(const EmaTable& table, const EmaBlend& blend, Isa isa, int num_threads);

#ifdef DPO_FAST_WITH_CUDA
// nullptr if the device can run the kernel, else the reason (static storage).
const char* ema_cuda_refusal(int device);
// Launches once on the caller's stream; nullptr, or the CUDA error's name.
const char* ema_cuda(const EmaTable& table, const EmaBlend& blend, int device, void* stream);
#endif

}  // namespace dpo_fast

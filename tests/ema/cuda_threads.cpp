// Runs the CUDA kernel's code on the host, thread by thread: what a block does, without a GPU. Packs are checked for
// the alignment that a 16-byte access needs by -fsanitize=alignment.
#include "ema_chunk.h"

using namespace dpo_fast;

extern "C" void run(const EmaRow* rows, const int32_t* chunk_rows, int64_t num_chunks, int64_t chunk_size, float weight,
                    int from_policy, int copy, int stochastic, uint64_t seed, uint64_t step, int num_threads) {
  const EmaBlend blend{weight, from_policy, copy, stochastic,
                       {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
                        static_cast<uint32_t>(step >> 32)}};
  for (int64_t block = 0; block < num_chunks; ++block) {
    const EmaRow& row = rows[chunk_rows[block]];
    const int64_t start = (block - row.first_chunk) * chunk_size, left = row.numel - start;
    const int64_t count = left < chunk_size ? left : chunk_size;
    for (int thread = num_threads - 1; thread >= 0; --thread) {
      if (stochastic) ema_dispatch<true>(row, start, count, blend, thread, num_threads);
      else ema_dispatch<false>(row, start, count, blend, thread, num_threads);
    }
  }
}

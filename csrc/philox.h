// Philox4x32-7: the counter-based generator behind stochastic rounding, for host and device.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Bits of an element at global position i (one definition for every backend; dpo_fast.functional.ema repeats it):
//   words = philox4x32_7(counter = (lo32(i >> 3), hi32(i >> 3), lo32(step), hi32(step)), key = (lo32(seed), hi32(seed)))
//   k = i & 7;  random16 = (words[k >> 1] >> (16 * (k & 1))) & 0xFFFF
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DPO_FAST_HD __host__ __device__ __forceinline__
#else
#define DPO_FAST_HD inline
#endif

namespace dpo_fast {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments
constexpr int kPhiloxRounds = 7;  // enough to pass BigCrush (Salmon et al.); 16 bits of rounding noise need no more

struct PhiloxKey {
  uint32_t seed_lo, seed_hi, step_lo, step_hi;
};

// The four words of one counter; together they serve the eight elements 8 * group .. 8 * group + 7.
DPO_FAST_HD void philox_words(uint64_t group, const PhiloxKey& key, uint32_t words[4]) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = key.step_lo, c3 = key.step_hi;
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace dpo_fast

// Philox4x32-7: the counter-based generator behind stochastic rounding, for host and device.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Bits of an element at global position i (one definition for every backend; dpo_fast.functional.ema repeats it):
//   words = philox4x32_7(counter = (lo32(i >> 5), hi32(i >> 5), lo32(step), hi32(step)), key = (lo32(seed), hi32(seed)))
//   half(k) = (words[k >> 1] >> (16 * (k & 1))) & 0xFFFF,   k = i & 7,   s = (i >> 3) & 3
//   random16 = s == 0 ? half(k) : half(k) ^ half((k + s) & 7)
// One counter serves 32 elements, in four octets. No two of its 32 values are the sum of the same halves, so each is
// uniform and any two are independent: every mean and every variance of a sum is that of independent bits, at a
// quarter of the multiplications.
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

constexpr uint64_t kPerCounter = 32;  // elements

struct PhiloxKey {
  uint32_t seed_lo, seed_hi, step_lo, step_hi;
};

// The four words of one counter.
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

// The random bits of the elements 8 * octet .. 8 * octet + 7, two to a word, lowest first.
DPO_FAST_HD void octet_words(uint64_t octet, const PhiloxKey& key, uint32_t words[4]) {
  uint32_t w[4];
  philox_words(octet >> 2, key, w);
  const uint32_t s = static_cast<uint32_t>(octet & 3), odd = 16 * (s & 1), mask = s == 0 ? 0u : 0xFFFFFFFFu;
  const bool by_word = s >= 2;  // the halves move on by s: by s >> 1 words and s & 1 halves
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = by_word ? w[(j + 1) & 3] : w[j], high = by_word ? w[(j + 2) & 3] : w[(j + 1) & 3];
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    words[j] = w[j] ^ (static_cast<uint32_t>(both >> odd) & mask);
  }
}

}  // namespace dpo_fast

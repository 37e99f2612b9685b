// One chunk of one tensor, shared out among the threads of a block: 16-byte accesses in the aligned middle, single
// elements at both ends, single elements throughout where reference, policy and shadow are not aligned alike.
//
// Plain C++ but for the annotations: a test compiles it for the host and runs every thread in a loop.
#pragma once

#include <cmath>

#include "ema_math.h"

#if defined(__CUDACC__)
#define EMA_UNROLL _Pragma("unroll")
#define EMA_NO_UNROLL _Pragma("unroll 1")
#else
#define EMA_UNROLL
#define EMA_NO_UNROLL
#endif

namespace dpo_fast {

// An address from the table. Told that it is global memory, the compiler need not emit generic accesses.
DPO_FAST_HD char* address(int64_t value) {
  char* data = reinterpret_cast<char*>(value);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(data));
#endif
  return data;
}

// Sixteen or eight bytes, moved by one instruction.
template <int kBytes>
struct alignas(kBytes) Pack {
  uint32_t words[kBytes / 4];
};

template <int64_t D>
constexpr int kItemSize = D == kF32 ? 4 : 2;

template <int64_t D, int kWidth>
using PackOf = Pack<kWidth * kItemSize<D>>;

template <int64_t D, int kWidth>
DPO_FAST_HD uint32_t get(const PackOf<D, kWidth>& pack, int k) {
  if (D == kF32) return pack.words[k];
  return (pack.words[k >> 1] >> (16 * (k & 1))) & 0xFFFFu;
}

// In ascending order of k, into a pack of its own: a pair's first element writes the whole word.
template <int64_t D, int kWidth>
DPO_FAST_HD void set(PackOf<D, kWidth>& pack, int k, uint32_t raw) {
  if (D == kF32) {
    pack.words[k] = raw;
  } else {
    pack.words[k >> 1] = k & 1 ? pack.words[k >> 1] | (raw << 16) : raw;
  }
}

// The addresses of one chunk's elements. Item accesses go through the storage's own width.
template <int64_t R, int64_t P>
struct ChunkView {
  char* ref;
  const char* policy;
  char* shadow;

  template <int64_t D>
  static DPO_FAST_HD uint32_t load_item(const char* data, int64_t i) {
    if (D == kF32) return reinterpret_cast<const uint32_t*>(data)[i];
    return reinterpret_cast<const uint16_t*>(data)[i];
  }
  template <int64_t D>
  static DPO_FAST_HD void store_item(char* data, int64_t i, uint32_t raw) {
    if (D == kF32) {
      reinterpret_cast<uint32_t*>(data)[i] = raw;
    } else {
      reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(raw);
    }
  }
  template <int64_t D, int kWidth>
  static DPO_FAST_HD PackOf<D, kWidth> load_pack(const char* data, int64_t first) {
    return *reinterpret_cast<const PackOf<D, kWidth>*>(data + first * kItemSize<D>);
  }
  template <int64_t D, int kWidth>
  static DPO_FAST_HD void store_pack(char* data, int64_t first, const PackOf<D, kWidth>& pack) {
    *reinterpret_cast<PackOf<D, kWidth>*>(data + first * kItemSize<D>) = pack;
  }
};

// The random bits of kWidth elements from position on, 16 bits each, lowest first, four to a 64-bit word.
template <int kWidth>
DPO_FAST_HD void random_pack(uint64_t position, const PhiloxKey& key, uint64_t drawn[2]) {
  const int phase = static_cast<int>(position & 7);
  uint32_t words[4];
  octet_words(position >> 3, key, words);
  uint64_t a = words[0] | static_cast<uint64_t>(words[1]) << 32, b = words[2] | static_cast<uint64_t>(words[3]) << 32;
  uint64_t c = 0, d = 0;
  if (phase + kWidth > 8) {  // the elements straddle two octets: the same for every vector of a chunk
    octet_words((position >> 3) + 1, key, words);
    c = words[0] | static_cast<uint64_t>(words[1]) << 32;
    d = words[2] | static_cast<uint64_t>(words[3]) << 32;
  }
  if (phase & 4) {
    a = b;
    b = c;
    c = d;
  }
  const int shift = 16 * (phase & 3);
  drawn[0] = shift == 0 ? a : a >> shift | b << (64 - shift);
  drawn[1] = shift == 0 ? b : b >> shift | c << (64 - shift);
}

template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
DPO_FAST_HD void chunk_item(const ChunkView<R, P>& view, int64_t i, uint64_t position, const EmaBlend& blend) {
  using View = ChunkView<R, P>;
  uint64_t drawn[2] = {0, 0};
  if (kStochastic) random_pack<1>(position + static_cast<uint64_t>(i), blend.key, drawn);
  const uint32_t old = kShadow ? 0u : View::template load_item<R>(view.ref, i);
  float master = kShadow ? float_of(View::template load_item<kF32>(view.shadow, i)) : 0.0f;
  const uint32_t random = static_cast<uint32_t>(drawn[0]) & 0xFFFFu;
  const uint32_t policy = View::template load_item<P>(view.policy, i);
  const uint32_t raw = ema_element<R, P, kShadow, kStochastic>(old, policy, master, blend, random);
  View::template store_item<R>(view.ref, i, raw);
  if (kShadow) View::template store_item<kF32>(view.shadow, i, bits_of(master));
}

// The packs at first, first + stride, ... below end, kUnroll at most: all loads are issued before the first use.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic, int kWidth, int kUnroll>
DPO_FAST_HD void chunk_packs(const ChunkView<R, P>& view, int64_t first, int64_t stride, int64_t end, uint64_t position,
                             const EmaBlend& blend) {
  using View = ChunkView<R, P>;
  PackOf<R, kWidth> refs[kUnroll] = {};
  PackOf<P, kWidth> policies[kUnroll] = {};
  PackOf<kF32, kWidth> masters[kUnroll] = {};
  EMA_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * stride;
    if (i >= end) break;
    policies[u] = View::template load_pack<P, kWidth>(view.policy, i);
    if constexpr (kShadow) masters[u] = View::template load_pack<kF32, kWidth>(view.shadow, i);
    else refs[u] = View::template load_pack<R, kWidth>(view.ref, i);
  }
  uint32_t left_over = 0;  // packs with a value that is not finite in the reference's type
  EMA_UNROLL
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * stride;
    if (i >= end) break;
    uint64_t drawn[2] = {0, 0};
    if (kStochastic) random_pack<kWidth>(position + static_cast<uint64_t>(i), blend.key, drawn);
    bool all_finite = true;
    PackOf<R, kWidth> out = {};
    EMA_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      const uint32_t random = static_cast<uint32_t>(drawn[k >> 2] >> (16 * (k & 3))) & 0xFFFFu;
      const float p = widen<P>(get<P, kWidth>(policies[u], k));
      const float r = kShadow ? float_of(get<kF32, kWidth>(masters[u], k)) : widen<R>(get<R, kWidth>(refs[u], k));
      const float value = blend_value(r, p, blend);
      all_finite &= fabsf(value) <= max_finite<R>();
      set<R, kWidth>(out, k, narrow_finite<R, kStochastic>(value, random));
      set<kF32, kWidth>(masters[u], k, bits_of(value));
    }
    if (all_finite) {
      View::template store_pack<R, kWidth>(view.ref, i, out);
      if constexpr (kShadow) View::template store_pack<kF32, kWidth>(view.shadow, i, masters[u]);
    } else {
      left_over |= 1u << u;
    }
  }
  EMA_NO_UNROLL
  for (int64_t i = first; left_over != 0; i += stride, left_over >>= 1) {
    if ((left_over & 1u) == 0) continue;
    EMA_NO_UNROLL
    for (int k = 0; k < kWidth; ++k) chunk_item<R, P, kShadow, kStochastic>(view, i + k, position, blend);
  }
}

// Elements before the first aligned pack of the reference; count if the others are not aligned with it.
template <int64_t R, int64_t P, bool kShadow, int kWidth>
DPO_FAST_HD int64_t unaligned_head(const ChunkView<R, P>& view, int64_t count) {
  constexpr int64_t kRefBytes = kWidth * kItemSize<R>, kPolicyBytes = kWidth * kItemSize<P>;
  const int64_t ref = reinterpret_cast<int64_t>(view.ref), policy = reinterpret_cast<int64_t>(view.policy);
  const int64_t head = (kRefBytes - ref % kRefBytes) % kRefBytes / kItemSize<R>;
  bool aligned = head < count && (policy + head * kItemSize<P>) % kPolicyBytes == 0;
  if (kShadow) aligned = aligned && (reinterpret_cast<int64_t>(view.shadow) + head * 4) % (kWidth * 4) == 0;
  return aligned ? head : count;
}

// Thread thread of num_threads: its share of elements [start, start + count) of the row's tensor.
template <int64_t R, int64_t P, bool kShadow, bool kStochasticAsked>
DPO_FAST_HD void ema_chunk(const EmaRow& row, int64_t start, int64_t count, const EmaBlend& blend, int thread,
                           int num_threads) {
  constexpr bool kStochastic = kStochasticAsked && R != kF32;
  constexpr int kWidth = kShadow || R == kF32 || P == kF32 ? 4 : 8;  // the widest access is 16 bytes
  constexpr int kUnroll = kStochastic || kShadow ? 2 : 4;
  const ChunkView<R, P> view{address(row.ref + start * kItemSize<R>), address(row.policy + start * kItemSize<P>),
                             kShadow ? address(row.shadow + start * 4) : nullptr};
  const uint64_t position = static_cast<uint64_t>(row.position + start);
  const int64_t head = unaligned_head<R, P, kShadow, kWidth>(view, count);
  const int64_t end = head + (count - head) / kWidth * kWidth;
  const int64_t stride = static_cast<int64_t>(num_threads) * kWidth;
  EMA_NO_UNROLL
  for (int64_t i = head + static_cast<int64_t>(thread) * kWidth; i < end; i += kUnroll * stride)
    chunk_packs<R, P, kShadow, kStochastic, kWidth, kUnroll>(view, i, stride, end, position, blend);

  const int64_t single = head + count - end;  // elements before and behind the packs
  EMA_NO_UNROLL
  for (int64_t i = thread; i < single; i += num_threads)
    chunk_item<R, P, kShadow, kStochastic>(view, i < head ? i : end + (i - head), position, blend);
}

// The row's types are the same for a whole block: one branch a chunk.
template <bool kStochastic>
DPO_FAST_HD void ema_dispatch(const EmaRow& row, int64_t start, int64_t count, const EmaBlend& blend, int thread,
                              int num_threads) {
#define EMA_CASE(R, P)                                                                              \
  if (row.ref_dtype == R && row.policy_dtype == P) {                                                \
    if (row.shadow != 0) ema_chunk<R, P, true, kStochastic>(row, start, count, blend, thread, num_threads); \
    else ema_chunk<R, P, false, kStochastic>(row, start, count, blend, thread, num_threads);        \
    return;                                                                                         \
  }
  EMA_CASE(kBF16, kBF16)
  EMA_CASE(kBF16, kF32)
  EMA_CASE(kBF16, kF16)
  EMA_CASE(kF32, kF32)
  EMA_CASE(kF32, kBF16)
  EMA_CASE(kF32, kF16)
  EMA_CASE(kF16, kF16)
  EMA_CASE(kF16, kF32)
  EMA_CASE(kF16, kBF16)
#undef EMA_CASE
}

}  // namespace dpo_fast

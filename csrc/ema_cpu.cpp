// The EMA on the CPU: chunks of all tensors in one parallel region, lanes chosen at run time.
#include <algorithm>

#include "ema_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define EMA_X86 1
#include "ema_avx2.h"
#include "ema_avx512.h"
#endif

namespace dpo_fast {
namespace {

struct Span {
  char* ref;
  const char* policy;
  char* shadow;
  int64_t count;
};
using SpanFn = void (*)(const Span&, const EmaBlend&, const uint16_t*);
using FillFn = void (*)(uint64_t, int, const PhiloxKey&, uint16_t*);

template <int64_t D>
inline uint32_t load_raw(const char* data, int64_t i) {
  if constexpr (D == kF32) {
    uint32_t raw;
    std::memcpy(&raw, data + 4 * i, 4);
    return raw;
  } else {
    uint16_t raw;
    std::memcpy(&raw, data + 2 * i, 2);
    return raw;
  }
}

template <int64_t D>
inline void store_raw(char* data, int64_t i, uint32_t raw) {
  if constexpr (D == kF32) {
    std::memcpy(data + 4 * i, &raw, 4);
  } else {
    const uint16_t half = static_cast<uint16_t>(raw);
    std::memcpy(data + 2 * i, &half, 2);
  }
}

template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
inline void span_element(const Span& s, int64_t i, const EmaBlend& b, const uint16_t* random) {
  float master = 0.0f;
  if constexpr (kShadow) master = float_of(load_raw<kF32>(s.shadow, i));
  const uint32_t drawn = kStochastic ? random[i] : 0u;
  const uint32_t old = kShadow ? 0u : load_raw<R>(s.ref, i);
  store_raw<R>(s.ref, i, ema_element<R, P, kShadow, kStochastic>(old, load_raw<P>(s.policy, i), master, b, drawn));
  if constexpr (kShadow) store_raw<kF32>(s.shadow, i, bits_of(master));
}

}  // namespace

namespace scalar {
#define EMA_TARGET
#define EMA_SCALAR
#include "ema_span.h"
#undef EMA_SCALAR
#undef EMA_TARGET

static void fill_random(uint64_t group, int num_groups, const PhiloxKey& key, uint16_t* out) {
  for (int g = 0; g < num_groups; ++g) {
    uint32_t words[4];
    philox_words(group + g, key, words);
    for (int k = 0; k < 8; ++k) out[8 * g + k] = static_cast<uint16_t>(words[k >> 1] >> (16 * (k & 1)));
  }
}
}  // namespace scalar

#ifdef EMA_X86
namespace avx2 {
#define EMA_TARGET EMA_AVX2
#include "ema_span.h"
#undef EMA_TARGET
}  // namespace avx2

namespace avx512 {
#define EMA_TARGET EMA_AVX512
#include "ema_span.h"
#undef EMA_TARGET
}  // namespace avx512
#endif

namespace {

constexpr int kRandomBlock = 1024;  // random bits drawn at once: 2 KiB, stays in L1
constexpr int kGroupMultiple = 8;   // counters per call of a fill_random: a multiple of every width

struct Lanes {
  SpanFn (*pick)(int64_t, int64_t, bool, bool);
  FillFn fill_random;
};

Lanes lanes_of(Isa isa) {
#ifdef EMA_X86
  if (isa == Isa::kAvx512) return {avx512::pick, avx512::fill_random};
  if (isa == Isa::kAvx2) return {avx2::pick, avx2::fill_random};
#endif
  (void)isa;
  return {scalar::pick, scalar::fill_random};
}

int64_t item_size(int64_t dtype) { return dtype == kF32 ? 4 : 2; }

void update_chunk(const EmaRow& row, int64_t start, int64_t count, const EmaBlend& blend, const Lanes& lanes) {
  const bool shadow = row.shadow != 0, stochastic = blend.stochastic != 0 && row.ref_dtype != kF32;
  const SpanFn run = lanes.pick(row.ref_dtype, row.policy_dtype, shadow, stochastic);
  alignas(64) uint16_t random[kRandomBlock + 8 * kGroupMultiple];
  const int64_t step = stochastic ? kRandomBlock : count;
  for (int64_t begin = start; begin < start + count; begin += step) {
    const int64_t length = std::min(step, start + count - begin);
    int phase = 0;
    if (stochastic) {
      const uint64_t position = static_cast<uint64_t>(row.position + begin);
      phase = static_cast<int>(position & 7);
      const int groups = static_cast<int>((phase + length + 7) / 8);
      lanes.fill_random(position >> 3, (groups + kGroupMultiple - 1) / kGroupMultiple * kGroupMultiple, blend.key,
                        random);
    }
    const Span span{reinterpret_cast<char*>(row.ref) + begin * item_size(row.ref_dtype),
                    reinterpret_cast<const char*>(row.policy) + begin * item_size(row.policy_dtype),
                    shadow ? reinterpret_cast<char*>(row.shadow) + begin * 4 : nullptr, length};
    run(span, blend, random + phase);
  }
}

}  // namespace

bool ema_isa_available(Isa isa) {
  if (isa == Isa::kScalar) return true;
#ifdef EMA_X86
  const bool avx2 = __builtin_cpu_supports("avx2");  // every such processor has F16C
  if (isa == Isa::kAvx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

void ema_cpu(const EmaTable& table, const EmaBlend& blend, Isa isa, int num_threads) {
  const Lanes lanes = lanes_of(isa);
  // Chunks are handed out one by one: a core slowed down by other work takes fewer. No value depends on the order.
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
#endif
  for (int64_t chunk = 0; chunk < table.num_chunks; ++chunk) {
    const EmaRow& row = table.rows[table.chunk_rows[chunk]];
    const int64_t start = (chunk - row.first_chunk) * table.chunk_size;
    update_chunk(row, start, std::min(table.chunk_size, row.numel - start), blend, lanes);
  }
  (void)num_threads;
}

}  // namespace dpo_fast

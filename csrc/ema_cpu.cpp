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

// Consecutive elements of one tensor.
struct Span {
  char* ref;
  const char* policy;
  char* shadow;
  int64_t count;
  uint64_t position;  // global position of the first, for the random bits
};
using SpanFn = void (*)(const Span&, const EmaBlend&);

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

// Elements [begin, end), one by one.
template <int64_t R, int64_t P, bool kShadow, bool kStochastic>
inline void span_elements(const Span& s, int64_t begin, int64_t end, const EmaBlend& b) {
  uint32_t words[4] = {0, 0, 0, 0};
  for (int64_t i = begin; i < end; ++i) {
    uint32_t drawn = 0;
    if constexpr (kStochastic) {
      const uint64_t position = s.position + static_cast<uint64_t>(i), k = position & 7;
      if (k == 0 || i == begin) octet_words(position >> 3, b.key, words);
      drawn = (words[k >> 1] >> (16 * (k & 1))) & 0xFFFFu;
    }
    float master = 0.0f;
    if constexpr (kShadow) master = float_of(load_raw<kF32>(s.shadow, i));
    const uint32_t old = kShadow ? 0u : load_raw<R>(s.ref, i);
    store_raw<R>(s.ref, i, ema_element<R, P, kShadow, kStochastic>(old, load_raw<P>(s.policy, i), master, b, drawn));
    if constexpr (kShadow) store_raw<kF32>(s.shadow, i, bits_of(master));
  }
}

}  // namespace

namespace scalar {
#define EMA_TARGET
#define EMA_SCALAR
#include "ema_span.h"
#undef EMA_SCALAR
#undef EMA_TARGET
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

SpanFn pick(Isa isa, int64_t ref_dtype, int64_t policy_dtype, bool shadow, bool stochastic) {
#ifdef EMA_X86
  if (isa == Isa::kAvx512) return avx512::pick(ref_dtype, policy_dtype, shadow, stochastic);
  if (isa == Isa::kAvx2) return avx2::pick(ref_dtype, policy_dtype, shadow, stochastic);
#endif
  (void)isa;
  return scalar::pick(ref_dtype, policy_dtype, shadow, stochastic);
}

int64_t item_size(int64_t dtype) { return dtype == kF32 ? 4 : 2; }

void update_chunk(const EmaRow& row, int64_t start, int64_t count, const EmaBlend& blend, Isa isa) {
  const bool shadow = row.shadow != 0, stochastic = blend.stochastic != 0 && row.ref_dtype != kF32;
  const Span span{reinterpret_cast<char*>(row.ref) + start * item_size(row.ref_dtype),
                  reinterpret_cast<const char*>(row.policy) + start * item_size(row.policy_dtype),
                  shadow ? reinterpret_cast<char*>(row.shadow) + start * 4 : nullptr, count,
                  static_cast<uint64_t>(row.position + start)};
  pick(isa, row.ref_dtype, row.policy_dtype, shadow, stochastic)(span, blend);
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
  // Neighbouring chunks are handed out together, so that each thread reads long runs, and a core slowed down by other
  // work takes fewer of them. No value depends on the order.
  const int64_t run = std::max<int64_t>(1, std::min<int64_t>(32, table.num_chunks / (8 * num_threads)));
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, run)
#endif
  for (int64_t chunk = 0; chunk < table.num_chunks; ++chunk) {
    const EmaRow& row = table.rows[table.chunk_rows[chunk]];
    const int64_t start = (chunk - row.first_chunk) * table.chunk_size;
    update_chunk(row, start, std::min(table.chunk_size, row.numel - start), blend, isa);
  }
  (void)run;
}

}  // namespace dpo_fast

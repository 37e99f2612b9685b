// Python's door to the EMA: dpo_fast._C.ema_cpu, ema_cuda, and what this build and machine can run.
#include "ema.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace dpo_fast {
namespace {

struct NamedIsa {
  const char* name;
  Isa isa;
};
constexpr NamedIsa kIsas[] = {{"avx512", Isa::kAvx512}, {"avx2", Isa::kAvx2}, {"scalar", Isa::kScalar}};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const NamedIsa& named : kIsas)
    if (ema_isa_available(named.isa)) names.emplace_back(named.name);
  return names;
}

Isa isa_called(const std::string& name) {
  for (const NamedIsa& named : kIsas)
    if ((name == "auto" || name == named.name) && ema_isa_available(named.isa)) return named.isa;
  throw py::value_error("isa='" + name + "' is unknown or not available on this processor; use 'auto'");
}

void check(bool ok, const std::string& message) {
  if (!ok) throw py::value_error(message);
}

EmaTable make_table(uint64_t rows, int64_t num_rows, uint64_t chunk_rows, int64_t num_chunks, int64_t chunk_size) {
  check(rows != 0 && chunk_rows != 0, "the EMA table needs non-null addresses of its rows and of its chunk map");
  check(num_rows >= 1 && num_chunks >= 1, "the EMA table needs at least one row and one chunk, got " +
                                              std::to_string(num_rows) + " and " + std::to_string(num_chunks));
  check(num_chunks <= INT32_MAX, "the EMA table has " + std::to_string(num_chunks) + " chunks, at most 2^31 - 1 fit");
  check(chunk_size >= 8 && chunk_size % 8 == 0,
        "chunk_size must be a positive multiple of 8, got " + std::to_string(chunk_size));
  return {reinterpret_cast<const EmaRow*>(rows), reinterpret_cast<const int32_t*>(chunk_rows), num_rows, num_chunks,
          chunk_size};
}

EmaBlend make_blend(float weight, bool from_policy, bool copy, bool stochastic, uint64_t seed, uint64_t step) {
  return {weight, from_policy, copy, stochastic,
          {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(step),
           static_cast<uint32_t>(step >> 32)}};
}

// For tables in host memory: every row and every chunk is what the kernels assume.
void check_table(uint64_t rows, int64_t num_rows, uint64_t chunk_rows, int64_t num_chunks, int64_t chunk_size) {
  const EmaTable table = make_table(rows, num_rows, chunk_rows, num_chunks, chunk_size);
  int64_t chunk = 0;
  for (int64_t i = 0; i < num_rows; ++i) {
    const EmaRow& row = table.rows[i];
    const std::string name = "row " + std::to_string(i) + " of the EMA table ";
    check(row.ref != 0 && row.policy != 0, name + "has a null address");
    check(row.numel >= 1, name + "has " + std::to_string(row.numel) + " elements");
    check(row.position >= 0, name + "has position " + std::to_string(row.position));
    check(row.ref_dtype >= 0 && row.ref_dtype < kNumDtypes && row.policy_dtype >= 0 && row.policy_dtype < kNumDtypes,
          name + "has an unknown dtype code");
    check(row.first_chunk == chunk, name + "starts at chunk " + std::to_string(row.first_chunk) + ", expected " +
                                        std::to_string(chunk));
    const int64_t end = chunk + (row.numel + chunk_size - 1) / chunk_size;
    check(end <= num_chunks, name + "ends beyond the chunk map");
    for (; chunk < end; ++chunk) check(table.chunk_rows[chunk] == i, name + "does not own its chunks");
  }
  check(chunk == num_chunks, "the chunk map has " + std::to_string(num_chunks) + " chunks, the rows need " +
                                 std::to_string(chunk));
}

void run_cpu(uint64_t rows, int64_t num_rows, uint64_t chunk_rows, int64_t num_chunks, int64_t chunk_size, float weight,
             bool from_policy, bool copy, bool stochastic, uint64_t seed, uint64_t step, int num_threads,
             const std::string& isa) {
  const EmaTable table = make_table(rows, num_rows, chunk_rows, num_chunks, chunk_size);
  const EmaBlend blend = make_blend(weight, from_policy, copy, stochastic, seed, step);
  const Isa chosen = isa_called(isa);
  check(num_threads >= 1, "num_threads must be at least 1, got " + std::to_string(num_threads));
  py::gil_scoped_release release;
  ema_cpu(table, blend, chosen, num_threads);
}

#ifdef DPO_FAST_WITH_CUDA
void run_cuda(uint64_t rows, int64_t num_rows, uint64_t chunk_rows, int64_t num_chunks, int64_t chunk_size,
              float weight, bool from_policy, bool copy, bool stochastic, uint64_t seed, uint64_t step, int device,
              uint64_t stream) {
  const EmaTable table = make_table(rows, num_rows, chunk_rows, num_chunks, chunk_size);
  const EmaBlend blend = make_blend(weight, from_policy, copy, stochastic, seed, step);
  check(device >= 0, "device must be a CUDA device index, got " + std::to_string(device));
  const char* error = ema_cuda(table, blend, device, reinterpret_cast<void*>(stream));
  if (error != nullptr)
    throw std::runtime_error("the EMA kernel on CUDA device " + std::to_string(device) + " failed: " + error);
}
#endif

}  // namespace

void register_ema(py::module_& m) {
  m.def("ema_isas", &available_isas, "Instruction sets ema_cpu can use on this processor, best first.");
  m.def("ema_check_table", &check_table, py::arg("rows"), py::arg("num_rows"), py::arg("chunk_rows"),
        py::arg("num_chunks"), py::arg("chunk_size"), "Raise ValueError if a table in host memory is malformed.");
  m.def("ema_cpu", &run_cpu, py::arg("rows"), py::arg("num_rows"), py::arg("chunk_rows"), py::arg("num_chunks"),
        py::arg("chunk_size"), py::arg("weight"), py::arg("from_policy"), py::arg("copy"), py::arg("stochastic"),
        py::arg("seed"), py::arg("step"), py::kw_only(), py::arg("num_threads"), py::arg("isa") = "auto");
#ifdef DPO_FAST_WITH_CUDA
  m.def(
      "ema_cuda_refusal",
      [](int device) -> std::string {
        const char* reason = ema_cuda_refusal(device);
        return reason == nullptr ? "" : reason;
      },
      py::arg("device"), "Why the CUDA kernel cannot run on this device; empty if it can.");
  m.def("ema_cuda", &run_cuda, py::arg("rows"), py::arg("num_rows"), py::arg("chunk_rows"), py::arg("num_chunks"),
        py::arg("chunk_size"), py::arg("weight"), py::arg("from_policy"), py::arg("copy"), py::arg("stochastic"),
        py::arg("seed"), py::arg("step"), py::kw_only(), py::arg("device"), py::arg("stream"));
#endif
}

}  // namespace dpo_fast

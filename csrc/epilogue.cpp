// Python's view of the epilogue: addresses and sizes. Private; dpo_fast/chunked/epilogue.py checks the tensors.
#include "epilogue.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace dpo_fast {
namespace {

struct NamedLanes {
  const char* name;
  LaneSet lanes;
};
constexpr NamedLanes kLaneSets[] = {
    {"avx512", LaneSet::kAvx512}, {"avx2", LaneSet::kAvx2}, {"scalar", LaneSet::kScalar}};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const NamedLanes& named : kLaneSets)
    if (lane_set_available(named.lanes)) names.emplace_back(named.name);
  return names;
}

LaneSet lanes_called(const std::string& name) {
  for (const NamedLanes& named : kLaneSets)
    if ((name == "auto" || name == named.name) && lane_set_available(named.lanes)) return named.lanes;
  throw py::value_error("isa='" + name + "' is unknown or not available on this processor; use 'auto'");
}

EpilogueChunk chunk_of(uintptr_t logits, int64_t rows, int64_t vocab, int64_t stride, uintptr_t target,
                       uintptr_t bias, float softcap, float scale) {
  if (rows < 0 || vocab < 1 || stride < vocab)
    throw py::value_error("epilogue: rows=" + std::to_string(rows) + " vocab=" + std::to_string(vocab) +
                                " stride=" + std::to_string(stride) + "; rows >= 0 and stride >= vocab >= 1 are needed");
  return {reinterpret_cast<float*>(logits),        rows, vocab, stride, reinterpret_cast<const int64_t*>(target),
          reinterpret_cast<const float*>(bias), softcap, scale};
}

}  // namespace

void register_epilogue(py::module_& m) {
  m.def("epilogue_isas", &available_isas, "Instruction sets the epilogue can use on this processor, best first.");
  m.attr("epilogue_columns") = static_cast<int64_t>(kNumColumns);
  m.def(
      "epilogue",
      [](uintptr_t logits, int64_t rows, int64_t vocab, int64_t stride, uintptr_t target, uintptr_t bias, float softcap,
         float scale, uintptr_t out, bool write, bool statistics, const std::string& isa, int num_threads) {
        const EpilogueChunk chunk = chunk_of(logits, rows, vocab, stride, target, bias, softcap, scale);
        const LaneSet set = lanes_called(isa);
        const py::gil_scoped_release nogil;
        epilogue(chunk, reinterpret_cast<float*>(out), write, statistics, set, num_threads);
      },
      py::arg("logits"), py::arg("rows"), py::arg("vocab"), py::arg("stride"), py::arg("target"), py::arg("bias"),
      py::arg("softcap"), py::arg("scale"), py::arg("out"), py::arg("write"), py::arg("statistics"), py::arg("isa"),
      py::arg("num_threads"));
  m.def(
      "exponentials",
      [](uintptr_t logits, int64_t rows, int64_t vocab, int64_t stride, uintptr_t target, uintptr_t bias, float softcap,
         float scale, uintptr_t shift, uintptr_t rest, const std::string& isa, int num_threads) {
        const EpilogueChunk chunk = chunk_of(logits, rows, vocab, stride, target, bias, softcap, scale);
        const LaneSet set = lanes_called(isa);
        const py::gil_scoped_release nogil;
        exponentials(chunk, reinterpret_cast<const float*>(shift), reinterpret_cast<const float*>(rest), set,
                     num_threads);
      },
      py::arg("logits"), py::arg("rows"), py::arg("vocab"), py::arg("stride"), py::arg("target"), py::arg("bias"),
      py::arg("softcap"), py::arg("scale"), py::arg("shift"), py::arg("rest"), py::arg("isa"),
      py::arg("num_threads"));
}

}  // namespace dpo_fast

// Python's view of the LM head: addresses and sizes. Private; dpo_fast/chunked/compiled_head.py checks the tensors.
#include "head.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace dpo_fast {
namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  if (head_available(LaneSet::kAvx512)) names.emplace_back("avx512");
  if (head_available(LaneSet::kAvx2)) names.emplace_back("avx2");
  return names;
}

LaneSet lanes_called(const std::string& name) {
  const bool any = name == "auto";
  if ((any || name == "avx512") && head_available(LaneSet::kAvx512)) return LaneSet::kAvx512;
  if ((any || name == "avx2") && head_available(LaneSet::kAvx2)) return LaneSet::kAvx2;
  throw py::value_error("isa='" + name + "' is unknown or not available on this processor; use 'auto'");
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A HeadProblem with its instruction set and threads: what every call shares.
struct Head {
  HeadProblem problem{};
  LaneSet lanes;
  int num_threads;

  Head(int64_t rows, int64_t vocab, uintptr_t target, uintptr_t bias, float softcap, float scale,
       const std::string& isa, int threads)
      : lanes(lanes_called(isa)), num_threads(threads) {
    if (rows < 0 || vocab < 1 || threads < 1)
      throw py::value_error("Head: rows=" + std::to_string(rows) + " vocab=" + std::to_string(vocab) +
                            " num_threads=" + std::to_string(threads) + "; rows >= 0, the others >= 1 are needed");
    problem.rows = rows;
    problem.vocab = vocab;
    problem.target = at<const int64_t>(target);
    problem.bias = at<const float>(bias);
    problem.softcap = softcap;
    problem.scale = scale;
  }

  void add_source(uintptr_t weight, int64_t type, int64_t stride, int64_t cols, uintptr_t x, uintptr_t dx,
                  uintptr_t grad) {
    if (problem.num_sources == kMaxSources || type < 0 || type > 2 || cols < 1 || stride < cols)
      throw py::value_error("Head.add_source: source " + std::to_string(problem.num_sources) + " of at most " +
                            std::to_string(kMaxSources) + ", type=" + std::to_string(type) +
                            " cols=" + std::to_string(cols) + " stride=" + std::to_string(stride) +
                            "; type 0, 1 or 2 and stride >= cols >= 1 are needed");
    problem.source[problem.num_sources++] = {at<const void>(weight), static_cast<WeightType>(type), stride, cols,
                                             at<const float>(x),     at<float>(dx),                 at<float>(grad)};
  }

  void forward(uintptr_t out, uintptr_t stored, bool statistics, uintptr_t scratch) const {
    const py::gil_scoped_release nogil;
    head_forward(problem, at<float>(out), at<float>(stored), statistics, at<void>(scratch), lanes, num_threads);
  }

  void backward(uintptr_t v, uintptr_t shift, uintptr_t rest, uintptr_t slope, uintptr_t stored, uintptr_t bias_grad,
                bool accumulate, uintptr_t scratch) const {
    const HeadBackward back{at<const float>(v),     at<const float>(shift),  at<const float>(rest), at<const float>(slope),
                            at<const float>(stored), at<float>(bias_grad), accumulate};
    const py::gil_scoped_release nogil;
    head_backward(problem, back, at<void>(scratch), lanes, num_threads);
  }
};

}  // namespace

void register_head(py::module_& m) {
  m.def("head_isas", &available_isas, "Instruction sets the LM head can use on this processor, best first.");
  m.attr("head_columns") = kNumHeadColumns;
  m.attr("head_panel_rows") = static_cast<int64_t>(48);
  m.attr("head_tile") = kTile;
  py::class_<Head>(m, "Head")
      .def(py::init<int64_t, int64_t, uintptr_t, uintptr_t, float, float, const std::string&, int>(), py::arg("rows"),
           py::arg("vocab"), py::arg("target"), py::arg("bias"), py::arg("softcap"), py::arg("scale"), py::arg("isa"),
           py::arg("num_threads"))
      .def("add_source", &Head::add_source, py::arg("weight"), py::arg("type"), py::arg("stride"), py::arg("cols"),
           py::arg("x"), py::arg("dx"), py::arg("grad"))
      .def("stored_bytes", [](const Head& h) { return 4 * head_stored_floats(head_shape(h.problem, h.lanes)); })
      .def("forward_scratch", [](const Head& h) { return head_forward_scratch(h.problem, h.lanes, h.num_threads); })
      .def("backward_scratch", [](const Head& h) { return head_backward_scratch(h.problem, h.lanes, h.num_threads); })
      .def("forward", &Head::forward, py::arg("out"), py::arg("stored"), py::arg("statistics"), py::arg("scratch"))
      .def("backward", &Head::backward, py::arg("v"), py::arg("shift"), py::arg("rest"), py::arg("slope"),
           py::arg("stored"), py::arg("bias_grad"), py::arg("accumulate"), py::arg("scratch"));
}

}  // namespace dpo_fast

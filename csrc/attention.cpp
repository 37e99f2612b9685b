// Python's view of the attention: addresses and strides. Private; dpo_fast/layouts/attention_compiled.py checks the
// tensors.
#include "attention.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

namespace py = pybind11;

namespace dpo_fast {
namespace {

using View = std::array<int64_t, 3>;  // address, stride of heads, stride of tokens

template <typename T>
AttentionView<T> view(const View& v) {
  return {reinterpret_cast<T*>(v[0]), v[1], v[2]};
}

// One packed row, with its instruction set and threads: what both directions share.
struct Attention {
  AttentionProblem problem{};
  LaneSet lanes;
  int num_threads;

  Attention(const View& query, const View& key, const View& value, int64_t query_heads, int64_t kv_heads,
            int64_t length, int64_t size, int64_t value_size, uintptr_t segments, int64_t num_segments, float scale,
            int64_t window, int threads)
      : lanes(attention_lanes(size, value_size)), num_threads(threads) {
    if (lanes == LaneSet::kScalar)
      throw py::value_error("Attention: no instruction set of this processor serves heads of " + std::to_string(size) +
                            " and " + std::to_string(value_size));
    if (kv_heads < 1 || query_heads < 1 || query_heads % kv_heads != 0 || length < 1 || window < 0 || threads < 1)
      throw py::value_error("Attention: query_heads=" + std::to_string(query_heads) +
                            " kv_heads=" + std::to_string(kv_heads) + " length=" + std::to_string(length) +
                            " window=" + std::to_string(window) + " num_threads=" + std::to_string(threads) +
                            "; whole groups of heads, a token or more, window >= 0 and threads >= 1 are needed");
    problem = {view<const float>(query), view<const float>(key), view<const float>(value), query_heads, kv_heads,
               length, size, value_size, reinterpret_cast<const AttentionSegment*>(segments), num_segments, scale,
               window};
    check_segments();
  }

  int64_t scratch_floats(bool backward) const {
    return num_threads * attention_scratch_floats(problem, lanes, backward);
  }

  void forward(const View& out, uintptr_t lse, uintptr_t scratch) const {
    const py::gil_scoped_release nogil;
    attention_forward(problem, {view<float>(out), reinterpret_cast<float*>(lse)}, reinterpret_cast<float*>(scratch),
                      lanes, num_threads);
  }

  void backward(const View& out, const View& dout, uintptr_t lse, const View& dquery, const View& dkey,
                const View& dvalue, uintptr_t scratch) const {
    const AttentionBackward b{view<const float>(out), view<const float>(dout), reinterpret_cast<const float*>(lse),
                              view<float>(dquery),    view<float>(dkey),       view<float>(dvalue)};
    const py::gil_scoped_release nogil;
    attention_backward(problem, b, reinterpret_cast<float*>(scratch), lanes, num_threads);
  }

 private:
  // They cover the row in order, and a prefix is the start of an earlier segment without one.
  void check_segments() const {
    int64_t expected = 0;
    for (int64_t i = 0; i < problem.num_segments; ++i) {
      const AttentionSegment& s = problem.segments[i];
      const bool rooted = s.prefix_length == 0 || std::any_of(problem.segments, problem.segments + i, [&](auto& root) {
                            return root.prefix_length == 0 && root.start == s.prefix_start &&
                                   root.length >= s.prefix_length;
                          });
      if (s.start != expected || s.length < 1 || s.prefix_length < 0 || !rooted)
        throw py::value_error("Attention: segment " + std::to_string(i) + " (" + std::to_string(s.start) + ", " +
                              std::to_string(s.length) + ", " + std::to_string(s.prefix_start) + ", " +
                              std::to_string(s.prefix_length) + ") does not follow from those before it");
      expected += s.length;
    }
    if (expected != problem.length)
      throw py::value_error("Attention: the segments cover " + std::to_string(expected) + " of " +
                            std::to_string(problem.length) + " tokens");
  }
};

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "attention_serves",
      [](int64_t size, int64_t value_size) { return attention_lanes(size, value_size) != LaneSet::kScalar; },
      py::arg("size"), py::arg("value_size"), "Whether this processor has instructions for these head sizes.");
  py::class_<Attention>(m, "Attention")
      .def(py::init<const View&, const View&, const View&, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t,
                    int64_t, float, int64_t, int>(),
           py::arg("query"), py::arg("key"), py::arg("value"), py::kw_only(), py::arg("query_heads"),
           py::arg("kv_heads"), py::arg("length"), py::arg("size"), py::arg("value_size"), py::arg("segments"),
           py::arg("num_segments"), py::arg("scale"), py::arg("window"), py::arg("num_threads"))
      .def("scratch_floats", &Attention::scratch_floats, py::arg("backward"))
      .def("forward", &Attention::forward, py::arg("out"), py::arg("lse"), py::arg("scratch"))
      .def("backward", &Attention::backward, py::arg("out"), py::arg("dout"), py::arg("lse"), py::arg("dquery"),
           py::arg("dkey"), py::arg("dvalue"), py::arg("scratch"));
}

}  // namespace dpo_fast

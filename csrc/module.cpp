// dpo_fast._C: CPU and CUDA code behind pybind11. No libtorch: callers pass pointers, sizes and a stream.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace dpo_fast {
void register_attention(py::module_& m);  // attention.cpp
void register_ema(py::module_& m);        // ema.cpp
void register_epilogue(py::module_& m);   // epilogue.cpp
void register_head(py::module_& m);       // head.cpp
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of dpo_fast. Private: the checked entry points are in dpo_fast.functional.";
#ifdef DPO_FAST_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif
  dpo_fast::register_attention(m);
  dpo_fast::register_ema(m);
  dpo_fast::register_epilogue(m);
  dpo_fast::register_head(m);
}

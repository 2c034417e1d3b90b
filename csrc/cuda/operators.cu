// What Python finds here: a table of launchers for float and double, and how this file was built.
//
// Arguments are device pointers to contiguous memory, 64-bit integers, doubles and bools, and last the stream; shapes
// were checked before. A launcher returns the error of its launch (0 is none), allocates nothing and waits for nothing,
// so that it can be captured. No PyTorch header is needed, so one library serves every version of it.
#include <cstring>

#include "pixel.cuh"
#include "select.cuh"

namespace smi {
namespace {

struct Operator {
  const char* name;
  void *of_float, *of_double;
};

#define SMI_OPERATOR(name) \
  { #name, reinterpret_cast<void*>(&name<float>), reinterpret_cast<void*>(&name<double>) }

const Operator OPERATORS[] = {
    SMI_OPERATOR(finish_prior_sums),
    SMI_OPERATOR(pixel_step),
    SMI_OPERATOR(select_tokens),
};

}  // namespace
}  // namespace smi

#define SMI_PUBLIC extern "C" __attribute__((visibility("default")))

// The launcher `name` for numbers of `bytes` bytes, or nullptr.
SMI_PUBLIC void* smi_operator(const char* name, int32_t bytes) {
  for (const smi::Operator& entry : smi::OPERATORS)
    if (std::strcmp(entry.name, name) == 0) return bytes == 4 ? entry.of_float : entry.of_double;
  return nullptr;
}

SMI_PUBLIC const char* smi_error(int code) {
#ifdef SMI_EMULATE
  return code == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "no error";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}

// The sources that this was built from, as setup.py hashes them, and the compiler.
SMI_PUBLIC const char* smi_sources() { return SMI_SOURCES; }
SMI_PUBLIC const char* smi_compiler() { return SMI_COMPILER; }

// What Python finds here: a table of functions for float and double, and how this file was built.
//
// Arguments are pointers to contiguous memory (unless strides go with them), 64-bit integers, doubles and bools; shapes
// and indices were checked before. No PyTorch header is needed, so one library serves every version of it.
#include <cstring>

#include "attention.h"
#include "image.h"
#include "linear.h"
#include "tokens.h"

namespace smi {

ParallelFor parallel_for = nullptr;

}  // namespace smi

#define SMI_PUBLIC extern "C" __attribute__((visibility("default")))

namespace smi {
namespace {

// `F`, from which no exception gets out, but whether there was one: scratch memory is all that can fail.
template <auto F>
struct Guarded;

template <typename... Arguments, void (*F)(Arguments...)>
struct Guarded<F> {
  static int32_t call(Arguments... arguments) {
    try {
      F(arguments...);
      return 0;
    } catch (...) {
      return 1;
    }
  }
};

struct Operator {
  const char* name;
  void *of_float, *of_double;
};

#define SMI_OPERATOR(name) \
  {                                                                        \
    #name, reinterpret_cast<void*>(&Guarded<&name<float>>::call),          \
        reinterpret_cast<void*>(&Guarded<&name<double>>::call)             \
  }

const Operator OPERATORS[] = {
    SMI_OPERATOR(adam_clamp),
    SMI_OPERATOR(attention),
    SMI_OPERATOR(attention_dx),
    SMI_OPERATOR(attention_row),
    SMI_OPERATOR(class_attention),
    SMI_OPERATOR(class_attention_dx),
    SMI_OPERATOR(cross_entropy_head),
    SMI_OPERATOR(embed),
    SMI_OPERATOR(embed_dx),
    SMI_OPERATOR(gather_patches),
    SMI_OPERATOR(linear_dx),
    SMI_OPERATOR(linear_gelu_dx),
    SMI_OPERATOR(linear_residual),
    SMI_OPERATOR(norm_linear),
    SMI_OPERATOR(norm_linear_dx),
    SMI_OPERATOR(pixel_step),
    SMI_OPERATOR(prior_coefficients),
    SMI_OPERATOR(prior_sums),
    SMI_OPERATOR(prior_sums_dx),
    SMI_OPERATOR(scatter_patches),
    SMI_OPERATOR(select_tokens),
};

}  // namespace
}  // namespace smi

// The function `name` for numbers of `bytes` bytes, or nullptr.
SMI_PUBLIC void* smi_operator(const char* name, int32_t bytes) {
  for (const smi::Operator& entry : smi::OPERATORS)
    if (std::strcmp(entry.name, name) == 0) return bytes == 4 ? entry.of_float : entry.of_double;
  return nullptr;
}

SMI_PUBLIC void smi_use_threads(smi::ParallelFor parallel_for) { smi::parallel_for = parallel_for; }

SMI_PUBLIC void smi_map_cells(const int64_t* keep, const int64_t* offsets, bool one_for_all, int64_t* cells,
                              int64_t images, int64_t kept, const smi::Grid* grid) {
  smi::map_cells(keep, offsets, one_for_all, cells, images, kept, *grid);
}

// The sources that this was built from, as setup.py hashes them, and the compiler.
SMI_PUBLIC const char* smi_sources() { return SMI_SOURCES; }
SMI_PUBLIC const char* smi_compiler() { return SMI_COMPILER; }

// Threads and scratch memory. Threads are PyTorch's own, so that both together use as many as the user asked for.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

namespace smi {

using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// `torch_parallel_for` of libtorch's stable C interface, which Python hands over; nullptr runs on the calling thread.
extern ParallelFor parallel_for;

// body(begin, end) over parts of [0, count), none shorter than `grain` but the last.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& body) {
  if (count <= 0) return;
  if (parallel_for == nullptr || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  const int32_t failed = parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&body));
  if (failed != 0) throw std::bad_alloc();  // nothing else is thrown in a body
}

// `size` numbers that this thread keeps until it asks again for the same Slot.
template <typename T, int Slot>
T* scratch(int64_t size) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

}  // namespace smi

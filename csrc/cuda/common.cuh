// What the CUDA operators share: one door for launches, 16-byte memory accesses, and sums over a block.
//
// With SMI_EMULATE the same code is compiled for the host, by a compiler that knows nothing of CUDA.
#pragma once

#include <cstdint>

#ifdef SMI_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>
#endif

namespace smi {

#ifdef SMI_EMULATE
constexpr int THREADS = 64;  // two warps: the least that shows what one does not know of the other
#else
constexpr int THREADS = 256;
#endif
constexpr int SUM_PARTS = 8;  // threads that share one sum of a block

// Some numbers that one instruction loads or stores.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store(T* to, const Pack<T, V>& value) {
  *reinterpret_cast<Pack<T, V>*>(to) = value;
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Sums of N numbers over a block of THREADS threads, always added in one order; those with threadIdx.x < N get sum
// threadIdx.x. Rows are padded so that the threads of a warp read from different banks.
template <typename T, int N>
__device__ __forceinline__ T block_sums(const T (&mine)[N]) {
  constexpr int ROW = THREADS + SUM_PARTS;
  __shared__ T values[N * ROW];
  __shared__ T parts[N * SUM_PARTS];
#pragma unroll
  for (int k = 0; k < N; ++k) values[k * ROW + threadIdx.x] = mine[k];
  __syncthreads();
  for (int task = threadIdx.x; task < N * SUM_PARTS; task += THREADS) {
    const T* from = values + task / SUM_PARTS * ROW + task % SUM_PARTS;
    T sum = 0;
    for (int i = 0; i < THREADS; i += SUM_PARTS) sum += from[i];
    parts[task] = sum;
  }
  __syncthreads();
  T sum = 0;
  if (threadIdx.x < N) {
    const T* from = parts + threadIdx.x * SUM_PARTS;
#pragma unroll
    for (int i = 0; i < SUM_PARTS; ++i) sum += from[i];
  }
  return sum;
}

// Runs a kernel on `blocks` blocks; the error of the launch alone, for nothing here waits for the device.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks == 0) return 0;
  if (blocks > INT32_MAX) return static_cast<int>(cudaErrorInvalidConfiguration);
#ifdef SMI_EMULATE
  (void)stream;
  emulate::run(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
  return 0;
#else
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  return static_cast<int>(cudaGetLastError());
#endif
}

}  // namespace smi

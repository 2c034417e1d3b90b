// Token selection: a block for each image finds the lowest chosen score digit by digit, then compacts.
//
// Meaning and shapes: smi_kernels/token_select/reference.py. Scores are read from memory once for each digit of 8 bits
// and once more to compact; after the first time they come from a cache, as an image has a few kilobytes of them.
// Counts are integers, so that the order in which threads add makes no difference.
#pragma once

#include "common.cuh"

namespace smi {

constexpr int DIGITS = 256;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Integers in the order of scores: NaN highest, -0 as high as +0.
__device__ __forceinline__ uint32_t ordered(float score) {
  if (score != score) return UINT32_MAX;
  const uint32_t bits = score == 0 ? 0 : __float_as_uint(score), sign = 0x80000000u;
  return bits & sign ? ~bits : bits | sign;
}

__device__ __forceinline__ uint64_t ordered(double score) {
  if (score != score) return UINT64_MAX;
  const uint64_t bits = score == 0 ? 0 : static_cast<uint64_t>(__double_as_longlong(score)), sign = 1ull << 63;
  return bits & sign ? ~bits : bits | sign;
}

template <typename T>
__global__ void __launch_bounds__(1024)
    select_tokens_kernel(const T* scores, const int64_t* keep, int64_t* chosen, int kept, int count) {
  using Key = decltype(ordered(T{}));
  constexpr int BITS = 8 * sizeof(Key);
  __shared__ int histogram[DIGITS];
  __shared__ int digit_found, left_found;
  __shared__ int above_of_warp[32], ties_of_warp[32];

  const int64_t image = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32;
  const T* row = scores + image * kept;

  Key lowest = 0;    // of the chosen; digits found so far, zeros behind them
  int left = count;  // to be chosen among the scores that begin with these digits
  for (int shift = BITS - 8; shift >= 0; shift -= 8) {
    for (int i = thread; i < DIGITS; i += threads) histogram[i] = 0;
    __syncthreads();
    for (int i = thread; i < kept; i += threads) {
      const Key key = ordered(row[i]) ^ lowest;
      // Shifted twice, for a shift by all bits has no meaning.
      if ((key >> shift >> 8) == 0) atomicAdd(&histogram[static_cast<int>(((key ^ lowest) >> shift) & 255)], 1);
    }
    __syncthreads();
    if (warp == 0) {  // a lane has eight digits; lane 0 the highest
      int mine[8], total = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) total += mine[i] = histogram[DIGITS - 1 - 8 * lane - i];
      int upto = total;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(ALL_LANES, upto, distance);
        if (lane >= distance) upto += other;
      }
      int higher = upto - total;
      if (higher < left && left <= upto) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (higher < left && left <= higher + mine[i])
            digit_found = DIGITS - 1 - 8 * lane - i, left_found = left - higher;
          higher += mine[i];
        }
      }
    }
    __syncthreads();
    lowest |= static_cast<Key>(digit_found) << shift;
    left = left_found;
  }

  int above = 0, ties = 0;  // before the scores of this turn
  for (int first = 0; first < kept; first += threads) {
    const int i = first + thread;
    const Key key = i < kept ? ordered(row[i]) : 0;
    const bool is_above = i < kept && key > lowest, is_tie = i < kept && key == lowest;
    const unsigned lanes_above = __ballot_sync(ALL_LANES, is_above), lanes_tied = __ballot_sync(ALL_LANES, is_tie);
    if (lane == 0) above_of_warp[warp] = __popc(lanes_above), ties_of_warp[warp] = __popc(lanes_tied);
    __syncthreads();
    const unsigned before = (1u << lane) - 1;
    int above_here = above + __popc(lanes_above & before), ties_here = ties + __popc(lanes_tied & before);
    for (int w = 0; w < threads / 32; ++w) {
      if (w < warp) above_here += above_of_warp[w], ties_here += ties_of_warp[w];
      above += above_of_warp[w], ties += ties_of_warp[w];
    }
    if (is_above || (is_tie && ties_here < left))
      chosen[image * count + above_here + (ties_here < left ? ties_here : left)] = keep[image * kept + i];
    __syncthreads();  // until all have read the counts of this turn
  }
}

template <typename T>
int select_tokens(const T* scores, const int64_t* keep, int64_t* chosen, int64_t images, int64_t kept, int64_t count,
                  void* stream) {
  if (count == 0) return 0;
  const int threads = kept > 4 * THREADS ? 4 * THREADS : THREADS;
  return launch(select_tokens_kernel<T>, images, threads, stream, scores, keep, chosen, static_cast<int>(kept),
                static_cast<int>(count));
}

}  // namespace smi

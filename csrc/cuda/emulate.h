// As much of CUDA as the kernels here use, for the host: tests only. One thread stands for each thread of a block, and
// lives as long as the launch; blocks run one after the other. A race in shared memory is a data race, which
// ThreadSanitizer reports.
//
// What it cannot show: warps that run in step, caches, timing, and the machine code itself.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // of all threads, as blocks run one at a time; what the last block left is still there

enum cudaError { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

namespace emulate {

constexpr unsigned WARP = 32;

struct Index {
  unsigned x = 0;
};

struct Warp {
  std::barrier<> barrier{WARP};
  uint32_t slots[WARP];
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / WARP) {
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Index thread, block, size;
inline thread_local Block* here = nullptr;
inline bool barriers = true;  // false to see that their absence is noticed

inline Warp& warp() { return *here->warps[thread.x / WARP]; }

// What every lane of this warp gives, to `take`; all must come.
template <typename F>
auto exchange(uint32_t value, const F& take) {
  Warp& mine = warp();
  mine.slots[thread.x % WARP] = value;
  mine.barrier.arrive_and_wait();
  const auto taken = take(mine.slots);
  mine.barrier.arrive_and_wait();
  return taken;
}

inline void run(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  static std::mutex one_launch;  // shared memory is static
  const std::lock_guard<std::mutex> lock(one_launch);
  Block state(threads);
  std::vector<std::thread> team;
  for (unsigned i = 0; i < threads; ++i)
    team.emplace_back([&, i] {
      thread.x = i, size.x = threads, here = &state;
      for (block.x = 0; block.x < blocks; ++block.x) {
        body();
        state.barrier.arrive_and_wait();
      }
    });
  for (auto& one : team) one.join();
}

}  // namespace emulate

#define threadIdx emulate::thread
#define blockIdx emulate::block
#define blockDim emulate::size

inline void __syncthreads() {
  if (emulate::barriers) emulate::here->barrier.arrive_and_wait();
}

inline int atomicAdd(int* at, int value) { return std::atomic_ref<int>(*at).fetch_add(value, std::memory_order_relaxed); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulate::exchange(vote, [](const uint32_t* slots) {
    unsigned bits = 0;
    for (unsigned i = 0; i < emulate::WARP; ++i) bits |= slots[i] << i;
    return bits;
  });
}

inline int __shfl_up_sync(unsigned, int value, unsigned distance) {
  return emulate::exchange(static_cast<uint32_t>(value), [&](const uint32_t* slots) {
    const unsigned lane = emulate::thread.x % emulate::WARP;
    return static_cast<int>(slots[lane < distance ? lane : lane - distance]);
  });
}

template <typename To, typename From>
inline To bits_of(From value) {
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float value) { return bits_of<unsigned>(value); }
inline long long __double_as_longlong(double value) { return bits_of<long long>(value); }

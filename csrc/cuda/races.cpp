// Every kernel on the host under a sanitizer, with threads for threads: races in shared memory are data races here, and
// what lies beyond an array is not ours. With an argument barriers do nothing, which must be noticed.
#include "operators.cu"

#include <cstdio>

namespace {

template <typename T>
std::vector<T> numbers(int64_t count, uint32_t seed) {
  std::vector<T> made(count);
  for (auto& one : made) one = static_cast<T>((seed = seed * 1664525u + 1013904223u) >> 24) / 64 - 2;
  return made;
}

template <typename T>
void select(int64_t kept, int64_t count) {
  const auto scores = numbers<T>(2 * kept, 1);  // of 256 values: many are equal
  std::vector<int64_t> keep(2 * kept), chosen(2 * count);
  for (int64_t i = 0; i < 2 * kept; ++i) keep[i] = i % kept;
  smi::select_tokens<T>(scores.data(), keep.data(), chosen.data(), 2, kept, count, nullptr);
}

template <typename T>
void step(int64_t H, int64_t W, int64_t height, int64_t width, bool frozen, int64_t flip) {
  const int64_t B = 2, C = 2, cells = H / height * (W / width), kept = cells / 2, pixels = B * C * H * W;
  const auto images = numbers<T>(pixels, 1), d_patches = numbers<T>(B * kept * C * height * width, 2);
  const auto d_images = numbers<T>(pixels, 3);
  auto exp_avg = numbers<T>(pixels, 4), exp_avg_sq = std::vector<T>(pixels, T{1});
  std::vector<T> made(pixels), sums(B * C * H * 9), total(B * C * 9);
  const std::vector<T> coefficients(B * 9, T{1}), correction(2, T{1}), low(C, T{-1}), high(C, T{1});
  const std::vector<int64_t> offsets = {-H - 1, 3, flip, 2 * H + 5, -W - 2, 1 - flip};
  std::vector<int32_t> slots(B * cells);
  for (int64_t i = 0; i < B * cells; ++i) slots[i] = static_cast<int32_t>(i % cells % 2 ? i % cells / 2 : -1);
  int64_t done = 0;
  smi::pixel_step<T>(images.data(), exp_avg.data(), exp_avg_sq.data(), d_patches.data(), d_images.data(), slots.data(),
                     offsets.data(), false, coefficients.data(), 1, correction.data(), 0.1, 0.5, 0.9, 1e-8, low.data(),
                     high.data(), frozen, made.data(), sums.data(), B, C, kept, H, W, height, width, nullptr);
  smi::finish_prior_sums<T>(made.data(), sums.data(), &done, total.data(), B * C, H, W, nullptr);
}

}  // namespace

int main(int arguments, char**) {
  emulate::barriers = arguments == 1;
  select<float>(300, 77);
  select<double>(65, 64);
  select<float>(1, 1);
  select<float>(4 * smi::THREADS + 1, 100);  // in more threads
  step<float>(36, 24, 6, 8, true, 0);
  step<float>(36, 24, 12, 6, false, 1);
  step<double>(18, 15, 6, 5, true, 1);
  std::puts("ran");
}

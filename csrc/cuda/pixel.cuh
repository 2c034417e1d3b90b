// The pixel step in one pass, and the end of its prior sums.
//
// Meaning and shapes: smi_kernels/pixel_update/reference.py. A block steps TILE_ROWS rows of one channel and takes the
// sums of what it wrote, which its caches still hold; differences between two tiles are left to `finish_prior_sums`,
// since no block may wait for another. New images go to memory of their own, because neighbours need the old ones.
#pragma once

#include "common.cuh"

namespace smi {

constexpr int TILE_ROWS = 16;  // as in smi_kernels/pixel_update/traffic.py

// Kernel arguments; sizes in pixels, `columns` and `rows` in patches.
template <typename T>
struct PixelStep {
  const T *images, *d_patches, *d_images;
  const int32_t* slots;
  const int64_t* offsets;
  const T *coefficients, *bias_correction, *low, *high;
  T *exp_avg, *exp_avg_sq, *new_images, *sums;
  T lr, take1, keep2, take2, eps;
  int64_t offsets_row, kept;
  int group, C, H, W, height, width, rows, columns;
  bool frozen;
};

__device__ __forceinline__ int modulo(int64_t a, int n) {
  const int64_t rest = a % n;
  return static_cast<int>(rest < 0 ? rest + n : rest);
}

// `a` in [0, 2 n) without a division.
__device__ __forceinline__ int wrap(int a, int n) { return a < n ? a : a - n; }

// An offset in whole patches, rounded half up, in [0, patches).
__device__ __forceinline__ int whole_patches(int64_t offset, int patch, int patches) {
  const int rest = modulo(offset, patch);
  return modulo((offset - rest) / patch + (2 * rest >= patch ? 1 : 0), patches);
}

// Slope of square * d^2 / 2 + magnitude * |d|.
template <typename T>
__device__ __forceinline__ T slope(T square, T magnitude, T d) {
  return square * d + (d > 0 ? magnitude : (d < 0 ? -magnitude : T{0}));
}

// V pixels of a row and the one on either side; beyond the row 0.
template <typename T, int V>
struct Strip {
  T at[V + 2];
  __device__ __forceinline__ Strip(const T* row, int x, int W) {
    const Pack<T, V> middle = load<T, V>(row + x);
    at[0] = x > 0 ? row[x - 1] : T{0};
#pragma unroll
    for (int j = 0; j < V; ++j) at[j + 1] = middle.at[j];
    at[V + 1] = x + V < W ? row[x + V] : T{0};
  }
};

// Gradient of the patches with respect to the pixels x .. x + V of row y. `dy`, `dx` are in [0, H) and [0, W).
template <typename T, int V>
struct PatchGradient {
  const T* d_patches;    // of this image and channel
  const int32_t* slots;  // of this image, or nullptr
  int64_t patch_stride;
  int dy, dx, shift_y, shift_x;
  bool flip;

  __device__ __forceinline__ int slot(const PixelStep<T>& a, int row, int column) const {
    if (slots == nullptr) return row * a.columns + column;
    if (flip) column = a.columns - 1 - column;
    row = wrap(row - shift_y + a.rows, a.rows);
    column = wrap(column - shift_x + a.columns, a.columns);
    return slots[row * a.columns + column];
  }

  __device__ __forceinline__ void read(const PixelStep<T>& a, int y, int x, T (&to)[V]) const {
    const int read_y = wrap(y + dy, a.H), row = read_y / a.height;
    const T* line = d_patches + (read_y - row * a.height) * a.width;
    int read_x = wrap(x + dx, a.W);
    if (flip) read_x = a.W - 1 - read_x;
    const int column = read_x / a.width, px = read_x - column * a.width, last = flip ? px - (V - 1) : px + (V - 1);
    if (last >= 0 && last < a.width) {  // one patch holds them all
      const int place = slot(a, row, column);
      const T* from = line + place * patch_stride + (flip ? last : px);
      if (place < 0) {
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = 0;
      } else if (V > 1 && reinterpret_cast<uintptr_t>(from) % (V * sizeof(T)) == 0) {
        const Pack<T, V> run = load<T, V>(from);
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = flip ? run.at[V - 1 - j] : run.at[j];
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) to[j] = from[flip ? V - 1 - j : j];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      int at = wrap(x + j + dx, a.W);
      if (flip) at = a.W - 1 - at;
      const int of = at / a.width, place = slot(a, row, of);
      to[j] = place < 0 ? T{0} : line[place * patch_stride + at - of * a.width];
    }
  }
};

// The nine sums over V pixels of row y, with differences to the row below if there is `down`.
template <typename T, int V, typename Row>
__device__ __forceinline__ void add_sums(const Row& here, const Row& below, bool beside, bool down, int x, int W,
                                         T (&sums)[9]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const T value = here.at[j + 1];
    const bool last = x + j + 1 >= W, first = x + j == 0;
    const T differences[4] = {beside && !last ? here.at[j + 2] - value : T{0}, down ? below.at[j + 1] - value : T{0},
                              down && !first ? below.at[j] - value : T{0},
                              down && !last ? below.at[j + 2] - value : T{0}};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[k] += differences[k] * differences[k];
      sums[4 + k] += differences[k] < 0 ? -differences[k] : differences[k];
    }
    if (beside) sums[8] += value * value;
  }
}

// At least so many blocks to a multiprocessor, as its registers allow without spills: loads of some hide behind others.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 4 ? 3 : 2;

template <typename T, int V>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) pixel_step_kernel(const PixelStep<T> a) {
  const int tiles = (a.H + TILE_ROWS - 1) / TILE_ROWS, vectors = a.W / V;
  const int64_t plane = blockIdx.x / tiles;
  const int top = static_cast<int>(blockIdx.x % tiles) * TILE_ROWS;
  const int bottom = top + TILE_ROWS < a.H ? top + TILE_ROWS : a.H;
  const int64_t image = plane / a.C, start = plane * a.H * a.W;
  const int channel = static_cast<int>(plane % a.C);

  PatchGradient<T, V> patches{};
  const int64_t patch = static_cast<int64_t>(a.height) * a.width;
  patches.d_patches = a.d_patches + (image * a.kept * a.C + channel) * patch;
  patches.patch_stride = a.C * patch;
  if (a.slots != nullptr) patches.slots = a.slots + image * a.rows * a.columns;
  if (a.offsets != nullptr) {
    const int64_t* offsets = a.offsets + image * a.offsets_row;
    const int64_t dy = offsets[0], dx = offsets[1];
    patches.dy = modulo(dy, a.H), patches.dx = modulo(dx, a.W), patches.flip = offsets[2] != 0;
    patches.shift_y = whole_patches(dy, a.height, a.rows), patches.shift_x = whole_patches(dx, a.width, a.columns);
  }
  T square[4], magnitude[4];
  const T* coefficients = a.coefficients + image / a.group * 9;
#pragma unroll
  for (int k = 0; k < 4; ++k) square[k] = 2 * coefficients[k], magnitude[k] = coefficients[4 + k];
  const T pixel = 2 * coefficients[8];
  const T rate = a.lr / a.bias_correction[0], root = a.bias_correction[1];
  const T low = a.low[channel], high = a.high[channel];

  const int items = (bottom - top) * vectors;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += THREADS) {
    const int y = top + item / vectors, x = item % vectors * V;
    const int64_t at = start + static_cast<int64_t>(y) * a.W;
    const T* row = a.images + at;
    if (a.frozen && patches.slots[y / a.height * a.columns + x / a.width] < 0) {
      store<T, V>(a.new_images + at + x, load<T, V>(row + x));
      continue;
    }
    T gradient[V];
    patches.read(a, y, x, gradient);
    if (a.d_images != nullptr) {
      const Pack<T, V> direct = load<T, V>(a.d_images + at + x);
#pragma unroll
      for (int j = 0; j < V; ++j) gradient[j] += direct.at[j];
    }
    Pack<T, V> first = load<T, V>(a.exp_avg + at + x), second = load<T, V>(a.exp_avg_sq + at + x), made;
    const bool has_above = y > 0, has_below = y + 1 < a.H;
    const Strip<T, V> here(row, x, a.W), above(has_above ? row - a.W : row, x, a.W);
    const Strip<T, V> below(has_below ? row + a.W : row, x, a.W);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const T value = here.at[j + 1];
      const bool left = x + j > 0, right = x + j + 1 < a.W;
      const T ends[8] = {here.at[j],  here.at[j + 2],  above.at[j + 1], below.at[j + 1],
                         below.at[j], above.at[j + 2], below.at[j + 2], above.at[j]};
      const bool inside[8] = {left,
                              right,
                              has_above,
                              has_below,
                              has_below && left,
                              has_above && right,
                              has_below && right,
                              has_above && left};
      T slopes = 0;
#pragma unroll
      for (int k = 0; k < 8; ++k)
        slopes += slope(square[k / 2], magnitude[k / 2], inside[k] ? value - ends[k] : T{0});
      const T g = gradient[j] + slopes + pixel * value;
      first.at[j] += (g - first.at[j]) * a.take1;
      second.at[j] = second.at[j] * a.keep2 + g * g * a.take2;
      T next = value - rate * first.at[j] / (sqrt(second.at[j]) / root + a.eps);
      next = next < low ? low : next;  // NaN stays
      made.at[j] = next > high ? high : next;
    }
    store<T, V>(a.new_images + at + x, made);
    store<T, V>(a.exp_avg + at + x, first);
    store<T, V>(a.exp_avg_sq + at + x, second);
  }

  __syncthreads();  // the sums read what other threads of this block wrote, and nothing of another's
  T sums[9] = {};
  for (int item = static_cast<int>(threadIdx.x); item < items; item += THREADS) {
    const int y = top + item / vectors, x = item % vectors * V;
    const T* row = a.new_images + start + static_cast<int64_t>(y) * a.W;
    const bool down = y + 1 < bottom;
    const Strip<T, V> here(row, x, a.W), below(down ? row + a.W : row, x, a.W);
    add_sums<T, V>(here, below, true, down, x, a.W, sums);
  }
  const T sum = block_sums(sums);
  T* to = a.sums + (plane * a.H + top) * 9;
  const int rest = (bottom - top) * 9;
  if (threadIdx.x < 9) to[threadIdx.x] = sum;
  for (int i = 9 + static_cast<int>(threadIdx.x); i < rest; i += THREADS) to[i] = 0;
}

// The sums of the tiles of a plane, and of the differences between them.
template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
    finish_prior_sums_kernel(const T* images, const T* tile_sums, int64_t* step, T* to, int H, int W) {
  const int tiles = (H + TILE_ROWS - 1) / TILE_ROWS, vectors = W / V;
  const int64_t plane = blockIdx.x, start = plane * H * W;
  T sums[9] = {};
  for (int tile = static_cast<int>(threadIdx.x); tile < tiles; tile += THREADS) {
    const T* from = tile_sums + (plane * H + static_cast<int64_t>(tile) * TILE_ROWS) * 9;
#pragma unroll
    for (int k = 0; k < 9; ++k) sums[k] += from[k];
  }
  const int64_t items = static_cast<int64_t>(tiles - 1) * vectors;
  for (int64_t item = threadIdx.x; item < items; item += THREADS) {
    const int64_t y = (item / vectors + 1) * TILE_ROWS - 1;
    const int x = static_cast<int>(item % vectors) * V;
    const T* row = images + start + y * W;
    const Strip<T, V> here(row, x, W), below(row + W, x, W);
    add_sums<T, V>(here, below, false, true, x, W, sums);
  }
  const T sum = block_sums(sums);
  if (threadIdx.x < 9) to[plane * 9 + threadIdx.x] = sum;
  if (step != nullptr && plane == 0 && threadIdx.x == 0) *step += 1;
}

template <typename T>
int pixel_step(const T* images, T* exp_avg, T* exp_avg_sq, const T* d_patches, const T* d_images, const int32_t* slots,
               const int64_t* offsets, bool one_for_all, const T* coefficients, int64_t group,
               const T* bias_correction, double lr, double beta1, double beta2, double eps, const T* low,
               const T* high, bool frozen, T* new_images, T* sums, int64_t count, int64_t channels, int64_t kept,
               int64_t H, int64_t W, int64_t height, int64_t width, void* stream) {
  constexpr int V = 16 / sizeof(T);
  if (count * channels * H * W == 0) return 0;
  PixelStep<T> a{};
  a.images = images, a.d_patches = d_patches, a.d_images = d_images, a.slots = slots, a.offsets = offsets;
  a.coefficients = coefficients, a.bias_correction = bias_correction, a.low = low, a.high = high;
  a.exp_avg = exp_avg, a.exp_avg_sq = exp_avg_sq, a.new_images = new_images, a.sums = sums;
  a.lr = static_cast<T>(lr), a.eps = static_cast<T>(eps);
  a.take1 = static_cast<T>(1 - beta1), a.keep2 = static_cast<T>(beta2), a.take2 = static_cast<T>(1 - beta2);
  a.offsets_row = one_for_all ? 0 : 3, a.kept = kept;
  a.group = static_cast<int>(group), a.C = static_cast<int>(channels);
  a.H = static_cast<int>(H), a.W = static_cast<int>(W);
  a.height = static_cast<int>(height), a.width = static_cast<int>(width);
  a.rows = a.H / a.height, a.columns = a.W / a.width;
  a.frozen = frozen && slots != nullptr;
  // Vectors must not straddle two patches of which one is frozen.
  const bool wide = W % V == 0 && (!a.frozen || width % V == 0) && aligned(images) && aligned(exp_avg) &&
                    aligned(exp_avg_sq) && aligned(new_images) && aligned(d_images);
  const int64_t blocks = count * channels * ((H + TILE_ROWS - 1) / TILE_ROWS);
  return launch(wide ? pixel_step_kernel<T, V> : pixel_step_kernel<T, 1>, blocks, THREADS, stream, a);
}

template <typename T>
int finish_prior_sums(const T* images, const T* row_sums, int64_t* step, T* sums, int64_t planes, int64_t H, int64_t W,
                      void* stream) {
  constexpr int V = 16 / sizeof(T);
  if (planes * H * W == 0) return 0;
  const auto kernel = W % V == 0 && aligned(images) ? finish_prior_sums_kernel<T, V> : finish_prior_sums_kernel<T, 1>;
  return launch(kernel, planes, THREADS, stream, images, row_sums, step, sums, static_cast<int>(H),
                static_cast<int>(W));
}

}  // namespace smi

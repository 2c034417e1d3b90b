// Image priors and the pixel update: everything that an iteration does to pixels, in one pass over them.
//
// Meanings and shapes: smi_kernels/image_prior/reference.py and smi_kernels/pixel_update/reference.py. The nine sums of
// a plane are: squares of the right, down, down-left and down-right differences, their absolute values, squares of
// the pixels.
#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "patches.h"

namespace smi {

constexpr int64_t BAND = 32;  // rows of a plane that one thread does at a time

// Gradient of the nine sums, weighted by `weights`, at pixels of one row; rows that do not exist are nullptr.
template <typename T>
struct Prior {
  T square[4], absolute[4], pixel;
  bool any_absolute = false;

  explicit Prior(const T* weights) : pixel(2 * weights[8]) {
    for (int k = 0; k < 4; ++k) {
      square[k] = 2 * weights[k], absolute[k] = weights[4 + k];
      any_absolute = any_absolute || !(absolute[k] == 0);
    }
  }

  template <bool ABSOLUTE>
  T slope(int k, T difference) const {
    T value = square[k] * difference;
    if (ABSOLUTE) value += difference > 0 ? absolute[k] : (difference < 0 ? -absolute[k] : T{0});
    return value;
  }

  // One pixel, wherever it lies.
  T at(const T* above, const T* row, const T* below, int64_t x, int64_t W) const {
    const T p = row[x];
    T sum = pixel * p;
    const bool left = x > 0, right = x + 1 < W;
    if (left) sum += slope<true>(0, p - row[x - 1]);
    if (right) sum += slope<true>(0, p - row[x + 1]);
    if (above != nullptr) {
      sum += slope<true>(1, p - above[x]);
      if (right) sum += slope<true>(2, p - above[x + 1]);
      if (left) sum += slope<true>(3, p - above[x - 1]);
    }
    if (below != nullptr) {
      sum += slope<true>(1, p - below[x]);
      if (left) sum += slope<true>(2, p - below[x - 1]);
      if (right) sum += slope<true>(3, p - below[x + 1]);
    }
    return sum;
  }

  // Added to gradient[begin .. end), with 1 <= begin and end < W.
  template <bool ABSOLUTE, bool ABOVE, bool BELOW>
  void inside(const T* above, const T* row, const T* below, int64_t begin, int64_t end, T* gradient) const {
    const Prior prior = *this;
#pragma omp simd
    for (int64_t x = begin; x < end; ++x) {
      const T p = row[x];
      T sum = prior.pixel * p + prior.template slope<ABSOLUTE>(0, p - row[x - 1]) +
              prior.template slope<ABSOLUTE>(0, p - row[x + 1]);
      if (ABOVE)
        sum += prior.template slope<ABSOLUTE>(1, p - above[x]) + prior.template slope<ABSOLUTE>(2, p - above[x + 1]) +
               prior.template slope<ABSOLUTE>(3, p - above[x - 1]);
      if (BELOW)
        sum += prior.template slope<ABSOLUTE>(1, p - below[x]) + prior.template slope<ABSOLUTE>(2, p - below[x - 1]) +
               prior.template slope<ABSOLUTE>(3, p - below[x + 1]);
      gradient[x] += sum;
    }
  }

  // Added to gradient[begin .. end).
  void add(const T* above, const T* row, const T* below, int64_t W, int64_t begin, int64_t end, T* gradient) const {
    if (begin == 0) gradient[0] += at(above, row, below, 0, W);
    if (end == W && W > 1) gradient[W - 1] += at(above, row, below, W - 1, W);
    begin = std::max(begin, int64_t{1}), end = std::min(end, W - 1);
    if (any_absolute)
      dispatch<true>(above, row, below, begin, end, gradient);
    else
      dispatch<false>(above, row, below, begin, end, gradient);
  }

 private:
  template <bool ABSOLUTE>
  void dispatch(const T* above, const T* row, const T* below, int64_t begin, int64_t end, T* gradient) const {
    if (above != nullptr && below != nullptr)
      inside<ABSOLUTE, true, true>(above, row, below, begin, end, gradient);
    else if (above != nullptr)
      inside<ABSOLUTE, true, false>(above, row, below, begin, end, gradient);
    else if (below != nullptr)
      inside<ABSOLUTE, false, true>(above, row, below, begin, end, gradient);
    else
      inside<ABSOLUTE, false, false>(above, row, below, begin, end, gradient);
  }
};

// The nine sums over one row, differences to the row below included; no row below is nullptr.
template <typename T>
inline void row_sums(const T* row, const T* below, int64_t W, T* sums) {
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0, a0 = 0, a1 = 0, a2 = 0, a3 = 0, p = 0;
  if (below != nullptr) {
#pragma omp simd reduction(+ : s0, s1, s2, s3, a0, a1, a2, a3, p)
    for (int64_t x = 0; x < W - 1; ++x) {
      const T right = row[x + 1] - row[x], down = below[x] - row[x];
      const T left = below[x] - row[x + 1], diagonal = below[x + 1] - row[x];
      s0 += right * right, s1 += down * down, s2 += left * left, s3 += diagonal * diagonal;
      a0 += std::abs(right), a1 += std::abs(down), a2 += std::abs(left), a3 += std::abs(diagonal);
      p += row[x] * row[x];
    }
    const T down = below[W - 1] - row[W - 1];
    s1 += down * down, a1 += std::abs(down);
  } else {
#pragma omp simd reduction(+ : s0, a0, p)
    for (int64_t x = 0; x < W - 1; ++x) {
      const T right = row[x + 1] - row[x];
      s0 += right * right, a0 += std::abs(right), p += row[x] * row[x];
    }
  }
  p += row[W - 1] * row[W - 1];
  const T all[9] = {s0, s1, s2, s3, a0, a1, a2, a3, p};
  std::copy(all, all + 9, sums);
}

// (planes, 9).
template <typename T>
void prior_sums(const T* images, T* sums, int64_t planes, int64_t H, int64_t W) {
  parallel(planes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      double total[9] = {};
      for (int64_t y = 0; y < H; ++y) {
        const T* row = images + (plane * H + y) * W;
        T of_row[9];
        row_sums(row, y + 1 < H ? row + W : nullptr, W, of_row);
        for (int k = 0; k < 9; ++k) total[k] += of_row[k];
      }
      for (int k = 0; k < 9; ++k) sums[plane * 9 + k] = static_cast<T>(total[k]);
    }
  });
}

template <typename T>
void prior_sums_dx(const T* images, const T* d_sums, T* d_images, int64_t planes, int64_t H, int64_t W) {
  parallel(planes * H, BAND, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / H, y = task % H;
      const T* row = images + task * W;
      T* to = d_images + task * W;
      std::fill(to, to + W, T{0});
      Prior<T>(d_sums + plane * 9).add(y > 0 ? row - W : nullptr, row, y + 1 < H ? row + W : nullptr, W, 0, W, to);
    }
  });
}

// The nine sums of (B, C, 9), float64 throughout: values (G, 3) of the priors of groups of images, and the gradient
// (G, 9) of their weighted sum with respect to the sums. `values` may be nullptr.
template <typename T>
void prior_coefficients(const T* sums, double tv1, double tv2, double l2, int64_t group, int64_t H, int64_t W,
                        T* values, T* coefficients, int64_t images, int64_t channels) {
  for (int64_t first = 0, g = 0; first < images; first += group, ++g) {
    const int64_t count = std::min(group, images - first) * channels;
    double total[9] = {};
    for (int64_t plane = first * channels; plane < first * channels + count; ++plane)
      for (int k = 0; k < 9; ++k) total[k] += sums[plane * 9 + k];
    const int64_t beside = H * (W - 1), below = (H - 1) * W, diagonal = (H - 1) * (W - 1);
    const int64_t differences[4] = {beside, below, diagonal, diagonal};
    double l1 = 0, frobenius = 0;
    T* to = coefficients + g * 9;
    for (int k = 0; k < 4; ++k) {
      const double n = static_cast<double>(std::max(count * differences[k], int64_t{1})), norm = std::sqrt(total[k]);
      l1 += total[4 + k] / n;
      frobenius += norm;
      to[k] = static_cast<T>(norm == 0 ? 0 : tv2 * 0.5 / norm);
      to[4 + k] = static_cast<T>(tv1 / n);
    }
    const double norm = std::sqrt(total[8]);
    to[8] = static_cast<T>(norm == 0 ? 0 : l2 * 0.5 / norm);
    if (values == nullptr) continue;
    values[g * 3] = static_cast<T>(l1), values[g * 3 + 1] = static_cast<T>(frobenius);
    values[g * 3 + 2] = static_cast<T>(norm);
  }
}

template <typename T>
struct Adam {
  T rate, keep1, take1, keep2, take2, eps, root;

  // `rate` is the learning rate over the first moment's bias correction, `root` corrects the root of the second.
  Adam(T rate, double beta1, double beta2, double eps, T root)
      : rate(rate),
        keep1(static_cast<T>(beta1)),
        take1(static_cast<T>(1 - beta1)),
        keep2(static_cast<T>(beta2)),
        take2(static_cast<T>(1 - beta2)),
        eps(static_cast<T>(eps)),
        root(root) {}

  void step(const T* x, const T* gradient, T* m, T* v, T low, T high, int64_t begin, int64_t end, T* to) const {
    const Adam a = *this;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const T g = gradient[i];
      const T first = a.keep1 * m[i] + a.take1 * g;
      const T second = a.keep2 * v[i] + a.take2 * g * g;
      m[i] = first, v[i] = second;
      T value = x[i] - a.rate * first / (std::sqrt(second) / a.root + a.eps);
      value = value < low ? low : value;  // NaN stays
      to[i] = value > high ? high : value;
    }
  }
};

// visit(begin, end, live) over runs of a row of pixels in live and in dropped patches; `slots` of the row's patches.
template <typename F>
inline void for_live(const int32_t* slots, const Grid& g, const F& visit) {
  for (int64_t first = 0; first < g.columns();) {
    const bool live = slots == nullptr || slots[first] >= 0;
    int64_t last = first + 1;
    while (last < g.columns() && (slots == nullptr || slots[last] >= 0) == live) ++last;
    visit(first * g.width, last * g.width, live);
    first = last;
  }
}

// Arguments as in the reference; `d_images` (B, C, H, W) or nullptr is added to the gradient of every pixel.
template <typename T>
void pixel_step(const T* images, T* exp_avg, T* exp_avg_sq, const T* d_patches, const T* d_images,
                const int32_t* slots, const int64_t* offsets, bool one_for_all, const T* coefficients, int64_t group,
                const T* bias_correction, double lr, double beta1, double beta2, double eps, const T* low,
                const T* high, bool frozen, T* new_images, T* sums, int64_t count, int64_t channels, int64_t kept,
                const Grid& g) {
  const int64_t H = g.H, W = g.W, bands = (H + BAND - 1) / BAND, cells = g.rows() * g.columns();
  const Adam<T> adam(static_cast<T>(lr) / bias_correction[0], beta1, beta2, eps, bias_correction[1]);
  parallel(count * channels * bands, 1, [&](int64_t begin, int64_t end) {
    T* gradient = scratch<T, 12>(W);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, image = plane / channels, c = plane % channels;
      const int64_t top = task % bands * BAND, bottom = std::min(H, top + BAND);
      const Augmentation a(offsets, one_for_all, image);
      const Prior<T> prior(coefficients + image / group * 9);
      const int32_t* of_image = slots == nullptr ? nullptr : slots + image * cells;
      for (int64_t y = top; y < bottom; ++y) {
        const int64_t start = (plane * H + y) * W;
        const T* row = images + start;
        if (d_images == nullptr)
          std::fill(gradient, gradient + W, T{0});
        else
          std::copy(d_images + start, d_images + start + W, gradient);

        const int64_t augmented = a.augmented_y(y, g), line = augmented % g.height;
        for (int64_t column = 0; column < g.columns(); ++column) {
          const int64_t cell = augmented / g.height * g.columns() + column;  // all are fed in their order
          const int64_t slot = of_image == nullptr ? cell : of_image[a.patch(augmented / g.height, column, g)];
          if (slot < 0) continue;
          const int64_t from = ((image * kept + slot) * channels + c) * g.height + line;
          add_row(d_patches + from * g.width, a, column * g.width, g.width, g, gradient);
        }

        for_live(frozen && of_image != nullptr ? of_image + y / g.height * g.columns() : nullptr, g,
                 [&](int64_t first, int64_t last, bool live) {
                   if (!live) {
                     std::copy(row + first, row + last, new_images + start + first);
                     return;
                   }
                   prior.add(y > 0 ? row - W : nullptr, row, y + 1 < H ? row + W : nullptr, W, first, last, gradient);
                   adam.step(row, gradient, exp_avg + start, exp_avg_sq + start, low[c], high[c], first, last,
                             new_images + start);
                 });
        if (y > top) row_sums(new_images + start - W, new_images + start, W, sums + (plane * H + y - 1) * 9);
      }
    }
  });
  parallel(count * channels * bands, 8, [&](int64_t begin, int64_t end) {  // rows whose next is another band's
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, y = std::min(H, (task % bands + 1) * BAND) - 1;
      const T* row = new_images + (plane * H + y) * W;
      row_sums(row, y + 1 < H ? row + W : nullptr, W, sums + (plane * H + y) * 9);
    }
  });
}

// In place; `live` (B, H, W) or nullptr.
template <typename T>
void adam_clamp(T* images, const T* grad, T* exp_avg, T* exp_avg_sq, double step, double lr, double beta1, double beta2,
                double eps, const T* low, const T* high, const uint8_t* live, int64_t count, int64_t channels,
                int64_t H, int64_t W) {
  const Adam<T> adam(static_cast<T>(lr / (1 - std::pow(beta1, step))), beta1, beta2, eps,
                     static_cast<T>(std::sqrt(1 - std::pow(beta2, step))));
  parallel(count * channels * H, BAND, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / H, c = plane % channels, start = task * W;
      const uint8_t* mask = live == nullptr ? nullptr : live + (plane / channels * H + task % H) * W;
      T* row = images + start;
      for (int64_t first = 0; first < W;) {
        int64_t last = mask == nullptr ? W : first + 1;
        while (last < W && (mask[last] != 0) == (mask[first] != 0)) ++last;
        if (mask == nullptr || mask[first] != 0)
          adam.step(row, grad + start, exp_avg + start, exp_avg_sq + start, low[c], high[c], first, last, row);
        first = last;
      }
    }
  });
}

}  // namespace smi

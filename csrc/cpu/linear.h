// Linear layers of a frozen network, forward and input gradient, with all that surrounds them done while a product is
// still in the cache: LayerNorm folded into weight and bias, GELU, residual sums, row statistics.
//
// Meanings and shapes: smi_kernels/linear/reference.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "matmul.h"
#include "parallel.h"

namespace smi {

constexpr int64_t PANEL = 64;        // columns that are done together; as wide as a chunk of row statistics
constexpr int64_t ROWS = 48;         // rows of a task
constexpr int64_t DEPTH = 512;       // terms of the sum between two visits of C

// The columns first .. first + columns of B (k, n) as (k, PANEL), with zeros behind them.
// TRANSPOSED: B is given as its transpose (n, k).
template <typename T, bool TRANSPOSED>
void pack_panel(const T* weight, int64_t row, int64_t k, int64_t first, int64_t columns, T* panel) {
  if (columns < PANEL) std::fill(panel, panel + k * PANEL, T{0});
  if constexpr (TRANSPOSED) {
    constexpr int64_t block = 16;  // both sides of the transposition stay in the first-level cache
    for (int64_t i = 0; i < k; i += block) {
      const int64_t end = std::min(k, i + block);
      for (int64_t j = 0; j < columns; ++j) {
        const T* from = weight + (first + j) * row;
        for (int64_t l = i; l < end; ++l) panel[l * PANEL + j] = from[l];
      }
    }
  } else {
    for (int64_t i = 0; i < k; ++i)
      std::copy(weight + i * row + first, weight + i * row + first + columns, panel + i * PANEL);
  }
}

// C = A B for A (m, k) and B (k, n), handed to `finish(row, first, columns, values)` a row of a panel at a time.
template <typename T, bool TRANSPOSED, typename Finish>
void linear(const T* a, int64_t a_row, const T* weight, int64_t weight_row, int64_t m, int64_t n, int64_t k,
            const Finish& finish) {
  const int64_t panels = (n + PANEL - 1) / PANEL, blocks = (m + ROWS - 1) / ROWS;
  parallel(panels * blocks, 1, [&](int64_t begin, int64_t end) {
    T* panel = scratch<T, 0>(k * PANEL);
    T* c = scratch<T, 1>(ROWS * PANEL);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / blocks * PANEL, columns = std::min(PANEL, n - first);
      if (packed != first) pack_panel<T, TRANSPOSED>(weight, weight_row, k, first, columns, panel);
      packed = first;
      const int64_t top = task % blocks * ROWS, rows = std::min(ROWS, m - top);
      for (int64_t i = 0; i < k; i += DEPTH)
        product(a + top * a_row + i, a_row, 1, panel + i * PANEL, PANEL, c, PANEL, rows, padded<T>(columns),
                std::min(DEPTH, k - i), i > 0);
      for (int64_t r = 0; r < rows; ++r) finish(top + r, first, columns, c + r * PANEL);
    }
  });
}

// Mean and sum of squared deviations.
template <typename T>
inline void chunk_statistics(const T* x, int64_t columns, T* stats) {
  T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) sum += x[j];
  const T mean = sum / static_cast<T>(columns);
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < columns; ++j) squares += (x[j] - mean) * (x[j] - mean);
  stats[0] = mean;
  stats[1] = squares;
}

// Statistics of the chunks of a row, all but the last 64 wide, to mean and 1 / standard deviation.
template <typename T>
inline void row_moments(const T* stats, int64_t chunks, int64_t width, double eps, T* moments) {
  T mean = 0, squares = 0;
  for (int64_t i = 0; i < chunks; ++i) mean += stats[2 * i] * static_cast<T>(std::min(PANEL, width - i * PANEL));
  mean /= static_cast<T>(width);
  for (int64_t i = 0; i < chunks; ++i) {
    const T away = stats[2 * i] - mean;
    squares += stats[2 * i + 1] + away * away * static_cast<T>(std::min(PANEL, width - i * PANEL));
  }
  moments[0] = mean;
  moments[1] = 1 / std::sqrt(squares / static_cast<T>(width) + static_cast<T>(eps));
}

template <typename T>
void all_moments(const T* stats, int64_t stats_row, int64_t m, int64_t chunks, int64_t width, double eps, T* moments) {
  for (int64_t i = 0; i < m; ++i) row_moments(stats + i * stats_row, chunks, width, eps, moments + 2 * i);
}

// The factor of u in GELU and its slope: Phi for ERF, else the logistic function of a u (1 + b u^2).
enum Gelu : int64_t { ERF, TANH, SIGMOID };

template <typename T, Gelu KIND>
inline Normal<T> gelu_factor(T u) {
  if constexpr (KIND == ERF) return normal(u);
  constexpr T a = KIND == TANH ? T(1.5957691216057308) : T(1.702), b = KIND == TANH ? T(0.044715) : T(0);
  const T below = 1 / (1 + exponential(-a * u * (1 + b * u * u)));
  return {below, below * (1 - below) * a * (1 + 3 * b * u * u)};
}

template <typename T, Gelu KIND>
inline void gelu(const T* u, int64_t columns, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) out[j] = u[j] * gelu_factor<T, KIND>(u[j]).below;
}

// Of d, the gradient of the activation: that of u, and its products with `sums` and with u - b.
template <typename T, Gelu KIND>
inline void gelu_dx(const T* d, const T* u, const T* sums, const T* b, int64_t columns, T* out, T* products) {
  T of_colsum = 0, of_u = 0;
#pragma omp simd reduction(+ : of_colsum, of_u)
  for (int64_t j = 0; j < columns; ++j) {
    const Normal<T> at = gelu_factor<T, KIND>(u[j]);
    const T du = d[j] * (at.below + u[j] * at.density);
    out[j] = du;
    of_colsum += du * sums[j];
    of_u += du * (u[j] - b[j]);
  }
  products[0] = of_colsum;
  products[1] = of_u;
}

template <typename T>
void norm_linear(const T* x, int64_t x_row, const T* stats, int64_t stats_row, const T* weight, const T* colsum,
                 const T* bias, double eps, T* u, T* activation, int64_t kind, T* moments, int64_t m, int64_t n,
                 int64_t k) {
  const auto activate = kind == ERF ? gelu<T, ERF> : kind == TANH ? gelu<T, TANH> : gelu<T, SIGMOID>;
  all_moments(stats, stats_row, m, (k + PANEL - 1) / PANEL, k, eps, moments);
  linear<T, true>(x, x_row, weight, k, m, n, k, [&](int64_t row, int64_t first, int64_t columns, const T* c) {
    const T mean = moments[2 * row], rstd = moments[2 * row + 1];
    const T *sums = colsum + first, *b = bias + first;
    T* out = u + row * n + first;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] = rstd * (c[j] - mean * sums[j]) + b[j];
    if (activation != nullptr) activate(out, columns, activation + row * n + first);
  });
}

template <typename T>
void linear_residual(const T* a, int64_t a_row, const T* weight, const T* bias, const T* residual,
                     int64_t residual_row, T* x, T* stats, int64_t m, int64_t n, int64_t k) {
  const int64_t chunks = (n + PANEL - 1) / PANEL;
  linear<T, true>(a, a_row, weight, k, m, n, k, [&](int64_t row, int64_t first, int64_t columns, const T* c) {
    const T *from = residual + row * residual_row + first, *b = bias + first;
    T* out = x + row * n + first;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] = from[j] + c[j] + b[j];
    chunk_statistics(out, columns, stats + 2 * (row * chunks + first / PANEL));
  });
}

template <typename T>
void linear_dx(const T* dy, int64_t dy_row, const T* weight, T* out, int64_t m, int64_t n, int64_t k) {
  linear<T, false>(dy, dy_row, weight, n, m, n, k, [&](int64_t row, int64_t first, int64_t columns, const T* c) {
    std::copy(c, c + columns, out + row * n + first);
  });
}

template <typename T>
void linear_gelu_dx(const T* dy, int64_t dy_row, const T* weight, const T* u, const T* colsum, const T* bias,
                    int64_t kind, T* du, T* dstats, int64_t m, int64_t n, int64_t k) {
  const auto through = kind == ERF ? gelu_dx<T, ERF> : kind == TANH ? gelu_dx<T, TANH> : gelu_dx<T, SIGMOID>;
  const int64_t chunks = (n + PANEL - 1) / PANEL;
  linear<T, false>(dy, dy_row, weight, n, m, n, k, [&](int64_t row, int64_t first, int64_t columns, const T* c) {
    through(c, u + row * n + first, colsum + first, bias + first, columns, du + row * n + first,
            dstats + 2 * (row * chunks + first / PANEL));
  });
}

template <typename T>
void norm_linear_dx(const T* du, int64_t du_row, const T* weight, const T* dstats, int64_t parts, const T* x,
                    int64_t x_row, const T* moments, const T* residual, const T* extra, T* dx, int64_t m, int64_t n,
                    int64_t k, int64_t tokens, int64_t kept) {
  std::vector<T> means(2 * m);  // of the gradient of the normalised row, and of that times the row
  for (int64_t i = 0; i < m; ++i) {
    T of_colsum = 0, of_u = 0;
    for (int64_t part = 0; part < parts; ++part) {
      of_colsum += dstats[2 * (i * parts + part)];
      of_u += dstats[2 * (i * parts + part) + 1];
    }
    means[2 * i] = of_colsum / static_cast<T>(n);
    means[2 * i + 1] = of_u / static_cast<T>(n);
  }
  linear<T, false>(du, du_row, weight, n, m, n, k, [&](int64_t row, int64_t first, int64_t columns, T* c) {
    const T mean = moments[2 * row], rstd = moments[2 * row + 1];
    const T of_colsum = means[2 * row], of_u = means[2 * row + 1];
    const bool has_more = row % tokens < kept;
    const int64_t more = (row / tokens * kept + row % tokens) * n + first;
    const T* in = x + row * x_row + first;
    T* out = dx + row * n + first;
    if (extra != nullptr && has_more)
      for (int64_t j = 0; j < columns; ++j) c[j] += extra[more + j];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] = rstd * (c[j] - of_colsum - (in[j] - mean) * rstd * of_u);
    if (residual != nullptr && has_more)
      for (int64_t j = 0; j < columns; ++j) out[j] += residual[more + j];
  });
}

// Patches (B K, FEATURES) to the tokens (B, P + K, D) behind prefix tokens; the meaning of `embed_tokens`.
template <typename T>
void embed(const T* patches, const int64_t* cells, const T* weight, const T* position, const T* prefix, T* x, T* stats,
           int64_t images, int64_t kept, int64_t prefix_tokens, int64_t width, int64_t features) {
  const int64_t tokens = prefix_tokens + kept, chunks = (width + PANEL - 1) / PANEL;
  for (int64_t image = 0; image < images; ++image)
    for (int64_t token = 0; token < prefix_tokens; ++token) {
      const int64_t row = image * tokens + token;
      std::copy(prefix + token * width, prefix + (token + 1) * width, x + row * width);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        chunk_statistics(x + row * width + chunk * PANEL, std::min(PANEL, width - chunk * PANEL),
                         stats + 2 * (row * chunks + chunk));
    }
  linear<T, true>(patches, features, weight, features, images * kept, width, features,
                  [&](int64_t patch, int64_t first, int64_t columns, const T* c) {
                    const int64_t row = patch / kept * tokens + prefix_tokens + patch % kept;
                    const T* place = position + cells[patch] * width + first;
                    T* out = x + row * width + first;
#pragma omp simd
                    for (int64_t j = 0; j < columns; ++j) out[j] = c[j] + place[j];
                    chunk_statistics(out, columns, stats + 2 * (row * chunks + first / PANEL));
                  });
}

// Gradient of the tokens (B, P + K, D) to that of the patches (B, K, FEATURES).
template <typename T>
void embed_dx(const T* dx, const T* weight, const T* scale, T* d_patches, int64_t images, int64_t kept,
              int64_t prefix_tokens, int64_t width, int64_t features) {
  const int64_t tokens = prefix_tokens + kept;
  linear<T, false>(dx, width, weight, features, images * tokens, features, width,
                   [&](int64_t row, int64_t first, int64_t columns, const T* c) {
                     const int64_t patch = row % tokens - prefix_tokens;
                     if (patch < 0) return;
                     const T factor = scale == nullptr ? 1 : scale[row / tokens];
                     T* out = d_patches + (row / tokens * kept + patch) * features + first;
#pragma omp simd
                     for (int64_t j = 0; j < columns; ++j) out[j] = factor * c[j];
                   });
}

}  // namespace smi

// Small matrix products out of registers: C (m, n) = or += A (m, k) B (k, n).
//
// A is read one number at a time and may have any strides, so that its transpose costs nothing; rows of B and C are
// contiguous and padded to whole vectors. Sums run over k in order, so that a row of C does not depend on the others.
#pragma once

#include "simd.h"

namespace smi {

template <typename T, int ROWS, int VECTORS>
inline void product_tile(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row,
                         int64_t k, bool add) {
  Vector<T> sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = add ? load(c + r * c_row + v * LANES<T>) : Vector<T>{};
  for (int64_t i = 0; i < k; ++i) {
    Vector<T> row[VECTORS];
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + i * b_row + v * LANES<T>);
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * a_row + i * a_k];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(c + r * c_row + v * LANES<T>, sum[r][v]);
}

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 sums, 4 vectors of B, 1 number of A: 29 of 32 registers
#else
constexpr int TILE_ROWS = 6, TILE_VECTORS = 2;  // 12 sums, 2 vectors of B, 1 number of A: 15 of 16 registers
#endif

template <typename T, int VECTORS>
inline void product_columns(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row,
                            int64_t m, int64_t k, bool add) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= m; r += TILE_ROWS)
    product_tile<T, TILE_ROWS, VECTORS>(a + r * a_row, a_row, a_k, b, b_row, c + r * c_row, c_row, k, add);
  for (; r + 2 <= m; r += 2)
    product_tile<T, 2, VECTORS>(a + r * a_row, a_row, a_k, b, b_row, c + r * c_row, c_row, k, add);
  if (r < m)
    product_tile<T, 1, VECTORS>(a + r * a_row, a_row, a_k, b, b_row, c + r * c_row, c_row, k, add);
}

template <typename T>
void product(const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t m,
             int64_t n, int64_t k, bool add) {
  constexpr int64_t wide = TILE_VECTORS * LANES<T>;
  int64_t j = 0;
  for (; j + wide <= n; j += wide)
    product_columns<T, TILE_VECTORS>(a, a_row, a_k, b + j, b_row, c + j, c_row, m, k, add);
  for (; j < n; j += LANES<T>) product_columns<T, 1>(a, a_row, a_k, b + j, b_row, c + j, c_row, m, k, add);
}

}  // namespace smi

// Attention of one image and head at a time, forward and gradient, with the softmax recomputed and nothing stored.
//
// Meanings and shapes: smi_kernels/attention/reference.py.
#pragma once

#include <algorithm>
#include <limits>

#include "matmul.h"
#include "parallel.h"

namespace smi {

constexpr int64_t QUERIES = 48;  // rows of scores that exist at once

// Rows (n, d) of any stride as (n, width) or, transposed, as (d, width); zeros behind them.
template <typename T>
void pack_rows(const T* from, int64_t row, int64_t n, int64_t d, T* to, int64_t width) {
  for (int64_t i = 0; i < n; ++i) {
    std::copy(from + i * row, from + i * row + d, to + i * width);
    std::fill(to + i * width + d, to + (i + 1) * width, T{0});
  }
}

template <typename T>
void pack_transposed(const T* from, int64_t row, int64_t n, int64_t d, T* to, int64_t width) {
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = 0; i < n; ++i) to[j * width + i] = from[i * row + j];
    std::fill(to + j * width + n, to + (j + 1) * width, T{0});
  }
}

// Softmax over the first `n` of each row, in place; zeros behind them up to `width`, which is whole vectors.
template <typename T>
void softmax(T* scores, int64_t rows, int64_t n, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    T* row = scores + i * width;
    std::fill(row + n, row + width, -std::numeric_limits<T>::infinity());  // so that no loop has a remainder
    T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < width; ++j) top = row[j] > top ? row[j] : top;
    double sum = 0;
    for (int64_t block = 0; block < width; block += 256) {  // long rows lose no digits
      const int64_t end = std::min(width, block + 256);
      T part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = block; j < end; ++j) {
        row[j] = exponential(row[j] - top);
        part += row[j];
      }
      sum += part;
    }
    const T share = static_cast<T>(1 / sum);
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) row[j] *= share;
  }
}

// Some rows of queries, keys or values, or of their gradients.
template <typename T>
struct Rows {
  T* data;
  int64_t row;
};

template <typename T>
void attend(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<T> out, int64_t queries, int64_t keys, int64_t d) {
  const int64_t wide = padded<T>(keys), deep = padded<T>(d);
  T* keys_t = scratch<T, 2>(d * wide);
  T* values = scratch<T, 3>(keys * deep);
  T* scores = scratch<T, 4>(QUERIES * wide);
  T* made = scratch<T, 5>(QUERIES * deep);
  pack_transposed(k.data, k.row, keys, d, keys_t, wide);
  pack_rows(v.data, v.row, keys, d, values, deep);
  for (int64_t first = 0; first < queries; first += QUERIES) {
    const int64_t rows = std::min(QUERIES, queries - first);
    product(q.data + first * q.row, q.row, 1, keys_t, wide, scores, wide, rows, wide, d, false);
    softmax(scores, rows, keys, wide);
    product(scores, wide, 1, values, deep, made, deep, rows, deep, keys, false);
    for (int64_t i = 0; i < rows; ++i)
      std::copy(made + i * deep, made + i * deep + d, out.data + (first + i) * out.row);
  }
}

template <typename T>
void attend_dx(Rows<const T> q, Rows<const T> k, Rows<const T> v, Rows<const T> d_out, Rows<T> dq, Rows<T> dk,
               Rows<T> dv, int64_t queries, int64_t keys, int64_t d) {
  const int64_t wide = padded<T>(keys), deep = padded<T>(d);
  T* keys_t = scratch<T, 2>(d * wide);
  T* values_t = scratch<T, 3>(d * wide);
  T* p = scratch<T, 4>(QUERIES * wide);
  T* made = scratch<T, 5>(QUERIES * deep);
  T* keys_packed = scratch<T, 6>(keys * deep);
  T* queries_packed = scratch<T, 7>(QUERIES * deep);
  T* d_out_packed = scratch<T, 8>(QUERIES * deep);
  T* dp = scratch<T, 9>(QUERIES * wide);
  T* dk_sum = scratch<T, 10>(keys * deep);
  T* dv_sum = scratch<T, 11>(keys * deep);
  pack_transposed(k.data, k.row, keys, d, keys_t, wide);
  pack_transposed(v.data, v.row, keys, d, values_t, wide);
  pack_rows(k.data, k.row, keys, d, keys_packed, deep);
  for (int64_t first = 0; first < queries; first += QUERIES) {
    const int64_t rows = std::min(QUERIES, queries - first);
    pack_rows(q.data + first * q.row, q.row, rows, d, queries_packed, deep);
    pack_rows(d_out.data + first * d_out.row, d_out.row, rows, d, d_out_packed, deep);
    product(queries_packed, deep, 1, keys_t, wide, p, wide, rows, wide, d, false);
    softmax(p, rows, keys, wide);
    product(d_out_packed, deep, 1, values_t, wide, dp, wide, rows, wide, d, false);
    product(p, 1, wide, d_out_packed, deep, dv_sum, deep, keys, deep, rows, first > 0);
    for (int64_t i = 0; i < rows; ++i) {
      T *pi = p + i * wide, *di = dp + i * wide, sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < keys; ++j) sum += pi[j] * di[j];
#pragma omp simd
      for (int64_t j = 0; j < wide; ++j) di[j] = pi[j] * (di[j] - sum);
    }
    product(dp, wide, 1, keys_packed, deep, made, deep, rows, deep, keys, false);
    product(dp, 1, wide, queries_packed, deep, dk_sum, deep, keys, deep, rows, first > 0);
    for (int64_t i = 0; i < rows; ++i)
      std::copy(made + i * deep, made + i * deep + d, dq.data + (first + i) * dq.row);
  }
  for (int64_t i = 0; i < keys; ++i) {
    std::copy(dk_sum + i * deep, dk_sum + i * deep + d, dk.data + i * dk.row);
    std::copy(dv_sum + i * deep, dv_sum + i * deep + d, dv.data + i * dv.row);
  }
}

// Adds the sums of `dx colsum` and `dx (x - bias)` over d columns to `stats`.
template <typename T>
inline void add_gradient_sums(const T* dx, const T* x, const T* colsum, const T* bias, int64_t d, T* stats) {
  T of_colsum = 0, of_x = 0;
#pragma omp simd reduction(+ : of_colsum, of_x)
  for (int64_t j = 0; j < d; ++j) {
    of_colsum += dx[j] * colsum[j];
    of_x += dx[j] * (x[j] - bias[j]);
  }
  stats[0] += of_colsum;
  stats[1] += of_x;
}

template <typename T>
void attention(const T* qkv, T* out, int64_t images, int64_t tokens, int64_t heads, int64_t d) {
  const int64_t D = heads * d;
  parallel(images * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      const T* from = qkv + image * tokens * 3 * D + head * d;
      attend<T>({from, 3 * D}, {from + D, 3 * D}, {from + 2 * D, 3 * D}, {out + image * tokens * D + head * d, D},
                tokens, tokens, d);
    }
  });
}

template <typename T>
void attention_dx(const T* qkv, const T* d_out, const T* colsum, const T* bias, T* dqkv, T* dstats, int64_t images,
                  int64_t tokens, int64_t heads, int64_t d) {
  const int64_t D = heads * d, row = 3 * D;
  parallel(images * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      const T* from = qkv + image * tokens * row + head * d;
      T* to = dqkv + image * tokens * row + head * d;
      attend_dx<T>({from, row}, {from + D, row}, {from + 2 * D, row}, {d_out + image * tokens * D + head * d, D},
                   {to, row}, {to + D, row}, {to + 2 * D, row}, tokens, tokens, d);
      for (int64_t i = 0; i < tokens; ++i) {
        T* stats = dstats + 2 * ((image * tokens + i) * heads + head);
        stats[0] = stats[1] = 0;
        for (int64_t part = 0; part < row; part += D)
          add_gradient_sums(to + i * row + part, from + i * row + part, colsum + part + head * d,
                            bias + part + head * d, d, stats);
      }
    }
  });
}

template <typename T>
void class_attention(const T* query, const T* kv, T* out, int64_t images, int64_t tokens, int64_t first, int64_t heads,
                     int64_t d) {
  const int64_t D = heads * d;
  parallel(images * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      const T* keys = kv + image * tokens * 2 * D + head * d;
      attend<T>({query + image * first * D + head * d, D}, {keys, 2 * D}, {keys + D, 2 * D},
                {out + image * first * D + head * d, D}, first, tokens, d);
    }
  });
}

template <typename T>
void class_attention_dx(const T* query, const T* kv, const T* d_out, const T* q_colsum, const T* q_bias,
                        const T* kv_colsum, const T* kv_bias, T* d_query, T* d_kv, T* dstats, int64_t images,
                        int64_t tokens, int64_t first, int64_t heads, int64_t d) {
  const int64_t D = heads * d, row = 2 * D;
  parallel(images * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads, column = head * d;
      const T *q = query + image * first * D + column, *keys = kv + image * tokens * row + column;
      T *dq = d_query + image * first * D + column, *to = d_kv + image * tokens * row + column;
      attend_dx<T>({q, D}, {keys, row}, {keys + D, row}, {d_out + image * first * D + column, D}, {dq, D}, {to, row},
                   {to + D, row}, first, tokens, d);
      for (int64_t i = 0; i < tokens; ++i) {
        T* stats = dstats + 2 * ((image * tokens + i) * heads + head);
        stats[0] = stats[1] = 0;
        for (int64_t part = 0; part < row; part += D)
          add_gradient_sums(to + i * row + part, keys + i * row + part, kv_colsum + part + column,
                            kv_bias + part + column, d, stats);
        if (i < first) add_gradient_sums(dq + i * D, q + i * D, q_colsum + column, q_bias + column, d, stats);
      }
    }
  });
}

// Mean over heads of the softmax of one query's scores over all keys, (B, N); any strides but contiguous d.
template <typename T>
void attention_row(const T* query, int64_t q_image, int64_t q_head, const T* key, int64_t k_image, int64_t k_head,
                   int64_t k_row, double scale, T* row, int64_t images, int64_t heads, int64_t tokens, int64_t d) {
  parallel(images, 1, [&](int64_t begin, int64_t end) {
    T* scores = scratch<T, 4>(padded<T>(tokens));
    for (int64_t image = begin; image < end; ++image) {
      T* mean = row + image * tokens;
      std::fill(mean, mean + tokens, T{0});
      for (int64_t head = 0; head < heads; ++head) {
        const T* q = query + image * q_image + head * q_head;
        for (int64_t i = 0; i < tokens; ++i) {
          const T* k = key + image * k_image + head * k_head + i * k_row;
          T sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t j = 0; j < d; ++j) sum += q[j] * k[j];
          scores[i] = sum * static_cast<T>(scale);
        }
        softmax(scores, 1, tokens, padded<T>(tokens));
        for (int64_t i = 0; i < tokens; ++i) mean[i] += scores[i];
      }
      for (int64_t i = 0; i < tokens; ++i) mean[i] /= static_cast<T>(heads);
    }
  });
}

}  // namespace smi

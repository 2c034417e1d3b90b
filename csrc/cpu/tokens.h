// Ranking of patches, and the cross-entropy at the end of the classifier.
//
// Meanings and shapes: smi_kernels/token_select/reference.py and smi_kernels/loss_head/reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"

namespace smi {

// The `count` entries of each row of `keep` with the highest scores, in their order; NaN is highest, ties go to the
// lower index.
template <typename T>
void select_tokens(const T* scores, const int64_t* keep, int64_t* chosen, int64_t images, int64_t kept, int64_t count) {
  parallel(images, 1, [&](int64_t begin, int64_t end) {
    int64_t* order = scratch<int64_t, 13>(kept);
    for (int64_t image = begin; image < end; ++image) {
      const T* row = scores + image * kept;
      for (int64_t i = 0; i < kept; ++i) order[i] = i;
      const auto before = [row](int64_t i, int64_t j) {
        const bool nan_i = std::isnan(row[i]), nan_j = std::isnan(row[j]);
        if (nan_i != nan_j) return nan_i;
        if (!nan_i && row[i] != row[j]) return row[i] > row[j];
        return i < j;
      };
      if (count < kept) std::nth_element(order, order + count, order + kept, before);
      std::sort(order, order + count);
      for (int64_t i = 0; i < count; ++i) chosen[image * count + i] = keep[image * kept + order[i]];
    }
  });
}

// `target` (B) classes or `probabilities` (B, classes); parts, colsum, bias as R of each.
template <typename T>
void cross_entropy_head(const T* parts, const int64_t* target, const T* probabilities, const T* colsum, const T* bias,
                        const T* grad_scale, T* loss, T* d_logits, T* dstats, int64_t R, int64_t images,
                        int64_t classes) {
  parallel(images, 1, [&](int64_t begin, int64_t end) {
    T* total = scratch<T, 4>(classes);
    for (int64_t image = begin; image < end; ++image) {
      std::fill(total, total + classes, T{0});
      for (int64_t r = 0; r < R; ++r) {
        const T* part = parts + (r * images + image) * classes;
        for (int64_t j = 0; j < classes; ++j) total[j] += part[j];
      }
      T top = total[0];
      for (int64_t j = 1; j < classes; ++j) top = total[j] > top ? total[j] : top;
      double sum = 0, value = 0;
      for (int64_t j = 0; j < classes; ++j) sum += std::exp(static_cast<double>(total[j] - top));
      const double log_sum = std::log(sum);
      const T scale = grad_scale == nullptr ? T{1} : grad_scale[image];
      const T* soft = probabilities == nullptr ? nullptr : probabilities + image * classes;
      T* gradient = d_logits + image * classes;
      for (int64_t j = 0; j < classes; ++j) {
        const double log_p = static_cast<double>(total[j] - top) - log_sum;
        const double wanted = soft != nullptr ? static_cast<double>(soft[j]) : (target[image] == j ? 1.0 : 0.0);
        if (wanted != 0) value -= wanted * log_p;
        gradient[j] = static_cast<T>(std::exp(log_p) - wanted) * scale;
      }
      loss[image] = static_cast<T>(value);
      for (int64_t r = 0; r < R; ++r) {
        const T *part = parts + (r * images + image) * classes, *sums = colsum + r * classes, *b = bias + r * classes;
        double of_colsum = 0, of_part = 0;  // terms of both signs, and of very different sizes
#pragma omp simd reduction(+ : of_colsum, of_part)
        for (int64_t j = 0; j < classes; ++j) {
          of_colsum += static_cast<double>(gradient[j] * sums[j]);
          of_part += gradient[j] == 0 ? 0 : static_cast<double>(gradient[j] * (part[j] - b[j]));  // b may be -infinity
        }
        dstats[2 * (r * images + image)] = static_cast<T>(of_colsum);
        dstats[2 * (r * images + image) + 1] = static_cast<T>(of_part);
      }
    }
  });
}

}  // namespace smi

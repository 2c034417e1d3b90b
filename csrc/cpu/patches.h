// Patches read from, and written to, images under roll and flip, which are index arithmetic: a row of a patch is at
// most two runs of an image's row.
//
// Meanings and shapes: smi_kernels/patch_embed/reference.py. Offsets are rows of (dy, dx, flip).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace smi {

struct Grid {
  int64_t H, W, height, width;  // of the images and of a patch, in pixels
  int64_t rows() const { return H / height; }
  int64_t columns() const { return W / width; }
};

inline int64_t modulo(int64_t a, int64_t n) {
  const int64_t rest = a % n;
  return rest < 0 ? rest + n : rest;
}

// An offset in whole patches, rounded half up.
inline int64_t whole_patches(int64_t offset, int64_t patch) {
  const int64_t rest = modulo(offset, patch);
  return (offset - rest) / patch + (2 * rest >= patch ? 1 : 0);
}

// One image's augmentation, flip(roll(image, (dy, dx))).
struct Augmentation {
  int64_t dy = 0, dx = 0;
  bool flip = false;

  Augmentation() = default;
  // Of image `image`: a row of `offsets` for each image, one for all, or nullptr for none.
  Augmentation(const int64_t* offsets, bool one_for_all, int64_t image) {
    if (offsets == nullptr) return;
    const int64_t* row = offsets + (one_for_all ? 0 : 3 * image);
    dy = row[0], dx = row[1], flip = row[2] != 0;
  }

  // The cell at which a patch lies, and the patch that lies at a cell.
  int64_t cell(int64_t patch, const Grid& g) const {
    const int64_t row = modulo(patch / g.columns() + whole_patches(dy, g.height), g.rows());
    const int64_t column = modulo(patch % g.columns() + whole_patches(dx, g.width), g.columns());
    return row * g.columns() + (flip ? g.columns() - 1 - column : column);
  }
  int64_t patch(int64_t row, int64_t column, const Grid& g) const {
    if (flip) column = g.columns() - 1 - column;
    return modulo(row - whole_patches(dy, g.height), g.rows()) * g.columns() +
           modulo(column - whole_patches(dx, g.width), g.columns());
  }
  // Where the augmented pixel (y, x) comes from, and where pixel y goes.
  int64_t source_y(int64_t y, const Grid& g) const { return modulo(y - dy, g.H); }
  int64_t source_x(int64_t x, const Grid& g) const { return modulo((flip ? g.W - 1 - x : x) - dx, g.W); }
  int64_t augmented_y(int64_t y, const Grid& g) const { return modulo(y + dy, g.H); }
};

// visit(source, i, count, step): the augmented pixels x .. x + n of a row come in runs from source, source + step, ...
template <typename F>
inline void for_runs(const Augmentation& a, int64_t x, int64_t n, const Grid& g, const F& visit) {
  const int64_t step = a.flip ? -1 : 1;
  for (int64_t i = 0; i < n;) {
    const int64_t source = a.source_x(x + i, g);
    const int64_t count = std::min(n - i, a.flip ? source + 1 : g.W - source);
    visit(source, i, count, step);
    i += count;
  }
}

template <typename T>
inline void read_row(const T* row, const Augmentation& a, int64_t x, int64_t n, const Grid& g, T* to) {
  for_runs(a, x, n, g, [&](int64_t source, int64_t i, int64_t count, int64_t step) {
    if (step > 0)
      std::copy(row + source, row + source + count, to + i);
    else
      for (int64_t j = 0; j < count; ++j) to[i + j] = row[source - j];
  });
}

template <typename T>
inline void add_row(const T* from, const Augmentation& a, int64_t x, int64_t n, const Grid& g, T* row) {
  for_runs(a, x, n, g, [&](int64_t source, int64_t i, int64_t count, int64_t step) {
    if (step > 0)
      for (int64_t j = 0; j < count; ++j) row[source + j] += from[i + j];
    else
      for (int64_t j = 0; j < count; ++j) row[source - j] += from[i + j];
  });
}

// Kept patches, or all of them, to the cells at which they lie.
inline void map_cells(const int64_t* keep, const int64_t* offsets, bool one_for_all, int64_t* cells, int64_t images,
                      int64_t kept, const Grid& g) {
  for (int64_t image = 0; image < images; ++image) {
    const Augmentation a(keep == nullptr ? nullptr : offsets, one_for_all, image);
    for (int64_t k = 0; k < kept; ++k)
      cells[image * kept + k] = keep == nullptr ? k : a.cell(keep[image * kept + k], g);
  }
}

template <typename T>
void gather_patches(const T* images, const int64_t* cells, const int64_t* offsets, bool one_for_all, T* patches,
                    int64_t count, int64_t channels, int64_t kept, const Grid& g) {
  parallel(count * kept, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / kept;
      const Augmentation a(offsets, one_for_all, image);
      const int64_t top = cells[task] / g.columns() * g.height, left = cells[task] % g.columns() * g.width;
      T* to = patches + task * channels * g.height * g.width;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t i = 0; i < g.height; ++i, to += g.width) {
          const int64_t y = a.source_y(top + i, g);
          read_row(images + ((image * channels + c) * g.H + y) * g.W, a, left, g.width, g, to);
        }
    }
  });
}

// The adjoint: zero where no cell was read, a sum where several were.
template <typename T>
void scatter_patches(const T* d_patches, const int64_t* cells, const int64_t* offsets, bool one_for_all, T* d_images,
                     int64_t count, int64_t channels, int64_t kept, const Grid& g) {
  parallel(count * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t image = plane / channels, c = plane % channels;
      const Augmentation a(offsets, one_for_all, image);
      T* to = d_images + plane * g.H * g.W;
      std::fill(to, to + g.H * g.W, T{0});
      for (int64_t k = 0; k < kept; ++k) {
        const int64_t cell = cells[image * kept + k];
        const T* from = d_patches + ((image * kept + k) * channels + c) * g.height * g.width;
        for (int64_t i = 0; i < g.height; ++i, from += g.width) {
          const int64_t y = a.source_y(cell / g.columns() * g.height + i, g);
          add_row(from, a, cell % g.columns() * g.width, g.width, g, to + y * g.W);
        }
      }
    }
  });
}

}  // namespace smi

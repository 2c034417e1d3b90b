// Vectors of the width that the compiler was told to build for, and the elementary functions that kernels need.
//
// Everything is written once for float and double. Loops over contiguous memory are left to the compiler
// (`#pragma omp simd`); only matrix products spell their registers out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace smi {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <typename T>
constexpr int LANES = VECTOR_BYTES / static_cast<int>(sizeof(T));

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
inline Vector<T> load(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename T>
inline void store(T* to, Vector<T> value) {
  std::memcpy(to, &value, sizeof value);
}

// Rounded up to whole vectors.
template <typename T>
constexpr int64_t padded(int64_t size) {
  return (size + LANES<T> - 1) / LANES<T> * LANES<T>;
}

// exp(x), relative error below 2^-22; 0 below -87.3, where float has no normal numbers, NaN of NaN.
// Cody & Waite's reduction by n log(2) in two parts, then the series of exp on [-log(2) / 2, log(2) / 2].
inline float exponential(float x) {
  const float bounded = x > -87.3f ? (x < 88.7f ? x : 88.7f) : -87.3f;  // a number even of NaN
  const float n = (bounded * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to an integer
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) * (1 << 23);
  float power;
  std::memcpy(&power, &bits, sizeof power);
  const float value = x < -87.3f ? 0.0f : p * power;
  return x != x ? x : value;
}

inline double exponential(double x) { return std::exp(x); }

// Phi(x), the normal distribution function, and phi(x), its density: all that GELU and its slope are made of.
template <typename T>
struct Normal {
  T below, density;
};

// Phi(-z sqrt(2)) = exp(-z^2) erfcx(z) / 2, with erfcx(z) = t q(t), t = 1 / (1 + 0.4 z), where q was fitted to equal
// relative error on 0 <= z <= 9.5; beyond, exp(-z^2) is 0. Relative error of the tail below 1e-6 for |x| < 4.
inline Normal<float> normal(float x) {
  const float z = (x < 0 ? -x : x) * 0.707106781f;
  const float t = 1.0f / (1.0f + 0.4f * z);
  float q = 0.0402685779f;
  q = q * t - 0.13547629f;
  q = q * t + 0.0738527509f;
  q = q * t + 0.0997176298f;
  q = q * t + 0.0715164184f;
  q = q * t + 0.196959643f;
  q = q * t + 0.200959429f;
  q = q * t + 0.226575595f;
  q = q * t + 0.225626305f;
  const float bell = exponential(-0.5f * x * x);
  const float tail = 0.5f * bell * t * q;
  return {x < 0 ? tail : 1.0f - tail, 0.398942280f * bell};
}

inline Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.70710678118654752440), 0.39894228040143267794 * std::exp(-0.5 * x * x)};
}

}  // namespace smi

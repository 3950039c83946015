// Mathematical functions (specification, chapter 6), in float. Fast and precise ones are the same.
#pragma once
#include "metal_vector.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define MAXFLOAT 0x1.fffffep+127f
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f

namespace metal {

#define FLOATING(name, value)                                                      \
  inline float name(float x) { return value; }                                     \
  inline half name(half h) { float x = h; return half(value); }                    \
  inline bfloat name(bfloat b) { float x = b; return bfloat(value); }              \
  template <class T, int N> inline vec<T, N> name(vec<T, N> v) {                   \
    for (int i = 0; i < N; i++) v[i] = name(v[i]);                           \
    return v;                                                                      \
  }
#define BUILT_IN(name) FLOATING(name, __builtin_##name##f(x))
#define FLOATING_FUNCTIONS                                                                        \
  BUILT_IN(exp) BUILT_IN(exp2) BUILT_IN(exp10) BUILT_IN(log) BUILT_IN(log2) BUILT_IN(log10)       \
  BUILT_IN(sqrt) BUILT_IN(sin) BUILT_IN(cos) BUILT_IN(tan) BUILT_IN(sinh) BUILT_IN(cosh)          \
  BUILT_IN(tanh) BUILT_IN(asin) BUILT_IN(acos) BUILT_IN(atan) BUILT_IN(asinh) BUILT_IN(acosh)     \
  BUILT_IN(atanh) BUILT_IN(floor) BUILT_IN(ceil) BUILT_IN(rint) BUILT_IN(round) BUILT_IN(trunc)   \
  BUILT_IN(fabs) FLOATING(rsqrt, 1.0f / __builtin_sqrtf(x))                                       \
  FLOATING(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f)                                             \
  inline float pow(float x, float y) { return __builtin_powf(x, y); }                             \
  inline float divide(float x, float y) { return x / y; }
FLOATING_FUNCTIONS
namespace fast { FLOATING_FUNCTIONS }
namespace precise { FLOATING_FUNCTIONS }

inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
inline float fmod(float x, float y) { return __builtin_fmodf(x, y); }
inline float copysign(float x, float y) { return __builtin_copysignf(x, y); }
inline float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(__builtin_fma(double(a), double(b), double(c))); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }

// Overloads and no templates, so that arguments of mixed types are as ambiguous as they are in Metal.
#define ORDER(T)                                                                           \
  constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
#define INTEGER_ORDER(T)                                                                   \
  constexpr T max(T a, T b) { return a < b ? b : a; }                                      \
  constexpr T min(T a, T b) { return b < a ? b : a; }                                      \
  ORDER(T)
#define FLOATING_ORDER(T) /* of a NaN and a number, the number */                          \
  constexpr T max(T a, T b) { return a != a || a < b ? b : a; }                            \
  constexpr T min(T a, T b) { return a != a || b < a ? b : a; }                            \
  constexpr T fmax(T a, T b) { return max(a, b); }                                         \
  constexpr T fmin(T a, T b) { return min(a, b); }                                         \
  inline T abs(T x) { return fabs(x); }                                                    \
  ORDER(T)
FLOATING_ORDER(float) FLOATING_ORDER(half) FLOATING_ORDER(bfloat)
INTEGER_ORDER(char) INTEGER_ORDER(short) INTEGER_ORDER(int) INTEGER_ORDER(long) INTEGER_ORDER(signed char)
INTEGER_ORDER(uchar) INTEGER_ORDER(ushort) INTEGER_ORDER(uint) INTEGER_ORDER(ulong) INTEGER_ORDER(bool)
#define SIGNED_ABS(T) constexpr T abs(T x) { return x < 0 ? T(-x) : x; }
SIGNED_ABS(char) SIGNED_ABS(short) SIGNED_ABS(int) SIGNED_ABS(long)

#define COMPONENTWISE(name)                                                                \
  template <class T, int N> constexpr vec<T, N> name(vec<T, N> a, vec<T, N> b) {           \
    for (int i = 0; i < N; i++) a[i] = name(a[i], b[i]);                                   \
    return a;                                                                              \
  }
COMPONENTWISE(max) COMPONENTWISE(min)
template <class T, int N> constexpr T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class Truth, int N> constexpr bool all(vec<Truth, N> v) {
  for (int i = 0; i < N; i++) if (!v[i]) return false;
  return true;
}
template <class Truth, int N> constexpr bool any(vec<Truth, N> v) {
  for (int i = 0; i < N; i++) if (v[i]) return true;
  return false;
}
template <class T> constexpr T select(T a, T b, bool second) { return second ? b : a; }
template <class T, class Truth, int N>
constexpr vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<Truth, N> second) {
  for (int i = 0; i < N; i++) if (second[i]) a[i] = b[i];
  return a;
}
template <class T> constexpr T mix(T a, T b, T t) { return a + (b - a) * t; }

constexpr uint popcount(uint x) { return __builtin_popcount(x); }
constexpr uint clz(uint x) { return x ? __builtin_clz(x) : 32; }
constexpr uint ctz(uint x) { return x ? __builtin_ctz(x) : 32; }

}  // namespace metal

// Metal's address spaces, scalar and vector types (Metal Shading Language Specification 3.2, chapter 2).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "../runtime.h"

#ifdef METAL_LINT  // clang then keeps pointers to different memories apart, as Metal does
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL__ 1
#define __METAL_VERSION__ 320

// For what the emulator does in a kernel's place: its accesses are not the kernel's.
#define NOT_CHECKED __attribute__((no_sanitize("thread"), noinline))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

// Brain float. Only conversions to wider types are implicit (specification, section 2.1).
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  constexpr explicit bfloat(float x) : bits(round(__builtin_bit_cast(uint32_t, x))) {}
  constexpr explicit bfloat(double x) : bfloat(float(x)) {}
  constexpr explicit bfloat(half x) : bfloat(float(x)) {}
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
  constexpr bfloat(Integer x) : bfloat(float(x)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

 private:
  static constexpr uint16_t round(uint32_t x) {
    const bool is_nan = (x & 0x7fffffff) > 0x7f800000;
    return is_nan ? x >> 16 | 64 : (x + 0x7fff + (x >> 16 & 1)) >> 16;
  }
};

#define BFLOAT_OPERATOR(op)                                                                         \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }         \
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>                   \
  constexpr bfloat operator op(bfloat a, Integer b) { return bfloat(float(a) op float(b)); }        \
  template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>                   \
  constexpr bfloat operator op(Integer a, bfloat b) { return bfloat(float(a) op float(b)); }        \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
BFLOAT_OPERATOR(+) BFLOAT_OPERATOR(-) BFLOAT_OPERATOR(*) BFLOAT_OPERATOR(/)
constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }

constexpr half operator""h(long double x) { return half(x); }
constexpr bfloat operator""bf(long double x) { return bfloat(float(x)); }

namespace metal {

template <class T, int N> struct vec;

// Some components of a vector, such as v.xy, to read or assign.
template <class T, int N, int... I> struct swizzle {
  T at[N];
  operator vec<T, sizeof...(I)>() const { return {at[I]...}; }
  swizzle& operator=(const vec<T, sizeof...(I)>& value) {
    int next = 0;
    ((at[I] = value.at[next++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& other) { return *this = vec<T, sizeof...(I)>(other); }
};

template <class T, int N> struct components;
template <class T> struct alignas(2 * sizeof(T)) components<T, 2> {
  union {
    T at[2];
    struct { T x, y; };
    swizzle<T, 2, 1, 0> yx;
  };
};
template <class T> struct alignas(4 * sizeof(T)) components<T, 3> {
  union {
    T at[4];
    struct { T x, y, z; };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
  };
};
template <class T> struct alignas(4 * sizeof(T)) components<T, 4> {
  union {
    T at[4];
    struct { T x, y, z, w; };
    swizzle<T, 4, 0, 1> xy;
    swizzle<T, 4, 1, 2> yz;
    swizzle<T, 4, 2, 3> zw;
    swizzle<T, 4, 0, 1, 2> xyz;
    swizzle<T, 4, 1, 2, 3> yzw;
  };
};

template <class T, int N> struct vec : components<T, N> {
  using components<T, N>::at;

  vec() = default;
  constexpr vec(const vec&) = default;
  constexpr vec(T value) { for (int i = 0; i < N; i++) at[i] = value; }
  template <class U, class = std::enable_if_t<!std::is_same_v<U, T>>>
  constexpr explicit vec(const vec<U, N>& other) { for (int i = 0; i < N; i++) at[i] = T(other.at[i]); }
  template <class... Parts, class = std::enable_if_t<(sizeof...(Parts) > 1)>>
  constexpr vec(const Parts&... parts) { int next = 0; (append(next, parts), ...); }

  constexpr vec& operator=(const vec& other) {
    for (int i = 0; i < N; i++) at[i] = other.at[i];
    return *this;
  }
  constexpr T& operator[](int i) { return at[i]; }
  constexpr const T& operator[](int i) const { return at[i]; }

 private:
  template <class U> constexpr void append(int& next, const U& part) { at[next++] = T(part); }
  template <class U, int M> constexpr void append(int& next, const vec<U, M>& part) {
    for (int i = 0; i < M; i++) at[next++] = T(part.at[i]);
  }
  template <class U, int M, int... I> constexpr void append(int& next, const swizzle<U, M, I...>& part) {
    append(next, vec<U, sizeof...(I)>(part));
  }
};

#define VECTOR_OPERATOR(op, Result)                                                                  \
  template <class T, int N> constexpr vec<Result, N> operator op(vec<T, N> a, vec<T, N> b) {         \
    vec<Result, N> out;                                                                              \
    for (int i = 0; i < N; i++) out.at[i] = Result(a.at[i] op b.at[i]);                              \
    return out;                                                                                      \
  }                                                                                                  \
  template <class T, int N> constexpr auto operator op(vec<T, N> a, std::type_identity_t<T> b) {     \
    return a op vec<T, N>(b);                                                                        \
  }                                                                                                  \
  template <class T, int N> constexpr auto operator op(std::type_identity_t<T> a, vec<T, N> b) {     \
    return vec<T, N>(a) op b;                                                                        \
  }
#define VECTOR_ARITHMETIC(op)                                                                        \
  VECTOR_OPERATOR(op, T)                                                                             \
  template <class T, int N, class U> constexpr vec<T, N>& operator op##=(vec<T, N>& a, const U& b) { \
    return a = a op b;                                                                               \
  }
VECTOR_ARITHMETIC(+) VECTOR_ARITHMETIC(-) VECTOR_ARITHMETIC(*) VECTOR_ARITHMETIC(/) VECTOR_ARITHMETIC(%)
VECTOR_ARITHMETIC(&) VECTOR_ARITHMETIC(|) VECTOR_ARITHMETIC(^) VECTOR_ARITHMETIC(<<) VECTOR_ARITHMETIC(>>)
VECTOR_OPERATOR(<, bool) VECTOR_OPERATOR(<=, bool) VECTOR_OPERATOR(>, bool) VECTOR_OPERATOR(>=, bool)
VECTOR_OPERATOR(==, bool) VECTOR_OPERATOR(!=, bool)
template <class T, int N> constexpr vec<T, N> operator-(vec<T, N> a) { return vec<T, N>(T(0)) - a; }

#define VECTOR_TYPES(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
VECTOR_TYPES(float) VECTOR_TYPES(half) VECTOR_TYPES(bfloat) VECTOR_TYPES(bool)
VECTOR_TYPES(char) VECTOR_TYPES(short) VECTOR_TYPES(int) VECTOR_TYPES(long)
VECTOR_TYPES(uchar) VECTOR_TYPES(ushort) VECTOR_TYPES(uint) VECTOR_TYPES(ulong)

template <class To, class From> inline To as_type(const From& value) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To same_bits;
  __builtin_memcpy((void*)&same_bits, &value, sizeof value);
  return same_bits;
}

using std::bool_constant, std::conditional_t, std::enable_if, std::enable_if_t, std::false_type;
using std::integral_constant, std::is_convertible_v, std::is_integral, std::is_integral_v, std::is_same;
using std::is_same_v, std::is_signed_v, std::is_unsigned_v, std::make_unsigned_t, std::remove_cv_t;
using std::remove_reference_t, std::true_type;
template <class T> using remove_addrspace_t = T;
template <class T> constexpr bool is_floating_point_v =
    std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};

template <class T> struct numeric_limits {  // of integers
  static constexpr T min() { return is_signed_v<T> ? T(T(1) << (8 * sizeof(T) - 1)) : T(0); }
  static constexpr T max() { return T(~min()); }
  static constexpr T lowest() { return min(); }
};
#define FLOAT_LIMITS(T, smallest, largest, precision)                            \
  template <> struct numeric_limits<T> {                                         \
    static constexpr T min() { return T(smallest); }                             \
    static constexpr T max() { return T(largest); }                              \
    static constexpr T lowest() { return T(-largest); }                          \
    static constexpr T epsilon() { return T(precision); }                        \
    static constexpr T infinity() { return T(__builtin_inff()); }                \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }             \
  };
FLOAT_LIMITS(float, 0x1p-126f, 0x1.fffffep+127f, 0x1p-23f)
FLOAT_LIMITS(half, 0x1p-14f, 0x1.ffcp+15f, 0x1p-10f)
FLOAT_LIMITS(bfloat, 0x1p-126f, 0x1.fep+127f, 0x1p-7f)
template <> struct numeric_limits<bool> {
  static constexpr bool min() { return false; }
  static constexpr bool max() { return true; }
};

}  // namespace metal

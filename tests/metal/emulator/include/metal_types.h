// Metal's address spaces, scalar types and their traits (Metal Shading Language Specification 3.2,
// chapters 2 and 4).
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <type_traits>

#include "../runtime.h"

#ifdef METAL_LINT  // clang then keeps pointers to different memories apart, as Metal does
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#else
#define device
#define constant
#define threadgroup
#endif
#define thread
// What Metal reserves for functions cannot be the name of something else.
#define kernel
#define vertex
#define fragment
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

#ifdef METAL_LINT  // classes cannot be copied between address spaces, so clang's own types stand in
typedef __bf16 bfloat;
#else
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
#endif

constexpr half operator"" h(long double x) { return half(x); }
constexpr bfloat operator"" bf(long double x) { return bfloat(float(x)); }

namespace metal {

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

// Vectors of two to four components (Metal Shading Language Specification 3.2, section 2.2).
#pragma once
#include "metal_types.h"

namespace metal {

#ifdef METAL_LINT

template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
// What a constructor call of a vector becomes.
template <class T, int N, class... Parts> vec<T, N> make_vector(Parts... parts);

#else

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

#endif

#define VECTOR_TYPES(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
VECTOR_TYPES(float) VECTOR_TYPES(half) VECTOR_TYPES(bfloat) VECTOR_TYPES(bool)
VECTOR_TYPES(char) VECTOR_TYPES(short) VECTOR_TYPES(int) VECTOR_TYPES(long)
VECTOR_TYPES(uchar) VECTOR_TYPES(ushort) VECTOR_TYPES(uint) VECTOR_TYPES(ulong)

}  // namespace metal

// The original overloads constructors by address space alone. This is as much as utils.h needs.
template <class T> struct complex_t {
  T real, imag;
};
using complex64_t = complex_t<float>;
constexpr bool operator>=(complex64_t a, complex64_t b) {
  return a.real > b.real || (a.real == b.real && a.imag >= b.imag);
}
constexpr complex64_t operator+(complex64_t a, complex64_t b) {
  return {a.real + b.real, a.imag + b.imag};
}

// 8 x 8 matrices spread over a SIMD-group (specification, section 6.7), two elements a lane.
//
// The specification leaves the layout open; this is the one of Apple's GPUs that MLX's kernels build on
// (BaseMMAFrag in mlx/backend/metal/kernels/steel/gemm/mma.h): a quad of lanes holds two rows of four.
#pragma once
#include "metal_simdgroup.h"

namespace emulator {

constexpr uint32_t matrix_row(uint32_t lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
constexpr uint32_t matrix_column(uint32_t lane) { return (lane >> 1 & 4) | (lane << 1 & 2); }  // and next

}  // namespace emulator

namespace metal {

template <class T, int Columns, int Rows> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "a simdgroup_matrix is 8 x 8");
  vec<T, 2> elements;

  simdgroup_matrix() : elements(emulator::undefined<T>()) {}
  explicit simdgroup_matrix(T diagonal) {
    const uint lane = emulator::lane(), place = emulator::matrix_row(lane) - emulator::matrix_column(lane);
    elements = vec<T, 2>{place == 0 ? diagonal : T(0), place == 1 ? diagonal : T(0)};
  }
  vec<T, 2>& thread_elements() { return elements; }
  const vec<T, 2>& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Columns, int Rows>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> filled;
  filled.elements = vec<T, 2>(value);
  return filled;
}

}  // namespace metal

namespace emulator {

#ifdef METAL_LINT  // where the type of memory says its address space, too
template <class T, class Memory> constexpr bool same_type = true;
#else
template <class T, class Memory> constexpr bool same_type = std::is_same_v<T, Memory>;
#endif

// The memory of a lane's element 0 or 1.
template <class T>
inline T& matrix_element(T* matrix, ulong stride, metal::ulong2 origin, bool transposed, int which) {
  const ulong row = matrix_row(lane()), column = matrix_column(lane()) + which;
  return transposed ? matrix[(origin.y + column) * stride + origin.x + row]
                    : matrix[(origin.y + row) * stride + origin.x + column];
}

inline void do_nothing(void**, uint32_t) {}

// A lane's elements of c = a b + c, in float, as Apple's GPUs compute.
struct MatrixPart {
  float a[2], b[2], c[2];
};

inline NOT_CHECKED void multiply_matrices(void** lanes, uint32_t) {
  float a[8][8], b[8][8], c[8][8];
  for (uint32_t l = 0; l < 32; l++) {
    const auto part = static_cast<const MatrixPart*>(lanes[l]);
    for (uint32_t i = 0, row = matrix_row(l), column = matrix_column(l); i < 2; i++, column++) {
      a[row][column] = part->a[i];
      b[row][column] = part->b[i];
      c[row][column] = part->c[i];
    }
  }
  for (int row = 0; row < 8; row++)
    for (int k = 0; k < 8; k++)
      for (int column = 0; column < 8; column++)
        c[row][column] = __builtin_fmaf(a[row][k], b[k][column], c[row][column]);
  for (uint32_t l = 0; l < 32; l++)
    for (uint32_t i = 0; i < 2; i++)
      static_cast<MatrixPart*>(lanes[l])->c[i] = c[matrix_row(l)][matrix_column(l) + i];
  count_matrix_product();
}

}  // namespace emulator

namespace metal {

template <class T, class Memory>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const Memory* from, ulong stride = 8,
                           ulong2 origin = ulong2(0), bool transposed = false, SITE) {
  static_assert(emulator::same_type<T, Memory>, "a matrix is loaded from memory of its own type");
  emulator::meet_simdgroup(emulator::do_nothing, nullptr, site, true);
  for (int i = 0; i < 2; i++)
    m.elements[i] = emulator::matrix_element(from, stride, origin, transposed, i);
}

template <class T, class Memory>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, Memory* to, ulong stride = 8,
                            ulong2 origin = ulong2(0), bool transposed = false, SITE) {
  static_assert(emulator::same_type<T, Memory>, "a matrix is stored to memory of its own type");
  emulator::meet_simdgroup(emulator::do_nothing, nullptr, site, true);
  for (int i = 0; i < 2; i++)
    emulator::matrix_element(to, stride, origin, transposed, i) = m.elements[i];
}

// The specification's references are not const.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a,
                                          simdgroup_matrix<B, 8, 8>& b, simdgroup_matrix<C, 8, 8>& c,
                                          SITE) {
  emulator::MatrixPart mine;
  for (int i = 0; i < 2; i++) {
    mine.a[i] = float(a.elements[i]);
    mine.b[i] = float(b.elements[i]);
    mine.c[i] = float(c.elements[i]);
  }
  emulator::meet_simdgroup(emulator::multiply_matrices, &mine, site, true);
  for (int i = 0; i < 2; i++) d.elements[i] = D(mine.c[i]);
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8>& a,
                               simdgroup_matrix<B, 8, 8>& b, SITE) {
  auto zero = make_filled_simdgroup_matrix<float, 8, 8>(0);
  simdgroup_multiply_accumulate(d, a, b, zero, site);
}

}  // namespace metal

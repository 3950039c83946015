// What MLX puts before the text of every custom kernel, as far as its documentation names it.

typedef half float16_t;
typedef bfloat bfloat16_t;

template <class T, class U> constexpr T ceildiv(T n, U m) { return (n + m - 1) / m; }

// The offset of the element with a row-major index, in an array of any strides.
template <class Offset = int64_t, class Index>
inline Offset elem_to_loc(Index index, const constant int* shape, const constant int64_t* strides,
                          int ndim) {
  Offset offset = 0;
  for (int axis = ndim - 1; axis >= 0; index /= shape[axis--])
    offset += (index % shape[axis]) * Offset(strides[axis]);
  return offset;
}

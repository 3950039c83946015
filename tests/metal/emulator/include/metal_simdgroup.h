// Barriers and SIMD-group functions (specification, sections 6.9.1 and 6.9.2). A SIMD-group is 32 lanes.
#pragma once
#include <string.h>

#include "metal_math.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

#define SITE emulator::Site site = emulator::Site::here()

inline void threadgroup_barrier(mem_flags flags, SITE) {
  emulator::threadgroup_barrier(uint(flags), site);
}
inline void simdgroup_barrier(mem_flags flags, SITE) { emulator::simdgroup_barrier(uint(flags), site); }

}  // namespace metal

namespace emulator {

// What reading an undefined value gives: NaN, -1 or true.
template <class T> inline T undefined() {
  T value;
  memset((void*)&value, std::is_same_v<T, bool> ? 1 : 0xFF, sizeof value);
  return value;
}

// A lane's part in a SIMD-group function.
template <class T> struct Part {
  T in, out;
  uint32_t source;  // the lane to read from
};

template <class T> NOT_CHECKED Part<T>* part(void** lanes, uint32_t active, uint32_t lane) {
  return lane < 32 && active >> lane & 1 ? static_cast<Part<T>*>(lanes[lane]) : nullptr;
}

template <class T> inline T meet(Collective collective, T in, uint32_t source, Site site) {
  Part<T> mine{in, {}, source};
  meet_simdgroup(collective, &mine, site);
  return mine.out;
}

// An assignment would be the vector's own, which is checked.
template <class T> NOT_CHECKED void copy_value(T& to, const T& from) {
  __builtin_memcpy((void*)&to, &from, sizeof to);
}

// Joins neighbours, then pairs of neighbours and so on, leaving inactive lanes out.
template <class T, class Join> NOT_CHECKED void reduce_lanes(void** lanes, uint32_t active) {
  T value[32];
  uint32_t present = active;
  for (uint32_t l = 0; l < 32; l++)
    if (auto* p = part<T>(lanes, active, l)) copy_value(value[l], p->in);
  for (uint32_t step = 1; step < 32; step *= 2)
    for (uint32_t l = 0; l < 32; l += 2 * step) {
      if (!(present >> (l + step) & 1)) continue;
      value[l] = present >> l & 1 ? Join::of(value[l], value[l + step]) : value[l + step];
      present |= 1u << l;
    }
  for (uint32_t l = 0; l < 32; l++)
    if (auto* p = part<T>(lanes, active, l)) copy_value(p->out, value[0]);
}

template <class T, class Join, bool inclusive> NOT_CHECKED void scan_lanes(void** lanes, uint32_t active) {
  T so_far = Join::template neutral<T>();
  for (uint32_t l = 0; l < 32; l++)
    if (auto* p = part<T>(lanes, active, l)) {
      const T with = Join::of(so_far, p->in);
      copy_value(p->out, inclusive ? with : so_far);
      so_far = with;
    }
}

template <class T> NOT_CHECKED void shuffle_lanes(void** lanes, uint32_t active) {
  for (uint32_t l = 0; l < 32; l++)
    if (auto* p = part<T>(lanes, active, l)) {
      auto* source = part<T>(lanes, active, p->source);
      copy_value(p->out, source ? source->in : undefined<T>());
    }
}

#define JOIN(Name, expression) \
  struct Name { template <class T> static T of(T a, T b) { return T(expression); } };
JOIN(Max, metal::max(a, b)) JOIN(Min, metal::min(a, b)) JOIN(And, a & b) JOIN(Or, a | b) JOIN(Xor, a ^ b)
struct Sum {
  template <class T> static T of(T a, T b) { return T(a + b); }
  template <class T> static T neutral() { return T(0); }
};
struct Product {
  template <class T> static T of(T a, T b) { return T(a * b); }
  template <class T> static T neutral() { return T(1); }
};

}  // namespace emulator

namespace metal {

#define REDUCTION(name, Join)                                                          \
  template <class T> inline T name(T x, SITE) {                                        \
    return emulator::meet(emulator::reduce_lanes<T, emulator::Join>, x, 0, site);      \
  }
REDUCTION(simd_sum, Sum) REDUCTION(simd_product, Product) REDUCTION(simd_max, Max) REDUCTION(simd_min, Min)
REDUCTION(simd_and, And) REDUCTION(simd_or, Or) REDUCTION(simd_xor, Xor)

#define SCAN(name, Join, inclusive)                                                            \
  template <class T> inline T name(T x, SITE) {                                                \
    return emulator::meet(emulator::scan_lanes<T, emulator::Join, inclusive>, x, 0, site);     \
  }
SCAN(simd_prefix_inclusive_sum, Sum, true) SCAN(simd_prefix_exclusive_sum, Sum, false)
SCAN(simd_prefix_inclusive_product, Product, true) SCAN(simd_prefix_exclusive_product, Product, false)

#define SHUFFLE(name, parameter, source_lane)                                          \
  template <class T> inline T name(T x, ushort parameter, SITE) {                      \
    const uint lane = emulator::lane();                                                \
    return emulator::meet(emulator::shuffle_lanes<T>, x, source_lane, site);           \
  }
SHUFFLE(simd_shuffle, source, source)
SHUFFLE(simd_broadcast, source, source)
SHUFFLE(simd_shuffle_xor, mask, lane ^ mask)
SHUFFLE(simd_shuffle_down, delta, lane + delta < 32 ? lane + delta : lane)
SHUFFLE(simd_shuffle_up, delta, lane >= delta ? lane - delta : lane)
SHUFFLE(simd_shuffle_rotate_down, delta, (lane + delta) % 32)
SHUFFLE(simd_shuffle_rotate_up, delta, (lane + 32 - delta) % 32)
SHUFFLE(quad_shuffle_xor, mask, lane ^ (mask & 3))
SHUFFLE(quad_broadcast, source, (lane & ~3u) | (source & 3))

// The lanes that the shift leaves empty take what it pushes out of `fill`.
template <class T> inline T simd_shuffle_and_fill_up(T x, T fill, ushort delta, SITE) {
  const T shifted = simd_shuffle_rotate_up(x, delta, site);
  const T filled = simd_shuffle_rotate_up(fill, delta, site);
  return emulator::lane() >= delta ? shifted : filled;
}
template <class T> inline T simd_shuffle_and_fill_down(T x, T fill, ushort delta, SITE) {
  const T shifted = simd_shuffle_rotate_down(x, delta, site);
  const T filled = simd_shuffle_rotate_down(fill, delta, site);
  return emulator::lane() + delta < 32 ? shifted : filled;
}

struct simd_vote {
  uint64_t votes;
  explicit operator uint64_t() const { return votes; }
  bool all() const { return uint32_t(votes) == ~0u; }
  bool any() const { return votes; }
};
inline simd_vote simd_ballot(bool x, SITE) { return {simd_or(x ? 1u << emulator::lane() : 0u, site)}; }
inline bool simd_any(bool x, SITE) { return simd_or(int(x), site); }
inline bool simd_all(bool x, SITE) { return simd_and(int(x), site); }

}  // namespace metal

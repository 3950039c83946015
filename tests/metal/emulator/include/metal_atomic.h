// Atomic functions on device and threadgroup memory (specification, section 6.15), all of relaxed order.
#pragma once
#include "metal_math.h"

namespace metal {

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

// Nothing can come between, since one fiber runs at a time.
#define FETCH(name, result)                                                               \
  template <class T, class U> NOT_CHECKED T name(atomic<T>* object, U operand, memory_order) {  \
    emulator::use_atomically(object, sizeof(T), emulator::reads | emulator::writes);     \
    const T old = object->value, x = T(operand);                                          \
    object->value = result;                                                               \
    return old;                                                                           \
  }
FETCH(atomic_fetch_add_explicit, T(old + x)) FETCH(atomic_fetch_sub_explicit, T(old - x))
FETCH(atomic_fetch_max_explicit, max(old, x)) FETCH(atomic_fetch_min_explicit, min(old, x))
FETCH(atomic_fetch_and_explicit, T(old & x)) FETCH(atomic_fetch_or_explicit, T(old | x))
FETCH(atomic_fetch_xor_explicit, T(old ^ x)) FETCH(atomic_exchange_explicit, x)

template <class T, class U>
NOT_CHECKED void atomic_store_explicit(atomic<T>* object, U value, memory_order) {
  emulator::use_atomically(object, sizeof(T), emulator::writes);
  object->value = T(value);
}
template <class T> NOT_CHECKED T atomic_load_explicit(const atomic<T>* object, memory_order) {
  emulator::use_atomically(object, sizeof(T), emulator::reads);
  return object->value;
}
template <class T>
NOT_CHECKED bool atomic_compare_exchange_weak_explicit(atomic<T>* object, T* expected, T desired,
                                                       memory_order, memory_order) {
  emulator::use_atomically(object, sizeof(T), emulator::reads | emulator::writes);
  const bool equal = __builtin_memcmp(&object->value, expected, sizeof(T)) == 0;
  (equal ? object->value : *expected) = equal ? desired : object->value;
  return equal;
}

}  // namespace metal

// The part of <metal_stdlib> that kernels use, and what a translated kernel needs besides.
#pragma once
#include "metal_atomic.h"
#include "metal_math.h"
#include "metal_matrix.h"
#include "metal_simdgroup.h"
#include "metal_types.h"
#include "metal_vector.h"

namespace metal {

struct os_log {  // drops what is logged
  template <class... Arguments> constexpr os_log(Arguments...) {}
  template <class... Arguments> void log_debug(Arguments...) const {}
};

}  // namespace metal

using metal::as_type, metal::atomic, metal::vec;
using namespace metal;

namespace emulator {

// A kernel's arguments as they come, converted to whatever the parameter's type is.
struct Pointer {
  void* address;
  template <class T> operator T*() const { return (T*)address; }
};
struct Reference {
  void* address;
  template <class T> operator T&() const { return *(T*)address; }
};
struct Position {
  const uint32_t* at;
  template <class T> NOT_CHECKED operator vec<T, 3>() const { return {T(at[0]), T(at[1]), T(at[2])}; }
  template <class T> NOT_CHECKED operator vec<T, 2>() const { return {T(at[0]), T(at[1])}; }
  NOT_CHECKED operator uint() const { return at[0]; }
};

}  // namespace emulator

// `threadgroup Name_type Name;`, given the type.
#ifdef METAL_LINT
#define THREADGROUP_VARIABLE(name) threadgroup name##_type& name = *(threadgroup name##_type*)0;
#define float2(...) make_vector<float, 2>(__VA_ARGS__)
#define float3(...) make_vector<float, 3>(__VA_ARGS__)
#define float4(...) make_vector<float, 4>(__VA_ARGS__)
#define half2(...) make_vector<half, 2>(__VA_ARGS__)
#define half3(...) make_vector<half, 3>(__VA_ARGS__)
#define half4(...) make_vector<half, 4>(__VA_ARGS__)
#define int2(...) make_vector<int, 2>(__VA_ARGS__)
#define int3(...) make_vector<int, 3>(__VA_ARGS__)
#define int4(...) make_vector<int, 4>(__VA_ARGS__)
#define uint2(...) make_vector<uint, 2>(__VA_ARGS__)
#define uint3(...) make_vector<uint, 3>(__VA_ARGS__)
#define uint4(...) make_vector<uint, 4>(__VA_ARGS__)
#else
#define THREADGROUP_VARIABLE(name)                                                                    \
  static const char name##_key = 0;                                                                   \
  name##_type& name = *static_cast<name##_type*>(                                                     \
      emulator::threadgroup_variable(&name##_key, sizeof(name##_type), alignof(name##_type), #name));
#endif

// What Metal leaves out of C++.
#pragma GCC poison double new delete virtual try catch throw typeid dynamic_cast thread_local goto

// What the runtime offers to an emulated kernel, and what the kernel offers to the runtime.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace emulator {

// One Metal thread as its kernel sees it, by the names of Metal's attributes (Metal Shading Language
// Specification 3.2, table 5.8).
struct Thread {
  uint32_t thread_position_in_grid[3], thread_position_in_threadgroup[3], threadgroup_position_in_grid[3];
  uint32_t threads_per_grid[3], threadgroups_per_grid[3];
  uint32_t threads_per_threadgroup[3];  // of this one, which the edge of the grid may cut
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t thread_index_in_threadgroup, thread_index_in_simdgroup, threads_per_simdgroup;
  uint32_t simdgroup_index_in_threadgroup, simdgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup;
};

// The place in the source that calls a barrier or a collective.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Does for all lanes at once what a SIMD-group function does. `lanes` are the pointers that the lanes
// gave to `meet_simdgroup`; bit l of `active` tells whether lane l takes part.
typedef void (*Collective)(void** lanes, uint32_t active);

enum Memory : uint32_t { device_memory = 1, threadgroup_memory = 2 };  // as in metal::mem_flags
enum Use : uint32_t { reads = 1, writes = 2, atomically = 4 };

uint32_t lane();  // of the running thread
void meet_simdgroup(Collective collective, void* lane, Site site, bool needs_all_lanes = false);
void simdgroup_barrier(uint32_t memory, Site site);
void threadgroup_barrier(uint32_t memory, Site site);
// The one copy of a `threadgroup` variable that all threads of a threadgroup share.
void* threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name);
void use_atomically(const void* address, size_t size, uint32_t use);
void count_matrix_product();

}  // namespace emulator

extern "C" void emulator_kernel(void** buffers, const emulator::Thread& thread);

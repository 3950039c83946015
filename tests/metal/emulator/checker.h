// Which accesses to memory are allowed: within bounds, after a write, and ordered among threads.
//
// Every byte of threadgroup memory and of the outputs remembers its last write and the reads since. Two
// accesses of one threadgroup are ordered if a barrier for that memory lies between them, counted in
// epochs; of one SIMD-group, also if a simdgroup_barrier does. Nothing orders two threadgroups. That
// depends on the kernel alone: the schedule decides which of two racing accesses comes second, not
// whether they race.
#pragma once
#include <stdint.h>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

constexpr uint32_t simd_width = 32;

struct Access {
  // The most narrow set that holds all threads of the access, or of several joined reads.
  enum Who : uint8_t { nobody, thread_only, simdgroup, threadgroup, everybody } who = nobody;
  bool atomic;
  uint16_t thread;        // in its threadgroup
  uint32_t threadgroup_index;
  uint32_t epoch;         // barriers of the threadgroup so far
  uint32_t simd_epoch;    // barriers of the SIMD-group so far

  bool same_simdgroup(const Access& other) const {
    return thread / simd_width == other.thread / simd_width;
  }
};

// Whether nothing orders `now` after `before`.
inline bool unordered(const Access& before, const Access& now) {
  if (before.who == Access::nobody || (before.atomic && now.atomic)) return false;
  if (before.who == Access::everybody || before.threadgroup_index != now.threadgroup_index) return true;
  if (before.epoch != now.epoch) return false;
  if (before.who == Access::threadgroup) return true;
  if (before.who == Access::thread_only && before.thread == now.thread) return false;
  return !before.same_simdgroup(now) || before.simd_epoch == now.simd_epoch;
}

// One access that stands for both reads. A read that an ordered one followed may be forgotten: whatever
// races with it races with the later one, too.
inline Access join_reads(const Access& before, Access now) {
  if (before.who == Access::nobody) return now;
  now.atomic = before.atomic && now.atomic;
  if (before.who == Access::everybody || before.threadgroup_index != now.threadgroup_index) {
    now.who = Access::everybody;
  } else if (before.epoch != now.epoch) {
    return now;
  } else if (before.who == Access::threadgroup || !before.same_simdgroup(now)) {
    now.who = Access::threadgroup;
  } else if (before.simd_epoch == now.simd_epoch) {
    now.who = before.thread == now.thread ? before.who : Access::simdgroup;
  }
  return now;
}

struct Byte {
  Access write, read;
};

// A buffer or a threadgroup variable.
struct Region {
  enum Kind : int { input, output, filled_output, threadgroup } kind;
  std::string name;
  char* base;
  size_t size;
  std::vector<Byte> bytes;  // of what can be written, when the accesses are checked
  uint64_t read = 0, written = 0;

  bool holds(const char* address, size_t count) const {
    return address >= base && address + count <= base + size;
  }
};

struct Finding {
  const char* what = nullptr;  // none: the access is fine
  size_t offset = 0;
  Access other{};
};

// Notes an access of `count` bytes and returns the first thing that is wrong with it.
inline Finding note(Region& region, size_t offset, size_t count, uint32_t use, const Access& now) {
  Finding found;
  auto report = [&](const char* what, size_t at, const Access& other) {
    if (!found.what) found = {what, at, other};
  };
  for (size_t i = offset; i < offset + count; i++) {
    Byte& byte = region.bytes[i];
    if (use & reads && byte.write.who == Access::nobody && region.kind != Region::filled_output)
      report("uninitialised: read before any write", i, byte.write);
    if (unordered(byte.write, now))
      report(use & writes ? "race: write not ordered after a write"
                          : "race: read not ordered after a write", i, byte.write);
    if (!(use & writes)) {
      byte.read = join_reads(byte.read, now);
      continue;
    }
    if (unordered(byte.read, now)) report("race: write not ordered after a read", i, byte.read);
    byte = {now, {}};
  }
  return found;
}

}  // namespace emulator

// Runs one dispatch of an emulated kernel: threadgroup after threadgroup, every thread a fiber.
//
// Fibers switch where threads wait for each other: at barriers and at SIMD-group functions. The last
// lane to arrive at a SIMD-group function computes it for all. In the checked build the compiler calls
// the hooks at the end of this file for every access to memory (-fsanitize=thread) and for undefined
// arithmetic (-fsanitize=bounds,...); no sanitizer's own runtime is linked.
#include "runtime.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <memory>

#include "checker.h"
#include "fiber.h"

using namespace emulator;

namespace {

constexpr size_t stack_bytes = 128 * 1024;
constexpr size_t max_threads = 1024;
constexpr size_t max_threadgroup_bytes = 32 * 1024;
constexpr size_t max_findings = 20;
// Bytes between threadgroup variables, so that an overrun of one does not reach the next.
constexpr size_t gap = 256;
constexpr size_t max_threadgroup_variables = 64;
constexpr size_t arena_bytes = max_threadgroup_bytes + max_threadgroup_variables * (gap + 64);

struct Buffer {
  void* data;
  size_t size;
  int kind;
  const char* name;
};

struct Statistics {
  uint64_t collectives, barriers, matrix_products, threadgroup_bytes;
};

struct Fiber {
  Thread thread;
  uint32_t index() const { return thread.thread_index_in_threadgroup; }
  uint32_t group() const { return thread.simdgroup_index_in_threadgroup; }

  enum State { ready, in_collective, in_barrier, done } state;
  void* stack_pointer;
  Collective collective;
  void* lane_data;
  Site site;
  bool needs_all_lanes;
};

struct SimdGroup {
  uint32_t first, count, live, waiting, epoch, device_epoch;
  std::vector<uint32_t> ready;
};

class Dispatch {
 public:
  Dispatch(const Buffer* given, int count, const uint32_t* grid, const uint32_t* threadgroup, bool checked,
           uint64_t seed, Statistics& statistics);
  void run();

  void finish_thread();
  void meet(Collective collective, void* lane, Site site, bool needs_all_lanes);
  void wait_at_barrier(uint32_t memory, Site site);
  void order_simdgroup(uint32_t memory);
  void* threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name);
  void access(const void* address, size_t size, uint32_t use);
  std::string self() const;
  void report(const std::string& key, const char* format, ...) __attribute__((format(printf, 3, 4)));
  [[noreturn]] void stop();

  const bool checked;
  Fiber* running = nullptr;
  std::vector<void*> buffers;
  std::vector<Region> regions;  // the buffers, then the variables of the running threadgroup
  std::string findings;
  Statistics& statistics;

 private:
  void run_threadgroup(uint32_t index);
  void start(uint32_t index, const uint32_t* position, const uint32_t* size);
  void wake(uint32_t index);
  Fiber* choose();
  void yield();
  void complete_if_met(SimdGroup& group);
  void release_barrier();
  void report_divergence();
  void access_region(Region& region, const char* address, size_t size, uint32_t use);
  const Region& nearest_region(const char* address) const;
  uint64_t random();
  SimdGroup& group() { return groups[running->group()]; }

  const uint32_t* grid;
  uint32_t group_size[3], group_count[3];
  bool stopped = false;
  uint64_t seed, random_state;
  std::map<std::string, int> reported;

  std::unique_ptr<char[]> stacks, arena;
  std::vector<Fiber> fibers;
  std::vector<SimdGroup> groups;
  void* main_stack = nullptr;
  uint32_t turn, live, at_barrier, barrier_memory, epoch, device_epoch, threadgroup_index;
  std::vector<const void*> variables;  // keys of the threadgroup variables met so far
  size_t arena_used;
};

Dispatch* dispatch = nullptr;

void run_fiber() {
  emulator_kernel(dispatch->buffers.data(), dispatch->running->thread);
  dispatch->finish_thread();
}

Dispatch::Dispatch(const Buffer* given, int count, const uint32_t* grid, const uint32_t* threadgroup,
                   bool checked, uint64_t seed, Statistics& statistics)
    : checked(checked),
      statistics(statistics),
      grid(grid),
      seed(seed),
      random_state(seed * 0x9E3779B97F4A7C15ull + 1) {
  for (int i = 0; i < count; i++) {
    Region region{Region::Kind(given[i].kind), given[i].name, (char*)given[i].data, given[i].size, {}};
    if (checked && region.kind != Region::input) region.bytes.resize(region.size);
    regions.push_back(region);
    buffers.push_back(given[i].data);
  }
  for (int i = 0; i < 3; i++) {
    group_size[i] = std::min(threadgroup[i], grid[i]);
    group_count[i] = (grid[i] + group_size[i] - 1) / group_size[i];
  }
}

void Dispatch::run() {
  size_t threads = size_t(group_size[0]) * group_size[1] * group_size[2];
  if (threads > max_threads)
    return report("threads", "%zu threads in a threadgroup; the limit is %zu", threads, max_threads);
  stacks.reset(new char[threads * stack_bytes]);
  arena.reset(new char[arena_bytes]);
  std::vector<uint32_t> order(group_count[0] * group_count[1] * group_count[2]);
  for (uint32_t i = 0; i < order.size(); i++) order[i] = i;
  if (seed)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random() % i]);
  for (uint32_t index : order) {
    run_threadgroup(index);
    regions.erase(regions.begin() + buffers.size(), regions.end());
    if (stopped) return;
  }
}

void Dispatch::run_threadgroup(uint32_t index) {
  threadgroup_index = index;
  const uint32_t position[3] = {index % group_count[0], index / group_count[0] % group_count[1],
                                index / group_count[0] / group_count[1]};
  uint32_t size[3];
  for (int i = 0; i < 3; i++) size[i] = std::min(group_size[i], grid[i] - position[i] * group_size[i]);
  live = size[0] * size[1] * size[2];
  turn = at_barrier = 0;
  barrier_memory = device_memory | threadgroup_memory;
  epoch = device_epoch = 0;
  variables.clear();
  arena_used = 0;
  memset(arena.get(), 0xFF, arena_bytes);  // NaN as a number, -1 as an integer
  fibers.assign(live, {});
  groups.clear();
  for (uint32_t first = 0; first < live; first += simd_width) {
    uint32_t count = std::min(simd_width, live - first);
    groups.push_back({first, count, count, 0, 0, 0, {}});
  }
  for (uint32_t i = live; i-- > 0;) start(i, position, size);
  running = choose();
  switch_stack(&main_stack, running->stack_pointer);
  running = nullptr;
}

// Makes a thread of the threadgroup at `position`, which has `size`.
void Dispatch::start(uint32_t index, const uint32_t* position, const uint32_t* size) {
  Fiber& fiber = fibers[index];
  Thread& t = fiber.thread;
  const uint32_t inside[3] = {index % size[0], index / size[0] % size[1], index / size[0] / size[1]};
  for (int i = 0; i < 3; i++) {
    t.thread_position_in_threadgroup[i] = inside[i];
    t.threadgroup_position_in_grid[i] = position[i];
    t.thread_position_in_grid[i] = position[i] * group_size[i] + inside[i];
    t.threads_per_threadgroup[i] = size[i];
    t.dispatch_threads_per_threadgroup[i] = group_size[i];
    t.threads_per_grid[i] = grid[i];
    t.threadgroups_per_grid[i] = group_count[i];
  }
  t.thread_index_in_threadgroup = index;
  t.thread_index_in_simdgroup = index % simd_width;
  t.threads_per_simdgroup = simd_width;
  t.simdgroup_index_in_threadgroup = index / simd_width;
  t.simdgroups_per_threadgroup = groups.size();
  const uint32_t full = group_size[0] * group_size[1] * group_size[2];
  t.dispatch_simdgroups_per_threadgroup = (full + simd_width - 1) / simd_width;
  fiber.stack_pointer = new_stack(stacks.get() + index * stack_bytes, stack_bytes, run_fiber);
  wake(index);
}

uint64_t Dispatch::random() {  // xorshift64 (Marsaglia 2003)
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

void Dispatch::wake(uint32_t index) {
  fibers[index].state = Fiber::ready;
  groups[fibers[index].group()].ready.push_back(index);
}

// The thread that runs next. A SIMD-group runs until it has to wait: with threads chosen one by one at
// random none would ever be a barrier ahead of another, and what goes wrong then would not show.
Fiber* Dispatch::choose() {
  if (seed && (groups[turn].ready.empty() || random() % 64 == 0)) turn = random() % groups.size();
  for (size_t tried = 0; tried < groups.size(); tried++, turn = (turn + 1) % groups.size()) {
    std::vector<uint32_t>& ready = groups[turn].ready;
    if (ready.empty()) continue;
    if (seed) std::swap(ready[random() % ready.size()], ready.back());
    uint32_t index = ready.back();
    ready.pop_back();
    return &fibers[index];
  }
  return nullptr;
}

void Dispatch::yield() {
  Fiber* next = choose();
  if (!next) {
    if (live) report_divergence();
    stop();
  }
  Fiber* self = running;
  running = next;
  if (next != self) switch_stack(&self->stack_pointer, next->stack_pointer);
}

// Leaves the threadgroup, for good if some of its threads are not done.
void Dispatch::stop() {
  stopped |= live > 0;
  switch_stack(&running->stack_pointer, main_stack);
  __builtin_unreachable();
}

void Dispatch::finish_thread() {
  running->state = Fiber::done;
  live--;
  group().live--;
  complete_if_met(group());
  if (live && at_barrier == live) release_barrier();
  yield();
}

void Dispatch::meet(Collective collective, void* lane, Site site, bool needs_all_lanes) {
  running->state = Fiber::in_collective;
  running->collective = collective;
  running->lane_data = lane;
  running->site = site;
  running->needs_all_lanes = needs_all_lanes;
  group().waiting++;
  complete_if_met(group());
  yield();
}

// Runs what all live lanes of the group wait for, if they wait for the same.
void Dispatch::complete_if_met(SimdGroup& group) {
  if (!group.waiting || group.waiting != group.live) return;
  const Fiber* sample = nullptr;
  void* lanes[simd_width] = {};
  uint32_t active = 0;
  for (uint32_t l = 0; l < group.count; l++) {
    Fiber& fiber = fibers[group.first + l];
    if (fiber.state != Fiber::in_collective) continue;
    if (!sample) sample = &fiber;
    if (fiber.collective != sample->collective || fiber.site.line != sample->site.line) return;
    lanes[l] = fiber.lane_data;
    active |= 1u << l;
  }
  if (sample->needs_all_lanes && active != ~0u) {
    report("lanes", "simdgroup_matrix function at %s:%d by %d lanes of SIMD-group %u; it needs all 32",
           sample->site.file, sample->site.line, __builtin_popcount(active), sample->group());
    stop();
  }
  sample->collective(lanes, active);
  statistics.collectives++;
  group.waiting = 0;
  for (uint32_t l = group.count; l-- > 0;)
    if (active >> l & 1) wake(group.first + l);
}

void Dispatch::order_simdgroup(uint32_t memory) {
  if (memory & threadgroup_memory) group().epoch++;
  if (memory & device_memory) group().device_epoch++;
}

void Dispatch::wait_at_barrier(uint32_t memory, Site site) {
  running->state = Fiber::in_barrier;
  running->collective = nullptr;
  running->site = site;
  barrier_memory &= memory;
  if (++at_barrier == live) release_barrier();
  yield();
}

void Dispatch::release_barrier() {
  const Site* site = nullptr;
  for (const Fiber& fiber : fibers) {
    if (fiber.state != Fiber::in_barrier) continue;
    if (!site) site = &fiber.site;
    if (fiber.site.line != site->line)
      report("barriers", "divergent barriers: threads of threadgroup %u meet at %s:%d and at %s:%d",
             threadgroup_index, site->file, site->line, fiber.site.file, fiber.site.line);
  }
  if (live < fibers.size())
    report("returned", "divergent barrier at %s:%d: %zu threads of threadgroup %u had returned before it",
           site->file, site->line, fibers.size() - live, threadgroup_index);
  if (barrier_memory & threadgroup_memory) epoch++;
  if (barrier_memory & device_memory) device_epoch++;
  barrier_memory = device_memory | threadgroup_memory;
  at_barrier = 0;
  statistics.barriers++;
  for (uint32_t i = fibers.size(); i-- > 0;)
    if (fibers[i].state == Fiber::in_barrier) wake(i);
}

// All live threads wait, and not for the same.
void Dispatch::report_divergence() {
  for (const SimdGroup& group : groups) {
    if (!group.waiting) continue;
    std::map<std::pair<int, Collective>, std::pair<int, const Fiber*>> places;  // lanes and one of them
    for (uint32_t l = 0; l < group.count; l++) {
      const Fiber& fiber = fibers[group.first + l];
      if (fiber.state == Fiber::done) continue;
      auto& [lanes, sample] = places[{fiber.site.line, fiber.collective}];
      lanes++;
      sample = &fiber;
    }
    std::string list;
    for (auto& [place, here] : places) {
      const auto& [lanes, sample] = here;
      list += (list.empty() ? "" : ", ") + std::to_string(lanes) + " in a " +
              (sample->state == Fiber::in_barrier ? "barrier" : "SIMD-group function") + " at " +
              sample->site.file + ":" + std::to_string(sample->site.line);
    }
    return report("divergence", "divergent lanes of SIMD-group %u of threadgroup %u: %s",
                  fibers[group.first].group(), threadgroup_index, list.c_str());
  }
}

void* Dispatch::threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name) {
  const size_t buffer_count = buffers.size();
  for (size_t i = 0; i < variables.size(); i++)
    if (variables[i] == key) return regions[buffer_count + i].base;
  size_t total = size;
  for (size_t i = buffer_count; i < regions.size(); i++) total += regions[i].size;
  statistics.threadgroup_bytes = std::max<uint64_t>(statistics.threadgroup_bytes, total);
  if (total > max_threadgroup_bytes || variables.size() == max_threadgroup_variables) {
    report("memory", "%zu bytes of threadgroup memory with '%s'; the limit is %zu", total, name,
           max_threadgroup_bytes);
    stop();
  }
  // At an odd multiple of the alignment, so that no access that asks for more finds it by luck.
  const uintptr_t start = reinterpret_cast<uintptr_t>(arena.get());
  arena_used = (((start + arena_used) / alignment + 1) | 1) * alignment - start;
  Region region{Region::threadgroup, name, arena.get() + arena_used, size, {}};
  arena_used += size + gap;
  if (checked) region.bytes.resize(size);
  regions.push_back(region);
  variables.push_back(key);
  return region.base;
}

std::string Dispatch::self() const {
  return "thread " + std::to_string(running->index()) + " of threadgroup " +
         std::to_string(threadgroup_index);
}

void Dispatch::report(const std::string& key, const char* format, ...) {
  if (reported[key]++ || reported.size() > max_findings) return;
  char line[500];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  findings += std::string(line) + "\n";
}

void Dispatch::access_region(Region& region, const char* address, size_t size, uint32_t use) {
  if (use & reads) region.read += size;
  if (use & writes) region.written += size;
  if (region.kind == Region::input) {
    if (use & writes)
      report("input " + region.name, "write to the input '%s' by %s", region.name.c_str(), self().c_str());
    return;
  }
  const bool shared = region.kind == Region::threadgroup;
  const Access now{Access::thread_only,
                   bool(use & atomically),
                   uint16_t(running->index()),
                   threadgroup_index,
                   shared ? epoch : device_epoch,
                   shared ? group().epoch : group().device_epoch};
  const Finding found = note(region, address - region.base, size, use, now);
  if (!found.what) return;
  std::string other;
  if (found.other.who)
    other = ", against thread " + std::to_string(found.other.thread) + " of threadgroup " +
            std::to_string(found.other.threadgroup_index);
  report(found.what + region.name, "%s: %s '%s', byte %zu, by %s%s", found.what,
         shared ? "threadgroup variable" : "output", region.name.c_str(), found.offset, self().c_str(),
         other.c_str());
}

const Region& Dispatch::nearest_region(const char* address) const {
  auto distance = [&](const Region& r) {
    return address < r.base ? r.base - address : std::max<ptrdiff_t>(0, address - (r.base + r.size - 1));
  };
  return *std::min_element(regions.begin(), regions.end(),
                           [&](const Region& a, const Region& b) { return distance(a) < distance(b); });
}

// Whether the address belongs to the kernel's constants, which are part of this library's image.
bool is_constant(const void* address) {
  Dl_info here, there;
  return dladdr((void*)&emulator_kernel, &here) && dladdr(address, &there) &&
         here.dli_fbase == there.dli_fbase;
}

void Dispatch::access(const void* pointer, size_t size, uint32_t use) {
  const char* address = static_cast<const char*>(pointer);
  const char* stack = stacks.get() + running->index() * stack_bytes;
  if (address >= stack && address < stack + stack_bytes) return;
  for (Region& region : regions)
    if (region.holds(address, size)) return access_region(region, address, size, use);
  const char* what = use & writes ? "write" : "read";
  if (address >= stacks.get() && address < stacks.get() + fibers.size() * stack_bytes) {
    report("private", "%s of another thread's private memory by %s", what, self().c_str());
  } else if (is_constant(address)) {
    if (!(use & writes)) return;
    report("constant", "write to constant memory by %s", self().c_str());
  } else {
    const Region& region = nearest_region(address);
    report("bounds", "%s of %zu bytes out of bounds by %s: at byte %td of '%s', which has %zu", what, size,
           self().c_str(), address - region.base, region.name.c_str(), region.size);
  }
  stop();
}

void checked_access(const void* address, size_t size, uint32_t use) {
  if (dispatch) dispatch->access(address, size, use);  // none runs while constants get their values
}

}  // namespace

namespace emulator {

uint32_t lane() { return dispatch->running->thread.thread_index_in_simdgroup; }

void meet_simdgroup(Collective collective, void* lane, Site site, bool needs_all_lanes) {
  dispatch->meet(collective, lane, site, needs_all_lanes);
}

void simdgroup_barrier(uint32_t memory, Site site) {
  auto order = [](void** lanes, uint32_t active) {
    uint32_t all = device_memory | threadgroup_memory;
    for (uint32_t l = 0; l < simd_width; l++)
      if (active >> l & 1) all &= *static_cast<uint32_t*>(lanes[l]);
    dispatch->order_simdgroup(all);
  };
  dispatch->meet(order, &memory, site, false);
}

void threadgroup_barrier(uint32_t memory, Site site) { dispatch->wait_at_barrier(memory, site); }

void* threadgroup_variable(const void* key, size_t size, size_t alignment, const char* name) {
  return dispatch->threadgroup_variable(key, size, alignment, name);
}

void use_atomically(const void* address, size_t size, uint32_t use) {
  if (dispatch->checked) dispatch->access(address, size, use | atomically);
}

void count_matrix_product() { dispatch->statistics.matrix_products++; }

}  // namespace emulator

extern "C" {

// Runs the kernel. Returns what was found wrong, "" for nothing; valid until the next call. `traffic` gets
// two numbers for each buffer, bytes read and bytes written, in the checked build.
__attribute__((visibility("default")))
const char* emulator_run(const Buffer* buffers, int count, const uint32_t* grid,
                         const uint32_t* threadgroup, int checked, uint64_t seed, Statistics* statistics,
                         uint64_t* traffic) {
  static std::string findings;
  *statistics = {};
  Dispatch here(buffers, count, grid, threadgroup, checked, seed, *statistics);
  dispatch = &here;
  here.run();
  dispatch = nullptr;
  for (int i = 0; i < count; i++) {
    traffic[2 * i] = here.regions[i].read;
    traffic[2 * i + 1] = here.regions[i].written;
  }
  findings = here.findings;
  return findings.c_str();
}

// ---- what -fsanitize=thread calls at every access ----

#define ACCESS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { checked_access(p, bytes, reads); }                 \
  void __tsan_write##bytes(void* p) { checked_access(p, bytes, writes); }               \
  void __tsan_unaligned_read##bytes(void* p) { checked_access(p, bytes, reads); }       \
  void __tsan_unaligned_write##bytes(void* p) { checked_access(p, bytes, writes); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* p, size_t n) { checked_access(p, n, reads); }
void __tsan_write_range(void* p, size_t n) { checked_access(p, n, writes); }
void* __tsan_memset(void* to, int value, size_t n) {
  checked_access(to, n, writes);
  return memset(to, value, n);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  checked_access(from, n, reads);
  checked_access(to, n, writes);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) {
  checked_access(from, n, reads);
  checked_access(to, n, writes);
  return memmove(to, from, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// ---- what -fsanitize=bounds,shift,... calls where arithmetic is undefined ----

struct Location {
  const char* file;
  uint32_t line, column;
};
static void undefined(const char* problem, const Location& at) {
  dispatch->report(problem, "%s at %s:%u by %s", problem, at.file, at.line, dispatch->self().c_str());
  dispatch->stop();
}
#define UNDEFINED(handler, problem, ...) \
  void __ubsan_handle_##handler(const Location* at, ##__VA_ARGS__) { undefined(problem, *at); }
UNDEFINED(out_of_bounds, "array index out of bounds", uintptr_t)
UNDEFINED(shift_out_of_bounds, "shift out of range", uintptr_t, uintptr_t)
UNDEFINED(divrem_overflow, "division by zero or out of range", uintptr_t, uintptr_t)
UNDEFINED(add_overflow, "signed overflow", uintptr_t, uintptr_t)
UNDEFINED(sub_overflow, "signed overflow", uintptr_t, uintptr_t)
UNDEFINED(mul_overflow, "signed overflow", uintptr_t, uintptr_t)
UNDEFINED(negate_overflow, "signed overflow", uintptr_t)
UNDEFINED(load_invalid_value, "invalid bool", uintptr_t)

struct TypeMismatch {
  Location at;
  const void* type;
  uint8_t log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(const TypeMismatch* found, uintptr_t address) {
  const bool fits = address && address % (uintptr_t(1) << found->log_alignment) == 0;
  undefined(fits ? "access outside of a variable" : "misaligned or null access", found->at);
}

}  // extern "C"

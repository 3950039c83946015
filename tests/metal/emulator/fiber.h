// Fibers: stacks of their own that are switched by hand. Only registers that the platform's calling
// convention preserves across a call are saved (System V x86-64 ABI 3.2.1; AAPCS64 6.1.1 and 6.1.2).
#pragma once
#include <stdint.h>
#include <string.h>

// Stores the running stack pointer and goes on with the other stack. The asm label makes the symbol the
// same on Linux and on macOS, which puts an underscore before C names.
extern "C" void switch_stack(void** save, void* load) asm("emulator_switch_stack");

#if defined(__x86_64__)

asm(R"(
.text
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

// A stack whose first switch enters `start`, which must not return.
inline void* new_stack(char* memory, size_t size, void (*start)()) {
  void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + size) & ~uintptr_t(15));
  *--top = nullptr;  // in place of a return address: calls leave the stack 8 off a multiple of 16
  *--top = reinterpret_cast<void*>(start);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  return top;
}

#elif defined(__aarch64__)

asm(R"(
.text
.p2align 2
emulator_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

// A stack whose first switch enters `start`, which must not return.
inline void* new_stack(char* memory, size_t size, void (*start)()) {
  char* top = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + size) & ~uintptr_t(15)) - 160;
  memset(top, 0, 160);
  memcpy(top + 88, &start, sizeof start);  // the link register
  return top;
}

#else
#error "The Metal emulator knows x86-64 and aarch64 only."
#endif

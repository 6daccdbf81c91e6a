/* fiber.cc: see fiber.h. */
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
/* void emulation_stack_switch(void **from, void *to): the registers that a call keeps go to the stack that is left,
 * whose pointer goes to *from; those of the other one come back. */
extern "C" void emulation_stack_switch(void **from, void *to);
__asm__(".text\n"
        ".globl emulation_stack_switch\n"
        ".type emulation_stack_switch, @function\n"
        "emulation_stack_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size emulation_stack_switch, . - emulation_stack_switch\n");
#endif

namespace emulation {

enum { STACK = 256 << 10 };

static void stack_make(fiber *f) {
    size_t guard = (size_t)sysconf(_SC_PAGESIZE);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *memory = mmap(NULL, STACK + guard, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
        perror("emulated device: a stack");
        abort();
    }
    f->memory = memory;
    f->bottom = (char *)memory + guard;
    f->size = STACK;
}

static void (*started)();

#ifdef __SANITIZE_ADDRESS__
static fiber *left; /* the one that the last switch left: whoever goes on is told its bounds */
#endif

/* The first function on a stack. */
static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(NULL, &left->bottom, &left->size);
#endif
    started();
    abort();
}

void fiber_prepare(fiber *f, void (*start)()) {
    if (!f->memory) stack_make(f);
    started = start;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(f->bottom, f->size); /* of functions that never returned */
#endif
#ifdef __x86_64__
    /* As emulation_stack_switch leaves it: six registers, the address it returns to, and above that a return address
     * that fiber_main never uses, which puts the stack where the calling convention wants it. */
    void **top = (void **)((char *)f->bottom + f->size);
    top[-1] = NULL;
    top[-2] = (void *)fiber_main;
    for (int i = 3; i <= 8; i++) top[-i] = NULL;
    f->at = top - 8;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = (void *)f->bottom;
    f->context.uc_stack.ss_size = f->size;
    f->context.uc_link = NULL;
    makecontext(&f->context, fiber_main, 0);
#endif
}

static void switch_stacks(fiber *from, fiber *to) {
#ifdef __x86_64__
    emulation_stack_switch(&from->at, to->at);
#else
    swapcontext(&from->context, &to->context);
#endif
}

void fiber_switch(fiber *from, fiber *to) {
#ifdef __SANITIZE_ADDRESS__
    left = from;
    __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->size);
    switch_stacks(from, to);
    __sanitizer_finish_switch_fiber(from->fake_stack, &left->bottom, &left->size);
#else
    switch_stacks(from, to);
#endif
}

void fiber_leave(fiber *from, fiber *to) {
#ifdef __SANITIZE_ADDRESS__
    left = from;
    __sanitizer_start_switch_fiber(NULL, to->bottom, to->size);
#endif
    switch_stacks(from, to);
    abort();
}

} // namespace emulation

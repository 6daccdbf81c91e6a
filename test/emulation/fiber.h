/* fiber.h: stacks and switching between them, for the emulation. A dozen instructions on x86-64; elsewhere ucontext,
 * whose switch is a system call. AddressSanitizer is told of each switch. */
#ifndef RIVERRUN_TEST_EMULATION_FIBER_H
#define RIVERRUN_TEST_EMULATION_FIBER_H

#include <stddef.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulation {

struct fiber {
    void *memory = NULL; /* the stack's; NULL: the stack of the thread that the program started with */
    void *at = NULL;     /* x86-64: the stack pointer where it has left */
#ifndef __x86_64__
    ucontext_t context;
#endif
    void *fake_stack = NULL; /* AddressSanitizer's */
    const void *bottom = NULL;
    size_t size = 0;
};

/* The next switch to it calls `start` on its stack, which is made if need be and kept for ever. `start` ends by
 * fiber_leave. */
void fiber_prepare(fiber *f, void (*start)());
void fiber_switch(fiber *from, fiber *to);
[[noreturn]] void fiber_leave(fiber *from, fiber *to);

} // namespace emulation

#endif

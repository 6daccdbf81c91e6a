/* emulation.cc: fibers, the order in which they run, and what they wait for (emulation.h). One launch at a time; the
 * scheduler is whoever called run_grid. */
#include "emulation.h"

#include "fiber.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

/* From the linker; weak, because there need not be any shared variable. */
extern "C" __attribute__((weak)) char __start_emulation_shared[], __stop_emulation_shared[];

namespace emulation {

enum waiting { RUNS, AT_BARRIER, AT_MEETING, AT_CLUSTER, AT_FLAG, RETURNED };

struct copy {
    void *to;
    const void *from;
    int size, bytes;
};

struct thread {
    fiber stack;
    uint3 index;
    enum waiting waiting;
    int barrier; /* AT_BARRIER: which, and for how many threads */
    unsigned wanted;
    const char *what; /* AT_MEETING */
    unsigned mask;
    void *brought;
    meeting *work;
    bool whole;
    bool arrived;         /* at the cluster's barrier, and has not waited for it */
    unsigned phase;       /* AT_CLUSTER, arrived: the barrier's when it arrived; AT_FLAG: the parity waited for */
    const uint64_t *flag; /* AT_FLAG */
    std::vector<copy> copies;  /* started and not waited for */
    std::vector<size_t> groups; /* how many of them belong to each committed group, oldest first */
    size_t committed;
};

/* A block that runs. */
struct block {
    uint3 index;
    unsigned rank; /* in its cluster */
    std::vector<thread> threads;
    unsigned left; /* of them, those that have not returned */
    void *dynamic;
    int sum, sum_out; /* of barrier_sum */
    std::vector<unsigned> order_of_warps, order_of_lanes;
};

static struct {
    const char *name; /* NULL when no kernel runs */
    const std::function<void()> *body;
    unsigned count; /* threads of a block */
    size_t dynamic_size;
    uint64_t key; /* of the order; 0 forward, 1 reverse */
    std::vector<block> blocks; /* of the cluster that runs, and left over from larger ones */
    unsigned cluster;          /* how many run */
    block *here;               /* the one that runs, and its thread that does */
    unsigned running;
    unsigned arrived, phase; /* of the cluster's barrier */
} now;

/* --- what goes wrong ---------------------------------------------------------------------------------------------- */

static void say_place() {
    fprintf(stderr, "emulated kernel %s, block (%u,%u,%u)", now.name, blockIdx.x, blockIdx.y, blockIdx.z);
}

void misuse(const char *format, ...) {
    fflush(stdout);
    if (now.name) {
        say_place();
        fprintf(stderr, ", thread (%u,%u,%u): ", threadIdx.x, threadIdx.y, threadIdx.z);
    } else {
        fprintf(stderr, "emulated device: ");
    }
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fprintf(stderr, "\n");
    abort();
}

static bool waits_alike(const thread *a, const thread *b) {
    if (a->waiting != b->waiting) return false;
    if (a->waiting == AT_BARRIER) return a->barrier == b->barrier && a->wanted == b->wanted;
    return a->waiting != AT_MEETING || (a->what == b->what && a->mask == b->mask);
}

/* Every thread waits or has returned, and no wait can end. */
[[noreturn]] static void deadlock() {
    fflush(stdout);
    say_place();
    fprintf(stderr, ": threads wait for ever:\n");
    for (unsigned i = 0, next; i < now.count; i = next) {
        const thread *t = &now.here->threads[i];
        for (next = i + 1; next < now.count && waits_alike(t, &now.here->threads[next]); next++) {}
        fprintf(stderr, "  threads %u to %u ", i, next - 1);
        if (t->waiting == RETURNED) fprintf(stderr, "have returned\n");
        else if (t->waiting == AT_CLUSTER) fprintf(stderr, "are at the cluster's barrier\n");
        else if (t->waiting == AT_FLAG) fprintf(stderr, "wait for a flag\n");
        else if (t->waiting == AT_MEETING) fprintf(stderr, "are at %s with the mask %08x\n", t->what, t->mask);
        else if (t->barrier == 0 && t->wanted == 0) fprintf(stderr, "are at __syncthreads\n");
        else fprintf(stderr, "are at barrier %d for %u threads\n", t->barrier, t->wanted);
    }
    abort();
}

/* --- the order ---------------------------------------------------------------------------------------------------- */

static uint64_t mixed(uint64_t v) {
    v += 0x9e3779b97f4a7c15u;
    v = (v ^ v >> 30) * 0xbf58476d1ce4e5b9u;
    v = (v ^ v >> 27) * 0x94d049bb133111ebu;
    return v ^ v >> 31;
}

static void order_make(std::vector<unsigned> &order, unsigned count, uint64_t salt) {
    order.resize(count);
    for (unsigned i = 0; i < count; i++) order[i] = now.key == 1 ? count - 1 - i : i;
    for (unsigned i = count; now.key > 1 && i > 1; i--) {
        unsigned j = (unsigned)(mixed(now.key * 1000003 + mixed(salt * 131 + i)) % i), kept = order[i - 1];
        order[i - 1] = order[j];
        order[j] = kept;
    }
}

static void order_read() {
    const char *wish = getenv("RIVERRUN_EMULATE_ORDER");
    now.key = 0;
    if (!wish || !*wish || strcmp(wish, "forward") == 0) return;
    char *end;
    uint64_t number = strtoull(wish, &end, 10);
    if (strcmp(wish, "reverse") == 0) now.key = 1;
    else if (*end == 0 && number > 0) now.key = number + 1;
    else misuse("RIVERRUN_EMULATE_ORDER must be forward, reverse or a number from 1, not '%s'", wish);
}

static bool flag_is_up(const uint64_t *flag, unsigned parity);

/* --- fibers ------------------------------------------------------------------------------------------------------- */

static fiber scheduler;

static void thread_main() {
    thread *self = &now.here->threads[now.running];
    (*now.body)();
    if (self->copies.size() > self->committed)
        misuse("%zu copies by cp.async were never committed: no wait is for them",
               self->copies.size() - self->committed);
    self->waiting = RETURNED;
    now.here->left--;
    fiber_leave(&self->stack, &scheduler);
}

/* Back to the scheduler until somebody lets this thread run again. */
static void wait_here(enum waiting why) {
    thread *self = &now.here->threads[now.running];
    self->waiting = why;
    fiber_switch(&self->stack, &scheduler);
}

static void thread_run(unsigned i) {
    now.running = i;
    threadIdx = now.here->threads[i].index;
    fiber_switch(&scheduler, &now.here->threads[i].stack);
}

/* Can a barrier or a meeting end? Looks at what thread i waits for, and lets those run who waited. */
static bool barrier_ends(unsigned i) {
    thread *t = &now.here->threads[i];
    unsigned there = 0, wanted = t->wanted ? t->wanted : now.here->left;
    for (unsigned j = 0; j < now.count; j++) {
        const thread *other = &now.here->threads[j];
        if (other->waiting == AT_BARRIER && other->barrier == t->barrier) there++;
    }
    if (there < wanted) return false;
    if (t->barrier == 0) {
        now.here->sum_out = now.here->sum;
        now.here->sum = 0;
    }
    int id = t->barrier;
    for (unsigned j = 0; j < now.count; j++) {
        thread *other = &now.here->threads[j];
        if (other->waiting == AT_BARRIER && other->barrier == id) other->waiting = RUNS;
    }
    return true;
}

static bool meeting_ends(unsigned i) {
    thread *t = &now.here->threads[i];
    unsigned first = i / WARP_LANES * WARP_LANES;
    void *all[WARP_LANES] = {NULL};
    for (unsigned k = 0; k < WARP_LANES; k++) {
        thread *other = first + k < now.count ? &now.here->threads[first + k] : NULL;
        if (!(t->mask >> k & 1)) continue;
        if (!other || other->waiting == RETURNED) {
            if (t->whole) misuse("%s needs all lanes of the warp, and lane %u is not there", t->what, k);
            continue;
        }
        if (other->waiting != AT_MEETING || other->mask != t->mask || other->what != t->what) return false;
        all[k] = other->brought;
    }
    t->work(all);
    for (unsigned k = 0; k < WARP_LANES; k++)
        if (all[k]) now.here->threads[first + k].waiting = RUNS;
    return true;
}

/* Run a warp until all its threads wait for the block or have returned. */
static bool warp_run(unsigned warp) {
    bool any = false;
    for (bool again = true; again;) {
        again = false;
        for (unsigned lane : now.here->order_of_lanes) {
            unsigned i = warp * WARP_LANES + lane;
            if (i >= now.count || now.here->threads[i].waiting != RUNS) continue;
            thread_run(i);
            again = any = true;
        }
        for (unsigned i = warp * WARP_LANES; i < (warp + 1) * WARP_LANES && i < now.count; i++)
            if (now.here->threads[i].waiting == AT_MEETING && meeting_ends(i)) again = true;
    }
    return any;
}

/* now.here = the block of this number in the grid, ready to run. */
static void block_start(block *self, size_t place) {
    now.here = self;
    self->index = {(unsigned)(place % gridDim.x), (unsigned)(place / gridDim.x % gridDim.y),
                   (unsigned)(place / gridDim.x / gridDim.y)};
    while (self->threads.size() < now.count) self->threads.emplace_back();
    if (now.dynamic_size) memset(self->dynamic, 0xff, now.dynamic_size);
    self->left = now.count;
    self->sum = 0;
    for (unsigned i = 0; i < now.count; i++) {
        thread *t = &self->threads[i];
        t->waiting = RUNS;
        t->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        t->arrived = false;
        t->copies.clear();
        t->groups.clear();
        t->committed = 0;
        fiber_prepare(&t->stack, thread_main);
    }
    order_make(self->order_of_warps, (now.count + WARP_LANES - 1) / WARP_LANES, 2 * place);
    order_make(self->order_of_lanes, WARP_LANES, 2 * place + 1);
}

/* Run a block until all its threads wait for others. */
static bool block_run(block *self) {
    bool any = false;
    now.here = self;
    blockIdx = self->index;
    for (unsigned warp : self->order_of_warps) any = warp_run(warp) || any;
    for (unsigned i = 0; i < now.count; i++) {
        thread *t = &self->threads[i];
        bool ends = t->waiting == AT_BARRIER ? barrier_ends(i) : t->waiting == AT_CLUSTER ? now.phase != t->phase
                  : t->waiting == AT_FLAG && flag_is_up(t->flag, t->phase);
        if (ends) any = true, t->waiting = RUNS;
    }
    return any;
}

/* The cluster's barrier ends when all threads that have not returned have arrived. */
static void cluster_settle() {
    unsigned left = 0;
    for (unsigned i = 0; i < now.cluster; i++) left += now.blocks[i].left;
    if (now.arrived == 0 || now.arrived < left) return;
    now.arrived = 0;
    now.phase++;
}

static void cluster_run(size_t place) {
    now.arrived = now.phase = 0;
    if (__start_emulation_shared) memset(__start_emulation_shared, 0xff,
                                         (size_t)(__stop_emulation_shared - __start_emulation_shared));
    for (unsigned i = 0; i < now.cluster; i++) block_start(&now.blocks[i], place * now.cluster + i);
    for (unsigned left = 1; left > 0;) {
        bool any = false;
        left = 0;
        for (unsigned i = 0; i < now.cluster; i++)
            any = block_run(&now.blocks[now.key == 1 ? now.cluster - 1 - i : i]) || any;
        cluster_settle();
        for (unsigned i = 0; i < now.cluster; i++) left += now.blocks[i].left;
        for (unsigned i = 0; !any && left > 0 && i < now.cluster; i++) {
            now.here = &now.blocks[i];
            blockIdx = now.here->index;
            if (now.here->left > 0) deadlock();
        }
    }
}

void run_grid(const char *name, dim3 grid, dim3 block, unsigned cluster, size_t dynamic,
              const std::function<void()> &body) {
    static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one);
    now.count = block.x * block.y * block.z;
    now.name = name;
    now.body = &body;
    now.cluster = cluster;
    while (now.blocks.size() < cluster) now.blocks.emplace_back();
    blockDim = block, gridDim = grid;
    now.dynamic_size = dynamic;
    for (unsigned i = 0; i < cluster; i++) {
        now.blocks[i].dynamic = NULL;
        now.blocks[i].rank = i;
        if (dynamic && posix_memalign(&now.blocks[i].dynamic, 1024, dynamic) != 0) misuse("out of memory");
    }
    size_t clusters = (size_t)grid.x * grid.y * grid.z / cluster;
    order_read();
    for (size_t i = 0; i < clusters; i++) cluster_run(now.key == 1 ? clusters - 1 - i : i);
    for (unsigned i = 0; i < cluster; i++) free(now.blocks[i].dynamic);
    now.name = NULL;
    pthread_mutex_unlock(&one);
}

/* --- what threads call -------------------------------------------------------------------------------------------- */

void *dynamic_shared() {
    return now.here->dynamic;
}

bool is_shared(const void *at, size_t bytes) {
    const char *from = (const char *)at, *dynamic = (const char *)now.here->dynamic;
    if (now.dynamic_size && from >= dynamic && from + bytes <= dynamic + now.dynamic_size) return true;
    return from >= __start_emulation_shared && from + bytes <= __stop_emulation_shared;
}

void barrier(int id, unsigned threads) {
    if (id < 0 || id >= BARRIERS) misuse("there is no barrier %d", id);
    if (threads % WARP_LANES != 0) misuse("barrier %d is for %u threads, which are no whole warps", id, threads);
    thread *self = &now.here->threads[now.running];
    self->barrier = id;
    self->wanted = threads;
    wait_here(AT_BARRIER);
}

int barrier_sum(int value) {
    now.here->sum += value;
    barrier(0, 0);
    return now.here->sum_out;
}

int lane() {
    return (int)(now.running % WARP_LANES);
}

unsigned lanes_left() {
    unsigned first = now.running / WARP_LANES * WARP_LANES, lanes = 0;
    for (unsigned k = 0; k < WARP_LANES && first + k < now.count; k++)
        if (now.here->threads[first + k].waiting != RETURNED) lanes |= 1u << k;
    return lanes;
}

void meet(const char *what, unsigned mask, void *mine, meeting *work, bool whole) {
    if (!(mask >> lane() & 1)) misuse("%s with the mask %08x, which lacks the lane that calls, %d", what, mask, lane());
    thread *self = &now.here->threads[now.running];
    self->what = what, self->mask = mask, self->brought = mine, self->work = work, self->whole = whole;
    wait_here(AT_MEETING);
}

/* --- clusters ----------------------------------------------------------------------------------------------------- */

unsigned cluster_rank() {
    return now.here->rank;
}

unsigned cluster_blocks() {
    return now.cluster;
}

char *cluster_place(const void *shared, unsigned rank) {
    if (rank >= now.cluster) misuse("block %u of a cluster of %u", rank, now.cluster);
    if (!is_shared(shared, 1) || !now.dynamic_size) misuse("a place in memory that is not dynamic shared memory");
    return (char *)now.blocks[rank].dynamic + ((const char *)shared - (const char *)now.here->dynamic);
}

void cluster_arrive() {
    thread *self = &now.here->threads[now.running];
    if (self->arrived) misuse("arrives twice at the cluster's barrier");
    self->arrived = true;
    self->phase = now.phase;
    now.arrived++;
}

void cluster_wait() {
    thread *self = &now.here->threads[now.running];
    if (!self->arrived) misuse("waits at the cluster's barrier, where it has not arrived");
    self->arrived = false;
    wait_here(AT_CLUSTER);
}

/* What the eight bytes of a flag hold. */
struct flag_bytes {
    int32_t bytes;  /* expected and not come; negative: come before they were expected */
    uint16_t phase; /* how often it went up */
    uint8_t armed, open;
};
static_assert(sizeof(flag_bytes) == sizeof(uint64_t), "a flag");
enum { FLAG_OPEN = 0xa5 };

static flag_bytes *flag_of(uint64_t *flag) {
    flag_bytes *f = (flag_bytes *)flag;
    if ((uintptr_t)flag % 8 != 0 || f->open != FLAG_OPEN) misuse("%p is no flag that was opened", (void *)flag);
    return f;
}

static void flag_settle(flag_bytes *f) {
    if (!f->armed || f->bytes != 0) return;
    f->armed = 0;
    f->phase++;
}

void flag_open(uint64_t *flag) {
    flag_bytes fresh = {0, 0, 0, FLAG_OPEN};
    if (!is_shared(flag, 8)) misuse("a flag in memory that is not shared");
    memcpy(flag, &fresh, sizeof fresh);
}

void flag_expect(uint64_t *flag, unsigned bytes) {
    flag_bytes *f = flag_of(flag);
    if (f->armed) misuse("a flag that waits for bytes is told of more");
    f->armed = 1;
    f->bytes += (int32_t)bytes;
    flag_settle(f);
}

static bool flag_is_up(const uint64_t *flag, unsigned parity) {
    return (((const flag_bytes *)flag)->phase & 1u) != parity;
}

void flag_wait(uint64_t *flag, unsigned parity) {
    thread *self = &now.here->threads[now.running];
    flag_of(flag);
    self->flag = flag;
    self->phase = parity;
    wait_here(AT_FLAG);
}

void flag_send(char *to, const void *from, size_t bytes, char *flag) {
    bool there = false;
    for (unsigned i = 0; i < now.cluster; i++) {
        const char *dynamic = (const char *)now.blocks[i].dynamic, *end = dynamic + now.dynamic_size;
        there |= to >= dynamic && to + bytes <= end && flag >= dynamic && flag + 8 <= end && now.blocks[i].left > 0;
    }
    if (!there) misuse("sends to %p with a flag at %p, which are not in a block of the cluster that runs", to, flag);
    if ((uintptr_t)to % bytes != 0) misuse("sends %zu bytes to %p, which is not aligned to them", bytes, to);
    memcpy(to, from, bytes);
    flag_bytes *f = flag_of((uint64_t *)flag);
    f->bytes -= (int32_t)bytes;
    flag_settle(f);
}

/* --- copies that don't wait --------------------------------------------------------------------------------------- */

void copy_start(void *shared, const void *global, int size, int bytes) {
    thread *self = &now.here->threads[now.running];
    if (!is_shared(shared, (size_t)size)) misuse("cp.async to memory that is not shared");
    if ((uintptr_t)shared % (uintptr_t)size != 0 || (uintptr_t)global % (uintptr_t)size != 0)
        misuse("cp.async of %d bytes between addresses that are not multiples of it: %p from %p", size, shared, global);
    if (bytes < 0 || bytes > size) misuse("cp.async of %d bytes out of %d", bytes, size);
    memset(shared, 0xff, (size_t)size);
    self->copies.push_back({shared, global, size, bytes});
}

void copy_commit() {
    thread *self = &now.here->threads[now.running];
    self->groups.push_back(self->copies.size() - self->committed);
    self->committed = self->copies.size();
}

void copy_wait(int groups) {
    thread *self = &now.here->threads[now.running];
    size_t done = 0, ended = 0;
    while (self->groups.size() - ended > (size_t)groups) done += self->groups[ended++];
    for (size_t i = 0; i < done; i++) {
        const copy *c = &self->copies[i];
        if (c->bytes > 0) memcpy(c->to, c->from, (size_t)c->bytes);
        memset((char *)c->to + c->bytes, 0, (size_t)(c->size - c->bytes));
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + (ptrdiff_t)done);
    self->groups.erase(self->groups.begin(), self->groups.begin() + (ptrdiff_t)ended);
    self->committed -= done;
}

} // namespace emulation

/* bench_stand.c: times repetitions of work on a device. bench_ops.h describes it. Owns a stand's memory and timer
 * between open and close. Called by bench_ops.c and bench_decode.c. */
#include "train/bench_ops.h"

#include <math.h>
#include <stdlib.h>

enum { WARM_UP = 2, REPEATS_LEAST = 5, REPEATS_FEW = 2, FLUSH_FLOATS = 64 << 20 };
static const double seconds_wanted = 0.1; /* that the repetitions of one measurement take together */
static const double seconds_long = 0.25;  /* one that takes as long is repeated few times */

static void stand_carve(struct bench_stand *s, arena *a) {
    int64_t floats = s->dev->kind == DEVICE_CUDA ? FLUSH_FLOATS : 1;
    s->flush = tensor_1d(arena_take(a, (size_t)floats * dtype_size(s->dev->ops->real)), s->dev->ops->real, floats);
    s->sum = arena_take(a, sizeof *s->sum);
}

int bench_stand_open(struct bench_stand *s, struct device *dev, error *err) {
    *s = (struct bench_stand){.dev = dev};
    arena counted = arena_measure("cache");
    stand_carve(s, &counted);
    TRY(arena_open(&s->memory, "cache", counted.peak, dev->memory, err));
    stand_carve(s, &s->memory);
    return device_timer_open(&s->timer, dev, BENCH_STAND_MOST, err);
}

void bench_stand_close(struct bench_stand *s) {
    device_timer_close(s->timer);
    arena_close(&s->memory);
}

static void time_lap(struct bench_stand *s, int lap, void (*work)(void *self), void *self) {
    if (s->dev->kind == DEVICE_CUDA) s->dev->ops->sum_squares(s->dev, s->sum, s->flush);
    device_timer_start(s->timer, lap);
    work(self);
    device_timer_stop(s->timer, lap);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int bench_take_times(struct bench_stand *s, void (*work)(void *self), void *self, struct bench_times *times,
                     error *err) {
    double seconds[BENCH_STAND_MOST], one = 0;
    for (int i = 0; i < WARM_UP && one < seconds_long; i++) {
        time_lap(s, 0, work, self);
        TRY(device_check(s->dev, err));
        one = device_timer_seconds(s->timer, 0);
    }
    int least = one < seconds_long ? REPEATS_LEAST : REPEATS_FEW;
    int count = (int)fmax(least, fmin(BENCH_STAND_MOST, seconds_wanted / one));
    for (int i = 0; i < count; i++) time_lap(s, i, work, self);
    TRY(device_check(s->dev, err));
    for (int i = 0; i < count; i++) seconds[i] = device_timer_seconds(s->timer, i);
    qsort(seconds, (size_t)count, sizeof *seconds, ascending);
    *times = (struct bench_times){.count = count,
                                  .median = (seconds[count / 2] + seconds[(count - 1) / 2]) / 2,
                                  .least = seconds[0],
                                  .most = seconds[count - 1]};
    return 0;
}

/* text.c: nearest names, and numbers as people read them. See text.h. */
#include "common/text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { WORD_MAX = 64 }; /* bytes of a word that text_distance looks at */

static int least(int a, int b) {
    return a < b ? a : b;
}

int text_distance(const char *a, const char *b) {
    int rows = (int)strnlen(a, WORD_MAX), columns = (int)strnlen(b, WORD_MAX);
    /* d[i % 3][j] is the distance between the first i bytes of a and the first j of b. A swap looks two rows back. */
    int d[3][WORD_MAX + 1];
    for (int j = 0; j <= columns; j++) d[0][j] = j;
    for (int i = 1; i <= rows; i++) {
        int *now = d[i % 3], *before = d[(i + 2) % 3], *earlier = d[(i + 1) % 3];
        now[0] = i;
        for (int j = 1; j <= columns; j++) {
            int changed = before[j - 1] + (a[i - 1] != b[j - 1]);
            now[j] = least(changed, least(before[j], now[j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
                now[j] = least(now[j], earlier[j - 2] + 1);
            }
        }
    }
    return d[rows % 3][columns];
}

const char *text_nearest(const char *word, const char *const *candidates) {
    int limit = (int)strnlen(word, WORD_MAX) / 3;
    int best = limit > 1 ? limit : 1;
    const char *nearest = NULL;
    for (; *candidates; candidates++) {
        int distance = text_distance(word, *candidates);
        if (distance < best || (distance == best && !nearest)) {
            best = distance;
            nearest = *candidates;
        }
    }
    return nearest;
}

/* `value` with three significant digits, scaled by `base` until it is below it, and the unit's name. */
static char *scaled(char *out, size_t size, double value, double base, const char *const *units, const char *plain) {
    if (!isfinite(value)) {
        snprintf(out, size, "?");
        return out;
    }
    int unit = 0;
    /* 999.5 would be printed as 1000, so it already belongs to the next unit. */
    while (units[unit] && fabs(value) >= (base == 1000 ? 999.5 : 1023.5)) {
        value /= base;
        unit++;
    }
    if (unit == 0) {
        snprintf(out, size, "%.0f%s", value, plain);
        return out;
    }
    int decimals = fabs(value) < 9.995 ? 2 : fabs(value) < 99.95 ? 1 : 0;
    snprintf(out, size, "%.*f %s", decimals, value, units[unit - 1]);
    return out;
}

char *text_bytes(char *out, size_t size, double bytes) {
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", NULL};
    return scaled(out, size, bytes, 1024, units, " B");
}

char *text_count(char *out, size_t size, double count) {
    static const char *const units[] = {"k", "M", "G", "T", "P", NULL};
    return scaled(out, size, count, 1000, units, "");
}

char *text_duration(char *out, size_t size, double seconds) {
    if (!isfinite(seconds) || seconds < 0 || seconds > 1e12) {
        snprintf(out, size, "?");
    } else if (seconds < 0.9995) {
        snprintf(out, size, "%.0f ms", seconds * 1e3);
    } else if (seconds < 59.95) {
        snprintf(out, size, "%.1f s", seconds);
    } else {
        long long s = llround(seconds);
        if (s < 3600)
            snprintf(out, size, "%lldm %02llds", s / 60, s % 60);
        else if (s < 86400)
            snprintf(out, size, "%lldh %02lldm", s / 3600, s / 60 % 60);
        else
            snprintf(out, size, "%lldd %02lldh", s / 86400, s / 3600 % 24);
    }
    return out;
}

int text_real_digits(double value) {
    char digits[40];
    for (int count = 1; count < 17; count++) {
        snprintf(digits, sizeof digits, "%.*g", count, value);
        if (strtod(digits, NULL) == value) return count;
    }
    return 17;
}

char *text_real(char *out, size_t size, double value) {
    snprintf(out, size, "%.*g", text_real_digits(value), value);
    return out;
}

double program_seconds(void) {
    char text[1024];
    unsigned long long ticks = 0;
    FILE *in = fopen("/proc/self/stat", "re");
    if (!in) return NAN;
    size_t size = fread(text, 1, sizeof text - 1, in);
    fclose(in);
    text[size] = '\0';
    /* The name of the program, in parentheses, may hold anything; the 20th field behind it is when it began. */
    const char *at = strrchr(text, ')');
    for (int field = 0; at && field < 20; field++) at = strchr(at + 1, ' ');
    if (!at || sscanf(at, " %llu", &ticks) != 1) return NAN;
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9 - (double)ticks / (double)sysconf(_SC_CLK_TCK);
}

double clock_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* safetensors.c: see safetensors.h. The reader maps the file and owns the mapping and a table of entries; the writer
 * owns a file_writer. Called by train/ (checkpoints, import, export) and by the golden test.
 *
 * The format: 8 bytes N (little-endian), N bytes of JSON, then the data. The JSON object has one member per tensor,
 * "NAME": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]} with offsets from the start of the data, and
 * may have "__metadata__": {"key": "string"}. Tensors fill the data without gaps.
 */
#include "common/safetensors.h"
#include "common/file.h"
#include "common/json.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "safetensors.c moves values between memory and file as they are: it needs a little-endian machine"
#endif

#define LENGTH_BYTES 8
/* The data starts at a multiple of this, so that a mapping of the file has every tensor aligned for its type. */
#define DATA_ALIGN 8

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [ST_F64] = {"F64", 8}, [ST_F32] = {"F32", 4},   [ST_F16] = {"F16", 2}, [ST_BF16] = {"BF16", 2},
    [ST_I64] = {"I64", 8}, [ST_I32] = {"I32", 4},   [ST_I16] = {"I16", 2}, [ST_I8] = {"I8", 1},
    [ST_U8] = {"U8", 1},   [ST_BOOL] = {"BOOL", 1},
};
#define DTYPES (int)(sizeof dtypes / sizeof *dtypes)

size_t safetensors_dtype_size(enum safetensors_dtype dtype) {
    return dtypes[dtype].size;
}

const char *safetensors_dtype_name(enum safetensors_dtype dtype) {
    return dtypes[dtype].name;
}

/* ---- reading ----------------------------------------------------------------------------------------------------- */

struct item { /* an entry while the header is read */
    struct safetensors_entry entry;
    uint64_t begin, end;
};

struct safetensors {
    char *path;
    void *map;
    size_t map_size;
    json_t *header;
    const json_t *metadata; /* borrowed from header; NULL if there is none */
    struct item *items;     /* in the order of their data */
    struct item **by_name;
    size_t count;
};

static int by_offset(const void *a, const void *b) {
    const struct item *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end)
        return x->end < y->end ? -1 : 1; /* empty tensors before the one that starts at the same place */
    return strcmp(x->entry.name, y->entry.name);
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(struct item *const *)a)->entry.name, (*(struct item *const *)b)->entry.name);
}

static int read_dtype(const char *path, const json_t *object, struct safetensors_entry *e, error *err) {
    const char *name = json_string_value(json_object_get(object, "dtype"));
    if (!name) return error_input(err, "%s: tensor %s has no dtype", path, e->name);
    for (int i = 0; i < DTYPES; i++) {
        if (strcmp(name, dtypes[i].name) == 0) {
            e->dtype = (enum safetensors_dtype)i;
            return 0;
        }
    }
    /* Names are part of messages, so what does not look like one stays out of them. */
    bool plain = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789") == strlen(name) && strlen(name) <= 32;
    return error_input(err,
                       "%s: tensor %s has dtype %s; riverrun reads F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL",
                       path, e->name, plain ? name : "?");
}

static int read_shape(const char *path, const json_t *object, struct safetensors_entry *e, error *err) {
    const json_t *shape = json_object_get(object, "shape");
    if (!json_is_array(shape)) return error_input(err, "%s: tensor %s has no shape", path, e->name);
    if (json_array_size(shape) > SAFETENSORS_DIMS) {
        return error_input(err, "%s: tensor %s has %zu dimensions; riverrun reads at most %d", path, e->name,
                           json_array_size(shape), SAFETENSORS_DIMS);
    }
    e->ndim = (int)json_array_size(shape);
    e->count = 1;
    bool empty = false, overflow = false;
    for (int i = 0; i < e->ndim; i++) {
        const json_t *dim = json_array_get(shape, (size_t)i);
        if (!json_is_integer(dim) || json_integer_value(dim) < 0) {
            return error_input(err, "%s: dimension %d of tensor %s is not a count", path, i, e->name);
        }
        e->dim[i] = json_integer_value(dim);
        if (e->dim[i] == 0) empty = true;
        else if (__builtin_mul_overflow(e->count, (uint64_t)e->dim[i], &e->count)) overflow = true;
    }
    if (empty) e->count = 0;
    else if (overflow || e->count > INT64_MAX / 8) {
        return error_input(err, "%s: tensor %s has a shape too large to exist", path, e->name);
    }
    return 0;
}

static int read_offsets(const char *path, const json_t *object, struct item *item, uint64_t data_size, error *err) {
    const struct safetensors_entry *e = &item->entry;
    const json_t *offsets = json_object_get(object, "data_offsets");
    const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end)) {
        return error_input(err, "%s: tensor %s has no pair of data_offsets", path, e->name);
    }
    if (json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin) ||
        (uint64_t)json_integer_value(end) > data_size) {
        return error_input(err,
                           "%s: the data of tensor %s (bytes %" PRId64 " to %" PRId64
                           ") lies outside the file's %" PRIu64 " bytes of data",
                           path, e->name, (int64_t)json_integer_value(begin), (int64_t)json_integer_value(end),
                           data_size);
    }
    item->begin = (uint64_t)json_integer_value(begin);
    item->end = (uint64_t)json_integer_value(end);
    uint64_t wanted = e->count * dtypes[e->dtype].size;
    if (item->end - item->begin != wanted) {
        return error_input(err, "%s: tensor %s has %" PRIu64 " bytes of data where its shape and dtype need %" PRIu64,
                           path, e->name, item->end - item->begin, wanted);
    }
    return 0;
}

static int read_item(const char *path, const char *name, const json_t *object, struct item *item, uint64_t data_size,
                     error *err) {
    struct safetensors_entry *e = &item->entry;
    if (strlen(name) == 0 || strlen(name) >= sizeof e->name) {
        return error_input(err, "%s: a tensor's name has %zu bytes, it must have 1 to %d", path, strlen(name),
                           LIMIT_NAME - 1);
    }
    for (const char *c = name; *c; c++) { /* names are part of messages */
        if ((unsigned char)*c < ' ' || *c == 127) {
            return error_input(err, "%s: a tensor's name holds the control character 0x%02x", path, (unsigned char)*c);
        }
    }
    snprintf(e->name, sizeof e->name, "%s", name);
    if (!json_is_object(object)) return error_input(err, "%s: tensor %s is not described by an object", path, e->name);
    TRY(read_dtype(path, object, e, err));
    TRY(read_shape(path, object, e, err));
    return read_offsets(path, object, item, data_size, err);
}

static int read_metadata(safetensors *s, const json_t *object, error *err) {
    if (!json_is_object(object)) return error_input(err, "%s: __metadata__ is not an object", s->path);
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)object, key, value) {
        if (!json_is_string(value)) return error_input(err, "%s: an entry of __metadata__ is not a string", s->path);
    }
    s->metadata = object;
    return 0;
}

/* Every member of the header, then the order of their data. */
static int read_header(safetensors *s, const char *data, uint64_t data_size, error *err) {
    size_t members = json_object_size(s->header);
    s->items = calloc(members + 1, sizeof *s->items);
    s->by_name = calloc(members + 1, sizeof *s->by_name);
    if (!s->items || !s->by_name)
        return error_system(err, "%s: no memory for the table of %zu tensors", s->path, members);
    const char *name;
    json_t *value;
    json_object_foreach(s->header, name, value) {
        if (strcmp(name, "__metadata__") == 0) {
            TRY(read_metadata(s, value, err));
        } else {
            TRY(read_item(s->path, name, value, &s->items[s->count], data_size, err));
            s->count++;
        }
    }
    qsort(s->items, s->count, sizeof *s->items, by_offset);
    uint64_t at = 0;
    for (size_t i = 0; i < s->count; i++) {
        struct item *item = &s->items[i];
        if (item->begin != at) {
            return error_input(err,
                               "%s: the data of tensor %s starts at byte %" PRIu64
                               ", %s the end of the tensor before it (%" PRIu64 ")",
                               s->path, item->entry.name, item->begin, item->begin < at ? "before" : "behind", at);
        }
        at = item->end;
        item->entry.data = data + item->begin;
        s->by_name[i] = item;
    }
    if (at != data_size) {
        return error_input(err, "%s: %" PRIu64 " bytes behind the last tensor belong to none", s->path, data_size - at);
    }
    qsort(s->by_name, s->count, sizeof *s->by_name, by_name);
    return 0;
}

static int map_file(safetensors *s, error *err) {
    int fd = open(s->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        if (errno == ENOENT) return error_input(err, "%s does not exist", s->path);
        return error_system(err, "cannot open %s: %s", s->path, strerror(errno));
    }
    struct stat st;
    int result = 0;
    if (fstat(fd, &st) != 0) result = error_system(err, "cannot read the size of %s: %s", s->path, strerror(errno));
    else if (!S_ISREG(st.st_mode)) result = error_input(err, "%s is not a regular file", s->path);
    else if (st.st_size < LENGTH_BYTES + 2) {
        result = error_input(err, "%s is no safetensors file: it has %" PRId64 " bytes", s->path, (int64_t)st.st_size);
    } else {
        s->map_size = (size_t)st.st_size;
        s->map = mmap(NULL, s->map_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (s->map == MAP_FAILED) {
            s->map = NULL;
            result = error_system(err, "cannot map %s into memory: %s", s->path, strerror(errno));
        }
    }
    close(fd);
    return result;
}

static int open_checked(safetensors *s, error *err) {
    TRY(map_file(s, err));
    const char *bytes = s->map;
    uint64_t length;
    memcpy(&length, bytes, sizeof length);
    uint64_t room = s->map_size - LENGTH_BYTES;
    if (length < 2 || length > room || length > LIMIT_JSON_BYTES || bytes[LENGTH_BYTES] != '{') {
        return error_input(err, "%s is no safetensors file: its first 8 bytes give a header of %" PRIu64
                           " bytes, which is not there", s->path, length);
    }
    if (json_read_text(&s->header, bytes + LENGTH_BYTES, length, s->path, err) != 0) return -1;
    if (!json_is_object(s->header)) return error_input(err, "%s: the header is not a JSON object", s->path);
    return read_header(s, bytes + LENGTH_BYTES + length, room - length, err);
}

int safetensors_open(safetensors **out, const char *path, error *err) {
    *out = NULL;
    safetensors *s = calloc(1, sizeof *s);
    if (!s || !(s->path = strdup(path))) {
        free(s);
        return error_system(err, "%s: no memory to open it", path);
    }
    if (open_checked(s, err) != 0) {
        safetensors_close(s);
        return -1;
    }
    *out = s;
    return 0;
}

void safetensors_close(safetensors *s) {
    if (!s) return;
    if (s->map) munmap(s->map, s->map_size);
    json_decref(s->header);
    free(s->items);
    free(s->by_name);
    free(s->path);
    free(s);
}

size_t safetensors_count(const safetensors *s) {
    return s->count;
}

const struct safetensors_entry *safetensors_at(const safetensors *s, size_t index) {
    ASSERT(index < s->count);
    return &s->items[index].entry;
}

const struct safetensors_entry *safetensors_find(const safetensors *s, const char *name) {
    size_t low = 0, high = s->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        int order = strcmp(name, s->by_name[middle]->entry.name);
        if (order == 0) return &s->by_name[middle]->entry;
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

const char *safetensors_metadata(const safetensors *s, const char *key) {
    return s->metadata ? json_string_value(json_object_get(s->metadata, key)) : NULL;
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static inline float from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023, wide;
    if (exponent == 0) { /* zero and subnormals: the mantissa counts units of 2^-24, which a float holds exactly */
        float x = (float)mantissa * 0x1p-24f;
        return sign ? -x : x;
    }
    if (exponent == 31) wide = sign | 0x7f800000u | mantissa << 13;
    else wide = sign | (exponent + 112) << 23 | mantissa << 13;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

uint16_t safetensors_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40); /* a NaN must not round to infinity */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Converts elements of the C type `type` at `from` (unaligned) by `value(x)` into out[0..count). */
#define CONVERT(type, value)                                                                                           \
    for (uint64_t i = 0; i < count; i++) {                                                                             \
        type x;                                                                                                        \
        memcpy(&x, bytes + i * sizeof x, sizeof x);                                                                    \
        out[i] = value;                                                                                                \
    }                                                                                                                  \
    break
#define CONVERT_ALL(real)                                                                                              \
    ASSERT(from <= e->count && count <= e->count - from);                                                              \
    const char *bytes = (const char *)e->data + from * dtypes[e->dtype].size;                                          \
    switch (e->dtype) {                                                                                                \
    case ST_F64: CONVERT(double, (real)x);                                                                             \
    case ST_F32: CONVERT(float, (real)x);                                                                              \
    case ST_F16: CONVERT(uint16_t, from_f16(x));                                                                       \
    case ST_BF16: CONVERT(uint16_t, from_bf16(x));                                                                     \
    case ST_I64: CONVERT(int64_t, (real)x);                                                                            \
    case ST_I32: CONVERT(int32_t, (real)x);                                                                            \
    case ST_I16: CONVERT(int16_t, (real)x);                                                                            \
    case ST_I8: CONVERT(int8_t, (real)x);                                                                              \
    case ST_U8: CONVERT(uint8_t, (real)x);                                                                             \
    case ST_BOOL: CONVERT(uint8_t, (real)(x != 0));                                                                    \
    }

void safetensors_to_f32(const struct safetensors_entry *e, uint64_t from, uint64_t count, float *out) {
    CONVERT_ALL(float)
}

void safetensors_to_f64(const struct safetensors_entry *e, uint64_t from, uint64_t count, double *out) {
    CONVERT_ALL(double)
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

struct safetensors_writer {
    file_writer *file;
    uint64_t *bytes; /* of each tensor */
    size_t count, at;
    uint64_t done; /* bytes of tensor `at` that were appended */
};

static json_t *describe(const struct safetensors_entry *e, uint64_t begin, uint64_t end) {
    json_t *shape = json_array();
    for (int i = 0; i < e->ndim; i++) json_array_append_new(shape, json_integer(e->dim[i]));
    json_t *offsets = json_array();
    json_array_append_new(offsets, json_integer((json_int_t)begin));
    json_array_append_new(offsets, json_integer((json_int_t)end));
    json_t *object = json_object();
    json_object_set_new(object, "dtype", json_string(dtypes[e->dtype].name));
    json_object_set_new(object, "shape", shape);
    json_object_set_new(object, "data_offsets", offsets);
    return object;
}

/* The header's text, and in bytes[] the size of each tensor. */
static char *header_text(const char *path, const struct safetensors_entry *entries, size_t count,
                         const char *const *metadata, uint64_t *bytes, error *err) {
    json_t *header = json_object();
    if (metadata && metadata[0]) {
        json_t *object = json_object();
        for (size_t i = 0; metadata[i]; i += 2) json_object_set_new(object, metadata[i], json_string(metadata[i + 1]));
        json_object_set_new(header, "__metadata__", object);
    }
    uint64_t at = 0;
    for (size_t i = 0; i < count; i++) {
        const struct safetensors_entry *e = &entries[i];
        uint64_t elements = 1;
        for (int d = 0; d < e->ndim; d++) elements *= (uint64_t)e->dim[d];
        bytes[i] = elements * dtypes[e->dtype].size;
        /* Readers view the mapping with the tensor's type: wider types must come first. */
        ASSERT(at % dtypes[e->dtype].size == 0);
        ASSERT(!json_object_get(header, e->name));
        json_object_set_new(header, e->name, describe(e, at, at + bytes[i]));
        at += bytes[i];
    }
    char *text = json_text(header, JSON_COMPACT, path, err);
    json_decref(header);
    return text;
}

static int write_header(safetensors_writer *w, const char *text, error *err) {
    static const char spaces[DATA_ALIGN] = "        ";
    size_t size = strlen(text), padding = (DATA_ALIGN - (LENGTH_BYTES + size) % DATA_ALIGN) % DATA_ALIGN;
    uint64_t length = size + padding;
    TRY(file_write(w->file, &length, sizeof length, err));
    TRY(file_write(w->file, text, size, err));
    return file_write(w->file, spaces, padding, err);
}

/* Steps over tensors that are complete, empty ones included. */
static void skip_complete(safetensors_writer *w) {
    while (w->at < w->count && w->done == w->bytes[w->at]) {
        w->at++;
        w->done = 0;
    }
}

int safetensors_create(safetensors_writer **out, const char *path, const struct safetensors_entry *entries,
                       size_t count, const char *const *metadata, error *err) {
    *out = NULL;
    safetensors_writer *w = calloc(1, sizeof *w);
    uint64_t *bytes = calloc(count + 1, sizeof *bytes);
    char *text = NULL;
    if (!w || !bytes) error_system(err, "no memory for the header of %s, of %zu tensors", path, count);
    else text = header_text(path, entries, count, metadata, bytes, err);
    if (!text) {
        free(w);
        free(bytes);
        return -1;
    }
    w->bytes = bytes;
    w->count = count;
    int result = file_create(&w->file, path, err);
    if (result == 0) result = write_header(w, text, err);
    free(text);
    if (result != 0) {
        safetensors_abandon(w);
        return -1;
    }
    skip_complete(w);
    *out = w;
    return 0;
}

int safetensors_append(safetensors_writer *w, const void *data, size_t bytes, error *err) {
    TRY(file_write(w->file, data, bytes, err));
    while (bytes > 0) {
        ASSERT(w->at < w->count);
        uint64_t room = w->bytes[w->at] - w->done, part = bytes < room ? bytes : room;
        w->done += part;
        bytes -= part;
        skip_complete(w);
    }
    return 0;
}

int safetensors_finish(safetensors_writer *w, uint64_t *size, uint64_t *hash, error *err) {
    ASSERT(w->at == w->count);
    if (size) *size = file_size_so_far(w->file);
    if (hash) *hash = file_hash(w->file);
    int result = file_close_synced(w->file, err);
    w->file = NULL;
    safetensors_abandon(w);
    return result;
}

void safetensors_abandon(safetensors_writer *w) {
    if (!w) return;
    file_abandon(w->file);
    free(w->bytes);
    free(w);
}

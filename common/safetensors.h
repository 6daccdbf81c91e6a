/* safetensors.h: reading and writing the safetensors format (8-byte header length, JSON header, raw little-endian
 * data).
 *
 * The reader believes nothing: header length, JSON, dtypes, shapes, offsets (in order, no gaps or overlaps, within the
 * file) are checked before any tensor is handed out; each refusal is one sentence naming file and tensor. The file is
 * memory-mapped; views live as long as the reader.
 */
#ifndef RIVERRUN_SAFETENSORS_H
#define RIVERRUN_SAFETENSORS_H

#include "common/error.h"
#include "common/limits.h"
#include <stdint.h>

enum safetensors_dtype { ST_F64, ST_F32, ST_F16, ST_BF16, ST_I64, ST_I32, ST_I16, ST_I8, ST_U8, ST_BOOL };
#define SAFETENSORS_DIMS 8

struct safetensors_entry {
    char name[LIMIT_NAME];
    enum safetensors_dtype dtype;
    int ndim;
    int64_t dim[SAFETENSORS_DIMS];
    uint64_t count; /* elements */
    const void *data; /* reader: in the mapping; may be unaligned for its dtype */
};

typedef struct safetensors safetensors;
int safetensors_open(safetensors **s, const char *path, error *err);
void safetensors_close(safetensors *s);
size_t safetensors_count(const safetensors *s);
const struct safetensors_entry *safetensors_at(const safetensors *s, size_t index);
const struct safetensors_entry *safetensors_find(const safetensors *s, const char *name); /* NULL if absent */
const char *safetensors_metadata(const safetensors *s, const char *key);                  /* NULL if absent */

/* Elements [from, from+count) of an entry converted to float or double (from any floating dtype; integers too). */
void safetensors_to_f32(const struct safetensors_entry *e, uint64_t from, uint64_t count, float *out);
void safetensors_to_f64(const struct safetensors_entry *e, uint64_t from, uint64_t count, double *out);
size_t safetensors_dtype_size(enum safetensors_dtype dtype);
const char *safetensors_dtype_name(enum safetensors_dtype dtype);
uint16_t safetensors_bf16(float x); /* round to nearest even; NaN stays NaN */

/* Writing: entries (name, dtype, dims; data ignored) are fixed at open; then each tensor's data is appended in that
 * order, in pieces of any size. Goes through common/file.h; finish syncs and returns size and XXH64 of the whole
 * file. */
typedef struct safetensors_writer safetensors_writer;
int safetensors_create(safetensors_writer **w, const char *path, const struct safetensors_entry *entries, size_t count,
                       const char *const *metadata /* key, value, ..., NULL; may be NULL */, error *err);
int safetensors_append(safetensors_writer *w, const void *data, size_t bytes, error *err);
int safetensors_finish(safetensors_writer *w, uint64_t *size, uint64_t *hash, error *err); /* frees, on failure too */
void safetensors_abandon(safetensors_writer *w);

#endif

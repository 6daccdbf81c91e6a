/* jsonl.h: one input's JSON lines as documents. */
#ifndef RIVERRUN_JSONL_H
#define RIVERRUN_JSONL_H

#include "common/error.h"
#include "data/input_stream.h"
#include "data/split.h"

/* Every line holds a JSON object, and its string at `key` (data/json_scan.h) is a document; lines of nothing but white
 * space are passed over. Each document begins as an input does, with nothing in front of it: JSON lines make the same
 * shards as files with the same texts, not split. The first line that is not as it must be ends it with ERROR_INPUT,
 * "INPUT:LINE: ..."; so does one of more than LIMIT_JSON_LINE bytes. Memory: the longest line, twice at the most. */
int jsonl_documents(input_stream *s, const char *key, const struct split_sink *sink, error *err);

#endif

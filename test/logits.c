/* logits.c: what a checkpoint computes, for comparison with other software (scripts/check_transformers.py).
 *
 *   logits CHECKPOINT < IDS    token ids in decimal, one sequence: the logits of every position to standard output,
 * f32, (T, vocabulary rows), row-major, in the machine's byte order logits --ids CHECKPOINT < TEXT    the ids of a
 * text, in decimal, one a line
 *
 * The whole model runs as in evaluation, in f32 on the CPU.
 */
#include "train/checkpoint.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct parts {
    struct checkpoint *checkpoint;
    tokenizer *tokenizer; /* NULL where there is none that riverrun reads */
    struct model_config *config;
    struct device *dev;
    struct model *model;
};

static char *read_input(size_t *size, error *err) {
    size_t capacity = 1 << 16, used = 0;
    char *text = malloc(capacity);
    while (text && (used += fread(text + used, 1, capacity - 1 - used, stdin)) == capacity - 1) {
        capacity *= 2;
        char *larger = realloc(text, capacity);
        if (!larger) free(text);
        text = larger;
    }
    if (!text) {
        error_system(err, "no memory for the input");
        return NULL;
    }
    text[used] = 0;
    *size = used;
    return text;
}

static int print_ids(const struct parts *p, const char *text, size_t size, error *err) {
    if (!p->tokenizer)
        return error_input(err, "%s has no tokenizer that riverrun reads", checkpoint_path(p->checkpoint));
    struct token_list list = {0};
    encoder *e;
    TRY(encoder_open(&e, p->tokenizer, err));
    int failed = encoder_append(e, text, size, &list, err);
    for (size_t i = 0; !failed && i < list.count; i++) printf("%" PRId32 "\n", list.ids[i]);
    encoder_close(e);
    free(list.ids);
    return failed;
}

/* Ids, checked against the rows of the model. */
static int parse_ids(const char *text, int64_t rows, int32_t **ids, int64_t *count, error *err) {
    *count = 0;
    *ids = malloc((strlen(text) + 1) * sizeof **ids);
    if (!*ids) return error_system(err, "no memory for the ids");
    for (;;) {
        char *end;
        long long id = strtoll(text, &end, 10);
        if (end == text) break;
        if (id < 0 || id >= rows)
            return error_input(err, "id %lld is not below the model's %" PRId64 " rows", id, rows);
        (*ids)[(*count)++] = (int32_t)id;
        text = end;
    }
    text += strspn(text, " \t\n");
    if (*text || *count == 0) return error_input(err, "the input must be one or more token ids in decimal");
    return 0;
}

static int print_logits(struct parts *p, const char *text, error *err) {
    int32_t *ids;
    int64_t T, rows = p->config->rows;
    int result = parse_ids(text, rows, &ids, &T, err);
    float *logits = NULL;
    if (result == 0) result = device_open(&p->dev, DEVICE_CPU, PRECISION_F32, err);
    if (result == 0) result = model_open(&p->model, p->config, p->dev, MODEL_INFER, 1, T, 0, 1, err);
    if (result == 0) result = checkpoint_load_model(p->checkpoint, p->model, err);
    if (result == 0 && !(logits = malloc((size_t)(T * rows) * sizeof *logits))) result = error_system(err, "no memory");
    if (result == 0) {
        model_set_batch(p->model, ids, NULL, NULL, 1, T);
        model_forward(p->model, NULL, NULL, false);
        model_logits(p->model, 0, T, logits);
        fwrite(logits, sizeof *logits, (size_t)(T * rows), stdout);
    }
    free(logits);
    free(ids);
    return result;
}

static int run(struct parts *p, const char *path, bool want_ids, error *err) {
    error ignored = {0};
    TRY(checkpoint_open(&p->checkpoint, path, err));
    if (checkpoint_tokenizer(p->checkpoint, &p->tokenizer, &ignored) != 0) p->tokenizer = NULL;
    int64_t vocab = p->tokenizer ? tokenizer_vocab(p->tokenizer) : 0;
    TRY(model_config_bind(&p->config, checkpoint_config(p->checkpoint), vocab, err));
    size_t size;
    char *text = read_input(&size, err);
    if (!text) return -1;
    int result = want_ids ? print_ids(p, text, size, err) : print_logits(p, text, err);
    free(text);
    return result;
}

static void parts_close(struct parts *p) {
    model_close(p->model);
    if (p->dev) device_close(p->dev);
    model_config_free(p->config);
    if (p->tokenizer) tokenizer_close(p->tokenizer);
    checkpoint_close(p->checkpoint);
}

int main(int argc, char **argv) {
    bool want_ids = argc == 3 && strcmp(argv[1], "--ids") == 0;
    if (argc != 2 && !want_ids) {
        fprintf(stderr, "usage: logits CHECKPOINT < IDS, or logits --ids CHECKPOINT < TEXT\n");
        return 2;
    }
    struct parts p = {0};
    error err = {0};
    int result = run(&p, argv[argc - 1], want_ids, &err);
    parts_close(&p);
    if (result == 0 && fflush(stdout) == 0 && !ferror(stdout)) return 0;
    fprintf(stderr, "logits: %s\n", result == 0 ? "cannot write to standard output" : err.text);
    return result == 0 ? 1 : error_exit_code(&err);
}

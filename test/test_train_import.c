/* test_train_import.c: directories that other software saved, in every form that weights come in; what import makes of
 * them and export gives back; and what is refused. Whether transformers agrees is for test_transformers.sh to say. */
#include "test/unit.h"

#include "test/support_checkpoint.h"
#include "train/commands.h"
#include "train/conversion.h"
#include <limits.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[256];
static struct comm one;
static struct parts model; /* tied; its weights are those of step 1 */
static struct parts untied;

static const char untied_text[] =
    "[model]\nd_model = 12\nvocab_size = 0\npad_vocab_to = 16\ntie_embeddings = false\npattern = m*2\n"
    "[block.m]\nmixer = mamba2\nd_state = 5\nhead_dim = 8\nchunk = 8\n";

/* A path in the directory. */
#define at(...) unit_format(directory, __VA_ARGS__)

/* ---- making directories ------------------------------------------------------------------------------------------ */

/* A tensor of a foreign file. */
struct piece {
    char name[LIMIT_NAME];
    enum safetensors_dtype dtype;
    int ndim;
    int64_t dim[SAFETENSORS_DIMS];
    int64_t count;
    float *values;
};

struct foreign {
    struct piece pieces[64];
    int count;
};

static void foreign_free(struct foreign *f) {
    for (int i = 0; i < f->count; i++) free(f->pieces[i].values);
    f->count = 0;
}

/* All tensors of the model, as they are. */
static void foreign_take(struct foreign *f, const struct parts *p, enum safetensors_dtype dtype) {
    const struct params *params = model_params(p->m);
    f->count = 0;
    for (int i = 0; i < params->count; i++) {
        const struct param *t = &params->list[i];
        struct piece *piece = &f->pieces[f->count++];
        snprintf(piece->name, sizeof piece->name, "%s", t->name);
        piece->dtype = dtype;
        piece->ndim = t->ndim;
        for (int k = 0; k < t->ndim; k++) piece->dim[k] = t->dim[k];
        piece->count = t->count;
        piece->values = malloc((size_t)t->count * sizeof(float));
        model_read_param(p->m, i, piece->values, DTYPE_F32);
    }
}

static struct piece *foreign_find(struct foreign *f, const char *name) {
    for (int i = 0; i < f->count; i++) {
        if (strcmp(f->pieces[i].name, name) == 0) return &f->pieces[i];
    }
    fail_msg("no tensor %s", name);
    return NULL;
}

/* An f16 of the value, which must not need subnormals; rounded towards zero. */
static uint16_t half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 23 & 255) - 127;
    if (exponent < -14) return (uint16_t)(bits >> 16 & 0x8000);
    return (uint16_t)((bits >> 16 & 0x8000) | (uint32_t)(exponent + 15) << 10 | (bits >> 13 & 1023));
}

/* Writes pieces [from, from+count), and puts into `values` what they hold after rounding to their type. */
static void foreign_write(struct foreign *f, int from, int count, const char *path) {
    struct safetensors_entry entries[64] = {0};
    error err = {0};
    safetensors_writer *w;
    for (int i = 0; i < count; i++) {
        const struct piece *p = &f->pieces[from + i];
        snprintf(entries[i].name, sizeof entries[i].name, "%s", p->name);
        entries[i].dtype = p->dtype;
        entries[i].ndim = p->ndim;
        memcpy(entries[i].dim, p->dim, sizeof p->dim);
    }
    assert_int_equal(safetensors_create(&w, path, entries, (size_t)count, NULL, &err), 0);
    for (int i = from; i < from + count; i++) {
        struct piece *p = &f->pieces[i];
        for (int64_t k = 0; k < p->count; k++) {
            union {
                double f64;
                float f32;
                uint16_t u16;
                int32_t i32;
            } x = {0};
            switch (p->dtype) {
            case ST_F64: x.f64 = (double)p->values[k]; break;
            case ST_F32: x.f32 = p->values[k]; break;
            case ST_F16: x.u16 = half(p->values[k]); break;
            case ST_BF16: x.u16 = safetensors_bf16(p->values[k]); break;
            default: x.i32 = (int32_t)p->values[k]; break;
            }
            struct safetensors_entry e = {.dtype = p->dtype, .count = 1, .data = &x};
            assert_int_equal(safetensors_append(w, &x, safetensors_dtype_size(p->dtype), &err), 0);
            safetensors_to_f32(&e, 0, 1, &p->values[k]);
        }
    }
    assert_int_equal(safetensors_finish(w, NULL, NULL, &err), 0);
}

static void put_text(const char *path, const char *text) {
    error err = {0};
    assert_int_equal(file_write_all(path, text, strlen(text), &err), 0);
}

/* DIRECTORY/name with a config.json, perhaps a byte tokenizer. */
static void make_foreign(const char *name, const struct parts *p, bool with_tokenizer) {
    error err = {0};
    assert_int_equal(file_make_directories(at("%s", name), &err), 0);
    json_t *object = architecture_write(p->mc, p->c, 256);
    assert_int_equal(json_write(object, at("%s/config.json", name), &err), 0);
    json_decref(object);
    size_t size;
    const char *text = tokenizer_json(p->t, &size);
    if (with_tokenizer) assert_int_equal(file_write_all(at("%s/tokenizer.json", name), text, size, &err), 0);
}

static void write_foreign(const char *name, struct foreign *f) {
    foreign_write(f, 0, f->count, at("%s/model.safetensors", name));
}

/* What riverrun loads from `path` is what the pieces hold. */
static void expect_weights(const char *path, struct foreign *f) {
    struct checkpoint *c;
    struct model_config *mc;
    error err = {0};
    if (checkpoint_open(&c, path, &err) != 0) fail_msg("%s", err.text);
    if (model_config_bind(&mc, checkpoint_config(c), 0, &err) != 0) fail_msg("%s", err.text);
    struct model *m;
    assert_int_equal(model_open(&m, mc, model.dev, MODEL_INFER, 1, 4, 0, 1, &err), 0);
    if (checkpoint_load_model(c, m, &err) != 0) fail_msg("%s", err.text);
    for (int i = 0; i < mc->params.count; i++) {
        const struct param *t = &mc->params.list[i];
        const struct piece *p = foreign_find(f, t->name);
        float *values = malloc((size_t)t->count * sizeof *values);
        model_read_param(m, i, values, DTYPE_F32);
        assert_memory_equal(values, p->values, (size_t)t->count * sizeof *values);
        free(values);
    }
    model_close(m);
    model_config_free(mc);
    checkpoint_close(c);
}

static int run_command(int (*command)(int, char **, error *), error *err, const char *a, const char *b, const char *c,
                       const char *d, const char *e) {
    const char *const words[] = {"import", a, b, c, d, e, NULL};
    char *arguments[7] = {NULL};
    int count = 0;
    for (; words[count]; count++) arguments[count] = strdup(words[count]);
    char *all[7];
    memcpy(all, arguments, sizeof all); /* flags_parse moves them */
    int result = command(count, arguments, err);
    for (int i = 0; i < count; i++) free(all[i]);
    return result;
}

static void must_import(const char *from, const char *to) {
    error err = {0};
    if (run_command(command_import, &err, from, "--out", to, NULL, NULL) != 0) fail_msg("%s", err.text);
}

/* ---- forms of weights -------------------------------------------------------------------------------------------- */

static void every_floating_type_is_read(void **state) {
    (void)state;
    static const enum safetensors_dtype dtypes[] = {ST_F64, ST_F32, ST_F16, ST_BF16};
    for (size_t i = 0; i < 4; i++) {
        struct foreign f;
        char name[32];
        foreign_take(&f, &model, dtypes[i]);
        snprintf(name, sizeof name, "hf-%s", safetensors_dtype_name(dtypes[i]));
        make_foreign(name, &model, true);
        write_foreign(name, &f);
        expect_weights(at("%s", name), &f);
        must_import(at("%s", name), at("imported-%zu", i));
        expect_weights(at("imported-%zu", i), &f);
        foreign_free(&f);
    }
}

static void several_files_behind_an_index(void **state) {
    (void)state;
    error err = {0};
    struct foreign f;
    foreign_take(&f, &untied, ST_F32);
    make_foreign("sharded", &untied, true);
    json_t *map = json_object(), *index = json_object();
    for (int from = 0, file = 0; from < f.count; from += 5, file++) {
        int count = f.count - from < 5 ? f.count - from : 5;
        char name[64];
        snprintf(name, sizeof name, "model-%05d.safetensors", file);
        foreign_write(&f, from, count, at("sharded/%s", name));
        for (int i = from; i < from + count; i++) json_object_set_new(map, f.pieces[i].name, json_string(name));
    }
    json_object_set_new(index, "weight_map", map);
    assert_int_equal(json_write(index, at("sharded/model.safetensors.index.json"), &err), 0);
    expect_weights(at("sharded"), &f);
    must_import(at("sharded"), at("imported-sharded"));
    expect_weights(at("imported-sharded"), &f);

    /* Indices that lie. */
    static const struct {
        const char *name, *file, *sentence;
    } lies[] = {
        {"a\nb", "model-00000.safetensors", "a tensor's name holds a control character"},
        {"ghost", "model-00000.safetensors", "names tensor ghost, which is in none of its files"},
        {"lm_head.weight", "model-99999.safetensors", "model-99999.safetensors does not exist"},
        {"lm_head.weight", "../sharded/model-00000.safetensors",
         "'weight_map' must give each tensor the plain name of a file"},
        {"lm_head.weight", "", "'weight_map' must give each tensor the plain name of a file"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        json_t *copy = json_deep_copy(index);
        struct checkpoint *c;
        json_object_set_new(json_object_get(copy, "weight_map"), lies[i].name, json_string(lies[i].file));
        assert_int_equal(json_write(copy, at("sharded/model.safetensors.index.json"), &err), 0);
        assert_int_equal(checkpoint_open(&c, at("sharded"), &err), -1);
        if (!strstr(err.text, lies[i].sentence)) fail_msg("%s", err.text);
        assert_int_equal(err.kind, ERROR_INPUT);
        json_decref(copy);
    }
    put_text(at("sharded/model.safetensors.index.json"), "{}");
    struct checkpoint *c;
    assert_int_equal(checkpoint_open(&c, at("sharded"), &err), -1);
    assert_non_null(strstr(err.text, "'weight_map' must be an object"));
    json_decref(index);
    foreign_free(&f);
}

/* An author's own name of the embedding, and a head that repeats it. */
static void check_spelling(const char *spelling, const char *to) {
    struct foreign f;
    foreign_take(&f, &model, ST_BF16);
    struct piece *embedding = foreign_find(&f, "backbone.embeddings.weight");
    struct piece *head = &f.pieces[f.count++];
    *head = *embedding;
    snprintf(head->name, sizeof head->name, "lm_head.weight");
    head->values = malloc((size_t)head->count * sizeof(float));
    memcpy(head->values, embedding->values, (size_t)head->count * sizeof(float));
    snprintf(embedding->name, sizeof embedding->name, "%s", spelling);
    make_foreign(spelling, &model, true);
    write_foreign(spelling, &f);
    must_import(at("%s", spelling), at("%s", to));
    snprintf(embedding->name, sizeof embedding->name, "backbone.embeddings.weight");
    expect_weights(at("%s", spelling), &f);
    expect_weights(at("%s", to), &f);
    foreign_free(&f);
}

static void other_spellings_are_known(void **state) {
    (void)state;
    check_spelling("backbone.embedding.weight", "imported-spelling");
    check_spelling("embedding.weight", "imported-other-spelling");
}

/* ---- what is refused --------------------------------------------------------------------------------------------- */

enum lie { LACKS, LACKS_MANY, EXTRA, SHAPE, RANK, INTEGERS, HEAD_DIFFERS, BOTH_NAMES };

static void tell_lie(struct foreign *f, enum lie lie) {
    struct piece *norm = foreign_find(f, "backbone.norm_f.weight"), *more = &f->pieces[f->count];
    switch (lie) {
    case LACKS:
    case LACKS_MANY:
        for (int i = 0; i < (lie == LACKS ? 1 : 7); i++) free(f->pieces[--f->count].values);
        break;
    case EXTRA:
    case HEAD_DIFFERS:
    case BOTH_NAMES:
        f->count++;
        *more = *foreign_find(f, "backbone.embeddings.weight");
        more->values = malloc((size_t)more->count * sizeof(float));
        memcpy(more->values, foreign_find(f, "backbone.embeddings.weight")->values,
               (size_t)more->count * sizeof(float));
        snprintf(more->name, sizeof more->name, "%s",
                 lie == EXTRA ? "backbone.extra" : lie == BOTH_NAMES ? "backbone.embedding.weight" : "lm_head.weight");
        more->values[more->count - 1] += 1;
        break;
    case SHAPE: norm->dim[0] = norm->count = 11; break;
    case RANK:
        norm->ndim = 2;
        norm->dim[1] = 1;
        break;
    case INTEGERS: norm->dtype = ST_I32; break;
    }
}

static void wrong_tensors_are_named(void **state) {
    (void)state;
    static const struct {
        enum lie lie;
        const char *sentence;
    } cases[] = {
        {LACKS, " lacks tensors that the model of the config has: backbone.norm_f.weight"},
        {LACKS_MANY,
         " lacks tensors that the model of the config has: backbone.layers.1.mixer.conv1d.bias, "
         "backbone.layers.1.mixer.dt_bias, backbone.layers.1.mixer.A_log, backbone.layers.1.mixer.D and 3 more"},
        {EXTRA, " holds tensors that the model of the config does not have: backbone.extra"},
        {BOTH_NAMES, " holds tensors that the model of the config does not have: backbone.embedding.weight"},
        {SHAPE, ": tensor backbone.norm_f.weight has shape (11); the model of the config needs (12)"},
        {RANK, ": tensor backbone.norm_f.weight has shape (12, 1); the model of the config needs (12)"},
        {INTEGERS, ": tensor backbone.norm_f.weight has dtype I32; weights must be F64, F32, F16 or BF16"},
        {HEAD_DIFFERS, ": lm_head.weight differs from the embedding, but the config says that they are tied"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct foreign f;
        error err = {0};
        char sentence[1000], resolved[PATH_MAX];
        foreign_take(&f, &model, ST_F32);
        tell_lie(&f, cases[i].lie);
        make_foreign("wrong", &model, true);
        write_foreign("wrong", &f);
        assert_non_null(realpath(at("wrong"), resolved));
        snprintf(sentence, sizeof sentence, "%s%s", resolved, cases[i].sentence);
        unit_expect(run_command(command_import, &err, at("wrong"), "--out", at("imported-wrong"), NULL, NULL), &err,
                    ERROR_INPUT, sentence);
        assert_false(file_exists(at("imported-wrong")));
        assert_false(file_exists(at("imported-wrong.riverrun-tmp")));
        foreign_free(&f);
    }
}

static void directories_without_weights(void **state) {
    (void)state;
    error err = {0};
    struct checkpoint *c;
    char sentence[1000], resolved[PATH_MAX];
    make_foreign("pickle", &model, true);
    assert_non_null(realpath(at("pickle"), resolved));
    snprintf(sentence, sizeof sentence,
             "%s holds no weights: neither model.safetensors nor model.safetensors.index.json", resolved);
    unit_expect(checkpoint_open(&c, at("pickle"), &err), &err, ERROR_INPUT, sentence);
    put_text(at("pickle/pytorch_model.bin"), "x");
    snprintf(sentence, sizeof sentence,
             "%s holds its weights as pytorch_model.bin, which can run programs when it is opened, so "
             "riverrun does not read it; convert it in Python: AutoModelForCausalLM.from_pretrained('%s')"
             ".save_pretrained('NEW', safe_serialization=True)",
             resolved, resolved);
    unit_expect(checkpoint_open(&c, at("pickle"), &err), &err, ERROR_INPUT, sentence);
}

/* config.json as Python writes it, and texts that only look like that. */
static void infinity_is_read(void **state) {
    (void)state;
    static const struct {
        const char *text, *value; /* of member "a", compact; NULL: refused */
    } cases[] = {
        {"{\"a\": [0.0, Infinity]}", "[0.0,\"Infinity\"]"},
        {"{\"a\": [-Infinity,NaN]}", "[\"-Infinity\",\"NaN\"]"},
        {"{\"a\": \"Infinity and NaN\"}", "\"Infinity and NaN\""},
        {"{\"a\": \"\\\"Infinity\"}", "\"\\\"Infinity\""},
        {"{\"a\": \"\\\\\", \"b\": Infinity}", "\"\\\\\""},
        {"{\"a\": Infinite}", NULL},
        {"{\"a\": \"Infinity}", NULL},
        {"", NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *object;
        error err = {0};
        put_text(at("python.json"), cases[i].text);
        int result = checkpoint_read_config_json(&object, at("python.json"), &err);
        assert_int_equal(result, cases[i].value ? 0 : -1);
        if (result != 0) continue;
        char *text = json_dumps(json_object_get(object, "a"), JSON_COMPACT | JSON_ENCODE_ANY);
        assert_string_equal(text, cases[i].value);
        free(text);
        json_decref(object);
    }
}

/* ---- tokenizers and vocabularies --------------------------------------------------------------------------------- */

/* Rows beyond the tokenizer's ids are padding; a tokenizer of another kind is carried along. */
static void tokenizers_of_imports(void **state) {
    (void)state;
    static const char other[] = "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": []}}";
    struct foreign f;
    error err = {0};
    struct checkpoint *c;
    tokenizer *t;
    char *text;
    size_t size;
    struct model_config *mc;
    foreign_take(&f, &model, ST_F32);
    make_foreign("byte", &model, true);
    write_foreign("byte", &f);
    must_import(at("byte"), at("byte-in"));
    assert_int_equal(checkpoint_open(&c, at("byte-in"), &err), 0);
    assert_int_equal(checkpoint_tokenizer(c, &t, &err), 0);
    assert_int_equal(model_config_bind(&mc, checkpoint_config(c), tokenizer_vocab(t), &err), 0);
    assert_int_equal(mc->vocab, 257);
    assert_int_equal(mc->rows, 272);
    assert_int_equal(checkpoint_state(c)->step, 0);
    assert_true(isnan(checkpoint_state(c)->best_valid));
    model_config_free(mc);
    tokenizer_close(t);
    checkpoint_close(c);

    make_foreign("strange", &model, false);
    write_foreign("strange", &f);
    put_text(at("strange/tokenizer.json"), other);
    put_text(at("strange/vocab.json"), "{}");
    must_import(at("strange"), at("strange-in"));
    assert_int_equal(checkpoint_open(&c, at("strange-in"), &err), 0);
    assert_int_equal(checkpoint_tokenizer(c, &t, &err), -1);
    assert_int_equal(model_config_bind(&mc, checkpoint_config(c), 0, &err), 0);
    assert_int_equal(mc->vocab, 272);
    model_config_free(mc);
    checkpoint_close(c);
    if (run_command(command_export, &err, at("strange-in"), "--out", at("strange-out"), NULL, NULL) != 0)
        fail_msg("%s", err.text);
    assert_int_equal(file_read_all(at("strange-out/tokenizer.json"), 1000, &text, &size, &err), 0);
    assert_string_equal(text, other);
    free(text);
    assert_true(file_exists(at("strange-out/vocab.json")));
    json_t *object;
    assert_int_equal(json_read(&object, at("strange-out/config.json"), &err), 0);
    assert_int_equal(json_integer_value(json_object_get(object, "eos_token_id")), 256); /* as the directory said */
    json_decref(object);

    /* None at all, and one given. */
    make_foreign("none", &model, false);
    write_foreign("none", &f);
    must_import(at("none"), at("none-in"));
    assert_false(file_exists(at("none-in/tokenizer.json")));
    assert_int_equal(checkpoint_open(&c, at("none-in"), &err), 0);
    assert_int_equal(checkpoint_tokenizer(c, &t, &err), -1);
    assert_non_null(strstr(err.text, "holds no tokenizer.json, so what its tokens mean is not known"));
    checkpoint_close(c);
    assert_int_equal(run_command(command_import, &err, at("none"), "--out", at("none-bytes"), "--tokenizer", "bytes"),
                     0);
    assert_int_equal(checkpoint_open(&c, at("none-bytes"), &err), 0);
    assert_int_equal(checkpoint_tokenizer(c, &t, &err), 0);
    tokenizer_close(t);
    checkpoint_close(c);
    foreign_free(&f);
}

/* ---- export ------------------------------------------------------------------------------------------------------ */

static void export_to(const char *from, const char *to, const char *dtype, const char *all) {
    error err = {0};
    char flag[32];
    snprintf(flag, sizeof flag, "--dtype=%s", dtype);
    if (run_command(command_export, &err, from, "--out", to, flag, all) != 0) fail_msg("%s", err.text);
}

static void export_gives_back_the_weights(void **state) {
    (void)state;
    error err = {0};
    char *a, *b;
    size_t a_size, b_size;
    assert_int_equal(parts_save(&model, at("run"), 1, 0, &err), 0);
    export_to(at("run"), at("f32"), "f32", NULL);
    /* Masters are exported bit for bit, and import and export are each other's reverse. */
    must_import(at("f32"), at("f32-in"));
    export_to(at("f32-in"), at("f32-again"), "f32", NULL);
    static const char *const same[] = {"run/latest", "f32-in", "f32-again"};
    assert_int_equal(file_read_all(at("f32/model.safetensors"), 1 << 22, &a, &a_size, &err), 0);
    for (size_t i = 0; i < 3; i++) {
        assert_int_equal(file_read_all(at("%s/model.safetensors", same[i]), 1 << 22, &b, &b_size, &err), 0);
        assert_int_equal(a_size, b_size);
        assert_memory_equal(a, b, a_size);
        free(b);
    }
    free(a);
    static const char *const files[] = {"config.json", "generation_config.json", "tokenizer.json",
                                        "tokenizer_config.json"};
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(file_read_all(at("f32/%s", files[i]), 1 << 22, &a, &a_size, &err), 0);
        assert_int_equal(file_read_all(at("run/latest/%s", files[i]), 1 << 22, &b, &b_size, &err), 0);
        assert_string_equal(a, b);
        free(a);
        free(b);
    }
    assert_false(file_exists(at("f32/trainer.json")) || file_exists(at("f32/optimizer.safetensors")));
}

static void bf16_is_rounded_where_it_may_be(void **state) {
    (void)state;
    error err = {0};
    safetensors *s;
    json_t *object;
    for (int all = 0; all < 2; all++) {
        export_to(at("run"), at("bf16-%d", all), "bf16", all ? "--dtype-all" : NULL);
        assert_int_equal(safetensors_open(&s, at("bf16-%d/model.safetensors", all), &err), 0);
        assert_string_equal(safetensors_metadata(s, "format"), "pt");
        const struct params *params = model_params(model.m);
        for (int i = 0; i < params->count; i++) {
            const struct param *p = &params->list[i];
            const struct safetensors_entry *e = safetensors_find(s, p->name);
            assert_non_null(e);
            bool stays = p->keep_real && !all;
            assert_int_equal(e->dtype, stays ? ST_F32 : ST_BF16);
            assert_int_equal((uintptr_t)e->data % safetensors_dtype_size(e->dtype), 0);
            float *values = malloc((size_t)p->count * sizeof *values);
            model_read_param(model.m, i, values, DTYPE_F32);
            for (int64_t k = 0; k < p->count; k++) {
                float there;
                safetensors_to_f32(e, (uint64_t)k, 1, &there);
                /* Half a unit in the last of 8 bits. */
                assert_true(stays ? there == values[k] : fabsf(there - values[k]) <= fabsf(values[k]) * 0x1p-8f);
            }
            free(values);
        }
        assert_int_equal(safetensors_count(s), (size_t)params->count);
        safetensors_close(s);
        assert_int_equal(json_read(&object, at("bf16-%d/config.json", all), &err), 0);
        assert_string_equal(json_string_value(json_object_get(object, "torch_dtype")), "bfloat16");
        json_decref(object);
    }
}

/* An odd number of bf16 before an f32 would put that where nobody can view it as f32. */
static void odd_counts_are_aligned(void **state) {
    (void)state;
    static const char text[] = "[model]\nd_model = 5\nvocab_size = 0\npad_vocab_to = 1\npattern = m\n"
                               "[block.m]\nmixer = mamba2\nd_state = 3\nhead_dim = 5\n";
    struct parts p;
    error err = {0};
    safetensors *s;
    parts_open(&p, &one, PRECISION_F32, text);
    assert_int_equal(parts_save(&p, at("odd"), 1, 0, &err), 0);
    export_to(at("odd"), at("odd-out"), "bf16", NULL);
    assert_int_equal(safetensors_open(&s, at("odd-out/model.safetensors"), &err), 0);
    assert_int_equal(safetensors_find(s, "backbone.embeddings.weight")->count % 2, 1);
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct safetensors_entry *e = safetensors_at(s, i);
        assert_int_equal((uintptr_t)e->data % safetensors_dtype_size(e->dtype), 0);
    }
    safetensors_close(s);
    parts_close(&p);
}

static void outputs_that_are_in_the_way(void **state) {
    (void)state;
    error err = {0};
    char sentence[1000];
    snprintf(sentence, sizeof sentence, "--out %s exists already; give a name that is free", at("f32"));
    unit_expect(run_command(command_export, &err, at("run"), "--out", at("f32"), NULL, NULL), &err, ERROR_INPUT,
                sentence);
    unit_expect(run_command(command_import, &err, at("byte"), "--out", at("f32"), NULL, NULL), &err, ERROR_INPUT,
                sentence);
    snprintf(sentence, sizeof sentence, "--out %s: there is no directory %s", at("no/such"), at("no"));
    unit_expect(run_command(command_export, &err, at("run"), "--out", at("no/such"), NULL, NULL), &err, ERROR_INPUT,
                sentence);
    unit_expect(run_command(command_export, &err, at("run"), "--out", at("x"), "--dtype-all", NULL), &err, ERROR_INPUT,
                "--dtype-all means nothing with --dtype f32; give --dtype bf16 or leave it out");
    char resolved[PATH_MAX];
    assert_non_null(realpath(at("run/latest"), resolved));
    snprintf(sentence, sizeof sentence,
             "%s is a checkpoint of riverrun already; train.init, eval and generate take it as it is", resolved);
    unit_expect(run_command(command_import, &err, at("run"), "--out", at("x"), NULL, NULL), &err, ERROR_INPUT,
                sentence);
    assert_false(file_exists(at("x")));
    /* A rest of a killed export is not in the way, nor is a slash behind the name. */
    assert_int_equal(file_make_directories(at("slash.riverrun-tmp/rest"), &err), 0);
    char slash[500];
    snprintf(slash, sizeof slash, "%s/", at("slash"));
    export_to(at("run"), slash, "f32", NULL);
    assert_true(file_exists(at("slash/config.json")));
    assert_false(file_exists(at("slash.riverrun-tmp")));
}

/* A model that transformers does not have goes out and comes in again. */
static void a_model_of_our_own(void **state) {
    (void)state;
    static const char text[] = "[model]\nd_model = 16\nvocab_size = 0\npattern = m a m\n"
                               "[block.m]\nmixer = mamba2\nd_state = 4\nhead_dim = 8\nmlp = swiglu\n"
                               "[block.a]\nmixer = mamba2\nd_state = 6\nhead_dim = 8\n";
    struct parts p;
    struct foreign f;
    error err = {0};
    parts_open(&p, &one, PRECISION_F32, text);
    assert_int_equal(parts_save(&p, at("own"), 3, 0, &err), 0);
    export_to(at("own"), at("own-out"), "f32", NULL);
    must_import(at("own-out"), at("own-in"));
    foreign_take(&f, &p, ST_F32);
    expect_weights(at("own-out"), &f);
    expect_weights(at("own-in"), &f);
    foreign_free(&f);
    parts_close(&p);

    /* A setting that is none is told with the directory that it is in. */
    char *json, *key, sentence[1000], resolved[PATH_MAX];
    size_t size;
    assert_int_equal(file_read_all(at("own-out/config.json"), 1 << 20, &json, &size, &err), 0);
    assert_non_null(key = strstr(json, "\"d_conv\""));
    memcpy(key, "\"d_canv\"", strlen("\"d_canv\""));
    put_text(at("own-out/config.json"), json);
    free(json);
    assert_non_null(realpath(at("own-out"), resolved));
    snprintf(sentence, sizeof sentence,
             "%s: config.json: derived [block.m] d_canv = 4: [block.m] has no option d_canv; did you mean d_conv?",
             resolved);
    int result = run_command(command_import, &err, at("own-out"), "--out", at("own-none"), NULL, NULL);
    unit_expect(result, &err, ERROR_INPUT, sentence);
    assert_false(file_exists(at("own-none")));
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static int open_all(void **state) {
    (void)state;
    error err = {0};
    parts_directory(directory);
    if (comm_open(&one, &err) != 0) return -1;
    parts_open(&model, &one, PRECISION_F32, parts_text);
    parts_open(&untied, &one, PRECISION_F32, untied_text);
    parts_fill(&model, 1);
    parts_fill(&untied, 2);
    return 0;
}

static int close_all(void **state) {
    (void)state;
    parts_close(&untied);
    parts_close(&model);
    unit_directory_remove(directory);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_floating_type_is_read),
        cmocka_unit_test(several_files_behind_an_index),
        cmocka_unit_test(other_spellings_are_known),
        cmocka_unit_test(wrong_tensors_are_named),
        cmocka_unit_test(directories_without_weights),
        cmocka_unit_test(infinity_is_read),
        cmocka_unit_test(tokenizers_of_imports),
        cmocka_unit_test(export_gives_back_the_weights),
        cmocka_unit_test(bf16_is_rounded_where_it_may_be),
        cmocka_unit_test(odd_counts_are_aligned),
        cmocka_unit_test(outputs_that_are_in_the_way),
        cmocka_unit_test(a_model_of_our_own),
    };
    return cmocka_run_group_tests(tests, open_all, close_all);
}

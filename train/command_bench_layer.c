/* command_bench_layer.c: `riverrun bench layer`: times of single layers of a model, in training and in generation, over
 * lengths and batches. What measures is train/bench_layer.c and bench_decode.c. Called by command_bench.c. */
#include "train/command_bench.h"

#include "common/text.h"
#include "train/bench_layer.h"
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIZES_MAX = 64 };
enum what { TRAIN, GENERATE, ALL };
static const char *const what_names[] = {"train", "generate", "all", NULL};

struct layer_flags {
    const char *block, *batch, *seq;
    bool mlp;
    int what;
};

#define FLAG(field) offsetof(struct layer_flags, field)
static const struct option layer_table[] = {
    {"block", OPTION_STRING, FLAG(block), "", 0, 0, "", "NAME of the [block.NAME] whose layer is timed; all, if empty.",
     NULL},
    {"batch", OPTION_STRING, FLAG(batch), "", 0, 0, "sequences",
     "Sequences at once: numbers with commas between them; the config's train.batch, if empty.", NULL},
    {"seq", OPTION_STRING, FLAG(seq), "", 0, 0, "tokens",
     "Lengths of the sequences, as many numbers as --batch has, or one of the two has one; the config's data.seq_len, "
     "if empty.", NULL},
    {"what", OPTION_CHOICE, FLAG(what), "all", 0, 0, "",
     "train: forward, and forward + backward; generate: reading a sequence of --seq tokens, and steps behind it.",
     what_names},
    {"mlp", OPTION_BOOL, FLAG(mlp), "false", 0, 0, "", "The block's MLP instead of its mixer.", NULL},
    OPTIONS_END,
};
#undef FLAG

const struct flags bench_layer_flags = {
    .command = "bench layer",
    .arguments = "CONFIG [section.key=value ...]",
    .summary =
        "Times single layers of the model that CONFIG describes: the norm, with the addition to the residual stream,\n"
        "and the mixer with its projections. Training: forward and forward + backward, checked against the same layer\n"
        "in double on the CPU for the first tokens of a sequence. Generation: one sequence of --seq tokens is read\n"
        "(prefill), its state is copied to --batch sequences, and each gets a token in a step, which generation\n"
        "records and replays (step), or as calls one after the other (call); steps are checked against one pass over\n"
        "the whole sequence. A cache has room for --seq tokens, whatever the config says. A wrong result has no time;\n"
        "what does not fit into memory is skipped. Device and precision: train.device and train.precision.",
    .table = layer_table,
    .least = 1,
    .most = -1,
};

/* ---- sizes ------------------------------------------------------------------------------------------------------ */

struct sizes {
    int count;
    int64_t list[SIZES_MAX];
};

static int read_sizes(const char *flag, const char *text, int64_t fallback, struct sizes *s, error *err) {
    *s = (struct sizes){1, {fallback}};
    const char *at = text;
    for (s->count = *text ? 0 : 1; *at; at += *at == ',') {
        char *end;
        errno = 0;
        long long value = strtoll(at, &end, 10);
        if (end == at || errno || value < 1 || (*end && (*end != ',' || !end[1])))
            return error_input(err, "--%s '%.100s' is no list of sizes: write numbers of at least 1, such as 1,2,4",
                               flag, text);
        if (s->count == SIZES_MAX) return error_input(err, "--%s has more than %d sizes", flag, SIZES_MAX);
        s->list[s->count++] = value;
        at = end;
    }
    return 0;
}

static int64_t size_at(const struct sizes *s, int i) {
    return s->list[s->count == 1 ? 0 : i];
}

/* ---- what is printed -------------------------------------------------------------------------------------------- */

struct session {
    const struct layer_flags *flags;
    int argc;
    char **argv; /* the config's path, and what overrides it */
    struct run_options *options;
    struct device *dev, *oracle;
    struct bench_ceilings ceilings;
    char machine[160];
    int wrong;
};

struct result {
    struct bench_measured train;
    struct bench_decoded decode;
    bool trained, decoded;
    double saved; /* bytes a token */
    char train_skipped[96], decode_skipped[96];
};

static void put_ms(struct json_line *line, const char *what, const struct bench_times *t, bool right) {
    const struct {
        const char *name;
        double value;
    } values[] = {{"ms", t->median}, {"ms_min", t->least}, {"ms_max", t->most}};
    char key[48];
    for (int i = 0; i < 3; i++) {
        snprintf(key, sizeof key, "%s_%s", what, values[i].name);
        json_line_real(line, key, right ? 1e3 * values[i].value : NAN);
    }
}

static double rate(const struct bench_work *w, const struct bench_times *t) {
    return 1e-12 * w->products / t->median;
}

static void put_train(struct json_line *line, const struct session *s, const struct result *r) {
    const struct bench_measured *m = &r->train;
    bool right = !m->difference.wrong;
    put_ms(line, "forward", &m->forward, right);
    put_ms(line, "both", &m->both, right);
    json_line_real(line, "forward_tflop_per_s", right ? rate(&m->forward_work, &m->forward) : NAN);
    json_line_real(line, "both_tflop_per_s", right ? rate(&m->both_work, &m->both) : NAN);
    json_line_real(line, "forward_floor_ms", 1e3 * bench_floor(&m->forward_work, &s->ceilings));
    json_line_real(line, "both_floor_ms", 1e3 * bench_floor(&m->both_work, &s->ceilings));
    json_line_real(line, "saved_bytes_token", r->saved);
    bench_put_solver(line, m);
    json_line_real(line, "difference", m->difference.worst);
    json_line_bool(line, "right", right);
}

static void put_decode(struct json_line *line, const struct bench_decoded *d) {
    put_ms(line, "prefill", &d->prefill, !d->wrong);
    put_ms(line, "step", &d->step, !d->wrong);
    put_ms(line, "call", &d->call, !d->wrong);
    json_line_int(line, "state_bytes", (int64_t)d->state_bytes);
    json_line_real(line, "decode_difference", d->difference);
    json_line_bool(line, "decode_right", !d->wrong);
}

static void print_json(const struct session *s, const struct bench_layer *l, const struct result *r) {
    struct json_line line;
    bench_begin_line(&line, "layer");
    json_line_string(&line, "machine", s->machine);
    json_line_string(&line, "precision", precision_choices[s->options->train.precision]);
    json_line_string(&line, "config", s->argv[0]);
    json_line_string(&line, "block", l->layer->block_name);
    json_line_string(&line, "mixer", l->layer->mixer->name);
    json_line_int(&line, "width", l->layer->context.d_model);
    json_line_int(&line, "batch", l->B);
    json_line_int(&line, "seq", l->T);
    if (r->trained) put_train(&line, s, r);
    if (r->decoded) put_decode(&line, &r->decode);
    if (*r->train_skipped) json_line_string(&line, "train_skipped", r->train_skipped);
    if (*r->decode_skipped) json_line_string(&line, "generate_skipped", r->decode_skipped);
    bench_end_line(&line);
    fflush(stdout);
}

static void say_header(const struct session *s) {
    fprintf(stderr, "%s, %s: copy %.0f GB/s, product %.4g TFLOP/s\n", s->machine,
            precision_choices[s->options->train.precision], 1e-9 * s->ceilings.bytes_per_s,
            1e-12 * s->ceilings.products_per_s);
    fprintf(stderr, "%-12s  %-10s  %5s  %8s  %19s  %13s  %13s  %10s  %9s  %9s  %9s  %s\n", "block", "mixer", "batch",
            "tokens", "ms fwd / both", "floor ms", "TFLOP/s", "kept/token", "prefill", "step ms", "call ms",
            "difference");
}

static void say(const struct bench_layer *l, const struct session *s, const struct result *r) {
    const struct bench_measured *m = &r->train;
    char number[24];
    fprintf(stderr, "%-12s  %-10s  %5" PRId64 "  %8" PRId64, l->layer->block_name, l->layer->mixer->name, l->B, l->T);
    if (r->trained)
        fprintf(stderr, "  %8.3f / %8.3f  %5.3g / %5.3g  %5.0f / %5.0f  %10s", 1e3 * m->forward.median,
                1e3 * m->both.median, 1e3 * bench_floor(&m->forward_work, &s->ceilings),
                1e3 * bench_floor(&m->both_work, &s->ceilings), rate(&m->forward_work, &m->forward),
                rate(&m->both_work, &m->both), text_bytes(number, sizeof number, r->saved));
    else fprintf(stderr, "  %19s  %13s  %13s  %10s", "-", "-", "-", "-");
    if (r->decoded)
        fprintf(stderr, "  %9.3f  %9.4f  %9.4f", 1e3 * r->decode.prefill.median, 1e3 * r->decode.step.median,
                1e3 * r->decode.call.median);
    else fprintf(stderr, "  %9s  %9s  %9s", "-", "-", "-");
    if (r->trained)
        fprintf(stderr, "  %.1e %s%s%s", m->difference.worst, m->difference.wrong ? "WRONG: " : "",
                m->difference.gradient ? "d" : "", m->difference.name);
    if (r->decoded) fprintf(stderr, "  %.1e%s steps", r->decode.difference, r->decode.wrong ? " WRONG:" : "");
    if (*r->train_skipped) fprintf(stderr, "  training %s", r->train_skipped);
    if (*r->decode_skipped) fprintf(stderr, "  generation %s", r->decode_skipped);
    fprintf(stderr, "\n");
}

/* ---- measuring -------------------------------------------------------------------------------------------------- */

static bool fits(const struct session *s, size_t bytes, char skipped[96]) {
    size_t has = device_present(s->dev->kind), taken = device_memory(s->dev).now;
    size_t more = s->dev->kind == DEVICE_CUDA ? (size_t)1 << 29 : 0; /* what the stand and libraries take */
    char wanted[24], free_bytes[24];
    if (taken + bytes + more <= has) return true;
    snprintf(skipped, 96, "needs %s, and %s are free", text_bytes(wanted, sizeof wanted, (double)bytes),
             text_bytes(free_bytes, sizeof free_bytes, (double)(has - taken)));
    return false;
}

static int measure(struct session *s, struct bench_layer *l, struct result *r, error *err) {
    size_t bytes;
    if (s->flags->what != GENERATE) {
        TRY(bench_layer_size(l, &bytes, err));
        r->trained = fits(s, bytes, r->train_skipped);
        if (r->trained) TRY(bench_layer_train(l, &r->train, err));
        r->saved = bench_layer_saved(l);
    }
    if (s->flags->what != TRAIN) {
        TRY(bench_decode_size(l, &bytes, err));
        r->decoded = fits(s, bytes, r->decode_skipped);
        if (r->decoded) TRY(bench_layer_decode(l, &r->decode, err));
    }
    return 0;
}

static int load(const struct session *s, config **c, error *err) {
    TRY(config_load(c, s->argv[0], err));
    for (int i = 1; i < s->argc; i++) TRY(config_override(*c, s->argv[i], err));
    return 0;
}

/* A cache with room for the sequence and what is generated behind it. */
static int set_context(config *c, const struct block_kind *kind, int64_t T, error *err) {
    char assignment[128];
    for (const struct option *o = kind->mixer->options; o && o->key; o++) {
        if (strcmp(o->key, "context") != 0) continue;
        snprintf(assignment, sizeof assignment, "block.%s.context=%" PRId64, kind->name, T + BENCH_DECODE_AHEAD);
        return config_override(c, assignment, err);
    }
    return 0;
}

static const struct layer *find_layer(const struct model_config *mc, const char *block, bool mlp) {
    for (int i = 0; i < mc->layer_count; i++)
        if (mc->layers[i].is_mlp == mlp && strcmp(mc->layers[i].block_name, block) == 0) return &mc->layers[i];
    return NULL;
}

static int measure_size(struct session *s, const struct block_kind *kind, int64_t B, int64_t T, error *err) {
    config *c = NULL;
    struct model_config *mc = NULL;
    int status = load(s, &c, err);
    if (status == 0 && s->flags->what != TRAIN) status = set_context(c, kind, T, err);
    if (status == 0) status = model_config_bind(&mc, c, 0, err);
    bool train = s->flags->what != GENERATE; /* which else has one sequence of T tokens, and steps of B */
    if (status == 0) status = model_check_batch(mc, train ? B : 1, T, err);
    if (status == 0) status = model_check_batch(mc, B, 1, err);
    struct bench_layer *l = status == 0 ? calloc(1, sizeof *l) : NULL;
    if (l) {
        struct result r = {0};
        *l = (struct bench_layer){.mc = mc, .B = B, .T = T, .dev = s->dev, .oracle = s->oracle};
        l->layer = find_layer(mc, kind->name, s->flags->mlp);
        status = l->layer ? measure(s, l, &r, err) : 0;
        if (status == 0 && l->layer) {
            say(l, s, &r);
            print_json(s, l, &r);
            s->wrong += (r.trained && r.train.difference.wrong) || (r.decoded && r.decode.wrong);
        }
        if (status != 0)
            error_context(err, "measuring block %s, %" PRId64 " x %" PRId64 " tokens", kind->name, B, T);
    } else if (status == 0) {
        status = error_system(err, "no memory for a measurement");
    }
    free(l);
    model_config_free(mc);
    config_free(c);
    return status;
}

static int check_block(const struct model_config *mc, const struct layer_flags *f, error *err) {
    bool any = false;
    for (int k = 0; k < mc->kind_count; k++) {
        if (*f->block && strcmp(mc->kinds[k].name, f->block) != 0) continue;
        any = any || find_layer(mc, mc->kinds[k].name, f->mlp);
    }
    if (any) return 0;
    if (!*f->block) return error_input(err, "no block of the config has an MLP");
    return error_input(err, "the config's pattern '%.200s' has no block %.64s%s", mc->options.pattern, f->block,
                       f->mlp ? " with an MLP" : "");
}

static int measure_all(struct session *s, const struct model_config *mc, error *err) {
    struct sizes batch, seq;
    const struct run_options *o = s->options;
    TRY(read_sizes("batch", s->flags->batch, o->train.batch, &batch, err));
    TRY(read_sizes("seq", s->flags->seq, o->data.T, &seq, err));
    if (batch.count != seq.count && batch.count != 1 && seq.count != 1)
        return error_input(err, "--batch has %d sizes and --seq %d: as many must be in both, or one in one of them",
                           batch.count, seq.count);
    TRY(check_block(mc, s->flags, err));
    TRY(device_open(&s->dev, (enum device_kind)o->train.device, (enum precision)o->train.precision, err));
    TRY(device_open(&s->oracle, DEVICE_CPU, PRECISION_F64, err));
    device_describe(s->dev, s->machine, sizeof s->machine);
    TRY(bench_ceilings(s->dev, &s->ceilings, err));
    say_header(s);
    for (int k = 0; k < mc->kind_count; k++) {
        if (*s->flags->block && strcmp(mc->kinds[k].name, s->flags->block) != 0) continue;
        for (int i = 0; i < batch.count || i < seq.count; i++)
            TRY(measure_size(s, &mc->kinds[k], size_at(&batch, i), size_at(&seq, i), err));
    }
    if (s->wrong == 0) return 0;
    return error_system(err, "%d of the layers gave wrong results", s->wrong);
}

int command_bench_layer(int argc, char **argv, error *err) {
    struct layer_flags f;
    bool helped;
    int count;
    TRY(flags_parse(&bench_layer_flags, argc, argv, &f, &count, NULL, &helped, err));
    if (helped) return 0;
    struct session s = {.flags = &f, .argc = count, .argv = argv + 1};
    struct model_config *mc = NULL;
    config *c = NULL;
    s.options = calloc(1, sizeof *s.options);
    int status = s.options ? 0 : error_system(err, "no memory for the options of a run");
    if (status == 0) status = load(&s, &c, err);
    if (status == 0) status = run_options_bind(s.options, c, err);
    if (status == 0) status = model_config_bind(&mc, c, 0, err);
    if (status == 0) status = config_finish(c, err);
    if (status == 0) status = measure_all(&s, mc, err);
    if (s.oracle) device_close(s.oracle);
    if (s.dev) device_close(s.dev);
    model_config_free(mc);
    config_free(c);
    free(s.options);
    return status;
}

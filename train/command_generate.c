/* command_generate.c: `riverrun generate CHECKPOINT --prompt TEXT`: continues a text on standard output. The work is
 * generate.c's. */
#include "train/commands.h"

#include "common/file.h"
#include "train/checkpoint.h"
#include "train/flags.h"
#include "train/generate.h"
#include "train/options.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    PROMPT_BYTES = 64 << 20, /* a prompt is held in memory, four bytes a token */
    PIECE = 256,             /* tokens of the prompt read at once: enough for the kernels, small in memory */
};

struct generate_flags {
    const char *prompt, *prompt_file;
    int64_t tokens, top_k, seed;
    double temperature, top_p;
    int device, precision;
    bool ignore_eod, echo;
};
/* Positions in the table of the flags that matter by being given. */
enum { GIVEN_PROMPT, GIVEN_PROMPT_FILE };

#define AT(field) offsetof(struct generate_flags, field)
static const struct option generate_flags_table[] = {
    [GIVEN_PROMPT] = {"prompt", OPTION_STRING, AT(prompt), "", 0, 0, "",
                      "Text to continue; an empty one stands for the end of a document, behind which the next begins.",
                      NULL},
    [GIVEN_PROMPT_FILE] = {"prompt-file", OPTION_STRING, AT(prompt_file), "", 0, 0, "",
                           "File that holds the text to continue; - is standard input.", NULL},
    {"tokens", OPTION_INT, AT(tokens), "256", 1, 1e12, "tokens", "Write at most this many.", NULL},
    {"temperature", OPTION_FLOAT, AT(temperature), "1", 0, 1000, "",
     "Divides the logits; below 1 the probable becomes more probable. 0: always the most probable token.", NULL},
    {"top-k", OPTION_INT, AT(top_k), "0", 0, LIMIT_VOCAB, "tokens", "Draw among this many most probable; 0: among all.",
     NULL},
    {"top-p", OPTION_FLOAT, AT(top_p), "1", 1e-6, 1, "",
     "Draw among the fewest most probable that have this share of the probability together; 1: among all.", NULL},
    {"seed", OPTION_INT, AT(seed), "1", 0, 9007199254740991.0, "",
     "Key of the draws: the same seed gives the same text.", NULL},
    {"ignore-eod", OPTION_BOOL, AT(ignore_eod), "false", 0, 0, "", "Go on behind the end of a document.", NULL},
    {"echo", OPTION_BOOL, AT(echo), "false", 0, 0, "", "Write the prompt first.", NULL},
    {"device", OPTION_CHOICE, AT(device), "auto", 0, 0, "", "What computes; auto: a GPU if there is one.",
     device_choices},
    {"precision", OPTION_CHOICE, AT(precision), "auto", 0, 0, "",
     "Numbers that are computed with; auto: bf16 on a GPU, fp32 on the CPU.", precision_choices},
    OPTIONS_END,
};

static const struct flags flags = {
    .command = "generate",
    .arguments = "CHECKPOINT",
    .summary = "Continue a text, byte for byte on standard output as it comes. CHECKPOINT is a model directory, or\n"
               "that of a run: then its latest. Memory does not grow with the length.",
    .table = generate_flags_table,
    .least = 1,
    .most = 1,
};

struct generator_parts {
    struct generate_flags flags;
    struct checkpoint *checkpoint;
    tokenizer *tokenizer;
    struct model_config *model_config;
    struct device *dev;
    struct model *model;
    char *text; /* the prompt */
    size_t size;
    struct token_list prompt; /* its tokens */
};

static void parts_close(struct generator_parts *g) {
    free(g->prompt.ids);
    free(g->text);
    model_close(g->model);
    if (g->dev) device_close(g->dev);
    if (g->model_config) model_config_free(g->model_config);
    if (g->tokenizer) tokenizer_close(g->tokenizer);
    if (g->checkpoint) checkpoint_close(g->checkpoint);
}

/* ---- the prompt ------------------------------------------------------------------------------------------------- */

static int read_prompt_text(struct generator_parts *g, uint64_t given, error *err) {
    const struct generate_flags *f = &g->flags;
    bool text = given >> GIVEN_PROMPT & 1, file = given >> GIVEN_PROMPT_FILE & 1;
    if (text == file) {
        return error_input(err, text ? "--prompt and --prompt-file are both given; give one of them"
                                     : "there is no prompt; give --prompt TEXT or --prompt-file FILE");
    }
    if (file) {
        const char *path = strcmp(f->prompt_file, "-") == 0 ? "/dev/stdin" : f->prompt_file;
        if (file_read_all(path, PROMPT_BYTES, &g->text, &g->size, err) != 0) return error_context(err, "--prompt-file");
        return 0;
    }
    g->text = strdup(f->prompt);
    g->size = strlen(f->prompt);
    return g->text ? 0 : error_system(err, "no memory for the prompt");
}

static int encode_prompt(struct generator_parts *g, error *err) {
    encoder *e;
    TRY(encoder_open(&e, g->tokenizer, err));
    int failed = encoder_append(e, g->text, g->size, &g->prompt, err);
    encoder_close(e);
    if (failed || g->prompt.count > 0) return failed;
    return token_list_add(&g->prompt, tokenizer_eod(g->tokenizer), err);
}

/* ---- the text --------------------------------------------------------------------------------------------------- */

/* Write a token's bytes at once, so that a reader sees the text grow. */
static int write_token(void *self, int32_t token) {
    const struct generator_parts *g = self;
    size_t size;
    const char *bytes = tokenizer_decode(g->tokenizer, token, &size);
    if (size == 0) return 0;
    return fwrite(bytes, 1, size, stdout) == size && fflush(stdout) == 0 ? 0 : -1;
}

static int parts_open(struct generator_parts *g, int argc, char **argv, bool *helped, error *err) {
    int count;
    uint64_t given;
    TRY(flags_parse(&flags, argc, argv, &g->flags, &count, &given, helped, err));
    if (*helped) return 0;
    TRY(read_prompt_text(g, given, err));
    TRY(checkpoint_open(&g->checkpoint, argv[1], err));
    TRY(checkpoint_tokenizer(g->checkpoint, &g->tokenizer, err));
    TRY(encode_prompt(g, err));
    TRY(model_config_bind(&g->model_config, checkpoint_config(g->checkpoint), tokenizer_vocab(g->tokenizer), err));
    TRY(device_choose(&g->flags.device, &g->flags.precision, err));
    TRY(device_open(&g->dev, (enum device_kind)g->flags.device, (enum precision)g->flags.precision, err));
    TRY(model_open(&g->model, g->model_config, g->dev, MODEL_INFER, 1, PIECE, 0, 1, err));
    return checkpoint_load_model(g->checkpoint, g->model, err);
}

/* A model that can't look back as far as a text goes still continues it, so this is a note. */
static void note_forgetting(const struct generator_parts *g) {
    int64_t context, prompt = (int64_t)g->prompt.count;
    const struct layer *layer = model_least_context(g->model_config, &context);
    if (!layer || prompt + g->flags.tokens <= context) return;
    fprintf(stderr,
            "note: block.%s.context = %lld: with %lld tokens of prompt and at most %lld behind them, those more than "
            "%lld back are forgotten\n",
            layer->block_name, (long long)context, (long long)prompt, (long long)g->flags.tokens, (long long)context);
}

static int run_generate(struct generator_parts *g, error *err) {
    const struct generate_flags *f = &g->flags;
    struct generate_options options = {
        .tokens = f->tokens,
        .temperature = f->temperature,
        .top_k = f->top_k,
        .top_p = f->top_p,
        .seed = (uint64_t)f->seed,
        .stop_at_eod = !f->ignore_eod,
        .eod = tokenizer_eod(g->tokenizer),
        .piece = PIECE,
    };
    note_forgetting(g);
    if (f->echo) fwrite(g->text, 1, g->size, stdout);
    TRY(generate(g->model, g->prompt.ids, g->prompt.count, &options, write_token, g, err));
    if (ferror(stdout)) return error_system(err, "cannot write to standard output: %s", strerror(errno));
    return 0;
}

int command_generate(int argc, char **argv, error *err) {
    struct generator_parts g = {0};
    bool helped = false;
    int result = parts_open(&g, argc, argv, &helped, err);
    if (result == 0 && !helped) result = run_generate(&g, err);
    parts_close(&g);
    return result;
}

/* test_train_plan.c: `riverrun plan`: its numbers are those of a model that is really opened, the batch it finds is the
 * largest that fits, and bad arguments are refused. */
#include "test/support_model.h"
#include "test/support_published.h"
#include "test/unit.h"

#include "common/json.h"
#include "train/commands.h"
#include <unistd.h>

/* Run the command with standard output in a file; returns the command's result and what it printed, to be freed. */
static int plan(char **text, error *err, char **words) {
    FILE *caught = tmpfile();
    assert_non_null(caught);
    int argc = 0, file = fileno(caught), kept = dup(STDOUT_FILENO);
    while (words[argc]) argc++;
    fflush(stdout);
    assert_true(kept >= 0 && dup2(file, STDOUT_FILENO) >= 0);
    int result = command_plan(argc, words, err);
    fflush(stdout);
    assert_true(dup2(kept, STDOUT_FILENO) >= 0);
    off_t size = lseek(file, 0, SEEK_END);
    *text = calloc((size_t)size + 1, 1);
    assert_int_equal(pread(file, *text, (size_t)size, 0), size);
    fclose(caught);
    close(kept);
    return result;
}

#define PLAN(text, err, ...) plan(text, err, (char *[]){(char[]){"plan"}, __VA_ARGS__, NULL})

static json_t *plan_json(char **words) {
    error err = {0};
    char *text;
    json_t *object;
    if (plan(&text, &err, words) != 0) fail_msg("%s", err.text);
    assert_int_equal(json_read_text(&object, text, strlen(text), "plan", &err), 0);
    free(text);
    return object;
}

static int64_t number(const json_t *object, const char *group, const char *key) {
    if (group) object = json_object_get(object, group);
    const json_t *value = json_object_get(object, key);
    assert_true(json_is_integer(value));
    return json_integer_value(value);
}

static void test_published(void **state) {
    (void)state;
    for (const struct published *p = published_models; p->path; p++) {
        json_t *o = plan_json((char *[]){"plan", (char *)p->path, "--json", NULL});
        assert_int_equal(number(o, NULL, "parameters"), p->params);
        assert_int_equal(number(o, NULL, "embedding_parameters"), p->matrices * p->rows * p->d_model);
        /* Tensors are padded to 64 bytes, no more. */
        int64_t bytes = number(o, "memory", "parameters");
        assert_true(bytes >= 4 * p->params && (double)bytes < 4.0001 * (double)p->params);
        assert_int_equal(number(o, NULL, "seq"), p->seq);
        json_decref(o);
    }
}

/* Steps and tokens of the run, and what the optimizer will do to each tensor. */
static void test_recipe(void **state) {
    (void)state;
    json_t *o = plan_json((char *[]){"plan", "configs/mamba2/130m.ini", "ramp.stages=64*1000 128*500",
                                     "train.steps=2000", "schedule.warmup=9", "group.gates.match=*.A_log *.dt_bias",
                                     "group.gates.lr_scale=0.25", "group.skip.match=*.D", "group.skip.clamp_max=1.5",
                                     "group.skip.weight_decay=0.5", "--tensors", "--json", NULL});
    assert_int_equal(number(o, NULL, "steps"), 2000);
    double tokens = 2048.0 * (64 * 1000 + 128 * 500 + 256 * 500);
    assert_true(json_real_value(json_object_get(o, "tokens")) == tokens);
    const json_t *list = json_object_get(o, "tensors"), *one;
    size_t i, gates = 0, skips = 0, decayed = 0;
    assert_int_equal(json_array_size(list), 1 + 24 * 9 + 1);
    json_array_foreach(list, i, one) {
        const char *name = json_string_value(json_object_get(one, "name")), *end = strrchr(name, '.') + 1;
        bool gate = strcmp(end, "A_log") == 0 || strcmp(end, "dt_bias") == 0, skip = strcmp(end, "D") == 0;
        double decay = json_number_value(json_object_get(one, "weight_decay"));
        assert_true(json_number_value(json_object_get(one, "lr_scale")) == (gate ? 0.25 : 1));
        assert_true(json_number_value(json_object_get(one, "clamp_max")) == (skip ? 1.5 : 0)); /* 0: not there */
        assert_true(decay == (skip ? 0.5 : strstr(name, "proj") || strstr(name, "conv1d.weight") ? 0.1 : 0));
        gates += gate;
        skips += skip;
        decayed += decay == 0.1;
    }
    assert_true(gates == 48 && skips == 24 && decayed == 72);
    json_decref(o);
    error err = {0};
    char *text;
    assert_int_equal(
        PLAN(&text, &err, "configs/mamba2/130m.ini", "--tensors", "group.a.match=*.A", "group.a.lr_scale=2"), -1);
    assert_non_null(strstr(err.text, "[group.a] match: no tensor has a name like *.A; the nearest is"));
    assert_string_equal(text, "");
    free(text);
    assert_int_equal(
        PLAN(&text, &err, "configs/mamba2/130m.ini", "--tensors", "group.a.match=*.D", "group.a.clamp_min=0"), 0);
    assert_non_null(strstr(text, "\nbackbone.layers.23.mixer.D                       24                         1"
                                 "            0  from 0\n"));
    assert_non_null(strstr(text, "the whole run       572205 steps, 300 G tokens, 2.54e+20 FLOPs"));
    free(text);
}

/* A config of a small model in a directory of the test's own. */
static void write_config(char path[300], const char *directory) {
    error err = {0};
    const char *text = "[model]\nd_model = 32\nvocab_size = 100\npattern = m*3\n"
                       "[block.m]\nmixer = mamba2\nhead_dim = 8\nd_state = 16\nmlp = swiglu\nmlp_width = 50\n"
                       "[data]\nseq_len = 40\n[train]\nbatch = 12\nmicro_batch = 2\n";
    snprintf(path, 300, "%s/small.ini", directory);
    assert_int_equal(file_write_all(path, text, strlen(text), &err), 0);
}

static void test_real(void **state) {
    (void)state;
    error err = {0};
    char directory[256], path[300];
    unit_directory(directory);
    write_config(path, directory);
    json_t *o = plan_json((char *[]){"plan", path, "--ranks", "3", "--precision", "fp64", "--json", NULL});
    assert_int_equal(number(o, NULL, "batch"), 2);
    assert_int_equal(number(o, NULL, "seq"), 40);
    config *c = NULL;
    struct model_config *mc = NULL;
    struct device *dev;
    struct model *m;
    assert_int_equal(config_load(&c, path, &err), 0);
    assert_int_equal(model_config_bind(&mc, c, 0, &err), 0);
    assert_int_equal(device_open(&dev, DEVICE_CPU, PRECISION_F64, &err), 0);
    assert_int_equal(model_open(&m, mc, dev, MODEL_TRAIN, 2, 40, 0, 3, &err), 0);
    struct model_memory real = model_allocated(m);
    assert_int_equal(number(o, "memory", "parameters"), real.parameters);
    assert_int_equal(number(o, "memory", "gradients"), real.gradients);
    assert_int_equal(number(o, "memory", "activations"), real.activations);
    assert_int_equal(number(o, "memory", "scratch"), real.scratch);
    assert_int_equal(number(o, "memory", "batch"), real.batch);
    assert_int_equal(number(o, "memory", "total"), real.total + (size_t)number(o, "memory", "optimizer"));
    assert_int_equal(number(o, "memory", "optimizer"), 2 * model_params(m)->elements / 3 * 8);
    struct model_state *s;
    assert_int_equal(number(o, NULL, "state_bytes_per_sequence"), model_state_bytes(mc, dev->ops, 1));
    assert_int_equal(model_state_open(&s, m, 1, &err), 0);
    model_state_close(s);
    model_close(m);
    device_close(dev);
    model_config_free(mc);
    config_free(c);
    json_decref(o);
    unit_directory_remove(directory);
}

/* The batch found fits, one more does not; nothing fits where one sequence is too much. */
static void test_largest(void **state) {
    (void)state;
    char directory[256], path[300], batch[32];
    unit_directory(directory);
    write_config(path, directory);
    for (int gib = 0; gib < 3; gib++) {
        char *memory = (char *[]){"0.01", "0.1", "1"}[gib];
        json_t *o = plan_json((char *[]){"plan", path, "--memory", memory, "--json", NULL});
        int64_t largest = number(o, NULL, "largest_batch");
        double limit = json_number_value(json_object_get(o, "memory_limit"));
        assert_true(largest >= 1);
        for (int more = 0; more < 2; more++) {
            snprintf(batch, sizeof batch, "%lld", (long long)largest + more);
            json_t *at = plan_json((char *[]){"plan", path, "--batch", batch, "--json", NULL});
            assert_int_equal((double)number(at, "memory", "total") <= limit, more == 0);
            if (!more) assert_int_equal(number(at, "memory", "total"), number(o, "largest_batch_memory", "total"));
            json_decref(at);
        }
        json_decref(o);
    }
    json_t *o = plan_json((char *[]){"plan", path, "--memory", "1e-4", "--json", NULL});
    assert_int_equal(number(o, NULL, "largest_batch"), 0);
    assert_true(number(o, "one_sequence_memory", "total") > 107374);
    json_decref(o);
    unit_directory_remove(directory);
}

static void test_text(void **state) {
    (void)state;
    error err = {0};
    char *text;
    assert_int_equal(
        PLAN(&text, &err, "configs/mamba2/2.7b.ini", "--memory", "80", "--ranks", "8", "train.micro_batch=2"), 0);
    static const char *const lines[] = {
        "configs/mamba2/2.7b.ini: 64 blocks (m*64) of width 2560, 50277 token ids in 50288 rows\n",
        "2,702,599,680\n",
        "forward 5.61 G, training 16.8 G (6 x parameters: 16.2 G)\n",
        "memory of a rank, fp32, 2 sequences of 2048 tokens at once, 8 ranks\n",
        "  optimizer        2.52 GiB\n",
        "largest batch in 80.0 GiB: ",
    };
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        if (!strstr(text, lines[i])) fail_msg("'%s' is not in:\n%s", lines[i], text);
    free(text);
}

static void test_refusals(void **state) {
    (void)state;
    static const struct {
        char *argument, *sentence;
    } cases[] = {
        {"model.d_mode=3", "command line: model.d_mode=3: [model] has no option d_mode; did you mean d_model?"},
        {"model.d_model=100", "block.m.head_dim = 64 must divide expand * d_model = 200; the nearest that does is 50"},
        {"train.micro_batch=7",
         "train.batch = 256 is no multiple of ranks * train.micro_batch = 1 * 7 = 7; the nearest valid: "
         "train.batch = 252 or 259, or train.micro_batch = 8"},
        {"--batch=1073741824",
         "a micro-batch of 1073741824 sequences of 2048 tokens is beyond any machine for this model; at most "
         "511475099 tokens can be asked for"},
        {"--memry=3", "'--memry' is no option of riverrun plan; did you mean --memory?"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        error err = {0};
        char *text;
        int result = PLAN(&text, &err, "configs/mamba2/130m.ini", cases[i].argument);
        unit_expect(result, &err, ERROR_INPUT, cases[i].sentence);
        assert_string_equal(text, "");
        free(text);
    }
}

/* What xLSTM's recipe decays: the matrices of layers and of the head; transformers' names say which. */
static void test_decay_of_the_head(void **state) {
    (void)state;
    static const char *const policies[] = {"optimizer.decay=table", "optimizer.decay=head", "optimizer.decay=all"};
    for (int policy = 0; policy < 3; policy++) {
        json_t *o = plan_json((char *[]){"plan", "configs/xlstm/165m.ini", (char *)policies[policy], "--tensors",
                                         "--json", NULL});
        const json_t *one;
        size_t i, decayed = 0;
        json_array_foreach(json_object_get(o, "tensors"), i, one) {
            const char *name = json_string_value(json_object_get(one, "name"));
            bool matrix = strstr(name, "mlstm_layer.") || strstr(name, ".ffn.");
            bool head = strcmp(name, "lm_head.weight") == 0;
            if (strstr(name, "bias") || strstr(name, "norm")) matrix = false;
            double decay = json_number_value(json_object_get(one, "weight_decay"));
            assert_true(decay == (policy == 2 || matrix || (policy == 1 && head) ? 0.1 : 0));
            decayed += decay == 0.1;
        }
        assert_int_equal(decayed, policy == 0 ? 12 * 10 : policy == 1 ? 12 * 10 + 1 : 12 * 15 + 3);
        json_decref(o);
    }
}

/* ParaRNN's recipe: everything decays, detached, and the cells' weights have a limit, which a group may change. */
static void test_limit_of_cells(void **state) {
    (void)state;
    json_t *o = plan_json((char *[]){"plan", "configs/pararnn/lstm-400m.ini", "group.first.match=*.0.mixer.cell.weight",
                                     "group.first.clamp_max=0.25", "--tensors", "--json", NULL});
    const json_t *one;
    size_t i, limited = 0;
    json_array_foreach(json_object_get(o, "tensors"), i, one) {
        const char *name = json_string_value(json_object_get(one, "name"));
        bool cell = strstr(name, "mixer.cell.weight") != NULL, first = cell && strstr(name, "layers.0.");
        assert_true(json_number_value(json_object_get(one, "weight_decay")) == 1e-3);
        assert_true(json_number_value(json_object_get(one, "clamp_min")) == (cell ? -0.5 : 0)); /* 0: not there */
        assert_true(json_number_value(json_object_get(one, "clamp_max")) == (first ? 0.25 : cell ? 0.5 : 0));
        limited += cell;
    }
    assert_int_equal(limited, 24);
    json_decref(o);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_published), cmocka_unit_test(test_real),     cmocka_unit_test(test_largest),
        cmocka_unit_test(test_text),      cmocka_unit_test(test_refusals), cmocka_unit_test(test_recipe),
        cmocka_unit_test(test_decay_of_the_head), cmocka_unit_test(test_limit_of_cells),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

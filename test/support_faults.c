/* support_faults.c: see support_faults.h. */
#include "test/unit.h"

#include "common/json.h"
#include "common/limits.h"
#include "test/support_faults.h"
#include "train/checkpoint.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>
#include <zstd.h>
#ifdef RIVERRUN_OPENMP
#include <omp.h>
#endif

/* The program under another name. */
int riverrun_main(int argc, char **argv);
#define main riverrun_main
#include "train/main.c"
#undef main

static const char train_config[] = "[model]\nd_model = 8\npattern = m\nvocab_size = 0\n"
                                  "[block.m]\nmixer = mamba2\nd_state = 4\nhead_dim = 8\nchunk = 8\n"
                                  "[train]\nsteps = 4\nbatch = 2\nmicro_batch = 1\nlog_every = 2\n"
                                  "[data]\ntrain = data\nvalid = valid\nseq_len = 16\n"
                                  "[optimizer]\nlr = 1e-2\n[schedule]\nkind = constant\nwarmup = 0\n"
                                  "[eval]\nevery = 2\ntokens = 60\nbatch = 2\n"
                                  "[checkpoint]\nevery = 2\nkeep = 1\n";

const struct fault_scene fault_scenes[] = {
    {.name = "tokenize", .base = NULL, .result = FAULT_TREE,
     .words = {"tokenize", "--out", "w/out", "--overwrite", "--shard-tokens", "1000", "--threads", "2", "text"}},
    {.name = "tokenize over old shards", .base = "old", .result = FAULT_TREE,
     .words = {"tokenize", "--out", "w/out", "--overwrite", "--shard-tokens", "1000", "--threads", "1", "text.zst",
               "text.gz"}},
    {.name = "tokenize JSON lines", .base = NULL, .result = FAULT_TREE,
     .words = {"tokenize", "--out", "w/out", "--overwrite", "--jsonl-key", "text", "--threads", "1", "lines"}},
    {.name = "train", .base = NULL, .result = FAULT_RUN, .words = {"train", "c.ini", "train.out=w/run"}},
    {.name = "train, going on", .base = "halfway", .result = FAULT_RUN, .words = {"train", "c.ini", "train.out=w/run"}},
    {.name = "train from weights", .base = NULL, .result = FAULT_RUN,
     .words = {"train", "c.ini", "train.out=w/run", "train.init=run", "train.steps=2"}},
    {.name = "export", .base = NULL, .result = FAULT_TREE, .words = {"export", "run", "--out", "w/out"}},
    {.name = "import", .base = NULL, .result = FAULT_TREE, .words = {"import", "hf", "--out", "w/out"}},
    {.name = "shards cat", .result = FAULT_OUTPUT, .reads_only = true, .words = {"shards", "cat", "data"}},
    {.name = "shards verify", .result = FAULT_OUTPUT, .reads_only = true,
     .words = {"shards", "verify", "--threads", "2", "data"}},
    {.name = "eval", .result = FAULT_OUTPUT, .reads_only = true, .words = {"eval", "run", "--data", "valid"}},
    {.name = "generate", .result = FAULT_OUTPUT, .reads_only = true,
     .words = {"generate", "run", "--prompt", "the ", "--tokens", "8", "--top-k", "5"}},
    {.name = "plan", .result = FAULT_OUTPUT, .reads_only = true,
     .words = {"plan", "c.ini", "model.vocab_size=257", "--json"}},
    {.name = NULL},
};

bool faults_all(void) {
    const char *text = getenv("FAULTS");
    return text && strcmp(text, "all") == 0;
}

void faults_shell(const char *format, ...) {
    char command[2000];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(command, sizeof command, format, arguments);
    va_end(arguments);
    if (system(command) != 0) fail_msg("%s failed", command);
}

/* ---- running ----------------------------------------------------------------------------------------------------- */

static void send_to(int descriptor, const char *path) {
    int opened = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (opened < 0 || dup2(opened, descriptor) < 0) _exit(99);
    close(opened);
}

static void run_child(const char *const *words, const struct fault *f) {
    char copies[16][200], *argv[17] = {copies[0]};
    int argc = 1;
    snprintf(copies[0], sizeof copies[0], "riverrun");
    for (; words[argc - 1]; argc++) {
        snprintf(copies[argc], sizeof copies[argc], "%s", words[argc - 1]);
        argv[argc] = copies[argc];
    }
    argv[argc] = NULL;
    send_to(STDOUT_FILENO, "stdout");
    send_to(STDERR_FILENO, "stderr");
    if (f && f->disk) setenv("RIVERRUN_TEST_FAULT", f->disk, 1);
    else unsetenv("RIVERRUN_TEST_FAULT");
#ifdef RIVERRUN_OPENMP
    omp_set_num_threads(1);
#endif
    if (f && f->arm) f->arm();
    int code = riverrun_main(argc, argv);
    if (f && f->disarm) f->disarm();
    exit(code);
}

int faults_run(const char *const *words, const struct fault *f) {
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) run_child(words, f);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void must_run(const char *const *words) {
    int code = faults_run(words, NULL);
    if (code == 0) return;
    faults_shell("cat stderr >&2");
    fail_msg("riverrun %s ended with exit code %d", words[0], code);
}

/* ---- what is there ----------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t digest, const void *bytes, size_t size) {
    return XXH64(bytes, size, digest);
}

/* Whether `path` is there, without following links. */
static bool is_there(const char *path) {
    struct stat about;
    return lstat(path, &about) == 0;
}

uint64_t faults_digest(const char *path, bool hidden) {
    char **names, target[LIMIT_PATH], inside[LIMIT_PATH];
    size_t count;
    uint64_t digest = 1, hash, size;
    error err = {0};
    ssize_t length = readlink(path, target, sizeof target);
    if (length >= 0) return mix(2, target, (size_t)length);
    if (!is_there(path)) return 0;
    if (!file_is_directory(path)) {
        assert_int_equal(file_hash_of(path, &hash, &size, &err), 0);
        return mix(3, &hash, sizeof hash);
    }
    assert_int_equal(file_list(path, "", &names, &count, &err), 0);
    for (size_t i = 0; i < count; i++) {
        if (names[i][0] == '.' && !hidden) continue;
        assert_int_equal(file_join(inside, sizeof inside, path, names[i], &err), 0);
        uint64_t below = faults_digest(inside, hidden);
        digest = mix(digest, names[i], strlen(names[i]));
        digest = mix(digest, &below, sizeof below);
    }
    file_list_free(names, count);
    return digest;
}

/* The log's steps and validations without times, which is what must not depend on interruptions. */
static uint64_t curve_digest(const char *path) {
    uint64_t digest = 5;
    char line[LIMIT_PATH * 2];
    FILE *in = fopen(path, "r");
    assert_non_null(in);
    while (fgets(line, sizeof line, in)) {
        json_t *object = json_loads(line, 0, NULL);
        assert_non_null(object);
        const char *type = json_string_value(json_object_get(object, "type"));
        if (strcmp(type, "step") == 0 || strcmp(type, "valid") == 0) {
            json_object_del(object, "seconds");
            json_object_del(object, "tokens_per_s");
            json_object_del(object, "flops_per_s");
            char *text = json_dumps(object, JSON_SORT_KEYS);
            digest = mix(digest, text, strlen(text));
            free(text);
        }
        json_decref(object);
    }
    fclose(in);
    return digest;
}

/* A run: 0 without a checkpoint; with one, which must be whole, the digest of its weights and moments, and of the curve
 * and the names in the directory if all of it is asked for. */
static bool run_digest(const char *run, bool all, uint64_t *digest) {
    struct checkpoint *c;
    error err = {0};
    char latest[LIMIT_PATH];
    assert_int_equal(file_join(latest, sizeof latest, run, "latest", &err), 0);
    *digest = 0;
    if (!is_there(latest)) return true;
    if (checkpoint_open(&c, latest, &err) != 0) {
        print_error("%s\n", err.text);
        return false;
    }
    checkpoint_close(c);
    uint64_t parts[2] = {faults_digest(unit_path(latest, "model.safetensors"), true),
                         faults_digest(unit_path(latest, "optimizer.safetensors"), true)};
    *digest = mix(4, parts, sizeof parts);
    if (!all) return true;
    uint64_t curve = curve_digest(unit_path(run, "log.jsonl"));
    *digest = mix(*digest, &curve, sizeof curve);
    char **names;
    size_t count;
    assert_int_equal(file_list(run, "", &names, &count, &err), 0);
    for (size_t i = 0; i < count; i++) *digest = mix(*digest, names[i], strlen(names[i]));
    file_list_free(names, count);
    return true;
}

uint64_t faults_run_digest(const char *run) {
    uint64_t digest;
    return run_digest(run, false, &digest) ? digest : 0;
}

/* False if what is there is not whole. */
static bool result_digest(const struct fault_scene *s, bool all, uint64_t *digest) {
    *digest = 0;
    if (s->result == FAULT_RUN) return run_digest("w/run", all, digest);
    if (s->result == FAULT_TREE) *digest = all ? faults_digest("w", true) : faults_digest("w/out", false);
    return true;
}

/* ---- attempts ---------------------------------------------------------------------------------------------------- */

void faults_prepare(const struct fault_scene *s) {
    if (s->reads_only) return;
    if (s->base) faults_shell("rm -rf w && cp -a '%s' w", s->base);
    else faults_shell("rm -rf w && mkdir w");
}

struct fault_whole faults_undisturbed(const struct fault_scene *s) {
    struct fault_whole whole = {0};
    faults_prepare(s);
    assert_true(result_digest(s, false, &whole.before));
    must_run(s->words);
    assert_true(result_digest(s, false, &whole.after));
    assert_true(result_digest(s, true, &whole.everything));
    whole.output = faults_digest("stdout", true);
    return whole;
}

bool faults_has_sentence(const char *what, const char *const *reasons) {
    char *text, *sentence = NULL;
    size_t size;
    int sentences = 0;
    bool last = false, found = false;
    error err = {0};
    assert_int_equal(file_read_all("stderr", 1 << 20, &text, &size, &err), 0);
    for (char *line = text, *end; *line; line = end) {
        end = line + strcspn(line, "\n");
        if (*end) *end++ = '\0';
        last = strncmp(line, "riverrun: ", 10) == 0;
        if (!last) continue;
        sentence = line;
        sentences++;
    }
    for (int i = 0; sentence && reasons[i] && !found; i++) found = strstr(sentence, reasons[i]) != NULL;
    bool right = sentences == 1 && last && found && strlen(sentence) >= 25;
    if (!right) {
        print_error("%s: %d sentences, the last line is %sone, its reason is %s\n", what, sentences,
                    last ? "" : "not ", found ? "there" : "missing");
        faults_shell("tail -n 30 stderr >&2");
    }
    free(text);
    return right;
}

/* What is wrong with what an attempt left behind; NULL: nothing. */
static const char *judge(const struct fault_scene *s, const struct fault_whole *whole, int code, uint64_t untouched) {
    if (code == 0 && faults_digest("stdout", true) != whole->output) return "another standard output";
    if (s->reads_only) return NULL;
    uint64_t now;
    if (!result_digest(s, false, &now)) return "what is there is not whole";
    if (code == 0 && now != whole->after) return "exit code 0, but the result is another";
    if (s->result == FAULT_TREE && now != whole->before && now != whole->after)
        return "the result is neither there as it was nor whole";
    if (s->result == FAULT_RUN && now == 0 && whole->before != 0) return "the checkpoint is lost";
    if (code == 0 || faults_digest("w", true) == untouched) return NULL;
    /* An export that failed after all was in place is there; making it again is refused, as it should be. */
    bool refuses = s->result == FAULT_TREE && now == whole->after && strcmp(s->words[0], "tokenize") != 0;
    if (!refuses && faults_run(s->words, NULL) != 0) return "the next run fails";
    if (!result_digest(s, true, &now) || now != whole->everything) return "the next run does not give the same";
    return NULL;
}

int faults_attempt(const struct fault_scene *s, const struct fault_whole *whole, const struct fault *f,
                   const char *what, const char *const *reasons) {
    char name[300];
    snprintf(name, sizeof name, "%s, %s", s->name, what);
    faults_prepare(s);
    uint64_t untouched = s->reads_only ? 0 : faults_digest("w", true);
    int code = faults_run(s->words, f);
    const char *wrong = code != 0 && code != 1 ? "neither success nor a refusal" : NULL;
    if (code == 1 && !faults_has_sentence(name, reasons)) return -1;
    if (!wrong) wrong = judge(s, whole, code, untouched);
    if (!wrong) return code;
    print_error("%s: exit code %d: %s\n", name, code, wrong);
    faults_shell("tail -n 30 stderr >&2");
    return -1;
}

/* ---- the directory ----------------------------------------------------------------------------------------------- */

static void write_text(const char *path, uint32_t seed, size_t size) {
    static const char words[] = "theandofriverrunpastevefromswervebendbayes";
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    for (size_t n = 0; n < size; n += 5) {
        seed = seed * 1664525 + 1013904223;
        if (n % 400 == 395) fprintf(out, "\n<|endoftext|>\n");
        else fprintf(out, "%.4s%c", words + (seed >> 16) % 38, n % 60 == 55 ? '\n' : ' ');
    }
    fclose(out);
}

static void write_compressed(const char *path, const char *from) {
    char *text, packed[10000];
    size_t size;
    error err = {0};
    assert_int_equal(file_read_all(from, 1 << 20, &text, &size, &err), 0);
    ZSTD_CCtx *context = ZSTD_createCCtx();
    assert_non_null(context);
    ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, 1);
    size_t packed_size = ZSTD_compress2(context, packed, sizeof packed, text, size);
    ZSTD_freeCCtx(context);
    assert_false(ZSTD_isError(packed_size));
    FILE *out = fopen(path, "w");
    assert_true(out && fwrite(packed, 1, packed_size, out) == packed_size && fclose(out) == 0);
    free(text);
}

void faults_enter(char directory[256]) {
    const char *parent = getenv("TMPDIR");
    if (access("/dev/shm", W_OK) == 0) parent = "/dev/shm";
    snprintf(directory, 256, "%s/unit.XXXXXX", parent && *parent ? parent : "/tmp");
    assert_non_null(mkdtemp(directory));
    assert_int_equal(chdir(directory), 0);
    write_text("text", 1, 3000);
    write_text("text2", 2, 2500);
    write_text("text3", 3, 500);
    write_compressed("text.zst", "text");
    faults_shell("cat > c.ini <<'END'\n%sEND", train_config);
    /* The second line is longer than the buffer for lines is at first. */
    faults_shell("echo '{\"text\":\"short\"}' > lines");
    faults_shell("{ printf '{\"text\":\"'; head -c 1100000 /dev/zero | tr '\\0' x; echo '\"}'; } >> lines");
    faults_shell("gzip -c text2 > text.gz && mkdir old halfway");
    must_run((const char *[]){"tokenize", "--out", "data", "--shard-tokens", "1500", "text", NULL});
    must_run((const char *[]){"tokenize", "--out", "valid", "text3", NULL});
    must_run((const char *[]){"tokenize", "--out", "old/out", "--shard-tokens", "700", "text3", NULL});
    must_run((const char *[]){"train", "c.ini", "train.out=run", NULL});
    must_run((const char *[]){"train", "c.ini", "train.out=halfway/run", "train.steps=2", NULL});
    must_run((const char *[]){"export", "run", "--out", "hf", NULL});
}

void faults_leave(const char *directory) {
    assert_int_equal(chdir("/"), 0);
    faults_shell("rm -rf '%s'", directory);
}

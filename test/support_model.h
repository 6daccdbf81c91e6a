/* support_model.h: small models for tests: opened from a config text, with weights that hide nothing, and batches drawn
 * from a key. Used by the tests of model/. A failure to open one fails the test that asked. */
#ifndef RIVERRUN_SUPPORT_MODEL_H
#define RIVERRUN_SUPPORT_MODEL_H

#include "model/model.h"

struct lm {
    config *c;
    struct model_config *mc;
    struct device *dev;
    struct model *m;
    size_t real; /* bytes of a real number */
};

/* The models that every test of a property of models runs through: a new mixer is tested by a line here. All have
 * LM_VOCAB token ids. The first is tied, without MLP. */
enum { LM_VOCAB = 29 };
extern const char *const lm_models[];
extern const int lm_model_count;

/* What of a config: only the model's sections. */
struct model_config *lm_config(config **c, const char *text);

/* On the device under test: the CPU or, where RIVERRUN_TEST_DEVICE is "cuda" in the environment, a GPU, which computes
 * in f32 what a test wants in f64. */
void lm_open(struct lm *lm, const char *text, enum precision precision, enum model_mode mode, int64_t B, int64_t T);
void lm_open_cpu(struct lm *lm, const char *text, enum precision precision, enum model_mode mode, int64_t B, int64_t T);
void lm_close(struct lm *lm);
bool lm_on_gpu(void);
/* What two results of the device under test may differ by where those of f64 may differ by `of_f64`. */
double lm_limit(double of_f64);

/* The papers' initialisation, then noise on every tensor: no gain is 1, no skip is 1, no two heads are alike, no gate
 * is closed. The same for every precision up to rounding. */
void lm_jitter(struct lm *lm, uint64_t seed);
void lm_copy_params(struct lm *to, const struct lm *from);
void lm_round(struct lm *lm); /* all weights to bf16 */

/* A batch on the host. */
struct tokens {
    int64_t B, T;
    int32_t *ids, *targets, *doc; /* (B,T) */
};
/* Random ids and targets below `vocab`, about one target in seven masked; documents of random length, half of the rows
 * starting with one, numbers sometimes left out (an empty document). */
struct tokens tokens_draw(int64_t B, int64_t T, int64_t vocab, uint64_t seed);
void tokens_free(struct tokens *t);
/* Rows [row, row+B) and times [from, from+T) of another batch, as a batch of its own with the same document numbers. */
struct tokens tokens_cut(const struct tokens *t, int64_t row, int64_t B, int64_t from, int64_t T);

void lm_set(struct lm *lm, const struct tokens *t, bool documents);

/* Forward and loss of the batch, no backward: per-target losses (B*T doubles) into `losses` if given; the sums. */
struct loss_sums lm_loss(struct lm *lm, const struct tokens *t, bool documents, double *losses);
/* Forward, loss and backward; gradients are added to what is there. */
struct loss_sums lm_grads(struct lm *lm, const struct tokens *t, bool documents, double scale, double z_loss);

/* Flat copies as doubles; the caller frees. */
double *lm_read_grads(const struct lm *lm);
double *lm_read_logits(struct lm *lm, int64_t from, int64_t count); /* count x rows */
/* One token of B sequences: logits, B x rows, into the caller's doubles. */
void lm_step(struct lm *lm, struct model_state *s, const int32_t *ids, int64_t B, double *logits);

/* || a - b || / || b ||; infinite where anything is not finite; 0 where both are all zero. */
double relative_error(const double *a, const double *b, int64_t count);
double largest_difference(const double *a, const double *b, int64_t count);

/* Tensor `index` of the table has this name and these dimensions (b, c = 0: there are fewer) and flags. */
void expect_tensor(const struct params *p, int index, const char *name, int64_t a, int64_t b, int64_t c, bool decay,
                   bool keep_real);
/* A tensor's values lie within the bounds, and reach out to this share of the way between them. */
void expect_range(const struct model *m, const char *name, double low, double high, double reach);
/* They have this standard deviation, and the mean 0. */
void expect_normal(const struct model *m, const char *name, double deviation);

#endif

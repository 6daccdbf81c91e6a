/* support_faults.h: the program's commands run with one thing failing in each run: for the tests of failing disks,
 * failing memory, and damaged files.
 *
 * The commands run in children of the test, by the program's own main, in a directory of the test's own in which it
 * works (so all paths are short and relative). The test itself starts no threads and changes nothing by common/file.h.
 * A scene is a command with what it finds; it is run undisturbed once, which says what whole results look like, and
 * then with one fault after another. Every attempt ends with the whole result, or with exit code 1 and one sentence
 * that tells the reason, and then what was there is still there, and the same command run again gives the whole result
 * with nothing left over.
 */
#ifndef RIVERRUN_SUPPORT_FAULTS_H
#define RIVERRUN_SUPPORT_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

/* Makes the directory, goes there, and makes what scenes find: text, data sets, runs, a model of other software. */
void faults_enter(char directory[256]);
void faults_leave(const char *directory);

enum fault_result {
    FAULT_TREE,   /* w/out: a directory that is there whole, as it was, or not there */
    FAULT_RUN,    /* w/run: a run whose latest checkpoint, if any, is whole */
    FAULT_OUTPUT, /* standard output */
};

struct fault_scene {
    const char *name;
    const char *words[12]; /* of the command line, NULL behind the last */
    const char *base;      /* the directory whose copy is `w` when the command begins; NULL: an empty one */
    enum fault_result result;
    bool reads_only; /* changes nothing on the disk but standard output */
};
extern const struct fault_scene fault_scenes[]; /* ends with one without a name */

/* What a run is subjected to. `disk` goes into RIVERRUN_TEST_FAULT; `arm` is called in the child just before the
 * command begins, and `disarm` when it has ended. All may be NULL. */
struct fault {
    const char *disk;
    void (*arm)(void);
    void (*disarm)(void);
};

/* The exit code of the command, or 128 + the signal that ended it. ./stdout and ./stderr hold what it said. */
int faults_run(const char *const *words, const struct fault *f);

/* `w` as the scene finds it. */
void faults_prepare(const struct fault_scene *s);

/* The whole results of a scene, from an undisturbed run. */
struct fault_whole {
    uint64_t before, after; /* digests of the result without hidden names */
    uint64_t everything;    /* of all that is there after */
    uint64_t output;        /* of standard output */
};
struct fault_whole faults_undisturbed(const struct fault_scene *s);

/* One attempt, judged as said above. `reasons`, ended by NULL, are texts of which the sentence has one. Returns the
 * exit code, or -1 after telling what was wrong. `what` names the fault. */
int faults_attempt(const struct fault_scene *s, const struct fault_whole *whole, const struct fault *f,
                   const char *what, const char *const *reasons);

/* ./stderr ends with one sentence of riverrun's, which has one of `reasons`. If not, it is told. */
bool faults_has_sentence(const char *what, const char *const *reasons);

/* FAULTS=all in the environment asks for complete sweeps. */
bool faults_all(void);

/* As system(), which must succeed. */
void faults_shell(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* XXH64 over names and contents of a tree, in order; hidden names (with a dot in front) only if asked for. 0:
 * absent. */
uint64_t faults_digest(const char *path, bool hidden);
/* Of a run's latest checkpoint: weights and moments. 0: none, or not whole. */
uint64_t faults_run_digest(const char *run);

#endif

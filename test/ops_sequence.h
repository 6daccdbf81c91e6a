/* test/ops_sequence.h: operands and identities that all sequence operations share.
 *
 * A sequence operation has operands with a place for every token, of dimensions (B, T, ...); a state that it takes and
 * gives, "initial" and "final", (B, ...), with further parts as "initial_m" and "final_m"; the documents "doc"; and
 * parameters that all tokens share. Its row has the parameters B, T, doc, initial and final:
 *   doc      0: no documents given; 1: a few long documents; 2: every row starts a document at its first token, another
 *            begins in the middle, with numbers left out (empty documents); 3: every token is a document; 4: short
 *            ones; 5: at every 64th token, and at the one behind every 128th
 *   initial, final   0: absent; 1: given, with gradient; 2: given, without
 */
#ifndef RIVERRUN_TEST_OPS_SEQUENCE_H
#define RIVERRUN_TEST_OPS_SEQUENCE_H

#include "test/ops.h"

/* Adds initial and final, of these dimensions, and doc. */
void sequence_declare(struct run *r, int ndim, const int64_t *dim);

/* Adds a state, or a part of one. */
void sequence_declare_state(struct run *r, const char *initial, const char *final, int ndim, const int64_t *dim);

/* Adds doc alone. */
void sequence_declare_doc(struct run *r);

/* Values and final state = what `step` gives token by token, its state reset where a document starts. The step's row
 * has operands of the same names without the dimension T, and "state" (with "state_m" ...). `parameters` names those
 * that it takes over from the sequence's row: "B H P". */
void sequence_equals_steps(struct run *r, const struct op_row *step, const char *parameters);

/* The same row with other parameters gives the same values and, if `backward`, gradients. */
void sequence_same(struct run *r, const char *changes, bool backward);
/* The same values and gradients with other lengths Q of chunks, and the same values when nothing is saved. */
void sequence_chunks(struct run *r);

/* Identities. */
void sequence_packed(struct run *r); /* every document run by itself: values and gradients */
void sequence_split(struct run *r);  /* two halves, the state and its gradient handed over */
void sequence_causal(struct run *r); /* values before token t keep their bits when the inputs from t on change */

#endif

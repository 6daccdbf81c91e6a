/* version.h: what this binary is: for --version, the log's first line and checkpoints. */
#ifndef RIVERRUN_VERSION_H
#define RIVERRUN_VERSION_H

const char *version_number(void); /* "0.1.0" */
/* Of the source; "-dirty" behind it if there were changes, "unknown" if there is none. */
const char *version_commit(void);
const char *version_compiler(void);
const char *version_parts(void); /* libraries it was built with: "openblas openmp mpi" */

#endif

/* dlfcn.h: in the emulation the libraries that are loaded for GPUs, cuBLASLt and NCCL, are linked. (cublas.cc, nccl.cc)
 */
#ifndef RIVERRUN_TEST_EMULATION_DLFCN_H
#define RIVERRUN_TEST_EMULATION_DLFCN_H

struct emulated_function {
    const char *name; /* NULL ends a list */
    void *function;
};
extern const struct emulated_function emulated_nccl[];

void *emulated_dlopen(const char *name, int flags);
void *emulated_dlsym(void *library, const char *name);
const char *emulated_dlerror();
int emulated_dlclose(void *library);

#define dlopen emulated_dlopen
#define dlsym emulated_dlsym
#define dlerror emulated_dlerror
#define dlclose emulated_dlclose
#define RTLD_LAZY 1
#define RTLD_NOW 2
#define RTLD_GLOBAL 256
#define RTLD_LOCAL 0

#endif

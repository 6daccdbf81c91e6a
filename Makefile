# Makefile: builds riverrun with the parts this machine has, and says which it found. `make help` lists the targets.
#
# Every part can be switched off on the command line (make MPI=0 CUDA=0), every directory is found through wildcards
# (a new source file needs no edit here), and everything that is built lies under $(BUILD). Changing a switch rebuilds
# what depends on it: the flags are kept in $(BUILD)/flags, and every object depends on that file.

# ---- switches ------------------------------------------------------------------------------------------------------

BUILD     ?= build
PREFIX    ?= /usr/local
CC        := $(if $(filter default,$(origin CC)),$(if $(shell command -v cc 2>/dev/null),cc,gcc),$(CC))
CLANG     ?= clang
PYTHON    ?= python3
CPU_ARCH  ?= native
OPENBLAS  ?= 1
OPENMP    ?= 1
MPI       ?= 1
CUDA      ?= 1
NCCL      ?= 1
CUDNN     ?= 1
EMULATE   ?= 0
WERROR    ?= 1
DEBUG     ?= 0
V         ?= 0
SAN       ?=
MPICC     ?= mpicc
NVCC_FOUND := $(firstword $(wildcard /usr/local/cuda/bin/nvcc) $(shell command -v nvcc 2>/dev/null))
CUDA_HOME ?= $(NVCC_FOUND:%/bin/nvcc=%)
CUDA_ARCH ?=

comma     := ,
hash      := \#
.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.PHONY: all report tests fuzzers install help deps clean test quickstart
.SUFFIXES:
Q := $(if $(filter 1,$(V)),,@)

# Goals that need neither compiler nor libraries, or hand over to a script that calls make again.
GOALS     := $(or $(MAKECMDGOALS),all)
BUILDING  := $(filter-out help deps clean test,$(GOALS))
REPORTING := $(filter all report tests install quickstart,$(GOALS))
# Whoever asks for the quick start wants it quick.
ifneq ($(filter quickstart,$(GOALS)),)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 1)
endif

# ---- what this machine has -----------------------------------------------------------------------------------------
# A part is there when the compiler finds its header (and, where it matters, its library). Probing is left out for goals
# that build nothing.

ifneq ($(BUILDING),)

# has_header HEADER,FLAGS gives 1 or nothing.
has_header = $(shell printf '$(hash)include <stddef.h>\n$(hash)include <$(1)>\n' | \
               $(CC) $(CPPFLAGS) $(2) -x c -E - >/dev/null 2>&1 && echo 1)
version_of = $(or $(shell pkg-config --modversion $(1) 2>/dev/null | head -n 1),found)
# archive_or_shared NAME gives the path of libNAME.a where there is one, so that the binary can be carried, else -lNAME.
archive_or_shared = $(if $(findstring /,$(call archive,$(1))),$(call archive,$(1)),-l$(1))
archive           = $(shell $(CC) $(LDFLAGS) -print-file-name=lib$(1).a)
linkage           = $(if $(filter %.a,$(1)),static,shared)

CC_VERSION := $(shell $(CC) --version 2>/dev/null | head -n 1)
ifeq ($(CC_VERSION),)
$(error There is no C compiler '$(CC)': install the Debian package gcc (`make deps` does it), or name another with CC=)
endif
MULTIARCH := $(shell $(CC) -print-multiarch 2>/dev/null)

# Required libraries: HEADER:LIBRARY:PKG-CONFIG NAME:DEBIAN PACKAGE
REQUIRED := zstd.h:zstd:libzstd:libzstd-dev xxhash.h:xxhash:libxxhash:libxxhash-dev \
            jansson.h:jansson:jansson:libjansson-dev ini.h:inih:inih:libinih-dev zlib.h:z:zlib:zlib1g-dev \
            utf8proc.h:utf8proc:libutf8proc:libutf8proc-dev
part = $(word $(2),$(subst :, ,$(1)))
ABSENT := $(foreach r,$(REQUIRED),$(if $(call has_header,$(call part,$r,1)),,$(call part,$r,4)))
ifneq ($(strip $(ABSENT)),)
$(error riverrun needs a library whose header is missing here, install the Debian package(s) \
  $(strip $(ABSENT)): `make deps` does it)
endif
$(foreach r,$(REQUIRED),$(eval LIB_$(call part,$r,2) := $(call archive_or_shared,$(call part,$r,2))))
REQUIRED_LIBS := $(foreach r,$(REQUIRED),$(LIB_$(call part,$r,2)))

# OpenBLAS: Debian's OpenMP build where it is installed (with its own run path, because the system's default may point
# at the pthread build, whose threads and ours would fight), else whatever pkg-config knows.
ifeq ($(OPENBLAS),1)
  BLAS_DIR := $(wildcard /usr/lib/$(MULTIARCH)/openblas-openmp)
  ifneq ($(BLAS_DIR),)
    BLAS_CFLAGS := -I/usr/include/$(MULTIARCH)/openblas-openmp
    BLAS_LIBS   := -L$(BLAS_DIR) -Wl,-rpath,$(BLAS_DIR) -lopenblas
    BLAS_TEXT   := $(call version_of,$(wildcard $(BLAS_DIR)/pkgconfig/openblas.pc))$(comma) its OpenMP build (shared)
  else
    BLAS_CFLAGS := $(shell pkg-config --cflags openblas 2>/dev/null)
    BLAS_LIBS   := $(or $(shell pkg-config --libs openblas 2>/dev/null),-lopenblas)
    BLAS_TEXT   := $(call version_of,openblas) (shared)
  endif
  HAVE_OPENBLAS := $(call has_header,cblas.h,$(BLAS_CFLAGS) -include openblas_config.h)
endif

ifeq ($(OPENMP),1)
  HAVE_OPENMP := $(call has_header,omp.h,-fopenmp)
endif

# MPI: Open MPI's or MPICH's wrapper is asked for its flags, so that the compiler stays ours.
ifeq ($(MPI),1)
  either_package = $(or $(shell pkg-config $(1) ompi-c 2>/dev/null),$(shell pkg-config $(1) mpich 2>/dev/null))
  MPI_CFLAGS := $(or $(shell $(MPICC) --showme:compile 2>/dev/null),$(call either_package,--cflags))
  MPI_LIBS   := $(or $(shell $(MPICC) --showme:link 2>/dev/null),$(call either_package,--libs))
  HAVE_MPI   := $(if $(MPI_LIBS),$(call has_header,mpi.h,$(MPI_CFLAGS)))
  MPI_TEXT   := $(or $(shell $(MPICC) --showme:version 2>/dev/null | sed -n 's/.*\(Open MPI [0-9.]*\).*/\1/p'),found)
endif

# CUDA: the toolkit, then the architectures: those asked for, else this machine's GPUs, else Ampere and Hopper plus PTX.
CUDA_SOURCES := $(sort $(filter-out kernels/cuda/each_cell%,$(wildcard kernels/cuda/*.cu train/*.cu)))
ifeq ($(CUDA),1)
  NVCC         := $(wildcard $(CUDA_HOME)/bin/nvcc)
  CUDA_VERSION := $(if $(NVCC),$(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p'))
  GPU_CAPS     := $(if $(NVCC),$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
                    grep -E '^[0-9]+\.[0-9]+$$' | sort -u))
  # 9.0 and newer chips have instructions of their own that only the "a" targets reach.
  GPU_ARCHS    := $(foreach c,$(GPU_CAPS),$(if $(filter 9.0 10.0 10.3 12.0 12.1,$c),$(subst .,,$c)a,$(subst .,,$c)))
  ifneq ($(CUDA_ARCH),)
    ARCHS := $(patsubst 90,90a,$(patsubst sm_%,%,$(subst $(comma), ,$(CUDA_ARCH))))
  else ifneq ($(GPU_ARCHS),)
    ARCHS := $(GPU_ARCHS)
  else
    ARCHS := 80 90a
    PTX   := -gencode arch=compute_80,code=compute_80
  endif
  GENCODE  := $(foreach a,$(ARCHS),-gencode arch=compute_$a,code=sm_$a) $(PTX)
  CUDA_DIR := $(firstword $(wildcard $(CUDA_HOME)/lib64 $(CUDA_HOME)/lib))
  ifneq ($(NVCC),)
    HAVE_CUDA := $(if $(CUDA_SOURCES),1)
    ifeq ($(NCCL),1)
      HAVE_NCCL := $(call has_header,nccl.h,-I$(CUDA_HOME)/include)
    endif
    # cuDNN's headers, and those of its frontend, which scripts/get_cudnn_frontend.sh fetches; the library itself is
    # loaded when it is needed.
    ifeq ($(CUDNN),1)
      CUDNN_FRONTEND ?= $(patsubst %/cudnn_frontend.h,%,$(firstword $(wildcard $(addsuffix /cudnn_frontend.h, \
                          $(BUILD)/cudnn-frontend/include $(CUDA_HOME)/include /usr/local/include /usr/include \
                          /usr/local/lib/python3*/*-packages/include /usr/lib/python3/dist-packages/include \
                          $(HOME)/.local/lib/python3*/site-packages/include))))
      HAVE_CUDNN := $(and $(call has_header,cudnn.h,-I$(CUDA_HOME)/include),$(wildcard \
                      $(CUDNN_FRONTEND)/cudnn_frontend.h),1)
    endif
  endif
endif
# The C++ compiler that goes with CC.
CXX := $(patsubst cc,c++,$(subst gcc,g++,$(CC)))
# EMULATE=1: the same sources by the C++ compiler that goes with CC, on the emulated GPU of test/emulation/, for tests.
ifeq ($(EMULATE),1)
  HAVE_CUDA   := $(if $(CUDA_SOURCES),1)
  HAVE_NCCL   := $(if $(filter 1,$(NCCL)),$(HAVE_MPI))
  HAVE_CUDNN  :=
  EMULATION   := $(sort $(wildcard test/emulation/*.cc))
endif
HAVE_CMOCKA := $(call has_header,cmocka.h,-include stdarg.h -include setjmp.h -include stdint.h)
# libFuzzer comes with clang; its runtime library is what may be missing.
HAVE_FUZZER := $(wildcard $(shell $(CLANG) -print-file-name=libclang_rt.fuzzer-$(shell uname -m).a 2>/dev/null) \
                 $(shell $(CLANG) -print-file-name=libclang_rt.fuzzer.a 2>/dev/null) \
                 $(shell $(CLANG) -print-resource-dir 2>/dev/null)/lib/linux/libclang_rt.fuzzer-$(shell uname -m).a)

# ---- flags ---------------------------------------------------------------------------------------------------------

# Errno and trapping of floating-point operations are given up because nothing here looks at them and loops vectorise
# without them; neither changes a result, unlike -ffast-math, which is not used.
ifneq ($(SAN),)
  OPTIMISE := -O1 -g -fno-omit-frame-pointer -fsanitize=$(SAN) -fno-sanitize-recover=all -DRIVERRUN_DEBUG
else ifeq ($(DEBUG),1)
  OPTIMISE := -O0 -g -fno-omit-frame-pointer -DRIVERRUN_DEBUG
else
  OPTIMISE := -O3 -g
endif
# Not wanted: gcc's guess that a snprintf may cut (messages are cut on purpose), and clang's note that it did not
# vectorise a loop. gcc's guess that a variable may be unset depends on how it optimises: a warning, but no error.
QUIET_GCC := $(if $(findstring clang,$(CC_VERSION)),,-Wno-format-truncation -Wno-error=maybe-uninitialized)
WARN := -Wall -Wextra -Wformat-security -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wno-pass-failed \
        $(if $(filter 1,$(WERROR)),-Werror)
MARCH := $(if $(CPU_ARCH),-march=$(CPU_ARCH))
# Loops of kernels/cpu/ use the widest registers there are; left alone, gcc stays with half of AVX-512's.
WIDE := $(shell $(CC) $(MARCH) -mprefer-vector-width=512 -x c -E /dev/null >/dev/null 2>&1 && \
          echo -mprefer-vector-width=512)

# What the language, the layout of the tree and the required libraries ask of every compiler.
BASE_CFLAGS := -std=gnu11 -I. -I$(BUILD)/gen -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -fno-math-errno -fno-trapping-math \
               -pthread $(WARN)
FEATURES := $(if $(HAVE_OPENBLAS),-DRIVERRUN_OPENBLAS $(BLAS_CFLAGS)) $(if $(HAVE_OPENMP),-DRIVERRUN_OPENMP) \
            $(if $(HAVE_MPI),-DRIVERRUN_MPI $(MPI_CFLAGS)) \
            $(if $(HAVE_CUDA),-DRIVERRUN_CUDA $(if $(EMULATION),-DRIVERRUN_EMULATE,-I$(CUDA_HOME)/include) \
              $(if $(HAVE_NCCL),-DRIVERRUN_NCCL))
# Without OpenMP its simd pragmas still count: they let loops that reduce vectorise. What only its other pragmas use is
# then unused.
NO_OPENMP := -fopenmp-simd -Wno-unused-variable
OMP_FLAG  := $(if $(HAVE_OPENMP),-fopenmp,$(NO_OPENMP))
ALL_CFLAGS := $(BASE_CFLAGS) $(QUIET_GCC) $(OPTIMISE) $(MARCH) $(OMP_FLAG) $(FEATURES) $(CPPFLAGS) $(CFLAGS)

CUDART    := -L$(CUDA_DIR) -Wl,-rpath,$(CUDA_DIR) -lcudart_static -lrt
CUDA_LIBS := $(if $(EMULATION),-lstdc++,$(if $(HAVE_CUDA),$(CUDART) -lstdc++))
LIBS := $(REQUIRED_LIBS) $(if $(HAVE_OPENBLAS),$(BLAS_LIBS)) $(if $(HAVE_MPI),$(MPI_LIBS)) $(CUDA_LIBS) $(LDLIBS) \
        -lm -ldl
LINK := $(CC) $(OPTIMISE) $(OMP_FLAG) -pthread $(LDFLAGS)

NVCCFLAGS_ALL := -std=c++17 -I. -I$(BUILD)/gen -O3 -lineinfo $(if $(filter 1,$(DEBUG)),-g -DRIVERRUN_DEBUG) $(GENCODE) \
                 $(if $(filter 1,$(WERROR)),-Werror all-warnings) -Xcompiler -Wall$(comma)-Wextra \
                 $(filter-out -fopenmp,$(FEATURES)) $(NVCCFLAGS)
# The one source in C++ that is no kernel: cuDNN's frontend is C++ headers, which are not ours to warn of.
CPP_FLAGS := -std=c++17 -I. -isystem $(CUDNN_FRONTEND) -I$(CUDA_HOME)/include -O2 -Wall -Wextra \
             $(if $(filter 1,$(WERROR)),-Werror)
# Kernels read the same memory as different types. What they are to be warned of is for nvcc to say.
EMULATE_FLAGS := -std=c++17 -Itest/emulation -I. -I$(BUILD)/gen $(OPTIMISE) $(MARCH) -fno-strict-aliasing \
                 -Wall -Wextra $(if $(filter 1,$(WERROR)),-Werror) $(filter-out -fopenmp,$(FEATURES)) $(CPPFLAGS)
EMULATE_CUDA  := -x c++ -w

# Fuzzers are built by clang with its sanitizers, from the same sources without the optional parts.
FUZZ_SAN    := -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_CFLAGS := $(BASE_CFLAGS) -O1 -g -fno-omit-frame-pointer $(FUZZ_SAN) $(NO_OPENMP) -DRIVERRUN_DEBUG $(CPPFLAGS)

# ---- the flags and the version, kept in files that change only when they do ------------------------------------------

GIT    := GIT_OPTIONAL_LOCKS=0 git
COMMIT := $(or $(shell $(GIT) describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null),unknown)
PARTS  := $(strip $(if $(HAVE_OPENBLAS),openblas) $(if $(HAVE_OPENMP),openmp) $(if $(HAVE_MPI),mpi) \
            $(if $(HAVE_CUDA),cuda))
define VERSION_H
/* Written by the Makefile. */
#define RIVERRUN_COMMIT "$(COMMIT)"
#define RIVERRUN_COMPILER "$(CC_VERSION)"
#define RIVERRUN_PARTS "$(PARTS)"
#define RIVERRUN_FLAGS "$(strip $(OPTIMISE) $(MARCH))"
endef
# Only attention asks; the flags are the same for all, so that a change leaves everything else as it is built.
define HAVE_CUDNN_H
/* Written by the Makefile. */
$(if $(HAVE_CUDNN),$(hash)define RIVERRUN_CUDNN 1)
endef
define FLAGS_TEXT
$(CC) $(CC_VERSION)
$(ALL_CFLAGS) $(WIDE)
$(if $(EMULATION),$(CXX) $(EMULATE_FLAGS) $(EMULATE_CUDA),$(NVCC) $(NVCCFLAGS_ALL))
$(LINK) $(LIBS)
endef
# write_if_new FILE,VARIABLE: the file gets the variable's text unless it has it already.
write_if_new = $(if $(and $(wildcard $(1)),$(call same,$(file <$(1)),$($(2)))),,$(file >$(1),$($(2))))
same = $(and $(findstring <$(1)>,<$(2)>),$(findstring <$(2)>,<$(1)>))
$(shell mkdir -p $(BUILD)/gen)
$(call write_if_new,$(BUILD)/flags,FLAGS_TEXT)
$(call write_if_new,$(BUILD)/gen/version.h,VERSION_H)
$(call write_if_new,$(BUILD)/gen/have_cudnn.h,HAVE_CUDNN_H)

# ---- sources and objects -------------------------------------------------------------------------------------------

# Layers, lowest last, which is also the order in which the linker wants them.
LAYERS := train model data kernels common
SOURCES_common  := $(sort $(wildcard common/*.c))
SOURCES_kernels := $(sort $(wildcard kernels/*.c kernels/cells/*.c) $(if $(HAVE_CUDA),$(wildcard kernels/cuda/*.c)))
SOURCES_model   := $(sort $(wildcard model/*.c))
SOURCES_data    := $(sort $(wildcard data/*.c))
SOURCES_train   := $(sort $(filter-out train/main.c,$(wildcard train/*.c)))

# kernels/cpu/ is compiled twice, in float and in double, but for what does not depend on the type: files named
# *_common.c and those listed here.
CPU_ONCE    :=
SOURCES_cpu := $(sort $(filter-out kernels/cpu/each_cell%,$(wildcard kernels/cpu/*.c)))
CPU_SINGLE  := $(filter %_common.c $(CPU_ONCE),$(SOURCES_cpu))
CPU_TWICE   := $(filter-out $(CPU_SINGLE),$(SOURCES_cpu))

# Sources named each_cell* are compiled once for every cell of kernels/cells/, into each_cell*.CELL.o; on the CPU in
# float and in double. The cells are those that kernels/cells/cells.h has in CELLS.
CELLS     := $(patsubst CELL(%),%,$(filter CELL(%),$(file <kernels/cells/cells.h)))
CELL_CPU  := $(foreach c,$(CELLS),$(patsubst %.c,%.$c,$(sort $(wildcard kernels/cpu/each_cell*.c))))
CELL_CUDA := $(foreach c,$(CELLS),$(patsubst %.cu,%.$c,$(sort $(wildcard kernels/cuda/each_cell*.cu))))
cell_flags = -DCELL=$(1) -DCELL_TEXT='"$(1)"' -DCELL_HEADER='"kernels/cells/$(1).h"'
# Derivatives by complex numbers need no care for infinite ones, as C has it for products of complex numbers.
CELL_COMPLEX := $(if $(findstring clang,$(CC_VERSION)),,-fcx-limited-range)

# objects_of DIRECTORY,LAYER
objects_of = $(patsubst %.c,$(1)/%.o,$(SOURCES_$(2))) $(if $(filter kernels,$(2)), \
               $(patsubst %.c,$(1)/%.o,$(CPU_SINGLE)) \
               $(patsubst %.c,$(1)/%.f32.o,$(CPU_TWICE)) $(patsubst %.c,$(1)/%.f64.o,$(CPU_TWICE)) \
               $(CELL_CPU:%=$(1)/%.f32.o) $(CELL_CPU:%=$(1)/%.f64.o))
OBJ := $(BUILD)/obj
CUDA_OBJECTS := $(if $(HAVE_CUDA),$(patsubst %.cu,$(OBJ)/%.cu.o, \
                  $(filter-out $(if $(HAVE_NCCL),,%_nccl.cu),$(CUDA_SOURCES))) $(CELL_CUDA:%=$(OBJ)/%.cu.o))
CUDA_OF_kernels := $(filter $(OBJ)/kernels/%,$(CUDA_OBJECTS)) $(EMULATION:%.cc=$(OBJ)/%.o) \
                   $(if $(HAVE_CUDNN),$(OBJ)/kernels/cuda/attention_cudnn.cpp.o)
CUDA_OF_train   := $(filter $(OBJ)/train/%,$(CUDA_OBJECTS))
# A source that goes away has to leave its library, too.
SOURCES_TEXT := $(strip $(foreach l,$(LAYERS) cpu,$(SOURCES_$l)) $(CELL_CPU) $(CUDA_OBJECTS))
$(call write_if_new,$(BUILD)/sources,SOURCES_TEXT)
LIBRARIES := $(LAYERS:%=$(BUILD)/lib%.a)

TEST_UNITS    := $(patsubst test/%.c,$(BUILD)/test/%,$(sort $(wildcard test/test_*.c)))
TEST_CUDA     := $(if $(HAVE_CUDA),$(patsubst test/%.cu,$(BUILD)/test/%,$(sort $(wildcard test/*.cu) \
                   $(if $(EMULATION),$(wildcard test/emulation/*.cu)))))
TEST_TABLES   := $(patsubst test/%.c,$(BUILD)/test/%,$(wildcard test/ops.c test/golden.c))
OPS_OBJECTS    := $(patsubst %.c,$(OBJ)/%.o,$(sort $(wildcard test/ops.c test/ops_*.c)))
GOLDEN_OBJECTS := $(patsubst %.c,$(OBJ)/%.o,$(sort $(wildcard test/golden.c test/golden_*.c)))
SUPPORT        := $(patsubst %.c,$(OBJ)/%.o,$(sort $(wildcard test/support*.c)))
# What is left in test/ are programs that scripts call.
TEST_TOOLS     := $(patsubst test/%.c,$(BUILD)/test/%,$(sort $(filter-out test/test_% test/ops.c test/ops_% \
                    test/golden.c test/golden_% test/support%,$(wildcard test/*.c))))
FUZZ_TARGETS   := $(patsubst test/fuzz/%.c,$(BUILD)/fuzz/%,$(sort $(wildcard test/fuzz/fuzz_*.c)))

# ---- targets -------------------------------------------------------------------------------------------------------

all: $(BUILD)/riverrun ## Build the program (the default); says first what it found and what it does without

report: ; @: ## Only say what was found

tests: $(TEST_UNITS) $(TEST_TABLES) $(TEST_TOOLS) $(TEST_CUDA) ## Build the test programs

fuzzers: $(if $(HAVE_FUZZER),$(FUZZ_TARGETS)) ## Build the fuzzers (clang with libFuzzer; left out without it)
	$(if $(HAVE_FUZZER),@:,@echo "fuzzers left out: no $(CLANG) with libFuzzer (Debian packages clang, libclang-rt-dev)")

install: $(BUILD)/riverrun ## Copy the program to PREFIX/bin (PREFIX=/usr/local, DESTDIR=)
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(BUILD)/riverrun $(DESTDIR)$(PREFIX)/bin/riverrun

$(BUILD)/riverrun: $(OBJ)/train/main.o $(LIBRARIES)
	@echo "  LINK $@"
	$(Q)$(LINK) -o $@ $^ $(LIBS)

# library LAYER,DIRECTORY OF THE ARCHIVE,DIRECTORY OF THE OBJECTS,MORE OBJECTS
define library
$(2)/lib$(1).a: $(call objects_of,$(3),$(1)) $(4) $(BUILD)/sources
	@echo "  AR   $$@"
	$(Q)rm -f $$@ && $(AR) crs $$@ $$(filter %.o,$$^)
endef
$(foreach l,$(LAYERS),$(eval $(call library,$l,$(BUILD),$(OBJ),$(CUDA_OF_$l))))
$(foreach l,$(LAYERS),$(eval $(call library,$l,$(BUILD)/fuzz,$(BUILD)/fuzz/obj,)))

# compile COMPILER,FLAGS
define compile
	@echo "  CC   $<"
	@mkdir -p $(@D)
	$(Q)$(1) $(2) -MMD -MP -c -o $@ $<
endef
$(OBJ)/%.f32.o: %.c $(BUILD)/flags
	$(call compile,$(CC),$(ALL_CFLAGS) $(WIDE) -DREAL_IS_FLOAT)
$(OBJ)/%.f64.o: %.c $(BUILD)/flags
	$(call compile,$(CC),$(ALL_CFLAGS) $(WIDE) -DREAL_IS_DOUBLE)
$(OBJ)/%.o: %.c $(BUILD)/flags
	$(call compile,$(CC),$(ALL_CFLAGS))
$(OBJ)/%.o: %.cc $(BUILD)/flags
	$(call compile,$(CXX),$(EMULATE_FLAGS))
# cell_rules DIRECTORY,CELL,COMPILER,FLAGS: each_cell* in C for one cell.
define cell_rules
$(1)/%.$(2).f32.o: %.c $(BUILD)/flags
	$$(call compile,$(3),$(4) $$(cell_flags_$(2)) -DREAL_IS_FLOAT)
$(1)/%.$(2).f64.o: %.c $(BUILD)/flags
	$$(call compile,$(3),$(4) $$(cell_flags_$(2)) -DREAL_IS_DOUBLE)
endef
$(foreach c,$(CELLS),$(eval cell_flags_$c := $(call cell_flags,$c)))
$(foreach c,$(CELLS),$(eval $(call cell_rules,$(OBJ),$c,$$(CC),$$(ALL_CFLAGS) $$(WIDE) $$(CELL_COMPLEX))))
$(foreach c,$(CELLS),$(eval $(call cell_rules,$(BUILD)/fuzz/obj,$c,$$(CLANG),$$(FUZZ_CFLAGS) \
  -fsanitize=fuzzer-no-link)))
$(OBJ)/%.cpp.o: %.cpp $(BUILD)/flags
	@echo "  CXX  $<"
	@mkdir -p $(@D)
	$(Q)$(CXX) $(CPP_FLAGS) -MMD -MP -c -o $@ $<
# compile_cuda FLAGS
ifneq ($(EMULATION),)
# The compiler forgets the section of shared variables (test/emulation/emulation.h) in templates: it is put back.
define compile_cuda
	@echo "  CXX  $<"
	@mkdir -p $(@D)
	$(Q)$(CXX) $(EMULATE_FLAGS) $(EMULATE_CUDA) $(1) -MMD -MP -MF $(@:.o=.d) -MT $@ -S -o $(@:.o=.s) $<
	$(Q)sed -i 's/^\t\.section\t\.bss\._ZZ.*/\t.section emulation_shared,"aw",%nobits/' $(@:.o=.s)
	$(Q)$(CXX) -c -o $@ $(@:.o=.s)
endef
else
define compile_cuda
	@echo "  NVCC $<"
	@mkdir -p $(@D)
	$(Q)$(NVCC) $(NVCCFLAGS_ALL) $(1) -MMD -MP -MF $(@:.o=.d) -c -o $@ $<
endef
endif
$(OBJ)/%.cu.o: %.cu $(BUILD)/flags
	$(call compile_cuda,)
# cell_rule_cuda CELL: each_cell* in CUDA for one cell.
define cell_rule_cuda
$(OBJ)/%.$(1).cu.o: %.cu $(BUILD)/flags
	$$(call compile_cuda,$$(cell_flags_$(1)))
endef
$(foreach c,$(CELLS),$(eval $(call cell_rule_cuda,$c)))
$(BUILD)/fuzz/obj/%.f32.o: %.c $(BUILD)/flags
	$(call compile,$(CLANG),$(FUZZ_CFLAGS) -fsanitize=fuzzer-no-link -DREAL_IS_FLOAT)
$(BUILD)/fuzz/obj/%.f64.o: %.c $(BUILD)/flags
	$(call compile,$(CLANG),$(FUZZ_CFLAGS) -fsanitize=fuzzer-no-link -DREAL_IS_DOUBLE)
$(BUILD)/fuzz/obj/%.o: %.c $(BUILD)/flags
	$(call compile,$(CLANG),$(FUZZ_CFLAGS) -fsanitize=fuzzer-no-link)

# The Python that goes into checkpoints, as C: every line a string.
HUB_TEXT := $(patsubst %,$(BUILD)/gen/%.inc,$(sort $(wildcard model/hub/*.py)))
$(BUILD)/gen/%.py.inc: %.py
	@mkdir -p $(@D)
	$(Q)sed -e 's/[\\"]/\\&/g' -e 's/.*/"&\\n"/' $< >$@
$(OBJ)/model/architecture_own.o $(BUILD)/fuzz/obj/model/architecture_own.o: $(HUB_TEXT)

# Test programs. The name says how much of the tree a program needs: test_common_* links common/, test_kernels_*
# kernels/ and common/, and so on; a name without a layer links everything. test/support*.c goes into each that uses it.
archives = $(1:%=$(BUILD)/lib%.a)
define link_test
	@echo "  LINK $@"
	$(if $(HAVE_CMOCKA),,$(error The unit tests need cmocka, Debian package libcmocka-dev: `make deps` installs it))
	@mkdir -p $(@D)
	$(Q)$(LINK) -o $@ $(filter-out %libsupport.a %/flags $(LIBRARIES),$^) $(filter %libsupport.a,$^) \
	  $(filter $(LIBRARIES),$^) -lcmocka $(LIBS)
endef
define link_table
	@echo "  LINK $@"
	@mkdir -p $(@D)
	$(Q)$(LINK) -o $@ $^ $(LIBS)
endef
SUPPORT_LIB := $(if $(SUPPORT),$(BUILD)/test/libsupport.a)
$(BUILD)/test/libsupport.a: $(SUPPORT)
	@mkdir -p $(@D)
	$(Q)rm -f $@ && $(AR) crs $@ $^

$(BUILD)/test/test_common_%: $(OBJ)/test/test_common_%.o $(SUPPORT_LIB) $(call archives,common)
	$(link_test)
$(BUILD)/test/test_kernels_%: $(OBJ)/test/test_kernels_%.o $(SUPPORT_LIB) $(call archives,kernels common)
	$(link_test)
$(BUILD)/test/test_data_%: $(OBJ)/test/test_data_%.o $(SUPPORT_LIB) $(call archives,data common)
	$(link_test)
$(BUILD)/test/test_model_%: $(OBJ)/test/test_model_%.o $(SUPPORT_LIB) $(call archives,model kernels common)
	$(link_test)
$(BUILD)/test/test_%: $(OBJ)/test/test_%.o $(SUPPORT_LIB) $(LIBRARIES)
	$(link_test)
# In front of every call of these stands the test's own function.
WRAPPED := malloc calloc realloc aligned_alloc posix_memalign strdup strndup asprintf realpath open_memstream fopen \
           opendir fdopendir getline mmap pthread_create
$(BUILD)/test/test_faults_memory: private LINK += $(WRAPPED:%=-Wl,--wrap=%)
$(BUILD)/test/ops: $(OPS_OBJECTS) $(SUPPORT_LIB) $(call archives,kernels common)
	$(link_table)
$(BUILD)/test/golden: $(GOLDEN_OBJECTS) $(SUPPORT_LIB) $(LIBRARIES)
	$(link_table)
$(TEST_CUDA): $(BUILD)/test/%: $(OBJ)/test/%.cu.o $(call archives,kernels common)
	$(link_table)
$(TEST_TOOLS): $(BUILD)/test/%: $(OBJ)/test/%.o $(SUPPORT_LIB) $(LIBRARIES)
	$(link_table)

# Fuzzers link everything, unless a line fuzz_NAME_LAYERS here says that less is enough.
fuzz_config_LAYERS      := common
fuzz_safetensors_LAYERS := common
fuzz_shard_LAYERS       := data common
fuzz_tokenizer_LAYERS   := data common
fuzz_encode_LAYERS      := data common
fuzz_dataset_LAYERS     := data common
fuzz_input_LAYERS       := data common
fuzz_json_scan_LAYERS   := data common
define fuzzer
$(BUILD)/fuzz/$(1): $(BUILD)/fuzz/obj/test/fuzz/$(1).o $(patsubst %,$(BUILD)/fuzz/lib%.a,$(or $($(1)_LAYERS),$(LAYERS)))
	@echo "  LINK $$@"
	$(Q)$(CLANG) -fsanitize=fuzzer $(FUZZ_SAN) -pthread $(LDFLAGS) -o $$@ $$^ $(REQUIRED_LIBS) -lm
endef
$(foreach t,$(FUZZ_TARGETS),$(eval $(call fuzzer,$(notdir $t))))

.SECONDARY:
-include $(shell test -d $(BUILD) && find $(BUILD) -name '*.d' 2>/dev/null)

# ---- the report ----------------------------------------------------------------------------------------------------

ifneq ($(REPORTING),)
# absent SWITCH gives why a part is not there; row NAME,TEXT,SWITCHES prints one line.
absent = $(if $(filter 1,$($(1))),not found,left out by $(1)=$($(1)))
row    = $(info $()  $(1) $(2)  [$(3)])
library_text = $(call part,$(1),3) $(call version_of,$(call part,$(1),3)) ($(call linkage,$(LIB_$(call part,$(1),2))))

ifneq ($(EMULATION),)
  CUDA_TEXT := an emulated GPU, for tests
else ifeq ($(NVCC),)
  CUDA_TEXT := $(call absent,CUDA): CPU only
else ifeq ($(HAVE_CUDA),)
  CUDA_TEXT := $(CUDA_VERSION) in $(CUDA_HOME): not used
else
  CUDA_TEXT := $(CUDA_VERSION) in $(CUDA_HOME), for $(ARCHS:%=sm_%)$(if $(PTX), and compute_80 PTX)
endif

$(info riverrun $(COMMIT), building in $(BUILD)/)
$(call row,compiler  ,$(CC_VERSION)$(comma) $(or $(MARCH),default)$(if $(SAN), -fsanitize=$(SAN)),CC= CPU_ARCH=)
$(call row,OpenBLAS  ,$(if $(HAVE_OPENBLAS),$(BLAS_TEXT),$(call absent,OPENBLAS): riverrun's own loops),OPENBLAS=0)
$(call row,OpenMP    ,$(if $(HAVE_OPENMP),found,$(call absent,OPENMP): one thread),OPENMP=0)
$(call row,MPI       ,$(if $(HAVE_MPI),$(MPI_TEXT),$(call absent,MPI): one process),MPI=0 MPICC=)
$(info $()  libraries  $(foreach r,$(REQUIRED),$(call library_text,$r)))
$(call row,CUDA      ,$(CUDA_TEXT),CUDA=0 CUDA_HOME= CUDA_ARCH=)
$(call row,cuDNN     ,$(if $(HAVE_CUDNN),found (loaded for attention in bf16),$(call absent,CUDNN): riverrun's own \
  attention),CUDNN=0 CUDNN_FRONTEND=)
$(call row,NCCL      ,$(if $(HAVE_NCCL),found (loaded when GPUs share a run),$(call absent,NCCL): one GPU),NCCL=0)
endif

endif # BUILDING

# ---- targets that run a script -------------------------------------------------------------------------------------

deps: ## Install the Debian packages that riverrun and its tests need (root or sudo)
	@sh scripts/deps.sh test

test: ## Build and run every test; the last line counts them
	@BUILD=$(BUILD) PYTHON=$(PYTHON) SAN=$(SAN) RIVERRUN_MAKE="$(MAKE_COMMAND)" sh scripts/run-tests.sh

quickstart: all ## Text to a trained byte-level model in a few minutes
	@BUILD=$(BUILD) sh scripts/quickstart-run.sh

clean: ## Remove what was built
	rm -rf $(BUILD) $(BUILD)-san $(BUILD)-emulate

help: ## Print this list
	@echo "make [target] [SWITCH=value ...]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' Makefile | \
	  while IFS='|' read -r target text; do printf '  %-11s %s\n' "$$target" "$$text"; done
	@echo "Switches: BUILD=$(BUILD) CC= CFLAGS= CPU_ARCH=native|x86-64-v3 OPENBLAS=0 OPENMP=0 MPI=0 CUDA=0 NCCL=0 CUDNN=0"
	@echo "          CUDA_HOME= CUDA_ARCH='80 90a' SAN=address,undefined DEBUG=1 WERROR=0 V=1 (commands shown) PREFIX="
	@echo "          EMULATE=1 (CUDA kernels on an emulated GPU, for tests; with a BUILD= of its own)"

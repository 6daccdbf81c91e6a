#!/bin/sh
# planted-mistakes.sh: shows that the tests can fail. In a copy of the tree it plants one mistake at a time, each where
# a person might make it, rebuilds what is needed and runs the test that must notice.
#
#   sh scripts/planted-mistakes.sh [PATTERN...]     only those whose name matches one of the shell patterns
#
# One line a mistake: caught, or MISSED with the exit code 1 at the end. Each test must pass without the mistake, or it
# has caught nothing. Nothing is compiled by nvcc: no test that runs here needs a GPU. CC and CPU_ARCH go to make.
set -uf
cd "$(dirname "$0")/.." || exit 1
only=${*:-*}
copy=$(mktemp -d "${TMPDIR:-/tmp}/riverrun-planted.XXXXXX") || exit 1
trap 'rm -rf "$copy"' EXIT
trap 'exit 1' HUP INT TERM
git archive HEAD | tar -x -C "$copy" || exit 1
# The virtual environments of the tests in Python are reused where they are there.
for venv in venv venv-data; do
    [ -d "${BUILD:-build}/$venv" ] && mkdir -p "$copy/build" && ln -s "$PWD/${BUILD:-build}/$venv" "$copy/build/$venv"
done
cd "$copy" || exit 1
export OMP_NUM_THREADS=2 BUILD=build RIVERRUN=build/riverrun
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
caught=0 missed=0
: >passing # the tests that were seen to pass without a mistake

# build_and_run TARGETS COMMAND: 0 if the command passes; 200 if the build fails, which no command's exit code is (that
# of a test program may be the number of its failed tests).
build_and_run() {
    # shellcheck disable=SC2086
    make -j2 WERROR=0 CUDA=0 $1 > build.log 2>&1 || return 200 # a mistake may leave something unused
    sh -c "$2" > log 2>&1
}

wanted() {
    # shellcheck disable=SC2254
    for pattern in $only; do case $1 in $pattern) return 0 ;; esac; done
    return 1
}

# plant NAME FILE SED-EXPRESSION TARGETS COMMAND
plant() {
    wanted "$1" || return 0
    if ! grep -qxF -- "$4: $5" passing; then
        build_and_run "$4" "$5"
        code=$?
        if [ "$code" != 0 ]; then
            echo "MISSED  $1: without the mistake '$5' gave $code: $(tail -n 1 log)"
            missed=$((missed + 1))
            return 0
        fi
        echo "$4: $5" >>passing
    fi
    cp -p "$2" saved
    sed -i "$3" "$2"
    if cmp -s "$2" saved; then
        echo "MISSED  $1: the mistake could not be planted, $2 has changed"
        missed=$((missed + 1))
        return 0
    fi
    build_and_run "$4" "$5"
    code=$?
    if [ "$code" = 200 ]; then
        echo "MISSED  $1: does not build with the mistake"; tail -n 5 build.log; missed=$((missed + 1))
    elif [ "$code" = 0 ] || [ "$code" = 77 ]; then
        echo "MISSED  $1: '$5' gave $code"; missed=$((missed + 1))
    else
        said=$(grep -iE 'fail|error|expected|differ|off by|!=' log | grep -vE '^\[ +(RUN|OK)' | head -n 1)
        echo "caught  $1: '$5' gave $code: $(echo "$said" | cut -c 1-150)"
        caught=$((caught + 1))
    fi
    cp -p saved "$2"
    touch "$2"
}

ops=build/test/ops
# Finite differences, of an operation and of the whole model.
plant gradient-of-a-decay kernels/cpu/ssd_backward.c 's/s->across\[i\] + before;/s->across[i];/' "$ops" "$ops grad ssd"
plant gradient-of-the-skip model/mamba2.c 's/tensor_none(), dw\[SKIP\], dy/tensor_none(), tensor_none(), dy/' \
    build/test/test_model_gradients build/test/test_model_gradients
plant gradient-with-a-state model/mamba.c \
    's/convolve(call, \&v, initial\[STATE_CONV\], tensor_none())/convolve(call, \&v, tensor_none(), tensor_none())/' \
    build/test/test_model_gradients build/test/test_model_gradients
# Identities of recurrent operations and of the model.
plant chunked-is-sequential kernels/cpu/ssd.c \
    's/leaving\[i\] += whole \* entering\[i\];/leaving[i] += 0 * whole * entering[i];/' \
    "$ops" "$ops test ssd"
plant packed-is-separate kernels/cpu/ssd.c 's/k.open = before == last;/k.open = true;/' "$ops" "$ops test ssd"
plant split-is-whole kernels/cpu/ssd.c \
    's/if (tensor_given(p->initial)) memcpy(first/if (tensor_given(p->initial) \&\& p->K > 1) memcpy(first/' \
    "$ops" "$ops test ssd"
plant step-is-forward kernels/cpu/conv.c \
    's/memmove(past, past + C, (size_t)((W - 2)/memmove(past, past, (size_t)((W - 2)/' \
    build/test/test_model_lm build/test/test_model_lm
plant ragged-length kernels/cpu/ssd.c 's/p.K = (p.T + p.Q - 1) \/ p.Q;/p.K = p.T \/ p.Q;/' "$ops" "$ops test ssd"
plant length-one kernels/cpu/conv.c \
    's/(tensor_given(final) \&\& t0 == 0) store_final/(tensor_given(final) \&\& !t0 \&\& y.dim[1] > 1) store_final/' \
    "$ops" "$ops test conv"
plant empty-document data/split.c 's/TRY(p->sink->end(p->sink->self, err));/if (p->start > 0) &/' \
    build/test/test_data_tokenize build/test/test_data_tokenize
# Float against double: a mistake in only one of the two types.
plant float-is-double kernels/cpu/real.h 's/return v > 20 ? v/return v > 2 ? v/' "$ops" "$ops test ssd_dt"
# The selective scan: the gradient of a decay, a document's start on the way back, the state from chunk to chunk.
plant scan-gradient-of-a-decay kernels/cpu/scan_backward.c \
    's/r = dh\[v\] \* \*scan_at(before, v);/r = dh[v] * *scan_at(h + at, v);/' \
    "$ops" "$ops grad 'scan T=7 D=2 N=2'"
plant scan-packed-is-separate kernels/cpu/scan_backward.c \
    's/memset(decay, 0, sizeof(scan_lanes));/for (int64_t l = 0; l < SCAN_LANES; l++) decay[l] = 1;/' \
    "$ops" "$ops test 'scan T=33 doc=2,4'"
plant scan-split-is-whole kernels/cpu/scan.c \
    's/OP(scan_state_read)(s->state, block, p->initial);/OP(scan_state_read)(s->state, block, tensor_none());/' \
    "$ops" "$ops test 'scan T=7'"
# The mLSTM's gates and normaliser, and the cap of logits.
plant mlstm-gradient-of-a-gate kernels/cpu/mlstm.c 's/l->da\[at\] \* sigmoid(-/l->da[at] * sigmoid(/' \
    "$ops" "$ops grad 'mlstm T=7 star=1'"
plant head-loss-gradient-of-the-cap kernels/cpu/head_loss.c \
    's/z_term \* p) \* (1 - part \* part)/z_term * p) * (1 - 0 * part)/' \
    "$ops" "$ops grad 'head_loss R=5 D=7 V=13 cap=4'"
# Golden vectors.
plant golden-mlstm kernels/cpu/mlstm.c 's/if (above) \*slope = den > 0/if (above) *slope = den > 1e9/' \
    build/test/golden "build/test/golden test/golden/op-mlstm.safetensors"
plant golden-scan kernels/cpu/scan_backward.c 's/SCAN_LN_2 \* ddelta\[l\]/ddelta[l]/' \
    build/test/golden "build/test/golden test/golden/op-selective-scan.safetensors"
plant golden-ssd kernels/cpu/ssd.c \
    's/decay->whole = k->open ? ssd_exp((real)before)/decay->whole = k->open ? ssd_exp((real)(before - decay->a[0]))/' \
    build/test/golden "build/test/golden test/golden/op-ssd.safetensors"
plant golden-model model/mixer_parts.c 's/call->layer->context.norm_eps);/1e-3);/' \
    build/test/golden "build/test/golden test/golden/hf-mamba2.safetensors"
plant golden-mamba model/mamba.c 's/v.dx, true, dw\[X_PROJ\]/v.dx, false, dw[X_PROJ]/' \
    build/test/golden "build/test/golden test/golden/hf-mamba.safetensors"
plant golden-xlstm model/mlstm.c 's/v->o, ACTIVATION_SIGMOID, call/v->o, ACTIVATION_SILU, call/' \
    build/test/golden "build/test/golden test/golden/hf-xlstm.safetensors"
plant preup-skip model/mlstm_preup.c 's/d.dxc, true, dw\[Q_PROJ\]/d.dxc, false, dw[Q_PROJ]/' \
    build/test/test_model_gradients build/test/test_model_gradients
plant slstm-swap model/slstm.c 's/return g <= F_WEIGHT \&\& convolves/return g >= Z_WEIGHT \&\& convolves/' \
    build/test/test_model_equations build/test/test_model_equations
plant slstm-clip model/slstm.c 's/call->doc, o->clip,$/call->doc, 0.01,/' build/test/test_model_gradients \
    build/test/test_model_gradients
plant parity kernels/cpu/slstm.c 's/sum += r\[k\] \* y\[k\]/sum += 0 * r[k] * y[k]/' build/riverrun \
    'RIVERRUN=build/riverrun sh test/test_parity.sh'
plant separate-projections model/mixer_parts.c 's/add_dx || i > 0/add_dx/' \
    build/test/test_model_gradients build/test/test_model_gradients
# Nonlinear cells: a document's start, the token whose Jacobian it is, Newton's iterates, a sum that is left out.
cell=build/test/test_kernels_cell
plant cell-document kernels/cpu/each_cell_backward.c \
    's/if (token.begins) memset(lambda/if (false) memset(lambda/' "$ops" "$ops grad cell"
plant cell-jacobian kernels/cpu/each_cell_backward.c \
    's/state_before(block, t, token.begins, before);/stored_state(block, t, before);/' \
    "$cell" "$cell"
plant cell-iterate kernels/cells/lstm.h '/step_jacobian/,/^}/{s/now\[0\]/fresh/g;s/REAL fresh/(void)now; REAL fresh/}' \
    build/test/golden "build/test/golden --precision fp64 test/golden/op-paralstm.safetensors"
plant cell-peephole kernels/cells/lstm.h 's/dw\[3\] = du\[0\] \* c;/dw[3] = 0 * c;/' "$cell" "$cell"
plant cell-dual kernels/cpu/each_cell.h 's/dual_slope(x) \* (1 - y \* y)/dual_slope(x) * (1 - y)/' "$cell" "$cell"
plant cell-shooting kernels/cpu/each_cell_forward.c \
    's/memcpy(state, old, sizeof state);/memcpy(state, start, sizeof state);/' \
    "$cell" "$cell"
# Several ranks, exact resume, kills.
plant two-ranks-are-one train/optimizer.c 's/comm_sum_device(o->comm, \&totals->loss.nll, 6);//' \
    "build/riverrun build/test/test_train_comm build/test/test_train_trainer" "sh test/test_mpi.sh"
plant resume-is-exact train/trainer.c \
    's/state->samples += (uint64_t)batch;/state->samples += t->state.step % 7 != 3 ? (uint64_t)batch : 0;/' \
    build/riverrun "sh test/test_resume.sh"
# Solvers that fail: a step that is not skipped, a rank that is not heard, a level that is judged by an earlier one.
plant solver-not-skipped kernels/step_decide.h 's/ || !(totals->residual <= rule->residual_max)//' \
    build/test/test_train_ladder build/test/test_train_ladder
plant solver-of-one-rank train/optimizer.c 's/comm_all_gather(o->comm, o->load_count, \&all, 1);//' \
    build/test/test_train_ladder build/test/test_train_ladder
plant solver-judged-late train/ladder.c 's/judged \&\& step >= r->since/judged/' \
    build/test/test_train_ladder build/test/test_train_ladder
plant solver-level-lost train/manifest.c 's/        s->rungs\[solver\] = r;//' build/riverrun 'sh test/test_ladder.sh'
plant kill-during-save train/checkpoint_save.c '/TRY(model_directory_publish/{h;d};/TRY(point_latest(s, err));/{G}' \
    build/test/test_train_checkpoint_faults build/test/test_train_checkpoint_faults
plant kill-during-training train/checkpoint_load.c 's/optimizer_scatter(o, b, which/if (which == 0) &/' \
    build/riverrun "sh test/test_kill.sh"
# Data and interchange.
plant shard-checksum data/shard_reader.c \
    's/uint64_t hash = XXH64(h, offsetof(struct shard_header, header_hash), 0);/uint64_t hash = h->header_hash;/' \
    build/test/test_data_shard_damage build/test/test_data_shard_damage
plant json-escape data/json_scan.c 's/if (low < 0xDC00 || low > 0xDFFF)/if (low < 0xDC00)/' \
    build/test/test_data_jsonl build/test/test_data_jsonl
plant places-to-cut data/pretokenize.c 's/if (is_blank(text\[at\]) \&\& !/if (is_blank(text[at]) || !/' \
    build/test/test_data_bpe build/test/test_data_bpe
plant order-of-merges data/bpe.c 's/if (merge.rank != key >> 32) continue;/if (merge.rank == NO_RANK) continue;/' \
    build/test/test_data_bpe build/test/test_data_bpe
plant download-checksum scripts/prepare_hub.py 's/if sums\[kind\] == about\[kind\]:/if True:/' \
    build/riverrun "sh test/test_prepare.sh"
plant transformers-opens model/architecture_ssm.c \
    's/"tie_word_embeddings", mc->options.tie_embeddings)/"tie_word_embeddings", !mc->options.tie_embeddings)/' \
    "build/riverrun build/test/logits" "sh test/test_transformers.sh"
# The same where the Python comes with the weights: a window that is one off, a state that is not read, another gate.
plant hub-window model/hub/mixers_riverrun.py \
    's/there > at\[:, None\] - self.window/there >= at[:, None] - self.window/' \
    "build/riverrun build/test/logits" "sh test/test_hub.sh"
plant hub-state model/hub/mixers_riverrun.py 's/past_k, past_v, running = state or/past_k, past_v, running = None or/' \
    "build/riverrun build/test/logits" "sh test/test_hub.sh"
plant hub-cell model/hub/mixers_riverrun.py 's/peep_o \* c)/peep_o * states[0])/' \
    "build/riverrun build/test/logits" "sh test/test_hub.sh"
# Sanitizers: a mistake that changes no result.
plant sanitizers kernels/cpu/conv.c \
    's/memcpy(past + (W - 2) \* C, now, .*;/&{ volatile real beyond = past[(W - 1) * C * B]; (void)beyond; }/' \
    "BUILD=build-san SAN=address,undefined build-san/test/ops" "build-san/test/ops test conv_step"
# CUDA kernels on the emulated GPU: a barrier, and the wait for a copy.
emulated="BUILD=build-emulate EMULATE=1 build-emulate/test/ops"
plant cuda-barrier kernels/cuda/scan.cu '0,/__syncthreads();/s//;/' \
    "$emulated" "build-emulate/test/ops test --device cuda 'scan T=97 D=33'"
plant cuda-copy-awaited kernels/cuda/ssd_chunk.cu 's/cp_async_wait<1>();/cp_async_wait<2>();/' \
    "$emulated" "build-emulate/test/ops test --device cuda --precision bf16 'ssd B=1 T=130 H=2 P=64 G=1 N=33 Q=64'"
# A product beside other work: its operands have to last until the join.
plant products-beside model/model.c \
    's/m->at.norm_work);/(char *)m->areas[AREA_SCRATCH].base + arena_mark(\&m->areas[AREA_SCRATCH]));/' \
    "BUILD=build-emulate EMULATE=1 build-emulate/test/test_model_gradients" \
    "env RIVERRUN_TEST_DEVICE=cuda build-emulate/test/test_model_gradients"

echo "$caught caught, $missed missed"
[ "$missed" = 0 ]

/* attention_cudnn.cpp: attention by cuDNN's fused kernels, through the frontend's graphs. See attention_cudnn.h; owns
 * the library's handle, one plan for each shape, and the memory that plans work in.
 *
 * A graph is one node: scores, the causal mask (with a left bound for a window), softmax, values; and its backward by
 * the deterministic algorithm. Operands are addressed by strides, so columns of one projection serve as they are.
 * cuDNN's first proposal for a shape is taken, which depends on nothing measured. A plan works in the caller's memory
 * if it is enough. The library is loaded when it is asked for, and the frontend finds its functions in it: the program
 * starts, and runs, without cuDNN. Exceptions of the frontend end here. */
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB

#include "kernels/cuda/attention_cudnn.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>

namespace fe = cudnn_frontend;

namespace cudnn_frontend {
void *cudnn_dlhandle = nullptr; /* the frontend declares it, and looks its functions up there */
}

/* Numbers by which a graph knows its operands. */
enum { Q = 1, K, V, O, STATS, DO, DQ, DK, DV };

enum { UNSPOKEN = 1 << 20 }; /* bytes that a plan may take of its own without a word */

struct plan {
    attention_cudnn_shape shape;
    std::shared_ptr<fe::graph::Graph> graph;
    int64_t bytes = 0;         /* that it works in */
    void *workspace = nullptr; /* its own, kept as long as the plan: a recorded step goes on using it */
    bool failed = false;
};

struct attention_cudnn {
    cudnnHandle_t handle = nullptr;
    cudaStream_t stream = nullptr;
    std::list<plan> plans;
    /* What is forked, with a stream that is its own; it is asked for once. */
    attention_cudnn *second = nullptr;
    cudaEvent_t forked = nullptr, joined = nullptr;
    bool alone = false; /* there is no second */
};

static std::shared_ptr<fe::graph::Tensor_attributes> operand(fe::graph::Graph &graph, const char *name, int64_t uid,
                                                             const attention_cudnn_shape &s, int64_t heads,
                                                             const attention_cudnn_strides &by) {
    return graph.tensor(fe::graph::Tensor_attributes()
                            .set_name(name)
                            .set_uid(uid)
                            .set_dim({s.B, heads, s.T, s.P})
                            .set_stride({by.row, by.head, by.token, 1}));
}

static void result(const std::shared_ptr<fe::graph::Tensor_attributes> &tensor, int64_t uid,
                   const attention_cudnn_shape &s, int64_t heads, const attention_cudnn_strides &by) {
    tensor->set_output(true)
        .set_uid(uid)
        .set_dim({s.B, heads, s.T, s.P})
        .set_stride({by.row, by.head, by.token, 1})
        .set_data_type(fe::DataType_t::BFLOAT16);
}

/* Logarithms of sums, (B,H,T) in memory. */
static fe::graph::Tensor_attributes &statistics(fe::graph::Tensor_attributes &tensor, const attention_cudnn_shape &s) {
    return tensor.set_uid(STATS)
        .set_dim({s.B, s.H, s.T, 1})
        .set_stride({s.H * s.T, s.T, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
}

template <class A> static A mask(A attributes, const attention_cudnn_shape &s) {
    attributes.set_name("attention")
        .set_attn_scale((float)s.scale)
        .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
    if (s.window > 0) attributes.set_diagonal_band_left_bound((int)s.window);
    return attributes;
}

static void describe_forward(fe::graph::Graph &graph, const attention_cudnn_shape &s) {
    auto attributes = mask(fe::graph::SDPA_attributes(), s);
    attributes.set_generate_stats(s.logarithms != 0);
    auto results = graph.sdpa(operand(graph, "q", Q, s, s.H, s.q), operand(graph, "k", K, s, s.G, s.k),
                              operand(graph, "v", V, s, s.G, s.v), attributes);
    result(results[0], O, s, s.H, s.o);
    if (s.logarithms) statistics(results[1]->set_output(true), s);
}

static void describe_backward(fe::graph::Graph &graph, const attention_cudnn_shape &s) {
    auto attributes = mask(fe::graph::SDPA_backward_attributes(), s);
    attributes.set_deterministic_algorithm(s.unordered == 0);
    fe::graph::Tensor_attributes stats;
    auto logarithms = graph.tensor(statistics(stats.set_name("stats"), s));
    auto results = graph.sdpa_backward(operand(graph, "q", Q, s, s.H, s.q), operand(graph, "k", K, s, s.G, s.k),
                                       operand(graph, "v", V, s, s.G, s.v), operand(graph, "o", O, s, s.H, s.o),
                                       operand(graph, "do", DO, s, s.H, s.dout), logarithms, attributes);
    result(results[0], DQ, s, s.H, s.dq);
    result(results[1], DK, s, s.G, s.dk);
    result(results[2], DV, s, s.G, s.dv);
}

/* Memory of the plan's own. Empty, or why there is none. */
static std::string allocate(plan &p) {
    if (cudaMalloc(&p.workspace, (size_t)p.bytes) == cudaSuccess) return "";
    cudaGetLastError();
    p.workspace = nullptr;
    return "no memory for its workspace of " + std::to_string(p.bytes) + " bytes";
}

/* Empty, or why cuDNN does not serve the shape. */
static std::string make(plan &p, cudnnHandle_t handle) {
    auto graph = std::make_shared<fe::graph::Graph>();
    graph->set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    if (p.shape.backward) describe_backward(*graph, p.shape);
    else describe_forward(*graph, p.shape);
    auto status = graph->validate();
    if (status.is_good()) status = graph->build_operation_graph(handle);
    if (status.is_good()) status = graph->create_execution_plans({fe::HeurMode_t::A});
    if (status.is_good()) status = graph->check_support(handle);
    if (status.is_good()) status = graph->build_plans(handle, fe::BuildPlanPolicy_t::HEURISTICS_CHOICE);
    if (status.is_good()) status = graph->get_workspace_size(p.bytes);
    if (status.is_bad()) return status.get_message();
    p.graph = graph;
    return "";
}

static std::string run(plan &p, cudnnHandle_t handle, const attention_cudnn_operands &x) {
    std::unordered_map<int64_t, void *> places = {
        {Q, (void *)x.q}, {K, (void *)x.k}, {V, (void *)x.v}, {O, x.o}};
    if (p.shape.backward || p.shape.logarithms) places[STATS] = x.lse;
    if (p.shape.backward) places.insert({{DO, (void *)x.dout}, {DQ, x.dq}, {DK, x.dk}, {DV, x.dv}});
    auto status = p.graph->execute(handle, places, p.workspace ? p.workspace : x.workspace);
    return status.is_bad() ? status.get_message() : "";
}

static plan &plan_of(attention_cudnn *c, const attention_cudnn_shape &shape, std::string &reason) {
    for (plan &p : c->plans)
        if (memcmp(&p.shape, &shape, sizeof shape) == 0) return p;
    plan &p = c->plans.emplace_back();
    memcpy(&p.shape, &shape, sizeof shape);
    reason = make(p, c->handle);
    p.failed = !reason.empty();
    return p;
}

bool attention_cudnn_run(struct attention_cudnn *c, const struct attention_cudnn_shape *shape,
                         const struct attention_cudnn_operands *x, char *why, size_t size) {
    std::string reason;
    bool done = false;
    plan *p = nullptr;
    try {
        p = &plan_of(c, *shape, reason);
        bool own = !p->failed && !p->workspace && p->bytes > (int64_t)x->workspace_bytes;
        if (own) reason = allocate(*p);
        if (!p->failed && reason.empty()) reason = run(*p, c->handle, *x);
        done = !p->failed && reason.empty();
        if (done && own && p->bytes > UNSPOKEN)
            reason = "takes " + std::to_string(p->bytes >> 20) + " MiB beside what was planned";
    } catch (const std::exception &e) {
        reason = e.what();
    }
    if (p && !done) p->failed = true;
    snprintf(why, size, "%s", reason.c_str());
    return done;
}

static attention_cudnn *open_for(cudaStream_t stream) {
    auto c = std::make_unique<attention_cudnn>();
    c->stream = stream;
    if (fe::detail::create_handle(&c->handle) != CUDNN_STATUS_SUCCESS) return nullptr;
    if (fe::detail::set_stream(c->handle, stream) == CUDNN_STATUS_SUCCESS) return c.release();
    fe::detail::destroy_handle(c->handle);
    return nullptr;
}

int64_t attention_cudnn_open(struct attention_cudnn **out, void *stream) {
    *out = nullptr;
    if (!fe::cudnn_dlhandle) fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    if (!fe::cudnn_dlhandle) return 0;
    try {
        *out = open_for((cudaStream_t)stream);
        return *out ? (int64_t)fe::detail::get_backend_version() : 0;
    } catch (const std::exception &) {
        return 0;
    }
}

static void close_second(attention_cudnn *c) {
    cudaStream_t stream = c->second ? c->second->stream : nullptr;
    if (stream) cudaStreamSynchronize(stream);
    attention_cudnn_close(c->second);
    if (stream) cudaStreamDestroy(stream);
    if (c->forked) cudaEventDestroy(c->forked);
    if (c->joined) cudaEventDestroy(c->joined);
    c->second = nullptr;
    c->forked = c->joined = nullptr;
}

static attention_cudnn *open_second(attention_cudnn *c) {
    cudaStream_t stream = nullptr;
    bool made = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess &&
                cudaEventCreateWithFlags(&c->forked, cudaEventDisableTiming) == cudaSuccess &&
                cudaEventCreateWithFlags(&c->joined, cudaEventDisableTiming) == cudaSuccess;
    try {
        if (made) c->second = open_for(stream);
    } catch (const std::exception &) {
    }
    if (c->second) return c->second;
    cudaGetLastError();
    close_second(c);
    if (stream) cudaStreamDestroy(stream);
    c->alone = true;
    return nullptr;
}

struct attention_cudnn *attention_cudnn_fork(struct attention_cudnn *c) {
    if (c->alone || (!c->second && !open_second(c))) return nullptr;
    bool waits = cudaEventRecord(c->forked, c->stream) == cudaSuccess &&
                 cudaStreamWaitEvent(c->second->stream, c->forked, 0) == cudaSuccess;
    return waits ? c->second : nullptr;
}

bool attention_cudnn_join(struct attention_cudnn *c) {
    return cudaEventRecord(c->joined, c->second->stream) == cudaSuccess &&
           cudaStreamWaitEvent(c->stream, c->joined, 0) == cudaSuccess;
}

void attention_cudnn_close(struct attention_cudnn *c) {
    if (!c) return;
    close_second(c);
    for (plan &p : c->plans)
        if (p.workspace) cudaFree(p.workspace);
    c->plans.clear();
    try {
        fe::detail::destroy_handle(c->handle);
    } catch (const std::exception &) {
    }
    delete c;
}

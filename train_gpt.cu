// train_gpt.cu: train_gpt.c on an NVIDIA GPU. Needs the CUDA Toolkit (12 or 13) and a GPU of compute capability 8.0 or
// higher (Ampere, Ada, Hopper, ...), nothing else.
//
//     make train_gpt_cu && ./train_gpt_cu       the same options, files and output as ./train_gpt
//     ./train_gpt_cu --compare                  the CPU and the GPU side by side, layer by layer
//     make train_gpt_cu PRECISION=fp32          all in float32, to compare numbers with the CPU's
//
// Read train_gpt.c first. Everything that is not arithmetic on tensors is taken from there. What follows are its layers
// again, in the same order under the same names; the mathematics is explained there, and here only what is special to a
// GPU. Its rooms:
//
//     errors and launches      every call is checked; the one place where kernels are started
//     memory                   16 bytes at a time; sums over the threads of a warp; copies to and from the host
//     matrix multiply          cuBLASLt's
//     layers                   embedding, layernorm, linear, attention, gelu, cross-entropy
//     model                    forward, backward and AdamW, recorded once and replayed
//     comparison               --compare
//
// A GPU runs a function, a "kernel", in very many threads at once. Threads come in blocks, which share some fast memory
// and can wait for one another; the 32 threads of a warp go through the program in step and can exchange registers.
// Hundreds of blocks run side by side in no particular order, so no sum may depend on who comes first: there are no
// atomic additions of floating-point numbers here, every sum is taken in a fixed order, and the same run gives the same
// bits every time.
//
// Precision: a `real` is a bfloat16, a float32 without its lower 16 bits, which the GPU's matrix units multiply many
// times faster. Activations and their gradients are kept in it. What is summed up is summed in float32, and weights,
// their gradients and AdamW's moments stay in float32; the multiplies read copies of the weights, rounded to bfloat16.

#include "train_gpt.c"

#include <type_traits>
#include <vector>

#ifdef CUDA_ON_CPU // the kernels run on the CPU, for tests on machines without a GPU
#include "dev/check/cuda_on_cpu.h"
#else
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

namespace gpu {

// `pair`: two neighbouring reals in registers.
#ifdef PRECISION_FP32
typedef float real;
typedef float2 pair;
#else
typedef __nv_bfloat16 real;
typedef uint32_t pair;
#endif

// ====================================================================================================================
// Errors and launches

static void check_status(cudaError_t status, const char* call, int line) {
    if (status) die("%s failed: %s (train_gpt.cu, line %d)", call, cudaGetErrorString(status), line);
}
static void check_status(cublasStatus_t status, const char* call, int line) {
    if (status) die("%s failed: cuBLAS status %d (train_gpt.cu, line %d)", call, (int)status, line);
}
#define check(call) check_status(call, #call, __LINE__)

static cudaStream_t stream; // all work is done in the order in which it is asked for

#ifndef CUDA_ON_CPU
// Starts a kernel. Shared memory beyond 48 KB has to be asked for.
template <typename... Parameters, typename... Arguments>
static void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t on,
                   Arguments... arguments) {
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
    kernel<<<grid, block, shared_bytes, on>>>(static_cast<Parameters>(arguments)...);
    cudaError_t status = cudaGetLastError();
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion)
        die("this program was compiled for other GPUs or drivers (%s): build it anew, here",
            cudaGetErrorString(status));
    check(status);
}

// The block's shared memory, of the size given at the launch.
template <typename T> __device__ inline T* shared_memory() {
    extern __shared__ uint4 block_memory[];
    return reinterpret_cast<T*>(block_memory);
}
#endif

enum { WARP = 32, THREADS = 256, GROUPS = THREADS / WARP }; // threads of a warp, of a block; warps of a block

// Blocks needed for n of something, `each` in a block.
static unsigned blocks(size_t n, size_t each) { return (unsigned)((n + each - 1) / each); }

// ====================================================================================================================
// Memory
//
// A GPU's memory is fast if the threads of a warp read neighbouring addresses, 16 bytes each. Rows begin at multiples
// of 16 bytes if their length is a multiple of WIDTH reals. Kernels are templates in W, the reals that a thread takes
// at a time: WIDTH if that is so, else 1.

enum { WIDTH = 16 / sizeof(real) };

__device__ inline float number(float x) { return x; }
__device__ inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

template <typename S, int W> struct alignas(sizeof(S) * W < 16 ? sizeof(S) * W : 16) Pack { S x[W]; };

template <int W, typename S> __device__ inline void load(float (&x)[W], const S* from) {
    Pack<S, W> pack = *reinterpret_cast<const Pack<S, W>*>(from);
    for (int i = 0; i < W; i++) x[i] = number(pack.x[i]);
}

template <int W, typename S> __device__ inline void store(S* to, const float (&x)[W]) {
    Pack<S, W> pack;
    for (int i = 0; i < W; i++) put(&pack.x[i], x[i]);
    *reinterpret_cast<Pack<S, W>*>(to) = pack;
}

// Calls work(W) with W as a constant. n: the length of rows.
template <typename Work> static void with_width(size_t n, Work work) {
    if (n % WIDTH == 0)
        work(std::integral_constant<int, WIDTH>());
    else
        work(std::integral_constant<int, 1>());
}

// The sum, or the maximum, over a warp, in every thread of it: in each of five rounds a thread and its partner, whose
// number differs in one bit, add what they have.
template <typename F> __device__ inline F warp_sum(F x) {
    for (int bit = WARP / 2; bit; bit /= 2) x += __shfl_xor_sync(0xffffffff, x, bit);
    return x;
}

// The sum of `sums` over a block's GROUPS warps, thread by thread and in the warps' order. It is returned in the first
// warp's. shared: room for THREADS * N floats.
template <int N> __device__ inline void add_warps(float (&sums)[N], float* shared) {
    int lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
    for (int i = 0; i < N; i++) shared[(group * N + i) * WARP + lane] = sums[i];
    __syncthreads();
    for (int k = 1; group == 0 && k < GROUPS; k++)
        for (int i = 0; i < N; i++) sums[i] += shared[(k * N + i) * WARP + lane];
    __syncthreads();
}

// Counts the blocks that come here. True in the last of `count`, which then finds what all others have written.
__device__ inline bool is_last_block(unsigned* counter, unsigned count) {
    unsigned* arrived = shared_memory<unsigned>();
    __syncthreads();
    if (threadIdx.x == 0) { // for all: what they wrote is seen before the counter, and read after it
        __threadfence();
        *arrived = atomicAdd(counter, 1u) + 1;
        if (*arrived == count) *counter = 0; // for the next kernel
        __threadfence();
    }
    __syncthreads();
    bool last = *arrived == count;
    __syncthreads();
    return last;
}

// What all models share. The workspace belongs to whichever kernel runs.
enum { WORKSPACE = 32 << 20, COUNTERS = 1 << 14, STAGING = 1 << 18, STAGES = 16 };
static char* workspace;
static unsigned* counters; // zero between kernels
static cublasLtHandle_t multiplier;
static struct {
    char* memory; // page-locked, so that a copy from it needs no waiting
    cudaEvent_t copied;
} staging[STAGES];
static size_t uploads, stages_used;

template <typename S> static S* device_memory(size_t count, const char* what) {
    void* p;
    size_t bytes = (count ? count : 1) * sizeof(S);
    cudaError_t status = cudaMalloc(&p, bytes);
    if (status) die("no GPU memory for %s (%.1f MB): %s", what, (double)bytes / 1e6, cudaGetErrorString(status));
    return (S*)p;
}

// Copies to the device without waiting for what it is doing: first to page-locked memory, and from there when the
// stream gets to it. There are STAGES pieces of that, used in turn; only a host so many copies ahead has to wait.
static void upload(void* to, const void* from, size_t bytes) {
    for (size_t at = 0, n; at < bytes; at += n) {
        auto& stage = staging[stages_used++ % STAGES];
        n = min_size(STAGING, bytes - at);
        check(cudaEventSynchronize(stage.copied));
        memcpy(stage.memory, (const char*)from + at, n);
        check(cudaMemcpyAsync((char*)to + at, stage.memory, n, cudaMemcpyHostToDevice, stream));
        check(cudaEventRecord(stage.copied, stream));
    }
}

static void download(void* to, const void* from, size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
}

static void to_device(float* to, const float* from, size_t n) {
    uploads++;
    upload(to, from, n * sizeof(float));
}

static void to_host(float* to, const float* from, size_t n) { download(to, from, n * sizeof(float)); }

// Finds the GPU and takes what all models share. Returns its description.
static const char* start(void) {
    static char description[320];
    if (stream) return description;
    cudaDeviceProp gpu;
    int count = 0, driver = 0, runtime = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    check(cudaDriverGetVersion(&driver));
    check(cudaRuntimeGetVersion(&runtime));
    if (status == cudaErrorInsufficientDriver && driver)
        die("the NVIDIA driver is for CUDA %d.%d and this program for %d.%d: install a newer driver, or --device cpu",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    if (status || !count)
        die("no NVIDIA GPU to use (%s); --device cpu does without",
            driver ? cudaGetErrorString(status ? status : cudaErrorNoDevice) : "there is no driver");
    check(cudaGetDeviceProperties(&gpu, 0));
    if (gpu.major < 8)
        die("%s has compute capability %d.%d, and 8.0 is needed; --device cpu does without", gpu.name, gpu.major,
            gpu.minor);
    snprintf(description, sizeof description, "%s, %d multiprocessors, %s", gpu.name, gpu.multiProcessorCount,
             sizeof(real) == 2 ? "bfloat16" : "float32");
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cublasLtCreate(&multiplier));
    workspace = device_memory<char>(WORKSPACE, "working space");
    counters = device_memory<unsigned>(COUNTERS, "counters");
    check(cudaMemsetAsync(counters, 0, COUNTERS * sizeof(unsigned), stream));
    for (auto& stage : staging) {
        check(cudaMallocHost((void**)&stage.memory, STAGING));
        check(cudaEventCreateWithFlags(&stage.copied, cudaEventDisableTiming));
    }
    return description;
}

// What is free, but for what the driver will want for kernels and cuBLASLt.
static size_t available(void) {
    const size_t reserve = 256 << 20;
    size_t unused, total;
    check(cudaMemGetInfo(&unused, &total));
    return unused > reserve ? unused - reserve : 0;
}

// ====================================================================================================================
// Matrix multiply
//
// cuBLASLt's. It takes matrices as Fortran does, columns dense; a matrix with dense rows is to it the transpose. So
// C = A B is asked for as C' = B' A': the operands change places, and nothing is moved. Which of its many algorithms
// suits a shape it says itself; it is asked once for each shape. Those that add up parts of a product in whatever order
// they come are ruled out.

// A matrix in memory: (rows,width) dense, or the transpose of that.
struct Matrix {
    const real* p;
    size_t width;
    bool is_transposed;
};
static Matrix matrix(const real* p, size_t width) { return {p, width, false}; }
static Matrix transposed(const real* p, size_t width) { return {p, width, true}; }

inline cudaDataType_t type_of(const float*) { return CUDA_R_32F; }
inline cudaDataType_t type_of(const __nv_bfloat16*) { return CUDA_R_16BF; }

struct Plan {
    size_t key[11]; // all that the choice depends on
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};
static Plan* plans;
static size_t plan_count;

template <typename S> static void set(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t what, S value) {
    check(cublasLtMatmulDescSetAttribute(operation, what, &value, sizeof value));
}
template <typename S>
static void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t what, S value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof value));
}

// A stored matrix as cuBLASLt sees it: `width` rows, one column for each of ours.
static cublasLtMatrixLayout_t layout(cudaDataType_t type, size_t width, size_t rows) {
    cublasLtMatrixLayout_t l;
    check(cublasLtMatrixLayoutCreate(&l, type, width, rows, (int64_t)width));
    return l;
}

static void choose_algorithm(Plan* plan, size_t M, size_t N, size_t K, uint32_t alignment) {
    cublasLtMatmulPreference_t preference;
    check(cublasLtMatmulPreferenceCreate(&preference));
    set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (size_t)WORKSPACE);
    set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment);
    set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment);
    cublasLtMatmulHeuristicResult_t choice;
    int found = 0;
    cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(multiplier, plan->operation, plan->a, plan->b, plan->c,
                                                           plan->c, preference, 1, &choice, &found);
    if (status || !found)
        die("cuBLASLt knows no way to multiply (%zu,%zu) by (%zu,%zu): status %d", M, K, K, N, (int)status);
    plan->algorithm = choice.algo;
    check(cublasLtMatmulPreferenceDestroy(preference));
}

// c (M,N) = a (M,K) times b (K,N), plus bias (N), plus add (M,N), each of which may be NULL; with add == c the product
// is accumulated. c is of reals or of floats. The epilogue is what is done to a sum before it is stored; `input`
// belongs to GELU's, (M,N).
template <typename S>
static void matmul(S* c, Matrix a, Matrix b, const real* bias, const S* add, size_t M, size_t N, size_t K,
                   cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT, real* input = NULL) {
    if (bias && epilogue == CUBLASLT_EPILOGUE_DEFAULT) epilogue = CUBLASLT_EPILOGUE_BIAS;
    uint32_t alignment = ((size_t)a.p | (size_t)b.p | (size_t)c | (size_t)add) % 16 ? sizeof(real) : 16;
    const size_t key[] = {
        M,         N,           K,        a.width, b.width, a.is_transposed, b.is_transposed, (size_t)epilogue,
        sizeof(S), add != NULL, alignment};
    size_t i = 0;
    while (i < plan_count && memcmp(plans[i].key, key, sizeof key)) i++;
    bool known = i < plan_count;
    if (!known) plans = (Plan*)realloc(plans, ++plan_count * sizeof(Plan));
    if (!plans) die("no memory for the multiply's plans");
    Plan* plan = &plans[i];
    if (!known) {
        memcpy(plan->key, key, sizeof key);
        check(cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, b.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan->operation, CUBLASLT_MATMUL_DESC_TRANSB, a.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        plan->a = layout(type_of(b.p), b.width, b.is_transposed ? N : K);
        plan->b = layout(type_of(a.p), a.width, a.is_transposed ? K : M);
        plan->c = layout(type_of(c), N, M);
    }
    if (bias) set(plan->operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (input) set(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, input);
    if (input) set(plan->operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)N);
    if (!known) choose_algorithm(plan, M, N, K, alignment);
    float one = 1, beta = add ? 1 : 0;
    check(cublasLtMatmul(multiplier, plan->operation, &one, b.p, plan->a, a.p, plan->b, &beta, add ? add : c, plan->c,
                         c, plan->c, &plan->algorithm, workspace, WORKSPACE, stream));
}

// ====================================================================================================================
// Layers
//
// Each is a kernel or two and a function with the same name and arguments as in train_gpt.c, which starts them.

// x (B,T,C) = wte[token] + wpe[position]. A thread takes W channels of a row.
template <int W>
__global__ static void embedding_forward_kernel(real* x, const int* tokens, const float* wte, const float* wpe,
                                                size_t rows, size_t T, size_t start, size_t C) {
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * W, row = at / C, c = at % C;
    if (row >= rows) return;
    float token[W], position[W];
    load(token, wte + (size_t)tokens[row] * C + c);
    load(position, wpe + (start + row % T) * C + c);
    for (int i = 0; i < W; i++) token[i] += position[i];
    store(x + at, token);
}

static void embedding_forward(real* x, const int* tokens, const float* wte, const float* wpe, size_t B, size_t T,
                              size_t start, size_t C) {
    with_width(C, [&](auto W) {
        launch(embedding_forward_kernel<W>, blocks(B * T * C / W, THREADS), THREADS, 0, stream, x, tokens, wte, wpe,
               B * T, T, start, C);
    });
}

// dwte[token] += dx: the rows of a token must be added up by one block, in order. order (2,rows) lists the rows sorted
// by token and then, where a token's rows begin, how many they are, and 0 elsewhere. Block i belongs to the i-th in
// this list and has something to do only if a token begins there. Its warps take the token's rows in turn.
template <int W>
__global__ static void token_gradient_kernel(float* dwte, const real* dx, const int* tokens, const int* order,
                                             size_t rows, size_t C) {
    int lane = threadIdx.x % WARP, group = threadIdx.x / WARP, count = order[rows + blockIdx.x];
    size_t c = ((size_t)blockIdx.y * WARP + lane) * W;
    if (count == 0) return;
    order += blockIdx.x;
    float sum[W] = {}, x[W];
#pragma unroll 4 // asks for several rows at once
    for (int i = group; c < C && i < count; i += GROUPS) {
        load(x, dx + (size_t)order[i] * C + c);
        for (int k = 0; k < W; k++) sum[k] += x[k];
    }
    add_warps(sum, shared_memory<float>());
    if (group > 0 || c >= C) return;
    dwte += (size_t)tokens[order[0]] * C + c;
    load(x, dwte);
    for (int k = 0; k < W; k++) x[k] += sum[k];
    store(dwte, x);
}

// dwpe[position] += dx: a thread adds up W channels of a position over the B sequences.
template <int W>
__global__ static void position_gradient_kernel(float* dwpe, const real* dx, size_t B, size_t T, size_t C) {
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (at >= T * C) return;
    float sum[W], x[W];
    load(sum, dwpe + at);
    for (size_t b = 0; b < B; b++) {
        load(x, dx + b * T * C + at);
        for (int k = 0; k < W; k++) sum[k] += x[k];
    }
    store(dwpe + at, sum);
}

static void embedding_backward(float* dwte, float* dwpe, const real* dx, const int* tokens, const int* order, size_t B,
                               size_t T, size_t C) {
    with_width(C, [&](auto W) {
        launch(token_gradient_kernel<W>, dim3((unsigned)(B * T), blocks(C, WARP * W)), THREADS,
               THREADS * W * sizeof(float), stream, dwte, dx, tokens, order, B * T, C);
        launch(position_gradient_kernel<W>, blocks(T * C / W, THREADS), THREADS, 0, stream, dwpe, dx, B, T, C);
    });
}

// A warp normalises a row. It reads the row three times, but only the first time from afar.
template <int W>
__global__ static void layernorm_forward_kernel(real* y, float* mean, float* rstd, const real* x, const float* w,
                                                const float* b, size_t rows, size_t C) {
    size_t row = (size_t)blockIdx.x * GROUPS + threadIdx.x / WARP, first = threadIdx.x % WARP * W;
    if (row >= rows) return;
    x += row * C;
    float v[W], scale[W], shift[W], sum = 0, squares = 0;
    for (size_t c = first; c < C; c += WARP * W) {
        load(v, x + c);
        for (int i = 0; i < W; i++) sum += v[i];
    }
    float m = warp_sum(sum) / (float)C;
    for (size_t c = first; c < C; c += WARP * W) {
        load(v, x + c);
        for (int i = 0; i < W; i++) squares += (v[i] - m) * (v[i] - m);
    }
    float r = 1 / sqrtf(warp_sum(squares) / (float)C + 1e-5f);
    for (size_t c = first; c < C; c += WARP * W) {
        load(v, x + c);
        load(scale, w + c);
        load(shift, b + c);
        for (int i = 0; i < W; i++) v[i] = (v[i] - m) * r * scale[i] + shift[i];
        store(y + row * C + c, v);
    }
    if (first == 0) {
        mean[row] = m;
        rstd[row] = r;
    }
}

static void layernorm_forward(real* y, float* mean, float* rstd, const real* x, const float* w, const float* b,
                              size_t rows, size_t C) {
    with_width(C, [&](auto W) {
        launch(layernorm_forward_kernel<W>, blocks(rows, GROUPS), THREADS, 0, stream, y, mean, rstd, x, w, b, rows, C);
    });
}

// dx: again a warp for each row.
template <int W>
__global__ static void layernorm_backward_kernel(real* dx, const real* dy, const real* x, const float* mean,
                                                 const float* rstd, const float* w, size_t rows, size_t C) {
    size_t row = (size_t)blockIdx.x * GROUPS + threadIdx.x / WARP, first = threadIdx.x % WARP * W;
    if (row >= rows) return;
    dx += row * C, dy += row * C, x += row * C;
    float m = mean[row], r = rstd[row], g[W], n[W], scale[W], old[W], g_sum = 0, gn_sum = 0;
    for (size_t c = first; c < C; c += WARP * W) {
        load(g, dy + c);
        load(n, x + c);
        load(scale, w + c);
        for (int i = 0; i < W; i++) {
            g_sum += g[i] * scale[i];
            gn_sum += g[i] * scale[i] * ((n[i] - m) * r);
        }
    }
    float g_avg = warp_sum(g_sum) / (float)C, gn_avg = warp_sum(gn_sum) / (float)C;
    for (size_t c = first; c < C; c += WARP * W) {
        load(g, dy + c);
        load(n, x + c);
        load(scale, w + c);
        load(old, dx + c);
        for (int i = 0; i < W; i++) old[i] += r * (g[i] * scale[i] - g_avg - (n[i] - m) * r * gn_avg);
        store(dx + c, old);
    }
}

// Sums over all rows, in two stages: db += sum of dy and, if dw is not NULL, dw += sum of dy n with the normalised
// n = (x - mean) rstd. Block (i,j) takes WARP * W columns of slice j of the rows; its warps take the slice's rows in
// turn. The last block of a column to finish adds up the slices, always in the same order. partial (slices,C/W,2,W).
template <int W>
__global__ static void sum_rows_kernel(float* dw, float* db, const real* dy, const real* x, const float* mean,
                                       const float* rstd, size_t rows, size_t C, size_t slice, float* partial,
                                       unsigned* counter) {
    size_t lane = threadIdx.x % WARP, group = threadIdx.x / WARP, c = (blockIdx.x * WARP + lane) * W;
    size_t end = (blockIdx.y + 1) * slice < rows ? (blockIdx.y + 1) * slice : rows;
    float sum[2 * W] = {}, part[2 * W], g[W], n[W]; // of dy, then of dy n
    for (size_t row = blockIdx.y * slice + group; c < C && row < end; row += GROUPS) {
        load(g, dy + row * C + c);
        for (int i = 0; i < W; i++) sum[i] += g[i];
        if (!dw) continue;
        load(n, x + row * C + c);
        for (int i = 0; i < W; i++) sum[W + i] += g[i] * ((n[i] - mean[row]) * rstd[row]);
    }
    add_warps(sum, shared_memory<float>());
    if (group == 0 && c < C) store(partial + 2 * (blockIdx.y * C + c), sum);
    if (!is_last_block(&counter[blockIdx.x], gridDim.y)) return;
    for (int i = 0; i < 2 * W; i++) sum[i] = 0;
#pragma unroll 4
    for (size_t j = group; c < C && j < gridDim.y; j += GROUPS) {
        load(part, partial + 2 * (j * C + c));
        for (int i = 0; i < 2 * W; i++) sum[i] += part[i];
    }
    add_warps(sum, shared_memory<float>());
    for (int i = 0; group == 0 && c < C && i < W; i++) {
        db[c + i] += sum[i];
        if (dw) dw[c + i] += sum[W + i];
    }
}

static void sum_rows(float* dw, float* db, const real* dy, const real* x, const float* mean, const float* rstd,
                     size_t rows, size_t C) {
    size_t most = min_size(128, WORKSPACE / (2 * C * sizeof(float))), slice = (rows + most - 1) / most;
    if (slice < 64) slice = 64;
    with_width(C, [&](auto W) {
        launch(sum_rows_kernel<W>, dim3(blocks(C, WARP * W), blocks(rows, slice)), THREADS,
               2 * THREADS * W * sizeof(float), stream, dw, db, dy, x, mean, rstd, rows, C, slice, (float*)workspace,
               counters);
    });
}

static void layernorm_backward(real* dx, float* dw, float* db, const real* dy, const real* x, const float* mean,
                               const float* rstd, const float* w, size_t rows, size_t C) {
    with_width(C, [&](auto W) {
        launch(layernorm_backward_kernel<W>, blocks(rows, GROUPS), THREADS, 0, stream, dx, dy, x, mean, rstd, w, rows,
               C);
    });
    sum_rows(dw, db, dy, x, mean, rstd, rows, C);
}

// Bias and residual are added by the multiply before it stores its sums, so that a layernorm finds them added.
static void linear_forward(real* y, const real* x, const real* w, const real* b, const real* residual, size_t rows,
                           size_t IC, size_t OC) {
    matmul(y, matrix(x, IC), matrix(w, OC), b, residual, rows, OC, IC);
}

// The weights' gradient is summed in float32, onto what is there. (cuBLASLt could find db too, but would replace it.)
static void linear_backward(real* dx, float* dw, float* db, const real* dy, const real* x, const real* w, size_t rows,
                            size_t IC, size_t OC) {
    if (dx) matmul(dx, matrix(dy, OC), transposed(w, OC), NULL, (real*)NULL, rows, IC, OC);
    matmul(dw, transposed(x, IC), matrix(dy, OC), NULL, dw, IC, OC, rows);
    sum_rows(NULL, db, dy, NULL, NULL, NULL, rows, OC);
}

// Attention works on tiles as on the CPU, but tiles of a size that fits a block's shared memory, and each warp keeps
// its sums in registers. What a warp multiplies at a time is 16 x 16 by 16 x 8, the shape of the matrix units'
// instruction. In that, each of the 32 threads holds certain elements of each operand, its "fragment". With row =
// thread / 4 and column = 2 (thread % 4), the pairs of neighbours that a thread has are
//     of A (16,16):  A[row][column..], A[row + 8][column..], A[row][column + 8..], A[row + 8][column + 8..],
//     of B (16,8):   B[column..][row], B[column + 8..][row],
//     of C (16,8):   C[row][column..], C[row + 8][column..].
// Two C's side by side have the elements where A has them, so the product of one multiplication becomes, rounded, an
// operand of the next without leaving the thread: scores become weights become outputs.
//
// A tile in shared memory has 16 bytes between its rows. Shared memory can be read in 32 places, "banks", at once, and
// with that gap any 8 neighbouring rows lie in different ones.

#ifndef CUDA_ON_CPU
// Four 8 x 8 matrices from shared memory, of whose rows thread i names the i-th; each thread gets a pair of each
// matrix's, as above. With _trans they are transposed on the way.
__device__ inline void ldmatrix_x4(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)));
}
__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)));
}

// c += a b in the matrix units: products of bfloat16 summed in float32.
__device__ inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x in one instruction, to two units in the last place. Results below the smallest normal number are 0.
__device__ inline float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Copies 16 bytes from global to shared memory in the background, zeros if not `valid`. Copies are gathered in groups;
// cp_async_wait<N> returns when all but the last N groups are there.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#endif

__device__ inline int fragment_row() { return threadIdx.x % WARP / 4; }
__device__ inline int fragment_column() { return threadIdx.x % 4 * 2; }

// The fragments of A at `tile`, of two B's side by side whose columns are the tile's rows, and of two B's whose rows
// are the tile's rows. The tile's rows are `width` apart.
__device__ inline void load_a(uint32_t a[4], const __nv_bfloat16* tile, int width) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4(a, tile + lane % 16 * width + lane / 16 * 8);
}
__device__ inline void load_b(uint32_t b[2][2], const __nv_bfloat16* tile, int width) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4(b[0], tile + (lane % 8 + lane / 16 * 8) * width + lane / 8 % 2 * 8);
}
__device__ inline void load_b_trans(uint32_t b[2][2], const __nv_bfloat16* tile, int width) {
    int lane = threadIdx.x % WARP;
    ldmatrix_x4_trans(b[0], tile + lane % 16 * width + lane / 16 * 8);
}
__device__ inline void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) { mma_bf16(c, a, b); }
__device__ inline void join(uint32_t& to, float x, float y) {
    __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    uint32_t bits; // `to` may be in memory, and is written at once, not byte by byte
    memcpy(&bits, &both, sizeof bits);
    to = bits;
}

// The same fragments in float32, for which there is no such instruction: the threads of a warp tell one another their
// elements, and each does the sums of its own four elements of C.
__device__ inline void load_a(float2 a[4], const float* tile, int width) {
    tile += fragment_row() * width + fragment_column();
    for (int i = 0; i < 4; i++) {
        const float* p = tile + i % 2 * 8 * width + i / 2 * 8;
        a[i] = make_float2(p[0], p[1]);
    }
}
__device__ inline void load_b(float2 b[2][2], const float* tile, int width) {
    tile += fragment_row() * width + fragment_column();
    for (int i = 0; i < 4; i++) {
        const float* p = tile + i / 2 * 8 * width + i % 2 * 8;
        b[i / 2][i % 2] = make_float2(p[0], p[1]);
    }
}
__device__ inline void load_b_trans(float2 b[2][2], const float* tile, int width) {
    tile += fragment_column() * width + fragment_row();
    for (int i = 0; i < 4; i++) {
        const float* p = tile + i % 2 * 8 * width + i / 2 * 8;
        b[i / 2][i % 2] = make_float2(p[0], p[width]);
    }
}
__device__ inline float2 of_thread(int lane, float2 x) {
    return make_float2(__shfl_sync(0xffffffff, x.x, lane), __shfl_sync(0xffffffff, x.y, lane));
}
__device__ inline void mma(float c[4], const float2 a[4], const float2 b[2]) {
    // The first of the four threads with A's rows and with B's columns that belong to this one's elements of C.
    int row = fragment_row() * 4, column = fragment_column() * 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll 1 // all in a row, in each place where this is used, would take minutes to compile
        for (int i = 0; i < 4; i++) {
            float2 low = of_thread(row + i, a[2 * half]), high = of_thread(row + i, a[2 * half + 1]);
            float2 left = of_thread(column + i, b[half]), right = of_thread(column + 4 + i, b[half]);
            c[0] = fmaf(low.y, left.y, fmaf(low.x, left.x, c[0]));
            c[1] = fmaf(low.y, right.y, fmaf(low.x, right.x, c[1]));
            c[2] = fmaf(high.y, left.y, fmaf(high.x, left.x, c[2]));
            c[3] = fmaf(high.y, right.y, fmaf(high.x, right.x, c[3]));
        }
}
__device__ inline void join(float2& to, float x, float y) { to = make_float2(x, y); }

// Two C's side by side as an A.
__device__ inline void c_to_a(pair a[4], const float c[2][4]) {
    join(a[0], c[0][0], c[0][1]);
    join(a[1], c[0][2], c[0][3]);
    join(a[2], c[1][0], c[1][1]);
    join(a[3], c[1][2], c[1][3]);
}

// A block has four warps, and a warp 16 M rows of its own. HEAD is the head size D rounded up to a multiple of 16, the
// difference filled with zeros. The rows of the others go by in tiles of TILE_ROWS, of which there is room for four,
// two at work and two under way.
enum { ATTENTION_WARPS = 4, ATTENTION_THREADS = ATTENTION_WARPS * WARP, MAX_HEAD = 128 };
template <int HEAD> struct Tiling {
    static constexpr int ROW = HEAD + WIDTH; // from row to row in shared memory
    static constexpr int TILE_ROWS = sizeof(real) > 2 && HEAD > 64 ? 32 : 64;
    static constexpr int M = sizeof(real) > 2 || HEAD > 64 || HEAD < 32 ? 1 : 2; // what the registers hold
    static constexpr size_t BYTES = 4 * TILE_ROWS * ROW * sizeof(real);
};

// Starts to copy a tile of `rows` rows from x, whose rows are `width` apart; zeros for rows from `valid` on and for
// columns from D on. Rows that do not begin at multiples of 16 bytes are copied one number at a time.
template <int HEAD, int ROWS>
__device__ inline void load_tile(real* tile, const real* x, size_t width, int valid, int D) {
    constexpr int PACKS = HEAD / WIDTH;
    for (int i = threadIdx.x; i < ROWS * PACKS; i += ATTENTION_THREADS) {
        int row = i / PACKS, c = i % PACKS * WIDTH;
        real* to = tile + row * Tiling<HEAD>::ROW + c;
        const real* from = x + row * width + c;
        if (D % WIDTH == 0)
            cp_async_16(to, row < valid && c < D ? from : x, row < valid && c < D);
        else
            for (int k = 0; k < WIDTH; k++) put(to + k, row < valid && c + k < D ? number(from[k]) : 0);
    }
}

// Writes a warp's C's, 16 rows of HEAD, to the first `valid` rows of y: row by `scale[0]`, row + 8 by `scale[1]`.
template <int HEAD>
__device__ inline void store_rows(real* y, size_t width, const float (*c)[4], const float scale[2], int valid, int D) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = fragment_row() + 8 * half;
        if (row >= valid) continue;
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
            int column = n * 8 + fragment_column();
            real* to = y + row * width + column;
            float left = scale[half] * c[n][2 * half], right = scale[half] * c[n][2 * half + 1];
            if (D % 2 == 0 && column < D)
                join(*reinterpret_cast<pair*>(to), left, right);
            else if (column < D) {
                put(to, left);
                if (column + 1 < D) put(to + 1, right);
            }
        }
    }
}

// Calls work(HEAD) with HEAD as a constant, the first multiple of 16 that holds D channels.
template <int HEAD = 16, typename Work> static void with_head(size_t D, Work work) {
    if constexpr (HEAD < MAX_HEAD)
        if (D > HEAD) return with_head<HEAD + 16>(D, work);
    work(std::integral_constant<int, HEAD>());
}

#define LOG2_E 1.44269504f // exponentials are made powers of 2, which the hardware has

// A block takes 64 M queries of a head, and goes along the keys up to its last query, the next tile on its way while
// one is worked on. Scores s, the outputs o and the running maximum and sum of each row stay in registers. Blocks with
// the most keys come first, so that the short ones fill the gaps at the end.
template <int HEAD>
__global__ static void __launch_bounds__(ATTENTION_THREADS)
    attention_forward_kernel(real* out, float* lse, const real* qkv, int T, int start, int C, int H, int heads) {
    constexpr int M = Tiling<HEAD>::M, ROW = Tiling<HEAD>::ROW, KEYS = Tiling<HEAD>::TILE_ROWS;
    constexpr int QUERIES = ATTENTION_WARPS * 16 * M;
    int D = C / H, head = blockIdx.x % heads, b = head / H, h = head % H, warp = threadIdx.x / WARP;
    int first = start + (gridDim.x / heads - 1 - blockIdx.x / heads) * QUERIES, row0 = first + warp * 16 * M;
    const real *sequence = qkv + (size_t)b * T * 3 * C + h * D, *k = sequence + C, *v = sequence + 2 * C;
    real* tiles = shared_memory<real>();
    float scale = LOG2_E / sqrtf((float)D);

    load_tile<HEAD, QUERIES>(tiles, sequence + (size_t)first * 3 * C, 3 * C, T - first, D);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    pair q[M][HEAD / 16][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < HEAD / 16; i++) load_a(q[m][i], tiles + (warp * M + m) * 16 * ROW + i * 16, ROW);
    __syncthreads();

    float o[M][HEAD / 8][4] = {}, largest[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = -INFINITY;
    int end = T < first + QUERIES ? T : first + QUERIES;
    load_tile<HEAD, KEYS>(tiles, k, 3 * C, T, D);
    load_tile<HEAD, KEYS>(tiles + KEYS * ROW, v, 3 * C, T, D);
    cp_async_commit();
    for (int j0 = 0, stage = 0; j0 < end; j0 += KEYS, stage ^= 1) {
        if (j0 + KEYS < end) {
            real* next = tiles + (stage ^ 1) * 2 * KEYS * ROW;
            size_t at = (size_t)(j0 + KEYS) * 3 * C;
            load_tile<HEAD, KEYS>(next, k + at, 3 * C, T - j0 - KEYS, D);
            load_tile<HEAD, KEYS>(next + KEYS * ROW, v + at, 3 * C, T - j0 - KEYS, D);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const real *keys = tiles + stage * 2 * KEYS * ROW, *values = keys + KEYS * ROW;
        if (j0 < row0 + 16 * M && row0 < T) {
            float s[M][KEYS / 8][4] = {};
#pragma unroll
            for (int i = 0; i < HEAD / 16; i++)
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    pair kt[2][2];
                    load_b(kt, keys + n * 16 * ROW + i * 16, ROW);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma(s[m][2 * n], q[m][i], kt[0]);
                        mma(s[m][2 * n + 1], q[m][i], kt[1]);
                    }
                }
#pragma unroll
            for (int m = 0; m < M; m++) {
                int row = row0 + m * 16 + fragment_row();
                if (j0 + KEYS > row0 + m * 16) // some keys may come after some queries
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (j0 + n * 8 + fragment_column() + e % 2 > row + e / 2 * 8) s[m][n][e] = -INFINITY;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float most = largest[m][half], shrink, tile_sum = 0;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1)); // a row lies in four threads
                    most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
                    shrink = exp2_((largest[m][half] - most) * scale);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; e++)
                            tile_sum += s[m][n][e] = exp2_((s[m][n][e] - most) * scale);
#pragma unroll
                    for (int n = 0; n < HEAD / 8; n++) {
                        o[m][n][2 * half] *= shrink;
                        o[m][n][2 * half + 1] *= shrink;
                    }
                    sum[m][half] = sum[m][half] * shrink + tile_sum;
                    largest[m][half] = most;
                }
            }
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                pair p[M][4], vt[2][2];
#pragma unroll
                for (int m = 0; m < M; m++) c_to_a(p[m], &s[m][2 * n]);
#pragma unroll
                for (int i = 0; i < HEAD / 16; i++) {
                    load_b_trans(vt, values + n * 16 * ROW + i * 16, ROW);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        mma(o[m][2 * i], p[m], vt[0]);
                        mma(o[m][2 * i + 1], p[m], vt[1]);
                    }
                }
            }
        }
        __syncthreads(); // before the next copy overwrites this tile
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        size_t at = (size_t)b * (T - start) + row0 + m * 16 - start;
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[m][half];
            total += __shfl_xor_sync(0xffffffff, total, 1);
            total += __shfl_xor_sync(0xffffffff, total, 2);
            inverse[half] = 1 / total;
            int row = fragment_row() + 8 * half;
            if (fragment_column() == 0 && row0 + m * 16 + row < T)
                lse[(at + row) * H + h] = largest[m][half] * (scale / LOG2_E) + logf(total);
        }
        store_rows<HEAD>(out + at * C + h * D, C, o[m], inverse, T - row0 - m * 16, D);
    }
}

// Heads of more than MAX_HEAD channels are too much for the registers. They are rare, and done simply: a block takes a
// query and THREADS of its channels, one a thread, and goes along the keys. Its warps find the next THREADS scores, and
// with them each thread moves its own channel's sum on. Blocks of a query's other channels find the same scores again.
__device__ inline float warp_dot(const real* x, const real* y, int D) {
    float sum = 0;
    for (int c = threadIdx.x % WARP; c < D; c += WARP) sum += number(x[c]) * number(y[c]);
    return warp_sum(sum);
}

__global__ static void wide_attention_forward_kernel(real* out, float* lse, const real* qkv, int T, int start, int C,
                                                     int H) {
    int D = C / H, h = blockIdx.x % H, N = T - start, i = start + blockIdx.x / H % N,
        c = blockIdx.y * THREADS + threadIdx.x;
    size_t b = blockIdx.x / H / N, row = b * N + i - start;
    const real *q = qkv + (b * T + i) * 3 * C + h * D, *k = qkv + b * T * 3 * C + C + h * D, *v = k + C;
    float *s = shared_memory<float>(), scale = 1 / sqrtf((float)D), largest = -INFINITY, sum = 0, o = 0;
    for (int j0 = 0; j0 <= i; j0 += THREADS) {
        int keys = i + 1 - j0 < THREADS ? i + 1 - j0 : THREADS;
        for (int j = threadIdx.x / WARP; j < keys; j += GROUPS) {
            float score = scale * warp_dot(q, k + (size_t)(j0 + j) * 3 * C, D);
            if (threadIdx.x % WARP == 0) s[j] = score;
        }
        __syncthreads();
        float most = largest;
        for (int j = 0; j < keys; j++) most = fmaxf(most, s[j]);
        float shrink = expf(largest - most);
        sum *= shrink, o *= shrink, largest = most;
        for (int j = 0; j < keys; j++) {
            float p = expf(s[j] - most);
            sum += p;
            if (c < D) o += p * number(v[(size_t)(j0 + j) * 3 * C + c]);
        }
        __syncthreads();
    }
    if (c < D) put(&out[row * C + h * D + c], o / sum);
    if (c == 0) lse[row * H + h] = largest + logf(sum);
}

static void attention_forward(real* out, float* lse, const real* qkv, Attention a) {
    size_t B = a.B, T = a.T, start = a.start, H = a.H, C = H * a.D;
    if (C / H > MAX_HEAD)
        return launch(wide_attention_forward_kernel, dim3((unsigned)(B * (T - start) * H), blocks(C / H, THREADS)),
                      THREADS, THREADS * sizeof(float), stream, out, lse, qkv, (int)T, (int)start, (int)C, (int)H);
    with_head(C / H, [&](auto HEAD) {
        unsigned tiles = blocks(T - start, ATTENTION_WARPS * 16 * Tiling<HEAD>::M);
        launch(attention_forward_kernel<HEAD>, tiles * (unsigned)(B * H), ATTENTION_THREADS, Tiling<HEAD>::BYTES,
               stream, out, lse, qkv, (int)T, (int)start, (int)C, (int)H, (int)(B * H));
    });
}

// The backward pass needs two numbers of a row in every tile: lse, here for powers of 2, and the sum over channels of
// dout out. They are prepared head by head, so that a tile's stand side by side. rows (B,H,T). A warp takes four rows
// of (B T,H), eight threads each.
template <int W>
__global__ static void attention_rows_kernel(float2* rows, const real* dout, const real* out, const float* lse,
                                             size_t T, size_t C, size_t H, size_t count) {
    size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) / 8, D = C / H, row = i / H, h = i % H;
    bool valid = i < count;
    float sum = 0, x[W], y[W];
    for (size_t c = threadIdx.x % 8 * W; valid && c < D; c += 8 * W) {
        load(x, dout + row * C + h * D + c);
        load(y, out + row * C + h * D + c);
        for (int k = 0; k < W; k++) sum += x[k] * y[k];
    }
    for (int bit = 4; bit; bit /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
    if (valid && threadIdx.x % 8 == 0)
        rows[(row / T * H + h) * T + row % T] = make_float2(lse[row * H + h] * LOG2_E, sum);
}

// A key's gradients are sums over queries, and a query's over keys. So that each block owns what it writes, the first
// kernel takes 64 keys and goes along the queries, the second takes queries and goes along the keys, and the tile's
// weights are computed in both. The first works on the transposed tile, keys by queries: there weights and ds come out
// in the form in which they are multiplied by dout and q. It takes 16 queries at a time.
template <int HEAD>
__global__ static void __launch_bounds__(ATTENTION_THREADS)
    attention_backward_keys_kernel(real* dqkv, const real* dout, const real* qkv, const float2* rows, int T, int C,
                                   int H, int heads) {
    constexpr int ROW = Tiling<HEAD>::ROW, QUERIES = Tiling<HEAD>::TILE_ROWS, KEYS = ATTENTION_WARPS * 16;
    int D = C / H, head = blockIdx.x % heads, b = head / H, h = head % H, warp = threadIdx.x / WARP;
    int first = blockIdx.x / heads * KEYS, key0 = first + warp * 16;
    size_t first_row = (size_t)b * T;
    const real *q = qkv + first_row * 3 * C + h * D, *d_o = dout + first_row * C + h * D;
    real* tiles = shared_memory<real>();
    float2* tile_rows = reinterpret_cast<float2*>(tiles + 4 * QUERIES * ROW); // (2,QUERIES)
    float scale = 1 / sqrtf((float)D);
    rows += (size_t)head * T;

    load_tile<HEAD, KEYS>(tiles, q + C + (size_t)first * 3 * C, 3 * C, T - first, D);
    load_tile<HEAD, KEYS>(tiles + KEYS * ROW, q + 2 * C + (size_t)first * 3 * C, 3 * C, T - first, D);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    pair k[HEAD / 16][4], v[HEAD / 16][4];
#pragma unroll
    for (int i = 0; i < HEAD / 16; i++) {
        load_a(k[i], tiles + warp * 16 * ROW + i * 16, ROW);
        load_a(v[i], tiles + (KEYS + warp * 16) * ROW + i * 16, ROW);
    }
    __syncthreads();

    float dk[HEAD / 8][4] = {}, dv[HEAD / 8][4] = {};
    float2 row = make_float2(0, 0); // this thread's of the next tile, on its way
    int stage = 0, begin = first / QUERIES * QUERIES;
    for (int i0 = begin - QUERIES; i0 < T; i0 += QUERIES, stage ^= 1) {
        int next = i0 + QUERIES;
        if (next < T) {
            real* to = tiles + (stage ^ 1) * 2 * QUERIES * ROW;
            load_tile<HEAD, QUERIES>(to, q + (size_t)next * 3 * C, 3 * C, T - next, D);
            load_tile<HEAD, QUERIES>(to + QUERIES * ROW, d_o + (size_t)next * C, C, T - next, D);
            bool exists = threadIdx.x < QUERIES && next + (int)threadIdx.x < T; // beyond T, weights must be 0
            row = exists ? rows[next + threadIdx.x] : make_float2(INFINITY, 0);
        }
        cp_async_commit();
        if (i0 >= begin) {
            cp_async_wait<1>();
            __syncthreads();
            const real *queries = tiles + stage * 2 * QUERIES * ROW, *gradients = queries + QUERIES * ROW;
            for (int j = 0; j < QUERIES; j += 16) {
                if (i0 + j + 15 < key0) continue; // all before the keys
                float p[2][4] = {}, ds[2][4] = {};
                pair b2[2][2], a[4];
#pragma unroll
                for (int i = 0; i < HEAD / 16; i++) {
                    load_b(b2, queries + j * ROW + i * 16, ROW);
                    mma(p[0], k[i], b2[0]);
                    mma(p[1], k[i], b2[1]);
                    load_b(b2, gradients + j * ROW + i * 16, ROW);
                    mma(ds[0], v[i], b2[0]);
                    mma(ds[1], v[i], b2[1]);
                }
                if (i0 + j < key0 + 15) // some queries may come before some keys
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (i0 + j + n * 8 + fragment_column() + e % 2 < key0 + fragment_row() + e / 2 * 8)
                                p[n][e] = -INFINITY;
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float2 r = tile_rows[stage * QUERIES + j + n * 8 + fragment_column() + e % 2];
                        float log_p = p[n][e] * (scale * LOG2_E) - r.x;
                        p[n][e] = exp2_(log_p > 0 ? 0 : log_p);
                        ds[n][e] = p[n][e] * (ds[n][e] - r.y);
                    }
                c_to_a(a, p);
#pragma unroll
                for (int i = 0; i < HEAD / 16; i++) {
                    load_b_trans(b2, gradients + j * ROW + i * 16, ROW);
                    mma(dv[2 * i], a, b2[0]);
                    mma(dv[2 * i + 1], a, b2[1]);
                }
                c_to_a(a, ds);
#pragma unroll
                for (int i = 0; i < HEAD / 16; i++) {
                    load_b_trans(b2, queries + j * ROW + i * 16, ROW);
                    mma(dk[2 * i], a, b2[0]);
                    mma(dk[2 * i + 1], a, b2[1]);
                }
            }
        }
        if (threadIdx.x < QUERIES) tile_rows[(stage ^ 1) * QUERIES + threadIdx.x] = row;
        __syncthreads();
    }
    const float scales[2] = {scale, scale}, ones[2] = {1, 1};
    real* to = dqkv + (first_row + key0) * 3 * C + C + h * D;
    store_rows<HEAD>(to, 3 * C, dk, scales, T - key0, D);
    store_rows<HEAD>(to + C, 3 * C, dv, ones, T - key0, D);
}

template <int HEAD>
__global__ static void __launch_bounds__(ATTENTION_THREADS)
    attention_backward_queries_kernel(real* dqkv, const real* dout, const real* qkv, const float2* rows, int T, int C,
                                      int H, int heads) {
    constexpr int M = Tiling<HEAD>::M, ROW = Tiling<HEAD>::ROW, KEYS = Tiling<HEAD>::TILE_ROWS;
    constexpr int QUERIES = ATTENTION_WARPS * 16 * M;
    int D = C / H, head = blockIdx.x % heads, b = head / H, h = head % H, warp = threadIdx.x / WARP;
    int first = (gridDim.x / heads - 1 - blockIdx.x / heads) * QUERIES, row0 = first + warp * 16 * M;
    size_t first_row = (size_t)b * T;
    const real *q = qkv + first_row * 3 * C + h * D, *keys = q + C, *values = q + 2 * C;
    real* tiles = shared_memory<real>();
    float scale = 1 / sqrtf((float)D);

    load_tile<HEAD, QUERIES>(tiles, q + (size_t)first * 3 * C, 3 * C, T - first, D);
    load_tile<HEAD, QUERIES>(tiles + QUERIES * ROW, dout + (first_row + first) * C + h * D, C, T - first, D);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    pair query[M][HEAD / 16][4], d_o[M][HEAD / 16][4];
    float2 row[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int i = 0; i < HEAD / 16; i++) {
            load_a(query[m][i], tiles + (warp * M + m) * 16 * ROW + i * 16, ROW);
            load_a(d_o[m][i], tiles + (QUERIES + (warp * M + m) * 16) * ROW + i * 16, ROW);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = row0 + m * 16 + fragment_row() + 8 * half;
            row[m][half] = i < T ? rows[(size_t)head * T + i] : make_float2(INFINITY, 0);
        }
    }
    __syncthreads();

    float dq[M][HEAD / 8][4] = {};
    int end = T < first + QUERIES ? T : first + QUERIES;
    load_tile<HEAD, KEYS>(tiles, keys, 3 * C, T, D);
    load_tile<HEAD, KEYS>(tiles + KEYS * ROW, values, 3 * C, T, D);
    cp_async_commit();
    for (int j0 = 0, stage = 0; j0 < end; j0 += KEYS, stage ^= 1) {
        if (j0 + KEYS < end) {
            real* next = tiles + (stage ^ 1) * 2 * KEYS * ROW;
            size_t at = (size_t)(j0 + KEYS) * 3 * C;
            load_tile<HEAD, KEYS>(next, keys + at, 3 * C, T - j0 - KEYS, D);
            load_tile<HEAD, KEYS>(next + KEYS * ROW, values + at, 3 * C, T - j0 - KEYS, D);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const real *k = tiles + stage * 2 * KEYS * ROW, *v = k + KEYS * ROW;
        for (int j = 0; j < KEYS && j0 + j < row0 + 16 * M; j += 16) { // not beyond the warp's last query
            float ds[M][2][4] = {}, dp[M][2][4] = {};
            pair b2[2][2], a[M][4];
#pragma unroll
            for (int i = 0; i < HEAD / 16; i++) {
                load_b(b2, k + j * ROW + i * 16, ROW);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(ds[m][0], query[m][i], b2[0]);
                    mma(ds[m][1], query[m][i], b2[1]);
                }
                load_b(b2, v + j * ROW + i * 16, ROW);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(dp[m][0], d_o[m][i], b2[0]);
                    mma(dp[m][1], d_o[m][i], b2[1]);
                }
            }
#pragma unroll
            for (int m = 0; m < M; m++) {
                int rows0 = row0 + m * 16;
                if (j0 + j + 15 > rows0) // some keys may come after some queries
#pragma unroll
                    for (int n = 0; n < 2; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (j0 + j + n * 8 + fragment_column() + e % 2 > rows0 + fragment_row() + e / 2 * 8)
                                ds[m][n][e] = -INFINITY;
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float2 r = row[m][e / 2];
                        float log_p = ds[m][n][e] * (scale * LOG2_E) - r.x;
                        ds[m][n][e] = exp2_(log_p > 0 ? 0 : log_p) * (dp[m][n][e] - r.y);
                    }
                c_to_a(a[m], ds[m]);
            }
#pragma unroll
            for (int i = 0; i < HEAD / 16; i++) {
                load_b_trans(b2, k + j * ROW + i * 16, ROW);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma(dq[m][2 * i], a[m], b2[0]);
                    mma(dq[m][2 * i + 1], a[m], b2[1]);
                }
            }
        }
        __syncthreads();
    }
    const float scales[2] = {scale, scale};
#pragma unroll
    for (int m = 0; m < M; m++)
        store_rows<HEAD>(dqkv + (first_row + row0 + m * 16) * 3 * C + h * D, 3 * C, dq[m], scales, T - row0 - m * 16,
                         D);
}

// For heads of more than MAX_HEAD channels: a block takes a row, and THREADS channels of its dq, dk and dv. First the
// row is a query, of the keys up to it, then a key, of the queries from it on.
__global__ static void wide_attention_backward_kernel(real* dqkv, const real* dout, const real* qkv, const float2* rows,
                                                      int T, int C, int H) {
    int D = C / H, h = blockIdx.x % H, t = blockIdx.x / H % T, c = blockIdx.y * THREADS + threadIdx.x;
    size_t b = blockIdx.x / H / T, first_row = b * T;
    const real *q = qkv + first_row * 3 * C + h * D, *k = q + C, *v = k + C, *d_o = dout + first_row * C + h * D;
    float2* weights = shared_memory<float2>(); // p and ds of a query and a key
    float scale = 1 / sqrtf((float)D), dq = 0, dk = 0, dv = 0;
    rows += (b * H + h) * T;
    for (int is_key = 0; is_key < 2; is_key++)
        for (int first = is_key ? t : 0, end = is_key ? T : t + 1; first < end; first += THREADS) {
            int count = end - first < THREADS ? end - first : THREADS;
            for (int n = threadIdx.x / WARP; n < count; n += GROUPS) {
                size_t i = is_key ? first + n : t, j = is_key ? t : first + n;
                float log_p = scale * warp_dot(q + i * 3 * C, k + j * 3 * C, D) * LOG2_E - rows[i].x;
                float p = exp2f(log_p > 0 ? 0 : log_p);
                float ds = p * (warp_dot(d_o + i * C, v + j * 3 * C, D) - rows[i].y);
                if (threadIdx.x % WARP == 0) weights[n] = make_float2(p, ds);
            }
            __syncthreads();
            for (int n = 0; c < D && n < count; n++) {
                size_t other = first + n;
                if (is_key) {
                    dk += weights[n].y * number(q[other * 3 * C + c]);
                    dv += weights[n].x * number(d_o[other * C + c]);
                } else {
                    dq += weights[n].y * number(k[other * 3 * C + c]);
                }
            }
            __syncthreads();
        }
    if (c >= D) return;
    real* to = dqkv + (first_row + t) * 3 * C + h * D + c;
    put(to, scale * dq);
    put(to + C, scale * dk);
    put(to + 2 * C, dv);
}

// rows (B,H,T): room to work in.
static void attention_backward(real* dqkv, float2* rows, const real* dout, const real* qkv, const real* out,
                               const float* lse, Attention a) {
    size_t B = a.B, T = a.T, H = a.H, C = H * a.D;
    with_width(C / H, [&](auto W) {
        launch(attention_rows_kernel<W>, blocks(B * T * H, THREADS / 8), THREADS, 0, stream, rows, dout, out, lse, T, C,
               H, B * T * H);
    });
    if (C / H > MAX_HEAD)
        return launch(wide_attention_backward_kernel, dim3((unsigned)(B * T * H), blocks(C / H, THREADS)), THREADS,
                      THREADS * sizeof(float2), stream, dqkv, dout, qkv, rows, (int)T, (int)C, (int)H);
    with_head(C / H, [&](auto HEAD) {
        unsigned heads = (unsigned)(B * H), queries = ATTENTION_WARPS * 16 * Tiling<HEAD>::M;
        size_t bytes = Tiling<HEAD>::BYTES;
        launch(attention_backward_keys_kernel<HEAD>, blocks(T, ATTENTION_WARPS * 16) * heads, ATTENTION_THREADS,
               bytes + 2 * Tiling<HEAD>::TILE_ROWS * sizeof(float2), stream, dqkv, dout, qkv, rows, (int)T, (int)C,
               (int)H, (int)heads);
        launch(attention_backward_queries_kernel<HEAD>, blocks(T, queries) * heads, ATTENTION_THREADS, bytes, stream,
               dqkv, dout, qkv, rows, (int)T, (int)C, (int)H, (int)heads);
    });
}

__device__ inline float gelu_gate(float x) { return 1 / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x))); }

template <int W> __global__ static void gelu_forward_kernel(real* y, const real* x, size_t n) {
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (at >= n) return;
    float v[W];
    load(v, x + at);
    for (int i = 0; i < W; i++) v[i] *= gelu_gate(v[i]);
    store(y + at, v);
}

static void gelu_forward(real* y, const real* x, size_t n) {
    with_width(n, [&](auto W) { launch(gelu_forward_kernel<W>, blocks(n / W, THREADS), THREADS, 0, stream, y, x, n); });
}

template <int W> __global__ static void gelu_backward_kernel(real* dx, const real* dy, const real* x, size_t n) {
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * W;
    if (at >= n) return;
    float v[W], g[W];
    load(v, x + at);
    load(g, dy + at);
    for (int i = 0; i < W; i++) {
        float s = gelu_gate(v[i]);
        g[i] *= s + v[i] * s * (1 - s) * 1.59576912f * (1 + 0.134145f * v[i] * v[i]);
    }
    store(dx + at, g);
}

static void gelu_backward(real* dx, const real* dy, const real* x, size_t n) {
    with_width(
        n, [&](auto W) { launch(gelu_backward_kernel<W>, blocks(n / W, THREADS), THREADS, 0, stream, dx, dy, x, n); });
}

// A block takes a row. Each thread goes through its part of it once, with the largest logit so far and the sum of
// e^(logit - largest), as attention does; then these are put together, neighbour by neighbour. logits' rows are
// padded(V) apart.
__global__ static void cross_entropy_forward_kernel(float* losses, float* lse, const real* logits, const int* targets,
                                                    size_t V, size_t stride) {
    size_t row = blockIdx.x, lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
    float largest = -INFINITY, sum = 0, x[WIDTH];
    logits += row * stride;
    for (size_t v = threadIdx.x * WIDTH; v < V; v += THREADS * WIDTH) {
        load(x, logits + v);
        float most = largest;
        for (int i = 0; i < WIDTH; i++) most = v + i < V ? fmaxf(most, x[i]) : most;
        sum *= expf(largest - most);
        for (int i = 0; i < WIDTH; i++) sum += v + i < V ? expf(x[i] - most) : 0;
        largest = most;
    }
    float most = largest;
    for (int bit = WARP / 2; bit; bit /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, bit));
    sum = warp_sum(sum == 0 ? 0 : sum * expf(largest - most)); // 0: a thread without any
    float* warps = shared_memory<float>();                     // (2,GROUPS)
    if (lane == 0) {
        warps[group] = most;
        warps[GROUPS + group] = sum;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < GROUPS; i++) most = fmaxf(most, warps[i]);
    sum = 0;
    for (int i = 0; i < GROUPS; i++) sum += warps[GROUPS + i] == 0 ? 0 : warps[GROUPS + i] * expf(warps[i] - most);
    lse[row] = most + logf(sum);
    losses[row] = lse[row] - number(logits[targets[row]]);
}

static void cross_entropy_forward(float* losses, float* lse, const real* logits, const int* targets, size_t rows,
                                  size_t V) {
    launch(cross_entropy_forward_kernel, (unsigned)rows, THREADS, 2 * GROUPS * sizeof(float), stream, losses, lse,
           logits, targets, V, padded(V));
}

// The padding's gradient is 0. share: of this batch in the step, on the device since it may change from step to step.
__global__ static void cross_entropy_backward_kernel(real* logits, const float* lse, const int* targets,
                                                     const float* share, size_t rows, size_t V, size_t stride) {
    size_t row = blockIdx.x, target = (size_t)targets[row];
    float row_lse = lse[row], scale = *share / (float)rows, x[WIDTH];
    logits += row * stride;
    for (size_t v = threadIdx.x * WIDTH; v < stride; v += THREADS * WIDTH) {
        load(x, logits + v);
        for (int i = 0; i < WIDTH; i++)
            x[i] = v + i < V ? scale * expf(x[i] - row_lse) - (v + i == target ? scale : 0) : 0;
        store(logits + v, x);
    }
}

static void cross_entropy_backward(real* logits, const float* lse, const int* targets, const float* share, size_t rows,
                                   size_t V) {
    launch(cross_entropy_backward_kernel, (unsigned)rows, THREADS, 0, stream, logits, lse, targets, share, rows, V,
           padded(V));
}

// ====================================================================================================================
// Model
//
// The tables of train_gpt.c are expanded once more, into pointers of the types that the tensors have here. The host
// sees the same tensors through Parameters and Activations, but only as addresses.

#define ROUNDED_FIELD(kind, field, name, rows, columns, mean, std) FIELD_##kind(real, field)
#define TENSOR_FIELD(kind, type, field, width)                     FIELD_##kind(type, field)
struct Rounded { // the weights as reals, for the multiplies
    PARAMETERS(ROUNDED_FIELD)
};
struct Tensors {
    ACTIVATIONS(TENSOR_FIELD)
};
static_assert(sizeof(Rounded) == sizeof(Parameters), "a pointer is a pointer");
static_assert(offsetof(Activations, embedded) + sizeof(Tensors) == sizeof(Activations), "a pointer is a pointer");

static Tensors tensors_of(const Activations* a) {
    Tensors t;
    memcpy(&t, (const char*)a + offsetof(Activations, embedded), sizeof t);
    return t;
}

// Work that is the same every time but for numbers in memory. To ask for it kernel by kernel takes the host longer than
// a small model's kernels take to run, so it is recorded as a graph, which is started as a whole. The first time it
// runs as it is: then multiplies choose their algorithms and the driver loads the kernels.
struct Recording {
    enum Pass { FORWARD, BACKWARD, UPDATE } pass;
    size_t model, B, T, times;
    cudaGraphExec_t graph;
};

template <typename Work> static void replay(Recording* r, Work work) {
    if (!r || layer_done || !r->times) {
        if (r) r->times++;
        return work();
    }
    if (!r->graph) {
        cudaGraph_t graph;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work();
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&r->graph, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    check(cudaGraphLaunch(r->graph, stream));
}

// A part of a tensor, for one block of AdamW's.
enum { PIECE = 1 << 13 };
struct Piece {
    size_t first;
    unsigned size;
    bool decays;
};

// What changes from step to step, and what comes back.
struct Numbers {
    Factors factors;
    float share;
};
struct Results {
    double loss, norm; // loss: the sum since it was last read
    float clip;        // what clipping leaves of the gradient
};

// What a model has here beside its blocks.
struct ModelExtra {
    size_t id, piece_count, seen_uploads;
    real* rounded;
    Rounded w;
    Piece* pieces;
    Numbers* numbers;
    Results *results, *host_results;
    Recording update;
};

// What activations have beside: a batch, its rows sorted by token, and what passes have been recorded.
enum { RECORDINGS = 16 };
struct ActivationsExtra {
    Config config;
    int *tokens, *targets, *order;
    float2* rows; // attention_backward's
    Recording recordings[RECORDINGS];
    size_t recording_count;
};

static ModelExtra* extra_of(const Model* m) { return (ModelExtra*)m->extra; }
static ActivationsExtra* extra_of(const Activations* a) { return (ActivationsExtra*)a->extra; }

static size_t activation_bytes(Activations* a, Config config, void* block) {
    config.V = padded(config.V);
    return lay_out_activations(a, config, sizeof(real), block);
}

static size_t activations_memory(Config config, size_t B, size_t T, bool training) {
    Activations a;
    memset(&a, 0, sizeof a);
    a.B = B, a.T = T, a.training = training;
    size_t for_attention = training ? config.H * sizeof(float2) : 0;
    return activation_bytes(&a, config, NULL) + B * T * (4 * sizeof(int) + for_attention);
}

// In training there is a second set of activations, for the one sequence of a sample.
static size_t memory(Config config, size_t B, size_t T, bool training) {
    Model model;
    model.config = config;
    describe_parameters(&model);
    size_t pieces = model.block_size / PIECE + model.tensor_count;
    free(model.tensors);
    return model.block_size * (sizeof(real) + (training ? 4 : 1) * sizeof(float)) + pieces * sizeof(Piece) +
           activations_memory(config, B, T, training) + (training ? activations_memory(config, 1, T, false) : 0);
}

static float* zeroed_block(const Model* model, const char* what) {
    float* block = device_memory<float>(model->block_size, what);
    check(cudaMemsetAsync(block, 0, model->block_size * sizeof(float), stream));
    return block;
}

static void create_model(Model* model, bool training) {
    static size_t models;
    start();
    describe_parameters(model);
    ModelExtra* e = (ModelExtra*)allocate(1, sizeof *e, "the model");
    model->extra = e;
    e->id = ++models;
    model->weights = zeroed_block(model, "the parameters");
    e->rounded = device_memory<real>(model->block_size, "the rounded parameters");
    e->numbers = device_memory<Numbers>(1, "numbers");
    e->results = device_memory<Results>(1, "results");
    check(cudaMemsetAsync(e->results, 0, sizeof *e->results, stream));
    check(cudaMallocHost((void**)&e->host_results, sizeof *e->host_results));
    point_parameters(&model->w, model, model->weights);
    Piece* pieces = (Piece*)allocate(model->block_size / PIECE + model->tensor_count, sizeof(Piece), "pieces");
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        real* rounded = e->rounded + t->offset;
        memcpy((char*)&e->w + t->slot, &rounded, sizeof rounded);
        size_t end = i + 1 < model->tensor_count ? t[1].offset : model->block_size;
        for (size_t at = t->offset; at < end; at += PIECE)
            pieces[e->piece_count++] = {at, (unsigned)min_size(PIECE, end - at), t->rows > 0};
    }
    if (training) {
        model->gradients = zeroed_block(model, "the gradients");
        model->moment1 = zeroed_block(model, "AdamW's first moments");
        model->moment2 = zeroed_block(model, "AdamW's second moments");
        point_parameters(&model->d, model, model->gradients);
        e->pieces = device_memory<Piece>(e->piece_count, "pieces");
        upload(e->pieces, pieces, e->piece_count * sizeof(Piece));
    }
    free(pieces);
}

static void create_activations(Activations* a, const Model* model, size_t B, size_t T, bool training) {
    ActivationsExtra* e = (ActivationsExtra*)allocate(1, sizeof *e, "the activations");
    a->extra = e;
    a->B = B, a->T = T, a->training = training;
    e->config = model->config;
    a->block = (float*)device_memory<char>(activation_bytes(a, e->config, NULL), "the activations");
    activation_bytes(a, e->config, a->block);
    e->tokens = device_memory<int>(4 * B * T, "a batch");
    e->targets = e->tokens + B * T;
    e->order = e->targets + B * T;
    e->rows = device_memory<float2>(training ? B * T * e->config.H : 0, "attention");
}

static void forget(Recording* r) {
    if (r->graph) check(cudaGraphExecDestroy(r->graph));
}

static void free_model(Model* model) {
    ModelExtra* e = extra_of(model);
    check(cudaStreamSynchronize(stream));
    forget(&e->update);
    void* const blocks[] = {model->weights, model->gradients, model->moment1, model->moment2,
                            e->rounded,     e->pieces,        e->numbers,     e->results};
    for (void* block : blocks) check(cudaFree(block));
    check(cudaFreeHost(e->host_results));
    free(model->tensors), free(e);
}

static void free_activations(Activations* a) {
    ActivationsExtra* e = extra_of(a);
    check(cudaStreamSynchronize(stream));
    for (size_t i = 0; i < e->recording_count; i++) forget(&e->recordings[i]);
    check(cudaFree(a->block));
    check(cudaFree(e->tokens));
    check(cudaFree(e->rows));
    free(e);
}

// The recording of a pass over these shapes, or NULL if there are too many to keep.
static Recording* recording(const Model* model, Activations* a, Recording::Pass pass, size_t B, size_t T) {
    ActivationsExtra* e = extra_of(a);
    Recording *r = e->recordings, *end = r + e->recording_count;
    while (r < end && (r->pass != pass || r->model != extra_of(model)->id || r->B != B || r->T != T)) r++;
    if (r < end) return r;
    if (e->recording_count == RECORDINGS) return NULL;
    *r = {pass, extra_of(model)->id, B, T, 0, NULL};
    e->recording_count++;
    return r;
}

__global__ static void round_kernel(real* to, const float* from, size_t n) {
    size_t at = ((size_t)blockIdx.x * THREADS + threadIdx.x) * WIDTH;
    float x[WIDTH];
    if (at >= n) return;
    load(x, from + at);
    store(to + at, x);
}

// loss += mean of the rows' losses. One block.
__global__ static void mean_loss_kernel(Results* results, const float* losses, size_t rows) {
    double sum = 0, *warps = shared_memory<double>();
    for (size_t i = threadIdx.x; i < rows; i += THREADS) sum += losses[i];
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < GROUPS; i++) sum += warps[i];
    results->loss += sum / (double)rows;
}

// The MLP's first half. In training GELU comes along with the multiply where the matrix units' arithmetic is all that is
// asked for; fc keeps its input. Generation has too few rows for that to matter.
static bool gelu_is_folded_in(bool training, size_t C) { return training && sizeof(real) == 2 && C % WIDTH == 0; }

// As cpu_forward. tokens and targets are on the device already.
static void run_forward(Model* model, Activations* activations, bool with_targets, size_t B, size_t T, size_t start) {
    const Parameters* p = &model->w;
    const Rounded* w = &extra_of(model)->w;
    const ActivationsExtra* e = extra_of(activations);
    Tensors a = tensors_of(activations);
    size_t V = model->config.V, C = model->config.C, L = model->config.L, N = T - start, rows = B * N;
    Attention shape = attention_of(model->config, B, T, start);
    embedding_forward(a.embedded, e->tokens, p->wte, p->wpe, B, N, start, C);
    done("embedding");
    const real *x = a.embedded, *none = NULL;
    for (size_t l = 0; l < L; l++) {
        layernorm_forward(a.ln1[l], a.ln1_mean[l], a.ln1_rstd[l], x, p->ln1_w[l], p->ln1_b[l], rows, C);
        done("ln1");
        linear_forward(a.qkv[l] + start * 3 * C, a.ln1[l], w->qkv_w[l], w->qkv_b[l], none, rows, C, 3 * C);
        done("qkv_w");
        gpu::attention_forward(a.att[l], a.lse[l], a.qkv[l], shape);
        done("attention");
        linear_forward(a.mid[l], a.att[l], w->att_w[l], w->att_b[l], x, rows, C, C);
        done("att_w");
        layernorm_forward(a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l], a.mid[l], p->ln2_w[l], p->ln2_b[l], rows, C);
        done("ln2");
        if (gelu_is_folded_in(activations->training, C)) {
            matmul(a.gelu[l], matrix(a.ln2[l], C), matrix(w->fc_w[l], 4 * C), w->fc_b[l], none, rows, 4 * C, C,
                   CUBLASLT_EPILOGUE_GELU_AUX_BIAS, a.fc[l]);
            done("fc_w");
        } else {
            linear_forward(a.fc[l], a.ln2[l], w->fc_w[l], w->fc_b[l], none, rows, C, 4 * C);
            done("fc_w");
            gelu_forward(a.gelu[l], a.fc[l], rows * 4 * C);
            done("gelu");
        }
        linear_forward(a.out[l], a.gelu[l], w->mlp_w[l], w->mlp_b[l], a.mid[l], rows, 4 * C, C);
        done("mlp_w");
        x = a.out[l];
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, x, p->lnf_w, p->lnf_b, rows, C);
    done("lnf");
    // The padding's logits come out as 0, and are never looked at.
    size_t first = with_targets ? 0 : rows - 1;
    matmul(a.logits, matrix(a.lnf + first * C, C), transposed(w->wte, C), NULL, none, rows - first, padded(V), C);
    done("logits");
    if (!with_targets) return;
    cross_entropy_forward(a.losses, a.logits_lse, a.logits, e->targets, rows, V);
    launch(mean_loss_kernel, 1, THREADS, GROUPS * sizeof(double), stream, extra_of(model)->results, a.losses, rows);
    done("loss");
}

static void forward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                    size_t start, bool) {
    ModelExtra* m = extra_of(model);
    size_t rows = B * (T - start);
    if (m->seen_uploads != uploads) // the host may have written weights
        launch(round_kernel, blocks(model->block_size, THREADS * WIDTH), THREADS, 0, stream, m->rounded, model->weights,
               model->block_size);
    m->seen_uploads = uploads;
    upload(extra_of(a)->tokens, tokens, rows * sizeof(int));
    if (!targets) return run_forward(model, a, false, B, T, start);
    upload(extra_of(a)->targets, targets, rows * sizeof(int));
    replay(recording(model, a, Recording::FORWARD, B, T), [&] { run_forward(model, a, true, B, T, 0); });
    model->loss_count += 1;
}

static void run_backward(Model* model, Activations* activations, size_t B, size_t T) {
    const Parameters *p = &model->w, *d = &model->d;
    const Rounded* w = &extra_of(model)->w;
    const ActivationsExtra* e = extra_of(activations);
    Tensors a = tensors_of(activations);
    size_t V = model->config.V, C = model->config.C, L = model->config.L, rows = B * T;
    Attention shape = attention_of(model->config, B, T, 0);
    const real* none = NULL;
    cross_entropy_backward(a.logits, a.logits_lse, e->targets, &extra_of(model)->numbers->share, rows, V);
    done("loss");
    matmul(a.dnormed, matrix(a.logits, padded(V)), matrix(w->wte, C), NULL, none, rows, C, padded(V));
    done("logits");
    matmul(d->wte, transposed(a.logits, padded(V)), matrix(a.lnf, C), NULL, d->wte, padded(V), C, rows);
    done("logits");
    check(cudaMemsetAsync(a.dresidual, 0, rows * C * sizeof(real), stream));
    const real* x = a.out[L - 1];
    layernorm_backward(a.dresidual, d->lnf_w, d->lnf_b, a.dnormed, x, a.lnf_mean, a.lnf_rstd, p->lnf_w, rows, C);
    done("lnf");
    for (size_t l = L; l-- > 0;) {
        x = l > 0 ? a.out[l - 1] : a.embedded;
        if (gelu_is_folded_in(activations->training, C)) {
            matmul(a.dfc, matrix(a.dresidual, C), transposed(w->mlp_w[l], C), NULL, none, rows, 4 * C, C,
                   CUBLASLT_EPILOGUE_DGELU, a.fc[l]);
            linear_backward(NULL, d->mlp_w[l], d->mlp_b[l], a.dresidual, a.gelu[l], w->mlp_w[l], rows, 4 * C, C);
            done("mlp_w");
        } else {
            linear_backward(a.dfc, d->mlp_w[l], d->mlp_b[l], a.dresidual, a.gelu[l], w->mlp_w[l], rows, 4 * C, C);
            done("mlp_w");
            gelu_backward(a.dfc, a.dfc, a.fc[l], rows * 4 * C);
            done("gelu");
        }
        linear_backward(a.dnormed, d->fc_w[l], d->fc_b[l], a.dfc, a.ln2[l], w->fc_w[l], rows, C, 4 * C);
        done("fc_w");
        layernorm_backward(a.dresidual, d->ln2_w[l], d->ln2_b[l], a.dnormed, a.mid[l], a.ln2_mean[l], a.ln2_rstd[l],
                           p->ln2_w[l], rows, C);
        done("ln2");
        linear_backward(a.datt, d->att_w[l], d->att_b[l], a.dresidual, a.att[l], w->att_w[l], rows, C, C);
        done("att_w");
        gpu::attention_backward(a.dqkv, e->rows, a.datt, a.qkv[l], a.att[l], a.lse[l], shape);
        done("attention");
        linear_backward(a.dnormed, d->qkv_w[l], d->qkv_b[l], a.dqkv, a.ln1[l], w->qkv_w[l], rows, C, 3 * C);
        done("qkv_w");
        layernorm_backward(a.dresidual, d->ln1_w[l], d->ln1_b[l], a.dnormed, x, a.ln1_mean[l], a.ln1_rstd[l],
                           p->ln1_w[l], rows, C);
        done("ln1");
    }
    embedding_backward(d->wte, d->wpe, a.dresidual, e->tokens, e->order, B, T, C);
    done("embedding");
}

// order (2,rows), as token_gradient_kernel wants it, by a counting sort: those of one token stay in order.
static void sort_rows(int* order, const int* tokens, size_t rows, size_t V) {
    int* place = (int*)allocate(V + 1, sizeof(int), "the order of tokens");
    for (size_t i = 0; i < rows; i++) place[tokens[i] + 1]++;
    memset(order + rows, 0, rows * sizeof(int));
    for (size_t v = 0; v < V; v++) {
        if (place[v + 1]) order[rows + (size_t)place[v]] = place[v + 1];
        place[v + 1] += place[v];
    }
    for (size_t i = 0; i < rows; i++) order[place[tokens[i]]++] = (int)i;
    free(place);
}

// tokens and targets must be the forward pass's; all but the order of tokens is on the device still.
static void backward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                     float share) {
    (void)targets;
    size_t rows = B * T;
    int* order = (int*)allocate(2 * rows, sizeof(int), "the order of tokens");
    sort_rows(order, tokens, rows, model->config.V);
    upload(extra_of(a)->order, order, 2 * rows * sizeof(int));
    free(order);
    upload(&extra_of(model)->numbers->share, &share, sizeof share);
    replay(recording(model, a, Recording::BACKWARD, B, T), [&] { run_backward(model, a, B, T); });
}

// The gradient's norm, and what clipping leaves of it. Each block sums its share of the squares, and the last adds up
// the blocks' sums. n is a multiple of 4.
enum { NORM_BLOCKS = 1024 };
__global__ static void norm_kernel(Results* results, const float* d, size_t n, const Numbers* numbers, double* partial,
                                   unsigned* counter) {
    double sum = 0, *warps = shared_memory<double>() + 1; // after is_last_block's
    float x[4];
    for (size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (size_t)gridDim.x * THREADS * 4) {
        load(x, d + i);
        for (int k = 0; k < 4; k++) sum += (double)x[k] * x[k];
    }
    for (int stage = 0; stage < 2; stage++) {
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = sum;
        __syncthreads();
        sum = warps[0];
        for (int i = 1; i < GROUPS; i++) sum += warps[i];
        if (stage == 1) break;
        if (threadIdx.x == 0) partial[blockIdx.x] = sum;
        if (!is_last_block(counter, gridDim.x)) return;
        sum = 0;
        for (unsigned i = threadIdx.x; i < gridDim.x; i += THREADS) sum += partial[i];
    }
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum), clip = numbers->factors.clip;
    results->norm = norm;
    results->clip = clip > 0 && clip < norm + 1e-6 ? (float)(clip / (norm + 1e-6)) : 1;
}

// All tensors in one launch, a block for each piece. It also rounds the new weights for the multiplies.
__global__ static void adamw_kernel(float* w, real* rounded, float* d, float* m, float* v, const Piece* pieces,
                                    const Numbers* numbers, const Results* results) {
    Piece piece = pieces[blockIdx.x];
    Factors f = numbers->factors;
    float keep = piece.decays ? f.keep : 1, clip = results->clip, wi[4], di[4], mi[4], vi[4];
    const float zero[4] = {};
    for (size_t i = piece.first + threadIdx.x * 4; i < piece.first + piece.size; i += THREADS * 4) {
        load(wi, w + i);
        load(di, d + i);
        load(mi, m + i);
        load(vi, v + i);
        for (int k = 0; k < 4; k++) {
            float g = clip * di[k];
            mi[k] = f.b1 * mi[k] + f.a1 * g;
            vi[k] = f.b2 * vi[k] + f.a2 * g * g;
            wi[k] = keep * wi[k] - f.rate * mi[k] / (sqrtf(vi[k]) * f.root + 1e-8f);
        }
        store(w + i, wi);
        store(rounded + i, wi);
        store(m + i, mi);
        store(v + i, vi);
        store(d + i, zero);
    }
}

static void update(Model* model, AdamW o) {
    ModelExtra* e = extra_of(model);
    Factors factors = adamw_factors(o);
    upload(&e->numbers->factors, &factors, sizeof factors);
    replay(&e->update, [&] {
        unsigned count = (unsigned)min_size(NORM_BLOCKS, blocks(model->block_size, THREADS * 4));
        launch(norm_kernel, count, THREADS, (GROUPS + 1) * sizeof(double), stream, e->results, model->gradients,
               model->block_size, e->numbers, (double*)workspace, counters);
        done("norm");
        launch(adamw_kernel, (unsigned)e->piece_count, THREADS, 0, stream, model->weights, e->rounded, model->gradients,
               model->moment1, model->moment2, e->pieces, e->numbers, e->results);
        done("adamw");
    });
}

static void wait(Model* model) {
    ModelExtra* e = extra_of(model);
    check(cudaMemcpyAsync(e->host_results, e->results, sizeof *e->results, cudaMemcpyDeviceToHost, stream));
    check(cudaMemsetAsync(&e->results->loss, 0, sizeof(double), stream));
    check(cudaStreamSynchronize(stream));
    model->loss_sum += e->host_results->loss;
    model->gradient_norm = e->host_results->norm;
}

inline float to_float(float x) { return x; }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// The first n numbers of a tensor that lies in rows of `width`, `stride` apart.
template <typename S> static void read_rows(float* to, const S* from, size_t n, size_t width, size_t stride) {
    size_t count = (n + width - 1) / width * stride;
    S* copy = (S*)allocate(count, sizeof(S), "a copy of activations");
    download(copy, from, count * sizeof(S));
    for (size_t i = 0; i < n; i++) to[i] = to_float(copy[i / width * stride + i % width]);
    free(copy);
}

// `tensor`, as the host knows it, tells which one is meant, and the table of what type it is.
static void read_activation(float* to, const Activations* a, const float* tensor, size_t n) {
    const Config c = extra_of(a)->config;
    const Tensors t = tensors_of(a);
#define READ(kind, type, field, width)                                                               \
    for (size_t l = 0; l < (kind == EACH || kind == CACHE ? c.L : 1); l++) {                         \
        type* p = ((type* const*)((const char*)&t + offsetof(Tensors, field)))[l];                   \
        if ((const void*)p == tensor)                                                                \
            return read_rows(to, p, n, width, (const void*)p == t.logits ? padded(width) : (width)); \
    }
    ACTIVATIONS(READ)
#undef READ
    die("no activation lies at %p", (const void*)tensor);
}

// The rate of a large multiply, operations a second. Of random numbers: of zeros it would be higher, as they take less
// power.
__global__ static void random_kernel(real* x) {
    uint32_t at = blockIdx.x * THREADS + threadIdx.x, bits = at * 2654435769u;
    bits = (bits ^ (bits >> 15)) * 2246822519u;
    put(x + at, (float)(bits >> 8) * (2.0f / (1 << 24)) - 1);
}

static double peak(void) {
#ifdef CUDA_ON_CPU // where it tells nothing
    enum { SIZE = 256, TIMES = 1 };
#else
    enum { SIZE = 4096, TIMES = 10 };
#endif
    real* x = device_memory<real>(3 * SIZE * SIZE, "a measurement");
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    launch(random_kernel, 3 * SIZE * SIZE / THREADS, THREADS, 0, stream, x);
    double best = 0;
    for (int i = 0; i < TIMES; i++) {
        float ms = 0;
        check(cudaEventRecord(begin, stream));
        matmul(x, matrix(x + SIZE * SIZE, SIZE), matrix(x + 2 * SIZE * SIZE, SIZE), NULL, (real*)NULL, SIZE, SIZE,
               SIZE);
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        check(cudaEventElapsedTime(&ms, begin, end));
        best = fmax(best, 2.0 * SIZE * SIZE * SIZE / (ms * 1e-3));
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    check(cudaFree(x));
    return best;
}

static const Device cuda = {start,      beyond_gpt2,      available, memory,   peak,   create_model, create_activations,
                            free_model, free_activations, forward,   backward, update, wait,         to_host,
                            to_device,  read_activation};

// ====================================================================================================================
// Comparison
//
// --compare trains the same steps on both devices from the same weights. In some of them each layer's end is marked, on
// the GPU by an event in the stream; these steps are started kernel by kernel. The others run as in training.

enum { COMPARED = 3, DEVICES = 2 };
typedef enum { FORWARD, BACKWARD, UPDATE, PASSES } Phase;

struct Mark {
    const char* layer;
    Phase phase;
    double time; // on the CPU
    cudaEvent_t event;
};
static std::vector<Mark> marks; // one is kept from step to step, with its event
static size_t mark_count;
static Phase phase;

static void mark(const char* layer) {
    if (mark_count == marks.size()) marks.emplace_back();
    Mark& m = marks[mark_count++];
    if (!strcmp(layer, "norm")) phase = UPDATE;
    m.layer = layer;
    m.phase = phase;
    m.time = seconds();
    if (device == &cuda && !m.event) check(cudaEventCreate(&m.event));
    if (device == &cuda) check(cudaEventRecord(m.event, stream));
    if (phase == FORWARD && !strcmp(layer, "loss"))
        phase = BACKWARD; // its last, which is also backward's first
    else if (!strcmp(layer, "embedding"))
        phase = FORWARD; // backward's last
}

static double milliseconds(size_t i) { // from mark i to the next
    float ms = 0;
    if (device != &cuda) return 1e3 * (marks[i + 1].time - marks[i].time);
    check(cudaEventElapsedTime(&ms, marks[i].event, marks[i + 1].event));
    return ms;
}

// Bytes read and written a second by a large copy.
static double copy_rate(void) {
    enum { BYTES = 1 << 28, TIMES = 4, PART = 1 << 20 };
    bool on_gpu = device == &cuda;
    char* x =
        on_gpu ? device_memory<char>(2 * (size_t)BYTES, "a measurement") : (char*)allocate(2, BYTES, "a measurement");
    double best = 0;
    for (int i = 0; i < TIMES; i++) {
        double begin = seconds();
        if (on_gpu) {
            check(cudaMemcpyAsync(x, x + BYTES, BYTES, cudaMemcpyDeviceToDevice, stream));
            check(cudaStreamSynchronize(stream));
        } else {
#pragma omp parallel for schedule(static)
            for (size_t at = 0; at < BYTES; at += PART) memcpy(x + at, x + BYTES + at, PART);
        }
        best = fmax(best, 2.0 * BYTES / (seconds() - begin));
    }
    if (on_gpu)
        check(cudaFree(x));
    else
        free(x);
    return best;
}

// What a step asks of a layer, forward and backward: operations or, where there are few of them, the reals that at
// least must be read and written.
struct Work {
    const char* layer;
    double operations, moved[PASSES];
};

static void print_layer(const Work* w, Phase p, double ms[DEVICES], const double peaks[DEVICES],
                        const double copies[DEVICES]) {
    static const char* const names[] = {"forward", "backward", "update"};
    if (!ms[0] && !ms[1]) return;
    printf("%-10s %-8s", w->layer, names[p]);
    for (int d = 0; d < DEVICES; d++) {
        double size = p == UPDATE || d == 0 ? sizeof(float) : sizeof(real);
        double share = w->operations > 0 ? w->operations * (p + 1) / peaks[d] : w->moved[p] * size / copies[d];
        if (ms[d])
            printf(" %10.3f ms %5.1f%%", ms[d], 100 * share / (ms[d] * 1e-3));
        else
            printf(" %20s", "in a multiply");
    }
    if (ms[0] && ms[1]) printf(" %8.1fx", ms[0] / ms[1]);
    putchar('\n');
}

static int compare(void) {
    const Device* const devices[DEVICES] = {&cpu, &cuda};
    static Run runs[DEVICES];
    double peaks[DEVICES], copies[DEVICES], losses[DEVICES][2 * COMPARED + 2], step_ms[DEVICES] = {};
    start(); // without a GPU, nothing need be begun
    for (int d = 0; d < DEVICES; d++) {
        Run* run = &runs[d];
        device = devices[d];
        run->tokenizer = load_tokenizer(data_path("tokenizer.bin"));
        Checkpoint file, *from = opt.init ? &file : NULL;
        if (from) file = open_checkpoint(weights_path(), "");
        Config config = run->model.config = choose_config(&run->tokenizer, from);
        run->B = (size_t)opt.batch;
        run->T = config.T;
        open_texts(run, config.V, NULL);
        printf("machine    %s\n", device->start());
        check_memory(config, run->B, true);
        peaks[d] = device->peak();
        copies[d] = copy_rate();
        create_model(run, from);
        if (from) close_checkpoint(from);
        printf("peak       %.0f GFLOP/s, copies %.0f GB/s\n", peaks[d] / 1e9, copies[d] / 1e9);
    }
    Config c = runs[0].model.config;
    double n = (double)opt.accumulate * (double)runs[0].B * (double)c.T, V = (double)c.V, C = (double)c.C,
           L = (double)c.L;
    double P = (double)runs[0].model.parameter_count, CCL = 2 * n * C * C * L, CL = n * C * L;
    print_config(c);
    printf(": %.0f parameters; %.0f tokens a step\n\n", P, n);
    const Work works[] = {{"embedding", 0, {3 * n * C, 3 * n * C}},
                          {"ln1", 0, {2 * CL, 4 * CL}},
                          {"qkv_w", 3 * CCL, {}},
                          {"attention", 2 * CL * (double)c.T, {}},
                          {"att_w", CCL, {}},
                          {"ln2", 0, {2 * CL, 4 * CL}},
                          {"fc_w", 4 * CCL, {}},
                          {"gelu", 0, {8 * CL, 12 * CL}},
                          {"mlp_w", 4 * CCL, {}},
                          {"lnf", 0, {2 * n * C, 4 * n * C}},
                          {"logits", 2 * n * C * V, {}},
                          {"loss", 0, {n * V, 2 * n * V}},
                          {"norm", 0, {0, 0, P}},
                          {"adamw", 0, {0, 0, 8 * P}}};
    enum { WORKS = sizeof works / sizeof *works };
    double ms[WORKS][PASSES][DEVICES] = {}, totals[PASSES][DEVICES] = {};
    // Of each kind of step the first is a trial: memory is touched, algorithms are chosen, graphs recorded.
    for (int d = 0; d < DEVICES; d++) {
        device = devices[d];
        for (int step = 0; step < 2 * COMPARED + 2; step++) {
            bool marked = step <= COMPARED, trial = step % (COMPARED + 1) == 0;
            layer_done = marked ? mark : NULL;
            mark_count = 0;
            phase = FORWARD;
            if (marked) mark("start");
            double begin = seconds();
            losses[d][step] = train_step(&runs[d]);
            if (trial) continue;
            if (!marked) step_ms[d] += 1e3 * (seconds() - begin) / COMPARED;
            for (size_t i = 0; i + 1 < mark_count; i++)
                for (int w = 0; w < WORKS; w++)
                    if (!strcmp(works[w].layer, marks[i + 1].layer)) {
                        ms[w][marks[i + 1].phase][d] += milliseconds(i) / COMPARED;
                        totals[marks[i + 1].phase][d] += milliseconds(i) / COMPARED;
                    }
        }
        layer_done = NULL;
    }
    printf("%-19s %20s %20s\n", "", "CPU       of peak", "GPU       of peak");
    for (int p = 0; p < PASSES; p++)
        for (int w = 0; w < WORKS; w++) print_layer(&works[w], (Phase)p, ms[w][p], peaks, copies);
    static const char* const names[] = {"forward", "backward", "update"};
    putchar('\n');
    for (int p = 0; p < PASSES; p++)
        printf("%-19s %10.3f ms        %10.3f ms        %8.1fx\n", names[p], totals[p][0], totals[p][1],
               totals[p][0] / totals[p][1]);
    double operations = (double)opt.accumulate * step_operations(c, runs[0].B, c.T);
    printf("%-19s %10.3f ms %5.1f%% %10.3f ms %5.1f%% %8.1fx\n\n", "a step in training", step_ms[0],
           100 * operations / peaks[0] / (step_ms[0] * 1e-3), step_ms[1],
           100 * operations / peaks[1] / (step_ms[1] * 1e-3), step_ms[0] / step_ms[1]);
    for (int step = 0; step < 2 * COMPARED + 2; step++)
        printf("step %d  loss %.6f on the CPU, %.6f on the GPU, difference %+.6f\n", step + 1, losses[0][step],
               losses[1][step], losses[1][step] - losses[0][step]);
    check_output();
    return 0;
}

} // namespace gpu

// Before main: this program's device is the GPU, unless --device says otherwise.
__attribute__((constructor)) static void register_device(void) {
    device = cuda_device = &gpu::cuda;
    compare_devices = gpu::compare;
}

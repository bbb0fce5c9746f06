// train_gpt.cu: train_gpt.c on an NVIDIA GPU. Needs the CUDA Toolkit (12 or 13) and a GPU of compute capability 8.0 or
// higher (Ampere, Ada, Hopper, ...), nothing else.
//
//     make train_gpt_cu && ./train_gpt_cu       the same options, files and output as ./train_gpt
//     ./train_gpt_cu --compare                  the CPU and the GPU side by side, kernel by kernel
//     make train_gpt_cu PRECISION=fp32          all in float32, to compare numbers with the CPU's
//     make train_gpt_cu MPI=1 && mpirun -n 8 ./train_gpt_cu     one model on eight GPUs; needs MPI and NCCL
//
// Read train_gpt.c first. Everything that is not arithmetic on tensors is taken from there. What follows are its layers
// again, in the same order under the same names; the mathematics is explained there, and here only what is special to a
// GPU. Its rooms:
//
//     errors and launches      every call is checked; the one place where kernels are started
//     memory                   16 bytes at a time; sums over the threads of a warp; copies to and from the host
//     matrix multiply          cuBLASLt's
//     layers                   embedding, layernorm, linear, gelu, cross-entropy
//     attention                a warp's multiply in the matrix units, and the layer made of it
//     model                    forward, backward and AdamW, recorded once and replayed
//     several GPUs             NCCL adds up their gradients while the backward pass runs
//     comparison               --compare
//
// A GPU runs a function, a "kernel", in very many threads at once. Threads come in blocks, which share some fast memory
// and can wait for one another; the 32 threads of a warp go through the program in step and can exchange registers.
// Hundreds of blocks run side by side in no particular order, and know nothing of one another: what they have in common
// is put together by the next kernel, which begins when all of them have ended. So there are no atomic additions and no
// fences here, every sum is taken in a fixed order, and the same run gives the same bits every time.
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
#ifdef WITH_MPI
#include <nccl.h>
#endif
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
    bool by_kernel = status >= cudaErrorIllegalAddress && status <= cudaErrorLaunchFailure;
    const char* advice = by_kernel ? "; CUDA_LAUNCH_BLOCKING=1 tells which kernel's fault it is" : "";
    if (status) die("%s failed: %s%s (train_gpt.cu, line %d)", call, cudaGetErrorString(status), advice, line);
}
static size_t multiplied[3]; // M, N, K of the latest multiply, if there was one
static void check_status(cublasStatus_t status, const char* call, int line) {
    char shape[100] = "";
    if (multiplied[0])
        snprintf(shape, sizeof shape, ", for (%zu,%zu) times (%zu,%zu)", multiplied[0], multiplied[2], multiplied[2],
                 multiplied[1]);
    if (status) die("%s failed: %s%s (train_gpt.cu, line %d)", call, cublasLtGetStatusName(status), shape, line);
}
#ifdef WITH_MPI
static void check_status(ncclResult_t status, const char* call, int line) {
    if (status)
        die("%s failed: %s; NCCL_DEBUG=WARN tells more (train_gpt.cu, line %d)", call, ncclGetErrorString(status),
            line);
}
#endif
#define check(call) check_status(call, #call, __LINE__)

static cudaStream_t stream; // all work is done in the order in which it is asked for

// A fault in a kernel is seen when somebody waits for the device, long after. With CUDA_LAUNCH_BLOCKING=1 in the
// environment, CUDA's own name for this, each kernel is waited for, and the one at fault is named.
static bool waits_for_each(void) {
    const char* text = getenv("CUDA_LAUNCH_BLOCKING");
    return text && *text && strcmp(text, "0");
}

static void (*kernel_done)(const char* name, double operations); // for --compare

static void launched(const char* name, cudaError_t status, double operations = 0) {
    if (!status && waits_for_each()) status = cudaStreamSynchronize(stream);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion)
        die("this program was compiled for other GPUs or drivers (%s): build it anew, here",
            cudaGetErrorString(status));
    if (status) die("%s failed: %s", name, cudaGetErrorString(status));
    if (kernel_done) kernel_done(name, operations);
}

// launch(kernel, grid, block, bytes of shared memory, stream, the kernel's arguments...)
#define launch(kernel, ...) launched(#kernel, start_kernel(#kernel, kernel, __VA_ARGS__))

#ifndef CUDA_ON_CPU
// Shared memory beyond 48 KB has to be asked for.
template <typename... Parameters, typename... Arguments>
static cudaError_t start_kernel(const char*, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                                cudaStream_t on, Arguments... arguments) {
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 << 10)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (status) return status;
    kernel<<<grid, block, shared_bytes, on>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
}

// The block's shared memory, of the size given at the launch.
template <typename T> __device__ inline T* shared_memory() {
    extern __shared__ uint4 block_memory[];
    return reinterpret_cast<T*>(block_memory);
}

__device__ inline void expect_aligned(const void*, size_t) {} // the device does
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

// What lies at p as a T, which must begin at a multiple of its alignment.
template <typename T, typename S> __device__ inline T& as(S* p) {
    expect_aligned(p, alignof(T));
    return *reinterpret_cast<T*>(p);
}

template <int W, typename S> __device__ inline void load(float (&x)[W], const S* from) {
    Pack<S, W> pack = as<const Pack<S, W>>(from);
    for (int i = 0; i < W; i++) x[i] = number(pack.x[i]);
}

template <int W, typename S> __device__ inline void store(S* to, const float (&x)[W]) {
    Pack<S, W> pack;
    for (int i = 0; i < W; i++) put(&pack.x[i], x[i]);
    as<Pack<S, W>>(to) = pack;
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

// The sum over a block, in every thread of it. shared: room for GROUPS.
__device__ inline double block_sum(double x, double* shared) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int i = 0; i < GROUPS; i++) x = i ? x + shared[i] : shared[i];
    return x;
}

// What all models share. The workspace belongs to whichever kernel runs.
enum { WORKSPACE = 32 << 20, STAGING = 1 << 18, STAGES = 16 };
static char* workspace;
static float* column_sums; // of a multiply, whose own the workspace is
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

static void join_gpus(void); // of several processes, each with one

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
    int number = cuda_number + world.neighbour;
    if (number >= count)
        die("there is no GPU %d, only 0 to %d%s", number, count - 1,
            world.size > 1 ? ", and each process needs one of its own" : "");
    check(cudaSetDevice(number));
    check(cudaGetDeviceProperties(&gpu, number));
    if (gpu.major < 8)
        die("%s has compute capability %d.%d, and 8.0 is needed; --device cpu does without", gpu.name, gpu.major,
            gpu.minor);
    snprintf(description, sizeof description, "%s, %d multiprocessors, %s", gpu.name, gpu.multiProcessorCount,
             sizeof(real) == 2 ? "bfloat16" : "float32");
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    check(cublasLtCreate(&multiplier));
    if (world.size > 1) join_gpus();
    workspace = device_memory<char>(WORKSPACE, "working space");
    column_sums = device_memory<float>(4 * MAX_SIZE, "sums of columns");
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
// cuBLASLt's. It takes matrices as Fortran does, column after column. Ours lie row after row, and what we call a row it
// calls a column: to it, each of our matrices is its own transpose. Therefore, where we want C = A B, it is asked for
// C' = B' A', the operands having changed places, and nothing is moved. An operand of ours that is a transpose is then,
// to it, the matrix itself.
//
// Which of its many algorithms suits a shape it says itself, and takes a while to. So the answer is kept: a plan, found
// again by all that the choice depends on. Algorithms that add up parts of a product in whatever order they come are
// ruled out. For a single row, column or product it may have none: then a plain kernel of ours does it.

// A matrix in memory: (rows,width) dense, or the transpose of that.
struct Matrix {
    const real* p;
    size_t width;
    bool is_transposed;
};
static Matrix matrix(const real* p, size_t width) { return {p, width, false}; }
static Matrix transposed(const real* p, size_t width) { return {p, width, true}; }

// What is done in the same kernel, to C (M,N) before it is stored: GELU, with its input kept in `at` (M,N), or GELU's
// derivative at the input kept there. Or, to B (K,N): the sums of its columns, written to `at` (N).
struct Folded {
    cublasLtEpilogue_t what;
    void* at;
};
static const Folded NOTHING = {CUBLASLT_EPILOGUE_DEFAULT, NULL};

inline cudaDataType_t type_of(const float*) { return CUDA_R_32F; }
inline cudaDataType_t type_of(const __nv_bfloat16*) { return CUDA_R_16BF; }

struct Plan {
    size_t key[11];
    bool is_plain; // cuBLASLt has no algorithm
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t a, b, c;
    cublasLtMatmulAlgo_t algorithm;
};
static std::vector<Plan> plans;

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

// may_fail: somebody knows what to do without, and what kind of error says that there is none does not matter.
static void choose_algorithm(Plan* plan, uint32_t alignment, bool may_fail) {
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
    if (!may_fail && status != CUBLAS_STATUS_NOT_SUPPORTED)
        check_status(status, "cublasLtMatmulAlgoGetHeuristic", __LINE__);
    plan->is_plain = status || !found;
    if (!plan->is_plain) plan->algorithm = choice.algo;
    check(cublasLtMatmulPreferenceDestroy(preference));
}

// A thread finds a number of C.
template <typename S>
__global__ static void plain_matmul_kernel(S* c, Matrix a, Matrix b, const real* bias, const S* add, float alpha,
                                           size_t M, size_t N, size_t K) {
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x, i = at / N, j = at % N;
    if (at >= M * N) return;
    float sum = 0;
    for (size_t k = 0; k < K; k++)
        sum += number(a.p[a.is_transposed ? k * a.width + i : i * a.width + k]) *
               number(b.p[b.is_transposed ? j * b.width + k : k * b.width + j]);
    sum *= alpha;
    if (bias) sum += number(bias[j]);
    if (add) sum += number(add[at]);
    put(&c[at], sum);
}

// c (M,N) = alpha times a (M,K) times b (K,N), plus bias (N), plus add (M,N), each of which may be NULL; with add == c
// the product is accumulated. c is of reals or of floats. False, and nothing done, if cuBLASLt cannot do what is to be
// folded in.
template <typename S>
[[nodiscard]] static bool matmul(S* c, Matrix a, Matrix b, const real* bias, const S* add, size_t M, size_t N, size_t K,
                                 float alpha, Folded folded) {
    cublasLtEpilogue_t epilogue =
        bias && folded.what == CUBLASLT_EPILOGUE_DEFAULT ? CUBLASLT_EPILOGUE_BIAS : folded.what;
    uint32_t alignment = ((size_t)a.p | (size_t)b.p | (size_t)c | (size_t)add) % 16 ? sizeof(real) : 16;
    const size_t key[] = {
        M,         N,           K,        a.width, b.width, a.is_transposed, b.is_transposed, (size_t)epilogue,
        sizeof(S), add != NULL, alignment};
    multiplied[0] = M, multiplied[1] = N, multiplied[2] = K;
    size_t i = 0;
    while (i < plans.size() && memcmp(plans[i].key, key, sizeof key)) i++;
    bool is_new = i == plans.size();
    if (is_new) {
        plans.emplace_back();
        Plan& plan = plans.back();
        memcpy(plan.key, key, sizeof key);
        check(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, b.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, a.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        plan.a = layout(type_of(b.p), b.width, b.is_transposed ? N : K);
        plan.b = layout(type_of(a.p), a.width, a.is_transposed ? K : M);
        plan.c = layout(type_of(c), N, M);
    }
    Plan& plan = plans[i];
    if (bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    if (folded.what == CUBLASLT_EPILOGUE_BGRADA)
        set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, folded.at);
    else if (folded.at) {
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, folded.at);
        set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)N);
    }
    if (is_new) choose_algorithm(&plan, alignment, folded.at || M == 1 || N == 1 || K == 1);
    double operations = 2.0 * (double)M * (double)N * (double)K;
    if (plan.is_plain && folded.at) return false;
    if (plan.is_plain) {
        launched("plain_matmul_kernel",
                 start_kernel("plain_matmul_kernel", plain_matmul_kernel<S>, blocks(M * N, THREADS), THREADS, 0, stream,
                              c, a, b, bias, add, alpha, M, N, K),
                 operations);
        return true;
    }
    float beta = add ? 1 : 0;
    check(cublasLtMatmul(multiplier, plan.operation, &alpha, b.p, plan.a, a.p, plan.b, &beta, add ? add : c, plan.c, c,
                         plan.c, &plan.algorithm, workspace, WORKSPACE, stream));
    launched("cublasLtMatmul", cudaSuccess, operations);
    return true;
}

// The same with nothing folded in, which always can be done.
template <typename S>
static void matmul(S* c, Matrix a, Matrix b, const real* bias, const S* add, size_t M, size_t N, size_t K,
                   float alpha = 1) {
    (void)matmul(c, a, b, bias, add, M, N, K, alpha, NOTHING);
}

// ====================================================================================================================
// Layers
//
// Each is a kernel or two and a function that starts them, with the same name as in train_gpt.c and the same arguments,
// but for three: embedding_backward wants the rows in the order of their tokens, attention_backward room to work in, and
// cross_entropy does what are two functions there.

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

// dwte[token] += dx. A token occurs in many rows, which must be added up in a fixed order. So the host sorts the rows by
// token, and a block takes all rows of one: block i those which begin at the i-th place of the list `order`, if a
// token's rows begin there; else it has nothing to do. Of order (2,rows), the first half is that list, and the second
// says how many rows the token has that begins there, 0 where none does. For the tokens 7 3 7 7 it is
//     1 0 2 3    rows: that of token 3, then those of token 7
//     1 3 0 0    one row from the first place on, three from the second
static void sort_rows(int* order, const int* tokens, size_t rows, size_t V) {
    int* place = (int*)allocate(V + 1, sizeof(int), "the order of tokens"); // a counting sort
    for (size_t i = 0; i < rows; i++) place[tokens[i] + 1]++;
    memset(order + rows, 0, rows * sizeof(int));
    for (size_t v = 0; v < V; v++) {
        if (place[v + 1]) order[rows + (size_t)place[v]] = place[v + 1];
        place[v + 1] += place[v];
    }
    for (size_t i = 0; i < rows; i++) order[place[tokens[i]]++] = (int)i;
    free(place);
}

// A block's warps take the token's rows in turn.
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

// Sums over rows are taken in two stages. Each block writes its own, a row of `partial` (count,n) of floats, and the
// next kernel adds those up: a block takes WARP columns, and its warps the rows in turn. The sums of columns from C on
// belong to `second`.
enum { LEAST_SLICE = 64 };
static size_t most_slices = 512;

__global__ static void add_slices_kernel(float* first, float* second, const float* partial, size_t count, size_t C,
                                         size_t n) {
    size_t c = blockIdx.x * WARP + threadIdx.x % WARP;
    float sum[1] = {};
#pragma unroll 4 // asks for several at once
    for (size_t i = threadIdx.x / WARP; c < n && i < count; i += GROUPS) sum[0] += partial[i * n + c];
    add_warps(sum, shared_memory<float>());
    if (threadIdx.x >= WARP || c >= n) return;
    if (c < C)
        first[c] += sum[0];
    else
        second[c - C] += sum[0];
}

static void add_slices(float* first, float* second, const float* partial, size_t count, size_t C) {
    size_t n = second ? 2 * C : C;
    launch(add_slices_kernel, blocks(n, WARP), THREADS, THREADS * sizeof(float), stream, first, second, partial, count,
           C, n);
}

// A block takes a slice of the rows, then the next one that is nobody's, and so on. In each slice a warp first finds dx
// of a row, as in the forward pass. Then a thread takes N columns at a time and adds up dy n and dy over the slice, which
// by now is near at hand: so dy and x come from afar once. partial (blocks,2,C).
enum { LAYERNORM_SLICE = 16 };
template <int W>
__global__ static void layernorm_backward_kernel(real* dx, const real* dy, const real* x, const float* mean,
                                                 const float* rstd, const float* w, size_t rows, size_t C,
                                                 float* partial) {
    constexpr int N = W < 2 ? W : 2;
    size_t lane = threadIdx.x % WARP * W;
    partial += blockIdx.x * 2 * C;
    for (size_t start = (size_t)blockIdx.x * LAYERNORM_SLICE; start < rows;
         start += (size_t)gridDim.x * LAYERNORM_SLICE) {
        size_t end = start + LAYERNORM_SLICE < rows ? start + LAYERNORM_SLICE : rows;
        for (size_t row = start + threadIdx.x / WARP; row < end; row += GROUPS) {
            size_t at = row * C;
            float m = mean[row], r = rstd[row], g[W], n[W], scale[W], old[W], g_sum = 0, gn_sum = 0;
            for (size_t c = lane; c < C; c += WARP * W) {
                load(g, dy + at + c);
                load(n, x + at + c);
                load(scale, w + c);
                for (int i = 0; i < W; i++) {
                    g_sum += g[i] * scale[i];
                    gn_sum += g[i] * scale[i] * ((n[i] - m) * r);
                }
            }
            float g_avg = warp_sum(g_sum) / (float)C, gn_avg = warp_sum(gn_sum) / (float)C;
            for (size_t c = lane; c < C; c += WARP * W) {
                load(g, dy + at + c);
                load(n, x + at + c);
                load(scale, w + c);
                load(old, dx + at + c);
                for (int i = 0; i < W; i++) old[i] += r * (g[i] * scale[i] - g_avg - (n[i] - m) * r * gn_avg);
                store(dx + at + c, old);
            }
        }
        for (size_t c = threadIdx.x * N; c < C; c += THREADS * N) {
            float w_sum[N] = {}, b_sum[N] = {}, g[N], n[N];
            if (start != (size_t)blockIdx.x * LAYERNORM_SLICE) {
                load(w_sum, partial + c);
                load(b_sum, partial + C + c);
            }
#pragma unroll 4
            for (size_t row = start; row < end; row++) {
                load(g, dy + row * C + c);
                load(n, x + row * C + c);
                for (int i = 0; i < N; i++) {
                    w_sum[i] += g[i] * ((n[i] - mean[row]) * rstd[row]);
                    b_sum[i] += g[i];
                }
            }
            store(partial + c, w_sum);
            store(partial + C + c, b_sum);
        }
    }
}

static void layernorm_backward(real* dx, float* dw, float* db, const real* dy, const real* x, const float* mean,
                               const float* rstd, const float* w, size_t rows, size_t C) {
    size_t room = WORKSPACE / (2 * C * sizeof(float)),
           count = min_size(blocks(rows, LAYERNORM_SLICE), min_size(most_slices, room));
    with_width(C, [&](auto W) {
        launch(layernorm_backward_kernel<W>, (unsigned)count, THREADS, 0, stream, dx, dy, x, mean, rstd, w, rows, C,
               (float*)workspace);
    });
    add_slices(dw, db, (const float*)workspace, count, C);
}

// db += sum of dy over all rows. Block (i,j) takes WARP * W columns of slice j of the rows; its warps take the slice's
// rows in turn. partial (slices,C).
template <int W>
__global__ static void sum_rows_kernel(float* partial, const real* dy, size_t rows, size_t C, size_t slice) {
    size_t lane = threadIdx.x % WARP, group = threadIdx.x / WARP, c = (blockIdx.x * WARP + lane) * W;
    size_t end = (blockIdx.y + 1) * slice < rows ? (blockIdx.y + 1) * slice : rows;
    float sum[W] = {}, g[W];
#pragma unroll 4
    for (size_t row = blockIdx.y * slice + group; c < C && row < end; row += GROUPS) {
        load(g, dy + row * C + c);
        for (int i = 0; i < W; i++) sum[i] += g[i];
    }
    add_warps(sum, shared_memory<float>());
    if (group == 0 && c < C) store(partial + blockIdx.y * C + c, sum);
}

static void sum_rows(float* db, const real* dy, size_t rows, size_t C) {
    size_t most = min_size(most_slices, WORKSPACE / (C * sizeof(float))), slice = (rows + most - 1) / most;
    if (slice < LEAST_SLICE) slice = LEAST_SLICE;
    with_width(C, [&](auto W) {
        launch(sum_rows_kernel<W>, dim3(blocks(C, WARP * W), blocks(rows, slice)), THREADS, THREADS * W * sizeof(float),
               stream, (float*)workspace, dy, rows, C, slice);
    });
    add_slices(db, NULL, (const float*)workspace, blocks(rows, slice), C);
}

// Bias and residual are added by the multiply before it stores its sums, so that a layernorm finds them added.
static void linear_forward(real* y, const real* x, const real* w, const real* b, const real* residual, size_t rows,
                           size_t IC, size_t OC) {
    matmul(y, matrix(x, IC), matrix(w, OC), b, residual, rows, OC, IC);
}

// The weights' gradient is summed in float32, onto what is there. The multiply, which reads dy anyway, can find the sums
// of its columns, where cuBLASLt has an algorithm for that; they are then added to db. (It could find those of dfc while
// it computes dfc, but only in dfc's own type: CUBLASLT_EPILOGUE_DGELU_BGRAD.)
static void linear_backward(real* dx, float* dw, float* db, const real* dy, const real* x, const real* w, size_t rows,
                            size_t IC, size_t OC) {
    if (dx) matmul(dx, matrix(dy, OC), transposed(w, OC), NULL, (real*)NULL, rows, IC, OC);
    Folded sums = {CUBLASLT_EPILOGUE_BGRADA, column_sums};
    if (matmul(dw, transposed(x, IC), matrix(dy, OC), NULL, dw, IC, OC, rows, 1, sums))
        return add_slices(db, NULL, column_sums, 1, OC);
    matmul(dw, transposed(x, IC), matrix(dy, OC), NULL, dw, IC, OC, rows);
    sum_rows(db, dy, rows, OC);
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
// e^(logit - largest), as attention does; then these are put together, neighbour by neighbour. If GRADIENT, dlogits are
// written over the logits at once, while the row is near at hand, but not yet multiplied by the row's share of the loss:
// that is left to the multiplies that read them. The padding's are 0. Rows are `stride` apart.
template <bool GRADIENT>
__global__ static void cross_entropy_kernel(float* losses, float* lse, real* logits, const int* targets, unsigned V,
                                            unsigned stride) {
    unsigned lane = threadIdx.x % WARP, group = threadIdx.x / WARP, row = blockIdx.x;
    float largest = -INFINITY, sum = 0, x[WIDTH];
    logits += (size_t)row * stride;
    for (unsigned v = threadIdx.x * WIDTH; v < V; v += THREADS * WIDTH) {
        load(x, logits + v);
        float most = largest;
        for (unsigned i = 0; i < WIDTH; i++) most = v + i < V ? fmaxf(most, x[i]) : most;
        sum *= expf(largest - most);
        for (unsigned i = 0; i < WIDTH; i++) sum += v + i < V ? expf(x[i] - most) : 0;
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
    for (int i = 0; i < GROUPS; i++) most = fmaxf(most, warps[i]);
    sum = 0;
    for (int i = 0; i < GROUPS; i++) sum += warps[GROUPS + i] == 0 ? 0 : warps[GROUPS + i] * expf(warps[i] - most);
    float row_lse = most + logf(sum);
    unsigned target = (unsigned)targets[row];
    if (threadIdx.x == 0) {
        lse[row] = row_lse;
        losses[row] = row_lse - number(logits[target]);
    }
    if (!GRADIENT) return;
    __syncthreads(); // before that logit is overwritten
    for (unsigned v = threadIdx.x * WIDTH; v < stride; v += THREADS * WIDTH) {
        load(x, logits + v);
        for (unsigned i = 0; i < WIDTH; i++)
            x[i] = v + i < V ? expf(x[i] - row_lse) - (v + i == target ? 1.0f : 0.0f) : 0;
        store(logits + v, x);
    }
}

// cross_entropy_forward and, if with_gradient, cross_entropy_backward with a scale of 1. The logits' rows are padded_V(V)
// long.
static void cross_entropy(float* losses, float* lse, real* logits, const int* targets, size_t rows, size_t V,
                          bool with_gradient) {
    size_t bytes = 2 * GROUPS * sizeof(float);
    if (with_gradient)
        launch(cross_entropy_kernel<true>, (unsigned)rows, THREADS, bytes, stream, losses, lse, logits, targets,
               (unsigned)V, (unsigned)padded_V(V));
    else
        launch(cross_entropy_kernel<false>, (unsigned)rows, THREADS, bytes, stream, losses, lse, logits, targets,
               (unsigned)V, (unsigned)padded_V(V));
}

// ====================================================================================================================
// Attention
//
// It works on tiles as on the CPU, but tiles of a size that fits a block's shared memory, and each warp keeps its sums in
// registers. (The steps that lead here are in dev/learn/cuda/attention.cu.) First come a warp's means: the multiply, and
// the copies in the background; then the forward pass, then the backward pass.
//
// What a warp multiplies at a time is 16 x 16 by 16 x 8, the shape of the matrix units' instruction. In that, each of
// the 32 threads holds certain elements of each operand, its "fragment". With row = thread / 4 and
// column = 2 (thread % 4), the pairs of neighbours that a thread has are
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

// Copies 8 or 16 bytes from global to shared memory in the background; if not `valid`, zeros, and `from` is not looked
// at. Copies are gathered in groups; cp_async_wait<N> returns when all but the last N groups are there.
template <int BYTES> __device__ inline void cp_async(void* to, const void* from, bool valid) {
    uint32_t shared = (uint32_t)__cvta_generic_to_shared(to), bytes = valid ? BYTES : 0;
    if (BYTES == 16) // these pass by the first cache, which has no use for what is in shared memory
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
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

// In float32 there is no such instruction. The same functions for that stand at the end of this room.
__device__ inline void load_a(float2 a[4], const float* tile, int width);
__device__ inline void load_b(float2 b[2][2], const float* tile, int width);
__device__ inline void load_b_trans(float2 b[2][2], const float* tile, int width);
__device__ inline void mma(float c[4], const float2 a[4], const float2 b[2]);
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

// Starts to copy a tile of ROWS rows from x, whose rows are `width` apart; zeros for rows from `valid` on and for
// columns from D on. A thread keeps to its column and goes down the rows, STEP at a time: all that changes from copy to
// copy is an address. Rows that do not begin at multiples of 16 bytes are copied one number at a time.
template <int HEAD, int ROWS>
__device__ inline void load_tile(real* tile, const real* x, size_t width, int valid, int D) {
    constexpr int PACKS = HEAD / WIDTH, STEP = ATTENTION_THREADS / PACKS, ROW = Tiling<HEAD>::ROW;
    int row = threadIdx.x / PACKS, c = threadIdx.x % PACKS * WIDTH;
    real* to = tile + row * ROW + c;
    const real* from = x + row * width + c;
    if (row >= STEP) return; // where the threads are no multiple of PACKS
    if (D % WIDTH == 0) {
        valid = c < D ? valid - row : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r += STEP, from += STEP * width)
            if (ROWS % STEP == 0 || r + row < ROWS) cp_async<16>(to + r * ROW, from, r < valid);
    } else
        for (int r = row; r < ROWS; r += STEP, to += STEP * ROW, from += STEP * width)
            for (int k = 0; k < WIDTH; k++) put(to + k, r < valid && c + k < D ? number(from[k]) : 0);
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
                join(as<pair>(to), left, right);
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
    int D = C / H, h = blockIdx.x % H, Q = T - start, i = start + blockIdx.x / H % Q,
        c = blockIdx.y * THREADS + threadIdx.x;
    size_t b = blockIdx.x / H / Q, row = b * Q + i - start;
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
// weights are computed in both: seven products of a tile instead of five. To have five, blocks of different keys would
// have to add to the same dq, in memory. In whatever order they come, the same run would have other bits. In the order
// of keys, each block waiting for the one before, it hangs if the device starts them in another order, which it may. And
// if each has a dq of its own, these are T/64 times as large as dq, in float32: at T = 1024 that is 800 MB for a layer
// of GPT-2 and 16 sequences, to be written and read, which takes longer than the two products.
//
// The first works on the transposed tile, keys by queries: there weights and ds come out in the form in which they are
// multiplied by dout and q. It takes 16 queries at a time.
template <int HEAD>
__global__ static void __launch_bounds__(ATTENTION_THREADS)
    attention_backward_keys_kernel(real* dqkv, const real* dout, const real* qkv, const float2* rows, int T, int C,
                                   int H, int heads) {
    constexpr int ROW = Tiling<HEAD>::ROW, QUERIES = Tiling<HEAD>::TILE_ROWS, KEYS = ATTENTION_WARPS * 16;
    static_assert(KEYS % QUERIES == 0, "a block's first key is the first query of a tile");
    int D = C / H, head = blockIdx.x % heads, b = head / H, h = head % H, warp = threadIdx.x / WARP;
    int first = blockIdx.x / heads * KEYS, key0 = first + warp * 16;
    size_t first_row = (size_t)b * T;
    const real *q = qkv + first_row * 3 * C + h * D, *d_o = dout + first_row * C + h * D;
    real* tiles = shared_memory<real>();
    float2* tile_rows = &as<float2>(tiles + 4 * QUERIES * ROW); // (2,QUERIES)
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

    // Queries from i0 on, their gradients and their two numbers start on their way. Beyond T all are 0, and add nothing.
    auto fetch = [&](int i0, int stage) {
        real* to = tiles + stage * 2 * QUERIES * ROW;
        load_tile<HEAD, QUERIES>(to, q + (size_t)i0 * 3 * C, 3 * C, T - i0, D);
        load_tile<HEAD, QUERIES>(to + QUERIES * ROW, d_o + (size_t)i0 * C, C, T - i0, D);
        int i = i0 + threadIdx.x;
        if (threadIdx.x < QUERIES) cp_async<8>(tile_rows + stage * QUERIES + threadIdx.x, rows + i, i < T);
    };
    float dk[HEAD / 8][4] = {}, dv[HEAD / 8][4] = {};
    fetch(first, 0);
    cp_async_commit();
    for (int i0 = first, stage = 0; i0 < T; i0 += QUERIES, stage ^= 1) {
        if (i0 + QUERIES < T) fetch(i0 + QUERIES, stage ^ 1);
        cp_async_commit();
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

// The multiply of 16 x 16 by 16 x 8 in float32: fragments as above, but the threads of a warp tell one another their
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
    size_t model, B, T;
    float share; // of a backward pass in the step; of a forward pass, whether one follows
    size_t times;
    cudaGraphExec_t graph;
};

template <typename Work> static void replay(Recording* r, Work work) {
    if (!r || layer_done || waits_for_each() || !r->times) {
        if (r) r->times++;
        return work();
    }
    if (!r->graph) {
        cudaGraph_t graph = NULL;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work();
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&r->graph, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    check(cudaGraphLaunch(r->graph, stream));
}

// A part of a tensor, for one block of AdamW's: where it begins in the parameters, and in the moments.
enum { PIECE = 1 << 13 };
struct Piece {
    size_t first, moment;
    unsigned size;
    bool decays;
};

// What comes back.
struct Results {
    double loss, norm; // loss: the sum since it was last read
    float clip;        // what clipping leaves of the gradient; NAN: no step is made
};

// What a model has here beside its blocks.
struct ModelExtra {
    size_t id, piece_count, seen_uploads;
    real* rounded;
    Rounded w;
    Piece* pieces;
    Factors* factors; // of the update
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

// The head, lnf to losses, is done in parts of so many rows that cuBLASLt and 32 bits can count their logits, of which
// there can be more than 2^31; with --recompute, of far fewer. If they fit at once, the gradient that cross_entropy
// leaves in their place is kept. If not, each part takes the place of the one before, and the backward pass computes
// them again.
static size_t most_logits = INT32_MAX, few_logits = 1 << 26;
static size_t head_rows(size_t V) {
    size_t rows = (recompute ? few_logits : most_logits) / padded_V(V);
    return rows ? rows : 1;
}

static ModelExtra* extra_of(const Model* m) { return (ModelExtra*)m->extra; }
static ActivationsExtra* extra_of(const Activations* a) { return (ActivationsExtra*)a->extra; }

static size_t activation_bytes(Activations* a, Config config, void* block) {
    a->logit_rows = head_rows(config.V);
    config.V = padded_V(config.V);
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
    size_t floats = training ? 2 * (model.block_size + model.moment_size) : model.block_size;
    return model.block_size * sizeof(real) + floats * sizeof(float) + pieces * sizeof(Piece) +
           activations_memory(config, B, T, training) + (training ? activations_memory(config, 1, T, false) : 0);
}

static float* zeroed_block(size_t size, const char* what) {
    float* block = device_memory<float>(size, what);
    check(cudaMemsetAsync(block, 0, size * sizeof(float), stream));
    return block;
}

static void create_model(Model* model, bool training) {
    static size_t models;
    start();
    describe_parameters(model);
    ModelExtra* e = (ModelExtra*)allocate(1, sizeof *e, "the model");
    model->extra = e;
    e->id = ++models;
    model->weights = zeroed_block(model->block_size, "the parameters");
    e->rounded = device_memory<real>(model->block_size, "the rounded parameters");
    e->factors = device_memory<Factors>(1, "numbers");
    e->results = device_memory<Results>(1, "results");
    check(cudaMemsetAsync(e->results, 0, sizeof *e->results, stream));
    check(cudaMallocHost((void**)&e->host_results, sizeof *e->host_results));
    point_parameters(&model->w, model, model->weights);
    Piece* pieces = (Piece*)allocate(model->block_size / PIECE + model->tensor_count, sizeof(Piece), "pieces");
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        real* rounded = e->rounded + t->offset;
        memcpy((char*)&e->w + t->slot, &rounded, sizeof rounded);
        size_t n = cache_lines(t->owned * sizeof(float)) / sizeof(float), first = t->offset + t->own;
        for (size_t at = 0; at < n; at += PIECE)
            pieces[e->piece_count++] = {first + at, t->moment + at, (unsigned)min_size(PIECE, n - at), t->rows > 0};
    }
    if (training) {
        model->gradients = zeroed_block(model->block_size, "the gradients");
        model->moment1 = zeroed_block(model->moment_size, "AdamW's first moments");
        model->moment2 = zeroed_block(model->moment_size, "AdamW's second moments");
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
                            e->rounded,     e->pieces,        e->factors,     e->results};
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
static Recording* recording(const Model* model, Activations* a, Recording::Pass pass, size_t B, size_t T, float share) {
    ActivationsExtra* e = extra_of(a);
    Recording *r = e->recordings, *end = r + e->recording_count;
    while (r < end &&
           (r->pass != pass || r->model != extra_of(model)->id || r->B != B || r->T != T || r->share != share))
        r++;
    if (r < end) return r;
    if (e->recording_count == RECORDINGS) return NULL;
    *r = {pass, extra_of(model)->id, B, T, share, 0, NULL};
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
    double sum = 0;
    for (size_t i = threadIdx.x; i < rows; i += THREADS) sum += losses[i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) results->loss += sum / (double)rows;
}

// The MLP's first half. In training GELU comes along with the multiply where the matrix units' arithmetic is all that is
// asked for, and cuBLASLt has an algorithm for it; fc keeps its input. Generation has too few rows for that to matter, and
// for a single row there may be no algorithm. With --recompute it is found twice, from the same fc, so that both find the
// same.
static bool gelu_is_folded_in(bool training, size_t rows, size_t C) {
    return training && !recompute && rows > 1 && sizeof(real) == 2 && C % WIDTH == 0;
}

static void head_forward(const Model* model, const Activations* activations, size_t first, size_t rows,
                         bool with_gradient) {
    Tensors a = tensors_of(activations);
    size_t V = model->config.V, C = model->config.C;
    matmul(a.logits, matrix(a.lnf + first * C, C), transposed(extra_of(model)->w.wte, C), NULL, (const real*)NULL, rows,
           padded_V(V), C); // the padding's logits come out as 0, and are never looked at
    done("logits");
    cross_entropy(a.losses + first, a.logits_lse + first, a.logits, extra_of(activations)->targets + first, rows, V,
                  with_gradient);
    done("loss");
}

// As cpu_forward. tokens and targets are on the device already.
static void run_forward(Model* model, Activations* activations, bool with_targets, bool training, size_t B, size_t T,
                        size_t start) {
    const Parameters* p = &model->w;
    const Rounded* w = &extra_of(model)->w;
    const ActivationsExtra* e = extra_of(activations);
    Tensors a = tensors_of(activations);
    size_t V = model->config.V, C = model->config.C, L = model->config.L, Q = T - start, rows = B * Q;
    Attention shape = attention_of(model->config, B, T, start);
    embedding_forward(a.embedded, e->tokens, p->wte, p->wpe, B, Q, start, C);
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
        bool folded = gelu_is_folded_in(activations->training, rows, C) &&
                      matmul(a.gelu[l], matrix(a.ln2[l], C), matrix(w->fc_w[l], 4 * C), w->fc_b[l], none, rows, 4 * C,
                             C, 1, Folded{CUBLASLT_EPILOGUE_GELU_AUX_BIAS, a.fc[l]});
        if (!folded) linear_forward(a.fc[l], a.ln2[l], w->fc_w[l], w->fc_b[l], none, rows, C, 4 * C);
        done("fc_w");
        if (!folded) {
            gelu_forward(a.gelu[l], a.fc[l], rows * 4 * C);
            done("gelu");
        }
        linear_forward(a.out[l], a.gelu[l], w->mlp_w[l], w->mlp_b[l], a.mid[l], rows, 4 * C, C);
        done("mlp_w");
        x = a.out[l];
    }
    layernorm_forward(a.lnf, a.lnf_mean, a.lnf_rstd, x, p->lnf_w, p->lnf_b, rows, C);
    done("lnf");
    if (!with_targets) {
        matmul(a.logits, matrix(a.lnf + (rows - 1) * C, C), transposed(w->wte, C), NULL, none, 1, padded_V(V), C);
        return done("logits");
    }
    size_t part = head_rows(V);
    for (size_t first = 0; first < rows; first += part)
        head_forward(model, activations, first, min_size(part, rows - first), training && rows <= part);
    launch(mean_loss_kernel, 1, THREADS, GROUPS * sizeof(double), stream, extra_of(model)->results, a.losses, rows);
    done("loss");
}

static void forward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                    size_t start, bool training) {
    ModelExtra* m = extra_of(model);
    size_t rows = B * (T - start);
    if (m->seen_uploads != uploads) // the host may have written weights
        launch(round_kernel, blocks(model->block_size, THREADS * WIDTH), THREADS, 0, stream, m->rounded, model->weights,
               model->block_size);
    m->seen_uploads = uploads;
    upload(extra_of(a)->tokens, tokens, rows * sizeof(int));
    if (!targets) return run_forward(model, a, false, false, B, T, start);
    upload(extra_of(a)->targets, targets, rows * sizeof(int));
    replay(recording(model, a, Recording::FORWARD, B, T, training),
           [&] { run_forward(model, a, true, training, B, T, 0); });
    model->loss_count += 1;
}

static void run_backward(Model* model, Activations* activations, size_t B, size_t T, float share) {
    const Parameters *p = &model->w, *d = &model->d;
    const Rounded* w = &extra_of(model)->w;
    const ActivationsExtra* e = extra_of(activations);
    Tensors a = tensors_of(activations);
    size_t V = model->config.V, C = model->config.C, L = model->config.L, rows = B * T;
    Attention shape = attention_of(model->config, B, T, 0);
    const real* none = NULL;
    size_t part = head_rows(V);
    for (size_t first = 0, n; first < rows; first += n) {
        n = min_size(part, rows - first);
        if (rows > part) head_forward(model, activations, first, n, true);
        float scale = share / (float)rows;
        matmul(a.dnormed + first * C, matrix(a.logits, padded_V(V)), matrix(w->wte, C), NULL, none, n, C, padded_V(V),
               scale);
        done("logits");
        matmul(d->wte, transposed(a.logits, padded_V(V)), matrix(a.lnf + first * C, C), NULL, d->wte, padded_V(V), C, n,
               scale);
        done("logits");
    }
    check(cudaMemsetAsync(a.dresidual, 0, rows * C * sizeof(real), stream));
    const real* x = a.out[L - 1];
    layernorm_backward(a.dresidual, d->lnf_w, d->lnf_b, a.dnormed, x, a.lnf_mean, a.lnf_rstd, p->lnf_w, rows, C);
    done("lnf");
    for (size_t l = L; l-- > 0;) {
        x = l > 0 ? a.out[l - 1] : a.embedded;
        if (recompute) {
            layernorm_forward(a.ln1[l], a.ln1_mean[l], a.ln1_rstd[l], x, p->ln1_w[l], p->ln1_b[l], rows, C);
            layernorm_forward(a.ln2[l], a.ln2_mean[l], a.ln2_rstd[l], a.mid[l], p->ln2_w[l], p->ln2_b[l], rows, C);
            gelu_forward(a.gelu[l], a.fc[l], rows * 4 * C);
        }
        bool folded = gelu_is_folded_in(activations->training, rows, C) &&
                      matmul(a.dfc, matrix(a.dresidual, C), transposed(w->mlp_w[l], C), NULL, none, rows, 4 * C, C, 1,
                             Folded{CUBLASLT_EPILOGUE_DGELU, a.fc[l]});
        linear_backward(folded ? NULL : a.dfc, d->mlp_w[l], d->mlp_b[l], a.dresidual, a.gelu[l], w->mlp_w[l], rows,
                        4 * C, C);
        done("mlp_w");
        if (!folded) {
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

// tokens and targets must be the forward pass's; all but the order of tokens is on the device still.
static void backward(Model* model, Activations* a, const int* tokens, const int* targets, size_t B, size_t T,
                     float share) {
    (void)targets;
    size_t rows = B * T;
    int* order = (int*)allocate(2 * rows, sizeof(int), "the order of tokens");
    sort_rows(order, tokens, rows, model->config.V);
    upload(extra_of(a)->order, order, 2 * rows * sizeof(int));
    free(order);
    replay(recording(model, a, Recording::BACKWARD, B, T, share), [&] { run_backward(model, a, B, T, share); });
}

// The gradient's norm, and what clipping leaves of it: each block sums its share of the squares, then one block adds up
// the blocks' sums. n is a multiple of 4.
enum { NORM_BLOCKS = 1024 };
__global__ static void norm_kernel(double* partial, const float* d, size_t n) {
    double sum = 0;
    float x[4];
    for (size_t i = ((size_t)blockIdx.x * THREADS + threadIdx.x) * 4; i < n; i += (size_t)gridDim.x * THREADS * 4) {
        load(x, d + i);
        for (int k = 0; k < 4; k++) sum += (double)x[k] * x[k];
    }
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ static void clip_kernel(Results* results, const double* partial, unsigned count, const Factors* factors) {
    double sum = 0;
    for (unsigned i = threadIdx.x; i < count; i += THREADS) sum += partial[i];
    sum = block_sum(sum, shared_memory<double>());
    if (threadIdx.x > 0) return;
    double norm = sqrt(sum), clip = factors->clip;
    results->norm = norm;
    results->clip = clip > 0 && clip < norm + 1e-6 ? (float)(clip / (norm + 1e-6)) : 1;
    if (!isfinite(norm) || !isfinite(results->loss)) results->clip = NAN;
}

// All tensors in one launch, a block for each piece. It also rounds the new weights for the multiplies.
__global__ static void adamw_kernel(float* w, real* rounded, float* d, float* m, float* v, const Piece* pieces,
                                    const Factors* factors, const Results* results) {
    Piece piece = pieces[blockIdx.x];
    Factors f = *factors;
    float keep = piece.decays ? f.keep : 1, clip = results->clip, wi[4], di[4], mi[4], vi[4];
    const float zero[4] = {};
    if (isnan(clip)) return;
    for (size_t i = piece.first + threadIdx.x * 4; i < piece.first + piece.size; i += THREADS * 4) {
        size_t j = i - piece.first + piece.moment;
        load(wi, w + i);
        load(di, d + i);
        load(mi, m + j);
        load(vi, v + j);
        for (int k = 0; k < 4; k++) {
            float g = clip * di[k];
            mi[k] = f.b1 * mi[k] + f.a1 * g;
            vi[k] = f.b2 * vi[k] + f.a2 * g * g;
            wi[k] = keep * wi[k] - f.rate * mi[k] / (sqrtf(vi[k]) * f.root + 1e-8f);
        }
        store(w + i, wi);
        store(rounded + i, wi);
        store(m + j, mi);
        store(v + j, vi);
        store(d + i, zero);
    }
}

static void sum_over_gpus(double* x, size_t n); // each number, over all processes

static void update(Model* model, AdamW o) {
    ModelExtra* e = extra_of(model);
    Factors factors = adamw_factors(o);
    upload(e->factors, &factors, sizeof factors);
    replay(world.size > 1 ? NULL : &e->update, [&] { // NCCL's work is not recorded
        unsigned count = (unsigned)min_size(NORM_BLOCKS, blocks(model->block_size, THREADS * 4));
        double* partial = (double*)workspace;
        launch(norm_kernel, count, THREADS, GROUPS * sizeof(double), stream, partial, model->gradients,
               model->block_size);
        if (world.size > 1) sum_over_gpus(partial, count);
        launch(clip_kernel, 1, THREADS, GROUPS * sizeof(double), stream, e->results, partial, count, e->factors);
        done("norm");
        launch(adamw_kernel, (unsigned)e->piece_count, THREADS, 0, stream, model->weights, e->rounded, model->gradients,
               model->moment1, model->moment2, e->pieces, e->factors, e->results);
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
#define READ(kind, type, field, width)                                                                 \
    for (size_t l = 0; l < (kind == EACH || kind == AGAIN || kind == CACHE ? c.L : 1); l++) {          \
        type* p = ((type* const*)((const char*)&t + offsetof(Tensors, field)))[l];                     \
        if ((const void*)p == tensor)                                                                  \
            return read_rows(to, p, n, width, (const void*)p == t.logits ? padded_V(width) : (width)); \
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

// clang-format off
static const Device cuda = {start, available, memory, peak, create_model, create_activations,
                            free_model, free_activations, forward, backward, update, wait,
                            to_host, to_device, read_activation, beyond_gpt2};
// clang-format on

// ====================================================================================================================
// Several GPUs
//
// As in train_gpt.c's room "several processes", with one GPU for each. What lies on the GPUs is moved by NCCL: from one to
// the other, past the host, and added up on the way. NCCL works in a stream of its own, `messages`. When the backward
// pass has come through a layer, an event in `stream` says so, and `messages`, which waits for it, adds up the layer's
// gradients, while `stream` goes on with the layer below. Everything is started by the host in the order in which all
// processes start it, as NCCL demands.
//
// Sums are taken in NCCL's order, which is the same for the same GPUs in the same places.

#ifdef WITH_MPI
static ncclComm_t processes;
static cudaStream_t messages;
static cudaEvent_t computed, moved; // in `stream`, in `messages`

static void join_gpus(void) {
    ncclUniqueId id;
    if (!world.rank) check(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    check(ncclCommInitRank(&processes, world.size, id, world.rank));
    check(cudaStreamCreateWithFlags(&messages, cudaStreamNonBlocking));
    check(cudaEventCreateWithFlags(&computed, cudaEventDisableTiming));
    check(cudaEventCreateWithFlags(&moved, cudaEventDisableTiming));
    world.neighbours = 1; // nobody shares this GPU's memory
}

// Does move() in `messages`, after what was started in `stream`.
template <typename Move> static void send_off(Move move) {
    check(cudaEventRecord(computed, stream));
    check(cudaStreamWaitEvent(messages, computed, 0));
    check(ncclGroupStart());
    move();
    check(ncclGroupEnd());
}

// What is started in `stream` from now on comes after what was sent off.
static void await_messages(void) {
    check(cudaEventRecord(moved, messages));
    check(cudaStreamWaitEvent(stream, moved, 0));
}

static void sum_over_gpus(double* x, size_t n) {
    send_off([&] { check(ncclAllReduce(x, x, n, ncclDouble, ncclSum, processes, messages)); });
    await_messages();
}

typedef enum { REDUCE_SCATTER, ALL_GATHER } Move;

// Of a tensor in a block, each part is summed up over all processes where it belongs; or is sent from there to all.
static void move_tensor(Move move, float* block, const Tensor* t) {
    float *whole = block + t->offset, *own = whole + t->own;
    size_t lines = cache_lines(t->size * sizeof(float)) / 64, N = (size_t)world.size;
    if (lines % N == 0) { // all parts are equal
        size_t n = lines / N * 64 / sizeof(float);
        if (move == REDUCE_SCATTER)
            check(ncclReduceScatter(whole, own, n, ncclFloat, ncclSum, processes, messages));
        else
            check(ncclAllGather(own, whole, n, ncclFloat, processes, messages));
        return;
    }
    for (int r = 0; r < world.size; r++) {
        size_t from = part_start(t->size, r), n = part_start(t->size, r + 1) - from;
        float* part = whole + from;
        if (n && move == REDUCE_SCATTER)
            check(ncclReduce(part, part, n, ncclFloat, ncclSum, r, processes, messages));
        else if (n)
            check(ncclBroadcast(part, part, n, ncclFloat, r, processes, messages));
    }
}

static void send_layer(long layer) {
    const Model* m = exchange.model;
    send_off([&] {
        for (size_t i = 0; i < m->tensor_count; i++)
            if (m->tensors[i].layer == layer) move_tensor(REDUCE_SCATTER, m->gradients, &m->tensors[i]);
    });
}

static void shared_update(Model* model, AdamW o) {
    double told = signalled != 0;
    send_layer(-1); // what is no layer's, as embeddings
    await_messages();
    for (size_t i = 0; i < model->tensor_count; i++) { // what was sent away becomes 0
        const Tensor* t = &model->tensors[i];
        float* d = model->gradients + t->offset;
        size_t end = t->own + t->owned;
        check(cudaMemsetAsync(d, 0, t->own * sizeof(float), stream));
        check(cudaMemsetAsync(d + end, 0, (t->size - end) * sizeof(float), stream));
    }
    sum_over_gpus(&extra_of(model)->results->loss, 1);
    model->loss_count *= world.size;
    update(model, o);
    send_off([&] {
        for (size_t i = 0; i < model->tensor_count; i++) move_tensor(ALL_GATHER, model->weights, &model->tensors[i]);
    });
    await_messages();
    uploads++; // the others' weights are not rounded yet
    sum_over_processes(&told, 1);
    world.stopping = told > 0;
    exchange.batches = 0;
}

// The gradients become all processes' moments or, with NULL, zero.
static void gather(const Model* model, const float* moments) {
    if (!moments) return check(cudaMemsetAsync(model->gradients, 0, model->block_size * sizeof(float), stream));
    for (const Tensor* t = model->tensors; t < model->tensors + model->tensor_count; t++)
        check(cudaMemcpyAsync(model->gradients + t->offset + t->own, moments + t->moment, t->owned * sizeof(float),
                              cudaMemcpyDeviceToDevice, stream));
    send_off([&] {
        for (size_t i = 0; i < model->tensor_count; i++) move_tensor(ALL_GATHER, model->gradients, &model->tensors[i]);
    });
    await_messages();
    check(cudaStreamSynchronize(stream));
}

static void use_nccl(Device* together) {
    together->update = shared_update, exchange.send_layer = send_layer, exchange.gather = gather;
}
#else
static void join_gpus(void) {}
static void sum_over_gpus(double*, size_t) {}
#endif

// ====================================================================================================================
// Comparison
//
// --compare trains the same steps on both devices from the same weights on the same random tokens, or on the one that
// --device names. In some steps each kernel's end is marked by an event in the stream, and on the CPU each layer's; these
// are started kernel by kernel. The others run as in training.

enum { COMPARED = 3, DEVICES = 2 };
typedef enum { FORWARD, BACKWARD, UPDATE, PASSES } Phase;
static const char* const phase_names[] = {"forward", "backward", "update"};

struct Mark {
    const char *layer, *kernel;
    Phase phase;
    double operations, time; // time: the CPU's
    cudaEvent_t event;
};
static std::vector<Mark> marks; // kept from step to step, with their events
static size_t mark_count, layer_began;
static Phase phase;

static void mark(const char* kernel, double operations) {
    if (mark_count == marks.size()) marks.emplace_back();
    Mark& m = marks[mark_count++];
    m.layer = m.kernel = kernel, m.operations = operations, m.phase = phase, m.time = seconds();
    if (device == &cuda && !m.event) check(cudaEventCreate(&m.event));
    if (device == &cuda) check(cudaEventRecord(m.event, stream));
}

// The kernels since the last layer were this one's.
static void mark_layer(const char* layer) {
    if (device == &cpu) mark(layer, 0);
    for (; layer_began < mark_count; layer_began++) marks[layer_began].layer = layer;
}

static double milliseconds(size_t i) { // from mark i - 1 to mark i
    float ms = 0;
    if (device != &cuda) return 1e3 * (marks[i].time - marks[i - 1].time);
    check(cudaEventElapsedTime(&ms, marks[i - 1].event, marks[i].event));
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

// A row of the table: what a kernel, all its calls in a pass and all layers together, takes; on the CPU a layer.
struct Row {
    Phase phase;
    const char *layer, *kernel;
    size_t calls;
    double ms, operations;
};

static void add_row(std::vector<Row>& rows, const Mark& m, double ms) {
    size_t i = 0;
    while (i < rows.size() &&
           (rows[i].phase != m.phase || strcmp(rows[i].layer, m.layer) || strcmp(rows[i].kernel, m.kernel)))
        i++;
    if (i == rows.size()) rows.push_back({m.phase, m.layer, m.kernel, 0, 0, 0});
    rows[i].calls++, rows[i].ms += ms, rows[i].operations += m.operations;
}

// What a call of a kernel computes, or else the bytes that at least it must read and write, n being the tokens. Multiplies
// say it themselves. Kernels that are not here have little to do. Of the logits, a call has as many as a part of the head.
static double work_of(const char* kernel, Config c, double n, double parameters, bool* is_bytes) {
    double C = (double)c.C, product = n * C * (double)c.T, row = n * C * sizeof(real),
           logits = n * (double)padded_V(c.V) / blocks((size_t)n, head_rows(c.V));
    const struct {
        const char* kernel;
        double operations, bytes;
    } table[] = {{"embedding_forward_kernel", 0, row + 2 * n * C * sizeof(float)},
                 {"token_gradient_kernel", 0, row + 2 * n * C * sizeof(float)},
                 {"position_gradient_kernel", 0, row},
                 {"layernorm_forward_kernel", 0, 2 * row},
                 {"layernorm_backward_kernel", 0, 4 * row},
                 {"attention_forward_kernel", 2 * product, 0},
                 {"attention_rows_kernel", 0, 2 * row},
                 {"attention_backward_keys_kernel", 4 * product, 0},
                 {"attention_backward_queries_kernel", 3 * product, 0},
                 {"gelu_forward_kernel", 0, 8 * row},
                 {"gelu_backward_kernel", 0, 12 * row},
                 {"cross_entropy_kernel<false>", 0, logits * sizeof(real)},
                 {"cross_entropy_kernel<true>", 0, 2 * logits * sizeof(real)},
                 {"norm_kernel", 0, parameters * sizeof(float)},
                 {"adamw_kernel", 0, parameters * (8 * sizeof(float) + sizeof(real))}};
    for (const auto& t : table)
        if (!strncmp(kernel, t.kernel, strlen(t.kernel))) {
            *is_bytes = t.bytes > 0;
            return t.operations + t.bytes;
        }
    return 0;
}

static double compared_step(Model* model, Activations* a, const int* tokens, size_t B, size_t step) {
    size_t T = model->config.T;
    for (size_t i = 0; i < (size_t)opt.accumulate; i++) {
        phase = FORWARD;
        device->forward(model, a, tokens, tokens + B * T, B, T, 0, true);
        phase = BACKWARD;
        device->backward(model, a, tokens, tokens + B * T, B, T, 1 / (float)opt.accumulate);
    }
    phase = UPDATE;
    AdamW o = {opt.lr, opt.beta1, opt.beta2, opt.weight_decay, opt.clip, step + 1};
    device->update(model, o);
    return take_loss(model);
}

struct Compared {
    const char* machine;
    double peak, copies, ms; // operations and bytes a second; a step in training
    double layers_ms[PASSES];
    std::vector<double> losses;
    std::vector<Row> rows;
};

static Compared compare_on(const Device* on, const Checkpoint* from, Config config, size_t B) {
    Compared c = {};
    Run run;
    memset(&run, 0, sizeof run);
    device = on;
    c.machine = device->start();
    printf("machine    %s\n", c.machine);
    check_memory(config, B, FOR_TRAINING);
    c.peak = device->peak();
    c.copies = copy_rate();
    printf("peak       %.3g TFLOP/s, copies %.0f GB/s\n", c.peak / 1e12, c.copies / 1e9);
    run.model.config = config;
    run.B = B, run.T = config.T;
    create_model(&run, from);
    size_t n = B * config.T;
    int* tokens = (int*)allocate(2 * n, sizeof(int), "a batch");
    for (size_t i = 0; i < 2 * n; i++) tokens[i] = (int)(random_bits(random_bits((uint64_t)opt.seed, 1), i) % config.V);
    auto step = [&] { c.losses.push_back(compared_step(&run.model, &run.a, tokens, B, c.losses.size())); };
    // Of each kind of step the first ones are a trial: memory is touched, algorithms are chosen, graphs recorded.
    kernel_done = mark, layer_done = mark_layer;
    for (int i = 0; i <= COMPARED; i++) {
        mark_count = layer_began = 0;
        phase = FORWARD;
        mark("start", 0);
        step();
        for (size_t k = 1; i > 0 && k < mark_count; k++) {
            add_row(c.rows, marks[k], milliseconds(k) / COMPARED);
            c.layers_ms[marks[k].phase] += milliseconds(k) / COMPARED;
        }
    }
    kernel_done = NULL, layer_done = NULL;
    for (int i = 0; i < 2; i++) step();
    double begin = seconds(), end = begin;
    int steps = 0;
    for (; steps < COMPARED || (end - begin < 2 && on != &cpu); steps++, end = seconds()) step();
    c.ms = 1e3 * (seconds() - begin) / steps;
    device->free_activations(&run.a), device->free_activations(&run.sampler), device->free_model(&run.model);
    free(tokens);
    return c;
}

static void print_rows(const Compared& c, Config config, double n, double parameters, const Compared* other) {
    printf("%-9s %-10s %-34s %5s %10s %17s %6s", "", "", "", "calls", "ms", "", "of it");
    puts(other ? "     CPU ms  times" : "");
    for (int p = 0; p < PASSES; p++)
        for (size_t i = 0; i < c.rows.size(); i++) {
            const Row& r = c.rows[i];
            if ((int)r.phase != p) continue;
            double calls = (double)r.calls / COMPARED, work = r.operations / COMPARED, rate = 0;
            bool is_bytes = false, first = true;
            if (!work) work = calls * work_of(r.kernel, config, n / (double)opt.accumulate, parameters, &is_bytes);
            rate = work / (r.ms * 1e-3);
            int name = (int)strcspn(r.kernel, "<"); // without the template's arguments
            printf("%-9s %-10s %-34.*s %5.0f %10.3f", phase_names[p], r.layer, name, r.kernel, calls, r.ms);
            if (work > 0)
                printf(" %8.1f %-8s %5.1f%%", rate / (is_bytes ? 1e9 : 1e12), is_bytes ? "GB/s" : "TFLOP/s",
                       100 * rate / (is_bytes ? c.copies : c.peak));
            else
                printf(" %24s", "");
            double layer_ms = 0, other_ms = 0;
            for (const Row& same : c.rows)
                if (same.phase == r.phase && !strcmp(same.layer, r.layer)) {
                    first = first && (layer_ms > 0 || !strcmp(same.kernel, r.kernel));
                    layer_ms += same.ms;
                }
            for (size_t k = 0; other && k < other->rows.size(); k++)
                if (other->rows[k].phase == r.phase && !strcmp(other->rows[k].layer, r.layer))
                    other_ms += other->rows[k].ms;
            if (first && other_ms > 0) printf(" %10.3f %6.1f", other_ms, other_ms / layer_ms);
            puts("");
        }
    putchar('\n');
    for (int p = 0; p < PASSES; p++) printf("%-60s %10.3f ms\n", phase_names[p], c.layers_ms[p]);
}

static void compare(void) {
    Checkpoint file, *from = opt.init ? &file : NULL;
    if (from) file = open_checkpoint(weights_path(), "");
    Config config = choose_config(NULL, from);
    if (!config.V) config.V = opt.preset ? 50257 : 1024; // GPT-2's, or prepare_data.py's
    size_t B = (size_t)opt.batch;
    bool wants[DEVICES] = {!opt.device || !strcmp(opt.device, "cpu"), !opt.device || strcmp(opt.device, "cpu")};
    Compared c[DEVICES] = {};
    if (wants[1]) device = &cuda, start(); // without a GPU, nothing need be begun
    for (int d = 0; d < DEVICES; d++)
        if (wants[d]) c[d] = compare_on(d ? &cuda : &cpu, from, config, B);
    if (from) close_checkpoint(from);
    Model model;
    model.config = config;
    describe_parameters(&model);
    free(model.tensors);
    double n = (double)opt.accumulate * (double)(B * config.T), parameters = (double)model.parameter_count;
    const char* name = opt.preset ? opt.preset : "the model";
    print_config(config);
    printf(": %.0f parameters; %.0f tokens a step\n\n", parameters, n);
    const Compared& shown = c[wants[1]];
    print_rows(shown, config, n, parameters, wants[0] && wants[1] ? &c[0] : NULL);
    for (size_t i = 0; wants[0] && wants[1] && i < 2 * COMPARED; i++)
        printf("step %zu  loss %.6f on the CPU, %.6f on the GPU, difference %+.6f\n", i + 1, c[0].losses[i],
               c[1].losses[i], c[1].losses[i] - c[0].losses[i]);
    double operations = (double)opt.accumulate * step_operations(config, B, config.T);
    puts("\n| machine | model | batch | ms a step | tokens/s | TFLOP/s | of its own multiply's "
         "|\n|---|---|---|---|---|---|---|");
    for (int d = 0; d < DEVICES; d++)
        if (wants[d])
            printf("| %s | %s | %zu x %zu | %.2f | %.0f | %.1f | %.1f%% |\n", c[d].machine, name, B, config.T, c[d].ms,
                   n / (c[d].ms * 1e-3), operations / (c[d].ms * 1e9), 100 * operations / c[d].peak / (c[d].ms * 1e-3));
}

} // namespace gpu

// Before main: this program's device is the GPU, unless --device says otherwise.
__attribute__((constructor)) static void register_device(void) {
    device = cuda_device = &gpu::cuda;
#ifdef WITH_MPI
    exchange.use_nccl = gpu::use_nccl;
#endif
    compare_devices = gpu::compare;
}

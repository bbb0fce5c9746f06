// test_cuda_on_cpu.cpp: does cuda_on_cpu.h see errors in kernels? Each kind of error that it is there for is made here
// once, beside the same without the error. Part of make test.

#define NO_MAIN
#include "../../train_gpt.c"
#include "cuda_on_cpu.h"

#include <sys/wait.h>

#define launch(kernel, ...) start_kernel(#kernel, kernel, __VA_ARGS__)

static int passed, failed;

static void expect(bool good, const char* what) {
    (good ? passed : failed)++;
    if (!good) printf("cuda_on_cpu: %s\n", what);
}

// That `work` ends the process with status 1 and one line with `text`; or, without text, that it ends well.
template <typename Work> static void ends(const char* text, const char* what, Work work) {
    int ends[2], status = 0;
    char line[4096] = "";
    if (pipe(ends)) die("no pipe");
    fflush(stdout);
    pid_t id = fork();
    if (id == 0) {
        dup2(ends[1], 2);
        work();
        _exit(0);
    }
    close(ends[1]);
    size_t n = 0;
    for (ssize_t got; n < sizeof line - 1 && (got = read(ends[0], line + n, sizeof line - 1 - n)) > 0;)
        n += (size_t)got;
    close(ends[0]);
    waitpid(id, &status, 0);
    bool good =
        text ? WIFEXITED(status) && WEXITSTATUS(status) == 1 && strstr(line, text) && strchr(line, '\n') == line + n - 1
             : WIFEXITED(status) && WEXITSTATUS(status) == 0;
    expect(good, what);
    if (!good) printf("    status %x, stderr: %s\n", (unsigned)status, line);
}

static cudaStream_t stream;
enum { N = 64 };

template <typename S> static S* device_array(size_t n) {
    void* p;
    if (cudaMalloc(&p, n * sizeof(S))) die("no memory");
    return (S*)p;
}
template <typename S> static std::vector<S> fetch(const S* from, size_t n) {
    std::vector<S> x(n);
    cudaMemcpyAsync(x.data(), from, n * sizeof(S), cudaMemcpyDeviceToHost, stream);
    cudaStreamSynchronize(stream);
    return x;
}
template <typename S> static void send(S* to, const S* from, size_t n) {
    cudaMemcpyAsync(to, from, n * sizeof(S), cudaMemcpyHostToDevice, stream);
    cudaStreamSynchronize(stream);
}

// ====================================================================================================================
// Kernels

// Turns a block's numbers round, once with the barrier that this needs.
template <bool BARRIER> __global__ static void turn_round(int* x) {
    int* shared = shared_memory<int>();
    shared[threadIdx.x] = (int)(100 * blockIdx.x + threadIdx.x);
    if (BARRIER) __syncthreads();
    x[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Each block takes the number after the one before's, which no order of blocks promises.
__global__ static void number_blocks(int* next, int* x) {
    if (threadIdx.x == 0) x[blockIdx.x] = (*next)++;
}

// A warp's lanes hand over numbers in memory, with and without waiting for one another.
template <bool WAIT> __global__ static void hand_over(int* x) {
    x[threadIdx.x] = (int)threadIdx.x;
    if (WAIT) __syncwarp();
    x[32 + threadIdx.x] = x[threadIdx.x ^ 1];
}

__global__ static void read_at(float* x, ptrdiff_t at) { x[0] = x[at]; }
__global__ static void write_at(float* x, ptrdiff_t at) { x[at] = 1; }
__global__ static void write_shared_at(ptrdiff_t at) { shared_memory<float>()[at] = 1; }
__global__ static void read_shared(float* x) { x[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }
__global__ static void half_wait() {
    if (threadIdx.x < N / 2) __syncthreads();
}
__global__ static void two_places() {
    if (threadIdx.x < N / 2)
        __syncthreads();
    else
        __syncthreads();
}
__global__ static void half_shuffle(float* x) {
    if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.0f, 1);
}
__global__ static void shuffles(int* x) {
    int i = (int)threadIdx.x;
    x[i] = __shfl_xor_sync(0xffffffff, i, 3) * 100 + __shfl_sync(0xffffffff, i, 5);
}
template <bool WAIT> __global__ static void copy_in_background(float* to, const float* from) {
    float* shared = shared_memory<float>();
    cp_async<16>(shared + 4 * threadIdx.x, from + 4 * threadIdx.x, threadIdx.x % 2);
    cp_async_commit();
    if (WAIT) cp_async_wait<0>();
    for (int i = 0; i < 4; i++) to[4 * threadIdx.x + i] = shared[4 * threadIdx.x + i];
}
__global__ static void copy_askew(const float* from) { cp_async<16>(shared_memory<float>(), from + 1, true); }

// c (16,8) = a (16,16) times b (16,8), fragments filled by the figures of the PTX manual; or with two of A's exchanged.
template <bool RIGHT> __global__ static void product(float* c, const float* a, const float* b) {
    int row = (int)threadIdx.x / 4, column = (int)threadIdx.x % 4 * 2;
    uint32_t fa[4], fb[2];
    float fc[4] = {};
    for (int i = 0; i < 4; i++) {
        int r = row + (RIGHT ? i % 2 : i / 2) * 8, k = column + (RIGHT ? i / 2 : i % 2) * 8;
        __nv_bfloat162 both = __floats2bfloat162_rn(a[r * 16 + k], a[r * 16 + k + 1]);
        memcpy(&fa[i], &both, 4);
    }
    for (int i = 0; i < 2; i++) {
        __nv_bfloat162 both = __floats2bfloat162_rn(b[(column + 8 * i) * 8 + row], b[(column + 8 * i + 1) * 8 + row]);
        memcpy(&fb[i], &both, 4);
    }
    mma_bf16(fc, fa, fb);
    for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * 8 + column + i % 2] = fc[i];
}

// Four 8 x 8 matrices of the numbers 0, 1, ...; each thread's pairs.
template <bool TRANSPOSED> __global__ static void load_matrices(uint32_t* x) {
    uint16_t* shared = shared_memory<uint16_t>();
    for (int i = 0; i < 8; i++) shared[threadIdx.x * 8 + i] = (uint16_t)(threadIdx.x * 8 + i);
    __syncwarp();
    uint32_t r[4];
    if (TRANSPOSED)
        ldmatrix_x4_trans(r, shared + threadIdx.x * 8);
    else
        ldmatrix_x4(r, shared + threadIdx.x * 8);
    for (int i = 0; i < 4; i++) x[threadIdx.x * 4 + i] = r[i];
}

__global__ static void add(int* x, int what) { x[0] += what; }
__global__ static void expect_alignment(const float* x, size_t to) { expect_aligned(x, to); }

// ====================================================================================================================
// Checks

// Whether a kernel's result is the same in all orders of threads and blocks, and what it is.
template <typename Start> static bool one_result(std::vector<int>* result, size_t n, Start start) {
    static const char* const orders[] = {"forward", "backward", "shuffled"};
    bool same = true;
    for (int i = 0; i < 3; i++) {
        int* x = device_array<int>(n);
        setenv("CUDA_ON_CPU_ORDER", orders[i], 1);
        start(x);
        std::vector<int> now = fetch(x, n);
        same = same && (i == 0 || now == *result);
        *result = now;
        cudaFree(x);
    }
    unsetenv("CUDA_ON_CPU_ORDER");
    return same;
}

static void check_orders() {
    std::vector<int> x;
    bool same = one_result(&x, 3 * N, [](int* p) { launch(turn_round<true>, 3, N, N * sizeof(int), stream, p); });
    for (int i = 0; i < 3 * N; i++) same = same && x[(size_t)i] == 100 * (i / N) + N - 1 - i % N;
    expect(same, "a correct kernel has another result");
    same = one_result(&x, N, [](int* p) { launch(turn_round<false>, 1, N, N * sizeof(int), stream, p); });
    expect(!same, "a missing barrier is not seen");
    expect(one_result(&x, 64, [](int* p) { launch(hand_over<true>, 1, 32, 0, stream, p); }), "a correct warp differs");
    expect(!one_result(&x, 64, [](int* p) { launch(hand_over<false>, 1, 32, 0, stream, p); }),
           "lanes that do not wait for one another are not seen");
    expect(!one_result(&x, 5,
                       [](int* p) {
                           int* next = device_array<int>(1);
                           cudaMemsetAsync(next, 0, sizeof *next, stream);
                           launch(number_blocks, 4, N, 0, stream, next, p);
                       }),
           "blocks that depend on their order are not seen");
}

static void check_memory() {
    float* x = device_array<float>(N);
    auto at = [=](void (*kernel)(float*, ptrdiff_t), ptrdiff_t i) {
        return [=] {
            launch(kernel, 1, 1, 0, stream, x, i);
            cudaStreamSynchronize(stream);
        };
    };
    ends(NULL, "the last number can be read", at(read_at, N - 1));
    ends(NULL, "the last number can be written", at(write_at, N - 1));
    ends("0 bytes beyond memory of 256 bytes", "a read beyond the end", at(read_at, N));
    ends("0 bytes beyond memory of 256 bytes", "a write beyond the end", at(write_at, N));
    ends("100 bytes beyond", "a write far beyond the end", at(write_at, N + 25));
    ends("4 bytes before memory", "a write before the beginning", at(write_at, -1));
    ends("beyond memory of 10 bytes", "a write just beyond an odd end", [] {
        launch(write_at, 1, 1, 0, stream, (float*)device_array<char>(10), (ptrdiff_t)2);
        cudaStreamSynchronize(stream);
    });
    auto shared_at = [](ptrdiff_t i) {
        return [=] {
            launch(write_shared_at, 1, 1, N * sizeof(float), stream, i);
            cudaStreamSynchronize(stream);
        };
    };
    ends(NULL, "all shared memory can be written", shared_at(N - 1));
    ends("beyond shared memory of 256 bytes", "a write beyond shared memory", shared_at(N));
    ends("before memory of 256 bytes", "a write before shared memory", shared_at(-1));
    ends("after it was freed", "memory used after it was freed", [=] {
        launch(write_at, 1, 1, 0, stream, x, (ptrdiff_t)0);
        cudaStreamSynchronize(stream);
        auto kernel = [=] { x[0] = 1; };
        cudaFree(x);
        kernel();
    });
    ends("the host reads or writes the device's memory", "the device's memory used on the host", [=] { x[0] = 1; });
    ends("a pointer that is not to the device's memory", "host memory given to a kernel", [] {
        float host[N];
        launch(write_at, 1, 1, 0, stream, host, (ptrdiff_t)0);
        cudaStreamSynchronize(stream);
    });
    ends("is not in the device's memory", "a copy the wrong way round", [=] {
        float host[N];
        cudaMemcpy(host, x, sizeof host, cudaMemcpyHostToDevice);
    });
    for (size_t to = 8; to <= 16; to *= 2)
        ends(to == 8 ? NULL : "16 bytes at once, at an address that is not a multiple", "an address that is askew",
             [=] {
                 launch(expect_alignment, 1, 1, 0, stream, x + 2, to);
                 cudaStreamSynchronize(stream);
             });
    launch(read_at, 1, 1, 0, stream, x, (ptrdiff_t)5);
    expect(isnan(fetch(x, 1)[0]), "what was never written is not NaN");
    launch(read_shared, 1, N, N * sizeof(float), stream, x);
    expect(isnan(fetch(x, N)[N - 1]), "shared memory that was never written is not NaN");
}

static void check_barriers() {
    auto run = [](auto... kernel) {
        return [=] {
            launch(kernel..., 2, N, 0, stream);
            cudaStreamSynchronize(stream);
        };
    };
    ends("not all threads reach a barrier", "a barrier that half of the threads reach", run(half_wait));
    ends("not all threads reach a barrier", "two barriers for one", run(two_places));
    ends("to do something together", "a shuffle that half of the lanes reach", [] {
        launch(half_shuffle, 1, N, 0, stream, device_array<float>(N));
        cudaStreamSynchronize(stream);
    });
    ends("grid of (0,1,1)", "a grid of no blocks", [] { launch(half_wait, 0, N, 0, stream); });
    ends("blocks of 2048 threads", "too many threads", [] { launch(half_wait, 1, 2048, 0, stream); });
    ends("bytes of shared memory", "too much shared memory", [] { launch(half_wait, 1, N, 1 << 20, stream); });
}

static void check_warps() {
    int* x = device_array<int>(N);
    launch(shuffles, 1, N, 0, stream, x);
    std::vector<int> got = fetch(x, N);
    bool good = true;
    for (int i = 0; i < N; i++) good = good && got[(size_t)i] == (i ^ 3) * 100 + i / 32 * 32 + 5;
    expect(good, "shuffles");

    float *from = device_array<float>(4 * N), *to = device_array<float>(4 * N), host[4 * N];
    for (int i = 0; i < 4 * N; i++) host[i] = (float)i;
    send(from, host, 4 * N);
    launch(copy_in_background<true>, 1, N, 4 * N * sizeof(float), stream, to, from);
    std::vector<float> copied = fetch(to, 4 * N);
    good = true;
    for (int i = 0; i < 4 * N; i++) good = good && copied[(size_t)i] == (i / 4 % 2 ? (float)i : 0);
    expect(good, "copies in the background do not arrive");
    launch(copy_in_background<false>, 1, N, 4 * N * sizeof(float), stream, to, from);
    expect(isnan(fetch(to, 4 * N)[5]), "a copy that was not waited for has arrived");
    ends("not a multiple of 16", "a copy from an odd address", [=] {
        launch(copy_askew, 1, 1, 16, stream, from);
        cudaStreamSynchronize(stream);
    });

    for (int transposed = 0; transposed < 2; transposed++) {
        uint32_t* r = device_array<uint32_t>(128);
        if (transposed)
            launch(load_matrices<true>, 1, 32, 512, stream, r);
        else
            launch(load_matrices<false>, 1, 32, 512, stream, r);
        std::vector<uint32_t> pairs = fetch(r, 128);
        good = true;
        for (uint32_t i = 0; i < 128; i++)
            for (uint32_t e = 0; e < 2; e++) {
                uint32_t row = i / 4 / 4, column = i / 4 % 4 * 2 + e, matrix_ = i % 4;
                uint32_t right = 64 * matrix_ + (transposed ? column * 8 + row : row * 8 + column);
                good = good && (pairs[i] >> 16 * e & 0xffff) == right;
            }
        expect(good, transposed ? "ldmatrix.trans" : "ldmatrix");
    }

    float a[256], b[128], *da = device_array<float>(256), *db = device_array<float>(128),
                          *dc = device_array<float>(128);
    for (int i = 0; i < 256; i++) a[i] = (float)(int)(random_bits(1, (uint64_t)i) % 9) - 4;
    for (int i = 0; i < 128; i++) b[i] = (float)(int)(random_bits(2, (uint64_t)i) % 9) - 4;
    send(da, a, 256);
    send(db, b, 128);
    for (int right = 0; right < 2; right++) {
        if (right)
            launch(product<true>, 1, 32, 0, stream, dc, da, db);
        else
            launch(product<false>, 1, 32, 0, stream, dc, da, db);
        std::vector<float> c = fetch(dc, 128);
        good = true;
        for (size_t i = 0; i < 128; i++) {
            float sum = 0;
            for (size_t k = 0; k < 16; k++) sum += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
            good = good && c[i] == sum;
        }
        expect(good == (bool)right, right ? "mma's product" : "a wrong fragment is not seen");
    }
}

// c = a b for one row, two columns and K numbers, as cuBLASLt sees it; NAN if it knows no way.
static float cublas_product(size_t M, size_t K, const float* a, const float* b, cublasLtEpilogue_t epilogue,
                            float* sums) {
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t la, lb, lc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t choice;
    int found = 0;
    std::vector<__nv_bfloat16> x(M * K), y(K * 2);
    for (size_t i = 0; i < M * K; i++) x[i] = __float2bfloat16(a[i]);
    for (size_t i = 0; i < K * 2; i++) y[i] = __float2bfloat16(b[i]);
    __nv_bfloat16 *A = device_array<__nv_bfloat16>(M * K), *B = device_array<__nv_bfloat16>(K * 2);
    float *C = device_array<float>(M * 2), *bias = device_array<float>(M), alpha = 2, beta = 0;
    send(A, x.data(), M * K), send(B, y.data(), K * 2);
    cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
    cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias);
    cublasLtMatrixLayoutCreate(&la, CUDA_R_16BF, M, K, (int64_t)M);
    cublasLtMatrixLayoutCreate(&lb, CUDA_R_16BF, K, 2, (int64_t)K);
    cublasLtMatrixLayoutCreate(&lc, CUDA_R_32F, M, 2, (int64_t)M);
    cublasLtMatmulPreferenceCreate(&preference);
    for (uint32_t& alignment : preference->alignment) alignment = 4;
    cublasLtMatmulAlgoGetHeuristic(NULL, operation, la, lb, lc, lc, preference, 1, &choice, &found);
    if (!found) return NAN;
    char* workspace = device_array<char>(16);
    cublasLtMatmul(NULL, operation, &alpha, A, la, B, lb, &beta, C, lc, C, lc, &choice.algo, workspace, 16, stream);
    if (sums) *sums = fetch(bias, 1)[0];
    return fetch(C, 1)[0];
}

static void check_multiplies() {
    enum { M = 8, K = 40 };
    float a[M * K], b[K * 2], right = 0, sum = 0, got_sum = 0;
    for (int i = 0; i < M * K; i++) a[i] = (float)(int)(random_bits(5, (uint64_t)i) % 9) - 4;
    for (int i = 0; i < K * 2; i++) b[i] = (float)(int)(random_bits(6, (uint64_t)i) % 9) - 4;
    for (int k = 0; k < K; k++) right += 2 * a[k * M] * b[k], sum += a[k * M];
    expect(cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL) == right, "cuBLASLt's product");
    cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_BGRADA, &got_sum);
    expect(got_sum == sum, "cuBLASLt's sums of a matrix that it multiplies");
    expect(isnan(cublas_product(1, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL)), "one row can be multiplied");
    // 1 and 39 numbers of 2^-24, which together are more than the last bit of 1, but each is less than that.
    for (int i = 0; i < M * K; i++) a[i] = 1;
    for (int i = 0; i < K * 2; i++) b[i] = i % K ? 0x1p-24f : 1;
    expect(cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL) == 2, "a matrix unit does not cut off");
    for (int i = 0; i < K * 2; i++) b[i] = i % K ? -0x1p-23f : 1;
    expect(cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL) == 2 - 78 * 0x1p-23f, "it cuts off too much");
    b[3] = INFINITY;
    expect(cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL) == INFINITY, "infinity is lost");
    b[4] = -INFINITY;
    expect(isnan(cublas_product(M, K, a, b, CUBLASLT_EPILOGUE_DEFAULT, NULL)), "infinity less infinity");
}

static void check_streams() {
    int *x = device_array<int>(1), one = 1;
    // A copy on another stream, which the kernel's does not wait for.
    send(x, &one, 1);
    cudaMemcpy(x, &one, sizeof one, cudaMemcpyHostToDevice);
    launch(add, 1, 1, 0, stream, x, 5);
    cudaStreamSynchronize(stream);
    expect(fetch(x, 1)[0] != 6, "a copy on another stream arrives without being waited for");
    int got = 0;
    cudaMemcpyAsync(x, &one, sizeof one, cudaMemcpyHostToDevice, stream);
    launch(add, 1, 1, 0, stream, x, 5);
    cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost);
    expect(got != 6, "a copy to the host sees what another stream has yet to do");
    cudaStreamSynchronize(stream);
    cudaMemcpy(&got, x, sizeof got, cudaMemcpyDeviceToHost);
    expect(got == 6, "a copy to the host does not see what another stream has done");

    cudaMemcpyAsync(x, &one, sizeof one, cudaMemcpyHostToDevice, stream);
    one = 7; // too soon
    expect(fetch(x, 1)[0] == 7, "a source that is overwritten too soon is not seen");
    cudaEvent_t copied;
    cudaEventCreate(&copied);
    one = 1;
    cudaMemcpyAsync(x, &one, sizeof one, cudaMemcpyHostToDevice, stream);
    cudaEventRecord(copied, stream);
    cudaEventSynchronize(copied);
    one = 7; // after waiting
    expect(fetch(x, 1)[0] == 1, "an event's wait does not wait");

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    int what = 10;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    launch(add, 1, 1, 0, stream, x, what);
    expect(cudaStreamSynchronize(stream) != cudaSuccess, "a stream that is captured can be waited for");
    cudaStreamEndCapture(stream, &graph);
    cudaGraphInstantiate(&exec, graph, 0);
    what = 1000; // the graph keeps 10
    expect(fetch(x, 1)[0] == 1, "what is captured is done at once");
    for (int i = 0; i < 3; i++) cudaGraphLaunch(exec, stream);
    expect(fetch(x, 1)[0] == 31, "a graph is not replayed");

    ends(NULL, "a kernel that fails", [=] {
        setenv("CUDA_ON_CPU_FAULT", "add", 1);
        launch(add, 1, 1, 0, stream, x, 1);
        _exit(cudaStreamSynchronize(stream) != cudaErrorIllegalAddress);
    });
}

// A second stream adds 5 when it is told that a first one has written 1, and a third reads when it is told of that. If one
// is not told, it is late or, in the other order, early.
static void check_events(bool is_early) {
    int* x = device_array<int>(1);
    const int zero = 0, one = 1;
    for (int missing = 0; missing < 3; missing++) {
        cudaStream_t second;
        cudaEvent_t written, added;
        if (is_early) setenv("CUDA_ON_CPU_ORDER", "backward", 1);
        cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking);
        unsetenv("CUDA_ON_CPU_ORDER");
        cudaEventCreate(&written), cudaEventCreate(&added);
        send(x, &zero, 1);
        cudaMemcpyAsync(x, &one, sizeof one, cudaMemcpyHostToDevice, stream);
        cudaEventRecord(written, stream);
        if (missing != 1) cudaStreamWaitEvent(second, written, 0);
        launch(add, 1, 1, 0, second, x, 5);
        cudaEventRecord(added, second);
        if (missing != 2) cudaStreamWaitEvent(stream, added, 0);
        cudaEventRecord(written, stream); // again: what waits, waits for the time before
        int got = fetch(x, 1)[0];
        bool is_wrong = missing == 2 || (is_early && missing == 1);
        expect(is_wrong ? got != 6 : got == 6, is_wrong ? "a missing wait is not seen" : "streams do not wait");
        cudaStreamSynchronize(second);
    }
}

// Against the definition: of the two neighbours, the nearer; of equally near ones, the even.
static void check_rounding() {
    bool good = true;
    for (uint64_t i = 0; i < 200000; i++) {
        uint32_t bits = (uint32_t)random_bits(3, i);
        if (i % 4 == 0) bits = (bits & 0xffff0000) | 0x8000;
        float x;
        memcpy(&x, &bits, sizeof x);
        uint16_t got = __float2bfloat16(x).bits, below = (uint16_t)(bits >> 16), above = (uint16_t)(below + 1);
        if (x != x) {
            good = good && got == 0x7FFF;
            continue;
        }
        double down = fabs((double)x - __bfloat162float({below})), up = fabs((double)__bfloat162float({above}) - x);
        if ((above & 0x7F80) == 0x7F80) up = fabs(ldexp(1, 128) - fabs((double)x)); // infinity, as if it were the next
        if ((below & 0x7FFF) == 0x7F80) down = 0, up = 1;
        good = good && got == (down < up ? below : up < down ? above : below % 2 ? above : below);
    }
    expect(good, "bfloat16 is not rounded to the nearest");
}

int main(void) {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    check_orders();
    check_memory();
    check_barriers();
    check_warps();
    check_multiplies();
    check_streams();
    check_events(false);
    check_events(true);
    check_rounding();
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}

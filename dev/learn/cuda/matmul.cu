// matmul.cu: c = a b, from the naive kernel to what train_gpt.cu uses. a (M,K), b (K,N), c (M,N).
//
//     make -C dev/learn/cuda matmul && build/matmul       (see README.md; on a CPU: make -C dev/learn/cuda check)
//
// A multiply of large matrices does 2 M N K operations on M K + K N numbers: with M = N = K = 4096, 4096 for each
// number read. A GPU can do some hundred operations in the time in which it reads a number from its memory, so a
// multiply should have to wait for nothing. But each number is used by 4096 sums, which are in different threads, warps
// and blocks. All steps are about reading it once for as many of them as possible: in the cache, in a block's shared
// memory, in a thread's registers, in the matrix units.

#include "lesson.h"

namespace gpu {

// Step 1. A thread for each sum. Neighbouring threads take neighbouring rows: when the 32 threads of a warp read
// a[row][k], they read from 32 rows, K numbers apart, and for each the memory delivers a whole sector of 32 bytes.
//
// Step 2. Neighbouring threads take neighbouring columns. Now a[row][k] is one address for all, delivered to all at
// once, and the 32 numbers b[k][column] lie side by side in two sectors. Nothing else has changed.
template <bool BY_COLUMN>
__global__ static void thread_kernel(real* c, const real* a, const real* b, size_t M, size_t N, size_t K) {
    size_t near = threadIdx.x % WARP, far = threadIdx.x / WARP;
    size_t row = BY_COLUMN ? blockIdx.x * GROUPS + far : blockIdx.x * WARP + near;
    size_t column = BY_COLUMN ? blockIdx.y * WARP + near : blockIdx.y * GROUPS + far;
    if (row >= M || column >= N) return;
    float sum = 0;
    for (size_t k = 0; k < K; k++) sum += number(a[row * K + k]) * number(b[k * N + column]);
    put(&c[row * N + column], sum);
}

// Step 3. A block finds 32 x 32 sums, in tiles of 32 of the K: it brings 32 x 32 numbers of a and of b to shared memory
// and uses each of them 32 times: from the GPU's memory comes a 32nd of the numbers. But for 4 multiply-adds a thread
// reads 5 numbers from shared memory. That serves the 32 threads of one warp in a cycle, in which the multiprocessor
// could do 64 or 128 multiply-adds.
enum { EDGE = 32 };
__global__ static void tile_kernel(real* c, const real* a, const real* b, size_t M, size_t N, size_t K) {
    float *a_tile = shared_memory<float>(), *b_tile = a_tile + EDGE * EDGE, sum[EDGE / GROUPS] = {};
    size_t lane = threadIdx.x % WARP, group = threadIdx.x / WARP;
    size_t row0 = blockIdx.x * EDGE, column = blockIdx.y * EDGE + lane;
    for (size_t k0 = 0; k0 < K; k0 += EDGE) {
        for (size_t i = group; i < EDGE; i += GROUPS) {
            a_tile[i * EDGE + lane] = row0 + i < M && k0 + lane < K ? number(a[(row0 + i) * K + k0 + lane]) : 0;
            b_tile[i * EDGE + lane] = k0 + i < K && column < N ? number(b[(k0 + i) * N + column]) : 0;
        }
        __syncthreads();
        for (int k = 0; k < EDGE; k++)
            for (int i = 0; i < EDGE / GROUPS; i++)
                sum[i] += a_tile[(group + i * GROUPS) * EDGE + k] * b_tile[k * EDGE + lane];
        __syncthreads();
    }
    for (int i = 0; i < EDGE / GROUPS; i++) {
        size_t row = row0 + group + i * GROUPS;
        if (row < M && column < N) put(&c[row * N + column], sum[i]);
    }
}

// Step 4. A thread finds 8 x 8 sums in registers, a block 128 x 128. For 64 multiply-adds it reads 8 + 8 numbers from
// shared memory, a quarter of a number for each instead of two. A thread's rows and columns are 16 apart, so that in
// each read the threads of a warp read neighbours, and no two from one bank. a's tile is turned for that, (K,M), and
// its rows are one longer than they need be, so that neither writing goes to a single bank.
enum { SIDE = 128, DEPTH = 16, PER_THREAD = SIDE / 16 };
__global__ static void register_kernel(real* c, const real* a, const real* b, size_t M, size_t N, size_t K) {
    float *a_tile = shared_memory<float>(), *b_tile = a_tile + DEPTH * (SIDE + 1);
    float sum[PER_THREAD][PER_THREAD] = {}, a_part[PER_THREAD], b_part[PER_THREAD];
    size_t row0 = blockIdx.x * SIDE, column0 = blockIdx.y * SIDE;
    int across = threadIdx.x % 16, down = threadIdx.x / 16;
    for (size_t k0 = 0; k0 < K; k0 += DEPTH) {
        for (int i = threadIdx.x; i < SIDE * DEPTH; i += THREADS) {
            size_t row = row0 + i / DEPTH, column = column0 + i % SIDE, a_k = k0 + i % DEPTH, b_k = k0 + i / SIDE;
            a_tile[i % DEPTH * (SIDE + 1) + i / DEPTH] = row < M && a_k < K ? number(a[row * K + a_k]) : 0;
            b_tile[i] = b_k < K && column < N ? number(b[b_k * N + column]) : 0;
        }
        __syncthreads();
        for (int k = 0; k < DEPTH; k++) {
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                a_part[i] = a_tile[k * (SIDE + 1) + down + 16 * i];
                b_part[i] = b_tile[k * SIDE + across + 16 * i];
            }
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++)
#pragma unroll
                for (int j = 0; j < PER_THREAD; j++) sum[i][j] += a_part[i] * b_part[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
#pragma unroll
        for (int j = 0; j < PER_THREAD; j++) {
            size_t row = row0 + down + 16 * i, column = column0 + across + 16 * j;
            if (row < M && column < N) put(&c[row * N + column], sum[i][j]);
        }
}

// Step 5. The matrix units: one instruction by which a warp multiplies 16 x 16 by 16 x 8 numbers, 2048 multiply-adds.
// By NVIDIA's data sheet an A100 does 312 TFLOP/s with them, and 19.5 with its other units. The operands are fragments
// (train_gpt.cu, above attention, says which thread holds what), and the functions that load them are those of
// attention. A warp finds 64 x 32 sums, for 4 + 2 loads of 16 x 16 numbers 16 multiplies. Rows are copied 16 bytes at a
// time, past the registers, so K and N must be multiples of WIDTH.
//
// Step 6. The same with STAGES tiles: while one is worked on, the next are on their way. In step 5 the matrix units
// stand still during each copy but for what other blocks on the multiprocessor have to do.
enum { SLICE = 32, A_ROW = SLICE + WIDTH, B_ROW = SIDE + WIDTH, STAGE = SIDE * A_ROW + SLICE * B_ROW };
template <int STAGES>
__global__ static void __launch_bounds__(THREADS)
    matrix_unit_kernel(real* c, const real* a, const real* b, size_t M, size_t N, size_t K) {
    real* stages = shared_memory<real>();
    size_t row0 = blockIdx.x * SIDE, column0 = blockIdx.y * SIDE, slices = (K + SLICE - 1) / SLICE;
    int warp_row = threadIdx.x / WARP % 2 * 64, warp_column = threadIdx.x / WARP / 2 * 32;
    auto copy = [&](size_t slice) {
        real *a_tile = stages + slice % STAGES * STAGE, *b_tile = a_tile + SIDE * A_ROW;
        for (int i = threadIdx.x * WIDTH; slice < slices && i < SIDE * SLICE; i += THREADS * WIDTH) {
            size_t row = row0 + i / SLICE, a_k = slice * SLICE + i % SLICE;
            bool a_valid = row < M && a_k < K;
            cp_async<16>(a_tile + i / SLICE * A_ROW + i % SLICE, a_valid ? a + row * K + a_k : a, a_valid);
            size_t column = column0 + i % SIDE, b_k = slice * SLICE + i / SIDE;
            bool b_valid = column < N && b_k < K;
            cp_async<16>(b_tile + i / SIDE * B_ROW + i % SIDE, b_valid ? b + b_k * N + column : b, b_valid);
        }
        cp_async_commit();
    };
    float sum[4][4][4] = {};
    for (size_t slice = 0; slice + 1 < STAGES; slice++) copy(slice);
    for (size_t slice = 0; slice < slices; slice++) {
        copy(slice + STAGES - 1);
        cp_async_wait<STAGES - 1>();
        __syncthreads();
        const real *a_tile = stages + slice % STAGES * STAGE, *b_tile = a_tile + SIDE * A_ROW;
#pragma unroll
        for (int k = 0; k < SLICE; k += 16) {
            pair a_part[4][4], b_part[2][2][2];
#pragma unroll
            for (int i = 0; i < 4; i++) load_a(a_part[i], a_tile + (warp_row + i * 16) * A_ROW + k, A_ROW);
#pragma unroll
            for (int j = 0; j < 2; j++) load_b_trans(b_part[j], b_tile + k * B_ROW + warp_column + j * 16, B_ROW);
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(sum[i][j], a_part[i], b_part[j / 2][j % 2]);
        }
        __syncthreads(); // before a copy overwrites this stage
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                size_t row = row0 + warp_row + i * 16 + fragment_row() + 8 * half;
                size_t column = column0 + warp_column + j * 8 + fragment_column();
                if (row < M && column < N)
                    join(as<pair>(&c[row * N + column]), sum[i][j][2 * half], sum[i][j][2 * half + 1]);
            }
}

// Step 7. cuBLASLt: the same ideas with tiles, stages and the order of blocks chosen for the shape and the GPU, and on
// newer GPUs their larger matrix instructions and hardware that copies whole tiles. It also does what comes after a
// multiply before the sums are stored: in train_gpt.cu the bias, the residual or GELU.
static void lesson(size_t M, size_t N, size_t K) {
    if (!timing) printf("(%zu,%zu) times (%zu,%zu)\n", M, K, K, N);
    const float *host_a, *host_b;
    real *a = numbers<real>(M * K, &host_a), *b = numbers<real>(K * N, &host_b), *c = room<real>(M * N);
    float* right = host_room(M * N);
    if (!timing) ::matmul(right, ::matrix(host_a, K), ::matrix(host_b, N), NULL, NULL, M, N, K);
    if (!timing) expect("c", c, right, M * N);
    double operations = 2.0 * (double)M * (double)N * (double)K;
    step("1 a thread for each sum", 0, operations, [&] {
        launch(thread_kernel<false>, dim3(blocks(M, WARP), blocks(N, GROUPS)), THREADS, 0, stream, c, a, b, M, N, K);
    });
    step("2 neighbours read neighbours", 0, operations, [&] {
        launch(thread_kernel<true>, dim3(blocks(M, GROUPS), blocks(N, WARP)), THREADS, 0, stream, c, a, b, M, N, K);
    });
    step("3 tiles in shared memory", 0, operations, [&] {
        launch(tile_kernel, dim3(blocks(M, EDGE), blocks(N, EDGE)), THREADS, 2 * EDGE * EDGE * sizeof(float), stream, c,
               a, b, M, N, K);
    });
    dim3 grid(blocks(M, SIDE), blocks(N, SIDE));
    step("4 tiles in registers", 0, operations, [&] {
        launch(register_kernel, grid, THREADS, DEPTH * (2 * SIDE + 1) * sizeof(float), stream, c, a, b, M, N, K);
    });
    if (K % WIDTH == 0 && N % WIDTH == 0) {
        step("5 matrix units", 0, operations,
             [&] { launch(matrix_unit_kernel<1>, grid, THREADS, STAGE * sizeof(real), stream, c, a, b, M, N, K); });
        enum { STAGES = sizeof(real) == 2 ? 3 : 2 }; // what fits
        step("6 copies in the background", 0, operations, [&] {
            launch(matrix_unit_kernel<STAGES>, grid, THREADS, STAGES * STAGE * sizeof(real), stream, c, a, b, M, N, K);
        });
    }
    step("7 cuBLASLt", 0, operations, [&] { matmul(c, matrix(a, K), matrix(b, N), NULL, (const real*)NULL, M, N, K); });
    finish();
}

} // namespace gpu

int main(void) {
    puts(gpu::start());
    gpu::lesson(1, 1, 1);
    gpu::lesson(37, 45, 51);
    gpu::lesson(130, 136, 88);
    if (gpu::time_steps()) gpu::lesson(4096, 4096, 4096);
    return 0;
}

// attention.cu: causal attention forward and backward, from the naive kernels to train_gpt.cu's.
//
//     make -C dev/learn/cuda attention && build/attention       (see README.md; on a CPU: make -C dev/learn/cuda check)
//
// For each of B H heads, out = softmax(q kT / sqrt(D)) v, with q, k and v (T,D) and the softmax over the keys up to the
// query's position. That is 2 T T D operations and as many more for the output, half of them masked, on 4 T D numbers.
// With T = 1024 and D = 64 there are 512 operations for each number, so memory need not be what one waits for. But the
// T x T scores and weights lie between, and a kernel that writes them to memory and reads them back waits for nothing
// else. The steps first get rid of that matrix, then read keys and values less often, then multiply faster.

#include "lesson.h"

namespace gpu {

// Step 1. As the formula says, one kernel after the other: scores, their softmax, the sum of values; a thread for each
// number of the result, and weights (B,H,T,T) in memory between them. T = 1024 needs 4 MB of it for each head, T = 8192
// 256 MB; it is written twice, and read as often at least.
__global__ static void scores_kernel(float* p, const real* qkv, size_t T, size_t C, size_t H, size_t count) {
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x, D = C / H;
    if (at >= count) return;
    size_t j = at % T, i = at / T % T, h = at / T / T % H, b = at / T / T / H;
    const real *q = qkv + (b * T + i) * 3 * C + h * D, *k = qkv + (b * T + j) * 3 * C + C + h * D;
    float sum = 0;
    for (size_t c = 0; j <= i && c < D; c++) sum += number(q[c]) * number(k[c]);
    p[at] = sum / sqrtf((float)D);
}
__global__ static void softmax_kernel(float* p, float* lse, size_t T, size_t H, size_t count) {
    size_t row = (size_t)blockIdx.x * THREADS + threadIdx.x; // of (B,H,T)
    if (row >= count) return;
    size_t i = row % T, h = row / T % H, b = row / T / H;
    float *s = p + row * T, largest = -INFINITY, sum = 0;
    for (size_t j = 0; j <= i; j++) largest = fmaxf(largest, s[j]);
    for (size_t j = 0; j <= i; j++) sum += expf(s[j] - largest);
    for (size_t j = 0; j < T; j++) s[j] = j <= i ? expf(s[j] - largest) / sum : 0;
    lse[(b * T + i) * H + h] = largest + logf(sum);
}
// to[i] = scale * sum over j of m_ij x_j, or of m_ji x_j if `turned`. m (B,H,T,T); rows of x and to are given widths.
__global__ static void weighted_sum_kernel(real* to, size_t to_width, const float* m, bool turned, const real* x,
                                           size_t x_width, float scale, size_t T, size_t C, size_t H, size_t count) {
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x, D = C / H;
    if (at >= count) return;
    size_t c = at % C, h = c / D, i = at / C % T, b = at / C / T;
    m += (b * H + h) * T * T;
    float sum = 0;
    for (size_t j = 0; j < T; j++) sum += m[turned ? j * T + i : i * T + j] * number(x[(b * T + j) * x_width + c]);
    put(&to[(b * T + i) * to_width + c], scale * sum);
}

static void weights_in_memory(float* p, float* lse, const real* qkv, size_t B, size_t T, size_t C, size_t H) {
    launch(scores_kernel, blocks(B * H * T * T, THREADS), THREADS, 0, stream, p, qkv, T, C, H, B * H * T * T);
    launch(softmax_kernel, blocks(B * H * T, THREADS), THREADS, 0, stream, p, lse, T, H, B * H * T);
}

// Step 2. The online softmax. A block for each query goes along the keys; whenever a larger score turns up, what has
// been summed is scaled down to it, so that no score is needed again. Nothing of size T x T is written, and keys after
// the query are not visited. This is the kernel that train_gpt.cu keeps for very large heads
// (wide_attention_forward_kernel). But each query reads all keys and values before it, so that each of these is read
// T / 2 times.
//
// Step 3. Tiles: a block takes 64 queries, and a tile of 64 keys and values, once in shared memory, serves all of them:
// keys and values are read from afar T / 128 times. Four threads share a query, each with a quarter of the tile's keys
// and a quarter of the channels. What is slow now is the arithmetic: for each multiply-add of the scores two numbers
// come from shared memory.
enum { TILE_EDGE = 64, SHARERS = 4 };
template <int HEAD>
__global__ static void __launch_bounds__(THREADS)
    shared_tile_kernel(real* out, float* lse, const real* qkv, int T, int C, int H) {
    // Rows are odd in length, so that a column's numbers are in different banks.
    constexpr int ROW = HEAD + 1, PART = HEAD / SHARERS;
    float *q = shared_memory<float>(), *k = q + TILE_EDGE * ROW, *v = k + TILE_EDGE * ROW, *p = v + TILE_EDGE * ROW;
    int D = C / H, h = blockIdx.y % H, i0 = blockIdx.x * TILE_EDGE;
    int row = threadIdx.x / SHARERS, part = threadIdx.x % SHARERS, i = i0 + row;
    size_t b = blockIdx.y / H;
    const real* sequence = qkv + b * T * 3 * C + h * D;
    auto copy = [&](float* tile, const real* x, int first) {
        for (int n = threadIdx.x; n < TILE_EDGE * HEAD; n += THREADS) {
            int t = first + n / HEAD, c = n % HEAD;
            tile[n / HEAD * ROW + c] = t < T && c < D ? number(x[(size_t)t * 3 * C + c]) : 0;
        }
    };
    float o[PART] = {}, largest = -INFINITY, sum = 0, scale = 1 / sqrtf((float)D);
    copy(q, sequence, i0);
    for (int j0 = 0; j0 < i0 + TILE_EDGE && j0 < T; j0 += TILE_EDGE) {
        copy(k, sequence + C, j0);
        copy(v, sequence + 2 * C, j0);
        __syncthreads();
        float s[TILE_EDGE / SHARERS], most = largest, tile_sum = 0;
#pragma unroll
        for (int n = 0; n < TILE_EDGE / SHARERS; n++) {
            int j = n * SHARERS + part;
            s[n] = 0;
            for (int c = 0; c < HEAD; c++) s[n] += q[row * ROW + c] * k[j * ROW + c];
            s[n] = j0 + j <= i ? s[n] * scale : -INFINITY;
            most = fmaxf(most, s[n]);
        }
        for (int bit = 1; bit < SHARERS; bit *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, bit));
#pragma unroll
        for (int n = 0; n < TILE_EDGE / SHARERS; n++) {
            float weight = expf(s[n] - most);
            tile_sum += weight;
            p[row * (TILE_EDGE + 1) + n * SHARERS + part] = weight;
        }
        float shrink = expf(largest - most);
        sum = sum * shrink + tile_sum;
        largest = most;
        __syncwarp(); // a row's four threads are in one warp
#pragma unroll
        for (int c = 0; c < PART; c++) {
            o[c] *= shrink;
            for (int j = 0; j < TILE_EDGE; j++) o[c] += p[row * (TILE_EDGE + 1) + j] * v[j * ROW + c * SHARERS + part];
        }
        __syncthreads();
    }
    for (int bit = 1; bit < SHARERS; bit *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
    if (i >= T) return;
#pragma unroll
    for (int c = 0; c < PART; c++)
        if (c * SHARERS + part < D) put(&out[(b * T + i) * C + h * D + c * SHARERS + part], o[c] / sum);
    if (part == 0) lse[(b * T + i) * H + h] = largest + logf(sum);
}

// Step 4. The matrix units do both products. A warp takes 16 queries, whose fragments stay in its registers, as do the
// scores: the pairs that a thread holds of two neighbouring results are those it must hold of an operand, so the
// weights go into the second product without visiting shared memory (train_gpt.cu explains the fragments). Keys and
// values are copied 16 bytes at a time.
template <int HEAD>
__global__ static void __launch_bounds__(ATTENTION_THREADS)
    matrix_unit_kernel(real* out, float* lse, const real* qkv, int T, int C, int H) {
    constexpr int ROW = Tiling<HEAD>::ROW, KEYS = 32, QUERIES = ATTENTION_WARPS * 16;
    int D = C / H, h = blockIdx.y % H, i0 = blockIdx.x * QUERIES, row0 = i0 + threadIdx.x / WARP * 16;
    size_t b = blockIdx.y / H;
    const real* sequence = qkv + b * T * 3 * C + h * D;
    real *tiles = shared_memory<real>(), *values = tiles + KEYS * ROW;
    float scale = LOG2_E / sqrtf((float)D), o[HEAD / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    pair q[HEAD / 16][4];
    load_tile<HEAD, QUERIES>(tiles, sequence + (size_t)i0 * 3 * C, 3 * C, T - i0, D);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int n = 0; n < HEAD / 16; n++) load_a(q[n], tiles + threadIdx.x / WARP * 16 * ROW + n * 16, ROW);
    __syncthreads();
    for (int j0 = 0; j0 < i0 + QUERIES && j0 < T; j0 += KEYS) {
        load_tile<HEAD, KEYS>(tiles, sequence + C + (size_t)j0 * 3 * C, 3 * C, T - j0, D);
        load_tile<HEAD, KEYS>(values, sequence + 2 * C + (size_t)j0 * 3 * C, 3 * C, T - j0, D);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        float s[KEYS / 8][4] = {};
        pair a[4], b2[2][2];
#pragma unroll
        for (int i = 0; i < HEAD / 16; i++)
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                load_b(b2, tiles + n * 16 * ROW + i * 16, ROW);
                mma(s[2 * n], q[i], b2[0]);
                mma(s[2 * n + 1], q[i], b2[1]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) { // the thread's two rows
            int i = row0 + fragment_row() + 8 * half;
            float most = largest[half], tile_sum = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    if (j0 + n * 8 + fragment_column() + e % 2 > i) s[n][e] = -INFINITY;
                    most = fmaxf(most, s[n][e]);
                }
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1)); // a row lies in four threads
            most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2));
            float shrink = exp2f((largest[half] - most) * scale);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) tile_sum += s[n][e] = exp2f((s[n][e] - most) * scale);
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                o[n][2 * half] *= shrink;
                o[n][2 * half + 1] *= shrink;
            }
            sum[half] = sum[half] * shrink + tile_sum;
            largest[half] = most;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            c_to_a(a, &s[2 * n]);
#pragma unroll
            for (int i = 0; i < HEAD / 16; i++) {
                load_b_trans(b2, values + n * 16 * ROW + i * 16, ROW);
                mma(o[2 * i], a, b2[0]);
                mma(o[2 * i + 1], a, b2[1]);
            }
        }
        __syncthreads();
    }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        inverse[half] = 1 / total;
        int i = row0 + fragment_row() + 8 * half;
        if (fragment_column() == 0 && i < T) lse[(b * T + i) * H + h] = largest[half] * (scale / LOG2_E) + logf(total);
    }
    store_rows<HEAD>(out + (b * T + row0) * C + h * D, C, o, inverse, T - row0, D);
}

// Step 5. train_gpt.cu's. The next tile is on its way while one is worked on. A warp takes 32 queries if there are
// registers for that, so that each fragment of keys and values it loads is used twice. Warps skip tiles that are masked
// for all of their queries, and compare positions only in tiles that may be masked in part. The matrix units need
// little time for a weight's 4 D operations, so every instruction beside them counts: 2^x is a single one, without
// exp2f's care for the smallest numbers. Blocks with the most keys start first, so that the short ones fill the gaps at
// the end.
static void forward_steps(size_t B, size_t T, size_t C, size_t H) {
    Attention shape = {B, T, 0, H, C / H};
    const float* host_qkv;
    real *qkv = numbers<real>(B * T * 3 * C, &host_qkv), *out = room<real>(B * T * C);
    float *lse = room<float>(B * T * H), *p = room<float>(B * H * T * T);
    float *right_out = host_room(B * T * C), *right_lse = host_room(B * T * H);
    if (!timing) {
        ::attention_forward(right_out, right_lse, host_qkv, shape);
        expect("out", out, right_out, B * T * C);
        expect("lse", lse, right_lse, B * T * H);
    }
    double operations = 2.0 * (double)(B * T * T * C); // what is masked is not counted
    unsigned heads = (unsigned)(B * H);
    step("1 all weights in memory", 0, operations, [&] {
        weights_in_memory(p, lse, qkv, B, T, C, H);
        launch(weighted_sum_kernel, blocks(B * T * C, THREADS), THREADS, 0, stream, out, C, p, false, qkv + 2 * C,
               3 * C, 1.0f, T, C, H, B * T * C);
    });
    step("2 online softmax", 0, operations, [&] {
        launch(wide_attention_forward_kernel, dim3((unsigned)(B * T * H), blocks(C / H, THREADS)), THREADS,
               THREADS * sizeof(float), stream, out, lse, qkv, (int)T, 0, (int)C, (int)H);
    });
    if (C / H <= 64) // what fits
        with_head(C / H, [&](auto HEAD) {
            size_t bytes = TILE_EDGE * (3 * (HEAD + 1) + TILE_EDGE + 1) * sizeof(float);
            if constexpr (HEAD <= 64)
                step("3 tiles in shared memory", 0, operations, [&] {
                    launch(shared_tile_kernel<HEAD>, dim3(blocks(T, TILE_EDGE), heads), THREADS, bytes, stream, out,
                           lse, qkv, (int)T, (int)C, (int)H);
                });
        });
    with_head(C / H, [&](auto HEAD) {
        step("4 matrix units", 0, operations, [&] {
            launch(matrix_unit_kernel<HEAD>, dim3(blocks(T, ATTENTION_WARPS * 16), heads), ATTENTION_THREADS,
                   ATTENTION_WARPS * 16 * Tiling<HEAD>::ROW * sizeof(real), stream, out, lse, qkv, (int)T, (int)C,
                   (int)H);
        });
    });
    step("5 copies in the background", 0, operations, [&] { gpu::attention_forward(out, lse, qkv, shape); });
    finish();
}

// The backward pass, step 1: with all weights p in memory, and as many ds = p (dp - do out) beside them, where
// dp_ij = do_i v_j; then dv = pT do, dq = ds k and dk = dsT q.
__global__ static void ds_kernel(float* ds, const float* p, const real* dout, const real* out, const real* qkv,
                                 size_t T, size_t C, size_t H, size_t count) {
    size_t at = (size_t)blockIdx.x * THREADS + threadIdx.x, D = C / H;
    if (at >= count) return;
    size_t j = at % T, i = at / T % T, h = at / T / T % H, b = at / T / T / H;
    const real *d_o = dout + (b * T + i) * C + h * D, *o = out + (b * T + i) * C + h * D;
    const real* v = qkv + (b * T + j) * 3 * C + 2 * C + h * D;
    float sum = 0;
    for (size_t c = 0; j <= i && c < D; c++) sum += number(d_o[c]) * (number(v[c]) - number(o[c]));
    ds[at] = p[at] * sum;
}

// Step 2. Weights are computed again from lse instead of being read, by a block for each position: first as a query,
// going along the keys before it, then as a key, going along the queries after it (wide_attention_backward_kernel).
//
// Step 3. train_gpt.cu's, with the matrix units, in two kernels: one in which a block owns 64 keys and goes along the
// queries, one in which it owns queries and goes along the keys. Each tile's weights are thus computed twice, 7
// products instead of 5, but each sum is in one block's registers: with a single kernel the blocks would have to add up
// dq in memory. train_gpt.cu says what that would cost if the same run is to give the same bits.
static void backward_steps(size_t B, size_t T, size_t C, size_t H) {
    Attention shape = {B, T, 0, H, C / H};
    const float *host_qkv, *host_dout;
    size_t rows = B * T;
    real *qkv = numbers<real>(rows * 3 * C, &host_qkv), *dout = numbers<real>(rows * C, &host_dout);
    real *out = room<real>(rows * C), *dqkv = room<real>(rows * 3 * C);
    float *lse = room<float>(rows * H), *p = room<float>(B * H * T * T), *ds = room<float>(B * H * T * T);
    float2* work = room<float2>(rows * H);
    float *host_out = host_room(rows * C), *host_lse = host_room(rows * H), *right = host_room(rows * 3 * C);
    gpu::attention_forward(out, lse, qkv, shape);
    if (!timing) {
        read_rows(host_out, out, rows * C, C, C);
        read_rows(host_lse, lse, rows * H, H, H);
        ::attention_backward(right, host_dout, host_qkv, host_out, host_lse, shape);
        expect("dqkv", dqkv, right, rows * 3 * C);
    }
    double operations = 5.0 * (double)(rows * T * C); // of 5 products, of which half is masked
    float scale = 1 / sqrtf((float)(C / H));
    float* lse_again = room<float>(rows * H);
    step("1 all weights in memory", 0, operations, [&] {
        auto sums = [&](size_t part, const float* m, bool turned, const real* x, size_t width, float by) {
            launch(weighted_sum_kernel, blocks(rows * C, THREADS), THREADS, 0, stream, dqkv + part * C, 3 * C, m,
                   turned, x, width, by, T, C, H, rows * C);
        };
        weights_in_memory(p, lse_again, qkv, B, T, C, H);
        launch(ds_kernel, blocks(B * H * T * T, THREADS), THREADS, 0, stream, ds, p, dout, out, qkv, T, C, H,
               B * H * T * T);
        sums(0, ds, false, qkv + C, 3 * C, scale);
        sums(1, ds, true, qkv, 3 * C, scale);
        sums(2, p, true, dout, C, 1);
    });
    step("2 weights found again", 0, operations, [&] {
        launch(attention_rows_kernel<1>, blocks(rows * H, THREADS / 8), THREADS, 0, stream, work, dout, out, lse, T, C,
               H, rows * H);
        launch(wide_attention_backward_kernel, dim3((unsigned)(rows * H), blocks(C / H, THREADS)), THREADS,
               THREADS * sizeof(float2), stream, dqkv, dout, qkv, work, (int)T, (int)C, (int)H);
    });
    step("3 matrix units", 0, operations, [&] { gpu::attention_backward(dqkv, work, dout, qkv, out, lse, shape); });
    finish();
}

static void lesson(size_t B, size_t T, size_t C, size_t H) {
    printf("B %zu, T %zu, C %zu, %zu heads, forward\n", B, T, C, H);
    forward_steps(B, T, C, H);
    printf("B %zu, T %zu, C %zu, %zu heads, backward\n", B, T, C, H);
    backward_steps(B, T, C, H);
}

} // namespace gpu

int main(void) {
    puts(gpu::start());
    gpu::lesson(1, 1, 8, 1);
    gpu::lesson(2, 65, 42, 2);
    gpu::lesson(1, 130, 64, 1);
    if (gpu::time_steps()) gpu::lesson(8, 1024, 768, 12);
    return 0;
}

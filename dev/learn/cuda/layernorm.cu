// layernorm.cu: layernorm forward and backward, from the naive kernels to train_gpt.cu's.
//
//     make -C dev/learn/cuda layernorm && build/layernorm       (see README.md; on a CPU: make -C dev/learn/cuda check)
//
// A layernorm does a handful of operations on each number, so its time is that of moving the numbers: forward it must
// read x and write y, backward read dy, x and dx and write dx. A kernel is as good as the share of the memory's rate at
// which it does just that. All steps are about which thread reads what, and when.

#include "lesson.h"

namespace gpu {

// Step 1. A thread for each row, as one would write it for a CPU. At any moment the 32 threads of a warp read 32
// different rows, 2 bytes of each, and the memory delivers sectors of 32 bytes. What is left of a sector may be gone
// from the cache when its turn comes, since thousands of threads share the cache. And there are only as many threads as
// rows: a few warps on each multiprocessor, too few to have enough reads under way.
__global__ static void row_a_thread_kernel(real* y, float* mean, float* rstd, const real* x, const float* w,
                                           const float* b, size_t rows, size_t C) {
    size_t row = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    x += row * C, y += row * C;
    float sum = 0, squares = 0;
    for (size_t c = 0; c < C; c++) sum += number(x[c]);
    float m = sum / (float)C;
    for (size_t c = 0; c < C; c++) squares += (number(x[c]) - m) * (number(x[c]) - m);
    float r = 1 / sqrtf(squares / (float)C + 1e-5f);
    for (size_t c = 0; c < C; c++) put(&y[c], (number(x[c]) - m) * r * w[c] + b[c]);
    mean[row] = m;
    rstd[row] = r;
}

// Step 2. A block for each row: neighbouring threads read neighbouring numbers, so that every sector is used as a whole
// at once. The threads' sums are added up in shared memory, half of the threads to the other half, eight times; each
// time all wait for one another.
__device__ inline float block_sum(float x, float* shared) {
    shared[threadIdx.x] = x;
    for (unsigned half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    float sum = shared[0];
    __syncthreads();
    return sum;
}
__global__ static void row_a_block_kernel(real* y, float* mean, float* rstd, const real* x, const float* w,
                                          const float* b, size_t C) {
    float *shared = shared_memory<float>(), sum = 0, squares = 0;
    x += blockIdx.x * C, y += blockIdx.x * C;
    for (size_t c = threadIdx.x; c < C; c += THREADS) sum += number(x[c]);
    float m = block_sum(sum, shared) / (float)C;
    for (size_t c = threadIdx.x; c < C; c += THREADS) squares += (number(x[c]) - m) * (number(x[c]) - m);
    float r = 1 / sqrtf(block_sum(squares, shared) / (float)C + 1e-5f);
    for (size_t c = threadIdx.x; c < C; c += THREADS) put(&y[c], (number(x[c]) - m) * r * w[c] + b[c]);
    if (threadIdx.x > 0) return;
    mean[blockIdx.x] = m;
    rstd[blockIdx.x] = r;
}

// Step 3. A warp for each row: its threads exchange registers without waiting for others (warp_sum), and while one warp
// waits for its row, the others of the block are free to go on with theirs. This is train_gpt.cu's kernel, told to take
// a number at a time.
//
// Step 4. The same, told to take 16 bytes at a time: an instruction asks for eight numbers instead of one, so that with
// as many instructions under way eight times the bytes are. A warp's request is for 512 neighbouring bytes.
static void forward_steps(size_t rows, size_t C) {
    const float *host_x, *host_w, *host_b;
    real *x = numbers<real>(rows * C, &host_x), *y = room<real>(rows * C);
    float *w = numbers<float>(C, &host_w), *b = numbers<float>(C, &host_b);
    float *mean = room<float>(rows), *rstd = room<float>(rows);
    float *right_y = host_room(rows * C), *right_mean = host_room(rows), *right_rstd = host_room(rows);
    ::layernorm_forward(right_y, right_mean, right_rstd, host_x, host_w, host_b, rows, C);
    expect("y", y, right_y, rows * C);
    expect("mean", mean, right_mean, rows);
    expect("rstd", rstd, right_rstd, rows);
    double bytes = 2.0 * (double)rows * (double)C * sizeof(real);
    step("1 a row a thread", bytes, 0, [&] {
        launch(row_a_thread_kernel, blocks(rows, THREADS), THREADS, 0, stream, y, mean, rstd, x, w, b, rows, C);
    });
    step("2 a row a block", bytes, 0, [&] {
        launch(row_a_block_kernel, (unsigned)rows, THREADS, THREADS * sizeof(float), stream, y, mean, rstd, x, w, b, C);
    });
    step("3 a row a warp", bytes, 0, [&] {
        launch(layernorm_forward_kernel<1>, blocks(rows, GROUPS), THREADS, 0, stream, y, mean, rstd, x, w, b, rows, C);
    });
    step("4 16 bytes at a time", bytes, 0, [&] { layernorm_forward(y, mean, rstd, x, w, b, rows, C); });
    finish();
}

// The backward pass finds dx for each row, from two sums over the row, and dw and db for each column, sums over all
// rows.
//
// Step 1. A thread for each row, and another kernel with a thread for each column. The latter's threads do read
// neighbours; but with 768 columns there are three blocks, and more than a hundred multiprocessors have nothing to do.
__global__ static void dx_a_thread_kernel(real* dx, const real* dy, const real* x, const float* mean, const float* rstd,
                                          const float* w, size_t rows, size_t C) {
    size_t row = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (row >= rows) return;
    dx += row * C, dy += row * C, x += row * C;
    float m = mean[row], r = rstd[row], g_sum = 0, gn_sum = 0;
    for (size_t c = 0; c < C; c++) {
        g_sum += number(dy[c]) * w[c];
        gn_sum += number(dy[c]) * w[c] * (number(x[c]) - m) * r;
    }
    for (size_t c = 0; c < C; c++) {
        float n = (number(x[c]) - m) * r, g = number(dy[c]) * w[c];
        put(&dx[c], number(dx[c]) + r * (g - g_sum / (float)C - n * gn_sum / (float)C));
    }
}
__global__ static void column_a_thread_kernel(float* dw, float* db, const real* dy, const real* x, const float* mean,
                                              const float* rstd, size_t rows, size_t C) {
    size_t c = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (c >= C) return;
    float dw_sum = 0, db_sum = 0;
    for (size_t row = 0; row < rows; row++) {
        dw_sum += number(dy[row * C + c]) * (number(x[row * C + c]) - mean[row]) * rstd[row];
        db_sum += number(dy[row * C + c]);
    }
    dw[c] += dw_sum;
    db[c] += db_sum;
}

// Step 2. dx by a warp for each row, 16 bytes at a time, for the same reasons as forward.
template <int W>
__global__ static void dx_a_warp_kernel(real* dx, const real* dy, const real* x, const float* mean, const float* rstd,
                                        const float* w, size_t rows, size_t C) {
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

// Step 3. dw and db in two stages: the rows are cut into slices, so that there are blocks enough for all
// multiprocessors. Block (i,j) takes WARP * W columns of slice j; eight warps share the slice's rows and add up what they
// have in shared memory. The block writes its sums to memory, and the next kernel adds up the slices (add_slices). The
// obvious way, an atomic addition of each block's sums to dw, would save the second stage; but then the order of the
// sum, and with it the last bits of every weight, would be different in each run. partial (slices,2,C).
template <int W>
__global__ static void column_slices_kernel(float* partial, const real* dy, const real* x, const float* mean,
                                            const float* rstd, size_t rows, size_t C, size_t slice) {
    size_t group = threadIdx.x / WARP, c = (blockIdx.x * WARP + threadIdx.x % WARP) * W;
    size_t end = (blockIdx.y + 1) * slice < rows ? (blockIdx.y + 1) * slice : rows;
    float w_sum[W] = {}, b_sum[W] = {}, g[W], n[W];
    for (size_t row = blockIdx.y * slice + group; c < C && row < end; row += GROUPS) {
        load(g, dy + row * C + c);
        load(n, x + row * C + c);
        for (int i = 0; i < W; i++) {
            w_sum[i] += g[i] * ((n[i] - mean[row]) * rstd[row]);
            b_sum[i] += g[i];
        }
    }
    add_warps(w_sum, shared_memory<float>());
    add_warps(b_sum, shared_memory<float>());
    if (group > 0 || c >= C) return;
    store(partial + blockIdx.y * 2 * C + c, w_sum);
    store(partial + blockIdx.y * 2 * C + C + c, b_sum);
}

// Step 4. train_gpt.cu's. Both of these read dy and x, 4 of the 6 tensors that pass by. When one block does both for a
// few rows, the second finds them in the cache.
static void backward_steps(size_t rows, size_t C) {
    const float *host_x, *host_dy, *host_w;
    real *x = numbers<real>(rows * C, &host_x), *dy = numbers<real>(rows * C, &host_dy), *dx = room<real>(rows * C);
    float *w = numbers<float>(C, &host_w), *dw = room<float>(C), *db = room<float>(C);
    float *right_dx = host_room(rows * C), *right_dw = host_room(C), *right_db = host_room(C);
    float *host_mean = host_room(rows), *host_rstd = host_room(rows), *mean = room<float>(rows);
    float *rstd = room<float>(rows), *zero = host_room(C);
    ::layernorm_forward(host_room(rows * C), host_mean, host_rstd, host_x, host_w, zero, rows, C);
    upload(mean, host_mean, rows * sizeof(float));
    upload(rstd, host_rstd, rows * sizeof(float));
    ::layernorm_backward(right_dx, right_dw, right_db, host_dy, host_x, host_mean, host_rstd, host_w, rows, C);
    expect("dx", dx, right_dx, rows * C, true);
    expect("dw", dw, right_dw, C, true);
    expect("db", db, right_db, C, true);
    double bytes = 4.0 * (double)rows * (double)C * sizeof(real);
    auto columns = [&] {
        launch(column_a_thread_kernel, blocks(C, THREADS), THREADS, 0, stream, dw, db, dy, x, mean, rstd, rows, C);
    };
    step("1 a row, or a column, a thread", bytes, 0, [&] {
        launch(dx_a_thread_kernel, blocks(rows, THREADS), THREADS, 0, stream, dx, dy, x, mean, rstd, w, rows, C);
        columns();
    });
    auto dx_a_warp = [&] {
        with_width(C, [&](auto W) {
            launch(dx_a_warp_kernel<W>, blocks(rows, GROUPS), THREADS, 0, stream, dx, dy, x, mean, rstd, w, rows, C);
        });
    };
    step("2 a row a warp", bytes, 0, [&] {
        dx_a_warp();
        columns();
    });
    step("3 columns in slices", bytes, 0, [&] {
        size_t slice = rows > 128 * 64 ? (rows + 127) / 128 : 64;
        dx_a_warp();
        with_width(C, [&](auto W) {
            launch(column_slices_kernel<W>, dim3(blocks(C, WARP * W), blocks(rows, slice)), THREADS,
                   THREADS * W * sizeof(float), stream, (float*)workspace, dy, x, mean, rstd, rows, C, slice);
        });
        add_slices(dw, db, (const float*)workspace, blocks(rows, slice), C);
    });
    step("4 both at once", bytes, 0, [&] { layernorm_backward(dx, dw, db, dy, x, mean, rstd, w, rows, C); });
    finish();
}

static void lesson(size_t rows, size_t C) {
    printf("%zu rows of %zu, forward\n", rows, C);
    forward_steps(rows, C);
    printf("%zu rows of %zu, backward\n", rows, C);
    backward_steps(rows, C);
}

} // namespace gpu

int main(void) {
    puts(gpu::start());
    gpu::lesson(1, 1);
    gpu::lesson(19, 37);
    gpu::lesson(300, 264);
    if (gpu::time_steps()) gpu::lesson(1 << 17, 768);
    return 0;
}

// 10_flash.c: flash attention, step by step.
//
// "FlashAttention" (Dao et al. 2022) computes softmax(q k^T / sqrt(d)) v without ever having the matrix of weights.
// Here it is built in four steps, each a function of a few lines for one causal head:
//   step 1   the weights in memory                     as the formula says
//   step 2   a row at a time, softmax kept running     "online": Milakov and Gimelshein 2018
//   step 3   tiles of queries by tiles of keys         FlashAttention's order
//   step 4   the same, fast                            train_gpt.c's own routine, which trains GPT-2
// Multiply-adds, e^x, bytes, and numbers that pass between memory and what is being worked on are counted as they
// happen; times are shown beside them.
//
// What to look at:
//   1. one row, key by key: how sums that began with the wrong maximum are corrected
//   2. the four tables: multiply-adds grow with T^2 in every step, and so does time; memory only in the first. What
//      tiles change is the traffic
//   3. the backward: which numbers stand for a matrix
//   4. that nothing is approximated, and what happens without the maximum

#include <omp.h>
#include <time.h>

#include "attention.h"
#include "draw.h"
#include "tape.h"

enum { D = 64, T_MIN = 256, T_MAX = 8192, SIZES = 6, STEPS = 4 };

size_t train_gpt_attention(float* out, float* lse, const float* qkv, int T, int D); // train_gpt_attention.c

// What a step costs, counted while it runs. Traffic: numbers read or written beyond the row, or the tiles, that a step
// is working on (its queries and outputs, once each, are left out).
static struct {
    double multiply_adds, exponentials, traffic;
    size_t bytes; // beside q, k, v and out
} cost;

static float* borrow(size_t count) {
    float* x = malloc(count * sizeof(float));
    if (!x) fprintf(stderr, "10_flash: no memory for %zu floats\n", count), exit(1);
    cost.bytes += count * sizeof(float);
    return x;
}

// ---- The steps: out (T,D) from q, k, v (T,D); lse (T), or in step 1 the weights, is what a backward would need ------

// Step 1: weights (T,T), written as scores, read, written as weights, and read once more.
static void weights_in_memory(float* out, const float* q, const float* k, const float* v, int T) {
    float* weights = borrow((size_t)T * T);
    for (int i = 0; i < T; i++)
        for (int j = 0; j <= i; j++) weights[(size_t)i * T + j] = inner(q + i * D, k + j * D, D) / sqrtf(D);
    for (int i = 0; i < T; i++) softmax_forward(weights + (size_t)i * T, weights + (size_t)i * T, 1, i + 1, no_mask);
    zero(out, (size_t)T * D);
    for (int i = 0; i < T; i++)
        for (int j = 0; j <= i; j++) add_scaled(out + i * D, weights[(size_t)i * T + j], v + j * D, D);
    double pairs = 0.5 * T * (T + 1.0);
    cost.multiply_adds += pairs * 2 * D, cost.exponentials += pairs, cost.traffic += pairs * (2 * D + 4);
    free(weights);
}

// Step 2: a query needs all keys' scores for its maximum and its sum, but it need not have them at once.
static void online(float* out, const float* q, const float* k, const float* v, int T) {
    float* lse = borrow((size_t)T);
    zero(out, (size_t)T * D);
    for (int i = 0; i < T; i++) {
        float largest = -INFINITY, sum = 0, *o = out + i * D;
        for (int j = 0; j <= i; j++) {
            float s = inner(q + i * D, k + j * D, D) / sqrtf(D);
            if (s > largest) { // all that was summed so far was too large by e^(s - largest)
                float shrink = exp_quick(largest - s);
                sum *= shrink, largest = s, cost.exponentials++;
                for (int c = 0; c < D; c++) o[c] *= shrink;
            }
            float p = exp_quick(s - largest);
            sum += p;
            add_scaled(o, p, v + j * D, D);
        }
        for (int c = 0; c < D; c++) o[c] /= sum;
        lse[i] = largest + logf(sum);
        cost.multiply_adds += 2.0 * D * (i + 1), cost.exponentials += i + 1, cost.traffic += 2.0 * D * (i + 1);
    }
    free(lse);
}

// Step 3: FLASH_TILE queries take the same FLASH_TILE keys while those are at hand, and correct their sums once a
// tile.
static void tiles(float* out, const float* q, const float* k, const float* v, int T) {
    float *lse = borrow((size_t)T), *s = borrow(FLASH_TILE), *largest = borrow(FLASH_TILE), *sum = borrow(FLASH_TILE);
    zero(out, (size_t)T * D);
    for (int i0 = 0; i0 < T; i0 += FLASH_TILE) {
        int rows = tile_end(i0, T) - i0;
        for (int r = 0; r < rows; r++) largest[r] = -INFINITY, sum[r] = 0;
        for (int j0 = 0; j0 < i0 + rows; j0 += FLASH_TILE) {
            cost.traffic += 2.0 * D * (tile_end(j0, T) - j0);
            for (int r = 0; r < rows; r++) {
                int keys = smaller(tile_end(j0, T), i0 + r + 1) - j0; // those that are not in the query's future
                float before = largest[r], *o = out + (i0 + r) * D;
                for (int j = 0; j < keys; j++) {
                    s[j] = inner(q + (i0 + r) * D, k + (j0 + j) * D, D) / sqrtf(D);
                    largest[r] = fmaxf(largest[r], s[j]);
                }
                float shrink = exp_quick(before - largest[r]);
                sum[r] *= shrink;
                for (int c = 0; c < D; c++) o[c] *= shrink;
                for (int j = 0; j < keys; j++) {
                    float p = exp_quick(s[j] - largest[r]);
                    sum[r] += p;
                    add_scaled(o, p, v + (j0 + j) * D, D);
                }
                cost.multiply_adds += 2.0 * D * keys, cost.exponentials += keys + 1;
            }
        }
        for (int r = 0; r < rows; r++) {
            lse[i0 + r] = largest[r] + logf(sum[r]);
            for (int c = 0; c < D; c++) out[(i0 + r) * D + c] /= sum[r];
        }
    }
    free(lse), free(s), free(largest), free(sum);
}

// Step 4: what train_gpt.c does, in which the products of a tile are matrix multiplies. Its rows hold q, k and v.
static void train_gpt(float* out, const float* qkv, int T) {
    float* lse = borrow((size_t)T);
    cost.bytes += train_gpt_attention(out, lse, qkv, T, D);
    free(lse);
}

// ---- 1. One row, key by key -----------------------------------------------------------------------------------------

static void one_row(void) {
    static const float score[] = {1, 3, 2, 5, 4}, value[] = {10, 20, 30, 40, 50};
    printf("1. One query, five keys with values of one number, key by key\n\n");
    printf("key  score  value   largest   old sums times   sum of e^(s-largest)   out so far\n");
    float largest = -INFINITY, sum = 0, out = 0, total = 0, expected = 0;
    for (int j = 0; j < 5; j++) {
        float now = fmaxf(largest, score[j]), shrink = expf(largest - now), p = expf(score[j] - now);
        sum = sum * shrink + p, out = out * shrink + p * value[j], largest = now;
        printf("%3d  %5.0f  %5.0f   %7.0f   %14.4f   %20.4f   %10.4f\n", j, score[j], value[j], largest, shrink, sum,
               out / sum);
        total += expf(score[j]), expected += expf(score[j]) * value[j];
    }
    claim(fabsf(out / sum - expected / total) < 1e-5f && fabsf(largest + logf(sum) - logf(total)) < 1e-6f,
          "after the last key it is softmax's average, %.4f", expected / total);
}

// ---- 2. Time and memory ---------------------------------------------------------------------------------------------

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run(int step, float* out, const float* q, const float* k, const float* v, const float* qkv, int T) {
    static void (*const steps[])(float*, const float*, const float*, const float*, int) = {weights_in_memory, online,
                                                                                           tiles};
    memset(&cost, 0, sizeof cost);
    if (step < 3)
        steps[step](out, q, k, v, T);
    else
        train_gpt(out, qkv, T);
}

static const char* const step_names[] = {"weights in memory", "online, a row", "tiles", "train_gpt.c"};

static void growth(const float* q, const float* k, const float* v, const float* qkv, float* out) {
    static double multiply_adds[STEPS][SIZES], exponentials[STEPS][SIZES], traffic[STEPS][SIZES];
    static float time[STEPS][SIZES], bytes[STEPS][SIZES], size[SIZES];
    for (int n = 0; n < SIZES; n++) {
        int T = T_MIN << n;
        size[n] = (float)T;
        for (int step = 0; step < STEPS; step++) {
            double best = INFINITY;
            for (int repeat = 0; repeat < (n < 4 ? 5 : 2); repeat++) {
                double start = seconds();
                run(step, out, q, k, v, qkv, T);
                best = fmin(best, seconds() - start);
            }
            multiply_adds[step][n] = cost.multiply_adds, exponentials[step][n] = cost.exponentials;
            traffic[step][n] = cost.traffic, bytes[step][n] = (float)cost.bytes, time[step][n] = (float)(1000 * best);
        }
    }
    printf("\n2. One causal head, D = %d, one thread\n", D);
    static const char* const titles[] = {"bytes beside q, k, v and out", "milliseconds", "numbers moved, millions"};
    for (int table = 0; table < 3; table++) {
        printf("\n%s\n%20s", titles[table], "T =");
        for (int n = 0; n < SIZES; n++) printf(" %9d", T_MIN << n);
        putchar('\n');
        for (int step = 0; step < (table == 2 ? 3 : STEPS); step++) {
            printf("%d  %-17s", step + 1, step_names[step]);
            for (int n = 0; n < SIZES; n++)
                if (table == 0)
                    printf(" %9.0f", (double)bytes[step][n]);
                else
                    printf(" %9.2f", table == 1 ? (double)time[step][n] : 1e-6 * traffic[step][n]);
            putchar('\n');
        }
    }
    printf("\nmultiply-adds, 1e6  ");
    for (int n = 0; n < SIZES; n++) printf(" %9.1f", 1e-6 * multiply_adds[0][n]);
    printf("\n\n");
    Series curves[2][STEPS];
    for (int step = 0; step < STEPS; step++) {
        curves[0][step] = (Series){step_names[step], SIZES, size, time[step], false};
        curves[1][step] = (Series){step_names[step], SIZES, size, bytes[step], false};
    }
    draw_curves("10_time", "Time", &(Axes){.x = "T", .y = "ms", .log_x = true, .log_y = true}, curves[0], STEPS);
    draw_curves("10_memory", "Memory beside q, k, v and out",
                &(Axes){.x = "T", .y = "bytes", .log_x = true, .log_y = true}, curves[1], STEPS);

    bool quadratic = true, same = true, linear = true;
    for (int n = 1; n < SIZES; n++)
        for (int step = 0; step < 3; step++) {
            double ratio = multiply_adds[step][n] / multiply_adds[step][n - 1];
            quadratic = quadratic && ratio > 3.98 && ratio <= 4;
            same = same && multiply_adds[step][n] == multiply_adds[0][n];
        }
    for (int n = 0; n < SIZES; n++) {
        float T = size[n];
        same = same && bytes[0][n] == 4 * T * T;
        for (int step = 1; step < STEPS; step++) { // but for a constant: lse, and in step 4 a copy of keys and values
            float numbers = step == 3 ? 1 + 2 * D : 1;
            linear = linear && bytes[step][n] - bytes[step][0] == 4 * numbers * (T - T_MIN);
        }
    }
    claim(quadratic && same, "all steps do the same multiply-adds, four times as many for twice the length");
    claim(linear,
          "memory: step 1 has 4 T^2 bytes, %.0f MB at T = %d; steps 2 and 3 have 4 T and a constant, "
          "%.0f and %.0f kB, and step 4 a copy of keys and values, %.1f MB",
          (double)bytes[0][SIZES - 1] / 1e6, T_MAX, (double)bytes[1][SIZES - 1] / 1e3,
          (double)bytes[2][SIZES - 1] / 1e3, (double)bytes[3][SIZES - 1] / 1e6);
    double row = traffic[1][SIZES - 1], tile = traffic[2][SIZES - 1];
    claim(row / tile > 0.98 * FLASH_TILE, "a row at a time saves memory, not traffic: tiles of %d move %.1f times less",
          FLASH_TILE, row / tile);
    claim(exponentials[1][SIZES - 1] < 1.01 * exponentials[0][SIZES - 1] &&
              exponentials[2][SIZES - 1] < 1.04 * exponentials[0][SIZES - 1],
          "the corrections are cheap: %.2f %% more e^x a row at a time, %.1f %% in tiles",
          100 * (exponentials[1][SIZES - 1] / exponentials[0][SIZES - 1] - 1),
          100 * (exponentials[2][SIZES - 1] / exponentials[0][SIZES - 1] - 1));
}

// ---- 3. The backward ------------------------------------------------------------------------------------------------

static void backwards(const float* q, const float* k, const float* v) {
    enum { T = 512, COUNT = T * D };
    float* x[9]; // dout, out; by weights dq, dk, dv; by lse dq, dk, dv; out again
    uint64_t seed = 9;
    Sizes size = {T, T, D, D, D};
    Mask mask = {causal, NULL};
    Score score = {.kind = SCALED_DOT};
    for (int a = 0; a < 9; a++) x[a] = calloc(COUNT, sizeof(float));
    for (int c = 0; c < COUNT; c++) x[0][c] = normal(&seed);
    memset(&cost, 0, sizeof cost);
    float *weights = borrow((size_t)T * T), *dscores = borrow((size_t)T * T);
    size_t matrices = cost.bytes;
    attention_forward(x[1], weights, dscores, size, q, k, v, score, mask);
    attention_backward(x[2], x[3], x[4], (ScoreGradient){0}, dscores, dscores, x[0], weights, size, q, k, v, score);
    float* lse = borrow(T);
    size_t numbers = cost.bytes - matrices;
    flash_forward(x[8], lse, size, q, k, v, mask);
    flash_backward(x[5], x[6], x[7], x[0], x[8], lse, size, q, k, v, mask);
    float most = 0, largest = 0;
    for (int a = 2; a < 5; a++)
        for (int c = 0; c < COUNT; c++)
            most = fmaxf(most, fabsf(x[a][c] - x[a + 3][c])), largest = fmaxf(largest, fabsf(x[a][c]));
    printf("\n3. Backward, T = %d: weights and their gradient take %zu bytes, lse %zu;\n", T, matrices, numbers);
    printf("   largest difference of dq, dk, dv, relative: %.1e\n\n", (double)(most / largest));
    claim(most < 2e-6f * largest && matrices == 2 * sizeof(float) * T * T && numbers == sizeof(float) * T,
          "one number a query stands for a row of weights in the backward: they are made anew, e^(s - lse)");
    for (int a = 0; a < 9; a++) free(x[a]);
    free(weights), free(dscores), free(lse);
}

// ---- 4. Exact -------------------------------------------------------------------------------------------------------

// The largest error, relative to the largest output; e^s without subtracting the maximum, if so asked for step 1.
static float error(const float* out, const float* q, const float* k, const float* v, int T) {
    double most = 0, size = 0;
    for (int i = 0; i < T; i++) {
        double sum = 0, expected[D] = {0}, s[T_MAX / 8], largest = -INFINITY;
        for (int j = 0; j <= i; j++) {
            s[j] = 0;
            for (int c = 0; c < D; c++) s[j] += (double)q[i * D + c] * (double)k[j * D + c] / sqrt(D);
            largest = fmax(largest, s[j]);
        }
        for (int j = 0; j <= i; j++) {
            double p = exp(s[j] - largest);
            sum += p;
            for (int c = 0; c < D; c++) expected[c] += p * (double)v[j * D + c];
        }
        for (int c = 0; c < D; c++) {
            double off = fabs((double)out[i * D + c] - expected[c] / sum);
            most = off <= most ? most : off, size = fmax(size, fabs(expected[c] / sum)); // a NaN stays
        }
    }
    return (float)(most / size);
}

// The share of rows of which e^s, summed as it is, is larger than a float.
static float overflowing(const float* q, const float* k, int T) {
    int rows = 0;
    for (int i = 0; i < T; i++) {
        float sum = 0;
        for (int j = 0; j <= i; j++) sum += expf(inner(q + i * D, k + j * D, D) / sqrtf(D));
        rows += !isfinite(sum);
    }
    return (float)rows / (float)T;
}

static void exactness(float* q, const float* k, const float* v, float* qkv, float* out) {
    enum { T = 1024 };
    printf("\n4. Largest error against double precision, relative, T = %d\n\n", T);
    printf("   deviation of scores   step 1    step 2    step 3    step 4    rows whose sum\n");
    printf("                                                                 is infinite\n");
    float worst = 0, factor = 1, lost = 0;
    for (int deviation = 1; deviation <= 100; deviation *= 10, factor = 10) {
        for (int i = 0; i < T * D; i++) q[i] *= factor;
        for (int i = 0; i < T * D; i++) qkv[i / D * 3 * D + i % D] = q[i];
        printf("   %19d", deviation);
        for (int step = 0; step < STEPS; step++) {
            run(step, out, q, k, v, qkv, T);
            float e = error(out, q, k, v, T);
            worst = e <= worst * (float)deviation ? worst : e / (float)deviation;
            printf("  %8.1e", (double)e);
        }
        lost = overflowing(q, k, T);
        printf("  %10.1f %%\n", 100 * (double)lost);
    }
    putchar('\n');
    claim(worst < 1e-6f, "no step is an approximation: the error is that of float32, in all four alike");
    claim(lost > 0.5f, "but without the maximum, %.0f %% of the rows of large scores would be infinite",
          100 * (double)lost);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    omp_set_num_threads(1);
    size_t numbers = (size_t)T_MAX * D;
    float *q = borrow(numbers), *k = borrow(numbers), *v = borrow(numbers), *out = borrow(numbers);
    float* qkv = borrow(3 * numbers);
    uint64_t seed = 1;
    for (size_t i = 0; i < numbers; i++) q[i] = normal(&seed), k[i] = normal(&seed), v[i] = normal(&seed);
    for (size_t i = 0; i < numbers; i++) {
        float* row = qkv + i / D * 3 * D + i % D;
        row[0] = q[i], row[D] = k[i], row[2 * D] = v[i];
    }
    one_row();
    growth(q, k, v, qkv, out);
    backwards(q, k, v);
    exactness(q, k, v, qkv, out); // makes q larger, so it comes last
    free(q), free(k), free(v), free(out), free(qkv);
    return lesson_ends();
}

// Three changes to try:
//   - In tiles(), make the future visible: let `keys` be all of the tile, and j0 run to T. The multiply-adds double,
//     and the causal mask is seen to be half of the cost: a mask saves what is not computed, no more.
//   - In online(), let shrink be 1. What was summed under a smaller maximum then counts too much: the errors of part 4
//     are 0.6 to 1, as large as the outputs.
//   - In main(), let train_gpt.c have all threads: omp_set_num_threads(2). Step 4's times halve, each thread has its
//     own 45 kB, and the results stay the same, bit for bit. The other steps have one thread only.

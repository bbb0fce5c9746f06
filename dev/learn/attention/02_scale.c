// 02_scale.c: why scores are divided by the square root of the key's size.
//
// "We suspect that for large values of d_k, the dot products grow large in magnitude, pushing the softmax function into
// regions where it has extremely small gradients. To counteract this effect, we scale the dot products by 1/sqrt(d_k)."
// (Vaswani et al. 2017, section 3.2.1.) Some texts repeat this; others say that gradients would become extremely large.
// Here they are measured, for d = 1 to 1024, with queries and keys of independent normal numbers, 64 keys each time.
//
// What to look at:
//   1. the scores: their variance is d, and the weights go over from an average to a choice
//   2. the gradients, at the scores and at the query, with a loss behind the values: medians vanish, means grow
//   3. the same with a loss that sits on the weights themselves: there, nothing vanishes
//   4. whether it matters: the same task learned with and without the scale

#include "attention.h"
#include "draw.h"
#include "tape.h"

enum { N = 64, DV = 16, D_MAX = 1024, SIZES = 11, TRIALS = 1000 };

// What is measured for one size: over all trials, means, and of the gradients medians as well.
typedef struct {
    float variance, entropy, top;                          // of the scores; of the weights, in nats; the largest weight
    float ds_median, ds_mean, dq_median, dq_mean, dq_most; // lengths of the gradients, loss behind the values
    float ds_direct, dq_direct;                            // mean lengths, loss -log of the weight of one key
} Measured;

static int by_size(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

static float length(const float* x, int n) { return sqrtf(inner(x, x, n)); }

static Measured measure(int d, bool scaled) {
    float ds_length[TRIALS], dq_length[TRIALS];
    float q[D_MAX], dq[D_MAX], scores[N], w[N], ds[N], v[N * DV], dv[N * DV] = {0}, out[DV], work[1 + N];
    float *k = malloc(sizeof(float) * (size_t)(N * d)), *dk = calloc((size_t)(N * d), sizeof(float));
    if (!k || !dk) abort();
    float dout[DV]; // the gradient of a loss behind the values: any direction
    Measured r = {0};
    Sizes sizes = {1, N, d, d, DV};
    Score score = {.kind = scaled ? SCALED_DOT : DOT};
    uint64_t seed = 1; // the same numbers, scaled or not
    for (int trial = 0; trial < TRIALS; trial++) {
        for (int c = 0; c < d; c++) q[c] = normal(&seed);
        for (int c = 0; c < N * d; c++) k[c] = normal(&seed);
        for (int c = 0; c < N * DV; c++) v[c] = normal(&seed);
        for (int c = 0; c < DV; c++) dout[c] = normal(&seed) / sqrtf(DV);
        score_forward(scores, work, sizes, q, k, score);
        attention_forward(out, w, work, sizes, q, k, v, score, no_mask);
        float top = 0;
        for (int j = 0; j < N; j++) {
            r.variance += scores[j] * scores[j] / (N * TRIALS);
            r.entropy -= w[j] > 0 ? w[j] * logf(w[j]) / TRIALS : 0;
            top = fmaxf(top, w[j]);
        }
        r.top += top / TRIALS;

        zero(dq, (size_t)d);
        attention_backward(dq, dk, dv, (ScoreGradient){0}, ds, work, dout, w, sizes, q, k, v, score);
        ds_length[trial] = length(ds, N), dq_length[trial] = length(dq, d);
        r.ds_mean += ds_length[trial] / TRIALS, r.dq_mean += dq_length[trial] / TRIALS;

        for (int j = 0; j < N; j++) ds[j] = w[j] - (j == 0); // of the loss -log w_0, at the scores
        zero(dq, (size_t)d);
        score_backward(dq, dk, (ScoreGradient){0}, work, ds, sizes, q, k, score);
        r.ds_direct += length(ds, N) / TRIALS, r.dq_direct += length(dq, d) / TRIALS;
    }
    qsort(ds_length, TRIALS, sizeof(float), by_size), qsort(dq_length, TRIALS, sizeof(float), by_size);
    r.ds_median = ds_length[TRIALS / 2], r.dq_median = dq_length[TRIALS / 2], r.dq_most = dq_length[TRIALS - 1];
    free(k), free(dk);
    return r;
}

static void gradients(void) {
    Measured measured[2][SIZES]; // not scaled, scaled
    float d[SIZES], entropy[2][SIZES], median[2][SIZES], mean[SIZES];
#pragma omp parallel for schedule(dynamic) collapse(2)
    for (int i = SIZES - 1; i >= 0; i--)
        for (int s = 0; s < 2; s++) measured[s][i] = measure(1 << i, s);
    for (int s = 0; s < 2; s++) {
        printf("\n%s\n", s ? "scaled by 1/sqrt(d)" : "not scaled");
        printf("      scores   weights          loss behind the values           loss on weights\n");
        printf("   d variance entropy  top   |ds| median mean   |dq| median mean     |ds|   |dq|\n");
        for (int i = 0; i < SIZES; i++) {
            Measured r = measured[s][i];
            d[i] = (float)(1 << i), entropy[s][i] = r.entropy, median[s][i] = r.dq_median;
            if (!s) mean[i] = r.dq_mean;
            printf("%4.0f %8.2f  %5.2f  %4.2f  %10.1e %6.3f  %10.1e %6.3f  %7.3f %6.2f\n", d[i], r.variance, r.entropy,
                   r.top, r.ds_median, r.ds_mean, r.dq_median, r.dq_mean, r.ds_direct, r.dq_direct);
        }
    }
    putchar('\n');
    Series entropies[] = {{"not scaled", SIZES, d, entropy[0], false}, {"scaled", SIZES, d, entropy[1], false}};
    draw_curves("02_entropy", "Entropy of 64 weights", &(Axes){.x = "d", .y = "nats", .log_x = true, .zero = true},
                entropies, 2);
    putchar('\n');
    Series lengths[] = {{"not scaled, median", SIZES, d, median[0], false},
                        {"not scaled, mean", SIZES, d, mean, false},
                        {"scaled, median", SIZES, d, median[1], false}};
    draw_curves("02_gradient", "Length of the query's gradient, loss behind the values",
                &(Axes){.x = "d", .y = "|dq|", .log_x = true, .log_y = true}, lengths, 3);

    Measured plain = measured[0][SIZES - 1], scaled = measured[1][SIZES - 1];
    bool variance_is_d = true, keeps = true;
    for (int i = 1; i < SIZES; i++) {
        variance_is_d = variance_is_d && fabsf(measured[0][i].variance / d[i] - 1) < 0.05f;
        keeps = keeps && fabsf(measured[1][i].dq_mean / scaled.dq_mean - 1) < 0.15f;
    }
    claim(variance_is_d, "the variance of q . k is d, to within 5 %%");
    claim(plain.entropy < 0.2f && scaled.entropy > 3.5f,
          "at d = 1024 the weights have %.2f nats of entropy (scaled: %.2f; all equal: %.2f)", plain.entropy,
          scaled.entropy, logf(N));
    claim(plain.ds_median < 0.01f * scaled.ds_median,
          "'extremely small': the median gradient at the scores is %.0f times smaller",
          scaled.ds_median / plain.ds_median);
    claim(plain.dq_mean > 5 * scaled.dq_mean,
          "'extremely large': yet the mean gradient at the query is %.0f times larger", plain.dq_mean / scaled.dq_mean);
    claim(plain.dq_most > 50 * scaled.dq_most, "and the largest of %d is %.0f times larger than the largest scaled one",
          TRIALS, plain.dq_most / scaled.dq_most);
    claim(plain.ds_direct > 1 && plain.dq_direct > 30 * scaled.dq_direct,
          "a loss on the weights vanishes nowhere: |ds| %.2f, |dq| %.0f times larger", plain.ds_direct,
          plain.dq_direct / scaled.dq_direct);
    claim(keeps, "scaled, gradients have the same size from d = 2 to d = 1024, to within 15 %%");
}

// ---- 4. Does it matter? ---------------------------------------------------------------------------------------------
//
// A lookup is learned: a query is a noisy copy of one of 16 keys, seen through a matrix W (D,D) that begins random; the
// loss is half the square of the distance between what comes out and the value that belongs to the key. Each is given
// the best of nine learning rates. Returns the loss at the end, as a share of that of the average of all values.
typedef enum { GRADIENT_DESCENT, ADAMW, OPTIMIZERS } Optimizer;
enum { D = 128, KEYS = 16, QUERIES = 16, STEPS = 400, LAST = 50, RATES = 9 };

static float learn(bool scaled, Optimizer optimizer, float rate, uint64_t seed) {
    Tape* tape = tape_new(seed);
    Node* W = parameter(tape, D, D, 1 / sqrtf(D));
    Sizes sizes = {QUERIES, KEYS, D, D, DV};
    Score score = {.kind = scaled ? SCALED_DOT : DOT};
    float x[QUERIES * D], q[QUERIES * D], dq[QUERIES * D], k[KEYS * D], dk[KEYS * D], v[KEYS * DV], dv[KEYS * DV];
    float out[QUERIES * DV], dout[QUERIES * DV], w[QUERIES * KEYS], ds[QUERIES * KEYS];
    double loss = 0, average = 0;
    for (int step = 0; step < STEPS; step++) {
        for (int c = 0; c < KEYS * D; c++) k[c] = normal(&seed);
        for (int c = 0; c < KEYS * DV; c++) v[c] = normal(&seed);
        for (int i = 0; i < QUERIES; i++) // query i asks for key i
            for (int c = 0; c < D; c++) x[i * D + c] = k[i * D + c] + 0.5f * normal(&seed);
        zero(q, QUERIES * D), zero(dq, QUERIES * D), zero(dk, KEYS * D), zero(dv, KEYS * DV);
        add_ab(q, x, W->value, QUERIES, D, D);
        attention_forward(out, w, NULL, sizes, q, k, v, score, no_mask);
        for (int c = 0; c < QUERIES * DV; c++) {
            float mean = 0;
            for (int j = 0; j < KEYS; j++) mean += v[j * DV + c % DV] / KEYS;
            dout[c] = (out[c] - v[c]) / QUERIES;
            if (step >= STEPS - LAST) loss += powf(out[c] - v[c], 2), average += powf(mean - v[c], 2);
        }
        attention_backward(dq, dk, dv, (ScoreGradient){0}, ds, NULL, dout, w, sizes, q, k, v, score);
        add_atb(W->grad, x, dq, D, QUERIES, D);
        if (optimizer == ADAMW)
            adamw(tape, rate, 0, 0);
        else
            add_scaled(W->value, -rate, W->grad, D * D), zero(W->grad, D * D);
    }
    tape_free(tape);
    return (float)(loss / average);
}

static void learning(void) {
    static const float first_rate[OPTIMIZERS] = {1e-3f, 1e-4f};
    static const char* const names[OPTIMIZERS] = {"gradient descent", "AdamW"};
    float loss[OPTIMIZERS][2][RATES], best[OPTIMIZERS][2];
#pragma omp parallel for schedule(dynamic) collapse(3)
    for (int o = 0; o < OPTIMIZERS; o++)
        for (int s = 0; s < 2; s++)
            for (int r = 0; r < RATES; r++)
                loss[o][s][r] = learn(s, (Optimizer)o, first_rate[o] * powf(3, (float)r), 7);
    printf("\nLoss after %d steps, relative to that of the average of all values, d = %d\n", STEPS, D);
    for (int o = 0; o < OPTIMIZERS; o++) {
        printf("%-17s", names[o]);
        for (int r = 0; r < RATES; r++) printf(" %6.2g", first_rate[o] * powf(3, (float)r));
        for (int s = 0; s < 2; s++) {
            best[o][s] = INFINITY;
            printf("\n%-17s", s ? "  scaled" : "  not scaled");
            for (int r = 0; r < RATES; r++)
                printf(" %6.4f", loss[o][s][r]), best[o][s] = fminf(best[o][s], loss[o][s][r]);
        }
        putchar('\n');
    }
    for (int o = 0; o < OPTIMIZERS; o++)
        claim(best[o][1] < 0.25f * best[o][0] && best[o][0] < 0.1f,
              "%s: it is learned without the scale, too, but %.0f times worse, each at its best rate", names[o],
              best[o][0] / best[o][1]);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    gradients();
    learning();
    return lesson_ends();
}

// Three changes to try:
//   - In measure(), divide every key by sqrtf(d) as well. The weights become equal as d grows, entropy goes to log 64,
//     and the scaled gradient at the query falls as 1/sqrt(d): one can scale too much.
//   - In measure(), add the query to each key, k[c] = q[c % d] + normal(&seed). All scores grow by |q|^2, about d, and
//     the weights and gradients at the scores stay as they are: softmax does not see what is added to all scores.
//   - In learn(), let W begin ten times smaller. At d = 128 the dot product is then not too large at first, and needs
//     no scale: what the factor does, an initialisation can do, or a learning rate that fits.

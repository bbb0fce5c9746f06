// test_fast_weights.c: are the forms of linear attention and of the delta rule the same, and are their gradients
// right?
//
// Against the formulas in double precision, which multiply whole matrices; chunks of every size against one another;
// the delta rule's backward against finite differences; outputs and gradients of all forms against PyTorch's. Ends with "N passed, N failed", and with status 1 if any
// failed.

#include "check.h"
#include "fast_weights.h"

#include <stdio.h>
#include <stdlib.h>

static float* room(size_t count, uint64_t* seed) {
    float* x = calloc(count, sizeof(float));
    if (!x) abort();
    for (size_t i = 0; i < count && seed; i++) x[i] = normal(seed);
    return x;
}

// No number of x may differ from y's by more than `limit` times the largest.
static void expect_same(const float* x, const double* y, size_t count, double limit, const char* name,
                        const char* what) {
    double most = 0, largest = 1e-20;
    for (size_t i = 0; i < count; i++) {
        double off = fabs((double)x[i] - y[i]);
        most = off <= most ? most : off, largest = fmax(largest, fabs(y[i])); // a NaN stays
    }
    expect_of(most <= limit * largest, name, what, most / largest);
}

// ---- Linear attention -----------------------------------------------------------------------------------------------

static double phi_double(double x) { return x > 0 ? x + 1 : exp(x); }

static void test_linear(Sizes size) {
    uint64_t seed = 1;
    int n = size.n, dk = size.dk, dv = size.dv;
    float *q = room((size_t)n * dk, &seed), *k = room((size_t)n * dk, &seed), *v = room((size_t)n * dv, &seed);
    double *out = calloc((size_t)n * dv, sizeof *out), *sums = calloc((size_t)n, sizeof *sums);
    if (!out || !sums) abort();
    for (int i = 0; i < n; i++) {
        for (int j = 0; j <= i; j++) {
            double weight = 0;
            for (int c = 0; c < dk; c++)
                weight += phi_double((double)q[i * dk + c]) * phi_double((double)k[j * dk + c]);
            sums[i] += weight;
            for (int d = 0; d < dv; d++) out[i * dv + d] += weight * (double)v[j * dv + d];
        }
        for (int d = 0; d < dv; d++) out[i * dv + d] /= sums[i];
    }
    int chunks[] = {1, 2, 5, 16, n, n + 3};
    for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
        char name[80];
        snprintf(name, sizeof name, "linear attention, n %d, dk %d, dv %d, chunks of %d", n, dk, dv, chunks[c]);
        float *got = room((size_t)n * dv, &seed), *got_sums = room((size_t)n, &seed); // to be overwritten
        float* work = room(linear_chunked_work(size, chunks[c]), &seed);
        linear_chunked(got, got_sums, work, size, q, k, v, chunks[c]);
        expect_same(got, out, (size_t)n * dv, 2e-6, name, "out");
        expect_same(got_sums, sums, (size_t)n, 2e-6, name, "sums");
        free(got), free(got_sums), free(work);
    }
    free(q), free(k), free(v), free(out), free(sums);
}

// ---- The delta rule -------------------------------------------------------------------------------------------------

typedef struct {
    float *q, *k, *v, *beta, *S; // S: the memory before
} Inputs;

// out (n,dv) and the memory after, S (dk,dv), in double precision, as the papers write it:
// S_t = (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T.
static void definition(double* out, double* S, Sizes size, Inputs x) {
    int dk = size.dk, dv = size.dv;
    double* next = calloc((size_t)dk * dv, sizeof *next);
    if (!next) abort();
    for (int c = 0; c < dk * dv; c++) S[c] = (double)x.S[c];
    for (int t = 0; t < size.n; t++) {
        const float *k = x.k + t * dk, *q = x.q + t * dk, *v = x.v + t * dv;
        for (int a = 0; a < dk; a++)
            for (int d = 0; d < dv; d++) {
                double sum = (double)x.beta[t] * (double)k[a] * (double)v[d];
                for (int c = 0; c < dk; c++)
                    sum += ((a == c) - (double)x.beta[t] * (double)k[a] * (double)k[c]) * S[c * dv + d];
                next[a * dv + d] = sum;
            }
        for (int c = 0; c < dk * dv; c++) S[c] = next[c];
        for (int d = 0; d < dv; d++) {
            out[t * dv + d] = 0;
            for (int c = 0; c < dk; c++) out[t * dv + d] += S[c * dv + d] * (double)q[c];
        }
    }
    free(next);
}

static Inputs inputs(Sizes size, uint64_t* seed) {
    int n = size.n, dk = size.dk;
    Inputs x = {room((size_t)n * dk, seed), room((size_t)n * dk, seed), room((size_t)n * size.dv, seed),
                room((size_t)n, NULL), room((size_t)dk * size.dv, seed)};
    for (int t = 0; t < n; t++) {
        float* k = x.k + t * dk;
        float length = sqrtf(inner(k, k, dk));
        for (int c = 0; c < dk; c++) k[c] /= length;
        x.beta[t] = t % 4 == 3 ? (float)(t % 8 == 3) : uniform(seed); // 0 and 1, too
    }
    return x;
}

static void free_inputs(Inputs x) { free(x.q), free(x.k), free(x.v), free(x.beta), free(x.S); }

static void test_delta(Sizes size) {
    uint64_t seed = 2;
    int n = size.n;
    size_t outputs = (size_t)n * size.dv, memory = (size_t)size.dk * size.dv;
    Inputs x = inputs(size, &seed);
    double *out = calloc(outputs, sizeof *out), *S = calloc(memory, sizeof *S);
    if (!out || !S) abort();
    definition(out, S, size, x);
    int chunks[] = {0, 1, 2, 5, 16, n, n + 3}; // 0: the recurrent form
    for (size_t c = 0; c < sizeof chunks / sizeof chunks[0]; c++) {
        char name[80];
        snprintf(name, sizeof name, "delta rule, n %d, dk %d, dv %d, chunks of %d", n, size.dk, size.dv, chunks[c]);
        float *got = room(outputs, &seed), *u = room(outputs, &seed), *state = room(memory, NULL);
        memcpy(state, x.S, memory * sizeof(float));
        if (chunks[c])
            delta_chunked(got, u, state, size, x.q, x.k, x.v, x.beta, chunks[c]);
        else
            delta_forward(got, u, state, size, x.q, x.k, x.v, x.beta);
        expect_same(got, out, outputs, 3e-6, name, "out");
        expect_same(state, S, memory, 3e-6, name, "the memory after");

        // Half of the sequence, and then the other half with the memory that the first has left.
        Sizes half = size, rest = size;
        half.m = half.n = n / 2, rest.m = rest.n = n - n / 2;
        memcpy(state, x.S, memory * sizeof(float));
        if (half.n) delta_forward(got, u, state, half, x.q, x.k, x.v, x.beta);
        size_t at_k = (size_t)half.n * size.dk, at_v = (size_t)half.n * size.dv;
        delta_forward(got + at_v, u + at_v, state, rest, x.q + at_k, x.k + at_k, x.v + at_v, x.beta + half.n);
        expect_same(got, out, outputs, 3e-6, name, "out, in two parts");
        free(got), free(u), free(state);
    }
    free(out), free(S), free_inputs(x);
}

// The loss: outputs and the memory after, each number times a fixed one.
static double loss(Sizes size, Inputs x, const float* dout, const float* dS) {
    size_t outputs = (size_t)size.n * size.dv, memory = (size_t)size.dk * size.dv;
    double *out = calloc(outputs, sizeof *out), *S = calloc(memory, sizeof *S), sum = 0;
    if (!out || !S) abort();
    definition(out, S, size, x);
    for (size_t c = 0; c < outputs; c++) sum += out[c] * (double)dout[c];
    for (size_t c = 0; c < memory; c++) sum += S[c] * (double)dS[c];
    free(out), free(S);
    return sum;
}

static void test_delta_backward(Sizes size) {
    uint64_t seed = 3;
    size_t keys = (size_t)size.n * size.dk, values = (size_t)size.n * size.dv, memory = (size_t)size.dk * size.dv;
    Inputs x = inputs(size, &seed);
    float *dout = room(values, &seed), *dS = room(memory, &seed), *d_after = room(memory, NULL);
    float *out = room(values, &seed), *u = room(values, &seed), *S = room(memory, NULL),
          *work = room(2 * size.dv, &seed);
    float *dq = room(keys, NULL), *dk = room(keys, NULL), *dv = room(values, NULL), *dbeta = room(size.n, NULL);
    memcpy(d_after, dS, memory * sizeof(float)), memcpy(S, x.S, memory * sizeof(float));
    delta_forward(out, u, S, size, x.q, x.k, x.v, x.beta);
    delta_backward(dq, dk, dv, dbeta, dS, S, work, dout, u, size, x.q, x.k, x.v, x.beta);

    struct {
        const char* name;
        float *x, *dx;
        size_t count;
    } parts[] = {{"dq", x.q, dq, keys},
                 {"dk", x.k, dk, keys},
                 {"dv", x.v, dv, values},
                 {"dbeta", x.beta, dbeta, (size_t)size.n},
                 {"dS", x.S, dS, memory}};
    char name[80];
    snprintf(name, sizeof name, "delta rule backward, n %d, dk %d, dv %d", size.n, size.dk, size.dv);
    double* before = calloc(memory, sizeof *before);
    double* slope = calloc(keys + values + memory, sizeof *slope);
    if (!before || !slope) abort();
    for (size_t c = 0; c < memory; c++) before[c] = (double)x.S[c];
    expect_same(S, before, memory, 4e-6, name, "all writes taken back");
    for (int p = 0; p < 5; p++) {
        for (size_t c = 0; c < parts[p].count; c++) {
            float keep = parts[p].x[c];
            parts[p].x[c] = keep + 1e-3f;
            double high = loss(size, x, dout, d_after), above = (double)parts[p].x[c];
            parts[p].x[c] = keep - 1e-3f;
            slope[c] = (high - loss(size, x, dout, d_after)) / (above - (double)parts[p].x[c]);
            parts[p].x[c] = keep;
        }
        expect_same(parts[p].dx, slope, parts[p].count, 2e-5, name, parts[p].name);
    }
    // Gradients are added to: after a second time, they are twice as large.
    memcpy(dS, d_after, memory * sizeof(float)), memcpy(S, x.S, memory * sizeof(float));
    float* once = room(3 * (keys + values), NULL); // dq, dk, dv, dbeta, one behind the other
    size_t at = 0;
    for (int p = 0; p < 4; at += parts[p++].count) memcpy(once + at, parts[p].dx, parts[p].count * sizeof(float));
    delta_forward(out, u, S, size, x.q, x.k, x.v, x.beta);
    delta_backward(dq, dk, dv, dbeta, dS, S, work, dout, u, size, x.q, x.k, x.v, x.beta);
    at = 0;
    for (int p = 0; p < 4; at += parts[p++].count) {
        for (size_t c = 0; c < parts[p].count; c++) slope[c] = 2 * (double)once[at + c];
        expect_same(parts[p].dx, slope, parts[p].count, 1e-5, name, "gradients are added");
    }
    float* all[] = {dout, dS, d_after, out, u, S, work, dq, dk, dv, dbeta, once};
    for (size_t a = 0; a < sizeof all / sizeof all[0]; a++) free(all[a]);
    free(before), free(slope), free_inputs(x);
}

static const Sizes sizes[] = {{1, 1, 1, 1, 1}, {2, 2, 3, 3, 1}, {17, 17, 5, 5, 7}, {40, 40, 16, 16, 9}};

static void test_all_linear(void) {
    for (int s = 0; s < 4; s++) test_linear(sizes[s]);
}
static void test_all_delta(void) {
    for (int s = 0; s < 4; s++) test_delta(sizes[s]);
}
static void test_all_delta_backward(void) {
    for (int s = 0; s < 3; s++) test_delta_backward(sizes[s]);
}

// ---- PyTorch --------------------------------------------------------------------------------------------------------

// Recurrent and in chunks; backward is the same for both, since it needs what both give.
static void test_pytorch_delta(void) {
    read_fixture("nodes");
    enum { N = 11, DK = 4, DV = 3 };
    Sizes size = {N, N, DK, DK, DV};
    const float *q = stored("delta.q")->value, *k = stored("delta.k")->value, *v = stored("delta.v")->value,
                *beta = stored("delta.beta")->value;
    for (int chunk = 0; chunk <= N; chunk += 4) {
        char what[40];
        snprintf(what, sizeof what, "delta rule, chunks of %d", chunk);
        float out[N * DV], u[N * DV], S[DK * DV], dS[DK * DV], work[2 * DV];
        float dq[N * DK] = {0}, dk[N * DK] = {0}, dv[N * DV] = {0}, dbeta[N] = {0};
        memcpy(S, stored("delta.S0")->value, sizeof S), memcpy(dS, stored("delta.by.S")->value, sizeof dS);
        if (chunk)
            delta_chunked(out, u, S, size, q, k, v, beta, chunk);
        else
            delta_forward(out, u, S, size, q, k, v, beta);
        expect_stored(what, "delta.out", out, N, DV, 2e-6);
        expect_stored(what, "delta.S", S, DK, DV, 2e-6);
        delta_backward(dq, dk, dv, dbeta, dS, S, work, stored("delta.by.out")->value, u, size, q, k, v, beta);
        expect_stored(what, "delta.d.q", dq, N, DK, 4e-6);
        expect_stored(what, "delta.d.k", dk, N, DK, 4e-6);
        expect_stored(what, "delta.d.v", dv, N, DV, 4e-6);
        expect_stored(what, "delta.d.beta", dbeta, 1, N, 4e-6);
        expect_stored(what, "delta.d.S0", dS, DK, DV, 4e-6);
    }
}

static void test_pytorch_linear(void) {
    read_fixture("nodes");
    enum { N = 11, DK = 4, DV = 3 };
    Sizes size = {N, N, DK, DK, DV};
    const float *q = stored("linear.q")->value, *k = stored("linear.k")->value, *v = stored("linear.v")->value;
    for (int chunk = 1; chunk <= N + 2; chunk += 3) {
        char what[48];
        snprintf(what, sizeof what, "linear attention, chunks of %d", chunk);
        float out[N * DV], sums[N], *work = room(linear_chunked_work(size, chunk) + linear_work(size), NULL);
        float dq[N * DK] = {0}, dk[N * DK] = {0}, dv[N * DV] = {0};
        linear_chunked(out, sums, work, size, q, k, v, chunk);
        expect_stored(what, "linear.out", out, N, DV, 2e-6);
        linear_backward(dq, dk, dv, work, stored("linear.by.out")->value, out, sums, size, q, k, v, true);
        expect_stored(what, "linear.d.q", dq, N, DK, 4e-6);
        expect_stored(what, "linear.d.k", dk, N, DK, 4e-6);
        expect_stored(what, "linear.d.v", dv, N, DV, 4e-6);
        free(work);
    }
}

static const Test tests[] = {{"linear", test_all_linear},
                             {"delta", test_all_delta},
                             {"delta_backward", test_all_delta_backward},
                             {"pytorch_linear", test_pytorch_linear},
                             {"pytorch_delta", test_pytorch_delta}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

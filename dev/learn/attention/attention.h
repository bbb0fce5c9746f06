// attention.h: the family of attention mechanisms as plain C functions, each forward followed by its backward.
//
// All of them answer one question: m queries look into a store of n pairs of key and value, and each takes home an
// average of the values, weighted by how well the keys fit.
//
//     scores_ij  = score(q_i, k_j)                                       (m,n)
//     weights_ij = e^scores_ij / sum over j' of e^scores_ij'             (m,n), over the j' that i may see
//     out_i      = sum over j of weights_ij v_j                          (m,dv)
//
// The mechanisms differ in the score, in which j a query may see, in where queries, keys and values come from, and in
// how the sums are organised. The rooms of this file:
//
//     products                    three small matrix products, all that is needed of linear algebra
//     scores                      dot, scaled dot, general, additive, concat, cosine, location
//     masks and softmax           what a query may see, and the weights
//     attention                   the three lines above, forward and backward: the heart
//     several heads               W^Q, W^K, W^V, W^O
//     local attention             Luong's windows: local-m and local-p
//     flash attention             the same result as the heart's, without ever storing the (m,n) weights
//     linear attention            another score, with which time grows with m + n instead of m n
//     positions                   sinusoidal, rotary, ALiBi: what tells attention the order of things
//
// Shapes stand in comments as "x (m,dk)", the last index running fastest. m queries of size dq, n keys of size dk with
// n values of size dv; m and n differ in cross-attention, where one sequence looks into another. A gradient of the
// loss is called d + the name of what it is the gradient of, and is added to what its array holds, so that several
// uses of one array collect in it (in self-attention dq, dk and dv may be one array); scratch and the results of a
// forward are overwritten. All sizes are at least 1. Nothing is allocated: where scratch is needed, a function says how
// many floats. All is float32 and runs on one thread; the order of every sum is fixed.
//
// A query that may see nothing gets weights 0 and output 0, and gives gradients 0. (PyTorch makes NaN of such a row.)
//
// It is written to be read. train_gpt.c has the fast version of the one mechanism that GPT-2 uses.

#ifndef ATTENTION_H
#define ATTENTION_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ====================================================================================================================
// Products

// x . y
static inline float inner(const float* x, const float* y, int size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < size; c++) sum += x[c] * y[c];
    return sum;
}

// y += a x
static inline void add_scaled(float* y, float a, const float* x, int size) {
    for (int c = 0; c < size; c++) y[c] += a * x[c];
}

// C (rows,columns) += A (rows,inside) B (inside,columns)
static inline void add_ab(float* c, const float* a, const float* b, int rows, int inside, int columns) {
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < inside; k++) add_scaled(c + i * columns, a[i * inside + k], b + k * columns, columns);
}

// C (rows,columns) += A (rows,inside) B^T, with B (columns,inside)
static inline void add_abt(float* c, const float* a, const float* b, int rows, int inside, int columns) {
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[i * columns + j] += inner(a + i * inside, b + j * inside, inside);
}

// C (rows,columns) += A^T B, with A (inside,rows), B (inside,columns)
static inline void add_atb(float* c, const float* a, const float* b, int rows, int inside, int columns) {
    for (int k = 0; k < inside; k++)
        for (int i = 0; i < rows; i++) add_scaled(c + i * columns, a[k * rows + i], b + k * columns, columns);
}

// For y = A B these give both gradients: dA += dy B^T, dB += A^T dy. Every backward below is made of them.

static inline void zero(float* x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = 0;
}

// ====================================================================================================================
// Scores: how well a key fits a query

typedef struct {
    int m, n;       // queries; keys and values
    int dq, dk, dv; // size of a query, of a key, of a value
} Sizes;

typedef enum {
    DOT,        // q . k                            dq = dk. Luong et al. 2015
    SCALED_DOT, // q . k / sqrt(dk)                 dq = dk. Vaswani et al. 2017
    GENERAL,    // q^T W k                          W (dq,dk). Luong et al. 2015, also called bilinear or multiplicative
    ADDITIVE,   // v_a . tanh(W_q^T q + W_k^T k)    W_q (dq,h), W_k (dk,h), v_a (h). Bahdanau et al. 2015
    CONCAT,     // v_a . tanh(W^T [q; k])           W (dq + dk,h), v_a (h). Luong et al. 2015
    COSINE,     // beta q . k / (|q| |k|)           dq = dk, beta (1). Content-based addressing, Graves et al. 2014
    LOCATION,   // (W^T q)_j                        W (dq,h), n <= h: the key itself is not looked at. Luong et al. 2015
    SCORES      // how many there are
} ScoreKind;

// A score with its parameters: those that its line above names, the others are not looked at.
typedef struct {
    ScoreKind kind;
    int h;                                   // columns of W_q, W_k and of concat's and location's W
    const float *W, *W_q, *W_k, *v_a, *beta; // beta NULL: 1
    const float* bias;                       // (m,n), added to the scores of any kind, or NULL; its gradient is dscores
} Score;

// The gradients of those parameters: the ones that the score has must be there, but for beta's.
typedef struct {
    float *W, *W_q, *W_k, *v_a, *beta;
} ScoreGradient;

// Concat is additive attention: W^T [q; k] = W_q^T q + W_k^T k, where W_q is W's first dq rows and W_k the others.
static inline Score as_additive(Score s, Sizes size) {
    if (s.kind == CONCAT) s.kind = ADDITIVE, s.W_q = s.W, s.W_k = s.W + size.dq * s.h;
    return s;
}

// Floats of scratch that score_forward, score_backward and what calls them need.
static inline size_t score_work(Sizes size, Score s) {
    size_t m = (size_t)size.m, n = (size_t)size.n;
    switch (s.kind) {
    case GENERAL:
        return m * (size_t)size.dk;
    case ADDITIVE:
    case CONCAT:
        return 2 * (m + n) * (size_t)s.h;
    case COSINE:
        return m + n;
    default:
        return 0;
    }
}

// inverse (rows): 1 / |x_i|, or 0 for a row of zeros, which so gets score 0 and gradient 0.
static inline void inverse_norms(float* inverse, const float* x, int rows, int size) {
    for (int i = 0; i < rows; i++) {
        float norm = sqrtf(inner(x + i * size, x + i * size, size));
        inverse[i] = norm > 0 ? 1 / norm : 0;
    }
}

// What dot products are multiplied with. For q and k with independent numbers of mean 0 and variance 1, q . k has
// variance dk: divided by sqrt(dk) it has 1 at any size, and softmax stays where its gradient is alive.
static inline float dot_scale(ScoreKind kind, int dk) { return kind == SCALED_DOT ? 1 / sqrtf((float)dk) : 1; }

// scores (m,n) from q (m,dq), k (n,dk).
static inline void score_forward(float* scores, float* work, Sizes size, const float* q, const float* k, Score s) {
    int m = size.m, n = size.n, dq = size.dq, dk = size.dk;
    s = as_additive(s, size);
    zero(scores, (size_t)m * n);
    switch (s.kind) {
    case DOT:
    case SCALED_DOT: {
        float scale = dot_scale(s.kind, dk);
        add_abt(scores, q, k, m, dk, n);
        for (int i = 0; i < m * n; i++) scores[i] *= scale;
        break;
    }
    case GENERAL: {       // q^T W k: W takes the query to where the keys live, and there it is a dot product
        float* qW = work; // (m,dk)
        zero(qW, (size_t)m * dk);
        add_ab(qW, q, s.W, m, dq, dk);
        add_abt(scores, qW, k, m, dk, n);
        break;
    }
    case ADDITIVE: { // each side is projected once, m + n times in all; each pair then costs h tanh
        float *a = work, *b = a + m * s.h; // q W_q (m,h), k W_k (n,h)
        zero(a, (size_t)(m + n) * s.h);
        add_ab(a, q, s.W_q, m, dq, s.h);
        add_ab(b, k, s.W_k, n, dk, s.h);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++)
                for (int c = 0; c < s.h; c++) scores[i * n + j] += s.v_a[c] * tanhf(a[i * s.h + c] + b[j * s.h + c]);
        break;
    }
    case COSINE: {
        float *one_over_q = work, *one_over_k = work + m, beta = s.beta ? *s.beta : 1;
        inverse_norms(one_over_q, q, m, dq);
        inverse_norms(one_over_k, k, n, dk);
        add_abt(scores, q, k, m, dk, n);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) scores[i * n + j] *= beta * one_over_q[i] * one_over_k[j];
        break;
    }
    case LOCATION: // the query says where to look, by number; of W's h positions the first n are there
        for (int i = 0; i < m; i++)
            for (int c = 0; c < dq; c++) add_scaled(scores + i * n, q[i * dq + c], s.W + c * s.h, n);
        break;
    default:
        break;
    }
    for (int i = 0; i < m * n && s.bias; i++) scores[i] += s.bias[i];
}

// dscores (m,n) -> dq (m,dq), dk (n,dk) and the parameters' gradients.
//     dot        s_ij = scale q_i . k_j:                 dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i
//     general    s_ij = u_i . k_j with u = q W:          dk = ds^T u,  du = ds k,  dq = du W^T,  dW = q^T du
//     additive   s_ij = v_a . t with t = tanh(a_i + b_j): dv_a = sum_ij ds_ij t,  and with
//                dt_ij = ds_ij v_a (1 - t^2):            da_i = sum_j dt_ij,  db_j = sum_i dt_ij, then as for products
//     cosine     s_ij = beta cos, cos = q^ . k^ with q^ = q / |q|, k^ = k / |k|. A change of q along itself changes
//                nothing:                                dq_i = beta / |q_i| sum_j ds_ij (k^_j - cos q^_i), dk alike
//     location   s_ij = sum_c q_ic W_cj:                 dq_ic = sum_j ds_ij W_cj,  dW_cj = sum_i q_ic ds_ij
static inline void score_backward(float* dq, float* dk, ScoreGradient d, float* work, const float* dscores, Sizes size,
                                  const float* q, const float* k, Score s) {
    int m = size.m, n = size.n, h = s.h;
    if (s.kind == CONCAT) d.W_q = d.W, d.W_k = d.W + size.dq * h;
    s = as_additive(s, size);
    switch (s.kind) {
    case DOT:
    case SCALED_DOT: {
        float scale = dot_scale(s.kind, size.dk);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                add_scaled(dq + i * size.dq, scale * dscores[i * n + j], k + j * size.dk, size.dk);
                add_scaled(dk + j * size.dk, scale * dscores[i * n + j], q + i * size.dq, size.dq);
            }
        break;
    }
    case GENERAL: {
        float *u = work, *du = work; // (m,size.dk), one after the other
        zero(u, (size_t)m * size.dk);
        add_ab(u, q, s.W, m, size.dq, size.dk);
        add_atb(dk, dscores, u, n, m, size.dk);
        zero(du, (size_t)m * size.dk);
        add_ab(du, dscores, k, m, n, size.dk);
        add_abt(dq, du, s.W, m, size.dk, size.dq);
        add_atb(d.W, q, du, size.dq, m, size.dk);
        break;
    }
    case ADDITIVE: {
        float *a = work, *b = a + m * h, *da = b + n * h, *db = da + m * h;
        zero(work, (size_t)2 * (m + n) * h);
        add_ab(a, q, s.W_q, m, size.dq, h);
        add_ab(b, k, s.W_k, n, size.dk, h);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++)
                for (int c = 0; c < h; c++) {
                    float ds = dscores[i * n + j], t = tanhf(a[i * h + c] + b[j * h + c]);
                    float dt = ds * s.v_a[c] * (1 - t * t);
                    d.v_a[c] += ds * t;
                    da[i * h + c] += dt;
                    db[j * h + c] += dt;
                }
        add_abt(dq, da, s.W_q, m, h, size.dq);
        add_atb(d.W_q, q, da, size.dq, m, h);
        add_abt(dk, db, s.W_k, n, h, size.dk);
        add_atb(d.W_k, k, db, size.dk, n, h);
        break;
    }
    case COSINE: {
        float *one_over_q = work, *one_over_k = work + m, beta = s.beta ? *s.beta : 1;
        inverse_norms(one_over_q, q, m, size.dq);
        inverse_norms(one_over_k, k, n, size.dk);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                const float *qi = q + i * size.dq, *kj = k + j * size.dk;
                float both = one_over_q[i] * one_over_k[j], cosine = both * inner(qi, kj, size.dk);
                float ds = dscores[i * n + j];
                add_scaled(dq + i * size.dq, beta * ds * both, kj, size.dk);
                add_scaled(dq + i * size.dq, -beta * ds * cosine * one_over_q[i] * one_over_q[i], qi, size.dq);
                add_scaled(dk + j * size.dk, beta * ds * both, qi, size.dq);
                add_scaled(dk + j * size.dk, -beta * ds * cosine * one_over_k[j] * one_over_k[j], kj, size.dk);
                if (d.beta) *d.beta += ds * cosine;
            }
        break;
    }
    case LOCATION:
        for (int i = 0; i < m; i++)
            for (int c = 0; c < size.dq; c++) {
                dq[i * size.dq + c] += inner(dscores + i * n, s.W + c * h, n);
                add_scaled(d.W + c * h, q[i * size.dq + c], dscores + i * n, n);
            }
        break;
    default:
        break;
    }
}

// ====================================================================================================================
// Masks and softmax

// May query i see key j? sees NULL: every query sees every key.
typedef struct {
    bool (*sees)(const void* data, int i, int j);
    const void* data;
} Mask;

static const Mask no_mask = {NULL, NULL};

// No key later than the query. data: NULL, or an int, the number of keys that come before the first query, as n - m
// keys do when the queries are the last m of n positions.
static inline bool causal(const void* data, int i, int j) { return j <= i + (data ? *(const int*)data : 0); }

// Keys at most *data (an int) away, to either side.
static inline bool window(const void* data, int i, int j) {
    int w = *(const int*)data;
    return j - i <= w && i - j <= w;
}

// The first *data (an int) keys; the others only fill up a batch of sequences of unequal lengths.
static inline bool padding(const void* data, int i, int j) {
    (void)i;
    return j < *(const int*)data;
}

// Any mask, written out.
typedef struct {
    const uint8_t* sees; // (m,n): 1 or 0
    int n;
} MaskTable;
static inline bool mask_table(const void* data, int i, int j) {
    const MaskTable* table = (const MaskTable*)data;
    return table->sees[(size_t)i * table->n + j];
}

static inline bool may_see(Mask mask, int i, int j) { return !mask.sees || mask.sees(mask.data, i, j); }

// weights (m,n) from scores (m,n), which may be the same array. The largest score of a row is subtracted first: that
// changes nothing, numerator and denominator being divided by the same e^largest, but keeps e^score finite.
static inline void softmax_forward(float* weights, const float* scores, int m, int n, Mask mask) {
    for (int i = 0; i < m; i++) {
        const float* s = scores + i * n;
        float *p = weights + i * n, largest = -INFINITY, sum = 0;
        for (int j = 0; j < n; j++)
            if (may_see(mask, i, j) && !(s[j] <= largest)) largest = s[j];
        for (int j = 0; j < n; j++)
            sum += p[j] = may_see(mask, i, j) && largest != -INFINITY ? expf(s[j] - largest) : 0;
        for (int j = 0; j < n && sum != 0; j++) p[j] /= sum;
    }
}

// dscores (m,n) from dweights (m,n), which may be the same array. With p = e^s / sum,
//     dp_j / ds_l = p_j (1 if j = l, else 0) - p_j p_l,    so    ds_l = p_l (dp_l - sum over j of p_j dp_j).
// A key that is not seen has p = 0, hence ds = 0: no mask is needed here.
static inline void softmax_backward(float* dscores, const float* dweights, const float* weights, int m, int n) {
    for (int i = 0; i < m; i++) {
        const float *dp = dweights + i * n, *p = weights + i * n;
        float mean = inner(p, dp, n);
        for (int j = 0; j < n; j++) dscores[i * n + j] = p[j] * (dp[j] - mean);
    }
}

// ====================================================================================================================
// Attention: the heart

// out (m,dv), weights (m,n) from q (m,dq), k (n,dk), v (n,dv); work: score_work() floats.
// Self-attention: q, k and v come from one sequence. Cross-attention: q from one, k and v from another.
// Time m n (d + dv) with d what the score costs, memory m n.
static inline void attention_forward(float* out, float* weights, float* work, Sizes size, const float* q,
                                     const float* k, const float* v, Score score, Mask mask) {
    score_forward(weights, work, size, q, k, score);
    softmax_forward(weights, weights, size.m, size.n, mask);
    zero(out, (size_t)size.m * size.dv);
    add_ab(out, weights, v, size.m, size.n, size.dv);
}

// dout (m,dv) -> dq (m,dq), dk (n,dk), dv (n,dv), the score's parameters, and dscores (m,n), which is overwritten.
// out = weights v is a product: dv = weights^T dout, dweights = dout v^T. The rest is above.
static inline void attention_backward(float* dq, float* dk, float* dv, ScoreGradient dscore, float* dscores,
                                      float* work, const float* dout, const float* weights, Sizes size, const float* q,
                                      const float* k, const float* v, Score score) {
    add_atb(dv, weights, dout, size.n, size.m, size.dv);
    float* dweights = dscores;
    zero(dweights, (size_t)size.m * size.n);
    add_abt(dweights, dout, v, size.m, size.dv, size.n);
    softmax_backward(dscores, dweights, weights, size.m, size.n);
    score_backward(dq, dk, dscore, work, dscores, size, q, k, score);
}

#endif

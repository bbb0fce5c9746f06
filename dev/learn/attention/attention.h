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

#include "quick.h"

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
    const float *W, *W_q, *W_k, *v_a, *beta; // beta NULL: 1; W_q, W_k NULL: q, k of size h are projected already
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
// variance dk: divided by sqrt(dk) it has 1 at any size. 02_scale.c measures what that is good for.
static inline float dot_scale(ScoreKind kind, int dk) { return kind == SCALED_DOT ? 1 / sqrtf((float)dk) : 1; }

// x W (rows,h), put into y; or x itself where W is NULL.
static inline const float* projected(float* y, const float* x, const float* W, int rows, int inside, int h) {
    if (!W) return x;
    zero(y, (size_t)rows * h);
    add_ab(y, x, W, rows, inside, h);
    return y;
}

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
        const float *a = projected(work, q, s.W_q, m, dq, s.h), *b = projected(work + m * s.h, k, s.W_k, n, dk, s.h);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int c = 0; c < s.h; c++) sum += s.v_a[c] * tanh_quick(a[i * s.h + c] + b[j * s.h + c]);
                scores[i * n + j] = sum;
            }
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
    case CONCAT: // is additive by now
    case SCORES:;
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
        float *u = work, *du = work; // (m,dk), one after the other
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
        const float* a = projected(work, q, s.W_q, m, size.dq, h);
        const float* b = projected(work + m * h, k, s.W_k, n, size.dk, h);
        float *da = s.W_q ? work + (m + n) * h : dq, *db = s.W_k ? work + (2 * m + n) * h : dk;
        zero(work + (m + n) * h, (size_t)(m + n) * h);
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) {
                float ds = dscores[i * n + j];
#pragma omp simd
                for (int c = 0; c < h; c++) {
                    float t = tanh_quick(a[i * h + c] + b[j * h + c]), dt = ds * s.v_a[c] * (1 - t * t);
                    d.v_a[c] += ds * t;
                    da[i * h + c] += dt;
                    db[j * h + c] += dt;
                }
            }
        if (s.W_q) add_abt(dq, da, s.W_q, m, h, size.dq), add_atb(d.W_q, q, da, size.dq, m, h);
        if (s.W_k) add_abt(dk, db, s.W_k, n, h, size.dk), add_atb(d.W_k, k, db, size.dk, n, h);
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
    case CONCAT: // is additive by now
    case SCORES:;
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
        float *p = weights + i * n, largest = -INFINITY, sum = 0;
        for (int j = 0; j < n; j++) {
            p[j] = may_see(mask, i, j) ? scores[i * n + j] : -INFINITY; // e^-infinity = 0
            if (!(p[j] <= largest)) largest = p[j];
        }
        if (largest == -INFINITY) { // nothing is seen
            zero(p, (size_t)n);
            continue;
        }
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < n; j++) sum += p[j] = exp_quick(p[j] - largest);
        for (int j = 0; j < n; j++) p[j] /= sum;
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

// ====================================================================================================================
// Several heads (Vaswani et al. 2017, section 3.2.2)
//
//     head_h = attention(q W^Q_h, k W^K_h, v W^V_h),    out = [head_1, ..., head_H] W^O
//
// A head looks at its own D directions of the vectors, so that one query can look for several things at once. With W^O
// cut into one block of D rows a head, the concatenation needs no memory: out = sum over h of head_h W^O_h.

typedef struct {
    Sizes in;     // of q, k, v as they come
    int heads, D; // D: size of a head's queries, keys and values; usually heads * D = dq
    int dout;     // columns of W^O
} HeadSizes;

typedef struct {
    const float* W_q; // (heads,dq,D)
    const float* W_k; // (heads,dk,D)
    const float* W_v; // (heads,dv,D)
    const float* W_o; // (heads,D,dout)
} Projections;

typedef struct {
    float *W_q, *W_k, *W_v, *W_o;
} ProjectionGradients;

static inline Sizes head_sizes(HeadSizes s) { return (Sizes){s.in.m, s.in.n, s.D, s.D, s.D}; }

// A head's queries, keys and values, and what it found: Q (m,D), K (n,D), V (n,D), O (m,D).
typedef struct {
    float *Q, *K, *V, *O;
} Head;

static inline Head head_in(float* block, HeadSizes s) {
    size_t queries = (size_t)s.in.m * s.D, keys = (size_t)s.in.n * s.D;
    return (Head){block, block + queries, block + queries + keys, block + queries + 2 * keys};
}
static inline size_t head_floats(HeadSizes s) { return 2 * (size_t)(s.in.m + s.in.n) * s.D; }

// out (m,dout), weights (heads,m,n) from q (m,dq), k (n,dk), v (n,dv). kept: heads * head_floats() floats, for the
// backward. bias: (heads,m,n), added to the scores, or NULL. Each head is scaled dot product attention.
static inline void multi_head_forward(float* out, float* weights, float* kept, HeadSizes size, const float* q,
                                      const float* k, const float* v, Projections w, const float* bias, Mask mask) {
    int m = size.in.m, n = size.in.n, dq = size.in.dq, dk = size.in.dk, dv = size.in.dv, D = size.D;
    zero(out, (size_t)m * size.dout);
    zero(kept, size.heads * head_floats(size));
    for (int h = 0; h < size.heads; h++) {
        Head x = head_in(kept + h * head_floats(size), size);
        Score score = {.kind = SCALED_DOT, .bias = bias ? bias + (size_t)h * m * n : NULL};
        add_ab(x.Q, q, w.W_q + h * dq * D, m, dq, D);
        add_ab(x.K, k, w.W_k + h * dk * D, n, dk, D);
        add_ab(x.V, v, w.W_v + h * dv * D, n, dv, D);
        // A dot product needs no scratch; `kept` stands there because gcc warns about NULL in the scores that do.
        attention_forward(x.O, weights + (size_t)h * m * n, kept, head_sizes(size), x.Q, x.K, x.V, score, mask);
        add_ab(out, x.O, w.W_o + h * D * size.dout, m, D, size.dout);
    }
}

// dout (m,dout) -> dq (m,dq), dk (n,dk), dv (n,dv), the projections' gradients, and dscores (heads,m,n), overwritten:
// it is bias's gradient. work: head_floats() floats. Products only: O = dout W^O_h^T, and so back to q, k, v.
static inline void multi_head_backward(float* dq, float* dk, float* dv, ProjectionGradients d, float* dscores,
                                       float* work, const float* dout, const float* weights, float* kept,
                                       HeadSizes size, const float* q, const float* k, const float* v, Projections w) {
    int m = size.in.m, n = size.in.n, D = size.D;
    Score score = {.kind = SCALED_DOT};
    for (int h = 0; h < size.heads; h++) {
        size_t at_q = (size_t)h * size.in.dq * D, at_k = (size_t)h * size.in.dk * D, at_v = (size_t)h * size.in.dv * D;
        size_t at_o = (size_t)h * D * size.dout, at = (size_t)h * m * n;
        Head x = head_in(kept + h * head_floats(size), size), dx = head_in(work, size);
        zero(work, head_floats(size));
        add_abt(dx.O, dout, w.W_o + at_o, m, size.dout, D);
        add_atb(d.W_o + at_o, x.O, dout, D, m, size.dout);
        attention_backward(dx.Q, dx.K, dx.V, (ScoreGradient){0}, dscores + at, NULL, dx.O, weights + at,
                           head_sizes(size), x.Q, x.K, x.V, score);
        add_abt(dq, dx.Q, w.W_q + at_q, m, D, size.in.dq);
        add_atb(d.W_q + at_q, q, dx.Q, size.in.dq, m, D);
        add_abt(dk, dx.K, w.W_k + at_k, n, D, size.in.dk);
        add_atb(d.W_k + at_k, k, dx.K, size.in.dk, n, D);
        add_abt(dv, dx.V, w.W_v + at_v, n, D, size.in.dv);
        add_atb(d.W_v + at_v, v, dx.V, size.in.dv, n, D);
    }
}

// ====================================================================================================================
// Local attention (Luong et al. 2015, section 3.2): a query looks only at the keys within D of a centre.
//
// local-m (monotonic) puts the centre of query i at i: that is attention_forward with the mask `window`.
// local-p (predictive) lets the query choose it, and favours the keys near it:
//     p_i = (n - 1) logistic(v_p . tanh(W_p^T q_i)),    weights_ij = aligned_ij e^(-(j - p_i)^2 / (2 sigma^2))
// where aligned = softmax of the scores of the keys with |j - p_i| <= D, and sigma = D / 2. The Gaussian is what p_i
// learns by: the window's edges have no gradient. Rows of weights sum to less than 1. (The paper counts positions from
// 1 and has p = S logistic(...), S positions; from 0 the last is n - 1.)

typedef struct {
    int D;                  // half the window's width, at least 1
    int h;                  // columns of W_p
    const float *W_p, *v_p; // (dq,h), (h)
} Local;

// Unit c of tanh(W_p^T q_i).
static inline float center_unit(Local local, const float* qi, int dq, int c) {
    float sum = 0;
    for (int r = 0; r < dq; r++) sum += qi[r] * local.W_p[r * local.h + c];
    return tanh_quick(sum);
}

typedef struct {
    const float* centers; // (m)
    int D;
} Near;
static inline bool near_center(const void* data, int i, int j) {
    const Near* near = (const Near*)data;
    return fabsf((float)j - near->centers[i]) <= (float)near->D;
}

// e^(-(j - p)^2 / (2 sigma^2)) with sigma = D / 2
static inline float nearness(float distance, int D) { return exp_quick(-2 * distance * distance / (float)(D * D)); }

// out (m,dv), weights (m,n), aligned (m,n), centers (m): p; work: score_work() floats.
static inline void local_forward(float* out, float* weights, float* aligned, float* centers, float* work, Sizes size,
                                 const float* q, const float* k, const float* v, Score score, Local local) {
    int m = size.m, n = size.n;
    for (int i = 0; i < m; i++) {
        float z = 0;
        for (int c = 0; c < local.h; c++) z += local.v_p[c] * center_unit(local, q + i * size.dq, size.dq, c);
        centers[i] = (float)(n - 1) * logistic_quick(z);
    }
    Near near = {centers, local.D};
    score_forward(aligned, work, size, q, k, score);
    softmax_forward(aligned, aligned, m, n, (Mask){near_center, &near});
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) weights[i * n + j] = aligned[i * n + j] * nearness((float)j - centers[i], local.D);
    zero(out, (size_t)m * size.dv);
    add_ab(out, weights, v, m, n, size.dv);
}

// dout (m,dv) -> dq, dk, dv, the score's parameters, dW_p (dq,h), dv_p (h), and dscores (m,n), overwritten.
//     daligned_ij = dweights_ij e^(...),    dp_i = sum_j dweights_ij weights_ij (j - p_i) / sigma^2,
//     dz_i = dp_i (n - 1) y (1 - y) with y = logistic(z) = p / (n - 1),    and on through tanh and W_p.
static inline void local_backward(float* dq, float* dk, float* dv, ScoreGradient dscore, float* dW_p, float* dv_p,
                                  float* dscores, float* work, const float* dout, const float* weights,
                                  const float* aligned, const float* centers, Sizes size, const float* q,
                                  const float* k, const float* v, Score score, Local local) {
    int m = size.m, n = size.n;
    add_atb(dv, weights, dout, n, m, size.dv);
    zero(dscores, (size_t)m * n);
    add_abt(dscores, dout, v, m, size.dv, n); // dweights
    for (int i = 0; i < m; i++) {
        const float* qi = q + i * size.dq;
        float dp = 0;
        for (int j = 0; j < n; j++) {
            float distance = (float)j - centers[i], *dweight = dscores + i * n + j;
            dp += *dweight * weights[i * n + j] * distance * 4 / (float)(local.D * local.D);
            *dweight *= nearness(distance, local.D); // now daligned
        }
        float dz = n == 1 ? 0 : dp * centers[i] * (1 - centers[i] / (float)(n - 1));
        for (int c = 0; c < local.h; c++) {
            float t = center_unit(local, qi, size.dq, c), dt = dz * local.v_p[c] * (1 - t * t);
            dv_p[c] += dz * t;
            for (int r = 0; r < size.dq; r++) {
                dW_p[r * local.h + c] += dt * qi[r];
                dq[i * size.dq + r] += dt * local.W_p[r * local.h + c];
            }
        }
    }
    softmax_backward(dscores, dscores, aligned, m, n);
    score_backward(dq, dk, dscore, work, dscores, size, q, k, score);
}

// ====================================================================================================================
// Flash attention (Dao et al. 2022): scaled dot product attention whose weights are never stored
//
// Softmax needs the sum over all keys before the first weight is known. But sums can be begun with any maximum and
// corrected later (online softmax, Milakov and Gimelshein 2018): a query that has seen some keys has their largest
// score, and relative to it
//     sum = sum_j e^(s_j - largest),    out = sum_j e^(s_j - largest) v_j.
// When a larger score comes, both are multiplied by e^(largest - new largest). At the end out / sum is exact. So keys
// can be taken a tile at a time, and a tile of queries is taken with each tile of keys while that is in the cache: that
// is all that FlashAttention saves, reads and writes of slow memory; its arithmetic is the heart's. One number a query
// remains for the backward: lse = largest + log sum, so that weights_ij = e^(s_ij - lse_i) can be made anew.
// Time m n (dk + dv) as before, memory m + n.

enum { FLASH_TILE = 32 };

static inline int tile_end(int start, int count) { return start + FLASH_TILE < count ? start + FLASH_TILE : count; }

// out (m,dv), lse (m), -INFINITY for a query that may see nothing.
static inline void flash_forward(float* out, float* lse, Sizes size, const float* q, const float* k, const float* v,
                                 Mask mask) {
    float scale = dot_scale(SCALED_DOT, size.dk), s[FLASH_TILE], largest[FLASH_TILE], sum[FLASH_TILE];
    zero(out, (size_t)size.m * size.dv);
    for (int i0 = 0; i0 < size.m; i0 += FLASH_TILE) {
        int i1 = tile_end(i0, size.m);
        for (int i = i0; i < i1; i++) largest[i - i0] = -INFINITY, sum[i - i0] = 0;
        for (int j0 = 0; j0 < size.n; j0 += FLASH_TILE) {
            int j1 = tile_end(j0, size.n);
            for (int i = i0; i < i1; i++) {
                float *o = out + (size_t)i * size.dv, *top = &largest[i - i0], before = *top;
                for (int j = j0; j < j1; j++) {
                    float score = scale * inner(q + (size_t)i * size.dq, k + (size_t)j * size.dk, size.dk);
                    s[j - j0] = may_see(mask, i, j) ? score : -INFINITY;
                    if (!(s[j - j0] <= *top)) *top = s[j - j0];
                }
                if (*top == -INFINITY) continue; // nothing seen so far
                float shrink = exp_quick(before - *top);
                sum[i - i0] *= shrink;
                for (int d = 0; d < size.dv; d++) o[d] *= shrink;
                for (int j = j0; j < j1; j++) {
                    float p = exp_quick(s[j - j0] - *top);
                    sum[i - i0] += p;
                    add_scaled(o, p, v + (size_t)j * size.dv, size.dv);
                }
            }
        }
        for (int i = i0; i < i1; i++) {
            lse[i] = largest[i - i0] + logf(sum[i - i0]);
            for (int d = 0; d < size.dv && lse[i] != -INFINITY; d++) out[(size_t)i * size.dv + d] /= sum[i - i0];
        }
    }
}

// dout (m,dv) -> dq (m,dq), dk (n,dk), dv (n,dv). The softmax's derivative needs the mean of a row's dweights, but
//     sum_j p_ij dp_ij = sum_j p_ij (dout_i . v_j) = dout_i . sum_j p_ij v_j = dout_i . out_i
// needs no other tile.
static inline void flash_backward(float* dq, float* dk, float* dv, const float* dout, const float* out,
                                  const float* lse, Sizes size, const float* q, const float* k, const float* v,
                                  Mask mask) {
    float scale = dot_scale(SCALED_DOT, size.dk), mean[FLASH_TILE];
    for (int i0 = 0; i0 < size.m; i0 += FLASH_TILE) {
        int i1 = tile_end(i0, size.m);
        for (int i = i0; i < i1; i++)
            mean[i - i0] = inner(dout + (size_t)i * size.dv, out + (size_t)i * size.dv, size.dv);
        for (int j0 = 0; j0 < size.n; j0 += FLASH_TILE)
            for (int i = i0; i < i1; i++)
                for (int j = j0; j < tile_end(j0, size.n); j++) {
                    if (!may_see(mask, i, j)) continue;
                    size_t at_q = (size_t)i * size.dq, at_k = (size_t)j * size.dk, at_v = (size_t)j * size.dv;
                    const float* dout_i = dout + (size_t)i * size.dv;
                    float p = exp_quick(scale * inner(q + at_q, k + at_k, size.dk) - lse[i]);
                    float ds = p * (inner(dout_i, v + at_v, size.dv) - mean[i - i0]) * scale;
                    add_scaled(dv + at_v, p, dout_i, size.dv);
                    add_scaled(dq + at_q, ds, k + at_k, size.dk);
                    add_scaled(dk + at_k, ds, q + at_q, size.dk);
                }
    }
}

// ====================================================================================================================
// Linear attention (Katharopoulos et al. 2020)
//
// In place of e^(q . k) the similarity is phi(q) . phi(k), with phi(x) = elu(x) + 1 > 0 for each number. Then q leaves
// the sum over keys:
//     out_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)  =  phi(q_i)^T S / phi(q_i) . z
//     with  S = sum_j phi(k_j) v_j^T  (dk,dv),    z = sum_j phi(k_j)  (dk).
// All that is known of the keys and values is in S and z, whose size does not depend on their number: a memory written
// to by adding outer products, as in the fast weights of Schmidhuber 1992. Causal: S and z as they are after key i, so
// it is a recurrent network. Time (m + n) dk dv, memory dk dv.

static inline float phi(float x) { return x > 0 ? x + 1 : exp_quick(x); }
static inline float phi_slope(float x) { return x > 0 ? 1 : exp_quick(x); } // its derivative

// Floats of scratch: forward S (dk,dv) and z (dk); backward their gradients, too.
static inline size_t linear_work(Sizes size) { return 2 * (size_t)size.dk * (size_t)(size.dv + 1); }

// S += phi(k) v^T, z += phi(k)
static inline void remember(float* S, float* z, const float* k, const float* v, Sizes size) {
    for (int c = 0; c < size.dk; c++) {
        z[c] += phi(k[c]);
        add_scaled(S + c * size.dv, phi(k[c]), v, size.dv);
    }
}

// out (m,dv), sums (m): phi(q_i) . z, for the backward. causal: query i sees keys 0..i; needs m <= n.
static inline void linear_forward(float* out, float* sums, float* work, Sizes size, const float* q, const float* k,
                                  const float* v, bool is_causal) {
    float *S = work, *z = S + size.dk * size.dv;
    zero(work, linear_work(size));
    zero(out, (size_t)size.m * size.dv);
    for (int j = 0; j < size.n && !is_causal; j++)
        remember(S, z, k + (size_t)j * size.dk, v + (size_t)j * size.dv, size);
    for (int i = 0; i < size.m; i++) {
        float* o = out + (size_t)i * size.dv;
        if (is_causal) remember(S, z, k + (size_t)i * size.dk, v + (size_t)i * size.dv, size);
        sums[i] = 0;
        for (int c = 0; c < size.dk; c++) {
            float a = phi(q[(size_t)i * size.dq + c]);
            sums[i] += a * z[c];
            add_scaled(o, a, S + c * size.dv, size.dv);
        }
        for (int d = 0; d < size.dv; d++) o[d] /= sums[i];
    }
}

// dout (m,dv) -> dq (m,dq), dk (n,dk), dv (n,dv). With a = phi(q_i), b_j = phi(k_j), out = a^T S / (a . z):
//     dnum = dout_i / sum_i,    dsum = -dout_i . out_i / sum_i,    da = S dnum + z dsum,
//     dS += a dnum^T,  dz += a dsum  from every query that saw key j, and then  db_j = dS v_j + dz,  dv_j = dS^T b_j.
// Causal: S and z are made anew, forward in time, for dq; dS and dz collect backward in time, for dk and dv.
static inline void linear_backward(float* dq, float* dk, float* dv, float* work, const float* dout, const float* out,
                                   const float* sums, Sizes size, const float* q, const float* k, const float* v,
                                   bool is_causal) {
    float *S = work, *z = S + size.dk * size.dv, *dS = z + size.dk, *dz = dS + size.dk * size.dv;
    zero(work, linear_work(size));
    for (int j = 0; j < size.n && !is_causal; j++)
        remember(S, z, k + (size_t)j * size.dk, v + (size_t)j * size.dv, size);
    for (int i = 0; i < size.m; i++) {
        const float *o = out + (size_t)i * size.dv, *d_o = dout + (size_t)i * size.dv;
        float dsum = -inner(d_o, o, size.dv) / sums[i];
        if (is_causal) remember(S, z, k + (size_t)i * size.dk, v + (size_t)i * size.dv, size);
        for (int c = 0; c < size.dk; c++) {
            float x = q[(size_t)i * size.dq + c], da = inner(S + c * size.dv, d_o, size.dv) / sums[i] + z[c] * dsum;
            dq[(size_t)i * size.dq + c] += da * phi_slope(x);
        }
    }
    int i = size.m - 1; // the last query whose gradient is not yet in dS and dz
    for (int j = size.n - 1; j >= 0; j--) {
        for (; i >= (is_causal ? j : 0); i--) {
            const float *o = out + (size_t)i * size.dv, *d_o = dout + (size_t)i * size.dv;
            float dsum = -inner(d_o, o, size.dv) / sums[i];
            for (int c = 0; c < size.dk; c++) {
                float a = phi(q[(size_t)i * size.dq + c]);
                add_scaled(dS + c * size.dv, a / sums[i], d_o, size.dv);
                dz[c] += a * dsum;
            }
        }
        for (int c = 0; c < size.dk; c++) {
            float x = k[(size_t)j * size.dk + c];
            dk[(size_t)j * size.dk + c] +=
                (inner(dS + c * size.dv, v + (size_t)j * size.dv, size.dv) + dz[c]) * phi_slope(x);
            add_scaled(dv + (size_t)j * size.dv, phi(x), dS + c * size.dv, size.dv);
        }
    }
}

// ====================================================================================================================
// Positions: attention itself does not know the order of its keys

// table (n,d), added to the inputs (Vaswani et al. 2017, section 3.5): pair c of position t is
// sin and cos of t / 10000^(2c/d), a clock with hands of many speeds.
static inline void sinusoidal_positions(float* table, int n, int d) {
    for (int t = 0; t < n; t++)
        for (int c = 0; c < d; c++) {
            double angle = t * pow(10000, -(double)(c - c % 2) / d);
            table[(size_t)t * d + c] = (float)(c % 2 ? cos(angle) : sin(angle));
        }
}

// Rotary positions (Su et al. 2021): pair c of row t of x (n,d), d even, is turned in its plane by the angle
// (first + t) / 10000^(2c/d), in place. After that q_i . k_j depends on i - j alone, since turning both by the same
// angle changes no product. Turning back is the inverse and, turns being orthogonal, the gradient: dx = back(dy).
static inline void turn_pairs(float* x, int n, int d, int first, int direction) {
    for (int t = 0; t < n; t++)
        for (int c = 0; c < d; c += 2) {
            double angle = direction * (first + t) * pow(10000, -(double)c / d);
            float *pair = x + (size_t)t * d + c, u = pair[0], w = pair[1];
            pair[0] = (float)cos(angle) * u - (float)sin(angle) * w;
            pair[1] = (float)sin(angle) * u + (float)cos(angle) * w;
        }
}
static inline void rotary_forward(float* x, int n, int d, int first) { turn_pairs(x, n, d, first, 1); }
static inline void rotary_backward(float* dx, int n, int d, int first) { turn_pairs(dx, n, d, first, -1); }

// ALiBi (Press et al. 2022): bias (m,n) = -slope |first + i - j|: what is further away counts less, and nothing is
// learned. Head h of H has slope 2^(-8 h / H), h from 1.
static inline void alibi(float* bias, int m, int n, int first, float slope) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) bias[(size_t)i * n + j] = -slope * fabsf((float)(first + i - j));
}

#endif

// dropout.h: attention with dropout on its weights, as one operation of the tape.
//
// In training, each weight is set to 0 with probability p, and the others are divided by 1 - p, so that what comes out
// is the same on average (Srivastava et al. 2014; Vaswani et al. 2017, section 5.4). A row of weights then no longer
// sums to 1. A token cannot rely on seeing one certain other token each time.

#pragma once
#include "tape_attention.h"

typedef struct {
    int batch;
    float *weights, *used; // (batch,m,n): of softmax; and what the values are multiplied with
} Dropped;

// With out = used V, used = factor weights:  dV = used^T dout,  dweights = factor dout V^T, and factor = used / weights
// is 0 or 1/(1 - p); then on through softmax and score as in attention.h.
static inline void dropped_attention_backward(Node* y) {
    const Dropped* e = (Dropped*)y->extra;
    Node *q = y->in[0], *k = y->in[1], *v = y->in[2];
    int m = q->rows / e->batch, n = k->rows / e->batch, d = q->cols, dv = v->cols;
    float *dw = (float*)take(y->tape, 2 * sizeof(float) * (size_t)(m * n)), *ds = dw + m * n;
    for (int b = 0; b < e->batch; b++) {
        const float *w = e->weights + b * m * n, *used = e->used + b * m * n, *dout = y->grad + b * m * dv;
        add_atb(v->grad + b * n * dv, used, dout, n, m, dv);
        zero(dw, (size_t)(m * n));
        add_abt(dw, dout, v->value + b * n * dv, m, dv, n);
        for (int i = 0; i < m * n; i++) dw[i] *= w[i] > 0 ? used[i] / w[i] : 0;
        softmax_backward(ds, dw, w, m, n);
        score_backward(q->grad + b * m * d, k->grad + b * n * d, (ScoreGradient){0}, NULL, ds, (Sizes){m, n, d, d, dv},
                       q->value + b * m * d, k->value + b * n * d, (Score){.kind = SCALED_DOT});
    }
}

// out (batch m,dv) from q (batch m,d), k (batch n,d), v (batch n,dv): one head, scaled dot products, each sequence by
// itself. seed NULL: nothing is dropped. *weights, if asked for: softmax's, (batch,m,n), on the tape.
static inline Node* dropped_attention(Node* q, Node* k, Node* v, int batch, float p, uint64_t* seed, float** weights) {
    int m = q->rows / batch, n = k->rows / batch, d = q->cols, dv = v->cols;
    insist(m * batch == q->rows && n * batch == k->rows && k->rows == v->rows && k->cols == d && p >= 0 && p < 1,
           "attention of %d x %d, %d x %d, %d x %d", q->rows, d, k->rows, k->cols, v->rows, dv);
    Node* y = record(q->tape, q->rows, dv, dropped_attention_backward, 3, (Node*[]){q, k, v}, sizeof(Dropped));
    size_t bytes = sizeof(float) * (size_t)(batch * m * n);
    Dropped e = {batch, (float*)take(y->tape, bytes), (float*)take(y->tape, bytes)};
    *(Dropped*)y->extra = e;
    zero(y->value, size(y));
    for (int b = 0; b < batch; b++) {
        float *w = e.weights + b * m * n, *used = e.used + b * m * n;
        score_forward(used, NULL, (Sizes){m, n, d, d, dv}, q->value + b * m * d, k->value + b * n * d,
                      (Score){.kind = SCALED_DOT});
        softmax_forward(w, used, m, n, no_mask);
        for (int i = 0; i < m * n; i++) used[i] = !seed ? w[i] : uniform(seed) < p ? 0 : w[i] / (1 - p);
        add_ab(y->value + b * m * dv, used, v->value + b * n * dv, m, n, dv);
    }
    if (weights) *weights = e.weights;
    return y;
}

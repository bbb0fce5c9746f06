// memory.h: an LSTM that reads its own past by attention (LSTMN: Cheng, Dong and Lapata 2016, section 3), on the tape.
//
// A recurrent network has one state, into which all that it has read must fit. The LSTMN keeps every state that it was
// ever in, as a tape of pairs (h_i, c_i), and begins each step from an average of them, weighted by attention, in place
// of the last one:
//     a_i = v_a . tanh(h_i W_h + x_t W_x + s_t-1 W_s),   w = softmax(a) over i < t       additive scores
//     (s_t, m_t) = sum over i of w_i (h_i, c_i)                                          what is remembered
//     i, f, o = logistic(x_t W + s_t U + b),  g = tanh(...)                              the cell of recurrent.h,
//     c_t = f * m_t + i * g,   h_t = o * tanh c_t                                        with s, m for h, c
// In the paper s and m are written with a tilde. Its self-attention is called intra-attention there, being the
// first of that kind. The t-th step reads t - 1 states: time and memory grow with the square of the length.

#pragma once
#include "attention.h"
#include "recurrent.h"

// Query, keys and values of sequence b, laid out as attention.h has them: K (count,h), V (count,dv).
typedef struct {
    int count, h, dv;
    float *K, *V, *dK, *dV, *work;
} Remembered;

// Inputs of the node: query, v_a, key_0, value_0, key_1, value_1 ...
static inline Remembered remembered(Node* const* in, int count, int b, Tape* t) {
    Remembered r = {count, in[2]->cols, in[3]->cols, NULL, NULL, NULL, NULL, NULL};
    size_t h = (size_t)r.h, dv = (size_t)r.dv, n = (size_t)count;
    r.K = (float*)take(t, sizeof(float) * (2 * n * (h + dv) + 2 * (1 + n) * h));
    r.V = r.K + n * h, r.dK = r.V + n * dv, r.dV = r.dK + n * h, r.work = r.dV + n * dv;
    for (int i = 0; i < count; i++) {
        memcpy(r.K + i * r.h, in[2 + 2 * i]->value + b * r.h, sizeof(float) * h);
        memcpy(r.V + i * r.dv, in[3 + 2 * i]->value + b * r.dv, sizeof(float) * dv);
    }
    return r;
}

// One query for each sequence, scored additively; queries and keys are projected already.
static inline Sizes one_query(Remembered r) { return (Sizes){1, r.count, r.h, r.h, r.dv}; }
static inline Score additive(const Node* v_a) { return (Score){.kind = ADDITIVE, .h = v_a->cols, .v_a = v_a->value}; }

// What the query's gradient, and those of all keys and values of a sequence, receive; see attention_backward.
static inline void read_memory_backward(Node* y) {
    Tape* t = y->tape;
    Node *query = y->in[0], *v_a = y->in[1];
    int count = y->inputs / 2 - 1, h = query->cols, dv = y->cols;
    const float* weights = (float*)y->extra;
    for (int b = 0; b < y->rows; b++) {
        int chunk = t->current;
        size_t used = t->used;
        Remembered r = remembered(y->in, count, b, t);
        float* dscores = (float*)take(t, sizeof(float) * (size_t)count);
        zero(r.dK, (size_t)count * (size_t)(h + dv));
        attention_backward(query->grad + b * h, r.dK, r.dV, (ScoreGradient){.v_a = v_a->grad}, dscores, r.work,
                           y->grad + b * dv, weights + b * count, one_query(r), query->value + b * h, r.K, r.V,
                           additive(v_a));
        for (int i = 0; i < count; i++) {
            add_scaled(y->in[2 + 2 * i]->grad + b * h, 1, r.dK + i * h, h);
            add_scaled(y->in[3 + 2 * i]->grad + b * dv, 1, r.dV + i * dv, dv);
        }
        t->current = chunk, t->used = used;
    }
}

// out (B,dv): for each of B sequences the average of its `count` values, one of each value[i] (B,dv), weighted by how
// well key[i] (B,h) fits query (B,h); v_a (1,h). *weights, if not NULL, is where the weights (B,count) are found.
static inline Node* read_memory(Node* query, Node* v_a, Node* const* key, Node* const* value, int count,
                                const float** weights) {
    Tape* t = query->tape;
    Node** in = (Node**)take(t, sizeof(Node*) * (size_t)(2 + 2 * count));
    in[0] = query, in[1] = v_a;
    for (int i = 0; i < count; i++) {
        insist(key[i]->cols == query->cols && key[i]->rows == query->rows && value[i]->rows == query->rows,
               "a memory of %d x %d, asked by %d x %d", key[i]->rows, key[i]->cols, query->rows, query->cols);
        in[2 + 2 * i] = key[i], in[3 + 2 * i] = value[i];
    }
    Node* y = record(t, query->rows, value[0]->cols, read_memory_backward, 2 + 2 * count, in,
                     sizeof(float) * (size_t)(query->rows * count));
    for (int b = 0; b < y->rows; b++) {
        int chunk = t->current;
        size_t used = t->used;
        Remembered r = remembered(in, count, b, t);
        attention_forward(y->value + b * y->cols, (float*)y->extra + b * count, r.work, one_query(r),
                          query->value + b * r.h, r.K, r.V, additive(v_a), no_mask);
        t->current = chunk, t->used = used; // the copies are not needed any more
    }
    if (weights) *weights = (float*)y->extra;
    return y;
}

typedef struct {
    Lstm cell;
    int h;                       // units of the score
    Node *W_h, *W_x, *W_s, *v_a; // (n,h), (in,h), (n,h), (1,h)
} Lstmn;

static inline Lstmn lstmn_new(Tape* t, int in, int n, int h) {
    return (Lstmn){lstm_new(t, in, n),
                   h,
                   recurrent_weights(t, n, h, n),
                   recurrent_weights(t, in, h, in),
                   recurrent_weights(t, n, h, n),
                   parameter(t, 1, h, 1 / sqrtf((float)h))};
}

// states[t] (B,n) from x (steps B,in), time-major: row t B + b is what sequence b reads at time t. weights[t], if
// weights is not NULL, becomes the weights (B,t) of step t >= 1.
static inline void lstmn_read(const Lstmn* l, Node* x, int steps, Node** states, const float** weights) {
    Tape* t = x->tape;
    int B = x->rows / steps, n = l->cell.n;
    Node *xW = lstm_input(&l->cell, x), *xW_x = matmul(x, l->W_x), *s = constant(t, B, n, NULL), *m = s;
    Node **key = (Node**)take(t, sizeof(Node*) * (size_t)steps),
         **pair = (Node**)take(t, sizeof(Node*) * (size_t)steps);
    for (int i = 0; i < steps; i++) {
        if (i > 0) {
            Node* query = add(slice_rows(xW_x, i * B, B), matmul(s, l->W_s));
            Node* both = read_memory(query, l->v_a, key, pair, i, weights ? &weights[i] : NULL);
            s = slice_columns(both, 0, n), m = slice_columns(both, n, n);
        }
        Node *h = s, *c = m;
        lstm_step(&l->cell, slice_rows(xW, i * B, B), &h, &c);
        states[i] = h, key[i] = matmul(h, l->W_h), pair[i] = concat_columns(2, (Node*[]){h, c});
    }
}

// tape_attention.h: attention with several heads, for a batch of sequences, as one operation of the tape.

#pragma once
#include "attention.h"
#include "tape.h"

// What the operation needs besides queries, keys and values. Zero stands for: one head, no mask, nothing added.
typedef struct {
    int heads;
    Mask mask;
    const float* bias;  // (heads,m,n), added to the scores, or NULL
    const float* turns; // (n,D), for rotary positions: a cos and a sin for each pair; or NULL. m must be n
    float* weights;     // (batch,heads,m,n), where they are kept; NULL: with the tape
} Heads;

// The table of turns for rotary positions (see rotary_forward): pair c of place i turns by i / base^(2c/D), in the
// paper with base 10000.
static inline void rotary_turns(float* turns, int n, int D, double base) {
    for (int i = 0; i < n; i++)
        for (int c = 0; c < D; c += 2) {
            double angle = i * pow(base, -(double)c / D);
            turns[i * D + c] = (float)cos(angle), turns[i * D + c + 1] = (float)sin(angle);
        }
}

// Columns from, from + 1, ... of x (rows,all) as head (rows,D), each pair turned by `direction` (1, -1) times the
// turns.
static inline void head_of(float* head, const float* x, int rows, int all, int from, int D, const float* turns,
                           int direction) {
    for (int i = 0; i < rows; i++) {
        memcpy(head + i * D, x + i * all + from, sizeof(float) * (size_t)D);
        for (int c = 0; c < D && turns; c += 2) {
            float *pair = head + i * D + c, u = pair[0], w = pair[1];
            float cosine = turns[i * D + c], sine = (float)direction * turns[i * D + c + 1];
            pair[0] = cosine * u - sine * w, pair[1] = sine * u + cosine * w;
        }
    }
}

static inline void add_head(float* x, const float* head, int rows, int all, int from, int D) {
    for (int i = 0; i < rows; i++) add_scaled(x + i * all + from, 1, head + i * D, D);
}

typedef struct {
    Heads heads;
    int batch;
} AttentionExtra;

static inline Sizes sizes_of_head(const Node* q, const Node* k, int batch, int heads) {
    int D = q->cols / heads;
    return (Sizes){q->rows / batch, k->rows / batch, D, D, D};
}

static inline void attention_node_backward(Node* y) {
    AttentionExtra* e = (AttentionExtra*)y->extra;
    Heads h = e->heads;
    Node *q = y->in[0], *k = y->in[1], *v = y->in[2];
    Sizes s = sizes_of_head(q, k, e->batch, h.heads);
    int m = s.m, n = s.n, D = s.dk, all = q->cols;
    float* room = (float*)take(y->tape, sizeof(float) * (size_t)((3 * m + 4 * n) * D + m * n));
    float *Q = room, *dQ = Q + m * D, *dO = dQ + m * D, *K = dO + m * D, *dK = K + n * D;
    float *V = dK + n * D, *dV = V + n * D, *dscores = dV + n * D;
    for (int task = 0; task < e->batch * h.heads; task++) {
        int b = task / h.heads, from = task % h.heads * D, at_q = b * m * all, at_k = b * n * all;
        head_of(Q, q->value + at_q, m, all, from, D, h.turns, 1);
        head_of(K, k->value + at_k, n, all, from, D, h.turns, 1);
        head_of(V, v->value + at_k, n, all, from, D, NULL, 1);
        head_of(dO, y->grad + at_q, m, all, from, D, NULL, 1);
        zero(dQ, (size_t)(m * D)), zero(dK, (size_t)(n * D)), zero(dV, (size_t)(n * D));
        attention_backward(dQ, dK, dV, (ScoreGradient){0}, dscores, NULL, dO, h.weights + (size_t)task * m * n, s, Q, K,
                           V, (Score){.kind = SCALED_DOT});
        head_of(Q, dQ, m, D, 0, D, h.turns, -1);
        head_of(K, dK, n, D, 0, D, h.turns, -1);
        add_head(q->grad + at_q, Q, m, all, from, D);
        add_head(k->grad + at_k, K, n, all, from, D);
        add_head(v->grad + at_k, dV, n, all, from, D);
    }
}

// out (batch m,C) from q (batch m,C), k and v (batch n,C), of which head h has columns h C/heads and following. The
// rows of a sequence lie together; each sequence sees itself only.
static inline Node* attention_node(Node* q, Node* k, Node* v, int batch, Heads h) {
    if (h.heads < 1) h.heads = 1;
    Sizes s = sizes_of_head(q, k, batch, h.heads);
    int m = s.m, n = s.n, D = s.dk, all = q->cols;
    insist(D * h.heads == all && k->cols == all && v->cols == all && v->rows == k->rows,
           "attention of %d x %d, %d x %d, %d x %d", q->rows, all, k->rows, k->cols, v->rows, v->cols);
    Node* y = record(q->tape, q->rows, all, attention_node_backward, 3, (Node*[]){q, k, v}, sizeof(AttentionExtra));
    if (!h.weights) h.weights = (float*)take(q->tape, sizeof(float) * (size_t)(batch * h.heads * m * n));
    *(AttentionExtra*)y->extra = (AttentionExtra){h, batch};
    float* room = (float*)take(q->tape, sizeof(float) * (size_t)(2 * (m + n) * D));
    float *Q = room, *O = Q + m * D, *K = O + m * D, *V = K + n * D;
    zero(y->value, size(y));
    for (int task = 0; task < batch * h.heads; task++) {
        int b = task / h.heads, head = task % h.heads, from = head * D;
        Score score = {.kind = SCALED_DOT, .bias = h.bias ? h.bias + (size_t)head * m * n : NULL};
        head_of(Q, q->value + b * m * all, m, all, from, D, h.turns, 1);
        head_of(K, k->value + b * n * all, n, all, from, D, h.turns, 1);
        head_of(V, v->value + b * n * all, n, all, from, D, NULL, 1);
        attention_forward(O, h.weights + (size_t)task * m * n, NULL, s, Q, K, V, score, h.mask);
        add_head(y->value + b * m * all, O, m, all, from, D);
    }
    return y;
}

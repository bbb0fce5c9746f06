// glimpse.h: looking at all places a little, or at one, drawn by chance: the soft and the hard attention of Xu et al.
// 2015 ("Show, attend and tell", section 4), as operations of the tape.
//
// For each of B pictures there are n places with scores, w = softmax(scores), and values. Soft attention takes their
// average, as everywhere in this course, and has a derivative. Hard attention draws one place from w and takes its value:
// the others need not be computed. A draw has no derivative; but its expectation has. With reward r_j for place j,
//     d/ds E[r] = d/ds sum_j w_j r_j = sum_j w_j r_j d(log w_j)/ds = E[r d(log w)/ds]
// (REINFORCE: Williams 1992), so the gradient of r log w at the place drawn is right on average. It is so with r - b for
// any b that does not depend on the draw, since E[d(log w)/ds] = d/ds sum_j w_j = 0: a baseline b near r leaves the mean,
// and takes away variance.

#pragma once
#include "attention.h"
#include "tape.h"

// out_b = sum over j of w_bj v_bj:  dw_bj = dout_b . v_bj,  dv_bj = w_bj dout_b
static inline void soft_glimpse_backward(Node* y) {
    Node *w = y->in[0], *v = y->in[1];
    for (int b = 0; b < w->rows; b++)
        for (int j = 0; j < w->cols; j++) {
            size_t at = (size_t)(b * w->cols + j), row = at * (size_t)y->cols;
            w->grad[at] += inner(y->grad + b * y->cols, v->value + row, y->cols);
            add_scaled(v->grad + row, w->value[at], y->grad + b * y->cols, y->cols);
        }
}

// out (B,c) from weights (B,n), values (B n,c), of which picture b has rows b n and following.
static inline Node* soft_glimpse(Node* weights, Node* values) {
    int B = weights->rows, n = weights->cols;
    insist(values->rows == B * n, "%d values for %d x %d weights", values->rows, B, n);
    Node* y = record(weights->tape, B, values->cols, soft_glimpse_backward, 2, (Node*[]){weights, values}, 0);
    zero(y->value, size(y));
    for (int b = 0; b < B; b++)
        add_ab(y->value + b * y->cols, weights->value + b * n, values->value + b * n * y->cols, 1, n, y->cols);
    return y;
}

// place[b]: drawn from row b of weights (B,n).
static inline void draw_places(int* place, const Node* weights, uint64_t* seed) {
    for (int b = 0; b < weights->rows; b++) {
        const float* w = weights->value + b * weights->cols;
        float left = uniform(seed);
        int j = 0;
        while (j < weights->cols - 1 && (left -= w[j]) > 0) j++;
        place[b] = j;
    }
}

typedef struct {
    const float* advantage; // (B): r - b
    const int* place;       // (B)
    float entropy;          // weight of the entropy
    float* w;               // (B,n)
} Reinforce;

// With H = -sum_j w_j log w_j and L_b = -(a log w_place + e H):
//     d(log w_place)/ds_j = [j = place] - w_j,    dH/ds_j = -w_j (log w_j + H)
static inline void reinforce_backward(Node* y) {
    const Reinforce* e = (Reinforce*)y->extra;
    Node* s = y->in[0];
    int n = s->cols;
    for (int b = 0; b < s->rows; b++) {
        const float* w = e->w + b * n;
        float H = 0, share = y->grad[0] / (float)s->rows;
        for (int j = 0; j < n; j++) H -= w[j] > 0 ? w[j] * logf(w[j]) : 0;
        for (int j = 0; j < n; j++) {
            float dlog = (float)(j == e->place[b]) - w[j], dH = w[j] > 0 ? -w[j] * (logf(w[j]) + H) : 0;
            s->grad[b * n + j] -= share * (e->advantage[b] * dlog + e->entropy * dH);
        }
    }
}

// The mean over pictures of -(advantage log w_place + entropy H(w)), (1,1), whose gradient at scores (B,n) is
// REINFORCE's. advantage and place must last until backward().
static inline Node* reinforce(Node* scores, const int* place, const float* advantage, float entropy) {
    Tape* t = scores->tape;
    int n = scores->cols;
    Node* y = record(t, 1, 1, reinforce_backward, 1, &scores, sizeof(Reinforce));
    Reinforce* e = (Reinforce*)y->extra;
    *e = (Reinforce){advantage, place, entropy, (float*)take(t, sizeof(float) * size(scores))};
    double sum = 0;
    for (int b = 0; b < scores->rows; b++) {
        float *w = e->w + b * n, H = 0;
        softmax_row(w, scores->value + b * n, n);
        for (int j = 0; j < n; j++) H -= w[j] > 0 ? w[j] * logf(w[j]) : 0;
        sum -= (double)(advantage[b] * logf(fmaxf(w[place[b]], 1e-37f)) + entropy * H);
    }
    y->value[0] = (float)(sum / scores->rows);
    return y;
}

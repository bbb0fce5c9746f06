// recurrent.h: the two recurrent cells that the encoder-decoders of 2014 to 2016 were made of, on the tape.
//
// A recurrent network reads a sequence from the first row to the last and keeps a state h, which is all that it knows
// of what it has read. Gates, numbers between 0 and 1, decide element by element how much of the state is replaced.
// Gradients flow back along the part that is not replaced without shrinking; that is what the gates are for.
//
// A batch of B sequences is read together: x (B,in), h (B,n). The product x W does not depend on the state, so it is
// done for all time steps in one go (gru_input, lstm_input), before the loop over the steps.

#pragma once
#include "tape.h"

// A matrix with PyTorch's spread for recurrent layers: a standard deviation of 1/sqrt(3n).
static inline Node* recurrent_weights(Tape* t, int rows, int cols, int n) {
    return parameter(t, rows, cols, 1 / sqrtf(3.0f * (float)n));
}

// Gated recurrent unit (Cho et al. 2014; with the reset gate behind the product, as in PyTorch and cuDNN):
//     r = logistic(x W_r + b_r + h U_r + c_r)              reset: does the candidate look at the state?
//     z = logistic(x W_z + b_z + h U_z + c_z)              update: is the state kept?
//     m = tanh(x W_m + b_m + r * (h U_m + c_m))            the candidate
//     h' = (1 - z) * m + z * h
typedef struct {
    int n;               // size of the state
    Node *W, *U, *b, *c; // (in,3n), (n,3n), (1,3n), (1,3n): r, z, m beside one another
} Gru;

static inline Gru gru_new(Tape* t, int in, int n) {
    return (Gru){n, recurrent_weights(t, in, 3 * n, n), recurrent_weights(t, n, 3 * n, n), parameter(t, 1, 3 * n, 0),
                 parameter(t, 1, 3 * n, 0)};
}

// x (rows,in) -> (rows,3n), for gru_step.
static inline Node* gru_input(const Gru* g, Node* x) { return add(matmul(x, g->W), g->b); }

// xW (B,3n), h (B,n) -> h' (B,n). One operation, with hU = h U, for speed: of a dozen, each would go through memory.
// With a_r, a_z, a_m, what is in the brackets of r, z and m:
//     dm = dh' (1 - z),   da_m = dm (1 - m^2),   da_r = da_m (h U_m + c_m) r (1 - r),   da_z = dh' (h - m) z (1 - z)
static inline void gru_step_backward(Node* y) {
    Node *x = y->in[0], *hU = y->in[1], *c = y->in[2], *h = y->in[3];
    for (int i = 0, n = y->cols; i < y->rows; i++) {
        const float *dy = y->grad + i * n, *state = h->value + i * n, *r = (float*)y->extra + i * 3 * n;
        const float *z = r + n, *m = z + n, *u = hU->value + i * 3 * n + 2 * n, *u0 = c->value + 2 * n;
        float* restrict dh = h->grad + i * n, * restrict dx = x->grad + i * 3 * n;
        float* restrict du = hU->grad + i * 3 * n, * restrict dc = c->grad;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            float da_m = dy[j] * (1 - z[j]) * (1 - m[j] * m[j]), da_r = da_m * (u[j] + u0[j]) * r[j] * (1 - r[j]);
            float da_z = dy[j] * (state[j] - m[j]) * z[j] * (1 - z[j]), du_m = da_m * r[j];
            dx[j] += da_r, dx[n + j] += da_z, dx[2 * n + j] += da_m;
            du[j] += da_r, du[n + j] += da_z, du[2 * n + j] += du_m;
            dc[j] += da_r, dc[n + j] += da_z, dc[2 * n + j] += du_m;
            dh[j] += dy[j] * z[j];
        }
    }
}
static inline Node* gru_step(const Gru* g, Node* xW, Node* h) {
    int n = g->n, B = h->rows;
    Node* hU = matmul(h, g->U);
    insist(xW->rows == B && xW->cols == 3 * n, "a GRU of %d from %d x %d", n, xW->rows, xW->cols);
    Node* y = record(h->tape, B, n, gru_step_backward, 4, (Node*[]){xW, hU, g->c, h},
                     sizeof(float) * (size_t)(B * 3 * n)); // r, z, m
    for (int i = 0; i < B; i++) {
        const float *x = xW->value + i * 3 * n, *u = hU->value + i * 3 * n, *c = g->c->value, *state = h->value + i * n;
        float* restrict r = (float*)y->extra + i * 3 * n, * restrict to = y->value + i * n;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            float reset = logistic_quick(x[j] + u[j] + c[j]), update = logistic_quick(x[n + j] + u[n + j] + c[n + j]);
            float candidate = tanh_quick(x[2 * n + j] + reset * (u[2 * n + j] + c[2 * n + j]));
            r[j] = reset, r[n + j] = update, r[2 * n + j] = candidate;
            to[j] = candidate + update * (state[j] - candidate);
        }
    }
    return y;
}

// Long short-term memory (Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000). Beside h it keeps a cell c,
// through which gradients flow where the forget gate is open:
//     i, f, o = logistic(x W + h U + b)      input, forget and output gate
//     g = tanh(x W_g + h U_g + b_g)          the candidate
//     c' = f * c + i * g,   h' = o * tanh c'
typedef struct {
    int n;
    Node *W, *U, *b; // (in,4n), (n,4n), (1,4n): i, f, g, o beside one another
} Lstm;

static inline Lstm lstm_new(Tape* t, int in, int n) {
    Lstm l = {n, recurrent_weights(t, in, 4 * n, n), recurrent_weights(t, n, 4 * n, n), parameter(t, 1, 4 * n, 0)};
    for (int j = n; j < 2 * n; j++) l.b->value[j] = 1; // remember, to begin with (Jozefowicz et al. 2015)
    return l;
}

// x (rows,in) -> (rows,4n), for lstm_step.
static inline Node* lstm_input(const Lstm* l, Node* x) { return add(matmul(x, l->W), l->b); }

// c' from a (B,4n), what the gates are made of, and c.  With i, f, g:
//     dc = dc' f,   da_i = dc' g i (1 - i),   da_f = dc' c f (1 - f),   da_g = dc' i (1 - g^2)
static inline void lstm_cell_backward(Node* y) {
    Node *a = y->in[0], *c = y->in[1];
    for (int row = 0, n = y->cols; row < y->rows; row++) {
        const float *dy = y->grad + row * n, *cell = c->value + row * n;
        const float *i = (float*)y->extra + row * 3 * n, *f = i + n, *g = f + n;
        float* restrict da = a->grad + row * 4 * n, * restrict dc = c->grad + row * n;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            da[j] += dy[j] * g[j] * i[j] * (1 - i[j]);
            da[n + j] += dy[j] * cell[j] * f[j] * (1 - f[j]);
            da[2 * n + j] += dy[j] * i[j] * (1 - g[j] * g[j]);
            dc[j] += dy[j] * f[j];
        }
    }
}
static inline Node* lstm_cell(Node* a, Node* c) {
    int n = c->cols;
    Node* y = record(a->tape, c->rows, n, lstm_cell_backward, 2, (Node*[]){a, c},
                     sizeof(float) * (size_t)(c->rows * 3 * n)); // i, f, g
    for (int row = 0; row < y->rows; row++) {
        const float *x = a->value + row * 4 * n, *cell = c->value + row * n;
        float* restrict i = (float*)y->extra + row * 3 * n, * restrict to = y->value + row * n;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            float in = logistic_quick(x[j]), forget = logistic_quick(x[n + j]), new = tanh_quick(x[2 * n + j]);
            i[j] = in, i[n + j] = forget, i[2 * n + j] = new;
            to[j] = forget * cell[j] + in * new;
        }
    }
    return y;
}

// h' = o tanh c', with o from the last columns of a.  With t = tanh c':  da_o = dh' t o (1 - o),  dc' = dh' o (1 - t^2).
static inline void lstm_output_backward(Node* y) {
    Node *a = y->in[0], *c = y->in[1];
    for (int row = 0, n = y->cols; row < y->rows; row++) {
        const float *dy = y->grad + row * n, *o = (float*)y->extra + row * 2 * n, *t = o + n;
        float* restrict da = a->grad + row * 4 * n + 3 * n, * restrict dc = c->grad + row * n;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            da[j] += dy[j] * t[j] * o[j] * (1 - o[j]);
            dc[j] += dy[j] * o[j] * (1 - t[j] * t[j]);
        }
    }
}
static inline Node* lstm_output(Node* a, Node* c) {
    int n = c->cols;
    Node* y = record(a->tape, c->rows, n, lstm_output_backward, 2, (Node*[]){a, c},
                     sizeof(float) * (size_t)(c->rows * 2 * n)); // o, t
    for (int row = 0; row < y->rows; row++) {
        const float *x = a->value + row * 4 * n + 3 * n, *cell = c->value + row * n;
        float* restrict o = (float*)y->extra + row * 2 * n, * restrict to = y->value + row * n;
#pragma omp simd
        for (int j = 0; j < n; j++) {
            float gate = logistic_quick(x[j]), t = tanh_quick(cell[j]);
            o[j] = gate, o[n + j] = t, to[j] = gate * t;
        }
    }
    return y;
}

// xW (B,4n), *h and *c (B,n) -> *h and *c, one step on
static inline void lstm_step(const Lstm* l, Node* xW, Node** h, Node** c) {
    Node* a = add(xW, matmul(*h, l->U));
    *c = lstm_cell(a, *c), *h = lstm_output(a, *c);
}

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

// xW (B,3n), h (B,n) -> h' (B,n)
static inline Node* gru_step(const Gru* g, Node* xW, Node* h) {
    int n = g->n;
    Node* hU = add(matmul(h, g->U), g->c);
    Node* gates = logistic_of(add(slice_columns(xW, 0, 2 * n), slice_columns(hU, 0, 2 * n)));
    Node *r = slice_columns(gates, 0, n), *z = slice_columns(gates, n, n);
    Node* m = tanh_of(add(slice_columns(xW, 2 * n, n), multiply(r, slice_columns(hU, 2 * n, n))));
    return add(m, multiply(z, subtract(h, m)));
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

// xW (B,4n), *h and *c (B,n) -> *h and *c, one step on
static inline void lstm_step(const Lstm* l, Node* xW, Node** h, Node** c) {
    int n = l->n;
    Node* a = add(xW, matmul(*h, l->U));
    Node *gates = logistic_of(slice_columns(a, 0, 2 * n)), *g = tanh_of(slice_columns(a, 2 * n, n));
    Node *i = slice_columns(gates, 0, n), *f = slice_columns(gates, n, n), *o = logistic_of(slice_columns(a, 3 * n, n));
    *c = add(multiply(f, *c), multiply(i, g));
    *h = multiply(o, tanh_of(*c));
}

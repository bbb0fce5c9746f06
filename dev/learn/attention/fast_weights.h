// fast_weights.h: memories of fixed size that are written to and read from with keys, and the orders of computation
// that give the same numbers.
//
// A matrix S (dk,dv) stores pairs by adding the outer product of key and value, S += k v^T, and is read with a query,
// S^T q = sum_j (q . k_j) v_j: attention without softmax, and the "fast weights" of Schmidhuber 1992, a network whose
// weights another network writes. attention.h's linear attention (Katharopoulos et al. 2020) is this for phi(q) and
// phi(k), divided by the sum of all weights.
//
//     write_to, read_from          the memory
//     linear_chunked               causal linear attention, a chunk of positions at a time
//     the delta rule               what a key already recalls is taken out before its new value is put in
//
// All sequences have size.m = size.n positions here, and queries of the keys' size, size.dq = size.dk. Gradients are
// added to; states and results are overwritten.

#ifndef FAST_WEIGHTS_H
#define FAST_WEIGHTS_H

#include "attention.h"

// S (dk,dv) += a k v^T
static inline void write_to(float* S, float a, const float* k, const float* v, Sizes size) {
    for (int c = 0; c < size.dk; c++) add_scaled(S + c * size.dv, a * k[c], v, size.dv);
}

// out (dv) += a S^T q
static inline void read_from(float* out, float a, const float* S, const float* q, Sizes size) {
    for (int c = 0; c < size.dk; c++) add_scaled(out, a * q[c], S + c * size.dv, size.dv);
}

// x (dk) += a S v: what S^T x . v changes by with x, so every gradient of a key or a query below.
static inline void read_back(float* x, float a, const float* S, const float* v, Sizes size) {
    for (int c = 0; c < size.dk; c++) x[c] += a * inner(S + c * size.dv, v, size.dv);
}

// ====================================================================================================================
// Linear attention in chunks
//
// linear_forward of attention.h goes through the sequence position by position: little work, no two positions at once.
// The formula itself, out = (phi(Q) phi(K)^T, masked) V, knows no order, but has n^2 weights. Between them: what lies
// in earlier chunks is read from S and z, what lies in the same chunk is weighted one by one. A chunk of 1 is the
// first, a chunk of n the second.

// Floats of scratch: S (dk,dv), z (dk), and of a chunk phi(q), phi(k) (chunk,dk).
static inline size_t linear_chunked_work(Sizes size, int chunk) {
    return (size_t)size.dk * (size_t)(size.dv + 1) + 2 * (size_t)chunk * size.dk;
}

// out (n,dv), sums (n) as linear_forward gives them, causal. Time n dk dv + n chunk (dk + dv) / 2. The same outputs are
// the same function, so its backward is linear_backward with is_causal, which needs no more than these.
static inline void linear_chunked(float* out, float* sums, float* work, Sizes size, const float* q, const float* k,
                                  const float* v, int chunk) {
    int dk = size.dk, dv = size.dv;
    float *S = work, *z = S + dk * dv, *a = z + dk, *b = a + chunk * dk; // a: phi(q), b: phi(k)
    zero(work, (size_t)dk * (size_t)(dv + 1));
    zero(out, (size_t)size.n * dv);
    for (int t0 = 0; t0 < size.n; t0 += chunk) {
        int rows = t0 + chunk < size.n ? chunk : size.n - t0;
        const float *q0 = q + (size_t)t0 * dk, *k0 = k + (size_t)t0 * dk, *v0 = v + (size_t)t0 * dv;
        for (int c = 0; c < rows * dk; c++) a[c] = phi(q0[c]), b[c] = phi(k0[c]);
        for (int i = 0; i < rows; i++) {
            float *o = out + (size_t)(t0 + i) * dv, sum = inner(a + i * dk, z, dk);
            read_from(o, 1, S, a + i * dk, size);
            for (int j = 0; j <= i; j++) {
                float weight = inner(a + i * dk, b + j * dk, dk);
                sum += weight;
                add_scaled(o, weight, v0 + j * dv, dv);
            }
            for (int d = 0; d < dv; d++) o[d] /= sum;
            sums[t0 + i] = sum;
        }
        for (int i = 0; i < rows; i++) {
            write_to(S, 1, b + i * dk, v0 + i * dv, size);
            for (int c = 0; c < dk; c++) z[c] += b[i * dk + c];
        }
    }
}

// ====================================================================================================================
// The delta rule (Widrow and Hoff 1960; as a memory: Schlag et al. 2021)
//
// A sum never forgets, it only fills up: a key that is written twice recalls both values, added. Here only what is new
// is written, the error of what the memory recalls, by a share beta in [0,1]:
//     e_t = v_t - S_(t-1)^T k_t,    u_t = beta_t e_t,    S_t = S_(t-1) + k_t u_t^T,    out_t = S_t^T q_t
// It is a step of gradient descent, of rate beta, on the loss |S^T k_t - v_t|^2 / 2. With |k| = 1 and beta = 1, S^T
// k_t is then v_t exactly; keys should have length 1, or at most: with beta |k|^2 > 2 the memory grows without bound.

// out (n,dv), u (n,dv): what is written, for the backward; from q, k (n,dk), v (n,dv), beta (n). S (dk,dv): the memory
// before, zeros at the beginning, and the memory after. Time n dk dv, and memory dk dv beside u.
static inline void delta_forward(float* out, float* u, float* S, Sizes size, const float* q, const float* k,
                                 const float* v, const float* beta) {
    zero(out, (size_t)size.n * size.dv);
    for (int t = 0; t < size.n; t++) {
        size_t at_k = (size_t)t * size.dk, at_v = (size_t)t * size.dv;
        for (int d = 0; d < size.dv; d++) u[at_v + d] = beta[t] * v[at_v + d];
        read_from(u + at_v, -beta[t], S, k + at_k, size);
        write_to(S, 1, k + at_k, u + at_v, size);
        read_from(out + at_v, 1, S, q + at_k, size);
    }
}

// The same in chunks. S0 being the memory before a chunk, S_t = S0 + sum over the chunk's s <= t of k_s u_s^T, so that
//     u_t = beta_t (v_t - S0^T k_t - sum over s < t of (k_t . k_s) u_s),
//     out_t = S0^T q_t + sum over s <= t of (q_t . k_s) u_s:
// the memory is written to once a chunk only; S0^T k and S0^T q are products of matrices, for all rows at once, and
// the u_t solve a triangular system (Yang et al. 2024 put it so). A chunk of n never forms S at all but for the end:
// the parallel form. Its backward is delta_backward, to which it leaves the same u and S.
static inline void delta_chunked(float* out, float* u, float* S, Sizes size, const float* q, const float* k,
                                 const float* v, const float* beta, int chunk) {
    int dk = size.dk, dv = size.dv;
    zero(out, (size_t)size.n * dv);
    for (int t0 = 0; t0 < size.n; t0 += chunk) {
        int t1 = t0 + chunk < size.n ? t0 + chunk : size.n;
        for (int t = t0; t < t1; t++) {
            const float *kt = k + (size_t)t * dk, *qt = q + (size_t)t * dk;
            float *ut = u + (size_t)t * dv, *o = out + (size_t)t * dv;
            for (int d = 0; d < dv; d++) ut[d] = beta[t] * v[(size_t)t * dv + d];
            read_from(ut, -beta[t], S, kt, size);
            read_from(o, 1, S, qt, size);
            for (int s = t0; s < t; s++)
                add_scaled(ut, -beta[t] * inner(kt, k + (size_t)s * dk, dk), u + (size_t)s * dv, dv);
            for (int s = t0; s <= t; s++) add_scaled(o, inner(qt, k + (size_t)s * dk, dk), u + (size_t)s * dv, dv);
        }
        for (int t = t0; t < t1; t++) write_to(S, 1, k + (size_t)t * dk, u + (size_t)t * dv, size);
    }
}

// dout (n,dv) -> dq, dk (n,dk), dv (n,dv), dbeta (n). S: the memory after on entry, the memory before, to rounding, on
// return: each write is taken back, S_(t-1) = S_t - k_t u_t^T, instead of keeping n memories. dS (dk,dv) is likewise
// the gradient of the memory after, zeros where nothing more comes of it, and on return that of the memory before.
// work: 2 dv.
//     dq_t = S_t dout_t,   dS += q_t dout_t^T,   du = dS^T k_t,   dk_t = dS u_t,   dbeta_t = du . e_t,
//     de = beta_t du,   dv_t = de,   dk_t -= S_(t-1) de,   dS -= k_t de^T
static inline void delta_backward(float* dq, float* dk, float* dv, float* dbeta, float* dS, float* S, float* work,
                                  const float* dout, const float* u, Sizes size, const float* q, const float* k,
                                  const float* v, const float* beta) {
    float *du = work, *e = work + size.dv;
    for (int t = size.n - 1; t >= 0; t--) {
        size_t at_k = (size_t)t * size.dk, at_v = (size_t)t * size.dv;
        read_back(dq + at_k, 1, S, dout + at_v, size);
        write_to(dS, 1, q + at_k, dout + at_v, size);
        zero(du, (size_t)size.dv);
        read_from(du, 1, dS, k + at_k, size);
        read_back(dk + at_k, 1, dS, u + at_v, size);
        write_to(S, -1, k + at_k, u + at_v, size);
        for (int d = 0; d < size.dv; d++) e[d] = v[at_v + d];
        read_from(e, -1, S, k + at_k, size);
        dbeta[t] += inner(du, e, size.dv);
        add_scaled(dv + at_v, beta[t], du, size.dv);
        read_back(dk + at_k, -beta[t], S, du, size);
        write_to(dS, -beta[t], k + at_k, du, size);
    }
}

#endif

// lib.c: attention.h as a shared library with a C ABI; attention.py calls it from Python.
//
//     make attention_lib                     build/attention/libattention.so
//
// Each function takes what its namesake in attention.h takes, pointers to dense float32 arrays and their sizes, but
// scratch, which is allocated here. It returns 0, or one of the codes below, having written nothing; attn_message()
// then says in words what is wrong. Gradients are added to what their arrays hold.

#include "attention.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

enum { OK, BAD_SIZE, BAD_ARGUMENT, NO_MEMORY };

static _Thread_local char message[256];

// What went wrong in this thread's last call that did not return 0.
EXPORT const char* attn_message(void) { return message; }

__attribute__((format(printf, 2, 3))) static int refuse(int code, const char* format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return code;
}

// ====================================================================================================================
// Checks

// attention.h counts the numbers of an array with int.
static int check_product(const char* what, long a, long b, long c) {
    if (a < 1 || b < 1 || c < 1)
        return refuse(BAD_SIZE, "%s (%ld,%ld,%ld): every size must be at least 1", what, a, b, c);
    if (a > INT_MAX || b > INT_MAX / a || c > INT_MAX / (a * b))
        return refuse(BAD_SIZE, "%s (%ld,%ld,%ld): more than 2^31 - 1 numbers", what, a, b, c);
    return OK;
}

static int check_sizes(const Sizes* s) {
    int code = check_product("q", 1, s->m, s->dq);
    if (!code) code = check_product("k", 1, s->n, s->dk);
    if (!code) code = check_product("v", 1, s->n, s->dv);
    if (!code) code = check_product("out", 1, s->m, s->dv);
    return code;
}

static int check_weights(const Sizes* s) {
    int code = check_sizes(s);
    return code ? code : check_product("weights", 1, s->m, s->n);
}

static int check_same(const Sizes* s, const char* who) {
    if (s->dq == s->dk) return OK;
    return refuse(BAD_SIZE, "%s: q of size %d and k of size %d; they must be of one size", who, s->dq, s->dk);
}

static int check_score(const Sizes* size, const Score* s) {
    static const char* const names[] = {"dot", "scaled_dot", "general", "additive", "concat", "cosine", "location"};
    if ((int)s->kind < 0 || s->kind >= SCORES) return refuse(BAD_ARGUMENT, "there is no score number %d", (int)s->kind);
    const char* name = names[s->kind];
    bool has_W = s->kind == GENERAL || s->kind == CONCAT || s->kind == LOCATION;
    bool has_v = s->kind == ADDITIVE || s->kind == CONCAT;
    if (has_W && !s->W) return refuse(BAD_ARGUMENT, "%s: W is missing", name);
    if (has_v && !s->v_a) return refuse(BAD_ARGUMENT, "%s: v_a is missing", name);
    if (s->kind == ADDITIVE && !(s->W_q && s->W_k)) return refuse(BAD_ARGUMENT, "%s: W_q or W_k is missing", name);
    if (s->kind == LOCATION && s->h < size->n)
        return refuse(BAD_SIZE, "location: W has %d columns, fewer than the %d keys", s->h, size->n);
    int code = OK;
    if (s->kind == DOT || s->kind == SCALED_DOT || s->kind == COSINE)
        code = check_same(size, name);
    else if (s->kind == GENERAL)
        code = check_product("W", 1, size->dq, size->dk);
    else {
        code = check_product("W", 1, (long)size->dq + size->dk, s->h);
        if (!code && has_v) code = check_product("the projected queries and keys", 2, (long)size->m + size->n, s->h);
    }
    return code;
}

// A mask: no (0), causal (1), a window of `argument` (2), the first `argument` keys (3), or a table (4).
typedef struct {
    int kind, argument;
    const uint8_t* table; // (m,n), 1 or 0
} MaskChoice;

static int choose_mask(Mask* mask, MaskTable* table, const Sizes* size, const MaskChoice* choice) {
    *table = (MaskTable){choice->table, size->n};
    switch (choice->kind) {
    case 0:
        *mask = no_mask;
        return OK;
    case 1:
        *mask = (Mask){causal, NULL};
        return OK;
    case 2:
        *mask = (Mask){window, &choice->argument};
        break;
    case 3:
        *mask = (Mask){padding, &choice->argument};
        break;
    case 4:
        *mask = (Mask){mask_table, table};
        return choice->table ? OK : refuse(BAD_ARGUMENT, "the mask is missing");
    default:
        return refuse(BAD_ARGUMENT, "there is no mask number %d", choice->kind);
    }
    return choice->argument >= 0 ? OK : refuse(BAD_ARGUMENT, "a mask's width of %d", choice->argument);
}

static int check_present(const char* names, int count, const void* const* pointers) {
    for (int i = 0; i < count; i++)
        if (!pointers[i]) return refuse(BAD_ARGUMENT, "number %d of (%s) is a null pointer", i + 1, names);
    return OK;
}

#define PRESENT(...) \
    check_present(#__VA_ARGS__, sizeof(const void*[]){__VA_ARGS__} / sizeof(void*), (const void* const[]){__VA_ARGS__})

// ends the function with the code of the first check that fails
#define TRY(check)               \
    do {                         \
        int code_ = (check);     \
        if (code_) return code_; \
    } while (0)

// Zeroed floats, at least one.
static int scratch(float** memory, size_t count) {
    *memory = calloc(count + 1, sizeof(float));
    return *memory ? OK : refuse(NO_MEMORY, "no memory for %.1f MB of scratch", (double)count * sizeof(float) / 1e6);
}

// ====================================================================================================================
// The functions

// out (m,dv), weights (m,n) <- q (m,dq), k (n,dk), v (n,dv)
EXPORT int attn_attention(float* out, float* weights, const Sizes* size, const float* q, const float* k, const float* v,
                          const Score* score, const MaskChoice* choice) {
    float* work;
    Mask mask;
    MaskTable table;
    TRY(PRESENT(out, weights, size, q, k, v, score, choice));
    TRY(check_weights(size));
    TRY(check_score(size, score));
    TRY(choose_mask(&mask, &table, size, choice));
    TRY(scratch(&work, score_work(*size, *score)));
    attention_forward(out, weights, work, *size, q, k, v, *score, mask);
    free(work);
    return OK;
}

// dq, dk, dv, the gradients of the score's parameters and dscores (m,n) <- dout (m,dv), weights (m,n)
EXPORT int attn_attention_backward(float* dq, float* dk, float* dv, const ScoreGradient* d, float* dscores,
                                   const float* dout, const float* weights, const Sizes* size, const float* q,
                                   const float* k, const float* v, const Score* score) {
    float* work;
    TRY(PRESENT(dq, dk, dv, d, dscores, dout, weights, size, q, k, v, score));
    TRY(check_weights(size));
    TRY(check_score(size, score));
    if ((score->W && !d->W) || (score->W_q && !d->W_q) || (score->W_k && !d->W_k) || (score->v_a && !d->v_a))
        return refuse(BAD_ARGUMENT, "no array for the gradient of a parameter");
    TRY(scratch(&work, score_work(*size, *score)));
    attention_backward(dq, dk, dv, *d, dscores, work, dout, weights, *size, q, k, v, *score);
    free(work);
    return OK;
}

static int check_heads(const HeadSizes* s, const Projections* w) {
    TRY(PRESENT(w->W_q, w->W_k, w->W_v, w->W_o));
    TRY(check_sizes(&s->in));
    TRY(check_product("weights", s->heads, s->in.m, s->in.n));
    TRY(check_product("W_q", s->heads, s->in.dq, s->D));
    TRY(check_product("W_k", s->heads, s->in.dk, s->D));
    TRY(check_product("W_v", s->heads, s->in.dv, s->D));
    TRY(check_product("W_o", s->heads, s->D, s->dout));
    TRY(check_product("out", 1, s->in.m, s->dout));
    return check_product("the heads' queries and keys", 2, (long)s->in.m + s->in.n, s->D);
}

static size_t kept_floats(HeadSizes s) { return (size_t)s.heads * head_floats(s); }

// out (m,dout), weights (heads,m,n) <- q (m,dq), k (n,dk), v (n,dv); bias (heads,m,n) or NULL
EXPORT int attn_multi_head(float* out, float* weights, const HeadSizes* size, const float* q, const float* k,
                           const float* v, const Projections* w, const float* bias, const MaskChoice* choice) {
    float* kept;
    Mask mask;
    MaskTable table;
    TRY(PRESENT(out, weights, size, q, k, v, w, choice));
    TRY(check_heads(size, w));
    TRY(choose_mask(&mask, &table, &size->in, choice));
    TRY(scratch(&kept, kept_floats(*size)));
    multi_head_forward(out, weights, kept, *size, q, k, v, *w, bias, mask);
    free(kept);
    return OK;
}

// dq, dk, dv, the projections' gradients, dscores (heads,m,n) <- dout (m,dout). The forward pass is run again.
EXPORT int attn_multi_head_backward(float* dq, float* dk, float* dv, const ProjectionGradients* d, float* dscores,
                                    const float* dout, const HeadSizes* size, const float* q, const float* k,
                                    const float* v, const Projections* w, const float* bias, const MaskChoice* choice) {
    float* memory;
    Mask mask;
    MaskTable table;
    TRY(PRESENT(dq, dk, dv, d, dscores, dout, size, q, k, v, w, choice));
    TRY(PRESENT(d->W_q, d->W_k, d->W_v, d->W_o));
    TRY(check_heads(size, w));
    TRY(choose_mask(&mask, &table, &size->in, choice));
    size_t m = (size_t)size->in.m, weights_count = (size_t)size->heads * m * (size_t)size->in.n;
    TRY(scratch(&memory, kept_floats(*size) + head_floats(*size) + weights_count + m * (size_t)size->dout));
    float *kept = memory, *work = kept + kept_floats(*size), *weights = work + head_floats(*size);
    multi_head_forward(weights + weights_count, weights, kept, *size, q, k, v, *w, bias, mask);
    multi_head_backward(dq, dk, dv, *d, dscores, work, dout, weights, kept, *size, q, k, v, *w);
    free(memory);
    return OK;
}

static int check_local(const Sizes* size, const Local* local) {
    TRY(PRESENT(local->W_p, local->v_p));
    if (local->D < 1) return refuse(BAD_ARGUMENT, "a window of D = %d; it must be at least 1", local->D);
    if (local->D > 1 << 15) return refuse(BAD_ARGUMENT, "a window of D = %d; 32768 is the most", local->D);
    return check_product("W_p", 1, size->dq, local->h);
}

// Local-p: out (m,dv), weights, aligned (m,n), centers (m) <- q (m,dq), k (n,dk), v (n,dv)
EXPORT int attn_local(float* out, float* weights, float* aligned, float* centers, const Sizes* size, const float* q,
                      const float* k, const float* v, const Score* score, const Local* local) {
    float* work;
    TRY(PRESENT(out, weights, aligned, centers, size, q, k, v, score, local));
    TRY(check_weights(size));
    TRY(check_score(size, score));
    TRY(check_local(size, local));
    TRY(scratch(&work, score_work(*size, *score)));
    local_forward(out, weights, aligned, centers, work, *size, q, k, v, *score, *local);
    free(work);
    return OK;
}

// dq, dk, dv, the gradients of the score's parameters, dW_p, dv_p, dscores (m,n) <- dout (m,dv) and what attn_local gave
EXPORT int attn_local_backward(float* dq, float* dk, float* dv, const ScoreGradient* d, float* dW_p, float* dv_p,
                               float* dscores, const float* dout, const float* weights, const float* aligned,
                               const float* centers, const Sizes* size, const float* q, const float* k, const float* v,
                               const Score* score, const Local* local) {
    float* work;
    TRY(PRESENT(dq, dk, dv, d, dW_p, dv_p, dscores, dout, weights, aligned, centers, size, q, k, v, score, local));
    TRY(check_weights(size));
    TRY(check_score(size, score));
    TRY(check_local(size, local));
    if ((score->W && !d->W) || (score->W_q && !d->W_q) || (score->W_k && !d->W_k) || (score->v_a && !d->v_a))
        return refuse(BAD_ARGUMENT, "no array for the gradient of a parameter");
    TRY(scratch(&work, score_work(*size, *score)));
    local_backward(dq, dk, dv, *d, dW_p, dv_p, dscores, work, dout, weights, aligned, centers, *size, q, k, v, *score,
                   *local);
    free(work);
    return OK;
}

// out (m,dv), lse (m) <- q (m,dk), k (n,dk), v (n,dv)
EXPORT int attn_flash(float* out, float* lse, const Sizes* size, const float* q, const float* k, const float* v,
                      const MaskChoice* choice) {
    Mask mask;
    MaskTable table;
    TRY(PRESENT(out, lse, size, q, k, v, choice));
    TRY(check_sizes(size));
    TRY(check_same(size, "flash"));
    TRY(choose_mask(&mask, &table, size, choice));
    flash_forward(out, lse, *size, q, k, v, mask);
    return OK;
}

// dq, dk, dv <- dout (m,dv) and what attn_flash gave
EXPORT int attn_flash_backward(float* dq, float* dk, float* dv, const float* dout, const float* out, const float* lse,
                               const Sizes* size, const float* q, const float* k, const float* v,
                               const MaskChoice* choice) {
    Mask mask;
    MaskTable table;
    TRY(PRESENT(dq, dk, dv, dout, out, lse, size, q, k, v, choice));
    TRY(check_sizes(size));
    TRY(check_same(size, "flash"));
    TRY(choose_mask(&mask, &table, size, choice));
    flash_backward(dq, dk, dv, dout, out, lse, *size, q, k, v, mask);
    return OK;
}

static int check_linear(const Sizes* size, int is_causal) {
    TRY(check_sizes(size));
    TRY(check_same(size, "linear"));
    TRY(check_product("S", 2, size->dk, (long)size->dv + 1));
    if (is_causal && size->m > size->n)
        return refuse(BAD_SIZE, "linear, causal: %d queries, but %d keys; query i needs key i", size->m, size->n);
    return OK;
}

// out (m,dv), sums (m) <- q (m,dk), k (n,dk), v (n,dv)
EXPORT int attn_linear(float* out, float* sums, const Sizes* size, const float* q, const float* k, const float* v,
                       int is_causal) {
    float* work;
    TRY(PRESENT(out, sums, size, q, k, v));
    TRY(check_linear(size, is_causal));
    TRY(scratch(&work, linear_work(*size)));
    linear_forward(out, sums, work, *size, q, k, v, is_causal);
    free(work);
    return OK;
}

// dq, dk, dv <- dout (m,dv) and what attn_linear gave
EXPORT int attn_linear_backward(float* dq, float* dk, float* dv, const float* dout, const float* out, const float* sums,
                                const Sizes* size, const float* q, const float* k, const float* v, int is_causal) {
    float* work;
    TRY(PRESENT(dq, dk, dv, dout, out, sums, size, q, k, v));
    TRY(check_linear(size, is_causal));
    TRY(scratch(&work, linear_work(*size)));
    linear_backward(dq, dk, dv, work, dout, out, sums, *size, q, k, v, is_causal);
    free(work);
    return OK;
}

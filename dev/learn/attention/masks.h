// masks.h: masks and changes of the score as small functions, and attention that skips what they leave out
// (FlexAttention: Dong et al. 2024).
//
//     mask(b,h,i,j)      may query i of head h of sequence b see key j?
//     score(s,b,h,i,j)   the score that takes the place of s = q_i . k_j / sqrt(D)
//
// A kernel for each kind of attention would be one kernel for each line below. Instead, one routine takes both
// functions as parameters. What the mask makes of a tile of 32 x 32 pairs is found once, before: empty tiles are
// skipped, tiles that are seen as a whole are not masked, and only in those between is each pair asked about. So the
// time follows the share of tiles that is left, not the share of pairs that is seen.
//
//     masks                       causal, padding, window, dilated, global, strided, fixed, prefix, documents
//     scores                      ALiBi, relative bias, soft cap
//     the definition              every pair is computed, with the parts of attention.h
//     block mask                  what the mask makes of each tile
//     in tiles                    flash attention that asks the block mask, forward and backward
//
// q, out (B,H,m,D) and k, v (B,H,n,D); gradients are added to, as in attention.h. A query that may see nothing gets
// output 0 and gives gradients 0.

#ifndef MASKS_H
#define MASKS_H

#include "attention.h"

typedef struct {
    int B, H, m, n, D; // sequences; heads; queries and keys of each; size of a query, key and value
} BatchSizes;

typedef struct {
    bool (*mask)(const void* data, int b, int h, int i, int j); // NULL: every key is seen
    const void* mask_data;
    float (*score)(const void* data, float s, int b, int h, int i, int j);   // NULL: s as it is
    float (*slope)(const void* data, float s, int b, int h, int i, int j);   // its derivative by s; NULL: 1
    void (*learn)(void* gradient, float dscore, int b, int h, int i, int j); // to the score's parameters; NULL: none
    const void* score_data;
} Flex;

// ====================================================================================================================
// Masks

// j <= i: what writes a text from left to right.
static inline bool see_causal(const void* data, int b, int h, int i, int j) {
    (void)data, (void)b, (void)h;
    return j <= i;
}

// data: an int for each sequence, its length; the keys from there on fill up the batch.
static inline bool see_padding(const void* data, int b, int h, int i, int j) {
    (void)h, (void)i;
    return j < ((const int*)data)[b];
}

typedef struct {
    int width;   // how far a query sees; of the blocks and strides of Child et al., their length
    int gap;     // of a dilated window: every gap-th key
    int globals; // how many first positions see all and are seen by all; of a fixed pattern, a block's summaries
} Pattern;

// A sliding window, as in Mistral 7B: the query itself and the width - 1 keys before it.
static inline bool see_window(const void* data, int b, int h, int i, int j) {
    (void)b, (void)h;
    return j <= i && i - j < ((const Pattern*)data)->width;
}

// The same number of keys, with gaps, so that it reaches further (Beltagy et al. 2020, "Longformer", section 3.1).
static inline bool see_dilated(const void* data, int b, int h, int i, int j) {
    const Pattern* p = (const Pattern*)data;
    (void)b, (void)h;
    return j <= i && i - j < p->width * p->gap && (i - j) % p->gap == 0;
}

// A window to both sides, and a few positions that see all and are seen by all: every two are two steps apart.
static inline bool see_global(const void* data, int b, int h, int i, int j) {
    const Pattern* p = (const Pattern*)data;
    (void)b, (void)h;
    return i < p->globals || j < p->globals || (i - j < p->width && j - i < p->width);
}

// Sparse Transformer, strided (Child et al. 2019, section 4.3): even heads see the last `width` keys, odd heads every
// width-th: after two layers, every pair is connected, with 2 sqrt(n) keys a query where width = sqrt(n).
static inline bool see_strided(const void* data, int b, int h, int i, int j) {
    int width = ((const Pattern*)data)->width;
    (void)b;
    return j <= i && (h % 2 ? (i - j) % width == 0 : i - j < width);
}

// Sparse Transformer, fixed: even heads see their own block of `width` keys, odd heads the last `globals` of each
// block, which are to sum it up.
static inline bool see_fixed(const void* data, int b, int h, int i, int j) {
    const Pattern* p = (const Pattern*)data;
    (void)b;
    return j <= i && (h % 2 ? j % p->width >= p->width - p->globals : i / p->width == j / p->width);
}

// data: an int for each sequence: that many first positions, the task's text, are seen by all (Raffel et al. 2020).
static inline bool see_prefix(const void* data, int b, int h, int i, int j) {
    (void)h;
    return j <= i || j < ((const int*)data)[b];
}

// Several texts packed into one sequence, none of which sees another.
typedef struct {
    const int* document; // (B,n): which text a position belongs to
    int n;
} Documents;
static inline bool see_document(const void* data, int b, int h, int i, int j) {
    const Documents* d = (const Documents*)data;
    (void)h;
    return j <= i && d->document[b * d->n + i] == d->document[b * d->n + j];
}

// ====================================================================================================================
// Scores

// ALiBi (Press et al. 2022): s - slope_h |i - j|. data: the slopes (H), 2^(-8 (h + 1) / H).
static inline float score_alibi(const void* data, float s, int b, int h, int i, int j) {
    (void)b;
    return s - ((const float*)data)[h] * fabsf((float)(i - j));
}

// A learned number for each head and distance, the furthest shared by all beyond (Raffel et al. 2020, without its
// logarithmic bins): bias (H,2 reach + 1), entry `reach` for distance 0.
typedef struct {
    float* bias;
    int reach;
} RelativeBias;
static inline int relative_index(int reach, int h, int i, int j) {
    int distance = j - i < -reach ? -reach : j - i > reach ? reach : j - i;
    return h * (2 * reach + 1) + reach + distance;
}
static inline float score_relative(const void* data, float s, int b, int h, int i, int j) {
    const RelativeBias* r = (const RelativeBias*)data;
    (void)b;
    return s + r->bias[relative_index(r->reach, h, i, j)];
}
// gradient: a RelativeBias, whose `bias` is the gradient and is added to.
static inline void learn_relative(void* gradient, float dscore, int b, int h, int i, int j) {
    RelativeBias* d = (RelativeBias*)gradient;
    (void)b;
    d->bias[relative_index(d->reach, h, i, j)] += dscore;
}

// Soft cap, as in Gemma 2: cap tanh(s / cap), so that no score is larger than cap. data: a float, cap.
static inline float score_soft_cap(const void* data, float s, int b, int h, int i, int j) {
    float cap = *(const float*)data;
    (void)b, (void)h, (void)i, (void)j;
    return cap * tanh_quick(s / cap);
}
static inline float slope_soft_cap(const void* data, float s, int b, int h, int i, int j) {
    float cap = *(const float*)data, t = tanh_quick(s / cap);
    (void)b, (void)h, (void)i, (void)j;
    return 1 - t * t;
}

// ====================================================================================================================
// The definition: one head of one sequence after the other, all of its pairs, with the parts of attention.h

// A mask and the head it is asked for, as attention.h's masks are.
typedef struct {
    const Flex* flex;
    int b, h;
} HeadMask;
static inline bool head_mask(const void* data, int i, int j) {
    const HeadMask* m = (const HeadMask*)data;
    return !m->flex->mask || m->flex->mask(m->flex->mask_data, m->b, m->h, i, j);
}

// out (B,H,m,D), weights (B,H,m,n), raw (B,H,m,n): the scores before they are changed.
static inline void flex_plain_forward(float* out, float* weights, float* raw, BatchSizes z, const float* q,
                                      const float* k, const float* v, Flex f) {
    Sizes size = {z.m, z.n, z.D, z.D, z.D};
    zero(out, (size_t)z.B * z.H * z.m * z.D);
    for (int b = 0; b < z.B; b++)
        for (int h = 0; h < z.H; h++) {
            size_t head = (size_t)b * z.H + h, at_q = head * z.m * z.D, at_k = head * z.n * z.D;
            float *s = raw + head * z.m * z.n, *w = weights + head * z.m * z.n;
            score_forward(s, w, size, q + at_q, k + at_k, (Score){.kind = SCALED_DOT});
            for (int i = 0; i < z.m; i++)
                for (int j = 0; j < z.n; j++) {
                    size_t at = (size_t)i * z.n + j;
                    w[at] = f.score ? f.score(f.score_data, s[at], b, h, i, j) : s[at];
                }
            softmax_forward(w, w, z.m, z.n, (Mask){head_mask, &(HeadMask){&f, b, h}});
            add_ab(out + at_q, w, v + at_k, z.m, z.n, z.D);
        }
}

// dout (B,H,m,D) -> dq, dk, dv, and what `learn` adds to learned (may be NULL). dscores (m,n): scratch.
static inline void flex_plain_backward(float* dq, float* dk, float* dv, void* learned, float* dscores,
                                       const float* dout, const float* weights, const float* raw, BatchSizes z,
                                       const float* q, const float* k, const float* v, Flex f) {
    Sizes size = {z.m, z.n, z.D, z.D, z.D};
    for (int b = 0; b < z.B; b++)
        for (int h = 0; h < z.H; h++) {
            size_t head = (size_t)b * z.H + h, at_q = head * z.m * z.D, at_k = head * z.n * z.D;
            const float *s = raw + head * z.m * z.n, *w = weights + head * z.m * z.n;
            add_atb(dv + at_k, w, dout + at_q, z.n, z.m, z.D);
            zero(dscores, (size_t)z.m * z.n);
            add_abt(dscores, dout + at_q, v + at_k, z.m, z.D, z.n); // dweights
            softmax_backward(dscores, dscores, w, z.m, z.n);
            for (int i = 0; i < z.m; i++)
                for (int j = 0; j < z.n; j++) {
                    size_t at = (size_t)i * z.n + j;
                    if (f.learn && learned) f.learn(learned, dscores[at], b, h, i, j);
                    if (f.slope) dscores[at] *= f.slope(f.score_data, s[at], b, h, i, j);
                }
            score_backward(dq + at_q, dk + at_k, (ScoreGradient){0}, dscores, dscores, size, q + at_q, k + at_k,
                           (Score){.kind = SCALED_DOT});
        }
}

// ====================================================================================================================
// Block mask

typedef enum { EMPTY, PARTIAL, WHOLE } TileKind;

// What the mask makes of each tile of FLASH_TILE x FLASH_TILE pairs. B or H may be 1 where the mask is the same for
// all sequences or heads.
typedef struct {
    int B, H;
    uint8_t* tile; // (B,H,tiles of queries,tiles of keys): a TileKind
} BlockMask;

static inline int tiles_of(int count) { return (count + FLASH_TILE - 1) / FLASH_TILE; }

static inline size_t block_mask_bytes(int B, int H, BatchSizes z) {
    return (size_t)B * H * tiles_of(z.m) * tiles_of(z.n);
}

static inline uint8_t* tile_at(BlockMask block, BatchSizes z, int b, int h, int i, int j) {
    size_t head = (size_t)(b % block.B) * block.H + h % block.H;
    return block.tile + (head * tiles_of(z.m) + i / FLASH_TILE) * tiles_of(z.n) + j / FLASH_TILE;
}

// Asks about every pair, once: a block mask serves all layers, and all steps for which the mask is the same.
static inline void block_mask(BlockMask block, BatchSizes z, Flex f) {
    for (int b = 0; b < block.B; b++)
        for (int h = 0; h < block.H; h++)
            for (int i0 = 0; i0 < z.m; i0 += FLASH_TILE)
                for (int j0 = 0; j0 < z.n; j0 += FLASH_TILE) {
                    int i1 = tile_end(i0, z.m), j1 = tile_end(j0, z.n), seen = 0;
                    for (int i = i0; i < i1; i++)
                        for (int j = j0; j < j1; j++) seen += !f.mask || f.mask(f.mask_data, b, h, i, j);
                    *tile_at(block, z, b, h, i0, j0) = (uint8_t)(seen == 0                       ? EMPTY
                                                                 : seen == (i1 - i0) * (j1 - j0) ? WHOLE
                                                                                                 : PARTIAL);
                }
}

// ====================================================================================================================
// In tiles: flash_forward and flash_backward of attention.h, where the derivations are, with three lines more: an
// empty tile is left out, a whole one is not masked, and scores are changed.

// Row i of a tile: raw scores and scores of keys j0 to j1 - 1, -INFINITY where a key is not seen.
static inline void tile_row(float* raw, float* s, BatchSizes z, const float* q, const float* k, Flex f, TileKind kind,
                            int b, int h, int i, int j0, int j1) {
    float scale = dot_scale(SCALED_DOT, z.D);
    for (int j = j0; j < j1; j++) s[j - j0] = raw[j - j0] = scale * inner(q, k + (size_t)(j - j0) * z.D, z.D);
    for (int j = j0; j < j1 && f.score; j++) s[j - j0] = f.score(f.score_data, raw[j - j0], b, h, i, j);
    for (int j = j0; j < j1 && kind == PARTIAL; j++)
        if (!f.mask(f.mask_data, b, h, i, j)) s[j - j0] = -INFINITY;
}

// out (B,H,m,D), lse (B,H,m): the logarithm of the sum of e^score, -INFINITY for a query that may see nothing.
static inline void flex_forward(float* out, float* lse, BatchSizes z, const float* q, const float* k, const float* v,
                                Flex f, BlockMask block) {
    float raw[FLASH_TILE], s[FLASH_TILE], largest[FLASH_TILE], sum[FLASH_TILE];
    zero(out, (size_t)z.B * z.H * z.m * z.D);
    for (int head = 0; head < z.B * z.H; head++) {
        int b = head / z.H, h = head % z.H;
        const float *k_head = k + (size_t)head * z.n * z.D, *v_head = v + (size_t)head * z.n * z.D;
        for (int i0 = 0; i0 < z.m; i0 += FLASH_TILE) {
            int i1 = tile_end(i0, z.m);
            size_t row = (size_t)head * z.m + i0;
            for (int i = i0; i < i1; i++) largest[i - i0] = -INFINITY, sum[i - i0] = 0;
            for (int j0 = 0; j0 < z.n; j0 += FLASH_TILE) {
                int j1 = tile_end(j0, z.n);
                TileKind kind = (TileKind)*tile_at(block, z, b, h, i0, j0);
                for (int i = i0; i < i1 && kind != EMPTY; i++) {
                    float *o = out + (row + i - i0) * z.D, *top = &largest[i - i0], before = *top;
                    tile_row(raw, s, z, q + (row + i - i0) * z.D, k_head + (size_t)j0 * z.D, f, kind, b, h, i, j0, j1);
                    for (int j = 0; j < j1 - j0; j++)
                        if (!(s[j] <= *top)) *top = s[j];
                    if (*top == -INFINITY) continue; // nothing seen so far
                    float shrink = exp_quick(before - *top);
                    sum[i - i0] *= shrink;
                    for (int d = 0; d < z.D; d++) o[d] *= shrink;
                    for (int j = 0; j < j1 - j0; j++) {
                        float p = exp_quick(s[j] - *top);
                        sum[i - i0] += p;
                        add_scaled(o, p, v_head + (size_t)(j0 + j) * z.D, z.D);
                    }
                }
            }
            for (int i = i0; i < i1; i++) {
                float* o = out + (row + i - i0) * z.D;
                lse[row + i - i0] = largest[i - i0] + logf(sum[i - i0]);
                for (int d = 0; d < z.D && sum[i - i0] > 0; d++) o[d] /= sum[i - i0];
            }
        }
    }
}

// dout (B,H,m,D) -> dq, dk, dv, and what `learn` adds to learned (may be NULL).
static inline void flex_backward(float* dq, float* dk, float* dv, void* learned, const float* dout, const float* out,
                                 const float* lse, BatchSizes z, const float* q, const float* k, const float* v, Flex f,
                                 BlockMask block) {
    float raw[FLASH_TILE], s[FLASH_TILE], scale = dot_scale(SCALED_DOT, z.D);
    for (int head = 0; head < z.B * z.H; head++) {
        int b = head / z.H, h = head % z.H;
        for (int i0 = 0; i0 < z.m; i0 += FLASH_TILE)
            for (int j0 = 0; j0 < z.n; j0 += FLASH_TILE) {
                int i1 = tile_end(i0, z.m), j1 = tile_end(j0, z.n);
                TileKind kind = (TileKind)*tile_at(block, z, b, h, i0, j0);
                for (int i = i0; i < i1 && kind != EMPTY; i++) {
                    size_t row = (size_t)head * z.m + i, at_q = row * z.D, at_k = ((size_t)head * z.n + j0) * z.D;
                    float mean = inner(dout + at_q, out + at_q, z.D);
                    tile_row(raw, s, z, q + at_q, k + at_k, f, kind, b, h, i, j0, j1);
                    for (int j = j0; j < j1; j++, at_k += (size_t)z.D) {
                        if (s[j - j0] == -INFINITY) continue;
                        float p = exp_quick(s[j - j0] - lse[row]);
                        float ds = p * (inner(dout + at_q, v + at_k, z.D) - mean);
                        if (f.learn && learned) f.learn(learned, ds, b, h, i, j);
                        if (f.slope) ds *= f.slope(f.score_data, raw[j - j0], b, h, i, j);
                        add_scaled(dv + at_k, p, dout + at_q, z.D);
                        add_scaled(dq + at_q, scale * ds, k + at_k, z.D);
                        add_scaled(dk + at_k, scale * ds, q + at_q, z.D);
                    }
                }
            }
    }
}

#endif

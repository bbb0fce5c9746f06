// vision.h: pictures for lesson 13, convolution and pooling on the tape, and the attention mechanisms of vision, put
// together from operations of the tape.
//
// A batch of feature maps is one matrix: a row for each place of each picture, (batch side side, channels), the places
// of a picture from left to right and from top to bottom. Then a 1 x 1 convolution is a matrix product, and attention
// over places is attention over rows.

#pragma once
#include "tape_attention.h"

// ---- pictures ------------------------------------------------------------------------------------------------------

enum { SIDE = 16, PIXELS = SIDE * SIDE, GLYPH = 5, CLASSES = 8, CLUTTER = 5, FRAGMENT = 3 };

static const char* const glyph[CLASSES] = {
    "..#....#..#####..#....#..", "#...#.#.#...#...#.#.#...#", "######...##...##...######", "#####..#....#....#....#..",
    "#....#....#....#....#####", "#...##...#######...##...#", "..#...#.#.#...#.#.#...#..", "#...##...##...##...######"};
static const char* const class_name[CLASSES] = {"plus", "cross", "square", "T", "L", "H", "diamond", "U"};

// What a picture shows, and where: up to two objects, each with the row and column of its upper left corner.
typedef struct {
    float pixels[PIXELS];
    int objects, class[2], row[2], col[2];
} Picture;

// Whether squares of sides a and b with these corners touch.
static inline bool overlap(int row_a, int col_a, int a, int row_b, int col_b, int b) {
    return row_a < row_b + b && row_b < row_a + a && col_a < col_b + b && col_b < col_a + a;
}

// Objects of different classes at random places, clutter, noise. The clutter is made of fragments, 3 x 3, of the same
// eight glyphs (as in the cluttered digits of Mnih et al. 2014), so that no single edge or corner tells what the
// object is, nor where.
static inline void draw_picture(Picture* p, int objects, uint64_t* seed) {
    for (int i = 0; i < PIXELS; i++) p->pixels[i] = 0.1f * normal(seed);
    p->objects = objects;
    for (int k = 0; k < objects + CLUTTER; k++) {
        bool whole = k < objects, free = false;
        int extent = whole ? GLYPH : FRAGMENT, row = 0, col = 0, class = random_below(seed, CLASSES);
        while (!free) {
            row = random_below(seed, SIDE - extent + 1), col = random_below(seed, SIDE - extent + 1);
            free = true;
            for (int o = 0; o < (whole ? k : objects); o++)
                free = free && !overlap(row, col, extent, p->row[o], p->col[o], GLYPH);
        }
        while (k == 1 && whole && class == p->class[0]) class = random_below(seed, CLASSES);
        if (whole) p->class[k] = class, p->row[k] = row, p->col[k] = col;
        int up = whole ? 0 : random_below(seed, 3), left = whole ? 0 : random_below(seed, 3);
        float ink = 0.7f + 0.6f * uniform(seed);
        for (int i = 0; i < extent; i++)
            for (int j = 0; j < extent; j++)
                if (glyph[class][(up + i) * GLYPH + left + j] == '#') p->pixels[(row + i) * SIDE + col + j] += ink;
    }
}

// ---- operations ----------------------------------------------------------------------------------------------------

// The windows of a picture. For each place (r, c) of the output, the window of extent x extent places that begins at
// (r stride - pad, c stride - pad), all channels, in one row; 0 where it hangs over the edge. What multiplies these
// rows is a convolution; with stride = extent, it is the patches of a Vision Transformer.
typedef struct {
    int batch, side, extent, stride, pad;
} Windows;

static inline int windows_side(Windows w) { return (w.side + 2 * w.pad - w.extent) / w.stride + 1; }

// Copies, or with `back` adds the other way: each number of a window goes back to where it was taken.
static inline void windows_move(float* windows, float* x, Windows w, int channels, bool back) {
    int out = windows_side(w);
    for (int b = 0; b < w.batch; b++)
        for (int place = 0; place < out * out; place++)
            for (int e = 0; e < w.extent * w.extent; e++, windows += channels) {
                int row = place / out * w.stride - w.pad + e / w.extent;
                int col = place % out * w.stride - w.pad + e % w.extent;
                bool inside = row >= 0 && row < w.side && col >= 0 && col < w.side;
                float* at = inside ? x + ((b * w.side + row) * w.side + col) * channels : NULL;
                for (int c = 0; c < channels; c++)
                    if (!back)
                        windows[c] = inside ? at[c] : 0;
                    else if (inside)
                        at[c] += windows[c];
            }
}
static inline void windows_backward(Node* y) {
    windows_move(y->grad, y->in[0]->grad, *(Windows*)y->extra, y->in[0]->cols, true);
}
// (batch side side,C) -> (batch out out,extent extent C)
static inline Node* windows_of(Node* x, Windows w) {
    insist(x->rows == w.batch * w.side * w.side, "%d rows for %d pictures", x->rows, w.batch);
    int out = windows_side(w);
    Node* y = record(x->tape, w.batch * out * out, w.extent * w.extent * x->cols, windows_backward, 1, &x, sizeof w);
    *(Windows*)y->extra = w;
    windows_move(y->value, x->value, w, x->cols, false);
    return y;
}

// The same numbers in another shape.
static inline void reshape_backward(Node* y) {
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[i] += y->grad[i];
}
static inline Node* reshape(Node* x, int rows, int cols) {
    insist(size(x) == (size_t)rows * (size_t)cols, "%d x %d as %d x %d", x->rows, x->cols, rows, cols);
    Node* y = record(x->tape, rows, cols, reshape_backward, 1, &x, 0);
    memcpy(y->value, x->value, sizeof(float) * size(x));
    return y;
}

// The largest number of each column, over every n = rows / groups rows: (groups n,C) -> (groups,C). Its gradient goes
// to where it was found.
static inline void most_of_rows_backward(Node* y) {
    const int* from = (int*)y->extra;
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[from[i]] += y->grad[i];
}
static inline Node* most_of_rows(Node* x, int groups) {
    int n = x->rows / groups, C = x->cols;
    insist(n * groups == x->rows, "%d rows in %d groups", x->rows, groups);
    Node* y = record(x->tape, groups, C, most_of_rows_backward, 1, &x, sizeof(int) * (size_t)(groups * C));
    for (int i = 0; i < groups * C; i++) {
        int best = i / C * n * C + i % C;
        for (int j = 1; j < n; j++) {
            int at = (i / C * n + j) * C + i % C;
            if (x->value[at] > x->value[best]) best = at;
        }
        ((int*)y->extra)[i] = best, y->value[i] = x->value[best];
    }
    return y;
}

// The mean instead. Its gradient is shared by all n.
static inline void mean_of_rows_backward(Node* y) {
    int n = y->in[0]->rows / y->rows, C = y->cols;
    for (int r = 0; r < y->in[0]->rows; r++) add_scaled(y->in[0]->grad + r * C, 1 / (float)n, y->grad + r / n * C, C);
}
static inline Node* mean_of_rows(Node* x, int groups) {
    int n = x->rows / groups, C = x->cols;
    insist(n * groups == x->rows, "%d rows in %d groups", x->rows, groups);
    Node* y = record(x->tape, groups, C, mean_of_rows_backward, 1, &x, 0);
    zero(y->value, size(y));
    for (int r = 0; r < x->rows; r++) add_scaled(y->value + r / n * C, 1 / (float)n, x->value + r * C, C);
    return y;
}

// Each row n times, one below the other: (groups,C) -> (groups n,C).
static inline Node* repeat_rows(Node* x, int n) {
    int* index = (int*)take(x->tape, sizeof(int) * (size_t)(x->rows * n));
    for (int i = 0; i < x->rows * n; i++) index[i] = i / n;
    return gather_rows(x, x->rows * n, index);
}

// ---- layers --------------------------------------------------------------------------------------------------------

typedef struct {
    Node *W, *b; // (in,out), (1,out)
} Linear;

static inline Linear linear(Tape* t, int in, int out) {
    Node* W = parameter(t, in, out, sqrtf(2 / (float)in)); // variance is kept through relu (He et al. 2015)
    return (Linear){W, parameter(t, 1, out, 0)};
}
static inline Node* apply(Linear l, Node* x) { return add(matmul(x, l.W), l.b); }

// ---- the mechanisms ------------------------------------------------------------------------------------------------
//
// Each takes feature maps x (batch places,C), and returns as many.

// Channel attention, "squeeze and excitation" (Hu et al. 2018): the mean of each channel over the picture; from these
// C numbers, by two layers with a narrow waist, C gates between 0 and 1; each channel times its gate.
typedef struct {
    Linear squeeze, excite; // (C,r), (r,C)
} ChannelAttention;

static inline ChannelAttention channel_attention(Tape* t, int C, int r) {
    return (ChannelAttention){linear(t, C, r), linear(t, r, C)};
}
static inline Node* waist(const ChannelAttention* a, Node* summary) {
    return apply(a->excite, relu_of(apply(a->squeeze, summary)));
}
static inline Node* attend_channels(const ChannelAttention* a, Node* x, int batch) {
    Node* gates = logistic_of(waist(a, mean_of_rows(x, batch))); // (batch,C)
    return multiply(x, repeat_rows(gates, x->rows / batch));
}

// Spatial attention as in the residual attention network (Wang et al. 2017, with one map for all channels): a branch
// goes down to half the resolution, sees wider there, comes back up, and gives a number M between 0 and 1 for each
// place. Places are multiplied with 1 + M: a branch that has learned nothing yet takes nothing away.
typedef struct {
    Linear down, up; // (9 C,r), (r,1)
} SpatialAttention;

static inline SpatialAttention spatial_attention(Tape* t, int C, int r) {
    return (SpatialAttention){linear(t, 9 * C, r), linear(t, r, 1)};
}
static inline Node* attend_places(const SpatialAttention* a, Node* x, int batch, int side, Node** map) {
    int half = side / 2, *index = (int*)take(x->tape, sizeof(int) * (size_t)x->rows);
    Node* low = relu_of(apply(a->down, windows_of(x, (Windows){batch, side, 3, 2, 1}))); // (batch half half,r)
    for (int i = 0; i < x->rows; i++)
        index[i] = (i / (side * side) * half + i / side % side / 2) * half + i % side / 2; // each place its quarter's
    *map = logistic_of(apply(a->up, gather_rows(low, x->rows, index)));                    // (batch places,1)
    return add(x, multiply(x, *map));
}

// Both, one after the other: CBAM (Woo et al. 2018). Gates of the channels from mean and maximum over the places, by
// the same two layers; then gates of the places from mean and maximum over the channels, by a 7 x 7 convolution.
typedef struct {
    ChannelAttention channels;
    Linear places; // (49 2,1)
} Cbam;

static inline Cbam cbam(Tape* t, int C, int r) {
    Cbam a = {channel_attention(t, C, r), linear(t, 49 * 2, 1)};
    a.places.b->value[0] = 2; // begin open: half closed, one training in three learned nothing
    return a;
}
static inline Node* attend_both(const Cbam* a, Node* x, int batch, int side, Node** map) {
    int rows = x->rows, C = x->cols;
    Node* gates =
        logistic_of(add(waist(&a->channels, mean_of_rows(x, batch)), waist(&a->channels, most_of_rows(x, batch))));
    x = multiply(x, repeat_rows(gates, rows / batch));
    Node* flat = reshape(x, rows * C, 1); // a place's channels as a group of rows
    Node* summary[2] = {mean_of_rows(flat, rows), most_of_rows(flat, rows)};
    Node* around = windows_of(concat_columns(2, summary), (Windows){batch, side, 7, 1, 3});
    *map = logistic_of(apply(a->places, around)); // (batch places,1)
    return multiply(x, *map);
}

// The non-local block (Wang et al. 2018): self-attention between all places of a picture, added to what is there. W_o
// begins as 0, so that the block begins as nothing. (The paper does not scale the scores; here they are scaled.)
typedef struct {
    Node *W_q, *W_k, *W_v, *W_o; // (C,r), (r,C)
} NonLocal;

static inline NonLocal non_local(Tape* t, int C, int r) {
    float deviation = 1 / sqrtf((float)C);
    Node *W_q = parameter(t, C, r, deviation), *W_k = parameter(t, C, r, deviation);
    Node *W_v = parameter(t, C, r, deviation), *W_o = parameter(t, r, C, 0);
    return (NonLocal){W_q, W_k, W_v, W_o};
}
// weights (batch,places,places)
static inline Node* attend_non_local(const NonLocal* a, Node* x, int batch, float* weights) {
    Node* found = attention_node(matmul(x, a->W_q), matmul(x, a->W_k), matmul(x, a->W_v), batch,
                                 (Heads){.heads = 1, .weights = weights});
    return add(x, matmul(found, a->W_o));
}

// The Vision Transformer (Dosovitskiy et al. 2021): each patch of a picture is a token, a learned class token is put
// before them, positions are learned; layers of self-attention and two-layer networks, each after a layernorm and
// added to what is there. The answer is read from the class token.
enum { LAYERS = 2 };

typedef struct {
    Node *gain[2], *bias[2], *W_q, *W_k, *W_v, *W_o;
    Linear wide, narrow;
} VitLayer;

typedef struct {
    Windows patches; // batch is not looked at
    int width, heads;
    Linear embed;
    Node *class_token, *positions, *gain, *bias; // (1,width), (1 + patches,width), (1,width) twice
    VitLayer layer[LAYERS];
    Node* attended[LAYERS]; // of the last pass: what each layer's attention found, and its weights
    float* weights[LAYERS]; // (batch,heads,1 + patches,1 + patches)
} Vit;

static inline Node* ones(Tape* t, int cols) {
    Node* p = parameter(t, 1, cols, 0);
    for (int c = 0; c < cols; c++) p->value[c] = 1;
    return p;
}
static inline int vit_tokens(const Vit* v) { return 1 + windows_side(v->patches) * windows_side(v->patches); }

// Over feature maps of so many channels: 1 for pictures; if they come from a convolution, the paper calls it a hybrid.
static inline void vit_new(Vit* v, Tape* t, Windows patches, int channels, int width, int heads, int hidden) {
    *v = (Vit){.patches = patches, .width = width, .heads = heads};
    v->embed = linear(t, patches.extent * patches.extent * channels, width);
    v->class_token = parameter(t, 1, width, 0.1f), v->positions = parameter(t, vit_tokens(v), width, 0.1f);
    v->gain = ones(t, width), v->bias = parameter(t, 1, width, 0);
    for (int l = 0; l < LAYERS; l++) {
        VitLayer* layer = v->layer + l;
        float deviation = 1 / sqrtf((float)width);
        for (int k = 0; k < 2; k++) layer->gain[k] = ones(t, width), layer->bias[k] = parameter(t, 1, width, 0);
        layer->W_q = parameter(t, width, width, deviation), layer->W_k = parameter(t, width, width, deviation);
        layer->W_v = parameter(t, width, width, deviation), layer->W_o = parameter(t, width, width, deviation);
        layer->wide = linear(t, width, hidden), layer->narrow = linear(t, hidden, width);
    }
}

// maps (batch side side,channels) -> the class tokens (batch,width)
static inline Node* vit_forward(Vit* v, Node* maps, int batch) {
    Tape* t = maps->tape;
    Windows w = v->patches;
    w.batch = batch;
    int n = vit_tokens(v), *from = (int*)take(t, sizeof(int) * (size_t)(3 * batch * n)), *position = from + batch * n,
        *first = position + batch * n;
    for (int i = 0; i < batch * n; i++)
        from[i] = i % n ? 1 + i / n * (n - 1) + i % n - 1 : 0, position[i] = i % n, first[i] = i * n;
    Node* parts[2] = {v->class_token, apply(v->embed, windows_of(maps, w))};
    Node* x = add(gather_rows(concat_rows(2, parts), batch * n, from), gather_rows(v->positions, batch * n, position));
    for (int l = 0; l < LAYERS; l++) {
        const VitLayer* layer = v->layer + l;
        v->weights[l] = (float*)take(t, sizeof(float) * (size_t)(batch * v->heads * n * n));
        Node* h = layernorm_rows(x, layer->gain[0], layer->bias[0]);
        v->attended[l] = attention_node(matmul(h, layer->W_q), matmul(h, layer->W_k), matmul(h, layer->W_v), batch,
                                        (Heads){.heads = v->heads, .weights = v->weights[l]});
        x = add(x, matmul(v->attended[l], layer->W_o));
        h = layernorm_rows(x, layer->gain[1], layer->bias[1]);
        x = add(x, apply(layer->narrow, relu_of(apply(layer->wide, h))));
    }
    return gather_rows(layernorm_rows(x, v->gain, v->bias), batch, first);
}

// ---- maps of a Vision Transformer -----------------------------------------------------------------------------------

// How much each token's answer is made of each token of the input, (n,n), if all that attention moves and all that is
// kept are worth the same: R = A_L ... A_1 with A = 1/2 I + 1/2 (mean of the heads' weights). Attention rollout (Abnar
// and Zuidema 2020). It is of a picture, whatever class one asks for. With `gradients`, after backward() from a class's
// logit, A = I + mean over the heads of max(0, weights * gradient of the logit by the weights): what spoke for that
// class (Chefer et al. 2021). The gradient is dO V^T, from what backward() left at the attention node.
static inline void vit_rollout(float* rollout, float* room, const Vit* v, int picture, bool gradients) {
    int n = vit_tokens(v), C = v->width, D = C / v->heads;
    float *A = room, *product = room + n * n; // 2 n n floats of room
    for (int i = 0; i < n * n; i++) rollout[i] = i / n == i % n;
    for (int l = 0; l < LAYERS; l++) {
        const Node *o = v->attended[l], *values = o->in[2];
        for (int i = 0; i < n * n; i++) A[i] = i / n == i % n ? gradients ? 1 : 0.5f : 0;
        for (int h = 0; h < v->heads; h++)
            for (int i = 0; i < n; i++)
                for (int j = 0; j < n; j++) {
                    float w = v->weights[l][((size_t)(picture * v->heads + h) * n + i) * n + j];
                    if (gradients) {
                        float dw = inner(o->grad + (picture * n + i) * C + h * D,
                                         values->value + (picture * n + j) * C + h * D, D);
                        A[i * n + j] += fmaxf(0, w * dw) / (float)v->heads;
                    } else
                        A[i * n + j] += 0.5f * w / (float)v->heads;
                }
        zero(product, (size_t)(n * n));
        add_ab(product, A, rollout, n, n, n);
        memcpy(rollout, product, sizeof(float) * (size_t)(n * n));
    }
}

// 12_pictures.h: the pictures of lesson 12, and a network that looks at them with soft or with hard attention.

#pragma once
#include "glimpse.h"

enum { SIDE = 4, CELLS = SIDE * SIDE, EDGE = 6, PIXELS = EDGE * EDGE, GLYPHS = 8, BATCH = 32 };
enum { SCOUT = 8, FEATURES = 64 }; // units of the network that scores, and of the one that sees

typedef struct {
    float pixel[CELLS][PIXELS]; // cell by cell
    int place, glyph;           // which cell is framed, and what is in it
} Picture;

// Glyphs are random 4 x 4 patterns of ink, made once.
static float glyph[GLYPHS][EDGE - 2][EDGE - 2];

static void make_glyphs(void) {
    uint64_t seed = 11;
    for (int g = 0; g < GLYPHS; g++)
        for (int i = 0; i < (EDGE - 2) * (EDGE - 2); i++)
            glyph[g][i / (EDGE - 2)][i % (EDGE - 2)] = (float)random_below(&seed, 2);
}

static void make_picture(Picture* p, uint64_t* seed) {
    p->place = random_below(seed, CELLS);
    for (int c = 0; c < CELLS; c++) {
        int g = random_below(seed, GLYPHS);
        if (c == p->place) p->glyph = g;
        for (int i = 0; i < PIXELS; i++) {
            int y = i / EDGE, x = i % EDGE;
            bool edge = y == 0 || x == 0 || y == EDGE - 1 || x == EDGE - 1;
            p->pixel[c][i] = 0.5f * normal(seed) + (edge ? (c == p->place ? 0.3f : 0) : glyph[g][y - 1][x - 1]);
        }
    }
}

typedef struct {
    Tape* tape;
    Node *S, *s, *S2; // scores: tanh(x S + s) S2      (PIXELS,SCOUT), (1,SCOUT), (SCOUT,1)
    Node *V, *v;      // values: relu(x V + v)         (PIXELS,FEATURES), (1,FEATURES)
    Node *W, *b;      // answers: value W + b          (FEATURES,GLYPHS), (1,GLYPHS)
    float baseline;   // of the reward: the running mean of log p(right answer)
} Seer;

static Seer seer_new(uint64_t seed) {
    Seer r = {.tape = tape_new(seed), .baseline = -logf(GLYPHS)};
    r.S = parameter(r.tape, PIXELS, SCOUT, 1.0f / EDGE), r.s = parameter(r.tape, 1, SCOUT, 0);
    r.S2 = parameter(r.tape, SCOUT, 1, 1 / sqrtf(SCOUT));
    r.V = parameter(r.tape, PIXELS, FEATURES, 1.4f / EDGE), r.v = parameter(r.tape, 1, FEATURES, 0);
    r.W = parameter(r.tape, FEATURES, GLYPHS, 1 / sqrtf(FEATURES)), r.b = parameter(r.tape, 1, GLYPHS, 0);
    return r;
}

// As many rows of one column as one row of CELLS for each picture: the same numbers.
static void reshape_backward(Node* y) { add_scaled(y->in[0]->grad, 1, y->grad, (int)size(y)); }
static Node* reshape(Node* a, int rows, int cols) {
    Node* y = record(a->tape, rows, cols, reshape_backward, 1, &a, 0);
    memcpy(y->value, a->value, sizeof(float) * size(y));
    return y;
}

// x (B CELLS,PIXELS) -> scores (B,CELLS)
static Node* scores_of(const Seer* r, Node* x) {
    return reshape(matmul(tanh_of(add(matmul(x, r->S), r->s)), r->S2), x->rows / CELLS, CELLS);
}
static Node* values_of(const Seer* r, Node* x) { return relu_of(add(matmul(x, r->V), r->v)); }
static Node* answers_of(const Seer* r, Node* value) { return add(matmul(value, r->W), r->b); }

static Node* pixels_of(const Seer* r, const Picture* p, int B) {
    Node* x = constant(r->tape, B * CELLS, PIXELS, NULL);
    for (int b = 0; b < B; b++) memcpy(x->value + b * CELLS * PIXELS, p[b].pixel, sizeof p[b].pixel);
    return x;
}

static void reward_of(float* reward, const Node* answers, const int* target) { // log p(right answer)
    float p[GLYPHS];
    for (int b = 0; b < answers->rows; b++)
        softmax_row(p, answers->value + b * GLYPHS, GLYPHS), reward[b] = logf(fmaxf(p[target[b]], 1e-30f));
}

typedef enum { SOFT, HARD, NO_BASELINE, METHODS } Method;
static const char* const method_name[METHODS] = {"soft", "hard", "hard, without a baseline"};

// Adds one batch's gradient. Xu et al. learn hard attention with the entropy of the weights added, which keeps them from
// settling on one place too early.
static void gradient(Seer* r, const Picture* p, Method method, float entropy, uint64_t* seed) {
    Node *x = pixels_of(r, p, BATCH), *scores = scores_of(r, x), *weights = softmax_rows(scores);
    int target[BATCH], place[BATCH], row[BATCH];
    float reward[BATCH], advantage[BATCH], mean = 0;
    for (int b = 0; b < BATCH; b++) target[b] = p[b].glyph;
    if (method == SOFT) {
        backward(cross_entropy(answers_of(r, soft_glimpse(weights, values_of(r, x))), target));
    } else {
        draw_places(place, weights, seed);
        for (int b = 0; b < BATCH; b++) row[b] = b * CELLS + place[b];
        Node* answers = answers_of(r, values_of(r, gather_rows(x, BATCH, row))); // one cell a picture
        reward_of(reward, answers, target);
        for (int b = 0; b < BATCH; b++) {
            advantage[b] = reward[b] - (method == HARD ? r->baseline : 0);
            mean += reward[b] / BATCH;
        }
        backward(add(cross_entropy(answers, target), reinforce(scores, place, advantage, entropy)));
        r->baseline = 0.9f * r->baseline + 0.1f * mean;
    }
    tape_clear(r->tape);
}

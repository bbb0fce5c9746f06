// 14_reviews.h: the reviews of lesson 14, and the small Transformer that reads them.

#pragma once
#include "dropout.h"

enum { LENGTH = 12, GOOD = 1, BAD = 7, NEUTRAL = 13, NOT = 29, WORDS = 30, WIDTH = 16, BATCH = 32, SEED = 1 };

// Word 0 is no word: an empty place. Deleting a word leaves one.
static const char* const vocabulary[WORDS] = {"_",     "good",  "great", "fine",  "fresh", "kind", "warm", "poor",
                                              "bad",   "rude",  "cold",  "stale", "slow",  "the",  "a",    "food",
                                              "was",   "and",   "room",  "we",    "came",  "with", "it",   "tea",
                                              "staff", "today", "all",   "very",  "had",   "not"};

// Returns whether the review is good. Without `negation` there is no "not" in it.
static int write_review(int* review, bool negation, uint64_t* seed) {
    int sum = 0;
    while (sum == 0) {
        sum = 0;
        for (int i = 0; i < LENGTH; i++) {
            int kind = random_below(seed, 10);
            review[i] = kind < 2 ? 0 : kind < 6 || !negation ? NEUTRAL + random_below(seed, NOT - NEUTRAL) : NOT;
            if (kind < 7) continue;
            review[i] = GOOD + random_below(seed, NEUTRAL - GOOD); // praise or blame
            sum += (review[i] < BAD ? 1 : -1) * (i > 0 && review[i - 1] == NOT ? -1 : 1);
        }
    }
    return sum > 0;
}

typedef struct {
    Node *W_q, *W_k, *W_v, *W_o, *gain[2], *bias[2], *W_1, *W_2;
} Layer;

typedef struct {
    Tape* tape;
    Node *E, *positions, *class_token, *W_out;
    Layer layer[2];
    float dropout;
    Node* embedded; // of the last pass: the words' vectors, (batch LENGTH,WIDTH)
    float* weights; // the class token's, (batch,LENGTH)
} Reader;

static void reader_new(Reader* r, float dropout) {
    Tape* t = tape_new(SEED);
    *r = (Reader){.tape = t, .dropout = dropout};
    r->E = parameter(t, WORDS, WIDTH, 0.5f), r->positions = parameter(t, LENGTH, WIDTH, 0.2f);
    r->class_token = parameter(t, 1, WIDTH, 0.5f), r->W_out = parameter(t, WIDTH, 2, 0.25f);
    for (int l = 0; l < 2; l++) {
        Node** matrices[] = {&r->layer[l].W_q, &r->layer[l].W_k, &r->layer[l].W_v, &r->layer[l].W_o};
        for (int k = 0; k < 4; k++) *matrices[k] = parameter(t, WIDTH, WIDTH, 0.25f);
        r->layer[l].W_1 = parameter(t, WIDTH, 2 * WIDTH, 0.35f);
        r->layer[l].W_2 = parameter(t, 2 * WIDTH, WIDTH, 0.25f);
        for (int k = 0; k < 2; k++) {
            r->layer[l].gain[k] = parameter(t, 1, WIDTH, 0), r->layer[l].bias[k] = parameter(t, 1, WIDTH, 0);
            for (int c = 0; c < WIDTH; c++) r->layer[l].gain[k]->value[c] = 1;
        }
    }
}

// x (batch m,WIDTH) looks at `seen` (batch n,WIDTH); then the two-layer network.
static Node* layer_of(const Reader* r, const Layer* l, Node* x, Node* seen, int batch, uint64_t* seed,
                      float** weights) {
    Node* h = layernorm_rows(x, l->gain[0], l->bias[0]);
    Node* s = seen == x ? h : layernorm_rows(seen, l->gain[0], l->bias[0]);
    Node* found =
        dropped_attention(matmul(h, l->W_q), matmul(s, l->W_k), matmul(s, l->W_v), batch, r->dropout, seed, weights);
    x = add(x, matmul(found, l->W_o));
    return add(x, matmul(relu_of(matmul(layernorm_rows(x, l->gain[1], l->bias[1]), l->W_1)), l->W_2));
}

// The logits (batch,2) of bad and good. seed: for dropout; NULL outside training.
static Node* read_reviews(Reader* r, const int* reviews, int batch, uint64_t* seed) {
    int position[BATCH * LENGTH], first[BATCH] = {0};
    for (int i = 0; i < batch * LENGTH; i++) position[i] = i % LENGTH;
    r->embedded = gather_rows(r->E, batch * LENGTH, reviews);
    Node* x = add(r->embedded, gather_rows(r->positions, batch * LENGTH, position));
    x = layer_of(r, &r->layer[0], x, x, batch, seed, NULL);
    Node* answer = gather_rows(r->class_token, batch, first);
    return matmul(layer_of(r, &r->layer[1], answer, x, batch, seed, &r->weights), r->W_out);
}

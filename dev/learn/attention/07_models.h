// 07_models.h: encoder-decoders for translation, from 2014 to 2017, on the tape. What differs is where the decoder finds
// what the encoder has read:
//
//     rnn           in one vector: the encoder's last state is the decoder's first      Cho et al. 2014
//     bahdanau      before each step, the decoder's state s(i-1) looks it up            Bahdanau et al. 2015
//     luong         after each step, the state s(i) does, everywhere or in a window     Luong et al. 2015
//     gnmt          as Bahdanau, for a stack of layers with residual connections        Wu et al. 2016
//     transformer   in every layer; and no recurrence at all, but attention             Vaswani et al. 2017
//
// A batch has B sentences of the same length n, so that nothing needs to be masked there; their translations are filled
// up to m words with PAD, for which there is no loss. Recurrent parts work on the batch one time step after another, on
// matrices whose rows are sentences; "by time" means that row i B + b is word i of sentence b. Everything else is "by
// sentence": row b n + i.

#pragma once
#include "07_language.h"
#include "recurrent.h"
#include "tape_attention.h"

typedef struct {
    int B, n, m;
    int* en;          // (B,n), by sentence
    int *in, *target; // (B,m): BEGIN and the translation; the translation and END, -1 for PAD
} Batch;

// The transformer's parts.
typedef struct {
    Node *gain, *bias;
} Norm;
typedef struct {
    Node *q, *k, *v, *o;
    Norm norm;
} AttentionBlock;
typedef struct {
    Node *in, *b, *out, *c;
    Norm norm;
} Mlp;

enum { EMBEDDING = 32, HEADS = 3, LAYERS = 2, HIDDEN = 64 };

typedef struct Model Model;
struct Model {
    const char* name;
    void (*create)(Model*);                                // its parameters
    Node* (*logits)(Model*, const Batch*, float* weights); // (B m,words); weights (B,m,n) are assigned, if not NULL
    ScoreKind score;                                       // luong's
    enum { GLOBAL, LOCAL_M, LOCAL_P } reach;               // luong's
    bool forwards;                                         // luong's: its encoder reads in one direction only
    int size;                                              // of states
    Tape* t;
    Node *en, *fr, *out, *bias; // embeddings, and from the decoder to the words
    Gru gru[3];
    Lstm lstm[7];
    Node* W[5];
    AttentionBlock block[3 * LAYERS]; // self-attention of encoder and of decoder; from the decoder to the encoder
    Mlp mlp[2 * LAYERS];
    Norm last[2];
    int D;          // half the window of local attention
    float rate;     // of learning
    double seconds; // spent on it
};

// A matrix that keeps the size of what goes through it.
static Node* weight(Tape* t, int rows, int cols) { return parameter(t, rows, cols, 1 / sqrtf((float)rows)); }

// ---- attention on the tape -----------------------------------------------------------------------------------------

typedef struct {
    int B;
    Sizes size;
    Score score;
    Local local;
    float *weights, *aligned, *centers; // (B,m,n), (B,m,n), (B,m)
} Attend;

static void attend_backward(Node* y) {
    const Attend* a = (Attend*)y->extra;
    Sizes s = a->size;
    float* grad[7]; // where there is an input
    for (int i = 0; i < 7; i++) grad[i] = y->in[i] ? y->in[i]->grad : NULL;
    float* work = (float*)take(y->tape, sizeof(float) * score_work(s, a->score));
    float* dscores = (float*)take(y->tape, sizeof(float) * (size_t)(s.m * s.n));
    ScoreGradient d = {.W = grad[3], .v_a = grad[4]};
    for (int b = 0; b < a->B; b++) {
        int at_q = b * s.m * s.dq, at_k = b * s.n * s.dk, at_v = b * s.n * s.dv;
        const float *q = y->in[0]->value + at_q, *k = y->in[1]->value + at_k, *v = y->in[2]->value + at_v;
        const float *dout = y->grad + b * s.m * s.dv, *weights = a->weights + b * s.m * s.n;
        if (a->local.D)
            local_backward(grad[0] + at_q, grad[1] + at_k, grad[2] + at_v, d, grad[5], grad[6], dscores, work, dout,
                           weights, a->aligned + b * s.m * s.n, a->centers + b * s.m, s, q, k, v, a->score, a->local);
        else
            attention_backward(grad[0] + at_q, grad[1] + at_k, grad[2] + at_v, d, dscores, work, dout, weights, s, q, k,
                               v, a->score);
    }
}

// Attention of attention.h for B sentences: q (B m,dq), k (B n,dk), v (B n,dv), by sentence -> (B m,dv). p holds the
// score's W and v_a and local-p's W_p and v_p, NULL where there is none; D is 0, or local-p's. *weights: (B,m,n).
static Node* attend(int B, Node* q, Node* k, Node* v, ScoreKind kind, Mask mask, Node* const* p, int D,
                    const float** weights) {
    Tape* t = q->tape;
    Node* y =
        record(t, q->rows, v->cols, attend_backward, 7, (Node*[]){q, k, v, p[0], p[1], p[2], p[3]}, sizeof(Attend));
    Attend* a = (Attend*)y->extra;
    Sizes s = {.m = q->rows / B, .n = k->rows / B, .dq = q->cols, .dk = k->cols, .dv = v->cols};
    *a = (Attend){.B = B, .size = s, .score = {.kind = kind}};
    if (p[0]) a->score.W = p[0]->value, a->score.h = p[0]->cols;
    if (p[1]) a->score.v_a = p[1]->value, a->score.h = (int)size(p[1]);
    if (D) a->local = (Local){.D = D, .h = p[2]->cols, .W_p = p[2]->value, .v_p = p[3]->value};
    size_t all = sizeof(float) * (size_t)(q->rows * s.n);
    a->weights = (float*)take(t, all), a->aligned = (float*)take(t, D ? all : 0);
    a->centers = (float*)take(t, sizeof(float) * (size_t)q->rows);
    float* work = (float*)take(t, sizeof(float) * score_work(s, a->score));
    for (int b = 0; b < B; b++) {
        const float *qb = q->value + b * s.m * s.dq, *kb = k->value + b * s.n * s.dk, *vb = v->value + b * s.n * s.dv;
        float *out = y->value + b * s.m * s.dv, *w = a->weights + b * s.m * s.n;
        if (D)
            local_forward(out, w, a->aligned + b * s.m * s.n, a->centers + b * s.m, work, s, qb, kb, vb, a->score,
                          a->local);
        else
            attention_forward(out, w, work, s, qb, kb, vb, a->score, mask);
    }
    if (weights) *weights = a->weights;
    return y;
}

// ---- what the recurrent models share -------------------------------------------------------------------------------

// words (B,n), by sentence -> their rows of the table, (n B,EMBEDDING), by time
static Node* embed_by_time(Node* table, const int* words, int B, int n) {
    int* index = (int*)take(table->tape, sizeof(int) * (size_t)(B * n));
    for (int i = 0; i < n; i++)
        for (int b = 0; b < B; b++) index[i * B + b] = words[b * n + i];
    return gather_rows(table, B * n, index);
}

// steps[i] (B,c) for i < n -> (B n,c), by sentence
static Node* by_sentence(Node* const* steps, int n) {
    int B = steps[0]->rows;
    int* index = (int*)take(steps[0]->tape, sizeof(int) * (size_t)(B * n));
    for (int i = 0; i < n; i++)
        for (int b = 0; b < B; b++) index[b * n + i] = i * B + b;
    return gather_rows(concat_rows(n, steps), B * n, index);
}

static Node* zeros(Tape* t, int rows, int cols) { return constant(t, rows, cols, NULL); }

// states[i] (B,c) from x (n B,in), by time; the last word first, if backwards. h: the first state.
static Node* run_gru(const Gru* g, Node* x, Node* h, int n, bool backwards, Node** states) {
    Node* xW = gru_input(g, x);
    for (int k = 0, B = h->rows; k < n; k++) {
        int i = backwards ? n - 1 - k : k;
        states[i] = h = gru_step(g, slice_rows(xW, i * B, B), h);
    }
    return h;
}

static void run_lstm(const Lstm* l, Node* x, int n, bool backwards, Node** states) {
    int B = x->rows / n;
    Node *xW = lstm_input(l, x), *h = zeros(x->tape, B, l->n), *c = h;
    for (int k = 0; k < n; k++) {
        int i = backwards ? n - 1 - k : k;
        lstm_step(l, slice_rows(xW, i * B, B), &h, &c);
        states[i] = h;
    }
}

// States of two directions beside one another.
static void both_directions(Node** states, Node* const* forth, Node* const* back, int n) {
    for (int i = 0; i < n; i++) states[i] = concat_columns(2, (Node*[]){forth[i], back[i]});
}

// A stack of LSTMs over x (n B,EMBEDDING), by time: the first layer in both directions, unless `forwards`; from the third
// on what a layer reads is added to what it says. Returns the states by sentence, (B n,size).
static Node* lstm_encoder(Model* m, const Batch* b, const Lstm* layer, int layers, bool forwards) {
    Node *forth[ROOM], *back[ROOM], *states[ROOM], *x = embed_by_time(m->en, b->en, b->B, b->n);
    for (int i = 0; i < layers; i++) {
        if (i) x = concat_rows(b->n, states);
        if (i || forwards)
            run_lstm(layer++, x, b->n, false, states);
        else {
            run_lstm(layer++, x, b->n, false, forth), run_lstm(layer++, x, b->n, true, back);
            both_directions(states, forth, back, b->n);
        }
        for (int k = 0; i >= 2 && k < b->n; k++) states[k] = add(states[k], slice_rows(x, k * b->B, b->B));
    }
    return by_sentence(states, b->n);
}

// What the attention of step i, one query a sentence, says into row i of the alignment (B,m,n).
static void note_weights(float* to, const float* weights, const Batch* b, int i) {
    for (int s = 0; to && s < b->B; s++)
        memcpy(to + (s * b->m + i) * b->n, weights + s * b->n, sizeof(float) * (size_t)b->n);
}

static void embeddings_new(Model* m, int width, int out) {
    m->en = parameter(m->t, english.count, width, 0.3f), m->fr = parameter(m->t, french.count, width, 0.3f);
    m->out = weight(m->t, out, french.count), m->bias = parameter(m->t, 1, french.count, 0);
}

static Node* words_from(const Model* m, Node* x) { return add(matmul(x, m->out), m->bias); }

// ---- rnn: everything through one vector ----------------------------------------------------------------------------

static inline void rnn_new(Model* m) {
    embeddings_new(m, EMBEDDING, m->size);
    for (int i = 0; i < 2; i++) m->gru[i] = gru_new(m->t, EMBEDDING, m->size);
}

static inline Node* rnn(Model* m, const Batch* b, float* weights) {
    Node* states[ROOM];
    Node* h =
        run_gru(&m->gru[0], embed_by_time(m->en, b->en, b->B, b->n), zeros(m->t, b->B, m->size), b->n, false, states);
    run_gru(&m->gru[1], embed_by_time(m->fr, b->in, b->B, b->m), h, b->m, false, states);
    for (int i = 0; weights && i < b->B * b->m * b->n; i++) weights[i] = 0;
    return words_from(m, by_sentence(states, b->m));
}

// ---- bahdanau: a bidirectional encoder, and a context c(i) from s(i-1) into the decoder's input --------------------
//
//     e_ij = v_a . tanh(W_a s(i-1) + U_a h_j),   weights_i = softmax e_i,   c_i = sum_j weights_ij h_j
//     s(i) = GRU([y(i-1); c_i], s(i-1));   the word from [s(i); c_i]        U_a h_j is computed once a sentence

static inline void bahdanau_new(Model* m) {
    int n = m->size, half = n * 3 / 4;
    embeddings_new(m, EMBEDDING, n + 2 * half);
    for (int i = 0; i < 2; i++) m->gru[i] = gru_new(m->t, EMBEDDING, half);
    m->gru[2] = gru_new(m->t, EMBEDDING, n);
    m->W[0] = weight(m->t, half, n);                       // the decoder's first state, from the whole read backwards
    m->W[1] = weight(m->t, n, 32);                         // W_a
    m->W[2] = weight(m->t, 2 * half, 32);                  // U_a
    m->W[3] = parameter(m->t, 1, 32, 0.5f);                // v_a
    m->W[4] = recurrent_weights(m->t, 2 * half, 3 * n, n); // from the context into the decoder
}

static inline Node* bahdanau(Model* m, const Batch* b, float* weights) {
    int B = b->B, half = m->gru[0].n;
    Node *forth[ROOM], *back[ROOM], *h[ROOM], *outputs[ROOM];
    Node *x = embed_by_time(m->en, b->en, B, b->n), *start = zeros(m->t, B, half);
    run_gru(&m->gru[0], x, start, b->n, false, forth);
    Node* s = tanh_of(matmul(run_gru(&m->gru[1], x, start, b->n, true, back), m->W[0]));
    both_directions(h, forth, back, b->n);
    Node *H = by_sentence(h, b->n), *keys = matmul(H, m->W[2]);
    Node* yW = gru_input(&m->gru[2], embed_by_time(m->fr, b->in, B, b->m));
    for (int i = 0; i < b->m; i++) {
        const float* now;
        Node* c =
            attend(B, matmul(s, m->W[1]), keys, H, ADDITIVE, no_mask, (Node*[]){NULL, m->W[3], NULL, NULL}, 0, &now);
        s = gru_step(&m->gru[2], add(slice_rows(yW, i * B, B), matmul(c, m->W[4])), s);
        outputs[i] = concat_columns(2, (Node*[]){s, c});
        note_weights(weights, now, b, i);
    }
    return words_from(m, by_sentence(outputs, b->m));
}

// ---- luong: stacks of two LSTMs, and a context from s(i), joined behind the cell -----------------------------------
//
//     weights_i = softmax over j of score(s(i), h_j),   c_i = sum_j weights_ij h_j,   s~(i) = tanh(W_c [c_i; s(i)])
//
// with the score dot, general or concat; over all j, or those within D of j = i (local-m) or of a predicted place
// (local-p). As the decoder's states do not wait for the attention, all steps look at once. Three departures from the
// paper: s~(i) is not fed into the next step; the decoder starts from zeros, so that all it learns of the sentence
// comes by attention; and the encoder's first layer reads in both directions, unless `forwards` says otherwise.

static inline void luong_new(Model* m) {
    int n = m->size;
    Lstm* l = m->lstm;
    embeddings_new(m, EMBEDDING, n);
    if (m->forwards)
        *l++ = lstm_new(m->t, EMBEDDING, n);
    else
        *l++ = lstm_new(m->t, EMBEDDING, n / 2), *l++ = lstm_new(m->t, EMBEDDING, n / 2);
    l[0] = lstm_new(m->t, n, n), l[1] = lstm_new(m->t, EMBEDDING, n), l[2] = lstm_new(m->t, n, n);
    m->W[0] = weight(m->t, 2 * n, n); // W_c
    if (m->score == GENERAL) m->W[1] = weight(m->t, n, n);
    if (m->score == CONCAT) m->W[1] = weight(m->t, 2 * n, 32), m->W[2] = parameter(m->t, 1, 32, 0.5f);
    if (m->reach == LOCAL_P) m->W[3] = weight(m->t, n, 16), m->W[4] = parameter(m->t, 1, 16, 0.1f);
}

static inline Node* luong(Model* m, const Batch* b, float* weights) {
    Node* states[ROOM];
    const Lstm* decoder = m->lstm + (m->forwards ? 2 : 3);
    Node* H = lstm_encoder(m, b, m->lstm, 2, m->forwards);
    run_lstm(&decoder[0], embed_by_time(m->fr, b->in, b->B, b->m), b->m, false, states);
    run_lstm(&decoder[1], concat_rows(b->m, states), b->m, false, states);
    Node* S = by_sentence(states, b->m);
    const float* now;
    Mask mask = m->reach == LOCAL_M ? (Mask){window, &m->D} : no_mask;
    Node* C = attend(b->B, S, H, H, m->score, mask, &m->W[1], m->reach == LOCAL_P ? m->D : 0, &now);
    if (weights) memcpy(weights, now, sizeof(float) * (size_t)(b->B * b->m * b->n));
    return words_from(m, tanh_of(matmul(concat_columns(2, (Node*[]){C, S}), m->W[0])));
}

// ---- gnmt: three layers, the first of the encoder in both directions, residual connections from the third ----------
//
// The lowest decoder layer's last output asks, with the additive score; the context goes into all decoder layers.

static inline void gnmt_new(Model* m) {
    int n = m->size;
    embeddings_new(m, EMBEDDING, n);
    for (int i = 0; i < 2; i++) m->lstm[i] = lstm_new(m->t, EMBEDDING, n / 2);
    for (int i = 2; i < 4; i++) m->lstm[i] = lstm_new(m->t, n, n);
    m->lstm[4] = lstm_new(m->t, EMBEDDING + n, n);
    for (int i = 5; i < 7; i++) m->lstm[i] = lstm_new(m->t, 2 * n, n);
    m->W[0] = weight(m->t, n, 32), m->W[1] = weight(m->t, n, 32), m->W[2] = parameter(m->t, 1, 32, 0.5f);
}

static inline Node* gnmt(Model* m, const Batch* b, float* weights) {
    Node *states[ROOM], *h[3], *c[3], *H = lstm_encoder(m, b, m->lstm, 3, false), *keys = matmul(H, m->W[1]);
    Node* y = embed_by_time(m->fr, b->in, b->B, b->m);
    for (int l = 0; l < 3; l++) h[l] = c[l] = zeros(m->t, b->B, m->size);
    for (int i = 0; i < b->m; i++) {
        const float* now;
        Node* context = attend(b->B, matmul(h[0], m->W[0]), keys, H, ADDITIVE, no_mask,
                               (Node*[]){NULL, m->W[2], NULL, NULL}, 0, &now);
        note_weights(weights, now, b, i);
        Node* x = slice_rows(y, i * b->B, b->B);
        for (int l = 0; l < 3; l++) {
            const Lstm* layer = &m->lstm[4 + l];
            lstm_step(layer, lstm_input(layer, concat_columns(2, (Node*[]){x, context})), &h[l], &c[l]);
            x = l == 2 ? add(h[l], x) : h[l];
        }
        states[i] = x;
    }
    return words_from(m, by_sentence(states, b->m));
}

// ---- transformer ---------------------------------------------------------------------------------------------------
//
// Encoder layer: unmasked self-attention, then an MLP; decoder layer: masked self-attention, attention to the encoder's
// output, then an MLP. Each is added to what it reads, and reads it normalised (layernorm first, as in GPT-2; the paper
// had it last, which is harder to train). Positions are sinusoids, added to the embeddings.

static void norm_new(Tape* t, Norm* norm, int n) {
    *norm = (Norm){parameter(t, 1, n, 0), parameter(t, 1, n, 0)};
    for (int j = 0; j < n; j++) norm->gain->value[j] = 1;
}
static Node* normalised(const Norm* norm, Node* x) { return layernorm_rows(x, norm->gain, norm->bias); }

// x plus what several heads answer, each on its part of the columns: x (B m,n) asks y (B k,n), or itself if y is NULL.
static Node* attention_block(const AttentionBlock* p, int B, Node* x, Node* y, Mask mask, float* weights) {
    Node *queries = normalised(&p->norm, x), *from = y ? y : queries;
    int m = x->rows / B, n = from->rows / B;
    Heads heads = {.heads = HEADS, .mask = mask};
    heads.weights = (float*)take(x->tape, sizeof(float) * (size_t)(B * HEADS * m * n)); // (B,HEADS,m,n)
    Node* out = attention_node(matmul(queries, p->q), matmul(from, p->k), matmul(from, p->v), B, heads);
    for (int i = 0; weights && i < B * m * n; i++) { // the heads' mean
        weights[i] = 0;
        for (int h = 0; h < HEADS; h++)
            weights[i] += heads.weights[(i / (m * n) * HEADS + h) * m * n + i % (m * n)] / HEADS;
    }
    return add(x, matmul(out, p->o));
}

static Node* mlp_block(const Mlp* p, Node* x) {
    return add(x, add(matmul(relu_of(add(matmul(normalised(&p->norm, x), p->in), p->b)), p->out), p->c));
}

static inline void transformer_new(Model* m) {
    int n = m->size;
    embeddings_new(m, n, n);
    for (int i = 0; i < 3 * LAYERS; i++) {
        AttentionBlock* p = &m->block[i];
        p->q = weight(m->t, n, n), p->k = weight(m->t, n, n), p->v = weight(m->t, n, n), p->o = weight(m->t, n, n);
        norm_new(m->t, &p->norm, n);
    }
    for (int i = 0; i < 2 * LAYERS; i++) {
        Mlp* p = &m->mlp[i];
        p->in = weight(m->t, n, HIDDEN), p->b = parameter(m->t, 1, HIDDEN, 0);
        p->out = weight(m->t, HIDDEN, n), p->c = parameter(m->t, 1, n, 0);
        norm_new(m->t, &p->norm, n);
    }
    for (int i = 0; i < 2; i++) norm_new(m->t, &m->last[i], n);
}

// words (B,n) -> (B n,size): what they are, and where they are
static Node* embed_with_positions(Node* table, const int* words, int B, int n) {
    Node *positions = constant(table->tape, B * n, table->cols, NULL), *x = gather_rows(table, B * n, words);
    sinusoidal_positions(positions->value, n, table->cols);
    for (int b = 1; b < B; b++)
        memcpy(positions->value + b * n * table->cols, positions->value, sizeof(float) * (size_t)(n * table->cols));
    return add(x, positions);
}

static inline Node* transformer(Model* m, const Batch* b, float* weights) {
    Node *x = embed_with_positions(m->en, b->en, b->B, b->n), *y = embed_with_positions(m->fr, b->in, b->B, b->m);
    for (int l = 0; l < LAYERS; l++)
        x = mlp_block(&m->mlp[l], attention_block(&m->block[l], b->B, x, NULL, no_mask, NULL));
    x = normalised(&m->last[0], x);
    for (int l = 0; l < LAYERS; l++) {
        y = attention_block(&m->block[LAYERS + l], b->B, y, NULL, (Mask){causal, NULL}, NULL);
        y = attention_block(&m->block[2 * LAYERS + l], b->B, y, x, no_mask, l == LAYERS - 1 ? weights : NULL);
        y = mlp_block(&m->mlp[LAYERS + l], y);
    }
    return words_from(m, normalised(&m->last[1], y));
}

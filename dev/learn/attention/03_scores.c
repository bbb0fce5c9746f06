// 03_scores.c: the score functions side by side: what they cost, and what they can learn.
//
//     dot         q . k                            Luong, Pham and Manning 2015
//     scaled dot  q . k / sqrt(d)                  Vaswani et al. 2017
//     cosine      beta q . k / (|q| |k|)           Graves, Wayne and Danihelka 2014, called content-based
//     general     q^T W k                          Luong et al. 2015
//     additive    v . tanh(W_q^T q + W_k^T k)      Bahdanau, Cho and Bengio 2015
//     concat      v . tanh(W^T [q; k])             Luong et al. 2015
//     location    (W^T q)_j                        Luong et al. 2015
//
// The task is an alignment. A sentence of 10 words, of 20 that there are, often with a word twice, is translated word
// by word; of each two neighbours, two in five exchange their places. The query is a translated word with its place in
// the new sentence, the keys are the words of the old one with theirs, each said more or less loudly; the weights must
// point at the word that the query is the translation of. The two languages' vectors are related by a linear map
// (Mikolov, Le and Sutskever 2013), which nobody tells the score. Every score has the same sentences, the same number
// of steps and the best of three learning rates.
//
// What to look at:
//   1. a score without parameters learns nothing by itself, but everything behind two learned projections; general is
//      the same thing, with both in one matrix
//   2. concat and additive are one function. Some texts leave v out; then tanh has to give a number, not a vector, and
//      all queries prefer the same key, for tanh(w . q + u . k) grows with u . k whatever q is
//   3. location finds the usual place of a word, and nothing else
//   4. the price: h times a tanh for each pair of query and key, against one product of two vectors

#include "attention.h"
#include "draw.h"
#include "tape.h"

#include <omp.h>

enum { N = 10, WORDS = 20, CONTENT = 16, PLACE = 8, D = CONTENT + PLACE, H = 24 };
enum { STEPS = 600, BATCH = 16, RATES = 3, TESTS = 2000 };

// ---- The task -------------------------------------------------------------------------------------------------------

typedef struct {
    float q[N * D], k[N * D];
    int words[N], right[N]; // the old sentence; the key that query i belongs to
} Sentence;

static float old_words[WORDS * CONTENT], new_words[WORDS * CONTENT], places[N * PLACE];

static void make_language(uint64_t seed) {
    float map[CONTENT * CONTENT];
    for (int c = 0; c < CONTENT * CONTENT; c++) map[c] = normal(&seed) / sqrtf(CONTENT);
    for (int c = 0; c < WORDS * CONTENT; c++) old_words[c] = normal(&seed);
    zero(new_words, WORDS * CONTENT);
    add_ab(new_words, old_words, map, WORDS, CONTENT, CONTENT);
    sinusoidal_positions(places, N, PLACE);
}

static void make_sentence(Sentence* s, uint64_t* seed) {
    for (int i = 0; i < N; i++) s->words[i] = random_below(seed, WORDS), s->right[i] = i;
    for (int i = 0; i < N; i += 2)
        if (uniform(seed) < 0.4f) s->right[i] = i + 1, s->right[i + 1] = i;
    for (int i = 0; i < N; i++) {
        float loudness = expf(0.5f * normal(seed));
        for (int c = 0; c < D; c++) {
            bool place = c >= CONTENT;
            s->q[i * D + c] = place ? places[i * PLACE + c - CONTENT] : new_words[s->words[s->right[i]] * CONTENT + c];
            s->k[i * D + c] =
                loudness * (place ? places[i * PLACE + c - CONTENT] : old_words[s->words[i] * CONTENT + c]);
        }
    }
}

// ---- A score with its parameters, and its training ------------------------------------------------------------------

typedef struct {
    const char* name;
    ScoreKind kind;
    bool projected; // q and k are first multiplied with learned matrices P_q, P_k (D,D)
    bool fixed_v;   // v_a stays (1, ..., 1)
    int h;          // units of additive and concat, if not H
} Contender;

typedef struct {
    Node *P_q, *P_k; // or NULL
    Score score;
    ScoreGradient gradient;
} Learner;

// A new parameter of a score; its gradient goes to *gradient.
static float* learned(Tape* t, int rows, int cols, float deviation, float** gradient) {
    Node* p = parameter(t, rows, cols, deviation);
    *gradient = p->grad;
    return p->value;
}

static Learner make_learner(Tape* t, const Contender* c) {
    ScoreKind kind = c->kind;
    int h = kind == LOCATION ? N : c->h ? c->h : H;
    float of_input = 1 / sqrtf(D), *v_a = NULL, *beta = NULL;
    Learner l = {.score = {.kind = kind, .h = h}};
    ScoreGradient* d = &l.gradient;
    if (c->projected) l.P_q = parameter(t, D, D, of_input), l.P_k = parameter(t, D, D, of_input);
    if (kind == GENERAL) l.score.W = learned(t, D, D, 1.0f / D, &d->W);
    if (kind == LOCATION) l.score.W = learned(t, D, N, of_input, &d->W);
    if (kind == CONCAT) l.score.W = learned(t, 2 * D, h, of_input, &d->W);
    if (kind == ADDITIVE) l.score.W_q = learned(t, D, h, of_input, &d->W_q);
    if (kind == ADDITIVE) l.score.W_k = learned(t, D, h, of_input, &d->W_k);
    if (kind == ADDITIVE || kind == CONCAT) l.score.v_a = v_a = learned(t, 1, h, 1 / sqrtf((float)h), &d->v_a);
    if (kind == COSINE) l.score.beta = beta = learned(t, 1, 1, 0, &d->beta), *beta = 1;
    for (int i = 0; i < h && c->fixed_v; i++) v_a[i] = 1;
    return l;
}

static const Sizes sizes = {N, N, D, D, 1};

// weights (N,N) of a sentence. If asked for, the gradient of the mean of -log weight of the right key is added to the
// parameters' gradients: at the scores it is weights - 1 at the right key, and the rest is score_backward.
static void align(float* weights, const Learner* l, const Sentence* s, bool with_gradient) {
    float Q[N * D] = {0}, K[N * D] = {0}, dQ[N * D] = {0}, dK[N * D] = {0}, dscores[N * N], work[4 * N * H + N * D];
    const float *q = s->q, *k = s->k;
    if (l->P_q) {
        add_ab(Q, s->q, l->P_q->value, N, D, D), q = Q;
        add_ab(K, s->k, l->P_k->value, N, D, D), k = K;
    }
    score_forward(weights, work, sizes, q, k, l->score);
    softmax_forward(weights, weights, N, N, no_mask);
    if (!with_gradient) return;
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) dscores[i * N + j] = (weights[i * N + j] - (j == s->right[i])) / (N * BATCH);
    score_backward(dQ, dK, l->gradient, work, dscores, sizes, q, k, l->score);
    if (l->P_q) {
        add_atb(l->P_q->grad, s->q, dQ, D, N, D);
        add_atb(l->P_k->grad, s->k, dK, D, N, D);
    }
}

// Trains, and gives the share of queries, in new sentences, whose largest weight is where it should be. The weights of
// the first of these sentences go to `shown`.
static float train(const Contender* c, float rate, int* parameters, float* shown) {
    uint64_t seed = 5;
    Tape* t = tape_new(3);
    Learner l = make_learner(t, c);
    *parameters = (int)parameter_total(t) - (c->fixed_v ? l.score.h : 0);
    Sentence s;
    float weights[N * N];
    for (int step = 0; step < STEPS; step++) {
        for (int b = 0; b < BATCH; b++) make_sentence(&s, &seed), align(weights, &l, &s, true);
        if (c->fixed_v) zero(l.gradient.v_a, (size_t)l.score.h);
        adamw(t, rate * (1 - (float)step / STEPS), 0, 1);
    }
    int hits = 0;
    for (int test = 0; test < TESTS; test++) {
        make_sentence(&s, &seed);
        align(weights, &l, &s, false);
        if (test == 0) memcpy(shown, weights, sizeof weights);
        for (int i = 0; i < N; i++) {
            int best = 0;
            for (int j = 1; j < N; j++)
                if (weights[i * N + j] > weights[i * N + best]) best = j;
            hits += best == s.right[i];
        }
    }
    tape_free(t);
    return (float)hits / (TESTS * N);
}

// ---- Time -----------------------------------------------------------------------------------------------------------

// Nanoseconds for one score of a query and a key of 64 numbers, forward and backward: the best of all rounds.
static void measure_time(ScoreKind kind, double* forward, double* backward) {
    enum { M = 128, SIZE = 64 };
    static float x[2 * SIZE * M], q[M * SIZE], k[M * SIZE], scores[M * M], work[4 * M * SIZE], d[3][2 * SIZE * M];
    uint64_t seed = 1;
    for (int c = 0; c < M * SIZE; c++) q[c] = normal(&seed), k[c] = normal(&seed);
    for (int c = 0; c < 2 * SIZE * M; c++) x[c] = normal(&seed) / 8;
    Sizes size = {M, M, SIZE, SIZE, 1};
    Score score = {.kind = kind, .h = kind == LOCATION ? M : SIZE, .W = x, .W_q = x, .W_k = x, .v_a = x};
    ScoreGradient gradient = {d[2], d[2], d[2], d[2], NULL};
    double t0 = omp_get_wtime();
    score_forward(scores, work, size, q, k, score);
    double t1 = omp_get_wtime();
    score_backward(d[0], d[1], gradient, work, scores, size, q, k, score);
    double t2 = omp_get_wtime();
    *forward = fmin(*forward, (t1 - t0) * 1e9 / (M * M)), *backward = fmin(*backward, (t2 - t1) * 1e9 / (M * M));
}

// ---- The comparison -------------------------------------------------------------------------------------------------

enum {
    BARE_DOT,
    BARE_SCALED,
    BARE_COSINE,
    WITH_W,
    WITH_TANH,
    JOINED,
    V_OF_ONES,
    NO_V,
    PLACES,
    P_DOT,
    P_SCALED,
    P_COSINE,
    ALL
};

static const Contender contenders[ALL] = {
    {.name = "dot", .kind = DOT},
    {.name = "scaled dot", .kind = SCALED_DOT},
    {.name = "cosine", .kind = COSINE},
    {.name = "general", .kind = GENERAL},
    {.name = "additive", .kind = ADDITIVE},
    {.name = "concat", .kind = CONCAT},
    {.name = "concat, v all ones", .kind = CONCAT, .fixed_v = true},
    {.name = "concat without v", .kind = CONCAT, .fixed_v = true, .h = 1},
    {.name = "location", .kind = LOCATION},
    {.name = "dot, projected", .kind = DOT, .projected = true},
    {.name = "scaled dot, projected", .kind = SCALED_DOT, .projected = true},
    {.name = "cosine, projected", .kind = COSINE, .projected = true},
};

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    make_language(1);
    static const float rates[RATES] = {0.003f, 0.01f, 0.03f};
    static float accuracy[ALL][RATES], weights[ALL][RATES][N * N];
    int parameters[ALL][RATES];
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int c = 0; c < ALL; c++)
        for (int r = 0; r < RATES; r++)
            accuracy[c][r] = train(&contenders[c], rates[r], &parameters[c][r], weights[c][r]);

    const char* names[ALL];
    float best[ALL], *shown[ALL];
    double forward[ALL], backward[ALL];
    for (int c = 0; c < ALL; c++) forward[c] = backward[c] = INFINITY;
    for (int round = 0; round < 30; round++) // in turns, so that what else the machine does disturbs all alike
        for (int c = 0; c < ALL; c++) measure_time(contenders[c].kind, &forward[c], &backward[c]);
    printf("%-22s %10s %8s     %s\n", "score", "parameters", "right",
           "ns a score, forward, backward (64 numbers each)");
    for (int c = 0; c < ALL; c++) {
        int r = accuracy[c][1] > accuracy[c][0] ? 1 : 0;
        r = accuracy[c][2] > accuracy[c][r] ? 2 : r;
        names[c] = contenders[c].name, best[c] = accuracy[c][r], shown[c] = weights[c][r];
        printf("%-22s %10d %6.1f %%", names[c], parameters[c][r], 100 * best[c]);
        if (c <= PLACES && c != V_OF_ONES && c != NO_V) printf("     %5.1f %5.1f", forward[c], backward[c]);
        putchar('\n');
    }
    putchar('\n');
    draw_bars("03_scores", "Share of queries that point at the right key", best, ALL, names);

    uint64_t seed = 5; // the sentence of which train() has kept the weights
    Sentence s;
    for (int i = 0; i <= STEPS * BATCH; i++) make_sentence(&s, &seed);
    char labels[2 * N][2] = {{0}};
    const char *rows[N], *cols[N];
    for (int i = 0; i < N; i++) {
        labels[i][0] = (char)('A' + s.words[s.right[i]]), rows[i] = labels[i];
        labels[N + i][0] = (char)('a' + s.words[i]), cols[i] = labels[N + i];
    }
    putchar('\n');
    draw_heat("03_additive", "Weights of the additive score: word X translates x", shown[WITH_TANH], N, N, rows, cols);
    putchar('\n');
    draw_heat("03_location", "Weights of the location score", shown[PLACES], N, N, rows, cols);
    putchar('\n');
    draw_heat("03_no_v", "Weights of concat without v", shown[NO_V], N, N, rows, cols);

    float worst = 1;
    for (int c = P_DOT; c < ALL; c++) worst = fminf(worst, best[c]);
    claim(
        best[BARE_DOT] < 0.15f && best[BARE_COSINE] < 0.15f && worst > 0.95f && best[WITH_W] > 0.95f,
        "dot and cosine alone guess (%.0f %%, %.0f %%); projected they are right in %.0f %%, and general is in %.0f %%",
        100 * best[BARE_DOT], 100 * best[BARE_COSINE], 100 * worst, 100 * best[WITH_W]);
    claim(best[BARE_SCALED] == best[BARE_DOT], "to divide by sqrt(d) changes no query's favourite");
    claim(fabsf(best[WITH_TANH] - best[WITH_W]) < 0.02f && fabsf(best[WITH_TANH] - worst) < 0.02f,
          "additive is no better than a product, nor worse: %.1f %% and %.1f %%", 100 * best[WITH_TANH],
          100 * best[WITH_W]);
    claim(fabsf(best[JOINED] - best[WITH_TANH]) < 0.005f, "concat is additive: %.1f %%", 100 * best[JOINED]);
    claim(best[NO_V] < 0.2f, "without v, concat guesses: %.1f %%", 100 * best[NO_V]);
    claim(best[V_OF_ONES] > best[JOINED] - 0.02f,
          "a v that is all ones, on the other hand, does no harm here: tanh is odd, so W can take v's signs");
    claim(fabsf(best[PLACES] - 0.6f) < 0.02f, "location finds the three in five words that kept their place: %.1f %%",
          100 * best[PLACES]);
    claim(forward[WITH_TANH] > 2 * forward[BARE_DOT], "an additive score takes %.1f times as long as a dot product",
          forward[WITH_TANH] / forward[BARE_DOT]);
    return lesson_ends();
}

// Three changes to try:
//   - H = 4. Additive falls to 76 %: each unit sees the sentence along one direction only. The products, of rank 24, do
//     not change.
//   - In make_sentence(), expf(1.5f * normal(seed)): some words are whispered, some shouted. Cosine does not notice;
//     the products lose 1 to 3 %, and additive falls to 84 %, its tanh being saturated by what is loud.
//   - In align(), after add_ab, set Q[i] and K[i] to 0 where i % D >= 4, and dQ[i], dK[i] after score_backward: the
//     projections have 4 numbers. Dot falls to 80 %, but cosine stays at 97 %: of vectors of one length each is its own
//     nearest, however crowded they are; among the others, a long one may be nearer to all.

// 05_multihead.c: self-attention makes a word's vector depend on its sentence; and what several heads are for.
//
// In self-attention, queries, keys and values are made of the same sequence: each word looks at all words of its own
// sentence and takes home an average of what they offer (Lin et al. 2017; Vaswani et al. 2017, section 3.2.2):
//
//     h = x + [head_1, ..., head_H] W^O,    head_h = softmax((x W^Q_h) (x W^K_h)^T / sqrt(D)) x W^V_h
//
// What to look at:
//   1. "bank" stands beside "river" in one sentence and beside "loan" in another. Its row of the embedding table is
//      between the two; what comes out of one layer of self-attention, trained to guess masked words, is not.
//   2. a task that asks for several things at once, at equal width and with the same number of parameters, for 1 to 16
//      heads; and how many heads it takes, by linear algebra

#include "draw.h"
#include "tape_attention.h"

// ---- 1. Which bank? -------------------------------------------------------------------------------------------------

enum { WORDS = 33, LENGTH = 8, WIDTH = 16, FIRST = 8, OWN = 11, BANK = 30, CURRENT = 31, MASKED = 32 };
enum { RIVER, MONEY };

// 8 words that fit everywhere; of each topic 5 nouns, 3 adjectives, 3 verbs; two nouns that belong to both.
static const char* const word[WORDS] = {
    "the",   "a",       "near",  "of",    "was",  "is",   "we",    "today",                             //
    "river", "boat",    "fish",  "shore", "reed", "deep", "muddy", "cold",  "cross",  "swim", "sail",   // RIVER
    "money", "loan",    "cash",  "vault", "fee",  "rich", "cheap", "safe",  "borrow", "pay",  "invest", // MONEY
    "bank",  "current", "[mask]"};

// A sentence about a topic, from one of three patterns: N, A, V stand for a noun, adjective, verb.
static void write_sentence(int* sentence, int topic, uint64_t* seed) {
    static const char* const pattern[3] = {"0N20N4A7", "6V0N30N7", "0AN30N5A"};
    const char* p = pattern[random_below(seed, 3)];
    for (int i = 0; i < LENGTH; i++) {
        int own = FIRST + topic * OWN;
        if (p[i] == 'N')
            sentence[i] = random_below(seed, 4) ? own + random_below(seed, 5) : BANK + random_below(seed, 2);
        else if (p[i] == 'A')
            sentence[i] = own + 5 + random_below(seed, 3);
        else if (p[i] == 'V')
            sentence[i] = own + 8 + random_below(seed, 3);
        else
            sentence[i] = p[i] - '0';
    }
}

typedef struct {
    Tape* tape;
    Node *E, *W_q, *W_k, *W_v, *W_o, *bias;
} Reader;

// h (batch LENGTH,WIDTH): each word's vector, with what it has taken from its sentence.
static Node* in_context(const Reader* r, const int* sentences, int batch, float* weights) {
    Node* x = gather_rows(r->E, batch * LENGTH, sentences);
    Node* found = attention_node(matmul(x, r->W_q), matmul(x, r->W_k), matmul(x, r->W_v), batch,
                                 (Heads){.heads = 2, .weights = weights});
    return add(x, matmul(found, r->W_o));
}

// Learns to guess masked words, as BERT (Devlin et al. 2019): of 10 words to be guessed, 8 are masked, one is replaced
// by another, one left as it is. The embedding table also gives the scores of the answers.
static void learn_to_read(Reader* r) {
    enum { BATCH = 32, STEPS = 2000 };
    uint64_t seed = 3;
    int sentences[BATCH * LENGTH], chosen[BATCH], target[BATCH];
    for (int step = 0; step < STEPS; step++) {
        for (int b = 0; b < BATCH; b++) {
            int* s = sentences + b * LENGTH;
            write_sentence(s, random_below(&seed, 2), &seed);
            int i = random_below(&seed, LENGTH);
            while (s[i] < FIRST) i = (i + 1) % LENGTH;
            chosen[b] = b * LENGTH + i, target[b] = s[i];
            int fate = random_below(&seed, 10);
            s[i] = fate < 8 ? MASKED : fate == 8 ? FIRST + random_below(&seed, MASKED - FIRST) : s[i];
        }
        Node* h = gather_rows(in_context(r, sentences, BATCH, NULL), BATCH, chosen);
        Node* loss = cross_entropy(add(matmul(h, transpose(r->E)), r->bias), target);
        backward(loss);
        adamw(r->tape, 0.01f * (1 - (float)step / STEPS), 0.01f, 1);
        tape_clear(r->tape);
    }
}

static float cosine(const float* x, const float* y) {
    return inner(x, y, WIDTH) / sqrtf(inner(x, x, WIDTH) * inner(y, y, WIDTH));
}

static int topic_of(int w) { return w < FIRST + OWN ? RIVER : MONEY; }

// The `count` words of either topic whose embeddings are nearest to x by their angle.
static void neighbours(int* nearest, int count, const float* x, const Node* E) {
    for (int k = 0; k < count; k++) {
        nearest[k] = -1;
        for (int w = FIRST; w < BANK; w++) {
            bool taken = false;
            for (int other = 0; other < k; other++) taken = taken || nearest[other] == w;
            if (!taken &&
                (nearest[k] < 0 || cosine(x, E->value + w * WIDTH) > cosine(x, E->value + nearest[k] * WIDTH)))
                nearest[k] = w;
        }
    }
}

static void which_bank(void) {
    Reader r = {.tape = tape_new(1)};
    r.E = parameter(r.tape, WORDS, WIDTH, 0.5f);
    r.W_q = parameter(r.tape, WIDTH, WIDTH, 0.25f), r.W_k = parameter(r.tape, WIDTH, WIDTH, 0.25f);
    r.W_v = parameter(r.tape, WIDTH, WIDTH, 0.25f), r.W_o = parameter(r.tape, WIDTH, WIDTH, 0.25f);
    r.bias = parameter(r.tape, 1, WORDS, 0);
    learn_to_read(&r);

    // Two sentences that differ in two words, and what surrounds "bank" there.
    enum { AT = 4, NOUNS = 10, NEAREST = 5, TESTS = 1000 };
    static const int sentence[2][LENGTH] = {{0, 9, 2, 0, BANK, 4, 14, 7}, {0, 20, 2, 0, BANK, 4, 25, 7}};
    static const char* const rows[3] = {"in the table", "near the boat", "near the loan"};
    float weights[2 * 2 * LENGTH * LENGTH], near[3 * NOUNS], mean[3][2] = {{0}};
    const char* nouns[NOUNS];
    Node* h = in_context(&r, sentence[0], 2, weights);
    const float* bank[3] = {r.E->value + BANK * WIDTH, h->value + AT * WIDTH, h->value + (LENGTH + AT) * WIDTH};
    bool all_own[2] = {true, true};
    printf("\n1. The neighbours of \"bank\", and the cosines of the angles to them\n\n");
    for (int k = 0; k < 3; k++) {
        int nearest[NEAREST];
        neighbours(nearest, NEAREST, bank[k], r.E);
        printf("%-15s", rows[k]);
        for (int n = 0; n < NEAREST; n++) {
            printf(" %s %.2f%s", word[nearest[n]], cosine(bank[k], r.E->value + nearest[n] * WIDTH),
                   n < NEAREST - 1 ? "," : "\n");
            if (k > 0) all_own[k - 1] = all_own[k - 1] && topic_of(nearest[n]) == k - 1;
        }
        for (int n = 0; n < NOUNS; n++) {
            int w = FIRST + n / 5 * OWN + n % 5;
            nouns[n] = word[w], near[k * NOUNS + n] = cosine(bank[k], r.E->value + w * WIDTH);
            mean[k][n / 5] += near[k * NOUNS + n] / 5;
        }
    }
    putchar('\n');
    draw_heat("05_bank", "\"bank\" and the nouns of both topics: cosines", near, 3, NOUNS, rows, nouns);
    for (int s = 0; s < 2; s++) {
        const char* words[LENGTH];
        for (int i = 0; i < LENGTH; i++) words[i] = word[sentence[s][i]];
        printf("\nweights of the first of two heads\n");
        draw_heat(s ? "05_weights_loan" : "05_weights_boat", NULL, weights + 2 * s * LENGTH * LENGTH, LENGTH, LENGTH,
                  words, words);
    }

    uint64_t seed = 9;
    int right = 0, right_in_table = 0;
    for (int test = 0; test < TESTS; test++) {
        int s[LENGTH], topic = random_below(&seed, 2), at, nearest;
        do {
            write_sentence(s, topic, &seed);
            for (at = 0; at < LENGTH && s[at] != BANK;) at++;
        } while (at == LENGTH);
        tape_clear(r.tape);
        neighbours(&nearest, 1, in_context(&r, s, 1, NULL)->value + at * WIDTH, r.E);
        right += topic_of(nearest) == topic;
        neighbours(&nearest, 1, bank[0], r.E);
        right_in_table += topic_of(nearest) == topic;
    }
    claim(fabsf(mean[0][RIVER] - mean[0][MONEY]) < 0.25f,
          "in the table, \"bank\" is near the nouns of both topics: %.2f, %.2f", mean[0][RIVER], mean[0][MONEY]);
    claim(mean[1][RIVER] > mean[1][MONEY] + 0.25f && mean[2][MONEY] > mean[2][RIVER] + 0.25f,
          "in context it is nearer to those of its sentence: %.2f, %.2f near the boat, %.2f, %.2f near the loan",
          mean[1][RIVER], mean[1][MONEY], mean[2][RIVER], mean[2][MONEY]);
    claim(all_own[RIVER] && all_own[MONEY], "there, its %d nearest neighbours are all of its sentence's topic",
          NEAREST);
    claim(right > 0.98f * TESTS && right_in_table < 0.6f * TESTS,
          "in %d new sentences, the nearest neighbour is of the right topic in %.1f %%; from the table, in %.1f %%",
          TESTS, 100.0f * (float)right / TESTS, 100.0f * (float)right_in_table / TESTS);
    tape_free(r.tape);
}

// ---- 2. What several heads are for ----------------------------------------------------------------------------------
//
// Each place is to say which letters stand 1, 2, 3 and 4 places before it: four groups of scores, read off linearly.
// Queries and keys are made of the places, values of the letters, so that head h looks p places back with a weight
// a_hp, whatever the letters are. The scores of the letters in group g are then
//
//     s_g = sum over p of S_gp letter_p,    S_gp = sum over h of a_hp B_gh,    B_gh = W^V_h times W^O_h's part for g
//
// It takes four heads. Say that group g is always right. Averaged over all ways to exchange letters with one another,
// S_gp is still right, and is o_gp times the identity, up to a constant. The letter at p = g must win against any other
// that stands at all p where o_gp is positive, and where o_gp is negative may itself stand: o_gg > sum over the other p
// of |o_gp|. A matrix o with such a diagonal can be inverted (Lévy and Desplanques), so it has rank 4; but it is the
// product of some matrix, groups by heads, and a, heads by places. With H heads its rank is H at most, however wide
// they are.
enum { LETTERS = 8, PLACES = 12, GROUPS = 4, C = 32, HEAD_COUNTS = 5 };

// Letters (batch,PLACES), and those to be named: target (GROUPS,batch,PLACES), -1 for the first places.
static void spell(int* letters, int* target, int batch, uint64_t* seed) {
    for (int i = 0; i < batch * PLACES; i++) letters[i] = random_below(seed, LETTERS);
    for (int g = 0; g < GROUPS; g++)
        for (int i = 0; i < batch * PLACES; i++)
            target[g * batch * PLACES + i] = i % PLACES < GROUPS ? -1 : letters[i - g - 1];
}

typedef struct {
    Tape* tape;
    Node *letters, *places, *W_q, *W_k, *W_v, *W_o;
    int heads;
} Speller;

static Node* scores(const Speller* s, const int* letters, int batch) {
    int place[PLACES * 256];
    for (int i = 0; i < batch * PLACES; i++) place[i] = i % PLACES;
    Node *x = gather_rows(s->letters, batch * PLACES, letters), *p = gather_rows(s->places, batch * PLACES, place);
    Node* found =
        attention_node(matmul(p, s->W_q), matmul(p, s->W_k), matmul(x, s->W_v), batch, (Heads){.heads = s->heads});
    return matmul(found, s->W_o);
}

// share[g]: of the places, those that name group g right; share[GROUPS]: all groups.
static size_t learn_to_spell(int heads, float share[GROUPS + 1]) {
    enum { BATCH = 32, STEPS = 1500, TESTS = 256 };
    Tape* t = tape_new(1);
    float deviation = 1 / sqrtf(C);
    Speller s = {t,
                 parameter(t, LETTERS, C, 1),
                 parameter(t, PLACES, C, 1),
                 parameter(t, C, C, deviation),
                 parameter(t, C, C, deviation),
                 parameter(t, C, C, deviation),
                 parameter(t, C, GROUPS * LETTERS, deviation),
                 heads};
    static _Thread_local int letters[TESTS * PLACES], target[GROUPS * TESTS * PLACES];
    uint64_t seed = 4;
    for (int step = 0; step < STEPS; step++) {
        spell(letters, target, BATCH, &seed);
        Node *all = scores(&s, letters, BATCH), *loss = NULL;
        for (int g = 0; g < GROUPS; g++) {
            Node* one = cross_entropy(slice_columns(all, g * LETTERS, LETTERS), target + g * BATCH * PLACES);
            loss = g ? add(loss, one) : one;
        }
        backward(loss);
        adamw(t, 0.02f * (1 - (float)step / STEPS), 0, 1);
        tape_clear(t);
    }
    spell(letters, target, TESTS, &seed);
    Node* all = scores(&s, letters, TESTS);
    int right[GROUPS + 1] = {0};
    for (int i = 0; i < TESTS * PLACES; i++) {
        if (i % PLACES < GROUPS) continue;
        bool every = true;
        for (int g = 0; g < GROUPS; g++) {
            const float* x = all->value + i * GROUPS * LETTERS + g * LETTERS;
            int best = 0;
            for (int c = 1; c < LETTERS; c++)
                if (x[c] > x[best]) best = c;
            right[g] += best == target[g * TESTS * PLACES + i];
            every = every && best == target[g * TESTS * PLACES + i];
        }
        right[GROUPS] += every;
    }
    for (int g = 0; g <= GROUPS; g++) share[g] = (float)right[g] / (TESTS * (PLACES - GROUPS));
    size_t parameters = parameter_total(t);
    tape_free(t);
    return parameters;
}

static void how_many_heads(void) {
    float share[HEAD_COUNTS][GROUPS + 1], all[HEAD_COUNTS];
    static const char* const labels[HEAD_COUNTS] = {"1 head of 32", "2 heads of 16", "4 heads of 8", "8 heads of 4",
                                                    "16 heads of 2"};
    size_t parameters[HEAD_COUNTS];
#pragma omp parallel for schedule(dynamic)
    for (int i = 0; i < HEAD_COUNTS; i++) parameters[i] = learn_to_spell(1 << i, share[i]);
    printf("\n2. Name the letters 1, 2, 3 and 4 places back: share of right answers\n\n");
    printf("                parameters   1 back  2 back  3 back  4 back   all four\n");
    for (int i = 0; i < HEAD_COUNTS; i++) {
        all[i] = share[i][GROUPS];
        printf("%-15s %10zu  %6.3f  %6.3f  %6.3f  %6.3f   %8.3f\n", labels[i], parameters[i], share[i][0], share[i][1],
               share[i][2], share[i][3], all[i]);
    }
    putchar('\n');
    draw_bars("05_heads", "All four letters right", all, HEAD_COUNTS, labels);
    claim(parameters[0] == parameters[HEAD_COUNTS - 1], "the number of parameters is the same for all");
    claim(share[0][0] > 0.99f && share[0][1] < 0.2f && share[0][2] < 0.2f && share[0][3] < 0.2f,
          "one head gets one letter right, and guesses the others: %.1f %% of places with all four", 100 * all[0]);
    claim(all[1] < 0.2f, "two heads do not suffice: %.1f %%", 100 * all[1]);
    claim(all[2] > 0.8f && all[3] > 0.99f, "four do, %.1f %%, and eight learn it more surely, %.1f %%", 100 * all[2],
          100 * all[3]);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    which_bank();
    how_many_heads();
    return lesson_ends();
}

// Three changes to try:
//   - In in_context(), return what attention has found, without adding x. The neighbours are still of the right topic,
//     but all that is left of the word itself is what its weight on itself brings: adding x keeps what a word is.
//   - In scores(), make values of the letters' vectors plus the places'. Four heads now succeed everywhere, two do
//     better, one still fails. (Values that know where they come from are beyond the proof above.)
//   - Let STEPS in learn_to_spell() be 3000: with the seed as it is, four heads then reach all places.

// 05_context.c: self-attention makes a word's vector depend on its sentence.
//
// In self-attention, queries, keys and values are made of the same sequence: each word looks at all words of its own
// sentence and takes home an average of what they offer (Lin et al. 2017; Vaswani et al. 2017, section 3.2.2):
//
//     h = x + [head_1, head_2] W^O,    head_h = softmax((x W^Q_h) (x W^K_h)^T / sqrt(D)) x W^V_h
//
// "bank" stands beside "boat" in one sentence and beside "loan" in another. A static embedding has one row for it,
// whatever the sentence (Mikolov et al. 2013). One layer of self-attention is trained to guess masked words, in
// generated sentences about rivers and about money.
//
// What to look at:
//   - the neighbours of "bank" in the embedding table, and of what comes out of the layer in either sentence
//   - the weights of "bank", beside what each word really brings to it

#include "draw.h"
#include "tape_attention.h"

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
    printf("\nThe neighbours of \"bank\", and the cosines of the angles to them\n\n");
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
    // What each word brings to "bank": its weight in both heads, and how far its share of what is found, the sum over
    // the heads of weight x W^V W^O, goes along the direction from the money nouns to the river nouns.
    float along[WIDTH] = {0};
    for (int n = 0; n < NOUNS; n++)
        add_scaled(along, n < 5 ? 0.2f : -0.2f, r.E->value + (FIRST + n / 5 * OWN + n % 5) * WIDTH, WIDTH);
    for (int s = 0; s < 2; s++) {
        static const char* const brings[3] = {"head 1", "head 2", "pull"};
        const char* words[LENGTH];
        float map[3 * LENGTH];
        for (int i = 0; i < LENGTH; i++) {
            float v[WIDTH] = {0}, share[WIDTH] = {0};
            words[i] = word[sentence[s][i]];
            add_ab(v, r.E->value + sentence[s][i] * WIDTH, r.W_v->value, 1, WIDTH, WIDTH);
            for (int head = 0; head < 2; head++) {
                float weight = map[head * LENGTH + i] = weights[((s * 2 + head) * LENGTH + AT) * LENGTH + i];
                for (int c = head * WIDTH / 2; c < (head + 1) * WIDTH / 2; c++)
                    add_scaled(share, weight * v[c], r.W_o->value + c * WIDTH, WIDTH);
            }
            map[2 * LENGTH + i] = inner(share, along, WIDTH) / sqrtf(inner(along, along, WIDTH));
        }
        putchar('\n');
        draw_heat(s ? "05_bank_loan" : "05_bank_boat", "weights of \"bank\", and pull to the river (+) or to money (-)",
                  map, 3, LENGTH, brings, words);
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

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    which_bank();
    return lesson_ends();
}

// Three changes to try:
//   - In in_context(), return what attention has found, without adding x. The neighbours are still of the right topic,
//     but all that is left of the word itself is what its weight on itself brings: adding x keeps what a word is.
//   - In the first sentence, put 20 ("loan") for 9 ("boat"). With a word of each topic "bank" is near both, 0.53 and 0.40
//     on average, and the adjective prevails: what a word means is what its sentence sums up to.
//   - In learn_to_read(), let STEPS be 200. The rows of the table have not settled by then, and the first claim fails;
//     yet in context, "bank" is of the right topic in all 1000 sentences.

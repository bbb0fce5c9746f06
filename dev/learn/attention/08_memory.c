// 08_memory.c: an LSTM that looks back at every state it was in, against one that has its last state only.
//
// "Long short-term memory-networks for machine reading" (Cheng, Dong and Lapata 2016) begin each step not from the last
// state but from an average of all states before, weighted by attention; memory.h has the formulas. It is the first
// self-attention: a word is related to the words before it in the same text, a year before the Transformer.
//
// The text here is generated, in a language with agreement: a noun is introduced with one of four endings, drawn anew
// in each story, and comes back later without it; the article behind it must agree with the ending that it had. Between
// the two are up to 57 words, and eleven other nouns with endings of their own:
//
//     foxa then owlu here hena ... owl U now ... fox A ...
//
// What to look at:
//   - the share of right articles, by the distance to the noun's introduction
//   - the weights at the articles: where the network looks back to
//   - the price

#define _GNU_SOURCE 1 // for clock_gettime

#include <time.h>

#include "draw.h"
#include "memory.h"

enum { STEMS = 14, NOUNS = 12, ENDINGS = 4, OTHERS = 6, T = 60, BATCH = 32 }; // T words in a story
enum {
    BARE = 0,
    INFLECTED = STEMS,
    ASKED = INFLECTED + STEMS * ENDINGS,
    OTHER,
    WORDS = OTHER + OTHERS
}; // their numbers
enum { EMBEDDING = 16, H = 32, BINS = 6, BIN = 10, BATCHES = 1000, TEST_BATCHES = 20 };

static const char* const stem[] = {"fox", "owl", "hen", "cat", "dog", "ant", "bee",
                                   "elk", "yak", "rat", "cow", "pig", "emu", "cod"};
static const char* const other[OTHERS] = {"then", "here", "now", "and", "so", "there"};
static const char ending[ENDINGS + 1] = "aeou";

// The article is to be named where the word is ASKED: target is the ending, and -1 elsewhere; since is how many words
// ago the noun was introduced.
typedef struct {
    int word[T], target[T], since[T];
} Story;

static void shuffle(int* x, int n, uint64_t* seed) {
    for (int i = n - 1; i > 0; i--) {
        int j = random_below(seed, i + 1), other_one = x[i];
        x[i] = x[j], x[j] = other_one;
    }
}

static void write_story(Story* s, uint64_t* seed) {
    int order[STEMS], class[STEMS], introduced[STEMS], at = 0, fill = T - 3 * NOUNS;
    for (int i = 0; i < STEMS; i++) order[i] = i, class[i] = random_below(seed, ENDINGS);
    for (int i = 0; i < T; i++) s->target[i] = -1;
    shuffle(order, STEMS, seed);
    for (int i = 0; i < 2 * NOUNS; i++) {
        for (; random_below(seed, fill + 2 * NOUNS - i) < fill; fill--)
            s->word[at++] = OTHER + random_below(seed, OTHERS);
        if (i == NOUNS) shuffle(order, NOUNS, seed); // they come back in another order
        int noun = order[i % NOUNS];
        if (i < NOUNS) {
            introduced[noun] = at, s->word[at++] = INFLECTED + noun * ENDINGS + class[noun];
        } else {
            s->word[at++] = BARE + noun;
            s->word[at] = ASKED, s->target[at] = class[noun], s->since[at] = at - introduced[noun], at++;
        }
    }
    while (at < T) s->word[at++] = OTHER + random_below(seed, OTHERS);
}

typedef struct {
    const char* name;
    bool attends;
    int n; // size of the state
    Tape* tape;
    Node *E, *W, *b;
    Lstm lstm;
    Lstmn lstmn;
    double seconds;                // of a step of training
    float right[BINS], all, looks; // shares: right answers by distance, in all; largest weight on the introduction
} Reader;

// Scores of the endings (T B,ENDINGS), time-major, and the targets (T B).
static Node* read_stories(const Reader* r, const Story* s, int B, int* target, const float** weights) {
    int words[T * BATCH];
    for (int i = 0; i < T; i++)
        for (int b = 0; b < B; b++) words[i * B + b] = s[b].word[i], target[i * B + b] = s[b].target[i];
    Node *x = gather_rows(r->E, T * B, words), *states[T];
    if (r->attends) {
        lstmn_read(&r->lstmn, x, T, states, weights);
    } else {
        Node *xW = lstm_input(&r->lstm, x), *h = constant(r->tape, B, r->n, NULL), *c = h;
        for (int i = 0; i < T; i++) lstm_step(&r->lstm, slice_rows(xW, i * B, B), &h, &c), states[i] = h;
    }
    return add(matmul(concat_rows(T, states), r->W), r->b);
}

static void reader_begins(Reader* r) {
    r->tape = tape_new(1);
    r->E = parameter(r->tape, WORDS, EMBEDDING, 1);
    if (r->attends)
        r->lstmn = lstmn_new(r->tape, EMBEDDING, r->n, H);
    else
        r->lstm = lstm_new(r->tape, EMBEDDING, r->n);
    r->W = parameter(r->tape, r->n, ENDINGS, 1 / sqrtf((float)r->n)), r->b = parameter(r->tape, 1, ENDINGS, 0);
}

static double seconds(void) { // of this thread's work
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The rate is 0.015, and falls to 0 over the second half of the steps.
static void learn(Reader* r) {
    uint64_t seed = 5;
    Story s[BATCH];
    int target[T * BATCH];
    double start = seconds();
    for (int step = 0; step < BATCHES; step++) {
        for (int b = 0; b < BATCH; b++) write_story(&s[b], &seed);
        backward(cross_entropy(read_stories(r, s, BATCH, target, NULL), target));
        adamw(r->tape, 0.015f * fminf(1, 2 - 2 * (float)step / BATCHES), 0.01f, 1);
        tape_clear(r->tape);
    }
    r->seconds = (seconds() - start) / BATCHES;
}

static int largest_of(const float* x, int n) {
    int best = 0;
    for (int j = 1; j < n; j++) best = x[j] > x[best] ? j : best;
    return best;
}

static void test(Reader* r) {
    uint64_t seed = 1000;
    Story s[BATCH];
    int target[T * BATCH], asked[BINS] = {0};
    const float* weights[T];
    for (int batch = 0; batch < TEST_BATCHES; batch++) {
        for (int b = 0; b < BATCH; b++) write_story(&s[b], &seed);
        const float* scores = read_stories(r, s, BATCH, target, weights)->value;
        for (int i = 0; i < T; i++)
            for (int b = 0; b < BATCH; b++) {
                if (s[b].target[i] < 0) continue;
                int bin = s[b].since[i] / BIN;
                asked[bin]++,
                    r->right[bin] += largest_of(scores + (i * BATCH + b) * ENDINGS, ENDINGS) == s[b].target[i];
                if (r->attends) r->looks += largest_of(weights[i] + b * i, i) == i - s[b].since[i];
            }
        tape_clear(r->tape);
    }
    float total = TEST_BATCHES * BATCH * NOUNS;
    for (int bin = 0; bin < BINS; bin++) r->all += r->right[bin] / total, r->right[bin] /= (float)asked[bin];
    r->looks /= total;
}

// One new story, and what the network looks back at where it is asked.
static void picture(const Reader* r) {
    static char text[T][8];
    const char *cols[T], *rows[NOUNS];
    float map[NOUNS * T] = {0};
    uint64_t seed = 2024;
    Story s;
    int target[T], row = 0;
    const float* weights[T];
    write_story(&s, &seed);
    read_stories(r, &s, 1, target, weights);
    for (int i = 0; i < T; i++) {
        int w = s.word[i];
        if (w == ASKED)
            snprintf(text[i], sizeof text[i], "_");
        else if (w >= INFLECTED && w < ASKED)
            snprintf(text[i], sizeof text[i], "%s%c", stem[(w - INFLECTED) / ENDINGS],
                     ending[(w - INFLECTED) % ENDINGS]);
        else
            snprintf(text[i], sizeof text[i], "%s", w < INFLECTED ? stem[w] : other[w - OTHER]);
        cols[i] = text[i];
        if (w == ASKED) rows[row] = text[i - 1], memcpy(map + row++ * T, weights[i], sizeof(float) * (size_t)i);
    }
    printf("\n");
    draw_heat("08_memory", "Where it looks back to, at the twelve articles (downwards) of a new story", map, NOUNS, T,
              rows, cols);
    tape_clear(r->tape);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    enum { LSTM, LSTMN, READERS };
    Reader readers[READERS] = {{.name = "LSTM", .n = 48}, {.name = "LSTMN", .n = 40, .attends = true}};
#pragma omp parallel for schedule(dynamic)
    for (int k = READERS - 1; k >= 0; k--) reader_begins(&readers[k]), learn(&readers[k]), test(&readers[k]);

    printf("Right articles in %d new stories, by the distance to the noun's introduction\n(guessing: %.2f)\n\n",
           TEST_BATCHES * BATCH, 1.0 / ENDINGS);
    printf("%-6s parameters  ms a step   1-9 10-19 20-29 30-39 40-49 50-59   all\n", "");
    Series series[READERS];
    static const float middle[BINS] = {5, 14.5f, 24.5f, 34.5f, 44.5f, 54.5f};
    for (int k = 0; k < READERS; k++) {
        Reader* r = &readers[k];
        printf("%-6s %10zu %10.1f", r->name, parameter_total(r->tape), 1000 * r->seconds);
        for (int bin = 0; bin < BINS; bin++) printf(" %5.3f", r->right[bin]);
        printf(" %5.3f\n", r->all);
        series[k] = (Series){r->name, BINS, middle, r->right, false};
    }
    printf("\n");
    draw_curves("08_distance_of_agreement", "Right articles",
                &(Axes){.x = "words since the noun's introduction", .y = "share", .zero = true}, series, READERS);
    picture(&readers[LSTMN]);
    Reader *lstm = &readers[LSTM], *lstmn = &readers[LSTMN];
    printf("\n");
    claim(lstmn->all > 0.9f, "the LSTMN names %.1f %% of the articles", 100 * lstmn->all);
    claim(1 - lstm->all > 10 * (1 - lstmn->all),
          "the LSTM, with as many parameters and the same stories, misses more than ten times as many: %.1f %%",
          100 * (1 - lstm->all));
    claim(lstmn->right[BINS - 1] > 0.9f, "the LSTMN does not mind the distance: %.1f %% beyond 50 words",
          100 * lstmn->right[BINS - 1]);
    claim(lstmn->looks > 0.8f, "its largest weight is on the noun's introduction in %.1f %% of the cases",
          100 * lstmn->looks);
    for (int k = 0; k < READERS; k++) tape_free(readers[k].tape);
    return lesson_ends();
}

// Three changes to try:
//   - Let STEMS be 8, NOUNS 6 and T 40: less to remember. The LSTM then holds it in its state, and names 93 % of the
//     articles; the LSTMN, at 59 %, has hardly begun to use its attention, and the claims fail. What attention buys is
//     not the same at every size, and learning to look takes a while of its own.
//   - Let the ending be a word of its own: in write_story(), for the introduction, s->word[at++] = BARE + noun,
//     introduced[noun] = at, s->word[at++] = INFLECTED + class[noun]; and fill = T - 4 * NOUNS. Now a state must first
//     bring noun and ending together, and the LSTMN, at 41 %, is as lost as the LSTM, at 47 %.
//   - Let the LSTM have twice the units, .n = 96, and so three times the parameters. It names 42 %.

// 07_translation.h: sentences to learn from, training, translating, and how good it is.

#pragma once
#define _GNU_SOURCE 1 // for clock_gettime
#include <time.h>

#include "07_models.h"
#include "draw.h"

enum { POOL = 16000, LARGEST_BATCH = 64, LENGTHS = 8, SHORTEST = 4 };
enum { TEST = 64 }; // new sentences of each length

static Sentence pool[POOL];       // to learn from, short ones first
static int first_of[LONGEST + 2]; // where those of n words begin

static void fill_pool(uint64_t seed) {
    int total = LONGEST - SHORTEST + 1;
    for (int n = SHORTEST, i = 0; n <= LONGEST + 1; n++) {
        first_of[n] = i;
        for (int end = (int)((int64_t)POOL * (n - SHORTEST + 1) / total); n <= LONGEST && i < end; i++)
            pool[i] = sentence_of(n, &seed);
    }
}

// A batch of sentences of the same length.
static Batch batch_of(Tape* t, const Sentence* const* s, int B) {
    Batch b = {.B = B, .n = s[0]->n, .m = 0};
    for (int i = 0; i < B; i++) b.m = s[i]->m > b.m ? s[i]->m : b.m;
    b.en = (int*)take(t, sizeof(int) * (size_t)(B * b.n));
    b.in = (int*)take(t, sizeof(int) * (size_t)(B * b.m)), b.target = (int*)take(t, sizeof(int) * (size_t)(B * b.m));
    for (int i = 0; i < B; i++) {
        memcpy(b.en + i * b.n, s[i]->en, sizeof(int) * (size_t)b.n);
        for (int j = 0; j < b.m; j++) {
            b.in[i * b.m + j] = j == 0 ? BEGIN : j <= s[i]->m ? s[i]->fr[j - 1] : PAD;
            b.target[i * b.m + j] = j < s[i]->m ? s[i]->fr[j] : -1;
        }
    }
    return b;
}

// The largest of n numbers.
static int best_of(const float* x, int n) {
    int best = 0;
    for (int j = 1; j < n; j++)
        if (x[j] > x[best]) best = j;
    return best;
}

// Seconds that this thread has worked.
static double thread_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// ---- training ------------------------------------------------------------------------------------------------------

// Reads `batches` batches of sentences, all models the same ones: at first from the shorter sentences only, from all when the share
// `growing` of the time is over. The learning rate climbs to the model's over 50 batches, and falls to 0 from a third of the
// time on.
static void train(Model* m, int batches, int size_of_batch, float growing) {
    insist(0 < size_of_batch && size_of_batch <= LARGEST_BATCH, "a batch of %d", size_of_batch);
    double begin = thread_seconds();
    uint64_t seed = 5;
    for (int i = 0; i < batches; i++) {
        float done = (float)i / (float)batches, warm = i < 50 ? (float)i / 50 : 1;
        int known = done < growing ? (int)((0.1f + 0.9f * done / growing) * POOL) : POOL;
        int n = pool[random_below(&seed, known)].n, many = first_of[n + 1] - first_of[n];
        const Sentence* s[LARGEST_BATCH];
        for (int k = 0; k < size_of_batch; k++) s[k] = &pool[first_of[n] + random_below(&seed, many)];
        Batch b = batch_of(m->t, s, size_of_batch);
        backward(cross_entropy(m->logits(m, &b, NULL), b.target));
        adamw(m->t, m->rate * warm * fminf(1, 1.5f * (1 - done)), 0, 1);
        tape_clear(m->t);
    }
    m->seconds = thread_seconds() - begin;
}

// ---- translating ---------------------------------------------------------------------------------------------------

// out[i] (ROOM): the translation of sentence i, word by word the most probable one after those before, up to END. Asked
// for one word after another, a model would have to run as often as there are words. But told a whole translation it
// says for all places at once which word it would have written there; if those are the words that it was told, it would
// have written the same. Otherwise all are right up to the first that differs, so it is told these instead, and so on,
// until nothing changes. Where one begins makes no difference to the result; the nearer, the sooner it is there, so it
// is the right translation.
static void translate(Model* m, const Sentence* const* s, int B, int (*out)[ROOM]) {
    int longest = smaller(ROOM - 1, s[0]->n + s[0]->n / 2 + 4), left[TEST], count = B; // those that may still change
    for (int i = 0; i < B; i++) {
        left[i] = i;
        for (int j = 0; j < ROOM; j++) out[i][j] = j < smaller(longest, s[i]->m) ? s[i]->fr[j] : END;
    }
    while (count > 0) {
        const Sentence* asked[TEST];
        for (int i = 0; i < count; i++) asked[i] = s[left[i]];
        Batch b = batch_of(m->t, asked, count);
        b.m = longest;
        b.in = (int*)take(m->t, sizeof(int) * (size_t)(count * b.m));
        for (int i = 0; i < count; i++)
            for (int j = 0; j < b.m; j++) b.in[i * b.m + j] = j == 0 ? BEGIN : out[left[i]][j - 1];
        const float* logits = m->logits(m, &b, NULL)->value;
        int changed = 0;
        for (int i = 0; i < count; i++) {
            bool same = true, ended = false;
            for (int j = 0; j < b.m; j++, logits += french.count) {
                int *word = &out[left[i]][j], best = ended ? END : best_of(logits, french.count);
                same = same && best == *word, ended = best == END, *word = best;
            }
            if (!same) left[changed++] = left[i];
        }
        count = changed;
        tape_clear(m->t);
    }
}

static int length_of(const int* words) {
    int n = 0;
    while (n < ROOM - 1 && words[n] != END) n++;
    return n;
}

// How often words i, i+1, ... of a, `order` of them, occur in b (n words).
static int occurrences(const int* a, int order, const int* b, int n) {
    int count = 0;
    for (int i = 0; i + order <= n; i++) count += !memcmp(a, b + i, sizeof(int) * (size_t)order);
    return count;
}

// BLEU (Papineni et al. 2002) of B translations: the geometric mean, for orders 1 to 4, of the share of their n-grams
// that the right translation has too, none counted more often than it occurs there; less where they are too short.
static double bleu_of(int (*out)[ROOM], const Sentence* const* s, int B) {
    double log_sum = 0, length = 0, right_length = 0;
    for (int order = 1; order <= 4; order++) {
        double matches = 0, all = 0;
        for (int k = 0; k < B; k++) {
            int n = length_of(out[k]), m = s[k]->m - 1;
            if (order == 1) length += n, right_length += m;
            for (int i = 0; i + order <= n; i++, all++) {
                int before = occurrences(out[k] + i, order, out[k], i + order - 1); // the same, further left
                matches += before < occurrences(out[k] + i, order, s[k]->fr, m);
            }
        }
        if (matches == 0) return 0;
        log_sum += log(matches / all) / 4;
    }
    return 100 * exp(log_sum + (length < right_length ? 1 - right_length / length : 0));
}

// ---- how good is it? -----------------------------------------------------------------------------------------------

typedef struct {
    float exact[LENGTHS], bleu[LENGTHS]; // per cent, by length: 5, 10 ... 40 English words
    float aligned; // per cent of French words whose largest weight is on an English word that they come from
} Quality;

static const float test_length[LENGTHS] = {5, 10, 15, 20, 25, 30, 35, 40};

static Sentence test_set[LENGTHS][TEST];

static void fill_tests(uint64_t seed) { // with sentences that are not learned from
    for (int l = 0; l < LENGTHS; l++)
        for (int k = 0; k < TEST;) {
            int n = (int)test_length[l];
            Sentence* s = &test_set[l][k++];
            *s = sentence_of(n, &seed);
            for (int i = first_of[n]; i < first_of[n + 1]; i++)
                if (!memcmp(pool[i].en, s->en, sizeof(int) * (size_t)n)) {
                    k--;
                    break;
                }
        }
}

// The weights (m,n) with which the model reads sentence s when it is told the right translation.
static void alignment_of(Model* m, const Sentence* s, float* weights) {
    Batch b = batch_of(m->t, &s, 1);
    m->logits(m, &b, weights);
    tape_clear(m->t);
}

static Quality test(Model* m) {
    Quality q = {.aligned = 0};
    int words = 0, aligned = 0;
    for (int l = 0; l < LENGTHS; l++) {
        const Sentence* s[TEST];
        int out[TEST][ROOM], exact = 0;
        for (int k = 0; k < TEST; k++) s[k] = &test_set[l][k];
        translate(m, s, TEST, out);
        q.bleu[l] = (float)bleu_of(out, s, TEST);
        Batch b = batch_of(m->t, s, TEST);
        float* weights = (float*)take(m->t, sizeof(float) * (size_t)(b.B * b.m * b.n));
        m->logits(m, &b, weights);
        for (int k = 0; k < TEST; k++) {
            exact += length_of(out[k]) == s[k]->m - 1 && !memcmp(out[k], s[k]->fr, sizeof(int) * (size_t)s[k]->m);
            for (int i = 0; i < s[k]->m; i++, words++)
                aligned += (int)(s[k]->from[i] >> best_of(weights + (k * b.m + i) * b.n, b.n) & 1);
        }
        tape_clear(m->t);
        q.exact[l] = 100 * (float)exact / TEST;
    }
    q.aligned = 100 * (float)aligned / (float)words;
    return q;
}

// All models, as many at a time as there are threads.
static void learn_and_test(Model* m, int count, Quality* q, int batches, int size_of_batch, float growing) {
    fill_pool(1), fill_tests(2);
    printf("%d sentences of %d to %d words; %d English and %d French words. %d batches of %d sentences.\n", POOL,
           SHORTEST, LONGEST, english.count - 3, french.count - 3, batches, size_of_batch);
    print_words("for example:", &english, pool[POOL / 4].en, pool[POOL / 4].n);
    print_words("           :", &french, pool[POOL / 4].fr, pool[POOL / 4].m);
    printf("%d models learn, which takes up to a minute ...\n", count);
    fflush(stdout);
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = count - 1; i >= 0; i--) { // the last ones take longest: they begin
        m[i].t = tape_new(17);
        m[i].create(&m[i]);
        train(&m[i], batches, size_of_batch, growing);
        q[i] = test(&m[i]);
    }
}

// Tables and curves, the file's names beginning with `name`.
static void report(const char* name, const Model* m, const Quality* q, int count) {
    Series exact[MAX_SERIES], bleu[MAX_SERIES];
    char file[2][64];
    printf("\n%-22s parameters  training  aligned   exact translations, %%, by length\n%-46s", "", "");
    for (int l = 0; l < LENGTHS; l++) printf("%5.0f", test_length[l]);
    for (int i = 0; i < count; i++) {
        printf("\n%-22s %10zu  %6.1f s  %5.1f %% ", m[i].name, parameter_total(m[i].t), m[i].seconds, q[i].aligned);
        for (int l = 0; l < LENGTHS; l++) printf("%5.0f", q[i].exact[l]);
        exact[i] = (Series){.label = m[i].name, .n = LENGTHS, .x = test_length, .y = q[i].exact};
        bleu[i] = (Series){.label = m[i].name, .n = LENGTHS, .x = test_length, .y = q[i].bleu};
    }
    printf("\n%-46s%5s", "", "BLEU, by length");
    for (int i = 0; i < count; i++) {
        printf("\n%-46s", m[i].name);
        for (int l = 0; l < LENGTHS; l++) printf("%5.0f", q[i].bleu[l]);
    }
    printf("\n\n");
    snprintf(file[0], sizeof file[0], "%s_exact", name), snprintf(file[1], sizeof file[1], "%s_bleu", name);
    Axes axes = {.x = "English words", .y = "exact translations, %", .zero = true};
    draw_curves(file[0], "exact translations by length", &axes, exact, count);
    axes.y = "BLEU";
    draw_curves(file[1], "BLEU by length", &axes, bleu, count);
}

static void claim_equal_sizes(const Model* m, int count) {
    size_t least = SIZE_MAX, most = 0;
    for (int i = 0; i < count; i++) {
        size_t total = parameter_total(m[i].t);
        least = total < least ? total : least, most = total > most ? total : most;
    }
    claim((double)most < 1.06 * (double)least, "all have about as many parameters: %zu to %zu", least, most);
}

// A test sentence in which these French words occur.
static const Sentence* sentence_with(const char* const* words, int count, int l) {
    for (int k = 0; k < TEST; k++) {
        int found = 0;
        for (int w = 0; w < count; w++)
            for (int i = 0; i < test_set[l][k].m; i++)
                if (!strcmp(french.word[test_set[l][k].fr[i]], words[w])) {
                    found++;
                    break;
                }
        if (found == count) return &test_set[l][k];
    }
    return &test_set[l][0];
}

// The weights with which m reads s, or, without m, the known alignment; French words are rows.
static void draw_alignment(const char* file, const char* title, Model* m, const Sentence* s) {
    static float weights[ROOM * ROOM];
    const char *rows[ROOM], *cols[ROOM];
    for (int i = 0; i < s->m; i++) rows[i] = french.word[s->fr[i]];
    for (int j = 0; j < s->n; j++) cols[j] = english.word[s->en[j]];
    if (m) alignment_of(m, s, weights);
    for (int i = 0; i < s->m && !m; i++)
        for (int j = 0; j < s->n; j++)
            weights[i * s->n + j] = (float)(s->from[i] >> j & 1) / (float)__builtin_popcountll(s->from[i]);
    draw_heat(file, title, weights, s->m, s->n, rows, cols);
    putchar('\n');
}

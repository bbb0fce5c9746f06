// 01_lookup.c: attention is a dictionary lookup that has been made soft, so that it can be learned.
//
// A dictionary compares the question with each key and returns the value of the one that is equal. Attention compares,
// too, but every key gets a score; softmax turns the scores into weights, which are positive and add up to 1, and
// the answer is the average of all values with these weights. (Graves et al. 2014, "Neural Turing Machines", section
// 3.3.1; Bahdanau et al. 2015, equations 5 and 6.)
//
// What to look at:
//   1. a lookup at several temperatures: from the average of all values to the value of the best key
//   2. the worked example of many introductions, with the digits that they do not print
//   3. an alignment that is not diagonal: the queries that ask for it are found by gradient descent

#include "attention.h"
#include "draw.h"
#include "tape.h"

// In nats: 0 when one weight is 1, log n when all are equal.
static float entropy(const float* weights, int n) {
    float sum = 0;
    for (int j = 0; j < n; j++) sum -= weights[j] > 0 ? weights[j] * logf(weights[j]) : 0;
    return sum;
}

static int argmax(const float* x, int n) {
    int best = 0;
    for (int j = 1; j < n; j++)
        if (x[j] > x[best]) best = j;
    return best;
}

// ---- 1. A small dictionary, at several temperatures ----------------------------------------------------------------
//
// Words are described by four numbers: is it an animal, does it fly, is it big, does it swim. The value to each is its
// number of legs. The question is for something that swims, and is an animal: two keys fit equally well, "duck" and
// "otter". Dividing the scores by a temperature t makes the difference between them larger (t < 1) or smaller.
static void temperatures(void) {
    enum { N = 5, D = 4, T = 6 };
    static const char* const words[N] = {"duck", "otter", "eagle", "horse", "boat"};
    static const float keys[N * D] = {1, 1, 0, 2, 1, 0, 0, 2, 1, 2, 1, 0, 1, 0, 2, 0, 0, 0, 2, 1}; // (N,D)
    static const float legs[N] = {2, 4, 2, 4, 0};                                                  // (N,1)
    static const float question[D] = {1, 0, 0, 1}, temperature[T] = {100, 10, 1, 0.5f, 0.1f, 0.001f};
    static const char* const labels[T] = {"t=100", "t=10", "t=1", "t=0.5", "t=0.1", "t=0.001"};
    float weights[T * N], out[T], q[D];
    Sizes sizes = {.m = 1, .n = N, .dq = D, .dk = D, .dv = 1};
    bool falls = true;
    for (int i = 0; i < T; i++) {
        for (int c = 0; c < D; c++) q[c] = question[c] / temperature[i];
        attention_forward(out + i, weights + i * N, NULL, sizes, q, keys, legs, (Score){.kind = DOT}, no_mask);
        falls = falls && (i == 0 || entropy(weights + i * N, N) <= entropy(weights + (i - 1) * N, N));
    }
    printf("\n1. Which animal swims, and how many legs has it?\n\n");
    draw_heat("01_temperature", "weights: one question at six temperatures", weights, T, N, labels, words);
    printf("\n%8s  entropy of the weights  legs\n", "");
    for (int i = 0; i < T; i++) printf("%8s  %22.4f  %.4f\n", labels[i], entropy(weights + i * N, N), out[i]);
    const float *hot = weights, *cold = weights + (T - 1) * N;
    claim(fabsf(out[0] - 12.0f / N) < 0.02f, "hot, every key counts: %.3f legs, and the mean of all is %.3f", out[0],
          12.0f / N);
    claim(falls && entropy(hot, N) > 0.999f * logf(N), "the colder, the fewer keys count: entropy falls from log %d",
          N);
    claim(cold[0] == 0.5f && cold[1] == 0.5f,
          "even the coldest softmax does not choose between equals: it shares, %.1f and %.1f", cold[0], cold[1]);
}

// ---- 2. The worked example ------------------------------------------------------------------------------------------
//
// The decoder is in state [10, 5, 10]; four encoder states are keys and values at once. The example is printed with
// scores 15, 60, 15, 35, weights 0, 1, 0, 0 and context [5, 0, 1]. None of these zeros is 0, but they are so near it
// that nothing can be learned from this example any more: the gradient at the scores has the size of the "zeros".
static void worked_example(void) {
    enum { N = 4, D = 3 };
    static const float state[D] = {10, 5, 10}, encoder[N * D] = {0, 1, 1, 5, 0, 1, 1, 1, 0, 0, 5, 1};
    static const float error[D] = {1, -1, 0}; // as if the loss fell along [-1 1 0]
    Sizes sizes = {.m = 1, .n = N, .dq = D, .dk = D, .dv = D};
    float context[2][D], weights[2][N], dscores[2][N], scores[N], dq[D], dk[N * D], dv[N * D];
    for (int scaled = 0; scaled < 2; scaled++) {
        Score score = {.kind = scaled ? SCALED_DOT : DOT};
        zero(dq, D), zero(dk, N * D), zero(dv, N * D);
        attention_forward(context[scaled], weights[scaled], NULL, sizes, state, encoder, encoder, score, no_mask);
        attention_backward(dq, dk, dv, (ScoreGradient){0}, dscores[scaled], NULL, error, weights[scaled], sizes, state,
                           encoder, encoder, score);
    }
    score_forward(scores, NULL, sizes, state, encoder, (Score){.kind = DOT});
    printf("\n2. The worked example: state [10 5 10]\n\n");
    printf("                            dot                       scaled by 1/sqrt(3)\n");
    printf("encoder    score   weight     gradient of score    score   weight     gradient\n");
    for (int j = 0; j < N; j++)
        printf("[%.0f %.0f %.0f]  %6.1f   %-9.3g  %-17.2g  %6.1f   %-9.3g  %-.2g\n", encoder[j * D], encoder[j * D + 1],
               encoder[j * D + 2], scores[j], weights[0][j], dscores[0][j], scores[j] / sqrtf(D), weights[1][j],
               dscores[1][j]);
    for (int scaled = 0; scaled < 2; scaled++)
        printf("context, %-7s [%.8g %.3g %.8g]\n", scaled ? "scaled:" : "dot:", context[scaled][0], context[scaled][1],
               context[scaled][2]);
    claim(scores[0] == 15 && scores[1] == 60 && scores[2] == 15 && scores[3] == 35, "the scores are 15, 60, 15, 35");
    claim(fabsf(context[0][0] - 5) < 1e-6f && context[0][1] < 1e-6f && fabsf(context[0][2] - 1) < 1e-6f,
          "the context is [5 0 1], as printed");
    claim(weights[0][0] > 2.8e-20f && weights[0][0] < 2.9e-20f, "what is printed as weight 0 is e^(15-60) = %.3g",
          weights[0][0]);
    claim(fabsf(dscores[0][3]) < 1e-9f && fabsf(dscores[1][3]) > 1e4f * fabsf(dscores[0][3]),
          "scaling by 1/sqrt(3) alone makes the gradient of score 35 %.0f times larger",
          fabsf(dscores[1][3] / dscores[0][3]));
}

// ---- 3. An alignment that is not diagonal ---------------------------------------------------------------------------
//
// "I love you" is "je t'aime": "you" comes last, and "t'" before "aime". A much-copied table lets "je" give 94 % of its
// attention to "I", "t'" 88 % to "you" and "aime" 95 % to "love" (the remainders are chosen here). Is there a query for
// each French word that asks for just that? The keys are random. With the identity as values, out is the matrix of
// weights itself, and attention_backward leads from a loss on the weights, -sum target log weights, to the queries.
static void alignment(void) {
    enum { M = 3, N = 3, D = 8 };
    static const char *const french[M] = {"je", "t'", "aime"}, *const english[N] = {"I", "love", "you"};
    static const float target[M * N] = {.94f, .02f, .04f, .11f, .01f, .88f, .03f, .95f, .02f};
    static const float identity[N * N] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    Sizes sizes = {.m = M, .n = N, .dq = D, .dk = D, .dv = N};
    Score score = {.kind = SCALED_DOT};
    float q[M * D] = {0}, k[N * D], dq[M * D], dk[N * D], dv[N * N], out[M * N], dout[M * N], weights[M * N],
                dscores[M * N];
    uint64_t seed = 1;
    for (int i = 0; i < N * D; i++) k[i] = normal(&seed);
    float worst = 1;
    int step = 0;
    for (; step < 5000 && worst > 5e-4f; step++) {
        attention_forward(out, weights, NULL, sizes, q, k, identity, score, no_mask);
        worst = 0;
        for (int i = 0; i < M * N; i++) {
            worst = fmaxf(worst, fabsf(out[i] - target[i]));
            dout[i] = -target[i] / out[i];
        }
        zero(dq, M * D), zero(dk, N * D), zero(dv, N * N);
        attention_backward(dq, dk, dv, (ScoreGradient){0}, dscores, NULL, dout, weights, sizes, q, k, identity, score);
        add_scaled(q, -1, dq, M * D);
    }
    printf("\n3. Queries that ask for a given alignment, after %d steps of gradient descent\n\n", step);
    draw_heat("01_alignment", "weights: \"I love you\" to \"je t'aime\"", out, M, N, french, english);
    int first = argmax(out, N), second = argmax(out + N, N), third = argmax(out + 2 * N, N);
    claim(worst < 1e-3f, "each weight is found to within %.4f", worst);
    claim(first == 0 && second == 2 && third == 1, "the words are read in the order %s, %s, %s: not the diagonal",
          english[first], english[second], english[third]);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    temperatures();
    worked_example();
    alignment();
    return lesson_ends();
}

// Three changes to try:
//   - In temperatures(), give the otter's key 2.001 for "swims" in place of 2. At t = 0.1 hardly anything changes; at
//     t = 0.001 otter takes three quarters of the weight, and at t = 1e-4 all of it: how hard a softmax is depends on
//     the differences of its scores.
//   - In worked_example(), halve the state to [5, 2.5, 5]. The weights of the other keys become the square roots of
//     what they were, and the gradients follow: how long a query is sets how hard it looks.
//   - In alignment(), set D to 2. Three keys in a plane suffice, if they are not on a line, but these nearly are: even
//     a million steps only come to within 0.002. Set D to 1, and no number of steps does: of three keys on a line, no
//     query likes the one in the middle best.

// 04_properties.c: what attention does not see, and where its output can lie.
//
// Attention is an average over a set. From this follows, before anything is learned (Lee et al. 2019, "Set
// Transformer", property 1; for the mask: Vaswani et al. 2017, section 3.2.3):
//   - queries in another order give the same outputs in that order (equivariance)
//   - pairs of key and value in another order give the same outputs (invariance)
//   - so self-attention gives a permuted sequence's outputs permuted: it does not know about order at all
//   - under a causal mask all three are lost, and one thing is won: output i does not depend on what follows i
//   - an output lies in the convex hull of the values
// A single head or several with W^O, it is the same; but for the last, which holds for one head only.
//
// What to look at: which of the differences in the table are 0, to the bit, and which are only rounding; the two
// pictures of outputs, inside the hull and outside it; and which column tells why weights are uniform.

#include "attention.h"
#include "draw.h"
#include "tape.h"

enum { N = 24, C = 32, HEADS_MAX = 4 };

// ---- 1. Order -------------------------------------------------------------------------------------------------------

typedef struct {
    int heads;
    bool causal;
    float W_q[C * C], W_k[C * C], W_v[C * C], W_o[C * C];
} Layer;

static Layer new_layer(int heads, bool masked, uint64_t seed) {
    Layer l = {.heads = heads, .causal = masked};
    for (int i = 0; i < C * C; i++) {
        l.W_q[i] = normal(&seed) / sqrtf(C) * 2, l.W_k[i] = normal(&seed) / sqrtf(C);
        l.W_v[i] = normal(&seed) / sqrtf(C), l.W_o[i] = normal(&seed) / sqrtf(C);
    }
    return l;
}

// out (N,C) from queries x (N,C) and from keys and values y (N,C)
static void attend(float* out, const Layer* l, const float* x, const float* y) {
    static float weights[HEADS_MAX * N * N], kept[4 * N * C];
    HeadSizes size = {.in = {N, N, C, C, C}, .heads = l->heads, .D = C / l->heads, .dout = C};
    Projections w = {l->W_q, l->W_k, l->W_v, l->W_o};
    multi_head_forward(out, weights, kept, size, x, y, y, w, NULL, l->causal ? (Mask){causal, NULL} : no_mask);
}

// y_i = x_order(i)
static void permute(float* y, const float* x, const int* order) {
    for (int i = 0; i < N; i++) memcpy(y + i * C, x + order[i] * C, sizeof(float) * C);
}

// The largest difference between rows 0 to `rows` - 1, relative to the largest number in them.
static float difference(const float* x, const float* y, int rows) {
    float most = 0, size = 0;
    for (int i = 0; i < rows * C; i++) most = fmaxf(most, fabsf(x[i] - y[i])), size = fmaxf(size, fabsf(x[i]));
    return most / size;
}

enum { QUERIES, PAIRS, SEQUENCE, FUTURE, PROPERTIES };

static void measure(float result[PROPERTIES], const Layer* l) {
    float x[N * C], y[N * C], out[N * C], expected[N * C], changed[N * C], got[N * C];
    int order[N];
    uint64_t seed = 2;
    for (int i = 0; i < N * C; i++) x[i] = normal(&seed), y[i] = normal(&seed);
    for (int i = 0; i < N; i++) order[i] = i;
    for (int i = N - 1; i > 0; i--) { // Fisher and Yates
        int other = random_below(&seed, i + 1), keep = order[i];
        order[i] = order[other], order[other] = keep;
    }
    attend(out, l, x, y);
    permute(expected, out, order);
    permute(changed, x, order);
    attend(got, l, changed, y);
    result[QUERIES] = difference(expected, got, N);

    permute(changed, y, order);
    attend(got, l, x, changed);
    result[PAIRS] = difference(out, got, N);

    attend(out, l, x, x);
    permute(expected, out, order);
    permute(changed, x, order);
    attend(got, l, changed, changed);
    result[SEQUENCE] = difference(expected, got, N);

    result[FUTURE] = 0;
    for (int i = 0; i + 1 < N; i++) { // everything after row i becomes something else, and a thousand times larger
        memcpy(changed, x, sizeof x);
        for (int c = (i + 1) * C; c < N * C; c++) changed[c] = 1000 * normal(&seed);
        attend(got, l, changed, changed);
        result[FUTURE] = fmaxf(result[FUTURE], difference(out, got, i + 1));
    }
}

static void order(void) {
    static const char* const names[PROPERTIES] = {
        "queries permuted: outputs permuted", "pairs permuted: outputs the same", "sequence permuted: outputs permuted",
        "later rows changed: row the same"};
    float r[2][2][PROPERTIES]; // one head, several; no mask, causal
    for (int several = 0; several < 2; several++)
        for (int masked = 0; masked < 2; masked++) {
            Layer l = new_layer(several ? HEADS_MAX : 1, masked, 1);
            measure(r[several][masked], &l);
        }
    printf("\n1. Largest difference from what the line says, relative to the largest output\n\n");
    printf("%38s   %-17s  %d heads, W^O\n", "", "one head, W^O", HEADS_MAX);
    printf("%38s   no mask   causal    no mask   causal\n", "");
    for (int p = 0; p < PROPERTIES; p++)
        printf("%-38s   %-8.2g  %-8.2g  %-8.2g  %-8.2g\n", names[p], r[0][0][p], r[0][1][p], r[1][0][p], r[1][1][p]);
    putchar('\n');
    for (int several = 0; several < 2; several++) {
        const char* heads = several ? "several heads" : "one head";
        const float *free_ = r[several][0], *masked = r[several][1];
        claim(free_[QUERIES] == 0, "%s: permuted queries give permuted outputs, bit for bit", heads);
        claim(free_[PAIRS] < 2e-6f && free_[SEQUENCE] < 2e-6f,
              "%s: the order of the pairs makes no difference but rounding", heads);
        claim(masked[QUERIES] > 0.1f && masked[PAIRS] > 0.1f && masked[SEQUENCE] > 0.1f,
              "%s: under the causal mask, order matters in all three", heads);
        claim(masked[FUTURE] == 0 && free_[FUTURE] > 0.1f,
              "%s: under the causal mask, and only there, later rows do not matter, bit for bit", heads);
    }
}

// ---- 2. The convex hull ---------------------------------------------------------------------------------------------

enum { POINTS = 9, OUTPUTS = 600 };
typedef struct {
    float x, y;
} Point;

// Twice the area of the triangle a b c, positive if it turns left.
static float area(Point a, Point b, Point c) { return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x); }

// The corners of the convex hull, to the left around it: from each corner, the next is the one that has all others to
// its left (gift wrapping, Jarvis 1973). Returns how many there are.
static int hull_of(Point* corner, const Point* p, int n) {
    int first = 0, count = 0, at, next;
    for (int j = 1; j < n; j++)
        if (p[j].x < p[first].x) first = j;
    at = first;
    do {
        corner[count++] = p[at];
        next = at == 0 ? 1 : 0;
        for (int j = 0; j < n; j++)
            if (j != at && area(p[at], p[next], p[j]) < 0) next = j;
        at = next;
    } while (at != first && count < n);
    return count;
}

// Solves o = w0 a + w1 b + w2 c with w0 + w1 + w2 = 1 for one of the triangles a b c into which the hull is cut from
// its first corner. Returns the smallest weight: not negative if o is in that triangle, and the largest over all
// triangles tells whether o is in the hull. *error: the distance between o and the sum with these weights.
static float solve(Point o, const Point* corner, int corners, float* error) {
    float best = -INFINITY;
    for (int t = 1; t + 1 < corners; t++) {
        Point a = corner[0], b = corner[t], c = corner[t + 1];
        float all = area(a, b, c), w0 = area(o, b, c) / all, w1 = area(a, o, c) / all, w2 = area(a, b, o) / all;
        float least = fminf(w0, fminf(w1, w2));
        if (least <= best) continue;
        best = least;
        *error = hypotf(w0 * a.x + w1 * b.x + w2 * c.x - o.x, w0 * a.y + w1 * b.y + w2 * c.y - o.y);
    }
    return best;
}

// Every head turns the values by an angle of its own (its W^V, a rotation; W^O adds the heads and divides by their
// number), so that token j has u_j = mean over h of v_j W^V_h to offer. One head gives averages of the u_j. Two heads
// may take their parts from different tokens, and leave the hull. Returns the share of outputs outside it.
static float hull(int heads, const char* name, const char* title, float* worst_error) {
    float W_q[8], W_k[8], W_v[8], W_o[8], k[POINTS * 2], v[POINTS * 2], q[OUTPUTS * 2],
        kept[4 * (OUTPUTS + POINTS) * 2];
    static float weights[2 * OUTPUTS * POINTS];
    Point out[OUTPUTS], u[POINTS] = {{0, 0}}, corner[POINTS + 1];
    uint64_t seed = 5;
    for (int i = 0; i < 8; i++) {
        float turn = i < 4 ? 0 : 2.5f; // of a head's block of four numbers: cos, sin, -sin, cos
        W_q[i] = normal(&seed), W_k[i] = normal(&seed);
        W_v[i] = i % 4 == 0 || i % 4 == 3 ? cosf(turn) : i % 4 == 1 ? sinf(turn) : -sinf(turn);
        W_o[i] = i % 4 == 0 || i % 4 == 3 ? 1 / (float)heads : 0;
    }
    for (int i = 0; i < POINTS * 2; i++) v[i] = normal(&seed);
    for (int j = 0; j < POINTS; j++) k[2 * j] = cosf((float)j), k[2 * j + 1] = sinf((float)j);
    for (int i = 0; i < OUTPUTS; i++) {
        float size = 8 * uniform(&seed); // a long query chooses, a short one averages
        q[2 * i] = size * normal(&seed), q[2 * i + 1] = size * normal(&seed);
    }
    HeadSizes size = {.in = {OUTPUTS, POINTS, 2, 2, 2}, .heads = heads, .D = 2, .dout = 2};
    multi_head_forward(&out[0].x, weights, kept, size, q, k, v, (Projections){W_q, W_k, W_v, W_o}, NULL, no_mask);
    for (int h = 0; h < heads; h++) add_ab(&u[0].x, v, W_v + h * 4, POINTS, 2, 2);
    for (int j = 0; j < POINTS; j++) u[j].x /= (float)heads, u[j].y /= (float)heads;
    int corners = hull_of(corner, u, POINTS), outside = 0;
    *worst_error = 0;
    float edge_x[POINTS + 1], edge_y[POINTS + 1], x[2][OUTPUTS], y[2][OUTPUTS]; // dots inside, outside
    int dots[2] = {0, 0};
    for (int i = 0; i < OUTPUTS; i++) {
        float error = 0;
        bool is_outside = solve(out[i], corner, corners, &error) < -1e-5f;
        outside += is_outside;
        *worst_error = fmaxf(*worst_error, error);
        x[is_outside][dots[is_outside]] = out[i].x, y[is_outside][dots[is_outside]++] = out[i].y;
    }
    for (int i = 0; i <= corners; i++) edge_x[i] = corner[i % corners].x, edge_y[i] = corner[i % corners].y;
    Series series[3] = {{"outputs inside", dots[0], x[0], y[0], true},
                        {"outputs outside", dots[1], x[1], y[1], true},
                        {"hull of the values", corners + 1, edge_x, edge_y, false}};
    putchar('\n');
    draw_curves(name, title, &(Axes){.x = "first number", .y = "second"}, series, 3);
    return (float)outside / OUTPUTS;
}

// ---- 3. What mixes places, and what does not ------------------------------------------------------------------------

// A linear layer "distributed over time" is one matrix for every row.
static void row_by_row(void) {
    float x[N * C], all[N * C] = {0}, one_by_one[N * C] = {0};
    Layer l = new_layer(1, false, 1);
    uint64_t seed = 7;
    for (int i = 0; i < N * C; i++) x[i] = normal(&seed);
    add_ab(all, x, l.W_o, N, C, C);
    for (int i = 0; i < N; i++) add_ab(one_by_one + i * C, x + i * C, l.W_o, 1, C, C);
    putchar('\n');
    claim(!memcmp(all, one_by_one, sizeof all), "a linear layer of all rows at once is that of each row, bit for bit");
}

// Mean entropy of the weights of N queries over N keys, and the spread of a query's scores: their deviation, mean over
// the queries. Queries and keys are normal, times their sizes; the keys share a part that is `common` times as large.
static void spread(float* entropy, float* deviation, float query_size, float key_size, float common) {
    float q[N * C], k[N * C], shared[C], scores[N * N], weights[N * N];
    uint64_t seed = 9;
    for (int c = 0; c < C; c++) shared[c] = common * normal(&seed);
    for (int i = 0; i < N * C; i++) q[i] = query_size * normal(&seed), k[i] = key_size * normal(&seed) + shared[i % C];
    score_forward(scores, NULL, (Sizes){N, N, C, C, C}, q, k, (Score){.kind = SCALED_DOT});
    softmax_forward(weights, scores, N, N, no_mask);
    *entropy = *deviation = 0;
    for (int i = 0; i < N; i++) {
        float mean = 0, squares = 0;
        for (int j = 0; j < N; j++) mean += scores[i * N + j] / N;
        for (int j = 0; j < N; j++) {
            float w = weights[i * N + j], off = scores[i * N + j] - mean;
            squares += off * off / N, *entropy -= w > 0 ? w * logf(w) / N : 0;
        }
        *deviation += sqrtf(squares) / N;
    }
}

static void uniform_weights(void) {
    static const struct {
        const char* name;
        float q, k, common;
    } cases[] = {{"normal queries and keys", 1, 1, 0},
                 {"queries a thousandth as long", 0.001f, 1, 0},
                 {"keys that are equal", 1, 0, 1},
                 {"keys alike but for a thousandth", 1, 0.001f, 1}};
    enum { CASES = sizeof cases / sizeof *cases };
    float entropy[CASES], deviation[CASES];
    printf("\n3. Why are weights uniform? Scores of %d keys; log %d = %.4f\n\n", N, N, log(N));
    printf("%-34s   entropy   deviation of a query's scores\n", "");
    for (int c = 0; c < CASES; c++) {
        spread(&entropy[c], &deviation[c], cases[c].q, cases[c].k, cases[c].common);
        printf("%-34s   %.4f    %.2g\n", cases[c].name, entropy[c], deviation[c]);
    }
    putchar('\n');
    bool even = true;
    for (int c = 1; c < CASES; c++) even = even && fabsf(entropy[c] - logf(N)) < 1e-4f && deviation[c] < 0.01f;
    claim(even && entropy[0] < 0.95f * logf(N) && deviation[0] > 0.5f,
          "weights are uniform where a query's scores do not spread: for short queries, and for keys that are alike");
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    order();
    printf("\n2. %d outputs over %d values in the plane\n", OUTPUTS, POINTS);
    float error1, error2;
    float outside1 = hull(1, "04_hull", "One head: inside the hull of the values", &error1);
    float outside2 = hull(2, "04_hull_heads", "Two heads: not inside", &error2);
    claim(
        outside1 == 0 && error1 < 1e-5f,
        "one head: every output is inside, and an average of at most three of the values: weights were solved for that "
        "give it to %.0e. So the weights cannot be read off an output",
        (double)error1);
    claim(outside2 > 0.1f, "two heads: %.0f %% of the outputs lie outside the hull of what the tokens offer",
          100 * outside2);
    row_by_row();
    uniform_weights();
    return lesson_ends();
}

// Three changes to try:
//   - In measure(), permute the mask along: write `bool sees(const void* order, int i, int j)`, which lets query i see
//     key j where order[j] <= order[i]. The sequence's permutation is then harmless under this mask, too: a mask is one
//     more input, and order is what it adds.
//   - In attend(), add to every row i of x and y a vector that only depends on i. All permutations now matter, mask or
//     not: this is what position encodings are for.
//   - In hull(), make `turn` 0 for both heads. No output is outside any more: the heads average the same points, and
//     the mean of two points of a convex set is in it. What leads out of the hull is that heads do different things to
//     values.

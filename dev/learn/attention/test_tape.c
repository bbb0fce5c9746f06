// test_tape.c: is every derivative on the tape right?
//
// Each operation's gradient is compared with finite differences, at sizes that are no multiple of anything. The GRU,
// the LSTM, layer normalisation, cross-entropy and AdamW are compared with PyTorch's, from a fixture that
// dev/check/tape_reference.py writes. Ends with "N passed, N failed", and with status 1 if any failed.

#include <omp.h>

#include "check.h"
#include "recurrent.h"

// ---- finite differences --------------------------------------------------------------------------------------------

// f of `count` parameters with the given rows and columns; error: what the differences' rounding may come to.
static void test_gradient(const char* name, Function* f, int count, const int (*shape)[2], double error) {
    Tape* t = tape_new(7);
    for (int i = 0; i < count; i++) parameter(t, shape[i][0], shape[i][1], 0.7f);
    Node* y = f(t->parameters);
    Node* sum = record(t, 1, 1, weighted_sum_backward, 1, &y, 0);
    for (int twice = 0; twice < 2; twice++) backward(sum); // a parameter's gradients add up until the update
    double worst = 0;
    for (int i = 0; i < count; i++) {
        Node* p = t->parameters[i];
        float* quotient = (float*)malloc(sizeof(float) * size(p));
        for (size_t k = 0; k < size(p); k++) quotient[k] = 2 * slope(f, t, &p->value[k]);
        double off = distance(p->grad, quotient, size(p));
        worst = off <= worst ? worst : off; // NaN stays
        free(quotient);
    }
    expect(worst < error, name, worst);
    expect_gradients_inside(t, name);
    tape_free(t);
}

static const int targets[7] = {2, 0, -1, 4, 4, 1, 3};
static const int indices[6] = {4, 0, 2, 2, 4, 4};

static Node* f_matmul(Node** p) { return matmul(p[0], p[1]); }
static Node* f_add(Node** p) { return add(p[0], p[1]); }
static Node* f_multiply(Node** p) { return multiply(p[0], p[1]); }
static Node* f_subtract(Node** p) { return subtract(p[0], p[1]); }
static Node* f_scale(Node** p) { return scale(p[0], -1.7f); }
static Node* f_tanh(Node** p) { return tanh_of(p[0]); }
static Node* f_logistic(Node** p) { return logistic_of(p[0]); }
// relu has no derivative at 0: every second number is moved up, the others down, far enough from it.
static Node* f_relu(Node** p) {
    Node* away = constant(p[0]->tape, p[0]->rows, p[0]->cols, NULL);
    for (size_t i = 0; i < size(away); i++) away->value[i] = i % 2 ? 4.0f : -4.0f;
    return relu_of(add(p[0], away));
}
static Node* f_softmax(Node** p) { return softmax_rows(p[0]); }
static Node* f_layernorm(Node** p) { return layernorm_rows(p[0], p[1], p[2]); }
static Node* f_concat_columns(Node** p) { return concat_columns(3, p); }
static Node* f_concat_rows(Node** p) { return concat_rows(3, p); }
static Node* f_slice_columns(Node** p) { return slice_columns(p[0], 2, 3); }
static Node* f_slice_rows(Node** p) { return slice_rows(p[0], 2, 3); }
static Node* f_gather_rows(Node** p) { return gather_rows(p[0], 6, indices); }
static Node* f_transpose(Node** p) { return transpose(p[0]); }
static Node* f_mean(Node** p) { return mean_of(p[0]); }
static Node* f_cross_entropy(Node** p) { return cross_entropy(p[0], targets); }
static Node* f_shared(Node** p) { return multiply(matmul(p[0], p[0]), add(p[0], tanh_of(p[0]))); } // used four times

// Two steps from the same input, and what both of them say: every gradient has two parts.
static Node* f_gru(Node** p) { // xW, h, U, c
    Gru g = {.n = p[1]->cols, .U = p[2], .c = p[3]};
    Node *h = gru_step(&g, p[0], p[1]), *again = gru_step(&g, p[0], h);
    return concat_columns(2, (Node*[]){h, again});
}
static Node* f_lstm(Node** p) { // xW, h, c, U
    Lstm l = {.n = p[1]->cols, .U = p[3]};
    Node* said[4] = {p[1], p[2]};
    lstm_step(&l, p[0], &said[0], &said[1]);
    said[2] = said[0], said[3] = said[1];
    lstm_step(&l, p[0], &said[2], &said[3]);
    return concat_columns(4, said);
}

static void test_gradients(void) {
    static const struct {
        const char* name;
        Function* f;
        int count, shape[4][2];
    } cases[] = {
        {"matmul 1x1x1", f_matmul, 2, {{1, 1}, {1, 1}}},
        {"matmul 5x7x3", f_matmul, 2, {{5, 7}, {7, 3}}},
        {"matmul 1x3x35", f_matmul, 2, {{1, 3}, {3, 35}}},
        {"matmul 67x2x33", f_matmul, 2, {{67, 2}, {2, 33}}},
        {"matmul 2x131x2", f_matmul, 2, {{2, 131}, {131, 2}}},
        {"add", f_add, 2, {{3, 5}, {3, 5}}},
        {"add a row", f_add, 2, {{3, 5}, {1, 5}}},
        {"add a column", f_add, 2, {{3, 5}, {3, 1}}},
        {"add a number", f_add, 2, {{3, 5}, {1, 1}}},
        {"multiply", f_multiply, 2, {{3, 17}, {3, 17}}},
        {"multiply by a row", f_multiply, 2, {{3, 5}, {1, 5}}},
        {"multiply by a column", f_multiply, 2, {{3, 5}, {3, 1}}},
        {"multiply by a number", f_multiply, 2, {{3, 5}, {1, 1}}},
        {"multiply two columns", f_multiply, 2, {{3, 1}, {3, 1}}},
        {"subtract a row", f_subtract, 2, {{3, 5}, {1, 5}}},
        {"scale", f_scale, 1, {{3, 5}}},
        {"tanh", f_tanh, 1, {{3, 19}}},
        {"logistic", f_logistic, 1, {{3, 19}}},
        {"relu", f_relu, 1, {{3, 19}}},
        {"softmax", f_softmax, 1, {{3, 7}}},
        {"softmax of one", f_softmax, 1, {{3, 1}}},
        {"layernorm", f_layernorm, 3, {{4, 9}, {1, 9}, {1, 9}}},
        {"concat_columns", f_concat_columns, 3, {{3, 2}, {3, 1}, {3, 5}}},
        {"concat_rows", f_concat_rows, 3, {{2, 3}, {1, 3}, {5, 3}}},
        {"slice_columns", f_slice_columns, 1, {{3, 7}}},
        {"slice_rows", f_slice_rows, 1, {{7, 3}}},
        {"gather_rows", f_gather_rows, 1, {{5, 3}}},
        {"transpose", f_transpose, 1, {{3, 7}}},
        {"mean", f_mean, 1, {{3, 7}}},
        {"cross_entropy", f_cross_entropy, 1, {{7, 5}}},
        {"one node, four times", f_shared, 1, {{5, 5}}},
        {"GRU of 1", f_gru, 4, {{1, 3}, {1, 1}, {1, 3}, {1, 3}}},
        {"GRU of 19", f_gru, 4, {{3, 57}, {3, 19}, {19, 57}, {1, 57}}},
        {"LSTM of 1", f_lstm, 4, {{1, 4}, {1, 1}, {1, 1}, {1, 4}}},
        {"LSTM of 19", f_lstm, 4, {{3, 76}, {3, 19}, {3, 19}, {19, 76}}},
        // All of them fill whole lines of cache, so that what lies behind is the node's next array.
        {"add, whole lines", f_add, 2, {{3, 16}, {3, 16}}},
        {"multiply, whole lines", f_multiply, 2, {{3, 16}, {3, 16}}},
        {"scale, whole lines", f_scale, 1, {{3, 16}}},
        {"tanh, whole lines", f_tanh, 1, {{3, 16}}},
        {"logistic, whole lines", f_logistic, 1, {{3, 16}}},
        {"relu, whole lines", f_relu, 1, {{3, 16}}},
        {"softmax, whole lines", f_softmax, 1, {{3, 16}}},
        {"layernorm, whole lines", f_layernorm, 3, {{4, 16}, {1, 16}, {1, 16}}},
        {"concat_columns, whole lines", f_concat_columns, 3, {{16, 2}, {16, 1}, {16, 5}}},
        {"concat_rows, whole lines", f_concat_rows, 3, {{2, 16}, {1, 16}, {5, 16}}},
        {"slice_columns, whole lines", f_slice_columns, 1, {{16, 7}}},
        {"slice_rows, whole lines", f_slice_rows, 1, {{7, 16}}},
        {"gather_rows, whole lines", f_gather_rows, 1, {{5, 16}}},
        {"transpose, whole lines", f_transpose, 1, {{16, 7}}},
        {"GRU, whole lines", f_gru, 4, {{3, 48}, {3, 16}, {16, 48}, {1, 48}}},
        {"LSTM, whole lines", f_lstm, 4, {{3, 64}, {3, 16}, {3, 16}, {16, 64}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        test_gradient(cases[i].name, cases[i].f, cases[i].count, cases[i].shape,
                      cases[i].f == f_gru || cases[i].f == f_lstm ? 3e-4 : 1e-4);
}

// ---- values and edges ----------------------------------------------------------------------------------------------

// multiply_add against three loops in double precision, for shapes around the tile's edges and all four transpositions.
static void test_product(void) {
    static const int sizes[] = {1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200};
    enum { S = sizeof sizes / sizeof *sizes, LARGEST = 200 };
    static float a[LARGEST * LARGEST], b[LARGEST * LARGEST], c[LARGEST * LARGEST], truth[LARGEST * LARGEST];
    uint64_t seed = 5;
    for (int i = 0; i < LARGEST * LARGEST; i++) a[i] = normal(&seed), b[i] = normal(&seed);
    double worst = 0;
    for (int n = 0; n < S * S * S; n += 5) { // every fifth of the triples, each with one of the four
        int M = sizes[n % S], N = sizes[n / S % S], K = sizes[n / S / S];
        int ai = n & 1 ? 1 : K, ak = n & 1 ? M : 1, bk = n & 2 ? 1 : N, bj = n & 2 ? K : 1;
        for (int i = 0; i < M * N; i++) {
            double sum = c[i] = truth[i] = (float)(i % 7);
            for (int k = 0; k < K; k++) sum += (double)a[i / N * ai + k * ak] * (double)b[k * bk + i % N * bj];
            truth[i] = (float)sum;
        }
        multiply_add(c, a, b, M, N, K, ai, ak, bk, bj);
        double error = distance(c, truth, (size_t)(M * N));
        worst = error <= worst ? worst : error;
    }
    expect(worst < 1e-6, "multiply_add against three loops", worst);
}

// The same bits with any number of threads.
static void test_threads(void) {
    enum { N = 150 };
    static float a[N * N], b[N * N], c[2][N * N];
    uint64_t seed = 6;
    for (int i = 0; i < N * N; i++) a[i] = normal(&seed), b[i] = normal(&seed);
    bool same = true;
    int most = omp_get_max_threads();
    for (int threads = 1; threads <= 5; threads++) {
        float* to = c[threads > 1];
        omp_set_num_threads(threads);
        memset(to, 0, sizeof c[0]);
        multiply_add(to, a, b, N, N, N, N, 1, N, 1);
        same = same && !memcmp(to, c[0], sizeof c[0]);
    }
    omp_set_num_threads(most);
    expect(same, "multiply_add with 1 to 5 threads", 0);
}

static void test_edges(void) {
    double worst[3] = {0, 0, 0};
    for (double x = -87; x < 88; x += 0.00037) {
        double e[3] = {fabs((double)exp_quick((float)x) / exp((double)(float)x) - 1),
                       fabs((double)tanh_quick((float)x) - tanh((double)(float)x)),
                       fabs((double)logistic_quick((float)x) * (1 + exp(-(double)(float)x)) - 1)};
        for (int i = 0; i < 3; i++) worst[i] = e[i] <= worst[i] ? worst[i] : e[i];
    }
    expect(worst[0] < 1.2e-7, "exp_quick", worst[0]);
    expect(worst[1] < 2.4e-7, "tanh_quick", worst[1]);
    expect(worst[2] < 2.4e-7, "logistic_quick", worst[2]);
    expect(exp_quick(-1000) == 0 && tanh_quick(1000) == 1 && tanh_quick(-1000) == -1, "far out", 0);
    expect(isnan(exp_quick(NAN)) && isnan(tanh_quick(NAN)) && isnan(logistic_quick(NAN)), "NaN stays NaN", 0);

    Tape* t = tape_new(1);
    const float huge[6] = {1000, -1000, 0, 500, 500, 500};
    Node* x = constant(t, 2, 3, huge);
    Node* p = softmax_rows(x);
    expect(p->value[0] == 1 && p->value[1] == 0 && fabsf(p->value[4] - 1.0f / 3) < 1e-7f, "softmax of huge scores", 0);
    expect(fabsf(mean_of(x)->value[0] - 250) < 1e-3f, "mean", 0);
    Node* loss = cross_entropy(x, (const int[]){-1, -1});
    backward(loss);
    expect(loss->value[0] == 0 && x->grad[0] == 0 && x->grad[5] == 0, "cross_entropy where nothing counts", 0);
    tape_clear(t);
    int nodes = 0; // memory is used again: a thousand steps take no more than the first
    for (int i = 0; i < 1000; i++) {
        backward(tanh_of(constant(t, 300, 300, NULL)));
        nodes = t->count;
        tape_clear(t);
    }
    expect(nodes == 2 && !t->chunk[2], "tape_clear gives memory back", nodes);
    uint64_t seed = 3, again = 3;
    double sum = 0, squares = 0;
    bool same = true;
    for (int i = 0; i < 100000; i++) {
        float z = normal(&seed);
        same = same && z == normal(&again), sum += (double)z, squares += (double)z * (double)z;
    }
    expect(same && fabs(sum / 1e5) < 0.01 && fabs(squares / 1e5 - 1) < 0.02, "normal", squares / 1e5);
    tape_free(t);
}

// ---- PyTorch -------------------------------------------------------------------------------------------------------

static void expect_equal(const char* what, const char* name, const float* x, int rows, int cols) {
    expect_stored(what, name, x, rows, cols, 1e-6);
}

// x (T B,in) time-major, T = 5 steps, from h0 (B,n); the loss is the sum of all states times fixed numbers.
static void test_recurrent(bool lstm) {
    enum { STEPS = 5 };
    const char *what = lstm ? "LSTM" : "GRU", *prefix = lstm ? "lstm" : "gru";
    char name[10][32];
    static const char* const parts[] = {"x", "h0", "c0", "W", "U", "b", "c", "states", "weights"};
    for (int i = 0; i < 9; i++) snprintf(name[i], sizeof name[i], "%s.%s", prefix, parts[i]);
    Tape* t = tape_new(1);
    Node *x = parameter_from(t, name[0]), *h = parameter_from(t, name[1]), *c = NULL, *states[STEPS];
    Node *W = parameter_from(t, name[3]), *U = parameter_from(t, name[4]), *b = parameter_from(t, name[5]), *b2 = NULL;
    if (lstm)
        c = parameter_from(t, name[2]);
    else
        b2 = parameter_from(t, name[6]);
    int n = h->cols, B = h->rows;
    Gru g = {n, W, U, b, b2};
    Lstm l = {n, W, U, b};
    Node* xW = lstm ? lstm_input(&l, x) : gru_input(&g, x);
    for (int i = 0; i < STEPS; i++) {
        Node* input = slice_rows(xW, i * B, B);
        if (lstm)
            lstm_step(&l, input, &h, &c);
        else
            h = gru_step(&g, input, h);
        states[i] = h;
    }
    Node *all = concat_rows(STEPS, states), *weights = constant(t, all->rows, n, stored(name[8])->value);
    expect_equal(what, name[7], all->value, all->rows, n);
    backward(multiply(all, weights));
    for (int i = 0; i < 7; i++) {
        Node* p[] = {t->parameters[0], t->parameters[1], c ? t->parameters[5] : NULL, W, U, b, b2};
        char d[40];
        snprintf(d, sizeof d, "d.%s", name[i]);
        if (p[i]) expect_equal(what, d, p[i]->grad, p[i]->rows, p[i]->cols);
    }
    tape_free(t);
}

// A small network with layernorm and cross-entropy, and ten steps of AdamW with decay and clipping.
static void test_training(void) {
    read_fixture("tape");
    Tape* t = tape_new(1);
    Node *W1 = parameter_from(t, "net.W1"), *b1 = parameter_from(t, "net.b1"), *gain = parameter_from(t, "net.gain");
    Node *bias = parameter_from(t, "net.bias"), *W2 = parameter_from(t, "net.W2");
    const Stored *x = stored("net.x"), *wanted = stored("net.targets");
    int steps = stored("net.losses")->cols, target[64];
    float losses[64], lengths[64];
    for (int i = 0; i < wanted->cols; i++) target[i] = (int)wanted->value[i];
    for (int i = 0; i < steps; i++) {
        Node* h = relu_of(add(matmul(constant(t, x->rows, x->cols, x->value), W1), b1));
        Node* loss = cross_entropy(matmul(layernorm_rows(h, gain, bias), W2), target);
        losses[i] = loss->value[0];
        backward(loss);
        lengths[i] = adamw(t, 0.02f, 0.1f, 0.5f);
        tape_clear(t);
    }
    expect_equal("AdamW", "net.losses", losses, 1, steps);
    expect_equal("AdamW", "net.lengths", lengths, 1, steps);
    static const char* const after[] = {"after.W1", "after.b1", "after.gain", "after.bias", "after.W2"};
    for (int i = 0; i < 5; i++)
        expect_equal("AdamW", after[i], t->parameters[i]->value, t->parameters[i]->rows, t->parameters[i]->cols);
    tape_free(t);
}

static void test_cells(void) {
    read_fixture("tape");
    test_recurrent(false);
    test_recurrent(true);
}

static const Test tests[] = {{"gradients", test_gradients}, {"product", test_product}, {"threads", test_threads},
                             {"edges", test_edges},         {"cells", test_cells},     {"training", test_training}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

// test_dropout.c: is attention with dropout right?
//
// Without dropout it is attention_node's, and its gradients too. With it, the same draws give the same numbers again,
// so that gradients can be compared with finite differences, and with PyTorch's; and on average nothing changes. Ends with "N passed, N
// failed", and with status 1 if any failed.

#include "check.h"
#include "dropout.h"

enum { BATCH = 3, M = 4, N = 7, D = 5 };

static Tape* new_tape(void) {
    Tape* t = tape_new(2);
    for (int k = 0; k < 3; k++) parameter(t, BATCH * (k ? N : M), D, 1);
    return t;
}

static Node* run(Tape* t, float p, uint64_t draws, float** weights) {
    Node** x = t->parameters;
    return dropped_attention(x[0], x[1], x[2], BATCH, p, draws ? &draws : NULL, weights);
}

static void test_without(void) {
    Tape *t = new_tape(), *plain = new_tape();
    float by[BATCH * M * D], sums = 0, *weights;
    for (int i = 0; i < BATCH * M * D; i++) by[i] = normal(&t->seed);
    Node* y = run(t, 0.5f, 0, &weights);
    Node* truth = attention_node(plain->parameters[0], plain->parameters[1], plain->parameters[2], BATCH, (Heads){0});
    for (int i = 0; i < BATCH * M * N; i++) sums += weights[i];
    expect(fabsf(sums - BATCH * M) < 1e-5f, "weights sum to 1", (double)sums);
    expect(distance(y->value, truth->value, size(y)) < 1e-6, "nothing dropped: plain attention", 0);
    backward(multiply(y, constant(t, BATCH * M, D, by)));
    backward(multiply(truth, constant(plain, BATCH * M, D, by)));
    for (int k = 0; k < 3; k++) {
        double error = distance(t->parameters[k]->grad, plain->parameters[k]->grad, size(t->parameters[k]));
        expect(error < 1e-6, "nothing dropped: plain attention's gradient", error);
    }
    tape_free(t), tape_free(plain);
}

static void test_with(float p) {
    Tape* t = new_tape();
    float by[BATCH * M * D];
    for (int i = 0; i < BATCH * M * D; i++) by[i] = normal(&t->seed);
    backward(multiply(run(t, p, 11, NULL), constant(t, BATCH * M, D, by)));
    for (int k = 0; k < 3; k++) {
        Node* x = t->parameters[k];
        float slopes[BATCH * N * D];
        for (size_t i = 0; i < size(x); i++) {
            float at = x->value[i], step = 0.02f;
            double f[4] = {0};
            for (int s = 0; s < 4; s++) {
                x->value[i] = at + step * (float[]){-2, -1, 1, 2}[s];
                tape_clear(t);
                const Node* y = run(t, p, 11, NULL);
                for (int e = 0; e < BATCH * M * D; e++) f[s] += (double)by[e] * (double)y->value[e];
            }
            x->value[i] = at;
            slopes[i] = (float)((8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * (double)step));
        }
        double error = distance(x->grad, slopes, size(x));
        expect(error < 1e-4, k == 0 ? "dq" : k == 1 ? "dk" : "dv", error);
    }
    enum { DRAWS = 4000 };
    float mean[BATCH * M * D] = {0};
    for (uint64_t draw = 1; draw <= DRAWS; draw++, tape_clear(t))
        add_scaled(mean, 1.0f / DRAWS, run(t, p, draw * 7919, NULL)->value, BATCH * M * D);
    Node* y = run(t, 0, 0, NULL);
    double error = distance(mean, y->value, size(y));
    expect(error < 0.05, "the same on average", error);
    expect(distance(run(t, p, 5, NULL)->value, y->value, size(y)) > 0.1, "but not each time", 0);
    tape_free(t);
}

// PyTorch, which is given the weights that this seed drops.
static Node* f_drawn(Node** p) {
    uint64_t draws = 11;
    return dropped_attention(p[0], p[1], p[2], BATCH, 0.375f, &draws, NULL);
}
static void test_pytorch(void) {
    read_fixture("nodes");
    expect_function("dropout", f_drawn, 3, (const char* const[]){"q", "k", "v"}, 4e-6);
}

static void test_with_little(void) { test_with(0.3f); }
static void test_with_much(void) { test_with(0.7f); }

static const Test tests[] = {{"without", test_without},
                             {"with_little", test_with_little},
                             {"with_much", test_with_much},
                             {"pytorch", test_pytorch}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

// test_nodes.c: are the operations that lessons 08 and 12 put on the tape right? memory.h, glimpse.h.
//
// Gradients are compared with finite differences, at odd sizes; the memory's output with its definition in double
// precision; REINFORCE's mean over all places with the exact gradient; all of them with PyTorch's. Ends with "N passed, N failed", and with status
// 1 if any failed.

#include "check.h"
#include "glimpse.h"
#include "memory.h"

// The gradient at each parameter against four values around it, whose error is of order step^4; relative to its length,
// or to 0.2 where it is shorter.
static void test_gradient(const char* name, Function* f, int count, const int (*shape)[2]) {
    Tape* t = tape_new(7);
    for (int i = 0; i < count; i++) parameter(t, shape[i][0], shape[i][1], 0.7f);
    Node* y = f(t->parameters);
    backward(record(t, 1, 1, weighted_sum_backward, 1, &y, 0));
    tape_clear(t);
    for (int i = 0; i < count; i++) {
        Node* p = t->parameters[i];
        double difference = 0, length = 0;
        for (size_t k = 0; k < size(p); k++) {
            double by_trying = (double)slope(f, t, p->value + k), g = (double)p->grad[k];
            difference += (g - by_trying) * (g - by_trying), length += by_trying * by_trying;
        }
        char text[80];
        snprintf(text, sizeof text, "%s, parameter %d", name, i);
        double error = sqrt(difference) / fmax(sqrt(length), 0.2);
        expect(error < 3e-4, text, error);
    }
    tape_free(t);
}

// ---- memory.h --------------------------------------------------------------------------------------------------------

// p: query, v_a, key_0, value_0, key_1, value_1 ...
static Node* f_memory1(Node** p) { return read_memory(p[0], p[1], (Node*[]){p[2]}, (Node*[]){p[3]}, 1, NULL); }
static Node* f_memory3(Node** p) {
    return read_memory(p[0], p[1], (Node*[]){p[2], p[4], p[6]}, (Node*[]){p[3], p[5], p[7]}, 3, NULL);
}
// Of two states, again and again: more than the few pointers that fit where one would.
static Node* f_memory9(Node** p) {
    Node *key[9], *value[9];
    for (int i = 0; i < 9; i++) key[i] = p[2 + i % 2], value[i] = p[4 + i % 3 % 2];
    return read_memory(p[0], p[1], key, value, 9, NULL);
}
// One state remembered twice, and also the query's: gradients collect.
static Node* f_memory_shared(Node** p) {
    return read_memory(p[0], p[1], (Node*[]){p[0], p[2], p[2]}, (Node*[]){p[0], p[2], p[2]}, 3, NULL);
}

enum { STEPS = 4, IN = 3, STATE = 5, UNITS = 2 };
static const int lstmn_shape[8][2] = {{STEPS * 2, IN}, {IN, 4 * STATE}, {STATE, 4 * STATE}, {1, 4 * STATE},
                                      {STATE, UNITS},  {IN, UNITS},     {STATE, UNITS},     {1, UNITS}};
static Node* f_lstmn_as_is(Node** p) {
    Lstmn l = {{STATE, p[1], p[2], p[3]}, UNITS, p[4], p[5], p[6], p[7]};
    Node* states[STEPS];
    lstmn_read(&l, p[0], STEPS, states, NULL);
    return concat_rows(STEPS, states);
}
// The score's parameters are enlarged: else the weights are nearly equal, and the rounding of the rest hides their part.
static Node* f_lstmn(Node** p) {
    return f_lstmn_as_is(
        (Node*[]){p[0], p[1], p[2], p[3], scale(p[4], 4), scale(p[5], 4), scale(p[6], 4), scale(p[7], 4)});
}

// The formulas at the head of memory.h in double precision, sequence by sequence.
static void test_lstmn_forward(void) {
    Tape* t = tape_new(3);
    for (int i = 0; i < 8; i++) parameter(t, lstmn_shape[i][0], lstmn_shape[i][1], 0.7f);
    Node** p = t->parameters;
    const Node* y = f_lstmn(p);
    double worst = 0;
    for (int b = 0; b < 2; b++) {
        double h[STEPS][STATE], c[STEPS][STATE], s[STATE] = {0}, m[STATE] = {0};
        for (int i = 0; i < STEPS; i++) {
            const float* x = p[0]->value + (i * 2 + b) * IN;
            double a[STEPS], sum = 0, remembered_s[STATE] = {0}, remembered_m[STATE] = {0};
            for (int j = 0; j < i; j++) {
                a[j] = 0;
                for (int u = 0; u < UNITS; u++) {
                    double z = 0;
                    for (int k = 0; k < IN; k++) z += 4 * (double)x[k] * (double)p[5]->value[k * UNITS + u];
                    for (int k = 0; k < STATE; k++)
                        z += 4 *
                             (h[j][k] * (double)p[4]->value[k * UNITS + u] + s[k] * (double)p[6]->value[k * UNITS + u]);
                    a[j] += 4 * (double)p[7]->value[u] * tanh(z);
                }
                sum += a[j] = exp(a[j]);
            }
            for (int j = 0; j < i; j++)
                for (int k = 0; k < STATE; k++)
                    remembered_s[k] += a[j] / sum * h[j][k], remembered_m[k] += a[j] / sum * c[j][k];
            memcpy(s, remembered_s, sizeof s), memcpy(m, remembered_m, sizeof m);
            for (int k = 0; k < STATE; k++) {
                double z[4];
                for (int gate = 0; gate < 4; gate++) {
                    int column = gate * STATE + k;
                    z[gate] = (double)p[3]->value[column];
                    for (int r = 0; r < IN; r++) z[gate] += (double)x[r] * (double)p[1]->value[r * 4 * STATE + column];
                    for (int r = 0; r < STATE; r++) z[gate] += s[r] * (double)p[2]->value[r * 4 * STATE + column];
                }
                c[i][k] = m[k] / (1 + exp(-z[1])) + tanh(z[2]) / (1 + exp(-z[0]));
                h[i][k] = tanh(c[i][k]) / (1 + exp(-z[3]));
                worst = fmax(worst, fabs(h[i][k] - (double)y->value[(i * 2 + b) * STATE + k]));
            }
        }
    }
    expect(worst < 2e-6, "LSTMN, output", worst);
    tape_free(t);
}

// ---- glimpse.h -------------------------------------------------------------------------------------------------------

static Node* f_soft(Node** p) { return soft_glimpse(p[0], p[1]); }
static Node* f_soft_twice(Node** p) { return add(soft_glimpse(p[0], p[1]), soft_glimpse(p[0], tanh_of(p[1]))); }

static const int places[3] = {4, 0, 2};
static const float advantages[3] = {0.7f, -1.3f, 0};
static Node* f_reinforce(Node** p) { return reinforce(p[0], places, advantages, 0.3f); }
static Node* f_reinforce_one(Node** p) { return reinforce(p[0], places + 1, advantages, 0.3f); }

// The gradient of E[r] = sum_j w_j r_j is what REINFORCE gives on average, with any baseline: here the average is
// taken over all places, each as often as its weight says, and not over draws.
static void test_unbiased(void) {
    enum { N = 6 };
    const float reward[N] = {0.3f, -2, 1, 0.1f, 0.8f, -0.4f};
    Tape* t = tape_new(5);
    Node* s = parameter(t, 1, N, 1);
    float w[N], exact[N] = {0}, mean[2][N] = {{0}};
    softmax_row(w, s->value, N);
    softmax_backward(exact, reward, w, 1, N);
    for (int with = 0; with < 2; with++)
        for (int j = 0; j < N; j++) {
            float advantage = reward[j] - (with ? 5.0f : 0);
            zero(s->grad, N);
            backward(reinforce(s, &j, &advantage, 0));
            add_scaled(mean[with], -w[j], s->grad, N);
            tape_clear(t);
        }
    float worst[2] = {0, 0};
    for (int with = 0; with < 2; with++)
        for (int j = 0; j < N; j++) worst[with] = fmaxf(worst[with], fabsf(mean[with][j] - exact[j]));
    expect(worst[0] < 1e-6f, "REINFORCE, mean over places", (double)worst[0]);
    expect(worst[1] < 2e-6f, "REINFORCE with a baseline, mean over places", (double)worst[1]);
    tape_free(t);
}

// Places are drawn as often as their weights say, each row from its own, and never where the weight is 0. Where rounding
// leaves a row's sum below 1, here by far, the rest is the last place's.
static void test_draws(void) {
    enum { DRAWS = 100000 };
    const float w[8] = {0, 0.5f, 0.125f, 0.375f, 0.25f, 0, 0.5f, 0};
    const double expected[8] = {0, 0.5, 0.125, 0.375, 0.25, 0, 0.5, 0.25};
    Tape* t = tape_new(1);
    Node* weights = constant(t, 2, 4, w);
    int times[8] = {0}, place[2];
    bool inside = true;
    uint64_t seed = 2;
    for (int i = 0; i < DRAWS; i++) {
        draw_places(place, weights, &seed);
        for (int b = 0; b < 2; b++)
            if (place[b] >= 0 && place[b] < 4)
                times[4 * b + place[b]]++;
            else
                inside = false;
    }
    double worst = 0;
    for (int j = 0; j < 8; j++) worst = fmax(worst, fabs((double)times[j] / DRAWS - expected[j]));
    expect(inside && worst < 0.01 && times[0] == 0 && times[5] == 0, "draws", worst);
    tape_free(t);
}

// The gradient of the expectation itself, from PyTorch: the mean over places of what a draw gives.
static void test_expectation(void) {
    read_fixture("nodes");
    Tape* t = tape_new(1);
    Node* s = parameter_from(t, "expectation.scores");
    const Stored *reward = stored("expectation.reward"), *by = stored("expectation.by.out");
    float w[8], mean[8] = {0};
    softmax_row(w, s->value, s->cols);
    for (int j = 0; j < s->cols; j++) {
        float advantage = reward->value[j] - 0.5f;
        zero(s->grad, size(s));
        backward(reinforce(s, &j, &advantage, 0));
        add_scaled(mean, -w[j] * by->value[0], s->grad, s->cols);
        tape_clear(t);
    }
    expect_stored("REINFORCE, mean over places", "expectation.d.scores", mean, 1, s->cols, 2e-6);
    tape_free(t);
}

static const float stored_advantages[3] = {0.75f, -1.25f, 0};
static Node* f_reinforce_stored(Node** p) { return reinforce(p[0], places, stored_advantages, 0.25f); }

static void test_pytorch(void) {
    read_fixture("nodes");
    // Gradients go through tanh several times, and tanh_quick is off by 1e-7 also where 1 - tanh^2 is almost nothing.
    expect_function("lstmn", f_lstmn_as_is, 8, (const char* const[]){"x", "W", "U", "b", "W_h", "W_x", "W_s", "v_a"},
                    5e-5);
    expect_function("soft", f_soft, 2, (const char* const[]){"weights", "values"}, 2e-6);
    expect_function("reinforce", f_reinforce_stored, 1, (const char* const[]){"scores"}, 2e-6);
}

static void test_memory(void) {
    test_gradient("memory of one", f_memory1, 4, (const int[][2]){{3, 5}, {1, 5}, {3, 5}, {3, 2}});
    test_gradient("memory of three", f_memory3, 8,
                  (const int[][2]){{2, 3}, {1, 3}, {2, 3}, {2, 7}, {2, 3}, {2, 7}, {2, 3}, {2, 7}});
    test_gradient("memory of nine", f_memory9, 6, (const int[][2]){{2, 3}, {1, 3}, {2, 3}, {2, 3}, {2, 7}, {2, 7}});
    test_gradient("memory, one node thrice", f_memory_shared, 3, (const int[][2]){{2, 3}, {1, 3}, {2, 3}});
    test_gradient("LSTMN", f_lstmn, 8, lstmn_shape);
}

static void test_glimpses(void) {
    test_gradient("soft glimpse", f_soft, 2, (const int[][2]){{3, 5}, {15, 4}});
    test_gradient("soft glimpse, twice", f_soft_twice, 2, (const int[][2]){{2, 3}, {6, 4}});
    test_gradient("soft glimpse, one place", f_soft, 2, (const int[][2]){{2, 1}, {2, 3}});
    test_gradient("reinforce", f_reinforce, 1, (const int[][2]){{3, 5}});
    test_gradient("reinforce, one place", f_reinforce_one, 1, (const int[][2]){{1, 1}});
}

static const Test tests[] = {{"memory", test_memory},     {"lstmn_forward", test_lstmn_forward},
                             {"glimpses", test_glimpses}, {"unbiased", test_unbiased},
                             {"draws", test_draws},       {"expectation", test_expectation},
                             {"pytorch", test_pytorch}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

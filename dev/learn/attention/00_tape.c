// 00_tape.c: backpropagation, in one page.
//
// Everything in this course learns by gradient descent, and gets its gradients from tape.h (or, for the attention
// mechanisms themselves, by hand). What a tape does is small: each operation computes its value at once and is written
// down; afterwards they are called in the opposite order, and each passes the derivative of the loss from its output on
// to its inputs. (Linnainmaa 1970; Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating
// errors".) Read tape.h beside this: it is as long as it is because it has 17 operations; one would do to understand it.
//
// What to look at:
//   1. the tape of a small expression, forwards and backwards, with each number
//   2. derivatives by trying (finite differences) agree with those of the tape, and what the two cost
//   3. two spirals that no straight line separates, learned by a network of three layers

#include <time.h>

#include "draw.h"
#include "tape.h"

// ---- 1. A small expression ------------------------------------------------------------------------------------------
//
// y = (a + b) b with a = 2, b = 3: y = 15. dy/da = b = 3; dy/db = (a + b) + b = 8, in two shares, as b is used twice.
static void small_expression(void) {
    Tape* t = tape_new(1);
    Node *a = parameter(t, 1, 1, 0), *b = parameter(t, 1, 1, 0);
    a->value[0] = 2, b->value[0] = 3;
    Node* sum = add(a, b);
    Node* y = multiply(sum, b);
    printf("1. y = (a + b) b\n\n   forwards, top to bottom      backwards, bottom to top\n");
    backward(y);
    const Node* nodes[] = {a, b, sum, y};
    static const char *const forwards[] = {"a", "b", "sum = a + b", "y = sum b"}, *const backwards[] = {
                                                                                      "dy/da = dy/dsum",
                                                                                      "dy/db = dy/dsum + sum",
                                                                                      "dy/dsum = b", "dy/dy"};
    for (int i = 0; i < 4; i++)
        printf("   %-11s = %-5g           %-21s = %g\n", forwards[i], nodes[i]->value[0], backwards[i],
               nodes[i]->grad[0]);
    claim(y->value[0] == 15 && a->grad[0] == 3 && b->grad[0] == 8, "y = 15, dy/da = 3, dy/db = 8");
    tape_free(t);
}

// ---- 2. Gradients by trying -----------------------------------------------------------------------------------------

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

enum { POINTS = 200, HIDDEN = 32 };

// Points (POINTS,2) on two spirals; which[i] tells the one that point i is on.
static void spirals(float* x, int* which) {
    for (int i = 0; i < POINTS; i++) {
        float turn = 0.5f + 3 * 3.14159265f * (float)(i / 2) / (POINTS / 2), side = i % 2 ? 1 : -1;
        x[2 * i] = side * turn * cosf(turn) / 10, x[2 * i + 1] = side * turn * sinf(turn) / 10;
        which[i] = i % 2;
    }
}

// Three layers: (rows,2) -> (rows,2) scores of the two spirals. p: weights and biases.
static Node* network(Node* x, Node* const* p) {
    Node* h = tanh_of(add(matmul(x, p[0]), p[1]));
    h = tanh_of(add(matmul(h, p[2]), p[3]));
    return add(matmul(h, p[4]), p[5]);
}

static Tape* network_new(void) {
    Tape* t = tape_new(3);
    parameter(t, 2, HIDDEN, 2), parameter(t, 1, HIDDEN, 1);
    parameter(t, HIDDEN, HIDDEN, 1 / sqrtf(HIDDEN)), parameter(t, 1, HIDDEN, 0);
    parameter(t, HIDDEN, 2, 1 / sqrtf(HIDDEN)), parameter(t, 1, 2, 0);
    return t;
}

static float loss_of(Tape* t, const float* x, const int* which) {
    float loss = cross_entropy(network(constant(t, POINTS, 2, x), t->parameters), which)->value[0];
    tape_clear(t);
    return loss;
}

static void by_trying(const float* x, const int* which) {
    enum { REPEAT = 50 };
    Tape* t = network_new();
    double forward_only = INFINITY, both = INFINITY; // the quickest of some times
    for (int i = 0; i < REPEAT; i++) {
        double begin = seconds();
        loss_of(t, x, which);
        forward_only = fmin(forward_only, seconds() - begin);
        for (int k = 0; k < t->parameter_count; k++)
            memset(t->parameters[k]->grad, 0, sizeof(float) * size(t->parameters[k]));
        begin = seconds();
        backward(cross_entropy(network(constant(t, POINTS, 2, x), t->parameters), which));
        both = fmin(both, seconds() - begin);
        tape_clear(t);
    }

    double difference = 0, length = 0, trying = seconds();
    for (int k = 0; k < t->parameter_count; k++)
        for (size_t i = 0; i < size(t->parameters[k]); i++) {
            float *w = &t->parameters[k]->value[i], was = *w, step = 0.01f;
            *w = was + step;
            float above = loss_of(t, x, which);
            *w = was - step;
            float below = loss_of(t, x, which);
            *w = was;
            double tried = (double)(above - below) / (2 * (double)step), told = (double)t->parameters[k]->grad[i];
            difference += (tried - told) * (tried - told), length += told * told;
        }
    trying = seconds() - trying;
    double error = sqrt(difference / length);
    size_t n = parameter_total(t);
    printf("\n2. The gradient of a network with %zu parameters, for %d points\n\n", n, POINTS);
    printf("   loss alone                 %8.3f ms\n   loss, and gradient by tape %8.3f ms, %.1f times that\n"
           "   gradient by trying         %8.1f ms, %.0f times that: two losses a parameter\n",
           1e3 * forward_only, 1e3 * both, both / forward_only, 1e3 * trying, trying / forward_only);
    claim(error < 1e-3, "both gradients are the same, but for %.5f of their length", error);
    claim(both < 8 * forward_only && trying > 20 * both,
          "the tape's costs a few losses, however many parameters there are");
    tape_free(t);
}

// ---- 3. Learning ----------------------------------------------------------------------------------------------------

static int right_answers(Tape* t, const float* x, const int* which) {
    Node* y = network(constant(t, POINTS, 2, x), t->parameters);
    int right = 0;
    for (int i = 0; i < POINTS; i++) right += (y->value[2 * i + 1] > y->value[2 * i]) == which[i];
    tape_clear(t);
    return right;
}

static void learn(const float* x, const int* which) {
    enum { STEPS = 600, EVERY = 10, SIDE = 24 };
    static float loss[STEPS / EVERY], at[STEPS / EVERY], map[SIDE * SIDE];
    Tape* t = network_new();
    int before = right_answers(t, x, which);
    for (int step = 0; step < STEPS; step++) {
        Node* node = cross_entropy(network(constant(t, POINTS, 2, x), t->parameters), which);
        if (step % EVERY == 0) loss[step / EVERY] = node->value[0], at[step / EVERY] = (float)step;
        backward(node);
        adamw(t, 0.01f, 0, 1);
        tape_clear(t);
    }
    int after = right_answers(t, x, which);
    printf("\n3. Two spirals\n\n");
    Series series = {.label = "loss", .n = STEPS / EVERY, .x = at, .y = loss};
    draw_curves("00_loss", "loss while learning", &(Axes){.x = "step", .y = "loss", .zero = true}, &series, 1);
    for (int i = 0; i < SIDE * SIDE; i++) {
        float point[2] = {((float)(i % SIDE) + 0.5f) / (SIDE / 2) - 1, 1 - ((float)(i / SIDE) + 0.5f) / (SIDE / 2)};
        Node* p = softmax_rows(network(constant(t, 1, 2, point), t->parameters));
        map[i] = p->value[1];
        tape_clear(t);
    }
    draw_heat("00_spirals", "probability of the second spiral, over the plane", map, SIDE, SIDE, NULL, NULL);
    claim(before < 0.7f * POINTS && after == POINTS, "of %d points, %d are told right before, %d after %d steps",
          POINTS, before, after, STEPS);
    tape_free(t);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    static float x[POINTS * 2];
    static int which[POINTS];
    spirals(x, which);
    small_expression();
    by_trying(x, which);
    learn(x, which);
    return lesson_ends();
}

// Three changes to try:
//   1. In tape.h, leave out "1 -" in logistic_of_backward or any other sign: make -C dev/learn/attention test tells
//      which derivative is wrong, and by how much.
//   2. network() without tanh_of: three linear layers are one, and half the points stay wrong whatever it learns.
//   3. parameter(t, 2, HIDDEN, 0) for the first layer: all hidden units are the same, get the same gradient, and stay the
//      same. That is why weights begin with random numbers.

// check.h: what the tests of this folder have in common: counting, distances, slopes on the tape, PyTorch's tensors.

#ifndef CHECK_H
#define CHECK_H

#include "tape.h"

static int passed, failed;

// name: of what is checked; what: of it must hold, or NULL. figure: what a reader of a failure would ask for.
static inline void expect_of(bool holds, const char* name, const char* what, double figure) {
    if (holds)
        passed++;
    else
        failed++, printf("FAILED: %s%s%s (%.3g)\n", name, what ? ", " : "", what ? what : "", figure);
}
static inline void expect(bool holds, const char* name, double figure) { expect_of(holds, name, NULL, figure); }

// ||x - y|| / ||y||, and ||x - y|| where y is 0.
static inline double distance(const float* x, const float* y, size_t n) {
    double difference = 0, length = 0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        length += (double)y[i] * (double)y[i];
    }
    return sqrt(difference) / (length > 0 ? sqrt(length) : 1);
}

// ---- slopes --------------------------------------------------------------------------------------------------------

// What is under test: a function of parameters p[0], p[1] ... that are on a tape.
typedef Node* Function(Node** p);

// The sum of f's elements, each times a fixed random number, in double precision.
static inline double weighted_sum(Function* f, Tape* t) {
    const Node* y = f(t->parameters);
    uint64_t seed = 99;
    double sum = 0;
    for (size_t i = 0; i < size(y); i++) sum += (double)normal(&seed) * (double)y->value[i];
    tape_clear(t);
    return sum;
}

// That sum as a node's backward, whose gradient the tape is asked for.
static inline void weighted_sum_backward(Node* y) {
    uint64_t seed = 99;
    for (size_t i = 0; i < size(y->in[0]); i++) y->in[0]->grad[i] += y->grad[0] * normal(&seed);
}

// The sum's derivative by *x, from four values around it: (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12 h, with an
// error of order h^4.
static inline float slope(Function* f, Tape* t, float* x) {
    const float h = 0.02f, at = *x;
    double near = 0, far = 0;
    for (int side = -1; side <= 1; side += 2) {
        *x = at + (float)side * h, near += side * weighted_sum(f, t);
        *x = at + (float)side * 2 * h, far += side * weighted_sum(f, t);
    }
    *x = at;
    return (float)((8 * near - far) / (12 * (double)h));
}

// ---- PyTorch's tensors ---------------------------------------------------------------------------------------------

// A fixture is a text: a tensor's name, rows, columns, and its numbers, again and again.
enum { TENSORS = 192 };
typedef struct {
    char name[32];
    int rows, cols;
    float* value;
} Stored;
static Stored fixture[TENSORS];

// name.txt, which dev/check/name_reference.py has written; ATTENTION_FIXTURES names another folder to read it from.
// Without it nothing can be checked.
static inline void read_fixture(const char* name) {
    if (fixture[0].value) return; // by an earlier test
    const char* folder = getenv("ATTENTION_FIXTURES");
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.txt", folder ? folder : "../../check/fixtures/attention", name);
    FILE* f = fopen(path, "r");
    bool good = f != NULL;
    for (int n = 0; good && n < TENSORS; n++) {
        Stored* s = &fixture[n];
        int found = fscanf(f, "%31s %d %d", s->name, &s->rows, &s->cols);
        if (found == EOF) break;
        size_t count = (size_t)s->rows * (size_t)s->cols;
        good = found == 3 && count > 0 && count < 100000 && (s->value = (float*)calloc(count, sizeof(float)));
        for (size_t i = 0; good && i < count; i++) good = fscanf(f, "%f", &s->value[i]) == 1;
    }
    if (f) fclose(f);
    if (good && fixture[0].value) return;
    fprintf(stderr, "cannot read %s; dev/check/%s_reference.py writes it\n", path, name);
    exit(1);
}

static inline const Stored* stored(const char* name) {
    for (int n = 0; n < TENSORS; n++)
        if (!strcmp(fixture[n].name, name)) return &fixture[n];
    fprintf(stderr, "no %s in the fixture\n", name);
    exit(1);
}

// x is the stored tensor, but for `limit` of its length. what: for whom it was computed. With other numbers than those
// of the repository, a gradient may by chance be a small difference of large ones; of 30 seeds one was off by 7e-5.
static inline void expect_stored(const char* what, const char* name, const float* x, int rows, int cols, double limit) {
    const Stored* s = stored(name);
    if (getenv("ATTENTION_FIXTURES")) limit = fmax(limit, 1e-3);
    char text[160];
    snprintf(text, sizeof text, "%s: %s as PyTorch's", what, name);
    bool shape = s->rows == rows && s->cols == cols;
    double error = shape ? distance(x, s->value, (size_t)(rows * cols)) : INFINITY;
    expect(error < limit, text, error);
}

// PREFIX.LABEL, until the next call.
static inline const char* label_of(const char* prefix, const char* label) {
    static char name[64];
    snprintf(name, sizeof name, "%s.%s", prefix, label);
    return name;
}

static inline Node* parameter_from(Tape* t, const char* name) {
    const Stored* s = stored(name);
    Node* p = parameter(t, s->rows, s->cols, 0);
    memcpy(p->value, s->value, sizeof(float) * size(p));
    return p;
}

// What f makes of the inputs stored as PREFIX.LABEL, in the order of the labels, is PREFIX.out, and its gradients are
// PREFIX.d.LABEL, where the loss is the sum of out times PREFIX.by.out.
static inline void expect_function(const char* prefix, Function* f, int count, const char* const* labels,
                                   double limit) {
    Tape* t = tape_new(1);
    for (int i = 0; i < count; i++) parameter_from(t, label_of(prefix, labels[i]));
    Node* y = f(t->parameters);
    expect_stored(prefix, label_of(prefix, "out"), y->value, y->rows, y->cols, limit);
    backward(multiply(y, constant(t, y->rows, y->cols, stored(label_of(prefix, "by.out"))->value)));
    for (int i = 0; i < count; i++) {
        const Node* p = t->parameters[i];
        char gradient[32];
        snprintf(gradient, sizeof gradient, "d.%s", labels[i]);
        expect_stored(prefix, label_of(prefix, gradient), p->grad, p->rows, p->cols, limit);
    }
    tape_free(t);
}

// ---- all tests of a file -------------------------------------------------------------------------------------------

typedef struct {
    const char* name;
    void (*run)(void);
} Test;

// TEST [NAME]: all tests, or one of them. Prints the line that ends a test's output, and gives its exit status.
static inline int run_tests(const Test* tests, size_t test_count, int count, char** arguments) {
    for (size_t i = 0; i < test_count; i++)
        if (count < 2 || !strcmp(arguments[1], tests[i].name)) tests[i].run();
    for (int n = 0; n < TENSORS; n++) free(fixture[n].value);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#define RUN_TESTS(tests, count, arguments) run_tests(tests, sizeof(tests) / sizeof(tests)[0], count, arguments)

#endif

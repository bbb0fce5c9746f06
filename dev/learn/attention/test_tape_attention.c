// test_tape_attention.c: is attention on the tape right?
//
// The output is compared with the definition written out in double precision, the gradients with finite differences,
// both with PyTorch's: one head and several, cross-attention, masks, biases, rotary positions. Ends with "N passed, N failed", and with
// status 1 if any failed.

#include "check.h"
#include "tape_attention.h"

typedef struct {
    const char* name;
    int batch, heads, m, n, D;
    bool masked, biased, rotary;
} Case;

static Node* run(const Case* c, Tape* t, const float* bias, const float* turns) {
    Heads h = {.heads = c->heads, .bias = c->biased ? bias : NULL, .turns = c->rotary ? turns : NULL};
    if (c->masked) h.mask = (Mask){causal, NULL};
    Node** p = t->parameters;
    return attention_node(p[0], p[1], p[2], c->batch, h);
}

// The rotated product of rows i and j of a head: Re(q conj(k) e^(i angle)) summed over the pairs, the angle that of i -
// j.
static double product(const Case* c, const float* q, const float* k, int i, int j) {
    double sum = 0;
    if (!c->rotary) {
        for (int e = 0; e < c->D; e++) sum += (double)q[e] * (double)k[e];
        return sum;
    }
    for (int e = 0; e < c->D; e += 2) {
        double angle = (i - j) * pow(100, -(double)e / c->D);
        double real = (double)q[e] * (double)k[e] + (double)q[e + 1] * (double)k[e + 1];
        double imaginary = (double)q[e + 1] * (double)k[e] - (double)q[e] * (double)k[e + 1];
        sum += real * cos(angle) - imaginary * sin(angle);
    }
    return sum;
}

static double forward_error(const Case* c, const Tape* t, const float* bias, const float* out) {
    int C = c->heads * c->D;
    double worst = 0;
    for (int b = 0; b < c->batch; b++)
        for (int h = 0; h < c->heads; h++)
            for (int i = 0; i < c->m; i++) {
                const float* q = t->parameters[0]->value + (b * c->m + i) * C + h * c->D;
                double expected[64] = {0}, sum = 0;
                for (int j = 0; j < (c->masked ? i + 1 : c->n); j++) {
                    const float* k = t->parameters[1]->value + (b * c->n + j) * C + h * c->D;
                    const float* v = t->parameters[2]->value + (b * c->n + j) * C + h * c->D;
                    double score = product(c, q, k, i, j) / sqrt(c->D);
                    double e = exp(score + (c->biased ? (double)bias[(h * c->m + i) * c->n + j] : 0));
                    sum += e;
                    for (int d = 0; d < c->D; d++) expected[d] += e * (double)v[d];
                }
                for (int d = 0; d < c->D; d++)
                    worst = fmax(worst, fabs((double)out[(b * c->m + i) * C + h * c->D + d] - expected[d] / sum));
            }
    return worst;
}

// Sum of the outputs, each times a fixed number.
static double sum_of_case(const Case* c, Tape* t, const float* bias, const float* turns, const float* by) {
    const Node* y = run(c, t, bias, turns);
    double sum = 0;
    for (size_t i = 0; i < size(y); i++) sum += (double)by[i] * (double)y->value[i];
    tape_clear(t);
    return sum;
}

static void test(const Case* c) {
    int C = c->heads * c->D;
    Tape* t = tape_new(1);
    for (int k = 0; k < 3; k++) parameter(t, c->batch * (k ? c->n : c->m), C, 1);
    float* bias = (float*)malloc(sizeof(float) * (size_t)(c->heads * c->m * c->n));
    float *turns = (float*)malloc(sizeof(float) * (size_t)(c->n * c->D)),
          *by = (float*)malloc(sizeof(float) * size(t->parameters[0]));
    for (int i = 0; i < c->heads * c->m * c->n; i++) bias[i] = normal(&t->seed);
    for (size_t i = 0; i < size(t->parameters[0]); i++) by[i] = normal(&t->seed);
    if (c->rotary) rotary_turns(turns, c->n, c->D, 100);
    double error = forward_error(c, t, bias, run(c, t, bias, turns)->value);
    expect_of(error < 2e-6, c->name, "output", error);
    tape_clear(t);

    backward(multiply(run(c, t, bias, turns), constant(t, c->batch * c->m, C, by)));
    for (int k = 0; k < 3; k++) {
        double difference = 0, length = 0;
        for (size_t i = 0; i < size(t->parameters[k]); i++) {
            float *x = t->parameters[k]->value + i, at = *x, step = 0.02f;
            double f[4];
            for (int s = 0; s < 4; s++)
                *x = at + step * (float[]){-2, -1, 1, 2}[s], f[s] = sum_of_case(c, t, bias, turns, by);
            *x = at;
            double slope = (8 * (f[2] - f[1]) - (f[3] - f[0])) / (12 * (double)step),
                   g = (double)t->parameters[k]->grad[i];
            difference += (g - slope) * (g - slope), length += slope * slope;
        }
        error = sqrt(difference / (length > 0 ? length : 1));
        expect_of(error < 1e-4, c->name, k == 0 ? "dq" : k == 1 ? "dk" : "dv", error);
    }
    free(bias), free(turns), free(by), tape_free(t);
}

static void test_cases(void) {
    static const Case cases[] = {{"one head", 1, 1, 5, 5, 6, false, false, false},
                                 {"one of everything", 1, 1, 1, 1, 1, false, false, false},
                                 {"cross-attention, a batch", 3, 1, 4, 7, 5, false, false, false},
                                 {"three heads, a batch", 2, 3, 5, 5, 4, false, false, false},
                                 {"masked", 2, 2, 6, 6, 3, true, false, false},
                                 {"biased, cross", 2, 3, 4, 6, 2, false, true, false},
                                 {"rotary", 2, 2, 7, 7, 4, false, false, true},
                                 {"all of it", 2, 2, 7, 7, 6, true, true, true}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) test(cases + i);
}

// PyTorch: two sequences of five, two heads of four, all of it.
static Node* f_all(Node** p) {
    float* turns = (float*)take(p[0]->tape, sizeof(float) * 5 * 4);
    rotary_turns(turns, 5, 4, 100);
    Heads h = {.heads = 2, .mask = {causal, NULL}, .bias = stored("heads.bias")->value, .turns = turns};
    return attention_node(p[0], p[1], p[2], 2, h);
}
static void test_pytorch(void) {
    read_fixture("nodes");
    expect_function("heads", f_all, 3, (const char* const[]){"q", "k", "v"}, 4e-6);
}

static const Test tests[] = {{"cases", test_cases}, {"pytorch", test_pytorch}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

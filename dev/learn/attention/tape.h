// tape.h: backpropagation, in one page. A tape of matrix operations that runs backwards.
//
//     Tape* t = tape_new(1234);                          the seed of its random numbers
//     Node* W = parameter(t, 2, 8, 0.5f);                stays on the tape, is learned
//     Node* y = tanh_of(matmul(constant(t, 1, 2, x), W)); an operation computes at once, and is recorded
//     backward(cross_entropy(y, target));                every node's grad = d loss / d node
//     adamw(t, 0.01f, 0, 1);  tape_clear(t);             one step down; forget what was recorded, keep the parameters
//
// Each node holds a matrix, its value, and the matrix of the same shape that backward() fills: the derivative of the
// loss by every element of the value. The chain rule says how: if the loss L depends on x only through y = f(x), then
// dL/dx = sum over the elements of y of dL/dy dy/dx. So an operation that knows dL/dy can add its share to dL/dx, and
// needs to know nothing else about L. The tape calls the operations from the last to the first; when one's turn comes,
// all who used its output have added their share already. The price of all derivatives together is that of two
// more forward passes, however many parameters there are (Linnainmaa 1970; Rumelhart, Hinton and Williams 1986).
//
// Every operation here is record(), which makes its node, then the forward computation, preceded by the function that
// runs it backward. A new operation is written outside this file in the same way; the attention mechanisms of
// attention.h, whose derivatives are worked out by hand, are put on the tape like that.
//
// float32, rows dense. The same program gives the same bits with any number of threads. A tape belongs to one thread
// at a time; different threads may use different tapes. Wrong shapes are bugs of the caller, and stop the program.

#ifndef TAPE_H
#define TAPE_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quick.h"

typedef struct Tape Tape;
typedef struct Node Node;

struct Node {
    int rows, cols;
    float *value, *grad;        // (rows,cols) each; grad exists once backward() has begun, a parameter's always
    void (*backward)(Node*);    // adds to the inputs' grad what follows from this node's; NULL: has no inputs
    Node** in;                  // the inputs
    int inputs;                 // how many
    void* extra;                // what backward needs besides
    Tape* tape;                 // where it is recorded
    float *mean, *mean_squares; // a parameter's, for AdamW
};

enum { CHUNK = 1 << 20, CHUNKS = 16 }; // memory comes in chunks of 1, 2, 4 ... MB, which stay for the next step

struct Tape {
    Node **nodes, **parameters; // in the order of their recording
    int count, room, parameter_count;
    char* chunk[CHUNKS];
    int current;   // the chunk in use
    size_t used;   // bytes of it
    uint64_t seed; // state of the random numbers
    int steps;     // of AdamW
};

#define insist(condition, ...) \
    ((condition) ? (void)0     \
                 : (void)(fprintf(stderr, "tape.h: "), fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), abort()))

// Random numbers: a counter, hashed (SplitMix64: Steele, Lea and Flood 2014).
static inline uint64_t random_bits(uint64_t* seed) {
    uint64_t x = *seed += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
static inline float uniform(uint64_t* seed) { return ((float)(random_bits(seed) >> 41) + 0.5f) / 8388608; } // in (0,1)
static inline int random_below(uint64_t* seed, int n) { return (int)((random_bits(seed) >> 32) * (uint64_t)n >> 32); }
static inline float normal(uint64_t* seed) { // mean 0, variance 1 (Box and Muller 1958)
    float radius = sqrtf(-2 * logf(uniform(seed)));
    return radius * cosf(6.2831853f * uniform(seed));
}

// ---- the tape ------------------------------------------------------------------------------------------------------

static inline Tape* tape_new(uint64_t seed) {
    Tape* t = (Tape*)calloc(1, sizeof(Tape));
    insist(t, "no memory");
    t->seed = seed;
    return t;
}

// Memory that lasts until tape_clear(), aligned to cache lines, not set to anything.
static inline void* take(Tape* t, size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    while (t->current < CHUNKS && t->used + bytes > (size_t)CHUNK << t->current) t->current++, t->used = 0;
    insist(t->current < CHUNKS, "a step needs more than 64 GB");
    char** chunk = &t->chunk[t->current];
    if (!*chunk) *chunk = (char*)aligned_alloc(64, (size_t)CHUNK << t->current);
    insist(*chunk, "no memory");
    return *chunk + (t->used += bytes) - bytes;
}

// A new node, to whose value the caller assigns. This is all that it takes to add an operation: `run_backward` will be
// given the node, with its grad complete, and adds to in[i]->grad. `extra`, of so many bytes, is at its disposal.
static inline Node* record(Tape* t, int rows, int cols, void (*run_backward)(Node*), int inputs, Node* const* in,
                           size_t extra) {
    insist(rows > 0 && cols > 0, "a matrix of %d x %d", rows, cols);
    Node* y = (Node*)take(t, sizeof(Node));
    *y = (Node){.rows = rows, .cols = cols, .backward = run_backward, .inputs = inputs, .tape = t};
    y->value = (float*)take(t, sizeof(float) * (size_t)rows * (size_t)cols);
    y->in = (Node**)take(t, sizeof(Node*) * (size_t)inputs);
    if (inputs) memcpy(y->in, in, sizeof(Node*) * (size_t)inputs);
    y->extra = take(t, extra);
    if (t->count == t->room) {
        t->room = 2 * t->room + 256;
        t->nodes = (Node**)realloc(t->nodes, sizeof(Node*) * (size_t)t->room);
        insist(t->nodes, "no memory");
    }
    return t->nodes[t->count++] = y;
}

static inline size_t size(const Node* x) { return (size_t)x->rows * (size_t)x->cols; }

// A matrix (rows,cols) with the given elements, or zeros if `value` is NULL.
static inline Node* constant(Tape* t, int rows, int cols, const float* value) {
    Node* y = record(t, rows, cols, NULL, 0, NULL, 0);
    if (value)
        memcpy(y->value, value, sizeof(float) * size(y));
    else
        memset(y->value, 0, sizeof(float) * size(y));
    return y;
}

// A matrix (rows,cols) to be learned, at first normal with the given standard deviation.
static inline Node* parameter(Tape* t, int rows, int cols, float deviation) {
    size_t n = (size_t)rows * (size_t)cols;
    Node* p = (Node*)calloc(1, sizeof(Node));
    t->parameters = (Node**)realloc(t->parameters, sizeof(Node*) * (size_t)(t->parameter_count + 1));
    insist(p && t->parameters, "no memory");
    *p = (Node){.rows = rows, .cols = cols, .tape = t, .value = (float*)calloc(4 * n, sizeof(float))};
    insist(p->value, "no memory");
    p->grad = p->value + n, p->mean = p->grad + n, p->mean_squares = p->mean + n;
    for (size_t i = 0; i < n; i++) p->value[i] = deviation == 0 ? 0 : deviation * normal(&t->seed);
    return t->parameters[t->parameter_count++] = p;
}

// How many numbers are learned.
static inline size_t parameter_total(const Tape* t) {
    size_t total = 0;
    for (int i = 0; i < t->parameter_count; i++) total += size(t->parameters[i]);
    return total;
}

// Fills the grad of every node on the tape, and adds to those of the parameters, with the derivatives of the sum of
// y's elements; y is mostly a loss (1,1).
static inline void backward(Node* y) {
    Tape* t = y->tape;
    for (int i = 0; i < t->count; i++) {
        Node* x = t->nodes[i];
        x->grad = (float*)memset(take(t, sizeof(float) * size(x)), 0, sizeof(float) * size(x));
    }
    for (size_t i = 0; i < size(y); i++) y->grad[i] = 1;
    for (int i = t->count - 1; i >= 0; i--)
        if (t->nodes[i]->backward) t->nodes[i]->backward(t->nodes[i]);
}

// Forgets all nodes but the parameters. The memory is used again.
static inline void tape_clear(Tape* t) { t->count = t->current = 0, t->used = 0; }

static inline void tape_free(Tape* t) {
    for (int i = 0; i < t->parameter_count; i++) free(t->parameters[i]->value), free(t->parameters[i]);
    for (int i = 0; i < CHUNKS; i++) free(t->chunk[i]);
    free(t->parameters), free(t->nodes), free(t);
}

// AdamW (Loshchilov and Hutter 2019): a step of size `rate` along the gradient's running mean, divided, element by
// element, by the root of the running mean of its square. Matrices also decay towards 0; single rows (biases, gains)
// do not. Before that, the gradient of all parameters together is shortened to length `clip`, if it is longer (0:
// never). Sets the gradients to zero. Returns their length before clipping.
static inline float adamw(Tape* t, float rate, float decay, float clip) {
    double squares = 0;
    for (int i = 0; i < t->parameter_count; i++)
        for (size_t k = 0; k < size(t->parameters[i]); k++)
            squares += (double)t->parameters[i]->grad[k] * (double)t->parameters[i]->grad[k];
    float length = (float)sqrt(squares), shorten = clip > 0 && length > clip ? clip / length : 1;
    const float beta1 = 0.9f, beta2 = 0.999f, epsilon = 1e-8f;
    t->steps++;
    float scale1 = 1 / (1 - powf(beta1, (float)t->steps)), scale2 = 1 / (1 - powf(beta2, (float)t->steps));
    for (int i = 0; i < t->parameter_count; i++) {
        Node* p = t->parameters[i];
        float keep = p->rows > 1 ? 1 - rate * decay : 1;
        for (size_t k = 0; k < size(p); k++) {
            float g = shorten * p->grad[k];
            p->mean[k] = beta1 * p->mean[k] + (1 - beta1) * g;
            p->mean_squares[k] = beta2 * p->mean_squares[k] + (1 - beta2) * g * g;
            p->value[k] =
                keep * p->value[k] - rate * scale1 * p->mean[k] / (sqrtf(scale2 * p->mean_squares[k]) + epsilon);
        }
        memset(p->grad, 0, sizeof(float) * size(p));
    }
    return length;
}

// ---- matrix product ------------------------------------------------------------------------------------------------
//
// C (M,N) += A (M,K) B (K,N), where a step down A is ai floats, a step right ak, and so for B: a transposed matrix is
// the same numbers with the strides exchanged. In tiles of 4 rows and two vectors of C, which stay in vector registers
// while k runs, with as many columns of B copied together, and parts of K that leave them in the first-level cache. An
// element's sum has a fixed order, whichever thread computes it and however long the vectors are.

#if defined(__AVX512F__) // bytes of a vector: what the processor has, as a longer one would not stay in registers
enum { VECTOR = 64 };
#elif defined(__AVX__)
enum { VECTOR = 32 };
#else
enum { VECTOR = 16 };
#endif
typedef float Vector __attribute__((vector_size(VECTOR), may_alias));
typedef float Unaligned __attribute__((vector_size(VECTOR), may_alias, aligned(4)));
enum { TILE_ROWS = 4, TILE_COLS = 2 * VECTOR / (int)sizeof(float), BAND = 64, DEPTH = 128 };

static inline int smaller(int a, int b) { return a < b ? a : b; }

// panel[k] = the numbers b[k bk + j bj] for j < width, then zeros.
static inline void copy_panel(Vector (*panel)[2], const float* b, int depth, int width, int bk, int bj) {
    float* to = (float*)panel;
    if (width < TILE_COLS) {
        memset(panel, 0, sizeof panel[0] * (size_t)depth);
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < width; j++) to[k * TILE_COLS + j] = b[k * bk + j * bj];
    } else if (bk == 1) { // with both loops' steps known, compilers turn rows into columns by shuffling registers
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < TILE_COLS; j++) to[k * TILE_COLS + j] = b[k + j * bj];
    } else {
        for (int k = 0; k < depth; k++)
            for (int j = 0; j < TILE_COLS; j++) to[k * TILE_COLS + j] = b[k * bk + j * bj];
    }
}

static inline void multiply_add(float* c, const float* a, const float* b, int M, int N, int K, int ai, int ak, int bk,
                                int bj) {
    int panels = (N + TILE_COLS - 1) / TILE_COLS, bands = (M + BAND - 1) / BAND;
#pragma omp parallel for if (panels * bands > 1 && (double)M * N * K > 1e6)
    for (int task = 0; task < panels * bands; task++) {
        int j0 = task % panels * TILE_COLS, width = smaller(TILE_COLS, N - j0);
        int i0 = task / panels * BAND, end = smaller(i0 + BAND, M);
        Vector panel[DEPTH][2];
        for (int k0 = 0; k0 < K; k0 += DEPTH) {
            int depth = smaller(DEPTH, K - k0);
            copy_panel(panel, b + k0 * bk + j0 * bj, depth, width, bk, bj);
            for (int i = i0; i < end; i += TILE_ROWS) {
                int rows = smaller(TILE_ROWS, end - i);
                const float* row[TILE_ROWS]; // the last one again where there are no more
                for (int r = 0; r < TILE_ROWS; r++) row[r] = a + (i + smaller(r, rows - 1)) * ai + k0 * ak;
                Vector sum[TILE_ROWS][2] = {{{0}}};
                for (int k = 0; k < depth; k++) {
                    // Volatile, or GCC reads both again for each row where it believes that to cost nothing (Zen).
                    Vector left = *(volatile Vector*)&panel[k][0], right = *(volatile Vector*)&panel[k][1];
                    for (int r = 0; r < TILE_ROWS; r++) {
                        sum[r][0] += row[r][k * ak] * left;
                        sum[r][1] += row[r][k * ak] * right;
                    }
                }
                if (rows == TILE_ROWS && width == TILE_COLS) {
                    for (int r = 0; r < TILE_ROWS; r++) {
                        Unaligned* to = (Unaligned*)(c + (i + r) * N + j0);
                        to[0] += sum[r][0], to[1] += sum[r][1];
                    }
                } else {
                    Vector tile[TILE_ROWS][2]; // so that the sums need not lie in memory
                    memcpy(tile, sum, sizeof tile);
                    for (int r = 0; r < rows; r++)
                        for (int j = 0; j < width; j++) c[(i + r) * N + j0 + j] += ((float*)tile[r])[j];
                }
            }
        }
    }
}

// y (m,n) = a (m,k) b (k,n).  da = dy b^T,  db = a^T dy.
static inline void matmul_backward(Node* y) {
    Node *a = y->in[0], *b = y->in[1];
    multiply_add(a->grad, y->grad, b->value, a->rows, a->cols, y->cols, y->cols, 1, 1, b->cols);
    multiply_add(b->grad, a->value, y->grad, b->rows, b->cols, a->rows, 1, a->cols, y->cols, 1);
}
static inline Node* matmul(Node* a, Node* b) {
    insist(a->cols == b->rows, "matmul of %d x %d and %d x %d", a->rows, a->cols, b->rows, b->cols);
    Node* y = record(a->tape, a->rows, b->cols, matmul_backward, 2, (Node*[]){a, b}, 0);
    memset(y->value, 0, sizeof(float) * size(y));
    multiply_add(y->value, a->value, b->value, a->rows, b->cols, a->cols, a->cols, 1, b->cols, 1);
    return y;
}

// ---- element by element --------------------------------------------------------------------------------------------
//
// In add and multiply b may also be one row (1,n), used for every row of a, or one column (m,1), for every column: then
// a step down, or right, stays in place. Its gradient is summed over all the places where it was used.

static inline int step_down(const Node* b) { return b->rows == 1 ? 0 : b->cols; }
static inline int step_right(const Node* b) { return b->cols == 1 ? 0 : 1; }

static inline Node* record_pair(Node* a, Node* b, void (*run_backward)(Node*)) {
    insist((b->rows == a->rows || b->rows == 1) && (b->cols == a->cols || b->cols == 1), "%d x %d beside %d x %d",
           a->rows, a->cols, b->rows, b->cols);
    return record(a->tape, a->rows, a->cols, run_backward, 2, (Node*[]){a, b}, 0);
}

// y = a + b.  da = dy,  db = dy.
static inline void add_backward(Node* y) {
    Node *a = y->in[0], *b = y->in[1];
    for (int i = 0, n = y->cols, right = step_right(b); i < y->rows; i++) {
        float *dy = y->grad + i * n, *da = a->grad + i * n, *db = b->grad + i * step_down(b);
        for (int j = 0; j < n; j++) da[j] += dy[j];
        for (int j = 0; j < n; j++) db[j * right] += dy[j];
    }
}
static inline Node* add(Node* a, Node* b) {
    Node* y = record_pair(a, b, add_backward);
    for (int i = 0, n = y->cols, right = step_right(b); i < y->rows; i++) {
        const float *x = a->value + i * n, *z = b->value + i * step_down(b);
        for (int j = 0; j < n; j++) y->value[i * n + j] = x[j] + z[j * right];
    }
    return y;
}

// y = a b, each element by its own.  da = dy b,  db = dy a.
static inline void multiply_backward(Node* y) {
    Node *a = y->in[0], *b = y->in[1];
    for (int i = 0, n = y->cols, right = step_right(b); i < y->rows; i++) {
        const float *dy = y->grad + i * n, *x = a->value + i * n, *z = b->value + i * step_down(b);
        float *da = a->grad + i * n, *db = b->grad + i * step_down(b);
        for (int j = 0; j < n; j++) da[j] += dy[j] * z[j * right];
        for (int j = 0; j < n; j++) db[j * right] += dy[j] * x[j];
    }
}
static inline Node* multiply(Node* a, Node* b) {
    Node* y = record_pair(a, b, multiply_backward);
    for (int i = 0, n = y->cols, right = step_right(b); i < y->rows; i++) {
        const float *x = a->value + i * n, *z = b->value + i * step_down(b);
        for (int j = 0; j < n; j++) y->value[i * n + j] = x[j] * z[j * right];
    }
    return y;
}

// y = s a, for a number s that is not learned.  da = s dy.
static inline void scale_backward(Node* y) {
    float s = *(float*)y->extra;
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[i] += s * y->grad[i];
}
static inline Node* scale(Node* a, float s) {
    Node* y = record(a->tape, a->rows, a->cols, scale_backward, 1, &a, sizeof s);
    *(float*)y->extra = s;
    for (size_t i = 0; i < size(y); i++) y->value[i] = s * a->value[i];
    return y;
}
static inline Node* subtract(Node* a, Node* b) { return add(a, scale(b, -1)); }

// y = tanh a.  da = dy (1 - y^2).
static inline void tanh_of_backward(Node* y) {
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[i] += y->grad[i] * (1 - y->value[i] * y->value[i]);
}
static inline Node* tanh_of(Node* a) {
    Node* y = record(a->tape, a->rows, a->cols, tanh_of_backward, 1, &a, 0);
    for (size_t i = 0; i < size(y); i++) y->value[i] = tanh_quick(a->value[i]);
    return y;
}

// y = 1 / (1 + e^-a).  da = dy y (1 - y).
static inline void logistic_of_backward(Node* y) {
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[i] += y->grad[i] * y->value[i] * (1 - y->value[i]);
}
static inline Node* logistic_of(Node* a) {
    Node* y = record(a->tape, a->rows, a->cols, logistic_of_backward, 1, &a, 0);
    for (size_t i = 0; i < size(y); i++) y->value[i] = logistic_quick(a->value[i]);
    return y;
}

// y = max(0, a).  da = dy where a > 0.
static inline void relu_of_backward(Node* y) {
    for (size_t i = 0; i < size(y); i++) y->in[0]->grad[i] += y->value[i] > 0 ? y->grad[i] : 0;
}
static inline Node* relu_of(Node* a) {
    Node* y = record(a->tape, a->rows, a->cols, relu_of_backward, 1, &a, 0);
    for (size_t i = 0; i < size(y); i++) y->value[i] = a->value[i] > 0 ? a->value[i] : 0;
    return y;
}

// ---- row by row ----------------------------------------------------------------------------------------------------

// p = e^x / sum of e^x over a row of n numbers, with the largest subtracted first, which changes nothing but keeps e^x
// finite. p may be x.
static inline void softmax_row(float* p, const float* x, int n) {
    float largest = x[0], sum = 0;
    for (int j = 1; j < n; j++) largest = x[j] > largest ? x[j] : largest;
    for (int j = 0; j < n; j++) p[j] = exp_quick(x[j] - largest);
    for (int j = 0; j < n; j++) sum += p[j];
    for (int j = 0; j < n; j++) p[j] /= sum;
}

// Each row's softmax.  dy_j/da_k = y_j ([j = k] - y_k), therefore da_k = y_k (dy_k - sum_j dy_j y_j).
static inline void softmax_rows_backward(Node* y) {
    for (int i = 0; i < y->rows; i++) {
        const float *p = y->value + i * y->cols, *dp = y->grad + i * y->cols;
        float *da = y->in[0]->grad + i * y->cols, sum = 0;
        for (int j = 0; j < y->cols; j++) sum += dp[j] * p[j];
        for (int j = 0; j < y->cols; j++) da[j] += p[j] * (dp[j] - sum);
    }
}
static inline Node* softmax_rows(Node* a) {
    Node* y = record(a->tape, a->rows, a->cols, softmax_rows_backward, 1, &a, 0);
    for (int i = 0; i < y->rows; i++) softmax_row(y->value + i * y->cols, a->value + i * y->cols, y->cols);
    return y;
}

// Layer normalisation (Ba, Kiros and Hinton 2016): each row x to mean 0, variance 1, then times gain, plus bias (1,n).
// With z = (x - mean) / deviation, dz = dy gain:  dx = (dz - mean(dz) - z mean(dz z)) / deviation, as mean and
// deviation depend on x as well.  dgain = sum over rows of dy z,  dbias = sum of dy.
static inline void layernorm_rows_backward(Node* y) {
    Node *a = y->in[0], *gain = y->in[1], *bias = y->in[2];
    int n = y->cols;
    for (int i = 0; i < y->rows; i++) {
        const float *dy = y->grad + i * n, *z = (float*)y->extra + i * (n + 1);
        float *dx = a->grad + i * n, inverse = z[n], sum = 0, sum_z = 0;
        for (int j = 0; j < n; j++) {
            gain->grad[j] += dy[j] * z[j], bias->grad[j] += dy[j];
            sum += dy[j] * gain->value[j], sum_z += dy[j] * gain->value[j] * z[j];
        }
        for (int j = 0; j < n; j++) dx[j] += (dy[j] * gain->value[j] - (sum + z[j] * sum_z) / (float)n) * inverse;
    }
}
static inline Node* layernorm_rows(Node* a, Node* gain, Node* bias) {
    int n = a->cols;
    insist(size(gain) == (size_t)n && size(bias) == (size_t)n, "layernorm of %d columns", n);
    Node* y = record(a->tape, a->rows, n, layernorm_rows_backward, 3, (Node*[]){a, gain, bias},
                     sizeof(float) * (size_t)a->rows * (size_t)(n + 1)); // z and 1/deviation of each row
    for (int i = 0; i < y->rows; i++) {
        const float* x = a->value + i * n;
        float *z = (float*)y->extra + i * (n + 1), mean = 0, variance = 0;
        for (int j = 0; j < n; j++) mean += x[j] / (float)n;
        for (int j = 0; j < n; j++) variance += (x[j] - mean) * (x[j] - mean) / (float)n;
        z[n] = 1 / sqrtf(variance + 1e-5f);
        for (int j = 0; j < n; j++) z[j] = (x[j] - mean) * z[n];
        for (int j = 0; j < n; j++) y->value[i * n + j] = z[j] * gain->value[j] + bias->value[j];
    }
    return y;
}

// ---- moving rows and columns: each gradient goes back to where its number came from --------------------------------

static inline void concat_columns_backward(Node* y) {
    for (int n = 0, from = 0; n < y->inputs; from += y->in[n++]->cols)
        for (int i = 0; i < y->rows; i++)
            for (int j = 0; j < y->in[n]->cols; j++)
                y->in[n]->grad[i * y->in[n]->cols + j] += y->grad[i * y->cols + from + j];
}
// [a, b, ...]: parts (m,n1), (m,n2) ... beside one another.
static inline Node* concat_columns(int count, Node* const* part) {
    int cols = 0;
    for (int n = 0; n < count; n++) cols += part[n]->cols;
    Node* y = record(part[0]->tape, part[0]->rows, cols, concat_columns_backward, count, part, 0);
    for (int n = 0, from = 0; n < count; from += part[n++]->cols) {
        insist(part[n]->rows == y->rows, "%d rows beside %d", part[n]->rows, y->rows);
        for (int i = 0; i < y->rows; i++)
            memcpy(y->value + i * cols + from, part[n]->value + i * part[n]->cols,
                   sizeof(float) * (size_t)part[n]->cols);
    }
    return y;
}

static inline void concat_rows_backward(Node* y) {
    const float* dy = y->grad;
    for (int n = 0; n < y->inputs; dy += size(y->in[n++]))
        for (size_t i = 0; i < size(y->in[n]); i++) y->in[n]->grad[i] += dy[i];
}
// Parts (m1,n), (m2,n) ... below one another.
static inline Node* concat_rows(int count, Node* const* part) {
    int rows = 0;
    for (int n = 0; n < count; n++) rows += part[n]->rows;
    Node* y = record(part[0]->tape, rows, part[0]->cols, concat_rows_backward, count, part, 0);
    float* to = y->value;
    for (int n = 0; n < count; to += size(part[n++])) {
        insist(part[n]->cols == y->cols, "%d columns below %d", part[n]->cols, y->cols);
        memcpy(to, part[n]->value, sizeof(float) * size(part[n]));
    }
    return y;
}

static inline void slice_columns_backward(Node* y) {
    int from = *(int*)y->extra;
    for (int i = 0; i < y->rows; i++)
        for (int j = 0; j < y->cols; j++) y->in[0]->grad[i * y->in[0]->cols + from + j] += y->grad[i * y->cols + j];
}
// Columns from, from + 1, ... of a, `count` of them.
static inline Node* slice_columns(Node* a, int from, int count) {
    insist(from >= 0 && count > 0 && from + count <= a->cols, "columns %d + %d of %d", from, count, a->cols);
    Node* y = record(a->tape, a->rows, count, slice_columns_backward, 1, &a, sizeof from);
    *(int*)y->extra = from;
    for (int i = 0; i < y->rows; i++)
        memcpy(y->value + i * count, a->value + i * a->cols + from, sizeof(float) * (size_t)count);
    return y;
}

static inline void gather_rows_backward(Node* y) {
    const int* index = (int*)y->extra;
    for (int i = 0; i < y->rows; i++)
        for (int j = 0; j < y->cols; j++) y->in[0]->grad[index[i] * y->cols + j] += y->grad[i * y->cols + j];
}
// Row i of y = row index[i] of a: the embedding of tokens, if a is a table; rows in another order; or some of them.
static inline Node* gather_rows(Node* a, int count, const int* index) {
    Node* y = record(a->tape, count, a->cols, gather_rows_backward, 1, &a, sizeof(int) * (size_t)count);
    for (int i = 0; i < count; i++) {
        insist(index[i] >= 0 && index[i] < a->rows, "row %d of %d", index[i], a->rows);
        ((int*)y->extra)[i] = index[i];
        memcpy(y->value + i * a->cols, a->value + index[i] * a->cols, sizeof(float) * (size_t)a->cols);
    }
    return y;
}

// Rows from, from + 1, ... of a, `count` of them.
static inline Node* slice_rows(Node* a, int from, int count) {
    int* index = (int*)take(a->tape, sizeof(int) * (size_t)count);
    for (int i = 0; i < count; i++) index[i] = from + i;
    return gather_rows(a, count, index);
}

static inline void transpose_backward(Node* y) {
    for (int i = 0; i < y->rows; i++)
        for (int j = 0; j < y->cols; j++) y->in[0]->grad[j * y->rows + i] += y->grad[i * y->cols + j];
}
static inline Node* transpose(Node* a) {
    Node* y = record(a->tape, a->cols, a->rows, transpose_backward, 1, &a, 0);
    for (int i = 0; i < y->rows; i++)
        for (int j = 0; j < y->cols; j++) y->value[i * y->cols + j] = a->value[j * y->rows + i];
    return y;
}

// ---- losses --------------------------------------------------------------------------------------------------------

// The mean of all elements, (1,1).
static inline void mean_of_backward(Node* y) {
    Node* a = y->in[0];
    for (size_t i = 0; i < size(a); i++) a->grad[i] += y->grad[0] / (float)size(a);
}
static inline Node* mean_of(Node* a) {
    Node* y = record(a->tape, 1, 1, mean_of_backward, 1, &a, 0);
    double sum = 0;
    for (size_t i = 0; i < size(a); i++) sum += (double)a->value[i];
    y->value[0] = (float)(sum / (double)size(a));
    return y;
}

// The mean over rows of -log softmax(logits)[target], (1,1); rows with a target below 0 do not count.
// With p the softmax: dlogits = (p - [column is the target]) / rows that count.
typedef struct {
    int counted;
    float* p;
    int* target;
} CrossEntropy;

static inline void cross_entropy_backward(Node* y) {
    const CrossEntropy* e = (CrossEntropy*)y->extra;
    Node* a = y->in[0];
    float share = y->grad[0] / (float)(e->counted > 0 ? e->counted : 1);
    for (int i = 0; i < a->rows; i++) {
        if (e->target[i] < 0) continue;
        for (int j = 0; j < a->cols; j++) a->grad[i * a->cols + j] += share * e->p[i * a->cols + j];
        a->grad[i * a->cols + e->target[i]] -= share;
    }
}
static inline Node* cross_entropy(Node* logits, const int* target) {
    Tape* t = logits->tape;
    int n = logits->cols;
    Node* y = record(t, 1, 1, cross_entropy_backward, 1, &logits, sizeof(CrossEntropy));
    CrossEntropy* e = (CrossEntropy*)y->extra;
    e->counted = 0;
    e->p = (float*)take(t, sizeof(float) * size(logits));
    e->target = (int*)take(t, sizeof(int) * (size_t)logits->rows);
    memcpy(e->target, target, sizeof(int) * (size_t)logits->rows);
    double sum = 0;
    for (int i = 0; i < logits->rows; i++) {
        insist(target[i] < n, "target %d of %d", target[i], n);
        if (target[i] < 0) continue;
        softmax_row(e->p + i * n, logits->value + i * n, n);
        float p = e->p[i * n + target[i]];
        sum -= log((double)(p < 1e-37f ? 1e-37f : p)), e->counted++;
    }
    y->value[0] = e->counted ? (float)(sum / e->counted) : 0;
    return y;
}

#endif

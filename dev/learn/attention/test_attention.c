// test_attention.c: the checks of attention.h.
//
//     test_attention [-v] [NAME]...        only tests with one of these in their names; -v prints every error
//
// Each mechanism is compared with PyTorch (fixtures written by dev/check/attention_reference.py; ATTENTION_FIXTURES
// names another folder), with finite differences, and with what must hold of it. Every array lies between NaNs, or,
// if it is added to, between numbers: what is read beside an array makes a result wrong, what is written is noticed.

#include "attention.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int passed, failed;
static bool verbose;

__attribute__((format(printf, 2, 3))) static bool check(bool condition, const char* format, ...) {
    condition ? passed++ : failed++;
    if (!condition || verbose) {
        va_list args;
        va_start(args, format);
        printf(condition ? "  passed: " : "  FAILED: ");
        vprintf(format, args);
        putchar('\n');
        va_end(args);
    }
    return condition;
}

static void give_up(const char* what, const char* name) {
    fprintf(stderr, "test_attention: %s %s\n", what, name);
    exit(1);
}

// ====================================================================================================================
// Arrays between NaNs

enum { BORDER = 16, MAX_ARRAYS = 4096 };
static struct {
    float *block, border;
    size_t count;
} arrays[MAX_ARRAYS];
static int array_count;

static float* bordered(size_t count, float value, float border) {
    float* block = malloc((count + 2 * BORDER) * sizeof(float));
    if (!block || array_count == MAX_ARRAYS) give_up("no room for", "an array");
    for (size_t i = 0; i < count + 2 * BORDER; i++) block[i] = i < BORDER || i >= count + BORDER ? border : value;
    arrays[array_count].block = block, arrays[array_count].border = border;
    arrays[array_count++].count = count;
    return block + BORDER;
}

static float* fresh(size_t count, float value) { return bordered(count, value, NAN); }

// For what is added to, where a NaN would stay one.
static float* gradient(size_t count) { return bordered(count, 0, 12345); }

static float* copy_of(const float* x, size_t count) {
    float* copy = fresh(count, 0);
    for (size_t i = 0; i < count; i++) copy[i] = x[i];
    return copy;
}

// Ends a test: frees its arrays, after a look at their borders.
static void finish(const char* name) {
    bool whole = true;
    while (array_count) {
        float *block = arrays[--array_count].block, *border = &arrays[array_count].border;
        size_t count = arrays[array_count].count;
        for (size_t i = 0; i < BORDER; i++)
            whole &= !memcmp(&block[i], border, sizeof *border) &&
                     !memcmp(&block[count + BORDER + i], border, sizeof *border);
        free(block);
    }
    check(whole, "%s writes inside its arrays only", name);
}

static uint64_t seed = 1;

// SplitMix64
static uint64_t random_bits(void) {
    uint64_t x = seed += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}
static int random_below(int n) { return (int)(random_bits() >> 33) % n; }
static float* random_array(size_t count) { // uniform, with variance 1
    float* x = fresh(count, 0);
    for (size_t i = 0; i < count; i++) x[i] = ((float)(random_bits() >> 40) / (1 << 24) - 0.5f) * 3.4641016f;
    return x;
}

// |got - want| / |want|, in Euclidean norms; where want is as good as 0, |got - want|.
static double error_of(const float* got, const float* want, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        if (got[i] == want[i]) { // infinities, too
            norm += isfinite(want[i]) ? (double)want[i] * want[i] : 0;
            continue;
        }
        double d = (double)got[i] - want[i];
        difference += d * d;
        norm += (double)want[i] * want[i];
    }
    return sqrt(norm > 1e-12 ? difference / norm : difference);
}

static bool same_bits(const float* x, const float* y, size_t count) { return !memcmp(x, y, count * sizeof(float)); }

static bool all_zero(const float* x, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (x[i] != 0) return false;
    return true;
}

// ====================================================================================================================
// A mechanism with its inputs, run forward and backward

enum { Q, K, V, W, W_Q, W_K, V_A, BETA, BIAS, W_V, W_O, W_P, V_P, INPUTS };
static const char* const input_names[INPUTS] = {"q",    "k",    "v",   "W",   "W_q", "W_k", "v_a",
                                                "beta", "bias", "W_v", "W_o", "W_p", "v_p"};

typedef enum { HEART, HEADS, LOCAL, FLASH, LINEAR, LINEAR_CAUSAL, MECHANISMS } Mechanism;
static const char* const mechanism_names[] = {"attention", "heads", "local", "flash", "linear", "linear_causal"};
static const char* const score_names[] = {"dot", "scaled_dot", "general", "additive", "concat", "cosine", "location"};

typedef struct {
    Mechanism mechanism;
    Sizes size;
    ScoreKind kind;
    int h, heads, D, dout, window; // window: local's D
    Mask mask;
    float *x[INPUTS], *d[INPUTS]; // the inputs that there are, and their gradients
    size_t count[INPUTS];
    float *out, *weights, *dscores, *dout_, *more, *work; // more: lse, sums, kept, or aligned and centers
    size_t out_count, weights_count, work_count;
} Problem;

static HeadSizes head_sizes_of(const Problem* p) { return (HeadSizes){p->size, p->heads, p->D, p->dout}; }
static Score score_of(const Problem* p) {
    return (Score){p->kind, p->h, p->x[W], p->x[W_Q], p->x[W_K], p->x[V_A], p->x[BETA], p->x[BIAS]};
}

// Room for results and gradients. Results begin as NaN, since they are overwritten; gradients as 0: they are added to.
static void make_room(Problem* p) {
    size_t m = (size_t)p->size.m, n = (size_t)p->size.n, heads = p->mechanism == HEADS ? (size_t)p->heads : 1;
    HeadSizes h = head_sizes_of(p);
    p->out_count = m * (size_t)(p->mechanism == HEADS ? p->dout : p->size.dv);
    p->weights_count = heads * m * n;
    p->out = fresh(p->out_count, NAN);
    p->weights = fresh(p->weights_count, NAN);
    p->dscores = fresh(p->weights_count, NAN);
    size_t more = 0, work = score_work(p->size, score_of(p));
    switch (p->mechanism) {
    case HEADS:
        more = heads * head_floats(h), work = head_floats(h);
        break;
    case LOCAL:
        more = m * n + m;
        break;
    case LINEAR:
    case LINEAR_CAUSAL:
        work = linear_work(p->size); // fall through
    case FLASH:
        more = m;
        break;
    default:
        break;
    }
    p->more = fresh(more, NAN), p->work = fresh(p->work_count = work, NAN);
    for (int i = 0; i < INPUTS; i++)
        if (p->x[i]) p->d[i] = gradient(p->count[i]);
}

static void forward(Problem* p) {
    const float *q = p->x[Q], *k = p->x[K], *v = p->x[V];
    Local local = {p->window, (int)p->count[V_P], p->x[W_P], p->x[V_P]};
    switch (p->mechanism) {
    case HEART:
        attention_forward(p->out, p->weights, p->work, p->size, q, k, v, score_of(p), p->mask);
        break;
    case HEADS:
        multi_head_forward(p->out, p->weights, p->more, head_sizes_of(p), q, k, v,
                           (Projections){p->x[W_Q], p->x[W_K], p->x[W_V], p->x[W_O]}, p->x[BIAS], p->mask);
        break;
    case LOCAL: {
        float* centers = p->more + p->size.m * p->size.n;
        local_forward(p->out, p->weights, p->more, centers, p->work, p->size, q, k, v, score_of(p), local);
        break;
    }
    case FLASH:
        flash_forward(p->out, p->more, p->size, q, k, v, p->mask);
        break;
    default:
        linear_forward(p->out, p->more, p->work, p->size, q, k, v, p->mechanism == LINEAR_CAUSAL);
    }
}

// Scratch holds nothing from the forward, nor do dscores hold anything from before.
static void backward(Problem* p) {
    for (size_t i = 0; i < p->work_count; i++) p->work[i] = NAN;
    for (size_t i = 0; i < p->weights_count; i++) p->dscores[i] = NAN;
    const float *q = p->x[Q], *k = p->x[K], *v = p->x[V];
    float *dq = p->d[Q], *dk = p->d[K], *dv = p->d[V];
    ScoreGradient d = {p->d[W], p->d[W_Q], p->d[W_K], p->d[V_A], p->d[BETA]};
    Local local = {p->window, (int)p->count[V_P], p->x[W_P], p->x[V_P]};
    switch (p->mechanism) {
    case HEART:
        attention_backward(dq, dk, dv, d, p->dscores, p->work, p->dout_, p->weights, p->size, q, k, v, score_of(p));
        break;
    case HEADS:
        multi_head_backward(dq, dk, dv, (ProjectionGradients){p->d[W_Q], p->d[W_K], p->d[W_V], p->d[W_O]}, p->dscores,
                            p->work, p->dout_, p->weights, p->more, head_sizes_of(p), q, k, v,
                            (Projections){p->x[W_Q], p->x[W_K], p->x[W_V], p->x[W_O]});
        break;
    case LOCAL:
        local_backward(dq, dk, dv, d, p->d[W_P], p->d[V_P], p->dscores, p->work, p->dout_, p->weights, p->more,
                       p->more + p->size.m * p->size.n, p->size, q, k, v, score_of(p), local);
        break;
    case FLASH:
        flash_backward(dq, dk, dv, p->dout_, p->out, p->more, p->size, q, k, v, p->mask);
        break;
    default:
        linear_backward(dq, dk, dv, p->work, p->dout_, p->out, p->more, p->size, q, k, v,
                        p->mechanism == LINEAR_CAUSAL);
    }
    if (p->x[BIAS]) add_scaled(p->d[BIAS], 1, p->dscores, (int)p->weights_count);
}

static void give(Problem* p, int input, size_t count) { p->x[input] = random_array(p->count[input] = count); }

// A mechanism with random inputs. General, additive, concat and location may have dq and dk differ.
static Problem random_problem(Mechanism mechanism, ScoreKind kind, Sizes size, Mask mask) {
    bool same = mechanism == FLASH || mechanism >= LINEAR || kind == DOT || kind == SCALED_DOT || kind == COSINE;
    if (mechanism == HEADS) same = false, kind = SCALED_DOT;
    if (same) size.dq = size.dk;
    Problem p = {
        .mechanism = mechanism, .size = size, .kind = kind, .h = 5, .heads = 3, .D = 2, .dout = 4, .mask = mask};
    if (kind == LOCATION) p.h = size.n + 2;
    size_t m = (size_t)size.m, n = (size_t)size.n, dq = (size_t)size.dq, dk = (size_t)size.dk, dv = (size_t)size.dv;
    size_t h = (size_t)p.h, heads = (size_t)p.heads, D = (size_t)p.D;
    give(&p, Q, m * dq), give(&p, K, n * dk), give(&p, V, n * dv);
    if (mechanism == HEADS) {
        give(&p, W_Q, heads * dq * D), give(&p, W_K, heads * dk * D), give(&p, W_V, heads * dv * D);
        give(&p, W_O, heads * D * (size_t)p.dout), give(&p, BIAS, heads * m * n);
    } else if (mechanism == HEART || mechanism == LOCAL) {
        if (kind == GENERAL) give(&p, W, dq * dk);
        if (kind == ADDITIVE) give(&p, W_Q, dq * h), give(&p, W_K, dk * h), give(&p, V_A, h);
        if (kind == CONCAT) give(&p, W, (dq + dk) * h), give(&p, V_A, h);
        if (kind == COSINE) give(&p, BETA, 1);
        if (kind == LOCATION) give(&p, W, dq * h);
        give(&p, BIAS, m * n);
    }
    if (mechanism == LOCAL) p.window = 3, give(&p, W_P, dq * 4), give(&p, V_P, 4);
    make_room(&p);
    p.dout_ = random_array(p.out_count);
    return p;
}

// ====================================================================================================================
// Against PyTorch

typedef struct {
    char name[64];
    double error; // of PyTorch's float32
    int dims[3];
    size_t count;
    float* x;
} Tensor;
static Tensor tensors[2048];
static int tensor_count;

static void read_fixtures(void) {
    const char* folder = getenv("ATTENTION_FIXTURES");
    char path[4096], line[256];
    snprintf(path, sizeof path, "%s/attention.txt", folder ? folder : "../../check/fixtures/attention");
    FILE* f = fopen(path, "r");
    if (!f) give_up("cannot open", path);
    while (fgets(line, sizeof line, f)) {
        Tensor* t = &tensors[tensor_count++];
        t->dims[0] = t->dims[1] = t->dims[2] = 1;
        if (tensor_count == 2048 ||
            sscanf(line, "%63s %lf %d %d %d", t->name, &t->error, &t->dims[0], &t->dims[1], &t->dims[2]) < 3)
            give_up("cannot read", path);
        t->count = (size_t)t->dims[0] * (size_t)t->dims[1] * (size_t)t->dims[2];
        t->x = malloc(t->count * sizeof(float));
        for (size_t i = 0; i < t->count; i++)
            if (!t->x || fscanf(f, "%f", &t->x[i]) != 1) give_up("a number is missing in", t->name);
        if (fgetc(f) != '\n') give_up("a number too many in", t->name);
    }
    fclose(f);
}

static const Tensor* find(const char* problem, const char* prefix, const char* name) {
    char full[160];
    snprintf(full, sizeof full, "%s.%s%s", problem, prefix, name);
    for (int i = 0; i < tensor_count; i++)
        if (!strcmp(tensors[i].name, full)) return &tensors[i];
    return NULL;
}

static const Tensor* need(const char* problem, const char* name) {
    const Tensor* t = find(problem, "", name);
    if (!t) give_up("no such tensor in the fixtures:", name);
    return t;
}

// Eight units in the last place, or four times the error of PyTorch's own float32, if that is more; eight times where
// gradients go through tanh: near 1 and -1, where 1 - tanh^2 is almost nothing, PyTorch's is off by up to 3e-8, and
// tanh_quick by 1e-7.
static const double TOLERANCE = 8 * 5.96e-8;
static double times_of(const char* problem) {
    return !strncmp(problem, "additive", 8) || !strncmp(problem, "concat", 6) ? 8 : 4;
}

static void compare(const char* problem, const char* prefix, const char* name, const float* got, size_t count) {
    const Tensor* want = find(problem, prefix, name);
    if (!check(want && want->count == count, "%s: the fixture has %s%s", problem, prefix, name)) return;
    double error = error_of(got, want->x, count);
    check(error <= fmax(TOLERANCE, times_of(problem) * want->error),
          "%s: %s%s differs from PyTorch's by %.2g, allowed %.2g", problem, prefix, name, error,
          fmax(TOLERANCE, times_of(problem) * want->error));
}

static Problem problem_of(const char* name) {
    const Tensor *q = need(name, "q"), *k = need(name, "k"), *v = need(name, "v"), *mask = find(name, "", "mask");
    Problem p = {.size = {q->dims[0], k->dims[0], q->dims[1], k->dims[1], v->dims[1]}};
    for (int m = HEADS; m < MECHANISMS; m++) {
        size_t length = strlen(mechanism_names[m]);
        if (!strncmp(name, mechanism_names[m], length) && (!name[length] || name[length] == '_'))
            p.mechanism = (Mechanism)m;
    }
    for (int kind = 0; kind < SCORES; kind++) // the last that fits: nothing is called like the beginning of another
        if (!strncmp(name, score_names[kind], strlen(score_names[kind]))) p.kind = (ScoreKind)kind;
    for (int i = 0; i < INPUTS; i++) {
        const Tensor* t = find(name, "", input_names[i]);
        if (t) p.x[i] = copy_of(t->x, p.count[i] = t->count);
    }
    if (p.mechanism == HEADS)
        p.heads = need(name, "W_q")->dims[0], p.D = need(name, "W_q")->dims[2], p.dout = need(name, "W_o")->dims[2];
    else if (p.mechanism == LOCAL)
        p.kind = p.x[W] ? GENERAL : DOT, p.window = (int)need(name, "D")->x[0];
    p.h = p.x[V_A] ? (int)p.count[V_A] : p.x[W] ? find(name, "", "W")->dims[1] : 0;
    if (mask && p.mechanism <= FLASH) {
        static uint8_t sees[4096];
        static MaskTable table = {sees, 0};
        for (size_t i = 0; i < mask->count && i < sizeof sees; i++) sees[i] = mask->x[i] != 0;
        table.n = p.size.n;
        p.mask = (Mask){mask_table, &table};
    }
    p.dout_ = copy_of(need(name, "dout")->x, need(name, "dout")->count);
    make_room(&p);
    return p;
}

static void test_pytorch(void) {
    int cases = 0;
    for (int i = 0; i < tensor_count; i++) {
        char* dot = strchr(tensors[i].name, '.');
        if (strcmp(dot, ".q")) continue;
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)(dot - tensors[i].name), tensors[i].name);
        Problem p = problem_of(name);
        size_t mn = (size_t)p.size.m * (size_t)p.size.n;
        forward(&p);
        compare(name, "", "out", p.out, p.out_count);
        if (p.mechanism <= LOCAL) compare(name, "", "weights", p.weights, p.weights_count);
        if (p.mechanism == LOCAL)
            compare(name, "", "aligned", p.more, mn), compare(name, "", "centers", p.more + mn, (size_t)p.size.m);
        if (p.mechanism == FLASH) compare(name, "", "lse", p.more, (size_t)p.size.m);
        backward(&p);
        for (int x = 0; x < INPUTS; x++)
            if (p.x[x]) compare(name, "d", input_names[x], p.d[x], p.count[x]);
        finish(name);
        cases++;
    }
    check(cases >= 45, "the fixtures have %d cases", cases);
}

static void test_positions(void) {
    const Tensor *x = need("rotary", "x"), *table = need("positions", "out");
    float* y = copy_of(x->x, x->count);
    rotary_forward(y, 7, 6, 2);
    compare("rotary", "", "out", y, x->count);
    float* dy = copy_of(need("rotary", "dout")->x, x->count);
    rotary_backward(dy, 7, 6, 2);
    compare("rotary", "d", "x", dy, x->count);
    rotary_backward(y, 7, 6, 2);
    check(error_of(y, x->x, x->count) < TOLERANCE, "turning back undoes turning");
    float* positions = fresh(table->count, NAN);
    sinusoidal_positions(positions, 7, 6);
    compare("positions", "", "out", positions, table->count);

    float *q = random_array(4), *k = random_array(4), *q1 = copy_of(q, 4), *k1 = copy_of(k, 4);
    rotary_forward(q, 1, 4, 9), rotary_forward(k, 1, 4, 5), rotary_forward(q1, 1, 4, 104),
        rotary_forward(k1, 1, 4, 100);
    check(fabsf(inner(q, k, 4) - inner(q1, k1, 4)) < 1e-5f, "rotary: only the distance counts");

    float *bias = fresh(6, NAN), want[6] = {-1, -0.5f, 0, -1.5f, -1, -0.5f};
    alibi(bias, 2, 3, 2, 0.5f);
    check(same_bits(bias, want, 6) || error_of(bias, want, 6) == 0, "alibi: -slope times the distance");
    finish("positions");
}

// ====================================================================================================================
// Against finite differences, with L = sum of out * dout:
// dL/dx = (8 (L(x + e) - L(x - e)) - (L(x + 2e) - L(x - 2e))) / 12e, but for a fourth power of e

static double loss_at(Problem* p, float* x, float value) {
    double sum = 0;
    *x = value;
    forward(p);
    for (size_t i = 0; i < p->out_count; i++) sum += (double)p->out[i] * p->dout_[i];
    return sum;
}

static void compare_with_differences(Problem* p, const char* name) {
    const float e = 0.02f;
    forward(p);
    backward(p);
    for (int i = 0; i < INPUTS; i++) {
        if (!p->x[i]) continue;
        double difference = 0, norm = 0;
        for (size_t c = 0; c < p->count[i]; c++) {
            float *x = &p->x[i][c], at = *x;
            double near = loss_at(p, x, at + e) - loss_at(p, x, at - e);
            double far = loss_at(p, x, at + 2 * e) - loss_at(p, x, at - 2 * e);
            double want = (8 * near - far) / (12 * (double)e), d = p->d[i][c] - want;
            *x = at;
            difference += d * d, norm += want * want;
        }
        double error = sqrt(difference) / (sqrt(norm) + 0.05);
        check(error < 1e-3, "%s, m %d n %d: d%s differs from finite differences by %.2g", name, p->size.m, p->size.n,
              input_names[i], error);
    }
}

static bool every_third_hidden(const void* data, int i, int j) {
    (void)data;
    return i != 1 && (i + 2 * j) % 3 != 0; // query 1 sees nothing
}

static void test_differences(void) {
    int one = 1;
    Mask masks[] = {no_mask, {causal, NULL}, {causal, &one}, {window, &one}, {every_third_hidden, NULL}};
    for (int mechanism = 0; mechanism < MECHANISMS; mechanism++)
        for (int kind = 0; kind < (mechanism == HEART ? SCORES : 1); kind++)
            for (int which = 0; which < 5; which++) {
                if (mechanism >= LINEAR && which) continue; // they have no masks, and local's window moves in steps
                if (mechanism == LOCAL) continue;
                Sizes size = {1 + random_below(5), 1 + random_below(6), 1 + random_below(4), 1 + random_below(4),
                              1 + random_below(4)};
                if (mechanism == LINEAR_CAUSAL) size.n = size.m;
                Problem p = random_problem((Mechanism)mechanism, (ScoreKind)kind, size, masks[which]);
                compare_with_differences(&p, mechanism == HEART ? score_names[kind] : mechanism_names[mechanism]);
                finish("a gradient");
            }
    // A window as wide as the sequence: nothing enters or leaves it when the centre moves.
    for (int kind = 0; kind < LOCATION; kind++) {
        Problem p = random_problem(LOCAL, (ScoreKind)kind, (Sizes){3, 4, 3, 2, 2}, no_mask);
        compare_with_differences(&p, "local");
        finish("a gradient");
    }
}

// ====================================================================================================================
// What must hold

static void test_classic_example(void) {
    float q[] = {10, 5, 10}, k[] = {0, 1, 1, 5, 0, 1, 1, 1, 0, 0, 5, 1}, scores[4], want[] = {15, 60, 15, 35};
    Sizes size = {1, 4, 3, 3, 3};
    score_forward(scores, NULL, size, q, k, (Score){.kind = DOT});
    check(same_bits(scores, want, 4), "the scores are 15, 60, 15, 35");
    float out[3], weights[4], context[] = {5, 0, 1};
    attention_forward(out, weights, NULL, size, q, k, k, (Score){.kind = DOT}, no_mask);
    check(error_of(out, context, 3) < 1e-7, "the context is [5, 0, 1]");
    check(fabs(weights[0] / exp(-45) - 1) < 1e-6, "what is printed as 0 is e^-45");
}

// Softmax does not see what is added to all scores, so these are looked at themselves: each as its formula has it.
static void test_scores(void) {
    for (int kind = 0; kind < SCORES; kind++) {
        Problem p = random_problem(HEART, (ScoreKind)kind, (Sizes){3, 4, 5, 5, 2}, no_mask);
        float *got = fresh(12, NAN), want[12];
        score_forward(got, p.work, p.size, p.x[Q], p.x[K], score_of(&p));
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 4; j++) {
                const float *q = p.x[Q] + i * 5, *k = p.x[K] + j * 5;
                double sum = 0, qq = 0, kk = 0;
                for (int c = 0; c < 5; c++) {
                    qq += q[c] * q[c], kk += k[c] * k[c];
                    if (kind == DOT || kind == SCALED_DOT || kind == COSINE) sum += q[c] * k[c];
                    if (kind == LOCATION) sum += q[c] * p.x[W][c * p.h + j];
                    for (int d = 0; d < 5 && kind == GENERAL; d++) sum += q[c] * p.x[W][c * 5 + d] * k[d];
                }
                if (kind == SCALED_DOT) sum /= sqrt(5);
                if (kind == COSINE) sum *= *p.x[BETA] / sqrt(qq * kk);
                for (int u = 0; u < p.h && (kind == ADDITIVE || kind == CONCAT); u++) {
                    const float* of_q = kind == ADDITIVE ? p.x[W_Q] : p.x[W];
                    const float* of_k = kind == ADDITIVE ? p.x[W_K] : p.x[W] + 5 * p.h;
                    double z = 0;
                    for (int c = 0; c < 5; c++) z += q[c] * of_q[c * p.h + u] + k[c] * of_k[c * p.h + u];
                    sum += p.x[V_A][u] * tanh(z);
                }
                want[i * 4 + j] = (float)sum + p.x[BIAS][i * 4 + j];
            }
        check(error_of(got, want, 12) < TOLERANCE, "%s: the scores differ by %.2g", score_names[kind],
              error_of(got, want, 12));
        finish("scores");
    }
}

// Concat is additive attention with its matrix cut in two, bit for bit.
static void test_concat_is_additive(void) {
    Problem c = random_problem(HEART, CONCAT, (Sizes){4, 5, 3, 2, 3}, no_mask);
    Problem a = c;
    a.kind = ADDITIVE, a.x[W_Q] = c.x[W], a.x[W_K] = c.x[W] + 3 * c.h, a.out = fresh(c.out_count, NAN);
    forward(&c), forward(&a);
    check(same_bits(a.out, c.out, c.out_count), "concat is additive");
    finish("concat");
}

// Without W_q or W_k the queries or keys are projected already: the same numbers, and the gradients of what is given.
static void test_projected(void) {
    for (int which = 1; which < 4; which++) {
        Problem p = random_problem(HEART, ADDITIVE, (Sizes){4, 7, 3, 2, 3}, (Mask){causal, NULL}), given = p;
        int m = p.size.m, n = p.size.n, h = p.h;
        if (which & 1) {
            given.x[Q] = fresh(given.count[Q] = (size_t)(m * h), 0), given.size.dq = h;
            add_ab(given.x[Q], p.x[Q], p.x[W_Q], m, 3, h);
            given.x[W_Q] = given.d[W_Q] = NULL;
        }
        if (which & 2) {
            given.x[K] = fresh(given.count[K] = (size_t)(n * h), 0), given.size.dk = h;
            add_ab(given.x[K], p.x[K], p.x[W_K], n, 2, h);
            given.x[W_K] = given.d[W_K] = NULL;
        }
        make_room(&given);
        forward(&p), forward(&given), backward(&p), backward(&given);
        check(same_bits(p.out, given.out, p.out_count), "projected already: out");
        if (which & 1) { // dq = dQ W_q^T
            float* dq = fresh(p.count[Q], 0);
            add_abt(dq, given.d[Q], p.x[W_Q], m, h, 3);
            check(error_of(dq, p.d[Q], p.count[Q]) < TOLERANCE, "projected already: dq");
        }
        if (which & 2) {
            float* dk = fresh(p.count[K], 0);
            add_abt(dk, given.d[K], p.x[W_K], n, h, 2);
            check(error_of(dk, p.d[K], p.count[K]) < TOLERANCE, "projected already: dk");
        }
        check(same_bits(p.d[V_A], given.d[V_A], p.count[V_A]), "projected already: dv_a");
        finish("projected");
    }
    // Self-attention, projected already, whose gradients collect in one array.
    Problem p = random_problem(HEART, ADDITIVE, (Sizes){6, 6, 5, 5, 5}, no_mask);
    for (int x = K; x <= V; x++) p.x[x] = p.x[Q];
    p.x[W_Q] = p.x[W_K] = NULL;
    forward(&p), backward(&p);
    float* sum = copy_of(p.d[Q], p.count[Q]);
    add_scaled(sum, 1, p.d[K], (int)p.count[K]), add_scaled(sum, 1, p.d[V], (int)p.count[V]);
    p.d[Q] = p.d[K] = p.d[V] = gradient(p.count[Q]);
    backward(&p);
    check(error_of(p.d[Q], sum, p.count[Q]) < TOLERANCE, "projected already: one array for dq, dk and dv");
    finish("projected");
}

static void test_weights(void) {
    for (int kind = 0; kind < SCORES; kind++) {
        Problem p = random_problem(HEART, (ScoreKind)kind, (Sizes){6, 9, 4, 4, 3}, (Mask){every_third_hidden, NULL});
        forward(&p);
        for (int i = 0; i < p.size.m; i++) {
            double sum = 0, smallest = 1;
            for (int j = 0; j < p.size.n; j++) {
                float w = p.weights[i * p.size.n + j];
                sum += w;
                smallest = w < smallest ? w : smallest;
                if (!every_third_hidden(NULL, i, j))
                    check(w == 0, "%s: what is hidden weighs nothing", score_names[kind]);
            }
            check(fabs(sum - (i != 1)) < 1e-6 && smallest >= 0, "%s: weights are positive, their sum 1",
                  score_names[kind]);
        }
        finish("weights");
    }
}

static bool nothing(const void* data, int i, int j) { return (void)data, (void)i, (void)j, false; }

// Queries that see nothing: output 0 and gradients 0, whatever is there.
static void test_blind(void) {
    for (int mechanism = 0; mechanism <= FLASH; mechanism++)
        for (int kind = 0; kind < (mechanism == HEART ? SCORES : 1); kind++) {
            if (mechanism == LOCAL) continue; // always sees something
            Problem p =
                random_problem((Mechanism)mechanism, (ScoreKind)kind, (Sizes){3, 40, 4, 4, 3}, (Mask){nothing, NULL});
            forward(&p);
            check(all_zero(p.out, p.out_count), "%s: sees nothing, gives 0", mechanism_names[mechanism]);
            if (mechanism == FLASH) check(p.more[0] == -INFINITY, "flash: the log of a sum of nothing");
            backward(&p);
            for (int x = 0; x < INPUTS; x++)
                if (p.x[x]) check(all_zero(p.d[x], p.count[x]), "sees nothing, d%s is 0", input_names[x]);
            finish("blind");
        }
}

// Gradients are added to what is there; and self-attention may collect all three in one array.
static void test_accumulation(void) {
    for (int mechanism = 0; mechanism < MECHANISMS; mechanism++)
        for (int kind = 0; kind < (mechanism == HEART ? SCORES : 1); kind++) {
            Problem p = random_problem((Mechanism)mechanism, (ScoreKind)kind, (Sizes){6, 6, 4, 4, 4}, no_mask);
            float *d[INPUTS], *x = p.x[Q], *together = fresh(p.count[Q], 0);
            p.x[K] = p.x[V] = x;
            forward(&p);
            backward(&p);
            memcpy(d, p.d, sizeof d);
            for (int i = 0; i < INPUTS; i++)
                if (d[i]) p.d[i] = fresh(p.count[i], 1);
            backward(&p);
            for (int i = 0; i < INPUTS; i++) {
                if (!d[i]) continue;
                for (size_t c = 0; c < p.count[i]; c++) d[i][c] += 1;
                check(error_of(p.d[i], d[i], p.count[i]) < 1e-6, "%s: d%s is added", mechanism_names[mechanism],
                      input_names[i]);
            }
            p.d[Q] = p.d[K] = p.d[V] = together;
            backward(&p);
            for (size_t c = 0; c < p.count[Q]; c++) d[Q][c] += d[K][c] + d[V][c] - 3;
            check(error_of(together, d[Q], p.count[Q]) < 2e-6, "%s: one array for dq, dk and dv",
                  mechanism_names[mechanism]);
            finish("accumulation");
        }
}

// Queries in another order give outputs in that order; keys with their values in another order change nothing.
static void test_order(void) {
    for (int kind = 0; kind < LOCATION; kind++) {
        Problem p = random_problem(HEART, (ScoreKind)kind, (Sizes){5, 7, 3, 3, 2}, no_mask);
        Problem turned = p;
        turned.x[BIAS] = p.x[BIAS] = NULL;
        turned.x[Q] = fresh(p.count[Q], 0), turned.x[K] = fresh(p.count[K], 0), turned.x[V] = fresh(p.count[V], 0);
        turned.out = fresh(p.out_count, NAN);
        float* want = fresh(p.out_count, NAN);
        forward(&p);
        for (int i = 0; i < 5; i++) {
            memcpy(turned.x[Q] + i * 3, p.x[Q] + (i + 2) % 5 * 3, 3 * sizeof(float));
            memcpy(want + i * 2, p.out + (i + 2) % 5 * 2, 2 * sizeof(float));
        }
        for (int j = 0; j < 7; j++) {
            memcpy(turned.x[K] + j * 3, p.x[K] + (j + 3) % 7 * 3, 3 * sizeof(float));
            memcpy(turned.x[V] + j * 2, p.x[V] + (j + 3) % 7 * 2, 2 * sizeof(float));
        }
        forward(&turned);
        check(error_of(turned.out, want, p.out_count) < TOLERANCE, "%s: order of queries and keys", score_names[kind]);
        finish("order");
    }
}

// Under the causal mask a row does not depend on later keys and values, bit for bit, even if they are NaN.
static void test_causal(void) {
    Mechanism mechanisms[] = {HEART, HEADS, FLASH, LINEAR_CAUSAL};
    for (int which = 0; which < 4; which++) {
        Problem p = random_problem(mechanisms[which], SCALED_DOT, (Sizes){40, 40, 3, 3, 3}, (Mask){causal, NULL});
        forward(&p);
        float* before = copy_of(p.out, p.out_count);
        int width = (int)p.out_count / 40;
        for (int t = 30; t < 40; t++)
            for (int c = 0; c < 3; c++) p.x[K][t * 3 + c] += 1, p.x[V][t * 3 + c] -= 1;
        forward(&p);
        check(same_bits(p.out, before, (size_t)(30 * width)), "%s: the past does not see the future",
              mechanism_names[p.mechanism]);
        check(!same_bits(p.out + 30 * width, before + 30 * width, (size_t)width), "%s: the present sees itself",
              mechanism_names[p.mechanism]);
        finish("causal");
    }
    int two = 2, wrong = 0;
    for (int i = 0; i < 9; i++)
        for (int j = 0; j < 9; j++) {
            wrong += causal(NULL, i, j) != (j <= i) || causal(&two, i, j) != (j <= i + 2);
            wrong += window(&two, i, j) != (abs(i - j) <= 2) || padding(&two, i, j) != (j < 2);
        }
    check(!wrong, "causal, causal after two, window of two, two that count");
}

// Flash and linear attention against the heart, at sizes that the fixtures do not have.
static void test_flash(void) {
    int sizes[] = {1, 31, 32, 33, 64, 97}, width = 20, offset = 5;
    Mask masks[] = {no_mask, {causal, NULL}, {causal, &offset}, {window, &width}, {every_third_hidden, NULL}};
    for (int a = 0; a < 6; a++)
        for (int which = 0; which < 5; which++) {
            Sizes size = {sizes[a], sizes[(a + which) % 6], 1 + random_below(9), 1 + random_below(9),
                          1 + random_below(9)};
            Problem f = random_problem(FLASH, SCALED_DOT, size, masks[which]), p = f;
            p.mechanism = HEART;
            make_room(&p);
            for (size_t i = 0; i < f.count[Q]; i++) f.x[Q][i] *= 4; // far from uniform
            forward(&f), forward(&p), backward(&f), backward(&p);
            check(error_of(f.out, p.out, p.out_count) < 2 * TOLERANCE, "flash %d x %d, mask %d", size.m, size.n, which);
            for (int x = Q; x <= V; x++) {
                double error = error_of(f.d[x], p.d[x], p.count[x]);
                check(error < 2e-5, "flash %d x %d, mask %d: d%s %.2g", size.m, size.n, which, input_names[x], error);
            }
            finish("flash");
        }
}

// Scores of a thousand overflow e^x, but not the softmax; what is NaN stays so, unless it is masked.
static void test_extremes(void) {
    for (int mechanism = 0; mechanism <= FLASH; mechanism += FLASH) {
        Problem p = random_problem((Mechanism)mechanism, DOT, (Sizes){3, 70, 4, 4, 2}, no_mask);
        for (size_t i = 0; i < p.count[Q]; i++) p.x[Q][i] *= 1000;
        forward(&p), backward(&p);
        bool finite = true;
        for (size_t i = 0; i < p.out_count; i++) finite &= isfinite(p.out[i]);
        for (size_t i = 0; i < p.count[K]; i++) finite &= isfinite(p.d[K][i]);
        check(finite, "%s: large scores", mechanism_names[mechanism]);
        for (int i = 0; i < 3; i++) { // as good as the value of the best key
            int best = 0;
            for (int j = 1; j < 70; j++)
                if (inner(p.x[Q] + i * 4, p.x[K] + j * 4, 4) > inner(p.x[Q] + i * 4, p.x[K] + best * 4, 4)) best = j;
            double error = error_of(p.out + (size_t)i * 2, p.x[V] + (size_t)best * 2, 2);
            check(error < 1e-4, "%s: large scores choose one value, to %.2g", mechanism_names[mechanism], error);
        }

        int three = 3;
        p.x[K][5 * 4] = NAN;
        p.mask = (Mask){padding, &three};
        forward(&p);
        for (size_t i = finite = 1; i < p.out_count; i++) finite &= isfinite(p.out[i]);
        check(finite, "%s: a masked NaN is not looked at", mechanism_names[mechanism]);
        p.mask = no_mask;
        forward(&p);
        for (size_t i = 0; i < p.out_count; i++) finite &= !isnan(p.out[i]);
        check(!finite && isnan(p.out[0]) && isnan(p.out[5]), "%s: a NaN stays visible", mechanism_names[mechanism]);
        finish("extremes");
    }
    // What is added to all scores of a row changes nothing, even if it is more than e^x can take.
    for (int mechanism = HEART; mechanism <= HEADS; mechanism++) {
        Problem p = random_problem((Mechanism)mechanism, GENERAL, (Sizes){3, 5, 4, 4, 2}, no_mask);
        forward(&p);
        float* before = copy_of(p.out, p.out_count);
        for (size_t i = 0; i < p.count[BIAS]; i++) p.x[BIAS][i] += i / 5 % 2 ? 256 : -256;
        forward(&p);
        check(error_of(p.out, before, p.out_count) < 1e-4, "%s: shifted scores", mechanism_names[mechanism]);
        finish("extremes");
    }
    // A vector of zeros has no direction: cosine 0, gradient 0.
    Problem p = random_problem(HEART, COSINE, (Sizes){2, 3, 4, 4, 2}, no_mask);
    p.x[BIAS] = NULL;
    zero(p.x[Q], 4);
    forward(&p), backward(&p);
    check(fabsf(p.weights[0] - 1 / 3.0f) < 1e-7f && all_zero(p.d[Q], 4) && !all_zero(p.d[Q] + 4, 4), "cosine with 0");
    p.x[BETA] = NULL, p.d[BETA] = NULL; // means 1
    float *weights = copy_of(p.weights, 6), one = 1;
    forward(&p), backward(&p);
    memcpy(weights, p.weights, 6 * sizeof(float));
    p.x[BETA] = &one;
    forward(&p);
    check(same_bits(weights, p.weights, 6), "cosine without beta");
    finish("extremes");
}

static void test_local(void) {
    Problem p = random_problem(LOCAL, GENERAL, (Sizes){9, 30, 3, 3, 2}, no_mask);
    p.window = 2;
    forward(&p);
    const float* centers = p.more + 9 * 30;
    for (int i = 0; i < 9; i++) {
        double sum = 0;
        check(centers[i] >= 0 && centers[i] <= 29, "local: centre %d is at %g", i, centers[i]);
        for (int j = 0; j < 30; j++) {
            sum += p.weights[i * 30 + j];
            check(fabsf((float)j - centers[i]) <= 2 || p.weights[i * 30 + j] == 0, "local: nothing beyond the window");
        }
        check(sum > 0 && sum <= 1 + 1e-6, "local: the sum of weights is %g", sum);
    }
    // With v_p = 0 the centre is in the middle, here at 4, and keys 2 to 6 are seen.
    p = random_problem(LOCAL, GENERAL, (Sizes){1, 9, 3, 3, 2}, no_mask);
    p.window = 2;
    zero(p.x[V_P], p.count[V_P]);
    forward(&p);
    for (int j = 0; j < 9; j++) check((p.weights[j] > 0) == (j >= 2 && j <= 6), "local: the window's edge, key %d", j);
    finish("local");
}

static const struct {
    const char* name;
    void (*run)(void);
} tests[] = {
    {"pytorch", test_pytorch},
    {"positions", test_positions},
    {"differences", test_differences},
    {"classic_example", test_classic_example},
    {"scores", test_scores},
    {"concat_is_additive", test_concat_is_additive},
    {"projected", test_projected},
    {"weights", test_weights},
    {"blind", test_blind},
    {"accumulation", test_accumulation},
    {"order", test_order},
    {"causal", test_causal},
    {"flash", test_flash},
    {"extremes", test_extremes},
    {"local", test_local},
};

int main(int argc, char** argv) {
    int names = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-v"))
            verbose = true;
        else
            names++;
    }
    read_fixtures();
    for (size_t t = 0; t < sizeof tests / sizeof tests[0]; t++) {
        bool wanted = !names;
        for (int i = 1; i < argc; i++) wanted |= argv[i][0] != '-' && strstr(tests[t].name, argv[i]);
        if (!wanted) continue;
        if (verbose) printf("%s\n", tests[t].name);
        seed = 1 + t; // so that a test alone does what it does among the others
        tests[t].run();
    }
    for (int i = 0; i < tensor_count; i++) free(tensors[i].x);
    printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}

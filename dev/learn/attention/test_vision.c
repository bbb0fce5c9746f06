// test_vision.c: are the operations and the mechanisms of vision.h right?
//
// Windows, pooling and reshaping against their definitions and finite differences; the mechanisms, their gradients and
// a Vision Transformer's maps against PyTorch's, which dev/check/vision_reference.py writes; the pictures against what
// they promise. Ends with "N passed, N failed", and with status 1 if any failed.

#include "check.h"
#include "vision.h"

// ---- operations ----------------------------------------------------------------------------------------------------

typedef Node* Operation(Node* x);

static Node* o_windows(Node* x) { return windows_of(x, (Windows){2, 5, 3, 2, 1}); }
static Node* o_window_of_all(Node* x) { return windows_of(x, (Windows){2, 5, 7, 1, 1}); }
static Node* o_patches(Node* x) { return windows_of(x, (Windows){2, 5, 2, 2, 0}); } // the last row and column are left
static Node* o_reshape(Node* x) { return reshape(x, 25, 6); }
static Node* o_most(Node* x) { return most_of_rows(x, 10); }
static Node* o_mean(Node* x) { return mean_of_rows(x, 10); }
static Node* o_repeat(Node* x) { return repeat_rows(x, 3); }

// All of these are linear where they are, so that a change of one number, however large, gives the gradient exactly;
// and so is the largest, as long as the largest stays the largest.
static void test_operation(const char* name, Operation* operation) {
    Tape* t = tape_new(4);
    Node* x = parameter(t, 2 * 5 * 5, 3, 1);
    Node* y = operation(x);
    float *by = (float*)malloc(sizeof(float) * size(y)), *slopes = (float*)malloc(sizeof(float) * size(x));
    for (size_t i = 0; i < size(y); i++) by[i] = normal(&t->seed);
    backward(multiply(y, constant(t, y->rows, y->cols, by)));
    for (size_t k = 0; k < size(x); k++) {
        double value[2] = {0, 0};
        for (int side = 0; side < 2; side++) {
            float at = x->value[k];
            x->value[k] = at + (side ? 1e-3f : -1e-3f);
            tape_clear(t);
            y = operation(x);
            for (size_t i = 0; i < size(y); i++) value[side] += (double)by[i] * (double)y->value[i];
            x->value[k] = at;
        }
        slopes[k] = (float)((value[1] - value[0]) / 2e-3);
    }
    double error = distance(x->grad, slopes, size(x));
    expect(error < 1e-3, name, error);
    free(by), free(slopes), tape_free(t);
}

static void test_values(void) {
    Tape* t = tape_new(1);
    const float x[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    const float corner[4] = {0, 0, 0, 1}, last[4] = {9, 0, 0, 0};
    Node* y = windows_of(constant(t, 9, 1, x), (Windows){1, 3, 2, 1, 1});
    expect(y->rows == 16 && y->cols == 4, "windows: shape", y->rows);
    expect(!memcmp(y->value, corner, sizeof corner) && !memcmp(y->value + 60, last, sizeof last), "windows: edges", 0);
    y = most_of_rows(constant(t, 9, 1, x), 3);
    expect(y->value[0] == 3 && y->value[1] == 6 && y->value[2] == 9, "the largest of three rows", y->value[0]);
    y = mean_of_rows(constant(t, 9, 1, x), 3);
    expect(fabsf(y->value[0] - 2) < 1e-6f && fabsf(y->value[2] - 8) < 1e-6f, "the mean of three rows", y->value[0]);
    y = repeat_rows(constant(t, 3, 3, x), 2);
    expect(y->rows == 6 && y->value[3] == 1 && y->value[6] == 4, "repeated rows", y->value[3]);
    tape_free(t);
}

static Vit vit;

// ---- what a network begins with ------------------------------------------------------------------------------------

static void expect_deviation(const char* name, const Node* p, double deviation) {
    double squares = 0;
    for (size_t i = 0; i < size(p); i++) squares += (double)p->value[i] * (double)p->value[i] / (double)size(p);
    double allowed = 4 * deviation / sqrt(2 * (double)size(p)); // four times that of the deviation itself
    expect(fabs(sqrt(squares) - deviation) <= allowed, name, sqrt(squares));
}

static void test_beginnings(void) {
    Tape* t = tape_new(3);
    Linear l = linear(t, 300, 200);
    expect_deviation("linear begins with sqrt(2/in)", l.W, sqrt(2.0 / 300));
    expect_deviation("its bias with 0", l.b, 0);
    expect(cbam(t, 4, 2).places.b->value[0] == 2, "CBAM's gates of places begin open", 0);
    vit_new(&vit, t, (Windows){0, 16, 4, 4, 0}, 3, 64, 4, 96);
    expect_deviation("class token", vit.class_token, 0.1);
    expect_deviation("positions", vit.positions, 0.1);
    for (int layer = 0; layer < 2; layer++) {
        const VitLayer* v = &vit.layer[layer];
        expect_deviation("W_q", v->W_q, 0.125), expect_deviation("W_k", v->W_k, 0.125);
        expect_deviation("W_v", v->W_v, 0.125), expect_deviation("W_o", v->W_o, 0.125);
        for (int k = 0; k < 2; k++) expect_deviation("layernorm's bias", v->bias[k], 0);
        for (int c = 0; c < 64; c++) expect(v->gain[0]->value[c] == 1 && v->gain[1]->value[c] == 1, "gain", c);
    }
    tape_free(t);
}

// ---- PyTorch -------------------------------------------------------------------------------------------------------

static void expect_equal(const char* mechanism, const char* tensor, const float* x, int rows, int cols) {
    expect_stored(mechanism, label_of(mechanism, tensor), x, rows, cols, 3e-6);
}

// Each mechanism on the fixture's two pictures of 6 x 6; its parameters are overwritten with the fixture's before.
enum { BATCH = 2, EXTENT = 6, WAIST = 3 };
typedef Node* Mechanism(Node* x, bool make);

static Node* m_channels(Node* x, bool make) {
    static ChannelAttention a;
    if (make) return a = channel_attention(x->tape, x->cols, WAIST), NULL;
    return attend_channels(&a, x, BATCH);
}
static Node* m_places(Node* x, bool make) {
    static SpatialAttention a;
    Node* map;
    if (make) return a = spatial_attention(x->tape, x->cols, WAIST), NULL;
    return attend_places(&a, x, BATCH, EXTENT, &map);
}
static Node* m_both(Node* x, bool make) {
    static Cbam a;
    Node* map;
    if (make) return a = cbam(x->tape, x->cols, WAIST), NULL;
    return attend_both(&a, x, BATCH, EXTENT, &map);
}
static Node* m_non_local(Node* x, bool make) {
    static NonLocal a;
    static float weights[BATCH * EXTENT * EXTENT * EXTENT * EXTENT];
    if (make) return a = non_local(x->tape, x->cols, WAIST), NULL;
    Node* y = attend_non_local(&a, x, BATCH, weights);
    double sum = 0;
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) sum += (double)weights[i];
    expect(fabs(sum - BATCH * EXTENT * EXTENT) < 1e-3, "non_local: weights of a place sum to 1", sum);
    return y;
}
static Node* m_vit(Node* x, bool make) {
    if (make) return vit_new(&vit, x->tape, (Windows){0, EXTENT, 3, 2, 1}, x->cols, 4, 2, 6), NULL;
    return vit_forward(&vit, x, BATCH);
}

static void test_mechanism(const char* name, Mechanism* mechanism) {
    Tape* t = tape_new(1);
    const Stored *s = stored(label_of(name, "x")), *by = stored(label_of(name, "by"));
    Node* x = parameter(t, s->rows, s->cols, 0);
    memcpy(x->value, s->value, sizeof(float) * size(x));
    mechanism(x, true);
    char label[32];
    for (int i = 1; i < t->parameter_count; i++) {
        Node* p = t->parameters[i];
        snprintf(label, sizeof label, "p%d", i - 1), s = stored(label_of(name, label));
        expect(p->rows == s->rows && p->cols == s->cols, name, i);
        memcpy(p->value, s->value, sizeof(float) * size(p));
    }
    Node* y = mechanism(x, false);
    expect_equal(name, "y", y->value, y->rows, y->cols);
    backward(multiply(y, constant(t, y->rows, y->cols, by->value)));
    expect_equal(name, "d.x", x->grad, x->rows, x->cols);
    for (int i = 1; i < t->parameter_count; i++) {
        snprintf(label, sizeof label, "d.p%d", i - 1);
        expect_equal(name, label, t->parameters[i]->grad, t->parameters[i]->rows, t->parameters[i]->cols);
    }
    if (mechanism == m_vit) {
        enum { N = 10 };
        float maps[2][BATCH * N * N], room[2 * N * N];
        for (int kind = 0; kind < 2; kind++)
            for (int b = 0; b < BATCH; b++) vit_rollout(maps[kind] + b * N * N, room, &vit, b, kind == 1);
        expect_equal(name, "rollout", maps[0], BATCH * N, N);
        expect_equal(name, "weighted", maps[1], BATCH * N, N);
    }
    tape_free(t);
}

// ---- pictures ------------------------------------------------------------------------------------------------------

static void test_pictures(void) {
    uint64_t seed = 8, again = 8;
    bool inside = true, apart = true, drawn = true, same = true;
    for (int i = 0; i < 500; i++) {
        Picture p, q;
        draw_picture(&p, 1 + i % 2, &seed), draw_picture(&q, 1 + i % 2, &again);
        same = same && !memcmp(p.pixels, q.pixels, sizeof p.pixels);
        for (int k = 0; k < p.objects; k++) {
            inside = inside && p.row[k] >= 0 && p.row[k] + GLYPH <= SIDE && p.col[k] >= 0 && p.col[k] + GLYPH <= SIDE;
            for (int e = 0; e < GLYPH * GLYPH; e++) { // noise has deviation 0.1, the faintest ink is 0.7
                float at = p.pixels[(p.row[k] + e / GLYPH) * SIDE + p.col[k] + e % GLYPH];
                drawn = drawn && fabsf(at) < (glyph[p.class[k]][e] == '#' ? 2.0f : 0.6f) &&
                        (at > 0.1f || glyph[p.class[k]][e] != '#');
            }
        }
        if (p.objects == 2)
            apart = apart && p.class[0] != p.class[1] && !overlap(p.row[0], p.col[0], GLYPH, p.row[1], p.col[1], GLYPH);
    }
    expect(inside, "objects are inside their pictures", 0);
    expect(apart, "two objects are of different classes, and apart", 0);
    expect(drawn, "an object is its glyph, and no clutter touches it", 0);
    expect(same, "the same seed draws the same pictures", 0);
}

static void test_operations(void) {
    test_operation("windows", o_windows);
    test_operation("a window larger than the picture", o_window_of_all);
    test_operation("patches", o_patches);
    test_operation("reshape", o_reshape);
    test_operation("the largest of rows", o_most);
    test_operation("the mean of rows", o_mean);
    test_operation("repeat", o_repeat);
}

static void test_mechanisms(void) {
    read_fixture("vision");
    test_mechanism("channels", m_channels);
    test_mechanism("places", m_places);
    test_mechanism("both", m_both);
    test_mechanism("non_local", m_non_local);
    test_mechanism("vit", m_vit);
}

static const Test tests[] = {{"values", test_values},
                             {"operations", test_operations},
                             {"pictures", test_pictures},
                             {"beginnings", test_beginnings},
                             {"mechanisms", test_mechanisms}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

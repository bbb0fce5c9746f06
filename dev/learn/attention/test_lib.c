// test_lib.c: does the C ABI refuse what it must, before it touches anything? lib.c itself, so that the sanitizers see
// it, too; what its functions compute is compared in test_attention.py.
//
// Each function once with good arguments, in arrays of just the size that they must have; then with each pointer missing
// and with each size wrong in turn. Ends with "N passed, N failed", and with status 1 if any failed.

#include "check.h"
#include "lib.c"

enum { M = 3, N = 5, DQ = 4, DV = 2, UNITS = 6, HEADS = 2, D = 3, DOUT = 7, ARRAYS = 64 };

static float* arrays[ARRAYS];
static size_t counts[ARRAYS];
static int array_count;

static float* array(size_t count, float value) {
    float* x = (float*)malloc(count * sizeof(float));
    if (!x) abort();
    for (size_t i = 0; i < count; i++) x[i] = value + 0.1f * (float)(i % 7) - 0.3f;
    arrays[array_count] = x, counts[array_count++] = count;
    return x;
}
// For results, which must become numbers.
static float* result(size_t count) { return array(count, NAN); }

static void free_arrays(void) {
    while (array_count) free(arrays[--array_count]);
}

static Sizes sizes;
static HeadSizes head_size;
static Score score;
static ScoreGradient score_gradient;
static MaskChoice choice;
static Projections projections;
static ProjectionGradients projection_gradients;
static Local local;

// Everything good, in new arrays.
static void begin(void) {
    free_arrays();
    sizes = (Sizes){M, N, DQ, DQ, DV};
    head_size = (HeadSizes){.in = sizes, .heads = HEADS, .D = D, .dout = DOUT};
    score = (Score){
        .kind = ADDITIVE, .h = UNITS, .W_q = array(DQ * UNITS, 0), .W_k = array(DQ * UNITS, 0), .v_a = array(UNITS, 1)};
    score_gradient = (ScoreGradient){.W_q = array(DQ * UNITS, 0), .W_k = array(DQ * UNITS, 0), .v_a = array(UNITS, 0)};
    choice = (MaskChoice){.kind = 1};
    projections = (Projections){array(HEADS * DQ * D, 0), array(HEADS * DQ * D, 0), array(HEADS * DV * D, 0),
                                array(HEADS * D * DOUT, 0)};
    projection_gradients = (ProjectionGradients){array(HEADS * DQ * D, 0), array(HEADS * DQ * D, 0),
                                                 array(HEADS * DV * D, 0), array(HEADS * D * DOUT, 0)};
    local = (Local){.D = 1, .h = UNITS, .W_p = array(DQ * UNITS, 0), .v_p = array(UNITS, 0)};
}

// ---- The functions, with their arguments in an array ----------------------------------------------------------------

static int attention(void** a) { return attn_attention(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); }
static int attention_back(void** a) {
    return attn_attention_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}
static int heads(void** a) { return attn_multi_head(a[0], a[1], a[2], a[3], a[4], a[5], a[6], NULL, a[7]); }
static int heads_back(void** a) {
    return attn_multi_head_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], NULL, a[11]);
}
static int locally(void** a) { return attn_local(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9]); }
static int locally_back(void** a) {
    return attn_local_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
                               a[14], a[15], a[16]);
}
static int flash(void** a) { return attn_flash(a[0], a[1], a[2], a[3], a[4], a[5], a[6]); }
static int flash_back(void** a) {
    return attn_flash_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10]);
}
static int linear(void** a) { return attn_linear(a[0], a[1], a[2], a[3], a[4], a[5], 1); }
static int linear_back(void** a) {
    return attn_linear_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], 1);
}

typedef int Call(void** a);
static const char* name;

static void expect_code(int code, int wanted, const char* words, const char* what) {
    char text[400];
    snprintf(text, sizeof text, "%s: %s: '%s'", name, what, code ? attn_message() : "");
    expect(code == wanted && (!code || strstr(attn_message(), words)), text, code);
}

// A good call; then each pointer missing, and each number of `numbers` 0, negative, and so large that a product is too
// large. `results` arrays begin with NaN, and must be written to by the good call and by no other.
static void test_call(const char* name_, Call* call, int count, void** a, int* numbers, int size_count, int results) {
    name = name_;
    for (int i = 0; i < count; i++) {
        void* keep = a[i];
        a[i] = NULL;
        expect_code(call(a), BAD_ARGUMENT, "null pointer", "a null pointer");
        a[i] = keep;
    }
    for (int i = 0; i < size_count; i++) {
        static const int bad[] = {0, -3, INT_MAX};
        for (int b = 0; b < 3; b++) {
            int keep = numbers[i];
            numbers[i] = bad[b];
            expect_code(call(a), BAD_SIZE, "", "a size");
            numbers[i] = keep;
        }
    }
    bool untouched = true, written = true;
    for (int i = 0; i < results; i++) untouched = untouched && isnan(*(float*)a[i]);
    expect_code(call(a), OK, "", "good arguments");
    for (int i = 0; i < array_count; i++)
        for (size_t c = 0; c < counts[i]; c++) written = written && isfinite(arrays[i][c]);
    expect_of(untouched, name, "nothing is written by a call that is refused", 0);
    expect_of(written, name, "all results are numbers", 0);
}

// ---- Tests ----------------------------------------------------------------------------------------------------------

enum { SIZE_COUNT = 5, HEAD_SIZE_COUNT = 8 };
static float* q(void) { return array(M * DQ, 0); }
static float* k(void) { return array(N * DQ, 0); }
static float* v(void) { return array(N * DV, 0); }
static float* pairs(void) { return array(M * N, 0.3f); }

static void test_forward(void) {
    begin();
    test_call("attention", attention, 8,
              (void*[]){result(M * DV), result(M * N), &sizes, q(), k(), v(), &score, &choice}, &sizes.m, SIZE_COUNT,
              2);
    begin();
    test_call("local", locally, 10,
              (void*[]){result(M * DV), result(M * N), result(M * N), result(M), &sizes, q(), k(), v(), &score, &local},
              &sizes.m, SIZE_COUNT, 4);
    begin();
    test_call("heads", heads, 8,
              (void*[]){result(M * DOUT), result(HEADS * M * N), &head_size, q(), k(), v(), &projections, &choice},
              &head_size.in.m, HEAD_SIZE_COUNT, 2);
    begin();
    test_call("flash", flash, 7, (void*[]){result(M * DV), result(M), &sizes, q(), k(), v(), &choice}, &sizes.m,
              SIZE_COUNT, 2);
    begin();
    test_call("linear", linear, 6, (void*[]){result(M * DV), result(M), &sizes, q(), k(), v()}, &sizes.m, SIZE_COUNT,
              2);
    free_arrays();
}

static void test_backward(void) {
    begin();
    test_call("attention_backward", attention_back, 12,
              (void*[]){q(), k(), v(), &score_gradient, result(M * N), array(M * DV, 0), pairs(), &sizes, q(), k(), v(),
                        &score},
              &sizes.m, SIZE_COUNT, 0);
    begin();
    test_call("local_backward", locally_back, 17,
              (void*[]){q(), k(), v(), &score_gradient, array(DQ * UNITS, 0), array(UNITS, 0), result(M * N),
                        array(M * DV, 0), pairs(), pairs(), array(M, 2), &sizes, q(), k(), v(), &score, &local},
              &sizes.m, SIZE_COUNT, 0);
    begin();
    test_call("heads_backward", heads_back, 12,
              (void*[]){q(), k(), v(), &projection_gradients, result(HEADS * M * N), array(M * DOUT, 0), &head_size,
                        q(), k(), v(), &projections, &choice},
              &head_size.in.m, HEAD_SIZE_COUNT, 0);
    begin();
    test_call("flash_backward", flash_back, 11,
              (void*[]){q(), k(), v(), array(M * DV, 0), array(M * DV, 0), array(M, 1), &sizes, q(), k(), v(), &choice},
              &sizes.m, SIZE_COUNT, 0);
    begin();
    test_call("linear_backward", linear_back, 10,
              (void*[]){q(), k(), v(), array(M * DV, 0), array(M * DV, 0), array(M, 2), &sizes, q(), k(), v()},
              &sizes.m, SIZE_COUNT, 0);
    free_arrays();
}

// What is neither a size nor a missing array.
static void test_refused(void) {
    begin();
    void* a[] = {result(M * DV), result(M * N), &sizes, q(), k(), v(), &score, &choice};
    name = "attention";
    sizes.dq = 2, score.kind = DOT;
    expect_code(attention(a), BAD_SIZE, "one size", "q and k of different sizes");
    sizes.dq = DQ;
    for (int kind = -1; kind <= SCORES; kind += SCORES + 1) {
        score.kind = (ScoreKind)kind;
        expect_code(attention(a), BAD_ARGUMENT, "no score number", "a score that there is not");
    }
    static const ScoreKind with_W[] = {GENERAL, CONCAT, LOCATION};
    for (int i = 0; i < 3; i++) {
        score.kind = with_W[i];
        expect_code(attention(a), BAD_ARGUMENT, "W is missing", "no W");
    }
    score.kind = LOCATION, score.W = score.W_q, score.h = N - 1;
    expect_code(attention(a), BAD_SIZE, "fewer than the 5 keys", "too few places");
    score.kind = ADDITIVE, score.h = UNITS, score.v_a = NULL;
    expect_code(attention(a), BAD_ARGUMENT, "v_a is missing", "no v_a");
    score.kind = DOT;
    for (int kind = -1; kind <= 5; kind += 6) {
        choice = (MaskChoice){.kind = kind};
        expect_code(attention(a), BAD_ARGUMENT, "no mask number", "a mask that there is not");
    }
    choice = (MaskChoice){.kind = 2, .argument = -1};
    expect_code(attention(a), BAD_ARGUMENT, "width of -1", "a negative window");
    choice = (MaskChoice){.kind = 4};
    expect_code(attention(a), BAD_ARGUMENT, "mask is missing", "no table");

    begin();
    name = "local";
    void* l[] = {result(M * DV), result(M * N), result(M * N), result(M), &sizes, q(), k(), v(), &score, &local};
    local.D = 0;
    expect_code(locally(l), BAD_ARGUMENT, "at least 1", "a window of 0");
    local.D = INT_MAX;
    expect_code(locally(l), BAD_ARGUMENT, "is the most", "a window that is too large");
    local.D = 1, local.v_p = NULL;
    expect_code(locally(l), BAD_ARGUMENT, "null pointer", "no v_p");

    begin();
    name = "heads";
    void* h[] = {result(M * DOUT), result(HEADS * M * N), &head_size, q(), k(), v(), &projections, &choice};
    projections.W_o = NULL;
    expect_code(heads(h), BAD_ARGUMENT, "null pointer", "no W_o");

    begin();
    name = "attention_backward";
    void* b[] = {q(), k(), v(), &score_gradient, result(M * N), array(M * DV, 0), pairs(), &sizes,
                 q(), k(), v(), &score};
    score_gradient.W_k = NULL;
    expect_code(attention_back(b), BAD_ARGUMENT, "gradient of a parameter", "no dW_k");

    begin();
    name = "linear";
    sizes.m = N + 1;
    expect_code(linear((void*[]){result((N + 1) * DV), result(N + 1), &sizes, q(), k(), v()}), BAD_SIZE, "causal",
                "more queries than keys");
    free_arrays();
}

static const Test tests[] = {{"forward", test_forward}, {"backward", test_backward}, {"refused", test_refused}};

int main(int count, char** arguments) { return RUN_TESTS(tests, count, arguments); }

// test_masks.c: are masks.h's masks what their papers say, and is attention in tiles the same as the definition?
//
// Every mask and every score, at odd sizes: the block mask against each pair of a tile; forward and backward in tiles
// against the definition made of attention.h's parts; gradients against finite differences of the formula in double
// precision; what is skipped is not even looked at. Ends with "N passed, N failed", and with status 1 if any failed.

#include "check.h"
#include "masks.h"

#include <stdio.h>
#include <stdlib.h>

enum { HEADS = 3, REACH = 5, LONGEST = 160 };

static float slopes[HEADS] = {0.2f, 0.05f, 0.01f}, cap = 1.5f, bias[HEADS * (2 * REACH + 1)];
static RelativeBias relative = {bias, REACH};
static int lengths[] = {45, 0}, prefixes[] = {7, 40}, document[2 * LONGEST];
static Documents documents = {document, LONGEST};
static Pattern pattern = {.width = 9, .gap = 4, .globals = 2};

typedef struct {
    const char* name;
    Flex flex;
} Case;
static const Case cases[] = {
    {"no mask", {0}},
    {"causal", {.mask = see_causal}},
    {"padding", {.mask = see_padding, .mask_data = lengths}}, // the second sequence sees nothing
    {"window", {.mask = see_window, .mask_data = &pattern}},
    {"dilated", {.mask = see_dilated, .mask_data = &pattern}},
    {"global", {.mask = see_global, .mask_data = &pattern}},
    {"strided", {.mask = see_strided, .mask_data = &pattern}},
    {"fixed", {.mask = see_fixed, .mask_data = &pattern}},
    {"prefix", {.mask = see_prefix, .mask_data = prefixes}},
    {"documents", {.mask = see_document, .mask_data = &documents}},
    {"alibi", {.mask = see_causal, .score = score_alibi, .score_data = slopes}},
    {"relative", {.score = score_relative, .learn = learn_relative, .score_data = &relative}},
    {"soft cap",
     {.mask = see_window, .mask_data = &pattern, .score = score_soft_cap, .slope = slope_soft_cap, .score_data = &cap}},
};
enum { CASES = sizeof cases / sizeof cases[0] };

// ---- What the masks are, said once more, by hand --------------------------------------------------------------------

// Rows of a causal pattern of 8 positions: what each sees.
static void expect_picture(const char* name, Flex f, int h, const char* const rows[8]) {
    int wrong = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) wrong += f.mask(f.mask_data, 0, h, i, j) != (rows[i][j] == '#');
    expect_of(wrong == 0, name, "pairs that differ from the drawing", wrong);
}

static void test_pictures(void) {
    Pattern three = {.width = 3, .gap = 2, .globals = 1};
    Flex f = {.mask = see_causal, .mask_data = &three};
    expect_picture("causal", f, 0,
                   (const char* const[]){"#.......", "##......", "###.....", "####....", "#####...", "######..",
                                         "#######.", "########"});
    f.mask = see_window;
    expect_picture("window", f, 0,
                   (const char* const[]){"#.......", "##......", "###.....", ".###....", "..###...", "...###..",
                                         "....###.", ".....###"});
    expect_picture("strided, even head", (Flex){.mask = see_strided, .mask_data = &three}, 0,
                   (const char* const[]){"#.......", "##......", "###.....", ".###....", "..###...", "...###..",
                                         "....###.", ".....###"});
    expect_picture("strided, odd head", (Flex){.mask = see_strided, .mask_data = &three}, 1,
                   (const char* const[]){"#.......", ".#......", "..#.....", "#..#....", ".#..#...", "..#..#..",
                                         "#..#..#.", ".#..#..#"});
    Pattern four = {.width = 4, .gap = 2};
    expect_picture("dilated", (Flex){.mask = see_dilated, .mask_data = &four}, 0,
                   (const char* const[]){"#.......", ".#......", "#.#.....", ".#.#....", "#.#.#...", ".#.#.#..",
                                         "#.#.#.#.", ".#.#.#.#"});
    four.width = 3;
    expect_picture("dilated", (Flex){.mask = see_dilated, .mask_data = &four}, 0,
                   (const char* const[]){"#.......", ".#......", "#.#.....", ".#.#....", "#.#.#...", ".#.#.#..",
                                         "..#.#.#.", "...#.#.#"});
    Pattern two_by_three = {.width = 2, .gap = 3};
    expect_picture("dilated", (Flex){.mask = see_dilated, .mask_data = &two_by_three}, 0,
                   (const char* const[]){"#.......", ".#......", "..#.....", "#..#....", ".#..#...", "..#..#..",
                                         "...#..#.", "....#..#"});
    f.mask = see_global;
    expect_picture("global", f, 0,
                   (const char* const[]){"########", "####....", "#####...", "######..", "#.#####.", "#..#####",
                                         "#...####", "#....###"});
    f.mask = see_fixed;
    expect_picture("fixed, even head", f, 0,
                   (const char* const[]){"#.......", "##......", "###.....", "...#....", "...##...", "...###..",
                                         "......#.", "......##"});
    expect_picture("fixed, odd head", f, 1,
                   (const char* const[]){"........", "........", "..#.....", "..#.....", "..#.....", "..#..#..",
                                         "..#..#..", "..#..#.."});
    expect_picture("prefix", (Flex){.mask = see_prefix, .mask_data = (int[]){3}}, 0,
                   (const char* const[]){"###.....", "###.....", "###.....", "####....", "#####...", "######..",
                                         "#######.", "########"});
    expect_picture("padding", (Flex){.mask = see_padding, .mask_data = (int[]){3}}, 0,
                   (const char* const[]){"###.....", "###.....", "###.....", "###.....", "###.....", "###.....",
                                         "###.....", "###....."});
    Documents two = {(int[]){4, 4, 4, 4, 4, 9, 9, 9}, 8};
    expect_picture("documents", (Flex){.mask = see_document, .mask_data = &two}, 0,
                   (const char* const[]){"#.......", "##......", "###.....", "####....", "#####...", ".....#..",
                                         ".....##.", ".....###"});
    Documents pair = {(int[]){1, 1, 2, 3, 3, 3}, 3}; // two sequences of three
    expect_of(see_document(&pair, 0, 0, 1, 0) && !see_document(&pair, 0, 0, 2, 0) && see_document(&pair, 1, 0, 2, 0) &&
                  see_document(&pair, 1, 0, 1, 0),
              "documents", "the second sequence", 1);
}

// Which of the learned numbers a pair of positions is given.
static void test_relative(void) {
    float number[2 * 5] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    RelativeBias two = {number, 2};
    static const int expected[][4] = {{0, 4, 4, 2}, {0, 4, 3, 1}, {0, 4, 0, 0}, {0, 4, 7, 4}, // h, i, j, entry
                                      {1, 4, 4, 7}, {1, 4, 1, 5}, {1, 4, 5, 8}, {1, 4, 6, 9}, {1, 0, 9, 9}};
    for (size_t c = 0; c < sizeof expected / sizeof expected[0]; c++) {
        const int* x = expected[c];
        expect_of(score_relative(&two, 0.5f, 1, x[0], x[1], x[2]) == 0.5f + (float)x[3], "relative", "entry", x[3]);
    }
}

// ---- In tiles, and by definition ------------------------------------------------------------------------------------

typedef struct {
    float *q, *k, *v, *dout, *out, *dq, *dk, *dv, *lse, *weights, *raw, *dscores, dbias[HEADS * (2 * REACH + 1)];
} Arrays;

static float* filled(size_t count, uint64_t* seed) {
    float* x = calloc(count, sizeof(float));
    if (!x) abort();
    for (size_t i = 0; i < count && seed; i++) x[i] = normal(seed);
    return x;
}

static Arrays arrays(BatchSizes z) {
    size_t heads = (size_t)z.B * z.H, q = heads * z.m * z.D, k = heads * z.n * z.D, pairs = heads * z.m * z.n;
    uint64_t seed = 5;
    Arrays a = {.q = filled(q, &seed),
                .k = filled(k, &seed),
                .v = filled(k, &seed),
                .dout = filled(q, &seed),
                .out = filled(q, &seed),
                .dq = filled(q, NULL),
                .dk = filled(k, NULL),
                .dv = filled(k, NULL),
                .lse = filled(heads * z.m, &seed),
                .weights = filled(pairs, &seed),
                .raw = filled(pairs, &seed),
                .dscores = filled((size_t)z.m * z.n, &seed)};
    return a;
}

static void free_arrays(Arrays a) {
    float* all[] = {a.q, a.k, a.v, a.dout, a.out, a.dq, a.dk, a.dv, a.lse, a.weights, a.raw, a.dscores};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
}

// No number of x may differ from y's by more than `limit` times the largest.
static void expect_same(const float* x, const float* y, size_t count, double limit, const char* name,
                        const char* what) {
    double most = 0, size = 1e-20;
    for (size_t i = 0; i < count; i++) {
        if (!(fabsf(x[i] - y[i]) <= (float)most)) most = (double)fabsf(x[i] - y[i]); // NaN stays
        size = fmax(size, (double)fabsf(y[i]));
    }
    expect_of(most <= limit * size, name, what, most / size);
}

static void run_plain(Arrays* a, BatchSizes z, Flex f) {
    flex_plain_forward(a->out, a->weights, a->raw, z, a->q, a->k, a->v, f);
    flex_plain_backward(a->dq, a->dk, a->dv, &(RelativeBias){a->dbias, REACH}, a->dscores, a->dout, a->weights, a->raw,
                        z, a->q, a->k, a->v, f);
}

static void run_tiles(Arrays* a, BatchSizes z, Flex f, BlockMask block) {
    flex_forward(a->out, a->lse, z, a->q, a->k, a->v, f, block);
    flex_backward(a->dq, a->dk, a->dv, &(RelativeBias){a->dbias, REACH}, a->dout, a->out, a->lse, z, a->q, a->k, a->v,
                  f, block);
}

static BlockMask new_block(BatchSizes z, Flex f) {
    BlockMask block = {z.B, z.H, malloc(block_mask_bytes(z.B, z.H, z))};
    if (!block.tile) abort();
    block_mask(block, z, f);
    return block;
}

static void test_tiles(Case c, BatchSizes z) {
    Arrays plain = arrays(z), tiles = arrays(z);
    BlockMask block = new_block(z, c.flex);
    size_t q = (size_t)z.B * z.H * z.m * z.D, k = (size_t)z.B * z.H * z.n * z.D;
    run_plain(&plain, z, c.flex);
    run_tiles(&tiles, z, c.flex, block);
    char name[80];
    snprintf(name, sizeof name, "%s, %d x %d", c.name, z.m, z.n);
    expect_same(tiles.out, plain.out, q, 2e-6, name, "out");
    expect_same(tiles.dq, plain.dq, q, 4e-6, name, "dq");
    expect_same(tiles.dk, plain.dk, k, 4e-6, name, "dk");
    expect_same(tiles.dv, plain.dv, k, 4e-6, name, "dv");
    expect_same(tiles.dbias, plain.dbias, HEADS * (2 * REACH + 1), 2e-5, name, "dbias");
    for (int row = 0; row < z.B * z.H * z.m; row++) { // rows that see nothing
        bool sees = false;
        for (int j = 0; j < z.n; j++)
            sees |= head_mask(&(HeadMask){&c.flex, row / z.m / z.H, row / z.m % z.H}, row % z.m, j);
        if (sees) continue;
        float sum = 0;
        for (int d = 0; d < z.D; d++) sum += fabsf(tiles.out[row * z.D + d]) + fabsf(tiles.dq[row * z.D + d]);
        expect_of(sum == 0 && tiles.lse[row] == -INFINITY, name, "a row that sees nothing", (double)sum);
    }
    free(block.tile), free_arrays(plain), free_arrays(tiles);
}

// ---- Gradients against finite differences ---------------------------------------------------------------------------

// sum of dout out in double precision, from the formula.
static double loss(const Arrays* a, BatchSizes z, Flex f) {
    double total = 0;
    for (int head = 0; head < z.B * z.H; head++)
        for (int i = 0; i < z.m; i++) {
            const float *qi = a->q + (head * z.m + i) * z.D, *d_o = a->dout + (head * z.m + i) * z.D;
            int b = head / z.H, h = head % z.H;
            double sum = 0, weighted = 0;
            for (int j = 0; j < z.n; j++) {
                if (f.mask && !f.mask(f.mask_data, b, h, i, j)) continue;
                const float *kj = a->k + (head * z.n + j) * z.D, *vj = a->v + (head * z.n + j) * z.D;
                double s = 0, along = 0;
                for (int d = 0; d < z.D; d++) s += (double)qi[d] * kj[d] / sqrt(z.D), along += (double)d_o[d] * vj[d];
                if (f.score == score_soft_cap)
                    s = cap * tanh(s / cap);
                else if (f.score) // what is added does not depend on s
                    s += (double)f.score(f.score_data, 0, b, h, i, j);
                sum += exp(s), weighted += exp(s) * along;
            }
            if (sum > 0) total += weighted / sum;
        }
    return total;
}

static void compare_gradient(const char* name, const char* what, float* x, const float* dx, int count, Arrays* a,
                             BatchSizes z, Flex f) {
    double worst = 0, size = 1e-20;
    for (int i = 0; i < count; i++) {
        float keep = x[i], eps = 4e-3f;
        x[i] = keep + eps;
        double high = loss(a, z, f), above = (double)x[i];
        x[i] = keep - eps;
        double slope = (high - loss(a, z, f)) / (above - (double)x[i]);
        x[i] = keep;
        worst = fmax(worst, fabs(slope - (double)dx[i])), size = fmax(size, fabs(slope));
    }
    expect_of(worst / size < 1e-4 || (size < 1e-10 && worst < 1e-10), name, what, worst / size);
}

static void test_gradients(Case c) {
    BatchSizes z = {2, HEADS, 11, 13, 5};
    Arrays a = arrays(z);
    BlockMask block = new_block(z, c.flex);
    run_tiles(&a, z, c.flex, block);
    int q = z.B * z.H * z.m * z.D, k = z.B * z.H * z.n * z.D;
    compare_gradient(c.name, "dq and finite differences", a.q, a.dq, q, &a, z, c.flex);
    compare_gradient(c.name, "dk and finite differences", a.k, a.dk, k, &a, z, c.flex);
    compare_gradient(c.name, "dv and finite differences", a.v, a.dv, k, &a, z, c.flex);
    if (c.flex.learn)
        compare_gradient(c.name, "dbias and finite differences", bias, a.dbias, HEADS * (2 * REACH + 1), &a, z, c.flex);
    free(block.tile), free_arrays(a);
}

// ---- What is skipped ------------------------------------------------------------------------------------------------

// Masks and scores that count how often they are asked.
typedef struct {
    Flex flex;
    long masks, scores;
} Counted;
static bool counted_mask(const void* data, int b, int h, int i, int j) {
    Counted* c = (Counted*)(uintptr_t)data;
    c->masks++;
    return c->flex.mask(c->flex.mask_data, b, h, i, j);
}
static float counted_score(const void* data, float s, int b, int h, int i, int j) {
    (void)b, (void)h, (void)i, (void)j;
    ((Counted*)(uintptr_t)data)->scores++;
    return s;
}

static void test_skipping(Case c) {
    BatchSizes z = {2, HEADS, 70, 131, 4};
    Counted counted = {.flex = c.flex};
    Flex f = {counted_mask, &counted, counted_score, NULL, NULL, &counted};
    BlockMask block = new_block(z, f);
    long pairs[3] = {0};
    expect_of(counted.masks == (long)z.B * z.H * z.m * z.n, c.name, "pairs asked for the block mask",
              (double)counted.masks);
    for (int b = 0; b < z.B; b++)
        for (int h = 0; h < z.H; h++)
            for (int i0 = 0; i0 < z.m; i0 += FLASH_TILE)
                for (int j0 = 0; j0 < z.n; j0 += FLASH_TILE) {
                    bool any = false, all = true;
                    int rows = smaller(FLASH_TILE, z.m - i0), columns = smaller(FLASH_TILE, z.n - j0);
                    for (int i = i0; i < i0 + rows; i++)
                        for (int j = j0; j < j0 + columns; j++) {
                            bool sees = c.flex.mask(c.flex.mask_data, b, h, i, j);
                            any |= sees, all &= sees;
                        }
                    TileKind kind = (TileKind)*tile_at(block, z, b, h, i0, j0);
                    expect_of(kind == (all ? WHOLE : any ? PARTIAL : EMPTY), c.name, "kind of a tile", kind);
                    pairs[kind] += (long)rows * columns;
                }
    Arrays a = arrays(z);
    counted.masks = 0;
    run_tiles(&a, z, f, block); // forward and backward
    expect_of(counted.scores == 2 * (pairs[PARTIAL] + pairs[WHOLE]), c.name, "pairs computed", (double)counted.scores);
    expect_of(counted.masks == 2 * pairs[PARTIAL], c.name, "pairs asked about", (double)counted.masks);
    free(block.tile), free_arrays(a);
}

// A block mask for one sequence and one head serves all, where the mask is the same for all.
static void test_shared(void) {
    BatchSizes z = {2, HEADS, 70, 70, 5}, one = {1, 1, 70, 70, 5};
    Flex f = {.mask = see_causal};
    Arrays a = arrays(z), b = arrays(z);
    BlockMask all = new_block(z, f), shared = new_block(one, f);
    run_tiles(&a, z, f, all), run_tiles(&b, z, f, shared);
    expect_of(!memcmp(a.out, b.out, sizeof(float) * (size_t)(z.B * z.H * z.m * z.D)), "shared", "out", 0);
    expect_of(!memcmp(a.dk, b.dk, sizeof(float) * (size_t)(z.B * z.H * z.n * z.D)), "shared", "dk", 0);
    free(all.tile), free(shared.tile), free_arrays(a), free_arrays(b);
    expect_of(block_mask_bytes(2, 3, (BatchSizes){9, 9, 64, 65, 1}) == 2 * 3 * 2 * 3, "shared", "bytes", 0);
}

// Keys and values that lie in empty tiles may be anything.
static void test_nothing_read(void) {
    int length = 64;
    BatchSizes z = {1, 1, 40, 100, 6};
    Flex f = {.mask = see_padding, .mask_data = &length};
    Arrays a = arrays(z), clean = arrays(z);
    BlockMask block = new_block(z, f);
    for (int i = length * z.D; i < z.n * z.D; i++) a.k[i] = a.v[i] = NAN;
    run_tiles(&a, z, f, block), run_tiles(&clean, z, f, block);
    expect_of(!memcmp(a.out, clean.out, sizeof(float) * (size_t)(z.m * z.D)), "padding", "out does not see NaNs", 0);
    expect_of(!memcmp(a.dq, clean.dq, sizeof(float) * (size_t)(z.m * z.D)), "padding", "dq does not see NaNs", 0);
    free(block.tile), free_arrays(a), free_arrays(clean);
}

static void test_all_tiles(void) {
    static const BatchSizes sizes[] = {
        {1, 1, 1, 1, 1}, {2, HEADS, 33, 70, 7}, {2, HEADS, 64, 64, 8}, {2, HEADS, 5, 129, 3}, {2, HEADS, 130, 31, 16}};
    for (int c = 0; c < CASES; c++)
        for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) test_tiles(cases[c], sizes[s]);
}

static void test_all_gradients(void) {
    for (int c = 0; c < CASES; c++) test_gradients(cases[c]);
}

static void test_all_skipping(void) {
    for (int c = 0; c < CASES; c++)
        if (cases[c].flex.mask) test_skipping(cases[c]);
}

// ---- PyTorch --------------------------------------------------------------------------------------------------------

static void take_floats(float* x, int count, const char* name) {
    memcpy(x, stored(name)->value, sizeof(float) * (size_t)count);
}
static void take_ints(int* x, int count, const char* name) {
    for (int i = 0; i < count; i++) x[i] = (int)stored(name)->value[i];
}

// Every mask and score, in tiles and by definition, with the fixture's patterns, which the cases keep from here on.
static void test_pytorch(void) {
    static const char* const names[CASES] = {"none",  "causal", "padding",   "window", "dilated",  "global",  "strided",
                                             "fixed", "prefix", "documents", "alibi",  "relative", "soft_cap"};
    enum { REAL_HEADS = 2 };
    read_fixture("nodes");
    const Stored *q = stored("masks.q"), *k = stored("masks.k"), *v = stored("masks.v");
    int p[3], n = stored("masks.document")->cols;
    take_ints(p, 3, "masks.pattern"), pattern = (Pattern){p[0], p[1], p[2]};
    take_ints(lengths, 2, "masks.lengths"), take_ints(prefixes, 2, "masks.prefixes");
    for (int i = 0; i < 2 * n; i++) document[i / n * LONGEST + i % n] = (int)stored("masks.document")->value[i];
    take_floats(slopes, REAL_HEADS, "masks.slopes"), take_floats(&cap, 1, "masks.cap");
    take_floats(bias, REAL_HEADS * (2 * REACH + 1), "masks.bias");
    BatchSizes z = {2, REAL_HEADS, q->rows / (2 * REAL_HEADS), n, q->cols};
    for (int tiles = 0; tiles < 2; tiles++)
        for (int c = 0; c < CASES; c++) {
            const char* prefix = names[c];
            char what[64];
            snprintf(what, sizeof what, "%s, %s", cases[c].name, tiles ? "in tiles" : "by definition");
            Arrays a = arrays(z);
            BlockMask block = new_block(z, cases[c].flex);
            memcpy(a.q, q->value, sizeof(float) * (size_t)(q->rows * q->cols));
            memcpy(a.k, k->value, sizeof(float) * (size_t)(k->rows * k->cols));
            memcpy(a.v, v->value, sizeof(float) * (size_t)(v->rows * v->cols));
            take_floats(a.dout, q->rows * q->cols, label_of(prefix, "by.out"));
            if (tiles)
                run_tiles(&a, z, cases[c].flex, block);
            else
                run_plain(&a, z, cases[c].flex);
            expect_stored(what, label_of(prefix, "out"), a.out, q->rows, z.D, 2e-6);
            expect_stored(what, label_of(prefix, "d.q"), a.dq, q->rows, z.D, 4e-6);
            expect_stored(what, label_of(prefix, "d.k"), a.dk, k->rows, z.D, 4e-6);
            expect_stored(what, label_of(prefix, "d.v"), a.dv, k->rows, z.D, 4e-6);
            if (cases[c].flex.learn)
                expect_stored(what, label_of(prefix, "d.bias"), a.dbias, REAL_HEADS, 2 * REACH + 1, 4e-6);
            free(block.tile), free_arrays(a);
        }
}

// Luong's local-m: attention.h's window with a score of its own.
static void test_local_m(void) {
    read_fixture("nodes");
    const Stored *q = stored("local_m.q"), *k = stored("local_m.k"), *v = stored("local_m.v"), *W = stored("local_m.W");
    enum { M = 6, N = 9, DQ = 4, DK = 3, DV = 2 };
    Sizes size = {M, N, DQ, DK, DV};
    Score score = {.kind = GENERAL, .W = W->value};
    int w = 2;
    float out[M * DV], weights[M * N], work[M * DK], dscores[M * N], dq[M * DQ] = {0}, dk[N * DK] = {0};
    float dv[N * DV] = {0}, dW[DQ * DK] = {0};
    attention_forward(out, weights, work, size, q->value, k->value, v->value, score, (Mask){window, &w});
    attention_backward(dq, dk, dv, (ScoreGradient){.W = dW}, dscores, work, stored("local_m.by.out")->value, weights,
                       size, q->value, k->value, v->value, score);
    expect_stored("local-m", "local_m.out", out, M, DV, 2e-6);
    expect_stored("local-m", "local_m.d.q", dq, M, DQ, 4e-6);
    expect_stored("local-m", "local_m.d.k", dk, N, DK, 4e-6);
    expect_stored("local-m", "local_m.d.v", dv, N, DV, 4e-6);
    expect_stored("local-m", "local_m.d.W", dW, DQ, DK, 4e-6);
}

static const Test tests[] = {
    {"pictures", test_pictures},         {"relative", test_relative},     {"tiles", test_all_tiles},
    {"gradients", test_all_gradients},   {"skipping", test_all_skipping}, {"shared", test_shared},
    {"nothing_read", test_nothing_read}, {"local_m", test_local_m},       {"pytorch", test_pytorch}};

int main(int count, char** arguments) {
    uint64_t seed = 3;
    for (int i = 0; i < HEADS * (2 * REACH + 1); i++) bias[i] = normal(&seed);
    for (int i = 0; i < 2 * LONGEST; i++) document[i] = i % LONGEST / 37 + (i >= LONGEST && i % LONGEST > 50);
    return RUN_TESTS(tests, count, arguments);
}

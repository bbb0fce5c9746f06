// 09_masks.c: one routine for every mask and every change of the score.
//
// Who may see whom, and what is done to a score, differs from model to model; each was once a kernel of its own.
// FlexAttention (Dong et al. 2024) takes both as small functions, mask(b,h,i,j) and score(s,b,h,i,j), and finds out by
// itself which tiles of the matrix of weights are empty. masks.h does the same: 12 masks, 3 changes of the score, one
// forward and one backward.
//
// What to look at:
//   1. the masks, drawn as tiles: white is skipped, dark is not masked, what lies between is asked pair by pair
//   2. the table: the pairs that are computed are those of the tiles that are left, counted, and the time follows them
//   3. the sparse patterns of the literature: a mask may leave 3 % of the pairs and all of the tiles
//   4. that all of it is exact: the same as computing every pair and masking it, forward and backward

#include "draw.h"
#include "masks.h"
#include "tape.h"
#include <time.h>

enum { B = 2, H = 2, T = 2048, D = 64, SMALL = 256 };

static int lengths[B] = {1500, 700}, prefixes[B] = {400, 200}, document[B * T];
static Documents documents = {document, T};
static Pattern near = {.width = 128}, gaps = {.width = 128, .gap = 8}, wide_gaps = {.width = 16, .gap = 64};
static Pattern longformer = {.width = 128, .globals = 16}, blocks = {.width = 128, .globals = 8};
static Pattern small_stride = {.width = 45}; // about sqrt(T)

typedef struct {
    const char* name;
    Flex flex;
    double seen, left, whole, time[2]; // shares of all; ms, forward, and with backward
    long computed;                     // pairs, counted
} Row;
static Row masks[] = {
    {.name = "none"},
    {.name = "causal", .flex = {.mask = see_causal}},
    {.name = "padding", .flex = {.mask = see_padding, .mask_data = lengths}},
    {.name = "window of 128", .flex = {.mask = see_window, .mask_data = &near}},
    {.name = "dilated, 128 by 8", .flex = {.mask = see_dilated, .mask_data = &gaps}},
    {.name = "dilated, 16 by 64", .flex = {.mask = see_dilated, .mask_data = &wide_gaps}},
    {.name = "global + window", .flex = {.mask = see_global, .mask_data = &longformer}},
    {.name = "strided by 128", .flex = {.mask = see_strided, .mask_data = &blocks}},
    {.name = "strided by 45", .flex = {.mask = see_strided, .mask_data = &small_stride}},
    {.name = "fixed, 128 and 8", .flex = {.mask = see_fixed, .mask_data = &blocks}},
    {.name = "prefix", .flex = {.mask = see_prefix, .mask_data = prefixes}},
    {.name = "documents", .flex = {.mask = see_document, .mask_data = &documents}},
};
enum { MASKS = sizeof masks / sizeof masks[0] };

static float* room(size_t count, uint64_t* seed) {
    float* x = calloc(count, sizeof(float));
    if (!x) abort();
    for (size_t i = 0; i < count && seed; i++) x[i] = normal(seed);
    return x;
}

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static BlockMask new_block(BatchSizes z, Flex f) {
    BlockMask block = {z.B, z.H, malloc(block_mask_bytes(z.B, z.H, z))};
    if (!block.tile) abort();
    block_mask(block, z, f);
    return block;
}

// ---- 1 and 2. The masks, and what they cost -------------------------------------------------------------------------

// A change of the score that changes nothing, and counts how many there are. It is given its counter as data, which a
// score may only read: hence the cast.
static float counted(const void* data, float s, int b, int h, int i, int j) {
    (void)b, (void)h, (void)i, (void)j;
    ++*(long*)(uintptr_t)data;
    return s;
}

static void measure(Row* row, const float* q, const float* k, const float* v, const float* dout) {
    BatchSizes z = {B, H, T, T, D};
    size_t count = (size_t)B * H * T * D;
    float *out = room(count, NULL), *lse = room((size_t)B * H * T, NULL);
    float *dq = room(count, NULL), *dk = room(count, NULL), *dv = room(count, NULL);
    BlockMask block = new_block(z, row->flex);
    for (size_t t = 0; t < block_mask_bytes(B, H, z); t++)
        row->left += block.tile[t] != EMPTY, row->whole += block.tile[t] == WHOLE;
    row->left /= (double)block_mask_bytes(B, H, z), row->whole /= (double)block_mask_bytes(B, H, z);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int i = 0; i < T; i++)
                for (int j = 0; j < T; j++) row->seen += head_mask(&(HeadMask){&row->flex, b, h}, i, j);
    row->seen /= (double)B * H * T * T;

    Flex counting = row->flex;
    counting.score = counted, counting.score_data = &row->computed;
    flex_forward(out, lse, z, q, k, v, counting, block);
    row->time[0] = row->time[1] = INFINITY;
    for (int repeat = 0; repeat < 2; repeat++) { // the shorter of two: others use this machine, too
        double start = seconds();
        flex_forward(out, lse, z, q, k, v, row->flex, block);
        double between = seconds();
        flex_backward(dq, dk, dv, NULL, dout, out, lse, z, q, k, v, row->flex, block);
        row->time[0] = fmin(row->time[0], 1000 * (between - start));
        row->time[1] = fmin(row->time[1], 1000 * (seconds() - between));
    }
    free(out), free(lse), free(dq), free(dk), free(dv), free(block.tile);
}

// Masks in one picture, each as 16 x 16 squares that are as dark as the cube root of the share of pairs that is seen,
// so that one in a hundred shows. Of the first sequence; of patterns that differ between heads, head 0, and then head
// 1.
static void picture(void) {
    static const struct {
        int row, head;
    } shown[3][4] = {
        {{1, 0}, {2, 0}, {3, 0}, {4, 0}}, {{6, 0}, {7, 0}, {7, 1}, {8, 1}}, {{9, 0}, {9, 1}, {10, 0}, {11, 0}}};
    enum { SIDE = 16, WIDE = 4 * (SIDE + 2) - 2, HIGH = 3 * (SIDE + 1) - 1, STEP = T / SIDE };
    static float x[HIGH * WIDE];
    static const char* empty[WIDE];
    for (int c = 0; c < WIDE; c++) empty[c] = "";
    for (int across = 0; across < 3; across++)
        for (int p = 0; p < 4; p++) {
            HeadMask one = {&masks[shown[across][p].row].flex, 0, shown[across][p].head};
            for (int i = 0; i < T; i++)
                for (int j = 0; j < T; j++)
                    x[(across * (SIDE + 1) + i / STEP) * WIDE + p * (SIDE + 2) + j / STEP] +=
                        (float)head_mask(&one, i, j) / (STEP * STEP);
        }
    for (int c = 0; c < HIGH * WIDE; c++) x[c] = cbrtf(x[c]);
    printf("1. Keys to the right, queries downwards; a square is 128 x 128 pairs:\n");
    printf("   causal, padding, window, dilated by 8 / global + window, strided by 128\n");
    printf("   (heads 0 and 1), strided by 45 (head 1) / fixed (heads 0 and 1), prefix,\n   documents\n");
    draw_heat("09_masks", NULL, x, HIGH, WIDE, empty, empty);
}

static void costs(void) {
    uint64_t seed = 1;
    size_t count = (size_t)B * H * T * D;
    float *q = room(count, &seed), *k = room(count, &seed), *v = room(count, &seed), *dout = room(count, &seed);
    printf("\n2. T = %d, D = %d, %d heads of %d sequences, tiles of %d x %d, one thread\n\n", T, D, H, B, FLASH_TILE,
           FLASH_TILE);
    printf("                    pairs       tiles       multiply-    forward      backward\n");
    printf("                     seen    left   masked   adds 1e6   ms  share     ms  share\n");
    bool as_counted = true;
    double all = (double)B * H * T * T;
    for (int r = 0; r < MASKS; r++) {
        Row* row = &masks[r];
        measure(row, q, k, v, dout);
        as_counted = as_counted && fabs((double)row->computed / all - row->left) < 1e-9;
        printf("%-18s %5.1f %% %5.1f %%  %5.1f %%  %8.0f %5.0f   %4.2f  %5.0f   %4.2f\n", row->name, 100 * row->seen,
               100 * row->left, 100 * (row->left - row->whole), 2e-6 * D * (double)row->computed, row->time[0],
               row->time[0] / masks[0].time[0], row->time[1], row->time[1] / masks[0].time[1]);
    }
    float left[MASKS], time[MASKS];
    for (int r = 0; r < MASKS; r++) {
        left[r] = (float)masks[r].left;
        time[r] = (float)((masks[r].time[0] + masks[r].time[1]) / (masks[0].time[0] + masks[0].time[1]));
    }
    putchar('\n');
    Series points[] = {{"a mask", MASKS, left, time, true},
                       {"time as tiles", 2, (float[]){0, 1}, (float[]){0, 1}, false}};
    draw_curves("09_time", "Forward and backward: time follows the tiles that are left",
                &(Axes){.x = "share of tiles", .y = "share of time", .zero = true}, points, 2);
    claim(as_counted, "the pairs computed are those of the tiles that are left, to the pair, for all %d masks", MASKS);
    claim(masks[3].computed * 10 < masks[0].computed,
          "a window of 128 computes %.1f %% of the pairs, and sees %.1f %%: the rest lies in tiles on its edges",
          100 * masks[3].left, 100 * masks[3].seen);
    claim(masks[4].seen < 0.06 && masks[4].left > 5 * masks[4].seen,
          "a dilated window sees as few pairs, but computes %.0f times more: tiles do not see gaps",
          masks[4].left / masks[4].seen);
    claim(masks[8].left > masks[1].left / 2 && masks[8].seen < 0.02,
          "strides of sqrt(T) = 45 see %.1f %% of the pairs, and compute %.0f %%: odd heads all that 'causal' does",
          100 * masks[8].seen, 100 * masks[8].left);
    free(q), free(k), free(v), free(dout);
}

// ---- 4. Exact -------------------------------------------------------------------------------------------------------

static float difference(const float* x, const float* y, size_t count) {
    float most = 0, size = 0;
    for (size_t i = 0; i < count; i++) most = fmaxf(most, fabsf(x[i] - y[i])), size = fmaxf(size, fabsf(y[i]));
    return most / size;
}

// The largest difference of the output and the three gradients from the definition, which computes every pair.
static float error(Flex f) {
    enum { COUNT = B * H * SMALL * D };
    BatchSizes z = {B, H, SMALL, SMALL, D};
    float *x[12], worst = 0; // q, k, v, dout; in tiles: out, dq, dk, dv; by definition: the same
    uint64_t seed = 2;
    for (int a = 0; a < 12; a++) x[a] = room(COUNT, a < 4 ? &seed : NULL);
    for (int c = 0; c < COUNT; c++) x[0][c] *= 3; // scores that a soft cap changes
    float *lse = room(B * H * SMALL, NULL), *weights = room((size_t)B * H * SMALL * SMALL, NULL);
    float *raw = room((size_t)B * H * SMALL * SMALL, NULL), *dscores = room((size_t)SMALL * SMALL, NULL);
    BlockMask block = new_block(z, f);
    flex_forward(x[4], lse, z, x[0], x[1], x[2], f, block);
    flex_backward(x[5], x[6], x[7], NULL, x[3], x[4], lse, z, x[0], x[1], x[2], f, block);
    flex_plain_forward(x[8], weights, raw, z, x[0], x[1], x[2], f);
    flex_plain_backward(x[9], x[10], x[11], NULL, dscores, x[3], weights, raw, z, x[0], x[1], x[2], f);
    for (int a = 4; a < 8; a++) worst = fmaxf(worst, difference(x[a], x[a + 4], COUNT));
    for (int a = 0; a < 12; a++) free(x[a]);
    free(lse), free(weights), free(raw), free(dscores), free(block.tile);
    return worst;
}

static void exactness(void) {
    static float slopes[H] = {0.0625f, 0.00390625f}, cap = 2, bias[H * 33];
    static RelativeBias relative = {bias, 16};
    uint64_t seed = 3;
    for (int c = 0; c < H * 33; c++) bias[c] = normal(&seed);
    Row scores[] = {
        {.name = "causal, ALiBi", .flex = {.score = score_alibi, .score_data = slopes}},
        {.name = "causal, relative", .flex = {.score = score_relative, .score_data = &relative}},
        {.name = "causal, soft cap", .flex = {.score = score_soft_cap, .slope = slope_soft_cap, .score_data = &cap}}};
    printf("\n4. Largest difference from computing every pair, of out, dq, dk and dv, relative\n   (T = %d)\n", SMALL);
    float worst = 0;
    for (int r = 0; r < MASKS + 3; r++) {
        Row* row = r < MASKS ? &masks[r] : &scores[r - MASKS];
        if (r >= MASKS) row->flex.mask = see_causal;
        float e = error(row->flex);
        printf("   %-18s %.1e%s", row->name, (double)e, r % 2 ? "\n" : "      ");
        worst = fmaxf(worst, e);
    }
    printf("\n\n");
    claim(worst < 2e-6f, "all are exact, to rounding: at most %.1e off", (double)worst);
}

int main(int count, char** arguments) {
    (void)count;
    lesson_begins(arguments[0]);
    for (int i = 0; i < B * T; i++) document[i] = i % T / (i < T ? 300 : 700); // texts of 300 and of 700 words
    picture();
    costs();
    exactness();
    return lesson_ends();
}

// Three changes to try:
//   - Write a mask of your own, say bool see_checkers(...) { return (i + j) % 2 == 0; }, and add a row for it. It sees
//     half of the pairs and leaves all of the tiles: nothing is saved, and each pair is asked about.
//   - Reorder the sequence for it: in the same mask, see j if i and j lie in the same half, i < T/2 and j < T/2 or
//     neither. It is the same mask, with even positions first and then the odd ones, and now half of the tiles go.
//     What can be saved depends on the order in which the positions lie.
//   - In attention.h, make FLASH_TILE 128. The window of 128 now computes twice as many pairs as it sees, the
//     documents 20 % for 12 %, and all patterns of Child et al. cost alike: what is gained by a mask is gained in
//     units of a tile.

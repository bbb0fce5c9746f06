// matmul.c: the matrix multiply of train_gpt.c, grown step by step from three plain loops.
//
//     make cpu_path                                 all steps, timed in turn, as shares of what the machine can do
//     make cpu_path CPU_PATH="--rows 64"            another shape; --help lists the options
//     make cpu_path CPU_PATH=--check                only checks the results, for many odd shapes
//
// To be read from top to bottom, beside the table that it prints. C (M,N) = A (M,K) B (K,N), rows dense: M rows of
// activations, K inputs, N outputs of a linear layer. Each step is a function that computes it, below a text that says
// what held up the last one, with figures for 256 x 768 x 3072, the MLP's first layer in GPT-2 124M. There A has 0.8
// MB, B 9.4 MB and C 3.1 MB, and M*N*K is 604 million multiply-adds. Figures of the processor are those of an AMD Zen 5:
// a core starts two fused multiply-adds (FMA) of 16 floats a cycle, each done 4 cycles later, loads two such vectors a
// cycle from its first-level cache (L1, 48 KB) and stores one. L2 has 1 MB, L3, shared, 32 MB. Other processors differ
// in the numbers, hardly in the order of the steps.
//
// The last steps are no copies: this file includes train_gpt.c, and calls its matmul().

#define NO_MAIN
#include "../../../train_gpt.c"

static float* room; // (K,N), for a step's copy of B

// ====================================================================================================================
// Step 1: the definition
//
// C(i,j) is the dot product of a row of A and a column of B: three loops, one multiply-add inside.
//
// What limits it is memory. Going down a column of B, each number is N floats (12,288 bytes) behind the last, so each
// load brings in a cache line of 64 bytes and uses 4. The other 15 floats belong to the next columns, and are gone
// before their turn: L1 has room for a column's 768 lines, but not at
// that distance (step 4 says why). Nearly every multiply-add waits for L2 or L3.

static void definition(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a[i * K + k] * b[k * N + j];
            c[i * N + j] = sum;
        }
}

// ====================================================================================================================
// Step 2: dense in memory
//
// B is copied once, transposed, so that both factors of a dot product are read along rows, 16 numbers a cache line.
// That costs K*N moves against M*N*K multiply-adds, a 256th here.
//
// Now the loads come quickly, and the sum is in the way: each addition needs the result of the one before, which takes
// 2 to 4 cycles, while the core could have begun 64 to 128 multiply-adds in that time. The compiler may not cut the sum
// into 16 partial ones to use vectors: floating-point addition is not associative, and the bits would change.

static void dense(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    for (size_t j = 0; j < N; j++)
        for (size_t k = 0; k < K; k++) room[j * K + k] = b[k * N + j];
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a[i * K + k] * room[j * K + k];
            c[i * N + j] = sum;
        }
}

// ====================================================================================================================
// Step 3: many sums at once
//
// With j innermost, a row of C grows by multiples of B's rows. Neighbouring j are different sums that do not wait for
// each other, and lie side by side in memory: the compiler takes 16 at a time without changing a bit. No transposed copy
// is needed, since B is read along its rows as it is.
//
// But each FMA of 16 now loads a vector of B, loads one of C and stores it: 3 accesses. With one store a cycle, half the
// peak is out of reach even if all were in L1. It is not: only the row of C is (12 KB). All of B, 9.4 MB, comes from L3
// for each of the 256 rows, 2.4 GB in total, and each of its numbers is used once each time.

// Columns from `first` on.
static void columns_from(size_t first, float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    for (size_t i = 0; i < M; i++) {
        float* __restrict__ row = c + i * N;
        for (size_t j = first; j < N; j++) row[j] = 0;
        for (size_t k = 0; k < K; k++)
            for (size_t j = first; j < N; j++) row[j] += a[i * K + k] * b[k * N + j];
    }
}

static void many_sums(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    columns_from(0, c, a, b, M, N, K);
}

// ====================================================================================================================
// Step 4: sums in registers, a block of B in L1
//
// A row of C is cut into strips of 8 vectors, few enough to stay in registers while k runs: C is no longer loaded and
// stored for each FMA. Why 8: two FMAs start in each of the 4 cycles that one takes, so fewer sums would wait for one
// another. An FMA now costs one load of B and an eighth of a load of A, a number that is spread over a vector: 9/8. With
// two loads a cycle, that is 16/9 FMAs, 89% of the peak. And k is cut too: 64 rows of B's strip, 32 KB, should stay in
// L1 while all rows of A use them. Then a number of B comes from far away once, and from L1 256 times. The price: sums
// leave the registers every 64 steps of k, so C goes back and forth 12 times, 75 MB in all.
//
// It gains little, because the block is not dense: its rows are 12,288 bytes apart. L1 has 64 places for lines with 12
// lines each, chosen by the address modulo 4,096, and all rows begin at the same one: the block shares 8 places, with
// room for 12 of its 64 rows. It comes from L2 each time. The proof: with rows 512 bytes longer (--out 3200), which
// spread over all places, this step is several times as fast, though it has more to do.

enum { VECTORS = 8, STRIP_WIDTH = VECTORS * LANES, STRIP_DEPTH = 64 };

// c (STRIP_WIDTH) = c or 0, plus a (depth) times b (depth,STRIP_WIDTH), whose rows are `width` apart.
static inline void strip(float* c, bool accumulate, const float* a, const float* b, size_t width, size_t depth) {
    vec sum[VECTORS] = {{0}};
    if (accumulate) memcpy(sum, c, sizeof sum);
    for (size_t k = 0; k < depth; k++)
#pragma GCC unroll 8
        for (size_t v = 0; v < VECTORS; v++) {
            vec x;
            memcpy(&x, b + k * width + v * LANES, sizeof x);
            sum[v] += a[k] * x;
        }
    memcpy(c, sum, sizeof sum);
}

static void in_registers(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    size_t whole = N / STRIP_WIDTH * STRIP_WIDTH;
    for (size_t j = 0; j < whole; j += STRIP_WIDTH)
        for (size_t k = 0; k == 0 || k < K; k += STRIP_DEPTH)
            for (size_t i = 0; i < M; i++)
                strip(c + i * N + j, k > 0, a + i * K + k, b + k * N + j, N, min_size(STRIP_DEPTH, K - k));
    columns_from(whole, c, a, b, M, N, K);
}

// ====================================================================================================================
// Step 5: a packed block
//
// The same, but the block is first copied into dense memory, as B was in step 2. That is 2.4 million moves, 9.4 MB, and
// then every load of B does come from L1.
//
// Of the 89% that the loads allow, C's traffic takes some, and some goes to filling and draining chains of sums that are
// only 64 long. To go on, there must be less to load for each FMA.

static void packed_block(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    float block[STRIP_DEPTH * STRIP_WIDTH] __attribute__((aligned(64)));
    size_t whole = N / STRIP_WIDTH * STRIP_WIDTH;
    for (size_t j = 0; j < whole; j += STRIP_WIDTH)
        for (size_t k0 = 0; k0 == 0 || k0 < K; k0 += STRIP_DEPTH) {
            size_t depth = min_size(STRIP_DEPTH, K - k0);
            for (size_t k = 0; k < depth; k++)
                memcpy(block + k * STRIP_WIDTH, b + (k0 + k) * N + j, STRIP_WIDTH * sizeof(float));
            for (size_t i = 0; i < M; i++) strip(c + i * N + j, k0 > 0, a + i * K + k0, block, STRIP_WIDTH, depth);
        }
    columns_from(whole, c, a, b, M, N, K);
}

// ====================================================================================================================
// Step 6: a tile of C in registers
//
// A strip uses a vector of B for one row of A. A tile of MR rows by 2 vectors uses it for MR: see kernel() in
// train_gpt.c. With 8 rows, a step of k loads 2 vectors of B and 8 numbers of A for 16 FMAs: 10/16 of a load for each,
// not 9/8. The loads no longer count, and a panel of B need not even be in L1: 128 bytes in 8 cycles, L2 can do. So
// blocks may be KC = 768 deep, and C is written once.
//
// Both factors are packed, in the order in which the kernel reads them. For A that gains little here; but packing takes
// any strides, so the transposed products of the backward pass get the same speed. A block of A (MC by KC, 384 KB) stays
// in L2 while the panels of B (COLUMNS by KC in all, 4.7 MB) come from L3, each used for MC rows.
//
// What limits it now is arithmetic, on one core. The rest is packing and storing the tiles.
//
// Step 7: threads
//
// The same function, with more than one thread: each takes blocks of MC rows, and packs its A itself.
//
// It does not quite run twice as fast on two cores. B is packed by one thread while all others wait, 9.4 MB read and
// written for every 604 million multiply-adds; and with 256 rows there are 2 blocks, with 64 rows only one.

enum { COLUMNS = 1536 };

static void pack_a(float* out, Matrix a, size_t rows, size_t depth) { pack(out, a, rows, MR, depth); }

static void pack_b(float* out, Matrix b, size_t columns, size_t depth) {
    Matrix bt = {b.p, b.column, b.row}; // panels run along its columns
    pack(out, bt, columns, NR, depth);
}

static void tiles(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    float* packed_b = workspace((COLUMNS + (size_t)omp_get_max_threads() * MC) * KC);
    float* packed_a = packed_b + COLUMNS * KC;
    for (size_t j = 0; j < N; j += COLUMNS)
        for (size_t k = 0; k == 0 || k < K; k += KC) {
            size_t columns = min_size(COLUMNS, N - j), depth = min_size(KC, K - k);
            pack_b(packed_b, block_at(matrix(b, N), k, j), columns, depth);
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < M; i += MC) {
                float *block = packed_a + (size_t)omp_get_thread_num() * MC * KC, *at = c + i * N + j;
                size_t rows = min_size(MC, M - i);
                pack_a(block, block_at(matrix(a, K), i, k), rows, depth);
                multiply_packed(at, N, block, packed_b, NULL, k > 0 ? at : NULL, rows, columns, depth);
            }
        }
}

// ====================================================================================================================
// Step 8: train_gpt.c's
//
// The factor with fewer lines, here A, is packed whole, by all threads. The other is packed in parts, NC columns of B, by
// the thread that then multiplies them with all of A: so the weights come from memory once, into the cache of the core
// that needs them, and no thread waits for another to pack. Parts are small enough for all threads to have some, and
// even, so that the last is no sliver; where there are too few, the whole is divided, too. The order of every sum depends
// on K alone, so the bits are the same for any number of threads. While the kernel sums, the tile's place in C is fetched
// from memory; bias and addition happen as tiles are stored. A single row, in generation, goes its own way: B is used
// once, there is nothing to reuse, and memory alone decides.

static void train_gpt_s(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    matmul(c, matrix(a, K), matrix(b, N), NULL, NULL, M, N, K);
}

// ====================================================================================================================
// Step 9: rounded to bfloat16
//
// With --precision bf16 both factors are rounded to 8 bits as they are packed, and the same kernel multiplies them.
// Nothing is gained: there are as many multiply-adds, and the rounding costs a pass over the panels. The error is no
// longer the sums', it is the factors': up to 2^-8 of each.
//
// Step 10: two products an instruction
//
// On a processor that has AVX512-BF16 (or, on Arm, BFDOT) the panels hold pairs of bfloat16s, half as many bytes, and one
// instruction adds two products to each of its 16 (or 4) sums: half as many instructions. Whether that is faster is up to
// the processor. The Xeon on which this was measured starts one every other cycle, and two multiply-adds every cycle: so its
// peak is half of float32's, and train_gpt.c takes step 9 on Intel's processors.

static void multiply_rounded(PairKernel* by, float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    bf16 = true, pair_kernel = by;
    matmul(c, matrix(a, K), matrix(b, N), NULL, NULL, M, N, K);
    bf16 = false, pair_kernel = NULL;
}

static void rounded(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    multiply_rounded(NULL, c, a, b, M, N, K);
}

static void in_pairs(float* c, const float* a, const float* b, size_t M, size_t N, size_t K) {
    multiply_rounded(find_pair_kernel(false), c, a, b, M, N, K);
}

static const struct {
    const char* name;
    void (*multiply)(float* c, const float* a, const float* b, size_t M, size_t N, size_t K);
    bool threads; // all, not just one
    bool bf16;
} steps[] = {
    {"1 the definition", definition, false, false},
    {"2 dense in memory", dense, false, false},
    {"3 many sums at once", many_sums, false, false},
    {"4 sums in registers, blocks", in_registers, false, false},
    {"5 a packed block of B", packed_block, false, false},
    {"6 a tile of C in registers", tiles, false, false},
    {"7 threads", tiles, true, false},
    {"8 train_gpt.c's", train_gpt_s, true, false},
    {"9 rounded to bfloat16", rounded, true, true},
    {"10 two products at a time", in_pairs, true, true},
};
enum { STEPS = sizeof steps / sizeof *steps };

// The last step is for processors that have the instruction.
static int steps_here(void) { return find_pair_kernel(false) && !PLAIN ? STEPS : STEPS - 1; }

// ====================================================================================================================
// Checking
//
// Each of K additions is rounded by up to 2^-24 of the partial sum so far; in the worst case an error of K 2^-24 times
// the products' magnitudes added up. But with random signs partial sums grow like sqrt(k), and their roundings, random
// too, add up like the root of the sum of their squares: like K, as the magnitudes do. So one bound serves every K,
// four units in the last place (steps at their worst reach about 3e-7 over 10^6 results):
//
//     |c(i,j) - float64's| <= 4 * 2^-23 * sum over k of |a(i,k) b(k,j)|        for each i and j.

//
// A factor that is rounded to bfloat16 is off by 2^-8 of itself at most, and a product by twice that.

#define BOUND 4.8e-7

static double bound_of(int step) { return BOUND + (steps[step].bf16 ? 0x1.01p-7 : 0); }

// What is multiplied, and what must come out.
typedef struct {
    size_t M, N, K;
    float *a, *b, *c;
    double *product, *magnitude;
} Problem;

// n numbers with NaN before and behind, which show where somebody reads or writes them.
enum { GUARD = 16 };
static float* guarded(size_t n) {
    float* p = (float*)allocate(n + 2 * GUARD, sizeof(float), "the matrices");
    for (size_t i = 0; i < n + 2 * GUARD; i++) p[i] = NAN;
    return p + GUARD;
}

static Problem create_problem(size_t M, size_t N, size_t K) {
    Problem p = {M, N, K, guarded(M * K), guarded(K * N), guarded(M * N), NULL, NULL};
    p.product = (double*)allocate(M * N, sizeof(double), "the product in float64");
    p.magnitude = (double*)allocate(M * N, sizeof(double), "the product in float64");
    room = guarded(K * N);
    for (size_t i = 0; i < M * K; i++) p.a[i] = random_normal(1, i);
    for (size_t i = 0; i < K * N; i++) p.b[i] = random_normal(2, i);
    for (size_t i = 0; i < M; i++)
        for (size_t k = 0; k < K; k++)
            for (size_t j = 0; j < N; j++) {
                double x = (double)p.a[i * K + k] * (double)p.b[k * N + j];
                p.product[i * N + j] += x;
                p.magnitude[i * N + j] += fabs(x);
            }
    return p;
}

static void destroy_problem(Problem* p) {
    free(p->a - GUARD);
    free(p->b - GUARD);
    free(p->c - GUARD);
    free(room - GUARD);
    free(p->product);
    free(p->magnitude);
}

// The step's largest error, as a share of the magnitude; infinity where a number is missing or written outside C.
static double largest_error(int step, Problem* p) {
    size_t n = p->M * p->N;
    for (size_t i = 0; i < n + 2 * GUARD; i++) (p->c - GUARD)[i] = NAN;
    steps[step].multiply(p->c, p->a, p->b, p->M, p->N, p->K);
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        double error = fabs((double)p->c[i] - p->product[i]), share = error > 0 ? error / p->magnitude[i] : error;
        if (!(share <= largest)) largest = isnan(share) ? INFINITY : share;
    }
    for (size_t i = 0; i < GUARD; i++)
        if (!isnan(p->c[n + i]) || !isnan(p->c[(ptrdiff_t)i - GUARD])) largest = INFINITY;
    return largest;
}

static int threads;

static void use_threads(int step) { omp_set_num_threads(steps[step].threads ? threads : 1); }

// Sizes around those of vectors, tiles, strips and blocks, on one thread and on several.
static bool check(void) {
    static const size_t sizes[] = {0, 1, 2, 7, 65, 130}, rows[] = {0, 1, 7, 65, 130}, more[] = {COLUMNS + 17, KC + 33};
    int passed = 0, failed = 0;
    threads = 3;
    for (size_t m = 0; m < 5; m++)
        for (size_t n = 0; n < 7; n++)
            for (size_t k = 0; k < 7; k++) {
                Problem p = create_problem(rows[m], n < 6 ? sizes[n] : more[0], k < 6 ? sizes[k] : more[1]);
                for (int s = 0; s < steps_here(); s++) {
                    use_threads(s);
                    double error = largest_error(s, &p);
                    bool right = error <= bound_of(s);
                    *(right ? &passed : &failed) += 1;
                    if (!right) printf("%-28s %zu x %zu x %zu: error %.1e\n", steps[s].name, p.M, p.K, p.N, error);
                }
                destroy_problem(&p);
            }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0;
}

// ====================================================================================================================
// Timing
//
// In rounds, in which all steps and the machine's peak take turns: other programs disturb some rounds, rarely most. The
// table has medians, and holds them against the best peak of all rounds, which nothing can exceed.

enum { MAX_ROUNDS = 100 };
#define LEAST 0.02 // seconds, of one step in one round

static double median(double* x, size_t n) {
    for (size_t i = 1; i < n; i++)
        for (size_t j = i; j > 0 && x[j] < x[j - 1]; j--) {
            double larger = x[j - 1];
            x[j - 1] = x[j];
            x[j] = larger;
        }
    return (x[(n - 1) / 2] + x[n / 2]) / 2;
}

static double time_of(int step, Problem* p) {
    double start = seconds(), now;
    int calls = 0;
    do {
        steps[step].multiply(p->c, p->a, p->b, p->M, p->N, p->K);
        calls++;
        now = seconds();
    } while (now - start < LEAST);
    return (now - start) / calls;
}

static double peak_of(int count, PairKernel* by) {
    omp_set_num_threads(count);
    pair_kernel = by;
    double peak = cpu_peak();
    pair_kernel = NULL;
    return peak;
}

static bool measure(size_t M, size_t N, size_t K, size_t rounds) {
    static double times[STEPS][MAX_ROUNDS], errors[STEPS], peak[2], pairs; // of one thread, of all; of all in pairs
    PairKernel* by = find_pair_kernel(false);
    Problem p = create_problem(M, N, K);
    for (int s = 0; s < steps_here(); s++) {
        use_threads(s);
        errors[s] = largest_error(s, &p);
    }
    for (size_t round = 0; round < rounds; round++) {
        peak[false] = fmax(peak[false], peak_of(1, NULL));
        peak[true] = fmax(peak[true], peak_of(threads, NULL));
        if (by) pairs = fmax(pairs, peak_of(threads, by));
        for (int s = 0; s < steps_here(); s++) {
            use_threads(s);
            times[s][round] = time_of(s, &p);
        }
    }
    destroy_problem(&p);
    printf("C (%zu,%zu) = A (%zu,%zu) B (%zu,%zu), float32, medians of %ld rounds\n", M, N, M, K, K, N, rounds);
    printf("peak: %.0f GFLOP/s on 1 thread, %.0f on %d", peak[false] / 1e9, peak[true] / 1e9, threads);
    if (by) printf("; %.0f by %s", pairs / 1e9, multiplies_bf16(by));
    puts("\n");
    printf("%-28s %7s %10s %8s %8s %10s %10s %8s\n", "step", "threads", "ms", "GFLOP/s", "of peak", "x the last",
           "x the 1st", "error");
    bool right = true;
    double first = 0, last = 0;
    for (int s = 0; s < steps_here(); s++) {
        double most = s == STEPS - 1 ? pairs : peak[steps[s].threads];
        double time = median(times[s], rounds), rate = 2.0 * (double)(M * N * K) / time;
        if (s == 0) first = last = time;
        printf("%-28s %7d %10.3f %8.1f %7.1f%% %10.2f %10.1f %8.1e%s\n", steps[s].name, steps[s].threads ? threads : 1,
               1e3 * time, rate / 1e9, 100 * rate / most, last / time, first / time, errors[s],
               errors[s] <= bound_of(s) ? "" : " WRONG");
        right = right && errors[s] <= bound_of(s);
        last = time;
    }
    puts("\nof peak: of as many threads as the step has, and of its instructions. error: the largest |c - float64's| / "
         "sum of |a b|.");
    return right;
}

static struct {
    size_t rows, in, out, rounds;
    bool check, help;
} want;

// clang-format off
static Option choices[] = {
    {"", "--rows", "N", "256", "rows of A and C (M)", WHOLE(&want.rows, 1, 1e5, 0)},
    {"", "--in", "N", "768", "columns of A, rows of B (K)", WHOLE(&want.in, 1, 1e5, 0)},
    {"", "--out", "N", "3072", "columns of B and C (N)", WHOLE(&want.out, 1, 1e5, 0)},
    {"", "--rounds", "N", "5", "in which all steps take turns", WHOLE(&want.rounds, 1, MAX_ROUNDS, 0)},
    {"", "--check", NULL, NULL, "check the steps at many odd shapes, and time nothing", FLAG(&want.check)},
    {"", "--help", NULL, NULL, "this text", FLAG(&want.help)},
};
// clang-format on
enum { CHOICES = sizeof choices / sizeof *choices };

static void help(void) {
    puts("cpu_path: the matrix multiply, step by step.\n");
    for (int i = 0; i < CHOICES; i++) {
        const Option* o = &choices[i];
        printf("  %-9s %-2s %s", o->name, o->argument ? o->argument : "", o->help);
        if (o->initial) printf(" [%s]", o->initial);
        putchar('\n');
    }
    puts("\nOMP_NUM_THREADS sets the number of threads from step 7 on.");
}

int main(int argc, char** argv) {
    prepare_threads(argv);
    threads = omp_get_max_threads();
    for (int i = 0; i < CHOICES; i++)
        if (choices[i].initial) set_option(&choices[i], choices[i].initial, 2, "");
    for (int i = 1; i < argc; i++) {
        Option* o = choices;
        while (o < choices + CHOICES && strcmp(o->name, argv[i])) o++;
        if (o == choices + CHOICES) fail(2, "unknown option %s (--help lists all)", argv[i]);
        if (!o->flag && ++i == argc) fail(2, "%s needs a value", o->name);
        set_option(o, argv[i], 2, "");
    }
    bool right = true;
    if (want.help)
        help();
    else if (want.check)
        right = check();
    else
        right = measure(want.rows, want.out, want.in, want.rounds);
    check_output();
    return right ? 0 : 1;
}

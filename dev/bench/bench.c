// bench.c: where the time of a training step goes, layer by layer, beside what the machine can do at most.
//
//     make bench                                        GPT-2 124M, batch 4 x 64 tokens
//     make bench BENCH="--preset small --scaling"       another model, another question; --help lists all
//
// Layers are timed inside real training steps, in the order and with the caches in which they really run: layer_done
// reads the clock after each, so the rows of the table add up to the step. Everything is measured in rounds, each of
// which measures the machine as well, and reported as medians: other programs disturb some rounds, rarely most.

#pragma GCC diagnostic ignored "-Wmissing-field-initializers" // what a Config's does not give is 0, as in GPT-2
#define NO_MAIN
#include "../../train_gpt.c"
#include <sys/resource.h>

#define ROUND 0.2 // seconds of steps in a round, at least

// ====================================================================================================================
// Options

static struct {
    const char *preset, *json;
    size_t layers, heads, channels, vocab, context, batch, repeats;
    double seconds;
    bool step, scaling, matmul, generate, help;
} want;

// clang-format off
static Option choices[] = {
    {"model", "--preset", "NAME", "gpt2", "gpt2, gpt2-medium, gpt2-large, gpt2-xl, small, nanogpt or tiny", TEXT(&want.preset, 0)},
    {"", "--layers", "N", NULL, "this and the next five: instead of the preset's", WHOLE(&want.layers, 1, MAX_LAYERS, 0)},
    {"", "--heads", "N", NULL, "", WHOLE(&want.heads, 1, MAX_SIZE, 0)},
    {"", "--channels", "N", NULL, "", WHOLE(&want.channels, 1, MAX_SIZE, 0)},
    {"", "--vocab", "N", NULL, "", WHOLE(&want.vocab, 1, MAX_SIZE, 0)},
    {"", "--context", "N", NULL, "", WHOLE(&want.context, 2, MAX_SIZE, 0)},
    {"", "--batch", "N", NULL, "", WHOLE(&want.batch, 1, MAX_SIZE, 0)},
    {"", "--precision", "NAME", NULL, "fp32 or bf16, as train_gpt's", TEXT(&opt.precision, 0)},
    {"what", "--step", NULL, NULL, "a training step, layer by layer: done if nothing else is asked for", FLAG(&want.step)},
    {"", "--scaling", NULL, NULL, "the step with 1, 2, 4, ... threads", FLAG(&want.scaling)},
    {"", "--matmul", NULL, NULL, "the multiply alone: a chosen model's shapes, or many if none is chosen", FLAG(&want.matmul)},
    {"", "--generate", NULL, NULL, "a token, and a prompt; with context 1024 if none is given", FLAG(&want.generate)},
    {"how", "--seconds", "X", "5", "for each of these, but three rounds at least", REAL(&want.seconds, 0, 1e6, 0)},
    {"", "--repeats", "N", NULL, "rounds, instead", WHOLE(&want.repeats, 1, 1e6, 0)},
    {"", "--json", "FILE", NULL, "write all figures there too", TEXT(&want.json, 0)},
    {"", "--help", NULL, NULL, "this text", FLAG(&want.help)},
};
enum { CHOICES = sizeof choices / sizeof *choices, MODEL_CHOICES = 7 };

static const struct {
    const char* name;
    size_t L, H, C, V, T, B;
} models[] = {
    {"gpt2",        12, 12,  768, 50257, 64,  4},
    {"gpt2-medium", 24, 16, 1024, 50257, 64,  4},
    {"gpt2-large",  36, 20, 1280, 50257, 64,  4},
    {"gpt2-xl",     48, 25, 1600, 50257, 64,  4},
    {"small",        3,  4,  192,  1024, 64,  8}, // as small as pays
    {"nanogpt",      4,  4,  128,    65, 64, 12}, // nanoGPT's recipe for CPUs
    {"tiny",         2,  2,   32,    80, 32,  2}, // for a test of a second
};
// clang-format on
enum { MODELS = sizeof models / sizeof *models };

static void help(void) {
    puts("bench: times train_gpt.\n");
    for (int i = 0; i < CHOICES; i++) {
        const Option* o = &choices[i];
        char left[64];
        snprintf(left, sizeof left, "%s %s", o->name, o->argument ? o->argument : "");
        printf("  %-7s %-16s %s", o->group, left, o->help);
        if (o->initial) printf(" [%s]", o->initial);
        putchar('\n');
    }
    puts("\nOMP_NUM_THREADS sets the number of threads.");
}

static size_t or_else(size_t given_size, size_t preset) { return given_size ? given_size : preset; }

// Returns the model's sizes; the batch is left in want.batch.
static Config read_options(int argc, char** argv) {
    for (int i = 0; i < CHOICES; i++)
        if (choices[i].initial) set_option(&choices[i], choices[i].initial, 2, "");
    for (int i = 1; i < argc; i++) {
        Option* o = choices;
        while (o < choices + CHOICES && strcmp(o->name, argv[i])) o++;
        if (o == choices + CHOICES) fail(2, "unknown option %s (--help lists all)", argv[i]);
        if (!o->flag && ++i == argc) fail(2, "%s needs a value", o->name);
        set_option(o, argv[i], 2, "");
        o->given = true;
    }
    size_t i = 0;
    while (i < MODELS && strcmp(models[i].name, want.preset)) i++;
    if (i == MODELS) fail(2, "unknown preset %s (--help lists all)", want.preset);
    Config c = {or_else(want.vocab, models[i].V), or_else(want.context, models[i].T),
                or_else(want.channels, models[i].C), or_else(want.heads, models[i].H),
                or_else(want.layers, models[i].L)};
    if (c.C % c.H) fail(2, "--channels %zu is not divisible by --heads %zu", c.C, c.H);
    choose_precision(2, "");
    if (!want.batch) want.batch = models[i].B;
    want.step = want.step || !(want.matmul || want.generate || want.scaling);
    return c;
}

// ====================================================================================================================
// Figures, and the file of all of them

typedef struct {
    double* values;
    size_t count;
} Samples;

static void add(Samples* s, double value) {
    s->values = (double*)realloc(s->values, (s->count + 1) * sizeof(double));
    if (!s->values) die("no memory for the samples");
    s->values[s->count++] = value;
}

static int ascending(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

// Of the samples in order, the one at this fraction of the way.
static double quantile(const Samples* s, double fraction) {
    qsort(s->values, s->count, sizeof(double), ascending);
    double at = fraction * (double)(s->count - 1);
    size_t low = (size_t)at, high = min_size(low + 1, s->count - 1);
    return s->values[low] + (at - (double)low) * (s->values[high] - s->values[low]);
}
static double median(const Samples* s) { return quantile(s, 0.5); }

static FILE* json_file;

// Writes values of the JSON file. A ' stands for ", which would want escaping here, and commas come by themselves.
__attribute__((format(printf, 1, 2))) static void json(const char* format, ...) {
    static const char* separator = "";
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char* c = text; *c; c++) *c = *c == '\'' ? '"' : *c;
    fprintf(json_file, "%s%s", strchr("]}", text[0]) ? "" : separator, text);
    separator = strchr("[{", text[strlen(text) - 1]) ? "\n" : ",\n";
}

// ====================================================================================================================
// The machine

static bool another_round(size_t done, double begin) {
    return want.repeats ? done < want.repeats : done < 3 || seconds() - begin < want.seconds;
}

// n floats, each first touched by the thread that will use it, so that it lies in the memory nearest to that.
static float* touched(size_t n) {
    size_t bytes = (n * sizeof(float) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    float* p = (float*)aligned_alloc(HUGE_PAGE, bytes);
    if (!p) die("no memory for %.0f MB", (double)n * 4e-6);
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE); // as allocate() does
#endif
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) p[i] = (float)(i % 1021) / 1021 - 0.5f;
    return p;
}

static int threads; // all of them
static Samples peak, reading, copying;

// Multiply-adds, and reading and copying arrays that no cache holds. A copied byte counts twice: it is read and written.
static void measure_machine(void) {
    enum { WORDS = 1 << 26 }; // 256 MB
    static float *from, *to;
    if (!from) from = touched(WORDS), to = touched(WORDS);
    add(&peak, device->peak());
    const uint32_t* words = (const uint32_t*)(const void*)from;
    uint32_t sum = 0;
    double start = seconds();
#pragma omp parallel for simd schedule(static) reduction(+ : sum)
    for (size_t i = 0; i < WORDS; i++) sum += words[i];
    double rate = 4.0 * WORDS / (seconds() - start);
    add(&reading, sum ? rate : 0); // a sum that nobody looks at is not computed
    size_t share = WORDS / (size_t)threads;
    start = seconds();
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < (size_t)threads; i++) memcpy(to + i * share, from + i * share, share * sizeof(float));
    add(&copying, 8.0 * (double)share * threads / (seconds() - start));
}

static double bandwidth(void) { return fmax(median(&reading), median(&copying)); }

static void print_machine(void) {
    if (bf16) printf("precision  bf16 in linear layers, by %s\n", multiplies_bf16(pair_kernel));
    printf("machine    %d threads, %.0f GFLOP/s of multiply-adds, memory: %.1f GB/s read, %.1f GB/s copied\n\n",
           threads, median(&peak) / 1e9, median(&reading) / 1e9, median(&copying) / 1e9);
}

// ====================================================================================================================
// The step, layer by layer

enum { FORWARD, BACKWARD, UPDATE, PASSES, LAYERS = 14 };
static const char* const pass_names[] = {"forward", "backward", "update"};

// What a layer must do at the least, in a step and all `times` of it together: operations if it multiplies (given for
// the forward pass; backward there are twice as many), or else bytes, each tensor that it reads or writes once.
typedef struct {
    const char* name;
    double times, forward, floats[PASSES];
} Layer;
static Layer layers[LAYERS];

// P: number of parameters.
static void describe_layers(Config config, size_t batch, double P) {
    double C = (double)config.C, V = (double)config.V, T = (double)config.T, L = (double)config.L;
    double R = (double)batch * T; // rows
    // clang-format off
    const Layer table[LAYERS] = {
        {"embedding", 1, 0, {2 * R * C + T * C, 3 * R * C + 2 * T * C, 0}}, // wte's rows, wpe, x; dx, both sums
        {"ln1",       L, 0, {2 * R * C, 4 * R * C, 0}},                     // x, y; dy, x, dx read and written
        {"qkv_w",     L, 2 * R * C * 3 * C, {0}},
        {"attention", L, 2 * R * T * C, {0}},                               // q k and p v, less the masked half
        {"att_w",     L, 2 * R * C * C, {0}},
        {"ln2",       L, 0, {2 * R * C, 4 * R * C, 0}},
        {"fc_w",      L, 2 * R * C * 4 * C, {0}},
        {"gelu",      L, 0, {2 * R * 4 * C, 3 * R * 4 * C, 0}},             // x, y; dy, x, dx
        {"mlp_w",     L, 2 * R * 4 * C * C, {0}},
        {"lnf",       1, 0, {2 * R * C, 4 * R * C, 0}},
        {"logits",    1, 2 * R * C * V, {0}},
        {"loss",      1, 0, {R * V, 2 * R * V, 0}},                         // logits; logits read and written
        {"norm",      1, 0, {0, 0, P}},                                     // d
        {"adamw",     1, 0, {0, 0, 8 * P}},                                 // w, d, m, v read and written
    };
    // clang-format on
    memcpy(layers, table, sizeof table);
}

static double operations(const Layer* l, int pass) {
    return pass == UPDATE ? 0 : l->times * l->forward * (pass == BACKWARD ? 2 : 1);
}
static double bytes(const Layer* l, int pass) { return l->times * l->floats[pass] * sizeof(float); }

static Model model;
static Activations activations;
static int *inputs, *targets;
static int current_pass;
static double clock_read;            // when the layer before was done
static double spent[LAYERS][PASSES]; // seconds of the step under way

static void record(const char* name) {
    device->wait(&model);
    double now = seconds();
    size_t i = 0;
    while (i < LAYERS && strcmp(layers[i].name, name)) i++;
    if (i == LAYERS) die("the benchmark's table has no layer %s", name);
    spent[i][current_pass] += now - clock_read;
    clock_read = now;
}

typedef struct {
    Samples step, rows[LAYERS][PASSES]; // seconds
} Timing;

// One training step on tokens that were never seen, so that the loss, and with it every number, stays ordinary.
// Returns its seconds, and adds them and those of its layers to t, if that is not NULL.
static double timed_step(Timing* t) {
    static size_t step;
    size_t V = model.config.V, B = activations.B, T = activations.T;
    AdamW adamw = {1e-4, 0.9, 0.99, 0.1, 1, ++step};
    for (size_t i = 0; i < B * T; i++) {
        inputs[i] = (int)(random_bits(2 * step, i) % V);
        targets[i] = (int)(random_bits(2 * step + 1, i) % V);
    }
    memset(spent, 0, sizeof spent);
    double start = clock_read = seconds();
    current_pass = FORWARD;
    device->forward(&model, &activations, inputs, targets, B, T, 0, true);
    current_pass = BACKWARD;
    device->backward(&model, &activations, inputs, targets, B, T, 1);
    current_pass = UPDATE;
    device->update(&model, adamw);
    record("adamw"); // all of the update that bears no name of its own
    double whole = seconds() - start;
    if (!isfinite(take_loss(&model))) die("the loss is not a number");
    if (!t) return whole;
    add(&t->step, whole);
    for (size_t i = 0; i < LAYERS; i++)
        for (int p = 0; p < PASSES; p++) add(&t->rows[i][p], spent[i][p]);
    return whole;
}

static void create(Config config, size_t B, bool training) {
    check_memory(config, B, training ? FOR_TRAINING : FOR_USE);
    memset(&model, 0, sizeof model);
    memset(&activations, 0, sizeof activations);
    model.config = config;
    device->create_model(&model, training);
    device->create_activations(&activations, &model, B, config.T, training);
    if (!in_16_bits) initialize(&model, 1); // zeros take as long
    inputs = (int*)allocate(B * config.T, sizeof(int), "tokens");
    targets = (int*)allocate(B * config.T, sizeof(int), "tokens");
    describe_layers(config, B, (double)model.parameter_count);
    layer_done = training ? record : NULL;
}

static void destroy(void) {
    device->free_model(&model);
    device->free_activations(&activations);
    free(inputs), free(targets);
}

// Steps with each of these numbers of threads in turn. Before those that count comes one that brings the caches and the
// threads back to how steps find them that follow each other, unless steps are so long that it makes no difference.
static void measure_steps(Timing* timings, const int* counts, size_t n) {
    double usual = timed_step(NULL), begin = seconds();
    for (size_t round = 0; another_round(round, begin); round++) {
        measure_machine();
        for (size_t i = 0; i < n; i++) {
            omp_set_num_threads(counts[i]);
            if (usual < ROUND) timed_step(NULL);
            double start = seconds();
            do timed_step(&timings[i]);
            while (seconds() - start < ROUND);
        }
        omp_set_num_threads(threads);
    }
}

// One row of the table; returns its seconds.
static double report_row(const Timing* t, size_t i, int p) {
    double time = median(&t->rows[i][p]), work = operations(&layers[i], p), moved = bytes(&layers[i], p);
    double rate = (work + moved) / time / 1e9, of_step = time / median(&t->step);
    double of_peak = 1e9 * rate / (work > 0 ? median(&peak) : bandwidth());
    printf("%-10s %-8s %9.3f %*.1f%*s %7.0f%% %7.1f%%\n", layers[i].name, pass_names[p], 1e3 * time, work > 0 ? 9 : 19,
           rate, work > 0 ? 10 : 0, "", 100 * of_peak, 100 * of_step);
    json("{'layer': '%s', 'pass': '%s', 'ms': %.9g, '%s': %.9g, 'of_peak': %.9g, 'of_step': %.9g}", layers[i].name,
         pass_names[p], 1e3 * time, work > 0 ? "gflops" : "gb_per_s", rate, of_peak, of_step);
    return time;
}

static void bench_step(Config config, size_t B) {
    static Timing t;
    struct rusage usage;
    create(config, B, true);
    timed_step(NULL);
    getrusage(RUSAGE_SELF, &usage); // before measure_machine takes memory of its own
    measure_steps(&t, &threads, 1);
    print_machine();
    double sum = 0, outside = 0, optimiser = 0, step = median(&t.step);
    printf("layer      pass            ms   GFLOP/s      GB/s  of peak  of step\n");
    json("'step': {");
    json("'rows': [");
    for (int p = 0; p < PASSES; p++)
        for (size_t i = 0; i < LAYERS; i++) {
            if (operations(&layers[i], p) + bytes(&layers[i], p) == 0) continue;
            double time = report_row(&t, i, p);
            sum += time;
            if (operations(&layers[i], p) == 0) outside += time;
            if (p == UPDATE) optimiser += bytes(&layers[i], p) / bandwidth();
        }
    json("]");
    double least = step_operations(config, B, config.T) / median(&peak) + optimiser;
    double tokens = (double)(B * config.T) / step, resident = (double)usage.ru_maxrss / 1024;
    printf("\nstep       %.3f ms (half of the steps %.3f to %.3f), %.0f tokens/s; the rows add up to %.3f ms\n"
           "floor      %.3f ms: multiply-adds at peak, then the optimiser's bytes; the step takes %.2f times that\n"
           "outside    %.1f%% of the step lies outside the layers that multiply\n"
           "resident   %.0f MB at most\n",
           1e3 * step, 1e3 * quantile(&t.step, 0.25), 1e3 * quantile(&t.step, 0.75), tokens, 1e3 * sum, 1e3 * least,
           step / least, 100 * outside / step, resident);
    json("'ms': %.9g, 'steps': %zu, 'parameters': %zu, 'tokens_per_s': %.9g, 'floor_ms': %.9g, 'over_floor': %.9g, "
         "'outside_multiplies': %.9g, 'resident_mb': %.9g}",
         1e3 * step, t.step.count, model.parameter_count, tokens, 1e3 * least, step / least, outside / step, resident);
    destroy();
}

// A row of the table below: the times of one thing with counts[0..n) threads.
static void report_scaling(const char* layer, const char* pass, Samples* const* times, const int* counts, size_t n) {
    printf("\n%-10s %-8s", layer, pass);
    for (size_t k = 0; k < n; k++) {
        double time = median(times[k]), speed_up = median(times[0]) / time;
        printf("%10.3f", 1e3 * time);
        if (k > 0) printf(" %5.2f %4.0f%%", speed_up, 100 * speed_up / counts[k]);
        json("{'layer': '%s', 'pass': '%s', 'threads': %d, 'ms': %.9g, 'speed_up': %.9g}", layer, pass, counts[k],
             1e3 * time, speed_up);
    }
}

static void bench_scaling(Config config, size_t B) {
    enum { MOST = 16 };
    int counts[MOST] = {1};
    size_t n = 1;
    for (; n < MOST && counts[n - 1] < threads; n++)
        counts[n] = (int)min_size(2 * (size_t)counts[n - 1], (size_t)threads);
    static Timing t[MOST];
    Samples* times[MOST];
    create(config, B, true);
    timed_step(NULL);
    measure_steps(t, counts, n);
    print_machine();
    printf("milliseconds, speed-up and efficiency by number of threads\nlayer      pass    %10d", 1);
    for (size_t k = 1; k < n; k++) printf("%10d%12s", counts[k], "");
    json("'scaling': [");
    for (int p = 0; p < PASSES; p++)
        for (size_t i = 0; i < LAYERS; i++) {
            for (size_t k = 0; k < n; k++) times[k] = &t[k].rows[i][p];
            if (operations(&layers[i], p) + bytes(&layers[i], p) > 0)
                report_scaling(layers[i].name, pass_names[p], times, counts, n);
        }
    for (size_t k = 0; k < n; k++) times[k] = &t[k].step;
    report_scaling("step", "all", times, counts, n);
    putchar('\n');
    json("]");
    destroy();
}

// ====================================================================================================================
// The multiply alone

typedef struct {
    size_t rows, in, out;
    bool tied; // the head, whose weight is stored (out,in)
} Shape;

enum { MULTIPLIES = 3 };
static const char* const multiply_names[] = {"y = x W", "dx = dy Wt", "dW += xt dy"};

// One of the multiplies of a linear layer. x, dx (rows,in); y, which is dy as well, (rows,out).
static void multiply(int which, Shape s, const float* x, float* dx, float* y, const float* w, float* dw) {
    Matrix weight = s.tied ? transposed(w, s.in) : matrix(w, s.out), flipped = {weight.p, weight.column, weight.row};
    if (which == 0)
        matmul(y, matrix(x, s.in), weight, NULL, NULL, s.rows, s.out, s.in);
    else if (which == 1)
        matmul(dx, matrix(y, s.out), flipped, NULL, NULL, s.rows, s.in, s.out);
    else if (s.tied)
        matmul(dw, transposed(y, s.out), matrix(x, s.in), NULL, dw, s.out, s.in, s.rows);
    else
        matmul(dw, transposed(x, s.in), matrix(y, s.out), NULL, dw, s.in, s.out, s.rows);
}

// The shapes of a model's layers, those of the head only if V > 0. Returns how many.
static size_t add_shapes(Shape* list, size_t rows, size_t C, size_t V) {
    const Shape shapes[] = {{rows, C, 3 * C, false},
                            {rows, C, C, false},
                            {rows, C, 4 * C, false},
                            {rows, 4 * C, C, false},
                            {rows, C, V, true}};
    size_t n = V ? 5 : 4;
    memcpy(list, shapes, n * sizeof *shapes);
    return n;
}

enum { SHAPES = 64 };
static size_t list_shapes(Shape* list, Config config, size_t B) {
    size_t n = 0;
    for (int i = 0; i < MODEL_CHOICES; i++)
        if (choices[i].given) return add_shapes(list, B * config.T, config.C, config.V);
    for (size_t rows = 256; rows <= 4096; rows *= 16) n += add_shapes(list + n, rows, 768, 50257);
    for (size_t C = 128; C <= 384; C += C < 256 ? 64 : 128)
        for (size_t rows = 1024; rows <= 2048; rows *= 2) n += add_shapes(list + n, rows, C, 0);
    return n;
}

// Each multiply is timed for a millisecond at least, right after the machine's peak: what slows one slows both.
static void bench_matmul(Config config, size_t B) {
    static Samples rates[SHAPES][MULTIPLIES], shares[SHAPES][MULTIPLIES];
    Shape list[SHAPES];
    size_t n = list_shapes(list, config, B), xs = 0, ys = 0, ws = 0;
    for (size_t i = 0; i < n; i++) {
        xs = (size_t)fmax((double)xs, (double)(list[i].rows * list[i].in));
        ys = (size_t)fmax((double)ys, (double)(list[i].rows * list[i].out));
        ws = (size_t)fmax((double)ws, (double)(list[i].in * list[i].out));
    }
    float *x = touched(xs), *dx = touched(xs), *y = touched(ys), *w = touched(ws), *dw = touched(ws);
    double begin = seconds();
    for (size_t round = 0; another_round(round, begin); round++) {
        measure_machine();
        for (size_t i = 0; i < n; i++)
            for (int which = 0; which < MULTIPLIES; which++) {
                double work = 2.0 * (double)(list[i].rows * list[i].in * list[i].out), calls = 0, time;
                multiply(which, list[i], x, dx, y, w, dw); // into the caches
                double most = device->peak(), start = seconds();
                do multiply(which, list[i], x, dx, y, w, dw), calls++;
                while ((time = seconds() - start) < 1e-3);
                add(&peak, most);
                add(&rates[i][which], calls * work / time);
                add(&shares[i][which], calls * work / time / most);
            }
    }
    free(x), free(dx), free(y), free(w), free(dw);
    print_machine();
    printf("GFLOP/s, and share of the peak measured just before: median and best of %zu rounds\n rows     in    out",
           rates[0][0].count);
    for (int which = 0; which < MULTIPLIES; which++) printf("%20s", multiply_names[which]);
    json("'matmul': [");
    for (size_t i = 0; i < n; i++) {
        printf("\n%5zu %6zu %6zu", list[i].rows, list[i].in, list[i].out);
        for (int which = 0; which < MULTIPLIES; which++) {
            double share = median(&shares[i][which]), best = quantile(&shares[i][which], 1);
            printf("%10.1f %3.0f%% %3.0f%%", median(&rates[i][which]) / 1e9, 100 * share, 100 * best);
            json("{'multiply': '%s', 'rows': %zu, 'in': %zu, 'out': %zu, 'gflops': %.9g, 'of_peak': %.9g, "
                 "'best_of_peak': %.9g}",
                 multiply_names[which], list[i].rows, list[i].in, list[i].out, median(&rates[i][which]) / 1e9, share,
                 best);
        }
    }
    putchar('\n');
    json("]");
}

// ====================================================================================================================
// Generation

// Positions from..to-1, given the cache of those before, and the logits of the last. Returns the seconds.
static double advance(size_t from, size_t to) {
    double start = seconds();
    device->forward(&model, &activations, inputs + from, NULL, 1, to, from, false);
    device->wait(&model);
    return seconds() - start;
}

// With weights of 32 bits and of 16, taking turns; the CPU's alone can be of 16.
static void bench_generate(Config config) {
    enum { STRIDE = 10 }; // one by one, so many positions are left out between two that are timed
    static Model kept[2];
    static Activations caches[2];
    static Samples token[2], batch, single;
    int kinds = device == &cpu && !PLAIN ? 2 : 1;
    if (!want.context) config.T = 1024;
    size_t T = config.T, prompt = (T * 125 + 127) / 128; // 1,000 of 1,024
    for (int kind = 0; kind < kinds; kind++) {
        in_16_bits = kind;
        create(config, 1, false);
        kept[kind] = model, caches[kind] = activations;
        for (size_t i = 0; i < T; i++) inputs[i] = (int)(random_bits(1, i) % config.V);
        advance(0, T); // every page of the cache touched
    }
    double begin = seconds();
    for (size_t round = 0; another_round(round, begin); round++) {
        measure_machine();
        for (int kind = 0; kind < kinds; kind++) {
            in_16_bits = kind, model = kept[kind], activations = caches[kind];
            double start = seconds();
            do add(&token[kind], advance(T - 1, T));
            while (seconds() - start < ROUND);
            if (kind == 1) continue;
            add(&batch, advance(0, prompt));
            double sum = 0;
            for (size_t i = prompt % STRIDE / 2; i < prompt; i += STRIDE) sum += STRIDE * advance(i, i + 1);
            add(&single, sum);
        }
    }
    print_machine();
    json("'generate': {");
    for (int kind = 0; kind < kinds; kind++) {
        // All weights, of wpe but one row; the keys and values of all positions. Biases and layernorms count as the rest.
        double weights = (double)(kept[kind].parameter_count - (T - 1) * config.C),
               cache = 2.0 * (double)(config.L * T * config.C);
        double one = median(&token[kind]), moved = (kind ? 2 : 4) * weights + 4 * cache, rate = moved / one;
        printf("token      weights of %d bits: %.3f ms with %zu in the cache: %.1f MB read, %.1f GB/s, %.0f%% of what "
               "can be read\n",
               kind ? 16 : 32, 1e3 * one, T - 1, moved / 1e6, rate / 1e9, 100 * rate / median(&reading));
        json("'cached%s': %zu, 'ms_per_token%s': %.9g, 'bytes%s': %.0f, 'of_bandwidth%s': %.9g", kind ? "_16" : "",
             T - 1, kind ? "_16" : "", 1e3 * one, kind ? "_16" : "", moved, kind ? "_16" : "", rate / median(&reading));
    }
    printf("prompt     %zu tokens: %.1f ms as one batch, %.1f ms one by one, %.1f times as long\n", prompt,
           1e3 * median(&batch), 1e3 * median(&single), median(&single) / median(&batch));
    json("'prompt': %zu, 'prompt_ms': %.9g, 'one_by_one_ms': %.9g}", prompt, 1e3 * median(&batch),
         1e3 * median(&single));
    for (int kind = 0; kind < kinds; kind++) {
        model = kept[kind], activations = caches[kind];
        device->free_model(&model), device->free_activations(&activations);
    }
    in_16_bits = false;
}

int main(int argc, char** argv) {
    prepare_threads(argv);
    Config config = read_options(argc, argv);
    if (want.help) {
        help();
        check_output();
        return 0;
    }
    Output out;
    if (want.json) output_open(&out, want.json, 0);
    json_file = want.json ? out.stream : fopen("/dev/null", "w");
    if (!json_file) die("cannot open /dev/null: %s", strerror(errno));
    threads = omp_get_max_threads();
    size_t B = want.batch;
    printf("model      %zu layers, %zu heads, %zu channels, vocabulary %zu, context %zu, batch %zu\n", config.L,
           config.H, config.C, config.V, config.T, B);
    json("{");
    json("'model': {'layers': %zu, 'heads': %zu, 'channels': %zu, 'vocab': %zu, 'context': %zu, 'batch': %zu}",
         config.L, config.H, config.C, config.V, config.T, B);
    if (want.step) bench_step(config, B);
    if (want.scaling) bench_scaling(config, B);
    if (want.matmul) bench_matmul(config, B);
    if (want.generate) bench_generate(config);
    json("'machine': {'threads': %d, 'peak_gflops': %.9g, 'read_gb_per_s': %.9g, 'copy_gb_per_s': %.9g}", threads,
         median(&peak) / 1e9, median(&reading) / 1e9, median(&copying) / 1e9);
    json("}\n");
    if (want.json) output_finish(&out);
    check_output();
    return 0;
}

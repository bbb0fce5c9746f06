// fuzz.c: libFuzzer's entry to everything in train_gpt.c that reads what somebody else wrote. README.md says how to run
// it. The environment variable FUZZ_TARGET names one of the targets in the table at the end.
//
// Whatever the input, a target must end in one of two ways: the input is refused, which in train_gpt.c is a call of
// fail(), or it is accepted and then holds what the target requires. Anything else is a bug, and the sanitizers or
// require() stop there.

#define _GNU_SOURCE 1
#include <fcntl.h>
#include <glob.h>
#include <sanitizer/allocator_interface.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define require(condition) ((condition) ? (void)0 : __builtin_trap())

static int input;            // a file in memory; whatever train_gpt.c opens, it gets this one
static bool config_there;    // whether it finds a config.json
static jmp_buf end_of_input; // where fail() goes instead of ending the process

__attribute__((noreturn)) static void end_input(int status) {
    require(status == 1 || status == 2);
    longjmp(end_of_input, 1);
}

// A block of exactly the file's size instead of a mapping, whose last page goes on beyond the file's end: so the
// address sanitizer sees a read of one byte too many.
static void* read_input(size_t size) {
    void* p = malloc(size);
    require(p && pread(input, p, size, 0) == (ssize_t)size);
    return p;
}

static void fill_input(const void* data, size_t size) {
    require(!ftruncate(input, 0) && pwrite(input, data, size, 0) == (ssize_t)size);
}

#define NO_MAIN
#define exit(status)                                  end_input(status)
#define open(...)                                     dup(input)
#define access(path, mode)                            (config_there ? 0 : -1)
#define mmap(address, size, protection, flags, f, at) read_input(size)
#define munmap(p, size)                               free(p)
#include "../../../train_gpt.c"
#undef exit
#undef open

static Tokenizer tokenizer; // of build/fuzz/data, made by prepare_data.py

static void round_trip(const Tokenizer* t, const uint8_t* text, size_t n) {
    int* tokens = (int*)malloc(n * sizeof(int)); // not by allocate(), which rounds up
    size_t count = encode(t, text, n, tokens), at = 0;
    require(count <= n);
    for (size_t i = 0; i < count; i++) {
        require(tokens[i] >= 0 && (size_t)tokens[i] < t->V && tokens[i] != t->end_of_text);
        Bytes s = token_string(t, tokens[i]);
        require(s.n <= n - at && !memcmp(s.p, text + at, s.n));
        at += s.n;
    }
    require(at == n);
    free(tokens);
}

static void fuzz_encoder(const uint8_t* data, size_t size) { round_trip(&tokenizer, data, size); }

// A tokenizer that is accepted, however odd, encodes anything.
static void fuzz_tokenizer(const uint8_t* data, size_t size) {
    static const char text[] =
        "It's the  theatre, they'll say: 1234567\n\n\t\xC3\xA9t\xC3\xA9 \xE2\x80\x83\xF0\x9F\x98\x80\xFF ";
    Tokenizer t = load_tokenizer("tokenizer.bin");
    round_trip(&t, (const uint8_t*)text, sizeof text);
    round_trip(&t, data, min_size(size, 4096));
    free(t.slots), free(t.classes), free((void*)t.file.data);
}

static void fuzz_shards(const uint8_t* data, size_t size) {
    (void)data, (void)size;
    enum { T = 4, V = 300 };
    int inputs[2 * T], targets[2 * T];
    Data d = open_data("train.bin", T, V);
    for (size_t i = 0; i < 2 * d.windows; i++) {
        if (i < d.windows)
            load_window(&d, i, 0, inputs, targets);
        else
            load_batch(&d, 1337, i * i, 2, inputs, targets);
        for (size_t j = 0; j < T; j++) {
            require(inputs[j] < V && targets[j] < V);
            require(j == 0 || inputs[j] == targets[j - 1]);
        }
    }
    for (size_t i = 0; i < d.shard_count; i++) unmap_file(&d.shards[i].file);
    free(d.shards);
}

static void reset_options(void) {
    char* nothing[] = {"train_gpt"};
    memset(&opt, 0, sizeof opt);
    for (int i = 0; i < OPTIONS; i++) options[i].given = false;
    parse_command_line(1, nothing);
}

static void fuzz_checkpoint(const uint8_t* data, size_t size) {
    // A length beyond 2^56 is refused at once. Such inputs get the right one, which the fuzzer will hardly find while
    // it changes the JSON text: the text ends at the first zero byte, with which the tensors in the seeds begin.
    if (size > 8 && data[7]) {
        uint64_t length = strnlen((const char*)data + 8, size - 8);
        require(pwrite(input, &length, sizeof length, 0) == sizeof length);
    }
    Checkpoint c = open_checkpoint("gpt.safetensors", "");
    Model model;
    memset(&model, 0, sizeof model);
    model.config = read_config(&c);
    if (device->memory(model.config, 1, model.config.T, true) < 1 << 22) { // more than an input's tensors can hold
        device->create_model(&model, true);
        load_block(&c, &model, "", model.weights);
        check_foreign(&c, &model);
        if (metadata(&c, "step")) {
            Run run;
            memset(&run, 0, sizeof run);
            run.tokenizer = tokenizer;
            reset_options();
            load_block(&c, &model, "adam.m.", model.moment1);
            load_block(&c, &model, "adam.v.", model.moment2);
            resume_options(&run, &c);
            require(run.step < (size_t)opt.steps && opt.batch >= 1 && opt.batch <= MAX_SIZE && opt.lr <= 1e3);
        }
    }
    device->free_model(&model);
    close_checkpoint(&c);
}

static void fuzz_config(const uint8_t* data, size_t size) {
    (void)data, (void)size;
    config_there = true;
    heads_from_config(".", 64);
}

// A line is an argument.
static void fuzz_options(const uint8_t* data, size_t size) {
    char *text = (char*)malloc(size + 1), *arguments[64], *rest = text;
    int count = 1;
    memcpy(text, data, size);
    text[size] = 0;
    while (rest && count < 63) arguments[count++] = strsep(&rest, "\n");
    arguments[0] = "train_gpt";
    arguments[count] = NULL;
    reset_options();
    parse_command_line(count, arguments);
    for (int i = 0; i < OPTIONS; i++) {
        const Option* o = &options[i];
        if (!o->initial && !o->given) continue;
        if (o->whole) require((double)*o->whole >= o->least && (double)*o->whole <= o->most);
        if (o->real) require(*o->real >= o->least && *o->real <= o->most);
    }
    free(text);
}

// What utf8_print() makes of the input, given to it in pieces of so many bytes.
static char* printed(const uint8_t* data, size_t size, size_t piece, size_t* length) {
    char* text = NULL;
    FILE* real = stdout;
    Utf8Printer printer = {{0}, 0};
    stdout = open_memstream(&text, length);
    for (size_t at = 0; at < size; at += piece) utf8_print(&printer, data + at, min_size(piece, size - at), false);
    utf8_print(&printer, NULL, 0, true);
    fclose(stdout);
    stdout = real;
    return text;
}

static void fuzz_utf8(const uint8_t* data, size_t size) {
    size_t length, other_length;
    uint32_t code;
    bool valid = true;
    for (size_t i = 0; i < size && valid; valid = code < BROKEN) i += utf8_character(data + i, size - i, &code);
    char* whole = printed(data, size, size, &length);
    for (size_t i = 0; i < length; require(code < BROKEN))
        i += utf8_character((uint8_t*)whole + i, length - i, &code);
    if (valid) require(length == size && !memcmp(whole, data, size));
    for (size_t piece = 1; piece < 6; piece++) {
        char* other = printed(data, size, piece, &other_length);
        require(other_length == length && !memcmp(other, whole, length));
        free(other);
    }
    free(whole);
}

static const struct {
    const char* name;
    void (*run)(const uint8_t* data, size_t size);
} targets[] = {
    {"shards", fuzz_shards},   {"tokenizer", fuzz_tokenizer}, {"checkpoint", fuzz_checkpoint}, {"config", fuzz_config},
    {"encoder", fuzz_encoder}, {"utf8", fuzz_utf8},           {"options", fuzz_options},       {NULL, NULL}};
static size_t target;

// What an input that was refused half way had allocated, to be freed after it.
static void* blocks[1 << 12];
static size_t block_count;
static __thread bool recording;

static void on_malloc(const volatile void* p, size_t size) {
    (void)size;
    if (!recording || !p) return;
    require(block_count < sizeof blocks / sizeof *blocks);
    blocks[block_count++] = (void*)p;
}

static void on_free(const volatile void* p) {
    if (!recording || !p) return;
    for (size_t i = block_count; i-- > 0;)
        if (blocks[i] == p) {
            blocks[i] = blocks[--block_count];
            return;
        }
}

int LLVMFuzzerInitialize(int* argc, char*** argv) {
    (void)argc, (void)argv;
    const char *path = "build/fuzz/data/tokenizer.bin", *name = getenv("FUZZ_TARGET");
    while (targets[target].name && (!name || strcmp(targets[target].name, name))) target++;
    int file = open(path, O_RDONLY);
    if (!targets[target].name || file < 0) {
        fprintf(stderr, "fuzz: FUZZ_TARGET must name a target, and %s must be there; fuzz/run.py sees to both\n", path);
        exit(1);
    }
    static char data[1 << 20];
    ssize_t n = read(file, data, sizeof data);
    close(file);
    input = memfd_create("input", 0);
    require(n > 0 && input >= 0);
    fill_input(data, (size_t)n);
    tokenizer = load_tokenizer(path);
    require(__sanitizer_install_malloc_and_free_hooks(on_malloc, on_free));
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fill_input(data, size);
    recording = true;
    if (!setjmp(end_of_input)) targets[target].run(data, size);
    recording = false;
    while (block_count) free(blocks[--block_count]);
    return 0;
}

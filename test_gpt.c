// test_gpt.c: the checks of train_gpt.c, or of its twin for GPUs.
//
//     make test                       all of them
//     build/test_gpt -v gelu utf8     those with "gelu" or "utf8" in their name, each named as it runs
//
// The program under test is included, so that its functions can be called one by one. Every test runs in a process of
// its own (`test_gpt --test NAME FOLDER`), so one that crashes takes no other along. What ends the program (errors,
// signals, a full disk, the command line as a whole) is tested on a further process: a fork, or this same binary as
// `test_gpt --cli ARGUMENTS`, which is train_gpt. All inputs are made here, in a folder under build/ that is removed
// in the end.

#pragma GCC diagnostic ignored "-Wmissing-field-initializers" // what a Config's does not give is 0, as in GPT-2
#define NO_MAIN
#include <stdbool.h>
static bool use_plain; // chosen while the tests run, to compare the two
#ifndef PLAIN
#define PLAIN use_plain
#endif
#ifdef TWIN
#include TWIN
#undef check // of the twin's; here it is a function
#else
#include "train_gpt.c"
#endif

#include <ftw.h>
#include <sys/resource.h>
#include <sys/wait.h>

// ====================================================================================================================
// Framework

static const char* test_name; // the test that is running
static const char* folder;    // of all files that the tests make
static int failures;          // the test's failed checks
static bool skipped;          // it cannot be done here

__attribute__((format(printf, 4, 5))) static bool check(bool good, const char* file, int line, const char* format,
                                                        ...) {
    if (good) return true;
    failures++;
    if (failures <= 20) {
        printf("%s:%d: %s: ", file, line, test_name);
        va_list args;
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        putchar('\n');
    } else if (failures == 21)
        printf("%s: %s: further failures are not shown\n", file, test_name);
    return false;
}

// CHECK(condition, format, ...): the rest is printed if it does not hold. Its value is the condition's.
#define CHECK(condition, ...) check(condition, __FILE__, __LINE__, __VA_ARGS__)

static void skip(const char* why) {
    printf("%s: skipped: %s\n", test_name, why);
    skipped = true;
}

// The path of a file in the tests' folder. A test's process does not live long enough to free it.
static const char* in_folder(const char* name) {
    char* path;
    if (asprintf(&path, "%s/%s", folder, name) < 0) die("no memory for a file's name");
    return path;
}

// A file's bytes, with a 0 behind them; NULL if there is none.
static char* read_file(const char* path, size_t* size) {
    FILE* f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    size_t n = (size_t)ftell(f);
    rewind(f);
    char* data = (char*)allocate(n + 1, 1, "a test's file");
    n = fread(data, 1, n, f);
    fclose(f);
    if (size) *size = n;
    return data;
}

// The old file is removed, not shortened to nothing, which some file systems take as a reason to wait for the disk.
static void write_file(const char* path, const void* data, size_t size) {
    unlink(path);
    FILE* f = fopen(path, "wb");
    if (!f || fwrite(data, 1, size, f) != size || fclose(f)) CHECK(false, "cannot write %s: %s", path, strerror(errno));
}

// B sequences of T positions, of which those from start on ask, with C channels in H heads.
static Attention attention_shape(size_t B, size_t T, size_t start, size_t C, size_t H) {
    const Config c = {0, T, C, H, 1};
    return attention_of(c, B, T, start);
}

static bool exists(const char* path) { return !access(path, F_OK); }

static bool same_files(const char* a, const char* b) {
    size_t n = 0, m = 0;
    char *x = read_file(a, &n), *y = read_file(b, &m);
    bool same = x && y && n == m && !memcmp(x, y, n);
    free(x), free(y);
    return same;
}

// Starts this binary anew, with the emulator and its options that $EMULATOR names if it is for another kind of machine.
static void restart(char** arguments) {
    char path[4096], *all[300] = {(char*)"sh", (char*)"-c", (char*)"exec $EMULATOR \"$0\" \"$@\"", path};
    if (!getenv("EMULATOR")) execv("/proc/self/exe", arguments);
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    for (int i = 1; i < 296 && arguments[i]; i++) all[i + 3] = arguments[i];
    execv("/bin/sh", all);
    _exit(127);
}

// How a further process ended and what it wrote.
typedef struct {
    int status, signal; // one of them is 0
    bool late;          // it was ended for taking too long
    char out[1 << 17], err[1 << 13];
} Result;

// How further processes are started, until the test says otherwise.
static struct {
    int threads;             // OMP_NUM_THREADS, or 0: as it is
    size_t file_limit;       // bytes that a file may have, as if the disk were full; 0: no limit
    int signal, at;          // raised in the update of this step (counted from 1); 0: none
    const char* output_path; // where stdout goes; NULL: into the result
} child;

static void read_output(const char* path, char* text, size_t room) {
    FILE* f = fopen(path, "rb");
    size_t n = f ? fread(text, 1, room - 1, f) : 0;
    for (size_t i = 0; i < n; i++)
        if (!text[i]) text[i] = '0'; // a model may well write zero bytes
    text[n] = 0;
    if (f) fclose(f);
}

// Runs a function, or with NULL this binary with these arguments. A function may only be forked off by a test that
// has run nothing on several threads before, because OpenMP does not survive a fork.
static const Result* run_child(void (*function)(const char*), const char* argument, char** arguments) {
    static Result r;
    char out[4200], err[4200], threads[16];
    snprintf(out, sizeof out, child.output_path ? "%s" : "%s/stdout", child.output_path ? child.output_path : folder);
    snprintf(err, sizeof err, "%s/stderr", folder);
    snprintf(threads, sizeof threads, "%d", child.threads);
    const char* was = getenv("OMP_NUM_THREADS");
    char* before = was ? strdup(was) : NULL;
    if (child.threads) setenv("OMP_NUM_THREADS", threads, 1);
    fflush(stdout);
    fflush(stderr);
    if (!child.output_path) unlink(out);
    unlink(err);
    pid_t id = fork();
    if (id == 0) {
        int o = open(out, O_WRONLY | O_CREAT | O_TRUNC, 0666), e = open(err, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        if (dup2(o, 1) < 0 || dup2(e, 2) < 0) _exit(126);
        if (child.file_limit) {
            struct rlimit limit = {child.file_limit, child.file_limit};
            signal(SIGXFSZ, SIG_IGN);
            setrlimit(RLIMIT_FSIZE, &limit);
        }
        if (!function) restart(arguments);
        function(argument);
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    pid_t ended = 0;
    double start = seconds();
    r.late = false;
    for (int turn = 0; (ended = waitpid(id, &status, WNOHANG)) == 0; turn++) {
        struct timespec pause = {0, turn < 20 ? 200000 : 2000000};
        nanosleep(&pause, NULL);
        if (seconds() - start > 240 && !r.late) {
            r.late = true;
            kill(id, SIGKILL);
        }
    }
    if (child.threads && before) setenv("OMP_NUM_THREADS", before, 1);
    if (child.threads && !before) unsetenv("OMP_NUM_THREADS");
    free(before);
    r.status = ended == id && WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    r.signal = ended == id && WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    if (child.output_path)
        r.out[0] = 0;
    else
        read_output(out, r.out, sizeof r.out);
    read_output(err, r.err, sizeof r.err);
    return &r;
}

static const Result* forked(void (*function)(const char*), const char* argument) {
    return run_child(function, argument, NULL);
}

// train_gpt with these arguments, which are separated by spaces; '' stands for one that is empty, and within '...'
// or "..." spaces belong to the argument.
__attribute__((format(printf, 1, 2))) static const Result* cli(const char* format, ...) {
    char text[1 << 14], number[16], step[16];
    char* arguments[256];
    int count = 0;
    snprintf(number, sizeof number, "%d", child.signal);
    snprintf(step, sizeof step, "%d", child.at);
    const char* fixed[] = {"test_gpt", "--signal", step, number, "--cli"};
    for (int i = 0; i < 5; i++)
        if (child.signal || i == 0 || i == 4) arguments[count++] = (char*)fixed[i];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char* p = text; *p && count < 255;) {
        if (*p == ' ') {
            p++;
            continue;
        }
        char end = *p == '\'' || *p == '"' ? *p : ' ';
        if (end != ' ') p++;
        arguments[count++] = p;
        while (*p && *p != end) p++;
        if (*p) *p++ = 0;
    }
    arguments[count] = NULL;
    return run_child(NULL, NULL, arguments);
}

// That a process ended as every failure must: this status, no signal, and one line on stderr that says `text`.
static bool check_failure(const Result* r, int status, const char* text, const char* file, int line, const char* what) {
    const char* end = strchr(r->err, '\n');
    bool good = check(!r->late, file, line, "%s: it does not end", what);
    if (r->signal)
        good = check(r->late, file, line, "%s: ended by signal %d", what, r->signal) && good;
    else
        good = check(r->status == status, file, line, "%s: status %d, expected %d (stderr: %s)", what, r->status,
                     status, r->err) &&
               good;
    good = check(!strncmp(r->err, "train_gpt: ", 11) && end && !end[1], file, line,
                 "%s: stderr is not one line by train_gpt: '%s'", what, r->err) &&
           good;
    return check(strstr(r->err, text) != NULL, file, line, "%s: '%s' is not in '%s'", what, text, r->err) && good;
}

static bool check_success(const Result* r, const char* file, int line, const char* what) {
    return check(r->status == 0 && r->signal == 0, file, line, "%s: status %d, signal %d, stderr: %s", what, r->status,
                 r->signal, r->err);
}

#define CHECK_FAILURE(result, status, text, what) check_failure(result, status, text, __FILE__, __LINE__, what)
#define CHECK_SUCCESS(result, what)               check_success(result, __FILE__, __LINE__, what)

// ====================================================================================================================
// Errors and files

// Replaces a file by 100 kB of 'n', as a checkpoint is.
static void replace_file(const char* path) {
    static char news[100000];
    Output out;
    memset(news, 'n', sizeof news);
    output_open(&out, path, 0);
    output_write(&out, news, sizeof news / 2);
    output_write(&out, news, sizeof news / 2);
    output_finish(&out);
}

static void test_replace_file(void) {
    const char *path = in_folder("file"), *temporary = in_folder("file.tmp");
    CHECK_SUCCESS(forked(replace_file, path), "a new file");
    size_t size = 0;
    char* data = read_file(path, &size);
    CHECK(data && size == 100000 && data[0] == 'n' && data[size - 1] == 'n', "the new file is not what was written");
    free(data);
    CHECK(!exists(temporary), "the temporary file is left");

    write_file(path, "old", 3);
    // The limits stop the write in the middle, at the last flush, and one byte before the end.
    static const size_t limits[] = {1000, 5000, 50000, 99999};
    for (size_t i = 0; i < 4; i++) {
        child.file_limit = limits[i];
        CHECK_FAILURE(forked(replace_file, path), 1, "cannot write", "a full disk");
        child.file_limit = 0;
        data = read_file(path, &size);
        CHECK(data && size == 3 && !memcmp(data, "old", 3), "a full disk at %zu bytes has cost the old file",
              limits[i]);
        free(data);
        CHECK(!exists(temporary), "a full disk at %zu bytes leaves the temporary file", limits[i]);
    }
    child.file_limit = 100000;
    CHECK_SUCCESS(forked(replace_file, path), "a disk with just enough room");
    child.file_limit = 0;
}

static void test_replace_file_impossible(void) {
    CHECK_FAILURE(forked(replace_file, in_folder("no/such/file")), 1, "No such file", "a folder that is not there");
    write_file(in_folder("file"), "old", 3);
    CHECK_FAILURE(forked(replace_file, in_folder("file/below")), 1, "Not a directory", "a folder that is a file");
    mkdir(in_folder("directory"), 0777);
    mkdir(in_folder("directory/full"), 0777);
    CHECK_FAILURE(forked(replace_file, in_folder("directory")), 1, "directory", "a name that is a folder's");
    CHECK(exists(in_folder("directory/full")) && !exists(in_folder("directory.tmp")), "the folder is not as it was");
    char path[5000];
    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = 0;
    CHECK_FAILURE(forked(replace_file, path), 1, "too long", "a name of 5,000 characters");
    path[1000] = 0;
    CHECK_FAILURE(forked(replace_file, path), 1, "name too long", "a name of 1,000 characters");
    // A device must not be replaced by a file, not even by root. (A pipe stands for it: were it replaced, no harm.)
    mkfifo(in_folder("pipe"), 0666);
    CHECK_FAILURE(forked(replace_file, in_folder("pipe")), 1, "not a regular file", "a name that is a pipe's");
    struct stat info;
    CHECK(!stat(in_folder("pipe"), &info) && S_ISFIFO(info.st_mode), "the pipe was replaced");
}

static void map_and_end(const char* path) {
    File file = map_file(path, "; advice");
    unmap_file(&file);
}

static void test_map_file(void) {
    write_file(in_folder("empty"), "", 0);
    write_file(in_folder("file"), "content", 7);
    File file = map_file(in_folder("file"), "");
    CHECK(file.size == 7 && !memcmp(file.data, "content", 7), "a mapped file differs");
    unmap_file(&file);
    CHECK(file.size == 0, "a file that is given back keeps its size");
    unmap_file(&file); // does nothing
    CHECK_SUCCESS(forked(map_and_end, in_folder("empty")), "an empty file");
    CHECK_FAILURE(forked(map_and_end, in_folder("missing")), 1, "missing: No such file or directory; advice",
                  "a missing file");
    CHECK_FAILURE(forked(map_and_end, folder), 1, "is not a regular file; advice", "a folder");
    CHECK_FAILURE(forked(map_and_end, "/dev/zero"), 1, "is not a regular file", "a device");
    mkfifo(in_folder("pipe"), 0666);
    CHECK_FAILURE(forked(map_and_end, in_folder("pipe")), 1, "is not a regular file", "a pipe that nobody writes to");
}

static void allocate_too_much(const char* size) {
    void* p = allocate((size_t)strtoull(size, NULL, 16), 4, "the test");
    printf("%p\n", p); // so that no compiler leaves it out
    free(p);
}

static void test_allocate(void) {
    for (size_t n = 0; n < 300; n += 7) {
        char* p = (char*)allocate(n, 3, "a test");
        bool zero = true;
        for (size_t i = 0; i < 3 * n; i++) zero = zero && !p[i];
        CHECK(zero && (size_t)p % 64 == 0, "%zu bytes are not zeroed and aligned", 3 * n);
        memset(p, 1, 3 * n);
        free(p);
    }
    CHECK_FAILURE(forked(allocate_too_much, "4000000000000000"), 1, "too large", "an overflow to 0");
    CHECK_FAILURE(forked(allocate_too_much, "3fffffffffffffff"), 1, "too large", "an overflow by the alignment");
    CHECK_FAILURE(forked(allocate_too_much, "ffffffffffffffff"), 1, "too large", "the largest size");
#ifndef __SANITIZE_ADDRESS__ // which stops a program that asks for so much
    CHECK_FAILURE(forked(allocate_too_much, "1000000000000000"), 1, "no memory", "more than the address space");
#endif
    double memory = (double)memory_available();
    CHECK(memory > 1e6 && memory < 1e15, "%.0f bytes of memory are available", memory);
}

// Limits of control groups: of version 2 in the group or in one above it, of version 1, and as a container sees them.
static void test_cgroup_limit(void) {
    static const char* const folders[] = {"c", "c/a", "c/a/b", "c/memory", "c/memory/d"};
    for (size_t i = 0; i < 5; i++) mkdir(in_folder(folders[i]), 0777);
    write_file(in_folder("list"), "0::/a/b\n", 8);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == SIZE_MAX, "a limit where there is none");
    write_file(in_folder("c/a/memory.max"), "max\n", 4);
    write_file(in_folder("c/a/b/memory.max"), "70000000\n", 9);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == 70000000, "the group's own limit");
    write_file(in_folder("c/a/memory.max"), "60000000\n", 9);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == 60000000, "the limit of the group above");
    write_file(in_folder("c/memory.max"), "50000000\n", 9);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == 50000000, "the topmost limit");
    const char* first = "11:cpu,cpuacct:/x\n7:memory:/d\n1:name=systemd:/y\n";
    write_file(in_folder("list"), first, strlen(first));
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == SIZE_MAX, "a limit of version 1 where there is none");
    write_file(in_folder("c/memory/d/memory.limit_in_bytes"), "40000000\n", 9);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == 40000000, "version 1");
    write_file(in_folder("list"), "7:memory:/outside/of/here\n", 26);
    write_file(in_folder("c/memory/memory.limit_in_bytes"), "30000000\n", 9);
    CHECK(cgroup_limit(in_folder("list"), in_folder("c")) == 30000000, "a path that only the host has");
    CHECK(cgroup_limit(in_folder("none"), in_folder("c")) == SIZE_MAX, "no list");
}

// ====================================================================================================================
// Random numbers

// Steele, Lea and Flood's generator started from 0 gives these.
static void test_random_bits(void) {
    static const uint64_t known[] = {0xE220A8397B1DCDAFu, 0x6E789E6AA1B965F4u, 0x06C45D188009454Fu,
                                     0xF88BB8A8724C81ECu};
    for (size_t i = 0; i < 4; i++)
        CHECK(random_bits(0, i) == known[i], "number %zu is %016llx", i, (unsigned long long)random_bits(0, i));
}

static void test_random_uniform(void) {
    double sum = 0, squares = 0, least = 1, most = 0;
    const int n = 200000;
    for (int i = 0; i < n; i++) {
        double u = random_uniform(7, (uint64_t)i);
        sum += u;
        squares += u * u;
        least = fmin(least, u);
        most = fmax(most, u);
    }
    double mean = sum / n, variance = squares / n - mean * mean;
    CHECK(least > 0 && least < 1e-4 && most < 1 && most > 1 - 1e-4, "uniform numbers from %g to %g", least, most);
    CHECK(fabs(mean - 0.5) < 0.003 && fabs(variance - 1 / 12.0) < 0.001, "mean %g, variance %g", mean, variance);
}

// Moments of the normal distribution up to the fourth, and no correlation of neighbours or of streams.
static void test_random_normal(void) {
    double m[5] = {0}, neighbours = 0, streams = 0, before = 0;
    const int n = 200000;
    for (int i = 0; i < n; i++) {
        double x = random_normal(random_bits(3, 1), (uint64_t)i);
        if (!CHECK(isfinite(x), "number %d is %g", i, x)) return;
        for (int k = 1; k < 5; k++) m[k] += pow(x, k) / n;
        neighbours += x * before / n;
        streams += x * random_normal(random_bits(3, 2), (uint64_t)i) / n;
        before = x;
    }
    CHECK(fabs(m[1]) < 0.01 && fabs(m[2] - 1) < 0.015, "mean %g, variance %g", m[1], m[2]);
    CHECK(fabs(m[3]) < 0.03 && fabs(m[4] - 3) < 0.12, "third moment %g, fourth %g", m[3], m[4]);
    CHECK(fabs(neighbours) < 0.01 && fabs(streams) < 0.01, "correlations %g and %g", neighbours, streams);
}

static void test_shuffled(void) {
    static bool seen[100000];
    static const size_t more[] = {511, 512, 513, 1023, 1024, 1025, 4095, 4097, 65535, 65537, 100000};
    for (size_t k = 1; k <= 300 + sizeof more / sizeof *more; k++) {
        size_t n = k <= 300 ? k : more[k - 301], moved = 0;
        memset(seen, 0, sizeof seen);
        for (size_t i = 0; i < n; i++) {
            uint64_t to = shuffled(i, n, 99 + k);
            if (!CHECK(to < n && !seen[to], "of %zu, element %zu goes to %zu: outside or taken", n, i, (size_t)to))
                break;
            seen[to] = true;
            moved += to != i;
        }
        if (n >= 100) CHECK(moved > n - 20, "of %zu only %zu are moved", n, moved);
    }
    // A different order for each key, and all orders of a few elements about equally often.
    size_t same = 0, counts[27] = {0};
    for (size_t i = 0; i < 1000; i++) same += shuffled(i, 1000, 1) == shuffled(i, 1000, 2);
    CHECK(same < 20, "two keys put %zu of 1000 to the same place", same);
    for (uint64_t key = 0; key < 6000; key++)
        counts[9 * shuffled(0, 3, random_bits(1, key)) + 3 * shuffled(1, 3, random_bits(1, key)) +
               shuffled(2, 3, random_bits(1, key))]++;
    size_t orders = 0;
    for (size_t i = 0; i < 27; i++) {
        orders += counts[i] > 0;
        CHECK(!counts[i] || (counts[i] > 800 && counts[i] < 1200), "an order of 3 occurs %zu times in 6000", counts[i]);
    }
    CHECK(orders == 6, "%zu orders of 3", orders);
}

// What a seed means: numbers worked out in Python from the comments, which no later version may change.
static void test_random_known(void) {
    static const uint64_t places[] = {319, 792, 276, 917, 40, 687, 863, 363};
    static const uint64_t far[] = {896509186959, 174015228566, 557167647576};
    for (uint64_t i = 0; i < 8; i++)
        CHECK(shuffled(i, 1000, 42) == places[i], "element %d of 1000 goes to %d", (int)i, (int)shuffled(i, 1000, 42));
    for (uint64_t i = 0; i < 3; i++)
        CHECK(shuffled(i, (uint64_t)1 << 40, 42) == far[i], "element %d of 2^40 goes elsewhere", (int)i);
    // A uniform number is the middle of one of 2^52 steps.
    CHECK(random_uniform(0, 2) * 4503599627370496.0 == 119047123894420.5, "uniform %.17g", random_uniform(0, 2));
    CHECK(random_uniform(0, 1) * 4503599627370496.0 == 1943429326707606.5, "uniform %.17g", random_uniform(0, 1));
    CHECK(fabs(random_normal(7, 0) - 1.3649922974572282) < 1e-6, "normal %.9g", random_normal(7, 0));
    CHECK(fabs(random_normal(7, 1) + 0.3965239752538177) < 1e-6, "normal %.9g", random_normal(7, 1));
    CHECK(fabs(random_normal(7, 100) + 0.5363079349197423) < 1e-6, "normal %.9g", random_normal(7, 100));
}

// ====================================================================================================================
// Matrix multiply

// A matrix of random numbers with GUARD numbers before and behind it, whose bits must not change.
enum { GUARD = 64 };
static const float guard = -12345.5f;

static float* guarded(size_t size, uint64_t key) {
    float* p = (float*)allocate(size + 2 * GUARD, sizeof(float), "a test's matrix");
    for (size_t i = 0; i < size + 2 * GUARD; i++) p[i] = i < GUARD || i >= GUARD + size ? guard : random_normal(key, i);
    return p + GUARD;
}

static bool release_guarded(float* p, size_t size) {
    bool whole = true;
    for (size_t i = 0; i < GUARD; i++) whole = whole && p[-1 - (ptrdiff_t)i] == guard && p[size + i] == guard;
    free(p - GUARD);
    return whole;
}

enum { TRANSPOSE_A = 1, TRANSPOSE_B = 2, BIAS = 4, ADD = 8, ADD_TO_ITSELF = 16, IN_TILE = 32 };

// matmul_tile reads whole tiles, so both factors are moved to where there is room, with NaN after them.
static void tile_product(float* c, size_t width, bool accumulate, Matrix a, const float* b, size_t M, size_t N,
                         size_t K) {
    size_t wide = round_up(N, NR), rows = round_up(M, MR);
    float *A = (float*)allocate(rows * K, sizeof(float), "a"), *B = (float*)allocate(K * wide, sizeof(float), "b");
    bool dense = a.column == 1;
    Matrix moved = dense ? matrix(A, K) : transposed(A, rows);
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < K; k++)
            A[i * moved.row + k * moved.column] = i < M ? a.p[i * a.row + k * a.column] : NAN;
    for (size_t k = 0; k < K; k++)
        for (size_t j = 0; j < wide; j++) B[k * wide + j] = j < N ? b[k * N + j] : NAN;
    matmul_tile(c, width, accumulate, moved, B, wide, M, N, K, NULL, NULL);
    free(A), free(B);
}

// x as a product of bfloat16s has it: of 8 bits, subnormal ones 0. As its definition says, by rounding x 2^-e to a
// multiple of 2^-8, which takes ties to even.
static double rounded(double x) {
    int e;
    double m = frexp(x, &e);
    return !bf16 || !isfinite(x) ? x : fabs(x) < FLT_MIN ? 0 : ldexp(nearbyint(ldexp(m, 8)), e - 8);
}

// One product against a plain loop in double precision; where bfloat16s are multiplied, of the rounded operands.
static void try_product(size_t M, size_t N, size_t K, int flags) {
    size_t width = flags & IN_TILE ? N + 5 : N, c_size = M * width; // a tile is a part of a wider matrix
    float *a = guarded(M * K, 1), *b = guarded(K * N, 2), *bias = guarded(N, 3), *c = guarded(c_size, 4);
    float *add = guarded(c_size, 5), *before = (float*)allocate(c_size, sizeof(float), "a test's matrix");
    memcpy(before, c, c_size * sizeof(float));
    Matrix A = flags & TRANSPOSE_A ? transposed(a, M) : matrix(a, K);
    Matrix B = flags & TRANSPOSE_B ? transposed(b, K) : matrix(b, N);
    if (flags & IN_TILE)
        tile_product(c, width, flags & ADD_TO_ITSELF, A, b, M, N, K);
    else
        matmul(c, A, B, flags & BIAS ? bias : NULL, flags & ADD_TO_ITSELF ? c : flags & ADD ? add : NULL, M, N, K);
    bool packed = M > 1 && !(flags & IN_TILE); // else in float32
    for (size_t i = 0; i < M * K && packed; i++) a[i] = (float)rounded(a[i]);
    for (size_t i = 0; i < K * N && packed; i++) b[i] = (float)rounded(b[i]);
    double error = 0, size = 0;
    bool outside = true;
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < width; j++) {
            if (j >= N) {
                outside = outside && c[i * width + j] == before[i * width + j];
                continue;
            }
            double sum = flags & BIAS ? bias[j] : 0;
            if (flags & ADD_TO_ITSELF)
                sum += before[i * width + j];
            else if (flags & ADD)
                sum += add[i * width + j];
            size += sum * sum; // the usual size of a sum of such terms; the sum itself may happen to be near 0
            for (size_t k = 0; k < K; k++) {
                double term = (double)A.p[i * A.row + k * A.column] * B.p[k * B.row + j * B.column];
                sum += term;
                size += term * term;
            }
            error += (c[i * width + j] - sum) * (c[i * width + j] - sum);
        }
    double allowed = PLAIN ? 2e-6 : 1e-6; // the plain multiply adds all of K up in one sum
    CHECK(error <= allowed * allowed * size, "(%zu,%zu) times (%zu,%zu), flags %d: relative error %g", M, K, K, N,
          flags, sqrt(error / size));
    CHECK(outside, "(%zu,%zu) times (%zu,%zu), flags %d: writes between the rows", M, K, K, N, flags);
    free(before);
    bool whole = release_guarded(c, c_size);
    whole = release_guarded(a, M * K) && whole;
    whole = release_guarded(b, K * N) && whole;
    whole = release_guarded(bias, N) && whole;
    whole = release_guarded(add, c_size) && whole;
    CHECK(whole, "(%zu,%zu) times (%zu,%zu), flags %d: writes outside", M, K, K, N, flags);
}

static void test_matmul_small(void) {
    static const size_t Ms[] = {1, 2, MR - 1, MR, MR + 1, 2 * MR + 3}, Ns[] = {1, 3, NR - 1, NR, NR + 1, 2 * NR + 5};
    static const size_t Ks[] = {0, 1, 2, 15, 16, 17, 33};
    omp_set_num_threads(1); // starting threads would take longer than their work
    for (size_t m = 0; m < 6; m++)
        for (size_t n = 0; n < 6; n++)
            for (size_t k = 0; k < 7; k++)
                for (int flags = 0; flags < 32; flags++) try_product(Ms[m], Ns[n], Ks[k], flags);
}

// matmul_tile where a is zero in part and c is not wanted in part: NaN stands where it has nothing to look for, and what
// it need not write keeps its bits.
static void try_product_in_part(size_t M, size_t N, size_t K, uint64_t key) {
    enum { ROWS = 3 * MR, COLUMNS = 3 * NR, DEPTH = 40 };
    float a[ROWS * DEPTH], b[DEPTH * COLUMNS], c[ROWS * COLUMNS], before[ROWS * COLUMNS];
    Range steps[ROWS], columns[ROWS], none = {0, 0};
    for (size_t i = 0; i < M; i++) { // grow by 0 to 3 a row
        Range last = i ? steps[i - 1] : none, taken = {last.first + random_bits(key, 3 * i) % 4, 0};
        taken.first = min_size(taken.first, K);
        taken.end = last.end + random_bits(key, 3 * i + 1) % 4;
        taken.end = min_size(K, taken.end < taken.first ? taken.first : taken.end);
        steps[i] = taken;
        columns[i].first = min_size(N - 1, (i ? columns[i - 1].first : 0) + random_bits(key, 3 * i + 2) % 8);
        columns[i].end = N;
    }
    for (size_t i = 0; i < ROWS; i++)
        for (size_t k = 0; k < K; k++) {
            size_t top = i / MR * MR, low = min_size(top + MR, M) - 1; // of the rows that are computed together
            bool own = i < M && k >= steps[i].first && k < steps[i].end,
                 read = i < M && k >= steps[top].first && k < steps[low].end;
            a[i * K + k] = own ? random_normal(key + 1, i * K + k) : read ? 0 : NAN;
        }
    for (size_t i = 0; i < DEPTH * COLUMNS; i++) b[i] = random_normal(key + 2, i);
    for (size_t i = 0; i < ROWS * COLUMNS; i++) before[i] = c[i] = random_normal(key + 3, i);
    bool add = key % 2;
    matmul_tile(c, COLUMNS, add, matrix(a, K), b, COLUMNS, M, N, K, steps, columns);
    double error = 0;
    bool kept = true;
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            double sum = add ? before[i * COLUMNS + j] : 0, off;
            for (size_t k = steps[i].first; k < steps[i].end; k++) sum += (double)a[i * K + k] * b[k * COLUMNS + j];
            off = fabs(c[i * COLUMNS + j] - sum);
            if (j >= columns[i].first) error = off <= error || isnan(error) ? error : off;
            if (j < columns[i / MR * MR].first / NR * NR) kept = kept && c[i * COLUMNS + j] == before[i * COLUMNS + j];
        }
    CHECK(error < 1e-5, "(%zu,%zu) times (%zu,%zu) in part: error %g", M, K, K, N, error);
    CHECK(kept, "(%zu,%zu) times (%zu,%zu) in part: writes what is not wanted", M, K, K, N);
}

static void test_matmul_in_part(void) {
    for (uint64_t key = 0; key < 200; key++)
        try_product_in_part(1 + random_bits(key, 1000) % (3 * MR), 1 + random_bits(key, 1001) % (3 * NR),
                            1 + random_bits(key, 1002) % 40, key);
}

// Sizes at the borders of the blocks, one dimension at a time so that it stays quick.
static void test_matmul_blocks(void) {
    static const int all[] = {0,
                              TRANSPOSE_A | BIAS,
                              TRANSPOSE_B | ADD,
                              TRANSPOSE_A | TRANSPOSE_B | ADD_TO_ITSELF,
                              BIAS | ADD_TO_ITSELF,
                              TRANSPOSE_B | BIAS};
    for (size_t f = 0; f < 6; f++)
        for (size_t d = 0; d < 3; d++) {
            try_product(MC - 1 + d, NR + 3, 20, all[f]);
            try_product(2 * MC - 1 + d, NR, 20, all[f]);
            try_product(MR + 2, NC - 1 + d, 7, all[f]);
            try_product(1, NC - 1 + d, 7, all[f]);
            try_product(MR + 2, NR + 1, KC - 1 + d, all[f]);
            try_product(MR + 2, NR + 1, 2 * KC - 1 + d, all[f]);
            try_product(1, 65, 2 * KC - 1 + d, all[f]);
            try_product(3, 2 * NC - 1 + d, 5, all[f]);
            try_product(NR, 8 * NC - 1 + d, 9, all[f]);
            try_product(8 * MC - 1 + d, NR, 9, all[f]);
            try_product(MR + 2, NR + 1, DEEP - 1 + d, all[f]);
            try_product(2 * NR, NR, DEEP - 1 + d, all[f]);
        }
    try_product(0, 0, 3, BIAS);
    try_product(3 * MC + 5, NC + 37, KC + 11, BIAS | ADD);
    try_product(5 * NR + 3, 7 * NR + 1, KC + 11, BIAS | ADD);
    try_product(7 * NR + 1, 5 * NR + 3, KC + 11, BIAS | ADD);
}

static void test_matmul_tile(void) {
    static const size_t sizes[] = {1, 2, MR, NR, NR + 1, 31, TILE - 1, TILE};
    static const size_t longer[] = {1, 15, TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 9};
    for (size_t m = 0; m < 8; m++)
        for (size_t n = 0; n < 7; n++)
            for (size_t k = 0; k < 7; k++)
                for (int flags = 0; flags <= TRANSPOSE_A; flags += TRANSPOSE_A) {
                    try_product(sizes[m], longer[n], longer[k], flags | IN_TILE);
                    try_product(sizes[m], longer[n], longer[k], flags | IN_TILE | ADD_TO_ITSELF);
                }
}

// What is not finite stays visible wherever it meets the sum, and nowhere else.
static void test_matmul_not_finite(void) {
    enum { M = 9, N = 40, K = 50 };
    static float a[M * K], b[K * N], c[M * N];
    for (size_t i = 0; i < M * K; i++) a[i] = 1;
    for (size_t i = 0; i < K * N; i++) b[i] = 1;
    a[3 * K + 7] = NAN;
    b[11 * N + 5] = INFINITY;
    for (size_t rows = 1; rows <= M; rows += M - 1) {
        matmul(c, matrix(rows == 1 ? a + 3 * K : a, K), matrix(b, N), NULL, NULL, rows, N, K);
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < N; j++) {
                bool as_it_must = rows == 1 || i == 3 ? (bool)isnan(c[i * N + j])
                                  : j == 5            ? (bool)isinf(c[i * N + j])
                                                      : c[i * N + j] == K;
                CHECK(as_it_must, "%zu rows: c(%zu,%zu) = %g", rows, i, j, c[i * N + j]);
            }
    }
}

// Every sign and exponent with every upper half of a mantissa, and lower halves around the middle.
static void test_matmul_rounding(void) {
    static const uint32_t lower[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    bf16 = true;
    for (uint32_t upper = 0; upper < 0x10000; upper++)
        for (size_t i = 0; i < sizeof lower / sizeof *lower; i++) {
            uint32_t bits = upper << 16 | lower[i], got;
            float x, y;
            memcpy(&x, &bits, sizeof x);
            got = bfloat16_bits(x);
            memcpy(&y, &got, sizeof y);
            double right = rounded(x);
            bool large = fabs(right) > FLT_MAX; // from the middle between the largest bfloat16 and 2^128 on
            CHECK(isnan(x) ? isnan(y)
                  : large  ? isinf(y) && (y > 0) == (x > 0)
                           : y == right,
                  "%a becomes %a, not %a", (double)x, (double)y, right);
            CHECK(!(got & 0xFFFF) && (isnan(x) || signbit(x) == signbit(y)), "%a becomes %08x", (double)x, got);
        }
}

// Each sum, number by number: k after k from 0, each product added as fma does. The processor's kernel and kernel() are
// as good as one another, but of a sum below 2^-126 the former makes 0.
static void test_matmul_bf16(void) {
    enum { M = 2 * MR + 3, N = 2 * NR + 5, K = 67 };
    static float c[M * N];
    PairKernel* kernels[] = {NULL, find_pair_kernel(false)};
    if (PLAIN) {
        skip("the plain multiply is in float32");
        return;
    }
    bool odd = LANES == 4 && kernels[1]; // BFDOT rounds in a way of its own, and is held against the bound alone
    bf16 = true;
    for (int which = 0; which < 2; which++) {
        if (which && !kernels[1]) {
            skip("this processor has no instruction for products of bfloat16s");
            return;
        }
        pair_kernel = kernels[which];
        test_matmul_small();
        test_matmul_not_finite();
        test_matmul_blocks();
        for (size_t depth = 1; depth <= K; depth += depth < 4 ? 1 : 9)
            for (int small = 0; small <= which && !(which && odd); small++) {
                float *a = guarded(M * depth, depth), *b = guarded(depth * N, 1 + depth);
                for (size_t i = 0; small && i < M * depth; i++) a[i] *= 0x1p-60f;
                for (size_t i = 0; small && i < depth * N; i++) b[i] *= 0x1p-66f;
                matmul(c, matrix(a, depth), matrix(b, N), NULL, NULL, M, N, depth);
                for (size_t i = 0; i < M * depth; i++) a[i] = (float)rounded(a[i]);
                for (size_t i = 0; i < depth * N; i++) b[i] = (float)rounded(b[i]);
                size_t wrong = 0;
                for (size_t i = 0; i < M * N; i++) {
                    float sum = 0;
                    for (size_t k = 0; k < depth; k++) {
                        sum = fmaf(a[i / N * depth + k], b[k * N + i % N], sum);
                        if (which && fabsf(sum) < FLT_MIN) sum = copysignf(0, sum);
                    }
                    wrong += c[i] != sum;
                }
                CHECK(!wrong, "kernel %d, depth %zu, small %d: %zu sums differ from the definition's", which, depth,
                      small, wrong);
                CHECK(release_guarded(a, M * depth) && release_guarded(b, depth * N), "writes outside");
            }
    }
}

// ====================================================================================================================
// The twin's layers
//
// They come under train_gpt.c's names and with its arguments, so that the checks of the layers below are the same for
// both: arguments are copied to memory of the device of exactly their size, and results back. And each call is compared
// with train_gpt.c's function on the same numbers, which have been rounded as the twin's are. What it computes in
// float32 then differs only by the order of sums. What it keeps in bfloat16, of 8 bits, is rounded once more, by at most
// 2^-8 of each number; some functions round on the way, too.
//
// The matrix units do not add up bfloat16's products quite in float32: NVIDIA does not say how, but it was measured (Fasi
// et al. 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025, "Accurate models of NVIDIA tensor
// cores"). Of 8 or 16 products and the sum so far, what lies below the 24th bit of the largest is cut off, without
// rounding. So each of K products, and each sum, loses less than 2^-23 of the largest number beside it, and always
// towards 0. Where that is about as large as the result, the result of K products is wrong by less than
// (K + K/8) 2^-23, for which cut_off(K) allows K 2^-22. cuda_on_cpu.h cuts off likewise.

#ifdef TWIN
#define SAME_IN_FLOAT32 1e-6
enum { TWINS = 1, BFLOAT16 = sizeof(gpu::real) == 2 };
#ifdef CUDA_ON_CPU
enum { SLOW = 1 }; // some checks are then done for a part of the cases
#else
enum { SLOW = 0 };
#endif

static double cut_off(size_t K) { return BFLOAT16 ? (double)K * 0x1p-22 : 0; }

__attribute__((unused)) static void from_float(float* to, float x) { *to = x; } // one of the two is used
__attribute__((unused)) static void from_float(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

static void on_device(cudaError_t status) {
    if (status) die("the device: %s", cudaGetErrorString(status));
}

// A layer's argument, on the device and, rounded likewise, on the host.
template <typename S> struct Both {
    size_t n;
    S* device;
    float* host;

    Both(const float* from, size_t count) : n(count), device(NULL), host((float*)allocate(n, sizeof(float), "a test")) {
        S* copy = (S*)allocate(n, sizeof(S), "a test");
        for (size_t i = 0; i < n; i++) {
            from_float(&copy[i], from ? from[i] : NAN);
            host[i] = gpu::to_float(copy[i]);
        }
        gpu::start();
        on_device(cudaMalloc((void**)&device, (n ? n : 1) * sizeof(S)));
        gpu::upload(device, copy, n * sizeof(S)); // in the order of the stream on which the layers run
        free(copy);
    }
    Both(const Both&) = delete;
    ~Both() {
        on_device(cudaStreamSynchronize(gpu::stream));
        on_device(cudaFree(device));
        free(host);
    }

    // Brings the device's result, which must agree with the host's, but for `roundings` to bfloat16 and what cannot be
    // known better.
    void finish(float* to, const char* what, int roundings = 1, double unknown = 0) const {
        S* copy = (S*)allocate(n, sizeof(S), "a test");
        gpu::download(copy, device, n * sizeof(S));
        double distance2 = 0, norm2 = 0;
        for (size_t i = 0; i < n; i++) {
            double ours = to[i] = gpu::to_float(copy[i]), right = host[i];
            if (ours == right || (isnan(ours) && isnan(right))) ours = right = isfinite(right) ? right : 0;
            distance2 += (ours - right) * (ours - right);
            norm2 += right * right;
        }
        free(copy);
        double error = distance2 ? sqrt(distance2 / norm2) : 0;
        double allowed = (sizeof(S) == 2 ? roundings * 0x1p-8 : SAME_IN_FLOAT32) + unknown;
        if (getenv("GPT_TEST_VERBOSE"))
            printf("  %-14s %-14s differs from the CPU's by %.1e of %.1e allowed\n", test_name, what, error, allowed);
        CHECK(error <= allowed, "%s differs from the CPU's by %.2e, allowed is %.2e", what, error, allowed);
    }
};

struct Indices {
    int* device;
    Indices(const int* from, size_t n) {
        on_device(cudaMalloc((void**)&device, n * sizeof(int)));
        gpu::upload(device, from, n * sizeof(int));
    }
    Indices(const Indices&) = delete;
    ~Indices() {
        on_device(cudaStreamSynchronize(gpu::stream));
        on_device(cudaFree(device));
    }
};

namespace twin {
typedef gpu::real real;

static size_t vocabulary_of(const int* tokens, size_t n) {
    int most = 0;
    for (size_t i = 0; i < n; i++) most = tokens[i] > most ? tokens[i] : most;
    return (size_t)most + 1;
}

static void embedding_forward(float* x_, const int* tokens, const float* wte_, const float* wpe_, size_t B, size_t T,
                              size_t start, size_t C) {
    Both<real> x(NULL, B * T * C);
    Both<float> wte(wte_, vocabulary_of(tokens, B * T) * C), wpe(wpe_, (start + T) * C);
    gpu::embedding_forward(x.device, Indices(tokens, B * T).device, wte.device, wpe.device, B, T, start, C);
    ::embedding_forward(x.host, tokens, wte.host, wpe.host, B, T, start, C);
    x.finish(x_, "x");
}

static void embedding_backward(float* dwte_, float* dwpe_, const float* dx_, const int* tokens, size_t B, size_t T,
                               size_t C) {
    size_t rows = B * T, V = vocabulary_of(tokens, rows);
    int* order = (int*)allocate(2 * rows, sizeof(int), "a test");
    gpu::sort_rows(order, tokens, rows, V);
    Both<real> dx(dx_, rows * C);
    Both<float> dwte(dwte_, V * C), dwpe(dwpe_, T * C);
    gpu::embedding_backward(dwte.device, dwpe.device, dx.device, Indices(tokens, rows).device,
                            Indices(order, 2 * rows).device, B, T, C);
    ::embedding_backward(dwte.host, dwpe.host, dx.host, tokens, B, T, C);
    dwte.finish(dwte_, "dwte");
    dwpe.finish(dwpe_, "dwpe");
    free(order);
}

static void layernorm_forward(float* y_, float* mean_, float* rstd_, const float* x_, const float* w_, const float* b_,
                              size_t rows, size_t C) {
    Both<real> y(NULL, rows * C), x(x_, rows * C);
    Both<float> mean(NULL, rows), rstd(NULL, rows), w(w_, C), b(b_, C);
    gpu::layernorm_forward(y.device, mean.device, rstd.device, x.device, w.device, b.device, rows, C);
    ::layernorm_forward(y.host, mean.host, rstd.host, x.host, w.host, b.host, rows, C);
    y.finish(y_, "y");
    mean.finish(mean_, "mean");
    rstd.finish(rstd_, "rstd");
}

static void layernorm_backward(float* dx_, float* dw_, float* db_, const float* dy_, const float* x_,
                               const float* mean_, const float* rstd_, const float* w_, size_t rows, size_t C) {
    Both<real> dx(dx_, rows * C), dy(dy_, rows * C), x(x_, rows * C);
    Both<float> dw(dw_, C), db(db_, C), mean(mean_, rows), rstd(rstd_, rows), w(w_, C);
    gpu::most_slices = rows % 2 ? 3 : 512; // so that blocks have several slices even here
    gpu::layernorm_backward(dx.device, dw.device, db.device, dy.device, x.device, mean.device, rstd.device, w.device,
                            rows, C);
    ::layernorm_backward(dx.host, dw.host, db.host, dy.host, x.host, mean.host, rstd.host, w.host, rows, C);
    dx.finish(dx_, "dx");
    dw.finish(dw_, "dw");
    db.finish(db_, "db");
}

static void linear_forward(float* y_, const float* x_, const float* w_, const float* b_, const float* residual_,
                           size_t rows, size_t IC, size_t OC) {
    Both<real> y(NULL, rows * OC), x(x_, rows * IC), w(w_, IC * OC), b(b_, OC), residual(residual_, rows * OC);
    gpu::linear_forward(y.device, x.device, w.device, b.device, residual_ ? residual.device : NULL, rows, IC, OC);
    ::linear_forward(y.host, x.host, w.host, b.host, residual_ ? residual.host : NULL, rows, IC, OC);
    y.finish(y_, "y");
}

static void linear_backward(float* dx_, float* dw_, float* db_, const float* dy_, const float* x_, const float* w_,
                            size_t rows, size_t IC, size_t OC) {
    Both<real> dx(NULL, rows * IC), dy(dy_, rows * OC), x(x_, rows * IC), w(w_, IC * OC);
    Both<float> dw(dw_, IC * OC), db(db_, OC);
    gpu::linear_backward(dx_ ? dx.device : NULL, dw.device, db.device, dy.device, x.device, w.device, rows, IC, OC);
    ::linear_backward(dx_ ? dx.host : NULL, dw.host, db.host, dy.host, x.host, w.host, rows, IC, OC);
    if (dx_) dx.finish(dx_, "dx");
    dw.finish(dw_, "dw", 1, cut_off(rows));
    db.finish(db_, "db", 1, cut_off(rows)); // the multiply's, too
}

// The weights are rounded before they meet the values; in the backward pass ds is, too.
static void attention_forward(float* out_, float* lse_, const float* qkv_, Attention a) {
    size_t rows = a.B * (a.T - a.start), H = a.H, C = H * a.D;
    Both<real> out(NULL, rows * C), qkv(qkv_, a.B * a.T * 3 * C);
    Both<float> lse(NULL, rows * H);
    gpu::attention_forward(out.device, lse.device, qkv.device, a);
    ::attention_forward(out.host, lse.host, qkv.host, a);
    out.finish(out_, "out", 2);
    lse.finish(lse_, "lse", 1, cut_off(a.D));
}

static void attention_backward(float* dqkv_, const float* dout_, const float* qkv_, const float* out_,
                               const float* lse_, Attention a) {
    size_t rows = a.B * a.T, H = a.H, C = H * a.D;
    Both<real> dqkv(NULL, rows * 3 * C), dout(dout_, rows * C), qkv(qkv_, rows * 3 * C), out(out_, rows * C);
    Both<float> lse(lse_, rows * H), work(NULL, rows * H * 2);
    gpu::attention_backward(dqkv.device, (float2*)work.device, dout.device, qkv.device, out.device, lse.device, a);
    ::attention_backward(dqkv.host, dout.host, qkv.host, out.host, lse.host, a);
    double largest = 0; // a weight is e^(s - lse), so the rounding of lse is its relative error
    for (size_t i = 0; i < rows * H; i++) largest = fmax(largest, fabsf(lse.host[i]));
    dqkv.finish(dqkv_, "dqkv", 2, largest * 0x1p-23);
}

static void gelu_forward(float* y_, const float* x_, size_t n) {
    Both<real> y(NULL, n), x(x_, n);
    gpu::gelu_forward(y.device, x.device, n);
    ::gelu_forward(y.host, x.host, n);
    y.finish(y_, "y");
}

static void gelu_backward(float* dx_, const float* dy_, const float* x_, size_t n) {
    Both<real> dx(NULL, n), dy(dy_, n), x(x_, n);
    const Both<real>& to = dx_ == dy_ ? dy : dx; // in place
    gpu::gelu_backward(to.device, dy.device, x.device, n);
    ::gelu_backward(to.host, dy.host, x.host, n);
    to.finish(dx_, "dx");
}

// Copies rows of `width` numbers; what is between them, if there is more room in `to`, is NaN.
static void copy_rows(float* to, size_t to_stride, const float* from, size_t from_stride, size_t rows, size_t width) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < to_stride; j++) to[i * to_stride + j] = j < width ? from[i * from_stride + j] : NAN;
}

static void cross_entropy_forward(float* losses_, float* lse_, const float* logits_, const int* targets, size_t rows,
                                  size_t V) {
    size_t wide = padded_V(V);
    float* copy = (float*)allocate(rows * wide, sizeof(float), "a test");
    copy_rows(copy, wide, logits_, V, rows, V);
    Both<real> logits(copy, rows * wide);
    Both<float> losses(NULL, rows), lse(NULL, rows);
    gpu::cross_entropy(losses.device, lse.device, logits.device, Indices(targets, rows).device, rows, V, false);
    copy_rows(copy, V, logits.host, wide, rows, V);
    ::cross_entropy_forward(losses.host, lse.host, copy, targets, rows, V);
    losses.finish(losses_, "losses");
    lse.finish(lse_, "lse");
    free(copy);
}

// The twin's finds lse again, and leaves the scale to the multiplies that follow.
static void cross_entropy_backward(float* logits_, const float* lse_, const int* targets, float scale, size_t rows,
                                   size_t V) {
    size_t wide = padded_V(V);
    float* copy = (float*)allocate(rows * wide, sizeof(float), "a test");
    copy_rows(copy, wide, logits_, V, rows, V);
    Both<real> logits(copy, rows * wide);
    Both<float> losses(NULL, rows), lse(NULL, rows);
    gpu::cross_entropy(losses.device, lse.device, logits.device, Indices(targets, rows).device, rows, V, true);
    copy_rows(copy, V, logits.host, wide, rows, V);
    ::cross_entropy_forward(losses.host, lse.host, copy, targets, rows, V);
    ::cross_entropy_backward(copy, lse.host, targets, 1, rows, V);
    memset(logits.host, 0, rows * wide * sizeof(float)); // the padding's gradient
    for (size_t i = 0; i < rows; i++) memcpy(logits.host + i * wide, copy + i * V, V * sizeof(float));
    losses.finish(copy, "losses");
    lse.finish(copy, "lse");
    (void)lse_;
    logits.finish(copy, "dlogits");
    copy_rows(logits_, V, copy, wide, rows, V);
    for (size_t i = 0; i < rows * V; i++) logits_[i] *= scale;
    free(copy);
}
} // namespace twin

#define embedding_forward      twin::embedding_forward
#define embedding_backward     twin::embedding_backward
#define layernorm_forward      twin::layernorm_forward
#define layernorm_backward     twin::layernorm_backward
#define linear_forward         twin::linear_forward
#define linear_backward        twin::linear_backward
#define attention_forward      twin::attention_forward
#define attention_backward     twin::attention_backward
#define gelu_forward           twin::gelu_forward
#define gelu_backward          twin::gelu_backward
#define cross_entropy_forward  twin::cross_entropy_forward
#define cross_entropy_backward twin::cross_entropy_backward
#else
enum { TWINS = 0, SLOW = 0 };
#define BFLOAT16 bf16 // GPT_TEST_PRECISION=bf16
#endif

// ====================================================================================================================
// Layers and model

// The bound stands in exp_'s comment: two units in the last place, of which one is at most 2^-23.
static void test_exp(void) {
    double worst = 0, at = 0;
    uint32_t bits[2];
    static const float ends[] = {-87.3f, 88.3f};
    memcpy(bits, ends, sizeof bits);
    // Every 97th of all the numbers between the cut-offs, negative and positive ones.
    for (int side = 0; side < 2; side++)
        for (uint32_t i = side ? 0 : 0x80000000u; i < bits[side]; i += 97) {
            float x;
            memcpy(&x, &i, sizeof x);
            double exact = exp((double)x), error = fabs(exp_(x) - exact) / exact;
            if (error > worst || isnan(error)) worst = error, at = x;
        }
    CHECK(worst <= 2 * 0x1p-23, "relative error %.3g at %.9g", worst, at);
    CHECK(exp_(0.0f) == 1 && exp_(-0.0f) == 1, "e^0 is %.9g and %.9g", exp_(0.0f), exp_(-0.0f));
    CHECK(exp_(-INFINITY) == 0 && exp_(INFINITY) == INFINITY, "e^-inf is %g, e^inf %g", exp_(-INFINITY),
          exp_(INFINITY));
    CHECK(isnan(exp_(NAN)) && isnan(exp_(-NAN)), "e^NaN is %g", exp_(NAN));
    CHECK(exp_(-87.3f) > 0 && exp_(nextafterf(-87.3f, -100)) == 0 && exp_(-1e30f) == 0, "the cut-off at -87.3 moved");
    CHECK(isfinite(exp_(88.3f)) && exp_(nextafterf(88.3f, 100)) == INFINITY && exp_(1e30f) == INFINITY,
          "the cut-off at 88.3 moved");
    // Rising, but for the rounding of its last place.
    float before = 0;
    for (float x = -88; x < 89; x += 1.0f / 512) {
        CHECK(exp_(x) >= before * (1 - 0x1p-22f), "it falls at %.9g", (double)x);
        before = exp_(x);
    }
}

// What dev/check/reference.py has left in fixtures/ is what PyTorch computes in float64. Each layer alone, fed with the
// reference's inputs, the whole model and a run of AdamW are held against it. GPT_FIXTURES names another folder of
// fixtures, written from another seed for instance.
static const struct {
    const char* name;
    bool complete; // with every activation and its gradient
} fixtures[] = {{"odd", true},    {"one", true},     {"tile63", true}, {"tile64", true},
                {"tile65", true}, {"tile130", true}, {"wide", false}};
enum { FIXTURES = sizeof fixtures / sizeof *fixtures };

static struct {
    const char* name;
    Checkpoint file;
    size_t V, T, C, H, L, B, rows; // rows = B T
} fixture;                         // the one that is open

// Memory that free_borrowed() gives back. Floats are NaN at first, so that one left out by mistake shows.
static void* borrowed[256];
static size_t borrowed_count;

static float* borrow(size_t n) {
    float* p = (float*)allocate(n, sizeof(float), "a test");
    for (size_t i = 0; i < n; i++) p[i] = NAN;
    return (float*)(borrowed[borrowed_count++] = p);
}

static float* borrow_zeros(size_t n) { return (float*)memset(borrow(n), 0, n * sizeof(float)); }

static float* borrow_copy(const float* x, size_t n) { return (float*)memcpy(borrow(n), x, n * sizeof(float)); }

static float* borrow_random(size_t n, uint64_t key) {
    float* x = borrow(n);
    for (size_t i = 0; i < n; i++) x[i] = random_normal(random_bits(key, 0), i);
    return x;
}

static void free_borrowed(void) {
    while (borrowed_count) free(borrowed[--borrowed_count]);
}

typedef struct {
    char name[96];
    const float* p;
    size_t n;
} Stored;

static Stored find_stored(const char* format, va_list args) {
    Stored s = {"", NULL, 0};
    vsnprintf(s.name, sizeof s.name, format, args);
    const Entry* e = find_entry(&fixture.file, "", s.name);
    if (e) {
        s.p = (const float*)e->data;
        s.n = (e->to - e->from) / sizeof(float);
    }
    return s;
}

__attribute__((format(printf, 1, 2))) static const float* stored(const char* format, ...) {
    va_list args;
    va_start(args, format);
    Stored s = find_stored(format, args);
    va_end(args);
    if (!s.p) die("fixture %s has no %s; dev/check/reference.py writes them anew", fixture.name, s.name);
    return s.p;
}

static int* stored_tokens(const char* name, size_t n) {
    const float* x = stored("%s", name);
    int* tokens = (int*)borrow(n);
    for (size_t i = 0; i < n; i++) tokens[i] = (int)x[i];
    return tokens;
}

static bool open_fixture(size_t i) {
    static char path[4096];
    const char* directory = getenv("GPT_FIXTURES");
    fixture.name = fixtures[i].name;
    snprintf(path, sizeof path, "%s/%s.safetensors", directory ? directory : "dev/check/fixtures", fixture.name);
    if (!CHECK(!access(path, R_OK), "%s is missing; dev/check/reference.py writes it", path)) return false;
    fixture.file = open_checkpoint(path, "");
    Config c = read_config(&fixture.file);
    fixture.V = c.V, fixture.T = c.T, fixture.C = c.C, fixture.H = c.H, fixture.L = c.L;
    fixture.B = find_entry(&fixture.file, "", "tokens")->shape[0];
    fixture.rows = fixture.B * fixture.T;
    return true;
}

static void close_fixture(void) {
    free_borrowed();
    close_checkpoint(&fixture.file);
}

static double euclidean_distance(const float* a, const float* b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
    return sqrt(sum);
}

static double euclidean_norm(const float* a, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)a[i] * a[i];
    return sqrt(sum);
}

// The larger of two, and NaN if one of them is: fmax would drop it.
static double larger(double a, double b) { return a >= b || isnan(a) ? a : b; }

static struct {
    size_t count;
    char name[160];
    double error, torch, allowed;
} nearest;

// The error of a tensor is |ours - right| / |right|, in Euclidean norms. float32 cannot do without: the same
// mathematics in PyTorch's float32 has an error too, which the fixture records, and ours may be four times that, as
// its sums have another order. But at least FLOOR, four units in the last place: below that, it would be luck.
// Where the twin rounds to bfloat16, with 8 bits for float32's 24, each rounding errs 2^16 times as much.
#define FLOOR   4.8e-7
#define COARSER (BFLOAT16 ? 65536.0 : 1.0)

__attribute__((format(printf, 3, 4))) static void compare(const float* ours, size_t n, const char* format, ...) {
    va_list args;
    va_start(args, format);
    Stored right = find_stored(format, args);
    va_end(args);
    if (!CHECK(right.p, "fixture %s has no %s", fixture.name, right.name)) return;
    if (!CHECK(right.n == n, "%s %s has %zu numbers, not %zu", fixture.name, right.name, right.n, n)) return;
    double norm = euclidean_norm(right.p, n), error = euclidean_distance(ours, right.p, n);
    if (error > 0) error /= norm;
    double torch = stored("%s.error", right.name)[0], allowed = COARSER * fmax(4 * torch, FLOOR);
    if (getenv("GPT_TEST_VERBOSE"))
        printf("  %-14s %-8s %-34s %.1e, PyTorch %.1e\n", test_name, fixture.name, right.name, error, torch);
    CHECK(error <= allowed, "%s: %s has an error of %.2e; PyTorch's float32 has %.2e", fixture.name, right.name, error,
          torch);
    nearest.count++;
    if (!(error / allowed <= nearest.error / nearest.allowed) || nearest.count == 1) {
        snprintf(nearest.name, sizeof nearest.name, "%s in %s", right.name, fixture.name);
        nearest.error = error, nearest.torch = torch, nearest.allowed = allowed;
    }
}

static void report_nearest(void) {
    if (nearest.count)
        printf("%s: %zu comparisons; nearest to its limit of %.1e: %s with %.1e (PyTorch %.1e)\n", test_name,
               nearest.count, nearest.allowed, nearest.name, nearest.error, nearest.torch);
    memset(&nearest, 0, sizeof nearest);
}

// For sums to which a backward function was asked to add twice.
static float* halved(float* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] /= 2;
    return x;
}

static void for_each_fixture(void (*run)(void)) {
    for (size_t i = 0; i < FIXTURES; i++)
        if (fixtures[i].complete && open_fixture(i)) {
            run();
            close_fixture();
        }
    report_nearest();
}

// What stands below layer l in the residual stream.
static const char* below(size_t l) {
    static char name[32];
    if (!l) return "embedded";
    snprintf(name, sizeof name, "h.%zu.out", l - 1);
    return name;
}

// The head and the embedding share their weights, so the backward test of both is one: the head's share of the
// gradient is there when embedding_backward adds its own.
static void compare_embedding(void) {
    size_t V = fixture.V, C = fixture.C, B = fixture.B, T = fixture.T, rows = fixture.rows;
    const int* tokens = stored_tokens("tokens", rows);
    float *x = borrow(rows * C), *dwte = borrow_zeros(V * C), *dwpe = borrow_zeros(T * C);
    embedding_forward(x, tokens, stored("wte.weight"), stored("wpe.weight"), B, T, 0, C);
    compare(x, rows * C, "embedded");
    for (int twice = 0; twice < 2; twice++) {
        matmul(dwte, transposed(stored("d.logits"), V), matrix(stored("lnf"), C), NULL, dwte, V, C, rows);
        embedding_backward(dwte, dwpe, stored("d.embedded"), tokens, B, T, C);
    }
    compare(halved(dwte, V * C), V * C, "d.wte.weight");
    compare(halved(dwpe, T * C), T * C, "d.wpe.weight");
}
static void test_embedding(void) { for_each_fixture(compare_embedding); }

// so_far: the gradient that the residual stream brings along, to which the layer adds its own; NULL: none.
static void compare_layernorm(const char* x_name, const char* y, const char* parameters, const float* so_far) {
    size_t C = fixture.C, rows = fixture.rows;
    const float *x = stored("%s", x_name), *w = stored("%s.weight", parameters), *b = stored("%s.bias", parameters);
    float *out = borrow(rows * C), *mean = borrow(rows), *rstd = borrow(rows);
    layernorm_forward(out, mean, rstd, x, w, b, rows, C);
    compare(out, rows * C, "%s", y);
    compare(mean, rows, "%s_mean", y);
    compare(rstd, rows, "%s_rstd", y);
    float *dw = borrow_zeros(C), *db = borrow_zeros(C), *dx = NULL;
    for (int twice = 0; twice < 2; twice++) {
        dx = so_far ? borrow_copy(so_far, rows * C) : borrow_zeros(rows * C);
        layernorm_backward(dx, dw, db, stored("d.%s", y), x, stored("%s_mean", y), stored("%s_rstd", y), w, rows, C);
    }
    compare(dx, rows * C, "d.%s", x_name);
    compare(halved(dw, C), C, "d.%s.weight", parameters);
    compare(halved(db, C), C, "d.%s.bias", parameters);
}
static void compare_layernorms(void) {
    size_t L = fixture.L;
    char x[32], y[32], parameters[32];
    for (size_t l = 0; l < L; l++) {
        snprintf(y, sizeof y, "h.%zu.ln1", l);
        snprintf(parameters, sizeof parameters, "h.%zu.ln_1", l);
        compare_layernorm(below(l), y, parameters, stored("d.h.%zu.mid", l));
        snprintf(x, sizeof x, "h.%zu.mid", l);
        snprintf(y, sizeof y, "h.%zu.ln2", l);
        snprintf(parameters, sizeof parameters, "h.%zu.ln_2", l);
        compare_layernorm(x, y, parameters, stored("d.h.%zu.out", l));
    }
    compare_layernorm(below(L), "lnf", "ln_f", NULL);
}
static void test_layernorm(void) { for_each_fixture(compare_layernorms); }

static void compare_linear(size_t l, const char* x_name, const char* y_name, const char* parameters,
                           const float* residual, size_t IC, size_t OC) {
    size_t rows = fixture.rows;
    const float* w = stored("h.%zu.%s.weight", l, parameters);
    const float *x = stored("h.%zu.%s", l, x_name), *dy = stored("d.h.%zu.%s", l, y_name);
    float *y = borrow(rows * OC), *dx = borrow(rows * IC), *dw = borrow_zeros(IC * OC), *db = borrow_zeros(OC);
    linear_forward(y, x, w, stored("h.%zu.%s.bias", l, parameters), residual, rows, IC, OC);
    compare(y, rows * OC, "h.%zu.%s", l, y_name);
    linear_backward(dx, dw, db, dy, x, w, rows, IC, OC);
    linear_backward(NULL, dw, db, dy, x, w, rows, IC, OC);
    compare(dx, rows * IC, "d.h.%zu.%s", l, x_name);
    compare(halved(dw, IC * OC), IC * OC, "d.h.%zu.%s.weight", l, parameters);
    compare(halved(db, OC), OC, "d.h.%zu.%s.bias", l, parameters);
}
static void compare_linears(void) {
    size_t C = fixture.C, L = fixture.L;
    for (size_t l = 0; l < L; l++) {
        compare_linear(l, "ln1", "qkv", "attn.c_attn", NULL, C, 3 * C);
        compare_linear(l, "att", "mid", "attn.c_proj", stored("%s", below(l)), C, C);
        compare_linear(l, "ln2", "fc", "mlp.c_fc", NULL, C, 4 * C);
        compare_linear(l, "gelu", "out", "mlp.c_proj", stored("h.%zu.mid", l), 4 * C, C);
    }
}
static void test_linear(void) { for_each_fixture(compare_linears); }

static void compare_attention(void) {
    size_t B = fixture.B, T = fixture.T, C = fixture.C, H = fixture.H, L = fixture.L, rows = fixture.rows;
    for (size_t l = 0; l < L; l++) {
        const float* qkv = stored("h.%zu.qkv", l);
        float *out = borrow(rows * C), *lse = borrow(rows * H), *dqkv = borrow(rows * 3 * C);
        attention_forward(out, lse, qkv, attention_shape(B, T, 0, C, H));
        compare(out, rows * C, "h.%zu.att", l);
        compare(lse, rows * H, "h.%zu.lse", l);
        attention_backward(dqkv, stored("d.h.%zu.att", l), qkv, stored("h.%zu.att", l), stored("h.%zu.lse", l),
                           attention_shape(B, T, 0, C, H));
        compare(dqkv, rows * 3 * C, "d.h.%zu.qkv", l);
    }
}
static void test_attention(void) { for_each_fixture(compare_attention); }

static void compare_gelu(void) {
    for (size_t l = 0; l < fixture.L; l++) {
        size_t n = fixture.rows * 4 * fixture.C;
        float *y = borrow(n), *dx = borrow(n), *in_place = borrow_copy(stored("d.h.%zu.gelu", l), n);
        gelu_forward(y, stored("h.%zu.fc", l), n);
        compare(y, n, "h.%zu.gelu", l);
        gelu_backward(dx, in_place, stored("h.%zu.fc", l), n);
        compare(dx, n, "d.h.%zu.fc", l);
        gelu_backward(in_place, in_place, stored("h.%zu.fc", l), n);
        CHECK(!memcmp(dx, in_place, n * sizeof(float)), "in place the result is another");
    }
}
static void test_gelu(void) { for_each_fixture(compare_gelu); }

static void compare_cross_entropy(void) {
    size_t V = fixture.V, rows = fixture.rows;
    const int* targets = stored_tokens("targets", rows);
    float *losses = borrow(rows), *lse = borrow(rows), *logits = borrow_copy(stored("logits"), rows * V);
    cross_entropy_forward(losses, lse, logits, targets, rows, V);
    compare(losses, rows, "losses");
    compare(lse, rows, "logits_lse");
    cross_entropy_backward(logits, lse, targets, 1 / (float)rows, rows, V);
    compare(logits, rows * V, "d.logits");
}
static void test_cross_entropy(void) { for_each_fixture(compare_cross_entropy); }

// The model with the fixture's parameters, wherever the device keeps them.
static Model fixture_model(void) {
    Model model;
    memset(&model, 0, sizeof model);
    model.config = read_config(&fixture.file);
    device->create_model(&model, true);
    load_block(&fixture.file, &model, "", model.weights);
    return model;
}

static float* from_device(const float* x, size_t n) {
    float* copy = borrow(n);
    device->to_host(copy, x, n);
    return copy;
}

static float* activation(const Activations* a, const float* tensor, size_t n) {
    float* copy = borrow(n);
    device->read_activation(copy, a, tensor, n);
    return copy;
}

static void compare_activations(const Activations* a, bool complete) {
    const Config c = read_config(&fixture.file);
    size_t L = fixture.L, rows = fixture.rows;
#define PLACE(kind, type, field, width) {kind, #field, width, offsetof(Activations, field)},
    const struct {
        Kind kind;
        const char* name;
        size_t width, slot;
    } table[] = {ACTIVATIONS(PLACE)};
#undef PLACE
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        bool each = table[i].kind == EACH || table[i].kind == AGAIN || table[i].kind == CACHE;
        for (size_t l = 0; table[i].kind != GRADIENT && l < (each ? L : 1); l++) {
            const float* x;
            char name[64];
            memcpy(&x, (const char*)a + table[i].slot + l * sizeof x, sizeof x);
            snprintf(name, sizeof name, each ? "h.%zu.%s" : "%.0zu%s", each ? l : 0, table[i].name);
            if (TWINS && !strcmp(name, "logits")) continue; // their gradient is there by now
            if (complete || find_entry(&fixture.file, "", name))
                compare(activation(a, x, rows * table[i].width), rows * table[i].width, "%s", name);
        }
    }
}

// times: how often the gradients were added.
static void compare_gradients(const Model* model, double times) {
    size_t C = fixture.C;
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        float* d = from_device(model->gradients + t->offset, t->size);
        for (size_t j = 0; j < t->size; j++) d[j] = (float)(d[j] / times);
        compare(d, t->size, "d.%s", t->name);
        // The same vector added to all keys shifts all scores of a query alike, which the softmax does not notice. So
        // the gradient of the keys' bias is zero but for rounding: of the size of what was summed, the keys' own.
        if (!strstr(t->name, "c_attn.bias")) continue;
        double zero = euclidean_norm(d + C, C), size = euclidean_norm(d, 3 * C);
        CHECK(zero <= COARSER * 1e-6 * size, "%s: %s of the keys is %.1e, where all of it is %.1e", fixture.name,
              t->name, zero, size);
    }
}

static void test_model(void) {
    for (size_t i = 0; i < FIXTURES; i++) {
        if (!open_fixture(i)) continue;
        size_t V = fixture.V, C = fixture.C, B = fixture.B, T = fixture.T, rows = fixture.rows;
        Model model = fixture_model();
        Activations a;
        memset(&a, 0, sizeof a);
        device->create_activations(&a, &model, B, T, true);
        const int *tokens = stored_tokens("tokens", rows), *targets = stored_tokens("targets", rows);
        device->forward(&model, &a, tokens, targets, B, T, 0, true);
        double loss = take_loss(&model), mean = 0;
        for (size_t j = 0; j < rows; j++) mean += stored("losses")[j] / (double)rows;
        CHECK(fabs(loss - mean) <= COARSER * FLOOR * mean, "%s: the loss is %.9f, not %.9f", fixture.name, loss, mean);
        compare_activations(&a, fixtures[i].complete);
        device->backward(&model, &a, tokens, targets, B, T, 1);
        device->wait(&model);
        compare_gradients(&model, 1);
        float* dlogits = activation(&a, a.logits, rows * V);
        for (size_t j = 0; TWINS && j < rows * V; j++)
            dlogits[j] /= (float)rows; // which is left to the multiplies there
        compare(dlogits, rows * V, "d.logits");
        compare(activation(&a, a.dresidual, rows * C), rows * C, "d.embedded");
        if (fixtures[i].complete) { // what layer 0, the last in the backward pass, has left
            compare(activation(&a, a.dnormed, rows * C), rows * C, "d.h.0.ln1");
            compare(activation(&a, a.dqkv, rows * 3 * C), rows * 3 * C, "d.h.0.qkv");
            compare(activation(&a, a.datt, rows * C), rows * C, "d.h.0.att");
            compare(activation(&a, a.dfc, rows * 4 * C), rows * 4 * C, "d.h.0.fc");
        }
        device->forward(&model, &a, tokens, targets, B, T, 0, true);
        device->backward(&model, &a, tokens, targets, B, T, 0.5f);
        device->wait(&model);
        compare_gradients(&model, 1.5);
        device->free_activations(&a);
        device->free_model(&model);
        close_fixture();
    }
    report_nearest();
}

// Fewer sequences than there is room for, as in validation; and generation's way to the same logits, which computes
// only what is new, in pieces of 1, 2, ... positions.
static void test_model_in_parts(void) {
    for (size_t i = 0; i < FIXTURES; i++) {
        if (!open_fixture(i)) continue;
        size_t V = fixture.V, B = fixture.B, T = fixture.T, rows = fixture.rows;
        Model model = fixture_model();
        Activations roomy, a;
        memset(&roomy, 0, sizeof roomy);
        memset(&a, 0, sizeof a);
        device->create_activations(&roomy, &model, B + 2, T, true);
        device->create_activations(&a, &model, 1, T, false);
        const int *tokens = stored_tokens("tokens", rows), *targets = stored_tokens("targets", rows);
        device->forward(&model, &roomy, tokens, targets, B, T, 0, false);
        take_loss(&model);
        compare(activation(&roomy, roomy.logits, rows * V), rows * V, "logits");
        for (size_t b = 0; b < B; b++)
            for (size_t start = 0, piece = 1, end; start < T; start = end, piece++) {
                end = min_size(T, start + piece);
                device->forward(&model, &a, tokens + b * T + start, NULL, 1, end, start, false);
                device->wait(&model);
                float* logits = borrow(V);
                device->read_activation(logits, &a, a.logits, V);
                const float* right = stored("logits") + (b * T + end - 1) * V;
                double error = euclidean_distance(logits, right, V) / euclidean_norm(right, V);
                // A single row, of few numbers, may err more than all together.
                CHECK(error <= (BFLOAT16 ? 0x1p-3 : 1e-5),
                      "%s: position %zu, computed from %zu on, has an error of %.1e", fixture.name, end - 1, start,
                      error);
            }
        device->free_activations(&roomy);
        device->free_activations(&a);
        device->free_model(&model);
        close_fixture();
    }
    report_nearest();
}

static double fixture_option(const char* name) {
    const char* value = metadata(&fixture.file, name);
    if (!value) die("fixture %s does not say %s", fixture.name, name);
    return strtod(value, NULL);
}

// Twenty steps with warm-up, cosine, clipping, decay, and two batches a step.
static void test_adamw_run(void) {
    for (size_t i = 0; i < FIXTURES; i++) {
        if (!open_fixture(i)) continue;
        size_t C = fixture.C, B = fixture.B, T = fixture.T, rows = fixture.rows;
        if (!find_entry(&fixture.file, "", "run.losses") || (SLOW && !fixtures[i].complete)) {
            close_fixture();
            continue;
        }
        opt.lr = fixture_option("--lr"), opt.min_lr = fixture_option("--min-lr");
        opt.warmup = (size_t)fixture_option("--warmup"), opt.steps = (size_t)fixture_option("--steps");
        size_t steps = opt.steps, accumulate = (size_t)fixture_option("--accumulate");
        int* tokens = stored_tokens("run.tokens", steps * accumulate * rows);
        int* targets = stored_tokens("run.targets", steps * accumulate * rows);
        float *rates = borrow(steps), *losses = borrow(steps), *norms = borrow(steps);
        Model model = fixture_model();
        Activations a;
        memset(&a, 0, sizeof a);
        device->create_activations(&a, &model, B, T, true);
        for (size_t step = 0; step < steps; step++) {
            for (size_t part = 0; part < accumulate; part++) {
                size_t at = (step * accumulate + part) * rows;
                device->forward(&model, &a, tokens + at, targets + at, B, T, 0, true);
                device->backward(&model, &a, tokens + at, targets + at, B, T, 1 / (float)accumulate);
            }
            AdamW o = {rate_at(step + 1),         fixture_option("--beta1"),
                       fixture_option("--beta2"), fixture_option("--weight-decay"),
                       fixture_option("--clip"),  step + 1};
            device->update(&model, o);
            losses[step] = (float)take_loss(&model);
            norms[step] = (float)model.gradient_norm;
            rates[step] = (float)o.lr;
        }
        compare(rates, steps, "run.rates");
        compare(losses, steps, "run.losses");
        compare(norms, steps, "run.norms");
        for (size_t k = 0; k < model.tensor_count && fixtures[i].complete; k++) {
            const Tensor* t = &model.tensors[k];
            float* w = from_device(model.weights + t->offset, t->size);
            size_t n = t->size;
            if (strstr(t->name, "c_attn.bias")) { // without the keys', where Adam divides rounding by rounding
                memmove(w + C, w + 2 * C, C * sizeof(float));
                n = 2 * C;
            }
            compare(w, n, "run.%s", t->name);
        }
        device->free_activations(&a);
        device->free_model(&model);
        close_fixture();
    }
    report_nearest();
}

// One update of gradients of all sizes, also as small as the 1e-8 in the denominator, against the formula in double.
static void test_adamw_formula(void) {
    for (int clipped = 0; clipped < 2; clipped++) {
        Model model;
        memset(&model, 0, sizeof model);
        Config config = {clipped ? 7u : 3001u, 5, 12, 3, 1}; // small, and longer than a thread's share
        model.config = config;
        device->create_model(&model, true);
        size_t n = model.block_size;
        float *w = borrow_zeros(n), *d = borrow_zeros(n), *m = borrow_zeros(n), *v = borrow_zeros(n);
        double norm2 = 0;
        for (size_t i = 0; i < model.tensor_count; i++)
            for (size_t k = model.tensors[i].offset; k < model.tensors[i].offset + model.tensors[i].size; k++) {
                d[k] = random_normal(1, k) * powf(10, (float)(random_bits(2, k) % 13) - 11);
                m[k] = random_normal(3, k) * fabsf(d[k]);
                v[k] = (float)random_uniform(4, k) * d[k] * d[k];
                w[k] = random_normal(5, k);
                norm2 += (double)d[k] * d[k];
            }
        device->to_device(model.weights, w, n);
        device->to_device(model.gradients, d, n);
        device->to_device(model.moment1, m, n);
        device->to_device(model.moment2, v, n);
        AdamW o = {0.01, 0.9, 0.95, 0.3, clipped ? sqrt(norm2) / 3 : 0, 3};
        device->update(&model, o);
        device->wait(&model);
        float *w_new = from_device(model.weights, n), *d_new = from_device(model.gradients, n);
        float *m_new = from_device(model.moment1, n), *v_new = from_device(model.moment2, n);
        CHECK(fabs(model.gradient_norm / sqrt(norm2) - 1) < 1e-6, "norm %.9g, not %.9g", model.gradient_norm,
              sqrt(norm2));
        for (size_t i = 0; i < model.tensor_count; i++) {
            const Tensor* t = &model.tensors[i];
            bool decays = !strstr(t->name, "bias") && !strstr(t->name, "ln_");
            for (size_t k = t->offset; k < t->offset + t->size; k++) {
                double g = d[k] * (clipped ? 1 / 3.0 : 1), m1 = 0.9 * m[k] + 0.1 * g, v1 = 0.95 * v[k] + 0.05 * g * g;
                double step = 0.01 * m1 / (1 - pow(0.9, 3)) / (sqrt(v1 / (1 - pow(0.95, 3))) + 1e-8);
                double kept = decays ? w[k] * (1 - 0.01 * 0.3) : w[k];
                // The squares of the smallest gradients are below what float32 holds in full.
                CHECK(fabs(m_new[k] - m1) <= 3e-7 * (fabs(m[k]) + fabs(g)) + 1e-37, "m %g, not %g", m_new[k], m1);
                CHECK(fabs(v_new[k] - v1) <= 5e-7 * v1 + 1e-37, "v %g, not %g", v_new[k], v1);
                CHECK(fabs(w_new[k] - (kept - step)) <= 2e-7 * fabs(kept) + 2e-6 * (fabs(step) + 1e-3),
                      "%s: w %.9g, not %.9g", t->name, w_new[k], kept - step);
                CHECK(d_new[k] == 0, "the gradient is left at %g", d_new[k]);
            }
        }
        // Of numbers that are not finite no step is made.
        const float bad[] = {NAN, INFINITY, -INFINITY};
        for (size_t i = 0; i < 3; i++) {
            device->to_device(model.gradients + n / 2, &bad[i], 1);
            device->update(&model, o);
            device->wait(&model);
            CHECK(!isfinite(model.gradient_norm), "norm %g of a gradient that has %g", model.gradient_norm, bad[i]);
            CHECK(!memcmp(from_device(model.weights, n), w_new, n * sizeof(float)) &&
                      !memcmp(from_device(model.moment1, n), m_new, n * sizeof(float)) &&
                      !memcmp(from_device(model.moment2, n), v_new, n * sizeof(float)),
                  "a gradient that has %g changes the model", bad[i]);
        }
        device->free_model(&model);
        free_borrowed();
    }
}

// Every tensor begins as GPT-2's, which its name tells.
static void test_initialize(void) {
    const Config config = {300, 64, 32, 4, 3};
    Model model, other;
    memset(&model, 0, sizeof model);
    memset(&other, 0, sizeof other);
    model.config = other.config = config;
    device->create_model(&model, false);
    device->create_model(&other, false);
    initialize(&model, 5);
    initialize(&other, 6);
    CHECK(model.tensor_count == 4 + 12 * config.L, "%zu tensors", model.tensor_count);
    const float* first = from_device(model.weights, 1);
    for (size_t i = 0; i < model.tensor_count; i++) {
        const Tensor* t = &model.tensors[i];
        const float *w = from_device(model.weights + t->offset, t->size),
                    *v = from_device(other.weights + t->offset, 1);
        bool norm = strstr(t->name, "ln_"), bias = strstr(t->name, "bias"), vector = norm || bias;
        double mean = norm && !bias ? 1 : 0, std = vector ? 0 : strstr(t->name, "c_proj") ? 0.02 / sqrt(6) : 0.02;
        double n = (double)t->size, sum = 0, squares = 0;
        for (size_t j = 0; j < t->size; j++) sum += w[j] - mean, squares += (w[j] - mean) * (w[j] - mean);
        CHECK((t->rows == 0) == vector, "%s decays, or should", t->name);
        CHECK(fabs(sum / n) <= 5 * std / sqrt(n), "%s: mean %g", t->name, mean + sum / n);
        CHECK(fabs(sqrt(squares / n) - std) <= 4 * std / sqrt(2 * n), "%s: deviation %g", t->name, sqrt(squares / n));
        float normal = random_normal(random_bits(random_bits(5, 256), i), 0); // what a seed means must not change
        CHECK(vector || fabs(w[0] / normal - std) < 1e-6 * std, "%s begins with %.9g", t->name, w[0]);
        CHECK(vector || (w[0] != v[0] && (i == 0 || w[0] != *first)), "%s begins as another", t->name);
    }
    free_borrowed();
    device->free_model(&model);
    device->free_model(&other);
}

// No activation reaches into another, in training and in generation, and memory() counts all of them.
static void test_memory(void) {
    const Config c = {70, 40, 24, 3, 5};
    for (size_t B = 1; B <= 50; B += 49)
        for (int training = 0; training < 2; training++) {
            if (B > 1 && !training) continue;
            const size_t L = c.L, rows = B * c.T;
            enum { PLACES = 32 * 5 };
            struct {
                const char *name, *from;
                size_t bytes;
            } at[PLACES];
            size_t count = 0, needed = 0;
            Model model;
            Activations a;
            memset(&model, 0, sizeof model);
            memset(&a, 0, sizeof a);
            model.config = c;
            device->create_model(&model, training);
            device->create_activations(&a, &model, B, c.T, training);
#define PLACE(kind, type, field, width)                                                                           \
    for (size_t l = 0;                                                                                            \
         l < (kind == CACHE || ((kind == EACH || kind == AGAIN) && training) ? L : kind != GRADIENT || training); \
         l++) {                                                                                                   \
        at[count].name = #field;                                                                                  \
        at[count].from = (const char*)*((float**)((char*)&a + offsetof(Activations, field)) + l);                 \
        at[count++].bytes = (kind == LOGITS && !training ? 1 : rows) * (width) *                                  \
                            (TWINS && BFLOAT16 && !strcmp(#type, "real") ? 2 : sizeof(float));                    \
    }
            ACTIVATIONS(PLACE)
#undef PLACE
            for (size_t i = 0; i < count; i++) {
                needed += at[i].bytes;
                for (size_t j = 0; j < i; j++)
                    CHECK(at[j].from + at[j].bytes <= at[i].from || at[i].from + at[i].bytes <= at[j].from,
                          "B = %zu, training %d: %s lies in %s", B, training, at[i].name, at[j].name);
            }
            size_t scores = memory_needed(c, B, FOR_SCORES);
            if (device == &cpu && training)
                CHECK(needed <= scores && scores <= needed + 64 * count, "B = %zu: scores take %zu bytes, not %zu", B,
                      scores, needed);
            needed += (training ? 4 : 1) * (model.parameter_count + (padded_V(c.V) - c.V) * c.C) * sizeof(float);
            size_t said = device->memory(c, B, c.T, training), tensors = count + 4 * model.tensor_count;
            if (device == &cpu) // a GPU may need more
                CHECK(needed <= said && said <= needed + 64 * tensors, "B = %zu, training %d: %zu bytes, not %zu", B,
                      training, said, needed);
            // Beside the batch, training has a sequence to sample from; a row of logits may go uncounted.
            size_t sampler = memory_needed(c, B, training ? FOR_TRAINING : FOR_USE) - said,
                   one = device->memory(c, 1, c.T, false);
            one -= model.block_size * sizeof(float);
            if (device == &cpu)
                CHECK(training ? sampler <= one && one <= sampler + padded_V(c.V) * sizeof(float) : !sampler,
                      "B = %zu, training %d: the sampler takes %zu bytes, not %zu", B, training, sampler, one);
            device->free_activations(&a);
            device->free_model(&model);
        }
}

static void make_model(Model* m, Config config, bool training, uint64_t seed);

// --recompute takes less memory and changes no bit, but where GELU is folded into a multiply of bfloat16s. With the head
// in parts, as the twin has it for more logits, sums come in another order.
static void test_recompute(void) {
    enum { B = 3, T = 24, N = B * T, CASES = TWINS ? 3 : 2 };
    const Config config = {256, T, 40, 2, 3};
    int tokens[N], targets[N];
    double losses[CASES];
    float* gradients[CASES];
    size_t bytes[CASES], n = 0;
    for (size_t i = 0; i < N; i++) {
        tokens[i] = (int)(random_bits(1, i) % 256);
        targets[i] = (int)(random_bits(2, i) % 256);
    }
    for (int again = 0; again < CASES; again++) {
#ifdef TWIN
        size_t few = gpu::few_logits;
        if (again == 2) gpu::few_logits = 7 * config.V;
#endif
        Model m;
        Activations a;
        memset(&a, 0, sizeof a);
        recompute = again > 0;
        make_model(&m, config, true, 5);
        device->create_activations(&a, &m, B, T, true);
        for (int twice = 0; twice < 2; twice++) {
            device->forward(&m, &a, tokens, targets, B, T, 0, true);
            device->backward(&m, &a, tokens, targets, B, T, 1);
        }
        losses[again] = take_loss(&m);
        gradients[again] = from_device(m.gradients, n = m.block_size);
        bytes[again] = device->memory(config, B, T, true);
        device->free_activations(&a), device->free_model(&m);
#ifdef TWIN
        gpu::few_logits = few;
#endif
    }
    recompute = false;
    size_t saved = 6 * config.C * (config.L - 1) * N * (TWINS && BFLOAT16 ? 2 : 4);
    CHECK(bytes[0] - bytes[1] >= saved, "%zu bytes are saved, not %zu", bytes[0] - bytes[1], saved);
    CHECK(bytes[CASES - 1] < bytes[1] || !TWINS, "the head in parts takes %zu bytes", bytes[CASES - 1]);
    for (int i = 1; i < CASES; i++) {
        double off = euclidean_distance(gradients[0], gradients[i], n) / euclidean_norm(gradients[0], n);
        double loss_off = fabs(losses[i] / losses[0] - 1), loss_allowed = i == 1 ? 0 : FLOOR,
               allowed = i == 1 ? 0 : 8 * FLOOR;
        if (BFLOAT16) loss_allowed = COARSER * FLOOR / 8, allowed = i * COARSER * FLOOR;
        CHECK(loss_off <= loss_allowed, "case %d: the loss is %.9g instead of %.9g", i, losses[i], losses[0]);
        CHECK(off <= allowed, "case %d: the gradients differ by %g", i, off);
    }
    free_borrowed();
}

// GPT-2 on 4 sequences of 1024: twice and four times 12 C C L + V C and C L T for each token.
static void test_step_operations(void) {
    const Config config = {50257, 1024, 768, 12, 12};
    CHECK(fabs(step_operations(config, 4, 1024) - 6 * (84934656.0 + 38597376.0 + 9437184.0) * 4096) < 1e6,
          "%.9g operations", step_operations(config, 4, 1024));
}

static double loss_at(Model* model, Activations* a, const Tensor* t, const float* w, const float* direction,
                      double step, const int* tokens, const int* targets) {
    float* moved = borrow(t->size);
    for (size_t i = 0; i < t->size; i++) moved[i] = (float)(w[i] + step * direction[i]);
    device->to_device(model->weights + t->offset, moved, t->size);
    device->forward(model, a, tokens, targets, a->B, a->T, 0, true);
    free(borrowed[--borrowed_count]);
    return take_loss(model);
}

// The slope of the loss, measured, is the gradient times the direction, for each tensor. The direction is half along
// the gradient, so that the loss moves, and half random, so that other components count too. Central differences at two
// distances are combined so that the error falls with the fourth power of the distance, which then may be so long that
// the loss changes by hundredths, against which its rounding is small.
static void check_slopes(Model* model, Activations* a, const int* tokens, const int* targets, const char* what) {
    device->forward(model, a, tokens, targets, a->B, a->T, 0, true);
    device->backward(model, a, tokens, targets, a->B, a->T, 1);
    take_loss(model);
    for (size_t i = 0; i < model->tensor_count; i++) {
        const Tensor* t = &model->tensors[i];
        size_t before = borrowed_count;
        float *g = from_device(model->gradients + t->offset, t->size), *d = borrow_random(t->size, i);
        float* w = from_device(model->weights + t->offset, t->size);
        double g_length = euclidean_norm(g, t->size), d_length = euclidean_norm(d, t->size), slope = 0;
        for (size_t j = 0; j < t->size; j++) {
            d[j] = (float)(g[j] / g_length + d[j] / d_length);
            slope += (double)g[j] * d[j];
        }
        double measured[2];
        for (int k = 0; k < 2; k++) {
            double step = 0.01 / slope / (k + 1);
            measured[k] = (loss_at(model, a, t, w, d, step, tokens, targets) -
                           loss_at(model, a, t, w, d, -step, tokens, targets)) /
                          (2 * step);
        }
        double combined = (4 * measured[1] - measured[0]) / 3, error = fabs(combined / slope - 1);
        if (getenv("GPT_TEST_VERBOSE"))
            printf("  %-34s slope %.6f, measured %.6f, error %.1e\n", t->name, slope, combined, error);
        CHECK(error < 2e-4, "%s: %s: the loss changes by %.6f a step, the gradient says %.6f", what, t->name, combined,
              slope);
        device->to_device(model->weights + t->offset, w, t->size);
        while (borrowed_count > before) free(borrowed[--borrowed_count]);
    }
}

static void test_finite_differences(void) {
    if (!open_fixture(0)) return;
    Model model = fixture_model();
    Activations a;
    memset(&a, 0, sizeof a);
    device->create_activations(&a, &model, fixture.B, fixture.T, true);
    check_slopes(&model, &a, stored_tokens("tokens", fixture.rows), stored_tokens("targets", fixture.rows), "GPT-2");
    device->free_activations(&a);
    device->free_model(&model);
    close_fixture();
}

// Attention by its definition, in double, for one head: q, k, v (T,D) are `stride` apart, out (T,D), lse (T), and
// weights (T,T) dense. Which keys a query sees is asked, as the layers do: the fixtures know that it is all up to its own.
static void attention_defined(double* out, double* lse, double* weights, const float* q, size_t stride, size_t T,
                              size_t D, size_t channels) {
    const float *k = q + channels, *v = k + channels;
    for (size_t i = 0; i < T; i++) {
        double largest = -INFINITY, sum = 0, *p = weights + i * T;
        Range seen = visible_keys(attention_shape(1, T, 0, channels, channels / D), i);
        for (size_t j = 0; j < T; j++) {
            double s = 0;
            for (size_t c = 0; c < D; c++) s += (double)q[i * stride + c] * k[j * stride + c];
            p[j] = j >= seen.first && j < seen.end ? s / sqrt((double)D) : -INFINITY;
            largest = fmax(largest, p[j]);
        }
        for (size_t j = 0; j < T; j++) sum += p[j] = exp(p[j] - largest);
        for (size_t j = 0; j < T; j++) p[j] /= sum;
        lse[i] = largest + log(sum);
        for (size_t c = 0; c < D; c++) {
            out[i * D + c] = 0;
            for (size_t j = 0; j < T; j++) out[i * D + c] += p[j] * v[j * stride + c];
        }
    }
}

// Lengths on both sides of a tile's edges; head sizes with 1, 64 and more numbers; and the last positions alone, as
// generation computes them.
static void test_attention_definition(void) {
    static const size_t lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 200}, sizes[] = {1, 3, 16, 64, 65, 130};
    for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            if (SLOW && (n * 6 + s) % 7) continue;
            size_t T = lengths[n], D = sizes[s], heads = s % 3 + 1, channels = heads * D, stride = 3 * channels;
            float* qkv = borrow_random(2 * T * stride, n * 10 + s);
            float *out = borrow(2 * T * channels), *lse = borrow(2 * T * heads);
            double* right = (double*)borrow(2 * T * D);
            double *right_lse = (double*)borrow(2 * T), *weights = (double*)borrow(2 * T * T);
            attention_forward(out, lse, qkv, attention_shape(2, T, 0, channels, heads));
            for (size_t b = 0; b < 2; b++)
                for (size_t h = 0; h < heads; h++) {
                    attention_defined(right, right_lse, weights, qkv + b * T * stride + h * D, stride, T, D, channels);
                    double error = 0, lse_error = 0;
                    for (size_t i = 0; i < T; i++) {
                        for (size_t c = 0; c < D; c++)
                            error = larger(error, fabs(out[(b * T + i) * channels + h * D + c] - right[i * D + c]));
                        lse_error = larger(lse_error, fabs(lse[(b * T + i) * heads + h] - right_lse[i]));
                    }
                    CHECK(error < COARSER * 4e-6 && lse_error < COARSER * 4e-6,
                          "T = %zu, D = %zu, head %zu: errors %.1e and %.1e", T, D, h, error, lse_error);
                }
            for (size_t start = 1; start < T; start += start < 3 ? 1 : T / 5 + 1) {
                size_t N = T - start;
                float *last = borrow(2 * N * channels), *last_lse = borrow(2 * N * heads);
                attention_forward(last, last_lse, qkv, attention_shape(2, T, start, channels, heads));
                double error = 0;
                for (size_t b = 0; b < 2; b++)
                    error = larger(error, larger(euclidean_distance(last + b * N * channels,
                                                                    out + (b * T + start) * channels, N * channels) /
                                                     euclidean_norm(last, N * channels),
                                                 euclidean_distance(last_lse + b * N * heads,
                                                                    lse + (b * T + start) * heads, N * heads) /
                                                     euclidean_norm(last_lse, N * heads)));
                CHECK(error < COARSER * 1e-6, "T = %zu, D = %zu: from %zu on the result differs by %.1e", T, D, start,
                      error);
            }
            free_borrowed();
        }
}

// With v_j the j-th unit vector, the output is the weights themselves: with D channels, D keys' at a time.
static void test_attention_weights(void) {
    enum { D = 16, LENGTH = 150 };
    float *qkv = borrow_random(LENGTH * 3 * D, 1), *out = borrow(LENGTH * D), *lse = borrow(LENGTH);
    double sums[LENGTH] = {0};
    for (size_t j0 = 0; j0 < LENGTH; j0 += D) {
        for (size_t j = 0; j < LENGTH; j++)
            for (size_t c = 0; c < D; c++) qkv[j * 3 * D + 2 * D + c] = j == j0 + c;
        attention_forward(out, lse, qkv, attention_shape(1, LENGTH, 0, D, 1));
        for (size_t i = 0; i < LENGTH; i++)
            for (size_t c = 0; c < D && j0 + c < LENGTH; c++) {
                float p = out[i * D + c];
                sums[i] += p;
                CHECK(j0 + c <= i ? p >= 0 && p <= 1 : p == 0, "position %zu gives %zu the weight %g", i, j0 + c, p);
            }
    }
    for (size_t i = 0; i < LENGTH; i++)
        CHECK(fabs(sums[i] - 1) < 2e-6, "the weights of position %zu sum to %.9f", i, sums[i]);
    free_borrowed();
}

static void test_attention_properties(void) {
    enum { LENGTH = 140, CHANNELS = 24, HEADS = 3, D = CHANNELS / HEADS, WIDTH = 3 * CHANNELS };
    size_t n = LENGTH * CHANNELS, last = (LENGTH - 1) * CHANNELS;
    const float* qkv = borrow_random(LENGTH * WIDTH, 1);
    float *out = borrow(n), *lse = borrow(LENGTH * HEADS), *out2 = borrow(n), *lse2 = borrow(LENGTH * HEADS);
    attention_forward(out, lse, qkv, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));

    // An average of values lies among them.
    for (size_t c = 0; c < CHANNELS; c++) {
        float low = INFINITY, high = -INFINITY;
        for (size_t i = 0; i < LENGTH; i++) {
            low = fminf(low, qkv[i * WIDTH + 2 * CHANNELS + c]);
            high = fmaxf(high, qkv[i * WIDTH + 2 * CHANNELS + c]);
            float y = out[i * CHANNELS + c];
            CHECK(y >= low - 1e-6f && y <= high + 1e-6f, "position %zu: %g is not within %g and %g", i, y, low, high);
        }
    }

    // What comes later changes nothing, not one bit, and what comes now does.
    static const size_t changed[] = {0, 1, 62, 63, 64, 65, 127, 128, LENGTH - 1};
    for (size_t k = 0; k < sizeof changed / sizeof *changed; k++) {
        size_t j = changed[k];
        float* x = borrow_copy(qkv, LENGTH * WIDTH);
        for (size_t c = 0; c < WIDTH; c++) x[j * WIDTH + c] = 3 - x[j * WIDTH + c];
        attention_forward(out2, lse2, x, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
        CHECK(!memcmp(out, out2, j * CHANNELS * sizeof(float)) && !memcmp(lse, lse2, j * HEADS * sizeof(float)),
              "position %zu is seen by an earlier one", j);
        for (size_t i = j; i < LENGTH; i++)
            CHECK(euclidean_distance(out + i * CHANNELS, out2 + i * CHANNELS, CHANNELS) > 1e-6, "%zu does not see %zu",
                  i, j);
    }

    // Without positions in it, attention does not know the order of what the last query sees.
    float* x = borrow_copy(qkv, LENGTH * WIDTH);
    for (size_t i = 0; i < LENGTH; i++)
        memcpy(x + i * WIDTH + CHANNELS, qkv + shuffled(i, LENGTH, 5) * WIDTH + CHANNELS, 2 * CHANNELS * sizeof(float));
    attention_forward(out2, lse2, x, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
    double error = euclidean_distance(out + last, out2 + last, CHANNELS);
    CHECK(error < 2e-6, "with keys and values in another order the last output differs by %.1e", error);

    // A vector added to all keys adds the same to all scores of a query.
    x = borrow_copy(qkv, LENGTH * WIDTH);
    for (size_t i = 0; i < LENGTH; i++)
        for (size_t c = 0; c < CHANNELS; c++) x[i * WIDTH + CHANNELS + c] += 2 * random_normal(7, c);
    attention_forward(out2, lse2, x, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
    error = euclidean_distance(out, out2, n) / euclidean_norm(out, n);
    CHECK(error < 3e-6, "with a vector added to all keys the output differs by %.1e", error);
    for (size_t i = 0; i < LENGTH * HEADS; i++) {
        double shift = 0;
        for (size_t c = 0; c < D; c++)
            shift +=
                qkv[i / HEADS * WIDTH + i % HEADS * D + c] * 2 * random_normal(7, i % HEADS * D + c) / sqrt((double)D);
        CHECK(fabs(lse2[i] - lse[i] - shift) < 2e-5, "the log-sum-exp moves by %g, not %g", lse2[i] - lse[i], shift);
    }

    // Scores beyond all measure pick one value each, and nothing overflows on the way.
    x = borrow_copy(qkv, LENGTH * WIDTH);
    for (size_t i = 0; i < LENGTH * WIDTH; i++)
        if (i % WIDTH < 2 * CHANNELS) x[i] *= 1e15f;
    attention_forward(out2, lse2, x, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
    for (size_t i = 0; i < LENGTH; i++)
        for (size_t h = 0; h < HEADS; h++) {
            double best_score = -INFINITY;
            size_t best = 0;
            for (size_t j = 0; j <= i; j++) {
                double s = 0;
                for (size_t c = h * D; c < (h + 1) * D; c++)
                    s += (double)x[i * WIDTH + c] * x[j * WIDTH + CHANNELS + c];
                if (s > best_score) best_score = s, best = j;
            }
            CHECK(!memcmp(out2 + i * CHANNELS + h * D, x + best * WIDTH + 2 * CHANNELS + h * D, D * sizeof(float)),
                  "huge scores: position %zu does not take the value of %zu", i, best);
            CHECK(fabs(lse2[i * HEADS + h] / (best_score / sqrt((double)D)) - 1) < 1e-5, "huge scores: log-sum-exp %g",
                  lse2[i * HEADS + h]);
        }

    // The same on the way back, with scores as large as a training run gone wrong may have them.
    for (size_t i = 0; i < LENGTH * WIDTH; i++) x[i] = i % WIDTH < 2 * CHANNELS ? qkv[i] * 300 : qkv[i];
    attention_forward(out2, lse2, x, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
    float* dqkv = borrow(LENGTH * WIDTH);
    attention_backward(dqkv, out, x, out2, lse2, attention_shape(1, LENGTH, 0, CHANNELS, HEADS));
    for (size_t i = 0; i < LENGTH * WIDTH; i++) CHECK(isfinite(dqkv[i]), "large scores: the gradient is %g", dqkv[i]);
    free_borrowed();
}

// The derivative by its definition, in double: dp = do v', ds = p (dp - sum of p dp), and from there dq, dk, dv.
static void test_attention_gradient(void) {
    static const size_t lengths[] = {1, 63, 64, 65, 129, 200}, sizes[] = {1, 5, 64, 80, 130};
    for (size_t n = 0; n < sizeof lengths / sizeof *lengths; n++)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            if (SLOW && (n * 5 + s) % 3) continue;
            size_t N = lengths[n], D = sizes[s], heads = s % 2 + 1, channels = heads * D, stride = 3 * channels;
            float *qkv = borrow_random(N * stride, 100 + n * 10 + s), *dout = borrow_random(N * channels, n * 10 + s);
            float *out = borrow(N * channels), *lse = borrow(N * heads), *dqkv = borrow(N * stride);
            double *o = (double*)borrow(2 * N * D), *l = (double*)borrow(2 * N), *p = (double*)borrow(2 * N * N);
            attention_forward(out, lse, qkv, attention_shape(1, N, 0, channels, heads));
            attention_backward(dqkv, dout, qkv, out, lse, attention_shape(1, N, 0, channels, heads));
            double* right = (double*)borrow(2 * N * stride);
            for (size_t i = 0; i < N * stride; i++) right[i] = 0;
            for (size_t h = 0; h < heads; h++) {
                const float *q = qkv + h * D, *k = q + channels, *v = k + channels;
                double *dq = right + h * D, *dk = dq + channels, *dv = dk + channels;
                attention_defined(o, l, p, q, stride, N, D, channels);
                for (size_t i = 0; i < N; i++) {
                    const float* x = dout + i * channels + h * D;
                    double average = 0;
                    for (size_t c = 0; c < D; c++) average += x[c] * o[i * D + c];
                    for (size_t j = 0; j < N; j++) {
                        double dp = 0, weight = p[i * N + j];
                        for (size_t c = 0; c < D; c++) dp += (double)x[c] * v[j * stride + c];
                        double ds = weight * (dp - average) / sqrt((double)D);
                        for (size_t c = 0; c < D; c++) {
                            dq[i * stride + c] += ds * k[j * stride + c];
                            dk[j * stride + c] += ds * q[i * stride + c];
                            dv[j * stride + c] += weight * x[c];
                        }
                    }
                }
            }
            // Queries, keys and values each for themselves. A query that sees itself alone has no choice, so for
            // N = 1 the first two are zero and what is left is rounding, to be measured by the values' gradient.
            static const char* const parts[] = {"queries", "keys", "values"};
            for (size_t part = 0; part < 3; part++) {
                double error = 0, norm2 = 0;
                for (size_t i = 0; i < N * channels; i++) {
                    size_t at = i / channels * stride + part * channels + i % channels;
                    size_t like = N == 1 ? at % channels + 2 * channels : at;
                    error += (dqkv[at] - right[at]) * (dqkv[at] - right[at]);
                    norm2 += right[like] * right[like];
                }
                CHECK(sqrt(error) <= COARSER * 3e-6 * sqrt(norm2),
                      "T = %zu, D = %zu: the gradient of the %s has an error of %.1e", N, D, parts[part],
                      sqrt(error / norm2));
            }
            free_borrowed();
        }
}

static void test_embedding_properties(void) {
    enum { CHANNELS = 70, LENGTH = 5, BATCH = 3, VOCABULARY = 4 }; // more channels than two threads' shares
    static const int tokens[BATCH * LENGTH] = {2, 2, 2, 2, 2, 0, 2, 0, 2, 0, 3, 3, 3, 3, 3};
    size_t n = BATCH * LENGTH * CHANNELS;
    const float* dx = borrow_random(n, 1);
    float *dwte = borrow_random(VOCABULARY * CHANNELS, 2), *dwpe = borrow_random((LENGTH + 1) * CHANNELS, 3);
    const float *wte = borrow_copy(dwte, VOCABULARY * CHANNELS), *wpe = borrow_copy(dwpe, (LENGTH + 1) * CHANNELS);
    embedding_backward(dwte, dwpe, dx, tokens, BATCH, LENGTH, CHANNELS);
    for (size_t c = 0; c < CHANNELS; c++) {
        double token_sums[VOCABULARY] = {0}, position_sums[LENGTH + 1] = {0};
        for (size_t i = 0; i < BATCH * LENGTH; i++) {
            token_sums[tokens[i]] += dx[i * CHANNELS + c];
            position_sums[i % LENGTH] += dx[i * CHANNELS + c];
        }
        for (size_t v = 0; v < VOCABULARY; v++) {
            double added = dwte[v * CHANNELS + c] - wte[v * CHANNELS + c];
            CHECK(fabs(added - token_sums[v]) < 5e-6, "to token %zu %g is added, not %g", v, added, token_sums[v]);
        }
        for (size_t t = 0; t <= LENGTH; t++) {
            double added = dwpe[t * CHANNELS + c] - wpe[t * CHANNELS + c];
            CHECK(fabs(added - position_sums[t]) < 5e-6, "to position %zu %g is added, not %g", t, added,
                  position_sums[t]);
        }
    }
    CHECK(!memcmp(dwte + CHANNELS, wte + CHANNELS, CHANNELS * sizeof(float)), "a token that does not occur has moved");
    float* x = borrow(2 * CHANNELS); // two sequences of one token, at the last position
    embedding_forward(x, tokens + 4, wte, wpe, 2, 1, LENGTH, CHANNELS);
    for (size_t i = 0; i < 2 * CHANNELS; i++) {
        float right =
            wte[(size_t)tokens[4 + i / CHANNELS] * CHANNELS + i % CHANNELS] + wpe[LENGTH * CHANNELS + i % CHANNELS];
        CHECK(x[i] == right, "channel %zu is %g, not %g", i, x[i], right);
    }
    free_borrowed();
}

static void test_layernorm_properties(void) {
    enum { WIDTH = 48, ROWS = 6 };
    float *x = borrow(ROWS * WIDTH), *y = borrow(ROWS * WIDTH), *mean = borrow(ROWS), *rstd = borrow(ROWS);
    const float *w = borrow_random(WIDTH, 1), *b = borrow_random(WIDTH, 2), *dy = borrow_random(ROWS * WIDTH, 3);
    float *dx = borrow_zeros(ROWS * WIDTH), *dw = borrow_zeros(WIDTH), *db = borrow_zeros(WIDTH);

    // A row of equal numbers has no direction: what is left is the bias. (With numbers whose sum is exact.)
    static const float constants[ROWS] = {0, 1, -3, 256, 0.125f, -65536};
    for (size_t i = 0; i < ROWS * WIDTH; i++) x[i] = constants[i / WIDTH];
    layernorm_forward(y, mean, rstd, x, w, b, ROWS, WIDTH);
    layernorm_backward(dx, dw, db, dy, x, mean, rstd, w, ROWS, WIDTH);
    for (size_t i = 0; i < ROWS; i++) {
        CHECK(!memcmp(y + i * WIDTH, b, WIDTH * sizeof(float)), "a row of %g is not mapped to the bias", constants[i]);
        CHECK(mean[i] == constants[i], "the mean of a row of %g is %g", constants[i], mean[i]);
        CHECK(fabsf(rstd[i] / 316.227766f - 1) < 1e-6f, "rstd of a row of %g is %g", constants[i], rstd[i]);
    }
    for (size_t i = 0; i < ROWS * WIDTH; i++) CHECK(isfinite(dx[i]), "the gradient of a constant row is %g", dx[i]);
    for (size_t c = 0; c < WIDTH; c++) CHECK(dw[c] == 0, "constant rows have a gradient of the weight: %g", dw[c]);

    // A row's shift and scale are taken out, so along both of them the gradient is zero: its sum, and its product with
    // x, are (but for eps, and rounding).
    float *ones = borrow(WIDTH), *zeros = borrow_zeros(WIDTH);
    for (size_t c = 0; c < WIDTH; c++) ones[c] = 1;
    memset(dx, 0, ROWS * WIDTH * sizeof(float));
    for (size_t i = 0; i < ROWS * WIDTH; i++) x[i] = 10 * random_normal(4, i) + 30;
    layernorm_forward(y, mean, rstd, x, ones, zeros, ROWS, WIDTH);
    layernorm_backward(dx, dw, db, dy, x, mean, rstd, ones, ROWS, WIDTH);
    for (size_t i = 0; i < ROWS; i++) {
        double sum = 0, squares = 0, dx_sum = 0, dx_x = 0;
        for (size_t c = i * WIDTH; c < (i + 1) * WIDTH; c++) {
            sum += y[c], squares += (double)y[c] * y[c], dx_sum += dx[c], dx_x += (double)dx[c] * (x[c] - mean[i]);
        }
        CHECK(fabs(sum / WIDTH) < 1e-6 && fabs(squares / WIDTH - 1) < 1e-5, "mean %g and variance %g, not 0 and 1",
              sum / WIDTH, squares / WIDTH);
        CHECK(fabs(dx_sum) < 1e-6 && fabs(dx_x) < 1e-4, "the gradient along a shift is %g, along a scale %g", dx_sum,
              dx_x);
    }
    free_borrowed();
}

static void test_gelu_properties(void) {
    enum { N = 40001 };
    float *x = borrow(N), *y = borrow(N), *minus = borrow(N), *y_minus = borrow(N), *dx = borrow(N), *dy = borrow(N);
    for (size_t i = 0; i < N; i++) {
        x[i] = ((float)i - 20000) / 1000;
        minus[i] = -x[i];
        dy[i] = 1;
    }
    gelu_forward(y, x, N);
    gelu_forward(y_minus, minus, N);
    gelu_backward(dx, dy, x, N);
    for (size_t i = 0; i < N; i++) {
        double z = x[i], u = sqrt(2 / 3.141592653589793) * (z + 0.044715 * z * z * z), t = tanh(u);
        double slope = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * sqrt(2 / 3.141592653589793) * (1 + 3 * 0.044715 * z * z);
        CHECK(fabs(y[i] - 0.5 * z * (1 + t)) <= 3e-7 * fmax(1, fabs(z)), "gelu(%g) is %.9g, not %.9g", z, y[i],
              0.5 * z * (1 + t));
        // (Where the slope is nearly 1, a rounding of it is multiplied by x and its derivative.)
        CHECK(fabs(dx[i] - slope) <= 2e-6, "the slope at %g is %.9g, not %.9g", z, dx[i], slope);
        CHECK(fabs(y[i] - y_minus[i] - z) <= 3e-7 * fmax(1, fabs(z)), "gelu(x) - gelu(-x) at %g is %.9g", z,
              y[i] - y_minus[i]);
    }
    // Far out it is x or nothing, and its slope 1 or 0.
    static const float far[] = {15, 100, 1e4f, 1e12f, 1e18f};
    for (size_t i = 0; i < 5; i++) {
        x[0] = far[i], x[1] = -far[i];
        gelu_forward(y, x, 2);
        gelu_backward(dx, dy, x, 2);
        CHECK(y[0] == x[0] && y[1] == 0, "gelu(%g) is %g and gelu(%g) is %g", x[0], y[0], x[1], y[1]);
        CHECK(dx[0] == 1 && dx[1] == 0, "its slope at %g is %g, at %g it is %g", x[0], dx[0], x[1], dx[1]);
    }
    x[0] = 0;
    gelu_forward(y, x, 1);
    gelu_backward(dx, dy, x, 1);
    CHECK(y[0] == 0 && dx[0] == 0.5f, "at 0 it is %g, its slope %g", y[0], dx[0]);
    free_borrowed();
}

static void test_cross_entropy_properties(void) {
    enum { WORDS = 300, ROWS = 9 };
    float *logits = borrow_random(ROWS * WORDS, 1), *losses = borrow(ROWS), *lse = borrow(ROWS);
    int targets[ROWS];
    for (size_t i = 0; i < ROWS; i++) targets[i] = (int)(random_bits(2, i) % WORDS);
    for (size_t i = 0; i < 2 * WORDS; i++) logits[i] = i < WORDS ? 7 : -1e30f; // rows 0 and 1: all alike
    logits[2 * WORDS + (size_t)targets[2]] = 1e30f;                            // row 2: all but certain
    logits[3 * WORDS + (size_t)(targets[3] + 1) % WORDS] = 1e30f;              // row 3: certain, and wrong
    for (size_t v = 0; v < WORDS; v++)                                         // row 4: half of all ruled out
        if (v % 2 != (size_t)targets[4] % 2) logits[4 * WORDS + v] = -INFINITY;
    for (size_t v = 0; v < WORDS; v++) logits[5 * WORDS + v] += 1000; // row 5: e^1000 is no float
    float* copy = borrow_copy(logits, ROWS * WORDS);
    cross_entropy_forward(losses, lse, logits, targets, ROWS, WORDS);
    CHECK(!memcmp(copy, logits, ROWS * WORDS * sizeof(float)), "the forward pass has changed the logits");
    CHECK(fabsf(losses[0] - logf(WORDS)) < 2e-6f, "the loss of equal logits is %g", losses[0]);
    CHECK(isfinite(losses[1]), "the loss of equal, very small logits is %g", losses[1]);
    CHECK(losses[2] == 0, "the loss of certainty is %g", losses[2]);
    CHECK(fabsf(losses[3] / 1e30f - 1) < 1e-6f, "the loss of wrong certainty is %g", losses[3]);
    for (size_t i = 4; i < ROWS; i++) {
        double sum = 0, largest = -INFINITY;
        for (size_t v = 0; v < WORDS; v++) largest = larger(largest, copy[i * WORDS + v]);
        for (size_t v = 0; v < WORDS; v++) sum += exp(copy[i * WORDS + v] - largest);
        double right = largest + log(sum) - copy[i * WORDS + (size_t)targets[i]];
        CHECK(fabs(losses[i] - right) < (i == 5 ? 2e-4 : 3e-6), "the loss of row %zu is %g, not %g", i, losses[i],
              right);
    }
    cross_entropy_backward(logits, lse, targets, 0.25f, ROWS, WORDS);
    for (size_t i = 0; i < ROWS; i++) {
        double sum = 0;
        for (size_t v = 0; v < WORDS; v++) {
            float d = logits[i * WORDS + v];
            sum += d;
            CHECK(v == (size_t)targets[i] ? d <= 0 && d >= -0.25f : d >= 0 && d <= 0.2501f, "row %zu: gradient %g", i,
                  d);
        }
        // Rows 1 and 5: float32 cannot hold log(WORDS) beside 1e30, and hardly beside 1000.
        if (i != 1) CHECK(fabs(sum) < (i == 5 ? 2e-5 : 1e-6), "the gradient of row %zu sums to %g", i, sum);
    }
    logits[0] = 5, targets[0] = 0;
    cross_entropy_forward(losses, lse, logits, targets, 1, 1);
    cross_entropy_backward(logits, lse, targets, 1, 1, 1);
    CHECK(losses[0] == 0 && logits[0] == 0, "a vocabulary of one: loss %g, gradient %g", losses[0], logits[0]);
    free_borrowed();
}

// ====================================================================================================================
// Tokenizer

// A vocabulary in the making: its tokens' strings one behind the other.
typedef struct {
    size_t V;
    uint32_t offsets[2000];
    uint8_t strings[20000];
} Vocabulary;

static void add_token(Vocabulary* v, const void* string, size_t n) {
    memcpy(v->strings + v->offsets[v->V], string, n);
    v->offsets[v->V + 1] = v->offsets[v->V] + (uint32_t)n;
    v->V++;
}

static void start_vocabulary(Vocabulary* v) {
    memset(v, 0, sizeof *v);
    for (int byte = 0; byte < 256; byte++) {
        uint8_t s = (uint8_t)byte;
        add_token(v, &s, 1);
    }
}

// Enough of Unicode for the tests: {first, last, class}.
static const uint32_t unicode_ranges[][3] = {
    {0x9, 0xD, SPACE},          {0x20, 0x20, SPACE},      {0x30, 0x39, NUMBER},
    {0x41, 0x5A, LETTER},       {0x61, 0x7A, LETTER},     {0x85, 0x85, SPACE},
    {0xA0, 0xA0, SPACE},        {0xBC, 0xBE, NUMBER},     {0xC0, 0xD6, LETTER},
    {0xD8, 0xF6, LETTER},       {0xF8, 0x2C1, LETTER},    {0x391, 0x3A1, LETTER},
    {0x3B1, 0x3C9, LETTER},     {0x660, 0x669, NUMBER},   {0x2028, 0x2029, SPACE},
    {0x3000, 0x3000, SPACE},    {0x4E00, 0x9FFF, LETTER}, {0xFFFD, 0xFFFD, OTHER + LETTER},
    {0x10400, 0x1044F, LETTER},
};
enum { RANGES = sizeof unicode_ranges / sizeof *unicode_ranges };

static void write_tokenizer(const char* path, const Vocabulary* v, size_t ranges, int end_of_text) {
    int32_t header[HEADER] = {TOKENIZER_MAGIC, 1,          v->V > 256, (int32_t)v->V, (int32_t)v->offsets[v->V],
                              (int32_t)ranges, end_of_text};
    unlink(path);
    FILE* f = fopen(path, "wb");
    if (!CHECK(f, "cannot write %s", path)) return;
    fwrite(header, sizeof header, 1, f);
    fwrite(unicode_ranges, sizeof *unicode_ranges, ranges, f);
    fwrite(v->offsets, sizeof(uint32_t), v->V + 1, f);
    fwrite(v->strings, 1, v->offsets[v->V], f);
    fclose(f);
}

static void free_tokenizer(Tokenizer* t) { free(t->slots), free(t->classes), free((void*)t->file.data); }

// Pieces as a plain loop makes them: the pair that makes the lowest token is joined, the leftmost first.
static size_t encode_plainly(const Tokenizer* t, const uint8_t* s, size_t n, int* tokens) {
    for (size_t i = 0; i < n; i++) tokens[i] = find_token(t, s + i, 1);
    for (;;) {
        int best = INT32_MAX;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            uint8_t pair[64];
            Bytes first = token_string(t, tokens[i]), second = token_string(t, tokens[i + 1]);
            memcpy(pair, first.p, first.n);
            memcpy(pair + first.n, second.p, second.n);
            int joined = find_token(t, pair, first.n + second.n);
            if (joined >= 0 && joined < best) best = joined, at = i;
        }
        if (best == INT32_MAX) return n;
        tokens[at] = best;
        memmove(tokens + at + 1, tokens + at + 2, (n - at - 2) * sizeof(int));
        n--;
    }
}

static bool decodes_to(const Tokenizer* t, const int* tokens, size_t count, const uint8_t* text, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        if (tokens[i] < 0 || (size_t)tokens[i] >= t->V) return false;
        Bytes s = token_string(t, tokens[i]);
        if (s.n > n - at || memcmp(s.p, text + at, s.n)) return false;
        at += s.n;
    }
    return at == n;
}

static void test_tokenizer_bytes(void) {
    CHECK(HEADER == 256 && TOKENIZER_MAGIC == 20261121 && SHARD_MAGIC == 20240520, "files of old are not read");
    static Vocabulary v;
    static uint8_t text[5000];
    static int tokens[5000];
    start_vocabulary(&v);
    write_tokenizer(in_folder("tokenizer.bin"), &v, 0, -1);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    CHECK(t.V == 256 && t.end_of_text == -1, "%zu tokens, end of text %d", t.V, t.end_of_text);
    for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)random_bits(1, i);
    for (size_t n = 0; n <= sizeof text; n = n < 40 ? n + 1 : n * 2 + 7) {
        bool same = encode(&t, text, n, tokens) == n;
        for (size_t i = 0; i < n && same; i++) same = tokens[i] == text[i];
        CHECK(same, "%zu bytes are not their own tokens", n);
    }
    free_tokenizer(&t);
}

// Random merges of three letters, so that pairs overlap and orders matter, against the plain loop.
static void test_tokenizer_merges(void) {
    static Vocabulary v;
    uint8_t text[64];
    int tokens[64], plain[64];
    for (uint64_t trial = 0; trial < 40; trial++) {
        start_vocabulary(&v);
        for (uint64_t i = 0; v.V < 256 + 3 + trial; i++) {
            // Two earlier tokens, of letters a to c or of those added since.
            uint8_t joined[64];
            size_t n = 0;
            for (uint64_t part = 0; part < 2; part++) {
                size_t choice = (size_t)(random_bits(trial, 2 * i + part) % (v.V - 256 + 3));
                size_t token = choice < 3 ? 'a' + choice : 253 + choice;
                size_t length = v.offsets[token + 1] - v.offsets[token];
                memcpy(joined + n, v.strings + v.offsets[token], length);
                n += length;
            }
            bool known = n > 12;
            for (size_t k = 0; k < v.V && !known; k++)
                known = v.offsets[k + 1] - v.offsets[k] == n && !memcmp(v.strings + v.offsets[k], joined, n);
            if (!known) add_token(&v, joined, n);
        }
        write_tokenizer(in_folder("tokenizer.bin"), &v, RANGES, -1);
        Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
        for (uint64_t k = 0; k < 200; k++) {
            size_t n = (size_t)(random_bits(trial + 100, 1000 * k) % sizeof text);
            for (size_t i = 0; i < n; i++) text[i] = (uint8_t)('a' + random_bits(trial + 100, 1000 * k + 1 + i) % 3);
            size_t count = encode(&t, text, n, tokens), expected = encode_plainly(&t, text, n, plain);
            CHECK(count == expected && !memcmp(tokens, plain, count * sizeof(int)),
                  "%.*s: %zu tokens, the plain loop has %zu or others", (int)n, text, count, expected);
        }
        free_tokenizer(&t);
    }
}

static void test_tokenizer_order(void) {
    static Vocabulary v;
    int tokens[64];
    start_vocabulary(&v);
    static const char* const merges[] = {"bc", "ab", "aa", "abc", "aab"}; // 256 to 260
    for (size_t i = 0; i < 5; i++) add_token(&v, merges[i], strlen(merges[i]));
    add_token(&v, "<|endoftext|>", 13); // 261
    write_tokenizer(in_folder("tokenizer.bin"), &v, RANGES, 261);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    static const struct {
        const char* text;
        size_t count;
        int tokens[8];
    } cases[] = {
        {"abc", 1, {259}},      // bc first, then a + bc
        {"aaa", 2, {258, 'a'}}, // the leftmost pair of two equal ones
        {"aaaa", 2, {258, 258}},
        {"aab", 1, {260}},       // ab (257) before aa (258), then a + ab
        {"aabc", 2, {258, 256}}, // bc, then aa (258) before abc (259)
        {"", 0, {0}},
        {"<|endoftext|>", 13, {'<', '|', 'e', 'n', 'd', 'o', 'f', 't'}}, // text, not the token
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t n = encode(&t, (const uint8_t*)cases[i].text, strlen(cases[i].text), tokens);
        CHECK(n == cases[i].count && !memcmp(tokens, cases[i].tokens, min_size(n, 8) * sizeof(int)),
              "'%s' becomes %zu tokens beginning with %d", cases[i].text, n, n ? tokens[0] : -1);
    }
    CHECK(t.end_of_text == 261, "end of text is %d", t.end_of_text);
    free_tokenizer(&t);
}

// Two strings of the same length that belong in the same slot of the hash table.
static void test_tokenizer_collision(void) {
    static Vocabulary v;
    static uint32_t seen[4 * MAX_SIZE];
    uint8_t one[3], other[3];
    start_vocabulary(&v);
    write_tokenizer(in_folder("tokenizer.bin"), &v, 0, -1);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    for (uint32_t i = 1;; i++) {
        if (!CHECK(i < 1 << 24, "no two strings share a slot")) return;
        for (int k = 0; k < 3; k++) other[k] = (uint8_t)(i >> 8 * k);
        uint32_t slot = (uint32_t)fingerprint(other, 3) & (SLOTS - 1), before = seen[slot];
        for (int k = 0; k < 3; k++) one[k] = (uint8_t)(before >> 8 * k);
        seen[slot] = i;
        if (before) break;
    }
    free_tokenizer(&t);
    for (int both = 0; both < 2; both++) {
        add_token(&v, both ? other : one, 3);
        write_tokenizer(in_folder("tokenizer.bin"), &v, 0, -1);
        t = load_tokenizer(in_folder("tokenizer.bin"));
        CHECK(find_token(&t, one, 3) == 256, "the first string is token %d", find_token(&t, one, 3));
        CHECK(find_token(&t, other, 3) == (both ? 257 : -1), "the second is token %d", find_token(&t, other, 3));
        free_tokenizer(&t);
    }
}

static void test_tokenizer_pieces(void) {
    // A | stands where the pattern cuts.
    static const char* const cases[] = {
        "Hello| world",
        "I|'m| you|'re| we|'ve| he|'ll| she|'d| it|'s| can|'t",
        "I|'|M| YOU|'|RE",
        "'s|t",
        "'|x",
        "'|r",
        "'|la",
        "'|v",
        "''|s",
        " '|s",
        "a|'",
        "a|  | b",
        "a|  ",
        " ",
        "  ",
        " | a",
        "a|\t|b",
        "a|\t| b",
        "a|\t\t|\t|b",
        "a|\r|\n|b",
        "a|\r\n\r\n",
        "a|\n|\n|b",
        "a| \n| b",
        "abc|123|def",
        "3|.|14",
        "x| ...| y",
        "x| 12| 3| +| 4",
        "a|!?|b",
        "_|snake|_|case|_",
        // Letters, numbers and spaces beyond ASCII; a combining mark is neither.
        "na\u00efve| \u0391\u03b2",
        "x|\u0300|y",
        "1\u00bd\u0663|x",
        "\u4e1c\u4eac",
        "a|\u00a0|b",
        "a| |\u00a0|b",
        "a|\u3000| b",
        "a|\u2028\u2029| b",
        "a| \U0001F600|b",
        "\U00010400a",
        // Bytes that are no UTF-8 are none of letter, number and space: strays, cut-off characters, a surrogate, a
        // space in an overlong form.
        "a|\xff\xfe|b",
        "a| \xff|b",
        "a|\xc3",
        "a|!\xc3!|b",
        "a|\xe2\x80|b",
        "a|\xed\xa0\x80|b",
        "a|\xc0\xa0|b",
        "a|\xf4\x90\x80\x80|b",
        "a|\xf8\x88\x80\x80\x80|b",
    };
    static Vocabulary v;
    start_vocabulary(&v);
    write_tokenizer(in_folder("tokenizer.bin"), &v, RANGES, -1);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[100], found[200];
        size_t n = 0, m = 0;
        for (const char* p = cases[i]; *p; p++)
            if (*p != '|') text[n++] = *p;
        for (size_t at = 0, length; at < n; at += length) {
            length = piece_length(&t, (const uint8_t*)text + at, n - at);
            if (!CHECK(length > 0 && length <= n - at, "'%s': a piece of %zu bytes", cases[i], length)) break;
            if (at) found[m++] = '|';
            memcpy(found + m, text + at, length);
            m += length;
        }
        found[m] = 0;
        CHECK(!strcmp(found, cases[i]), "'%s' is cut into '%s'", cases[i], found);
    }
    CHECK(piece_length(&t, (const uint8_t*)"'\0s", 3) == 2, "an apostrophe and a zero byte");
    free_tokenizer(&t);
}

// Every code point there is, and every sequence of bytes near the borders of what is none.
static void test_utf8_character(void) {
    for (uint32_t c = 0; c < 0x110000; c++) {
        uint8_t s[4];
        size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
        for (size_t i = n; i-- > 1;) s[i] = (uint8_t)(0x80 | (c >> (6 * (n - 1 - i)) & 0x3F));
        s[0] = (uint8_t)(n == 1 ? c : (0xF00u >> n & 0xFF) | c >> (6 * (n - 1)));
        uint32_t code, expected = c >= 0xD800 && c < 0xE000 ? (uint32_t)BROKEN : c;
        size_t length = utf8_character(s, n, &code);
        CHECK(code == expected && length == (expected == c ? n : 1), "U+%04X is read as U+%04X, %zu bytes", c, code,
              length);
        for (size_t cut = 1; cut < n && expected == c; cut++)
            CHECK(utf8_character(s, cut, &code) == 1 && code == UNFINISHED, "U+%04X cut off is read", c);
    }
    static const char* const none[] = {"\x80",
                                       "\xbf",
                                       "\xc0\x80",
                                       "\xc1\xbf",
                                       "\xe0\x80\x80",
                                       "\xe0\x9f\xbf",
                                       "\xf0\x80\x80\x80",
                                       "\xf0\x8f\xbf\xbf",
                                       "\xf4\x90\x80\x80",
                                       "\xf5\x80\x80\x80",
                                       "\xf8\x88\x80\x80\x80",
                                       "\xfe",
                                       "\xff",
                                       "\xc3\x28",
                                       "\xe2\x28\xa1",
                                       "\xe2\x82\x28",
                                       "\xf0\x28\x8c\xbc",
                                       "\xf0\x90\x28\xbc",
                                       "\xf0\x90\x8c\x28"};
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        uint32_t code;
        size_t length = utf8_character((const uint8_t*)none[i], strlen(none[i]), &code);
        CHECK(code == BROKEN && length == 1, "case %zu is read as U+%04X, %zu bytes", i, code, length);
    }
}

// A piece may be as long as the text, which must not cost the square of its length.
static void encode_too_much(const char* path) {
    Tokenizer t = load_tokenizer(path);
    encode(&t, (const uint8_t*)"a", UINT32_MAX / 4, NULL); // refused before it is looked at
}

// Pieces just as long as the working memory, or longer by one, whose end is joined: nothing is written beyond it.
static void test_tokenizer_room(void) {
    static Vocabulary v;
    uint8_t text[600];
    int tokens[600];
    start_vocabulary(&v);
    memset(text, 'a', sizeof text);
    for (size_t n = 2; n <= 64; n *= 2) add_token(&v, text, n);
    write_tokenizer(in_folder("tokenizer.bin"), &v, RANGES, -1);
    CHECK_FAILURE(forked(encode_too_much, in_folder("tokenizer.bin")), 1, "more than 1 GB", "a text of 1 GB");
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    for (size_t first = 1; first <= 64; first++)
        for (size_t more = 0; more < 2; more++) {
            size_t n = 3 * first + 1 + more;
            memset(text, 'a', n);
            text[first] = '!';
            size_t count = encode(&t, text, n, tokens);
            CHECK(decodes_to(&t, tokens, count, text, n), "%zu and %zu letters do not come back", first, n - first - 1);
        }
    free_tokenizer(&t);
}

// A piece of 64 times the length takes about 64 times the processor time; were it quadratic, 4096 times.
static void test_tokenizer_long_pieces(void) {
    enum { LONG = 160000, SHORT = LONG / 64 };
    static Vocabulary v;
    uint8_t* text = (uint8_t*)allocate(LONG, 1, "a test's text");
    int* tokens = (int*)allocate(LONG, sizeof(int), "a test's tokens");
    start_vocabulary(&v);
    memset(text, 'a', LONG);
    for (size_t n = 2; n <= 64; n *= 2) add_token(&v, text, n);
    write_tokenizer(in_folder("tokenizer.bin"), &v, RANGES, -1);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    static const char* const units[] = {"a", "ab", " ", "\n", "'", "\xff", "aaa ", "a\xcc\x80"};
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        for (size_t k = 0; k < LONG; k++) text[k] = (uint8_t)units[i][k % strlen(units[i])];
        clock_t start = clock();
        encode(&t, text, SHORT, tokens);
        clock_t middle = clock();
        size_t count = encode(&t, text, LONG, tokens);
        double ratio = (double)(clock() - middle) / (double)(middle - start + 1);
        if (getenv("GPT_TEST_VERBOSE")) printf("  '%s': %.1f times\n", units[i], ratio);
        CHECK(ratio < 512, "64 times as much of '%s' takes %.1f times as long", units[i], ratio);
        CHECK(decodes_to(&t, tokens, count, text, LONG), "a long piece of '%s' does not come back", units[i]);
        if (i == 0) CHECK(count == LONG / 64, "%d times 'a' become %zu tokens", LONG, count);
    }
    free(text), free(tokens);
    free_tokenizer(&t);
}

static void load_and_use_tokenizer(const char* path) {
    Tokenizer t = load_tokenizer(path);
    uint8_t text[512];
    int tokens[512];
    for (size_t i = 0; i < sizeof text; i++) text[i] = (uint8_t)(i < 256 ? i : 'a' + i % 3);
    if (!decodes_to(&t, tokens, encode(&t, text, sizeof text, tokens), text, sizeof text)) abort();
    free_tokenizer(&t);
}

// Writes a damaged copy of a file and expects that loading it fails as it must.
static void refuse(void (*load)(const char*), const char* data, size_t size, const char* text, const char* what) {
    const char* path = in_folder("damaged");
    write_file(path, data, size);
    CHECK_FAILURE(forked(load, path), 1, text, what);
}

static void test_tokenizer_damaged(void) {
    static Vocabulary v;
    char what[100];
    start_vocabulary(&v);
    static const char* const merges[] = {"ab", "bc", "abc", "aa"};
    for (size_t i = 0; i < 4; i++) add_token(&v, merges[i], strlen(merges[i]));
    add_token(&v, "<|endoftext|>", 13);
    const char* whole = in_folder("whole");
    write_tokenizer(whole, &v, RANGES, 260);
    CHECK_SUCCESS(forked(load_and_use_tokenizer, whole), "the whole file");
    size_t size = 0;
    char *data = read_file(whole, &size), *copy = read_file(whole, NULL);

    // Cut off at every byte where something begins or ends, and at every 5th elsewhere; or too long.
    for (size_t n = 0; n < size; n += n < 40 || n + 40 > size ? 1 : 5) {
        snprintf(what, sizeof what, "cut off after %zu bytes", n);
        refuse(load_and_use_tokenizer, data, n, n < HEADER * 4 ? "cut off" : "is damaged", what);
    }
    copy = (char*)realloc(copy, size + 1);
    copy[size] = 'x';
    refuse(load_and_use_tokenizer, copy, size + 1, "is damaged", "one byte too long");

    // Header fields. The kind (2) is for people; the end of text (6) may be any token, or none.
    static const int32_t values[] = {0, 1, -1, 2, 255, 256, 260, 261, 262, 65536, 65537, INT32_MAX, INT32_MIN};
    for (size_t field = 0; field < 7; field++)
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            int32_t was;
            memcpy(&was, data + 4 * field, 4);
            if (field == 2 || values[i] == was) continue;
            if (field == 6 && (values[i] == -1 || values[i] == 256)) continue;
            memcpy(copy, data, size);
            memcpy(copy + 4 * field, &values[i], 4);
            snprintf(what, sizeof what, "header field %zu set to %d", field, values[i]);
            refuse(load_and_use_tokenizer, copy, size, in_folder("damaged"), what);
        }

    size_t ranges = HEADER * 4, offsets = ranges + 12 * RANGES, strings = offsets + 4 * (v.V + 1);
    static const struct {
        size_t index;
        uint32_t value;
    } wrong_ranges[] = {{0, 14}, {1, 0x20}, {1, 8}, {3, 0xD}, {3, 9}, {2, 0}, {2, 4}, {2, UINT32_MAX}, {4, UINT32_MAX}};
    for (size_t i = 0; i < sizeof wrong_ranges / sizeof *wrong_ranges; i++) {
        memcpy(copy, data, size);
        memcpy(copy + ranges + 4 * wrong_ranges[i].index, &wrong_ranges[i].value, 4);
        refuse(load_and_use_tokenizer, copy, size, "Unicode ranges", "wrong ranges");
    }
    static const struct {
        size_t index;
        uint32_t value;
    } wrong_offsets[] = {{0, 1}, {1, 0}, {1, 2}, {100, 99}, {100, UINT32_MAX}, {260, 5000}, {261, 0}, {261, 300}};
    for (size_t i = 0; i < sizeof wrong_offsets / sizeof *wrong_offsets; i++) {
        memcpy(copy, data, size);
        memcpy(copy + offsets + 4 * wrong_offsets[i].index, &wrong_offsets[i].value, 4);
        refuse(load_and_use_tokenizer, copy, size, "offsets are out of order", "wrong offsets");
    }
    memcpy(copy, data, size);
    copy[strings + 7] = 'a';
    refuse(load_and_use_tokenizer, copy, size, "tokens 7 and 97 are the same", "a byte given twice");
    memcpy(copy, data, size);
    memcpy(copy + strings + 256, "bcbc", 4);
    refuse(load_and_use_tokenizer, copy, size, "tokens 256 and 257 are the same", "a joined token given twice");
    int32_t byte_as_end = 'a';
    memcpy(copy, data, size);
    memcpy(copy + 24, &byte_as_end, 4);
    refuse(load_and_use_tokenizer, copy, size, "no token for byte 97", "a byte that is missing");
    refuse(load_and_use_tokenizer, "PK", 2, "is not a tokenizer made by prepare_data.py", "another file");

    // Any byte changed: refused as it must be, or usable.
    for (uint64_t i = 0; i < 300; i++) {
        memcpy(copy, data, size);
        size_t at = (size_t)(random_bits(5, 2 * i) % size);
        copy[at] = (char)random_bits(5, 2 * i + 1);
        write_file(in_folder("damaged"), copy, size);
        const Result* r = forked(load_and_use_tokenizer, in_folder("damaged"));
        snprintf(what, sizeof what, "byte %zu changed", at);
        if (r->status || r->signal) CHECK_FAILURE(r, 1, "damaged", what);
    }
    free(data), free(copy);
}

// Ids that tiktoken gives, for GPT-2's own vocabulary as prepare_data.py writes it.
static void test_tokenizer_gpt2(void) {
    const char* path = getenv("GPT2_TOKENIZER");
    if (!path) {
        skip("GPT2_TOKENIZER does not name a tokenizer.bin made with prepare_data.py --tokenizer gpt2");
        return;
    }
    static const struct {
        const char *text, *ids;
    } cases[] = {
        {"Hello world", "15496 995"},
        {"Hello, I'm a language model,", "15496 11 314 1101 257 3303 2746 11"},
        {" antidisestablishmentarianism's they'll WE'LL", "1885 29207 44390 3699 1042 338 484 1183 12887 6 3069"},
        {"x = [1, 2.5];\n\tif (a  &&   b) \r\n\n  return;  ",
         "87 796 685 16 11 362 13 20 11208 198 197 361 357 64 220 11405 220 220 275 8 220 201 628 220 1441 26 220 220"},
        {"na\u00efve caf\u00e9\u00a0\u03a9\u03bc\u03ad\u03b3\u03b1 \u6771\u4eac \u0417\u0434\u0440\u0430\u0432 "
         "\u0663\u00bd\u216b 12345",
         "2616 38776 40304 1849 138 102 34703 138 255 42063 17394 10545 251 109 12859 105 12466 245 43666 21169 16142 "
         "38857 18923 96 23141 158 227 104 17031 2231"},
        {"\U0001F469\u200d\U0001F469\u200d\U0001F467 \U0001F1E9\U0001F1EA\u2028\u3000x\u0300 \ufeff<|endoftext|>",
         "41840 102 447 235 41840 102 447 235 41840 100 12520 229 102 8582 229 103 447 101 5099 222 87 136 222 27332 "
         "119 123 27 91 437 1659 5239 91 29"},
        {"   \n  ", "220 220 220 198 220 220"},
        {"''s '' don''t", "7061 82 10148 836 7061 83"},
    };
    Tokenizer t = load_tokenizer(path);
    CHECK(t.V == 50257 && t.end_of_text == 50256, "%zu tokens, end of text %d", t.V, t.end_of_text);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int tokens[200];
        char found[1000] = "";
        size_t n = encode(&t, (const uint8_t*)cases[i].text, strlen(cases[i].text), tokens), at = 0;
        for (size_t k = 0; k < n; k++)
            at += (size_t)snprintf(found + at, sizeof found - at, "%s%d", k ? " " : "", tokens[k]);
        CHECK(!strcmp(found, cases[i].ids), "'%s': tiktoken gives %s, here %s", cases[i].text, cases[i].ids, found);
    }
    free_tokenizer(&t);
}

// ====================================================================================================================
// Data loader

static void write_shard(const char* path, const uint16_t* tokens, size_t count) {
    int32_t header[HEADER] = {SHARD_MAGIC, 1, (int32_t)count};
    unlink(path);
    FILE* f = fopen(path, "wb");
    if (!CHECK(f, "cannot write %s", path)) return;
    fwrite(header, sizeof header, 1, f);
    fwrite(tokens, sizeof *tokens, count, f);
    fclose(f);
}

// Three shards in which a token is its own number, so that a window tells where it was cut.
static void test_data_epochs(void) {
    enum { T = 16, SHARDS = 3 };
    static const size_t counts[SHARDS] = {1000, 17, 333}; // 61, 1 and 19 windows
    static uint16_t tokens[2000];
    static int inputs[100 * T], targets[100 * T];
    static bool seen[2000];
    for (size_t i = 0; i < 2000; i++) tokens[i] = (uint16_t)i;
    mkdir(in_folder("d"), 0777);
    for (size_t s = 0, at = 0; s < SHARDS; at += counts[s++]) {
        char name[32];
        snprintf(name, sizeof name, "d/part_%zu.bin", s);
        write_shard(in_folder(name), tokens + at, counts[s]);
    }
    write_shard(in_folder("d/other.bin"), tokens, 100); // not matched
    Data d = open_data(in_folder("d/part_*.bin"), T, 65536);
    CHECK(d.shard_count == SHARDS && d.token_count == 1350, "%zu shards, %zu tokens", d.shard_count, d.token_count);
    CHECK(d.windows == 61 + 1 + 19, "%zu windows", d.windows);
    size_t first_window[8], shifts_seen = 0, last_shift = SIZE_MAX;
    for (uint64_t epoch = 0; epoch < 8; epoch++) {
        memset(seen, 0, sizeof seen);
        // Batches of 7 do not divide the epoch: the borders between epochs fall inside them.
        size_t shift[SHARDS] = {SIZE_MAX, SIZE_MAX, SIZE_MAX}, in_shard[SHARDS] = {0};
        for (uint64_t w = 0; w < d.windows; w++) {
            load_batch(&d, 42, epoch * d.windows + w, 1, inputs, targets);
            for (size_t i = 0; i < T; i++) {
                CHECK(inputs[i] == inputs[0] + (int)i && targets[i] == inputs[i] + 1,
                      "epoch %zu, window %zu is not T tokens and the T one further on", (size_t)epoch, (size_t)w);
                CHECK(!seen[inputs[i]], "epoch %zu: token %d is seen twice", (size_t)epoch, inputs[i]);
                seen[inputs[i]] = true;
            }
            size_t start = (size_t)inputs[0], s = start < 1000 ? 0 : start < 1017 ? 1 : 2;
            size_t begin = s == 0 ? 0 : s == 1 ? 1000 : 1017;
            CHECK((size_t)targets[T - 1] < begin + counts[s], "a window crosses the end of its shard");
            if (shift[s] == SIZE_MAX) shift[s] = (start - begin) % T;
            in_shard[s]++;
            if (w == 0) first_window[epoch] = start;
        }
        CHECK(in_shard[0] == 61 && in_shard[1] == 1 && in_shard[2] == 19, "windows by shard: %zu, %zu, %zu",
              in_shard[0], in_shard[1], in_shard[2]);
        shifts_seen += shift[0] != last_shift;
        last_shift = shift[0];
    }
    size_t different = 0;
    for (size_t e = 1; e < 8; e++) different += first_window[e] != first_window[0];
    CHECK(different >= 6, "epochs begin with the same window");
    CHECK(shifts_seen >= 5, "epochs are cut alike");

    // A batch is the windows that would have been loaded one by one, also across the end of an epoch.
    static int one_input[T], one_target[T];
    load_batch(&d, 42, d.windows - 40, 90, inputs, targets);
    for (size_t b = 0; b < 90; b++) {
        load_batch(&d, 42, d.windows - 40 + b, 1, one_input, one_target);
        CHECK(!memcmp(inputs + b * T, one_input, sizeof one_input) &&
                  !memcmp(targets + b * T, one_target, sizeof one_target),
              "window %zu of a batch differs from itself alone", b);
    }
    // Another seed, another order.
    size_t same = 0;
    for (uint64_t w = 0; w < d.windows; w++) {
        load_batch(&d, 42, w, 1, inputs, targets);
        load_batch(&d, 43, w, 1, one_input, one_target);
        same += inputs[0] / T == one_input[0] / T;
    }
    CHECK(same < 20, "two seeds agree on %zu of %zu windows", same, d.windows);
    // Without a key nothing is shifted: validation always sees the same.
    for (size_t w = 0; w < d.windows; w++) {
        load_window(&d, w, 0, inputs, targets);
        size_t begin = w < 61 ? 16 * w : w < 62 ? 1000 : 1017 + 16 * (w - 62);
        CHECK((size_t)inputs[0] == begin, "window %zu begins at %d", w, inputs[0]);
    }
}

// How many windows there are, from none to a few, for every count of tokens, each of them read to its end.
// What a seed means for the order: worked out in Python from the comments, and not to change in later versions.
static void test_data_known(void) {
    static uint16_t tokens[201];
    static const struct {
        uint64_t taken;
        int first;
    } known[] = {{0, 51}, {1, 6}, {2, 31}, {39, 146}, {40, 156}, {78, 179}};
    int inputs[5], targets[5];
    for (size_t i = 0; i < 201; i++) tokens[i] = (uint16_t)i;
    write_shard(in_folder("train.bin"), tokens, 201);
    Data d = open_data(in_folder("train.bin"), 5, 201);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        load_batch(&d, 1337, known[i].taken, 1, inputs, targets);
        CHECK(inputs[0] == known[i].first, "window %d begins at %d", (int)known[i].taken, inputs[0]);
    }
}

// Checkpoints keep the mark, so it must stay what it is: pieces of 4,096 bytes, the last one shorter, each hashed.
static void test_data_mark(void) {
    static uint16_t tokens[2601];
    for (size_t i = 0; i < 2601; i++) tokens[i] = (uint16_t)(7 * i % 251);
    uint64_t expected = 0;
    for (size_t at = 0; at < sizeof tokens; at += 4096) {
        uint64_t hash = 0xCBF29CE484222325u;
        for (size_t i = at; i < sizeof tokens && i < at + 4096; i++)
            hash = (hash ^ ((uint8_t*)tokens)[i]) * 0x100000001B3u;
        expected = random_bits(expected, hash);
    }
    for (size_t changed = 0; changed <= 2601; changed += 289) { // the last time nothing
        if (changed < 2601) tokens[changed]++;
        write_shard(in_folder("train.bin"), tokens, 2601);
        Data d = open_data(in_folder("train.bin"), 5, 65536);
        CHECK((data_mark(&d) == expected) == (changed == 2601), "token %zu changed: mark %016llx", changed,
              (unsigned long long)data_mark(&d));
        if (changed < 2601) tokens[changed]--;
    }
}

static void test_data_counts(void) {
    static uint16_t tokens[100];
    int inputs[10], targets[10];
    for (size_t i = 0; i < 100; i++) tokens[i] = (uint16_t)i;
    for (size_t T = 1; T <= 10; T += 3)
        for (size_t count = T + 1; count < 60; count++) {
            write_shard(in_folder("train.bin"), tokens, count);
            Data d = open_data(in_folder("train.bin"), T, 65536);
            size_t cuts = (count - 1) / T;
            CHECK(d.windows == (cuts > 1 ? cuts - 1 : 1), "%zu tokens, T %zu: %zu windows", count, T, d.windows);
            for (uint64_t w = 0; w < 5 * d.windows; w++) {
                load_batch(&d, 1, w, 1, inputs, targets);
                CHECK((size_t)targets[T - 1] < count, "%zu tokens, T %zu: a window ends at %d", count, T,
                      targets[T - 1]);
            }
        }
}

static void load_data(const char* pattern) {
    Data d = open_data(pattern, 8, 100);
    int inputs[8], targets[8];
    for (size_t i = 0; i < d.windows; i++) load_window(&d, i, 0, inputs, targets);
}

static void test_data_damaged(void) {
    uint16_t tokens[30];
    char what[100];
    for (size_t i = 0; i < 30; i++) tokens[i] = (uint16_t)i;
    const char* whole = in_folder("whole");
    write_shard(whole, tokens, 30);
    CHECK_SUCCESS(forked(load_data, whole), "the whole file");
    size_t size = 0;
    char *data = read_file(whole, &size), *copy = read_file(whole, NULL);
    for (size_t n = 0; n < size; n += n < 40 || n + 80 > size ? 1 : 11) {
        snprintf(what, sizeof what, "cut off after %zu bytes", n);
        refuse(load_data, data, n, n < HEADER * 4 ? "cut off" : "is damaged", what);
    }
    static const int32_t values[] = {0, 1, -1, 29, 31, 65536, INT32_MAX, INT32_MIN};
    for (size_t field = 0; field < 3; field++)
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            if (field == 1 && values[i] == 1) continue;
            memcpy(copy, data, size);
            memcpy(copy + 4 * field, &values[i], 4);
            snprintf(what, sizeof what, "header field %zu set to %d", field, values[i]);
            refuse(load_data, copy, size, in_folder("damaged"), what);
        }
    tokens[13] = 100; // the vocabulary has 100: 0 to 99
    write_shard(in_folder("damaged"), tokens, 30);
    CHECK_FAILURE(forked(load_data, in_folder("damaged")), 1, "token 13 is 100, but the vocabulary has 100",
                  "a token too many");
    write_shard(in_folder("short"), tokens, 8);
    CHECK_FAILURE(forked(load_data, in_folder("short")), 1, "8 tokens are too few for a context of 8", "8 tokens");
    write_shard(in_folder("short"), tokens, 0);
    CHECK_FAILURE(forked(load_data, in_folder("short")), 1, "0 tokens are too few", "no tokens");
    CHECK_FAILURE(forked(load_data, in_folder("none_*.bin")), 1, "none_*.bin", "a pattern that matches nothing");
    CHECK_FAILURE(forked(load_data, folder), 1, "not a regular file", "a folder");
    // A name with brackets is itself, not a pattern, if there is such a file.
    tokens[13] = 13;
    write_shard(in_folder("a[1].bin"), tokens, 30);
    CHECK_SUCCESS(forked(load_data, in_folder("a[1].bin")), "a name with brackets");
    // A shard too short for a window, among others, is passed over.
    write_shard(in_folder("s1"), tokens, 5);
    write_shard(in_folder("s2"), tokens, 30);
    CHECK_SUCCESS(forked(load_data, in_folder("s[12]")), "a short shard and a long one");
    write_file(in_folder("s1"), data, size - 1);
    CHECK_FAILURE(forked(load_data, in_folder("s[12]")), 1, "s1 is damaged", "a damaged shard among others");
    free(data), free(copy);
}

// ====================================================================================================================
// Checkpoint

// A safetensors file in the making.
typedef struct {
    char* text;
    uint8_t* data;
    size_t text_size, data_size;
} Builder;

static void free_builder(Builder* b) {
    free(b->text), free(b->data);
    memset(b, 0, sizeof *b);
}

static void append(char** text, size_t* length, const char* format, ...) {
    va_list args;
    va_start(args, format);
    char* more;
    int n = vasprintf(&more, format, args);
    va_end(args);
    if (n >= 0) *text = (char*)realloc(*text, *length + (size_t)n + 1);
    if (n < 0 || !*text) die("no memory for a test's text");
    memcpy(*text + *length, more, (size_t)n + 1);
    *length += (size_t)n;
    free(more);
}

// shape and offsets as they stand in the file, so that they may be wrong; data may be NULL: any numbers.
static void add_entry(Builder* b, const char* name, const char* type, const char* shape, size_t bytes,
                      const void* data) {
    append(&b->text, &b->text_size, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
           b->text ? "," : "", name, type, shape, b->data_size, b->data_size + bytes);
    b->data = (uint8_t*)realloc(b->data, b->data_size + bytes + 1);
    for (size_t i = 0; i < bytes; i++)
        b->data[b->data_size + i] = data ? ((const uint8_t*)data)[i] : (uint8_t)(i % 4 == 3 ? 0x3C : i * 7);
    b->data_size += bytes;
}

static void write_parts(const char* path, const char* text, size_t text_size, const void* data, size_t data_size) {
    uint64_t length = text_size;
    unlink(path);
    FILE* f = fopen(path, "wb");
    if (!CHECK(f, "cannot write %s", path)) return;
    fwrite(&length, sizeof length, 1, f);
    fwrite(text, 1, text_size, f);
    if (data_size) fwrite(data, 1, data_size, f);
    fclose(f);
}

static void write_safetensors(const char* path, Builder* b) {
    char* text = NULL;
    size_t length = 0;
    append(&text, &length, "{%s}", b->text ? b->text : "");
    write_parts(path, text, length, b->data, b->data_size);
    free(text);
}

// All tensors of a GPT-2 but `except` (or NULL), of random bits that are finite numbers.
static void add_model(Builder* b, Config config, const char* prefix, const char* type, const char* except) {
    Model m;
    memset(&m, 0, sizeof m);
    m.config = config;
    describe_parameters(&m);
    for (size_t i = 0; i < m.tensor_count; i++) {
        const Tensor* t = &m.tensors[i];
        char name[128], shape[64];
        size_t bytes = t->size * type_size(type);
        if (except && !strcmp(except, t->name)) continue;
        snprintf(name, sizeof name, "%s%s", prefix, t->name);
        if (t->rows)
            snprintf(shape, sizeof shape, "[%zu,%zu]", t->rows, t->columns);
        else
            snprintf(shape, sizeof shape, "[%zu]", t->columns);
        uint8_t* data = (uint8_t*)allocate(bytes, 1, "a test's tensor");
        for (size_t k = 0; k < bytes; k++) {
            bool top = (k + 1) % (bytes / t->size) == 0; // has most of the exponent, which must not be all ones
            data[k] = (uint8_t)random_bits(i, k) & (top ? 0xBF : 0xFF);
        }
        add_entry(b, name, type, shape, bytes, data);
        free(data);
    }
    free(m.tensors);
}

static const Config tiny = {256, 4, 6, 2, 2}; // V, T, C, H, L

static void load_weights(const char* path) {
    Model m;
    opt.init = path;
    Tokenizer none;
    load_for_use(&m, &none, false, false);
    device->free_model(&m);
    opt.init = NULL;
}

static void make_model(Model* m, Config config, bool training, uint64_t seed) {
    memset(m, 0, sizeof *m);
    m->config = config;
    device->create_model(m, training);
    initialize(m, seed);
}

static bool same_tensors(const Model* a, const float* x, const Model* b, const float* y) {
    bool same = a->tensor_count == b->tensor_count;
    for (size_t i = 0; same && i < a->tensor_count; i++) {
        const Tensor *s = &a->tensors[i], *t = &b->tensors[i];
        same = s->size == t->size;
        if (!same) break;
        float *u = (float*)allocate(s->size, sizeof(float), "a copy"), *v = (float*)allocate(s->size, 4, "a copy");
        device->to_host(u, x + s->offset, s->size);
        device->to_host(v, y + t->offset, s->size);
        same = !memcmp(u, v, s->size * sizeof(float));
        free(u), free(v);
    }
    return same;
}

static void test_checkpoint_round_trip(void) {
    static const Config shapes[] = {{256, 4, 6, 2, 2}, {520, 33, 40, 5, 1}, {257, 1, 1, 1, 3}};
    for (size_t i = 0; i < 3; i++) {
        Model m, back;
        make_model(&m, shapes[i], true, 5);
        for (size_t t = 0; t < m.tensor_count; t++) // moments of bits that no arithmetic would leave alone, but finite
            for (size_t j = 0; j < m.tensors[t].size; j++) {
                uint32_t bits[2] = {(uint32_t)random_bits(t, j) & 0xBFFFFFFF,
                                    (uint32_t)random_bits(t + 1000, j) & 0xBFFFFFFF};
                float x[2];
                memcpy(x, bits, sizeof x);
                device->to_device(m.moment1 + m.tensors[t].offset + j, x, 1);
                device->to_device(m.moment2 + m.tensors[t].offset + j, x + 1, 1);
            }
        const char* path = in_folder("gpt.safetensors");
        char more[64];
        snprintf(more, sizeof more, ",\"--heads\":\"%zu\",\"step\":\"17\"", shapes[i].H);
        save_checkpoint(path, &m, true, more, NULL);
        size_t size = 0;
        char* data = read_file(path, &size);
        uint64_t header = 0;
        if (data) memcpy(&header, data, 8);
        CHECK(header % 8 == 0 && size == 8 + header + 12 * m.parameter_count, "%zu bytes of header, %zu in all",
              (size_t)header, size);
        free(data);
        Checkpoint c = open_checkpoint(path, "");
        memset(&back, 0, sizeof back);
        back.config = read_config(&c);
        CHECK(!memcmp(&back.config, &shapes[i], sizeof back.config), "the shape does not come back");
        CHECK(metadata(&c, "step") && !strcmp(metadata(&c, "step"), "17") && !metadata(&c, "stop"), "metadata");
        device->create_model(&back, true);
        load_block(&c, &back, "", back.weights);
        load_block(&c, &back, "adam.m.", back.moment1);
        load_block(&c, &back, "adam.v.", back.moment2);
        check_foreign(&c, &back);
        close_checkpoint(&c);
        CHECK(same_tensors(&m, m.weights, &back, back.weights), "shape %zu: the weights do not come back", i);
        CHECK(same_tensors(&m, m.moment1, &back, back.moment1), "shape %zu: the first moments do not come back", i);
        CHECK(same_tensors(&m, m.moment2, &back, back.moment2), "shape %zu: the second moments do not come back", i);
        device->free_model(&m), device->free_model(&back);
    }
}

static double half_plainly(uint32_t h) {
    int exponent = h >> 10 & 31;
    double fraction = h & 1023, sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction > 0 ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24));
}

static void test_half_to_float(void) {
    for (uint32_t h = 0; h < 65536; h++) {
        double expected = half_plainly(h), got = half_to_float((uint16_t)h);
        CHECK(isnan(expected) ? isnan(got) : got == expected && !signbit(got) == !signbit(expected),
              "0x%04X is %g, not %g", h, expected, got);
    }
}

// The three types, with and without the prefix of a model saved with its head.
static void test_checkpoint_import(void) {
    static const char* const types[] = {"F32", "F16", "BF16"};
    static const char* const prefixes[] = {"", "transformer."};
    for (size_t type = 0; type < 3; type++)
        for (size_t p = 0; p < 2; p++) {
            Builder b = {NULL, NULL, 0, 0};
            add_entry(&b, "h.0.attn.masked_bias", "F32", "[]", 4, NULL); // so that the weights are not aligned
            add_model(&b, tiny, prefixes[p], types[type], NULL);
            const char* path = in_folder("model.safetensors");
            write_safetensors(path, &b);
            write_file(in_folder("config.json"), "{\"n_head\": 2}", 13);
            Model m;
            opt.init = path;
            Tokenizer none;
            load_for_use(&m, &none, false, false);
            CHECK(!memcmp(&m.config, &tiny, sizeof tiny), "%s: another shape", types[type]);
            size_t at = 4, width = type_size(types[type]);
            for (size_t t = 0; t < m.tensor_count; t++)
                for (size_t j = 0; j < m.tensors[t].size; j++, at += width) {
                    uint32_t bits = 0, got;
                    float x, expected;
                    memcpy(&bits, b.data + at, width);
                    device->to_host(&x, m.weights + m.tensors[t].offset + j, 1);
                    if (type == 2) bits <<= 16;
                    expected = (float)half_plainly(bits);
                    if (type == 1 && !isnan(expected)) memcpy(&bits, &expected, 4);
                    memcpy(&got, &x, 4);
                    CHECK(got == bits || (type == 1 && isnan(expected) && isnan(x)), "%s: %s, number %zu is %g",
                          types[type], m.tensors[t].name, j, (double)x);
                }
            device->free_model(&m);
            free_builder(&b);
        }
    opt.init = NULL;
}

static size_t heads_of(const char* path) {
    Checkpoint c = open_checkpoint(path, "");
    size_t heads = read_config(&c).H;
    close_checkpoint(&c);
    return heads;
}

// A model in two files and their index: read as one, and what may be wrong with that.
static void test_checkpoint_parts(void) {
    Builder a = {NULL, NULL, 0, 0}, b = a, whole = a;
    add_model(&whole, tiny, "", "F32", NULL);
    add_model(&a, tiny, "", "F32", "wpe.weight");
    add_entry(&b, "transformer.wpe.weight", "F32", "[4,6]", 96, NULL);
    mkdir(in_folder("parts"), 0777);
    write_safetensors(in_folder("parts/a.safetensors"), &a);
    write_safetensors(in_folder("parts/b.safetensors"), &b);
    write_safetensors(in_folder("parts/c.safetensors"), &whole);
    write_file(in_folder("parts/config.json"), "{\"n_head\": 2}", 13);
#define MAP(files) "{\"metadata\": {\"total_size\": 1}, \"weight_map\": {" files "}}"
#define A_AND_B \
    "\"h.0.ln_1.bias\": \"a.safetensors\", \"wpe.weight\": \"b.safetensors\", \"wte.weight\": \"a.safetensors\""
    static const struct {
        const char *index, *error;
    } cases[] = {
        {MAP(A_AND_B), NULL},
        {MAP("\"x\": \"b.safetensors\""), "is not a GPT-2"},
        {MAP("\"x\": \"a.safetensors\""), "is not a GPT-2"},
        {MAP("\"x\": \"none.safetensors\""), "none.safetensors: No such file"},
        {MAP("\"x\": \"../a.safetensors\""), "in another folder"},
        {MAP(A_AND_B ", \"z\": \"c.safetensors\""), "is in two files"},
        {MAP(""), "is not a GPT-2"},
        {"{\"weight_map\": 5}", "is not a GPT-2"},
        {"[]", "is damaged"},
        {"", "is damaged"},
        {"{\"weight_map\": {\"x\": 5}}", "5: No such file"},
    };
#undef MAP
#undef A_AND_B
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char what[200];
        snprintf(what, sizeof what, "%.199s", cases[i].index);
        write_file(in_folder("parts/model.safetensors.index.json"), cases[i].index, strlen(cases[i].index));
        const Result* r = cli("--init %s --export %s", in_folder("parts"), in_folder("to"));
        if (cases[i].error)
            CHECK_FAILURE(r, 1, cases[i].error, what);
        else
            CHECK_SUCCESS(r, what);
    }
    const char* pickles = "{\"weight_map\": {\"x\": \"pickle\"}}";
    unlink(in_folder("parts/model.safetensors.index.json"));
    write_file(in_folder("parts/pytorch_model.bin"), "PK", 2);
    write_file(in_folder("parts/pytorch_model.bin.index.json"), pickles, strlen(pickles));
    CHECK_FAILURE(cli("--init %s --export x", in_folder("parts")), 1, "to_safetensors.py", "Python's own format");
    unlink(in_folder("parts/pytorch_model.bin"));
    write_file(in_folder("parts/pickle"), "PK", 2);
    CHECK_FAILURE(cli("--init %s --export x", in_folder("parts")), 1, "parts/pickle", "several in Python's format");
    write_file(in_folder("parts/pytorch_model.bin"), "PK", 2);
    CHECK_FAILURE(cli("--init %s --export x", in_folder("parts/pytorch_model.bin")), 1, "to_safetensors.py",
                  "Python's own format");
    free_builder(&a), free_builder(&b), free_builder(&whole);
}

static void test_checkpoint_heads(void) {
    const Config wide = {256, 4, 192, 3, 1};
    Builder b = {NULL, NULL, 0, 0};
    mkdir(in_folder("m"), 0777);
    const char *path = in_folder("m/model.safetensors"), *config = in_folder("m/config.json");
    add_model(&b, wide, "", "F32", NULL);
    write_safetensors(path, &b);
    CHECK(heads_of(path) == 3, "without a word about heads there are %zu of 192 channels", heads_of(path));
    static const struct {
        const char* text;
        size_t heads;
    } configs[] = {
        {"{\"n_head\": 6}", 6},
        {"{\n  \"x\": [1, {\"n_head\": 7}, true, null, -1.5e-3, \"}\\\"\"],\n  \"n_head\" : 12 ,\n  \"y\": {}\n}\n",
         12},
        {"{}", 3},
        {"{\"n_layer\": 5}", 3},
        {"{\"activation_function\": \"gelu_new\", \"layer_norm_epsilon\": 0.00001, \"n_inner\" :null}", 3},
        {"{\"activation_function\":\"gelu_pytorch_tanh\",\"layer_norm_epsilon\":1e-05,\"n_inner\":768}", 3},
        {"{\"scale_attn_weights\": true, \"scale_attn_by_inverse_layer_idx\": false}", 3},
    };
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        write_file(config, configs[i].text, strlen(configs[i].text));
        CHECK(heads_of(path) == configs[i].heads, "%s: %zu heads", configs[i].text, heads_of(path));
        CHECK_SUCCESS(forked(load_weights, path), configs[i].text);
    }
    static const char* const wrong[][2] = {
        {"{\"n_head\": 5}", "heads 5"},
        {"{\"n_head\": 18446744073709551615}", "impossible"},
        {"{\"n_head\": -1}", "n_head is '-1', not a whole number"},
        {"{\"n_head\": \"three\"}", "whole number"},
        {"{\"activation_function\": \"relu\"}", "activation_function is relu, which"},
        {"{\"layer_norm_epsilon\": 1e-6}", "layer_norm_epsilon is 1e-6, which"},
        {"{\"scale_attn_weights\": false}", "scale_attn_weights is false"},
        {"{\"scale_attn_by_inverse_layer_idx\": true}", "layer_idx is true"},
        {"{\"n_inner\": 192}", "n_inner is 192"},
        {"{\"n_head\": 3", "config.json is damaged"},
        {"", "config.json is damaged"},
        {"n_head: 3", "config.json is damaged"}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        write_file(config, wrong[i][0], strlen(wrong[i][0]));
        CHECK_FAILURE(forked(load_weights, path), 1, wrong[i][1], wrong[i][0]);
    }
    static const char nul[] = "{\"x\": \0null}";
    write_file(config, nul, sizeof nul - 1);
    CHECK_FAILURE(forked(load_weights, path), 1, "config.json is damaged", "a NUL before a value");
    const Config narrow = {256, 4, 63, 3, 1}; // less than one head of 64
    Builder n = {NULL, NULL, 0, 0};
    add_model(&n, narrow, "", "F32", NULL);
    write_safetensors(in_folder("narrow.safetensors"), &n);
    CHECK_FAILURE(forked(load_weights, in_folder("narrow.safetensors")), 1, "impossible", "63 channels");
    free_builder(&n);
    // What training has noted comes first.
    append(&b.text, &b.text_size, ",\"__metadata__\":{\"--heads\":\"2\"}");
    write_safetensors(path, &b);
    CHECK(heads_of(path) == 2, "the metadata says 2 heads, there are %zu", heads_of(path));
    free_builder(&b);
    // But not what no option could have asked for.
    static const char* const noted[][2] = {
        {"\"--heads\":\"0\"", "--heads is 0, not 1 to 65536"},
        {"\"--heads\":\"65537\"", "--heads is 65537, not"},
        {"\"--heads\":\"2\",\"--layers\":\"0\"", "--layers is 0, not 1 to 96"},
        {"\"--heads\":\"2\",\"--channels\":\"18446744073709551615\"", "--channels is 1844674407370955"},
    };
    for (size_t i = 0; i < sizeof noted / sizeof *noted; i++) {
        Builder shaped = {NULL, NULL, 0, 0};
        append(&shaped.text, &shaped.text_size, "\"__metadata__\":{%s}", noted[i][0]);
        add_model(&shaped, tiny, "", "F32", NULL);
        write_safetensors(path, &shaped);
        CHECK_FAILURE(forked(load_weights, path), 1, noted[i][1], noted[i][0]);
        free_builder(&shaped);
    }
}

static void test_checkpoint_foreign(void) {
    const char* path = in_folder("gpt.safetensors");
    static const struct {
        const char *name, *type, *shape;
        size_t bytes;
        const char* refused; // NULL: passes
    } cases[] = {
        {"h.0.attn.bias", "F32", "[1,1,4,4]", 64, NULL},
        {"h.0.attn.bias", "BOOL", "[1,1,4,4]", 16, NULL},
        {"transformer.h.1.attn.bias", "U8", "[1,1,4,4]", 16, NULL},
        {"h.1.attn.masked_bias", "F32", "[]", 4, NULL},
        {"adam.m.of.another.life", "F32", "[3]", 12, NULL},
        {"h.2.mlp.c_fc.weight", "F32", "[6,24]", 576, "h.2.mlp.c_fc.weight, which a GPT-2 has not"},
        {"h.0.attn.bias2", "F32", "[4]", 16, "h.0.attn.bias2, which"},
        {"rotary.inv_freq", "F32", "[4]", 16, "rotary.inv_freq, which"},
        {"lm_head.weight", "F32", "[256,6]", 6144, "its head is not its token embedding"},
        {"transformer.wte.weight", "F32", "[256,6]", 6144, "wte.weight/data_offsets/0 twice"},
        {"lm_head.weight", "F32", "[1]", 4, "its head is not its token embedding"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Builder b = {NULL, NULL, 0, 0};
        append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"2\"}");
        add_model(&b, tiny, "", "F32", NULL);
        add_entry(&b, cases[i].name, cases[i].type, cases[i].shape, cases[i].bytes, NULL);
        write_safetensors(path, &b);
        if (cases[i].refused)
            CHECK_FAILURE(forked(load_weights, path), 1, cases[i].refused, cases[i].name);
        else
            CHECK_SUCCESS(forked(load_weights, path), cases[i].name);
        free_builder(&b);
    }
    // A head that is the token embedding again, bit for bit.
    Builder b = {NULL, NULL, 0, 0};
    append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"2\"}");
    add_model(&b, tiny, "transformer.", "F32", NULL);
    uint8_t* wte = (uint8_t*)allocate(6144, 1, "a copy");
    memcpy(wte, b.data, 6144);
    add_entry(&b, "lm_head.weight", "F32", "[256,6]", 6144, wte);
    write_safetensors(path, &b);
    CHECK_SUCCESS(forked(load_weights, path), "a tied head");
    b.data[b.data_size - 1] ^= 1;
    write_safetensors(path, &b);
    CHECK_FAILURE(forked(load_weights, path), 1, "its head is not its token embedding", "a head that differs in a bit");
    free(wte);
    free_builder(&b);
}

static void test_checkpoint_incomplete(void) {
    const char* path = in_folder("gpt.safetensors");
    Model m;
    memset(&m, 0, sizeof m);
    m.config = tiny;
    describe_parameters(&m);
    char wrong[64], what[100];
    for (size_t i = 0; i < m.tensor_count; i++)
        for (int change = 0; change < 6; change++) {
            const Tensor* t = &m.tensors[i];
            size_t rows = t->rows ? t->rows : 1, columns = t->columns;
            Builder b = {NULL, NULL, 0, 0};
            append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"2\"}");
            add_model(&b, tiny, "", "F32", t->name);
            if (change == 1) columns++; // one number more in a row
            if (change == 5) columns = 0;
            if (change == 2) // transposed
                snprintf(wrong, sizeof wrong, "[%zu,%zu]", columns, rows);
            else if (change == 3) // flat, or with a dimension more
                snprintf(wrong, sizeof wrong, t->rows ? "[%zu]" : "[1,%zu]", t->size);
            else if (t->rows)
                snprintf(wrong, sizeof wrong, "[%zu,%zu]", rows, columns);
            else
                snprintf(wrong, sizeof wrong, "[%zu]", columns);
            if (change) // 0: missing; 4: of integers
                add_entry(&b, t->name, change == 4 ? "I32" : "F32", wrong, 4 * rows * columns, NULL);
            bool square = t->rows == t->columns && change == 2;
            write_safetensors(path, &b);
            snprintf(what, sizeof what, "%s, change %d", t->name, change);
            // Which tensor is blamed may be another: sizes are read off the embeddings, layers are counted by ln_1.
            if (square)
                CHECK_SUCCESS(forked(load_weights, path), what);
            else
                CHECK_FAILURE(forked(load_weights, path), 1, path, what);
            free_builder(&b);
        }
    device->free_model(&m);
    Builder b = {NULL, NULL, 0, 0};
    Config deep = {256, 1, 1, 1, MAX_LAYERS};
    append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"1\"}");
    add_model(&b, deep, "", "F32", NULL);
    snprintf(what, sizeof what, "h.%d.ln_1.weight", MAX_LAYERS);
    add_entry(&b, what, "F32", "[1]", 4, NULL);
    write_safetensors(path, &b);
    CHECK_FAILURE(forked(load_weights, path), 1, "more than 96 layers", "97 layers");
    free_builder(&b);
    // A vocabulary that no uint16 token fits.
    Config large = {65537, 1, 1, 1, 1};
    append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"1\"}");
    add_model(&b, large, "", "F16", NULL);
    write_safetensors(path, &b);
    CHECK_FAILURE(forked(load_weights, path), 1, "impossible sizes: vocabulary 65537", "65537 tokens");
    free_builder(&b);
}

static void test_checkpoint_json(void) {
    char deep[5000] = "{\"a\":{\"x\":", *text = NULL;
    for (int i = 0; i < 2000; i++) strcat(deep, "[");
#define T(shape, from, to) "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" from "," to "]}"
    const struct {
        const char* json;
        size_t data;
        const char* error;
    } cases[] = {
        {"", 0, "not a safetensors file"},
        {"[]", 0, "not a safetensors file"},
        {"{}", 0, "is not a GPT-2"},
        {"{ } \n", 0, "is not a GPT-2"},
        {"{}", 1, "1 bytes belong to no tensor"},
        {"{}x", 0, "something follows"},
        {"{}{}", 0, "something follows"},
        {"{}\0", 0, "is not a GPT-2"},
        {"{ ", 0, "'\"' missing"},
        {"{\"", 0, "does not end"},
        {"{\"a", 0, "does not end"},
        {"{\"a\\\"", 0, "does not end"},
        {"{\"a\"", 0, "':' missing"},
        {"{\"a\":", 0, "a value is missing"},
        {"{\"a\":1}", 0, "is not a GPT-2"},
        {"{\"a\":nulL}", 0, "'}' missing"},
        {"{\"a\":null}", 1, "1 bytes belong to no tensor"},
        {"{\"a\":{}}", 0, "is not a GPT-2"},
        {"{\"a\":{\"dtype\":\"F32\"}}", 0, "tensor a has no dtype or data_offsets"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", 4, "has no dtype or data_offsets"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "4 bytes belong to no tensor"},
        {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "tensor a has the wrong size"},
        {"{\"a\":" T("[1]", "0", "4"), 4, "'}' missing"},
        {"{\"a\":" T("[1]", "0", "4") ",}", 4, "'\"' missing"},
        {"{\"a\":" T("[1", "0", "4") "}", 4, "']' missing"},
        {"{\"a\":" T("[1,]", "0", "4") "}", 4, "a value is missing"},
        {"{\"a\":" T("[-1]", "0", "4") "}", 4, "its a/shape/0 is '-1', not a whole number"},
        {"{\"a\":" T("[1.0]", "0", "4") "}", 4, "is '1.0', not a whole number"},
        {"{\"a\":" T("[1e0]", "0", "4") "}", 4, "is '1e0', not a whole number"},
        {"{\"a\":" T("2", "0", "8") "}", 8, "tensor a has the wrong size"},
        {"{\"a\":" T("[1,1,1,1,1]", "0", "4") "}", 4, "over 4 dimensions"},
        {"{\"a\":" T("[99999999999999999999]", "0", "4") "}", 4, "not a whole number"},
        {"{\"a\":" T("[1]", "0", "18446744073709551616") "}", 4, "its a/data_offsets/1 is '18446744073709551616'"},
        {"{\"a\":" T("[4294967296,4294967296]", "0", "4") "}", 4, "too large"},
        {"{\"a\":" T("[4611686018427387904]", "0", "0") "}", 0, "too large"},
        {"{\"a\":" T("[2]", "0", "4") "}", 4, "tensor a has the wrong size"},
        {"{\"a\":" T("[1]", "4", "8") "}", 8, "4 bytes belong to no tensor"},
        {"{\"a\":" T("[1]", "0", "8") "}", 8, "tensor a has the wrong size"},
        {"{\"a\":" T("[1]", "0", "4") "}", 3, "the place of tensor a is wrong"},
        {"{\"a\":" T("[1]", "0", "4") "}", 5, "1 bytes belong to no tensor"},
        {"{\"a\":" T("[1]", "4", "0") "}", 4, "the place of tensor a is wrong"},
        {"{\"a\":" T("[1]", "0", "18446744073709551612") "}", 4, "the place of tensor a is wrong"},
        {"{\"a\":" T("[1]", "0", "4") ",\"b\":" T("[1]", "0", "4") "}", 4, "is wrong"},
        {"{\"a\":" T("[2]", "0", "8") ",\"b\":" T("[2]", "4", "12") "}", 12, "the place of tensor b is wrong"},
        {"{\"a\":" T("[1]", "0", "4") ",\"b\":" T("[1]", "8", "12") "}", 12, "4 bytes belong to no tensor"},
        {"{\"a\":" T("[1]", "0", "4") ",\"a\":" T("[1]", "4", "8") "}", 8, "has a/data_offsets/0 twice"},
        {"{\"b\":" T("[1]", "4", "8") ",\"a\":" T("[1]", "0", "4") "}", 8, "is not a GPT-2"}, // any order is good
        {"{\"__metadata__\":{\"k\":1,\"k\":2}}", 0, "has k twice"},
        {"{\"__metadata__\":[],\"a\":[]}", 0, "is not a GPT-2"},
        {"{\"__metadata__\":{\"k\":\"v\"", 0, "'}' missing"},
        {"{\"__metadata__\":{}}", 0, "is not a GPT-2"},
        {deep, 0, "too deep a nesting"},
    };
#undef T
    const char* path = in_folder("damaged");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_parts(path, cases[i].json, strlen(cases[i].json), "\0\0\0\0\0\0\0\0\0\0\0", cases[i].data);
        CHECK_FAILURE(forked(load_weights, path), 1, cases[i].error, cases[i].json);
    }
    // Sizes that are read off the embeddings must be there, and agree.
    static const char* const embeddings[][4] = {
        {"[0,4]", "[4,4]", "0", "64"},
        {"[4,0]", "[4,0]", "0", "0"},
        {"[4,4]", "[4,3]", "64", "48"},
        {"[4,4]", "[0,4]", "64", "0"},
        {"[4,4]", "[16]", "64", "64"},
        {"[16]", "[4,4]", "64", "64"},
        {"[]", "[]", "4", "4"},
        {"[2,2,4]", "[4,4]", "64", "64"},
        {"[0,99999999999]", "[0,99999999999]", "0", "0"},
    };
    for (size_t i = 0; i < sizeof embeddings / sizeof *embeddings; i++) {
        Builder b = {NULL, NULL, 0, 0};
        add_entry(&b, "wte.weight", "F32", embeddings[i][0], (size_t)atoi(embeddings[i][2]), NULL);
        add_entry(&b, "wpe.weight", "F32", embeddings[i][1], (size_t)atoi(embeddings[i][3]), NULL);
        write_safetensors(path, &b);
        CHECK_FAILURE(forked(load_weights, path), 1, path, embeddings[i][0]);
        free_builder(&b);
    }
    // Header lengths that do not fit the file.
    static const uint64_t lengths[] = {0, 1, 3, 4, 100000001, INT64_MAX, UINT64_MAX, UINT64_MAX - 7, UINT64_MAX - 8};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        char file[11] = "12345678{}";
        memcpy(file, &lengths[i], 8);
        refuse(load_weights, file, 10, in_folder("damaged"), "a wrong length of the header");
    }
    // A header that claims to go on behind the end of a file that fills its pages.
    static char pages[1 << 16];
    const uint64_t beyond = 1 << 20;
    memset(pages, ' ', sizeof pages);
    memcpy(pages, &beyond, 8);
    pages[8] = '{';
    refuse(load_weights, pages, sizeof pages, "cut off", "a header longer than the file");
    // As much as there may be in a list, and more.
    for (int more = 0; more < 2; more++) {
        size_t length = 0;
        append(&text, &length, "{\"__metadata__\":{\"k\":\"v\"");
        for (int i = 1; i < MAX_PAIRS + more; i++) append(&text, &length, ",\"k%d\":\"v\"", i);
        append(&text, &length, "}}");
        write_parts(path, text, length, NULL, 0);
        const char* error = more ? "too long a list" : "is not a GPT-2";
        CHECK_FAILURE(forked(load_weights, path), 1, error, "a long list");
    }
    free(text);
}

static void test_checkpoint_damaged(void) {
    Builder b = {NULL, NULL, 0, 0};
    Config smallest = {256, 1, 1, 1, 1};
    char what[100];
    append(&b.text, &b.text_size, "\"__metadata__\":{\"--heads\":\"1\"}");
    add_model(&b, smallest, "", "F32", NULL);
    const char* whole = in_folder("whole");
    write_safetensors(whole, &b);
    free_builder(&b);
    CHECK_SUCCESS(forked(load_weights, whole), "the whole file");
    size_t size = 0;
    char *data = read_file(whole, &size), *copy = read_file(whole, NULL);
    uint64_t header;
    memcpy(&header, data, 8);
    for (size_t n = 0; n < size; n += n < 8 + header + 8 || n + 8 > size ? 1 : 29) {
        snprintf(what, sizeof what, "cut off after %zu bytes", n);
        refuse(load_weights, data, n, in_folder("damaged"), what);
    }
    // A header that ends early, at any byte, with all the tensors behind it.
    for (uint64_t n = 0; n < header; n += 3) {
        memcpy(copy, data, size);
        memcpy(copy, &n, 8);
        snprintf(what, sizeof what, "a header of %zu bytes", (size_t)n);
        refuse(load_weights, copy, size, in_folder("damaged"), what);
    }
    // Any byte of the header changed: refused as it must be, or harmless (in a key that nobody reads, say).
    for (uint64_t i = 0; i < 500; i++) {
        memcpy(copy, data, size);
        size_t at = (size_t)(random_bits(5, 2 * i) % (8 + header));
        copy[at] = (char)random_bits(5, 2 * i + 1);
        write_file(in_folder("damaged"), copy, size);
        const Result* r = forked(load_weights, in_folder("damaged"));
        snprintf(what, sizeof what, "byte %zu changed", at);
        if (r->status || r->signal) CHECK_FAILURE(r, 1, in_folder("damaged"), what);
    }
    free(data), free(copy);
}

static void test_export(void) {
    Builder b = {NULL, NULL, 0, 0};
    add_model(&b, tiny, "transformer.", "F32", NULL);
    mkdir(in_folder("from"), 0777);
    write_safetensors(in_folder("from/model.safetensors"), &b);
    write_file(in_folder("from/config.json"), "{\"n_head\": 2}", 13);
    CHECK_SUCCESS(cli("--init %s --export %s", in_folder("from"), in_folder("to")), "an export");
    size_t size = 0;
    char* config = read_file(in_folder("to/config.json"), &size);
    static const char* const fields[] = {"\"model_type\": \"gpt2\"",
                                         "\"vocab_size\": 256",
                                         "\"n_positions\": 4",
                                         "\"n_embd\": 6",
                                         "\"n_layer\": 2",
                                         "\"n_head\": 2",
                                         "\"bos_token_id\": null",
                                         "\"eos_token_id\": null",
                                         "\"activation_function\": \"gelu_new\"",
                                         "GPT2LMHeadModel",
                                         "\"tie_word_embeddings\": true"};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        CHECK(config && strstr(config, fields[i]), "config.json has not %s", fields[i]);
    free(config);
    // All bytes of the weights, and a folder that is opened again to the same.
    char* model = read_file(in_folder("to/model.safetensors"), &size);
    CHECK(model && size > b.data_size && !memcmp(model + size - b.data_size, b.data, b.data_size),
          "the exported weights are not those of the model");
    free(model);
    CHECK_SUCCESS(cli("--init %s --export=%s", in_folder("to"), in_folder("again")), "an export of an export");
    CHECK(same_files(in_folder("to/model.safetensors"), in_folder("again/model.safetensors")) &&
              same_files(in_folder("to/config.json"), in_folder("again/config.json")),
          "an export of an export differs");
    CHECK(!exists(in_folder("to/model.safetensors.tmp")) && !exists(in_folder("to/config.json.tmp")), "left over");
    CHECK_SUCCESS(cli("--init %s --export %s", in_folder("from"), in_folder("to")), "an export over an export");
    CHECK_FAILURE(cli("--init %s --export %s", in_folder("from"), in_folder("to/config.json")), 1, "Not a directory",
                  "an export into a file");
    CHECK_FAILURE(cli("--init %s --export %s", in_folder("from"), in_folder("no/such")), 1, "No such file",
                  "an export into a folder that cannot be made");
    child.file_limit = 3000;
    CHECK_FAILURE(cli("--init %s --export %s", in_folder("from"), in_folder("to")), 1, "cannot write", "a full disk");
    child.file_limit = 0;
    CHECK(same_files(in_folder("to/model.safetensors"), in_folder("again/model.safetensors")),
          "a full disk has cost the old export");
    free_builder(&b);
}

// ====================================================================================================================
// Generation

// What is written to stdout between the two calls.
static int real_stdout;

static void begin_capture(void) {
    fflush(stdout);
    real_stdout = dup(1);
    int fd = open(in_folder("captured"), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(real_stdout >= 0 && fd >= 0 && dup2(fd, 1) == 1, "cannot capture the output");
    close(fd);
}

static char* end_capture(size_t* size) {
    fflush(stdout);
    dup2(real_stdout, 1);
    close(real_stdout);
    return read_file(in_folder("captured"), size);
}

// How the text must look: characters as they are, and what is none as U+FFFD.
static size_t print_plainly(const uint8_t* s, size_t n, char* out) {
    size_t m = 0;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        length = utf8_character(s + i, n - i, &code);
        memcpy(out + m, code >= BROKEN ? "\xEF\xBF\xBD" : (const char*)s + i, code >= BROKEN ? 3 : length);
        m += code >= BROKEN ? 3 : length;
    }
    return m;
}

static void test_utf8_print(void) {
    static const char* const parts[] = {"a",        "\n",       "\u00e9",          "\u4e1c", "\U0001F600",   "\x80",
                                        "\xc3",     "\xe4\xb8", "\xf0\x9f\x98",    "\xff",   "\xed\xa0\x80", "\xf8",
                                        "\xe0\x80", "\xc0",     "\xf0\x80\x80\x80"};
    for (uint64_t trial = 0; trial < 300; trial++) {
        uint8_t text[200];
        char expected[600];
        size_t n = 0, size = 0;
        for (uint64_t i = 0; i < trial % 30; i++) {
            const char* part = parts[random_bits(trial, i) % (sizeof parts / sizeof *parts)];
            memcpy(text + n, part, strlen(part));
            n += strlen(part);
        }
        begin_capture();
        Utf8Printer printer = {{0}, 0};
        bool whole = true; // no character is ever cut, whenever one looks
        for (size_t i = 0, step; i < n; i += step) {
            step = min_size(n - i, 1 + (size_t)(random_bits(trial + 1000, i) % 4));
            utf8_print(&printer, text + i, step, false);
            fflush(stdout);
            char* so_far = read_file(in_folder("captured"), &size);
            for (size_t k = 0, length; k < size; k += length) {
                uint32_t code;
                length = utf8_character((const uint8_t*)so_far + k, size - k, &code);
                whole = whole && code < BROKEN;
            }
            free(so_far);
        }
        utf8_print(&printer, NULL, 0, true);
        char* printed = end_capture(&size);
        size_t length = print_plainly(text, n, expected);
        CHECK(whole, "trial %zu: a character is cut", (size_t)trial);
        CHECK(size == length && !memcmp(printed, expected, size), "trial %zu: %zu bytes are printed as %zu, not %zu",
              (size_t)trial, n, size, length);
        free(printed);
    }
    // A whole character is not held back.
    begin_capture();
    Utf8Printer printer = {{0}, 0};
    utf8_print(&printer, (const uint8_t*)"\xe4\xb8\x9c", 3, false);
    size_t size = 0;
    char* printed = end_capture(&size);
    CHECK(size == 3, "%zu bytes of a character of 3 are printed", size);
    free(printed);
    // Nor is what can no longer become one.
    static const char* const broken[] = {"\xc0\x80",
                                         "\xc3"
                                         "a",
                                         "\xe4"
                                         "a",
                                         "\xe4\xb8"
                                         "a",
                                         "\xf0\x80\x80\x80"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        printer.count = 0;
        begin_capture();
        utf8_print(&printer, (const uint8_t*)broken[i], strlen(broken[i]), false);
        printed = end_capture(&size);
        CHECK(size >= 3 && !memcmp(printed, "\xEF\xBF\xBD", 3), "broken character %zu is held back", i);
        free(printed);
    }
}

static void try_sampling(const float* logits, size_t V, Sampling s) {
    enum { GRID = 4000 };
    double p[64], sum = 0, total = 0, kept = 0;
    size_t order[64], counts[64] = {0}, n = V;
    Candidate candidates[64];
    for (size_t i = 0; i < V; i++) { // by falling logit, then by rising number
        size_t k = i;
        for (; k > 0 && logits[order[k - 1]] < logits[i]; k--) order[k] = order[k - 1];
        order[k] = i;
    }
    for (size_t i = 0; i < V; i++) p[i] = exp((logits[order[i]] - logits[order[0]]) / s.temperature);
    if (s.top_k) n = min_size(n, s.top_k);
    for (size_t i = 0; i < n; i++) sum += p[i];
    size_t nucleus = 0;
    while (nucleus < n && (nucleus == 0 || total < s.top_p * sum)) total += p[nucleus++];
    for (size_t i = 0; i < GRID; i++) counts[sample_token(logits, V, &s, (i + 0.5) / GRID, candidates)]++;
    for (size_t i = 0; i < V; i++) {
        double expected = i < nucleus ? p[i] / total : 0, found = counts[order[i]] / (double)GRID;
        kept += found;
        CHECK(fabs(found - expected) < 1.01 / GRID + 1e-5,
              "%zu tokens, temperature %g, top-k %zu, top-p %g: the %zuth likeliest is drawn with %.5f, not %.5f", V,
              s.temperature, s.top_k, s.top_p, i, found, expected);
    }
    CHECK(fabs(kept - 1) < 1e-9, "draws add up to %g", kept);
}

static void test_sample_token(void) {
    static const size_t sizes[] = {1, 2, 7, 40}, ks[] = {0, 1, 2, 5, 40, 100};
    static const double temperatures[] = {0.3, 1, 2}, ps[] = {1, 0.95, 0.9, 0.5, 1e-9};
    float logits[64];
    for (uint64_t trial = 0; trial < 3; trial++)
        for (size_t v = 0; v < 4; v++) {
            for (size_t i = 0; i < sizes[v]; i++) logits[i] = 2 * random_normal(trial + 10 * v, i);
            for (size_t t = 0; t < 3; t++)
                for (size_t k = 0; k < 6; k++)
                    for (size_t p = 0; p < 5; p++) {
                        Sampling s = {temperatures[t], ps[p], ks[k], 0, 0};
                        try_sampling(logits, sizes[v], s);
                    }
        }
    // The small ones count towards what top-p leaves out, though none of them is drawn; and equal ones.
    static const float skewed[] = {0.88f, 0.08f, 0.02f, 0.02f}, equal[] = {0.2f, 0.2f, 0.2f, 0.2f, 0.2f};
    for (size_t i = 0; i < 4; i++) logits[i] = logf(skewed[i]);
    Sampling nucleus = {1, 0.9, 0, 0, 0}, half = {1, 0.5, 0, 0, 0}, two = {1, 1, 2, 0, 0};
    try_sampling(logits, 4, nucleus);
    for (size_t i = 0; i < 5; i++) logits[i] = logf(equal[i]);
    try_sampling(logits, 5, half);
    try_sampling(logits, 5, two);
    // The ends of the range, and logits so far apart that all but one have no probability.
    Candidate candidates[64];
    Sampling plain = {1, 1, 0, 0, 0}, cold = {1e-30, 1, 0, 0, 0}, greedy = {0, 1, 0, 0, 0};
    for (size_t i = 0; i < 9; i++) logits[i] = i == 4 ? 3e38f : -3e38f;
    CHECK(sample_token(logits, 9, &plain, 0.999999999999, candidates) == 4, "the only likely token is not drawn");
    for (size_t i = 0; i < 9; i++) logits[i] = i == 4 ? 1 : 0;
    CHECK(sample_token(logits, 9, &plain, 1e-300, candidates) == 0, "the first token is not drawn at 0");
    CHECK(sample_token(logits, 9, &plain, 1 - 1e-16, candidates) == 8, "the last token is not drawn at 1");
    CHECK(sample_token(logits, 9, &cold, 0.9, candidates) == 4, "at temperature 1e-30 the best is not drawn");
    CHECK(sample_token(logits, 9, &greedy, 0.9, candidates) == 4, "at temperature 0 the best is not drawn");
    Sampling first = {1, 1, 1, 0, 0};
    CHECK(sample_token(logits, 9, &first, 1, candidates) == 4, "of the likeliest alone, another is drawn");
    logits[8] = 2;
    CHECK(sample_token(logits, 9, &greedy, 0.9, candidates) == 8, "the last is the best, and is not drawn");
    logits[4] = 2;
    CHECK(sample_token(logits, 9, &greedy, 0.9, candidates) == 4, "of two equally good the first is not drawn");
}

static void sample_nan(const char* number) {
    float logits[3] = {0, strtof(number, NULL), 1};
    Candidate candidates[3];
    Sampling s = {1, 1, 0, 0, 0};
    printf("%d\n", sample_token(logits, 3, &s, 0.5, candidates));
}

static void test_sample_not_finite(void) {
    CHECK_FAILURE(forked(sample_nan, "nan"), 1, "not a number", "a logit that is NaN");
    CHECK_FAILURE(forked(sample_nan, "inf"), 1, "not a number", "an infinite logit");
    CHECK_SUCCESS(forked(sample_nan, "-inf"), "a logit of minus infinity");
}

// Weights large enough that one token differs from another.
static void make_speak(Model* m, uint64_t seed) {
    for (size_t i = 0; i < m->tensor_count; i++) {
        const Tensor* t = &m->tensors[i];
        float* w = (float*)allocate(t->size, sizeof(float), "a test's weights");
        for (size_t j = 0; j < t->size; j++)
            w[j] = (t->rows ? 0 : t->mean) + (t->rows == m->config.V ? 1.0f : 0.3f) * random_normal(seed + i, j);
        device->to_device(m->weights + t->offset, w, t->size);
        free(w);
    }
}

static void make_speaker(Model* m, Config config, uint64_t seed) {
    make_model(m, config, false, seed);
    make_speak(m, seed);
}

static void compare_logits(const float* a, const float* b, size_t V, size_t position, const char* what) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < V; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)b[i] * b[i];
    }
    CHECK(size > 0 && difference <= (BFLOAT16 ? 0x1p-8 : 1e-10) * size, "%s, position %zu: relative difference %g",
          what, position, sqrt(difference / size));
}

// The key/value cache: however a text is cut into calls, each position has the logits of one call for all.
static void test_generation_cache(void) {
    const Config config = {300, 70, 24, 3, 2}; // longer than a tile of attention
    int tokens[70], targets[70];
    Model m;
    Activations whole, part, training;
    memset(&whole, 0, sizeof whole), memset(&part, 0, sizeof part), memset(&training, 0, sizeof training);
    make_speaker(&m, config, 3);
    for (size_t i = 0; i < 70; i++) {
        tokens[i] = (int)(random_bits(9, i) % 300);
        targets[i] = (int)(random_bits(9, i + 1) % 300);
    }
    device->create_activations(&training, &m, 1, 70, true);
    device->create_activations(&whole, &m, 1, 70, false);
    device->create_activations(&part, &m, 1, 70, false);
    float* expected = (float*)allocate(70 * 300, sizeof(float), "logits");
    float got[300];
    device->forward(&m, &training, tokens, targets, 1, 70, 0, false);
    device->wait(&m);
    device->read_activation(expected, &training, training.logits, 70 * 300);
    for (size_t n = 1; n <= 70; n += SLOW ? 9 : 1) {
        device->forward(&m, &whole, tokens, NULL, 1, n, 0, false);
        device->wait(&m);
        device->read_activation(got, &whole, whole.logits, 300);
        compare_logits(got, expected + (n - 1) * 300, 300, n - 1, "all at once");
    }
    for (size_t step = 1; step < 70; step = step * 2 + 1)
        for (size_t prompt = 1; prompt < 70; prompt += SLOW ? 33 : 11)
            for (size_t n = prompt, cached = 0; cached < 70; cached = n, n = min_size(n + step, 70)) {
                device->forward(&m, &part, tokens + cached, NULL, 1, n, cached, false);
                device->wait(&m);
                device->read_activation(got, &part, part.logits, 300);
                compare_logits(got, expected + (n - 1) * 300, 300, n - 1, "with a cache");
            }
    free(expected);
    device->free_activations(&whole), device->free_activations(&part), device->free_activations(&training);
    device->free_model(&m);
}

// A model whose matrices are kept in 16 bits computes, to the last bit, what the same model does of which they were
// rounded before: at odd sizes, with and without a cache. Loaded from a file, as it always is.
static void test_generation_16_bits(void) {
    const Config configs[] = {{300, 70, 24, 3, 2}, {131, 9, 40, 1, 1}, {257, 40, 129, 3, 1}, {64, 3, 1, 1, 2}};
    const char* path = in_folder("gpt.safetensors");
    static int tokens[70];
    static float expected[300], got[300], first[300];
    for (size_t which = 0; which < 4; which++) {
        Config config = configs[which];
        size_t T = config.T, V = config.V, rows = 0;
        Model exact, wide, half;
        Activations a, b;
        memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
        make_speaker(&exact, config, 3 + which);
        for (size_t i = 0; i < T; i++) tokens[i] = (int)(random_bits(9, i) % V);
        CHECK(!save_checkpoint(path, &exact, false, "", NULL), "the model is not saved");
        Checkpoint c = open_checkpoint(path, "");
        memset(&half, 0, sizeof half), memset(&wide, 0, sizeof wide);
        half.config = wide.config = config;
        in_16_bits = true;
        cpu_create_model(&half, false);
        load_block(&c, &half, "", half.weights);
        in_16_bits = false;
        cpu_create_model(&wide, false);
        load_block(&c, &wide, "", wide.weights);
        close_checkpoint(&c);
        bf16 = true; // for rounded() to round
        for (size_t i = 0; i < wide.tensor_count; i++) {
            const Tensor* t = &wide.tensors[i];
            rows += t->rows ? t->size : 0;
            for (size_t j = 0; j < t->size && t->rows; j++)
                wide.weights[t->offset + j] = (float)rounded(wide.weights[t->offset + j]);
        }
        CHECK(half.block_size <= wide.block_size - rows / 2 + 16 * wide.tensor_count,
              "16 bits take %zu floats, not %zu", half.block_size, wide.block_size - rows / 2);
        cpu_create_activations(&a, &wide, 1, T, false);
        cpu_create_activations(&b, &half, 1, T, false);
        for (int prompts_too = 0; prompts_too <= 1; prompts_too++) {
            bf16 = prompts_too; // the products of many rows are of rounded numbers with it
            for (size_t prompt = 1; prompt <= T; prompt += 4)
                for (size_t n = prompt, cached = 0; cached < T; cached = n, n = min_size(n + (cached > 5 ? 1 : 2), T)) {
                    cpu_forward(&wide, &a, tokens + cached, NULL, 1, n, cached, false);
                    memcpy(expected, a.logits, V * sizeof(float));
                    in_16_bits = true;
                    cpu_forward(&half, &b, tokens + cached, NULL, 1, n, cached, false);
                    in_16_bits = false;
                    memcpy(got, b.logits, V * sizeof(float));
                    CHECK(!memcmp(got, expected, V * sizeof(float)), "%zu channels, positions %zu to %zu", config.C,
                          cached, n - 1);
                }
        }
        // Rounding moved each weight by 2^-8 of itself at most: the logits by a sixteenth, as in compare_logits.
        bf16 = false;
        cpu_forward(&exact, &a, tokens, NULL, 1, 1, 0, false);
        double difference = 0, size = 0;
        memcpy(first, a.logits, V * sizeof(float));
        cpu_forward(&wide, &a, tokens, NULL, 1, 1, 0, false);
        for (size_t i = 0; i < V; i++) {
            difference += pow((double)first[i] - a.logits[i], 2);
            size += pow(first[i], 2);
        }
        CHECK(config.C == 1 || (difference > 0 && difference < size / 256), "%zu channels: %g of %g", config.C,
              sqrt(difference), sqrt(size));
        cpu_free_activations(&a), cpu_free_activations(&b);
        cpu_free_model(&exact), cpu_free_model(&wide), cpu_free_model(&half);
    }
}

// One row times a matrix in 16 bits, against double precision and the numbers as they were: each product is off by
// 2^-8 of itself at most, and a sum of K by K + 2 roundings of 2^-24 besides. NaN and infinity stay what they are.
static void test_row_16_bits(void) {
    static const size_t sizes[] = {1, 2, 7, 8, 9, 31, 32, 33, 64, 127, 128, 129, 300};
    enum { SIZES = sizeof sizes / sizeof *sizes };
    if (PLAIN) return;
    for (size_t p = 0; p < SIZES * SIZES * 2; p++) {
        size_t K = sizes[p / 2 / SIZES], N = sizes[p / 2 % SIZES], turned = p % 2;
        float *x = guarded(K, p), *w = guarded(K * N, p + 1), *c = guarded(N, p + 2), *bias = guarded(N, p + 3);
        uint16_t* half = (uint16_t*)allocate(K * N, sizeof *half, "a test's matrix");
        const float* as_weights = (const float*)(const void*)half;
        for (size_t i = 0; i < K * N; i++) half[i] = (uint16_t)(bfloat16_bits(w[i]) >> 16);
        Matrix b = turned ? transposed(as_weights, K) : matrix(as_weights, N);
        for (int special = 0; special < 3; special++) {
            size_t at = (K - 1) * (turned ? 1 : N) + (N - 1) * (turned ? K : 1); // the last row's last number
            if (special) half[at] = special == 1 ? 0x7FC0 : 0xFF80;              // NaN, -infinity
            in_16_bits = true;
            matmul(c, matrix(x, K), b, bias, NULL, 1, N, K);
            in_16_bits = false;
            for (size_t j = 0; j < N; j++) {
                double sum = bias[j], size = fabs(sum);
                for (size_t k = 0; k < K; k++) {
                    double product = (double)x[k] * w[turned ? j * K + k : k * N + j];
                    sum += product, size += fabs(product);
                }
                bool marked = special && j == N - 1;
                CHECK(marked ? (special == 1 ? (bool)isnan(c[j]) : !isfinite(c[j]))
                             : fabs(c[j] - sum) <= (0x1p-8 + (double)(K + 2) * 0x1p-24) * size,
                      "(1,%zu) (%zu,%zu)%s, column %zu: %g, not %g", K, K, N, turned ? " turned" : "", j, c[j], sum);
            }
        }
        CHECK(release_guarded(x, K) && release_guarded(w, K * N) && release_guarded(c, N) && release_guarded(bias, N),
              "written outside");
        free(half);
    }
}

// The same text with nothing remembered from one token to the next.
static size_t generate_plainly(Model* m, Activations* a, const Tokenizer* t, const int* prompt, size_t n, Sampling s,
                               uint8_t* text) {
    size_t T = m->config.T, V = m->config.V, used = min_size(n, T), size = 0;
    int* window = (int*)allocate(T + 1, sizeof(int), "a test's window");
    float* logits = (float*)allocate(V, sizeof(float), "logits");
    Candidate* candidates = (Candidate*)allocate(V, sizeof(Candidate), "candidates");
    memcpy(window, prompt + n - used, used * sizeof(int));
    for (size_t i = 0; i < s.tokens; i++) {
        device->forward(m, a, window, NULL, 1, used, 0, false);
        device->wait(m);
        device->read_activation(logits, a, a->logits, V);
        int token = sample_token(logits, V, &s, random_uniform(s.key, i), candidates);
        if (token == t->end_of_text) break;
        text[size++] = (uint8_t)token;
        if (used == T) { // the newer half stays
            memmove(window, window + T - T / 2, T / 2 * sizeof(int));
            used = T / 2;
        }
        window[used++] = token;
    }
    free(window), free(logits), free(candidates);
    return size;
}

static void test_generation_window(void) {
    static Vocabulary v;
    start_vocabulary(&v);
    write_tokenizer(in_folder("tokenizer.bin"), &v, 0, -1);
    Tokenizer t = load_tokenizer(in_folder("tokenizer.bin"));
    static const size_t contexts[] = {1, 2, 3, 10}, prompts[] = {1, 9, 10, 25};
    int prompt[25];
    uint8_t text[100];
    char expected[400];
    omp_set_num_threads(1); // starting threads would take longer than their work
    for (size_t i = 0; i < 25; i++) prompt[i] = (int)(random_bits(4, i) % 256);
    for (size_t c = 0; c < 4; c++) {
        const Config config = {256, contexts[c], 16, 2, 2};
        Model m;
        Activations a, b;
        memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
        make_speaker(&m, config, 8);
        device->create_activations(&a, &m, 1, contexts[c], false);
        device->create_activations(&b, &m, 1, contexts[c], false);
        for (size_t p = 0; p < 4; p++)
            for (int kind = 0; kind < 5; kind++) {
                // Greedy, hot, the likeliest by top-k and by top-p, and one that meets the end of the text.
                Sampling s = {kind ? 1.0 : 0.0, kind == 3 ? 1e-9 : 1, kind == 2, 40, 1234};
                int end = t.end_of_text;
                if (kind == 4) {
                    size_t n = generate_plainly(&m, &b, &t, prompt, prompts[p], s, text);
                    t.end_of_text = text[n / 2];
                }
                size_t n = generate_plainly(&m, &b, &t, prompt, prompts[p], s, text), size = 0;
                CHECK(n == 40 || kind == 4, "%zu tokens instead of 40", n);
                begin_capture();
                generate(&m, &a, &t, prompt, prompts[p], &s);
                char* printed = end_capture(&size);
                CHECK(size == print_plainly(text, n, expected) && !memcmp(printed, expected, size),
                      "context %zu, prompt of %zu, kind %d: another text than without a cache", contexts[c], prompts[p],
                      kind);
                free(printed);
                t.end_of_text = end;
                if (kind == 2 || kind == 3) { // the same as greedy
                    uint8_t greedy[100];
                    s.temperature = 0;
                    generate_plainly(&m, &b, &t, prompt, prompts[p], s, greedy);
                    CHECK(!memcmp(greedy, text, 40), "kind %d differs from always the likeliest", kind);
                }
            }
        device->free_activations(&a), device->free_activations(&b);
        device->free_model(&m);
    }
    free_tokenizer(&t);
}

// A folder with the three files that training reads, made of random words.
static const char* make_data(void) {
    enum { TRAIN = 6000, VAL = 900 };
    static const char* const words[] = {"the ", "cat ", "sat ", "on ",     "a ",  "mat, ", "and ",
                                        "dog ", "ran ", "up ",  "hill.\n", "to ", "see ",  "moon "};
    static Vocabulary v;
    static uint16_t tokens[TRAIN + VAL];
    size_t n = 0;
    for (uint64_t i = 0; n < TRAIN + VAL; i++)
        for (const char* p = words[random_bits(77, i) % 14]; *p && n < TRAIN + VAL; p++) tokens[n++] = (uint8_t)*p;
    mkdir(in_folder("data"), 0777);
    start_vocabulary(&v);
    write_tokenizer(in_folder("data/tokenizer.bin"), &v, 0, -1);
    write_shard(in_folder("data/train.bin"), tokens, TRAIN);
    write_shard(in_folder("data/val.bin"), tokens + TRAIN, VAL);
    return in_folder("data");
}

static void generate_in_16_bits(const char* path) {
    char* arguments[] = {(char*)"test_gpt",   (char*)"--checkpoint",
                         (char*)path,         (char*)"--generate",
                         (char*)"x",          (char*)"--data",
                         (char*)make_data(),  (char*)"--precision=bf16",
                         (char*)"--tokens=0", NULL};
    omp_set_num_threads(1); // a forked process has none of its parent's, and would wait for them
    train_gpt(9, arguments);
    printf("kept in 16 bits: %d\n", in_16_bits);
}

static void test_generation_cli(void) {
    const char *data = make_data(), *path = in_folder("gpt.safetensors");
    static char text[1 << 17], other[4096];
    const Config config = {256, 24, 32, 2, 2};
    Model m;
    make_speaker(&m, config, 21);
    save_checkpoint(path, &m, false, ",\"--heads\":\"2\"", NULL);
    device->free_model(&m);
#define GENERATE "--data %s --checkpoint %s --tokens 60 "
    const Result* r = cli(GENERATE "--generate 'the cat'", data, path);
    CHECK_SUCCESS(r, "generating");
    CHECK(!strncmp(r->out, "the cat", 7) && strlen(r->out) > 7 + 60 && r->out[strlen(r->out) - 1] == '\n',
          "the prompt and 60 characters: '%s'", r->out);
    snprintf(text, sizeof text, "%s", r->out);
    r = cli(GENERATE "--generate 'the cat'", data, path);
    CHECK(!strcmp(r->out, text), "the same seed, another text: %s", r->out);
    r = cli(GENERATE "--generate 'the cat' --seed 2", data, path);
    CHECK(strcmp(r->out, text) != 0, "another seed, the same text: %s", r->out);
    for (int threads = 1; threads <= 5; threads += 2) {
        child.threads = threads;
        r = cli(GENERATE "--generate 'the cat'", data, path);
        CHECK(!strcmp(r->out, text), "%d threads, another text: %s", threads, r->out);
    }
    child.threads = 0;
    for (int threads = 1; threads <= 3 && !PLAIN; threads += 2) {
        child.threads = threads;
        r = cli(GENERATE "--generate 'the cat' --precision bf16", data, path);
        CHECK_SUCCESS(r, "generating in 16 bits");
        if (threads == 1) snprintf(text, sizeof text, "%s", r->out);
        CHECK(!strcmp(r->out, text), "%d threads, another text: %s", threads, r->out);
    }
    r = forked(generate_in_16_bits, path);
    CHECK(r->status == 0 && strstr(r->out, "kept in 16 bits: 1"), "--precision bf16 changes nothing: %s", r->out);
    child.threads = 0;
    r = cli(GENERATE "--generate 'the cat' --temperature 0", data, path);
    snprintf(text, sizeof text, "%s", r->out);
    r = cli(GENERATE "--generate 'the cat' --top-k 1", data, path);
    CHECK(!strcmp(r->out, text), "--top-k 1 is not --temperature 0");
    r = cli(GENERATE "--generate 'the cat' --top-p 1e-9", data, path);
    CHECK(!strcmp(r->out, text), "--top-p 1e-9 is not --temperature 0");
    r = cli(GENERATE "--generate ''", data, path);
    CHECK_SUCCESS(r, "an empty prompt");
    CHECK(strlen(r->out) >= 61, "an empty prompt gives %zu bytes", strlen(r->out));
    // A prompt of many contexts: only its end counts.
    memset(other, 'x', 2000);
    snprintf(other + 2000, sizeof other - 2000, "%s", "the cat sat on the mat, and the dog ran up the hill");
    r = cli(GENERATE "--temperature 0 --generate '%s'", data, path, other);
    CHECK_SUCCESS(r, "a long prompt");
    snprintf(text, sizeof text, "%s", r->out + 2000);
    r = cli(GENERATE "--temperature 0 --generate '%s'", data, path, other + 2000);
    CHECK(!strcmp(r->out, text), "what is out of the context changes the text");
    r = cli(GENERATE "--generate x --tokens 0", data, path);
    CHECK(!r->status && !strcmp(r->out, "x\n"), "no tokens: '%s'", r->out);
#undef GENERATE
}

// ====================================================================================================================
// Training

#define SMALL_MODEL "--layers 2 --heads 2 --channels 40 --context 24 --batch 3 --warmup 3 --val-batches 3 "

// The log without its last two columns, which are times.
static char* read_log(const char* path) {
    char* text = read_file(path, NULL);
    size_t commas = 0, n = 0;
    for (const char* p = text; p && *p; p++) {
        commas = *p == '\n' ? 0 : commas + (*p == ',');
        if (commas < 5) text[n++] = *p;
    }
    if (text) text[n] = 0;
    return text;
}

static void same_logs(const char* a, const char* b, const char* what) {
    char *x = read_log(a), *y = read_log(b);
    CHECK(x && y && strlen(x) > 100 && !strcmp(x, y), "%s: the logs differ:\n%s\n%s", what, x ? x : "none",
          y ? y : "none");
    free(x), free(y);
}

// Sizes that no block, tile or vector divides; the number of threads is more and less than that of the pieces.
static void test_threads(void) {
    const char* data = make_data();
    static const int counts[] = {1, 2, 3, 4, 7};
    for (size_t i = 0; i < 5; i++) {
        char path[4200], log[4200];
        snprintf(path, sizeof path, "%s/%d.safetensors", folder, counts[i]);
        snprintf(log, sizeof log, "%s/%d.csv", folder, counts[i]);
        child.threads = counts[i];
        CHECK_SUCCESS(
            cli("--data %s --checkpoint %s --log %s --layers 2 --heads 3 --channels 39 --context 70 --batch 3 "
                "--accumulate 2 --steps 4 --warmup 2 --val-batches 2 --val-every 2",
                data, path, log),
            "training");
        CHECK(same_files(in_folder("1.safetensors"), path), "%d threads give other bits than 1", counts[i]);
        same_logs(in_folder("1.csv"), log, "threads");
    }
    child.threads = 0;
}

// --precision is part of what a run is: the same bits for any number of threads, and resumed without saying it again.
static void test_precision(void) {
    const char* data = make_data();
    const char *whole = in_folder("whole.safetensors"), *path = in_folder("gpt.safetensors");
#define RUN \
    "--layers 2 --heads 3 --channels 39 --context 70 --batch 3 --steps 6 --val-every 0 --data %s --checkpoint %s "
    CHECK_SUCCESS(cli(RUN, data, whole), "in float32");
    CHECK_SUCCESS(cli(RUN "--precision fp32", data, path), "in float32, asked for");
    Checkpoint one = open_checkpoint(whole, ""), two = open_checkpoint(path, "");
    const Entry *e = find_entry(&one, "", "wte.weight"), *f = find_entry(&two, "", "wte.weight");
    CHECK(!metadata(&one, "--precision") && !strcmp(metadata(&two, "--precision"), "fp32"), "not remembered");
    CHECK(!memcmp(e->data, f->data, e->to - e->from), "--precision fp32 is not what is done without");
    close_checkpoint(&two);
    CHECK_SUCCESS(cli(RUN "--precision bf16", data, path), "in bfloat16");
    two = open_checkpoint(path, "");
    f = find_entry(&two, "", "wte.weight");
    CHECK(memcmp(e->data, f->data, e->to - e->from), "--precision bf16 changes nothing");
    close_checkpoint(&one), close_checkpoint(&two);
    for (int threads = 1; threads <= 5; threads += 2) {
        child.threads = threads;
        CHECK_SUCCESS(cli(RUN "--precision bf16", data, whole), "in bfloat16");
        CHECK(same_files(whole, path), "%d threads give other bits in bfloat16", threads);
    }
    child.threads = 0;
    child.signal = SIGTERM, child.at = 3;
    const Result* r = cli(RUN "--precision bf16", data, path);
    CHECK(r->status == 128 + SIGTERM, "not stopped: %d, %s", r->status, r->err);
    child.signal = 0;
    r = cli("--resume --checkpoint %s --data %s", path, data);
    CHECK_SUCCESS(r, "resuming");
    CHECK(strstr(r->out, ", bfloat16 by "), "it does not say how it multiplies: %s", r->out);
    CHECK(same_files(whole, path), "stopped and resumed in bfloat16, the bits differ");
    // Another may be given, and is kept from then on.
    r = cli("--resume --precision fp32 --steps 7 --checkpoint %s --data %s", path, data);
    CHECK_SUCCESS(r, "resuming in float32");
    CHECK(!strstr(r->out, "bfloat16 by"), "float32 is asked for: %s", r->out);
    two = open_checkpoint(path, "");
    CHECK(!strcmp(metadata(&two, "--precision"), "fp32"), "it is %s", metadata(&two, "--precision"));
    close_checkpoint(&two);
    CHECK_FAILURE(cli("--precision half"), 2, "--precision is fp32 or bf16, not 'half'", "no precision");
#undef RUN
}

static void test_resume(void) {
    const char* data = make_data();
    const char *whole = in_folder("whole.safetensors"), *path = in_folder("gpt.safetensors");
    const char *whole_log = in_folder("whole.csv"), *log = in_folder("gpt.csv");
#define RUN SMALL_MODEL "--data %s --checkpoint %s --log %s --steps 20 --val-every 7 "
    CHECK_SUCCESS(cli(RUN, data, whole, whole_log), "the uninterrupted run");
    // A polite signal: the step is finished and saved, and the last line says how to go on.
    static const int polite[] = {SIGTERM, SIGINT};
    for (size_t i = 0; i < 2; i++) {
        child.signal = polite[i];
        child.at = 10;
        const Result* r = cli(RUN, data, path, log);
        child.signal = 0;
        CHECK(r->status == 128 + polite[i] && !r->signal, "signal %d: status %d, ended by %d", polite[i], r->status,
              r->signal);
        char line[20000];
        snprintf(line, sizeof line,
                 "stopped after step 10, saved in %s; `./train_gpt --resume --data %s --log %s --checkpoint %s` goes",
                 path, data, log, path);
        CHECK(strstr(r->out, line), "'%s' is not in the output: %s", line, r->out);
        CHECK_SUCCESS(cli("--resume --checkpoint %s --data %s --log %s", path, data, log), "resuming");
        CHECK(same_files(whole, path), "stopped by signal %d and resumed, the bits differ", polite[i]);
        same_logs(whole_log, log, "stopped and resumed");
    }
    // A kill at any step: what was saved last is whole, and the steps since are done again to the same bits.
    for (int at = 1; at <= 20; at += 6) {
        unlink(path);
        child.signal = SIGKILL;
        child.at = at;
        const Result* r = cli(RUN "--save-every 4", data, path, log);
        child.signal = 0;
        CHECK(r->signal == SIGKILL, "not killed: status %d", r->status);
        CHECK(exists(path) == (at > 4), "killed in step %d, and there is %s checkpoint", at, at > 4 ? "no" : "a");
        if (!exists(path)) continue;
        // Another thread count for the rest, and a number of steps that is the same.
        child.threads = at % 4;
        r = cli("--resume --checkpoint %s --data %s --log %s --steps 20", path, data, log);
        child.threads = 0;
        CHECK_SUCCESS(r, "resuming after a kill");
        // --save-every is among the options that a checkpoint keeps; so its value differs from the whole run's.
        CHECK_SUCCESS(cli(RUN "--save-every 4", data, whole, in_folder("again.csv")), "the uninterrupted run");
        CHECK(same_files(whole, path), "killed in step %d and resumed, the bits differ", at);
        same_logs(whole_log, log, "killed and resumed");
    }
    // Stopped twice, before the first step is over and just before the last.
    child.signal = SIGTERM;
    child.at = 1;
    CHECK(cli(RUN "--save-every 4", data, path, log)->status == 128 + SIGTERM, "not stopped in step 1");
    child.at = 18;
    CHECK(cli("--resume --checkpoint %s --data %s --log %s", path, data, log)->status == 128 + SIGTERM,
          "not stopped in step 19");
    child.signal = 0;
    CHECK_SUCCESS(cli("--resume --checkpoint %s --data %s --log %s", path, data, log), "resuming again");
    CHECK(same_files(whole, path), "stopped twice and resumed, the bits differ");
    same_logs(whole_log, log, "stopped twice and resumed");
    // A run that is over goes on only when it is given more steps.
    CHECK_FAILURE(cli("--resume --checkpoint %s --data %s", path, data), 1, "has done all of its 20 steps", "no more");
    CHECK(same_files(whole, path), "a refused --resume has changed the checkpoint");
    CHECK_SUCCESS(cli("--resume --checkpoint %s --data %s --steps 23 --log %s", path, data, log), "3 steps more");
    char* text = read_log(log);
    CHECK(text && strstr(text, "\n20,") && strstr(text, "\n23,") && !strstr(text, "\n24,"), "the log: %s", text);
    free(text);
#undef RUN
}

// What is printed at the end is a command that works as it stands.
static void test_advice(void) {
    const char *data = make_data(), *path = in_folder("it's mine");
    char line[20000];
#define RUN SMALL_MODEL "--data %s --train %s/tra*.bin --val=%s/val.bin --checkpoint \"%s\" --steps 2 "
    const char* end = "--train '%s/tra*.bin' --val %s/val.bin --checkpoint '%s/it'\\''s mine'%s";
    const Result* r = cli(RUN "--device cpu", data, data, data, path);
    CHECK_SUCCESS(r, "training");
    snprintf(line, sizeof line, end, data, data, folder, " --device cpu --generate \"The\"\n");
    CHECK(strstr(r->out, line), "'%s' is not in the output: %s", line, r->out);
    child.signal = SIGINT;
    child.at = 1;
    r = cli(RUN, data, data, data, path);
    child.signal = 0;
    snprintf(line, sizeof line, end, data, data, folder, "` goes on from there\n");
    CHECK(strstr(r->out, line), "'%s' is not in the output: %s", line, r->out);
#undef RUN
}

// The least learning rate follows the highest, unless it was given.
static void test_resume_lr(void) {
    const char *data = make_data(), *path = in_folder("gpt.safetensors"), *log = in_folder("log.csv");
#define RUN SMALL_MODEL "--data %s --checkpoint %s --log %s --steps 6 "
    CHECK_SUCCESS(cli(RUN, data, path, log), "a run");
    CHECK_SUCCESS(cli("--resume --data %s --checkpoint %s --log %s --steps 9 --lr 1e-5", data, path, log), "resuming");
    char* text = read_log(log);
    char* last = text ? strstr(text, "\n9,") : NULL;
    double loss, val, lr = 0;
    CHECK(last && sscanf(last, "\n9,%lf,%lf,%lf", &loss, &val, &lr) == 3, "the log has no step 9: %s", text);
    CHECK(fabs(lr - 2e-7) < 1e-12, "the last learning rate is %g", lr);
    free(text);
    CHECK_SUCCESS(cli(RUN "--min-lr 1e-4", data, path, log), "a run with --min-lr");
    CHECK_FAILURE(cli("--resume --data %s --checkpoint %s --steps 9 --lr 1e-5", data, path), 2,
                  "--min-lr 0.0001 is above --lr 1e-05", "a --lr below the checkpoint's --min-lr");
    CHECK_FAILURE(cli(RUN "--min-lr 1e-2", data, path, log), 2, "--min-lr 0.01 is above --lr 0.002", "--min-lr 1e-2");
#undef RUN
}

// A run that is begun over another's checkpoint keeps that, once; one that goes on keeps nothing.
static void test_keep_old(void) {
    const char *data = make_data(), *path = in_folder("gpt.safetensors"), *old = in_folder("gpt.safetensors.old");
    const char* good = in_folder("good.safetensors");
#define RUN SMALL_MODEL "--data %s --checkpoint %s --steps 4 --save-every 1 --seed %d "
    char line[9000];
    snprintf(line, sizeof line, "checkpoint in %s; the one there is kept as %s\n", path, old);
    CHECK_SUCCESS(cli(RUN, data, good, 1), "a run");
    const Result* r = cli(RUN, data, path, 1);
    CHECK(!exists(old) && !strstr(r->out, "is kept"), "nothing was there to be kept: %s", r->out);
    child.signal = SIGINT;
    child.at = 2;
    r = cli(RUN, data, path, 2);
    CHECK(r->status == 128 + SIGINT && strstr(r->out, line), "'%s' is not in the output: %s", line, r->out);
    child.signal = 0;
    CHECK(same_files(good, old) && !same_files(good, path), "stopped early, a run has cost the other's checkpoint");
    r = cli("--resume --data %s --checkpoint %s", data, path);
    CHECK(!r->status && !strstr(r->out, "is kept"), "resuming: %s%s", r->out, r->err);
    CHECK(same_files(good, old), "resuming has changed what was kept");
    // What is there is never replaced, be it a folder.
    unlink(old);
    mkdir(old, 0777);
    for (int i = 2; i < 5; i++) {
        char next[4300];
        snprintf(next, sizeof next, "%s%d", old, i);
        CHECK_SUCCESS(cli(RUN, data, path, i), "a run over another");
        CHECK(exists(next), "run %d is not kept as %s", i, next);
    }
    // Stopped in the first step, and by what it prints, a run has changed nothing, or saved itself.
    CHECK_SUCCESS(cli(RUN, data, good, 9), "a run");
#undef RUN
}

// A sample stands between two lines of ---.
static const char* last_sample(const char* text) {
    const char *last = text, *before = text;
    for (const char* p = text; (p = strstr(p, "\n---\n")) != NULL; p += 4) {
        before = last;
        last = p;
    }
    return before;
}

// Resuming must not depend on when the validation and the samples were due.
static void test_resume_elsewhere(void) {
    const char* data = make_data();
    const char *whole = in_folder("whole.safetensors"), *path = in_folder("gpt.safetensors");
#define RUN SMALL_MODEL "--data %s --checkpoint %s --steps 12 --accumulate 2 --val-every 5 --sample-every 4 --seed 3 "
    const Result* r = cli(RUN, data, whole);
    CHECK_SUCCESS(r, "the uninterrupted run");
    char* out = strdup(r->out);
    child.signal = SIGTERM;
    child.at = 6;
    CHECK(cli(RUN, data, path)->status == 128 + SIGTERM, "not stopped");
    child.signal = 0;
    r = cli("--resume --checkpoint %s --data %s", path, data);
    CHECK_SUCCESS(r, "resuming");
    CHECK(same_files(whole, path), "stopped and resumed, the bits differ");
    const char *before = last_sample(out), *after = last_sample(r->out);
    const char* end = strstr(before + 4, "\n---\n");
    CHECK(end && end - before > 100 && !strncmp(before, after, (size_t)(end - before)),
          "the last sample differs:\n%s\n%s", before, after);
    free(out);
#undef RUN
}

static double difference(const Model* a, const float* x, const float* y) {
    double error = 0, size = 0;
    for (size_t i = 0; i < a->tensor_count; i++) {
        const Tensor* t = &a->tensors[i];
        float *u = (float*)allocate(t->size, sizeof(float), "a copy"), *v = (float*)allocate(t->size, 4, "a copy");
        device->to_host(u, x + t->offset, t->size);
        device->to_host(v, y + t->offset, t->size);
        for (size_t j = 0; j < t->size; j++) {
            error += ((double)u[j] - v[j]) * ((double)u[j] - v[j]);
            size += (double)v[j] * v[j];
        }
        free(u), free(v);
    }
    return sqrt(error / size);
}

// Four sequences at once, or twice two, have one gradient.
static void test_accumulate(void) {
    enum { B = 4, T = 24 };
    const char* data = make_data();
    const Config config = {256, T, 40, 2, 2};
    Model once, twice;
    Activations a;
    int inputs[B * T], targets[B * T];
    memset(&a, 0, sizeof a);
    make_model(&once, config, true, 5);
    make_model(&twice, config, true, 5);
    device->create_activations(&a, &once, B, T, true);
    Data d = open_data(in_folder("data/train.bin"), T, 256);
    load_batch(&d, 1, 0, B, inputs, targets);
    device->forward(&once, &a, inputs, targets, B, T, 0, true);
    device->backward(&once, &a, inputs, targets, B, T, 1);
    for (size_t half = 0; half < 2; half++) {
        load_batch(&d, 1, half * B / 2, B / 2, inputs, targets);
        device->forward(&twice, &a, inputs, targets, B / 2, T, 0, true);
        device->backward(&twice, &a, inputs, targets, B / 2, T, 0.5f);
    }
    double one = take_loss(&once), two = take_loss(&twice);
    // Half as many rows may be multiplied by another algorithm, which adds up in another order. Where a sum lies next to
    // the middle between two bfloat16s it is then rounded to the other one, and what follows from it, too. So the two are
    // like two computations with roundings of their own. A gradient is reached through some twenty of 2^-9 at most, which
    // differ in two ways at most: 2^-4 if all went the same way, but they do not, and half of it is allowed. The loss
    // has fewer, of which the rows' average is taken.
    double off = difference(&twice, twice.gradients, once.gradients);
    double loss_allowed = BFLOAT16 ? COARSER * FLOOR / 8 : 1e-6, allowed = BFLOAT16 ? COARSER * FLOOR : 1e-5;
    CHECK(fabs(one - two) < loss_allowed * one, "the losses are %.9g and %.9g", one, two);
    CHECK(off < allowed, "the gradients differ by %g", off);
    if (TWINS) printf("%s: losses within %.1e, gradients within %.1e\n", test_name, fabs(one - two) / one, off);
    device->free_activations(&a), device->free_model(&once), device->free_model(&twice);

    // The same on the command line, where the windows taken must also be the same.
    const char* logs[2] = {in_folder("4x1.csv"), in_folder("2x2.csv")};
    double losses[2][8] = {{0}}, norms[2][8] = {{0}};
    for (int i = 0; i < 2; i++) {
        CHECK_SUCCESS(
            cli("--data %s --checkpoint %s --log %s --layers 2 --heads 2 --channels 40 --context 24 --steps 8 "
                "--lr 1e-3 --batch %d --accumulate %d",
                data, in_folder("gpt.safetensors"), logs[i], i ? 2 : 4, i ? 2 : 1),
            "training");
        char* text = read_file(logs[i], NULL);
        char* line = text ? strchr(text, '\n') : NULL;
        for (int step = 0; line && step < 8; step++, line = strchr(line + 1, '\n'))
            if (sscanf(line + 1, "%*d,%lf,,%*f,%lf", &losses[i][step], &norms[i][step]) != 2) // a step validated
                sscanf(line + 1, "%*d,%lf,%*f,%*f,%lf", &losses[i][step], &norms[i][step]);
        free(text);
    }
    for (int step = 0; step < 8; step++) {
        double error = fabs(losses[0][step] / losses[1][step] - 1),
               norm_error = fabs(norms[0][step] / norms[1][step] - 1);
        CHECK(losses[0][step] > 0 && error < (BFLOAT16 ? loss_allowed : 1e-4), "step %d: the losses are %.9g and %.9g",
              step + 1, losses[0][step], losses[1][step]);
        CHECK(norms[0][step] > 0 && norm_error < (BFLOAT16 ? allowed : 1e-2),
              "step %d: the gradients' norms are %.9g and %.9g", step + 1, norms[0][step], norms[1][step]);
        if (TWINS)
            printf("%s: step %d, losses within %.1e, norms within %.1e\n", test_name, step + 1, error, norm_error);
    }
}

// What the log says: a row a step, the schedule of the learning rate, validations where they are due, and a loss that
// falls from that of a guess.
// The validation loss is the mean over windows spread evenly over the text, and each token has its bytes.
static void test_validation(void) {
    enum { TOKENS = 900, T = 24, WINDOWS = 36 };
    static Vocabulary v;
    static uint16_t tokens[TOKENS];
    static const size_t settings[][3] = {{3, 3, 9}, {5, 100, WINDOWS}}; // batch, batches, windows that they hold
    const char *data = make_data(), *path = in_folder("gpt.safetensors"), *log = in_folder("log.csv");
    start_vocabulary(&v);
    add_token(&v, "ab", 2);
    add_token(&v, "abcdefg", 7);
    write_tokenizer(in_folder("data/tokenizer.bin"), &v, RANGES, -1);
    for (size_t i = 0; i < TOKENS; i++) tokens[i] = (uint16_t)(random_bits(3, i) % 3 ? random_bits(4, i) % 258 : 257);
    write_shard(in_folder("data/val.bin"), tokens, TOKENS);
    Tokenizer t = load_tokenizer(in_folder("data/tokenizer.bin"));
    for (size_t k = 0; k < 2; k++) {
        size_t count = settings[k][2];
        const Result* r = cli(SMALL_MODEL "--batch %zu --val-batches %zu --steps 1 --lr 0 --data %s --checkpoint %s "
                                          "--log %s",
                              settings[k][0], settings[k][1], data, path, log);
        CHECK_SUCCESS(r, "training");
        double loss = 0, bytes = 0, logged = 0, bits = 0;
        const char *text = read_file(log, NULL), *line = text ? strchr(text, '\n') : NULL;
        const char* shown = strstr(r->out, "  val ");
        CHECK(line && sscanf(line, "\n1,%*f,%lf", &logged) == 1, "the log is %s", text);
        CHECK(shown && sscanf(shown, "  val %*f %lf bits/byte", &bits) == 1, "no bits per byte in %s", r->out);
        Checkpoint c = open_checkpoint(path, "");
        Model m;
        Activations a;
        memset(&m, 0, sizeof m);
        memset(&a, 0, sizeof a);
        m.config = read_config(&c);
        device->create_model(&m, false);
        device->create_activations(&a, &m, 1, T, true);
        load_block(&c, &m, "", m.weights);
        for (size_t i = 0; i < count; i++) {
            int inputs[T], targets[T];
            for (size_t j = 0; j < T; j++) {
                size_t at = i * WINDOWS / count * T + j;
                inputs[j] = tokens[at], targets[j] = tokens[at + 1];
                bytes += (double)token_string(&t, targets[j]).n;
            }
            device->forward(&m, &a, inputs, targets, 1, T, 0, false);
            loss += take_loss(&m);
        }
        CHECK(fabs(logged - loss / (double)count) < 1e-6 * logged, "validation loss %.9g, not %.9g", logged,
              loss / (double)count);
        CHECK(fabs(bits - loss * T / bytes / 0.6931471805599453) < 6e-4, "%.4f bits per byte", bits);
        device->free_activations(&a);
        device->free_model(&m);
        close_checkpoint(&c);
    }
    free_tokenizer(&t);
}

static void test_log(void) {
    const char *data = make_data(), *path = in_folder("log.csv");
    const double guess = 5.545177444479562; // ln 256
    CHECK_SUCCESS(cli(SMALL_MODEL "--data %s --checkpoint %s --log %s --steps 60 --warmup 10 --lr 3e-3 --min-lr 3e-4 "
                                  "--val-every 25",
                      data, in_folder("gpt.safetensors"), path),
                  "training");
    char* text = read_file(path, NULL);
    CHECK(text && !strncmp(text, "step,loss,val_loss,lr,grad_norm,ms,tokens_per_s\n", 48), "the log's first line");
    const char* line = text;
    double first = 0, last = 0, last_val = 0;
    int rows = 0;
    while (line && (line = strchr(line, '\n')) != NULL && line[1]) {
        line++;
        rows++;
        int step = 0, commas = 0;
        double loss = 0, val = 0, lr = 0, norm_ = 0, ms = 0, speed = 0;
        for (const char* p = line; *p && *p != '\n'; p++) commas += *p == ',';
        bool validated = sscanf(line, "%d,%lf,%lf,%lf,%lf,%lf,%lf", &step, &loss, &val, &lr, &norm_, &ms, &speed) == 7;
        if (!validated) sscanf(line, "%d,%lf,,%lf,%lf,%lf,%lf", &step, &loss, &lr, &norm_, &ms, &speed);
        bool due_here = rows % 25 == 0 || rows == 60;
        double expected = rows <= 10 ? 3e-3 * rows / 10
                                     : 3e-4 + 0.5 * (3e-3 - 3e-4) * (1 + cos(3.141592653589793 * (rows - 10) / 50.0));
        CHECK(step == rows && commas == 6 && norm_ > 0 && ms > 0 && speed > 0, "row %d: %.80s", rows, line);
        CHECK(validated == due_here, "step %d is %svalidated", step, validated ? "" : "not ");
        CHECK(fabs(speed * ms / 1e3 - 3 * 24) < 4, "step %d: %g tokens/s for %g ms", step, speed, ms);
        CHECK(fabs(lr - expected) < 1e-7 * 3e-3, "step %d: learning rate %g, not %g", step, lr, expected);
        if (step == 1) first = loss;
        if (validated) last_val = val;
        last = loss;
    }
    CHECK(rows == 60, "%d rows", rows);
    CHECK(fabs(first - guess) < 0.3, "the first loss is %g, that of a guess %g", first, guess);
    CHECK(last < 3.2 && last_val < 3.2, "after 60 steps the loss is %g, on unseen text %g", last, last_val);
    free(text);
}

// ====================================================================================================================
// Variants
//
// What holds of any model, whatever its layers are, and without numbers from elsewhere to compare with. Whoever changes
// the architecture adds a line: the options that choose it, GPT-2's own being none, and how many parameters the model
// below should have with them, worked out by hand.

static const struct {
    const char* options;
    size_t parameters;
} variants[] = {
    {"", 17640},
};

#define VARIANT_MODEL "--layers 2 --heads 4 --channels 24 --context 70 --batch 3 " // more than a tile of attention

enum { VARIANT_V = 61, VARIANT_B = 3, VARIANT_T = 70 };
typedef struct {
    const char* name;
    Model model;
    Activations a;
    int tokens[VARIANT_B * VARIANT_T], targets[VARIANT_B * VARIANT_T];
} Subject;

// The model that these options choose, with weights large enough for everything to matter.
static void make_subject(Subject* s, const char* variant) {
    char text[512], *words[64], *rest = text;
    int count = 0;
    snprintf(text, sizeof text, "test_gpt " VARIANT_MODEL "%s", variant);
    for (char* word; (word = strsep(&rest, " ")) != NULL;)
        if (*word) words[count++] = word;
    for (int i = 0; i < OPTIONS; i++) options[i].given = false;
    parse_command_line(count, words);
    memset(s, 0, sizeof *s);
    s->name = *variant ? variant : "GPT-2";
    opt.model.V = VARIANT_V;
    make_model(&s->model, opt.model, true, 7);
    device->create_activations(&s->a, &s->model, VARIANT_B, VARIANT_T, true);
    for (size_t i = 0; i < VARIANT_B * VARIANT_T; i++) {
        s->tokens[i] = (int)(random_bits(11, i) % VARIANT_V);
        s->targets[i] = (int)(random_bits(12, i) % VARIANT_V);
    }
}

static void free_subject(Subject* s) {
    device->free_activations(&s->a);
    device->free_model(&s->model);
    free_borrowed();
}

static double subject_loss(Subject* s, bool training) {
    device->forward(&s->model, &s->a, s->tokens, s->targets, VARIANT_B, VARIANT_T, 0, training);
    return take_loss(&s->model);
}

// Logits of n positions from a forward pass over `rows` of them, the last n.
static const float* logits_of(const Activations* a, size_t n) {
    float* logits = borrow(n * VARIANT_V);
    device->read_activation(logits, a, a->logits, n * VARIANT_V);
    return logits;
}

// As many parameters as should be; and what begins at random, the matrices and embeddings, decays.
static void check_parameters(const Subject* s, size_t count) {
    CHECK(s->model.parameter_count == count, "%s: %zu parameters, not %zu", s->name, s->model.parameter_count, count);
    for (size_t i = 0; i < s->model.tensor_count; i++) {
        const Tensor* t = &s->model.tensors[i];
        CHECK((t->rows > 0) == (t->std > 0), "%s: %s %s", s->name, t->name, t->rows ? "decays" : "does not decay");
    }
}

// A new model guesses: it gives each token about the same probability, and does not settle on one by its shape alone.
static void check_first_values(Subject* s) {
    double loss = subject_loss(s, false), guess = log((double)VARIANT_V);
    CHECK(fabs(loss - guess) < 0.05, "%s: a new model's loss is %g, a guess's %g", s->name, loss, guess);
}

// Two forms of the same: what differs is rounding.
static void check_plain(Subject* s) {
    if (PLAIN) return;
#ifndef TWIN
    size_t n = s->model.block_size;
    float* gradients[2];
    double losses[2];
    for (int k = 0; k < 2; k++) {
        use_plain = k;
        memset(s->model.gradients, 0, n * sizeof(float));
        losses[k] = subject_loss(s, true);
        device->backward(&s->model, &s->a, s->tokens, s->targets, VARIANT_B, VARIANT_T, 1);
        gradients[k] = borrow_copy(s->model.gradients, n);
    }
    use_plain = false;
    memset(s->model.gradients, 0, n * sizeof(float));
    CHECK(fabs(losses[0] / losses[1] - 1) < 1e-6, "%s: loss %.9g, but plain %.9g", s->name, losses[0], losses[1]);
    for (size_t i = 0; i < s->model.tensor_count; i++) {
        const Tensor* t = &s->model.tensors[i];
        double error = euclidean_distance(gradients[0] + t->offset, gradients[1] + t->offset, t->size);
        CHECK(error <= 1e-5 * euclidean_norm(gradients[1] + t->offset, t->size), "%s: %s: plain is another gradient",
              s->name, t->name);
    }
#endif
}

// A position depends on no later one, and on nothing of the batch's other rows. To the bit: the same sums are taken.
static void check_causality(Subject* s) {
    enum { ROWS = VARIANT_B * VARIANT_T, AT = VARIANT_T + 41 }; // a position of the second row
    subject_loss(s, false);
    const float* before = logits_of(&s->a, ROWS);
    s->tokens[AT] = (s->tokens[AT] + 1) % VARIANT_V;
    subject_loss(s, false);
    const float* after = logits_of(&s->a, ROWS);
    s->tokens[AT] = (s->tokens[AT] + VARIANT_V - 1) % VARIANT_V;
    for (size_t i = 0; i < ROWS; i++) {
        bool same = !memcmp(before + i * VARIANT_V, after + i * VARIANT_V, VARIANT_V * sizeof(float));
        CHECK(same || (i >= AT && i < 2 * VARIANT_T), "%s: token %d moves what row %zu says", s->name, AT, i);
        CHECK(!same || i != AT, "%s: token %d does not move its own row", s->name, AT);
    }
}

// However a text is cut into calls, each position has the logits of one pass over all of it.
static void check_cache(Subject* s) {
    Activations part;
    memset(&part, 0, sizeof part);
    device->create_activations(&part, &s->model, 1, VARIANT_T, false);
    subject_loss(s, false);
    const float* whole = logits_of(&s->a, VARIANT_T);
    static const size_t steps[] = {1, 5, 66};
    for (size_t k = 0; k < 3; k++)
        for (size_t cached = 0, n; cached < VARIANT_T; cached = n) {
            n = min_size(cached + steps[k], VARIANT_T);
            device->forward(&s->model, &part, s->tokens + cached, NULL, 1, n, cached, false);
            compare_logits(logits_of(&part, 1), whole + (n - 1) * VARIANT_V, VARIANT_V, n - 1, s->name);
            free(borrowed[--borrowed_count]);
        }
    device->free_activations(&part);
}

// Training changes the weights and nothing else that validation sees.
static void check_validation(Subject* s) {
    double before = subject_loss(s, false);
    for (int i = 0; i < 2; i++) {
        subject_loss(s, true);
        device->backward(&s->model, &s->a, s->tokens, s->targets, VARIANT_B, VARIANT_T, 1);
        CHECK(subject_loss(s, false) == before, "%s: a step's passes change the loss that is validated", s->name);
    }
}

// Whole runs: the same bits from any number of threads, with --recompute, and in two parts; and what is saved is the
// model that was validated last.
static void check_run(Subject* s, const char* data, const char* variant) {
    const char *whole = in_folder("whole.safetensors"), *path = in_folder("part.safetensors");
    char run[9000];
    snprintf(run, sizeof run, VARIANT_MODEL "%s --data %s --steps 4 --warmup 2 --val-batches 2 --val-every 2 ", variant,
             data);
    const char* log = in_folder("log.csv");
    for (int threads = 1; threads <= 3; threads++) {
        child.threads = threads;
        CHECK_SUCCESS(cli("%s %s --save-every 4 --log %s --checkpoint %s", run, threads == 3 ? "--recompute" : "", log,
                          threads == 1 ? whole : path),
                      run);
        CHECK(threads == 1 || same_files(whole, path), "%s: %d threads give other bits than 1", s->name, threads);
    }
    child.threads = 0;
    child.signal = SIGTERM, child.at = 2;
    cli("%s --save-every 4 --checkpoint %s", run, path);
    child.signal = 0;
    CHECK_SUCCESS(cli("--resume --data %s --checkpoint %s", data, path), "resuming");
    CHECK(same_files(whole, path), "%s: resumed, the bits differ", s->name);
    CHECK_SUCCESS(cli("--generate 'the ' --tokens 80 --data %s --checkpoint %s", data, path), "generation");
    const char* beyond = beyond_gpt2(opt.model);
    const Result* exported = cli("--export %s --checkpoint %s", in_folder("exported"), path);
    CHECK(beyond ? exported->status == 1 && strstr(exported->err, beyond) : !exported->status,
          "%s: --export ends with status %d: %s", s->name, exported->status, exported->err);
    if (beyond) CHECK_FAILURE(cli("--attention 'the ' --data %s --checkpoint %s", data, path), 1, beyond, s->name);
    CHECK_SUCCESS(cli("--init %s --lr 0 --min-lr 0 --batch 3 --steps 1 --warmup 0 --val-batches 2 --data %s --log %s "
                      "--checkpoint %s",
                      whole, data, in_folder("again.csv"), in_folder("again.safetensors")),
                  "another run from its weights");
    double losses[2] = {0, 0};
    const char *last = strstr(read_file(log, NULL), "\n4,"), *again = read_file(in_folder("again.csv"), NULL);
    CHECK(last && sscanf(last, "\n4,%*f,%lf", &losses[0]) == 1 && again &&
              sscanf(strchr(again, '\n'), "\n1,%*f,%lf", &losses[1]) == 1 && losses[0] == losses[1],
          "%s: it is saved as a model of another loss, %.9g, not %.9g", s->name, losses[1], losses[0]);
}

static void test_variants(void) {
    const char* data = make_data();
    for (size_t i = 0; i < sizeof variants / sizeof *variants; i++) {
        static Subject s;
        make_subject(&s, variants[i].options);
        check_parameters(&s, variants[i].parameters);
        check_first_values(&s);
        make_speak(&s.model, 5);
        check_slopes(&s.model, &s.a, s.tokens, s.targets, s.name);
        check_plain(&s);
        check_causality(&s);
        check_cache(&s);
        check_validation(&s);
        check_run(&s, data, variants[i].options);
        free_subject(&s);
    }
}

// ====================================================================================================================
// Command line

// A checkpoint of a short run, in the folder of make_data().
static const char* make_checkpoint(const char* data) {
    CHECK_SUCCESS(cli(SMALL_MODEL "--data %s --checkpoint %s --steps 2", data, in_folder("gpt.safetensors")),
                  "two steps");
    return in_folder("gpt.safetensors");
}

static void test_help(void) {
    const Result* r = cli("--help");
    CHECK_SUCCESS(r, "--help");
    CHECK(!*r->err, "--help writes to stderr: %s", r->err);
    for (int i = 0; i < OPTIONS; i++) {
        char line[64];
        snprintf(line, sizeof line, " %s%s%s ", options[i].name, options[i].argument ? " " : "",
                 options[i].argument ? options[i].argument : "");
        CHECK(strstr(r->out, line) && strstr(r->out, options[i].help), "--help does not explain %s", options[i].name);
        CHECK(!options[i].initial || strstr(r->out, options[i].initial), "--help has no default for %s",
              options[i].name);
    }
    for (const char* line = r->out; *line;) {
        const char* end = strchr(line, '\n');
        CHECK(end && end - line <= 120, "a line of the help is not ended or too long: %.130s", line);
        line = end ? end + 1 : line + strlen(line);
    }
    CHECK(!strcmp(cli("-h")->out, cli("--help")->out), "-h is not --help");
    r = cli("--version");
    CHECK_SUCCESS(r, "--version");
    CHECK(!strcmp(r->out, "train_gpt " VERSION "\n"), "--version prints '%s'", r->out);
}

// argument: an option and its value, separated by a space.
static void parse_one(const char* argument) {
    char text[256], *space = text;
    snprintf(text, sizeof text, "%s", argument);
    while (*space && *space != ' ') space++;
    char* arguments[] = {(char*)"test_gpt", (char*)"--lr=1000", text, *space ? space + 1 : NULL, NULL};
    *space = 0;
    parse_command_line(arguments[3] ? 4 : 3, arguments); // no --min-lr is above this --lr
}

static void test_option_values(void) {
    static const char* const garbage[] = {"",
                                          "x",
                                          "1x",
                                          "nan",
                                          "-nan",
                                          "inf",
                                          "-inf",
                                          "-1",
                                          "-0.5",
                                          "1e400",
                                          "1e-400",
                                          "0x",
                                          "1 2",
                                          "--",
                                          "1,5",
                                          "--lr",
                                          "99999999999999999999",
                                          "-99999999999999999999",
                                          "+",
                                          "1e",
                                          ".",
                                          "%d"};
    char text[256];
    for (int i = 0; i < OPTIONS; i++) {
        const Option* o = &options[i];
        if (!o->whole && !o->real) continue;
        for (size_t g = 0; g < sizeof garbage / sizeof *garbage; g++) {
            if (o->most > 1e20 && strtod(garbage[g], NULL) > 1e10 && strtod(garbage[g], NULL) <= o->most) continue;
            snprintf(text, sizeof text, "%s %s", o->name, garbage[g]);
            CHECK_FAILURE(forked(parse_one, text), 2, o->name, text);
        }
        static const char* const real[] = {"1.5", "1e3", "0.0"};
        for (size_t g = 0; g < 3 && o->whole; g++) {
            snprintf(text, sizeof text, "%s %s", o->name, real[g]);
            CHECK_FAILURE(forked(parse_one, text), 2, "whole number", text);
        }
        // The ends of the range, and just beyond.
        const char* format = o->whole ? "%s %.0f" : "%s %.17g";
        double ends[] = {o->least, o->most};
        double beyond[] = {o->whole ? o->least - 1 : nextafter(o->least, -INFINITY),
                           o->whole ? o->most + 1 : nextafter(o->most, INFINITY)};
        for (int k = 0; k < 2; k++) {
            snprintf(text, sizeof text, format, o->name, ends[k]);
            CHECK_SUCCESS(forked(parse_one, text), text);
            snprintf(text, sizeof text, format, o->name, beyond[k]);
            CHECK_FAILURE(forked(parse_one, text), 2, o->name, text);
        }
        CHECK_FAILURE(forked(parse_one, o->name), 2, "needs a value", o->name);
        snprintf(text, sizeof text, "%s=", o->name);
        CHECK_FAILURE(forked(parse_one, text), 2, o->name, text);
    }
    static const char* const counts[] = {"--layers", "--heads", "--channels",   "--context",
                                         "--steps",  "--batch", "--accumulate", "--val-batches"};
    for (int i = 0; i < 8; i++) { // none of these may be 0
        snprintf(text, sizeof text, "%s 0", counts[i]);
        CHECK_FAILURE(forked(parse_one, text), 2, counts[i], text);
    }
}

static void test_option_names(void) {
    char text[256], suggestion[256];
    for (int i = 0; i < OPTIONS; i++) {
        const char* name = options[i].name;
        size_t n = strlen(name), middle = 2 + (n - 2) / 2;
        // A letter is missing, doubled, or another.
        for (int change = 0; change < 3; change++) {
            snprintf(text, sizeof text, "%.*s%s%s 1", (int)middle, name, change ? "q" : "",
                     name + middle + (change != 1));
            snprintf(suggestion, sizeof suggestion, "did you mean %s?", name);
            if (n > 5) CHECK_FAILURE(forked(parse_one, text), 2, suggestion, text);
        }
    }
    CHECK_FAILURE(cli("--completely-different 3"), 2, "unknown option --completely-different (--help", "no likeness");
    CHECK(!strstr(cli("--completely-different 3")->err, "did you mean"), "a suggestion for an option like no other");
    CHECK_FAILURE(cli("--%0500d 3", 0), 2, "unknown option", "a name of 502 characters");
    CHECK_FAILURE(cli("-"), 2, "unknown option -", "a dash");
    CHECK_FAILURE(cli("--"), 2, "unknown option --", "two dashes");
    CHECK_FAILURE(cli("--=5"), 2, "unknown option --", "two dashes and a value");
    CHECK_FAILURE(cli("stray"), 2, "'stray' is no option", "a word");
    CHECK_FAILURE(cli("''"), 2, "'' is no option", "an empty word");
    CHECK_FAILURE(cli("--steps 5 6"), 2, "'6' is no option", "a number too many");
    CHECK_FAILURE(cli("--resume=1"), 2, "--resume takes no value", "a value for a flag");
    CHECK_FAILURE(cli("--preset gpt3"), 2, "--preset is gpt2, gpt2-medium", "an unknown preset");
    CHECK_FAILURE(cli("--preset gpt2 --init x"), 2, "leave out --preset", "two origins of the sizes");
    CHECK_FAILURE(cli("--resume --init x"), 2, "give one of them", "two origins of the weights");
    CHECK_FAILURE(cli("--precision bf16 --tokenize x"), 2, "has no effect with --tokenize",
                  "a precision where nothing is multiplied");
    CHECK_FAILURE(cli("--layers 3 --tokenize x"), 2, "has no effect with --tokenize", "a shape without a model");
    CHECK_FAILURE(cli("--init a --checkpoint b --generate x"), 2, "--checkpoint has no effect", "two models");
    CHECK_FAILURE(cli("--top-k 3 --temperature 0 --generate x"), 2, "no effect with --temperature 0", "no chance");
    CHECK_FAILURE(cli("--top-p 0.5 --temperature 0"), 2, "no effect with --temperature 0", "no chance in training");
}

static void set_and_print(const char* argument) {
    char* arguments[] = {(char*)"test_gpt", (char*)"--steps=7", (char*)"--steps",    (char*)"80",  (char*)"--lr=2e-3",
                         (char*)"--preset", (char*)argument,    (char*)"--generate", (char*)"a=b", NULL};
    parse_command_line(9, arguments);
    printf("%zu %zu %zu %zu %zu %g %g %zu %s", opt.steps, opt.model.L, opt.model.H, opt.model.C, opt.model.T, opt.lr,
           opt.min_lr, opt.warmup, opt.prompt);
}

// Both ways to give a value, the last one counting, and presets, which what is given takes precedence over.
static void test_option_meaning(void) {
    const Result* r = forked(set_and_print, "gpt2-medium");
    CHECK(!strcmp(r->out, "80 24 16 1024 1024 0.002 4e-05 4 a=b"), "the options are %s", r->out);
    r = forked(set_and_print, "gpt2-xl");
    CHECK(!strcmp(r->out, "80 48 25 1600 1024 0.002 4e-05 4 a=b"), "the options are %s", r->out);
}

// Whatever fails leaves the checkpoint that was there.
static void test_cli_failures(void) {
    const char *data = make_data(), *checkpoint = make_checkpoint(data);
    char base[9000], what[400];
    size_t size = 0;
    char* before = read_file(checkpoint, &size);
    write_file(in_folder("file"), "x", 1);
    mkdir(in_folder("empty"), 0777);
    mkdir(in_folder("full"), 0777);
    write_file(in_folder("full/file"), "x", 1);
    mkfifo(in_folder("pipe"), 0666);
    snprintf(base, sizeof base, "--data %s --checkpoint %s", data, checkpoint);
    const struct {
        const char* arguments; // FOLDER stands for the tests' folder
        int status;
        const char* text;
    } cases[] = {
        {"--heads 3 --channels 40", 2, "--channels 40 is not divisible by --heads 3"},
        {"--data FOLDER/nowhere", 1,
         "nowhere/tokenizer.bin: No such file or directory; `python3 prepare_data.py --out"},
        {"--data FOLDER/empty", 1, "empty/tokenizer.bin: No such file"},
        {"--data FOLDER/file", 1, "Not a directory"},
        {"--train FOLDER/none.bin", 1, "none.bin: No such file"},
        {"--train FOLDER/none_*.bin", 1, "none_*.bin"},
        {"--val FOLDER/none.bin", 1, "none.bin: No such file"},
        {"--train FOLDER/file", 1, "is not a file of tokens, or is cut off"},
        {"--train FOLDER/data/tokenizer.bin", 1, "is not a file of tokens"},
        {"--context 6001", 1, "6000 tokens are too few for a context of 6001"},
        {"--context 2000", 1, "val.bin: 900 tokens are too few for a context of 2000"},
        {"--resume --checkpoint FOLDER/none", 1, "none: No such file"},
        {"--generate x --checkpoint FOLDER/none", 1, "none: No such file"},
        {"--export FOLDER/e --checkpoint FOLDER/none", 1, "none: No such file"},
        {"--init FOLDER/none", 1, "none: No such file"},
        {"--init FOLDER/empty", 1, "empty/model.safetensors: No such file"},
        {"--init FOLDER/file", 1, "not a safetensors file"},
        {"--init FOLDER/pipe", 1, "not a regular file"},
        {"--checkpoint FOLDER/no/such/file", 1, "No such file"},
        {"--checkpoint FOLDER/file/below", 1, "Not a directory"},
        {"--checkpoint FOLDER/full", 1, "not a regular file"},
        {"--checkpoint FOLDER/pipe", 1, "not a regular file"},
        {"--checkpoint FOLDER/data/val.bin", 1, "val.bin is not a safetensors file"},
        {"--log FOLDER/no/such/file", 1, "No such file"},
        {"--log FOLDER/full", 1, "not a regular file"},
        {"--tokenize FOLDER/none", 1, "none: No such file"},
        {"--tokenize FOLDER/pipe", 1, "not a regular file"},
        {"--channels 65536 --heads 64 --layers 96 --context 4", 1, "MB of memory"},
        {"--batch 65536 --channels 65536", 1, "MB of memory"},
        {"--preset gpt2-xl --batch 65536 --context 64", 1, "MB of memory"},
        {"--resume --channels 48", 1, "--channels 48 does not fit"},
        {"--resume --layers 3", 1, "--layers 3 does not fit"},
        {"--resume --heads 4", 1, "--heads 4 does not fit"},
        {"--resume --context 32", 1, "--context 32 does not fit"},
        {"--resume", 1, "has done all of its 2 steps"},
        {"--resume --steps 1", 1, "has done 2 steps, more than --steps 1"},
        {"--resume --steps 4 --train FOLDER/data/val.bin", 1, "other data"},
        {"--init FOLDER/gpt.safetensors --context 25", 1, "longer than the 24 positions"},
        {"--init FOLDER/gpt.safetensors --channels 64", 1, "--channels 64 does not fit"},
        {"--generate x --heads 4", 1, "--heads 4 does not fit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char arguments[2000];
        size_t n = 0;
        for (const char* p = cases[i].arguments; *p;)
            if (!strncmp(p, "FOLDER", 6)) {
                n += (size_t)snprintf(arguments + n, sizeof arguments - n, "%s", folder);
                p += 6;
            } else
                arguments[n++] = *p++;
        arguments[n] = 0;
        snprintf(what, sizeof what, "%s", cases[i].arguments);
        const Result* r = cli("%s %s", base, arguments);
        CHECK_FAILURE(r, cases[i].status, cases[i].text, what);
        CHECK(!strstr(r->out, "\nstep "), "%s: found only after the first step", what);
        size_t now = 0;
        char* after = read_file(checkpoint, &now);
        CHECK(after && now == size && !memcmp(before, after, size), "%s: the checkpoint has changed", what);
        free(after);
        CHECK(!exists(in_folder("gpt.safetensors.tmp")), "%s: a temporary file is left", what);
    }
    free(before);
}

// A folder's name is itself, whatever it would mean as a pattern.
static void test_cli_folder_name(void) {
    const char *data = make_data(), *other = in_folder("[d]ata");
    uint16_t tokens[99] = {0};
    size_t size = 0;
    char* tokenizer = read_file(in_folder("data/tokenizer.bin"), &size);
    mkdir(other, 0777);
    write_file(in_folder("[d]ata/tokenizer.bin"), tokenizer, size);
    write_shard(in_folder("[d]ata/train.bin"), tokens, 99);
    write_shard(in_folder("[d]ata/val.bin"), tokens, 98);
    const Result* r = cli(SMALL_MODEL "--data %s --checkpoint %s --steps 1", other, in_folder("gpt.safetensors"));
    CHECK_SUCCESS(r, other);
    CHECK(strstr(r->out, "99 tokens to train on, 98 to validate"), "not in %s, but in %s: %s", other, data, r->out);
    free(tokenizer);
}

// Files that do not belong together.
static void write_copy(const char* from, const char* to) {
    size_t size = 0;
    char* data = read_file(in_folder(from), &size);
    write_file(in_folder(to), data, size);
    free(data);
}

static void test_cli_mismatch(void) {
    char base[9000];
    static Vocabulary v;
    const char *data = make_data(), *checkpoint = make_checkpoint(data);
    // Another tokenizer of the same size, and a larger one.
    start_vocabulary(&v);
    v.strings['a'] = 'b', v.strings['b'] = 'a';
    mkdir(in_folder("swapped"), 0777);
    write_tokenizer(in_folder("swapped/tokenizer.bin"), &v, 0, -1);
    write_copy("data/train.bin", "swapped/train.bin");
    write_copy("data/val.bin", "swapped/val.bin");
    CHECK_FAILURE(cli("--data %s --checkpoint %s --resume --steps 5", in_folder("swapped"), checkpoint), 1,
                  "was trained with another tokenizer", "a text of another tokenizer");
    CHECK_FAILURE(cli(SMALL_MODEL "--data %s --train %s/train.bin", data, in_folder("swapped")), 1,
                  "was not made with the tokenizer of", "a text beside another tokenizer");
    // The shard's own word is worth more than what is beside it.
    Tokenizer own = load_tokenizer(in_folder("data/tokenizer.bin"));
    uint64_t mark = own.mark;
    free_tokenizer(&own);
    size_t shard_size = 0;
    char* shard = read_file(in_folder("data/train.bin"), &shard_size);
    memcpy(shard + 12, &mark, sizeof mark);
    write_file(in_folder("swapped/train.bin"), shard, shard_size);
    CHECK_SUCCESS(cli(SMALL_MODEL "--data %s --train %s/train.bin --steps 1 --checkpoint %s", data,
                      in_folder("swapped"), in_folder("marked")),
                  "a text that names its tokenizer");
    mark++;
    memcpy(shard + 12, &mark, sizeof mark);
    write_file(in_folder("swapped/train.bin"), shard, shard_size);
    CHECK_FAILURE(cli(SMALL_MODEL "--data %s --train %s/train.bin", data, in_folder("swapped")), 1,
                  "was not made with the tokenizer of", "a text that names another tokenizer");
    free(shard);
    // The model writes with its own tokenizer, and no other is taken that is asked for; an export, too.
    static char text[1 << 17];
    snprintf(text, sizeof text, "%s", cli("--data %s --generate x --checkpoint %s", data, checkpoint)->out);
    const Result* r = cli("--generate x --checkpoint %s", checkpoint);
    CHECK(!r->status && !strcmp(r->out, text), "without data/ the text is another: %s", r->err);
    static const char* const uses[] = {"--generate", "--tokenize"};
    for (int i = 0; i < 2; i++)
        CHECK_FAILURE(cli("--data %s %s %s --checkpoint %s", in_folder("swapped"), uses[i], checkpoint, checkpoint), 1,
                      "leave out --data", "another tokenizer than the model's");
    r = cli("--tokenize %s --checkpoint %s", in_folder("swapped/tokenizer.bin"), checkpoint);
    CHECK(!r->status && *r->out, "--tokenize with a checkpoint's tokenizer: %s", r->err);
    CHECK_SUCCESS(cli("--checkpoint %s --export %s", checkpoint, in_folder("e")), "an export");
    r = cli("--init %s --generate x", in_folder("e"));
    CHECK(!r->status && !*r->err && !strcmp(r->out, text), "an export writes another text: %s", r->err);
    CHECK_FAILURE(cli("--data %s --init %s --generate x", in_folder("swapped"), in_folder("e")), 1,
                  "was trained with another tokenizer", "an export with another tokenizer");
    unlink(in_folder("e/config.json"));
    r = cli("--init %s --generate x", in_folder("e"));
    CHECK(!r->status && !strcmp(r->out, text), "an export of one file has other heads: %s", r->err);
    // Nothing is replaced that is no export.
    write_file(in_folder("e/config.json"), "{}", 2);
    CHECK_FAILURE(cli("--checkpoint %s --export %s", checkpoint, in_folder("e")), 1, "config.json is not of an earlier",
                  "an export over another config.json");
    write_copy("gpt.safetensors", "e/model.safetensors");
    CHECK_FAILURE(cli("--checkpoint %s --export %s", in_folder("e/model.safetensors"), in_folder("e")), 1,
                  "model.safetensors is not of an earlier", "an export over its own checkpoint");
    CHECK(same_files(checkpoint, in_folder("e/model.safetensors")), "an export has replaced a checkpoint");
    // Weights without a run, and a run without its moments.
    CHECK_SUCCESS(cli("--checkpoint %s --export %s", checkpoint, in_folder("exported")), "an export");
    CHECK_FAILURE(cli("--data %s --resume --checkpoint %s", data, in_folder("exported/model.safetensors")), 1,
                  "holds no run to resume", "weights alone");
    CHECK_SUCCESS(
        cli("--batch 3 --data %s --init %s --checkpoint %s --steps 2", data, in_folder("exported"), in_folder("tuned")),
        "fine-tuning");
    CHECK_SUCCESS(cli("--batch 3 --context 9 --data %s --init %s --checkpoint %s --steps 2", data,
                      in_folder("exported"), in_folder("tuned")),
                  "fine-tuning with a shorter context");
    CHECK_FAILURE(cli("--context 25 --data %s --init %s --generate x", data, in_folder("exported")), 1,
                  "is longer than the 24 positions", "a longer context than the file's");
    // A token that the vocabulary has not, met in training and in validation.
    uint16_t tokens[200] = {0};
    tokens[100] = 256;
    write_shard(in_folder("data/bad.bin"), tokens, 200);
    const char* other = in_folder("other.safetensors");
    CHECK_FAILURE(cli(SMALL_MODEL "--data %s --train %s --checkpoint %s", data, in_folder("data/bad.bin"), other), 1,
                  "token 100 is 256, but the vocabulary has 256", "a foreign token to train on");
    CHECK_FAILURE(
        cli(SMALL_MODEL "--data %s --val %s --checkpoint %s --val-every 1", data, in_folder("data/bad.bin"), other), 1,
        "token 100 is 256, but the vocabulary has 256", "a foreign token to validate on");
    // A checkpoint whose options were tampered with.
    size_t size = 0;
    char* file = read_file(checkpoint, &size);
    char* beta = NULL;
    for (size_t i = 0; file && i + 12 < size && !beta; i++)
        if (!memcmp(file + i, "\"--beta1\":\"0", 12)) beta = file + i + 11;
    if (CHECK(beta, "no --beta1 in the checkpoint")) {
        *beta = '7';
        write_file(in_folder("tampered"), file, size);
        CHECK_FAILURE(cli("--data %s --resume --steps 5 --checkpoint %s", data, in_folder("tampered")), 1, "--beta1",
                      "an impossible option in the checkpoint");
        beta[-4] = '2'; // --beta2 twice
        write_file(in_folder("tampered"), file, size);
        CHECK_FAILURE(cli("--data %s --resume --steps 5 --checkpoint %s", data, in_folder("tampered")), 1,
                      "has --beta2 twice", "a key twice in the checkpoint");
    }
    free(file);
    // One that only another version of the program knows, wherever the model is used; and none where an older one had none.
    file = read_file(checkpoint, &size);
    char* name = file ? strstr(file + 8, "\"--batch\"") : NULL;
    if (CHECK(name, "no --batch in the checkpoint")) {
        memcpy(name, "\"--bunch\"", 9);
        write_file(in_folder("tampered"), file, size);
        snprintf(base, sizeof base, "--data %s --checkpoint %s", data, in_folder("tampered"));
        const char* unknown = "was made with --bunch 3, which this program does not know";
        CHECK_FAILURE(cli("%s --resume --steps 5", base), 1, unknown, "a resumed run");
        CHECK_FAILURE(cli("%s --generate x", base), 1, unknown, "generation");
        CHECK_FAILURE(cli("%s --export %s", base, in_folder("exported")), 1, unknown, "an export");
        CHECK_FAILURE(cli("--data %s --init %s", data, in_folder("tampered")), 1, unknown, "another run's weights");
        memcpy(name, "\"  batch\"", 9);
        write_file(in_folder("tampered"), file, size);
        CHECK_SUCCESS(cli("%s --resume --steps 3", base), "a checkpoint from before there was --batch");
    }
    free(file);
    static const char* const numbers[] = {"\"step\":\"", "\"windows\":\"", "\"tokens\":\"", "\"--heads\":\""};
    for (size_t n = 0; n < sizeof numbers / sizeof *numbers; n++) {
        file = read_file(checkpoint, &size);
        char* at = file ? strstr(file + 8, numbers[n]) : NULL;
        if (CHECK(at, "no %s in the checkpoint", numbers[n])) {
            at[strlen(numbers[n])] = 'x';
            write_file(in_folder("tampered"), file, size);
            CHECK_FAILURE(cli("--data %s --resume --steps 5 --checkpoint %s", data, in_folder("tampered")), 1, "'x",
                          numbers[n]);
        }
        free(file);
    }
    CHECK_SUCCESS(cli("--data %s --resume --steps 5 --checkpoint %s --channels %d", data, checkpoint, 40),
                  "a shape that is what it was");
}

static void test_cli_full_disk(void) {
    const char *data = make_data(), *checkpoint = make_checkpoint(data);
    size_t size = 0;
    char* before = read_file(checkpoint, &size);
    static const size_t limits[] = {100, 5000, 100000};
    for (size_t i = 0; i < 3; i++) {
        child.file_limit = i == 2 ? size - 1000 : 1000 + limits[i]; // metadata may be a little shorter
        CHECK_FAILURE(cli(SMALL_MODEL "--data %s --checkpoint %s --steps 3 --save-every 2", data, checkpoint), 1,
                      "cannot write", "a full disk");
        child.file_limit = 0;
        size_t now = 0;
        char* after = read_file(checkpoint, &now);
        CHECK(after && now == size && !memcmp(before, after, size), "a full disk has cost the checkpoint");
        free(after);
        CHECK(!exists(in_folder("gpt.safetensors.tmp")), "a full disk leaves a temporary file");
    }
    free(before);
    // The log fills up.
    child.file_limit = 1500;
    CHECK_FAILURE(cli(SMALL_MODEL "--data %s --checkpoint %s --steps 100 --log %s", data, checkpoint, in_folder("log")),
                  1, "cannot write", "a full disk for the log");
    child.file_limit = 0;
    if (!exists("/dev/full")) {
        skip("there is no /dev/full here");
        return;
    }
    child.output_path = "/dev/full";
    static const char* const cases[] = {"--help", "--version", SMALL_MODEL "--steps 2", "--generate x",
                                        "--tokenize Makefile"};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_FAILURE(cli("--data %s --checkpoint %s %s", data, checkpoint, cases[i]), 1,
                      i == 4 && !exists("Makefile") ? "Makefile" : "cannot write to standard output", cases[i]);
    child.output_path = NULL;
}

// Numbers that are not finite are neither taken from a file nor saved in one.
static void test_cli_nan(void) {
    const char *data = make_data(), *checkpoint = make_checkpoint(data), *spoilt = in_folder("nan.safetensors");
    const Config config = {256, 24, 16, 2, 1};
    Model m;
    const float bad[] = {12345.678f, NAN, INFINITY, -INFINITY};
    make_model(&m, config, false, 1);
    device->to_device(m.w.lnf_w + 3, &bad[1], 1);
    CHECK(save_checkpoint(spoilt, &m, false, ",\"--heads\":\"2\"", NULL) && !exists(spoilt), "NaN is saved");
    device->to_device(m.w.lnf_w + 3, &bad[0], 1);
    CHECK(!save_checkpoint(spoilt, &m, false, ",\"--heads\":\"2\"", NULL), "a finite number is not saved");
    device->free_model(&m);
    size_t size = 0, now = 0;
    char* file = read_file(spoilt, &size);
    char* at = (char*)memmem(file, size, &bad[0], sizeof(float));
    for (int i = 1; i < 4; i++) {
        memcpy(at, &bad[i], sizeof(float));
        write_file(spoilt, file, size);
        CHECK_FAILURE(cli("--batch 3 --data %s --init %s --checkpoint %s --save-every 1", data, spoilt, checkpoint), 1,
                      "tensor ln_f.weight holds numbers that are not finite",
                      "training from weights that are not finite");
        CHECK_FAILURE(cli("--data %s --init %s --generate x", data, spoilt), 1, "not finite",
                      "generating with weights that are not finite");
    }
    free(file);
    // Steps that blow up: what was good is kept, the last step that could be computed with is saved.
    char* before = read_file(checkpoint, &size);
#define RUN     "--data %s --checkpoint %s --layers 1 --heads 2 --channels 32 --context 16 --batch 2 --steps 3 --tokens 0 "
#define BLOW_UP "--lr 1e3 --min-lr 1e3 --warmup 0 --weight-decay 1e3 --clip 0 "
    const char* other = in_folder("blown.safetensors");
    CHECK_FAILURE(cli(RUN BLOW_UP, data, other), 1, "at step 3 the validation loss is",
                  "a run that blows up in its last step");
    CHECK(!exists(other), "a model that is not a number is saved");
    CHECK_FAILURE(cli(RUN BLOW_UP "--save-every 1", data, other), 1, "the validation loss is", "the same, saved");
    CHECK_SUCCESS(cli("--data %s --checkpoint %s --generate x --tokens 3", data, other), "the last good checkpoint");
    CHECK_FAILURE(cli(RUN BLOW_UP "--steps 5 --checkpoint %s", data, other, checkpoint), 1, "at step 4 the loss is",
                  "a NaN loss");
    char* after = read_file(checkpoint, &now);
    CHECK(after && now == size && !memcmp(before, after, size), "a loss that is NaN has cost the checkpoint");
    free(before), free(after);
#undef BLOW_UP
#undef RUN
}

static void test_cli_tokenize(void) {
    static Vocabulary v;
    const char* text = "Hello,  w\u00f6rld!\r\n\tIt's 12\u00bd o'clock. \xff\xfe abcabc";
    int tokens[100];
    char expected[2000];
    start_vocabulary(&v);
    static const char* const merges[] = {"ll", "He", "bc", "abc", "\xc3\xb6", " w", "12"};
    for (size_t i = 0; i < 7; i++) add_token(&v, merges[i], strlen(merges[i]));
    mkdir(in_folder("data"), 0777);
    write_tokenizer(in_folder("data/tokenizer.bin"), &v, RANGES, -1);
    write_file(in_folder("text"), text, strlen(text));
    write_file(in_folder("nothing"), "", 0);
    Tokenizer t = load_tokenizer(in_folder("data/tokenizer.bin"));
    size_t count = encode(&t, (const uint8_t*)text, strlen(text), tokens), n = 0;
    for (size_t i = 0; i < count; i++) n += (size_t)snprintf(expected + n, sizeof expected - n, "%d\n", tokens[i]);
    const Result* r = cli("--data %s --tokenize %s", in_folder("data"), in_folder("text"));
    CHECK_SUCCESS(r, "--tokenize");
    CHECK(count < strlen(text) && !strcmp(r->out, expected), "--tokenize prints %s", r->out);
    r = cli("--data %s --tokenize %s", in_folder("data"), in_folder("nothing"));
    CHECK_SUCCESS(r, "--tokenize an empty file");
    CHECK(!*r->out, "an empty file has tokens: %s", r->out);
    free_tokenizer(&t);
}

// ====================================================================================================================
// Looking at attention

static void open_view(View* v, Model model, const int* tokens, size_t n) {
    memset(v, 0, sizeof *v);
    v->model = model;
    int* own = (int*)allocate(n + 1, sizeof(int), "a test");
    memcpy(own, tokens, n * sizeof(int));
    look_at(v, own, n);
}

static void close_view(View* v) {
    device->free_activations(&v->a);
    device->free_model(&v->model);
}

// Against PyTorch's, to which the scores' error counts as it is, not relative to them.
static void compare_view(void) {
    size_t T = fixture.T, L = fixture.L, H = fixture.H, pairs = T * T;
    const int* tokens = stored_tokens("tokens", fixture.rows);
    float* logits = borrow(fixture.rows * fixture.V);
    for (size_t b = 0; b < fixture.B && T > 1; b++) {
        View v;
        open_view(&v, fixture_model(), tokens + b * T, T);
        for (size_t l = 0; l < L; l++) {
            const float* right = find_entry(&fixture.file, "", "h.0.weights") ? stored("h.%zu.weights", l) : NULL;
            for (size_t h = 0; h < H; h++) {
                const float* p = view_weights(&v, l, h);
                double error = 0, sum_error = 0;
                for (size_t i = 0; i < T; i++) {
                    double sum = 0;
                    for (size_t j = 0; j < T; j++) {
                        sum += p[i * T + j];
                        if (right) error = larger(error, fabs(p[i * T + j] - right[(b * H + h) * pairs + i * T + j]));
                        CHECK(j <= i ? p[i * T + j] >= 0 : p[i * T + j] == 0, "%zu looks at %zu: %g", i, j,
                              p[i * T + j]);
                    }
                    sum_error = larger(sum_error, fabs(sum - 1));
                }
                CHECK(error <= (BFLOAT16 ? 0.05 : 1e-6), "%s, layer %zu, head %zu: a weight is wrong by %.1e",
                      fixture.name, l, h, error);
                CHECK(sum_error <= 3e-6, "%s, layer %zu, head %zu: weights sum to 1 within %.1e", fixture.name, l, h,
                      sum_error);
            }
        }
        memcpy(logits + b * T * fixture.V, v.logits, T * fixture.V * sizeof(float));
        close_view(&v);
    }
    if (T > 1) compare(logits, fixture.rows * fixture.V, "logits");
}
static void test_view_weights(void) { for_each_fixture(compare_view); }

// Maps of which every number can be told: tokens 5 6 5 6 5 6 5 6.
static void test_view_patterns(void) {
    enum { N = 8 };
    static const int tokens[N] = {5, 6, 5, 6, 5, 6, 5, 6};
    static const struct {
        const char* pattern;
        size_t back;            // every query looks back so far, or at the first token
        double is[NUMBERS - 1]; // DISTANCE to INDUCTION
    } maps[] = {{"itself", 0, {0, 1, 0, 0, 0, 0}},
                {"previous", 1, {1, 0, 1, 1. / 7, 0, 1}}, // what stands before is what followed the copy
                {"same", 2, {13. / 7, 0, 1. / 7, 2. / 7, 1, 0}},
                {"first", N, {4, 0, 1. / 7, 1, 0.5, 0}}};
    for (size_t m = 0; m < sizeof maps / sizeof *maps; m++) {
        float p[N * N] = {0};
        for (size_t i = 0; i < N; i++) p[i * N + (maps[m].back <= i ? i - maps[m].back : 0)] = 1;
        HeadView head = describe_head(p, tokens, N);
        CHECK(!strcmp(head.pattern, maps[m].pattern), "'%s', not %s", head.pattern, maps[m].pattern);
        CHECK(head.is[ENTROPY] == 0, "%s: %g bits", maps[m].pattern, head.is[ENTROPY]);
        for (int k = DISTANCE; k < NUMBERS; k++)
            CHECK(fabs(head.is[k] - maps[m].is[k - 1]) < 1e-12, "%s: number %d is %g, not %g", maps[m].pattern, k,
                  head.is[k], maps[m].is[k - 1]);
    }
    float even[N * N] = {0};
    double bits = 0;
    for (size_t i = 0; i < N * N; i++) even[i] = i % N <= i / N ? 1 / (float)(i / N + 1) : 0;
    for (size_t i = 1; i < N; i++) bits += log2((double)i + 1) / (N - 1);
    static const int different[N] = {0, 1, 2, 3, 4, 5, 6, 7};
    HeadView head = describe_head(even, different, N);
    CHECK(!strcmp(head.pattern, "uniform") && fabs(head.is[ENTROPY] - bits) < 1e-6 &&
              fabs(head.is[DISTANCE] - 2) < 1e-6,
          "even weights are '%s', %g bits, %g back", head.pattern, head.is[ENTROPY], head.is[DISTANCE]);
    CHECK(isnan(head.is[SAME]) && isnan(head.is[INDUCTION]), "copies where there are none");
    // Three tokens again and again: what followed the copy stands two before. A third of the weight on each of the last
    // three is above a half nowhere, and near; odd keys with five times the weight of even ones have fewer bits than all
    // alike, but not far fewer.
    enum { M = 24 };
    int triples[M];
    float induction[M * M] = {0}, local[M * M] = {0}, broad[M * M] = {0};
    for (size_t i = 0; i < M; i++) {
        triples[i] = (int)(i % 3);
        induction[i * M + (i < 2 ? 0 : i - 2)] = 1;
        for (size_t j = 0; j < 3; j++) local[i * M + (i < j ? 0 : i - j)] += 1 / 3.f;
        for (size_t j = 0; j <= i; j++) broad[i * M + j] = (j % 2 ? 5 : 1) / (float)(i % 2 ? 3 * (i + 1) : 3 * i + 1);
    }
    head = describe_head(induction, triples, M);
    CHECK(!strcmp(head.pattern, "induction") && head.is[INDUCTION] == 1 && head.is[SAME] == 0, "'%s', %g, %g",
          head.pattern, head.is[INDUCTION], head.is[SAME]);
    head = describe_head(local, triples, M);
    CHECK(!strcmp(head.pattern, "local"), "'%s', %g back", head.pattern, head.is[DISTANCE]);
    head = describe_head(broad, triples, M);
    CHECK(!strcmp(head.pattern, "broad"), "'%s', %g bits", head.pattern, head.is[ENTROPY]);
}

// Of the same order, of the opposite one, and of one with two neighbours exchanged: 1 - 6 (1 + 1) / (5 (25 - 1)).
static void test_view_correlation(void) {
    static const double gates[3][5] = {{-3, 0, 0.5, 7, 7.25}, {9, 3, 2, 1, -1}, {0, 1, 3, 2, 4}};
    static const double right[] = {1, -1, 0.9};
    HeadView heads[5];
    for (int k = 0; k < 3; k++) {
        for (int i = 0; i < 5; i++) heads[i].loss = 0.1 * i * i, heads[i].gate = gates[k][i];
        double found = rank_correlation(heads, 5);
        CHECK(fabs(found - right[k]) < 1e-12, "the ranks correlate by %g, not %g", found, right[k]);
    }
    CHECK(isnan(rank_correlation(heads, 1)), "the correlation of a single head");
}

// The clearest head is that of least entropy, but not one that looks at the first token; of those asked for.
static void test_view_choice(void) {
    View v;
    HeadView heads[6];
    static const double bits[6] = {0.5, 2, 1.5, 0, 3, 1.7};
    memset(&v, 0, sizeof v);
    memset(heads, 0, sizeof heads);
    v.L = 2, v.H = 3, v.heads = heads;
    for (int i = 0; i < 6; i++) heads[i].is[ENTROPY] = bits[i], heads[i].pattern = i % 3 ? "" : "first";
    static const char* const asked[] = {"", "--layer", "--head"};
    static const size_t chosen[] = {2, 5, 1};
    for (int i = 0; i < 3; i++) {
        if (i) set_option(find_option(asked[i]), "1", 2, ""), find_option(asked[i])->given = true;
        choose_head(&v);
        if (i) set_option(find_option(asked[i]), "0", 2, ""), find_option(asked[i])->given = false;
        CHECK(v.layer * v.H + v.head == chosen[i], "%s: layer %zu, head %zu", asked[i], v.layer, v.head);
    }
}

// The loss of the text if the output of head h in layer l is mean + gate (output - mean), layer by layer.
static double gated_loss(const View* v, size_t layer, size_t h, float gate) {
    Config c = v->model.config;
    size_t rows = v->n - 1, C = c.C, D = C / c.H;
    const Parameters* w = &v->model.w;
    float *x = borrow(rows * C), *y = borrow(rows * C), *wide = borrow(rows * 4 * C), *mid = borrow(rows * 4 * C);
    float *mean = borrow(rows), *rstd = borrow(rows), *lse = borrow(rows * c.H), *losses = borrow(rows);
    embedding_forward(x, v->tokens, w->wte, w->wpe, 1, rows, 0, C);
    for (size_t l = 0; l < c.L; l++) {
        layernorm_forward(y, mean, rstd, x, w->ln1_w[l], w->ln1_b[l], rows, C);
        linear_forward(wide, y, w->qkv_w[l], w->qkv_b[l], NULL, rows, C, 3 * C);
        attention_forward(y, lse, wide, attention_of(c, 1, rows, 0));
        for (size_t d = h * D; d < (h + 1) * D && l == layer; d++) {
            double sum = 0;
            for (size_t i = 0; i < rows; i++) sum += y[i * C + d] / (double)rows;
            for (size_t i = 0; i < rows; i++) y[i * C + d] = (float)(sum + gate * (y[i * C + d] - sum));
        }
        linear_forward(x, y, w->att_w[l], w->att_b[l], borrow_copy(x, rows * C), rows, C, C);
        layernorm_forward(y, mean, rstd, x, w->ln2_w[l], w->ln2_b[l], rows, C);
        linear_forward(wide, y, w->fc_w[l], w->fc_b[l], NULL, rows, C, 4 * C);
        gelu_forward(mid, wide, rows * 4 * C);
        linear_forward(x, mid, w->mlp_w[l], w->mlp_b[l], borrow_copy(x, rows * C), rows, 4 * C, C);
    }
    layernorm_forward(y, mean, rstd, x, w->lnf_w, w->lnf_b, rows, C);
    float *logits = borrow(rows * c.V), *logits_lse = borrow(rows);
    matmul(logits, matrix(y, C), transposed(w->wte, C), NULL, NULL, rows, c.V, C);
    cross_entropy_forward(losses, logits_lse, logits, v->targets, rows, c.V);
    double loss = 0;
    for (size_t i = 0; i < rows; i++) loss += losses[i] / (double)rows;
    return loss;
}

// Without a head, and with a little of it: measured by changing W^O, and directly.
static void test_view_ablation(void) {
    for (size_t f = 0; f < FIXTURES; f++) {
        if (strcmp(fixtures[f].name, "odd") && strcmp(fixtures[f].name, "tile65")) continue;
        if (!open_fixture(f)) return;
        View v;
        open_view(&v, fixture_model(), stored_tokens("tokens", fixture.rows), fixture.T);
        ablate(&v);
        CHECK(v.loss == text_loss(&v), "%s: the weights are not as they were", fixture.name);
        CHECK(v.correlation == rank_correlation(v.heads, fixture.L * fixture.H), "%s: the correlation", fixture.name);
        if (device == &cpu) {
            double most = 0;
            for (size_t i = 0; i < fixture.L * fixture.H; i++) most = fmax(most, fabs(v.heads[i].loss));
            for (size_t i = 0; i < fixture.L * fixture.H; i++) {
                size_t l = i / fixture.H, h = i % fixture.H, kept = borrowed_count;
                double loss = gated_loss(&v, l, h, 0) - v.loss;
                double narrow = (gated_loss(&v, l, h, 0.98f) - gated_loss(&v, l, h, 1.02f)) / 0.04;
                double wide = (gated_loss(&v, l, h, 0.96f) - gated_loss(&v, l, h, 1.04f)) / 0.08;
                double gate = (4 * narrow - wide) / 3; // Richardson: what grows with the step's square is gone
                CHECK(fabs(v.heads[i].loss - loss) < 2e-6, "%s, layer %zu, head %zu: %.7f, not %.7f", fixture.name, l,
                      h, v.heads[i].loss, loss);
                CHECK(fabs(v.heads[i].gate - gate) < 1e-4, "%s, layer %zu, head %zu: gate %.7f, not %.7f", fixture.name,
                      l, h, v.heads[i].gate, gate);
                while (borrowed_count > kept) free(borrowed[--borrowed_count]);
            }
            CHECK(most > 1e-3, "%s: no head matters", fixture.name);
        }
        close_view(&v);
        close_fixture();
    }
}

// Each token's loss from a window of its own, which begins where --stride lets it.
static void test_eval(void) {
    const char *data = make_data(), *path = in_folder("gpt.safetensors"), *file = in_folder("text");
    CHECK_SUCCESS(cli(SMALL_MODEL "--data %s --steps 5 --checkpoint %s", data, path), "training");
    const char* text = "the cat sat on a mat, and the dog ran up a hill to see the moon and the other cat.\n";
    size_t n = strlen(text), T = 24, V = 256;
    write_file(file, text, n);
    Tokenizer t;
    Model m;
    Activations a;
    opt.init = path;
    load_for_use(&m, &t, true, false);
    opt.init = NULL;
    int* tokens = (int*)borrow(n);
    CHECK(encode(&t, (const uint8_t*)text, n, tokens) == n, "a token is a byte here");
    memset(&a, 0, sizeof a);
    device->create_activations(&a, &m, 1, T, false);
    float* logits = borrow(V);
    for (size_t stride = 1; stride < T; stride += stride < 2 ? 10 : 12) {
        double sum = 0, loss = NAN, bits = NAN;
        for (size_t i = 1; i < n; i++) {
            size_t begin = i < T ? 0 : (i - T + stride) / stride * stride;
            double total = 0;
            device->forward(&m, &a, tokens + begin, NULL, 1, i - begin, 0, false);
            device->wait(&m);
            device->read_activation(logits, &a, a.logits, V);
            for (size_t v = 0; v < V; v++) total += exp(logits[v]);
            sum += log(total) - logits[tokens[i]];
        }
        for (size_t batch = 1; batch <= 7; batch += 3) {
            const Result* r = cli("--data %s --checkpoint %s --eval %s --stride %zu --batch %zu --json", data, path,
                                  file, stride, batch);
            CHECK_SUCCESS(r, "--eval");
            const char *at = strstr(r->out, "\"loss\": "), *bits_at = strstr(r->out, "\"bits_per_byte\": ");
            if (at && bits_at) loss = strtod(at + 8, NULL), bits = strtod(bits_at + 17, NULL);
            double right = sum / (double)(n - 1);
            CHECK(fabs(loss / right - 1) < 1e-6 && fabs(bits / right * log(2) - 1) < 1e-6,
                  "stride %zu, batch %zu: %s, not %.8f", stride, batch, r->out, right);
        }
    }
    CHECK(strstr(cli("--data %s --checkpoint %s --eval %s", data, path, file)->out, "perplexity"), "a line to read");
    CHECK_FAILURE(cli("--data %s --checkpoint %s --eval %s --stride 24", data, path, file), 2, "at most 23", "stride");
    write_file(file, "x", 1);
    CHECK_FAILURE(cli("--data %s --checkpoint %s --eval %s", data, path, file), 1, "at least two tokens", "one token");
    // Windows of a long text that together need more memory than any machine has.
    enum { MANY = 70000 };
    static char many[MANY];
    const char* wide = in_folder("wide.safetensors");
    CHECK_SUCCESS(
        cli("--layers 1 --heads 1 --channels 128 --context 2048 --batch 1 --val-batches 1 --data %s --val %s/train.bin "
            "--steps 1 --checkpoint %s",
            data, data, wide),
        "training");
    memset(many, 'x', MANY);
    write_file(file, many, MANY);
    CHECK_FAILURE(cli("--data %s --checkpoint %s --eval %s --stride 1 --batch 65536", data, wide, file), 1, "would fit",
                  "too many windows at once");
    device->free_activations(&a), device->free_model(&m), free_tokenizer(&t);
    free_borrowed();
}

// All 65536 numbers of half precision, what lies between neighbours, and what is too large.
static void test_float_to_half(void) {
    for (uint32_t h = 0; h < 0x7C00; h++) {
        float x = half_to_float((uint16_t)h), next = half_to_float((uint16_t)(h + 1));
        CHECK(float_to_half(x) == h && float_to_half(-x) == (h | 0x8000), "%g", x);
        if (h == 0x7BFF) next = 65536;
        float middle = (x + next) / 2;
        CHECK(float_to_half(middle) == h + (h & 1), "between %g and %g: to even", x, next);
        CHECK(float_to_half(nextafterf(middle, x)) == h, "below the middle of %g and %g", x, next);
        CHECK(float_to_half(nextafterf(middle, next)) == h + 1, "above the middle of %g and %g", x, next);
    }
    CHECK(float_to_half(INFINITY) == 0x7C00 && float_to_half(-1e30f) == 0xFC00, "infinity");
    CHECK(isnan(half_to_float(float_to_half(NAN))), "NaN");
}

// What --attention prints and writes, and what it refuses.
static void test_attention_cli(void) {
    const char *data = make_data(), *model = in_folder("gpt.safetensors"), *page = in_folder("page.html");
    CHECK_SUCCESS(cli(SMALL_MODEL "--data %s --steps 2 --checkpoint %s", data, model), "training");
#define LOOK "--data %s --checkpoint %s --html %s --attention "
    const Result* r = cli(LOOK "'a text of bytes' --ablate", data, model, page);
    CHECK_SUCCESS(r, "--attention");
    CHECK(strstr(r->out, "layer head") && strstr(r->out, "gate+") && strstr(r->out, "in a browser") == NULL, "%s",
          r->out);
    char* text = read_file(page, NULL);
    CHECK(text && strstr(text, "\"gate\":") && !strstr(text, "@DATA@") && !strstr(text, "\"live\":"), "the page");
    free(text);
    CHECK_SUCCESS(cli(LOOK "'a </script> text' --live", data, model, page), "a page over a page");
    text = read_file(page, NULL);
    CHECK(text && strstr(text, "\"live\":") && !strstr(text, "a </script>") && !strstr(text, "\"</script"), "the page");
    free(text);
    CHECK_FAILURE(cli(LOOK "'a text' --layer 9", data, model, page), 2, "the model has layers 0 to", "--layer 99");
    CHECK_FAILURE(cli(LOOK "'a text' --head 99", data, model, page), 2, "the model has heads 0 to", "--head 99");
    CHECK_FAILURE(cli(LOOK "x", data, model, page), 1, "at least two tokens", "a single token");
    CHECK(!*cli(LOOK "'a text' --layer 99 --ablate", data, model, page)->out,
          "work was done before --layer was looked at");
    r = cli(LOOK "'a text of bytes' --tokens 5", data, model, page);
    CHECK(strstr(r->out, "the first 5 of the text's 15 tokens (--tokens"), "--tokens 5: %s", r->out);
    r = cli(LOOK "'%0200d'", data, model, page, 0);
    CHECK(strstr(r->out, "the first 24 of the text's 200 tokens (the model's context)"), "200 tokens: %s", r->out);
    const char* wide = in_folder("wide.safetensors");
    CHECK_SUCCESS(cli("--layers 1 --heads 1 --channels 8 --context 150 --batch 1 --data %s --steps 1 --checkpoint %s",
                      data, wide),
                  "training");
    r = cli(LOOK "'%0200d'", data, wide, page, 0);
    CHECK(strstr(r->out, "the first 128 of the text's 200 tokens (--tokens"), "200 tokens: %s", r->out);
    r = cli(LOOK "'%0200d' --tokens 140", data, wide, page, 0);
    CHECK(strstr(r->out, "the first 140 of the text's 200 tokens"), "140 of 200 tokens: %s", r->out);
    CHECK_FAILURE(cli(LOOK "'a text'", data, model, model), 1, "is not a page", "a page in place of the checkpoint");
    CHECK_FAILURE(cli("--data %s --html %s --steps 1", data, page), 2, "--html has no effect without --attention",
                  "--html");
    CHECK_FAILURE(cli("--generate x --data %s --lr 1", data), 2, "--lr has no effect with --generate", "--lr");
    CHECK_FAILURE(cli("--generate x --export y"), 2, "give one of them", "two things to do");
#undef LOOK
}

#ifdef TWIN
// ====================================================================================================================
// The twin beside the CPU

enum { TWIN_STEPS = SLOW ? 24 : 200 };

// A row's loss is the difference of two numbers, lse and a logit, each found from rounded ones and rounded: in float32
// four times, by 2^-24 of them. What bfloat16 leaves of the logits is off by more, but as often up as down.
#define LOSS_FLOOR (BFLOAT16 ? COARSER * FLOOR / 8 : 0x1p-22)

// A model in training on a device, from the same weights always, on two batches of random tokens in turn.
typedef struct {
    const Device* on;
    Model model;
    Activations a;
} Trained;

static Trained start_training(const Device* on, Config config, size_t B, int* tokens, int* targets) {
    Trained t;
    memset(&t, 0, sizeof t);
    device = t.on = on;
    make_model(&t.model, config, true, 4);
    device->create_activations(&t.a, &t.model, B, config.T, true);
    for (size_t i = 0; i < 2 * B * config.T; i++) {
        tokens[i] = (int)(random_bits(1, i) % config.V);
        targets[i] = (int)(random_bits(2, i) % config.V);
    }
    return t;
}

static double training_step(Trained* t, const int* tokens, const int* targets, size_t B, size_t step) {
    AdamW o = {0.01, 0.9, 0.95, 0.1, 1, step + 1};
    device = t->on;
    device->forward(&t->model, &t->a, tokens, targets, B, t->model.config.T, 0, true);
    device->backward(&t->model, &t->a, tokens, targets, B, t->model.config.T, 1);
    device->update(&t->model, o);
    return take_loss(&t->model);
}

static void end_training(Trained* t) {
    device = t->on;
    device->free_activations(&t->a);
    device->free_model(&t->model);
    device = &gpu::cuda;
}

// Trains by itself; returns the weights.
static float* train_on(const Device* on, Config config, size_t B, double* losses, size_t* bytes) {
    int tokens[2 * 256], targets[2 * 256];
    Trained t = start_training(on, config, B, tokens, targets);
    for (size_t step = 0; step < TWIN_STEPS; step++)
        losses[step] = training_step(&t, tokens + step % 2 * B * config.T, targets + step % 2 * B * config.T, B, step);
    float* weights = from_device(t.model.weights, t.model.block_size);
    *bytes = t.model.block_size * sizeof(float);
    end_training(&t);
    return weights;
}

// V, T, C, H, L: rows of whole 16 bytes, and odd ones, longer than a tile of attention.
static const Config twin_configs[] = {{40, 20, 32, 2, 2}, {33, 66, 6, 2, 1}};
enum { TWIN_CONFIGS = sizeof twin_configs / sizeof *twin_configs };

// Both take the same steps, and from step to step the twin goes on from the CPU's weights and moments. Otherwise a
// difference in the last bits would grow, since AdamW moves weights whose gradient is nearly 0 as far as others: the CPU
// without fused multiply-adds is 0.02 off the CPU with them after 200 such steps. A pass has the loss to within its
// rounding, that of the largest lse, and the gradient too; so by how much the loss falls in a step is known to the
// gradient's precision. (The CPU without fused multiply-adds is within 0.08 of this bound over 200 steps in float32.
// There lse grows to 15 while the loss falls to 0.0002.) Then both train by themselves, and must have learned.
static void test_twin_trains_alike(void) {
    for (size_t c = 0; c < TWIN_CONFIGS; c++) {
        double on_cpu[TWIN_STEPS], on_twin[TWIN_STEPS], again[TWIN_STEPS], worst = 0;
        size_t bytes, B = c ? 1 : 3, rows = B * twin_configs[c].T;
        int tokens[2 * 256], targets[2 * 256];
        Trained both[2] = {start_training(&cpu, twin_configs[c], B, tokens, targets),
                           start_training(&gpu::cuda, twin_configs[c], B, tokens, targets)};
        Model *ours = &both[0].model, *twins = &both[1].model;
        for (size_t step = 0; step < TWIN_STEPS; step++) {
            size_t n = ours->block_size, at = step % 2 * rows;
            gpu::to_device(twins->weights, ours->weights, n);
            gpu::to_device(twins->moment1, ours->moment1, n);
            gpu::to_device(twins->moment2, ours->moment2, n);
            double before[2], after[2], largest = 0;
            for (int i = 0; i < 2; i++) {
                before[i] = training_step(&both[i], tokens + at, targets + at, B, step);
                device->forward(&both[i].model, &both[i].a, tokens + at, targets + at, B, twin_configs[c].T, 0, false);
                after[i] = take_loss(&both[i].model);
            }
            for (size_t i = 0; i < rows; i++) largest = fmax(largest, fabsf(both[0].a.logits_lse[i]));
            double allowed = LOSS_FLOOR * (1 + largest), fell = COARSER * FLOOR * 4 * fabs(before[0] - after[0]);
            double error = fabs(before[1] - before[0]) / allowed, error2 = fabs(after[1] - after[0]) / (allowed + fell);
            CHECK(error <= 1, "step %zu: the loss is %.7f, on the CPU %.7f", step + 1, before[1], before[0]);
            CHECK(error2 <= 1, "step %zu leaves a loss of %.7f, on the CPU %.7f", step + 1, after[1], after[0]);
            worst = fmax(worst, fmax(error, error2));
        }
        printf("%s: the twin is within %.2f of what rounding allows\n", test_name, worst);
        for (int i = 0; i < 2; i++) end_training(&both[i]);
        const float* w = train_on(&gpu::cuda, twin_configs[c], B, on_twin, &bytes);
        const float* w2 = train_on(&gpu::cuda, twin_configs[c], B, again, &bytes);
        CHECK(!memcmp(on_twin, again, sizeof again) && !memcmp(w, w2, bytes), "the same run has other bits");
        train_on(&cpu, twin_configs[c], B, on_cpu, &bytes);
        double first = on_cpu[0], last = on_cpu[TWIN_STEPS - 1], twins_last = on_twin[TWIN_STEPS - 1];
        CHECK(last < 0.95 * first, "nothing was learned");
        CHECK(fabs(twins_last - last) < 0.1 * (first - last), "alone the twin ends at %.4f, the CPU at %.4f",
              twins_last, last);
        free_borrowed();
    }
}

// Threads and blocks come in any order; no bit may depend on it.
static void test_twin_orders(void) {
#ifdef CUDA_ON_CPU
    static const char* const orders[] = {"forward", "backward", "shuffled"};
    for (size_t c = 0; c < TWIN_CONFIGS; c++) {
        double losses[3][TWIN_STEPS];
        size_t bytes;
        const float* w[3];
        for (int i = 0; i < 3; i++) {
            setenv("CUDA_ON_CPU_ORDER", orders[i], 1);
            w[i] = train_on(&gpu::cuda, twin_configs[c], c ? 1 : 2, losses[i], &bytes);
            CHECK(!memcmp(losses[0], losses[i], sizeof losses[i]) && !memcmp(w[0], w[i], bytes),
                  "threads %s have other bits than forward", orders[i]);
        }
        free_borrowed();
    }
#else
    skip("a GPU's threads come as they please");
#endif
}

// gpu::matmul against train_gpt.c's, on the shapes for which cuBLASLt may have no algorithm, too.
static void test_twin_matmul(void) {
    static const size_t shapes[][3] = {{1, 1, 1}, {1, 40, 24}, {40, 1, 24}, {40, 24, 1}, {16, 24, 40}, {7, 9, 130}};
    for (size_t i = 0; i < 8 * sizeof shapes / sizeof *shapes; i++) {
        size_t M = shapes[i / 8][0], N = shapes[i / 8][1], K = shapes[i / 8][2];
        bool ta = i & 1, tb = i & 2, extras = i & 4;
        float alpha = extras ? 0.75f : 1;
        Both<gpu::real> a(borrow_random(M * K, 1), M * K), b(borrow_random(K * N, 2), K * N),
            bias(borrow_random(N, 3), N), c(extras ? borrow_random(M * N, 4) : NULL, M * N);
        Both<float> sum(borrow_random(M * N, 5), M * N);
        gpu::Matrix ga = ta ? gpu::transposed(a.device, M) : gpu::matrix(a.device, K);
        gpu::Matrix gb = tb ? gpu::transposed(b.device, K) : gpu::matrix(b.device, N);
        Matrix ha = ta ? transposed(a.host, M) : matrix(a.host, K), hb = tb ? transposed(b.host, K) : matrix(b.host, N);
        float *product = borrow(M * N), *got = borrow(M * N);
        matmul(product, ha, hb, NULL, NULL, M, N, K);
        gpu::matmul(c.device, ga, gb, extras ? bias.device : NULL, extras ? c.device : NULL, M, N, K, alpha);
        gpu::matmul(sum.device, ga, gb, NULL, sum.device, M, N, K, alpha);
        for (size_t j = 0; j < M * N; j++) {
            c.host[j] = alpha * product[j] + (extras ? bias.host[j % N] + c.host[j] : 0);
            sum.host[j] += alpha * product[j];
        }
        c.finish(got, "c");
        sum.finish(got, "the sum", 1, cut_off(K));
        free_borrowed();
    }
}

// Models larger than the fixtures', with heads of GPT-2's size, against the CPU: the loss, and all gradients. In float32
// the CPU without fused multiply-adds is up to 1.4e-6 from itself with them here; five times that is allowed.
static void test_twin_large(void) {
    static const struct {
        Config config;
        size_t B;
    } models[] = {{{300, 192, 128, 2, 1}, 1}, {{50257, 1024, 768, 12, 2}, 2}, {{1000, 520, 1600, 25, 1}, 3}};
    for (size_t i = 0; i < (SLOW ? 1 : sizeof models / sizeof *models); i++) {
        Config config = models[i].config;
        size_t B = models[i].B, n = 2 * B * config.T;
        int *tokens = (int*)borrow(n), *targets = (int*)borrow(n);
        double losses[2];
        float* gradients[2];
        Trained both[2] = {start_training(&cpu, config, B, tokens, targets),
                           start_training(&gpu::cuda, config, B, tokens, targets)};
        for (int d = 0; d < 2; d++) {
            Model* m = &both[d].model;
            device = both[d].on;
            device->forward(m, &both[d].a, tokens, targets, B, config.T, 0, true);
            device->backward(m, &both[d].a, tokens, targets, B, config.T, 1);
            losses[d] = take_loss(m);
            gradients[d] = from_device(m->gradients, m->block_size);
        }
        double error = fabs(losses[1] / losses[0] - 1), worst = 0;
        CHECK(error <= LOSS_FLOOR, "the loss is %.7f, on the CPU %.7f", losses[1], losses[0]);
        const Model* m = &both[0].model;
        for (size_t t = 0; t < m->tensor_count; t++) {
            const float *ours = gradients[0] + m->tensors[t].offset, *twins = gradients[1] + m->tensors[t].offset;
            double size = euclidean_norm(ours, m->tensors[t].size);
            double off = euclidean_distance(ours, twins, m->tensors[t].size) / size;
            CHECK(off <= (BFLOAT16 ? 2 * COARSER * FLOOR : 16 * FLOOR),
                  "%zu channels: the gradient of %s differs by %.1e", config.C, m->tensors[t].name, off);
            worst = larger(worst, off);
        }
        printf("%s: %zu channels, loss within %.1e, gradients within %.1e\n", test_name, config.C, error, worst);
        for (int d = 0; d < 2; d++) end_training(&both[d]);
        free_borrowed();
    }
}

// A head in parts, as for more logits than can be counted, has the gradients of one in a piece.
static void test_twin_head(void) {
    enum { B = 2, T = 20, ROWS = B * T };
    const Config config = {300, T, 32, 2, 1};
    size_t whole = gpu::most_logits;
    static const size_t parts[] = {ROWS, 7, 1};
    float *first = NULL, *losses = NULL;
    for (size_t i = 0; i < 3; i++) {
        int tokens[2 * ROWS], targets[2 * ROWS];
        gpu::most_logits = i ? parts[i] * padded_V(config.V) : whole;
        Trained t = start_training(&gpu::cuda, config, B, tokens, targets);
        CHECK(t.a.logit_rows >= parts[i], "%zu rows at a time", t.a.logit_rows);
        for (int twice = 0; twice < 2; twice++) {
            device->forward(&t.model, &t.a, tokens, targets, B, T, 0, true);
            device->backward(&t.model, &t.a, tokens, targets, B, T, 0.5f);
        }
        take_loss(&t.model);
        float *gradients = from_device(t.model.gradients, t.model.block_size),
              *now = activation(&t.a, t.a.losses, ROWS);
        if (!i) first = gradients, losses = now;
        for (size_t row = 0; row < ROWS; row++)
            CHECK(fabsf(now[row] - losses[row]) <= COARSER * FLOOR * losses[row],
                  "%zu rows at a time: row %zu's loss is %g", parts[i], row, now[row]);
        size_t n = t.model.block_size;
        double off = euclidean_distance(gradients, first, n) / euclidean_norm(first, n);
        CHECK(off <= (BFLOAT16 ? 2 * COARSER : 8) * FLOOR, "%zu rows at a time: the gradients differ by %g", parts[i],
              off);
        end_training(&t);
    }
    gpu::most_logits = whole;
    free_borrowed();
}

// A kernel that fails is named if each is waited for; else there is a line that says how to find it. What waits for
// each kernel changes no bit.
static void test_twin_fault(void) {
#ifdef CUDA_ON_CPU
    const char *data = make_data(), *path = in_folder("gpt.safetensors");
#define TRAIN SMALL_MODEL "--data %s --steps 2 --checkpoint %s"
    CHECK_SUCCESS(cli(TRAIN, data, path), "training");
    setenv("CUDA_LAUNCH_BLOCKING", "1", 1);
    CHECK_SUCCESS(cli(TRAIN, data, in_folder("each.safetensors")), "training, kernel by kernel");
    CHECK(same_files(path, in_folder("each.safetensors")), "waiting for each kernel changes the result");
    setenv("CUDA_ON_CPU_FAULT", "clip_kernel", 1);
    CHECK_FAILURE(cli(TRAIN, data, path), 1, "clip_kernel failed: an illegal memory access", "a kernel that fails");
    unsetenv("CUDA_LAUNCH_BLOCKING");
    CHECK_FAILURE(cli(TRAIN, data, path), 1, "CUDA_LAUNCH_BLOCKING=1", "a kernel that fails, seen later");
#undef TRAIN
#else
    skip("a GPU's kernels do not fail when asked to");
#endif
}

// --device cuda:N, --compare on one device and on both, --memory.
static void test_twin_options(void) {
    const char* data = make_data();
    const Result* r;
#define ONE_STEP SMALL_MODEL "--data %s --steps 1 --checkpoint %s "
#ifdef CUDA_ON_CPU
    r = cli(ONE_STEP "--device cuda:1", data, in_folder("gpt.safetensors"));
    CHECK_SUCCESS(r, "--device cuda:1");
    CHECK(strstr(r->out, "place, 2 multiprocessors"), "--device cuda:1 takes the other: %s", r->out);
#endif
    CHECK_FAILURE(cli(ONE_STEP "--device cuda:99", data, in_folder("none")), 1, "there is no GPU 99",
                  "--device cuda:99");
    static const char* const wrong[] = {"cuda:", "cuda:x", "cuda:1x", "cuda:-1", "cuda1", "gpu"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        CHECK_FAILURE(cli(ONE_STEP "--device %s", data, in_folder("none"), wrong[i]), 2, wrong[i], wrong[i]);
#undef ONE_STEP
    static const char* const devices[] = {"--device cpu", "--device cuda", ""};
    for (int i = SLOW ? 1 : 0; i < 3; i++) {
        r = cli("--compare --layers 1 --heads 2 --channels 16 --context 8 --batch 2 %s", devices[i]);
        CHECK_SUCCESS(r, "--compare");
        CHECK(!strstr(r->out, "CPU,") == (i == 1), "%s: %s", devices[i], r->out);
        CHECK(!strstr(r->out, "adamw_kernel") == (i == 0), "%s: %s", devices[i], r->out);
        CHECK(strstr(r->out, "2 x 8 |"), "%s, no last line: %s", devices[i], r->out);
    }
    CHECK_FAILURE(cli("--compare --log x"), 2, "--log has no effect with --compare", "a log of a comparison");
    r = cli("--memory");
    CHECK_SUCCESS(r, "--memory");
    CHECK(strstr(r->out, "gpt2-xl") && strstr(r->out, "recompute"), "--memory says %s", r->out);
}

// A checkpoint of either is resumed by the other; the losses go on as if nothing had happened.
static void test_twin_resume(void) {
    const char *data = make_data(), *path = in_folder("gpt.safetensors"), *log = in_folder("gpt.csv");
    static const char* const devices[] = {"cpu", "cuda"};
    double last[2][2];
    for (int from = 0; from < 2; from++)
        for (int to = 0; to < 2; to++) {
            unlink(path), unlink(log);
            cli(SMALL_MODEL "--data %s --checkpoint %s --log %s --steps 4 --device %s", data, path, log, devices[from]);
            CHECK_SUCCESS(
                cli("--resume --steps 8 --data %s --checkpoint %s --log %s --device %s", data, path, log, devices[to]),
                "resuming");
            char* text = read_file(log, NULL);
            const char* line = text ? strstr(text, "\n8,") : NULL;
            last[from][to] = NAN;
            if (CHECK(line && strstr(text, "\n4,") && strstr(text, "\n5,"), "the log: %s", text))
                sscanf(line, "\n8,%lf", &last[from][to]);
            free(text);
        }
    for (int i = 0; i < 4; i++)
        CHECK(fabs(last[i / 2][i % 2] / last[0][0] - 1) <= COARSER * FLOOR,
              "%s, then %s: the last loss is %.7f, not %.7f", devices[i / 2], devices[i % 2], last[i / 2][i % 2],
              last[0][0]);
}

// Too little memory is one line, whoever asks for it.
static void test_twin_memory(void) {
#ifdef CUDA_ON_CPU
    const char* data = make_data();
    static const char* const sizes[] = {"1000", "34000000", "36000000"};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        setenv("CUDA_ON_CPU_MEMORY", sizes[i], 1);
        CHECK_FAILURE(cli(SMALL_MODEL "--data %s --steps 1 --checkpoint %s", data, in_folder("none")), 1, "MB",
                      sizes[i]);
        CHECK(!exists(in_folder("none")), "a checkpoint of nothing");
    }
#else
    skip("a GPU's memory cannot be made smaller");
#endif
}
#endif

// ====================================================================================================================
// All tests, in the order in which they run

// What a test is of. The twin is only asked for what its device does: the rest is train_gpt.c's.
typedef enum {
    HOST,
    DEVICE,
    RUNS, // of the device: whole runs, where that is slow only in bfloat16
    EXACT // of the device, with numbers to float32's precision
} Part;

static const struct {
    const char* name;
    void (*run)(void);
    Part part;
} tests[] = {
    // Errors and files
    {"replace_file", test_replace_file, HOST},
    {"replace_file_impossible", test_replace_file_impossible, HOST},
    {"map_file", test_map_file, HOST},
    {"allocate", test_allocate, HOST},
    {"cgroup_limit", test_cgroup_limit, HOST},
    // Random numbers
    {"random_bits", test_random_bits, HOST},
    {"random_uniform", test_random_uniform, HOST},
    {"random_normal", test_random_normal, HOST},
    {"shuffled", test_shuffled, HOST},
    {"random_known", test_random_known, HOST},
    // Matrix multiply
    {"matmul_small", test_matmul_small, HOST},
    {"matmul_blocks", test_matmul_blocks, HOST},
    {"matmul_tile", test_matmul_tile, HOST},
    {"matmul_in_part", test_matmul_in_part, HOST},
    {"matmul_not_finite", test_matmul_not_finite, HOST},
    {"matmul_rounding", test_matmul_rounding, HOST},
    {"matmul_bf16", test_matmul_bf16, HOST},
    // Layers and model
    {"exp", test_exp, HOST},
    {"embedding", test_embedding, DEVICE},
    {"embedding_properties", test_embedding_properties, EXACT},
    {"layernorm", test_layernorm, DEVICE},
    {"layernorm_properties", test_layernorm_properties, EXACT},
    {"linear", test_linear, DEVICE},
    {"attention", test_attention, DEVICE},
    {"attention_definition", test_attention_definition, DEVICE},
    {"attention_weights", test_attention_weights, EXACT},
    {"attention_properties", test_attention_properties, EXACT},
    {"attention_gradient", test_attention_gradient, DEVICE},
    {"gelu", test_gelu, DEVICE},
    {"gelu_properties", test_gelu_properties, EXACT},
    {"cross_entropy", test_cross_entropy, DEVICE},
    {"cross_entropy_properties", test_cross_entropy_properties, EXACT},
    {"model", test_model, DEVICE},
    {"model_in_parts", test_model_in_parts, DEVICE},
    {"finite_differences", test_finite_differences, EXACT},
    {"adamw_formula", test_adamw_formula, DEVICE},
    {"adamw_run", test_adamw_run, DEVICE},
    {"initialize", test_initialize, DEVICE},
    {"memory", test_memory, DEVICE},
    {"recompute", test_recompute, DEVICE},
    {"step_operations", test_step_operations, HOST},
    // Tokenizer
    {"tokenizer_bytes", test_tokenizer_bytes, HOST},
    {"tokenizer_merges", test_tokenizer_merges, HOST},
    {"tokenizer_order", test_tokenizer_order, HOST},
    {"tokenizer_collision", test_tokenizer_collision, HOST},
    {"tokenizer_pieces", test_tokenizer_pieces, HOST},
    {"utf8_character", test_utf8_character, HOST},
    {"tokenizer_room", test_tokenizer_room, HOST},
    {"tokenizer_long_pieces", test_tokenizer_long_pieces, HOST},
    {"tokenizer_damaged", test_tokenizer_damaged, HOST},
    {"tokenizer_gpt2", test_tokenizer_gpt2, HOST},
    // Data loader
    {"data_epochs", test_data_epochs, HOST},
    {"data_known", test_data_known, HOST},
    {"data_mark", test_data_mark, HOST},
    {"data_counts", test_data_counts, HOST},
    {"data_damaged", test_data_damaged, HOST},
    // Checkpoint
    {"checkpoint_round_trip", test_checkpoint_round_trip, DEVICE},
    {"half_to_float", test_half_to_float, HOST},
    {"checkpoint_import", test_checkpoint_import, HOST},
    {"checkpoint_parts", test_checkpoint_parts, HOST},
    {"checkpoint_heads", test_checkpoint_heads, HOST},
    {"checkpoint_foreign", test_checkpoint_foreign, HOST},
    {"checkpoint_incomplete", test_checkpoint_incomplete, HOST},
    {"checkpoint_json", test_checkpoint_json, HOST},
    {"checkpoint_damaged", test_checkpoint_damaged, HOST},
    {"export", test_export, HOST},
    // Generation
    {"utf8_print", test_utf8_print, HOST},
    {"sample_token", test_sample_token, HOST},
    {"sample_not_finite", test_sample_not_finite, HOST},
    {"generation_cache", test_generation_cache, DEVICE},
    {"generation_16_bits", test_generation_16_bits, HOST},
    {"row_16_bits", test_row_16_bits, HOST},
    {"generation_window", test_generation_window, HOST},
    {"generation_cli", test_generation_cli, HOST},
    // Training
    {"threads", test_threads, HOST},
    {"precision", test_precision, HOST},
    {"resume", test_resume, HOST},
    {"keep_old", test_keep_old, HOST},
    {"advice", test_advice, HOST},
    {"resume_lr", test_resume_lr, HOST},
    {"resume_elsewhere", test_resume_elsewhere, HOST},
    {"accumulate", test_accumulate, RUNS},
    {"log", test_log, HOST},
    {"validation", test_validation, HOST},
    // Variants
    {"variants", test_variants, HOST},
    // Looking at attention
    {"view_weights", test_view_weights, DEVICE},
    {"view_patterns", test_view_patterns, HOST},
    {"view_choice", test_view_choice, HOST},
    {"view_correlation", test_view_correlation, HOST},
    {"view_ablation", test_view_ablation, DEVICE},
    {"float_to_half", test_float_to_half, HOST},
    {"eval", test_eval, HOST},
    {"attention_cli", test_attention_cli, HOST},
#ifdef TWIN
    // The twin beside the CPU
    {"twin_matmul", test_twin_matmul, DEVICE},
    {"twin_head", test_twin_head, DEVICE},
    {"twin_large", test_twin_large, DEVICE},
    {"twin_fault", test_twin_fault, RUNS},
    {"twin_options", test_twin_options, RUNS},
    {"twin_trains_alike", test_twin_trains_alike, DEVICE},
    {"twin_orders", test_twin_orders, DEVICE},
    {"twin_resume", test_twin_resume, RUNS},
    {"twin_memory", test_twin_memory, DEVICE},
#endif
    // Command line
    {"help", test_help, HOST},
    {"option_values", test_option_values, HOST},
    {"option_names", test_option_names, HOST},
    {"option_meaning", test_option_meaning, HOST},
    {"cli_failures", test_cli_failures, HOST},
    {"cli_folder_name", test_cli_folder_name, HOST},
    {"cli_mismatch", test_cli_mismatch, HOST},
    {"cli_full_disk", test_cli_full_disk, HOST},
    {"cli_nan", test_cli_nan, RUNS},
    {"cli_tokenize", test_cli_tokenize, HOST},
};

enum { TESTS = sizeof tests / sizeof *tests, FAILED = 3, SKIPPED = 77 };

// Raises a signal in the middle of a training run: at its update number signal_at.
static int signal_number, signal_at, updates;
static void (*real_update)(Model* model, AdamW o);

static void update_and_raise(Model* model, AdamW o) {
    if (++updates == signal_at) raise(signal_number);
    real_update(model, o);
}

static int run_cli(int argc, char** argv) {
    static Device interrupted;
    if (signal_at) {
        interrupted = *device;
        real_update = device->update;
        interrupted.update = update_and_raise;
        device = &interrupted;
    }
    return train_gpt(argc, argv);
}

static int run_test(const char* name) {
    for (size_t i = 0; i < TESTS; i++)
        if (!strcmp(tests[i].name, name)) {
            test_name = name;
            tests[i].run();
            fflush(stdout);
            return failures ? FAILED : skipped ? SKIPPED : 0;
        }
    return FAILED;
}

static int remove_one(const char* path, const struct stat* info, int type, struct FTW* place) {
    (void)info, (void)type, (void)place;
    return remove(path);
}

// Whether a test's name contains one of these words, or there are no words.
static bool chosen(const char* name, char** words) {
    bool any = !*words;
    for (; *words && !any; words++) any = strstr(name, *words);
    return any;
}

static volatile sig_atomic_t interrupted_by;
static void on_interrupt(int number) { interrupted_by = number; }

int main(int argc, char** argv) {
    prepare_threads(argv);
    if (argc > 4 && !strcmp(argv[1], "--signal")) {
        signal_at = atoi(argv[2]);
        signal_number = atoi(argv[3]);
        argc -= 3;
        argv += 3;
    }
    if (argc > 1 && !strcmp(argv[1], "--cli")) return run_cli(argc - 1, argv + 1);
    const char* precision = getenv("GPT_TEST_PRECISION"); // of the CPU's products: bf16, or fp32
    if (precision && !TWINS) opt.precision = precision, choose_precision(2, "GPT_TEST_PRECISION: ");
    if (bf16) pair_kernel = find_pair_kernel(false); // even where it is not faster
    if (argc == 4 && !strcmp(argv[1], "--test")) {
        setvbuf(stdout, NULL, _IOLBF, 0);
        folder = argv[3];
        alarm(900); // a test that hangs is ended by a signal
        int status = run_test(argv[2]);
        _exit(status);
    }
    bool verbose = argc > 1 && !strcmp(argv[1], "-v");
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (verbose) setenv("GPT_TEST_VERBOSE", "1", 1);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    setenv("ASAN_OPTIONS", "detect_leaks=0", 0); // an error ends the program without tidying up
    setenv("OMP_WAIT_POLICY", "passive", 0);     // threads that wait leave the cores to those that work
    int passed = 0, failed = 0, left_out = 0;
    for (size_t i = 0; i < TESTS && !interrupted_by; i++) {
        if (!chosen(tests[i].name, argv + 1 + verbose)) continue;
        if (TWINS && (tests[i].part == HOST || tests[i].part == (SLOW && !BFLOAT16 ? RUNS : HOST))) continue;
        if (BFLOAT16 && tests[i].part == EXACT) continue;
        char own[] = "build/test.XXXXXX";
        mkdir("build", 0777);
        if (!mkdtemp(own)) {
            printf("cannot make a folder in build/: %s\n", strerror(errno));
            return 1;
        }
        double start = seconds();
        pid_t id = fork();
        char* arguments[] = {argv[0], (char*)"--test", (char*)tests[i].name, own, NULL};
        if (id == 0) restart(arguments);
        int status = 0;
        while (waitpid(id, &status, 0) < 0 && errno == EINTR) {
        }
        if (WIFSIGNALED(status)) printf("%s: ended by signal %d\n", tests[i].name, WTERMSIG(status));
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : FAILED;
        if (code && code != FAILED && code != SKIPPED)
            printf("%s: the program under test ended this test with status %d\n", tests[i].name, code);
        if (verbose)
            printf("%-40s %s  %.2f s\n", tests[i].name,
                   code == 0         ? "passed"
                   : code == SKIPPED ? "skipped"
                                     : "FAILED",
                   seconds() - start);
        passed += code == 0;
        left_out += code == SKIPPED;
        failed += code != 0 && code != SKIPPED;
        nftw(own, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    }
    if (!(passed + failed + left_out)) printf("no test has such a name\n");
    printf("%d passed, %d failed", passed, failed);
    if (left_out) printf(", %d skipped", left_out);
    putchar('\n');
    return failed || interrupted_by || !(passed + left_out);
}

// lesson.h: what the lessons share: numbers to work on, a check of each step's results, and a stopwatch.
//
// A lesson runs its steps one after the other; each computes the same as the one before, a little better. First they
// are checked on small shapes with awkward edges against train_gpt.c's function on the same numbers, then timed on a
// large one. On a CPU there is nothing to time: that is for finding errors in kernels, and says nothing about a GPU.

#define NO_MAIN
#include "../../../train_gpt.cu"

#include <functional>

namespace gpu {

static bool timing;
static double machine_peak, machine_copy, last_ms; // operations and bytes a second; the step before
static std::vector<void*> memory_taken;            // by the shape at work
static std::vector<float*> host_taken;

struct Expected {
    std::function<void()> clear;
    std::function<void(const char* step)> compare;
};
static std::vector<Expected> expected;

inline void round_to(float* to, float x) { *to = x; }
inline void round_to(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

template <typename S> static S* room(size_t n) {
    memory_taken.push_back(device_memory<S>(n, "a lesson"));
    return (S*)memory_taken.back();
}
static float* host_room(size_t n) {
    host_taken.push_back((float*)allocate(n, sizeof(float), "a lesson"));
    return host_taken.back();
}

// Numbers spread evenly from -1 to 1, on the device and, rounded likewise, on the host.
template <typename S> static S* numbers(size_t n, const float** host) {
    static uint64_t key;
    S *copy = (S*)allocate(n, sizeof(S), "a lesson"), *to = room<S>(n);
    float* exact = host_room(n);
    key++;
#pragma omp parallel for
    for (size_t i = 0; i < n; i++) {
        round_to(&copy[i], (float)(2 * random_uniform(key, i) - 1));
        exact[i] = to_float(copy[i]);
    }
    upload(to, copy, n * sizeof(S));
    free(copy);
    *host = exact;
    return to;
}

// The steps that follow must leave in `result` (n) what is in `right`, or add it to what is there if `adds`. Numbers
// may be wrong by some part of themselves and of the average number, which is the rounding's where they are bfloat16.
template <typename S> static void expect(const char* what, S* result, const float* right, size_t n, bool adds = false) {
    Expected e;
    e.clear = [=] { check(cudaMemsetAsync(result, adds ? 0 : 0xFF, n * sizeof(S), stream)); }; // of 0xFF bytes: NaN
    e.compare = [=](const char* step) {
        S* copy = (S*)allocate(n, sizeof(S), "a lesson");
        download(copy, result, n * sizeof(S));
        double squares = 0, error = 0, allowed = sizeof(S) == 2 ? 1.0 / 32 : 1e-4;
        for (size_t i = 0; i < n; i++) squares += (double)right[i] * right[i];
        for (size_t i = 0; i < n; i++) {
            double e_i = fabs(to_float(copy[i]) - right[i]) / (fabs(right[i]) + sqrt(squares / (double)n) + 1e-30);
            error = e_i <= error ? error : e_i; // NaN stays
        }
        free(copy);
        if (!(error <= allowed)) die("%s: %s is wrong by %.1e, allowed is %.1e", step, what, error, allowed);
        printf("  %s %.1e", what, error);
    };
    expected.push_back(e);
}

// A step. bytes: what must at least be read and written; operations: what is to be computed, or 0 if that is nothing
// beside the bytes.
template <typename Work> static void step(const char* name, double bytes, double operations, Work work) {
    for (auto& e : expected) e.clear();
    if (!timing) {
        printf("%-34s", name);
        work();
        for (auto& e : expected) e.compare(name);
        puts("");
        return;
    }
    static cudaEvent_t begin, end;
    if (!begin) check(cudaEventCreate(&begin));
    if (!end) check(cudaEventCreate(&end));
    float ms = 0;
    for (int times = 1; times <= 20; times += 19) { // once as a trial
        check(cudaEventRecord(begin, stream));
        for (int i = 0; i < times; i++) work();
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        check(cudaEventElapsedTime(&ms, begin, end));
        ms /= (float)times;
    }
    printf("%-34s %9.3f ms", name, ms);
    if (operations > 0)
        printf(" %9.2f TFLOP/s %5.1f%%", operations / ms * 1e-9, 100 * operations / machine_peak / (ms * 1e-3));
    else
        printf(" %9.1f GB/s    %5.1f%%", bytes / ms * 1e-6, 100 * bytes / machine_copy / (ms * 1e-3));
    if (last_ms > 0) printf(" %7.2fx", last_ms / ms);
    putchar('\n');
    last_ms = ms;
}

// Frees what a shape has taken. A line between groups of steps that are not to be compared.
static void finish(void) {
    check(cudaStreamSynchronize(stream));
    for (void* p : memory_taken) check(cudaFree(p));
    for (float* p : host_taken) free(p);
    memory_taken.clear(), host_taken.clear(), expected.clear();
    last_ms = 0;
}

// Whether there is something to time, and the table's head.
static bool time_steps(void) {
#ifdef CUDA_ON_CPU
    return false;
#endif
    timing = true;
    machine_peak = peak();
    machine_copy = copy_rate();
    printf("\n%s: cuBLASLt's rate for 4096 x 4096 matrices is %.1f TFLOP/s, a copy's %.0f GB/s.\n"
           "%-34s %12s %17s %6s %8s\n",
           start(), machine_peak * 1e-12, machine_copy * 1e-9, "", "time", "rate", "of it", "before");
    return true;
}

} // namespace gpu

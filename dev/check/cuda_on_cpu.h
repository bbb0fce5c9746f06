// cuda_on_cpu.h: runs CUDA kernels on the CPU, to test them on machines without a GPU and to step through them.
//
//     make train_gpt_cu_on_cpu && gdb --args ./train_gpt_cu_on_cpu --steps 2 --layers 1 --channels 32
//     (gdb) break layernorm_forward_kernel<1> if threadIdx.x == 33
//
// It takes the place of the CUDA Toolkit's headers, is included by train_gpt.cu after train_gpt.c, and is slow. It is
// not there to imitate a GPU that happens to get away with an error, but to make errors show:
//
//     threads     are fibers: each runs alone until it waits for others. CUDA_ON_CPU_ORDER=forward, backward or shuffled
//                 says who comes first, threads and blocks. A barrier is missing where the order changes the result.
//     barriers    must be reached by all threads of the block at the same line, and what a warp does together by all
//                 its lanes. If not, that is an error.
//     memory      of the device and shared memory end at a page that cannot be touched, are full of NaN at first, and
//                 are looked after on their other side. The host cannot touch the device's memory.
//     copies      in the background (cp.async) destroy what they will overwrite at once, and arrive when waited for.
//     streams     do nothing until somebody waits for them, each for itself. So what the host reads or overwrites too
//                 soon is seen, and what one stream takes from another without waiting. With CUDA_ON_CPU_ORDER=backward
//                 all but the first are as early as they may be, instead: so is what they take before it is there.
//     addresses   of more than a number at a time must be multiples of its size, which x86 would not ask for.
//     multiplies  of bfloat16 cut off what the matrix units cut off, cuBLASLt adds in an order that depends on the
//                 shape, knows no way to multiply by a single row or column, nor, at times, to fold GELU in: all that it
//                 may do, too.
//
//     NCCL        is MPI's messages between as many such processes, in a program built with WITH_MPI.
//
// Every such error is one line on stderr and exit status 1.

#include <deque>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(threads)
#define __shared__ static // a block runs at a time; but this kind of shared memory is not looked after

// ====================================================================================================================
// Types

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }

// A bfloat16 is the upper half of a float, rounded to the nearest, of two equally near ones to the even one.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static inline __nv_bfloat16 __float2bfloat16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return {0x7FFF}; // as the device writes NaN
    return {(uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}

// What a kernel finds out about its place.
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// ====================================================================================================================
// Errors

static const char* kernel_name; // of the kernel that runs, or NULL
static bool in_thread;          // one of its threads runs, not what goes on between them

// One line that says what is wrong and where. It may be called by a signal's handler.
__attribute__((noreturn, format(printf, 1, 2))) static void wrong(const char* format, ...) {
    char text[1024];
    int n = snprintf(text, sizeof text, "cuda_on_cpu: ");
    if (kernel_name)
        n += snprintf(text + n, 300, "%.200s, block (%u,%u,%u)", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z);
    if (kernel_name && in_thread)
        n += snprintf(text + n, 100, ", thread (%u,%u,%u)", threadIdx.x, threadIdx.y, threadIdx.z);
    if (kernel_name) n += snprintf(text + n, 3, ": ");
    va_list args;
    va_start(args, format);
    n += vsnprintf(text + n, sizeof text - 1 - (size_t)n, format, args);
    va_end(args);
    n = n < (int)sizeof text - 1 ? n : (int)sizeof text - 2;
    text[n++] = '\n';
    fflush(stdout);
    if (write(2, text, (size_t)n) < 0) _exit(2);
    _exit(1);
}

// ====================================================================================================================
// Memory

enum { PAGE = 4096, GUARD = 1 << 20, POISON = 0xFF }; // of 0xFF bytes, a float is NaN and an index -1

// Memory that ends, but for what fills up 16 bytes, where a guard begins. What lies before it up to the page's start,
// its margin, cannot be guarded so: it is poisoned, and must stay so.
struct Region {
    char *map, *begin;
    size_t size, room; // as asked for; and in whole pages
    bool shared, freed;
};
static std::vector<Region> regions;

static Region make_region(size_t size, bool shared) {
    Region r = {NULL, NULL, size, size / PAGE * PAGE + PAGE, shared, false};
    void* p = mmap(NULL, r.room + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return r;
    r.map = (char*)p;
    mprotect(r.map + GUARD, r.room, PROT_READ | PROT_WRITE);
    memset(r.map + GUARD, POISON, min_size(r.room, 1 << 18)); // all that tests use; the rest stays untouched, for speed
    memset(r.map + GUARD + r.room - PAGE, POISON, PAGE);
    r.begin = r.map + GUARD + r.room - (size + 15) / 16 * 16;
    regions.push_back(r);
    return r;
}

static void look_after(const Region& r) {
    if (r.freed) return;
    for (const char* p = r.map + GUARD; p < r.begin; p++)
        if (*p != (char)POISON)
            wrong("something was written %td bytes before memory of %zu bytes", r.begin - p, r.size);
    for (const char* p = r.begin + r.size; p < r.map + GUARD + r.room; p++)
        if (*p != (char)POISON)
            wrong("something was written %td bytes beyond memory of %zu bytes", p - r.begin - (ptrdiff_t)r.size,
                  r.size);
}

// The device's memory cannot be touched but while the device is at work.
static bool memory_is_open;
static void open_memory(bool open) {
    if (open == memory_is_open) return;
    memory_is_open = open;
    for (const Region& r : regions)
        if (!r.shared && !r.freed) mprotect(r.map + GUARD, r.room, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

static const Region* region_of(const void* p) {
    for (const Region& r : regions)
        if (r.map <= (const char*)p && (const char*)p < r.map + r.room + 2 * GUARD) return &r;
    return NULL;
}

// That `bytes` from p on are the device's.
static void expect_device(const void* p, size_t bytes, const char* what) {
    const Region* r = region_of(p);
    if (!r || r->shared || r->freed) wrong("%s is not in the device's memory", what);
    if ((const char*)p < r->begin || (const char*)p + bytes > r->begin + r->size)
        wrong("%s reaches beyond memory of %zu bytes", what, r->size);
}
static void expect_host(const void* p, const char* what) {
    if (region_of(p)) wrong("%s is in the device's memory", what);
}

static void on_bad_access(int number, siginfo_t* info, void*) {
    const char* p = (const char*)info->si_addr;
    const Region* r = region_of(p);
    if (r && r->freed) wrong("memory of %zu bytes is used after it was freed", r->size);
    const char* kind = r && r->shared ? "shared memory" : "memory";
    if (r && p >= r->map + GUARD + r->room)
        wrong("%td bytes beyond %s of %zu bytes", p - r->begin - (ptrdiff_t)r->size, kind, r->size);
    if (r && p < r->map + GUARD) wrong("%td bytes before %s of %zu bytes", r->begin - p, kind, r->size);
    if (r) wrong("the host reads or writes the device's memory");
    if (kernel_name) wrong("a wild address, %p", (const void*)p);
    signal(number, SIG_DFL); // nothing of ours: the instruction is tried again, and ends the program
}

// ====================================================================================================================
// Threads
//
// A fiber has a stack of its own and is switched to by setting the stack pointer. A block's fibers are taken warp by
// warp: each lane runs until it waits or is done; then, if all wait for the same thing that a warp does together, that
// is done and they go on; if they wait for the block, it is the next warp's turn. Fibers are made once, and used again
// by every block.

enum { MAX_THREADS = 1024, LANES_OF_WARP = 32, STACK = 1 << 16, MOST_SHARED = 99 << 10 }; // 99 KB: compute 8.6's limit

typedef void (*Together)(void** lanes); // what a warp does together; `lanes` are the lanes' operands
enum State { READY, IN_WARP, IN_BLOCK, DONE };

struct Copy { // on its way to shared memory
    void* to;
    const void* from; // NULL: zeros
    size_t bytes, group;
};

struct Fiber {
    void* context[5]; // __builtin_setjmp's
    uint3 index;
    State state;
    int line;          // where it waits
    Together together; // for what
    void* operand;
    std::deque<Copy> copies;
    size_t groups; // of copies, so far
};

static Fiber fibers[MAX_THREADS];
static Fiber* running;
static size_t fibers_made;
static void* scheduler[5];
static size_t first_lane, lane_count, lanes_run, lane_order[LANES_OF_WARP]; // of the warp whose turn it is
static std::function<void()> body;                                          // the kernel with its arguments
static const Region* shared;                                                // memory of the block

// To the next lane of the warp, or, after the last, back. (noipa: who calls these must not think that he knows which
// registers they change, since others run meanwhile.)
__attribute__((noreturn, noipa)) static void switch_lanes(void) {
    while (lanes_run < lane_count) {
        running = &fibers[first_lane + lane_order[lanes_run++]];
        if (running->state == DONE) continue;
        __builtin_longjmp(running->context, 1);
    }
    __builtin_longjmp(scheduler, 1);
}

__attribute__((noipa)) static void wait_as(State state, int line, Together together, void* operand) {
    running->state = state;
    running->line = line;
    running->together = together;
    running->operand = operand;
    if (!__builtin_setjmp(running->context)) switch_lanes();
    threadIdx = running->index;
    running->state = READY;
}

static ucontext_t creator;
static void fiber_main(void) {
    if (!__builtin_setjmp(running->context)) setcontext(&creator);
    for (;;) {
        threadIdx = running->index;
        running->state = READY;
        body();
        wait_as(DONE, 0, NULL, NULL);
    }
}

static void make_fibers(size_t count) {
    for (; fibers_made < count; fibers_made++) {
        static ucontext_t made;
        void* stack = mmap(NULL, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) die("no memory for a fiber");
        mprotect(stack, PAGE, PROT_NONE);
        running = &fibers[fibers_made];
        getcontext(&made);
        made.uc_stack.ss_sp = stack;
        made.uc_stack.ss_size =
            STACK + PAGE - fibers_made % 16 * 256; // else all would want the same places of the cache
        makecontext(&made, fiber_main, 0);
        swapcontext(&creator, &made);
    }
}

__attribute__((noipa)) static void run_lanes(void) {
    lanes_run = 0;
    in_thread = true;
    if (!__builtin_setjmp(scheduler)) switch_lanes();
    in_thread = false;
}

// Runs a warp until all its lanes wait for the block or are done.
static void run_warp(size_t first, size_t count) {
    first_lane = first;
    lane_count = count;
    for (;;) {
        run_lanes();
        void* operands[LANES_OF_WARP];
        const Fiber *f = &fibers[first], *waiting = NULL;
        for (size_t i = 0; i < count; i++) {
            operands[i] = f[i].operand;
            if (f[i].state == IN_WARP) waiting = &f[i];
        }
        if (!waiting) return;
        for (size_t i = 0; i < LANES_OF_WARP; i++) {
            if (i < count && f[i].together == waiting->together && f[i].line == waiting->line) continue;
            char there[32] = "is done";
            if (i < count && f[i].state != DONE) snprintf(there, sizeof there, "waits in line %d", f[i].line);
            wrong("threads from %zu on are to do something together in line %d, but thread %zu %s", first,
                  waiting->line, first + i, i < count ? there : "does not exist");
        }
        waiting->together(operands);
    }
}

enum Order { FORWARD, BACKWARD, SHUFFLED };
static Order chosen_order(void) {
    const char* text = getenv("CUDA_ON_CPU_ORDER");
    if (!text || !strcmp(text, "forward")) return FORWARD;
    if (!strcmp(text, "backward")) return BACKWARD;
    if (!strcmp(text, "shuffled")) return SHUFFLED;
    die("CUDA_ON_CPU_ORDER is forward, backward or shuffled, not '%s'", text);
}
static size_t in_order(Order order, size_t i, size_t n, uint64_t key) {
    return order == FORWARD ? i : order == BACKWARD ? n - 1 - i : (size_t)shuffled(i, n, key);
}

static void run_block(Order order, uint64_t key) {
    size_t threads = (size_t)blockDim.x * blockDim.y * blockDim.z, warps = (threads + 31) / 32, waiting = 0;
    memset(shared->begin, POISON, shared->size);
    for (size_t i = 0; i < threads; i++) {
        Fiber* f = &fibers[i];
        f->index.x = (unsigned)i % blockDim.x;
        f->index.y = (unsigned)i / blockDim.x % blockDim.y;
        f->index.z = (unsigned)i / blockDim.x / blockDim.y;
        f->state = READY;
        f->copies.clear();
        f->groups = 0;
    }
    do {
        for (size_t i = 0; i < warps; i++) {
            size_t first = in_order(order, i, warps, key) * LANES_OF_WARP,
                   count = min_size(LANES_OF_WARP, threads - first);
            for (size_t k = 0; k < count; k++) lane_order[k] = in_order(order, k, count, key + i);
            run_warp(first, count);
        }
        key += warps;
        waiting = 0;
        for (size_t i = 0; i < threads; i++) {
            waiting += fibers[i].state == IN_BLOCK;
            if (fibers[i].state == fibers[0].state && fibers[i].line == fibers[0].line) continue;
            char one[32] = "is done", other[32] = "is done";
            if (fibers[0].state != DONE) snprintf(one, sizeof one, "waits in line %d", fibers[0].line);
            if (fibers[i].state != DONE) snprintf(other, sizeof other, "waits in line %d", fibers[i].line);
            wrong("not all threads reach a barrier: thread 0 %s, thread %zu %s", one, i, other);
        }
    } while (waiting);
    look_after(*shared);
}

// CUDA_ON_CPU_FAULT=NAME: the kernel of that name fails, as one does on a device: those who wait for it are told, and
// nothing works from then on.
static bool has_failed;

static void run_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                       const std::function<void()>& work) {
    const char* fault = getenv("CUDA_ON_CPU_FAULT");
    if (fault && !strcmp(fault, name)) has_failed = true;
    if (has_failed) return;
    static uint64_t launches;
    static std::map<size_t, Region> shared_of_size;
    if (!shared_of_size.count(shared_bytes)) shared_of_size[shared_bytes] = make_region(shared_bytes, true);
    uint64_t key = random_bits(++launches, 0);
    Order order = chosen_order();
    shared = &shared_of_size[shared_bytes];
    gridDim = grid;
    blockDim = block;
    kernel_name = name;
    body = work;
    make_fibers((size_t)block.x * block.y * block.z);
    size_t blocks = (size_t)grid.x * grid.y * grid.z;
    for (size_t i = 0; i < blocks; i++) {
        size_t at = in_order(order, i, blocks, key);
        blockIdx.x = (unsigned)(at % grid.x);
        blockIdx.y = (unsigned)(at / grid.x % grid.y);
        blockIdx.z = (unsigned)(at / grid.x / grid.y);
        run_block(order, key + i);
    }
    for (const Region& r : regions)
        if (!r.shared) look_after(r);
    kernel_name = NULL;
}

// ====================================================================================================================
// Streams
//
// A stream is a queue of work, done when somebody waits for it. While work is captured, it goes to a graph instead. The
// stream called NULL waits for no other here: CUDA's does not wait for those made with cudaStreamNonBlocking.

typedef std::function<void()> Task;
typedef std::function<bool()> Condition;
struct Work {
    Task task;
    Condition may_begin; // of what waits for another stream; else empty
    Task wait;           // makes it so
};
struct Stream {
    std::deque<Work> queue;
    bool runs_early;
};
static Stream null_stream;
static std::vector<Stream*> streams = {&null_stream};
static const Stream* capturing;     // NULL: none is
static std::vector<Task>* captured; // by it

static Stream* stream_of(Stream* stream) { return stream ? stream : &null_stream; }

static void work_early(Stream* stream) {
    std::deque<Work>& queue = stream->queue;
    bool was_open = memory_is_open;
    while (!queue.empty() && (!queue.front().may_begin || queue.front().may_begin())) {
        Task task = queue.front().task;
        queue.pop_front();
        open_memory(true);
        task();
    }
    open_memory(was_open);
}

static void enqueue(Stream* stream, const Task& task, const Condition& may_begin = {}, const Task& wait = {}) {
    if (capturing == stream_of(stream)) return captured->push_back(task);
    stream_of(stream)->queue.push_back({task, may_begin, wait});
    if (stream && stream->runs_early) work_early(stream);
}

// Does what is queued, or only as much as makes `done` true. Memory then stays open, since opening and closing takes long.
static void work_until(Stream* stream, const Condition& done = {}) {
    std::deque<Work>& queue = stream_of(stream)->queue;
    if (!queue.empty()) open_memory(true);
    while (!queue.empty() && !(done && done())) {
        Work work = queue.front();
        queue.pop_front();
        if (work.may_begin && !work.may_begin()) work.wait();
        work.task();
    }
    if (!done) open_memory(false);
}

static void expect_argument(const char* name, const void* p) {
    const Region* r = region_of(p);
    if (p && (!r || r->shared || r->freed)) wrong("%s is given a pointer that is not to the device's memory", name);
}
template <typename T> static void check_argument(const char* name, const T& argument) {
    if constexpr (std::is_pointer<T>::value) expect_argument(name, (const void*)argument);
}

template <typename... Parameters, typename... Arguments>
static void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   Stream* stream, Arguments... arguments) {
    size_t threads = (size_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        wrong("%s is launched with a grid of (%u,%u,%u)", name, grid.x, grid.y, grid.z);
    if (!threads || threads > MAX_THREADS) wrong("%s is launched with blocks of %zu threads", name, threads);
    if (shared_bytes > MOST_SHARED) wrong("%s is launched with %zu bytes of shared memory", name, shared_bytes);
    std::tuple<Parameters...> kept(static_cast<Parameters>(arguments)...);
    enqueue(stream, [=] {
        std::apply([&](const Parameters&... p) { (check_argument(name, p), ...); }, kept);
        run_kernel(name, grid, block, shared_bytes, [&] { std::apply(kernel, kept); });
    });
}
} // namespace cuda_on_cpu

template <typename T> static inline T* shared_memory() { return (T*)cuda_on_cpu::shared->begin; }

static inline void expect_aligned(const void* p, size_t to) {
    if ((size_t)p % to) cuda_on_cpu::wrong("%zu bytes at once, at an address that is not a multiple of that", to);
}

// ====================================================================================================================
// What threads do together. The line of the call tells whether they are at the same place.

static inline void __syncthreads(int line = __builtin_LINE()) {
    cuda_on_cpu::wait_as(cuda_on_cpu::IN_BLOCK, line, NULL, NULL);
}

namespace cuda_on_cpu {
static void in_warp(Together together, int line, void* operand, unsigned mask = 0xffffffff) {
    if (mask != 0xffffffff) wrong("in line %d, not all lanes are named; that is not supported here", line);
    wait_as(IN_WARP, line, together, operand);
}

template <typename T> struct Shuffle {
    T mine, result;
    unsigned from;
};
template <typename T> static void shuffle_together(void** lanes) {
    for (size_t i = 0; i < LANES_OF_WARP; i++) {
        Shuffle<T>* s = (Shuffle<T>*)lanes[i];
        s->result = ((Shuffle<T>*)lanes[s->from])->mine;
    }
}
template <typename T> static T shuffle(unsigned mask, T x, unsigned from, int line) {
    Shuffle<T> s = {x, x, from};
    in_warp(shuffle_together<T>, line, &s, mask);
    return s.result;
}
static unsigned lane() { return (unsigned)(running - fibers) % LANES_OF_WARP; }
} // namespace cuda_on_cpu

static inline void __syncwarp(unsigned mask = 0xffffffff, int line = __builtin_LINE()) {
    cuda_on_cpu::in_warp([](void**) {}, line, NULL, mask);
}
template <typename T> static inline T __shfl_sync(unsigned mask, T x, int from, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, x, (unsigned)from % 32, line);
}
template <typename T> static inline T __shfl_xor_sync(unsigned mask, T x, int bits, int line = __builtin_LINE()) {
    return cuda_on_cpu::shuffle(mask, x, (cuda_on_cpu::lane() ^ (unsigned)bits) % 32, line);
}

// The matrix units' instructions, from the PTX manual's figures: in which lane and register an element lies.

namespace cuda_on_cpu {
struct LoadMatrix {
    uint32_t* r;
    const void* row;
};
template <bool TRANSPOSED> static void load_matrices(void** lanes) {
    uint16_t m[4][8][8];
    for (int i = 0; i < 32; i++) {
        const char* row = (const char*)((LoadMatrix*)lanes[i])->row;
        if ((size_t)row % 16) wrong("ldmatrix: lane %d's row does not begin at a multiple of 16 bytes", i);
        if (row < shared->begin || row + 16 > shared->begin + shared->size)
            wrong("ldmatrix: lane %d's row is outside of shared memory", i);
        memcpy(m[i / 8][i % 8], row, 16);
    }
    for (int i = 0; i < 32; i++)
        for (int k = 0; k < 4; k++) {
            int row = i / 4, column = i % 4 * 2;
            uint32_t low = TRANSPOSED ? m[k][column][row] : m[k][row][column];
            uint32_t high = TRANSPOSED ? m[k][column + 1][row] : m[k][row][column + 1];
            ((LoadMatrix*)lanes[i])->r[k] = low | high << 16;
        }
}

static uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// sums (N) += x (depth) times y (depth,N), as a matrix unit does it. Products of bfloat16s are exact. They and the sum
// so far are brought to the exponent of the largest of them, what then lies below the 24th bit is cut off, and so it is
// when the new sum is stored. (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025,
// "Accurate models of NVIDIA tensor cores": A100 and H100 keep one or two bits more, depth is 8 and 16.)
static void add_truncated(float* sums, const float* x, const float* y, size_t depth, size_t N) {
    enum { PART = 64 };
    for (size_t first = 0; first < N; first += PART) {
        size_t n = min_size(PART, N - first);
        float *to = sums + first, largest[PART], total[PART];
        int32_t fixed[PART]; // in units of the largest number's last bit: 17 numbers below 2^24 at most
        for (size_t j = 0; j < n; j++) largest[j] = fabsf(total[j] = to[j]);
        for (size_t k = 0; k < depth; k++)
#pragma omp simd
            for (size_t j = 0; j < n; j++) {
                float product = x[k] * y[k * N + first + j];
                total[j] += product;
                largest[j] = fabsf(product) > largest[j] ? fabsf(product) : largest[j];
            }
        float unit[PART], per_unit[PART];
        bool plain[PART]; // zeros, very small numbers, infinities and NaN
#pragma omp simd
        for (size_t j = 0; j < n; j++) {
            plain[j] = !(largest[j] > 0x1p-90f && largest[j] < 0x1p90f);
            uint32_t exponent = bits_of(largest[j]) >> 23;
            unit[j] = float_of((exponent - 23) << 23), per_unit[j] = float_of((277 - exponent) << 23);
            fixed[j] = plain[j] ? 0 : (int32_t)(to[j] * per_unit[j]);
        }
        for (size_t k = 0; k < depth; k++)
#pragma omp simd
            for (size_t j = 0; j < n; j++)
                fixed[j] += plain[j] ? 0 : (int32_t)(x[k] * y[k * N + first + j] * per_unit[j]);
#pragma omp simd
        for (size_t j = 0; j < n; j++) {
            float stored = (float)fixed[j]; // to the nearest; if that is farther from 0, the one before
            if (abs((int32_t)stored) > abs(fixed[j])) stored = float_of(bits_of(stored) - 1);
            to[j] = plain[j] ? total[j] : stored * unit[j];
        }
    }
}

struct Multiply {
    float* c;
    const uint32_t *a, *b;
};
static float half_of(uint32_t pair, int which) { return __bfloat162float({(uint16_t)(pair >> 16 * which)}); }
static void multiply(void** lanes) {
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < 32; i++) {
        const Multiply* l = (const Multiply*)lanes[i];
        for (int e = 0; e < 8; e++)
            a[i / 4 + e / 2 % 2 * 8][i % 4 * 2 + e % 2 + e / 4 * 8] = half_of(l->a[e / 2], e % 2);
        for (int e = 0; e < 4; e++) b[i % 4 * 2 + e % 2 + e / 2 * 8][i / 4] = half_of(l->b[e / 2], e % 2);
        for (int e = 0; e < 4; e++) c[i / 4 + e / 2 * 8][i % 4 * 2 + e % 2] = l->c[e];
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k += 8) add_truncated(c[i], a[i] + k, b[k], 8, 8);
    for (int i = 0; i < 32; i++)
        for (int e = 0; e < 4; e++) ((Multiply*)lanes[i])->c[e] = c[i / 4 + e / 2 * 8][i % 4 * 2 + e % 2];
}

static void copies_arrive(size_t last_group) {
    std::deque<Copy>& copies = running->copies;
    for (; !copies.empty() && copies.front().group < last_group; copies.pop_front()) {
        if (copies.front().from)
            memcpy(copies.front().to, copies.front().from, copies.front().bytes);
        else
            memset(copies.front().to, 0, copies.front().bytes);
    }
}
} // namespace cuda_on_cpu

static inline void ldmatrix_x4(uint32_t r[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::LoadMatrix l = {r, row};
    cuda_on_cpu::in_warp(cuda_on_cpu::load_matrices<false>, line, &l);
}
static inline void ldmatrix_x4_trans(uint32_t r[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::LoadMatrix l = {r, row};
    cuda_on_cpu::in_warp(cuda_on_cpu::load_matrices<true>, line, &l);
}
static inline void mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2], int line = __builtin_LINE()) {
    cuda_on_cpu::Multiply m = {c, a, b};
    cuda_on_cpu::in_warp(cuda_on_cpu::multiply, line, &m);
}
static inline float exp2_(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}

template <int BYTES> static inline void cp_async(void* to, const void* from, bool valid) {
    using namespace cuda_on_cpu;
    static_assert(BYTES == 8 || BYTES == 16, "what the instruction can do");
    if (((size_t)to | (size_t)from) % BYTES) wrong("cp.async: an address is not a multiple of %d", BYTES);
    if ((char*)to < shared->begin || (char*)to + BYTES > shared->begin + shared->size)
        wrong("cp.async: to outside of shared memory");
    if (valid) expect_device(from, BYTES, "what cp.async copies");
    memset(to, POISON, BYTES);
    running->copies.push_back({to, valid ? from : NULL, BYTES, running->groups});
}
static inline void cp_async_commit() { cuda_on_cpu::running->groups++; }
template <int N> static inline void cp_async_wait() {
    size_t groups = cuda_on_cpu::running->groups;
    cuda_on_cpu::copies_arrive(groups > N ? groups - N : 0);
}

// ====================================================================================================================
// The CUDA runtime

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
    size_t totalGlobalMem;
};
struct cuda_on_cpu_event {
    size_t recorded, reached; // times
    cuda_on_cpu::Stream* on;
    double time;
};
typedef cuda_on_cpu::Stream* cudaStream_t;
typedef cuda_on_cpu_event* cudaEvent_t;
typedef std::vector<cuda_on_cpu::Task>*cudaGraph_t, *cudaGraphExec_t;

static inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    case cudaErrorIllegalAddress:
        return "an illegal memory access was encountered";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    default:
        return "invalid argument";
    }
}
// There are CUDA_ON_CPU_DEVICES devices, or two, so that the second can be asked for; they are the same.
static inline cudaError_t cudaGetDeviceCount(int* count) {
    const char* text = getenv("CUDA_ON_CPU_DEVICES");
    return *count = text ? atoi(text) : 2, cudaSuccess;
}
namespace cuda_on_cpu {
static int device_number;
}
static inline cudaError_t cudaSetDevice(int i) {
    int count;
    cudaGetDeviceCount(&count);
    return cuda_on_cpu::device_number = i, i >= 0 && i < count ? cudaSuccess : cudaErrorInvalidDevice;
}
static inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
static inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int i) {
    *p = {"the CPU in a GPU's place", 8, 0, 1 + i, memory_available()};
    return cudaSuccess;
}

// CUDA_ON_CPU_MEMORY: bytes that the device has.
namespace cuda_on_cpu {
static size_t memory_used;
static size_t memory_size(void) {
    const char* text = getenv("CUDA_ON_CPU_MEMORY");
    return text ? (size_t)strtoull(text, NULL, 10) : memory_used + memory_available();
}
static void prepare(void) {
    static char stack[1 << 16]; // a fiber's may be what has overflowed
    stack_t own;
    memset(&own, 0, sizeof own);
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, NULL);
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}
} // namespace cuda_on_cpu

static inline cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    *total = cuda_on_cpu::memory_size();
    *unused = *total - min_size(*total, cuda_on_cpu::memory_used);
    return cudaSuccess;
}
static inline cudaError_t cudaMalloc(void** p, size_t bytes) {
    using namespace cuda_on_cpu;
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    prepare();
    size_t unused = memory_size() - min_size(memory_size(), memory_used);
    if (bytes > unused) return cudaErrorMemoryAllocation;
    Region r = make_region(bytes, false);
    if (!r.map) return cudaErrorMemoryAllocation;
    if (!memory_is_open) mprotect(r.map + GUARD, r.room, PROT_NONE);
    memory_used += bytes;
    *p = r.begin;
    return cudaSuccess;
}
// Its addresses stay taken, so that later use is found out.
static inline cudaError_t cudaFree(void* p) {
    using namespace cuda_on_cpu;
    if (!p) return cudaSuccess;
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    for (Stream* stream : streams) work_until(stream);
    for (Region& r : regions)
        if (r.begin == p && !r.shared && !r.freed) {
            r.freed = true;
            memory_used -= r.size;
            mprotect(r.map + GUARD, r.room, PROT_NONE);
            madvise(r.map + GUARD, r.room, MADV_DONTNEED);
            return cudaSuccess;
        }
    return cudaErrorInvalidValue;
}
static inline cudaError_t cudaMallocHost(void** p, size_t bytes) {
    *p = malloc(bytes);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
static inline cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }

static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    using namespace cuda_on_cpu;
    streams.push_back(*stream = new Stream());
    (*stream)->runs_early = streams.size() > 2 && chosen_order() == BACKWARD;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (cuda_on_cpu::capturing) return cudaErrorStreamCaptureUnsupported;
    cuda_on_cpu::work_until(stream);
    return cuda_on_cpu::has_failed ? cudaErrorIllegalAddress : cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
static inline cudaError_t start_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                                       size_t shared_bytes, cudaStream_t stream, Arguments... arguments) {
    cuda_on_cpu::launch(name, kernel, grid, block, shared_bytes, stream, arguments...);
    return cudaSuccess;
}

static inline void expect_copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    using namespace cuda_on_cpu;
    if (kind == cudaMemcpyDeviceToHost)
        expect_host(to, "what is copied to the host");
    else
        expect_device(to, bytes, "what is copied to");
    if (kind == cudaMemcpyHostToDevice)
        expect_host(from, "what is copied from the host");
    else
        expect_device(from, bytes, "what is copied from");
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                          cudaStream_t stream) {
    expect_copy(to, from, bytes, kind);
    cuda_on_cpu::enqueue(stream, [=] { memcpy(to, from, bytes); });
    return cudaSuccess;
}
// On the stream NULL. What goes to the device need only have left the host's memory when this returns (CUDA Runtime
// API, "API synchronization behavior"): it is there when somebody waits for that stream, and nothing is until then.
static inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    using namespace cuda_on_cpu;
    expect_copy(to, from, bytes, kind);
    work_until(NULL);
    open_memory(true);
    if (kind == cudaMemcpyHostToDevice) {
        std::string staged((const char*)from, bytes);
        memset(to, POISON, bytes);
        enqueue(NULL, [=] { memcpy(to, staged.data(), bytes); });
    } else
        memcpy(to, from, bytes);
    open_memory(false);
    return cudaSuccess;
}
static inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t stream) {
    cuda_on_cpu::expect_device(to, bytes, "what is set");
    cuda_on_cpu::enqueue(stream, [=] { memset(to, byte, bytes); });
    return cudaSuccess;
}

static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new cuda_on_cpu_event();
    return cudaSuccess;
}
static inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (cuda_on_cpu::capturing) return cudaErrorStreamCaptureUnsupported;
    if (event->recorded) cuda_on_cpu::work_until(event->on, [=] { return event->reached == event->recorded; });
    return cuda_on_cpu::has_failed ? cudaErrorIllegalAddress : cudaSuccess;
}
static inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    cudaEventSynchronize(event);
    delete event;
    return cudaSuccess;
}
static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (cuda_on_cpu::capturing) return cudaErrorStreamCaptureUnsupported;
    event->recorded++;
    event->on = stream;
    cuda_on_cpu::enqueue(stream, [=] {
        event->reached++;
        event->time = seconds();
    });
    return cudaSuccess;
}
// For what was recorded last, not for what will be, on a stream that does not change.
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    using namespace cuda_on_cpu;
    if (capturing) return cudaErrorStreamCaptureUnsupported;
    size_t times = event->recorded;
    Stream* on = event->on;
    Condition reached = [=] { return event->reached >= times; };
    enqueue(
        stream, [] {}, reached, [=] { work_until(on, reached); });
    return cudaSuccess;
}
static inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    if (begin->reached < begin->recorded || end->reached < end->recorded) return cudaErrorNotReady;
    *ms = (float)(1e3 * (end->time - begin->time));
    return cudaSuccess;
}

static inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    using namespace cuda_on_cpu;
    if (capturing || !stream) return cudaErrorStreamCaptureUnsupported;
    capturing = stream;
    captured = new std::vector<Task>();
    return cudaSuccess;
}
static inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    if (cuda_on_cpu::capturing != stream) return cudaErrorInvalidValue;
    *graph = cuda_on_cpu::captured;
    cuda_on_cpu::capturing = NULL;
    return cudaSuccess;
}
static inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    *exec = new std::vector<cuda_on_cpu::Task>(*graph);
    return cudaSuccess;
}
static inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
static inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    for (const cuda_on_cpu::Task& work : *exec) cuda_on_cpu::enqueue(stream, work);
    return cudaSuccess;
}
static inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }

// ====================================================================================================================
// cuBLASLt: products as a matrix unit forms them, or, of float32, train_gpt.c's multiply; on copies.

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasLtEpilogue_t {
    CUBLASLT_EPILOGUE_DEFAULT = 1,
    CUBLASLT_EPILOGUE_BIAS = 4,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4,
    CUBLASLT_EPILOGUE_DGELU = 64 | 128,
    CUBLASLT_EPILOGUE_BGRADA = 256
};
enum cublasLtMatmulDescAttributes_t {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_DESC_TRANSB,
    CUBLASLT_MATMUL_DESC_EPILOGUE,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD
};
enum cublasLtMatmulPreferenceAttributes_t {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
};
enum { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

namespace cuda_on_cpu {
struct Operation {
    cublasOperation_t transposed[2]; // A, B
    cublasLtEpilogue_t epilogue;
    char *bias, *aux;
    int64_t aux_ld;
};
struct Layout { // column-major
    cudaDataType_t type;
    size_t rows, columns, ld;
    bool operator==(const Layout& l) const {
        return type == l.type && rows == l.rows && columns == l.columns && ld == l.ld;
    }
};
struct Preference {
    size_t workspace;
    uint32_t reduction, alignment[4]; // of A, B, C, D
};
struct Algorithm { // the choice holds for these, and no others
    Operation operation;
    Layout a, b, c, d;
    Preference preference;
};
} // namespace cuda_on_cpu
typedef struct cuda_on_cpu_handle* cublasLtHandle_t;
typedef cuda_on_cpu::Operation* cublasLtMatmulDesc_t;
typedef cuda_on_cpu::Layout* cublasLtMatrixLayout_t;
typedef cuda_on_cpu::Preference* cublasLtMatmulPreference_t;
typedef cuda_on_cpu::Algorithm cublasLtMatmulAlgo_t;
struct cublasLtMatmulHeuristicResult_t {
    cublasLtMatmulAlgo_t algo;
};

static inline const char* cublasLtGetStatusName(cublasStatus_t status) {
    return status == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
           : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                   : "CUBLAS_STATUS_NOT_SUPPORTED";
}
static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return *handle = NULL, CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t compute,
                                                      cudaDataType_t scale) {
    *operation = new cuda_on_cpu::Operation();
    (*operation)->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    return compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType_t type,
                                                        uint64_t rows, uint64_t columns, int64_t ld) {
    *layout = new cuda_on_cpu::Layout{type, rows, columns, (size_t)ld};
    return rows && columns && ld >= (int64_t)rows ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = new cuda_on_cpu::Preference{0, ~0u, {256, 256, 256, 256}};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    return delete p, CUBLAS_STATUS_SUCCESS;
}

namespace cuda_on_cpu {
struct Field {
    void* at;
    size_t size;
};
static cublasStatus_t set_field(const Field* fields, size_t count, size_t which, const void* value, size_t size) {
    if (which >= count || fields[which].size != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(fields[which].at, value, size);
    return CUBLAS_STATUS_SUCCESS;
}
} // namespace cuda_on_cpu
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t o,
                                                            cublasLtMatmulDescAttributes_t which, const void* value,
                                                            size_t size) {
    const cuda_on_cpu::Field fields[] = {{&o->transposed[0], 4}, {&o->transposed[1], 4}, {&o->epilogue, 4},
                                         {&o->bias, 8},          {&o->aux, 8},           {&o->aux_ld, 8}};
    return cuda_on_cpu::set_field(fields, 6, which, value, size);
}
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
                                                                  cublasLtMatmulPreferenceAttributes_t which,
                                                                  const void* value, size_t size) {
    const cuda_on_cpu::Field fields[] = {{&p->workspace, 8},    {&p->reduction, 4},    {&p->alignment[0], 4},
                                         {&p->alignment[1], 4}, {&p->alignment[2], 4}, {&p->alignment[3], 4}};
    return cuda_on_cpu::set_field(fields, 6, which, value, size);
}
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t operation,
                                                            cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                            cublasLtMatmulPreference_t preference, int,
                                                            cublasLtMatmulHeuristicResult_t* choice, int* found) {
    size_t K = operation->transposed[0] == CUBLAS_OP_T ? a->rows : a->columns;
    bool sums_columns = operation->epilogue == CUBLASLT_EPILOGUE_BGRADA;
    // Of the small ones, some fold in GELU and others its derivative, some both and others neither.
    size_t refused = operation->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS ? 2
                     : operation->epilogue == CUBLASLT_EPILOGUE_DGELU       ? 5
                                                                            : SIZE_MAX;
    choice->algo = {*operation, *a, *b, *c, *d, *preference};
    *found = c->rows > 1 && c->columns > 1 && K > 1 &&
             (!sums_columns || (a->type == CUDA_R_16BF && c->rows % 8 == 0)) &&
             (c->rows >= 160 || c->columns % refused);
    // Which error says that there is none is not to be relied on.
    return *found ? CUBLAS_STATUS_SUCCESS : K % 2 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_INVALID_VALUE;
}

namespace cuda_on_cpu {
static float get(const void* p, size_t i, cudaDataType_t type) {
    return type == CUDA_R_32F ? ((const float*)p)[i] : __bfloat162float(((const __nv_bfloat16*)p)[i]);
}
static void put(void* p, size_t i, cudaDataType_t type, float x) {
    if (type == CUDA_R_32F)
        ((float*)p)[i] = x;
    else
        ((__nv_bfloat16*)p)[i] = __float2bfloat16(x);
}
static size_t size_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

static void expect_matrix(const void* p, const Layout& l, uint32_t alignment, const char* what) {
    expect_device(p, ((l.columns - 1) * l.ld + l.rows) * size_of(l.type), what);
    if ((size_t)p % alignment) wrong("%s does not begin at a multiple of %u bytes as was promised", what, alignment);
}

// op(A), dense, as train_gpt.c sees it: the rows of one are the columns of the other.
static std::vector<float> dense(const void* p, const Layout& l, bool is_transposed) {
    std::vector<float> x(l.rows * l.columns);
    for (size_t j = 0; j < l.columns; j++)
        for (size_t i = 0; i < l.rows; i++)
            x[is_transposed ? i * l.columns + j : j * l.rows + i] = get(p, j * l.ld + i, l.type);
    return x;
}

struct Product {
    Operation o;
    Layout a, b, c;
    const void *A, *B, *C;
    void* D;
    float alpha, beta;
};

static void multiply_and_finish(const Product& p) {
    bool ta = p.o.transposed[0], tb = p.o.transposed[1];
    size_t M = p.c.rows, N = p.c.columns, K = ta ? p.a.rows : p.a.columns;
    std::vector<float> a = dense(p.A, p.a, ta), b = dense(p.B, p.b, tb), product(M * N), part(M * N);
    // D' (N,M) = op(B)' (N,K) times op(A)' (K,M), in one or two parts of K and 8 or 16 at a time, by the shape.
    uint64_t choice = random_bits(random_bits(M, N), K);
    size_t depth = choice & 1 ? 8 : 16, parts = choice & 2 ? 2 : 1;
    for (size_t i = 0, k0, end; i < parts; i++) {
        k0 = K * i / parts, end = K * (i + 1) / parts;
        if (k0 == end) continue;
        std::vector<float>& to = i ? part : product;
        if (p.a.type == CUDA_R_32F)
            ::matmul(to.data(), matrix(b.data() + k0, K), matrix(a.data() + k0 * M, M), NULL, NULL, N, M, end - k0);
        else
#pragma omp parallel for schedule(static)
            for (size_t j = 0; j < N; j++)
                for (size_t k = k0; k < end; k += depth)
                    add_truncated(&to[j * M], &b[j * K + k], &a[k * M], min_size(depth, end - k), M);
        for (size_t j = 0; i && j < M * N; j++) product[j] += part[j];
    }
    for (size_t j = 0; j < N; j++)
        for (size_t i = 0; i < M; i++) {
            float x = p.alpha * product[j * M + i];
            if (p.beta) x += p.beta * get(p.C, j * p.c.ld + i, p.c.type);
            if (p.o.epilogue & 4) x += get(p.o.bias, i, p.a.type);
            size_t at = j * (size_t)p.o.aux_ld + i;
            if (p.o.epilogue & 32) {
                put(p.o.aux, at, p.a.type, x);
                x *= 0.5f * (1 + tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
            }
            if (p.o.epilogue & 64) {
                float z = get(p.o.aux, at, p.a.type), t = tanhf(0.797884561f * (z + 0.044715f * z * z * z));
                x *= 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * 0.797884561f * (1 + 0.134145f * z * z);
            }
            put(p.D, j * p.c.ld + i, p.c.type, x);
        }
    for (size_t i = 0; (p.o.epilogue & CUBLASLT_EPILOGUE_BGRADA) && i < M; i++) {
        float sum = 0;
        for (size_t k = 0; k < K; k++) sum += a[k * M + i];
        put(p.o.bias, i, p.c.type, sum); // not added to what is there
    }
}
} // namespace cuda_on_cpu

static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha,
                                            const void* A, cublasLtMatrixLayout_t a, const void* B,
                                            cublasLtMatrixLayout_t b, const void* beta, const void* C,
                                            cublasLtMatrixLayout_t c, void* D, cublasLtMatrixLayout_t d,
                                            const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t bytes,
                                            cudaStream_t stream) {
    using namespace cuda_on_cpu;
    const Operation o = *operation;
    bool ta = o.transposed[0], tb = o.transposed[1];
    size_t M = c->rows, N = c->columns, K = ta ? a->rows : a->columns;
    if ((ta ? a->columns : a->rows) != M || (tb ? b->columns : b->rows) != K || (tb ? b->rows : b->columns) != N ||
        !(*c == *d) || a->type != b->type)
        return CUBLAS_STATUS_INVALID_VALUE;
    const Algorithm& chosen = *algorithm;
    if (!(chosen.a == *a && chosen.b == *b && chosen.c == *c) || chosen.operation.epilogue != o.epilogue ||
        chosen.operation.transposed[0] != o.transposed[0] || chosen.operation.transposed[1] != o.transposed[1] ||
        bytes < chosen.preference.workspace)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const uint32_t* alignment = chosen.preference.alignment;
    expect_matrix(A, *a, alignment[0], "cuBLASLt's A");
    expect_matrix(B, *b, alignment[1], "cuBLASLt's B");
    expect_matrix(C, *c, alignment[2], "cuBLASLt's C");
    expect_matrix(D, *d, alignment[3], "cuBLASLt's D");
    expect_device(workspace, bytes, "cuBLASLt's workspace");
    if (o.epilogue & 4) expect_device(o.bias, M * size_of(a->type), "cuBLASLt's bias");
    if (o.epilogue & CUBLASLT_EPILOGUE_BGRADA) expect_device(o.bias, M * size_of(c->type), "cuBLASLt's sums");
    if (o.epilogue & (32 | 64)) {
        expect_matrix(o.aux, {a->type, M, N, (size_t)o.aux_ld}, 16, "cuBLASLt's input of GELU");
        if (o.aux_ld % 8 || o.aux_ld < (int64_t)M) return CUBLAS_STATUS_INVALID_VALUE; // as its manual says
    }
    Product p = {o, *a, *b, *c, A, B, C, D, *(const float*)alpha, *(const float*)beta};
    enqueue(stream, [=] { multiply_and_finish(p); });
    return CUBLAS_STATUS_SUCCESS;
}

// ====================================================================================================================
// NCCL, over MPI. What a stream is given, it does when its turn comes, like everything else; so the processes meet where
// they wait for their streams.

#ifdef WITH_MPI
enum ncclResult_t { ncclSuccess = 0, ncclInvalidArgument = 4, ncclInvalidUsage = 5 };
enum ncclDataType_t { ncclFloat = 7, ncclDouble = 8 };
enum ncclRedOp_t { ncclSum = 0 };
struct ncclUniqueId {
    char internal[128];
};
struct cuda_on_cpu_comm {
    MPI_Comm mpi;
    int rank, size;
};
typedef cuda_on_cpu_comm* ncclComm_t;

namespace cuda_on_cpu {
static int groups_open;
static bool is_initialised; // one communicator a process is all that is supported

static MPI_Datatype mpi_type(ncclDataType_t type) { return type == ncclFloat ? MPI_FLOAT : MPI_DOUBLE; }
static size_t size_of(ncclDataType_t type) { return type == ncclFloat ? sizeof(float) : sizeof(double); }

// Starts work(copy of `bytes` at `from`, to), where both are the device's, and the same or apart.
template <typename F>
static ncclResult_t communicate(const void* from, size_t bytes, void* to, size_t result, cudaStream_t stream, F work) {
    expect_device(from, bytes, "what NCCL sends");
    expect_device(to, result, "where NCCL puts what it receives");
    enqueue(stream, [=] {
        std::string copy((const char*)from, bytes);
        work((void*)copy.data(), to);
    });
    return ncclSuccess;
}
static void expect_in_place(const void* part, const void* whole, size_t at, size_t bytes, const char* call) {
    if ((const char*)part != (const char*)whole + at && (const char*)part < (const char*)whole + bytes &&
        (const char*)whole < (const char*)part + bytes)
        wrong("%s is given memory that overlaps, but not where it may", call);
}
} // namespace cuda_on_cpu

static inline const char* ncclGetErrorString(ncclResult_t result) {
    return result == ncclSuccess ? "no error" : result == ncclInvalidUsage ? "invalid usage" : "invalid argument";
}
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    for (size_t i = 0; i < sizeof id->internal; i++) id->internal[i] = (char)random_bits((uint64_t)getpid(), i);
    return ncclSuccess;
}
static inline ncclResult_t ncclCommInitRank(ncclComm_t* comm, int size, ncclUniqueId id, int rank) {
    using namespace cuda_on_cpu;
    ncclUniqueId first = id;
    if (is_initialised) wrong("a second communicator of NCCL is not supported here");
    is_initialised = true;
    *comm = new cuda_on_cpu_comm{MPI_COMM_NULL, rank, size};
    MPI_Comm_split(MPI_COMM_WORLD, 0, rank, &(*comm)->mpi);
    MPI_Bcast(&first, sizeof first, MPI_BYTE, 0, (*comm)->mpi);
    if (memcmp(&first, &id, sizeof id)) wrong("ncclCommInitRank: rank %d has not the unique id of rank 0", rank);
    int actual_rank, actual_size;
    MPI_Comm_rank((*comm)->mpi, &actual_rank), MPI_Comm_size((*comm)->mpi, &actual_size);
    if (rank != actual_rank || size != actual_size) wrong("ncclCommInitRank: rank %d of %d is wrong", rank, size);
    std::vector<int> devices((size_t)size);
    MPI_Allgather(&device_number, 1, MPI_INT, devices.data(), 1, MPI_INT, (*comm)->mpi);
    for (int r = 0; r < rank; r++) // all processes run on one machine here
        if (devices[(size_t)r] == device_number) return ncclInvalidUsage;
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupStart(void) { return cuda_on_cpu::groups_open++, ncclSuccess; }
static inline ncclResult_t ncclGroupEnd(void) {
    return cuda_on_cpu::groups_open-- > 0 ? ncclSuccess : ncclInvalidUsage;
}
static inline ncclResult_t ncclAllReduce(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t,
                                         ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    size_t bytes = n * size_of(type);
    expect_in_place(to, from, 0, bytes, "ncclAllReduce");
    return communicate(from, bytes, to, bytes, stream,
                       [=](void* x, void* y) { MPI_Allreduce(x, y, (int)n, mpi_type(type), MPI_SUM, comm->mpi); });
}
static inline ncclResult_t ncclReduce(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t, int root,
                                      ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    size_t bytes = n * size_of(type);
    expect_in_place(to, from, 0, bytes, "ncclReduce");
    return communicate(from, bytes, to, bytes, stream,
                       [=](void* x, void* y) { MPI_Reduce(x, y, (int)n, mpi_type(type), MPI_SUM, root, comm->mpi); });
}
static inline ncclResult_t ncclBroadcast(const void* from, void* to, size_t n, ncclDataType_t type, int root,
                                         ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    size_t bytes = n * size_of(type);
    expect_in_place(to, from, 0, bytes, "ncclBroadcast");
    return communicate(from, bytes, to, bytes, stream, [=](void* x, void* y) {
        MPI_Bcast(x, (int)n, mpi_type(type), root, comm->mpi);
        memcpy(y, x, bytes);
    });
}
static inline ncclResult_t ncclReduceScatter(const void* from, void* to, size_t n, ncclDataType_t type, ncclRedOp_t,
                                             ncclComm_t comm, cudaStream_t stream) {
    using namespace cuda_on_cpu;
    size_t part = n * size_of(type), bytes = part * (size_t)comm->size;
    expect_in_place(to, from, (size_t)comm->rank * part, bytes, "ncclReduceScatter");
    return communicate(from, bytes, to, part, stream, [=](void* x, void* y) {
        MPI_Reduce_scatter_block(x, y, (int)n, mpi_type(type), MPI_SUM, comm->mpi);
    });
}
static inline ncclResult_t ncclAllGather(const void* from, void* to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                         cudaStream_t stream) {
    using namespace cuda_on_cpu;
    size_t part = n * size_of(type), bytes = part * (size_t)comm->size;
    expect_in_place(from, to, (size_t)comm->rank * part, bytes, "ncclAllGather");
    return communicate(from, part, to, bytes, stream, [=](void* x, void* y) {
        MPI_Allgather(x, (int)n, mpi_type(type), y, (int)n, mpi_type(type), comm->mpi);
    });
}
#endif

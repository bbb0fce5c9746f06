// shim.c: preloaded into train_gpt, lets one call fail. FAULT=KIND:N, in the environment, names the Nth call of that
// kind between the beginning of main() and the end of the process, by train_gpt or by the libraries that it uses. KIND
// is one of the names below. The number of such calls is written to the file that FAULT_COUNT names.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef enum { NONE, MEMORY, MMAP, OPEN, READ, WRITE, FLUSH, SYNC, CLOSE, RENAME, LINK, MKDIR, KINDS } Kind;
static const char* const names[KINDS] = {"",      "memory", "mmap",  "open",   "read", "write",
                                         "flush", "sync",   "close", "rename", "link", "mkdir"};
static Kind wanted;
static int nth, count;

// Whether this call is the one to fail, with this error.
static bool fails(Kind kind, int error) {
    if (kind != wanted || __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) != nth) return false;
    errno = error;
    return true;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int (*program)(int, char**, char**);

static int counted(int argc, char** argv, char** environment) {
    const char* fault = getenv("FAULT");
    const char* colon = fault ? strchr(fault, ':') : NULL;
    if (colon) {
        nth = atoi(colon + 1);
        for (int i = 1; i < KINDS; i++)
            if (strlen(names[i]) == (size_t)(colon - fault) && !strncmp(names[i], fault, strlen(names[i])))
                wanted = (Kind)i;
    }
    int status = program(argc, argv, environment);
    wanted = NONE; // what follows is not the program's
    return status;
}

__attribute__((noreturn)) void exit(int status) {
    wanted = NONE;
    REAL(exit)(status);
    __builtin_unreachable();
}

int __libc_start_main(int (*main)(int, char**, char**), int argc, char** argv, void (*init)(void), void (*fini)(void),
                      void (*loader_fini)(void), void* stack_end) {
    program = main;
    return REAL(__libc_start_main)(counted, argc, argv, init, fini, loader_fini, stack_end);
}

__attribute__((destructor)) static void report(void) {
    const char* path = getenv("FAULT_COUNT");
    int file = path ? creat(path, 0666) : -1;
    if (file >= 0) dprintf(file, "%d\n", count);
}

// dlsym() allocates, so for these the C library's own names.
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void*, size_t),
    *__libc_memalign(size_t, size_t);
void* malloc(size_t size) { return fails(MEMORY, ENOMEM) ? NULL : __libc_malloc(size); }
void* calloc(size_t n, size_t size) { return fails(MEMORY, ENOMEM) ? NULL : __libc_calloc(n, size); }
void* realloc(void* p, size_t size) { return fails(MEMORY, ENOMEM) ? NULL : __libc_realloc(p, size); }
void* aligned_alloc(size_t to, size_t size) { return fails(MEMORY, ENOMEM) ? NULL : __libc_memalign(to, size); }

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
    return fails(MMAP, ENOMEM) ? MAP_FAILED : REAL(mmap)(address, size, protection, flags, file, offset);
}

int open(const char* path, int flags, ...) {
    va_list args;
    va_start(args, flags);
    int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(args, int) : 0;
    va_end(args);
    return fails(OPEN, EMFILE) ? -1 : REAL(open)(path, flags, mode);
}

// A stream whose reads fail is one of a directory.
FILE* fopen(const char* path, const char* mode) {
    if (fails(OPEN, EMFILE)) return NULL;
    return REAL(fopen)(mode[0] == 'r' && fails(READ, 0) ? "/" : path, mode);
}

// Files only; what is printed fails in fflush(), and a stream into memory has no disk.
size_t fwrite(const void* data, size_t size, size_t n, FILE* stream) {
    if (stream == stdout || stream == stderr || fileno(stream) < 0 || !fails(WRITE, ENOSPC))
        return REAL(fwrite)(data, size, n, stream);
    size_t half = REAL(fwrite)(data, size, n / 2, stream);
    errno = ENOSPC;
    return half;
}

int fflush(FILE* stream) { return fails(FLUSH, EIO) ? EOF : REAL(fflush)(stream); }
int fsync(int file) { return fails(SYNC, EIO) ? -1 : REAL(fsync)(file); }
int rename(const char* from, const char* to) { return fails(RENAME, EACCES) ? -1 : REAL(rename)(from, to); }
int link(const char* from, const char* to) { return fails(LINK, EPERM) ? -1 : REAL(link)(from, to); }
int linkat(int a, const char* from, int b, const char* to, int flags) {
    return fails(LINK, EPERM) ? -1 : REAL(linkat)(a, from, b, to, flags);
}
int mkdir(const char* path, mode_t mode) { return fails(MKDIR, EACCES) ? -1 : REAL(mkdir)(path, mode); }

int fclose(FILE* stream) {
    int result = REAL(fclose)(stream);
    return fails(CLOSE, EIO) ? EOF : result;
}

# make help lists the targets.
#
# CC=clang works as well as gcc. DEBUG=1 builds with the address and undefined-behaviour sanitizers.
# No -ffast-math: NaN and infinity stay visible, and sums keep their order. The -fno- options only give up errno and
# floating-point traps, which nothing here looks at and which keep loops from being vectorised.

CC       = gcc
PYTHON   = python3
ARCH     = -march=native
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
CFLAGS   = -std=c11 -O3 $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp $(WARNINGS)
LDLIBS   = -lm

ifdef DEBUG
CFLAGS  += -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif

.PHONY: all help test bench cpu_path mutate fuzz faults coverage clean data tools

all: train_gpt

help:
	@echo "make train_gpt    the program; prepares data/ if there is none"
	@echo "make test         all checks; a minute or two"
	@echo "make bench        times a training step, layer by layer; BENCH=\"--help\" lists what else"
	@echo "make cpu_path     the matrix multiply in steps, from three loops to train_gpt.c's, each timed; ten seconds"
	@echo "make mutate       small errors in train_gpt.c, each of which the tests must catch; half an hour"
	@echo "make fuzz         made-up inputs to everything that reads files; FUZZ_SECONDS=60 for each of seven"
	@echo "make faults       every call that can fail, fails in turn: memory, files, disk; two minutes"
	@echo "make coverage     lists the lines of train_gpt.c that the tests do not run; two minutes"
	@echo "make clean        removes what was built (data/ and checkpoints stay)"
	@echo
	@echo "make CC=clang ... with another compiler       make DEBUG=1 ... with sanitizers"
	@echo "make ARCH= ...    for any machine of this kind, not just for this one"
	@echo
	@echo "make test CC=aarch64-linux-gnu-gcc ARCH= EMULATOR='qemu-aarch64 -L /usr/aarch64-linux-gnu'"
	@echo "                  tests it for another kind of machine"

tools:
	@command -v $(firstword $(CC)) >/dev/null || { echo "make: $(CC) is not installed; it is needed to build" >&2; exit 1; }
	@echo 'int main(void) { return 0; }' | $(CC) -x c -fopenmp - -o /dev/null 2>/dev/null || \
	    { echo "make: $(CC) cannot build OpenMP programs here; its OpenMP library (libgomp or libomp) is missing" >&2; exit 1; }

# The prerequisite after | is checked each time, but does not make the program out of date.
train_gpt: train_gpt.c Makefile | tools data
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

data: data/train.bin

data/train.bin:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; it is needed to prepare data/" >&2; exit 1; }
	$(PYTHON) prepare_data.py

build/test_gpt: test_gpt.c train_gpt.c Makefile | tools
	@mkdir -p build
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

test: build/test_gpt
	$(EMULATOR) ./build/test_gpt
	$(PYTHON) dev/test_prepare_data.py

build/bench: dev/bench/bench.c train_gpt.c Makefile | tools
	@mkdir -p build
	$(CC) $(CFLAGS) -Wno-unused-function $< -o $@ $(LDLIBS)

bench: build/bench
	./build/bench $(BENCH)

build/cpu_path: dev/cpu/matmul.c train_gpt.c Makefile | tools
	@mkdir -p build
	$(CC) $(CFLAGS) -Wno-unused-function $< -o $@ $(LDLIBS)

cpu_path: build/cpu_path
	./build/cpu_path $(CPU_PATH)

mutate: | tools
	$(PYTHON) dev/mutate.py

FUZZ_SECONDS = 60
fuzz:
	$(PYTHON) dev/fuzz/run.py $(FUZZ_SECONDS)

build/shim.so: dev/faults/shim.c | tools
	@mkdir -p build
	$(CC) -std=c11 -O1 -Wall -Wextra -shared -fPIC $< -o $@

faults: train_gpt build/shim.so
	$(PYTHON) dev/faults/run.py

coverage: build/shim.so
	$(PYTHON) dev/coverage.py

clean:
	rm -rf build train_gpt train_gpt_cu __pycache__

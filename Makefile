# make help lists the targets.
#
# CC=clang works as well as gcc. DEBUG=1 builds with the address and undefined-behaviour sanitizers, PLAIN=1 with the
# plain multiply and attention. CFLAGS is yours to set; what the code cannot do without is in REQUIRED.
# No -ffast-math: NaN and infinity stay visible, and sums keep their order. The -fno- options only give up errno and
# floating-point traps, which nothing here looks at and which keep loops from being vectorised.

CC       = gcc
MPICC   ?= mpicc
MPIRUN  ?= mpirun
PYTHON   = python3
ARCH     = -march=native
WARNINGS = -Wall -Wextra -Wpedantic -Wshadow
CFLAGS   = -O3 $(ARCH)
LDLIBS   = -lm
# GCC takes some processors with AVX-512 for ones that had better use half of it.
WIDE    := $(shell $(CC) $(ARCH) -mprefer-vector-width=512 -dM -E - </dev/null 2>/dev/null | grep -q __AVX512F__ && \
             echo -mprefer-vector-width=512)
REQUIRED = -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp
OPTIONS  = -std=c11 $(REQUIRED) $(WIDE) $(WARNINGS) $(CFLAGS) $(if $(PLAIN),-DPLAIN=1) $(SANITIZE)
COMPILE  = $(CC) $(OPTIONS)

# train_gpt.cu: in bfloat16 or, with PRECISION=fp32, in float32; for the GPU that is here, else for any of compute
# capability 8.0 or higher. On the CPU it is C++ like any other.
CXX       = g++
CXXFLAGS  = -std=c++17 $(ARCH) $(REQUIRED)
NVCC      = $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc) nvcc)
NVCC_ARCH = $(shell nvidia-smi >/dev/null 2>&1 && echo native || echo sm_80)
NVCCFLAGS = -std=c++17 -O3 -arch=$(NVCC_ARCH) -Xcompiler "$(filter-out -std=%,$(CXXFLAGS))" -diag-suppress 1675
PRECISION = bf16
FP32      = $(if $(filter fp32,$(PRECISION)),-DPRECISION_FP32)
# MPI=1: for several GPUs, with MPI and NCCL; NCCL=DIR if that is elsewhere. mpi.h's C++ is not wanted.
MPICXX   ?= mpicxx
WITH_MPI  = -DWITH_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX
NVCC_MPI  = $(if $(MPI),-ccbin $(MPICXX) $(WITH_MPI) $(if $(NCCL),-I$(NCCL)/include -L$(NCCL)/lib))
ON_CPU    = $(if $(MPI),$(MPICXX) $(WITH_MPI),$(CXX)) -x c++ -DCUDA_ON_CPU $(CXXFLAGS) -Wno-unknown-pragmas -Wno-unused-function

ifdef DEBUG
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
endif

ifeq ($(filter $(PRECISION),bf16 fp32),)
$(error PRECISION is bf16 or fp32, not '$(PRECISION)')
endif

.PHONY: all help test test_twin test_nccl test_gpt_cu test_mpi sanitize_cu print_sanitized bench by_hand attention \
    attention_lib cpu_path variants mutate fuzz faults coverage clean data tools nvcc mpicc mpicxx nccl FORCE

all: train_gpt

help:
	@echo "run"
	@echo "  make train_gpt     the program; prepares data/ if there is none"
	@echo "  make train_gpt_cu  the same for an NVIDIA GPU; PRECISION=fp32: all in float32;"
	@echo "                     NVCC_ARCH=sm_90: for that GPU; MPI=1: for several, with NCCL,"
	@echo "                     started by mpirun"
	@echo "  make train_gpt_mpi the same for several processes, which mpirun starts;"
	@echo "                     MPICC=mpicc.mpich: with that MPI"
	@echo "  make clean         removes what was built (data/ and checkpoints stay)"
	@echo
	@echo "learn, more in dev/learn/README.md"
	@echo "  make by_hand       the figures of dev/learn/by_hand.md: every layer, forward"
	@echo "                     and backward, with numbers that fit on paper"
	@echo "  make attention     the course on attention, from lookup to vision: each"
	@echo "                     lesson in turn, a few minutes, pictures in build/attention"
	@echo "  make attention_lib its functions for Python: dev/learn/attention/attention.py"
	@echo "  make cpu_path      the multiply in steps, from three loops to train_gpt.c's,"
	@echo "                     each timed; ten seconds"
	@echo "  make variants      what changed since GPT-2: eight diffs, tested and trained;"
	@echo "                     VARIANTS=--check: tested only"
	@echo "  make -C dev/learn/cuda check"
	@echo "                     GPU kernels in steps, each checked, without a GPU"
	@echo "  make train_gpt_cu_on_cpu"
	@echo "                     train_gpt_cu without a GPU, slow, to look into with gdb"
	@echo
	@echo "check, more in dev/check/README.md"
	@echo "  make test          all checks; a few minutes"
	@echo "  make test_gpt_cu   those of train_gpt_cu, on the GPU, in both precisions"
	@echo "  make test_nccl     those of several GPUs, without one; two minutes"
	@echo "  make sanitize_cu   the layers under compute-sanitizer, on the GPU; half an"
	@echo "                     hour"
	@echo "  dev/check/first_gpu.sh"
	@echo "                     what to know of a new GPU, in a report; half an hour"
	@echo "  make test_mpi      train_gpt_mpi: 1 to 4 processes against train_gpt; a minute"
	@echo "  make mutate        small errors in train_gpt.c, each of which the tests must"
	@echo "                     catch; half an hour"
	@echo "  make fuzz          made-up inputs to everything that reads files;"
	@echo "                     FUZZ_SECONDS=60 for each of seven"
	@echo "  make faults        every call that can fail, fails in turn: memory, files,"
	@echo "                     disk; two minutes"
	@echo "  make coverage      lists the lines of train_gpt.c that the tests do not run;"
	@echo "                     two minutes"
	@echo
	@echo "measure, more in dev/bench/README.md"
	@echo "  make bench         times a training step, layer by layer; BENCH=\"--help\" lists"
	@echo "                     what else"
	@echo
	@echo "with any of these"
	@echo "  make CC=clang ...  with another compiler"
	@echo "  make DEBUG=1 ...   with sanitizers"
	@echo "  make PLAIN=1 ...   the plain multiply and attention only: slow"
	@echo "  make ARCH= ...     for any machine of this kind, not just for this one"
	@echo "  for another kind of machine, tested here: see dev/check/README.md"

tools:
	@command -v $(firstword $(CC)) >/dev/null || { echo "make: $(CC) is not installed; it is needed to build" >&2; exit 1; }
	@echo 'int main(void) { return 0; }' | $(CC) -x c -fopenmp - -o /dev/null 2>/dev/null || \
	    { echo "make: $(CC) cannot build OpenMP programs here; its OpenMP library (libgomp or libomp) is missing" >&2; exit 1; }

# Hold how programs were built last, and are newer than a program that was built otherwise.
build/compile build/compile_cu build/compile_mpi: FORCE
	@mkdir -p build
	@echo '$(subst ','\'',$($(@F)))' | cmp -s - $@ || echo '$(subst ','\'',$($(@F)))' >$@
compile    = $(COMPILE)
compile_mpi = $(MPICC) $(COMPILE)
compile_cu = $(NVCC) $(NVCCFLAGS) $(NVCC_MPI) $(ON_CPU) $(FP32)

# The prerequisite after | is checked each time, but does not make the program out of date.
train_gpt: train_gpt.c Makefile build/compile | tools data
	$(COMPILE) $< -o $@ $(LDLIBS)

# The compiler behind mpicc is the one that builds the rest. MPICH has a pointer of value 1, at which GCC warns.
mpicc:
	@command -v $(MPICC) >/dev/null || { echo "make: $(MPICC) is not installed; Open MPI and MPICH have it (Debian:" \
	    "libopenmpi-dev or libmpich-dev)" >&2; exit 1; }

train_gpt_mpi: train_gpt.c Makefile build/compile_mpi | tools mpicc data
	OMPI_CC="$(CC)" MPICH_CC="$(CC)" $(MPICC) $(OPTIONS) -Wno-unknown-warning-option -Wno-stringop-overflow -DWITH_MPI $< -o $@ $(LDLIBS)

test_mpi: train_gpt train_gpt_mpi
	$(PYTHON) dev/check/test_mpi.py --mpirun $(MPIRUN)

data: data/train.bin

data/train.bin:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; it is needed to prepare data/" >&2; exit 1; }
	$(PYTHON) prepare_data.py

build/test_gpt: test_gpt.c train_gpt.c Makefile build/compile | tools
	$(COMPILE) $< -o $@ $(LDLIBS)

# The layers and the model once more, on the plain multiply and attention.
build/test_plain: test_gpt.c train_gpt.c Makefile build/compile | tools
	$(COMPILE) -UPLAIN -DPLAIN=1 $< -o $@ $(LDLIBS)

LAYERS = matmul embedding layernorm linear attention gelu cross_entropy model adamw generation_cache threads variants
test: build/test_gpt build/test_plain build/by_hand
	$(EMULATOR) ./build/by_hand --check dev/learn/by_hand.md
	$(EMULATOR) ./build/test_gpt
	GPT_TEST_PRECISION=bf16 $(EMULATOR) ./build/test_gpt $(filter-out matmul threads variants,$(LAYERS))
	$(EMULATOR) ./build/test_plain $(LAYERS)
	@if [ -n "$(DEBUG)" ]; then echo "skipped: train_gpt.cu's tests; the sanitizers do not know its threads"; \
	elif ! command -v $(CXX) >/dev/null; then echo "skipped: train_gpt.cu's tests; $(CXX) is not installed"; \
	else $(MAKE) --no-print-directory test_twin; fi
	$(PYTHON) dev/check/test_prepare_data.py
	$(PYTHON) dev/bench/scale.py --check
	$(MAKE) --no-print-directory -C dev/learn/attention test

# The twin's checks, with its kernels on the CPU.
TWIN = train_gpt.cu train_gpt.c dev/check/cuda_on_cpu.h Makefile build/compile_cu

build/test_twin_bf16 build/test_twin_fp32: build/test_twin_%: test_gpt.c $(TWIN) | tools
	$(ON_CPU) -O2 -DTWIN='"train_gpt.cu"' $(if $(filter fp32,$*),-DPRECISION_FP32) $< -o $@ $(LDLIBS)

build/test_cuda_on_cpu: dev/check/test_cuda_on_cpu.cpp $(TWIN) | tools
	$(ON_CPU) -O2 $< -o $@ $(LDLIBS)

test_twin: build/test_cuda_on_cpu build/test_twin_bf16 build/test_twin_fp32
	./build/test_cuda_on_cpu
	./build/test_twin_bf16
	./build/test_twin_fp32

nvcc:
	@command -v $(NVCC) >/dev/null || { echo "make: nvcc is not installed; the CUDA Toolkit, 12 or later, has it" >&2; exit 1; }

mpicxx:
	@command -v $(MPICXX) >/dev/null || { echo "make: $(MPICXX) is not installed; MPI=1 needs it: libopenmpi-dev or libmpich-dev has it" >&2; exit 1; }

nccl: nvcc mpicxx
	@echo '#include <nccl.h>' | $(NVCC) $(NVCC_MPI) -x cu -E - >/dev/null 2>&1 || \
	    { echo "make: there is no nccl.h; MPI=1 needs NCCL: libnccl-dev has it, or NCCL=DIR where DIR/include/nccl.h is" >&2; exit 1; }

train_gpt_cu: train_gpt.cu train_gpt.c Makefile build/compile_cu | nvcc data $(if $(MPI),nccl)
	$(NVCC) $(NVCCFLAGS) $(NVCC_MPI) $(FP32) $< -o $@ -lcublasLt $(if $(MPI),-lnccl)

train_gpt_cu_on_cpu: $(TWIN) | tools data $(if $(MPI),mpicxx)
	$(ON_CPU) $(WARNINGS) -O1 -g $(FP32) $< -o $@ $(LDLIBS)

# Several of them, NCCL's calls being MPI's.
build/nccl_bf16 build/nccl_fp32: build/nccl_%: $(TWIN) | tools data
	$(ON_CPU) -O2 $(if $(filter fp32,$*),-DPRECISION_FP32) $< -o $@ $(LDLIBS)

test_nccl:
	@if command -v $(MPICXX) >/dev/null; then $(MAKE) --no-print-directory MPI=1 build/nccl_fp32 build/nccl_bf16; fi
	MPIRUN=$(MPIRUN) $(PYTHON) dev/check/test_nccl.py build/nccl_fp32 build/nccl_bf16

build/test_gpt_cu_bf16 build/test_gpt_cu_fp32: build/test_gpt_cu_%: test_gpt.c train_gpt.cu train_gpt.c Makefile build/compile_cu | nvcc
	$(NVCC) $(NVCCFLAGS) $(if $(filter fp32,$*),-DPRECISION_FP32) -x cu -DTWIN='"train_gpt.cu"' $< -o $@ -lcublasLt

test_gpt_cu: build/test_gpt_cu_bf16 build/test_gpt_cu_fp32
	./build/test_gpt_cu_bf16
	./build/test_gpt_cu_fp32

# compute-sanitizer makes kernels a hundred times as slow: the layers, and a model in parts.
SANITIZED = embedding layernorm linear attention gelu cross_entropy model_in_parts twin_matmul twin_head
sanitize_cu: build/test_gpt_cu_bf16 build/test_gpt_cu_fp32
	for tool in memcheck racecheck initcheck; do for p in bf16 fp32; do \
	    compute-sanitizer --tool $$tool --target-processes all --error-exitcode 9 \
	        ./build/test_gpt_cu_$$p $(SANITIZED) || exit 1; done; done
print_sanitized:
	@echo $(SANITIZED)

build/bench: dev/bench/bench.c train_gpt.c Makefile build/compile | tools
	$(COMPILE) -Wno-unused-function $< -o $@ $(LDLIBS)

bench: build/bench
	./build/bench $(BENCH)
	@if nvidia-smi -L >/dev/null 2>&1 && command -v $(NVCC) >/dev/null; then \
	    $(MAKE) --no-print-directory train_gpt_cu && timeout 40 ./train_gpt_cu --compare && \
	    { timeout 40 ./train_gpt_cu --compare --device cuda --preset gpt2 --batch 16 || \
	      timeout 40 ./train_gpt_cu --compare --device cuda --preset gpt2 --batch 4; }; fi

# clang tells of loops that it unrolls instead of vectorising, being so short here.
build/by_hand: dev/learn/by_hand.c train_gpt.c Makefile build/compile | tools
	$(COMPILE) -Wno-unused-function -Wno-pass-failed $< -o $@ $(LDLIBS)

by_hand: build/by_hand
	./build/by_hand

attention: | tools
	$(MAKE) --no-print-directory -C dev/learn/attention lessons

attention_lib: | tools
	$(MAKE) --no-print-directory -C dev/learn/attention lib

build/cpu_path: dev/learn/cpu/matmul.c train_gpt.c Makefile build/compile | tools
	$(COMPILE) -Wno-unused-function $< -o $@ $(LDLIBS)

cpu_path: build/cpu_path
	./build/cpu_path $(CPU_PATH)

variants: | tools
	$(PYTHON) dev/learn/variants/run.py $(VARIANTS)

mutate: | tools
	$(PYTHON) dev/check/mutate.py

FUZZ_SECONDS = 60
fuzz:
	$(PYTHON) dev/check/fuzz/run.py $(FUZZ_SECONDS)

build/shim.so: dev/check/faults/shim.c | tools
	@mkdir -p build
	$(CC) -std=c11 -O1 -Wall -Wextra -shared -fPIC $< -o $@

faults: train_gpt build/shim.so
	$(PYTHON) dev/check/faults/run.py

coverage: build/shim.so
	$(PYTHON) dev/check/coverage.py

clean:
	rm -rf build train_gpt train_gpt_mpi train_gpt_cu train_gpt_cu_on_cpu __pycache__

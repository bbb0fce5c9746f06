#!/bin/sh
# first_gpu.sh: what somebody with half an hour on a strange GPU should run. One report comes of it.
#
#     dev/check/first_gpu.sh                    from the repository's folder; the report is build/first_gpu.txt
#     LLMC=../llm.c dev/check/first_gpu.sh      also llm.c's CUDA program, built by its own Makefile
#     ON_CPU=1 dev/check/first_gpu.sh           tries the script itself, with the programs built for the CPU
#
# Each part has a time limit of its own, and one that fails or takes too long keeps no other from running; after half an
# hour no further one begins, and the one at work ends. The report ends with a line for each part: what came of it, and in
# how many seconds. After Ctrl-C, too.

cd "$(dirname "$0")/../.." || exit 1
mkdir -p build
report=build/first_gpu.txt summary=build/first_gpu.summary
rm -f build/first_?.safetensors*
: >"$report" && : >"$summary" || exit 1
deadline=$(($(date +%s) + 1800)) running=
trap 'trap "" INT TERM; [ -z "$running" ] || kill "$running"; tail -n 400 build/first_gpu.part >>"$report"
    echo "$name: interrupted" >>"$summary"; finish; exit 130' INT TERM

finish() {
    { echo; echo "== summary"; cat "$summary"; } | tee -a "$report"
    echo "The report is $report."
}

# part SECONDS NAME COMMAND: runs a command of the shell's under a time limit, into the report. It runs beside this
# shell, which sees no signal while it runs a command itself; timeout passes on the one that it gets.
part() {
    limit=$1 name=$2 begin=$(date +%s)
    shift 2
    [ "$limit" -lt $((deadline - begin)) ] || limit=$((deadline - begin))
    if [ "$limit" -le 0 ]; then
        printf '%-34s not done, no time is left\n' "$name" >>"$summary"
        return
    fi
    { echo; echo "== $name"; echo "\$ $*"; } | tee -a "$report"
    timeout -k 10 "$limit" sh -c "$*" </dev/null >build/first_gpu.part 2>&1 &
    running=$!
    wait "$running"
    status=$? running=
    tail -n 400 build/first_gpu.part >>"$report"
    tail -n 4 build/first_gpu.part
    case $status in
    0) result=ok ;;
    77) result="left out" ;;
    124 | 137) result="not done in $limit s" ;;
    *) result="FAILED, status $status" ;;
    esac
    printf '%-34s %-24s %5d s\n' "$name" "$result" $(($(date +%s) - begin)) >>"$summary"
}

needs='command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; exit 77; }'
if [ -n "$ON_CPU" ]; then
    program=./train_gpt_cu_on_cpu tests=build/test_twin
    small='--layers 2 --heads 2 --channels 16 --context 8' model="$small" batches='2 3 4'
    part 900 'build' make train_gpt_cu_on_cpu build/test_twin_bf16 build/test_twin_fp32
else
    program=./train_gpt_cu tests=build/test_gpt_cu
    small='' model='--preset gpt2' batches='16 32 64'
    part 30 'machine' 'nvidia-smi; nvcc --version || /usr/local/cuda/bin/nvcc --version; nproc; git log -1 --oneline'
    part 400 'build' make train_gpt_cu
fi

part 120 'smoke run' "$program $small --steps 20 --val-every 10 --sample-every 20 --checkpoint build/first_a.safetensors"
part 120 'generate' "$program --checkpoint build/first_a.safetensors --generate The --tokens 8"
part 120 'determinism' "$program $small --steps 20 --val-every 10 --sample-every 20 \
    --checkpoint build/first_b.safetensors && cmp build/first_a.safetensors build/first_b.safetensors"
part 120 'recompute' "$program $small --steps 20 --recompute --checkpoint build/first_c.safetensors"
part 60 'what fits' "$program --memory"

[ -n "$ON_CPU" ] || part 400 'build the tests' make -j2 build/test_gpt_cu_bf16 build/test_gpt_cu_fp32
part 240 'tests in bfloat16' "./${tests}_bf16 -v ${ON_CPU:+gelu}"
part 240 'tests in float32' "./${tests}_fp32 -v ${ON_CPU:+gelu}"

for batch in $batches; do
    part 120 "speed, batch $batch" "$program --compare --device cuda $model --batch $batch"
done
part 120 'speed, recompute' "$program --compare --device cuda $model --batch ${batches%% *} --recompute"
part 180 'CPU and GPU side by side' "$program --compare $small"

# Any Python that has PyTorch with CUDA.
for python in python3 /usr/bin/python3 build/venv-torch/bin/python; do
    $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && break
    python=
done
if [ -n "$python" ]; then
    part 300 'PyTorch' "$python dev/bench/pytorch.py --device cuda --preset gpt2 --context 1024 --batch ${batches%% *} \
        --rounds 3 ${LLMC:+--llmc '$LLMC'}"
else
    part 10 'PyTorch' 'echo "no PyTorch with CUDA is installed"; exit 77'
fi

# What takes longest comes last.
for run in 'memcheck bf16' 'memcheck fp32' 'racecheck bf16' 'initcheck bf16'; do
    tool=${run% *} precision=${run#* }
    part 200 "$tool, $precision" "$needs; compute-sanitizer --tool $tool --target-processes all --error-exitcode 9 \
        ./${tests}_$precision $(make -s print_sanitized)"
done
finish
! grep -q 'FAILED\|not done' "$summary"

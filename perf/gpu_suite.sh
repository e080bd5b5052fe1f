#!/usr/bin/env bash
# All that only a GPU can prove, in under ten minutes on one H100 or H200: the kernels' tests on the device, exactness,
# graphs, collectives, the 14B with dummy weights, and every benchmark.
#
#   perf/gpu_suite.sh [FOLDER]      logs and JSON go there, by default perf/results/gpu; PYTHON names the interpreter
#
# Needs torch with CUDA, triton, numpy, safetensors and pytest. Without hypothesis the property tests are left out, without
# transformers benchmark E1; with xdist the kernels' tests compile side by side. Nothing is installed. The status is 0 if
# every part passed.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2
results=${1:-perf/results/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=.:tests PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
table=()
failed=0

has() {
    "$python" -c "import $1" 2>/dev/null
}

# part NAME SECONDS COMMAND...: runs a part with a time limit, keeps its output, goes on whatever happens
part() {
    local name=$1 limit=$2 status began=$SECONDS verdict=passed
    shift 2
    echo "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" >"$results/$name.log" 2>&1
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        verdict="FAILED: over $limit s"
    elif [ "$status" -ne 0 ]; then
        verdict="FAILED: status $status"
    fi
    [ "$status" -eq 0 ] || failed=1
    tail -n 40 "$results/$name.log"
    table+=("$(printf '%-18s %5d s  %s' "$name" "$((SECONDS - began))" "$verdict")")
}

# missing NAME REASON: a part that cannot run here counts as failed
missing() {
    echo "== $1: $2"
    table+=("$(printf '%-18s %5d s  FAILED: %s' "$1" 0 "$2")")
    failed=1
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "perf/gpu_suite.sh needs $python to have a torch that sees a GPU; PYTHON names another one" >&2
    exit 2
fi
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
"$python" -c 'from perf.timing import machine; print(", ".join(f"{k} {v}" for k, v in machine().items()))' |
    tee "$results/machine.txt"

if has pytest; then
    # the project's own settings ask for plugins that may not be here
    printf '[pytest]\nmarkers =\n    long: needs minutes or a GPU\n    timeout: of pytest-timeout\n' >"$results/pytest.ini"
    pytest=("$python" -m pytest -q -rs -c "$results/pytest.ini" --rootdir . -p no:cacheprovider)
    mapfile -t tests < <(grep -l 'implementation(' tests/test_*.py | grep -v test_bench)
    if ! has hypothesis; then
        echo "no hypothesis: these files are left out:" "$(grep -l hypothesis "${tests[@]}" | tr '\n' ' ')"
        mapfile -t tests < <(grep -L hypothesis "${tests[@]}")
    fi
    has hypothesis && has httpx || pytest+=(--noconftest)
    # most of their time is compiling, a build for almost every shape
    has xdist && many=(-n "$(($(nproc) < 12 ? $(nproc) : 12))") || many=()
    part kernel_tests 130 "${pytest[@]}" "${many[@]}" -m "not long" "${tests[@]}"
    part gpu_tests 130 "${pytest[@]}" -m long tests/test_gpu.py
else
    missing kernel_tests "$python has no pytest"
    missing gpu_tests "$python has no pytest"
fi
part bench_kernels 130 "$python" -m perf.bench_kernels --repeats 10 --json "$results/kernels.json"
suites=(F1 F2 E1 E2 E3 E4 L1)
if ! has transformers; then
    echo "no transformers: E1 is left out"
    suites=(F1 F2 E2 E3 E4 L1)
fi
part bench_forward 210 "$python" -m perf.bench_forward --repeats 10 --only "${suites[@]}" --json "$results/forward.json"

echo
printf '%s\n' "${table[@]}" | tee "$results/summary.txt"
exit "$failed"

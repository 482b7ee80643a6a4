#!/bin/sh
# Every result of docs/benchmarks.md, piece by piece, on a machine that does nothing else: all.sh RESULTS MODELS [PIECE...]
# A piece whose file is in RESULTS is not run again; delete the file, or name the piece, to measure it anew.
# PYTHON is the interpreter; LLAMA_AVX2 a folder with llama.cpp's libraries built without AVX-512, for the last pieces.
set -eu
here=$(dirname "$0")
results=$1 models=$2
shift 2
wanted=" $* "
mkdir -p "$results"

piece() { # name, benchmark, options
    name=$1 script=$2
    shift 2
    case $wanted in
    "  ") [ ! -e "$results/$name.json" ] || return 0 ;;
    *" $name "*) ;;
    *) return 0 ;;
    esac
    echo "== $name" >&2
    start=$(date +%s)
    ${PYTHON:-python} "$here/$script.py" "$@" --folder "$models" --json "$results/$name.json"
    echo "== $name: $(($(date +%s) - start)) s" >&2
}

avx2="--isa avx2 ${LLAMA_AVX2:+--llama-library $LLAMA_AVX2}"
qwen="--trio qwen1.5b+0.5b --tokens 16"
piece decode-smollm2-bf16 decode --trio smollm2
piece workload-smollm2 workload --trio smollm2 --trials "$results/workload-smollm2.trials"
piece decode-qwen-bf16 decode $qwen
piece prefill-smollm2 prefill --trio smollm2
piece prefill-qwen prefill --trio qwen1.5b+0.5b
piece decode-qwen-8bit decode $qwen --bits 8
piece decode-qwen-4bit decode $qwen --bits 4
piece decode-smollm2-8bit decode --trio smollm2 --bits 8
piece decode-smollm2-4bit decode --trio smollm2 --bits 4
piece busy-smollm2 busy --trio smollm2 --rounds 3
piece busy-qwen busy --trio qwen1.5b+0.5b --rounds 2 --tokens 16
piece decode-smollm2-avx2 decode --trio smollm2 $avx2
piece decode-qwen-avx2 decode $qwen --rounds 3 $avx2
piece prefill-smollm2-avx2 prefill --trio smollm2 $avx2

#!/usr/bin/env bash
# Everything that is measured on one GPU, in about four minutes on an H100: installed jaxmoe with the
# library of its family, nothing else on the GPU. Rows go to benchmarks/results/.
#
#   benchmarks/gpu.sh                   # all steps
#   benchmarks/gpu.sh layers stages     # some of: layers stages prepare w4a8 baseline roofline
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
all=(layers stages prepare w4a8 baseline roofline)
steps=("$@")
[ $# -gt 0 ] || steps=("${all[@]}")
names='--layer qwen3-30b-a3b --layer gpt-oss-120b --layer mixtral-8x7b --layer deepseek-v3-ep8'
formats='--format nvfp4 --format mxfp4'

rows=benchmarks/results/$("$python" -c \
  'from jaxmoe import benchmark as b; print(b.device_slug(b.device_name()))').json || exit 1

# A step that takes far longer than it should is given up; its rows up to there are kept.
bench() { timeout "$1" "$python" -m jaxmoe.cli bench --json "$rows" "${@:2}"; }

failed=()
for step in "${steps[@]}"; do
  printf '\n== %s\n' "$step"
  case $step in
    # shellcheck disable=SC2086  # the lists are meant to be split
    layers) bench 200 $names $formats --implementation auto --compute w4a16 --seconds 0.15 \
      --tokens 1,16,64,256,1024,4096,16384 ;;
    stages) timeout 90 "$python" benchmarks/stages.py ;;
    prepare) timeout 120 "$python" benchmarks/prepare.py ;;
    # shellcheck disable=SC2086
    w4a8) bench 120 $names $formats --implementation auto --compute w4a8 --seconds 0.1 \
      --mode program --tokens 1,64,1024,16384 ;;
    baseline) bench 60 --layer qwen3-30b-a3b --implementation ragged_dot --seconds 0.2 \
      --tokens 1,256 ;;
    roofline) "$python" benchmarks/roofline.py "$rows" ;;
    *) echo "step must be one of ${all[*]}, got $step" >&2; exit 2 ;;
  esac || failed+=("$step")
done
printf '\nrows: %s\n' "$rows"
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }

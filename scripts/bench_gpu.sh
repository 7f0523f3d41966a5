#!/usr/bin/env bash
# For whoever has a GPU for ten minutes: the tests that need one, a short real training with SGD and with SAM.v2, and the
# benchmark, of which what fits into the time counts. Everything ends in one JSON file. Without a network it takes
# any Python that has what is named below.
#
# usage: bash scripts/bench_gpu.sh [--data-dir DIR] [--device DEVICE] [--output FILE] [--minutes M] [flags of benchmarks.benchmark]
#   --data-dir DIR   an image folder to train on (DIR/train/<class>/*, DIR/test/<class>/*); the digits without it
#   --device DEVICE  cuda; cpu tries the script where there is no GPU
#   --output FILE    bench_gpu.json
#   --minutes M      how long it may take, a whole number (10)
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")/.." && pwd)
data=(--dataset digits) device=cuda output=$PWD/bench_gpu.json minutes=10
flags=()
while [ $# -gt 0 ]; do
    case $1 in --data-dir=* | --device=* | --output=* | --minutes=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        --data-dir | --device | --output | --minutes)
            [ -n "${2-}" ] || { echo "error: $1 needs a value; --help lists what it takes" >&2; exit 2; } ;;&
        --data-dir) data=(--dataset folder --data-dir "$(realpath -m "$2")"); shift 2 ;;
        --device) device=$2; shift 2 ;;
        --output) output=$(realpath -m "$2"); shift 2 ;;
        --minutes) minutes=$2; shift 2 ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        *) flags+=("$1"); shift ;;
    esac
done
[ "${data[1]}" = digits ] || [ -d "${data[3]}/train" ] || { echo "error: --data-dir: there is no '${data[3]}/train'" >&2; exit 2; }
[ -d "$(dirname "$output")" ] || { echo "error: --output: there is no directory '$(dirname "$output")'" >&2; exit 2; }
[ ! -d "$output" ] || { echo "error: --output: '$output' is a directory: name a file" >&2; exit 2; }
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "error: --minutes takes a whole number above 0, not '$minutes'" >&2; exit 2; }
cd "$here"
PYTHON=python3
if ! python3 -c 'import torch, torchvision, scipy, tqdm, tensorboard, sklearn, pytest' 2>/dev/null; then
    set -- requirements.txt requirements-dev.txt
    # shellcheck source=scripts/setup.sh
    source scripts/setup.sh
fi
"$PYTHON" -c 'import sys; from benchmarks.benchmark import build_parser; build_parser().parse_args(sys.argv[1:])' \
    --device "$device" ${flags[@]+"${flags[@]}"} # a wrong flag is known now
scratch=$(mktemp -d)
failed=0

# shellcheck disable=SC2317,SC2329 # the trap calls it
collect() { # what there is, into one file
    "$PYTHON" - "$scratch" "$output" <<'PYTHON'
import json
import sys
from pathlib import Path

scratch, output = map(Path, sys.argv[1:])
result = {"parts": {}}
for text in sorted(scratch.glob("*.txt")):
    name = text.stem
    ended = scratch / f"{name}.code"
    part = {"exit_code": int(ended.read_text()) if ended.exists() else None, "output": text.read_text()}
    for file in (scratch / f"{name}.json", scratch / f"{name}-run" / "result.json"):
        if file.exists():
            part["result"] = json.loads(file.read_text())
    result["parts"][name] = part
output.write_text(json.dumps(result, indent=1) + "\n")
print(output)
PYTHON
    rm -rf "$scratch"
}
child=''
trap collect EXIT
trap '[ -z "$child" ] || { kill -TERM "$child" 2>/dev/null || true; wait "$child" || true; }; exit 130' INT TERM HUP

part() { # part NAME COMMAND...: run it, show its output, keep that and how it ended
    local name=$1 left=$((60 * minutes - 10 - SECONDS)) code=0
    shift
    echo "== $name" >&2
    : >"$scratch/$name.txt"
    timeout --kill-after=5 $((left > 1 ? left : 1)) "$@" >"$scratch/$name.txt" 2>&1 & # behind: a signal ends wait at once
    child=$!
    tail -n +1 -f --pid="$child" "$scratch/$name.txt" &
    wait "$child" || code=$?
    child=''
    wait # for tail
    echo "$code" >"$scratch/$name.code"
    [ "$code" = 0 ] || { failed=1; echo "== $name ended with exit code $code" >&2; }
}

SECONDS=0 # without what is installed first
part tests "$PYTHON" -m pytest tests/test_gpu.py -p no:cacheprovider
for optimizer in sgd sgd-sam; do
    sam=()
    [ "$optimizer" = sgd ] || sam=(--sam-v2)
    part "train-$optimizer" "$PYTHON" main_prune_train.py "${data[@]}" --device "$device" --optmzr "$optimizer" \
        ${sam[@]+"${sam[@]}"} --prune-method random --sparsity 0.9 --epochs 10 --compile on \
        --output-dir "$scratch/train-$optimizer-run"
done
part benchmark "$PYTHON" -m benchmarks.benchmark --device "$device" --turns 5 --output "$scratch/benchmark.json" \
    ${flags[@]+"${flags[@]}"}
exit $failed

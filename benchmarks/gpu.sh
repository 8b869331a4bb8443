#!/usr/bin/env bash
# What is measured on a GPU, one step after the other; one that fails or runs out of its time leaves the others alone.
#
#   benchmarks/gpu.sh OUT [STEP=MINUTES ...]        such as tests=3 delta=5 recurrences=20; all steps, if none is named
#
# A step is `tests`, a comparison of configs/compare, `longnet-ranks` (two GPUs and more), or a bench. OUT gets a log a
# step, the tables as CSV, and of a comparison what it takes to go on: unpack NAME.tgz in runs/compare. Wants python with
# torch for CUDA; mamba-ssm, causal-conv1d and fla where they are to be measured too. Every GPU there is trains models of
# a comparison, where NVIDIA's MPS is at hand several at once on each; what is timed runs alone.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
steps=${*:-tests=10 scan=10 model=10 delta=15 delta-layer=5 decode=10 train=10 longnet-ranks=5 growth=20 growth_models=20 recurrences=60 erasing=15 mqar=30 recovery=10}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
cli="python3 -m rnn_longctx.cli"
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')

compare() {
    local jobs=1 code
    if ! grep -q '^measure: growth' "configs/compare/$1.yaml"; then
        jobs=$((gpus * 14))
        if command -v nvidia-cuda-mps-control >/dev/null; then
            export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
            nvidia-cuda-mps-control -d
        fi
    fi
    # interrupted, and not killed: it ends its cells, which go on from their snapshots
    timeout -s INT "$2m" $cli compare "configs/compare/$1.yaml" --device cuda --jobs "$jobs"
    code=$?
    [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    tar czf "$out/$1.tgz" --exclude snapshots --exclude model --exclude site-packages.txt -C runs/compare "$1"
    for table in runs/compare/"$1"/*.csv; do cp "$table" "$out/$1-$(basename "$table")"; done
    return $code
}

for step in $steps; do
    name=${step%=*} minutes=${step#*=} began=$SECONDS
    if [ "$name" = tests ]; then
        timeout "${minutes}m" python3 -m pytest -m gpu -q
    elif [ "$name" = longnet-ranks ]; then
        timeout "${minutes}m" torchrun --nproc-per-node "$gpus" -m rnn_longctx.cli bench parallel --mixer longnet --length 1m --out "$out/longnet-ranks.csv"
    elif [ -f "configs/compare/$name.yaml" ]; then
        compare "$name" "$minutes"
    else
        lengths=$([ "$name" = delta ] && echo "--lengths 1m")
        timeout "${minutes}m" $cli bench "$name" $lengths --out "$out/$name.csv"
    fi >"$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - began)) s; $(tail -n 1 "$out/$name.log")"
done

#!/usr/bin/env bash
# What is measured on a GPU, one step after the other; one that fails or runs out of its time leaves the others alone.
#
#   benchmarks/gpu.sh OUT [STEP=MINUTES ...]        such as tests=3 delta=5 study=20; all steps, if none is named
#
# OUT gets a log a step, the benches' tables as CSV, and of the study its table and what it takes to go on: unpack
# study.tgz in runs/compare. Wants python with torch for CUDA; mamba-ssm, causal-conv1d and fla where they are to be
# measured too. Every GPU there is trains models of the study; where NVIDIA's MPS is at hand, several at once on each.
set -u
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
steps=${*:-tests=10 scan=10 model=10 delta=15 delta-layer=5 decode=10 train=10 study=90}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
cli="python3 -m rnn_longctx.cli"
jobs=$(($(python3 -c 'import torch; print(torch.cuda.device_count())') * 14))

study() {
    if command -v nvidia-cuda-mps-control >/dev/null; then
        export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
        nvidia-cuda-mps-control -d
    fi
    # interrupted, and not killed: it ends its cells, which go on from their snapshots
    timeout -s INT "$1m" $cli compare configs/compare/recurrences.yaml --jobs "$jobs"
    local code=$?
    [ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] && echo quit | nvidia-cuda-mps-control
    tar czf "$out/study.tgz" --exclude snapshots --exclude model --exclude site-packages.txt -C runs/compare recurrences
    cp runs/compare/recurrences/compare.* "$out"
    return $code
}

for step in $steps; do
    name=${step%=*} minutes=${step#*=} began=$SECONDS
    case $name in
    tests) timeout "${minutes}m" python3 -m pytest -m gpu -q ;;
    study) study "$minutes" ;;
    delta) timeout "${minutes}m" $cli bench delta --lengths 1m --out "$out/delta.csv" ;;
    *) timeout "${minutes}m" $cli bench "$name" --out "$out/$name.csv" ;;
    esac >"$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - began)) s; $(tail -n 1 "$out/$name.log")"
done

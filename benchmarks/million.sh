#!/usr/bin/env bash
# Trains models of docs/results/million.md side by side on one GPU, and evaluates each as soon as it is trained.
#
#   CUDA_VISIBLE_DEVICES=1 benchmarks/million.sh FOLDER [NAME ...]
#
# NAME is one of `recipe` below, with its seed; without any, what is to be tried next. FOLDER/NAME is a training,
# FOLDER/fin/NAME the finished weights, FOLDER/{keys,far,loss,long,eight}-NAME the evaluations, for `benchmarks/million.py
# table`. Killed, the same command goes on where it stopped. Wants python with torch for CUDA and fla, texts/prose-train
# and texts/prose-eval (plain novels), and NVIDIA's MPS where several are to share the GPU.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
names=${*:-more-1 more-0 more-2 cold-1 cold-0}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
cli="python3 -m rnn_longctx.cli"
cd "$root"

if command -v nvidia-cuda-mps-control >/dev/null; then
    export CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d) CUDA_MPS_LOG_DIRECTORY=$(mktemp -d)
    nvidia-cuda-mps-control -d
    trap 'echo quit | nvidia-cuda-mps-control; rm -r "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"' EXIT
    export CUDA_VISIBLE_DEVICES=0 # of those that the daemon sees
fi

slow=kda:heads=8,head_dim=64,A_min=1e-7,A_max=1,A_log_uniform=true
short_mix='[{task: "passkey:learn=both", fraction: 0.2, lengths: [128, LONG], fill: true},
    {task: "passkey:learn=both", fraction: 0.15, lengths: [128, LONG], fill: true, in_text: true},
    {task: "passkey:learn=both", fraction: 0.15, lengths: [128, LONG], fill: true, in_text: true, draw: uniform},
    {task: "multikey:keys=4", fraction: 0.2, lengths: [LEAST, LONG], fill: true, in_text: true}]'

usual=kda:heads=8,head_dim=64
gdn=gated-deltanet:heads=8,head_dim=64,expand_v=1
mamba2=mamba2:headdim=32,d_state=64
after() { echo "[\"$1\", \"$1,$2\", \"$1,$2\", \"$1,$2\"]"; } # the first layer at its usual rates, three slow ones above

recipe() { # the settings of a NAME, which ends in its seed, and the number of its steps
    local kind=${1%-*} mix turn=1k:125:64,256k:15:2 more=1k:250:64,256k:20:2
    steps=2460
    case $kind in
    as-it-is) ;;
    slow-wide) settings+=(--set "model.mixer=$slow") ;;
    cycles | cold) # the decay alternates: rows of 1K, of which many are read at once, and streams of 256K
        settings+=(--set schedule.decay=0.25 --set "train_length=2k:1100:32,16k:450:4,64k:300:2,256k:50:2,$turn,$turn,$turn,$turn")
        [ "$kind" = cycles ] || settings+=(--set passing.carry=0.1) ;; # nine of ten rows begin without a state, as short texts do
    more) # of both more, and four of five rows begin without a state
        steps=3390
        settings+=(--set schedule.decay=0.3 --set passing.carry=0.2 --set "train_length=2k:1500:32,16k:450:4,64k:300:2,256k:60:2,$more,$more,$more,$more") ;;
    tail) # the decay ends on rows of 1K
        settings+=(--set schedule.decay=0.25 --set train_length=2k:1100:32,16k:450:4,64k:300:2,256k:110:2,1k:500:64) ;;
    to16k*) # streams and gaps of up to 16K alone: what one setting is worth, in ten minutes
        mix=${short_mix//LONG/16k}
        case $kind in
        *-usual) settings+=(--set "model.mixer=$usual") ;; # all layers forget soon
        *-slow) settings+=(--set "model.mixer=$slow") ;; # none does
        *-gdn) settings+=(--set "model.mixer=$(after "$gdn" A_min=1e-7,A_max=1,A_log_uniform=true)") ;;
        *-mamba2) settings+=(--set "model.mixer=$(after "$mamba2" A_low=1e-5,A_high=1,A_draw=log-uniform)") ;;
        *-filler) mix=${mix//, in_text: true/} ;; # no key stands in text
        *-log) mix=${mix//, draw: uniform/} ;; # all gaps log-uniform
        *-lr*) settings+=(--set "optimizer.lr=${kind#*-lr}") ;;
        esac
        settings+=(--set schedule.decay=0.25 --set train_length=2k:1100:32,16k:860:4,1k:500:64 --set passing.segment=16k
            --set "data.mix=${mix/LEAST/1k}" --set 'evaluate.lengths=[2k, 64k]') ;;
    short-wide) # windows of 512 alone
        mix=${short_mix//LONG/512}
        settings+=(--set passing=null --set train_length=512 --set batch_size=128 --set steps=2460
            --set "data.mix=${mix/LEAST/512}" --set 'evaluate.lengths=[512]') ;;
    *) echo "no recipe is called $kind" >&2 && return 1 ;;
    esac
}

run() { # one model: train it, and evaluate it
    local name=$1 steps settings=(--set "seed=${1##*-}" --set "out=$folder/$1" --set evaluate.every=1300)
    recipe "$name" || return
    if [ ! -e "$folder/fin/$name" ]; then
        $cli train configs/train/million.yaml "${settings[@]}" &
        # its finished weights are there before what is measured of them last, which takes minutes
        while ! grep -q "\"step\": $steps" "$folder/$name/last/config.json" 2>/dev/null; do
            sleep 3
            kill -0 $! 2>/dev/null || return
        done
        sleep 5 # until all files are written
        rm -rf "$folder/fin/part-$name"
        mkdir -p "$folder/fin" && cp -r "$folder/$name/last" "$folder/fin/part-$name" && mv "$folder/fin/part-$name" "$folder/fin/$name" || return
    fi
    evaluate() {
        $cli eval "$folder/fin/$name" --device cuda --dtype bfloat16 --out "$folder/$1-$name" "${@:2}"
    }
    evaluate keys --lengths 512,16k,64k,256k --task passkey:n=60,tokens=16m --task passkey:haystack=stdlib,n=60,tokens=16m --task multikey:n=60,tokens=16m
    evaluate far --lengths 1m --task passkey:n=30,tokens=32m --task passkey:haystack=stdlib,n=30,tokens=32m
    evaluate loss --text stdlib --text texts/prose-eval --lengths 512,16k,64k,256k,1m --task lm:slices=16 --mitigation none --mitigation recompute:last=512
    case $name in to16k-*) wait && return ;; esac
    evaluate long --lengths 4m,16m --task passkey:n=3,tokens=48m
    evaluate eight --lengths 8m --task lm:slices=1
    wait
}

first=${names%% *}
for name in $names; do
    run "$name" >>"$folder/$name.log" 2>&1 &
    [ "$name" = "$first" ] || continue
    # it tunes the kernels, alone, and the others find on disk what it chose
    while kill -0 $! 2>/dev/null && [ "$(cat "$folder/$name/log.csv" 2>/dev/null | wc -l)" -lt 2 ]; do sleep 2; done
done
wait

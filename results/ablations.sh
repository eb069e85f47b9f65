#!/usr/bin/env bash
# Trains and evaluates the ablations of results/README.md: results/ablations.sh BOOKS [NAME ...]
# Each is configs/recall_64k.py:small with one thing changed, seed 0. Checkpoints go to runs/ablations/,
# trials to runs/results/ablations/NAME/. BOOKS as for reproduce.sh. What is finished is not repeated.
set -euo pipefail
books=$(realpath "$1")
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}
models=runs/ablations
out=${OUT:-runs/results/ablations}
mkdir -p "$models"

# Name and flags. "recipe" is the configuration itself; other chunks read as many bytes a query.
all='
recipe
chunk-128        --model.chunk-size 128 --model.top-k 16
chunk-512        --model.chunk-size 512 --model.top-k 4
top-16           --model.top-k 16
top-128          --model.top-k 128
selector-mean    --model.selector mean
selector-max     --model.selector max --model.selector-blocks 4
no-key-conv      --model.key-conv 0
no-preheat       --stages.1.trainable all
ce               --stages.4.loss ce
zero-init        --model.attention-init zero
copy-init        --model.attention-init copy
share-1-of-4     --model.num-blocks 3 --model.num-attention-blocks 1 --model.ffn-width 222
share-0-of-4     --model.num-blocks 4 --model.num-attention-blocks 0 --model.ffn-width 190 --model.key-conv 0 --stages.1.trainable all
'

names=${*:2}
for name in ${names:-$(awk 'NF {print $1}' <<<"$all")}; do
    flags=$(awk -v name="$name" '$1 == name {$1 = ""; print}' <<<"$all")
    # shellcheck disable=SC2086
    $python train.py --config configs/recall_64k.py:small --data.path "$books/[!dS]*.txt" \
        --run.remat none --workdir "$models/run-$name" $flags
    model=$models/$name.safetensors
    [ -e "$model" ] || $python -m rwkvx_jax.convert "$models/run-$name" "$model" --to ours
    measure() { $python eval.py "$@" --piece 4096 --checkpoint "$model"; }
    measure niah --output "$out/$name/pairs" --tasks recall_64 --lengths 4096,16384 --depths 5 --trials 10
    measure passkey --output "$out/$name/book" --lengths 4096,16384 --depths 5 --trials 10 \
        --haystack "$books/dracula.txt"
    measure long-loss --output "$out/$name/loss" --text "$books/dracula.txt" --length 16384
done

#!/usr/bin/env bash
# Trains and evaluates the mixers of results/README.md: results/twins.sh BOOKS [VARIANT[@SEED] ...]
# Each is configs/twins_4k.py, seed 0 unless said: rwkv7 (no variant), kda, kda-alone, kda@1, ...
# Checkpoints go to runs/twins/, trials to runs/results/twins/NAME/. BOOKS as for reproduce.sh.
# What is finished is not repeated; a run that was stopped goes on.
set -euo pipefail
books=$(realpath "$1")
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}
models=runs/twins
out=${OUT:-runs/results/twins}
mkdir -p "$models"

all="rwkv7 gated_deltanet mamba2 kda transformer transformer-sparse
    rwkv7-alone gated_deltanet-alone mamba2-alone kda-alone
    rwkv6 rwkv5 rwkv4 deltanet lightning
    rwkv6-alone rwkv5-alone rwkv4-alone deltanet-alone lightning-alone
    rwkv7@1 gated_deltanet@1 mamba2@1 rwkv7-alone@1
    rwkv7@2 gated_deltanet@2 mamba2@2 rwkv7-alone@2"

names=${*:2}
for name in ${names:-$all}; do
    variant=${name%@*} seed=0
    [ "$name" = "$variant" ] || seed=${name#*@}
    config=configs/twins_4k.py
    [ "$variant" = rwkv7 ] || config+=:$variant
    $python train.py --config "$config" --data.path "$books/[!dS]*.txt" --run.remat none \
        --data.seed "$seed" --model.init-seed "$seed" --workdir "$models/run-$name"
    model=$models/$name.safetensors
    [ -e "$model" ] || $python -m rwkvx_jax.convert "$models/run-$name" "$model" --to ours
    $python eval.py niah --piece 4096 --checkpoint "$model" --output "$out/$name/pairs" \
        --tasks recall_64 --lengths 4096,16384 --depths 5 --trials 10
    $python eval.py long-loss --piece 4096 --checkpoint "$model" --output "$out/$name/loss" \
        --text "$books/dracula.txt" --length 16384
    $python eval.py ar-hits --piece 4096 --checkpoint "$model" --output "$out/$name/hits" \
        --text "$books/dracula.txt" --length 4096 --documents 40
done

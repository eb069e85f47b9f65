#!/usr/bin/env bash
# Trains and evaluates what results/README.md tells of: results/reproduce.sh BOOKS [SEED ...]
# Checkpoints go to runs/seedN/, figures and trials to results/seedN/.
# BOOKS: a folder of the novels named in results/README.md. What begins with d (dracula.txt is for
# evaluation, david_copperfield.txt unused) or S (a note of sources) is not trained on.
set -euo pipefail
books=$(realpath "$1")
cd "$(dirname "$0")/.."
seeds=${*:2}
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}

train() {  # CONFIG SEED
    $python train.py --config "configs/$1.py" --data.path "$books/[!dS]*.txt" \
        --data.seed "$2" --model.init-seed "$2" --run.remat none --workdir "runs/$1-$2"
}

keep() {  # CONFIG SEED NAME [flags]
    $python -m rwkvx_jax.convert "runs/$1-$2" "runs/seed$2/$3.safetensors" --to ours "${@:4}"
}

evaluate() {  # SEED
    local models=runs/seed$1 out=results/seed$1
    local all=(--checkpoint "$models/recall_64k.safetensors"
        --checkpoint "$models/recall_16k.safetensors"
        --checkpoint "$models/recall_64k_rwkv7.safetensors")
    local book=(--haystack "$books/dracula.txt")
    passkey() { $python eval.py passkey --piece 4096 "${all[@]}" --output "$out/$1" "${@:2}"; }
    passkey filler --lengths 1024,4096,16384,65536 --trials 10
    passkey book --lengths 1024,4096,16384,65536 --trials 10 "${book[@]}"
    passkey filler_256k --lengths 262144 --trials 4 --depths 5
    passkey book_256k --lengths 262144 --trials 4 --depths 5 "${book[@]}"
    passkey filler_1m --lengths 1048576 --trials 1 --depths 5
    passkey book_1m --lengths 1048576 --trials 1 --depths 5 "${book[@]}"
    for digits in 3 8; do
        passkey "digits$digits" --lengths 4096,16384 --trials 5 --digits $digits
    done
    passkey wording --lengths 4096,16384 --trials 5 --wording other
    $python eval.py niah --piece 4096 "${all[@]}" --output "$out/pairs" --depths 10 --trials 10 \
        --tasks recall_16 recall_64 --lengths 4096,16384
    $python eval.py niah --piece 4096 "${all[@]}" --output "$out/pairs" --depths 10 --trials 10 \
        --tasks recall_256 --lengths 16384
    $python eval.py long-loss "${all[@]}" --output "$out/loss" --text "$books/dracula.txt" \
        --length 65536
}

for seed in ${seeds:-0 1 2}; do
    train recall_64k "$seed"
    train recall_64k_rwkv7 "$seed"
    mkdir -p "runs/seed$seed"
    keep recall_64k "$seed" recall_64k
    keep recall_64k "$seed" recall_16k --step 3600
    keep recall_64k_rwkv7 "$seed" recall_64k_rwkv7
    evaluate "$seed"
done

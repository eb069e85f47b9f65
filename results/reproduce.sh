#!/usr/bin/env bash
# Trains and evaluates what results/README.md tells of: results/reproduce.sh BOOKS [SEED ...]
# Checkpoints go to runs/seedN/, figures and trials to runs/results/seedN/ (other
# weights than those kept in results/ never join their files).
# BOOKS: a folder of the novels named in results/README.md. What begins with d (dracula.txt and
# david_copperfield.txt, for evaluation) or S (a note of sources) is not trained on.
set -euo pipefail
books=$(realpath "$1")
cd "$(dirname "$0")/.."
seeds=${*:2}
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}

train() {  # EXPERIMENT[:VARIANT] SEED
    $python train.py --config "$1" --data.path "$books/[!dS]*.txt" \
        --data.seed "$2" --model.init-seed "$2" --run.remat none --workdir "runs/${1/:/_}-$2"
}

keep() {  # EXPERIMENT[_VARIANT] SEED NAME [flags]
    local model=runs/seed$2/$3.safetensors
    [ -e "$model" ] || $python -m rwkvx_jax.convert "runs/$1-$2" "$model" --to ours "${@:4}"
}

evaluate() {  # SEED
    local models=runs/seed$1 out=${OUT:-runs/results}/seed$1
    local two=(--checkpoint "$models/recall_64k.safetensors"
        --checkpoint "$models/recall_64k_rwkv7.safetensors")
    local all=("${two[@]}" --checkpoint "$models/recall_16k.safetensors")
    local book=(--haystack "$books/dracula.txt") long_book=(--haystack "$books/d*.txt")
    passkey() { $python eval.py passkey --piece 4096 --output "$out/$1" "${@:2}"; }
    pairs() { $python eval.py niah --piece 4096 --output "$out/pairs" --trials 10 "${two[@]}" "$@"; }
    passkey filler "${all[@]}" --lengths 1024,4096,16384,65536 --trials 10
    passkey book "${all[@]}" --lengths 1024,4096,16384,65536 --trials 10 "${book[@]}"
    pairs --tasks recall_16 recall_64 --lengths 4096,16384
    pairs --tasks recall_256 --lengths 16384
    for digits in 3 4 6 7 8; do
        passkey "digits$digits" "${two[@]}" --lengths 4096,16384 --trials 5 --digits $digits
    done
    passkey wording "${two[@]}" --lengths 4096,16384 --trials 5 --wording other
    $python eval.py long-loss "${two[@]}" --output "$out/loss" --text "$books/dracula.txt" \
        --length 65536
    $python eval.py selection --checkpoint "$models/recall_64k.safetensors" --blocks 4 \
        --output "$out/selection" --text "$books/dracula.txt" --length 65536
    [ "$1" = 0 ] || return 0
    passkey filler_256k "${all[@]}" --lengths 262144 --trials 4 --depths 5
    passkey book_256k "${all[@]}" --lengths 262144 --trials 4 --depths 5 "${long_book[@]}"
    passkey filler_1m "${all[@]}" --lengths 1048576 --trials 1 --depths 5
    passkey book_1m "${all[@]}" --lengths 1048576 --trials 1 --depths 5 "${long_book[@]}"
    $python eval.py speed --checkpoint "$models/recall_64k.safetensors" --output "$out/speed"
    local short=(--checkpoint "$models/recall_16k.safetensors"
        --checkpoint "$models/recall_64k_full.safetensors" --output "$out/full")
    $python eval.py niah --piece 4096 "${short[@]}" --trials 5 --tasks recall_64 \
        --lengths 4096,16384,32768
    $python eval.py passkey --piece 4096 "${short[@]}" --trials 5 "${book[@]}" \
        --lengths 1024,4096,16384,32768
    $python eval.py long-loss "${short[@]}" --text "$books/dracula.txt" --length 32768
}

for seed in ${seeds:-0 1 2}; do
    train recall_64k "$seed"
    train recall_64k:rwkv7 "$seed"
    [ "$seed" != 0 ] || train recall_64k:full 0
    mkdir -p "runs/seed$seed"
    keep recall_64k "$seed" recall_64k
    keep recall_64k "$seed" recall_16k --step "$($python - <<'PYTHON'
from rwkvx_jax.experiment_files import load_config
print(sum(s.steps for s in load_config("recall_64k").stages if s.seq_len <= 16384))
PYTHON
)"
    keep recall_64k_rwkv7 "$seed" recall_64k_rwkv7
    [ "$seed" != 0 ] || keep recall_64k_full 0 recall_64k_full
    evaluate "$seed"
done

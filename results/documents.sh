#!/usr/bin/env bash
# Short documents in one window, apart or one after the other: results/documents.sh BOOKS [SEED ...]
# Seeds 0 1 2 unless said. Checkpoints go to runs/documents/, trials to runs/results/documents/SEED/.
# BOOKS as for reproduce.sh. What is finished is not repeated; a run that was stopped goes on.
set -euo pipefail
books=$(realpath "$1")
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}
models=runs/documents
out=${OUT:-runs/results/documents}
mkdir -p "$models"
[ -e "$models/train.jsonl" ] ||
    $python tools/cut_documents.py "$books/[!dS]*.txt" --output "$models/train.jsonl"
[ -e "$models/held_out" ] ||
    $python tools/cut_documents.py "$books/dracula.txt" --output "$models/held_out"

seeds=${*:2}
for seed in ${seeds:-0 1 2}; do
    checkpoints=()
    for variant in apart carried; do
        config=configs/documents_4k.py name=$variant-$seed
        [ "$variant" = apart ] || config+=:$variant
        $python train.py --config "$config" --data.path "$models/train.jsonl" --run.remat none \
            --data.seed "$seed" --model.init-seed "$seed" --workdir "$models/run-$name"
        model=$models/$name.safetensors
        [ -e "$model" ] || $python -m rwkvx_jax.convert "$models/run-$name" "$model" --to ours
        checkpoints+=(--checkpoint "$model")
    done
    for task in long-loss ar-hits; do
        $python eval.py "$task" "${checkpoints[@]}" --output "$out/$seed" \
            --text "$models/held_out" --length 1024 --skip 0 --documents 300
    done
done

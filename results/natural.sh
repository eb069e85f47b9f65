#!/usr/bin/env bash
# Recall in plain text by the kept models: results/natural.sh BOOKS SPEECHES
# BOOKS as for reproduce.sh; SPEECHES: a folder of .txt files of another kind of text. Trials go to
# runs/results/natural/. What is finished is not repeated.
set -euo pipefail
books=$(realpath "$1") speeches=$(realpath "$2")
cd "$(dirname "$0")/.."
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 JAX_PLATFORMS=cpu
python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/results/natural}
two=(--checkpoint results/recall_64k.safetensors --checkpoint results/recall_64k_rwkv7.safetensors)
all=("${two[@]}" --checkpoint results/recall_64k_full.safetensors)
for text in "$books/dracula.txt" "$speeches"; do
    where=$out/$(basename "$text" .txt)
    $python eval.py ar-hits "${all[@]}" --output "$where" --text "$text" --piece 2048 --batch 1 \
        --length 16384 --documents 20
    $python eval.py copy "${all[@]}" --output "$where" --text "$text" --piece 2048 --batch 1 \
        --distances 256,1024,4096,16384 --documents 20
    $python eval.py longppl "${two[@]}" --output "$where" --text "$text" --piece 2048 --batch 1 \
        --length 32768 --stride 4096 --documents 8
done

#!/usr/bin/env bash
# NusaX (Acehnese, Javanese) with the English MiniLM checkpoint and human translations, 2 seeds:
#   MINILM=<checkpoint folder> DATA=<folder of nusax/...> sweeps/nusax_minilm.sh
# About an hour on one core. mt=gold: test sources are human English, so the figures of translate_test and flare are upper bounds.
set -euo pipefail
: "${MINILM:?set MINILM to the checkpoint folder}" "${DATA:?set DATA to the folder that holds nusax/}"
out=${OUT:-outputs/nusax_minilm}
${PYTHON:-.venv/bin/python} -m flare_exp -m experiment=nusax_minilm model.path="$MINILM" task.data_dir="$DATA/nusax" \
    output_dir="$out" task.lang=ace,jav seed=0,1 method=zero_shot,translate_test,lora,flare trainer.enable_progress_bar=false
${PYTHON:-.venv/bin/python} -m flare_exp report "$out" | tee "$out/table.txt"

#!/usr/bin/env bash
# XNLI (Swahili) and TyDiQA (English, zero-shot Swahili) with MiniLM: MINILM=<checkpoint folder> DATA=<folder of xnli/, tydiqa/>
set -euo pipefail
out=${OUT:-outputs/xnli_tydiqa_minilm} run="${PYTHON:-.venv/bin/python} -m flare_exp -m trainer.enable_progress_bar=false"
$run experiment=xnli_minilm model.path="$MINILM" task.data_dir="$DATA/xnli" output_dir="$out/gold" seed=0 method=zero_shot,translate_test,lora,flare
$run experiment=xnli_minilm model.path="$MINILM" task.data_dir="$DATA/xnli" output_dir="$out/file" seed=0 method=translate_test,flare mt=file mt.fallback=gold
$run experiment=tydiqa_minilm model.path="$MINILM" task.data_dir="$DATA/tydiqa" output_dir="$out/tydiqa" seed=0 task.test_split=train
${PYTHON:-.venv/bin/python} -m flare_exp report "$out" | tee "$out/table.txt"

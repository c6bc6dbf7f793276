#!/usr/bin/env bash
# The three kinds of task x three families of the embedded world, far, LoRA against FLARE; 3 seeds. Two to four core-hours.
# A run that is there already is not run again: start it again after an interruption.
set -euo pipefail
out=${OUT:-outputs/toy_tasks} run="${PYTHON:-.venv/bin/python} -m flare_exp -m trainer=cpu trainer.enable_progress_bar=false"
$run output_dir="$out" seed=0,1,2 model=tiny,tiny_decoder,tiny_seq2seq task=toy_sentiment,toy_nli,toy_qa method=lora,flare
${PYTHON:-.venv/bin/python} -m flare_exp report "$out" | tee "$out/table.txt"

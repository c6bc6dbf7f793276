#!/usr/bin/env bash
# Translation quality against gain, embedded world, far, 3 seeds: LoRA, FLARE and FLARE MT with a tiny NLLB of two qualities, LoRA and
# FLARE with human translations, and human translations with errors of a known rate. About three hours of one core.
# A run that is there already is not run again: start it again after an interruption.
set -euo pipefail
out=${OUT:-outputs/mt_gain} run="${PYTHON:-.venv/bin/python} -m flare_exp -m trainer=cpu trainer.enable_progress_bar=false"
$run output_dir="$out/gold" mt=gold method=lora,flare task=toy_sentiment,toy_nli,toy_qa seed=0,1,2
$run output_dir="$out/nllb" mt=toy_nllb method=lora,flare,flare_mt task=toy_sentiment,toy_nli,toy_qa seed=0,1,2
$run output_dir="$out/nllb_undertrained" mt=toy_nllb mt.pretrain.steps=1050 method=lora,flare,flare_mt task=toy_sentiment,toy_nli,toy_qa seed=0,1,2
$run output_dir="$out/noise" mt=gold mt.noise=0.1,0.2,0.4,0.8 method=lora,flare seed=0,1,2
$run output_dir="$out/ablations" mt=toy_nllb source.shuffle=true seed=0,1,2
$run output_dir="$out/ablations_empty" mt=toy_nllb source.empty=true seed=0,1,2
${PYTHON:-.venv/bin/python} -m flare_exp report "$out" --figures "$out/figures" | tee "$out/table.txt"

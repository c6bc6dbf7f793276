#!/usr/bin/env bash
# The table of the embedded world: methods and source ablations (near, far), translations of three qualities (half), all fusion
# functions (far); 3 seeds. Two hours or more on one core. A run that is there already is not run again: start it again after an interruption.
set -euo pipefail
out=${OUT:-outputs/toy_table} run="${PYTHON:-.venv/bin/python} -m flare_exp -m trainer=cpu trainer.enable_progress_bar=false"
$run output_dir="$out/methods" method=zero_shot,lora,translate_test,flare task.lang=near,far seed=0,1,2
$run output_dir="$out/shuffled" source.shuffle=true task.lang=near,far seed=0,1,2
$run output_dir="$out/empty" source.empty=true task.lang=near,far seed=0,1,2
$run output_dir="$out/half_known" experiment=half_known method=zero_shot,lora,translate_test,flare,ensemble mt.noise=0.1,0.3,0.6 seed=0,1,2
$run output_dir="$out/half_robust" experiment=half_known source=robust mt.noise=0.1,0.3,0.6 seed=0,1,2
$run output_dir="$out/fusions" seed=0,1,2 fusion=add,mul,mul_relu,cross_attn,gated
${PYTHON:-.venv/bin/python} -m flare_exp report "$out" | tee "$out/table.txt"

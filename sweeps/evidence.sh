#!/usr/bin/env bash
# Evidence on real text with multilingual-e5-small: NusaX, SIB-200, XNLI, XQuAD. 274 runs, one after the other.
#   E5=<checkpoint folder> DATA=<folder of nusax/, sib200/, xnli/, xquad/, tydiqa/> sweeps/evidence.sh
# The same command again goes on: finished runs return their results. When a run fails, the others go on; the end names it.
# Spanish is translated by Apertium (apt install apertium apertium-eng-spa), Swahili by the files of xnli/mt_sw-en; the rest by humans.
set -euo pipefail
: "${E5:?set E5 to the checkpoint folder}" "${DATA:?set DATA to the folder that holds nusax/, sib200/, xnli/, xquad/, tydiqa/}"
out=${OUT:-outputs/evidence}
failed=()

# Learning rates with the best validation score among 2e-4, 5e-4, 1e-3 and 2e-3 on NusaX jav, seed 0, human translations (docs/results.md).
# Not yet searched: input_fusion, x_mixup (the preset's rate) and full.
declare -A rate=([lora]=2e-3 [ensemble]=2e-3 [flare]=1e-3 [full]=1e-4)

run() { # folder method=<name> key=value ...
    local folder=$1 code=0 method=${2#method=}
    shift
    "${PYTHON:-.venv/bin/python}" -m flare_exp "$@" ${rate[$method]:+transfer.lr=${rate[$method]}} \
        model.path="$E5" model.revision=null trainer.enable_progress_bar=false \
        output_dir="$out/$folder" || code=$?
    if ((code >= 128)); then exit "$code"; fi # stopped: Ctrl-C, SIGTERM
    if ((code)); then failed+=("$folder"); fi
}

nusax() { # name of the method, language, seed, share of wrong words in the test data's translations, key=value ...
    run "nusax/$2_$1_n$4_s$3" "$5" experiment=e5_nusax task.data_dir="$DATA/nusax" mt.noise_in=test task.lang="$2" seed="$3" mt.noise="$4" "${@:6}"
}

apertium=(mt=command "mt.command=apertium -u {from}-{to}")
labels="zero_shot translate_test lora flare ensemble"

for lang in jav ban; do for seed in 0 1 2; do for noise in 0 0.2 0.4 0.8; do
    for method in $labels; do nusax "$method" $lang $seed $noise method="$method"; done
done; done; done
for lang in jav ban; do for seed in 0 1 2; do for noise in 0 0.2 0.4 0.8; do
    nusax flare_gated $lang $seed $noise method=flare fusion=gated
    nusax input_fusion $lang $seed $noise method=input_fusion
    nusax x_mixup $lang $seed $noise method=x_mixup
    nusax full $lang $seed $noise method=full
done; done; done

for seed in 0 1 2; do for method in $labels; do
    nusax "$method" ace $seed 0 method="$method"
done; done
for seed in 0 1 2; do for method in $labels; do
    run "sib200/jav_Latn_gold_${method}_s$seed" method="$method" experiment=e5_sib200 task.data_dir="$DATA/sib200" task.lang=jav_Latn \
        mt=gold seed=$seed
done; done
for seed in 0 1 2; do for method in $labels; do
    run "sib200/spa_Latn_apertium_${method}_s$seed" method="$method" experiment=e5_sib200 task.data_dir="$DATA/sib200" task.lang=spa_Latn \
        "${apertium[@]}" seed=$seed
done; done

for method in $labels; do
    run "xnli/es_apertium_${method}_s0" method="$method" experiment=e5_xnli task.data_dir="$DATA/xnli" task.lang=es "${apertium[@]}" seed=0
done
for method in $labels; do # the tests are translated by a real system, the training data by humans
    run "xnli/sw_file_${method}_s0" method="$method" experiment=e5_xnli task.data_dir="$DATA/xnli" task.lang=sw mt=file mt.path="$DATA/xnli" \
        mt.fallback=gold seed=0
done
for method in zero_shot lora flare; do
    run "xquad/es_apertium_${method}_s0" method="$method" experiment=e5_xquad task.data_dir="$DATA/xquad" \
        task.train_data_dir="$DATA/tydiqa" task.lang=es "${apertium[@]}" mt.marker=brackets seed=0
done

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]/#/$out/}" >&2
    exit 1
fi

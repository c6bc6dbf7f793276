#!/usr/bin/env bash
# Evidence on real text with multilingual-e5-small: NusaX, SIB-200, XNLI, XQuAD. 292 runs, one after the other.
#   E5=<checkpoint folder> DATA=<folder of nusax/, sib200/, xnli/, xquad/, tydiqa/> sweeps/evidence.sh
# The same command again goes on: finished runs return their results. When a run fails, the others go on; the end names it.
# Spanish is translated by Apertium (apt install apertium apertium-eng-spa), Swahili by the files of xnli/mt_sw-en; the rest by humans.
set -euo pipefail
: "${DATA:?set DATA to the folder that holds nusax/, sib200/, xnli/, xquad/, tydiqa/}"
out=${OUT:-outputs/evidence}
source "$(dirname "$0")/e5_runs.bash"

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

for lang in jav ban ace; do for seed in 0 1 2; do # a student without a source; a source in Indonesian beside the English one
    nusax distil $lang $seed 0 method=distil distil.lr=2e-3
    nusax flare_eng_ind $lang $seed 0 method=flare "source.langs=[eng,ind]"
done; done
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

finish

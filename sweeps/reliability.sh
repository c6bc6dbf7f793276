#!/usr/bin/env bash
# Bad translations: NusaX with multilingual-e5-small, test sources from clean to unrelated. 459 runs, one after the other.
#   E5=<checkpoint folder> DATA=<folder of nusax/> sweeps/reliability.sh
# The same command again goes on: finished runs return their results. LANGS, SEEDS and METHODS choose a part, e.g. LANGS=jav SEEDS="0 1".
# Training sources are clean human English. Test sources have a share of wrong words, are those of other examples, or are left out.
set -euo pipefail
: "${DATA:?set DATA to the folder that holds nusax/}"
out=${OUT:-outputs/reliability}
source "$(dirname "$0")/e5_runs.bash"

declare -A options=(
    [lora]="method=lora"
    [translate_test]="method=translate_test"
    [ensemble]="method=ensemble"
    [flare]="method=flare"
    [gated]="method=flare fusion=gated"
    [robust]="method=flare source=robust"
)
fusing=" flare gated robust "

for lang in ${LANGS:-jav ban ace}; do for seed in ${SEEDS:-0 1 2}; do
    for method in ${METHODS:-lora translate_test ensemble flare gated robust}; do
        for noise in 0 0.1 0.2 0.4 0.6 0.8 1; do
            nusax "$method" "$lang" "$seed" "$noise" ${options[$method]}
        done
        [[ $fusing == *" $method "* ]] || continue
        for ablation in shuffle empty; do
            nusax "${method}_$ablation" "$lang" "$seed" 0 ${options[$method]} source.$ablation=true source.ablate_in=test
        done
        nusax "${method}_two_passes" "$lang" "$seed" 0.8 ${options[$method]} "predict.sources=[given,none]"
    done
done; done
finish

# Runs with multilingual-e5-small, for the scripts that source this file. It expects E5 and DATA; $out is the folder of the runs.
: "${E5:?set E5 to the checkpoint folder}"
failed=()

# Learning rates with the best validation score among 2e-4, 5e-4, 1e-3 and 2e-3 on NusaX jav, seed 0, human translations (docs/results.md).
# Of input_fusion 5e-4 and 1e-3 alone were tried; full is not searched. That of distil is its teacher's; the student has distil.lr.
declare -A rate=([lora]=2e-3 [ensemble]=2e-3 [flare]=1e-3 [gated]=2e-3 [x_mixup]=2e-3 [input_fusion]=1e-3 [distil]=1e-3 [full]=1e-4)

run() { # folder method=<name> key=value ...
    local folder=$1 code=0 method=${2#method=}
    shift
    if [[ " $* " == *" fusion=gated "* ]]; then method=gated; fi
    "${PYTHON:-.venv/bin/python}" -m flare_exp "$@" ${rate[$method]:+transfer.lr=${rate[$method]}} \
        model.path="$E5" model.revision=null trainer.enable_progress_bar=false \
        output_dir="$out/$folder" || code=$?
    if ((code >= 128)); then exit "$code"; fi # stopped: Ctrl-C, SIGTERM
    if ((code)); then failed+=("$folder"); fi
}

nusax() { # name of the method, language, seed, share of wrong words in the test data's translations, key=value ...
    run "nusax/$2_$1_n$4_s$3" "$5" experiment=e5_nusax task.data_dir="$DATA/nusax" mt.noise_in=test task.lang="$2" seed="$3" mt.noise="$4" "${@:6}"
}

finish() { # names the failed runs
    if ((${#failed[@]})); then
        printf 'failed: %s\n' "${failed[@]/#/$out/}" >&2
        exit 1
    fi
}

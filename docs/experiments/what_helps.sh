#!/usr/bin/env bash
# Do ensembles, other summaries of a scan, neighbouring slices, longer training and mixing help? The
# runs and tables of docs/what-helps.md. From the folder of this repository, with the environment
# active:
#
#     bash docs/experiments/what_helps.sh OASIS/AD_NC    # eleven hours on two cores
#     ONLY='oasis-small.*' bash docs/experiments/what_helps.sh OASIS/AD_NC  # runs of these names
#     HELPED='deeplong5' bash docs/experiments/what_helps.sh OASIS/AD_NC  # 13 hours more
#
# runs/helps holds the runs. Finished runs are skipped, interrupted runs are resumed. Two run at a
# time (JOBS), with one thread each. Of the tables, those whose runs are all finished are printed.
# HELPED names what has helped on the local cue, which is then run on OASIS-1, too.
set -euo pipefail
data=${1:?expected the folder AD_NC of the OASIS-1 slices}
runs=${2:-runs/helps}
export OMP_NUM_THREADS=1
mkdir -p "$runs"
local="$runs/LOCAL/AD_NC"
if [ ! -d "$runs/LOCAL" ]; then
    rm -rf "$runs/LOCAL.part"  # of a drawing that was interrupted
    python -m tools.phantom "$runs/LOCAL.part" --cue local --subjects 1000
    mv "$runs/LOCAL.part" "$runs/LOCAL"
fi

flags_of() {  # MODEL SET
    case $1 in
        small) echo "--recipe small";;
        cnn) echo "--model cnn --image-size 112 --batch-size 32 --lr 2e-3 --epochs 10 --keep last";;
        paper)  # about 2,000 steps on each set
            local epochs=20
            if [ "$2" = local ]; then epochs=120; fi
            echo "--model atto --image-size 64 --batch-size 32 --epochs $epochs --keep last";;
        long5) echo "--recipe small --epochs 50";;
        mix5) echo "--recipe small --epochs 50 --mixup 0.2 --cutmix 1.0";;
        long20) echo "--recipe small --epochs 200";;
        mix20) echo "--recipe small --epochs 200 --mixup 0.2 --cutmix 1.0";;
        deep*)  # the depth of atto is like that of tiny; the best flags of docs/recipes.md
            local deep="--model atto --model-args head_norm=batch --image-size 112 --batch-size 32"
            deep="$deep --lr 1e-3 --keep last"
            case $1 in
                deep) echo "$deep --epochs 10";;
                deeplong5) echo "$deep --epochs 50";;
                deepmix5) echo "$deep --epochs 50 --mixup 0.2 --cutmix 1.0";;
                deeplong20) echo "$deep --epochs 200";;
                deepmix20) echo "$deep --epochs 200 --mixup 0.2 --cutmix 1.0";;
            esac;;
    esac
}
# All runs of a set learn from the subjects of the first, small with seed 0: else five seeds
# together would have seen more subjects than one.
oasis() {  # MODEL SEED: five folds
    local k split
    for k in 0 1 2 3 4; do
        split="--split $runs/oasis-small-s0-f$k/split.csv"
        if [ "$1-$2" = small-0 ]; then split="--pool-test --folds 5 --fold $k"; fi
        echo "--out $runs/oasis-$1-s$2-f$k --data $data $split --seed $2 $(flags_of "$1" oasis)"
    done
}
drawn() {  # MODEL SUBJECTS SEED
    local split="--split $runs/local-small-n$2-s0/split.csv"
    if [ "$1-$3" = small-0 ]; then split="--subjects $2"; fi
    echo "--out $runs/local-$1-n$2-s$3 --data $local $split --seed $3 $(flags_of "$1" local)"
}
list() {  # the flags of all runs, the most telling first
    local model seed n
    for seed in 0 1 2 3 4; do
        oasis small $seed
        for n in 50 100 200; do drawn small $n $seed; done
    done
    for seed in 0 1 2 3 4; do for model in long5 mix5; do drawn $model 100 $seed; done; done
    for n in 50 100 200; do for seed in 0 1 2 3 4; do drawn cnn $n $seed; done; done
    for seed in 0 1 2 3 4; do drawn paper 100 $seed; done
    for seed in 0 1 2; do for model in long20 mix20; do drawn $model 100 $seed; done; done
    for seed in 0 1 2; do
        for model in deep deeplong5 deepmix5; do drawn $model 100 $seed; done
    done
    for model in deeplong20 deepmix20; do drawn $model 100 0; done
    for seed in 0 1 2; do for model in cnn paper ${HELPED:-}; do oasis $model $seed; done; done
    if [[ "${HELPED:-}" == *deep* ]]; then for seed in 0 1 2; do oasis deep $seed; done; fi
}
start_or_resume() {  # FLAGS
    local out=${1#--out }; out=${out%% *}  # the word behind --out
    if [ -f "$out/resources.json" ]; then return; fi  # written last
    if [ -f "$out/last.pth" ]; then set -- "--out $out --resume"; fi
    echo "python train.py $1"
    local begin=$SECONDS
    python train.py $1 > "$out.log" 2>&1 || { tail -5 "$out.log"; return 1; }
    echo "$out took $((SECONDS - begin)) s"
}
export -f start_or_resume
chosen=$(list | grep -E -- "--out $runs/(${ONLY:-[^ ]*}) ") ||
    echo "no run has a name that fits ONLY='${ONLY:-}'"
run_all() {  # the lines of flags come on standard input
    tr '\n' '\0' | xargs -0 -r -P "${JOBS:-2}" -I{} bash -c 'start_or_resume "{}"' ||
        echo "some runs failed; their tables are missing"
}
# First the runs whose subjects are those of the others.
sed -n '/--split/!{/./p}' <<< "$chosen" | run_all
sed -n '/--split/p' <<< "$chosen" | run_all

finished() {  # MODEL SET: the runs of a model on a set, if all its seeds are finished
    local flags out found=()
    while read -r flags; do
        out=${flags#--out }; out=${out%% *}
        if [ ! -f "$out/resources.json" ]; then return; fi
        found+=("$out")
    done < <(list | grep -E -- "--out $runs/$2-$1-")
    echo "${found[@]}"
}
table() {  # TITLE COMMAND...: the command and its output
    printf '\n### %s\n\n' "$1"
    shift
    "$@"
}
for model in small cnn paper; do
    found=$(finished $model oasis)
    if [ -n "$found" ]; then
        table "$model, OASIS-1" python -m tools.evaluate $found
        table "$model, OASIS-1: from slices to a scan" python -m docs.experiments.aggregate $found
        rm -f "$runs/$model.pth"
        table "$model, OASIS-1: all runs as one model" \
            python -m tools.ensemble $found --out "$runs/$model.pth"
    fi
done
for model in small cnn paper; do for n in 50 100 200; do
    found=$(finished "$model-n$n" local)
    if [ -n "$found" ]; then
        table "$model, local cue, $n subjects" python -m tools.evaluate $found
        table "$model, local cue, $n subjects: from slices to a scan" \
            python -m docs.experiments.aggregate $found
    fi
done; done
against() {  # SET TITLE MODEL OTHER: the paired difference, on as many seeds as both have
    local found other n
    found=$(finished "$3" "$1")
    other=$(finished "$4" "$1")
    if [ -z "$found" ] || [ -z "$other" ]; then return; fi
    n=$(wc -w <<< "$found")
    table "$2" python -m tools.evaluate $found --against $(cut -d' ' -f "1-$n" <<< "$other")
}
for model in long5 mix5 long20 mix20; do
    against local "$model minus 10 epochs, local cue" $model-n100 small-n100
done
for times in 5 20; do
    against local "mixing, $times times the steps, local cue" mix$times-n100 long$times-n100
done
for model in deeplong5 deepmix5 deeplong20 deepmix20; do
    against local "$model minus 10 epochs, local cue" $model-n100 deep-n100
done
for model in deeplong5 deeplong20 deepmix20; do  # not planned
    against local "$model minus the small recipe, local cue" $model-n100 small-n100
done
for times in 5 20; do
    against local "mixing, $times times the steps, deep, local cue" \
        deepmix$times-n100 deeplong$times-n100
done
for model in ${HELPED:-}; do
    shorter=small
    if [[ $model == deep* ]]; then shorter=deep; fi
    against oasis "$model minus 10 epochs, OASIS-1" $model $shorter
done
if [ -z "${ONLY:-}" ]; then
    table "neighbours, OASIS-1" \
        python -m docs.experiments.context "$data" --folds 5 --image-size 64 --out "$runs/neighbours"
fi

#!/usr/bin/env bash
# Which parts of the phantom as a teacher matter? The runs and the table of docs/transfer.md, "Which parts matter".
# From the folder of this repository, with the environment active:
#
#     bash docs/experiments/teacher.sh OASIS/AD_NC     # two hours on two cores; runs/teacher holds the runs
#
# Finished runs are skipped, interrupted runs are resumed. Two run at a time (JOBS), with one thread each.
set -euo pipefail
data=${1:?expected the folder AD_NC of the OASIS-1 slices}
runs=${2:-runs/teacher}
export OMP_NUM_THREADS=1
if [ ! -d "$data" ]; then echo "error: there is no folder $data"; exit 2; fi
mkdir -p "$runs/sets"

draw() {  # NAME FLAGS...: draw a phantom, if it does not exist
    local set="$runs/sets/$1"
    if [ -d "$set" ]; then return; fi
    rm -rf "$set.part"
    python -m tools.phantom "$set.part" "${@:2}"
    mv "$set.part" "$set"
}
train() {  # NAME SET RECIPE FLAGS...: train, or resume, a network of 64 px
    local out="$runs/$1"
    if [ -f "$out/test/metrics.json" ]; then return; fi
    if [ -f "$out/last.pth" ]; then
        python train.py --out "$out" --resume >> "$out.log" 2>&1
    else
        python train.py --data "$runs/sets/$2/AD_NC" --out "$out" --image-size 64 --recipe "${@:3}" > "$out.log" 2>&1
    fi
}
without() {  # VARIATION
    draw "without-$1" --cue varied --subjects 250 --without "$1"
    train "without-$1" "without-$1" phantom
}
export runs
export -f draw train without

draw varied-250 --cue varied --subjects 250
xargs -P "${JOBS:-2}" -I{} bash -euc "{}" <<'RUNS'
train all varied-250 phantom
train classes varied-250 small
train cnn varied-250 phantom --model cnn
draw varied-250-s1 --cue varied --subjects 250 --seed 1; train all-s1 varied-250-s1 phantom --seed 1
draw varied-250-s2 --cue varied --subjects 250 --seed 2; train all-s2 varied-250-s2 phantom --seed 2
without contrast
without bias
without sharpness
without noise
without pose
without mask
without levels
draw varied-200 --cue varied --subjects 200; train subjects-200 varied-200 phantom --epochs 50 --warmup-epochs 5
draw varied-1000 --cue varied --subjects 1000; train subjects-1000 varied-1000 phantom --epochs 10 --warmup-epochs 1
draw varied-4000 --cue varied --subjects 4000; train subjects-4000 varied-4000 phantom --epochs 3 --warmup-epochs 0.3
RUNS

# sets that no run has seen, drawn with another seed
draw VARIED --cue varied --subjects 250 --seed 7
draw GLOBAL --cue global --subjects 100 --seed 7
draw LOCAL --cue local --subjects 250 --seed 7
python -m docs.experiments.transfer "$runs"/{all,all-s1,all-s2,classes,cnn} "$runs"/without-* "$runs"/subjects-{200,1000,4000} \
    --sets "$runs"/sets/{VARIED,GLOBAL,LOCAL}/AD_NC "$data" --apart

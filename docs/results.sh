#!/usr/bin/env bash
# Every command behind a table or picture of this repository. From its folder, with the environment active:
#
#     bash docs/results.sh OASIS/AD_NC             # hours on two cores; runs/results holds the runs
#     bash docs/results.sh OASIS/AD_NC runs/other
#
# A run that is finished is skipped, one that was interrupted is resumed. At the end docs/results.md and the pictures in
# figures/ are written again from what the runs hold. Two runs train at a time (JOBS), with one thread each.
set -euo pipefail
data=${1:?expected the folder AD_NC of the OASIS-1 slices}
runs=${2:-runs/results}
export OMP_NUM_THREADS=1
mkdir -p "$runs"
list="$runs/commands.txt"
: > "$list"

train() {  # NAME FLAGS...: one line in the list of commands
    local name=$1; shift
    echo "python train.py --out $runs/$name $*" >> "$list"
}

recipe="--model atto --image-size 64 --batch-size 16 --lr 1e-3 --patience 0"
for k in 0 1 2 3 4; do
    train "fold$k" "--data $data $recipe --val-fraction 0.2 --epochs 20 --folds 5 --fold $k"
done
train by-subject "--data $data $recipe --epochs 20 --no-augment"
train by-slice-LEAKY "--data $data $recipe --epochs 20 --no-augment --split-by slice"
for k in 0 1 2 3 4; do
    train "plain-fold$k" "--data $data $recipe --val-fraction 0.2 --epochs 12 --no-augment --folds 5 --fold $k"
done
phantom="$runs/PHANTOM/AD_NC"
[ -d "$phantom" ] || python phantom.py "$runs/PHANTOM" --subjects 100
train phantom-by-subject "--data $phantom $recipe --epochs 10 --no-augment"
train phantom-by-slice-LEAKY "--data $phantom $recipe --epochs 10 --no-augment --split-by slice"

start_or_resume() {
    local out=${1#* --out }; out=${out%% *}
    if [ -f "$out/test/metrics.json" ]; then return; fi
    if [ -f "$out/last.pth" ]; then set -- "python train.py --out $out --resume"; fi
    echo "$1"
    $1 > "$out.log" 2>&1 || { tail -5 "$out.log"; return 1; }
}
export -f start_or_resume
tr '\n' '\0' < "$list" | xargs -0 -P "${JOBS:-2}" -I{} bash -c 'start_or_resume "{}"'

unset OMP_NUM_THREADS
[ -f "$runs/speed.json" ] || python benchmark.py --json "$runs/speed.json" > "$runs/speed.txt"
export OMP_NUM_THREADS=1

# ---- the page

block() { printf '\n```%s\n%s\n```\n' "$1" "$2"; }
tables() {  # COMMAND: what it prints, under the command
    block bash "$*"
    echo
    "$@"
}
commands() { block bash "$(grep -E -- "--out $runs/($1) " "$list")"; }

rm -rf "$runs/cv"
{
    cat <<'TEXT'
# Results

Written by `docs/results.sh`, which holds every command; never edited. In brackets, 95 % intervals of a bootstrap over
subjects. A slice-level score counts slices, a scan-level score scans, a subject-level score subjects. Each run prints
its own tables to `training_log.txt`; these are printed by the commands above them. Since these runs, the gradient of the
depthwise weights is taken in float32 where a CPU trains in bfloat16: retrained, they will differ in the last digits.

TEXT
    python - "$runs/fold0/config.json" "$runs/speed.json" <<'PYTHON'
import json, sys
config, speed = (json.load(open(path)) for path in sys.argv[1:])
v = config["versions"]
print(f"Trained on {config['used']['device']} ({speed['machine'].split(',')[0]}), {config['used']['threads']} thread a run, "
      f"{config['used']['amp']}; Python {v['python']}, torch {v['torch']}, torchvision {v['torchvision']}, scikit-learn "
      f"{v['scikit-learn']}. No GPU has been measured.")
PYTHON
    cat <<'TEXT'

## Real slices, out of fold

The 102 subjects of OASIS-1's `train/`, each predicted by the one model of five that has not seen it. Epoch and
calibration come from a validation part (20 %) of the other folds; the learning rate was chosen by the training loss
alone (at 2e-3 the first fold stayed at ln 2). One scan a subject, so scan and subject are the same unit here, and all
scans have one window, so that its vote is the majority class. Most AD subjects are very mild (CDR 0.5).
TEXT
    commands 'fold.'
    tables python evaluate.py "$runs"/fold? --out "$runs/cv"
    cat <<'TEXT'

## Is augmentation better, or is it noise?

The recipe above (20 epochs) against the one without augmentation (12).
TEXT
    commands 'plain-fold.'
    tables python evaluate.py "$runs"/fold? --against "$runs"/plain-fold? | sed -n '/^```bash/,/^```$/p; /first against second/,$p'
    cat <<'TEXT'

## What leakage does

The same model, data and flags twice, split by subject and by slice. Augmentation is off, so that the network can
memorise its slices. LEAKY at the test rows of the second says how the model was made; no subject of the OASIS-1 test
set is in train.
TEXT
    commands 'by-subject|by-slice-LEAKY'
    tables python evaluate.py "$runs/by-subject" "$runs/by-slice-LEAKY" --each
    cat <<'TEXT'

On the phantom, whose test set shares subjects with its training set, as that of `AD_NC` does:
TEXT
    commands 'phantom-by-subject|phantom-by-slice-LEAKY'
    tables python evaluate.py "$runs/phantom-by-subject" "$runs/phantom-by-slice-LEAKY" --each
    cat <<'TEXT'

## Parity and speed against torchvision

The first line of each group is the reference. See [speed.md](speed.md) for what is done and what is not shown.
TEXT
    block bash "python benchmark.py --json $runs/speed.json"
    block "" "$(grep -v "decoded slices are kept" "$runs/speed.txt")"
    cat <<'TEXT'

## Pictures

| Out of fold | |
| --- | --- |
| ![ROC curves](../figures/oasis_roc_curve.png) | ![Reliability diagram](../figures/oasis_calibration.png) |
| ![Risk-coverage curves](../figures/oasis_risk_coverage.png) | ![Confusion matrices](../figures/oasis_confusion_matrix.png) |
| **Split by subject** | **Split by slice (LEAKY)** |
| ![Training curves, split by subject](../figures/leak_by_subject.png) | ![Training curves, split by slice](../figures/leak_by_slice.png) |
| **Accuracy by window, phantom** | |
| ![Accuracy by slice window](../figures/phantom_window_accuracy.png) | |

Data were provided by OASIS-1: Cross-Sectional: Principal Investigators: D. Marcus, R. Buckner, J. Csernansky, J. Morris;
P50 AG05681, P01 AG03991, P01 AG026276, R01 AG021910, P20 MH071616, U24 RR021382.
TEXT
} > "$runs/results.md"
mv "$runs/results.md" docs/results.md

for name in roc_curve calibration risk_coverage confusion_matrix; do
    cp "$runs/cv/$name.png" "figures/oasis_$name.png"
done
cp "$runs/by-subject/training_curves.png" figures/leak_by_subject.png
cp "$runs/by-slice-LEAKY/training_curves.png" figures/leak_by_slice.png
cp "$runs/by-subject/lr_schedule.png" figures/lr_schedule.png
cp "$runs/phantom-by-subject/test/window_accuracy.png" figures/phantom_window_accuracy.png
python phantom.py --sheet figures/phantom.png
echo "wrote docs/results.md and figures/"

#!/usr/bin/env bash
# The commands behind the tables and pictures of docs/results.md. From the folder of this repository, with the environment
# active:
#
#     bash docs/experiments/results.sh OASIS/AD_NC                  # five hours on two cores; runs/results holds the runs
#     ONLY='oasis.*' bash docs/experiments/results.sh OASIS/AD_NC   # the runs of these names
#     ONLY=none bash docs/experiments/results.sh OASIS/AD_NC        # trains nothing
#     ONLY='gpu-.*' JOBS=8 bash docs/experiments/results.sh OASIS/AD_NC   # the runs for a GPU, eight at a time
#
# Finished runs are skipped, interrupted runs are resumed. At the end, each section of docs/results.md whose runs are
# all finished is rewritten, with its pictures in figures/; the other sections stay as they are. Two runs train at a
# time (JOBS), with one thread each.
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
wanted() { grep -E -- "--out $runs/(${ONLY:-[^ ]*}) " "$list" || true; }  # ONLY: names, as a regular expression

paper="--model atto --image-size 112 --batch-size 32 --epochs 20 --keep last"  # the documented recipe, as far as a CPU goes
cnn="--model cnn --image-size 112 --batch-size 32 --lr 2e-3 --epochs 10 --keep last"  # the small recipe, but the model
flags_of() { case $1 in paper) echo "$paper";; small) echo "--recipe small";; cnn) echo "$cnn";; esac; }

local="$runs/LOCAL/AD_NC"
learning_curve() {  # SUBJECTS...
    for n in "$@"; do for seed in 0 1; do for model in paper small cnn; do
        train "$model-n$n-s$seed" "--data $local --subjects $n --seed $seed $(flags_of $model)"
    done; done; done
}
oasis() {  # SEED
    for k in 0 1 2 3 4; do for model in paper small cnn; do
        train "oasis-$model-s$1-f$k" "--data $data --pool-test --folds 5 --fold $k --seed $1 $(flags_of $model) --epochs 10"
    done; done
}
learning_curve 200 100 400
train layer "--data $local --subjects 200 --recipe small --model-args norm=layer"
train layer-head-batch "--data $local --subjects 200 --recipe small --model-args norm=layer head_norm=batch"
oasis 0
learning_curve 800 50
oasis 1
for seed in 0 1; do train "steps-n200-s$seed" "--data $local --subjects 200 --seed $seed $paper --epochs 80"; done
leak="--model atto --image-size 64 --batch-size 16 --lr 1e-3 --patience 0 --augment none"
train by-subject "--data $data $leak --epochs 20"
train by-slice-LEAKY "--data $data $leak --epochs 20 --split-by slice"
phantom="$runs/PHANTOM/AD_NC"
train phantom-by-subject "--data $phantom $leak --epochs 10"
train phantom-by-slice-LEAKY "--data $phantom $leak --epochs 10 --split-by slice"
# for a GPU: the documented recipe as it is, tiny at 224 px, and the others on the same machine
for k in 0 1 2 3 4; do train "gpu-oasis-full-f$k" "--data $data --pool-test --folds 5 --fold $k"; done
train gpu-full-n200 "--data $local --subjects 200 --keep last"
for k in 0 1 2 3 4; do for model in small cnn; do
    train "gpu-oasis-$model-f$k" "--data $data --pool-test --folds 5 --fold $k $(flags_of $model) --epochs 10"
done; done
for model in small cnn; do train "gpu-$model-n200" "--data $local --subjects 200 $(flags_of $model)"; done
train gpu-head-n200 "--data $local --subjects 200 --keep last --model-args head_norm=batch"

draw() {  # NAME FLAGS...: draw a phantom, if it does not exist and a wanted run needs it
    if wanted | grep -q -- "--data $runs/$1/" && [ ! -d "$runs/$1" ]; then python -m tools.phantom "$runs/$1" "${@:2}"; fi
}
draw LOCAL --cue local --subjects 1000
draw PHANTOM --subjects 100

start_or_resume() {
    local out=${1#* --out }; out=${out%% *}
    if [ -f "$out/test/metrics.json" ]; then return; fi
    if [ -f "$out/last.pth" ]; then set -- "python train.py --out $out --resume"; fi
    echo "$1"
    $1 > "$out.log" 2>&1 || { tail -5 "$out.log"; return 1; }
}
export -f start_or_resume
wanted | tr '\n' '\0' | xargs -0 -r -P "${JOBS:-2}" -I{} bash -c 'start_or_resume "{}"'

unset OMP_NUM_THREADS
if [ -z "${ONLY:-}" ] && [ ! -f "$runs/speed.json" ]; then
    python -m tools.benchmark --json "$runs/speed.json" > "$runs/speed.txt"
fi

# ---- the page

block() { printf '\n```%s\n%s\n```\n' "$1" "$2"; }
tables() {  # COMMAND: the command and its output
    block bash "$*"
    echo
    "$@"
}
commands() { block bash "$(grep -E -- "--out $runs/($1) " "$list")"; }

finished() {  # PATTERNS: the folders of finished runs
    local pattern run
    for pattern in "$@"; do for run in "$runs"/$pattern; do
        if [ -f "$run/test/metrics.json" ]; then echo "$run"; fi
    done; done
}
folds() {  # MODEL: its runs on real slices, of the seeds whose runs are all finished
    local seed
    for seed in 0 1; do
        if [ -z "$(missing "oasis-.*-s$seed-.*")" ]; then finished "oasis-$1-s$seed-f?"; fi
    done
}
missing() {  # NAMES, a regular expression: the names of unfinished runs
    local name
    for name in $(sed -E "s/.*--out [^ ]*\/([^ ]+) .*/\1/" "$list" | grep -E "^($1)$"); do
        if [ -z "$(finished "$name")" ]; then echo "$name"; fi
    done
}
section() {  # TITLE NEEDED NAMES FUNCTION: rewritten if all NEEDED runs are finished, else copied from the page
    local names first
    if [ -n "$(missing "$2")" ]; then
        awk -v title="## $1" '/^## /{on = ($0 == title)} on' docs/results.md
        return
    fi
    first=$(grep -oE -m 1 -- "--out $runs/($2) " "$list" | cut -d " " -f 2)
    printf '## %s\n\n' "$1"
    python - "$first/config.json" <<'PYTHON'
import json, sys
config = json.load(open(sys.argv[1]))
used, v = config["used"], config["versions"]
print(f"Trained on {used['machine']}, {used['precision']}; Python {v['python']}, "
      f"torch {v['torch']}, torchvision {v['torchvision']}, scikit-learn {v['scikit-learn']}.\n")
PYTHON
    "$4"
    names=$(missing "$3")
    if [ -n "$names" ]; then printf '\n**Missing, not yet run:** %s\n' "$(echo $names)"; fi
    echo
}
compared() {  # COMMAND with --against: the command and the comparison alone
    echo
    tables "$@" | sed -n '/^```bash/,/^```$/p; /first against second/,$p'
}

local_cue() {
    cat <<'TEXT'
The phantom with a local cue (`tools.phantom --cue local`): the class shows in temporal horn and hippocampus alone. The best
observer, who knows how far the disease went, is right on 0.915 of the subjects. 200 test subjects, six slices each, none
used in any choice: recipes were ranked within train/ ([recipes.md](recipes.md)). `paper` is the documented recipe,
shortened for a CPU: `atto` instead of `tiny`, 112 px instead of 224, batches of 32 for 20 epochs, 680 steps on 200
subjects. `small` is the recipe of that name, `cnn` a plain CNN by its flags: 10 epochs, 340 steps. The numbers of
training subjects include the tenth that is used for validation.
TEXT
    commands '(paper|small|cnn)-n200-s0'
    echo
    echo "and so on for 50 to 800 subjects and seeds 0 and 1."
    rm -f figures/learning_curve.png
    tables python -m docs.experiments.learning_curve figures/learning_curve.png $(finished 'paper-n*-s?' 'small-n*-s?' 'cnn-n*-s?')
    printf '\n![Learning curves](../figures/learning_curve.png)\n'
    local model n
    for model in small cnn paper; do
        tables python -m tools.evaluate "$runs"/$model-n200-s?
    done
    for n in 50 100 200 400 800; do
        compared python -m tools.evaluate "$runs"/small-n$n-s? --against "$runs"/cnn-n$n-s?
    done
    printf '\nThe small recipe on 100 subjects against the documented one on 200:\n'
    compared python -m tools.evaluate "$runs"/small-n100-s? --against "$runs"/paper-n200-s?
}

steps() {
    cat <<'TEXT'
The curves above have the same number of epochs for all sizes, so that 800 subjects are also four times the steps of
200. Here the shortened documented recipe (`paper`) has the steps of its 800 subjects on 200: 80 epochs, 2,720 steps. It
was run after the curves were seen, and nothing was chosen by it.
TEXT
    commands 'steps-n200-s.'
    tables python -m tools.evaluate "$runs"/steps-n200-s?
}

layer_norm() {
    cat <<'TEXT'
The small recipe on 200 subjects with LayerNorm everywhere, with BatchNorm on the pooled features alone, and as it is
(BatchNorm in stem and blocks, LayerNorm on the pooled features). What it means: [recipes.md](recipes.md).
TEXT
    commands 'layer|layer-head-batch|small-n200-s0'
    tables python -m docs.experiments.tables "$runs"/{layer,layer-head-batch,small-n200-s0}
    rm -f figures/probe.png
    tables python -m docs.experiments.probe figures/probe.png "$runs"/{layer,layer-head-batch,small-n200-s0}
    printf '\n![Read-out after each stage](../figures/probe.png)\n'
}

fragile() {
    cat <<'TEXT'
The runs of seed 0 on 400 subjects: share of scans whose prediction changes with a small change of the slices. On
unchanged slices `paper` has a lower AUROC than the others, so more of its predictions may be close to the threshold.
TEXT
    rm -rf "$runs/stress"
    tables python -m docs.experiments.stress "$runs"/{paper,small,cnn}-n400-s0 --out "$runs/stress"
    printf '\n![Predictions that change](../figures/stress.png)\n'
    cp "$runs/stress/stress.png" figures/stress.png
}

real_slices() {
    cat <<'TEXT'
136 subjects of OASIS-1 (Marcus et al. 2007, doi 10.1162/jocn.2007.19.9.1498), 60 or older, one scan each, 32 axial
slices of a skull-stripped, Talairach-registered volume; AD is CDR 0.5 or 1. The slices are not part of this repository.
train/ and test/ are pooled; five folds, each subject whole, two seeds (of folds, weights and order). Three models at
112 px, batches of 32, 10 epochs (about 980 steps), the last one kept, so that validation (10 % of the other folds)
chooses nothing but the calibration: `atto` by the documented recipe, the small recipe, and a plain CNN by its flags;
beside them logistic regression. Pooled out-of-fold scores at subject level, mean over seeds, with a bootstrap over
subjects, paired differences, and by severity (CDR). Nothing is chosen by these scores. The standard error of an AUROC
of 0.65 is 0.047 here (Hanley & McNeil 1982: 78 AD, 58 NC); where the errors of two models correlate by a half,
that of their difference is 0.047 as well, so that only differences of 0.09 or more could be shown.
TEXT
    local model pair
    for model in paper small cnn; do
        printf '\n### %s\n' "$model"
        commands "oasis-$model-s.-f."
        tables python -m tools.evaluate $(folds $model)
        tables python -m docs.experiments.tables $(folds $model) --by "$(dirname "$data")/subjects.csv" cdr
    done
    for pair in "small paper" "small cnn" "cnn paper"; do
        set -- $pair
        printf '\n### %s against %s\n' "$1" "$2"
        compared python -m tools.evaluate $(folds $1) --against $(folds $2)
    done
}

beside_baselines() {
    cat <<'TEXT'
The folds of the small recipe with seed 0, beside the baselines.
TEXT
    rm -rf "$runs/cv"
    tables python -m tools.evaluate "$runs"/oasis-small-s0-f? --out "$runs/cv"
    for name in roc_curve calibration risk_coverage confusion_matrix; do
        cp "$runs/cv/$name.png" "figures/oasis_$name.png"
    done
}

full() {
    cat <<'TEXT'
The documented recipe as `train.py` has it: `tiny`, 224 px, batches of 64, up to 100 epochs, in the precision named above. On the
OASIS-1 slices the five folds are those of seed 0 above, and validation chooses the epoch and the end, as by default; the
small recipe and the plain CNN have ten epochs, as above. On the local cue (200 training subjects) the last epoch is
kept, as above; `head` is the documented recipe with `--model-args head_norm=batch`. One seed. These commands were written before
the runs, and nothing was chosen by their scores.
TEXT
    local model
    commands 'gpu-.*'
    for model in full small cnn; do
        printf '\n### Real slices, %s\n' "$model"
        tables python -m tools.evaluate "$runs"/gpu-oasis-$model-f?
    done
    for model in small cnn; do
        printf '\n### Real slices, full against %s\n' "$model"
        compared python -m tools.evaluate "$runs"/gpu-oasis-full-f? --against "$runs"/gpu-oasis-$model-f?
    done
    printf '\n### The local cue\n'
    tables python -m docs.experiments.tables $(finished 'gpu-*-n200')
    compared python -m tools.evaluate "$runs"/gpu-full-n200 --against "$runs"/gpu-small-n200
}

leakage() {
    cat <<'TEXT'
The same model, data and flags twice, once with whole subjects apart and once with slices apart (`--split-by slice`).
Augmentation is off, so that the network can memorise its slices; the epoch is the best on validation. One seed.
Validation of the first has ten subjects only. LEAKY at the test rows of the second says how the model was made; no
subject of the OASIS-1 test set is in train.
TEXT
    commands 'by-subject|by-slice-LEAKY'
    tables python -m docs.experiments.tables "$runs/by-subject" "$runs/by-slice-LEAKY"
    cat <<'TEXT'

On the phantom, whose test set shares subjects with its training set, as that of `AD_NC` does:
TEXT
    commands 'phantom-by-subject|phantom-by-slice-LEAKY'
    tables python -m docs.experiments.tables "$runs/phantom-by-subject" "$runs/phantom-by-slice-LEAKY"
    cp "$runs/by-subject/training_curves.png" figures/leak_by_subject.png
    cp "$runs/by-slice-LEAKY/training_curves.png" figures/leak_by_slice.png
    cp "$runs/phantom-by-subject/test/window_accuracy.png" figures/phantom_window_accuracy.png
}

speed() {
    if [ ! -f "$runs/speed.json" ]; then
        awk '/^## /{on = ($0 == "## Parity and speed against torchvision")} on' docs/results.md
        return
    fi
    cat <<'TEXT'
## Parity and speed against torchvision

The first line of each group is the reference. See [speed.md](speed.md) for what is done and what is not shown.
TEXT
    block bash "python -m tools.benchmark --json $runs/speed.json"
    block "" "$(cat "$runs/speed.txt")"
    echo
}

{
    cat <<'TEXT'
# Results

Written by `docs/experiments/results.sh`, which holds every command. A section is rewritten when all of its runs have
been repeated; until then it shows an earlier version of the code. In brackets, 95 % intervals of a bootstrap over test
subjects; they leave out the spread over seeds, training sets and validation splits. A slice-level score counts slices,
a scan-level score scans, a subject-level score subjects. Each run prints its own tables to `training_log.txt`; these
are printed by the commands above them. No GPU has been measured.

TEXT
    section "The positive control: a cue that a blur barely shows" '(paper|small|cnn)-n(100|200|400)-s.' \
        '(paper|small|cnn)-n.*' local_cue
    section "Too few subjects, or too few steps?" 'steps-n200-s.' none steps
    section "Where LayerNorm loses the class" 'layer|layer-head-batch|small-n200-s0' none layer_norm
    section "How fragile it is" '(paper|small|cnn)-n400-s0' none fragile
    section "The protocol for real slices, written before the runs" 'oasis-.*-s0-.*' 'oasis-.*' real_slices
    section "Real slices: the small recipe beside the baselines" 'oasis-small-s0-.*' none beside_baselines
    section "The documented recipe in full, on a GPU" 'gpu-oasis-.*|gpu-(full|small)-n200' 'gpu-.*' full
    section "What leakage does" '.*by-s.*' none leakage
    speed
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
rm -f figures/phantom.png
python -m tools.phantom --sheet figures/phantom.png
# the documented recipe on AD_NC: 90 % of its 21,520 training slices in batches of 64
python -c "import pathlib, utils; utils.plot_lr_schedule(pathlib.Path('figures/lr_schedule.png'), steps_per_epoch=303, epochs=100, warmup_epochs=1, lr=1e-4)"
echo "wrote docs/results.md and figures/"

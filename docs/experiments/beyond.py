"""Does a network that saw drawings alone know more than the dark share? Three tries.

    python -m docs.experiments.beyond VARIED/AD_NC --sets GLOBAL/AD_NC LOCAL/AD_NC OASIS/AD_NC

Each way in WAYS trains the recipe `phantom` at 64 px on a set of `tools.phantom --cue varied`; the
numbers in it were fixed before the first run. Other sets are then ranked, with all their subjects.
The score of a subject is the mean over its slices. Printed for each set and way: subject-level
AUROC, mean over seeds, of the network and of network and dark share together (the sum of their
standardised scores, without a fit), each with its paired difference from the dark share.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

import train
from adnc.cli import COUNT, Parser, run_script
from adnc.data.pixels import find_head
from adnc.phantom.draw import LATENTS_FILE, read_soft_labels
from adnc.scoring.assess import format_table
from adnc.scoring.baselines import DARK, all_dark_shares
from dataset import decode_set
from docs.experiments.finetune import fit
from docs.experiments.transfer import auroc, bootstrap, subject_scores
from modules import make_model
from predict import predict_logits
from utils import pick_device, seed_everything

IMAGE_SIZE = 64
MIDDLE = 128  # the grey of the head's median in normalised slices

# ---------------------------------------------------------------- ways


def fluid(slices):
    """The label of the recipe."""
    return read_soft_labels(slices.index, slices.root)


def hippocampus(slices):
    """The probability of AD given the size of the hippocampus among subjects with ventricles, horn
    and sulci alike: what the amount of fluid does not say."""
    table = pd.read_csv(Path(slices.root).parent / LATENTS_FILE, dtype={"scan": str}).set_index(
        "scan"
    )
    sizes = np.log(table[["hippocampus", "horn", "ventricle", "sulcus"]])
    others = np.column_stack((np.ones(len(sizes)), sizes[["horn", "ventricle", "sulcus"]]))
    expected = others @ np.linalg.lstsq(others, sizes.hippocampus, rcond=None)[0]
    small = expected - sizes.hippocampus
    p_ad = 1 / (1 + np.exp(-2 * small / small.std()))
    return p_ad[slices.index.scan].to_numpy(float)


def classes(slices):
    """AD or NC."""
    return slices.is_ad.astype(float)


def as_it_is(slices):
    return slices


def normalised(slices):
    """Slices whose head has its median grey at MIDDLE."""
    images = np.empty(slices.images.shape, np.uint8)
    for row in slices.rows:
        pixels = slices.images[row]
        head = pixels[find_head(pixels)]
        median = max(float(np.median(head)), 1.0) if len(head) else MIDDLE
        images[row] = (pixels * (MIDDLE / median)).round().clip(0, 255)
    return replace(slices, images=images)


# name -> (label of a slice, what is done to its pixels)
WAYS = {
    "the recipe": (fluid, as_it_is),
    "grey divided by the head's median": (fluid, normalised),
    "hippocampus, other sizes alike": (hippocampus, as_it_is),
    "classes": (classes, as_it_is),
}


# ---------------------------------------------------------------- training and scores


def train_network(slices, p_ad, device, seed):
    """The recipe `phantom` on a SliceSet with a label p_ad (N,) for each slice."""
    seed_everything(seed)
    model = make_model("narrow", drop_path_rate=0.0)
    recipe = {"lr": train.SMALL["lr"], "epochs": train.SMALL["epochs"]}
    options = {"image_size": IMAGE_SIZE}
    return fit(model, slices, options, device=device, seed=seed, p_ad=p_ad, **recipe)


def score_set(slices, columns):
    """(is_ad bool (S,), dark share (S,), scores (S, C)) of subjects, from columns of slices."""
    dark = all_dark_shares(slices.images, slices.rows)[:, DARK.index(0.5)]
    is_ad = subject_scores(slices, slices.is_ad) > 0.5
    scores = [subject_scores(slices, column) for column in columns]
    return is_ad.to_numpy(), subject_scores(slices, dark).to_numpy(), np.column_stack(scores)


def standardised(x):
    return (x - x.mean(0)) / x.std(0)


def format_way(name, is_ad, dark, scores):
    """A row of the table: AUROC of the network and of both, mean over the columns of scores."""
    both = standardised(scores) + standardised(dark)[:, None]
    every = np.column_stack((dark, scores, both))
    points, resamples = auroc(is_ad, every), bootstrap(is_ad, every)
    n = scores.shape[1]
    row = [name]
    for begin in (1, 1 + n):
        columns = slice(begin, begin + n)
        mean = resamples[:, columns].mean(1)
        low, high = np.percentile(mean, (2.5, 97.5))
        worst, best = np.percentile(mean - resamples[:, 0], (2.5, 97.5))
        point = points[columns].mean()
        row.append(f"{point:.3f} [{low:.3f}, {high:.3f}]")
        row.append(f"{point - points[0]:+.3f} [{worst:+.3f}, {best:+.3f}]")
    return row


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("varied", metavar="VARIED", help="the set to train on, of tools.phantom --cue varied")
    add("--sets", nargs="+", required=True, metavar="AD_NC", help="sets to rank")
    add("--seeds", type=COUNT, default=2, help="networks of each way (2)")
    args = parser.parse_args(argv)

    device = pick_device()
    drawn = decode_set(args.varied, progress=None).part("train")
    sets = {root: decode_set(root, progress=None) for root in args.sets}
    rows = {root: [] for root in sets}
    for name, (label, change) in WAYS.items():
        changed = change(drawn)
        networks = [train_network(changed, label(drawn), device, s) for s in range(args.seeds)]
        for root, slices in sets.items():
            seen = change(slices)
            options = dict(image_size=IMAGE_SIZE, device=device, amp=None)
            logits = [predict_logits(model.eval(), seen, **options) for model in networks]
            rows[root].append(format_way(name, *score_set(slices, logits)))

    head = ["", "network", "minus dark share", "both together", "minus dark share"]
    for root, slices in sets.items():
        is_ad, dark, _ = score_set(slices, [np.zeros(len(slices.index))])
        value = float(auroc(is_ad, dark[:, None])[0])
        print(f"\n{root}: {len(is_ad)} subjects, dark share alone {value:.3f}\n")
        for line in format_table([head, *rows[root]]):
            print(line, flush=True)


if __name__ == "__main__":
    run_script(main)

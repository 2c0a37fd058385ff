"""Does a network that saw drawings alone know more than the dark share? Six other ways to train.

    python -m docs.experiments.beyond VARIED/AD_NC --sets GLOBAL/AD_NC LOCAL/AD_NC OASIS/AD_NC

Each way in WAYS trains on all training subjects of a set of `tools.phantom --cue varied`, at 64 px
and else by the recipe `phantom`; the numbers in it were fixed before the first run. Other sets are
then ranked, with all their subjects. The score of a subject is the mean over its slices. Printed
for each set and way: subject-level AUROC, mean over seeds, of the network and of network and dark
share together (the sum of their standardised scores, without a fit), each with its paired
difference from the dark share.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression

import train
from adnc.cli import COUNT, Parser, run_script
from adnc.data.pixels import find_head
from adnc.phantom.draw import LATENTS_FILE, read_soft_labels
from adnc.scoring.assess import format_table
from adnc.scoring.baselines import DARK, all_dark_shares
from dataset import Batches
from docs.experiments.transfer import auroc, bootstrap, read_set, subject_scores
from modules import make_model
from predict import predict_logits
from utils import pick_device, seed_everything

IMAGE_SIZE = 64
MIDDLE = 128  # the grey of the head's median in normalised slices

# ---------------------------------------------------------------- labels, pixels and offsets


def fluid(slices):
    """The label of the recipe."""
    return read_soft_labels(slices.index, slices.root)


def hippocampus(slices):
    """The probability of AD given how small the hippocampus is among subjects with ventricles and
    sulci alike: what most of the fluid does not tell."""
    table = pd.read_csv(Path(slices.root).parent / LATENTS_FILE, dtype={"scan": str})
    table = table.set_index("scan")
    sizes = np.log(table[["hippocampus", "ventricle", "sulcus"]].to_numpy())
    others = np.column_stack((np.ones(len(sizes)), sizes[:, 1:]))
    learned = (table.split == "train").to_numpy()
    weights = np.linalg.lstsq(others[learned], sizes[learned, 0], rcond=None)[0]
    small = (others @ weights - sizes[:, 0])[:, None]
    line = LogisticRegression(C=1e3).fit(small[learned], table.label[learned] == "AD")
    p_ad = pd.Series(line.predict_proba(small)[:, 1], table.index)
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


def share_logits(slices):
    """What the dark shares say of each slice of a SliceSet, logits (N,): a logistic regression on
    its classes."""
    shares = all_dark_shares(slices.images, slices.rows)
    x = (shares - shares.mean(0)) / shares.std(0)
    return LogisticRegression().fit(x, slices.is_ad).decision_function(x)


@dataclass
class Way:
    """label: of a slice. change: of the pixels. epochs, augment: None and "full" as in the recipe.
    beside_share: the network learns what the share leaves unexplained, logit = network + share."""

    label: object = fluid
    change: object = as_it_is
    epochs: int | None = None
    augment: str = "full"
    beside_share: bool = False


WAYS = {
    "the recipe": Way(),
    "grey divided by the head's median": Way(change=normalised),
    "no crop, flip and rotation": Way(augment="none"),
    "3 epochs, not 10": Way(epochs=3),
    "hippocampus, ventricles and sulci alike": Way(label=hippocampus),
    "classes": Way(label=classes),
    "classes, beside the share": Way(label=classes, beside_share=True),
}


# ---------------------------------------------------------------- training and scores


def train_network(slices, way, device, seed):
    """A network that has learned a SliceSet of drawings by a Way."""
    seed_everything(seed)
    state = train.TrainState(
        make_model("narrow", drop_path_rate=0.0), device=device, amp=None, lr=train.SMALL["lr"]
    )
    batches = Batches(
        way.change(slices), train.SMALL["batch_size"], generator=torch.Generator(), device=device,
        p_ad=way.label(slices),
    )  # fmt: skip
    offset = torch.zeros(len(batches.rows), 1)
    if way.beside_share:
        offset = torch.from_numpy(share_logits(slices)).float()[:, None]
    batches.labels = torch.cat((batches.labels, offset.to(device)), dim=1)  # (N, 3)
    cross_entropy = train.make_loss()

    def criterion(logits, labels):
        half = labels[:, 2:] / 2
        return cross_entropy(logits + torch.cat((-half, half), dim=1), labels[:, :2])

    epochs = way.epochs or train.SMALL["epochs"]
    schedule = dict(
        steps_per_epoch=len(batches), epochs=epochs, warmup_epochs=1, lr=train.SMALL["lr"]
    )
    for epoch in range(epochs):
        batches.generator.manual_seed(1000 * seed + epoch)
        row = train.train_one_epoch(
            state, batches, criterion=criterion, schedule=schedule, image_size=IMAGE_SIZE,
            seed=seed, augment=way.augment,
        )  # fmt: skip
        state.history.append(row)
    return state.model.eval()


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
        point, difference = points[columns].mean(), mean - resamples[:, 0]
        low, high = np.percentile(mean, (2.5, 97.5))
        row.append(f"{point:.3f} [{low:.3f}, {high:.3f}]")
        low, high = np.percentile(difference, (2.5, 97.5))
        row.append(f"{point - points[0]:+.3f} [{low:+.3f}, {high:+.3f}]")
    return row


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("varied", metavar="VARIED", help="the set to train on, of tools.phantom --cue varied")
    add("--sets", nargs="+", required=True, metavar="AD_NC", help="sets to rank")
    add("--seeds", type=COUNT, default=1, help="networks of each way (1)")
    args = parser.parse_args(argv)

    device = pick_device()
    drawn = read_set(args.varied).part("train")
    sets = {root: read_set(root) for root in args.sets}
    rows = {root: [] for root in sets}
    for name, way in WAYS.items():
        networks = [train_network(drawn, way, device, seed) for seed in range(args.seeds)]
        options = dict(image_size=IMAGE_SIZE, device=device, amp=None)
        for root, slices in sets.items():
            seen = way.change(slices)
            logits = [predict_logits(model, seen, **options) for model in networks]
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

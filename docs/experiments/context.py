"""Do the two neighbouring slices help as extra channels? The same slices, as one and as three.

    python -m docs.experiments.context OASIS/AD_NC --folds 5 --out runs/neighbours
    python -m docs.experiments.context PHANTOM/AD_NC --subjects 100 --out runs/phantom-neighbours

2.5-D: the slice before and the slice after it in the same scan are two more channels; where there
is none, the slice itself is taken. The number of a slice is no input. Both ways have the small
recipe, the same folds for all seeds, and the same order and augmentation of slices; the initial
weights differ, since a stem of three channels draws more of them. With --folds all subjects are
predicted out of fold; otherwise networks trained on --subjects of train/ predict test/. Each
network has a temperature fitted on validation, and a subject the mean of p_AD. --out gets the
predictions, one file for each seed; those that are there are not computed again. Prints the
subject-level AUROC, mean over seeds, and the paired differences.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

import train
from adnc.cli import COUNT, Parser, number, run_script
from adnc.data.augment import eval_transform
from adnc.data.subjects import split_hash
from adnc.errors import InputError, count
from adnc.files import fingerprint, read_csv, write_csv
from adnc.scoring.assess import format_table
from adnc.scoring.baselines import DARK, all_dark_shares
from adnc.scoring.calibration import fit_temperature
from dataset import Batches, load_set
from docs.experiments.tables import compare_ways
from modules import make_model
from utils import seed_everything

# ---------------------------------------------------------------- neighbours


def neighbours(index):
    """The rows of the pixels of the slice before each slice, of itself, and of the one after, int
    (N, 3). InputError unless the slices of each scan have consecutive numbers."""
    order = index.sort_values(["scan", "slice"], kind="stable")
    gaps = order.groupby("scan").slice.diff().dropna()
    if (gaps != 1).any():
        raise InputError(
            f"{(gaps != 1).sum()} slices do not follow the one before them by 1; expected scans "
            "of consecutive slices"
        )
    before = order.groupby("scan").row.shift(1).fillna(order.row)
    after = order.groupby("scan").row.shift(-1).fillna(order.row)
    table = pd.DataFrame({"before": before, "row": order.row, "after": after})
    return table.loc[index.index].to_numpy(np.int64)


class Neighbours:
    """The pixels of a SliceSet as an array of three channels a row, as Batches reads it."""

    def __init__(self, slices):
        self.images = slices.images
        self.rows = np.zeros((len(slices.images), 3), np.int64)
        self.rows[slices.rows] = neighbours(slices.index)

    def __getitem__(self, rows):
        return self.images[self.rows[rows]]


class ContextBatches(Batches):
    """Batches of images uint8 (B, 3, H, W). On a CPU."""

    def __init__(self, slices, batch_size, **options):
        super().__init__(slices, batch_size, **options)
        self.images = Neighbours(slices)

    def _fetch(self, numbers):
        images, labels = super()._fetch(numbers)
        return images[:, 0], labels  # (B, 1, 3, H, W) -> (B, 3, H, W)


DARK_SHARE = "dark share, not fitted"
WAYS = {"one slice": (Batches, 1), "with its neighbours (2.5-D)": (ContextBatches, 3)}

# ---------------------------------------------------------------- training and scores


def train_network(slices, batches_of, in_chans, image_size, seed):
    """The small recipe on the part "train" of a SliceSet."""
    seed_everything(seed)
    model = make_model(train.SMALL["model"], in_chans=in_chans)
    state = train.TrainState(model, device=torch.device("cpu"), amp=None, lr=train.SMALL["lr"])
    order = torch.Generator()
    batches = batches_of(
        slices.part("train"), train.SMALL["batch_size"], generator=order, device=state.device
    )
    schedule = dict(
        steps_per_epoch=len(batches), epochs=train.SMALL["epochs"], warmup_epochs=1,
        lr=train.SMALL["lr"],
    )  # fmt: skip
    for epoch in range(train.SMALL["epochs"]):
        order.manual_seed(1000 * seed + epoch)
        row = train.train_one_epoch(
            state, batches, criterion=train.make_loss(), schedule=schedule,
            image_size=image_size, seed=seed,
        )  # fmt: skip
        state.history.append(row)
    return state.model.eval()


@torch.inference_mode()
def predict(model, slices, batches_of, image_size):
    """z_AD - z_NC of the slices of a SliceSet, float64 (N,)."""
    logits = []
    for images, _ in batches_of(slices, 64, device=torch.device("cpu")):
        logits.append(model(eval_transform(images, image_size)).double())
    return torch.cat(logits).diff(dim=1)[:, 0].numpy()


def load_splits(root, folds, n_subjects):
    """A SliceSet for each fold, or one if there are none; alike for all seeds."""
    options = dict(val_fraction=0.1, seed=0, n_subjects=n_subjects, progress=None)
    if folds is None:
        return [load_set(root, drop_test_subjects=True, **options)]
    return [
        load_set(root, fold=fold, folds=folds, pool_test=True, **options) for fold in range(folds)
    ]


def score_seed(splits, image_size, seed):
    """The index of the test slices, with the p_AD of each of WAYS and the dark share."""
    parts = []
    for slices in splits:
        val, test = slices.part("val"), slices.part("test")
        columns = {DARK_SHARE: all_dark_shares(test.images, test.rows)[:, DARK.index(0.5)]}
        for name, (batches_of, in_chans) in WAYS.items():
            model = train_network(slices, batches_of, in_chans, image_size, seed)
            z = predict(model, val, batches_of, image_size)
            temperature = fit_temperature(z, val.is_ad, val.index.group)
            columns[name] = expit(predict(model, test, batches_of, image_size) / temperature)
        parts.append(test.index.reset_index(drop=True).assign(**columns))
    return pd.concat(parts, ignore_index=True)


def read_or_score(splits, image_size, seed, file):
    """The table of `score_seed` from a file, which is written if it does not exist."""
    if not file.exists():
        table = score_seed(splits, image_size, seed)
        write_csv(file, table[["scan", "slice", "subject", "group", "label", *WAYS, DARK_SHARE]])
    return read_csv(file).astype(dict.fromkeys((*WAYS, DARK_SHARE), float))


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("set", metavar="AD_NC", help="a set whose scans have consecutive slices")
    add("--folds", type=number(2, 100, int), help="folds over train/ and test/")
    add("--subjects", type=COUNT, metavar="N", help="train on N subjects of train/ (all)")
    add("--image-size", type=COUNT, default=112, metavar="PX", help="side of the input (112)")
    add("--seeds", nargs="+", type=number(0, 1000, int), default=range(5), help="(0 1 2 3 4)")
    add("--out", required=True, metavar="DIR", help="folder of the predictions")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    splits = load_splits(args.set, args.folds, args.subjects)
    if splits[0].index.subject.isna().any():
        raise InputError(f"{args.set} has scans whose subject is not known; expected subjects.csv")
    # In the names of the files, so that those of another set, split or recipe are not taken for
    # these.
    content = [split_hash(slices.index) for slices in splits]
    recipe = [f"{name}={value}" for name, value in sorted(train.SMALL.items())]
    which = fingerprint(" ".join([*recipe, *content, *splits[0].index.pixel_hash]), 6)
    tables = []
    for seed in args.seeds:
        file = out / f"{args.image_size}px-{which}-seed{seed}.csv"
        tables.append(read_or_score(splits, args.image_size, seed, file))
    n_subjects, seeds = tables[0].subject.nunique(), count(len(tables), "seed")
    print(f"{args.set}: {n_subjects} test subjects, {seeds}, {args.image_size} px\n")
    head = ["", "subject-level AUROC", "minus one slice"]
    ways = {
        name: [table.assign(p_AD=table[name]) for table in tables] for name in (*WAYS, DARK_SHARE)
    }
    for line in format_table([head, *compare_ways(ways)]):
        print(line)


if __name__ == "__main__":
    run_script(main)

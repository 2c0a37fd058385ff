"""How well do networks rank the subjects of sets that they were not trained on?

    python -m docs.experiments.transfer runs/phantom-s? --sets OASIS/AD_NC LOCAL/AD_NC

All subjects of a set are used, of train/ and test/, with the labels of its folders: the runs must
not have seen them. The score of a subject is the mean logit over its slices. Printed for each set:
subject-level AUROC of each run with its interval, Spearman's correlation of its scores with the
dark share of the head (adnc.scoring.baselines), the mean over runs, their ensemble (the mean of
their standardised scores), the dark share itself, and the paired difference from it.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from adnc.cli import Parser, run_script
from adnc.data.subjects import find_exposure
from adnc.errors import InputError
from adnc.scoring.assess import format_table
from adnc.scoring.baselines import DARK, all_dark_shares
from dataset import decode_set
from predict import predict_checkpoint
from utils import load_checkpoint, pick_device

RESAMPLES = 2000


def auroc(is_ad, scores):
    """AUROC of each column of scores (N, ...) for is_ad bool (N,); ties count half."""
    ranks = rankdata(scores, axis=0)
    n_ad = int(is_ad.sum())
    n_nc = len(is_ad) - n_ad
    above = ranks[is_ad].sum(0) - n_ad * (n_ad + 1) / 2
    return above / (n_ad * n_nc)


def bootstrap(is_ad, scores):
    """AUROC of each column of scores (N, C) in RESAMPLES resamples of the subjects, (B, C).

    A resample without one of the classes is drawn again.
    """
    rng = np.random.default_rng(0)
    resamples = []
    while len(resamples) < RESAMPLES:
        rows = rng.integers(0, len(is_ad), len(is_ad))
        if 0 < is_ad[rows].sum() < len(rows):
            resamples.append(auroc(is_ad[rows], scores[rows]))
    return np.array(resamples)


def subject_scores(slices, values):
    """Mean of values (N,) over the slices of each subject, a Series; sorted by subject."""
    return pd.Series(np.asarray(values)).groupby(slices.index.subject.to_numpy()).mean()


def read_set(root):
    """The SliceSet of the scans of a set whose subjects are known; what is left out is printed."""
    slices = decode_set(root, progress=None)
    for line in (*slices.notes, *(f"left out: {path}, {why}" for path, why in slices.bad)):
        print(line)
    unknown = slices.index.subject.isna()
    if unknown.any():
        print(f"left out: {slices.index.scan[unknown].nunique()} scans of unknown subjects")
    return slices.where(~unknown)


def require_unseen(checkpoint, name, slices):
    """InputError if training has seen a subject of a SliceSet."""
    seen = (find_exposure(slices.index, checkpoint["exposure"]) == "yes").sum()
    if seen:
        raise InputError(f"{name} has seen {seen} slices of {slices.root}, or their subjects")


def read_scores(runs, root, device):
    """(is_ad bool (S,), DataFrame with a column for each run and one for the dark share)."""
    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names) or "dark share" in names:
        raise InputError(f"the runs are {', '.join(names)}; expected folders of different names")
    slices = read_set(root)
    columns = {}
    for run in runs:
        checkpoint = load_checkpoint(Path(run) / "best_model.pth")
        require_unseen(checkpoint, run, slices)
        logits = predict_checkpoint(checkpoint, slices, device=device)
        columns[Path(run).name] = subject_scores(slices, logits)
    dark = all_dark_shares(slices.images, slices.rows)[:, DARK.index(0.5)]
    columns["dark share"] = subject_scores(slices, dark)
    table = pd.DataFrame(columns)
    is_ad = subject_scores(slices, slices.is_ad).loc[table.index] > 0.5
    return is_ad.to_numpy(), table


def format_scores(is_ad, table, together=True):
    """Lines of a Markdown table for the scores of `read_scores`; `together` adds the mean of the
    runs and their ensemble."""
    names = list(table)[:-1]
    standard = (table[names] - table[names].mean()) / table[names].std()
    columns = {**table, "ensemble": standard.mean(axis=1)}
    order = [*names, "ensemble", "dark share"]
    scores = np.column_stack([columns[name] for name in order])
    points, resamples = auroc(is_ad, scores), bootstrap(is_ad, scores)
    means = np.column_stack([resamples[:, : len(names)].mean(1), resamples])
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    differences = np.percentile(means - resamples[:, -1:], (2.5, 97.5), axis=0)

    rows = [["", "subject-level AUROC", "minus that of the dark share", "rank correlation with it"]]
    values = [points[: len(names)].mean(), *points]
    for i, name in enumerate([f"mean of {len(names)}", *order]):
        difference, correlation = "", ""
        if name != "dark share":
            lower, upper = differences[:, i]
            difference = f"{values[i] - points[-1]:+.3f} [{lower:+.3f}, {upper:+.3f}]"
        if name in names:
            correlation = f"{spearmanr(table[name], table['dark share'])[0]:.2f}"
        auc = f"{values[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]"
        rows.append([name, auc, difference, correlation])
    head, mean, *each, ensemble, dark = rows
    if together:
        return format_table([head, *each, mean, ensemble, dark])
    return format_table([head, *each, dark])


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--sets", nargs="+", required=True, metavar="AD_NC", help="sets to rank")
    parser.add_argument(
        "--apart", action="store_true",
        help="the runs are not repetitions: print neither their mean nor their ensemble",
    )  # fmt: skip
    args = parser.parse_args(argv)
    device = pick_device()
    for root in args.sets:
        is_ad, table = read_scores(args.runs, root, device)
        print(f"\n{root}: {len(is_ad)} subjects, {is_ad.sum()} AD\n")
        for line in format_scores(is_ad, table, together=not args.apart):
            print(line)


if __name__ == "__main__":
    run_script(main)

"""Weights that saw drawings alone, and a few subjects of another set: how should they be used?

    python -m docs.experiments.finetune OASIS/AD_NC --subjects 25 50 100 --seeds 3

Each number of subjects is drawn from the set once for each seed, half of them AD; all other
subjects are the test. Of each subject a few slices are used, evenly spaced, since this is for a
CPU. METHODS learn from the drawn subjects; the numbers in them were fixed before the first run.
Printed: subject-level AUROC and Brier score of each method, mean over seeds, with an interval over
subjects, and the paired difference of AUROC from the weights as they are.
"""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import nn

import train
from adnc.cli import COUNT, Parser, run_script
from adnc.errors import InputError
from adnc.scoring.assess import format_table
from adnc.scoring.baselines import STRENGTHS, all_dark_shares
from dataset import Batches
from docs.experiments.probe import read_features
from docs.experiments.transfer import auroc, read_set, require_unseen, subject_scores
from modules import make_model
from predict import PHANTOM, predict_logits
from utils import build_model, load_checkpoint, pick_device, seed_everything

LR, EPOCHS, BATCH = 5e-4, 5, 32
RESAMPLES = 1000
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


# ---------------------------------------------------------------- training


def keep_statistics(model):
    """Keep the running statistics of BatchNorm, and use them in training, too."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def fit(model, part, checkpoint, *, device, seed, lr=LR, epochs=EPOCHS, criterion=None):
    """Train a model on a SliceSet, without a warm-up; returns it."""
    state = train.TrainState(model, device=device, amp=None, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    batches = Batches(part, BATCH, generator=generator, device=device)
    schedule = dict(steps_per_epoch=len(batches), epochs=epochs, warmup_epochs=0, lr=lr)
    for _ in range(epochs):
        row = train.train_one_epoch(
            state, batches, criterion=criterion or train.make_loss(), schedule=schedule,
            image_size=checkpoint["image_size"], seed=seed,
        )  # fmt: skip
        state.history.append(row)
    return state.model


def train_head(model, part, checkpoint, **options):
    """Train the last layer alone."""
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.head.parameters():
        p.requires_grad_(True)
    model = fit(keep_statistics(model), part, checkpoint, **options)
    for p in model.parameters():
        p.requires_grad_(True)
    return model


def pull_to_start(model, strength=0.1):
    """A loss with a penalty on the distance from the weights as they are: L2-SP (Li et al. 2018,
    "Explicit inductive bias for transfer learning")."""
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    loss = train.make_loss()

    def criterion(logits, labels):
        distance = sum(((p - old) ** 2).sum() for p, old in zip(parameters, start))
        return loss(logits, labels) + strength / 2 * distance

    return criterion


# ---------------------------------------------------------------- methods

# Each returns logits (N,) of all slices of a set, having seen the labels of `part`, its SliceSet of
# the drawn subjects, which are its `rows` (n,). `context` holds what all methods share.


def as_they_are(context, part, rows, seed):
    return context["logits"]


def calibrated(context, part, rows, seed):
    """Two numbers: slope and bias of the mean logit of a subject, by logistic regression."""
    scores = subject_scores(part, context["logits"][rows])
    labels = subject_scores(part, part.is_ad).loc[scores.index] > 0.5
    line = LogisticRegression(C=1e3).fit(scores.to_numpy()[:, None], labels)
    return line.decision_function(context["logits"][:, None])


def logistic_on(features):
    """A method: a logistic regression on features of slices, the penalty chosen by cross-validation
    over the drawn subjects."""

    def method(context, part, rows, seed):
        x, subjects = context[features], part.index.subject.to_numpy()
        middle, spread = x[rows].mean(0), x[rows].std(0) + 1e-9
        x = (x - middle) / spread
        losses = []
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=2000)
            p = cross_val_predict(
                model, x[rows], part.is_ad, groups=subjects, cv=GroupKFold(5),
                method="predict_proba",
            )[:, 1]  # fmt: skip
            p_subject = subject_scores(part, p)
            is_ad = subject_scores(part, part.is_ad).loc[p_subject.index]
            losses.append(-np.log(np.where(is_ad > 0.5, p_subject, 1 - p_subject)).mean())
        strength = STRENGTHS[int(np.argmin(losses))]
        model = LogisticRegression(C=strength, max_iter=2000).fit(x[rows], part.is_ad)
        return model.decision_function(x)

    return method


def trained(prepare):
    """A method: logits of the model that `prepare(model, part, checkpoint, ...)` returns."""

    def method(context, part, rows, seed):
        seed_everything(seed)
        options = dict(device=context["device"], seed=seed)
        model = prepare(copy.deepcopy(context["model"]), part, context["checkpoint"], **options)
        return context["predict"](model)

    return method


def head_then_all(model, part, checkpoint, **options):
    model = train_head(model, part, checkpoint, **options)
    return fit(model, part, checkpoint, lr=LR / 10, **options)


def pulled(model, part, checkpoint, **options):
    return fit(model, part, checkpoint, criterion=pull_to_start(model), **options)


def frozen_statistics(model, part, checkpoint, **options):
    return fit(keep_statistics(model), part, checkpoint, **options)


def from_random(model, part, checkpoint, **options):
    """The small recipe from random weights, at the same image size."""
    model = make_model(checkpoint["flags"]["model"], **checkpoint["flags"]["model_args"])
    recipe = {"lr": train.SMALL["lr"], "epochs": train.SMALL["epochs"]}
    return fit(model, part, checkpoint, **recipe, **options)


METHODS = {
    "as they are, untouched": as_they_are,
    "calibration: slope and bias": calibrated,
    "logistic regression on the pooled features": logistic_on("features"),
    "the last layer": trained(train_head),
    "the last layer, then all at a tenth of the rate": trained(head_then_all),
    "all weights": trained(fit),
    "all weights, pulled to the start (L2-SP)": trained(pulled),
    "all weights, statistics of BatchNorm kept": trained(frozen_statistics),
    "random weights, small recipe": trained(from_random),
    "no network: logistic regression on the dark shares": logistic_on("dark_shares"),
}


# ---------------------------------------------------------------- scores


def make_context(checkpoint, slices, device):
    """What all methods share: the weights, and what they and the dark share say of each slice."""
    options = {name: checkpoint[name] for name in ("image_size", "mean", "std")}

    def predict(model):
        return predict_logits(model.eval(), slices, device=device, amp=None, **options)

    model = build_model(checkpoint)
    return {
        "device": device,
        "checkpoint": checkpoint,
        "model": model,
        "predict": predict,
        "logits": predict(model),
        "features": read_features(checkpoint, slices, device)["head norm"].astype(float),
        "dark_shares": all_dark_shares(slices.images, slices.rows),
    }


def thin_out(slices, n):
    """At most n slices of each subject of a SliceSet, evenly spaced over its scans and slices."""
    order = slices.index.sort_values(["subject", "scan", "slice"], kind="stable")
    place = order.groupby("subject").cumcount()
    count = order.groupby("subject").path.transform("size")
    step = place * n // count
    kept = step.groupby(order.subject).diff() != 0  # the first slice of each of n parts
    kept = kept.reindex(slices.index.index)
    return replace(slices, index=slices.index[kept].reset_index(drop=True))


def draw_subjects(is_ad, n, seed):
    """A mask of n of the subjects of a Series is_ad, half of them AD."""
    if n < 5:
        raise InputError(f"--subjects is {n}; expected 5 or more, for five folds of them")
    rng = np.random.default_rng([seed, n])
    drawn = pd.Series(False, is_ad.index)
    for label, count in ((True, n // 2), (False, n - n // 2)):
        members = is_ad.index[is_ad == label].to_numpy()
        if len(members) <= count:
            raise InputError(
                f"{len(members)} subjects of a class are too few; expected more than {count}, half "
                "of --subjects"
            )
        drawn[rng.choice(members, count, replace=False)] = True
    return drawn


def run_methods(context, slices, n, seed):
    """(test: is_ad bool (S,), DataFrame of the logit of each test subject by each method)."""
    is_ad = subject_scores(slices, slices.is_ad) > 0.5
    drawn = draw_subjects(is_ad, n, seed)
    rows = np.flatnonzero(slices.index.subject.map(drawn))
    part = replace(slices, index=slices.index.iloc[rows])
    columns = {}
    for name, method in METHODS.items():
        columns[name] = subject_scores(slices, method(context, part, rows, seed))[~drawn]
    return is_ad[~drawn], pd.DataFrame(columns)


def score(is_ad, logits):
    """(AUROC, Brier score) of each column of logits (S, C), float (2, C)."""
    p = expit(logits)
    return np.stack((auroc(is_ad, logits), ((p - is_ad[:, None]) ** 2).mean(0)))


def summarise(results):
    """Rows of the table for the results of `run_methods` of several seeds.

    In each resample of the subjects of the set, all seeds are scored on those of their test that it
    holds.
    """
    subjects = sorted(set().union(*(is_ad.index for is_ad, _ in results)))
    rng, resamples = np.random.default_rng(0), []
    while len(resamples) < RESAMPLES:
        chosen = pd.Series(rng.choice(subjects, len(subjects)))
        scores = []
        for is_ad, table in results:
            rows = chosen[chosen.isin(is_ad.index)]
            labels = is_ad[rows].to_numpy()
            if labels.all() or not labels.any():
                break
            scores.append(score(labels, table.loc[rows].to_numpy()))
        else:
            resamples.append(np.mean(scores, axis=0))
    resamples = np.array(resamples)  # (RESAMPLES, 2, methods)
    each = np.array([score(is_ad.to_numpy(), table.to_numpy()) for is_ad, table in results])
    mean, spread = each.mean(0), np.zeros(each.shape[1:])
    if len(each) > 1:
        spread = each.std(0, ddof=1)

    rows = []
    for i, name in enumerate(METHODS):
        low, high = np.percentile(resamples[:, 0, i], (2.5, 97.5))
        auc, difference = f"{mean[0, i]:.3f} [{low:.3f}, {high:.3f}]", ""
        if i > 0:
            low, high = np.percentile(resamples[:, 0, i] - resamples[:, 0, 0], (2.5, 97.5))
            difference = f"{mean[0, i] - mean[0, 0]:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append([name, auc, f"{spread[0, i]:.3f}", difference, f"{mean[1, i]:.3f}"])
    return rows


# ---------------------------------------------------------------- command


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("set", metavar="AD_NC", help="a set that the weights have not seen")
    add("--checkpoint", default=PHANTOM, help="weights to start from (weights/phantom.pth)")
    add("--subjects", nargs="+", type=COUNT, default=[25, 50, 100], help="how many are used")
    add("--seeds", type=COUNT, default=3, help="how often each number is drawn (3)")
    add("--slices", type=COUNT, default=8, help="slices used of each subject (8)")
    args = parser.parse_args(argv)

    slices = thin_out(read_set(args.set), args.slices)
    checkpoint = load_checkpoint(args.checkpoint)
    require_unseen(checkpoint, args.checkpoint, slices)
    context = make_context(checkpoint, slices, pick_device())
    head = ["", "subject-level AUROC", "SD of seeds", "minus untouched", "Brier score"]
    for n in args.subjects:
        results = [run_methods(context, slices, n, seed) for seed in range(args.seeds)]
        test, _ = results[0]
        print(
            f"\n{args.set}: {n} subjects, half of them AD; the test are {len(test)} others, "
            f"{test.sum()} of them AD; {args.seeds} draws\n"
        )
        for line in format_table([head, *summarise(results)]):
            print(line, flush=True)


if __name__ == "__main__":
    run_script(main)

"""Compare the attribution methods of `predict.py --explain` on the phantom.

    python -m docs.experiments.attribution WORK > tables.md     # about 20 minutes on one core

Where atrophy alters the phantom's anatomy is known. The script draws two phantoms into the folder
WORK, one with the local and one with the global cue, and trains on each twice: with its labels, and
with labels shuffled over subjects. What exists is not repeated. It prints the tables of
docs/explain.md.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import train
from adnc import CLASSES
from adnc.cli import Parser, number, run_script
from adnc.data.index import list_inputs
from adnc.explain import attribution
from adnc.files import write_atomically, write_csv
from adnc.phantom.anatomy import render
from adnc.phantom.draw import EFFECT, draw, plan, plan_local
from adnc.scoring import plots
from adnc.scoring.assess import format_table
from dataset import load_inputs, read_index
from modules import make_model
from utils import build_model, load_checkpoint

# cue: (subjects of the phantom, how its scans are planned, recipe)
PHANTOMS = {"local": (200, plan_local, "small"), "global": (100, plan, "demo")}
MIN_CHANGE = 5  # grey levels: pixels that atrophy changes by more are the altered region
N_RANDOM = 3  # random maps for each map

# ---------------------------------------------------------------- data and models


def shuffle_labels(data, out, seed=0):
    """Copy a set AD_NC into `out` by hard links, with labels shuffled over subjects.

    Returns the path of the new AD_NC.
    """
    index = read_index(data)
    subjects = index.drop_duplicates("subject").sort_values("subject")
    shuffled = np.random.default_rng(seed).permutation(subjects.label)
    label = index.subject.map(dict(zip(subjects.subject, shuffled)))
    for split in ("train", "test"):
        for name in CLASSES:
            (out / "AD_NC" / split / name).mkdir(parents=True)
    for path, split, name in zip(index.path, index.split, label):
        os.link(path, out / "AD_NC" / split / name / Path(path).name)
    # The phantom's own metadata are not copied, since they hold the true labels.
    write_csv(out / "subjects.csv", index.drop_duplicates("scan")[["scan", "subject"]])
    return out / "AD_NC"


def prepare(work, cue):
    """(path of the phantom with a cue, checkpoint, checkpoint with shuffled labels)."""
    subjects, _, recipe = PHANTOMS[cue]
    data, shuffled = work / cue / "AD_NC", work / f"{cue}-shuffled" / "AD_NC"
    part = work / "part"  # what an interrupted command leaves
    if not data.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        draw(part, subjects, cue=cue)
        part.rename(work / cue)
    if not shuffled.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        shuffle_labels(data, part)
        part.rename(work / f"{cue}-shuffled")
    checkpoints = []
    for name, source in ((f"run-{cue}", data), (f"run-{cue}-shuffled", shuffled)):
        if not (work / name / "test" / "metrics.json").exists():
            flags = ["--data", str(source), "--recipe", recipe]
            if (work / name / "last.pth").exists():
                flags = ["--resume"]
            train.main([*flags, "--out", str(work / name)])
        checkpoints.append(load_checkpoint(work / name / "best_model.pth"))
    return data, *checkpoints


def altered(scan, seed=0):
    """The pixels of a scan's slices that atrophy changes: bool (n, 240, 256).

    The same scan, noise included, is drawn with the mean atrophy of AD and with that of NC.
    """
    ad = render(scan._replace(atrophy=EFFECT), seed).astype(int)
    nc = render(scan._replace(atrophy=-EFFECT), seed).astype(int)
    return abs(ad - nc) > MIN_CHANGE


def altered_regions(index, cue):
    """The altered region of each row of an index: bool (N, 240, 256)."""
    subjects, plan_scans, _ = PHANTOMS[cue]
    planned = {str(scan.scan): scan for scan in plan_scans(subjects)}
    regions = np.zeros((len(index), 240, 256), bool)
    parts = index.assign(at=range(len(index))).groupby("scan")
    for name, part in tqdm(parts, "altered anatomy", leave=False, disable=None):
        scan = planned[name]
        regions[part["at"]] = altered(scan)[[scan.indices.index(number) for number in part.slice]]
    return regions


def choose_slices(index, n_scans, n_slices):
    """Which rows of the test index are explained, bool (N,).

    Half of the scans are AD; of each scan, `n_slices` evenly spaced slices are taken.
    """
    scans = index.drop_duplicates("scan").groupby("label").scan.head(n_scans // 2)
    place = index.sort_values("slice").groupby("scan").cumcount().reindex(index.index)
    step = (index.groupby("scan").scan.transform("size") / n_slices).clip(lower=1)
    return index.scan.isin(scans) & (place % step < 1)


# ---------------------------------------------------------------- measures


def share_inside(maps, region):
    """The share of the positive attribution of maps (N, S, S) in regions bool (N, S, S).

    Returns (N,), NaN for a map without positive values.
    """
    positive = maps.clip(min=0)
    with np.errstate(invalid="ignore"):
        return (positive * region).sum((1, 2)) / positive.sum((1, 2))


def scramble(maps, rng):
    """Random maps (N, S, S) with the power spectrum, and so the smoothness, of the given ones."""
    phase = np.angle(np.fft.rfft2(rng.standard_normal(maps.shape)))
    size = np.abs(np.fft.rfft2(maps - maps.mean((1, 2), keepdims=True)))
    return np.fft.irfft2(size * np.exp(1j * phase), maps.shape[1:])


@torch.inference_mode()
def deletion(model, x, baseline, maps, mask, share=0.05):
    """The margins (N,) of images (N, 1, S, S) after deletion (Samek et al. 2017, arXiv 1509.06321).

    The pixels with the highest values inside the mask, a share of all pixels, are replaced by the
    baseline.
    """
    ranked = np.where(mask, maps, -np.inf).reshape(len(maps), -1)
    n = int(share * ranked.shape[1])
    deleted = np.zeros(ranked.shape, bool)
    np.put_along_axis(deleted, np.argpartition(-ranked, n, axis=1)[:, :n], True, axis=1)
    deleted = torch.from_numpy(deleted.reshape(maps.shape)[:, None]).to(x.device)
    return attribution.margin(model)(torch.where(deleted, baseline, x)).double().cpu().numpy()


def edges(model, x, baseline):
    """Not an attribution: the strength of edges, which does not depend on the weights."""
    dy, dx = torch.gradient(x, dim=(2, 3))
    return (dx**2 + dy**2).sqrt()


def distance(model, x, baseline):
    """Not an attribution: the distance of each pixel from the mean training slice.

    Deletion alone rewards this distance.
    """
    return (x - baseline).abs()


CONTROLS = {"edges (no attribution)": edges, "distance to mean (no attribution)": distance}


def interval(values, scans, digits=3):
    """`mean [low, high]` of slice values by a bootstrap over scans, and whether low is above 0."""
    means = pd.Series(values).groupby(scans).mean().dropna().to_numpy()
    resampled = np.random.default_rng(0).choice(means, (2000, len(means))).mean(1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return f"{means.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]", bool(low > 0)


class Experiment:
    """The slices of a phantom, the model, and the model that was trained with shuffled labels."""

    def __init__(self, checkpoint, shuffled, slices, regions):
        self.checkpoint, self.slices = checkpoint, slices
        self.model = build_model(checkpoint).eval()
        self.shuffled = build_model(shuffled).eval()
        self.baseline = self.view(checkpoint["mean_slice"].numpy()[None])
        self.x = self.view(slices.images[slices.rows])
        # > 0 is half a pixel or more, since the view is centred on 0.
        self.region = self.view((255 * regions).astype(np.uint8))[:, 0].numpy() > 0
        self.mask = attribution.inside_head(self.x, self.baseline)
        self.scans, self.is_ad = slices.index.scan.to_numpy(str), slices.is_ad

    def view(self, images):
        """uint8 (N, H, W) as the model sees them."""
        return attribution.view(self.checkpoint, images, torch.device("cpu"))

    def fresh_model(self):
        return make_model(**self.checkpoint["model"])

    def check(self, name, method, maps):
        """A row of the table of checks, and the names of the parts of the model."""
        others = attribution.attribute(method, self.shuffled, self.x, self.baseline, progress=name)
        on_shuffled = attribution.compare(maps, others, self.mask)
        some = plots.evenly(np.arange(len(self.x)), attribution.N_CHECKED)
        checked = attribution.check(
            method, self.model, self.fresh_model, self.x[some], self.baseline, name
        )
        cascade = checked.groupby("part", sort=False)[["signed", "absolute"]].mean()
        usable = attribution.is_usable(checked) and max(on_shuffled) < attribution.LIMIT
        row = [name, *(f"{part.signed:.2f}, {part.absolute:.2f}" for part in cascade.itertuples())]
        row += ["{:.2f}, {:.2f}".format(*on_shuffled), "yes" if usable else "UNUSABLE"]
        return row, list(cascade.index)

    def localise(self, name, maps):
        """A row of the table of localisation and deletion, each compared with random maps."""
        rng = np.random.default_rng(0)
        random_maps = [scramble(maps, rng) for _ in range(N_RANDOM)]
        share = share_inside(maps, self.region)
        area = (self.region & self.mask).sum((1, 2)) / self.mask.sum((1, 2))
        by_chance = [share_inside(other * self.mask, self.region) for other in random_maps]
        by_chance = np.nanmean(by_chance, axis=0)

        temperature = self.checkpoint["calibration"]["temperature"]
        logits = attribution.margin(self.model)(self.x).detach().double().numpy()

        def drop(maps):
            remaining = deletion(self.model, self.x, self.baseline, maps, self.mask)
            return expit(logits / temperature) - expit(remaining / temperature)

        real = drop(maps)
        chance = np.mean([drop(other) for other in random_maps], axis=0)
        more, is_inside = interval(share - np.maximum(area, by_chance), self.scans)
        drops, is_deleted = interval((real - chance)[self.is_ad], self.scans[self.is_ad])
        better = []
        if is_inside:
            better.append("inside")
        if is_deleted:
            better.append("deletion")
        ad_scans = self.scans[self.is_ad]
        return [
            name,
            interval(share, self.scans)[0],
            f"{area.mean():.3f}",
            interval(by_chance, self.scans)[0],
            more,
            interval(real[self.is_ad], ad_scans)[0],
            interval(chance[self.is_ad], ad_scans)[0],
            drops,
            " and ".join(better) if better else "NO BETTER THAN CHANCE",
        ]

    def classify(self, name, maps):
        """A row of the table of the sums of maps as a classifier."""
        inside = (maps * self.region).sum((1, 2))
        return [
            name,
            f"{(inside[self.is_ad] > 0).mean():.2f}",
            f"{(inside[~self.is_ad] > 0).mean():.2f}",
            f"{roc_auc_score(self.is_ad, inside):.3f}",
            f"{roc_auc_score(self.is_ad, maps.sum((1, 2))):.3f}",
        ]


# ---------------------------------------------------------------- tables and a picture


def plot_maps(path, experiment, regions):
    """Draw two slices of an AD and two of an NC scan in columns.

    The first row shows the altered region, the others the map of each method.
    """
    from matplotlib.figure import Figure

    index = experiment.slices.index.assign(at=range(len(experiment.slices)))
    shown = []
    for label in reversed(CLASSES):
        shown.extend(index[index.label == label]["at"].iloc[[7, 9]])
    pixels = experiment.slices.images[experiment.slices.rows[shown]]
    x = experiment.view(pixels)
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    contents = [("altered by atrophy", None), *attribution.METHODS.items()]
    axes = figure.subplots(len(contents), len(shown))
    for row, (name, method) in zip(axes, contents):
        if method:
            maps = attribution.attribute(method, experiment.model, x, experiment.baseline)
            maps = attribution.smooth(maps)
            values = [attribution.to_slice(one, pixels.shape[1:]) for one in maps]
        else:
            values = [regions[at].astype(float) for at in shown]
            for axis, at in zip(row, shown):
                axis.set_title(f"{index.label.iloc[at]}, slice {index.slice.iloc[at]}", fontsize=9)
        for axis, picture, value in zip(row, pixels, values):
            axis.imshow(plots.blend(picture, value, np.quantile(abs(value), 0.995)))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def run(work, cue, n_scans, n_slices):
    """Print the tables of one phantom, and draw its picture."""
    data, checkpoint, shuffled = prepare(work, cue)
    slices = load_inputs(list_inputs([data / "test"]), slice_size=checkpoint["slice_size"])
    slices = slices.where(choose_slices(slices.index, n_scans, n_slices))
    regions = altered_regions(slices.index, cue)
    experiment = Experiment(checkpoint, shuffled, slices, regions)
    plot_maps(work / f"explain-{cue}.png", experiment, regions)

    checks, places, classes = [], [], []
    for name, method in {**attribution.METHODS, **CONTROLS}.items():
        maps = attribution.attribute(
            method, experiment.model, experiment.x, experiment.baseline, progress=name
        )
        row, parts = experiment.check(name, method, maps)
        checks.append(row)
        places.append(experiment.localise(name, maps))
        classes.append(experiment.classify(name, maps))

    n_ad, n = slices.is_ad.sum(), slices.index.scan.nunique()
    print(f"\n{cue} cue: {len(slices)} slices of {n} test scans, {n_ad} of the slices AD\n")
    steps = [parts[0], *(f"+ {part}" for part in parts[1:])]
    header = ["method", *steps, "shuffled labels", "usable"]
    print("\n".join(format_table([header, *checks])), "", sep="\n")
    header = [
        "method", "positive inside", "area", "random map inside", "more than both",
        "drop of p_AD", "random map", "more", "better than chance",
    ]  # fmt: skip
    print("\n".join(format_table([header, *places])), "", sep="\n")
    header = [
        "method", "AD slices positive inside", "NC slices", "AUROC of the sum inside",
        "of the whole sum",
    ]  # fmt: skip
    print("\n".join(format_table([header, *classes])), flush=True)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("work", metavar="WORK", help="folder for the phantoms and their runs")
    parser.add_argument(
        "--scans", type=number(2, 5000, int), default=40, help="test scans to explain, at most (40)"
    )
    parser.add_argument(
        "--slices", type=number(1, 20, int), default=6, help="slices of each, at most (6)"
    )
    args = parser.parse_args(argv)
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for cue in PHANTOMS:
        run(work, cue, args.scans, args.slices)


if __name__ == "__main__":
    run_script(main)

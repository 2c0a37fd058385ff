"""What the attribution methods of `predict.py --explain` are worth on the phantom, where the altered anatomy is known.

    python docs/attribution.py WORK > WORK/tables.md     # from the folder of the repository; about 20 minutes on a core

draws two phantoms into the folder WORK, one with the local and one with the global cue, and trains on each, once with
its labels and once with labels that are shuffled over subjects. What is there already is not made again. Prints the
tables of docs/explain.md.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adnc.cli import Parser, number, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("work", metavar="WORK", help="folder for the phantoms and their runs")
    parser.add_argument("--scans", type=number(2, 5000, int), default=40, help="test scans to explain, at most (40)")
    parser.add_argument("--slices", type=number(1, 20, int), default=6, help="slices of each, at most (6)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from adnc.explain import attribution as explain
from adnc.scoring import plots
from adnc.phantom.anatomy import render
from adnc.scoring.assess import format_table
from utils import build_model, load_checkpoint
from dataset import load_inputs, read_index
from adnc.files import write_atomically
from adnc.data.index import list_inputs
from adnc.scoring.metrics import expit
from adnc.phantom.draw import EFFECT, plan, plan_local
from adnc.cli import CLASSES

# cue: (subjects of the phantom, how its scans are planned, recipe)
PHANTOMS = {"local": (200, plan_local, "small"), "global": (100, plan, "demo")}
CHANGED = 5  # grey levels: pixels that atrophy changes by more are the altered region
DRAWS = 3  # random maps for each map


def shuffle_labels(data, out, seed=0):
    """A copy (links) of a set AD_NC with the labels shuffled over the subjects; returns its AD_NC."""
    index = read_index(data)
    subjects = index.drop_duplicates("subject").sort_values("subject")
    drawn = np.random.default_rng(seed).permutation(subjects.label)
    label = index.subject.map(dict(zip(subjects.subject, drawn)))
    for split in ("train", "test"):
        for name in CLASSES:
            (out / "AD_NC" / split / name).mkdir(parents=True)
    for path, split, name in zip(index.path, index.split, label):
        os.link(path, out / "AD_NC" / split / name / Path(path).name)
    # not the metadata, which know the labels
    index.drop_duplicates("scan")[["scan", "subject"]].to_csv(out / "subjects.csv", index=False)
    return out / "AD_NC"


def run(script, *words):
    print("python", script, *words, file=sys.stderr)
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True, stdout=sys.stderr)


def prepare(work, cue):
    """The paths of the phantom with a cue and of the two runs on it."""
    subjects, _, recipe = PHANTOMS[cue]
    data, shuffled = work / cue / "AD_NC", work / f"{cue}-shuffled" / "AD_NC"
    if not data.is_dir():
        run("phantom.py", work / cue, "--cue", cue, "--subjects", subjects)
    if not shuffled.is_dir():
        shuffle_labels(data, work / f"{cue}-shuffled")
    runs = work / f"run-{cue}", work / f"run-{cue}-shuffled"
    for folder, source in zip(runs, (data, shuffled)):
        if not (folder / "test" / "metrics.json").exists():
            run("train.py", "--data", source, "--recipe", recipe, "--out", folder)
    return data, *runs


# ---------------------------------------------------------------- what is measured


def altered(scan, seed=0):
    """Where atrophy acts on the slices of a scan: bool (n, 240, 256). The same scan, noise included, is drawn with the
    mean atrophy of AD and with that of NC."""
    ill, well = (render(scan._replace(atrophy=sign * EFFECT), seed).astype(int) for sign in (1, -1))
    return abs(ill - well) > CHANGED


def interval(values, scans, digits=3):
    """`mean [low, high]` of values of slices, a bootstrap over scans; and whether the interval is above 0."""
    means = pd.Series(values).groupby(scans).mean().dropna().to_numpy()
    drawn = np.random.default_rng(0).choice(means, (2000, len(means))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{means.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]", bool(low > 0)


def edges(model, x, baseline):
    """Not an attribution: the strength of edges, which no weight can change."""
    dy, dx = torch.gradient(x, dim=(2, 3))
    return (dx**2 + dy**2).sqrt()


def distance(model, x, baseline):
    """Not an attribution: how far each pixel is from the mean training slice. It shows what deletion gains by that."""
    return (x - baseline).abs()


CONTROLS = {"edges (no attribution)": edges, "distance to mean (no attribution)": distance}


def measure(name, method, checkpoint, shuffled, x, baseline, region, scans, is_ad):
    """The rows of a method in the three tables of the page, and the parts of the model."""
    model, other = (build_model(each).eval() for each in (checkpoint, shuffled))
    where, temperature = explain.inside_head(x, baseline), checkpoint["calibration"]["temperature"]
    maps = explain.attribute(method, model, x, baseline, bar=name)
    on_shuffled = explain.compare(maps, explain.attribute(method, other, x, baseline, bar=name), where)
    some = np.unique(np.linspace(0, len(x) - 1, explain.CHECKED).round().astype(int))
    checked = explain.check(method, checkpoint, x[some], baseline, name)
    cascade = checked.groupby("part", sort=False)[["signed", "absolute"]].mean()
    usable = explain.is_usable(checked) and max(on_shuffled) < explain.LIMIT
    first = [name, *(f"{row.signed:.2f}, {row.absolute:.2f}" for row in cascade.itertuples()),
             "{:.2f}, {:.2f}".format(*on_shuffled), "yes" if usable else "UNUSABLE"]

    share, area = explain.share_inside(maps, region), (region & where).sum((1, 2)) / where.sum((1, 2))
    rng = np.random.default_rng(0)
    random = [explain.scramble(maps, rng) for _ in range(DRAWS)]
    by_chance = np.nanmean([explain.share_inside(other * where, region) for other in random], axis=0)
    p = expit(explain.margin(model)(x).detach().double().numpy() / temperature)

    def drop(maps):
        return p - expit(explain.deletion(model, x, baseline, maps, where) / temperature)

    real, chance = drop(maps), np.mean([drop(other) for other in random], axis=0)
    inside, better_inside = interval(share - np.maximum(area, by_chance), scans)
    drops, better_drop = interval((real - chance)[is_ad], scans[is_ad])
    verdict = " and ".join(["inside"] * better_inside + ["deletion"] * better_drop) or "NO BETTER THAN CHANCE"
    net = (maps * region).sum((1, 2))
    third = [name, f"{(net[is_ad] > 0).mean():.2f}", f"{(net[~is_ad] > 0).mean():.2f}",
             f"{roc_auc_score(is_ad, net):.3f}", f"{roc_auc_score(is_ad, maps.sum((1, 2))):.3f}"]
    second = [name, interval(share, scans)[0], f"{area.mean():.3f}", interval(by_chance, scans)[0], inside,
              interval(real[is_ad], scans[is_ad])[0], interval(chance[is_ad], scans[is_ad])[0], drops, verdict]
    return first, second, third, list(cascade.index)


def draw(path, explainer, slices, region):
    """A picture: slices of an AD and of an NC scan in columns; with what atrophy alters, and with each method's map."""
    from matplotlib.figure import Figure

    index = slices.index.assign(at=range(len(slices)))
    shown = [at for label in CLASSES[::-1] for at in index[index.label == label]["at"].iloc[[7, 9]]]
    pixels = slices.images[slices.rows[shown]]
    x = explainer.view(pixels)
    figure = Figure(figsize=(7.2, 7.2), layout="constrained")
    axes = figure.subplots(4, 4)
    for row, (name, method) in zip(axes, [("altered by atrophy", None), *explain.METHODS.items()]):
        maps = explain.attribute(method, explainer.model, x, explainer.baseline) if method else None
        for axis, k, at in zip(row, range(4), shown):
            found = region[at].astype(float) if maps is None else explain.to_slice(
                gaussian_filter(maps[k], maps.shape[1] / explain.SMOOTH), pixels.shape[1:])
            axis.imshow(plots.blend(pixels[k], found, np.quantile(abs(found), 0.995)))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if maps is None:
                axis.set_title(f"{index.label.iloc[at]}, slice {index.slice.iloc[at]}", fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def some_of(index, scans, slices):
    """Which rows of the test index are explained: of each class half of the scans, of each of them some slices."""
    ordered = index.drop_duplicates("scan").groupby("label").scan.head(scans // 2)
    place = index.sort_values("slice").groupby("scan").cumcount().reindex(index.index)
    step = (index.groupby("scan").scan.transform("size") / slices).clip(lower=1)
    return index.scan.isin(ordered) & (place % step < 1)


def regions(index, cue):
    """The altered region of each row: bool (N, 240, 256)."""
    subjects, how, _ = PHANTOMS[cue]
    planned = {str(scan.scan): scan for scan in how(subjects)}
    found = np.zeros((len(index), 240, 256), bool)
    parts = index.assign(at=range(len(index))).groupby("scan")
    for name, part in tqdm(parts, "altered anatomy", leave=False, disable=None):
        scan = planned[name]
        found[part["at"]] = altered(scan)[[scan.indices.index(number) for number in part.slice]]
    return found


def assess(work, cue, args):
    """Print the tables of a phantom."""
    data, *runs = prepare(work, cue)
    checkpoint, shuffled = (load_checkpoint(folder / "best_model.pth") for folder in runs)
    slices = load_inputs(list_inputs([data / "test"]), checkpoint)
    slices = slices.where(some_of(slices.index, args.scans, args.slices))
    explainer, index = explain.Explainer(checkpoint, "auto", torch.device("cpu")), slices.index
    x = explainer.view(slices.images[slices.rows])
    region = regions(index, cue)
    draw(work / f"explain-{cue}.png", explainer, slices, region)
    seen = explainer.view((255 * region).astype(np.uint8))[:, 0].numpy() > 0  # at least half of a pixel

    rows = {name: measure(name, method, checkpoint, shuffled, x, explainer.baseline, seen, index.scan.to_numpy(str),
                          slices.is_ad)
            for name, method in {**explain.METHODS, **CONTROLS}.items()}
    firsts, seconds, thirds, names = zip(*rows.values())
    print(f"\n{cue} cue: {len(index)} slices of {index.scan.nunique()} test scans, {slices.is_ad.sum()} of them AD\n")
    steps = ["head", *(f"+ {name}" for name in names[0][1:])]
    print(*format_table([["method", *steps, "shuffled labels", "usable"], *firsts]), "", sep="\n")
    print(*format_table([["method", "positive inside", "area", "random map inside", "more than both",
                          "drop of p_AD", "random map", "more", "better than chance"], *seconds]), "", sep="\n")
    print(*format_table([["method", "AD slices positive inside", "NC slices", "AUROC of the sum inside",
                          "of the whole sum"], *thirds]), sep="\n", flush=True)


def main(args):
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for cue in PHANTOMS:
        assess(work, cue, args)


if __name__ == "__main__":
    run_script(main, ARGS)

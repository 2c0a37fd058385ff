"""How fragile a model is, and what each stage knows: small changes of the test slices, and linear
probes.

    python -m docs.experiments.stress runs/a runs/b --out stress

A change is a function of one slice uint8 (H, W), applied to the decoded slices; the rest is the
inference path of any prediction."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch import nn

from adnc.cli import Parser, run_script
from adnc.cpu_engine import is_convnext
from adnc.data.augment import eval_transform
from adnc.data.index import list_inputs
from adnc.errors import InputError
from adnc.files import new_folder, write_csv
from adnc.scoring import metrics, plots
from adnc.scoring.assess import cell, format_table, read_run
from adnc.scoring.calibration import apply_calibration
from dataset import Batches, load_inputs
from predict import predict_slices
from utils import build_model, load_checkpoint, pick_amp, pick_device

FOLDS = 5  # of the linear probe

# ---------------------------------------------------------------- changes


def shift(pixels, by):
    """Moved right and down by `by` pixels; what comes in is black."""
    moved = np.zeros_like(pixels)
    moved[by:, by:] = pixels[:-by, :-by]
    return moved


def rotate(pixels, degrees):
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR))


def gamma(pixels, exponent):
    return (255 * (pixels / 255) ** exponent).round().astype(np.uint8)


def contrast(pixels, factor):
    return (pixels * factor).clip(0, 255).round().astype(np.uint8)


def noise(pixels, sd):
    """Gaussian noise of `sd` grey levels inside the brain; the same for the same slice."""
    drawn = np.random.default_rng(int(pixels.sum())).normal(0, sd, pixels.shape)
    return (pixels + drawn * (pixels > 0)).clip(0, 255).round().astype(np.uint8)


def blur(pixels, sigma):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def bias_field(pixels, share):
    """Brighter by a share on one side, darker on the other, as near a coil."""
    return (
        (pixels * np.linspace(1 - share, 1 + share, pixels.shape[1]))
        .clip(0, 255)
        .round()
        .astype(np.uint8)
    )


# name: (function, its levels, their unit)
CHANGES = {
    "shift": (shift, (1, 2, 4, 8), "px"),
    "rotation": (rotate, (2, 5, 10, 15), "degrees"),
    "gamma": (gamma, (0.7, 0.85, 1.2, 1.4), ""),
    "contrast": (contrast, (0.7, 0.85, 1.15, 1.3), "times"),
    "noise": (noise, (5, 10, 20), "grey levels"),
    "blur": (blur, (0.5, 1, 2), "px"),
    "JPEG quality": (jpeg, (75, 50, 25), ""),
    "bias field": (bias_field, (0.1, 0.2, 0.4), ""),
}
KEPT = (0.5, 0.1)  # shares of a scan's slices, at least one: the others are missing

# ---------------------------------------------------------------- decisions that change


def stress(checkpoint, slices, device, amp):
    """Scores of a model on labelled slices under each of CHANGES, and with slices missing.

    Returns a table, a row a change: change, level, n (scans), changed (the share of scans whose
        prediction changes), accuracy and auroc at scan level, and the interval of each (name +
        "_ci95"); the first row has the slices as they are. """

    def predict(images, index=slices.index):
        part = replace(slices, images=images, index=index)
        raw = predict_slices(checkpoint, part, device=device, amp=amp)
        return apply_calibration(raw, checkpoint["calibration"])

    plain = predict(slices.images)
    rows = [{"change": "none", "level": "", **score_change(plain, plain)}]
    for name, (change, levels, unit) in CHANGES.items():
        for level in levels:
            with ThreadPoolExecutor() as pool:
                images = np.stack(
                    list(pool.map(change, slices.images, [level] * len(slices.images)))
                )
            scores = score_change(plain, predict(images))
            rows.append({"change": name, "level": f"{level} {unit}".strip(), **scores})
    place = slices.index.groupby("scan").cumcount()
    size = slices.index.groupby("scan").scan.transform("size")
    for share in KEPT:
        step = (size / (size * share).round().clip(lower=1)).round().astype(int)
        left = predict(slices.images, slices.index[place % step == 0])
        rows.append(
            {"change": "slices left", "level": f"{share:g} of them", **score_change(plain, left)}
        )
    return pd.DataFrame(rows)


def score_change(plain, other):
    """Scan-level scores of predictions, and the share of scans whose prediction is not that of
    `plain`."""
    scans, before = (
        metrics.aggregate(other, "scan"),
        metrics.aggregate(plain, "scan").set_index("scan"),
    )
    changed = (
        scans.prediction.to_numpy(str) != before.prediction[scans.scan].to_numpy(str)
    ).astype(float)
    bootstrap = metrics.Bootstrap(scans.group)
    resampled = bootstrap.total(changed) / bootstrap.total(np.ones(len(changed)))
    sample = metrics.summarise_unit(metrics.sample_unit(other, "scan"))
    row = {"n": len(scans), "changed": changed.mean(), "changed_ci95": metrics.interval(resampled)}
    for name in ("accuracy", "auroc"):
        row[name], row[f"{name}_ci95"] = sample[name], sample["ci95"][name]
    return row


def load_test(folder):
    """(checkpoint, SliceSet) of a run's test: its best model, and the slices that its predictions
    list."""
    predictions, _ = read_run(folder)
    checkpoint = load_checkpoint(Path(folder) / "best_model.pth")
    listing = list_inputs(predictions.path.tolist(), checkpoint["flags"]["subject_pattern"])
    listing.index["label"] = listing.index.path.map(dict(zip(predictions.path, predictions.label)))
    slices = load_inputs(listing, slice_size=checkpoint["slice_size"], bits=checkpoint["bits"])
    bad = slices.index[slices.index.error.notna()]
    if len(bad):
        raise InputError(
            f"{len(bad)} test slices of {folder} cannot be read, first {bad.path.iloc[0]}: "
            f"{bad.error.iloc[0]}"
        )
    return checkpoint, slices


# ---------------------------------------------------------------- what each stage knows


@torch.inference_mode()
def probe(checkpoint, slices, device):
    """What a model knows after the stem, each stage and the head's norm, from the mean x over the
    map: {place: (auroc, spread)}.

    `auroc` is that of a scan-level read-out: a logistic regression on x, cross-validated over
    groups of labelled slices; NaN if these are too few. `spread` is how far slices differ: the norm
    of the SD of x over slices, divided by the norm of its mean. """
    model = build_model(checkpoint).to(device).eval()
    features = {name: [] for name in places(model)}
    for name, module in places(model).items():
        module.register_forward_hook(keep_means(features[name]))
    for images, _ in Batches(slices, 64, device=device):
        model(eval_transform(images, checkpoint["image_size"]))
    scores = {}
    for name, parts in features.items():
        x = torch.cat(parts).numpy()
        spread = np.linalg.norm(x.std(0)) / max(np.linalg.norm(x.mean(0)), 1e-12)
        scores[name] = read_out(x, slices), float(spread)
    return scores


def keep_means(features):
    """A hook that appends the mean over the map of a module's output."""

    def hook(module, inputs, output):
        output = output.float()
        features.append((output.flatten(2).mean(2) if output.ndim == 4 else output).cpu())

    return hook


def read_out(x, slices):
    """Scan-level AUROC of a cross-validated logistic regression on features x (N, C) of slices; NaN
    if they are too few."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    index, is_ad = slices.index, slices.is_ad
    n_folds = min(FOLDS, index.group.nunique())
    if n_folds < 2:
        return math.nan
    p = np.zeros(len(index))
    for train, test in GroupKFold(n_folds).split(index, index.label, index.group):
        if not 0 < is_ad[train].mean() < 1:
            return math.nan
        line = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        p[test] = line.fit(x[train], is_ad[train]).predict_proba(x[test])[:, 1]
    scans = pd.DataFrame({"scan": index.scan, "ad": is_ad, "p": p}).groupby("scan").mean()
    y, p = scans.ad.to_numpy() == 1, scans.p.to_numpy()
    return metrics.point_scores(y, p, p >= 0.5)["auroc"]


def places(model):
    """The modules after which `probe` looks, by name."""
    if is_convnext(model):
        stages = {f"stage {i}": stage for i, stage in enumerate(model.stages, 1)}
        return {"stem": model.downsample_layers[0], **stages, "head norm": model.norm}
    pools = [module for module in model if isinstance(module, nn.MaxPool2d)]
    return {f"stage {i}": module for i, module in enumerate(pools, 1)}


# ---------------------------------------------------------------- tables and pictures


def format_stress(tables):
    """Lines of a table of `stress` for several runs, {name: table}."""
    header = ["change"]
    for name, table in tables.items():
        header += [f"{name} (n = {table.n[0]:,}): changed", f"{name}: AUROC"]
    rows = [header]
    first = next(iter(tables.values()))
    for i, (change, level) in enumerate(zip(first.change, first.level)):
        row = [f"{change} {level}".strip()]
        for table in tables.values():
            for column in ("changed", "auroc"):
                part = {column: table[column][i], "ci95": {column: table[f"{column}_ci95"][i]}}
                row.append(cell(part, column))
        rows.append(row)
    return format_table(rows)


def format_probe(known):
    """Lines of a table of `probe` for several runs, {name: dict}."""
    rows = [
        ["linear read-out", *(f"{name}: {what}" for name in known for what in ("AUROC", "spread"))]
    ]
    for place in dict.fromkeys(place for scores in known.values() for place in scores):
        row = [f"after {place}"]
        for scores in known.values():
            if place in scores:
                auroc, spread = scores[place]
                row += ["undefined" if math.isnan(auroc) else f"{auroc:.3f}", f"{spread:.2g}"]
            else:
                row += ["", ""]
        rows.append(row)
    return format_table(rows)


def plot_stress(path, tables, title):
    """For each kind of change the share of scans whose decision changes, by level; a line a run."""
    first = next(iter(tables.values()))
    kinds = [kind for kind in dict.fromkeys(first.change) if kind != "none"]
    n_rows = math.ceil(len(kinds) / 3)
    with plots.figure(path, title, 3, height=2.2 * n_rows, width=3, ratios=[1] * n_rows) as rows:
        for axes, kind in zip(rows.flat, kinds):
            for name, table in tables.items():
                part = table[table.change == kind]
                levels = part.level.str.split(n=1)  # the number, and its unit
                axes.plot(levels.str[0], part.changed, marker="o", markersize=3, label=name)
            axes.set(title=" ".join([kind, *levels.iloc[0][1:]]), ylim=(-0.02, 1.02))
        rows.flat[0].legend()
        rows[0][0].set_ylabel("share of scans")


def plot_probe(path, known, title):
    """AUROC of a linear read-out, and spread, by place in the network; a line a run."""
    with plots.figure(path, title, 2) as ((left, right),):
        for name, scores in known.items():
            aurocs, spreads = zip(*scores.values())
            left.plot(list(scores), aurocs, marker="o", markersize=3, label=name)
            right.plot(list(scores), spreads, marker="o", markersize=3, label=name)
        left.set(ylabel="AUROC, linear read-out")
        right.set(ylabel="SD over slices / mean", yscale="log")
        for axes in (left, right):
            axes.tick_params(axis="x", rotation=30)
        left.legend()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new folder for stress.csv and two pictures"
    )
    args = parser.parse_args(argv)
    out = new_folder(args.out)
    device = pick_device()
    amp = pick_amp("auto", device)
    tables, known = {}, {}
    for folder in args.runs:
        checkpoint, slices = load_test(folder)
        tables[folder] = stress(checkpoint, slices, device, amp)
        known[folder] = probe(checkpoint, slices, device)
    print(
        "share of scans whose decision changes, and scan-level AUROC, if slices are changed",
        "",
        sep="\n",
    )
    print("\n".join(format_stress(tables)), "", sep="\n")
    print(
        "scan-level AUROC of a linear read-out of the mean over the map, cross-validated by "
        "group; and the spread: the SD "
        "of that mean over slices, relative to its size", "", sep="\n",
    )  # fmt: skip
    print("\n".join(format_probe(known)))
    write_csv(
        out / "stress.csv", pd.concat([table.assign(run=name) for name, table in tables.items()])
    )
    plot_stress(out / "stress.png", tables, "decisions that change if the slices are changed")
    plot_probe(
        out / "probe.png", known, "what is known after each stage, and how far slices differ there"
    )
    print(f"results in {out}")


if __name__ == "__main__":
    run_script(main)

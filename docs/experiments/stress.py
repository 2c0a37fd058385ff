"""Stress test: how many predictions change when the test slices are changed a little?

    python -m docs.experiments.stress runs/a runs/b --out stress

A change is a function of one decoded slice, uint8 (H, W); everything else is the inference path of
any prediction. Prints a table, and writes it as stress.csv with a picture, stress.png.
"""

import io
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageFilter

from adnc.cli import Parser, run_script
from adnc.data.index import list_inputs
from adnc.errors import InputError
from adnc.files import new_folder, require_new, write_csv
from adnc.scoring import metrics, plots
from adnc.scoring.assess import cell, format_table, read_run
from adnc.scoring.calibration import apply_calibration
from dataset import load_inputs
from predict import predict_slices
from utils import load_checkpoint, pick_amp, pick_device

# ---------------------------------------------------------------- changes


def shift(pixels, by):
    """Move right and down by `by` pixels; the new pixels are black."""
    moved = np.zeros_like(pixels)
    moved[by:, by:] = pixels[:-by, :-by]
    return moved


def rotate(pixels, degrees):
    return np.asarray(Image.fromarray(pixels).rotate(degrees, Image.Resampling.BILINEAR))


def to_uint8(pixels):
    return pixels.clip(0, 255).round().astype(np.uint8)


def gamma(pixels, exponent):
    return to_uint8(255 * (pixels / 255) ** exponent)


def contrast(pixels, factor):
    return to_uint8(pixels * factor)


def noise(pixels, sd):
    """Gaussian noise of `sd` grey levels inside the brain; equal slices get equal noise."""
    generator = np.random.default_rng(int(pixels.sum()))
    noise = generator.normal(0, sd, pixels.shape)
    return to_uint8(pixels + np.where(pixels > 0, noise, 0.0))


def blur(pixels, sigma):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def bias_field(pixels, share):
    """Brighter by a share on one side and darker on the other, as near a coil."""
    return to_uint8(pixels * np.linspace(1 - share, 1 + share, pixels.shape[1]))


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
KEPT = (0.5, 0.1)  # shares of the slices of a scan that are left; at least one slice is

# ---------------------------------------------------------------- predictions that change


def load_test(folder):
    """(checkpoint, SliceSet) of the test of a run: its best model, and the slices that its
    predictions list."""
    predictions, _ = read_run(folder)
    checkpoint = load_checkpoint(Path(folder) / "best_model.pth")
    listing = list_inputs(predictions.path.tolist(), checkpoint["flags"]["subject_pattern"])
    listing.index["label"] = listing.index.path.map(dict(zip(predictions.path, predictions.label)))
    slices = load_inputs(listing, slice_size=checkpoint["slice_size"], bits=checkpoint["bits"])
    bad = slices.index[slices.index.error.notna()]
    if len(bad):
        first = bad.iloc[0]
        raise InputError(
            f"{len(bad)} test slices of {folder} cannot be read, first {first.path}: {first.error}"
        )
    return checkpoint, slices


def stress(checkpoint, slices, *, device, amp):
    """Scores of a model on labelled slices under each of CHANGES, and with slices left out.

    Returns a table with one row per change: change, level, n (scans), changed (the share of scans
    whose prediction changes), accuracy and auroc at scan level, and the interval of each (name +
    "_ci95"). The first row is for the unchanged slices.
    """

    def predict(images, index=slices.index):
        part = replace(slices, images=images, index=index)
        predictions = predict_slices(checkpoint, part, device=device, amp=amp)
        return apply_calibration(predictions, checkpoint["calibration"])

    plain = predict(slices.images)
    rows = [{"change": "none", "level": "", **score_change(plain, plain)}]

    for name, (change, levels, unit) in CHANGES.items():
        for level in levels:
            with ThreadPoolExecutor() as pool:
                images = list(pool.map(change, slices.images, itertools.repeat(level)))
            scores = score_change(plain, predict(np.stack(images)))
            rows.append({"change": name, "level": f"{level} {unit}".strip(), **scores})

    position = slices.index.groupby("scan").cumcount()
    size = slices.index.groupby("scan").scan.transform("size")
    for share in KEPT:
        step = (size / (size * share).round().clip(lower=1)).round().astype(int)
        scores = score_change(plain, predict(slices.images, slices.index[position % step == 0]))
        rows.append({"change": "slices left", "level": f"{share:g} of them", **scores})
    return pd.DataFrame(rows)


def score_change(plain, other):
    """Scan-level scores of predictions, and the share of scans predicted differently in `plain`."""
    scans = metrics.aggregate(other, "scan")
    before = metrics.aggregate(plain, "scan").set_index("scan").prediction[scans.scan]
    changed = (scans.prediction.to_numpy(str) != before.to_numpy(str)).astype(float)
    bootstrap = metrics.Bootstrap(scans.group)
    resampled = bootstrap.total(changed) / bootstrap.total(np.ones(len(changed)))
    sample = metrics.summarise_unit(metrics.sample_unit(other, "scan"))

    share = changed.mean()
    changed_ci95 = metrics.interval(resampled)
    if share in (0, 1):  # where the bootstrap says nothing
        changed_ci95 = metrics.exact_interval(share, scans.group.nunique())
    row = {"n": len(scans), "changed": share, "changed_ci95": changed_ci95}
    for name in ("accuracy", "auroc"):
        row[name] = sample[name]
        row[f"{name}_ci95"] = sample["ci95"][name]
    return row


# ---------------------------------------------------------------- table and picture


def format_stress(tables):
    """Lines of a table of the results of `stress` for several runs, {name: table}."""
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


def plot_stress(path, tables, title):
    """The share of scans whose prediction changes, by level; a panel per change, a line per run."""
    first = next(iter(tables.values()))
    changes = [name for name in dict.fromkeys(first.change) if name != "none"]
    n_rows = math.ceil(len(changes) / 3)
    size = dict(columns=3, height=2.2 * n_rows, width=3, ratios=np.ones(n_rows))
    with plots.figure(path, title, **size) as panels:
        for axes, change in zip(panels.flat, changes):
            for name, table in tables.items():
                part = table[table.change == change]
                levels = part.level.str.split(n=1)  # the number and its unit
                axes.plot(levels.str[0], part.changed, marker="o", markersize=3, label=name)
            axes.set(title=" ".join([change, *levels.iloc[0][1:]]), ylim=(-0.02, 1.02))
        panels.flat[0].legend()
        panels[0][0].set_ylabel("share of scans")


# ---------------------------------------------------------------- command


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the results")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    require_new(args.out)
    device = pick_device()
    amp = pick_amp("auto", device)
    tables = {}
    for folder in args.runs:
        checkpoint, slices = load_test(folder)
        tables[folder] = stress(checkpoint, slices, device=device, amp=amp)

    print("share of scans whose prediction changes, and scan-level AUROC, on changed slices\n")
    print("\n".join(format_stress(tables)))
    out = new_folder(args.out)
    rows = pd.concat([table.assign(run=name) for name, table in tables.items()])
    write_csv(out / "stress.csv", rows)
    plot_stress(out / "stress.png", tables, "predictions that change when the slices are changed")
    print(f"results in {out}")


if __name__ == "__main__":
    run_script(main)

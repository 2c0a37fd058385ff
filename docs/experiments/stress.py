"""How fragile a model is, and where it knows what it knows: test slices changed a little, and a look after each stage.

Not run by itself; `evaluate.py RUN --stress` is its command. A change is a function of one slice uint8 (H, W), applied
to the decoded slices, so that everything behind it is the road of any prediction.
"""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageFilter
from torch import nn

from adnc.scoring import metrics
from utils import build_model, load_checkpoint
from dataset import load_inputs, make_loader
from adnc.cpu_engine import calibrated, predict_slices
from adnc.data.index import list_inputs
from modules import ConvNeXt
from adnc.data.augment import eval_transform
from adnc.cli import InputError, Threads

FOLDS = 5  # of the linear probe

# ---------------------------------------------------------------- what is changed


def shift(pixels, by):
    """Moved right and down by so many pixels; what comes in is black."""
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
    """Gaussian noise of so many grey levels where there is a brain; the same for the same slice."""
    drawn = np.random.default_rng(int(pixels.sum())).normal(0, sd, pixels.shape)
    return (pixels + drawn * (pixels > 0)).clip(0, 255).round().astype(np.uint8)


def blur(pixels, sigma):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def bias_field(pixels, share):
    """Brighter by a share on one side, darker on the other, as a coil makes it."""
    return (pixels * np.linspace(1 - share, 1 + share, pixels.shape[1])).clip(0, 255).round().astype(np.uint8)


CHANGES = {  # name: (function, its levels, their unit)
    "shift": (shift, (1, 2, 4, 8), "px"), "rotation": (rotate, (2, 5, 10, 15), "degrees"),
    "gamma": (gamma, (0.7, 0.85, 1.2, 1.4), ""), "contrast": (contrast, (0.7, 0.85, 1.15, 1.3), "times"),
    "noise": (noise, (5, 10, 20), "grey levels"), "blur": (blur, (0.5, 1, 2), "px"),
    "JPEG quality": (jpeg, (75, 50, 25), ""), "bias field": (bias_field, (0.1, 0.2, 0.4), ""),
}  # fmt: skip
KEPT = (0.5, 0.1)  # shares of a scan's slices, at least one: the others are missing

# ---------------------------------------------------------------- what it does


def stress(checkpoint, slices, runtime, batch_size=64):
    """What a model says of labelled slices under each of CHANGES and with slices missing. Returns a table, a row a
    change: change, level, n (scans), changed (the share of scans whose prediction is another), accuracy and auroc at
    scan level, and the interval of each (name + "_ci95"); the first row is of the slices as they are."""

    def predict(images, index=slices.index):
        part = replace(slices, images=images, index=index)
        raw = predict_slices(checkpoint, part, runtime, batch_size=batch_size)
        return calibrated(raw, checkpoint)

    plain = predict(slices.images)
    rows = [score_change(plain, plain) | {"change": "none", "level": ""}]
    for name, (change, levels, unit) in CHANGES.items():
        for level in levels:
            with Threads() as pool:
                images = np.stack(list(pool.map(lambda pixels: change(pixels, level), slices.images)))  # noqa: B023
            rows.append(score_change(plain, predict(images)) | {"change": name, "level": f"{level} {unit}".strip()})
    place = slices.index.groupby("scan").cumcount()
    size = slices.index.groupby("scan").scan.transform("size")
    for share in KEPT:
        step = (size / (size * share).round().clip(lower=1)).round().astype(int)
        left = predict(slices.images, slices.index[place % step == 0])
        rows.append(score_change(plain, left) | {"change": "slices left", "level": f"{share:g} of them"})
    return pd.DataFrame(rows)


def load_test(folder, predictions):
    """(checkpoint, SliceSet) of a run's test: its best model, and the slices that its predictions list."""
    if not (Path(folder) / "best_model.pth").exists():
        raise InputError(f"{folder} has no best_model.pth; expected the folder of a finished run of train.py")
    checkpoint = load_checkpoint(Path(folder) / "best_model.pth")
    missing = [path for path in predictions.path if not Path(path).exists()]
    if missing:
        raise InputError(f"{len(missing)} test slices of {folder} are not where they were, first {missing[0]}")
    listing = list_inputs(predictions.path.tolist(), checkpoint["flags"].get("subject_pattern"))
    listing.index["label"] = listing.index.path.map(dict(zip(predictions.path, predictions.label)))
    slices = load_inputs(listing, checkpoint)
    failed = slices.index[slices.index.error.notna()]
    if len(failed):
        raise InputError(f"{len(failed)} test slices of {folder} cannot be read any more, first {failed.path.iloc[0]}: "
                         f"{failed.error.iloc[0]}")
    return checkpoint, slices


def score_change(plain, other):
    """Scan-level scores of predictions, and the share of scans whose prediction is not that of `plain`."""
    scans, before = metrics.aggregate(other, "scan"), metrics.aggregate(plain, "scan").set_index("scan")
    changed = (scans.prediction.to_numpy(str) != before.prediction[scans.scan].to_numpy(str)).astype(float)
    bootstrap = metrics.Bootstrap(scans.group)
    sample = metrics.summarise_unit(metrics.sample_unit(other, "scan"))
    drawn = bootstrap.total(changed) / bootstrap.total(np.ones(len(changed)))
    row = {"n": len(scans), "changed": changed.mean(), "changed_ci95": metrics.interval(drawn)}
    for name in ("accuracy", "auroc"):
        row |= {name: sample[name], f"{name}_ci95": sample["ci95"][name]}
    return row


# ---------------------------------------------------------------- where the information is


@torch.inference_mode()
def probe(checkpoint, slices, runtime, batch_size=64):
    """What a model knows after the stem, each stage and the head's norm, from the mean x over the map: {place: (auroc,
    spread)}. `auroc` is that at scan level of a logistic regression on x, cross-validated over groups of labelled
    slices, NaN where these are too few; `spread` how far slices differ: the norm of the SD of x over slices, over the
    norm of its mean."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = build_model(checkpoint).to(runtime.device).eval()
    seen, hooks = {name: [] for name in stages(model)}, []
    for name, module in stages(model).items():
        hooks.append(module.register_forward_hook(
            lambda module, given, out, name=name: seen[name].append(out.float().flatten(2).mean(2).cpu()
                                                                    if out.ndim == 4 else out.float().cpu())))
    for x, _ in make_loader(slices, batch_size):
        model(eval_transform(x.to(runtime.device), checkpoint["image_size"]))
    index, scores, n = slices.index, {}, min(FOLDS, slices.index.group.nunique())
    folds = list(GroupKFold(n).split(index, index.label, index.group)) if n > 1 else []
    known = bool(folds) and all(0 < slices.is_ad[train].mean() < 1 for train, _ in folds)
    for name, parts in seen.items():
        x, p = torch.cat(parts).numpy(), np.zeros(len(index))
        for train, test in folds if known else ():
            line = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            p[test] = line.fit(x[train], slices.is_ad[train]).predict_proba(x[test])[:, 1]
        table = pd.DataFrame({"scan": index.scan, "ad": slices.is_ad, "p": p}).groupby("scan").mean()
        y, p = table.ad.to_numpy() == 1, table.p.to_numpy()
        spread = np.linalg.norm(x.std(0)) / max(np.linalg.norm(x.mean(0)), 1e-12)
        scores[name] = metrics.point_scores(y, p, p >= 0.5)["auroc"] if known else math.nan, float(spread)
    return scores


def stages(model):
    """The modules behind which `probe` looks, by name."""
    if isinstance(model, ConvNeXt):
        parts = {f"stage {i}": stage for i, stage in enumerate(model.stages, 1)}
        return {"stem": model.downsample_layers[0], **parts, "head norm": model.norm}
    pools = [module for module in model if isinstance(module, nn.MaxPool2d)]
    return {f"stage {i}": module for i, module in enumerate(pools, 1)}

"""Linear probe: what does each stage of a network know about the class?

    python -m docs.experiments.probe probe.png runs/a runs/b

After the stem, each stage and the norm of the head, features are averaged over the map. Prints the
scan-level AUROC of a logistic regression on them, cross-validated over groups of test subjects, and
their spread over slices; draws both.
"""

import math

import numpy as np
import pandas as pd
import torch
from torch import nn

from adnc.cli import Parser, new_png, run_script
from adnc.cpu_engine import is_convnext
from adnc.data.augment import eval_transform
from adnc.scoring import metrics, plots
from adnc.scoring.assess import format_table
from dataset import Batches
from docs.experiments.stress import load_test
from utils import build_model, pick_device

FOLDS = 5

# ---------------------------------------------------------------- features


def places(model):
    """The modules after which features are read, by name."""
    if is_convnext(model):
        stages = {f"stage {i}": stage for i, stage in enumerate(model.stages, 1)}
        return {"stem": model.downsample_layers[0], **stages, "head norm": model.norm}
    pools = [module for module in model if isinstance(module, nn.MaxPool2d)]
    return {f"stage {i}": pool for i, pool in enumerate(pools, 1)}


@torch.inference_mode()
def read_features(checkpoint, slices, device):
    """Features (N, C) of slices after each place of a model, averaged over the map, by name."""
    model = build_model(checkpoint).to(device).eval()
    features = {name: [] for name in places(model)}
    for name, module in places(model).items():
        module.register_forward_hook(keep_means(features[name]))
    mean, std = checkpoint["mean"], checkpoint["std"]
    for images, _ in Batches(slices, 64, device=device):
        model(eval_transform(images, checkpoint["image_size"], mean, std))
    return {name: torch.cat(parts).numpy() for name, parts in features.items()}


def keep_means(features):
    """A hook that appends the output of a module, averaged over the map, to a list."""

    def hook(module, inputs, output):
        output = output.float()
        if output.ndim == 4:
            output = output.flatten(2).mean(2)  # (N, C, H, W) -> (N, C)
        features.append(output.cpu())

    return hook


# ---------------------------------------------------------------- scores


def probe(checkpoint, slices, *, device):
    """{place: (auroc, spread)} of a model on labelled slices.

    `auroc` is that of `read_out`. `spread` tells how far slices differ: the norm of the SD of the
    features over slices, divided by the norm of their mean.
    """
    scores = {}
    for name, x in read_features(checkpoint, slices, device).items():
        spread = np.linalg.norm(x.std(0)) / max(np.linalg.norm(x.mean(0)), 1e-12)
        scores[name] = (read_out(x, slices), float(spread))
    return scores


def read_out(x, slices):
    """Scan-level AUROC of a cross-validated logistic regression on features x (N, C); NaN if there
    are too few groups."""
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
        if is_ad[train].all() or not is_ad[train].any():
            return math.nan
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        p[test] = model.fit(x[train], is_ad[train]).predict_proba(x[test])[:, 1]

    scans = pd.DataFrame({"scan": index.scan, "ad": is_ad, "p": p}).groupby("scan").mean()
    y, p = scans.ad.to_numpy() == 1, scans.p.to_numpy()
    return metrics.point_scores(y, p, p >= 0.5)["auroc"]


# ---------------------------------------------------------------- table and picture


def format_probe(results):
    """Lines of a table of the results of `probe` for several runs, {name: scores}."""
    header = ["linear read-out"]
    for name in results:
        header += [f"{name}: AUROC", f"{name}: spread"]
    rows = [header]
    for place in dict.fromkeys(place for scores in results.values() for place in scores):
        row = [f"after {place}"]
        for scores in results.values():
            if place in scores:
                auroc, spread = scores[place]
                row += ["undefined" if math.isnan(auroc) else f"{auroc:.3f}", f"{spread:.2g}"]
            else:
                row += ["", ""]
        rows.append(row)
    return format_table(rows)


def plot_probe(path, results, title):
    """AUROC and spread by place in the network, a line per run."""
    with plots.figure(path, title, columns=2) as ((left, right),):
        for name, scores in results.items():
            aurocs, spreads = zip(*scores.values())
            left.plot(list(scores), aurocs, marker="o", markersize=3, label=name)
            right.plot(list(scores), spreads, marker="o", markersize=3, label=name)
        left.set(ylabel="AUROC, linear read-out")
        right.set(ylabel="SD over slices / mean", yscale="log")
        for axes in (left, right):
            axes.tick_params(axis="x", rotation=30)
        left.legend()


# ---------------------------------------------------------------- command


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("png", type=new_png, metavar="PNG", help="the picture")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = pick_device()
    results = {}
    for folder in args.runs:
        checkpoint, slices = load_test(folder)
        results[folder] = probe(checkpoint, slices, device=device)

    print(
        "AUROC: scan-level, of a linear read-out of the mean over the map, cross-validated;\n"
        "spread: the SD of that mean over slices, relative to its size\n"
    )
    print("\n".join(format_probe(results)))
    plot_probe(args.png, results, "what each stage knows, and how far slices differ there")
    print(f"\npicture in {args.png}")


if __name__ == "__main__":
    run_script(main)

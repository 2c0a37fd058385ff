"""Baselines that a ConvNeXt has to beat: predictors that see no anatomy, or only a blur.

train.py fits them on the training slices and stores them in the checkpoint, so that the final test
and predict.py report them beside the model.

    majority_class        the larger class of the training scans
    window_vote           the larger class of the training scans with the same slice window (lowest
                          slice number): what a model can learn from the choice of slices alone
    logistic_regression   on the slice, averaged down to about 16 x 16 pixels; the p_AD of a scan is
                          the mean over its slices
"""

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from adnc.scoring.metrics import fit_windows

SIDE = 16  # pixels of the short side after averaging

# scikit-learn's C, the inverse strength of the L2 penalty. Validation chooses.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def shrink(images, rows):
    """Rows (N,) of uint8 (M, H, W) -> float32 (N, pixels) in [0, 1]: means of square blocks."""
    block = max(1, min(images.shape[1:]) // SIDE)
    height, width = (side // block for side in images.shape[1:])
    parts = []
    for part in np.array_split(rows, 1 + len(rows) // 1024):  # all at once may not fit in memory
        # (n, H, W) -> (n, height, block, width, block)
        blocks = images[part][:, : height * block, : width * block]
        blocks = blocks.reshape(len(part), height, block, width, block)
        means = blocks.mean((2, 4), dtype=np.float32)
        parts.append(means.reshape(len(part), height * width) / 255)
    return np.concatenate(parts)


def fit_baselines(slices):
    """Fit the baselines on split "train" of a SliceSet; returns plain values for the checkpoint.

    The penalty of the logistic regression is chosen by the log loss of the validation scans.
    """
    index, y = slices.index, slices.is_ad
    train = (index.split == "train").to_numpy()
    val = (index.split == "val").to_numpy()
    scans = index[train].groupby("scan").agg(label=("label", "first"), at=("slice", "min"))

    x = shrink(slices.images, slices.rows)
    scaler = StandardScaler().fit(x[train])
    x = scaler.transform(x)
    best, best_loss = None, np.inf
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(x[train], y[train])
        p = index[val].assign(p=model.predict_proba(x[val])[:, 1])
        p = p.groupby("scan").agg(p=("p", "mean"), label=("label", "first"))
        loss = log_loss(p.label == "AD", p.p, labels=[False, True])
        if loss < best_loss:
            best, best_loss = model, loss

    weights = best.coef_[0] / scaler.scale_  # of the pixels before standardisation
    return {
        "share_AD": float((scans.label == "AD").mean()),
        "windows": fit_windows(scans).to_dict(),
        "weights": weights.tolist(),
        "bias": float(best.intercept_[0] - weights @ scaler.mean_),
        "C": float(best.C),
    }


def predict_baselines(fitted, slices):
    """p_AD of each baseline for a SliceSet, a DataFrame with one column per baseline.

    The pixels must have the size of those of the fit. A slice window that does not occur in
    training gets the share of AD among the training scans.
    """
    window = slices.index.groupby("scan").slice.transform("min")
    window_vote = window.map(fitted["windows"]).astype(float).fillna(fitted["share_AD"])
    pixels = shrink(slices.images, slices.rows).astype(float)
    logits = pixels @ np.array(fitted["weights"]) + fitted["bias"]
    table = pd.DataFrame(index=slices.index.index)
    table["majority_class"] = fitted["share_AD"]
    table["window_vote"] = window_vote.to_numpy()
    table["logistic_regression"] = expit(logits)
    return table.round(7)  # as in predictions.csv

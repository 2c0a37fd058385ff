"""Baselines that a ConvNeXt has to beat: predictors that see no anatomy, or only a blur of it.

train.py fits them on its training slices and puts them into the checkpoint, so that its own test and predict.py
report them beside the model.

    majority_class        the larger class of the training scans
    window_vote           the larger class of the training scans with the same slice window (lowest slice number):
                          what a model can get from the choice of slices alone
    logistic_regression   on the slice, averaged down to about 16 x 16 pixels; a scan gets the mean over its slices
"""

import numpy as np
import pandas as pd

from adnc.scoring.metrics import expit, fit_windows

SIDE = 16  # pixels of the short side after averaging
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn, the inverse of the L2 penalty; chosen on validation


def shrink(images, rows):
    """Rows (N,) of uint8 (M, H, W) -> float32 (N, pixels) in [0, 1]: means of square blocks."""
    block = max(1, min(images.shape[1:]) // SIDE)
    height, width = (side // block for side in images.shape[1:])
    parts = []
    for part in np.array_split(rows, 1 + len(rows) // 1024):  # together they may not fit into memory
        blocks = images[part][:, : height * block, : width * block]
        blocks = blocks.reshape(len(part), height, block, width, block)
        parts.append(blocks.mean((2, 4), dtype=np.float32).reshape(len(part), height * width) / 255)
    return np.concatenate(parts)


def fit_baselines(slices):
    """Fit the baselines on split "train" of a SliceSet; returns plain values for the checkpoint. The penalty of the
    logistic regression is chosen by the log loss of the validation scans."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    index, y = slices.index, slices.is_ad
    train, val = (index.split == "train").to_numpy(), (index.split == "val").to_numpy()
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
    """p_AD of each baseline for a SliceSet whose pixels have the size of the fit: a DataFrame with a column each. A
    window that training did not have gets the majority."""
    window = slices.index.groupby("scan").slice.transform("min")
    window_vote = window.map(fitted["windows"]).astype(float).fillna(fitted["share_AD"])
    pixels = shrink(slices.images, slices.rows).astype(float)
    logits = pixels @ np.array(fitted["weights"]) + fitted["bias"]
    table = pd.DataFrame(index=slices.index.index)
    table["majority_class"] = fitted["share_AD"]
    table["window_vote"] = window_vote.to_numpy()
    table["logistic_regression"] = expit(logits)
    return table.round(7)  # as in predictions.csv

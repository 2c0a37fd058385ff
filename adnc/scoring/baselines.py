"""What a ConvNeXt has to beat: predictors that see no anatomy, or only a blur of it.

Not run by itself: train.py fits them on its training slices and puts them into the checkpoint, so that its own test and
predict.py report them beside the ConvNeXt.

    majority_class        the larger class of the training scans, for everybody
    window_vote           the larger class of the training scans with the same slice window (its lowest slice number):
                          what a model can get from the choice of slices alone
    logistic_regression   on the slice, averaged down to about 16 x 16 pixels; a scan gets the mean over its slices
"""

import numpy as np
import pandas as pd
from scipy.special import expit

from adnc.scoring.metrics import fit_windows

SIDE = 16  # pixels of the short side after averaging
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of scikit-learn, the inverse of the L2 penalty; chosen on validation


def shrink(images, rows=None):
    """Rows `rows` (N,), or all, of uint8 (M, H, W) -> float32 (N, pixels) in [0, 1]: means of square blocks, about SIDE
    on the short side."""
    if rows is not None:  # in parts: together they may not fit into memory
        parts = np.array_split(rows, 1 + len(rows) // 1024)
        return np.concatenate([shrink(images[part]) for part in parts])
    block = max(1, min(images.shape[1:]) // SIDE)
    height, width = (side // block for side in images.shape[1:])
    images = images[:, : height * block, : width * block].reshape(len(images), height, block, width, block)
    return images.mean((2, 4), dtype=np.float32).reshape(len(images), height * width) / 255


def fit_baselines(slices):
    """Fit all three on split "train" of a SliceSet. The penalty of the logistic regression is chosen by the log loss of
    the validation scans. Returns plain values for the checkpoint."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.preprocessing import StandardScaler

    index, y = slices.index, slices.is_ad
    train, val = (index.split == "train").to_numpy(), (index.split == "val").to_numpy()
    scans = index[train].groupby("scan").agg(label=("label", "first"), at=("slice", "min"))
    x = shrink(slices.images, slices.rows)
    scale = StandardScaler().fit(x[train])
    standard = scale.transform(x)
    best, best_loss = None, np.inf
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(standard[train], y[train])
        p = index[val].assign(p=model.predict_proba(standard[val])[:, 1]).groupby("scan").agg(
            p=("p", "mean"), label=("label", "first"))  # fmt: skip
        loss = log_loss(p.label == "AD", p.p, labels=[False, True])
        if loss < best_loss:
            best, best_loss = model, loss
    weights = best.coef_[0] / scale.scale_  # on pixels as they are
    return {
        "share_AD": float((scans.label == "AD").mean()), "windows": fit_windows(scans).to_dict(),
        "weights": weights.tolist(), "bias": float(best.intercept_[0] - weights @ scale.mean_), "C": float(best.C),
    }  # fmt: skip


def predict_baselines(fitted, slices):
    """p_AD of each baseline, a DataFrame with a column each and the index of the SliceSet's, whose pixels have the size
    that the fit had. A window that training did not have gets the majority."""
    at = slices.index.groupby("scan").slice.transform("min")
    z = shrink(slices.images, slices.rows).astype(float) @ np.array(fitted["weights"]) + fitted["bias"]
    return pd.DataFrame({
        "majority_class": fitted["share_AD"],
        "window_vote": at.map(fitted["windows"]).astype(float).fillna(fitted["share_AD"]).to_numpy(),
        "logistic_regression": expit(z),
    }, index=slices.index.index).round(7)  # as predictions.csv has them  # fmt: skip

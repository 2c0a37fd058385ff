"""Baselines that a ConvNeXt has to beat: predictors that see no anatomy, a blur, or one number.

train.py fits them on the training slices and stores them in the checkpoint, so that the final test
and predict.py report them beside the model.

    majority_class        the larger class of the training scans
    window_vote           the larger class of the training scans with the same slice window (lowest
                          slice number): what a model can learn from the choice of slices alone
    logistic_regression   on the slice, averaged down to about 16 x 16 pixels; the p_AD of a scan is
                          the mean over its slices
    dark_share            on the shares of the head that are darker than 0.4, 0.5 and 0.6 of its
                          median grey. In T1 fluid is dark, and atrophy makes room for fluid. The
                          head is what is not black, so that the background must be black
"""

import numpy as np
import pandas as pd
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from adnc.data.pixels import find_head, threads
from adnc.scoring.metrics import fit_windows

SIDE = 16  # pixels of the short side after averaging

DARK = (0.4, 0.5, 0.6)  # of the median grey of the head
MIN_BACKGROUND = 0.1  # share of near-black in the median slice

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


def dark_shares(pixels):
    """The shares of the head in a slice uint8 (H, W) that are darker than DARK times the median
    grey of the head, float (3,); 0 if there is no head.
    """
    head = pixels[find_head(pixels)]
    if len(head) == 0:
        return np.zeros(len(DARK))
    median = np.median(head)
    return np.array([np.mean(head < share * median) for share in DARK])


def all_dark_shares(images, rows):
    """`dark_shares` of rows (N,) of uint8 (M, H, W), float (N, 3)."""
    with threads() as pool:
        shares = list(pool.map(lambda row: dark_shares(images[row]), rows))
    return np.reshape(shares, (len(rows), len(DARK)))


def describe_background(index):
    """A line if the slices of an index with pixels.STATS have no black background."""
    near_black = index.near_black.median()
    if near_black < MIN_BACKGROUND:
        yield (
            f"only {near_black:.0%} of a slice is near-black: without a black background the dark "
            "share of the head is no measure of fluid"
        )


def fit_logistic(x, is_ad, train, val, scan):
    """A logistic regression on standardised features (N, F); returns plain values.

    Fitted on the rows `train`, with the penalty that has the lowest log loss on the scans of the
    rows `val` (boolean arrays (N,)). `scan` (N,) names the scan of each row.
    """
    scaler = StandardScaler().fit(x[train])
    train_x, val_x = scaler.transform(x[train]), scaler.transform(x[val])
    val_scans = pd.DataFrame({"scan": scan[val], "is_ad": is_ad[val]})
    best, best_loss = None, np.inf
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(train_x, is_ad[train])
        p = val_scans.assign(p=model.predict_proba(val_x)[:, 1])
        p = p.groupby("scan").agg(p=("p", "mean"), is_ad=("is_ad", "first"))
        loss = log_loss(p.is_ad, p.p, labels=[False, True])
        if loss < best_loss:
            best, best_loss = model, loss
    weights = best.coef_[0] / scaler.scale_  # of the features before standardisation
    bias = float(best.intercept_[0] - weights @ scaler.mean_)
    return {"weights": weights.tolist(), "bias": bias, "C": float(best.C)}


def fit_baselines(slices):
    """Fit the baselines on split "train" of a SliceSet; returns plain values for the checkpoint.

    Validation chooses the penalties of the logistic regressions.
    """
    index = slices.index
    chosen = slices.where(index.split != "test")
    index, is_ad, scan = chosen.index, chosen.is_ad, chosen.index.scan.to_numpy()
    train = (index.split == "train").to_numpy()
    val = (index.split == "val").to_numpy()
    scans = index[train].groupby("scan").agg(label=("label", "first"), at=("slice", "min"))
    blur = shrink(slices.images, chosen.rows)
    shares = all_dark_shares(slices.images, chosen.rows)
    return {
        "share_AD": float((scans.label == "AD").mean()),
        "windows": fit_windows(scans).to_dict(),
        "logistic_regression": fit_logistic(blur, is_ad, train, val, scan),
        "dark_share": fit_logistic(shares, is_ad, train, val, scan),
    }


def predict_baselines(fitted, slices):
    """p_AD of each baseline for a SliceSet, a DataFrame with one column per baseline.

    The pixels must have the size of those of the fit. A slice window that does not occur in
    training gets the share of AD among the training scans.
    """
    window = slices.index.groupby("scan").slice.transform("min")
    window_vote = window.map(fitted["windows"]).astype(float).fillna(fitted["share_AD"])
    features = {
        "logistic_regression": shrink(slices.images, slices.rows).astype(float),
        "dark_share": all_dark_shares(slices.images, slices.rows),
    }
    table = pd.DataFrame(index=slices.index.index)
    table["majority_class"] = fitted["share_AD"]
    table["window_vote"] = window_vote.to_numpy()
    for name, x in features.items():
        model = fitted[name]
        table[name] = expit(x @ np.array(model["weights"]) + model["bias"])
    return table.round(7)  # as in predictions.csv

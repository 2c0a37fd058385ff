"""Orientation: does a scan fit the mean training slice better if it is turned or mirrored?"""

import numpy as np
from PIL import Image

from adnc.data.pixels import mean_slice

SIDE = 64  # pixels, to which slices are reduced for the comparison
MARGIN = 0.02  # of correlation: a turn must fit better by this much than upright
MIN_FIT = 0.5  # the correlation of something that shows a head at all

# What was done to an upright slice to get the view; the eight of a square.
VIEWS = {
    "upright": lambda x: x,
    "turned by 90 degrees": lambda x: np.rot90(x, 1),
    "turned by 180 degrees": lambda x: np.rot90(x, 2),
    "turned by 270 degrees": lambda x: np.rot90(x, 3),
    "mirrored left to right": lambda x: x[:, ::-1],
    "mirrored top to bottom": lambda x: x[::-1],
    "transposed": lambda x: x.T,
    "transposed and turned by 180 degrees": lambda x: np.rot90(x, 2).T,
}


def reduce(pixels):
    """A slice (H, W) as float (SIDE, SIDE)."""
    image = Image.fromarray(np.asarray(pixels, np.float32))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), float)


def fits(pixels, training):
    """The correlation of a slice (H, W) with each of VIEWS of the mean training slice (H, W)."""
    scan, upright = reduce(pixels).ravel(), reduce(training)
    if np.ptp(scan) == 0 or np.ptp(upright) == 0:
        return {}
    return {name: np.corrcoef(scan, view(upright).ravel())[0, 1] for name, view in VIEWS.items()}


def find_view(pixels, training):
    """The name of the view of VIEWS that a slice (H, W) fits better than upright by MARGIN, or
    None. An axial brain and its mirror image are too alike to be told apart."""
    correlations = fits(pixels, training)
    if not correlations:
        return None
    best = max(correlations, key=correlations.get)
    if correlations[best] < max(MIN_FIT, correlations["upright"] + MARGIN):
        return None
    return best


def describe_turned(slices, training):
    """Lines on the scans of a SliceSet whose mean slice fits a turned or mirrored mean training
    slice uint8 (H, W) better than the upright one."""
    index = slices.index[slices.index.error.isna()]
    views = {}
    for scan, part in index.groupby("scan", sort=False):
        view = find_view(mean_slice(slices.images, part.row.to_numpy(np.int64)), training)
        if view is not None:
            views.setdefault(view, []).append(scan)
    for view, scans in views.items():
        yield (
            f"{len(scans)} of {index.scan.nunique()} scans, first {scans[0]}, look {view} beside "
            "the training slices; do not rely on their p_AD"
        )

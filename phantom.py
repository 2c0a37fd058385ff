"""Draw a synthetic imitation of the ADNI `AD_NC` set, for whoever has no access to ADNI.

    python phantom.py ADNI                                        60 subjects, 140 scans, 2,800 slices
    python phantom.py ADNI --subjects 680 --seed 1                the size of the real set
    python phantom.py --sheet figures/phantom.png                 a contact sheet only; no set is drawn

writes

    ADNI/meta_data_with_label.json                       scan -> label and paths that name the subject
    ADNI/AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg  256 x 240, 8-bit grey, 20 slices a scan

What is imitated: layout, names and proportions (subjects that stand in train and in test, 1 to 8 scans a
subject, metadata entries without a picture), the near-black share, and the shortcut: the window of 20 slice
indices is tied to the class, and a majority vote on it alone gets 68 % of the scans right.

What is invented: the brain. It is a parametric 3-D shape, cut along sagittal planes. One latent number a
subject, its atrophy, is N(+1.37, 1) for AD and N(-1.37, 1) for NC; it drives the ventricles most, then sulci,
hippocampus and temporal lobe. The best possible accuracy by subject is therefore about 0.915, never 1.
Besides the atrophy only the window depends on the class. A result on the phantom says that the code works; it
says nothing about Alzheimer's disease.
"""

import itertools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset import Parser, run

WIDTH, HEIGHT, SLICES = 256, 240, 20
MIDLINE, SPACING = 90.5, 1.2             # slice index of the midline; mm between slices (a pixel is 1 mm)
EFFECT = 1.37                            # half the distance between the classes, in SD; Phi(1.37) = 0.915
SCAN_IDS = np.arange(10_000, 1_210_000)  # image ids as ADNI has them
STARTS = (67, 70, 74, 77, 81, 84, 88, 91, 95)
AD_WINDOWS = (67, 77, 81, 95)            # windows that lean to AD; the other five lean to NC
LEAN = 0.36                              # by 1 +/- LEAN, so that a vote gets 0.5 + LEAN / 2 = 0.68
CSF, GREY, WHITE = 0.16, 0.60, 1.0       # T1 contrast, relative to white matter

# The real set: subjects in train only, in both, in test only; shares of them with 1, 2, ... scans there.
AD_SHARE = 743 / 1526
GROUPS = {"train": 349, "both": 216, "test": 115}
SCANS = {
    ("train", "train"): (0.52, 0.29, 0.12, 0.05, 0.02), ("test", "test"): (0.64, 0.24, 0.10, 0.02),
    ("both", "train"): (0.38, 0.30, 0.17, 0.10, 0.05), ("both", "test"): (0.76, 0.19, 0.05),
}
NEITHER = (2189 - 1526) / 1526           # metadata entries with label 1 and no picture, for each scan drawn


class Scan(NamedTuple):
    """One scan of the plan. `atrophy` is the subject's latent; `visit` counts the subject's scans from 0."""
    scan: int
    subject: str
    label: str
    split: str
    start: int
    atrophy: float
    visit: int


# ---- who is scanned, and where -----------------------------------------------------------------------------

def _quota(rng, values, weights, n):
    """n values in shuffled order, each as often as its weight says, to within one."""
    at = (np.arange(n) + rng.random()) / max(n, 1)
    picked = np.searchsorted(np.cumsum(weights) / np.sum(weights), at, side="right")
    return [values[i] for i in rng.permutation(np.minimum(picked, len(values) - 1))]


def plan(subjects=60, seed=0):
    """The scans of a set, as a list of Scan: who has which class, stands where, and how far the disease went.

    Everything is drawn by quota, so that 60 subjects have the same proportions as 680. Raises ValueError
    where there are too few subjects to fill train and test with both classes.
    """
    if not 10 <= subjects <= 5000:
        raise ValueError(f"--subjects is {subjects}; expected 10 to 5000, to fill train and test")
    if seed < 0:
        raise ValueError(f"--seed is {seed}; expected 0 or more")
    rng = np.random.default_rng([seed, 0])
    numbers = rng.choice(7999, subjects, replace=False) + 1
    names = [f"{rng.integers(2, 142):03d}_S_{number:04d}" for number in numbers]
    groups = _quota(rng, list(GROUPS), list(GROUPS.values()), subjects)
    scans = []
    for group in GROUPS:
        everyone = [name for name, g in zip(names, groups) if g == group]
        offset, ill = rng.random(), round(AD_SHARE * len(everyone))
        for label, sign, members in (("NC", -1, everyone[ill:]), ("AD", 1, everyone[:ill])):
            # quantiles, evenly spread; the classes half a step apart, so as not to overlap by turns
            steps = (rng.permutation(len(members)) + (offset + 0.25 * sign) % 1) / max(len(members), 1)
            counts = {split: _quota(rng, range(1, len(weights) + 1), weights, len(members))
                      for (g, split), weights in SCANS.items() if g == group}
            for k, subject in enumerate(members):
                atrophy = sign * (EFFECT - NormalDist().inv_cdf(np.clip(steps[k], 0.002, 0.998)))
                splits = rng.permutation([split for split in counts for _ in range(counts[split][k])])
                scans += [Scan(0, subject, label, str(split), 0, float(atrophy), visit)
                          for visit, split in enumerate(splits)]
    return _with_ids_and_windows(rng, scans)


def _with_ids_and_windows(rng, scans):
    ids = rng.choice(SCAN_IDS, len(scans), replace=False)
    done = [scan._replace(scan=int(i)) for scan, i in zip(scans, ids)]
    for split in ("train", "test"):
        for label, sign in (("AD", 1), ("NC", -1)):
            here = [k for k, scan in enumerate(done) if (scan.split, scan.label) == (split, label)]
            # the four windows that lean to AD hold half of all scans, the other five the other half
            weights = [(1 + sign * LEAN) / 8 if s in AD_WINDOWS else (1 - sign * LEAN) / 10 for s in STARTS]
            for k, start in zip(here, _quota(rng, STARTS, weights, len(here))):
                done[k] = done[k]._replace(start=start)
    return sorted(done)


def metadata(scans, seed=0):
    """What meta_data_with_label.json holds: {scan: {"label": 0 | 1 | 2, "raw": path, "brain": path}}.

    Label 0 is NC, 2 AD; 1 is neither, and such scans have no picture, as in the real set.
    """
    rng = np.random.default_rng([seed, 1])
    rows = [(s.scan, s.subject, {"NC": 0, "AD": 2}[s.label]) for s in scans]
    taken = [s.scan for s in scans]
    free = rng.choice(np.setdiff1d(SCAN_IDS, taken), round(NEITHER * len(scans)), replace=False)
    subject = [f"{rng.integers(2, 142):03d}_S_{8000 + n:04d}" for n in rng.permutation(1999)]
    rows += [(int(i), subject[k * 680 // 1526 % 1999], 1) for k, i in enumerate(free)]
    entries = {}
    for scan, name, label in sorted(rows):
        day = f"20{rng.integers(5, 15):02d}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
        stem = f"ADNI_{name}_MR_MP-RAGE_{day}{rng.integers(10**9):09d}_1_S{rng.integers(10**5)}_I{scan}"
        folder = f"ADNI/{name}/MP-RAGE/{day[:4]}-{day[4:6]}-{day[6:]}/I{scan}"
        entries[str(scan)] = {"label": label, "raw": f"{folder}/{stem}.nii",
                              "brain": f"{folder}/{stem}_brain.nii.gz"}
    return entries


# ---- shapes: signed distances in mm, negative inside; p = (x, y, z), y forward, z up -----------------------

def _ellipsoid(p, centre, radii):
    d = [(a - c) / r for a, c, r in zip(p, centre, radii)]
    q = np.sqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2) + 1e-6
    slope = np.sqrt(sum((a / r) ** 2 for a, r in zip(d, radii))) + 1e-6
    return q * (q - 1) / slope


def _tube(p, *knots):
    """Round tube along knots (x, y, z, radius)."""
    best = None
    for a, b in itertools.pairwise(knots):
        along = [v - u for u, v in zip(a[:3], b[:3])]
        d = [v - u for u, v in zip(a[:3], p)]
        t = np.clip(sum(u * v for u, v in zip(d, along)) / sum(u * u for u in along), 0, 1)
        far = np.sqrt(sum((u - t * v) ** 2 for u, v in zip(d, along))) - (a[3] + t * (b[3] - a[3]))
        best = far if best is None else np.minimum(best, far)
    return best


def _join(a, b, k):
    """Union with a rounded seam of k mm."""
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def _cover(distance, soft=1.5):
    """Share of a pixel inside a shape: 1 deep inside, 0 outside, a ramp of `soft` mm between."""
    return np.clip(0.5 - distance / soft, 0, 1)


def _paint(image, distance, value, soft=1.5):
    image += (value - image) * _cover(distance, soft)


# ---- one subject -------------------------------------------------------------------------------------------

class Anatomy:
    """The shape of one subject's brain, a function of the seed, the subject's name and the atrophy alone."""
    GRID, PITCH, WAVE = 64, 3.0, 22.0    # folding: cells, mm a cell, mm for two sulci

    def __init__(self, seed, subject, atrophy):
        rng = np.random.default_rng([seed, 2, int(subject[:3]), int(subject[6:])])
        own = rng.standard_normal(4)     # each effect of atrophy has a spread of its own
        # plain floats: a NumPy float64 would turn every float32 array that it meets into float64
        # steep where the classes meet, with a limit to what fits into a head
        self.ventricle = float(np.exp(0.05 + 0.9 * np.tanh(0.45 * atrophy) + 0.11 * own[0]))
        self.sulcus = float(np.exp(0.20 * atrophy + 0.10 * own[1]))
        self.hippocampus = float(np.exp(-0.09 * atrophy + 0.05 * own[2]))
        self.temporal = float(np.exp(-0.025 * atrophy + 0.02 * own[3]))
        self.size = (1 + 0.025 * rng.standard_normal(3)).tolist()
        self.bumps = rng.uniform(-2.5, 2.5, 10).tolist()
        self.phase = rng.uniform(0, 2 * np.pi, 12).tolist()
        self.folds = self._folding(rng)

    def _folding(self, rng):
        """Signed distance (mm) to the sulci, the zero crossings of periodic band-pass noise."""
        k = np.fft.fftfreq(self.GRID, self.PITCH)
        radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k[:self.GRID // 2 + 1] ** 2)
        band = np.exp(-0.5 * ((radius * self.WAVE - 1) / 0.16) ** 2)
        noise = np.fft.irfftn(np.fft.rfftn(rng.standard_normal((self.GRID,) * 3)) * band)
        wave = 2 * np.pi / self.WAVE
        slope = sum(((np.roll(noise, -1, i) - np.roll(noise, 1, i)) / self.PITCH / 2) ** 2 for i in range(3))
        return (noise / np.sqrt(slope + (wave * noise) ** 2)).astype(np.float32).ravel()

    def sheet_distance(self, p):
        """The folding field at p (mm), by linear interpolation."""
        n, index, share = self.GRID, [], []
        for a in p:
            cell = a / self.PITCH + 4 * n
            low = cell.astype(np.int32)
            share.append(cell - low)
            index.append((low % n, (low + 1) % n))
        total = 0
        for i in (0, 1):
            for j in (0, 1):
                line = (index[0][i] * n + index[1][j]) * n
                low, high = self.folds[line + index[2][0]], self.folds[line + index[2][1]]
                total = total + (low + (high - low) * share[2]) * (share[0] if i else 1 - share[0]) * (
                    share[1] if j else 1 - share[1])
        return np.abs(total)

    def cerebrum(self, p):
        b = self.bumps
        main = _ellipsoid(p, (0, b[0], 21), (66, 84, 49 + b[1]))
        front = _ellipsoid(p, (0, 43 + b[2], 12), (52, 39, 32 + b[3]))
        back = _ellipsoid(p, (0, -51 + b[4], 8), (56, 36, 28 + b[5]))
        t = self.temporal
        lobe = _ellipsoid(p, (43, 12 + b[6], -21), (25 * t, 44 * t, 19 * t))
        return _join(_join(_join(main, front, 8), back, 8), lobe, 4)

    def section(self, x, y, z):
        """Brightness (white matter 1) and brain share at x, y, z (mm; three flat float32 arrays)."""
        left = x < 0
        p = [np.abs(x) / self.size[0], y / self.size[1], z / self.size[2]]
        hull = self.cerebrum(p)
        image = np.full_like(y, WHITE)
        sheet = self._cortex(image, p, left, hull)
        lower = np.full_like(y, 99)
        # each part is drawn only where it can be: half the time
        deep = np.flatnonzero((p[1] > -72) & (p[1] < 48) & (p[2] > -34) & (p[2] < 42) & (hull < 2))
        image[deep] = self._deep(image[deep], [a[deep] for a in p])
        hind = np.flatnonzero((p[1] < 22) & (p[2] < 12))
        image[hind], lower[hind] = self._hindbrain(image[hind], [a[hind] for a in p], hull[hind])
        image *= 1 + 0.025 * np.sin(p[1] / 9 + self.phase[0]) * np.sin(p[2] / 8 + self.phase[1])
        notch = (0.6 + 1.0 * self.sulcus) * np.clip(1 - sheet / 4, 0, 1)     # gyri bulge between the sulci
        return image, _cover(np.minimum(hull + notch, lower), 2.0)

    def _cortex(self, image, p, left, hull):
        """Grey ribbon under the surface and along the sulci; returns the distance to these."""
        x, y, z = p
        w = self.phase
        # looked up along rays from the centre, so that the sheets stand upright on the surface
        q = np.sqrt((x / 66) ** 2 + (y / 83) ** 2 + ((z - 14) / 50) ** 2)
        pull = 0.35 + 0.65 / np.maximum(q, 0.45)
        bend = 4 * np.sin(y / 11 + w[2]) + 4 * np.sin(z / 9 + w[3])
        side = np.where(left, -1, 1).astype(np.float32)
        sheet = self.sheet_distance((side * (x * pull + 7) + bend, y * pull + 5 * np.sin(z / 8 + w[4]),
                                     (z - 14) * pull + 5 * np.sin(y / 9 + w[5])))
        depth = np.minimum(-hull, x + 1.0)                         # the medial wall is a surface, too
        reach = 15 + 5 * np.sin(y / 17 + w[6]) * np.sin(z / 14 + w[7]) + 0.4 * np.minimum(x, 30)
        over = np.maximum(depth - reach, 0)
        arch = _ellipsoid(p, (0, 0, 4), (400, 46, 34))           # cingulate sulcus, over the corpus callosum
        cingulate = np.sqrt((arch - 2 * np.sin(y / 11 + w[8])) ** 2 + np.maximum(x - 9, 0) ** 2)
        cingulate += np.maximum(-8 - z, 0) + np.maximum(1.5 * np.sin(y / 7 + w[4]), 0)   # with gaps
        sulcus = np.minimum(np.sqrt(sheet ** 2 + over ** 2), cingulate)
        half = self.sulcus * (0.7 - 0.25 * np.clip(depth / 15, 0, 1) + 0.9 * np.clip(1 + hull / 5, 0, 1))
        _paint(image, np.minimum(depth, sulcus - half) - 2.3, GREY, 1.5)
        _paint(image, sulcus - half, CSF, 1.6)
        _paint(image, _tube(p, (31, 28, -9, 1.8 * self.sulcus), (34, 2, -3, 1.6 * self.sulcus),
                            (37, -24, 6, 1.2 * self.sulcus)), CSF)  # Sylvian fissure
        return sheet

    def _deep(self, image, p):
        """Deep grey nuclei, ventricles, corpus callosum, hippocampus, in painting order; returns image."""
        x, y, z = p
        v, h = self.ventricle, self.hippocampus
        lift = 2.5 * (v - 1)
        _paint(image, _ellipsoid(p, (17, -2, 4), (15, 34, 19)), WHITE, 4)        # capsule around the nuclei
        _paint(image, _ellipsoid(p, (0, -1, 8), (9, 31, 17)), 0.74, 3)           # septum
        _paint(image, _ellipsoid(p, (10, -9, 5), (9.5, 15, 9)), 0.72, 3)         # thalamus
        _paint(image, _ellipsoid(p, (25, 6, 1), (6, 17, 10)), 0.64, 2.5)         # putamen
        _paint(image, _ellipsoid(p, (18.5, 2, 0), (4, 10, 6)), 0.82, 2.5)        # pallidum
        _paint(image, _ellipsoid(p, (13, 21, 7), (5.5, 10, 8)), 0.64, 2)         # caudate head
        _paint(image, _ellipsoid(p, (5, 4, -7), (8, 12, 5)), 0.66, 3)            # hypothalamus
        _paint(image, _ellipsoid(p, (23, 12, -20), (9, 9, 8)), 0.62, 3)          # amygdala
        _paint(image, _ellipsoid(p, (0, -1, 0), (1.4 * v, 12, 7)), CSF)          # third ventricle
        _paint(image, _ellipsoid(p, (0, -6, 3), (4, 5.5, 4.5)), 0.68)            # massa intermedia
        body = _tube(p, (11, 35, 5, 2.6 * v), (9, 25, 12, 4.4 * v), (8, 6, 17 + lift / 2, 4.0 * v),
                     (11, -14, 16 + lift / 2, 4.0 * v), (17, -28, 11, 5.0 * v), (23, -38, 4, 5.4 * v),
                     (25, -60, 1, 1.6 * v))
        horn = _tube(p, (23, -36, 2, 4.5 * v), (28, -24, -8, 2.3 * v), (29, -8, -14, 2.0 * v),
                     (30, 6, -17, 1.5 * v))
        _paint(image, _join(body, horn, 3), CSF)
        tail = [(25, 3, -20, 6.0), (27, -10, -18.5, 5.2), (25, -24, -11, 4.2), (20, -34, -1, 3.0)]
        # CSF fills the room that a shrinking hippocampus leaves
        _paint(image, _tube(p, *[(a, b, c, r * 1.12) for a, b, c, r in tail]), CSF)
        _paint(image, _tube(p, *[(a, b, c - r * (1 - h), r * h) for a, b, c, r in tail]), GREY)
        callosum = _tube((0, y, z - lift), (0, 19, -1, 1.2), (0, 29, 1, 2.8), (0, 33, 8, 4.4),
                         (0, 28, 17, 3.2), (0, 14, 24, 2.7), (0, -4, 26, 2.5), (0, -20, 22, 2.6),
                         (0, -30, 15, 3.4), (0, -34, 8, 4.8))
        _paint(image, np.maximum(callosum + 0.5 * (self.sulcus - 1), x - 14), 1.04)
        fornix = _tube(p, (2, -25, 14, 1.6), (2, -8, 17, 1.7), (2, 8, 13, 1.7), (2, 12, 3, 1.3))
        _paint(image, np.maximum(fornix, x - 4), 0.95)
        return image

    def _hindbrain(self, image, p, hull):
        """Paint cerebellum and brainstem below the cerebrum; returns image and their distance."""
        x, y, z = p
        w = self.phase
        b = self.bumps
        centre, radii = (0, -46 + b[7], -39 + b[8]), (52, 33, 25)
        bell = _ellipsoid(p, centre, radii)
        dy, dz = y - centre[1] - 12, z - centre[2]
        angle = np.arctan2(dz, dy)                               # from where the lobules fan out
        out = np.sqrt(dy ** 2 + dz ** 2)
        twist = 0.25 * np.sin(out / 6 + w[9]) + 0.15 * np.sin(x / 5 + w[10])
        branch = np.abs(np.sin(4.5 * (angle + twist) + w[11])) * out / 4.5 - np.clip(2.2 - out / 30, 0.8, 2.2)
        folia = np.clip(np.cos(30 * (angle + 0.6 * twist) + x / 3), 0, 1) * (bell > -14)
        folia *= np.clip(out / 20, 0, 1)
        bell += 0.7 * folia
        tissue = GREY + 0.02 - 0.20 * folia
        core = _ellipsoid(p, (14, centre[1] + 8, centre[2] + 1), (16, 13, 8))
        _paint(tissue, np.minimum(core, np.maximum(branch, 5 + bell)), 0.94, 2.5)
        stem = _tube(p, (4, -12, -2, 9), (0, -12, -13, 8.5), (0, -5, -27, 13.5), (0, -13, -44, 7.5),
                     (0, -20, -58, 6.5), (0, -25, -72, 5.5))
        peduncle = _tube(p, (8, -14, -30, 7), (17, -32, -34, 6))
        stem = _join(stem, peduncle, 4)
        image[hull > 0] = CSF
        _paint(image, np.maximum(bell, 1.5 - hull), tissue)      # a dark cleft under the cerebrum stays
        _paint(image, np.where(hull > -6, stem, np.maximum(stem, z + 4)), 0.90, 2)
        _paint(image, _ellipsoid(p, (0, -24, -34), (7, 4, 9)), CSF)              # fourth ventricle
        _paint(image, _tube(p, (0, -19, -8, 1.3), (0, -22, -26, 1.5)), CSF)      # aqueduct
        return image, np.minimum(bell, stem)


# ---- one scan ----------------------------------------------------------------------------------------------

def render(scan, seed=0, slices=None):
    """Draw a scan: uint8 array (slices, 240, 256), by default the 20 of its window.

    Pose, brightness, contrast, bias and noise depend on seed, subject and visit only, never on the class.
    """
    slices = np.arange(scan.start, scan.start + SLICES) if slices is None else np.asarray(slices)
    key = [seed, 3, int(scan.subject[:3]), int(scan.subject[6:])]
    head = np.random.default_rng(key).standard_normal(8)
    rng = np.random.default_rng(key + [scan.visit])
    pose = (0.8 * head + 0.35 * rng.standard_normal(8)).tolist()
    # from scan to scan the disease goes on a little, in both classes alike
    atrophy = scan.atrophy + 0.06 * scan.visit + 0.06 * rng.standard_normal()
    anatomy = Anatomy(seed, scan.subject, atrophy)
    turn, scale = np.deg2rad(3.0 * pose[0]), 1 + 0.025 * head[1] + 0.004 * pose[1]
    column, row = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    right, down = (column - 128 - 2.5 * pose[2]) / scale, (row - 123 - 2.5 * pose[3]) / scale
    y = (-np.cos(turn) * right - np.sin(turn) * down).astype(np.float32)   # the face looks to the left
    z = (np.sin(turn) * right - np.cos(turn) * down).astype(np.float32)
    near = np.flatnonzero((y / 101) ** 2 + ((z + 2) / 89) ** 2 < 1)      # no brain outside this ellipse
    y, z = y.ravel()[near], z.ravel()[near]
    white, gamma = float(178 * np.exp(0.09 * pose[4])), 1 + 0.08 * pose[5]
    bias = 1 + 0.05 * pose[6] * y / 80 + 0.05 * pose[7] * z / 60
    noise = white * float(rng.uniform(0.022, 0.04))
    drawn = np.zeros((len(slices), HEIGHT * WIDTH), np.uint8)
    for picture, index in zip(drawn, slices):
        x = np.full_like(y, (index - MIDLINE + 0.5 * pose[1]) * SPACING / scale)
        image, share = anatomy.section(x, y, z)
        image = white * bias * np.clip(image, 0, None) ** gamma
        real, imaginary = noise * rng.standard_normal((2, len(near)), np.float32)
        # Rician, as a magnitude image; the stripped skull leaves true black
        picture[near] = np.clip(share * np.hypot(image + real, imaginary), 0, 255)
    return drawn.reshape(-1, HEIGHT, WIDTH)


def _write(scan, seed, root):
    for index, pixels in enumerate(render(scan, seed), scan.start):
        Image.fromarray(pixels).save(root / scan.split / scan.label / f"{scan.scan}_{index}.jpeg", quality=92)


def draw(out, subjects=60, seed=0, workers=None, progress=True):
    """Draw a set under the folder `out`; returns the path of out/AD_NC.

    The bytes depend on subjects and seed only, not on workers (threads; by default one a core). Raises
    ValueError where out already holds a set or an argument is out of range. An interrupted run leaves no half
    set.
    """
    from tqdm import tqdm
    out = Path(out)
    for name in ("AD_NC", "meta_data_with_label.json"):
        if (out / name).exists():
            raise ValueError(f"{out / name} exists; expected a folder without a set: name another or move it")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers is {workers}; expected 1 or more")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder, or a name that is free")
    scans = plan(subjects, seed)
    out.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".phantom-", dir=out))
    try:
        for folder in ("train/AD", "train/NC", "test/AD", "test/NC"):
            (draft / "AD_NC" / folder).mkdir(parents=True)
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            jobs = pool.map(lambda scan: _write(scan, seed, draft / "AD_NC"), scans)
            for _ in tqdm(jobs, "phantom", len(scans), unit=" scans", disable=None if progress else True):
                pass
        (draft / "meta.json").write_text(json.dumps(metadata(scans, seed), indent=1))
        os.replace(draft / "meta.json", out / "meta_data_with_label.json")
        os.replace(draft / "AD_NC", out / "AD_NC")   # last: a folder of that name is always complete
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out / "AD_NC"


def contact_sheet(file, subjects=60, seed=0, slices=(68, 74, 80, 86, 91, 98, 105, 112)):
    """Save a picture of two NC and two AD subjects (quartiles of atrophy in their class) by slice index."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.6 * len(slices), 6.6), layout="constrained")
    axes = figure.subplots(4, len(slices))
    first = [scan for scan in plan(subjects, seed) if scan.visit == 0]
    for row, (label, share) in enumerate([("NC", 0.25), ("NC", 0.75), ("AD", 0.25), ("AD", 0.75)]):
        ranked = sorted((s for s in first if s.label == label), key=lambda s: s.atrophy)
        scan = ranked[int(share * len(ranked))]
        for axis, pixels, index in zip(axes[row], render(scan, seed, slices), slices):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"slice {index}" if row == 0 else "", fontsize=9)
        axes[row, 0].set_ylabel(f"{label}, atrophy {scan.atrophy:+.1f}", fontsize=9)
    figure.suptitle("phantom.py: synthetic sagittal slices, not patients")
    figure.savefig(file, dpi=110)
    return Path(file)


def main(args):
    if not (args.out or args.sheet):
        raise ValueError("nothing to do: expected OUT, a folder to draw into, or --sheet FILE")
    if args.out:
        print(f"drew {draw(args.out, args.subjects, args.seed, args.workers)}")
    if args.sheet:
        print(f"drew {contact_sheet(args.sheet, args.subjects, args.seed)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("out", nargs="?", help="folder to write AD_NC and meta_data_with_label.json into")
    parser.add_argument("--subjects", type=int, default=60, help="10 to 5000; the real set has 680 (60)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another set (0)")
    parser.add_argument("--workers", type=int, help="threads; no influence on the result (one a core)")
    parser.add_argument("--sheet", metavar="FILE", help="save a contact sheet, too; without OUT, that alone")
    run(main, parser.parse_args())

"""Draw a synthetic imitation of the ADNI `AD_NC` set, slices or volumes.

What is imitated: layout, names and proportions (subjects in both train and test, 1 to 8 scans a
subject, metadata entries without a picture), the near-black share, and the shortcut: the window of
20 slice indices is tied to the class, and a majority vote on it alone gets 68 % of the scans right.

What is invented: the brain. It is a parametric 3-D shape, cut along sagittal planes. One latent
number a subject, its atrophy, is N(+1.37, 1) for AD and N(-1.37, 1) for NC; it drives the
ventricles most, then sulci, hippocampus and temporal lobe. The best possible subject-level accuracy
is therefore about 0.915, never 1. Besides the atrophy only the window depends on the class. A
result on the phantom shows that the code works; it says nothing about Alzheimer's disease.

With the local cue the atrophy acts on the temporal horn and the hippocampus alone. Ventricles and
sulci follow an ageing that is independent of the class, and scanners (contrast, texture, noise),
tilt and position differ as much as in real sets. Each subject has one scan of the same six slices,
so there is no window to vote on; a fifth of the subjects is in test. The best possible accuracy is
again about 0.915; a logistic regression on blurred slices of 200 subjects stays below an AUROC of
0.7.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from adnc.errors import InputError
from adnc.files import write_atomically, write_csv, write_json, write_text
from adnc.phantom.anatomy import Scan, render, render_head
from adnc.phantom.varied import SIDE, render_varied
from adnc.volumes.look import Look
from adnc.volumes.read import import_nibabel

EFFECT = 1.37  # half the distance between the classes, in SD; Phi(1.37) = 0.915
SCAN_IDS = np.arange(10_000, 1_210_000)  # image ids as ADNI has them
STARTS = (67, 70, 74, 77, 81, 84, 88, 91, 95)
AD_WINDOWS = (67, 77, 81, 95)  # windows that lean to AD; the other five lean to NC
LEAN = 0.36  # by 1 +/- LEAN, so that a vote gets 0.5 + LEAN / 2 = 0.68

# Proportions of the real set: subjects in train only, in both, in test only.
AD_SHARE = 743 / 1526
GROUPS = {"train": 349, "both": 216, "test": 115}
# (group of a subject, split) -> shares of these subjects with 1, 2, ... scans in that split
SCANS = {
    ("train", "train"): (0.52, 0.29, 0.12, 0.05, 0.02),
    ("test", "test"): (0.64, 0.24, 0.10, 0.02),
    ("both", "train"): (0.38, 0.30, 0.17, 0.10, 0.05),
    ("both", "test"): (0.76, 0.19, 0.05),
}
NEITHER = (2189 - 1526) / 1526  # metadata entries with label 1 and no picture, per scan
AGEING = 1.7  # SD of the second latent: that of atrophy over both classes
# Orientations of the volumes, in turn. Scanners store sagittal heads as PSR.
STORED = ("RAS", "LAS", "PSR", "LPI")


# ---------------------------------------------------------------- subjects and scans


def quota(rng, values, weights, n):
    """n values in shuffled order, each as often as its weight says, to within one."""
    at = (np.arange(n) + rng.random()) / max(n, 1)
    picked = np.searchsorted(np.cumsum(weights) / np.sum(weights), at, side="right")
    return [values[i] for i in rng.permutation(np.minimum(picked, len(values) - 1))]


def subject_names(rng, n):
    numbers = rng.choice(7999, n, replace=False) + 1
    return [f"{rng.integers(2, 142):03d}_S_{number:04d}" for number in numbers]


def plan(subjects=60, seed=0):
    """The scans of a set, as a list of Scan with the class, split and atrophy of each.

    Everything is drawn by quota, so that 60 subjects have the same proportions as 680. InputError
    for fewer than 10 subjects.
    """
    if subjects < 10:
        raise InputError(
            f"{subjects} subjects are too few; expected 10 or more, to fill train and test"
        )
    rng = np.random.default_rng([seed, 0])
    names = subject_names(rng, subjects)
    groups = quota(rng, list(GROUPS), list(GROUPS.values()), subjects)

    scans = []
    for group in GROUPS:
        members = [name for name, g in zip(names, groups) if g == group]
        offset = rng.random()
        n_ad = round(AD_SHARE * len(members))
        scans += plan_class(rng, group, members[n_ad:], "NC", (offset - 0.25) % 1)
        scans += plan_class(rng, group, members[:n_ad], "AD", (offset + 0.25) % 1)
    ids = rng.choice(SCAN_IDS, len(scans), replace=False)
    scans = [scan._replace(scan=int(i)) for scan, i in zip(scans, ids)]
    return sorted(assign_windows(rng, scans))


def plan_class(rng, group, members, label, offset):
    """The scans, not yet numbered, of the members of a group that have one class.

    Their atrophies are evenly spread quantiles of the class. `offset` of the two classes differs by
    half a step, so that they do not pair up.
    """
    sign = 1 if label == "AD" else -1
    steps = (rng.permutation(len(members)) + offset) / max(len(members), 1)
    counts = {}  # split -> number of scans of each member
    for (g, split), weights in SCANS.items():
        if g == group:
            counts[split] = quota(rng, range(1, len(weights) + 1), weights, len(members))

    scans = []
    for k, subject in enumerate(members):
        atrophy = sign * (EFFECT - NormalDist().inv_cdf(np.clip(steps[k], 0.002, 0.998)))
        splits = np.repeat(list(counts), [count[k] for count in counts.values()])
        for visit, split in enumerate(rng.permutation(splits)):
            scans.append(Scan(0, subject, label, str(split), 0, float(atrophy), visit))
    return scans


def assign_windows(rng, scans):
    """The same scans with a slice window each, tied to the class.

    The four windows that lean to AD hold half of all scans, the other five the other half.
    """
    scans = list(scans)
    for split in ("train", "test"):
        for label, sign in (("AD", 1), ("NC", -1)):
            weights = []
            for start in STARTS:
                if start in AD_WINDOWS:
                    weights.append((1 + sign * LEAN) / 8)
                else:
                    weights.append((1 - sign * LEAN) / 10)
            here = [k for k, scan in enumerate(scans) if (scan.split, scan.label) == (split, label)]
            for k, start in zip(here, quota(rng, STARTS, weights, len(here))):
                scans[k] = scans[k]._replace(start=start)
    return scans


def plan_local(subjects=60, seed=0):
    """The scans of a set with the local cue, as a list of Scan: one per subject.

    A fifth of the subjects is in test. In both splits half are AD, and the atrophies of a class are
    evenly spread quantiles.
    """
    rng = np.random.default_rng([seed, 4])
    n_test = max(2, round(subjects / 5))
    names = subject_names(rng, subjects)
    ids = rng.choice(SCAN_IDS, subjects, replace=False)

    scans = []
    for split, members in (("test", names[:n_test]), ("train", names[n_test:])):
        for i, subject in enumerate(members):
            if i % 2:
                label, sign, n_class = "AD", 1, len(members) // 2
            else:
                label, sign, n_class = "NC", -1, (len(members) + 1) // 2
            quantile = NormalDist().inv_cdf((i // 2 + 0.5) / n_class)
            atrophy = float(sign * EFFECT + quantile)
            ageing = float(AGEING * rng.standard_normal())
            scan = int(ids[len(scans)])
            scans.append(Scan(scan, subject, label, split, 0, atrophy, 0, ageing))
    return sorted(scans)


def metadata(scans, seed=0):
    """The content of meta_data_with_label.json: scan -> {"label": int, "raw": path, "brain": path}.

    Label 0 is NC, 2 is AD; 1 is neither, and such scans have no picture, as in the real set.
    """
    rng = np.random.default_rng([seed, 1])
    rows = [(scan.scan, scan.subject, {"NC": 0, "AD": 2}[scan.label]) for scan in scans]
    used = [scan.scan for scan in scans]
    free = rng.choice(np.setdiff1d(SCAN_IDS, used), round(NEITHER * len(scans)), replace=False)
    others = [f"{rng.integers(2, 142):03d}_S_{8000 + n:04d}" for n in rng.permutation(1999)]
    for k, i in enumerate(free):
        subject = others[k * 680 // 1526 % len(others)]  # 1,526 scans of 680 subjects, as in AD_NC
        rows.append((int(i), subject, 1))

    entries = {}
    for scan, name, label in sorted(rows):
        day = f"20{rng.integers(5, 15):02d}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
        time, series = rng.integers(10**9), rng.integers(10**5)
        stem = f"ADNI_{name}_MR_MP-RAGE_{day}{time:09d}_1_S{series}_I{scan}"
        folder = f"ADNI/{name}/MP-RAGE/{day[:4]}-{day[4:6]}-{day[6:]}/I{scan}"
        entries[str(scan)] = {
            "label": label,
            "raw": f"{folder}/{stem}.nii",
            "brain": f"{folder}/{stem}_brain.nii.gz",
        }
    return entries


DRAWN = "drawn-"


def drawn_names(scans):
    """Names of the subjects that are no ids of ADNI: weights that were trained on drawings must not
    be said to know a person."""
    return [f"{DRAWN}{scan.subject[6:]}" for scan in scans]


# ---------------------------------------------------------------- files


def new_folders(out, *names):
    """Make the folders `names` in the folder `out`. InputError if one of them exists."""
    for name in names:
        if (out / name).exists():
            raise InputError(
                f"{out / name} exists, and nothing is overwritten; choose another folder"
            )
    for name in names:
        (out / name).mkdir(parents=True)


CUES = ("global", "local", "varied")
LATENTS_FILE, SLICES_FILE = "latents.csv", "slices.csv"  # beside AD_NC, with the cue "varied"
DEGREE = 4  # of the polynomial that gives the usual fluid by place
# How predict.py cuts a volume for a model that was trained on this set, which shows all planes: the
# 75 mm of the brain that the axial drawings show, and their field of view.
VARIED_LOOK = Look("axial", count=25, size=(SIDE, SIDE), spacing=1.8, step=3.0)


def is_varied_set(root, index):
    """Whether `root`, with its index, is the AD_NC of a set drawn with the cue "varied"."""
    beside = [Path(root).parent / name for name in (LATENTS_FILE, SLICES_FILE)]
    if not all(path.is_file() for path in beside):
        return False
    return bool(index.subject.str.startswith(DRAWN, na=False).all())


def label_slices(slices, latents):
    """The probability of AD given the fluid that each slice shows, float64 (N,).

    `slices` and `latents` are the tables SLICES_FILE and LATENTS_FILE. The logarithm of the share
    of fluid is compared with what is usual at the place where the slice is cut (a polynomial for
    each plane) and given in SD: the fluid of a slice. The probability is that of a subject all of
    whose slices show that fluid, by a logistic regression of the class on the subject's mean,
    fitted on train/.

    The class itself, or the latent atrophy, would teach that a wide ventricle speaks against AD
    where the horn is seen, since age explains both. That is true of the drawings, and did not carry
    over to real brains (docs/transfer.md).
    """
    table = slices.merge(latents[["scan", "label", "split"]], on="scan")
    fluid = np.log(table.fluid + 0.01)
    for rows in table.groupby("plane").groups.values():
        train = rows[table.split[rows] == "train"]
        usual = np.polynomial.Polynomial.fit(table.place[train], fluid[train], DEGREE)
        fluid[rows] -= usual(table.place[rows].to_numpy())
    fluid /= fluid[table.split == "train"].std()

    subjects = table.assign(fluid=fluid).groupby("scan")
    subjects = subjects.agg(
        fluid=("fluid", "mean"), label=("label", "first"), split=("split", "first")
    )
    subjects = subjects[subjects.split == "train"]
    fit = LogisticRegression(C=1e3).fit(subjects[["fluid"]], subjects.label == "AD")
    return fit.predict_proba(fluid.to_frame("fluid"))[:, 1]


def read_soft_labels(index, root):
    """The probability of AD of each slice of an index of a drawn set, float64 (N,): that of
    `label_slices`. InputError if there is none for a slice."""
    file = Path(root).parent / SLICES_FILE
    if not file.is_file():
        raise InputError(
            f"there is no {file}; soft labels are those of a set of tools.phantom --cue varied"
        )
    table = pd.read_csv(file, dtype={"scan": str})
    columns = ["scan", "slice", "p_AD"]
    if not set(columns) <= set(table) or table.duplicated(columns[:2]).any():
        raise InputError(
            f"{file} is not what tools.phantom writes; expected a row with {', '.join(columns)} "
            "for each slice; draw the set again"
        )
    table = table[columns]
    p = index[["scan", "slice"]].merge(table, on=["scan", "slice"], how="left").p_AD
    if p.isna().any():
        first = index.iloc[int(p.isna().argmax())]
        raise InputError(
            f"{file} has no row for slice {first.slice} of scan {first.scan}; draw the set again"
        )
    return p.to_numpy(float)


def draw(out, subjects=60, seed=0, *, workers=None, progress=True, cue="global", without=()):
    """Draw a set under the folder `out`; returns the path of out/AD_NC.

    The bytes depend on subjects, seed and cue (one of CUES) alone; with the cue "varied" also on
    the variations of `adnc.phantom.varied` that it goes `without`. `workers` is the number of
    threads. InputError if `out` holds a set.
    """
    if without and cue != "varied":
        raise InputError(f"the cue {cue} has no variations; leave out {', '.join(without)}")
    scans = plan(subjects, seed) if cue == "global" else plan_local(subjects, seed)
    out = Path(out)
    new_folders(out, "AD_NC")
    for folder in ("train/AD", "train/NC", "test/AD", "test/NC"):
        (out / "AD_NC" / folder).mkdir(parents=True)

    def write(scan):
        if cue == "varied":
            slices, qualities, sizes, shown = render_varied(scan, seed, without)
            names = range(1, len(slices) + 1)
        else:
            slices, names = render(scan, seed), scan.indices
            qualities, sizes, shown = [92 for _ in names], {}, []
        for pixels, name, quality in zip(slices, names, qualities):
            file = out / "AD_NC" / scan.split / scan.label / f"{scan.scan}_{name}.jpeg"
            Image.fromarray(pixels).save(file, quality=quality)
        return sizes, [{"scan": scan.scan, "slice": n, **row} for n, row in zip(names, shown)]

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        done = pool.map(write, scans)
        bar = tqdm(done, "phantom", len(scans), unit=" scans", disable=None if progress else True)
        sizes, shown = zip(*bar)
    if cue == "varied":
        table = pd.DataFrame(scans)[["scan", "subject", "label", "split", "atrophy", "ageing"]]
        table.subject = drawn_names(scans)
        table = pd.concat([table, pd.DataFrame(sizes)], axis=1).round(4)
        write_csv(out / LATENTS_FILE, table)
        slices = pd.DataFrame([row for rows in shown for row in rows]).round(4)
        slices["p_AD"] = label_slices(slices, table).round(4)
        write_csv(out / SLICES_FILE, slices)
        write_csv(out / "subjects.csv", table[["scan", "subject"]])
        write_json(out / "extraction.json", asdict(VARIED_LOOK))
    else:
        write_text(out / "meta_data_with_label.json", json.dumps(metadata(scans, seed), indent=1))
    return out / "AD_NC"


def draw_volumes(out, count, seed=0, every=1):
    """Draw the first scan of `count` subjects, NC and AD in turn, as volumes; returns out/heads.

    out/heads/sub-*_T1w.nii.gz are heads with a skull and a capsule on the left temple, voxels of
    1.2 x 1 x 1 mm, each stored in another orientation; out/brains the brains alone, stored alike;
    out/heads.csv has class, atrophy, orientation and volume of the brain. Only each `every`-th
    slice is drawn. InputError if `out` holds volumes.
    """
    nib = import_nibabel()
    first = [scan for scan in plan(max(10, 4 * count), seed) if scan.visit == 0]
    nc = [scan for scan in first if scan.label == "NC"]
    ad = [scan for scan in first if scan.label == "AD"]
    scans = [scan for pair in zip(nc, ad) for scan in pair][:count]
    out = Path(out)
    new_folders(out, "heads", "brains")

    rows = []
    for number, scan in enumerate(tqdm(scans, "phantom", unit=" heads", disable=None)):
        head, brain, affine = render_head(scan, seed, every)
        orientation = STORED[number % len(STORED)]
        subject = "sub-" + scan.subject.replace("_", "")
        stored = nib.orientations.axcodes2ornt(orientation)
        transform = nib.orientations.ornt_transform(nib.io_orientation(affine), stored)
        for name, pixels, kind in (("heads", head, "T1w"), ("brains", brain, "desc-brain_T1w")):
            image = nib.Nifti1Image(pixels, affine).as_reoriented(transform)
            nib.save(image, out / name / f"{subject}_{kind}.nii.gz")
        litres = 1e-6 * float(np.count_nonzero(brain) * np.prod(np.diag(affine)[:3]))
        rows.append((f"{subject}_T1w", subject, scan.label, scan.atrophy, orientation, litres))
    columns = ["scan", "subject", "label", "atrophy", "orientation", "brain_litres"]
    write_csv(out / "heads.csv", pd.DataFrame(rows, columns=columns))
    return out / "heads"


def contact_sheet(file, subjects=60, seed=0, slices=(68, 74, 80, 86, 91, 98, 105, 112)):
    """Save a picture of two NC and two AD subjects (quartiles of atrophy) by slice index."""
    figure = Figure(figsize=(1.6 * len(slices), 6.6), layout="constrained")
    axes = figure.subplots(4, len(slices))
    first = [scan for scan in plan(subjects, seed) if scan.visit == 0]
    for row, (label, share) in enumerate([("NC", 0.25), ("NC", 0.75), ("AD", 0.25), ("AD", 0.75)]):
        same_class = [scan for scan in first if scan.label == label]
        same_class.sort(key=lambda scan: scan.atrophy)
        scan = same_class[int(share * len(same_class))]
        for axis, pixels, index in zip(axes[row], render(scan, seed, slices), slices):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"slice {index}", fontsize=9)
        axes[row, 0].set_ylabel(f"{label}, atrophy {scan.atrophy:+.1f}", fontsize=9)
    figure.suptitle("synthetic sagittal slices, not patients")
    write_atomically(file, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    return Path(file)

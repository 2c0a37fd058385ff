"""Draw a synthetic imitation of the ADNI `AD_NC` set, for whoever has no access to ADNI.

    python phantom.py ADNI                                        60 subjects, 140 scans, 2,800 slices
    python phantom.py ADNI --subjects 680 --seed 1                the size of the real set
    python phantom.py LOCAL --cue local --subjects 250            a cue that a blur does not show
    python phantom.py --sheet figures/phantom.png                 a contact sheet only; no set is drawn
    python phantom.py HEADS --volumes 4                           four heads with a skull, as NIfTI, and no slices

writes

    ADNI/meta_data_with_label.json                       scan -> label and paths that name the subject
    ADNI/AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg  256 x 240, 8-bit grey, 20 slices a scan

What is imitated: layout, names and proportions (subjects that are in both train and test, 1 to 8 scans a
subject, metadata entries without a picture), the near-black share, and the shortcut: the window of 20 slice
indices is tied to the class, and a majority vote on it alone gets 68 % of the scans right.

What is invented: the brain. It is a parametric 3-D shape, cut along sagittal planes. One latent number a
subject, its atrophy, is N(+1.37, 1) for AD and N(-1.37, 1) for NC; it drives the ventricles most, then sulci,
hippocampus and temporal lobe. The best possible subject-level accuracy is therefore about 0.915, never 1.
Besides the atrophy only the window depends on the class. A result on the phantom says that the code works; it
says nothing about Alzheimer's disease.

With --cue local the atrophy acts on the temporal horn and the hippocampus alone, ventricles and sulci follow an
ageing that says nothing of the class, and scanners (contrast, texture, noise), tilt and position differ as much as
in real sets. Each subject has one scan of six slices, the same of everybody, so that there is no window to vote on;
a fifth of the subjects is in test. The best observer is right on 0.915 of the subjects, a logistic regression on
blurred slices of 200 subjects stays below an AUROC of 0.7.

With --volumes N it writes the first scans of N subjects as HEADS/heads/sub-*_T1w.nii.gz, voxels of 1.2 x 1 x 1 mm, each
stored in another orientation, with a capsule on the left temple; the brain alone as HEADS/brains/, stored alike; and
HEADS/heads.csv with class, atrophy, orientation and volume of the brain.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from statistics import NormalDist

from adnc.cli import SEED, InputError, Parser, Threads, number, picture, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", nargs="?", help="folder to write AD_NC and meta_data_with_label.json into")
    add = parser.add_argument_group("what is drawn").add_argument
    add("--subjects", type=number(10, 5000, int), default=60, help="the real set has 680 (60)")
    add("--cue", choices=("global", "local"), default="global", help="what the class shows in (global)")
    add("--seed", type=SEED, default=0, help="another seed, another set (0)")
    add("--volumes", type=number(1, 100, int), metavar="N", help="draw N heads as NIfTI, not slices")
    add("--sheet", type=picture, metavar="PNG", help="save a contact sheet; without OUT, that alone")
    add = parser.add_argument_group("machine").add_argument
    add("--workers", type=number(1, 1024, int), help="threads; no influence on the result (one a core)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
from PIL import Image

from adnc.phantom.anatomy import Scan, render, render_head
from adnc.files import make_folder, write_atomically, write_csv

EFFECT = 1.37                            # half the distance between the classes, in SD; Phi(1.37) = 0.915
SCAN_IDS = np.arange(10_000, 1_210_000)  # image ids as ADNI has them
STARTS = (67, 70, 74, 77, 81, 84, 88, 91, 95)
AD_WINDOWS = (67, 77, 81, 95)            # windows that lean to AD; the other five lean to NC
LEAN = 0.36                              # by 1 +/- LEAN, so that a vote gets 0.5 + LEAN / 2 = 0.68

# The real set: subjects in train only, in both, in test only; shares of them with 1, 2, ... scans there.
AD_SHARE = 743 / 1526
GROUPS = {"train": 349, "both": 216, "test": 115}
SCANS = {
    ("train", "train"): (0.52, 0.29, 0.12, 0.05, 0.02), ("test", "test"): (0.64, 0.24, 0.10, 0.02),
    ("both", "train"): (0.38, 0.30, 0.17, 0.10, 0.05), ("both", "test"): (0.76, 0.19, 0.05),
}
AGEING = 1.7                             # SD of the second latent: that of atrophy over both classes
STORED = ("RAS", "LAS", "PSR", "LPI")     # orientations of the volumes, by turns; scanners store sagittal heads as PSR
NEITHER = (2189 - 1526) / 1526           # metadata entries with label 1 and no picture, for each scan drawn


# ---- who is scanned, and where -----------------------------------------------------------------------------

def _quota(rng, values, weights, n):
    """n values in shuffled order, each as often as its weight says, to within one."""
    at = (np.arange(n) + rng.random()) / max(n, 1)
    picked = np.searchsorted(np.cumsum(weights) / np.sum(weights), at, side="right")
    return [values[i] for i in rng.permutation(np.minimum(picked, len(values) - 1))]


def _names(rng, n):
    numbers = rng.choice(7999, n, replace=False) + 1
    return [f"{rng.integers(2, 142):03d}_S_{number:04d}" for number in numbers]


def plan_local(subjects=60, seed=0):
    """The scans of a set with the local cue, as a list of Scan: one a subject, a fifth of them in test; half are AD,
    in both parts with evenly spread quantiles of atrophy."""
    rng = np.random.default_rng([seed, 4])
    n_test = max(2, round(subjects / 5))
    names, ids = _names(rng, subjects), rng.choice(SCAN_IDS, subjects, replace=False)
    scans = []
    for split, members in (("test", names[:n_test]), ("train", names[n_test:])):
        for i, subject in enumerate(members):
            label, sign = ("AD", 1) if i % 2 else ("NC", -1)
            share = (i // 2 + 0.5) / ((len(members) + (not i % 2)) // 2)
            atrophy = sign * EFFECT + NormalDist().inv_cdf(share)
            scans.append(Scan(int(ids[len(scans)]), subject, label, split, 0, float(atrophy), 0,
                              float(AGEING * rng.standard_normal())))
    return sorted(scans)


def plan(subjects=60, seed=0):
    """The scans of a set, as a list of Scan: who has which class, is where, and how far the disease went.

    Everything is drawn by quota, so that 60 subjects have the same proportions as 680.
    """
    if subjects < 10:
        raise InputError(f"{subjects} subjects are too few; expected 10 or more, to fill train and test")
    rng = np.random.default_rng([seed, 0])
    names = _names(rng, subjects)
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
    ids = rng.choice(SCAN_IDS, len(scans), replace=False)
    scans = [scan._replace(scan=int(i)) for scan, i in zip(scans, ids)]
    for split in ("train", "test"):
        for label, sign in (("AD", 1), ("NC", -1)):
            here = [k for k, scan in enumerate(scans) if (scan.split, scan.label) == (split, label)]
            # the four windows that lean to AD hold half of all scans, the other five the other half
            weights = [(1 + sign * LEAN) / 8 if s in AD_WINDOWS else (1 - sign * LEAN) / 10 for s in STARTS]
            for k, start in zip(here, _quota(rng, STARTS, weights, len(here))):
                scans[k] = scans[k]._replace(start=start)
    return sorted(scans)


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


@contextlib.contextmanager
def _draft(out, content, *names):
    """A folder to draw `names` in, which are moved into the folder `out` at the end: an interrupted run leaves nothing
    there. InputError where one of them is there already."""
    for name in names:
        if (out / name).exists():
            raise InputError(f"{out / name} exists; expected a folder without {content}: name another or move it")
    make_folder(out)
    with tempfile.TemporaryDirectory(prefix=".phantom-", dir=out, ignore_cleanup_errors=True) as draft:
        yield Path(draft)
        for name in reversed(names):  # the first last: where it is, all is complete
            os.replace(Path(draft) / name, out / name)


def draw(out, subjects=60, seed=0, workers=None, progress=True, cue="global"):
    """Draw a set under the folder `out`; returns the path of out/AD_NC.

    The bytes depend on subjects, seed and cue only, not on workers (threads; by default one a core). Raises
    ValueError where out already holds a set or an argument is out of range. An interrupted run leaves no half
    set.
    """
    from tqdm import tqdm
    out = Path(out)
    scans = plan(subjects, seed) if cue == "global" else plan_local(subjects, seed)
    with _draft(out, "a set", "AD_NC", "meta_data_with_label.json") as draft:
        def write(scan):
            folder = draft / "AD_NC" / scan.split / scan.label
            for index, pixels in zip(scan.indices, render(scan, seed)):
                Image.fromarray(pixels).save(folder / f"{scan.scan}_{index}.jpeg", quality=92)

        for folder in ("train/AD", "train/NC", "test/AD", "test/NC"):
            (draft / "AD_NC" / folder).mkdir(parents=True)
        with Threads(workers or os.cpu_count()) as pool:
            jobs = pool.map(write, scans)
            for _ in tqdm(jobs, "phantom", len(scans), unit=" scans", disable=None if progress else True):
                pass
        (draft / "meta_data_with_label.json").write_text(json.dumps(metadata(scans, seed), indent=1))
    return out / "AD_NC"


def draw_volumes(out, count, seed=0, every=1):
    """Draw the first scan of `count` subjects, NC and AD by turns, as volumes under the folder `out`, as the docstring
    of this file says; with each `every`-th slice only. Returns out/heads. InputError where `out` holds volumes."""
    import pandas as pd
    from tqdm import tqdm

    from adnc.volumes import read as readers

    out, nib = Path(out), readers.nibabel()
    first = [scan for scan in plan(max(10, 4 * count), seed) if scan.visit == 0]
    classes = [[scan for scan in first if scan.label == label] for label in ("NC", "AD")]
    scans = [classes[i % 2][i // 2] for i in range(count)]
    rows = []
    with _draft(out, "volumes", "heads", "brains") as draft:
        for name in ("heads", "brains"):
            (draft / name).mkdir()
        for number, scan in enumerate(tqdm(scans, "phantom", unit=" heads", disable=None)):
            head, brain, affine = render_head(scan, seed, every)
            stored, subject = STORED[number % len(STORED)], "sub-" + scan.subject.replace("_", "")
            to = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(stored))
            for name, pixels, kind in (("heads", head, "T1w"), ("brains", brain, "desc-brain_T1w")):
                image = nib.Nifti1Image(pixels, affine).as_reoriented(to)
                nib.save(image, draft / name / f"{subject}_{kind}.nii.gz")
            litres = 1e-6 * float(np.count_nonzero(brain) * np.prod(np.diag(affine)[:3]))
            rows.append((f"{subject}_T1w", subject, scan.label, scan.atrophy, stored, litres))
        columns = ["scan", "subject", "label", "atrophy", "orientation", "brain_litres"]
        write_csv(out / "heads.csv", pd.DataFrame(rows, columns=columns))
    return out / "heads"


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
    write_atomically(file, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    return Path(file)


def main(args):
    if not (args.out or args.sheet):
        raise InputError("nothing to do: expected OUT, a folder to draw into, or --sheet PNG")
    if args.volumes:
        if not args.out:
            raise InputError("--volumes needs OUT, a folder to draw into")
        print(f"drew {draw_volumes(args.out, args.volumes, args.seed)}")
    elif args.out:
        print(f"drew {draw(args.out, args.subjects, args.seed, args.workers, cue=args.cue)}")
    if args.sheet:
        print(f"drew {contact_sheet(args.sheet, args.subjects, args.seed)}")


if __name__ == "__main__":
    run_script(main, ARGS)

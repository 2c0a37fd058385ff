"""The data: an index of slices, the split by subject, the audit, and batches for training.

    python dataset.py AD_NC                     # the audit: the content of a folder, and leaks
    python dataset.py AD_NC --mean means.png    # does a mean slice tell the classes apart?

    index = read_index("ADNI/AD_NC")   # path, label, scan, slice, subject, split, group
    index = split_index(index)         # 10 % of the training subjects become split "val"

The set is AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg. A scan is not a patient: the subject of a
scan is known only from meta_data_with_label.json or subjects.csv beside AD_NC, or from names of
scans in a known form. The audit reports what could not be checked without them. Exit status 1:
training would refuse the set."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))  # under python -P it is missing

from adnc import CLASSES
from adnc.cli import Parser, add_subject_pattern, new_png, run_script
from adnc.data import pixels, subjects
from adnc.data.augment import as_trained
from adnc.data.index import describe_bad, list_set, usable
from adnc.data.index import read_index as read_index
from adnc.data.subjects import split_index as split_index
from adnc.errors import InputError, count, printable
from adnc.scoring import plots
from adnc.scoring.metrics import window_vote

# ---------------------------------------------------------------- slices with their pixels


@dataclass
class SliceSet:
    """Slices with their pixels.

    index: one row per slice, with the columns of `read_index`, and error (reason why the file could
        not be read, else <NA>), row (of `images`), pixel_hash (equal for equal pixels),
        pixels.STATS (what the range check looks at), and bits and depth of files with 16 bits.
    images: uint8 (M, H, W). The pixels of a slice are images[row], whatever the order of the index.
    root: the folder AD_NC.
    bad: (path, reason) of the files that were left out.
    dropped: the number of scans that --drop-test-subjects left out, or None.
    unused: rows like those of the index, of slices that are in no part, as with --subjects.
    sources: the files that name the subjects.
    notes: sentences on what was converted, assumed, or not used.
    """

    index: pd.DataFrame
    images: np.ndarray
    root: str = ""
    bad: list = field(default_factory=list)
    dropped: int | None = None
    unused: pd.DataFrame | None = None
    sources: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def __len__(self):
        return len(self.index)

    @property
    def rows(self):
        return self.index.row.to_numpy(np.int64)

    @property
    def is_ad(self):
        return (self.index.label == "AD").to_numpy(bool)

    def where(self, mask):
        """The same pixels with only some rows of the index, given by a boolean array."""
        return replace(self, index=self.index[np.asarray(mask)])

    def part(self, split):
        """The rows of a split, in the order of the pixels."""
        return replace(self, index=self.index[self.index.split == split].sort_values("row"))


def decode_set(root, *, use_cache=True, subject_pattern=None, progress="decoding"):
    """Index and decode the folder `root`, for training and for the audit; returns a SliceSet.

    Files that cannot be used are left out and listed in `bad`. InputError if no slice of train/ is
    left.
    """
    listing = list_set(root, subject_pattern)
    index, bad = usable(listing.index)
    train = index.path[index.split == "train"]
    if train.empty:
        raise InputError(f"no slice is left in train/; {describe_bad(bad)}")

    paths = index.path.tolist()
    images, stats, errors = pixels.decode_files(
        paths,
        lambda: pixels.common_size(train),
        root=listing.root if use_cache else None,
        progress=progress,
    )
    index = index.assign(row=np.arange(len(index)), error=pd.array(errors, "string"))
    index, unreadable = usable(pd.concat([index, stats], axis=1))
    notes = [
        *listing.notes,
        *pixels.describe_bits(index),
        *pixels.describe_converted(index, images.shape[1:]),
        *pixels.describe_outliers(index),
    ]
    return SliceSet(
        subjects.assign_groups(index), images, listing.root,
        bad=bad + unreadable, sources=listing.sources, notes=notes,
    )  # fmt: skip


def load_set(
    root, *, val_fraction=0.1, split_by="subject", seed=0, split_file=None, fold=None, folds=None,
    pool_test=False, drop_test_subjects=False, n_subjects=None, skip_bad=False, use_cache=True,
    subject_pattern=None, progress="decoding",
):  # fmt: skip
    """Index, decode and split the folder `root`; the arguments are flags of train.py. Returns a
    SliceSet.

    Files that cannot be used are an InputError; with `skip_bad` they are left out and listed in
    `bad`.
    """
    slices = decode_set(
        root, use_cache=use_cache, subject_pattern=subject_pattern, progress=progress
    )
    if slices.bad and not skip_bad:
        raise InputError(
            describe_bad(slices.bad, "fix or remove them, or leave them out with --skip-bad")
        )

    index, dropped = slices.index, None
    if pool_test:
        index = index.assign(split="train")
    elif folds is not None:  # the official test set takes no part in a cross-validation
        index = index[index.split == "train"]

    if split_file is not None:
        index = subjects.read_split(index, split_file, slices.root)
    else:
        if drop_test_subjects:
            index, dropped = subjects.drop_test_subjects(index)
        if n_subjects is not None:
            index = subjects.take_subjects(index, n_subjects, seed)
        if folds is not None:
            index = subjects.fold_index(index, fold, folds, split_by, seed)
        index = split_index(index, val_fraction, split_by, seed)

    check_classes(index, slices.root)
    unused = slices.index[~slices.index.path.isin(index.path)]
    index = index.reset_index(drop=True)
    return replace(slices, index=index, unused=unused, dropped=dropped)


def check_classes(index, root):
    """InputError if train or val lacks a class, or test is empty."""
    if not (index.split == "test").any():
        raise InputError(f"{root}: test holds no slice; add some, or use --fold and --folds")
    for split in ("train", "val"):
        missing = set(CLASSES) - set(index.label[index.split == split])
        if missing:
            groups = index[index.split.isin(["train", "val"])].groupby("label").group.nunique()
            there = " and ".join(f"{groups.get(label, 0)} {label}" for label in CLASSES)
            raise InputError(
                f"{root}: no {' or '.join(sorted(missing))} is left for {split}: train and val "
                f"have {there} subjects together; expected two or more of each class, one of them "
                "for val (see --val-fraction, --subjects, --split)"
            )


def load_inputs(listing, *, slice_size, bits=None, progress="decoding"):
    """Decode the slices of a Listing, into memory, as the slices of a checkpoint's training were.

    `slice_size` is (H, W) and `bits` the depth of 16-bit files in training. Returns a SliceSet with
    every row of the listing; a file that cannot be read has an error and no row.
    """
    index = listing.index
    readable = index.error.isna()
    images, stats, errors = pixels.decode_files(
        index.path[readable].tolist(), lambda: slice_size, progress=progress, bits=bits
    )
    stats = stats.assign(row=np.arange(len(stats)), failed=pd.array(errors, "string"))
    stats.index = index.index[readable]
    decoded = stats[stats.failed.isna()].drop(columns="failed")
    index = index.assign(error=index.error.fillna(stats.failed)).join(decoded)
    index = subjects.assign_groups(index.assign(pixel_hash=index.pixel_hash.fillna("")))
    notes = [
        *listing.notes,
        *pixels.describe_bits(index),
        *pixels.describe_converted(index[index.error.isna()], slice_size),
    ]
    return SliceSet(index, images, notes=notes)


# ---------------------------------------------------------------- batches


class Batches:
    """Batches of (images uint8 (B, 1, H, W), labels int64 (B,)) of a SliceSet, on the device.

    `p_ad` (N,), the probability of AD of each slice, replaces its class: labels are then float32
    (B, 2), the shares of NC and AD.

    With a generator the order is a random permutation drawn from it; without one, batches follow
    the index. The last batch may be smaller. One thread fetches the next batch. The set is put on a
    GPU once if it fits into half of the free memory; else each batch is pinned and copied. With
    `world` processes, process `rank` gets the rows rank, rank + world, ... of each batch.
    """

    def __init__(
        self, slices, batch_size, *, generator=None, device=None, rank=0, world=1, p_ad=None
    ):
        self.images, self.rows = slices.images, slices.rows
        self.labels = torch.from_numpy(slices.is_ad.astype(np.int64))
        if p_ad is not None:
            self.labels = torch.from_numpy(np.stack((1 - p_ad, p_ad), 1).astype(np.float32))
        self.batch_size, self.generator = batch_size, generator
        self.device = device or torch.device("cpu")
        self.rank, self.world = rank, world
        if self.device.type == "cuda":
            self._move_to_gpu()

    def _move_to_gpu(self):
        self.labels = self.labels.to(self.device)
        size = len(self.rows) * int(np.prod(self.images.shape[1:]))
        if size < torch.cuda.mem_get_info(self.device)[0] / 2:
            parts = [
                torch.from_numpy(self.images[rows])
                for rows in np.array_split(self.rows, 1 + size // 2**28)
            ]
            self.images = torch.cat([part.to(self.device) for part in parts])
            self.rows = np.arange(len(self.rows))

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self):
        n = len(self.rows)
        order = torch.arange(n)
        if self.generator is not None:
            order = torch.randperm(n, generator=self.generator)
        with ThreadPoolExecutor(1) as pool:
            fetched = None
            for numbers in order.split(self.batch_size):
                next_fetched = pool.submit(self._fetch, numbers[self.rank :: self.world])
                if fetched is not None:
                    yield fetched.result()
                fetched = next_fetched
            if fetched is not None:
                yield fetched.result()

    def _fetch(self, numbers):
        rows = self.rows[numbers.numpy()]
        if torch.is_tensor(self.images):  # on the GPU
            images = self.images[torch.from_numpy(rows).to(self.device)]
        else:
            images = torch.from_numpy(self.images[rows])
            if self.device.type == "cuda":  # a copy from pinned memory does not wait for the GPU
                images = images.pin_memory().to(self.device, non_blocking=True)
        labels = self.labels[numbers.to(self.labels.device)]
        return images[:, None], labels  # (B, H, W) -> (B, 1, H, W)


# ---------------------------------------------------------------- audit


def audit(slices):
    """The audit of a SliceSet of `decode_set`, line by line: its content, and leaks."""
    index = slices.index
    yield f"{slices.root}: {len(index):,} slices of {index.scan.nunique():,} scans"
    yield from slices.notes
    if slices.sources:
        yield f"subjects from {' and '.join(map(str, slices.sources))}"
    else:
        yield "no meta_data_with_label.json or subjects.csv"

    yield ""
    yield f"{'':<8}{'slices':>10}{'scans':>8}{'subjects':>10}"
    for (split, label), part in index.groupby(["split", "label"]):
        n_subjects = part.subject.nunique() if part.subject.notna().any() else "?"
        yield f"{split + ' ' + label:<8}{len(part):>10,}{part.scan.nunique():>8,}{n_subjects:>10}"
    yield ""

    per_scan = index.groupby("scan").size().value_counts().sort_index()
    numbers = [f"{n} ({count(scans, 'scan')})" for n, scans in per_scan.items()]
    yield f"slices per scan: {', '.join(numbers)}"
    yield f"slice numbers: {index.slice.min()} to {index.slice.max()}"
    sizes = index[["width", "height"]].astype(int).value_counts().items()
    sizes = ", ".join(
        f"{width} wide x {height} high ({n:,} slices)" for (width, height), n in sizes
    )
    yield f"image sizes: {sizes}"

    if set(index.split) != {"train", "test"}:
        yield from audit_subjects(index)
        return
    majority = index[index.split == "train"].drop_duplicates("scan").label.mode()[0]
    test_scans = index[index.split == "test"].drop_duplicates("scan")
    yield (
        f"baselines: a vote on the slice numbers alone is right for {window_vote(index):.3f} of "
        f"the {len(test_scans)} test scans, the larger class ({majority}) for "
        f"{(test_scans.label == majority).mean():.3f}"
    )
    yield from audit_subjects(index)


def audit_subjects(index):
    """Lines on leaks between train and test, and on what could not be checked."""
    unknown = index.scan[index.subject.isna()]
    if len(unknown):
        yield (
            f"NOT CHECKED: the subject of {unknown.nunique()} of {index.scan.nunique()} scans is "
            f"unknown, first {unknown.iloc[0]}; whether train and test share these patients is "
            "unknown too, and a split treats each such scan as a subject of its own"
        )
    n_test = index[index.split == "test"].subject.nunique()
    shared = subjects.shared_subjects(index)
    if shared:
        yield (
            f"LEAK: {len(shared)} of the {n_test} test subjects are also in train: scores on all "
            "of test are too high; look at those on subjects not seen in training"
        )
    elif n_test:
        yield f"none of the {n_test} known test subjects is in train"
    yield from subjects.describe_copies(index)
    yield from subjects.describe_both_classes(index)


# ---------------------------------------------------------------- pictures of the training slices


def means_by_position(slices, ranges=4):
    """Rows for `plots.plot_means`: mean slices of each class, of all slices and of ranges of slice
    numbers."""
    numbers = slices.index.slice
    spans = [("all slices", numbers.min(), numbers.max())]
    for part in np.array_split(np.unique(numbers), min(ranges, numbers.nunique())):
        spans.append((f"slices {part[0]} to {part[-1]}", part[0], part[-1]))
    rows = []
    for text, low, high in spans:
        means = {}
        for label in CLASSES:
            own = slices.rows[numbers.between(low, high) & (slices.index.label == label)]
            mean = pixels.mean_slice(slices.images, own) if len(own) else None
            means[label] = (mean, len(own))
        rows.append((text, means))
    return rows


def draw_pictures(slices, *, montage=None, augmented=None, mean=None):
    """Draw the pictures that have a path; yields a line on each."""
    train = slices.part("train")
    title = f"training slices of {slices.root}"
    if montage:
        plots.plot_montage(montage, plots.montage_rows(train.index, slices.images), title)
        yield f"contact sheet in {montage}"
    if augmented:
        rows = plots.montage_rows(train.index, slices.images, as_trained)
        plots.plot_montage(augmented, rows, f"{title}, augmented")
        yield f"contact sheet in {augmented}"
    if mean:
        plots.plot_means(mean, means_by_position(train), title)
        yield f"mean slices in {mean}"


# ---------------------------------------------------------------- command


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("root", metavar="AD_NC", help="folder with train/ and test/")
    add_subject_pattern(parser)
    add = parser.add_argument_group("pictures of the training slices, new PNG files").add_argument
    add(
        "--montage",
        type=new_png,
        metavar="PNG",
        help="contact sheet of train/, by class and subject",
    )
    add(
        "--augmented",
        type=new_png,
        metavar="PNG",
        help="the same slices as the network sees them in training",
    )
    add("--mean", type=new_png, metavar="PNG", help="mean slice of AD, of NC, and their difference")
    args = parser.parse_args(argv)

    root = Path(args.root).resolve()
    for path in filter(None, (args.montage, args.augmented, args.mean)):
        if root in Path(path).resolve().parents:
            parser.error(
                f"{path} is inside the set, where it would be taken for a slice; name a file "
                "outside"
            )
    return args


def main(argv=None):
    args = parse_args(argv)
    slices = decode_set(args.root, use_cache=False, subject_pattern=args.subject_pattern)
    for line in audit(slices):
        print(printable(line))
    for line in draw_pictures(
        slices, montage=args.montage, augmented=args.augmented, mean=args.mean
    ):
        print(printable(line))

    if slices.bad:
        advice = "fix or remove them, or train without them with --skip-bad"
        sys.exit(f"error: {describe_bad(slices.bad, advice)}")  # status 1; 2 is wrong usage
    try:
        check_classes(split_index(slices.index), slices.root)
    except InputError as problem:
        sys.exit(f"error: training would refuse this set: {problem}")


if __name__ == "__main__":
    run_script(main)

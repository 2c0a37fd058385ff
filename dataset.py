"""The data: an index of slices, who is in them, the audit, and the sets that models train on and predict.

    python dataset.py AD_NC                            # the audit: what the folder holds, where its subjects leak
    python dataset.py AD_NC --mean means.png           # and whether a mean slice already tells the classes apart

    index = read_index("ADNI/AD_NC")   # a DataFrame, a row a slice: path, label, scan, slice, subject, split, group
    index = split_index(index)         # 10 % of the training subjects become split "val"

The set is AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg. A scan is not a patient: who is in a scan is known only from
meta_data_with_label.json or subjects.csv beside AD_NC, and without them the audit says what could not be checked.
"""

import os
import shutil
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from adnc.cli import CLASSES, STOP_SIGNALS, InputError, Parser, is_new_request, picture, printable, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("root", metavar="AD_NC", help="the folder with train/ and test/")
    parser.add_subject_pattern(parser)
    add = parser.add_argument_group("pictures of the training slices, in PNG files that are new").add_argument
    for flag, what in (("--montage", "a contact sheet of train/, by class and subject"),
                       ("--augmented", "the same slices as the network sees them in training"),
                       ("--mean", "the mean training slice of AD, of NC, and their difference, by slice number")):
        add(flag, type=picture, metavar="PNG", help=f"save {what}")
    args = parser.parse_args(argv)
    drawn = [os.path.abspath(path) for path in (args.montage, args.augmented, args.mean) if path]
    if len(set(drawn)) < len(drawn):
        parser.error(f"two pictures cannot both be {drawn[0]}; name a file for each")
    inside = [path for path in drawn if Path(args.root).resolve() in Path(path).resolve().parents]
    if inside:
        parser.error(f"{inside[0]} is in the set, where it would be taken for a slice; name a file outside {args.root}")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd

from adnc.data import cache
from adnc.scoring import plots
from adnc.data import subjects
from adnc.data.index import describe_bad, list_set, usable
from adnc.data.index import read_index as read_index
from adnc.scoring.metrics import window_vote
from adnc.data.pixels import common_size, describe_bits, describe_strange, mean_slice
from adnc.data.subjects import assign_groups
from adnc.data.subjects import split_index as split_index
from adnc.data.augment import as_trained, send

# ---------------------------------------------------------------- decoded slices, ready to train on or to predict


@dataclass
class SliceSet:
    """Slices with their pixels. `index` has listing.COLUMNS, error, row, pixel_hash, slices.STATS, bits and depth; the
    pixels of a slice are images[row], uint8 (H, W), whatever the order of the index; one that cannot be read has an
    error and no row. `bad` lists the (path, reason) of files that were left out, `dropped` is the number of scans that
    --drop-test-subjects left out, or None, `sources` the files that the subjects came from, `passed` lines on
    what was passed over or converted."""

    index: pd.DataFrame
    images: np.ndarray
    root: str = ""
    bad: list = field(default_factory=list)
    dropped: int | None = None
    sources: list[Path] = field(default_factory=list)
    passed: list = field(default_factory=list)

    def __len__(self):
        return len(self.index)

    def where(self, rows):
        """The same pixels with only some rows of the index, given by a boolean array."""
        return replace(self, index=self.index[np.asarray(rows)])

    def part(self, split):
        """The rows of a split, in the order of the pixels, whatever the order of the index."""
        return replace(self, index=self.index[self.index.split == split].sort_values("row"))

    @property
    def rows(self):
        return self.index.row.to_numpy(np.int64)

    @property
    def is_ad(self):
        return (self.index.label == "AD").to_numpy()


def decode_set(root, keep=True, bar="decoding", pattern=None):
    """Index and decode the folder `root`, for training and for the audit; returns a SliceSet. `keep`: in the cache.
    `pattern` finds subjects in names of scans (see metadata.py).

    Files that cannot be used are left out and listed in `bad`; InputError if no slice of train/ is left.
    """
    listing = list_set(root, pattern)
    index, bad = usable(listing.index)
    train, paths = index.path[index.split == "train"], index.path.tolist()
    if train.empty:
        raise InputError(f"no slice is left in train/; {describe_bad(bad)}")
    images, known, errors = cache.decode(paths, lambda: common_size(train), listing.root if keep else None, bar)
    index = index.assign(row=np.arange(len(index)), error=pd.array(errors, "string"))
    index, unread = usable(pd.concat([index, known], axis=1))
    return SliceSet(assign_groups(index), images, listing.root, bad + unread, sources=listing.sources,
                    passed=[*listing.warnings, *describe_bits(index), *describe_strange(index)])


def load_set(args, root, bar="decoding"):
    """Index, decode and split the folder `root` as the flags of train.py say; returns a SliceSet.

    Files that cannot be used are an InputError, or with --skip-bad they are left out and listed in `bad`.
    """
    slices = decode_set(root, not args.no_cache, bar, args.subject_pattern)
    if slices.bad and not args.skip_bad:
        raise InputError(describe_bad(slices.bad, "fix or remove them, or leave them out with --skip-bad"))
    index, dropped = subjects.split_as_asked(slices.index, args, slices.root)
    how = (f"{args.split} needs both classes in train and in val" if args.split else
           "after what --subjects, --fold and --drop-test-subjects take away, train/ needs two subjects or more of "
           f"each class, and --val-fraction (it is {args.val_fraction}) more than 0")
    check_classes(index, slices.root, how)
    unused = [f"{args.split} says who is in val; --val-fraction is not used"] if args.split else []
    return replace(slices, index=index.reset_index(drop=True), dropped=dropped, passed=slices.passed + unused)


def check_classes(index, root, how):
    """InputError where train or val lacks a class, or test is empty; `how` says what it takes."""
    if not (index.split == "test").any():
        raise InputError(f"{root}: no slices are left for test, which is read once, at the end; name some as test")
    for split in ("train", "val"):
        missing = set(CLASSES) - set(index.label[index.split == split])
        if missing:
            raise InputError(f"{root}: no {' or '.join(sorted(missing))} is left for {split}; {how}")


def load_inputs(listing, checkpoint, bar="decoding"):
    """Decode the slices of a Listing like those that a checkpoint was trained on, into memory; returns a SliceSet with
    all its rows."""
    index, wanted = listing.index, listing.index.error.isna().to_numpy()
    size, bits = checkpoint["slice_size"], checkpoint.get("bits")
    images, known, errors = cache.decode(index.path[wanted].tolist(), lambda: size, None, bar, bits)
    known = known.assign(row=np.arange(len(known)), failed=pd.array(errors, "string")).set_index(index.index[wanted])
    index = index.assign(error=index.error.fillna(known.failed)).join(known[known.failed.isna()].drop(columns="failed"))
    return SliceSet(assign_groups(index.assign(pixel_hash=index.pixel_hash.fillna(""))), images,
                    passed=[*listing.warnings, *describe_bits(index)])


# ---------------------------------------------------------------- batches

AHEAD = 2  # batches that each worker fetches ahead
LONGEST_FETCH = 60  # seconds for a batch of decoded slices; a worker that needs more has lost it


def make_loader(slices, batch_size, *, generator=None, device=None, share=None, workers=0):
    """Batches of (uint8 (B, 1, H, W), int64 (B,)) of a SliceSet through the standard DataLoader.

    With a generator the order is a random permutation drawn from it, without one it is that of the index. The last
    batch may be smaller. For a CUDA `device` the set is put there once if it fits into half of the free memory; if not,
    two processes fetch and pin batches ahead. With `workers` so many processes fetch them, on any device: the batches
    are the same. `share` = (rank, world, size) makes of each batch the part of one process of several: the rows rank,
    rank + world, ..., filled up to `size` with the first row of the batch.
    """
    import torch
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

    cuda = device is not None and device.type == "cuda"
    pixels = _InMemory(slices.images, slices.rows, slices.is_ad)
    if cuda and not workers:
        if len(slices) * slices.images[0].nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            pixels = _OnDevice(pixels, device)
        else:
            workers = 2
    ahead = {}
    if workers:
        check_shared_memory(workers, min(batch_size, len(slices)) * slices.images[0].nbytes)
        ahead = dict(num_workers=workers, persistent_workers=True, pin_memory=cuda, worker_init_fn=_leave_signals,
                     prefetch_factor=AHEAD, timeout=LONGEST_FETCH)
    order = RandomSampler(pixels, generator=generator) if generator else SequentialSampler(pixels)
    # batch_size=None: the sampler hands over a whole batch of rows, which one index fetches
    batches = BatchSampler(order, batch_size, drop_last=False)
    if share is not None:
        batches = _Share(batches, *share)
    return DataLoader(pixels, batch_size=None, sampler=batches, **ahead)


def check_shared_memory(workers, size):
    """OSError where /dev/shm has no room for the batches of `size` bytes that so many processes fetch ahead: one that
    cannot hand over its batch says so nowhere, and the other end waits for it."""
    if not os.path.isdir("/dev/shm"):  # as outside Linux
        return
    needed, free = size * (workers * AHEAD + 2), shutil.disk_usage("/dev/shm").free
    if needed > free:
        raise OSError(f"{workers} workers hand over up to {needed / 1e6:,.0f} MB at a time through /dev/shm, which has "
                      f"{free / 1e6:,.0f} MB free; take --workers 0 or a smaller --batch-size, or give a container "
                      "more of it (docker run --shm-size 1g)")


def _leave_signals(worker):
    """A signal to a whole group of processes is the first one's to answer. A SIGTERM that comes later ends a worker, or
    one that hangs would be waited for without limit when the process ends."""
    times = []

    def end(number, frame):
        if is_new_request(times) and len(times) > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)


class _Share:
    """A process's part of each batch of a batch sampler."""

    def __init__(self, batches, rank, world, size):
        self.batches, self.rank, self.world, self.size = batches, rank, world, size

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            part = batch[self.rank :: self.world]
            yield part + batch[:1] * (self.size - len(part))


class _InMemory:
    def __init__(self, images, rows, labels):
        self.images, self.rows, self.labels = images, rows, labels.astype(np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, batch):
        import torch

        return torch.from_numpy(self.images[self.rows[batch]][:, None]), torch.from_numpy(self.labels[batch])


class _OnDevice(_InMemory):
    """The same, with the pixels on a device."""

    def __init__(self, pixels, device):
        import torch

        first = range(0, len(pixels), 1024)  # in parts, so that memory holds no second copy of the set
        parts = (pixels[np.arange(start, min(start + 1024, len(pixels)))] for start in first)
        parts = [(images.to(device), labels.to(device)) for images, labels in parts]
        self.images, self.labels = (torch.cat(part) for part in zip(*parts))

    def __getitem__(self, batch):
        import torch

        batch = send(torch.tensor(batch), self.labels.device)
        return self.images[batch], self.labels[batch]


# ---------------------------------------------------------------- audit


def audit(slices):
    """What a SliceSet of `decode_set` holds and where it leaks, as lines of text."""
    index, sources = slices.index, " and ".join(map(str, slices.sources))
    yield f"{slices.root}: {len(index):,} slices of {index.scan.nunique():,} scans"
    unmapped = index.scan[index.subject.isna()].nunique()
    yield from slices.passed
    yield f"subjects from {sources}" if sources else "no meta_data_with_label.json or subjects.csv"
    yield ""
    yield f"{'':<8}{'slices':>10}{'scans':>8}{'subjects':>10}"
    for (split, label), part in index.groupby(["split", "label"]):
        known = part.subject.nunique() if part.subject.notna().any() else "?"
        yield f"{split + ' ' + label:<8}{len(part):>10,}{part.scan.nunique():>8,}{known:>10}"
    yield ""
    per_scan = index.groupby("scan").size().value_counts().sort_index()
    yield "slices per scan: " + ", ".join(f"{n} ({scans} scans)" for n, scans in per_scan.items())
    yield f"slice numbers: {index.slice.min()} to {index.slice.max()}"
    sizes = index[["width", "height"]].astype(int).value_counts().items()
    sizes = ", ".join(f"{width} wide x {height} high ({n:,} slices)" for (width, height), n in sizes)
    yield f"image sizes: {sizes}; {(index.colour > 0).sum():,} slices are in colour"
    majority = index[index.split == "train"].drop_duplicates("scan").label.mode()[0]
    test_scans = index[index.split == "test"].drop_duplicates("scan")
    yield (f"a vote on the slice window alone is right on {window_vote(index):.3f} of the {len(test_scans)} test "
           f"scans; always {majority} on {(test_scans.label == majority).mean():.3f}")
    if unmapped:
        yield (f"NOT CHECKED: {unmapped} of {index.scan.nunique()} scans have no known subject, first "
               f"{index.scan[index.subject.isna()].iloc[0]}; whether train and test share these patients is unknown, "
               "and a split treats each such scan as a subject of its own")
    test_subjects = index[index.split == "test"].subject.nunique()
    shared = subjects.shared_subjects(index)
    if shared:
        yield (f"LEAK: {len(shared)} of the {test_subjects} test subjects are also in train: scores on all of test are "
               "too high; look at those on subjects not seen in training")
    elif test_subjects:
        yield f"none of the {test_subjects} known test subjects is in train"
    yield from subjects.describe_copies(index)
    yield from subjects.describe_both_classes(index)


POSITIONS = 4  # ranges of slice numbers that --mean draws


def means_by_position(slices):
    """Rows for `plots.plot_means` of a SliceSet: all slices, and those of each range of slice numbers."""
    numbers, rows = slices.index.slice, []
    ranges = np.array_split(np.unique(numbers), min(POSITIONS, numbers.nunique()))
    for text, low, high in (("all slices", numbers.min(), numbers.max()),
                            *((f"slices {part[0]} to {part[-1]}", part[0], part[-1]) for part in ranges)):
        of = {label: slices.rows[numbers.between(low, high) & (slices.index.label == label)] for label in CLASSES}
        rows.append((text, {label: (mean_slice(slices.images, own) if len(own) else None, len(own))
                            for label, own in of.items()}))
    return rows


def draw(slices, args):
    """The pictures of the training slices that the flags ask for; yields a line on each."""
    train, what = slices.part("train"), f"training slices of {slices.root}"
    for path, change, how in ((args.montage, np.asarray, ""), (args.augmented, as_trained, ", augmented")):
        if path:
            plots.plot_montage(path, plots.montage_rows(train.index, slices.images, change), what + how)
            yield f"contact sheet in {path}"
    if args.mean:
        plots.plot_means(args.mean, means_by_position(train), what)
        yield f"mean slices in {args.mean}"


def main(args):
    slices = decode_set(args.root, pattern=args.subject_pattern)
    for line in (*audit(slices), *draw(slices, args)):
        print(printable(line, ""))
    if slices.bad:
        advice = "fix or remove them, or train without them with --skip-bad"
        sys.exit(f"error: {describe_bad(slices.bad, advice)}")  # status 1; 2 is wrong usage
    try:
        check_classes(split_index(slices.index), slices.root, "train/ needs two subjects or more of each class")
    except InputError as problem:
        sys.exit(f"error: training would refuse this set: {problem}")


if __name__ == "__main__":
    run_script(main, ARGS)

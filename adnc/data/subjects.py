"""Who belongs together (`group`), who is on which side of a split, who was seen in training.

Not run by itself. Functions of the index, a table with a row a slice.
"""

import os

import numpy as np

from adnc.files import read_table
from adnc.data.metadata import spelling
from adnc.cli import InputError, fingerprint

# ---------------------------------------------------------------- groups


def assign_groups(table):
    """The table with the column `group`, that of everybody whom a split must keep together: the subject; the scan where
    the subject is unknown; and what shares a slice pixel for pixel (column pixel_hash, "" where it is not known) is one
    group, under the name of its first. Split, folds, intervals, calibration and prediction sets read it.
    """
    groups = table.subject.fillna("scan " + table.scan).astype(str)
    if not table.pixel_hash[table.pixel_hash != ""].duplicated().any():
        return table.assign(group=groups)
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # a graph of groups and pictures; what hangs together is one group
    names, group = np.unique(groups, return_inverse=True)
    pictures, picture = np.unique(table.pixel_hash.where(table.pixel_hash != "", table.path), return_inverse=True)
    n = len(names) + len(pictures)
    graph = coo_array((np.ones(len(table)), (group, len(names) + picture)), shape=(n, n))
    part = connected_components(graph, directed=False)[1][: len(names)]
    _, first = np.unique(part, return_index=True)
    return table.assign(group=names[first[part[group]]])


# ---------------------------------------------------------------- split


def drop_test_subjects(index):
    """Leave out of split "train" whose group is also in "test". Returns (index, number of scans left out). InputError
    where no subject is known."""
    if index.subject.isna().all():
        raise InputError("which subjects are in both train and test is unknown: there is no meta_data_with_label.json "
                         "or subjects.csv; without one, test subjects cannot be dropped from training")
    out = (index.split == "train") & index.group.isin(index.group[index.split == "test"])
    return index[~out], index.scan[out].nunique()


def take_subjects(index, n, seed=0):
    """Keep n groups of split "train", of each class its share, in a seeded order: fewer are among more, as learning
    curves need it. InputError where there are fewer."""
    train = index[index.split == "train"]
    label = train.groupby("group").label.first()
    if n > len(label):
        raise InputError(f"--subjects is {n}, but train/ has {len(label)}; expected no more")
    order = np.random.default_rng(seed).permutation(len(label))
    rank = label.iloc[order].groupby(label.iloc[order]).cumcount()
    share = label.map(label.value_counts()) / len(label)
    first = ((rank + 0.5) / share.loc[rank.index]).sort_values(kind="stable").index[:n]
    return index[(index.split != "train") | index.group.isin(first)]


def _units(index, by):
    """What a split keeps together: the group, or each slice by itself."""
    if by not in ("subject", "slice"):
        raise InputError(f"a split by {by!r} is not known; choose subject or slice")
    return index.group if by == "subject" else index.path


def split_index(index, val_fraction=0.1, by="subject", seed=0):
    """Turn `val_fraction` of split "train" into split "val", stratified by class; returns a new DataFrame.

    by="subject" keeps a group whole (see `assign_groups`); by="slice" is the naive split that leaks, for showing the
    leak. In each class groups are taken in a seeded random order until the number of slices is nearest to the fraction:
    at least one, and at least one stays in train. A class with a single group stays in train.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(f"the validation fraction is {val_fraction}; expected at least 0 and less than 1")
    index = index.copy()
    train = index[index.split == "train"]
    units = _units(train, by)
    sizes = train.label.groupby(units).agg(["min", "size"])
    generator = np.random.default_rng(seed)
    for _, part in sizes.groupby("min"):
        if len(part) < 2 or val_fraction == 0:
            continue
        part = part.iloc[generator.permutation(len(part))]
        slices = part["size"].cumsum().to_numpy()
        take = 1 + int(np.abs(slices[:-1] - val_fraction * slices[-1]).argmin())
        index["split"] = index.split.mask((index.split == "train") & _units(index, by).isin(part.index[:take]), "val")
    if by == "subject":
        check_disjoint(index)
    return index


def fold_index(index, fold, folds, by="subject", seed=0):
    """Fold `fold` (0 to folds - 1) of a cross-validation over split "train", by scikit-learn's StratifiedGroupKFold.

    The fold becomes split "test" and the rows of the official test set are dropped, so that epochs are still chosen on
    a "val" that `split_index` takes from what remains, never on the fold itself.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"fold {fold} of {folds} does not exist; folds count from 0, and there are at least 2")
    index = index[index.split == "train"].copy()
    units = _units(index, by)
    fewest = units.groupby(index.label).nunique().min()
    if fewest < folds:
        raise InputError(f"{folds} folds need {folds} groups in each class; the smaller class has {fewest}")
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    held_out = list(kfold.split(index, index.label, units))[fold][1]
    index["split"] = np.where(np.isin(np.arange(len(index)), held_out), "test", index.split)
    return index


def read_split(index, file, root):
    """The index with the split (train, val or test) that a split.csv gives to each file, by its path below `root`.

    The file may be of an earlier run or made by hand; of its columns path and split are read. InputError where it does
    not name the slices of the index, each once, or where a group is in both train and val, or a scan also in test.
    """
    given = read_table(file, ("path", "split"))
    given["path"], given["split"] = given.path.map(os.path.normpath, na_action="ignore"), given.split.str.lower()
    wrong = given[~given.split.isin(["train", "val", "test"]) | given.path.isna() | given.path.duplicated()]
    if len(wrong):
        raise InputError(f"--split {file}: {len(wrong)} rows, first {wrong.path.iloc[0]} with split "
                         f"{wrong.split.iloc[0]}, are not usable; expected each path once, in train, val or test")
    paths = index.path.map(lambda path: os.path.relpath(path, root))
    missing, unknown = sorted(set(paths) - set(given.path)), sorted(set(given.path) - set(paths))
    for names, where in ((missing, f"of the slices under {root} are not in it"),
                         (unknown, f"of its slices are not under {root}, or not usable")):
        if names:
            raise InputError(f"--split {file}: {len(names):,} {where}, first {names[0]}; expected the same slices, by "
                             f"paths such as {paths.iloc[0]} (in the file: {next(iter(given.path), 'none')})")
    index = index.assign(split=paths.map(dict(zip(given.path, given.split))).to_numpy(str))
    shared = _shared(index, "group", "train", "val")
    if shared:
        raise InputError(f"--split {file} has {len(shared)} groups in both train and val, first {shared[0]}; expected "
                         "all scans of a subject, and copies of a scan, on one side")
    shared = _shared(index.assign(split=index.split.replace("val", "train")), "scan", "train", "test")
    if shared:
        raise InputError(f"--split {file} has {len(shared)} scans in both test and train or val, first {shared[0]}; "
                         "expected all slices of a scan on one side")
    return index


def split_as_asked(index, args, root):
    """The index with the split that the flags of train.py ask for; and how many scans --drop-test-subjects left out, or
    None."""
    dropped = None
    if args.pool_test:
        index = index.assign(split="train")
    elif args.folds is not None:  # the official test set takes part in nothing
        index = index[index.split == "train"]
    if args.split:
        return read_split(index, args.split, root), None
    if args.drop_test_subjects:
        index, dropped = drop_test_subjects(index)
    if args.subjects is not None:
        index = take_subjects(index, args.subjects, args.seed)
    if args.folds is not None:
        index = fold_index(index, args.fold, args.folds, args.split_by, args.seed)
    return split_index(index, args.val_fraction, args.split_by, args.seed), dropped


def _shared(index, column, one, other):
    """The values of a column that are known and in both splits, sorted."""
    known = index[index[column].notna()]
    return sorted(set(known[column][known.split == one]) & set(known[column][known.split == other]))


def check_disjoint(index):
    """Raise RuntimeError if train and val share a subject, a scan, or a group, which copies of a slice belong to."""
    for column in ("subject", "scan", "group"):
        shared = _shared(index, column, "train", "val")
        if shared:
            raise RuntimeError(f"train and val share {len(shared)} {column}s, first {shared[0]}; the split leaks")


def shared_subjects(index):
    """The subjects that are in both train (or val) and test, sorted."""
    return _shared(index.assign(split=index.split.replace("val", "train")), "subject", "train", "test")


def split_hash(index):
    """A fingerprint of who is where: SHA-256 of the sorted lines split/label/group/file, 16 hex digits."""
    places = index.split + "/" + index.label + "/" + index.group.astype(str) + "/" + index.path.map(os.path.basename)
    return fingerprint("\n".join(sorted(places)), 16)


def describe_split(index, by, dropped=None):
    """Lines that say who is where, and what could not be known. `dropped` is the number of scans that
    `drop_test_subjects` left out, or None."""
    parts = [f"{split} {len(part):,} slices of {part.scan.nunique()} scans, {part.subject.nunique()} known subjects"
             for split, part in index.groupby("split", sort=False)]
    yield "; ".join(parts)
    unknown = index.scan[index.subject.isna()].nunique()
    if by == "slice":
        yield "LEAKY SPLIT: train and val share scans (--split-by slice); do not believe the scores on val"
    elif unknown:
        yield f"{unknown} scans have no known subject: they are split by scan, and subjects may be shared"
    shared = len(shared_subjects(index))
    if shared:
        yield (f"LEAK IN THE DATA: {shared} test subjects are also in train; those known to be unseen are reported "
               "apart (--drop-test-subjects trains without them)")
    if dropped is not None:
        yield f"left out of train: {dropped} scans of subjects who are also in test"
    yield from describe_both_classes(index)
    yield from describe_copies(index)


def describe_both_classes(index):
    """A line on subjects who have scans of both classes: in AD_NC there are none, so an id is likely to be wrong."""
    both = index.dropna(subset="subject").groupby("subject").label.nunique()
    if (both > 1).any():
        yield (f"SUSPICIOUS: subjects with scans of both classes: {(both > 1).sum()}, first {both.index[both > 1][0]}; "
               "is the id really that of one person?")


def describe_copies(index):
    """Lines on slices that are equal, pixel for pixel, in two scans: one brain under two names."""
    found = index[index.pixel_hash != ""].drop_duplicates(["scan", "pixel_hash"])
    found = found[found.duplicated("pixel_hash", keep=False)]
    if found.empty:
        return
    leak = found.groupby("pixel_hash").filter(lambda copies: {"test"} < set(copies.split))  # in test and elsewhere
    both = found.groupby("pixel_hash").filter(lambda copies: copies.label.nunique() > 1)
    if len(both):
        one, other = both[both.pixel_hash == both.pixel_hash.iloc[0]].drop_duplicates("label").path
        yield (f"SUSPICIOUS: {both.pixel_hash.nunique()} slices are in both classes, pixel for pixel, first {one} and "
               f"{other}; one of the two labels is wrong")
    part = leak if len(leak) else found
    one, other = part[part.pixel_hash == part.pixel_hash.iloc[0]].path.iloc[:2]
    where = "LEAK: slices of test are copies, pixel for pixel, of slices in train" if len(leak) else (
        "slices are in two scans, pixel for pixel")
    yield (f"{where}: {part.pixel_hash.nunique()} slices of {part.scan.nunique()} scans, first {one} and {other}; "
           "these scans are kept on one side of a split, and in test they count as seen in training")


# ---------------------------------------------------------------- who was seen in training


def record_exposure(index):
    """Who is in an index, as a checkpoint keeps it, so that predict.py can tell a test from a memory: fingerprints of
    subjects, scans and slices, not names (which spares the reader the names, but does not hide them from somebody who
    tries all ids), and whether a subject is unknown."""
    return {
        "subjects": sorted(map(fingerprint, index.subject.dropna().map(spelling).unique())),
        "scans": sorted(map(fingerprint, index.scan.unique())),
        "slices": sorted(set(index.pixel_hash) - {""}),
        "unknown": bool(index.subject.isna().any()),
    }


def merge_exposure(one, other):
    """Two records of `record_exposure` as one."""
    return {name: value or other[name] if name == "unknown" else sorted({*value, *other[name]})
            for name, value in one.items()}


def find_exposure(table, recorded):
    """Whether the model's training has seen each row of a table: "yes", "no" or "unknown", an array.

    `recorded` (of `record_exposure`) is about train and val. A row was seen if its subject, its scan, or any slice of
    its group is among them; unknown if its own subject, or that of any training scan, is not known.
    """
    known = table.subject.notna()
    names = table.subject.astype(object)
    seen = known & (names.map(spelling).map(fingerprint).isin(recorded["subjects"])
                    | names.map(fingerprint).isin(recorded["subjects"]))  # as older checkpoints have them
    seen |= table.scan.map(fingerprint).isin(recorded["scans"]) | table.pixel_hash.isin(recorded["slices"])
    seen = table.group.isin(table.group[seen])
    return np.select([seen.to_numpy(bool), (~known | recorded["unknown"]).to_numpy(bool)], ["yes", "unknown"], "no")


def describe_transfer(index, init):
    """A line for each part of the data whose subjects the weights of --init were trained on. `init` is that of
    `checkpoint.start_model`."""
    for split in ("val", "test") if init and init["exposure"] else ():
        part = index[index.split == split]
        shared = part.scan[find_exposure(part, init["exposure"]) == "yes"].nunique()
        if shared:
            yield (f"LEAK BY TRANSFER: --init was trained on subjects of {shared} of the {part.scan.nunique()} scans "
                   f"of {split}")

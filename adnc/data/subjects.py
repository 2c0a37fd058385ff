"""Groups of slices that belong together, the split by subject, exposure to training.

Functions of the index, a DataFrame with a row per slice.
"""

import os
import re
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from adnc.errors import InputError, count
from adnc.files import fingerprint, read_table, same_name

MIN_VALIDATION_GROUPS = 5  # of each class; with fewer a warning

# ---------------------------------------------------------------- names of subjects

# Spellings of the ids of subjects in the archives and in BIDS, each with its usual form.
ARCHIVES = (
    (r"(?:sub-)?(?:ADNI)?(\d{3})_?S_?(\d{4,5})", r"\1_S_\2"),
    (r"(?:sub-)?(OAS[12])_?(\d{4})", r"\1_\2"),
    (r"(?:sub-)?(OAS[34]\d{4})", r"\1"),
)


def archive_id(subject):
    """The id of a subject of ADNI or OASIS in the form of its archive, or None for any other name:
    002_S_6795 for sub-ADNI002S6795. Such an id means the same person in every set of data."""
    for form, template in ARCHIVES:
        match = re.fullmatch(form, str(subject))
        if match:
            return match.expand(template)
    return None


def set_root(path):
    """The folder of the set that a path belongs to: AD_NC for AD_NC/test/AD/x.jpeg, else its own
    folder."""
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        folder = folder.parent
    while folder.name.lower() in ("train", "test", "ad", "nc"):
        folder = folder.parent
    return folder


# ---------------------------------------------------------------- groups


def assign_groups(table):
    """The table with the column `group`: slices that a split must keep together.

    A group is the subject, or the scan if the subject is unknown; groups that share a slice pixel
    for pixel (column pixel_hash, "" if unknown) become one, named after the first. Split, folds,
    intervals, calibration and prediction sets read this column.
    """
    groups = table.subject.fillna("scan " + table.scan).astype(str)
    if not table.pixel_hash[table.pixel_hash != ""].duplicated().any():
        return table.assign(group=groups)

    # A graph of groups and pictures: every connected component is one group.
    names, group_number = np.unique(groups, return_inverse=True)
    pictures = table.pixel_hash.where(table.pixel_hash != "", table.path)
    pictures, picture_number = np.unique(pictures, return_inverse=True)
    n_nodes = len(names) + len(pictures)
    edges = (np.ones(len(table)), (group_number, len(names) + picture_number))
    graph = coo_array(edges, shape=(n_nodes, n_nodes))
    component = connected_components(graph, directed=False)[1][: len(names)]
    _, first = np.unique(component, return_index=True)
    return table.assign(group=names[first[component[group_number]]])


# ---------------------------------------------------------------- split


def drop_test_subjects(index):
    """Drop the groups from split "train" that are also in "test".

    Returns (index, number of scans left out). InputError if no subject is known.
    """
    if index.subject.isna().all():
        raise InputError(
            "no subject is known, so none can be dropped; add meta_data_with_label.json or "
            "subjects.csv, name a --subject-pattern, or leave out --drop-test-subjects"
        )
    in_test = index.group.isin(index.group[index.split == "test"])
    dropped = (index.split == "train") & in_test
    return index[~dropped], index.scan[dropped].nunique()


def take_subjects(index, n, seed=0):
    """Keep n groups of split "train", in the proportion of the classes, chosen by the seed.

    A smaller n keeps a part of what a larger n keeps, as learning curves need it. InputError if
    there are fewer than n groups.
    """
    label = index[index.split == "train"].groupby("group").label.first()
    if n > len(label):
        raise InputError(f"--subjects is {n}, but train/ has {len(label)}; expected no more")
    # In a random order, the r-th subject of a class gets the position (r + 0.5) / (share of the
    # class); the first n positions then hold the classes in their proportion.
    order = np.random.default_rng(seed).permutation(len(label))
    rank = label.iloc[order].groupby(label.iloc[order]).cumcount()
    share = label.map(label.value_counts()) / len(label)
    kept = ((rank + 0.5) / share.loc[rank.index]).sort_values(kind="stable").index[:n]
    return index[(index.split != "train") | index.group.isin(kept)]


def split_units(index, by):
    """What a split keeps together: the group, or with by="slice" each slice by itself."""
    if by not in ("subject", "slice"):
        raise InputError(f"there is no split by {by!r}; choose subject or slice")
    return index.group if by == "subject" else index.path


def split_index(index, val_fraction=0.1, by="subject", seed=0):
    """Turn `val_fraction` of split "train" into split "val", stratified by class; returns a new
    DataFrame.

    by="subject" keeps a group whole (see `assign_groups`); by="slice" is the naive split that
    leaks, for showing the leak. In each class groups are taken in a seeded random order until the
    number of slices is nearest to the fraction: at least one group, and at least one stays in
    train. A class with a single group stays in train.
    """
    if not 0 <= val_fraction < 1:
        raise InputError(
            f"the validation fraction is {val_fraction}; expected at least 0 and less than 1"
        )
    index = index.copy()
    train = index[index.split == "train"]
    sizes = train.label.groupby(split_units(train, by)).agg(["min", "size"])
    generator = np.random.default_rng(seed)
    for _, part in sizes.groupby("min"):
        if len(part) < 2 or val_fraction == 0:
            continue
        part = part.iloc[generator.permutation(len(part))]
        n_slices = part["size"].cumsum().to_numpy()
        take = 1 + int(np.abs(n_slices[:-1] - val_fraction * n_slices[-1]).argmin())
        chosen = split_units(index, by).isin(part.index[:take])
        index["split"] = index.split.mask((index.split == "train") & chosen, "val")
    if by == "subject":
        check_disjoint(index)
    return index


def fold_index(index, fold, folds, by="subject", seed=0):
    """Fold `fold` (0 to folds - 1) of a cross-validation over split "train".

    scikit-learn's StratifiedGroupKFold makes the folds. The fold becomes split "test", and the rows
    of the official test set are dropped. Epochs are still chosen on a "val" that `split_index`
    takes from the rest, never on the fold itself.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(
            f"there is no fold {fold} of {folds}; folds count from 0, and there are at least 2"
        )
    index = index[index.split == "train"].copy()
    units = split_units(index, by)
    fewest = units.groupby(index.label).nunique().min()
    if fewest < folds:
        raise InputError(
            f"{folds} folds need {folds} groups in each class; the smaller class has {fewest}"
        )
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    held_out = list(kfold.split(index, index.label, units))[fold][1]
    index["split"] = np.where(np.isin(np.arange(len(index)), held_out), "test", index.split)
    return index


UNUSED = "unused"  # in a split.csv: a slice that is in no part, as with --subjects


def read_split(index, file, root):
    """The index with the split (train, val or test) that a split.csv gives each file, by its path
    below `root`, without the files that are UNUSED.

    The file comes from an earlier run or was made by hand; its columns path and split are read.
    InputError if it does not name the slices of the index, each once, or if a group is in both
    train and val, or a scan in both test and another split.
    """
    given = read_table(file, ("path", "split"))
    given["path"] = given.path.map(comparable_path, na_action="ignore")
    given["split"] = given.split.str.lower()
    in_a_split = given.split.isin(["train", "val", "test", UNUSED])
    valid = in_a_split & given.path.notna() & ~given.path.duplicated()
    if not valid.all():
        row = given[~valid].iloc[0]
        raise InputError(
            f"--split {file}: {(~valid).sum()} rows, first {row.path} with split {row.split}, are "
            "not usable; expected each path once, in train, val or test, or unused"
        )

    paths = index.path.map(lambda path: comparable_path(os.path.relpath(path, root)))
    missing = sorted(set(paths) - set(given.path))
    unknown = sorted(set(given.path) - set(paths))
    expected = f"expected the same slices, by paths such as {paths.iloc[0]}"
    if missing:
        raise InputError(
            f"--split {file}: {len(missing):,} of the slices under {root} are not in it, first "
            f"{missing[0]}; {expected}"
        )
    if unknown:
        raise InputError(
            f"--split {file}: {len(unknown):,} of its slices are not under {root}, or not usable, "
            f"first {unknown[0]}; {expected}"
        )

    index = index.assign(split=paths.map(dict(zip(given.path, given.split))).to_numpy(str))
    index = index[index.split != UNUSED]
    shared = shared_values(index, "group", "train", "val")
    if shared:
        raise InputError(
            f"--split {file} has {len(shared)} groups in both train and val, first {shared[0]}; "
            "expected all scans of a subject, and copies of a scan, on one side"
        )
    merged = index.assign(split=index.split.replace("val", "train"))
    shared = shared_values(merged, "scan", "train", "test")
    if shared:
        raise InputError(
            f"--split {file} has {len(shared)} scans in both test and train or val, first "
            f"{shared[0]}; expected all slices of a scan on one side"
        )
    return index


def comparable_path(path):
    """A path in the spelling of `same_name`, whatever system wrote it."""
    return os.path.normpath(same_name(path).replace("\\", "/"))


def shared_values(index, column, one, other):
    """The known values of a column that are in both splits, sorted."""
    values = [index[column][index.split == split].dropna() for split in (one, other)]
    return sorted(set(values[0]) & set(values[1]))


def check_disjoint(index):
    """Raise RuntimeError if train and val share a subject, a scan or a group."""
    for column in ("subject", "scan", "group"):
        shared = shared_values(index, column, "train", "val")
        if shared:
            raise RuntimeError(
                f"train and val share {len(shared)} {column}s, first {shared[0]}; the split leaks"
            )


def shared_subjects(index):
    """The subjects that are in both test and train (or val), sorted."""
    return shared_values(
        index.assign(split=index.split.replace("val", "train")), "subject", "train", "test"
    )


def split_hash(index):
    """A fingerprint of the split: 16 hex digits of the sorted lines split/label/group/file."""
    files = index.path.map(os.path.basename)
    lines = index.split.str.cat([index.label, index.group.astype(str), files], sep="/")
    return fingerprint("\n".join(sorted(lines)), 16)


# ---------------------------------------------------------------- the split in words


def describe_split(index, by, dropped=None):
    """Lines on the sizes of the splits and on leaks.

    `dropped` is the number of scans that `drop_test_subjects` left out, or None.
    """
    parts = []
    for split in ("train", "val", "test"):
        part = index[index.split == split]
        scans = count(part.scan.nunique(), "scan")
        known = count(part.subject.nunique(), "known subject")
        parts.append(f"{split} {count(len(part), 'slice')} of {scans}, {known}")
    yield "; ".join(parts)
    n_unknown = index.scan[index.subject.isna()].nunique()
    if by == "slice":
        yield (
            "LEAKY SPLIT: train and val share scans (--split-by slice); do not believe the scores "
            "on val"
        )
    elif n_unknown:
        yield (
            f"{n_unknown} scans have no known subject: they are split by scan, and subjects may be "
            "shared"
        )
    n_shared = len(shared_subjects(index))
    if n_shared:
        yield (
            f"LEAK IN THE DATA: {n_shared} test subjects are also in train; scores on the other "
            "test subjects are reported separately (without --split and --folds, "
            "--drop-test-subjects trains without the shared ones)"
        )
    if dropped is not None:
        yield f"left out of train: {dropped} scans of subjects that are also in test"
    yield from describe_both_classes(index)
    yield from describe_copies(index)


def describe_validation(index):
    """A line if validation has too few groups of a class to choose anything on."""
    groups = index[index.split == "val"].drop_duplicates("group").label.value_counts()
    if groups.min() < MIN_VALIDATION_GROUPS:
        counts = ", ".join(f"{n} {label}" for label, n in groups.sort_index().items())
        yield (
            f"WARNING: validation has only {counts} subjects. The temperature and the prediction "
            "sets rest on them, and without --keep last the epoch, too; "
            f"{MIN_VALIDATION_GROUPS} or more of each class are better: raise --val-fraction"
        )


def loose_name(subject):
    """A name without what is easily written in two ways: case, blanks, dashes, leading zeros."""
    text = re.sub(r"[\W_]+", "_", same_name(subject).casefold()).removeprefix("sub_")
    return re.sub(r"(?<!\d)0+(?=\d)", "", text)


# Scans of one subject, if they are also a tenth of all and twice those of the next one: the subject
# may be a word for "unknown".
MANY_SCANS = 5


def describe_doubtful_names(index):
    """Lines on subjects that may be one person in two spellings, or no person."""
    identified = index.dropna(subset="subject")
    names = identified.subject.drop_duplicates()
    for _, alike in names.groupby(names.map(loose_name)):
        if len(alike) > 1:
            yield (
                f"SUSPICIOUS: the subjects {' and '.join(alike[:2])} differ only in case, blanks, "
                "dashes or zeros: if they are one person, write them alike in the table"
            )
            break
    n_scans = identified.groupby("subject").scan.nunique().sort_values()
    if len(n_scans) < 2:
        return
    second, most = n_scans.iloc[-2:]
    if most >= max(MANY_SCANS, 0.1 * index.scan.nunique(), 2 * second):
        yield (
            f"SUSPICIOUS: {most} of {index.scan.nunique()} scans have the subject "
            f"{n_scans.index[-1]}: is it a word for an unknown one? Then leave its cells empty"
        )


def describe_both_classes(index):
    """A line on subjects with scans of both classes, if any; AD_NC has none."""
    n_classes = index.dropna(subset="subject").groupby("subject").label.nunique()
    both = n_classes.index[n_classes > 1]
    if len(both):
        yield (
            f"SUSPICIOUS: {len(both)} subjects have scans of both classes, first {both[0]}; is the "
            "id really that of one person?"
        )


def describe_copies(index):
    """Lines on slices that are equal, pixel for pixel, in two scans: one brain under two names."""
    slices = index[index.pixel_hash != ""].drop_duplicates(["scan", "pixel_hash"])
    copies = slices[slices.duplicated("pixel_hash", keep=False)]
    if copies.empty:
        return
    by_picture = copies.groupby("pixel_hash")
    in_both_classes = by_picture.filter(lambda part: part.label.nunique() > 1)
    if len(in_both_classes):
        first = in_both_classes[in_both_classes.pixel_hash == in_both_classes.pixel_hash.iloc[0]]
        one, other = first.drop_duplicates("label").path
        yield (
            f"SUSPICIOUS: {in_both_classes.pixel_hash.nunique()} slices are in both classes, pixel "
            f"for pixel, first {one} and {other}; one of the two labels is wrong"
        )
    leaks = by_picture.filter(lambda part: "test" in set(part.split) and part.split.nunique() > 1)
    part, where = copies, "slices are in two scans, pixel for pixel"
    if len(leaks):
        part, where = leaks, "LEAK: slices of test are copies, pixel for pixel, of slices in train"
    one, other = part[part.pixel_hash == part.pixel_hash.iloc[0]].path.iloc[:2]
    yield (
        f"{where}: {part.pixel_hash.nunique()} slices of {part.scan.nunique()} scans, first {one} "
        f"and {other}; a split by subject keeps these scans together in train or val, and those in "
        "test count as seen in training"
    )


# ---------------------------------------------------------------- exposure


def record_exposure(index, drawn=False):
    """What training has seen, for the checkpoint: fingerprints of subjects, scans, slices and of
    the folder of the set, whether a subject is unknown, and whether all slices are drawings.

    Fingerprints keep names out of the file. They are no encryption: a reader can try all ids.
    """
    return {
        "subjects": sorted(map(fingerprint, index.subject.dropna().unique())),
        "scans": sorted(map(fingerprint, index.scan.unique())),
        "slices": sorted(set(index.pixel_hash) - {""}),
        "sets": sorted(set(set_fingerprints(index.path))),
        "unknown": bool(index.subject.isna().any()),
        "drawn": drawn,
    }


def set_fingerprints(paths):
    """The fingerprint of the `set_root` of each of a Series of paths."""
    folders = paths.map(os.path.dirname)
    roots = {folder: fingerprint(str(set_root(folder or "."))) for folder in folders.unique()}
    return folders.map(roots)


def merge_exposure(one, other):
    """Two records of `record_exposure` as one."""
    names = ("subjects", "scans", "slices", "sets")
    merged = {name: sorted({*one[name], *other[name]}) for name in names}
    drawn = one.get("drawn", False) and other.get("drawn", False)
    return {**merged, "unknown": one["unknown"] or other["unknown"], "drawn": drawn}


def same_names(table, recorded):
    """Whether each row has the name of a subject or scan in training, (N,), and whether that name
    identifies it: an id of an archive, or any name in the same set of data."""
    has_subject = table.subject.notna()
    subject = has_subject & table.subject.astype(object).map(fingerprint).isin(recorded["subjects"])
    same_set = set_fingerprints(table.path).isin(recorded["sets"])
    identified = subject & (same_set | table.subject.map(archive_id).notna())
    scan = table.scan.map(fingerprint).isin(recorded["scans"])
    return subject | scan, identified | (scan & same_set)


def find_exposure(table, recorded):
    """Whether training has seen each row of a table: an array of "yes", "no" or "unknown".

    `recorded` (of `record_exposure`) covers train and val. A row was seen if its subject, its scan,
    or any slice of its group is among them. It is unknown if its own subject, or that of any
    training scan, is not known, and if it has only the name of one of them: sub-1 of another set of
    data is another person. Drawings are of no subject, whatever their names are.
    """
    named, identified = same_names(table, recorded)
    seen = identified | table.pixel_hash.isin(recorded["slices"])
    seen = table.group.isin(table.group[seen])
    unknown = table.subject.isna() | recorded["unknown"] | named
    if recorded.get("drawn"):
        unknown[:] = False
    return np.select([seen.to_numpy(bool), unknown.to_numpy(bool)], ["yes", "unknown"], "no")


def describe_same_names(table, recorded):
    """A line on rows that have only the name of a subject or scan in training."""
    named, identified = same_names(table, recorded)
    doubtful = table[named & ~identified & (find_exposure(table, recorded) == "unknown")]
    if len(doubtful):
        row = doubtful.iloc[0]
        name = row.subject if isinstance(row.subject, str) else row.scan
        yield (
            f"{doubtful.scan.nunique()} scans have the name of a subject or scan in training, such "
            f"as {name}, but are of another folder: whether they are the same person is unknown"
        )


def describe_shared_names(index, inputs):
    """Lines on subjects whose name, which is no id of an archive, is in several INPUTs of a
    prediction, and on scans of unknown subjects of which this is so: they count as one."""
    roots = {"subject": {}, "scan": {}}  # of each name, the folders in which it is
    for given in dict.fromkeys(str(Path(given)) for given in inputs):
        inside = index[(index.path == given) | index.path.str.startswith(f"{given}/")]
        names = {"subject": inside.subject.dropna(), "scan": inside.scan[inside.subject.isna()]}
        for unit in roots:
            for name in names[unit].unique():
                roots[unit].setdefault(name, set()).add(str(set_root(given)))
    for unit, folders in roots.items():
        shared = [name for name in folders if len(folders[name]) > 1 and archive_id(name) is None]
        if shared:
            first, second, *_ = sorted(folders[shared[0]])
            yield (
                f"{unit} {shared[0]} is in {first} and in {second}, and counts as one {unit} "
                f"(names in several folders: {len(shared)}); if these are different {unit}s, "
                "predict the folders apart"
            )


def describe_transfer(index, init):
    """A line for each split with subjects that the weights of --init were trained on.

    `init` is a dict with the exposure of these weights (of `record_exposure`, or None), or None.
    """
    if not init or not init["exposure"]:
        return
    for split in ("val", "test"):
        part = index[index.split == split]
        n_seen = part.scan[find_exposure(part, init["exposure"]) == "yes"].nunique()
        if n_seen:
            yield (
                f"LEAK BY TRANSFER: --init was trained on subjects of {n_seen} of the "
                f"{part.scan.nunique()} scans of {split}"
            )

"""The data: an index of slices, their subjects, the audit, the split, and who was seen in training.

    python dataset.py AD_NC            # the audit: what the folder holds, and where its subjects leak

    index = read_index("ADNI/AD_NC")   # a DataFrame, a row a slice: path, label, scan, slice, subject, split
    index = split_index(index)         # 10 % of the training subjects become split "val"

The set is AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg. A scan is not a patient: who is in a scan is known only from
meta_data_with_label.json or subjects.csv beside AD_NC, and without them the audit says what could not be checked.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def _end_quietly(kind, problem, trace):
    """Ctrl-C while a script still imports is no error to be looked into; its exit status is 130 all the same."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, problem, trace)


sys.excepthook = _end_quietly  # before the imports that take time

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from slices import fingerprint_file, header  # noqa: E402

CLASSES = ("NC", "AD")  # the position is the class number of the model; AD is the positive class
EXTENSIONS = (".jpeg", ".jpg", ".png")


# ---------------------------------------------------------------- the command line of every script


class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring as the manual; wrong usage is one `error: ...` line and status 2."""

    def __init__(self, manual):
        super().__init__(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {printable(message)}\n")


def printable(text, breaks="\n"):
    """Text for a terminal: what does not print (control characters, bytes that are no UTF-8) becomes an escape."""
    return "".join(c if c.isprintable() or c in breaks else ascii(c)[1:-1] for c in str(text))


def run(main, args):
    """Run a script's main; wrong input ends it with one `error: ...` line and status 2, without a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know all letters of a name
    try:
        main(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as problem:
        print(f"error: {printable(problem) or type(problem).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- index


def is_junk(name):
    """Leftovers of archives and tools: .DS_Store, ._x.jpeg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def parse_name(path):
    """`<scan>_<slice>.jpeg` -> (scan, slice), the scan being all before the last underscore; None for another form."""
    match = re.fullmatch(r"(.+)_(\d{1,9})", Path(path).stem, re.DOTALL)  # more digits are an id, no slice number
    return (match[1], int(match[2])) if match else None


def list_images(folder):
    """The image files right in `folder`, sorted by name, junk and other files passed over."""
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(EXTENSIONS) and not is_junk(entry.name) and not entry.is_dir()
    )


def read_subjects(root):
    """Who is in each scan, from a file in `root` or beside it.

    Returns (subjects, labels, source): two dicts from scan id to subject and to class name, and the path of the file
    read: meta_data_with_label.json (ADNI; the subject is the `ddd_S_dddd` in a file name of the entry), else
    subjects.csv (columns scan and subject), else None and empty dicts.
    """
    root = Path(root)
    folders = (root, root.parent if root.name not in ("", "..") else root.resolve().parent)
    for path in (folder / "meta_data_with_label.json" for folder in folders):
        if path.is_file():
            return *_subjects_from_json(path), path
    for path in (folder / "subjects.csv" for folder in folders):
        if path.is_file():
            try:
                table = pd.read_csv(path, dtype=str, keep_default_na=False)  # a scan may be named NA
                table = table.apply(lambda column: column.str.strip()).replace("", None)
            except ValueError as problem:
                reason = str(problem).strip()
                raise ValueError(f"{path} cannot be read ({reason}); expected the columns scan and subject") from None
            if not {"scan", "subject"} <= set(table.columns):
                raise ValueError(f"{path} has the columns {', '.join(table.columns)}; expected scan and subject")
            known = table.dropna(subset=["scan", "subject"]).drop_duplicates(["scan", "subject"])
            twice = known.scan[known.scan.duplicated()]
            if len(twice):
                raise ValueError(f"{path} gives scan {twice.iloc[0]} to two subjects; expected one row a scan")
            return dict(zip(known.scan, known.subject)), {}, path
    return {}, {}, None


def _subjects_from_json(path):
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError(f"but a {type(entries).__name__}")
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not a JSON object of scans ({problem}); mend it or move it away") from None
    subjects, labels = {}, {}
    for scan, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {}
        names = " ".join(os.path.basename(value) for value in entry.values() if isinstance(value, str))
        found = set(re.findall(r"ADNI_(\d{3}_S_\d{4,5})_", names))
        if len(found) > 1:
            raise ValueError(f"{path} names two subjects in scan {scan} ({', '.join(sorted(found))}); expected one")
        if found:
            subjects[scan] = found.pop()
        if "label" in entry:
            labels[scan] = {"0": "NC", "1": "neither", "2": "AD"}.get(str(entry["label"]), f"label {entry['label']}")
    return subjects, labels


def describe_bad(bad, advice="mend or remove them"):
    """Lines on files that cannot be used, (path, reason) each: how many there are, and the first ten."""
    lines = [f"{len(bad):,} file{'s' * (len(bad) > 1)} cannot be used; {advice}:"]
    lines += [f"  {printable(path, '')} {printable(reason, '')}" for path, reason in bad[:10]]
    return "\n".join(lines + [f"  ... and {len(bad) - 10:,} more"] * (len(bad) > 10))


def read_index(root, bad=None):
    """Index the slices under `root`, a folder AD_NC with {train,test}/{AD,NC}/<scan>_<slice>.jpeg.

    Returns a DataFrame with a row a slice, ordered by split, label, scan and slice: path (opens from here), label
    ("AD" or "NC"), scan, slice (int), subject (<NA> where no metadata maps the scan) and split ("train" or "test").
    `index.attrs` tells the root and the file the subjects came from. Raises ValueError on a folder of another form.

    Files of another name, folders, slices that are there twice and scans that stand in two classes, in train and test,
    or in another class than the metadata say, cannot be used: a ValueError, or with a list `bad` they are left out and
    (path, reason) is appended to it. Whether the files hold images is not looked at.
    """
    root, found = Path(root), [] if bad is None else bad
    if not (root / "train").is_dir() and (root / "AD_NC").is_dir():
        root = root / "AD_NC"
    rows = []
    for split in ("train", "test"):
        for label in ("AD", "NC"):
            folder = root / split / label
            if not folder.is_dir():
                raise ValueError(f"{folder} is not a folder; expected AD_NC with train/AD, train/NC, test/AD, test/NC")
            images = list_images(folder)
            nested = sorted(e.path for e in os.scandir(folder) if e.is_dir() and not is_junk(e.name))
            found += [(path, f"is a folder; expected only files <scan>_<slice>.jpeg in {label}") for path in nested]
            if not images and not nested:
                raise ValueError(f"{folder} holds no images (.jpeg, .jpg, .png); expected files <scan>_<slice>.jpeg")
            for path in images:
                name = parse_name(path)
                if name is None:
                    found.append((path, "is not named <scan>_<slice>, as 218391_78.jpeg is"))
                else:
                    rows.append((path, label, *name, split))
    index = pd.DataFrame(rows, columns=["path", "label", "scan", "slice", "split"])
    subjects, labels, source = read_subjects(root)
    index["subject"] = index.scan.map(subjects).astype("string")
    index = _consistent(index, labels, source, found)
    if found and (bad is None or index.empty):
        raise ValueError(describe_bad(found))
    index = index.sort_values(["split", "label", "scan", "slice"], ignore_index=True)
    index = index[["path", "label", "scan", "slice", "subject", "split"]]
    index.attrs = {"root": str(root), "subjects_from": str(source) if source else None}
    return index


def _consistent(index, labels, source, found):
    """The index without what contradicts itself or the metadata; appends (path, reason) of that to `found`."""
    reason = pd.Series("", index=index.index)
    for column, what in (("label", "both classes"), ("split", "both train and test")):
        several = index.groupby("scan")[column].transform("nunique") > 1
        others = index[several].groupby(["scan", column]).path.first()
        for row in index[several].itertuples():
            other = next(path for value, path in others[row.scan].items() if value != getattr(row, column))
            reason[row.Index] = f"is of scan {row.scan}, which stands in {what} (there as {other})"
    twice = index.duplicated(["scan", "slice"], keep=False) & (reason == "")
    for _, paths in index[twice].groupby(["scan", "slice"]).path:
        others = [paths.iloc[1]] + [paths.iloc[0]] * (len(paths) - 1)
        reason[paths.index] = [f"is the same slice of a scan as {other}" for other in others]
    told = index.scan.map(labels)
    wrong = told.notna() & (told != index.label) & (reason == "")
    reason[wrong] = [f"is in folder {label}, but {source} says {other}"
                     for label, other in zip(index.label[wrong], told[wrong])]
    found += zip(index.path[reason != ""], reason[reason != ""])
    return index[reason == ""]


# ---------------------------------------------------------------- audit


def window_vote(index):
    """Scan accuracy on test of a vote on the slice window alone (the lowest slice number of a scan), fitted on train.

    What a model can get from the choice of slices without looking at anatomy; windows unseen in train count as the
    larger class of train. Returns a fraction of the test scans.
    """
    scans = index.groupby(["split", "scan"]).agg(label=("label", "first"), window=("slice", "min")).reset_index()
    train, test = scans[scans.split == "train"], scans[scans.split == "test"]
    majority = train.label.mode()[0]
    vote = train.groupby("window").label.agg(lambda labels: labels.mode()[0])
    return float((test.window.map(vote).fillna(majority) == test.label).mean())


def describe_copies(index):
    """Lines on slices that are equal, pixel for pixel, in two scans (column pixels): one brain under two names."""
    found = index[index.pixels != ""].drop_duplicates(["scan", "pixels"])
    found = found[found.duplicated("pixels", keep=False)]
    if found.empty:
        return
    across = found.groupby("pixels").split.agg(lambda splits: "test" in set(splits) and len(set(splits)) > 1)
    leak = found[found.pixels.isin(across.index[across])]
    part = leak if len(leak) else found
    one, other = part[part.pixels == part.pixels.iloc[0]].path.iloc[:2]
    where = "LEAK: slices of test are copies, pixel for pixel, of slices in train" if len(leak) else (
        "slices stand in two scans, pixel for pixel")
    yield (f"{where}: {part.pixels.nunique()} slices of {part.scan.nunique()} scans, first {one} and {other}; "
           "these scans are kept on one side of a split, and in test they count as seen in training")


def shared_subjects(index):
    """The subjects that stand in both train (or val) and test, sorted."""
    known = index.dropna(subset="subject")
    test = known.split == "test"
    return sorted(set(known.subject[test]) & set(known.subject[~test]))


def audit(index):
    """What the index holds and where it leaks, as lines of text for people. Decodes each file once."""
    yield f"{index.attrs.get('root', 'index')}: {len(index):,} slices of {index.scan.nunique():,} scans"
    source = index.attrs.get("subjects_from")
    unmapped = index.scan[index.subject.isna()].nunique()
    yield f"subjects from {source}" if source else "no meta_data_with_label.json or subjects.csv: subjects unknown"
    yield ""
    yield f"{'':<8}{'slices':>10}{'scans':>8}{'subjects':>10}"
    for (split, label), part in index.groupby(["split", "label"]):
        subjects = part.subject.nunique() if part.subject.notna().any() else "?"
        yield f"{split + ' ' + label:<8}{len(part):>10,}{part.scan.nunique():>8,}{subjects:>10}"
    yield ""
    per_scan = index.groupby("scan").size().value_counts().sort_index()
    yield "slices a scan: " + ", ".join(f"{n} ({scans} scans)" for n, scans in per_scan.items())
    yield f"slice numbers: {index.slice.min()} to {index.slice.max()}"
    with ThreadPoolExecutor() as pool:
        headers = Counter(pool.map(header, index.path))
        index = index.assign(pixels=list(pool.map(fingerprint_file, index.path)))
    kinds = ((f"{h[0]} wide x {h[1]} high, mode {h[2]}" if h else "UNREADABLE", n) for h, n in headers.most_common())
    yield "image sizes: " + ", ".join(f"{kind} ({n:,} slices)" for kind, n in kinds)
    majority = index[index.split == "train"].drop_duplicates("scan").label.mode()[0]
    test_scans = index[index.split == "test"].drop_duplicates("scan")
    yield (
        f"a vote on the slice window alone is right on {window_vote(index):.3f} of the {len(test_scans)} test scans; "
        f"always {majority} on {(test_scans.label == majority).mean():.3f}"
    )
    if unmapped:
        yield (
            f"NOT CHECKED: {unmapped} of {index.scan.nunique()} scans have no known subject; whether train and test "
            "share these patients cannot be told, and a split treats each such scan as a subject of its own"
        )
    test_subjects = index[index.split == "test"].subject.nunique()
    shared = shared_subjects(index)
    if shared:
        yield (
            f"LEAK: {len(shared)} of the {test_subjects} test subjects also stand in train: "
            "figures on all of test are too high; look at those on subjects not seen in training"
        )
    elif test_subjects:
        yield f"none of the {test_subjects} known test subjects stands in train"
    yield from describe_copies(index)
    both = index.dropna(subset="subject").groupby("subject").label.nunique()
    if (both > 1).any():
        yield f"{(both > 1).sum()} subjects have scans of both classes, first {both.index[both > 1][0]}"


# ---------------------------------------------------------------- split


def _groups(index, by):
    """What a split keeps together: the subject (the scan where the subject is unknown), or each slice by itself.

    Where the index has fingerprints of its slices (column pixels), groups that hold the same slice become one.
    """
    if by == "slice":
        return index.path
    if by != "subject":
        raise ValueError(f"a split by {by!r} is not known; choose subject or slice")
    groups = index.subject.fillna("scan " + index.scan).astype(str)
    if "pixels" not in index or not index.pixels[index.pixels != ""].duplicated().any():
        return groups
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    # a graph of groups and pictures; what hangs together is one group, under the name of its first
    names, group = np.unique(groups, return_inverse=True)
    pictures, picture = np.unique(index.pixels.where(index.pixels != "", index.path), return_inverse=True)
    n = len(names) + len(pictures)
    graph = coo_array((np.ones(len(index)), (group, len(names) + picture)), shape=(n, n))
    part = connected_components(graph, directed=False)[1][: len(names)]
    _, first = np.unique(part, return_index=True)
    return pd.Series(names[first[part[group]]], index=index.index)


def drop_test_subjects(index):
    """Leave out of split "train" who also stands in "test" (or whose slices do). Returns (index, number of scans left
    out). Where no subject is known, ValueError."""
    if index.subject.isna().all():
        raise ValueError("which subjects stand in train and test is unknown: there is no meta_data_with_label.json or "
                         "subjects.csv; without one, test subjects cannot be dropped from training")
    groups = _groups(index, "subject")
    out = (index.split == "train") & groups.isin(groups[index.split == "test"])
    return index[~out], index.scan[out].nunique()


def split_index(index, val_fraction=0.1, by="subject", seed=0):
    """Turn `val_fraction` of split "train" into split "val", stratified by class; returns a new DataFrame.

    by="subject" keeps a subject whole (a scan, where its subject is unknown); by="slice" is the naive split that leaks,
    for showing the leak. In each class groups are taken in a seeded random order until the number of slices is nearest
    to the fraction: at least one, and at least one stays in train. A class with a single group stays in train.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the validation fraction is {val_fraction}; expected at least 0 and less than 1")
    index = index.copy()
    train = index[index.split == "train"]
    groups = _groups(train, by)
    sizes = pd.DataFrame({"group": groups, "label": train.label}).groupby("group").label.agg(["min", "size"])
    generator = np.random.default_rng(seed)
    for _, part in sizes.groupby("min"):
        if len(part) < 2 or val_fraction == 0:
            continue
        part = part.iloc[generator.permutation(len(part))]
        slices = part["size"].cumsum().to_numpy()
        take = 1 + int(np.abs(slices[:-1] - val_fraction * slices[-1]).argmin())
        index.loc[train.index[groups.isin(part.index[:take])], "split"] = "val"
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
        raise ValueError(f"fold {fold} of {folds} does not exist; folds count from 0, and there are at least 2")
    index = index[index.split == "train"].copy()
    groups = _groups(index, by)
    fewest = pd.DataFrame({"group": groups, "label": index.label}).groupby("label").group.nunique().min()
    if fewest < folds:
        raise ValueError(f"{folds} folds need {folds} groups in each class; the smaller class has {fewest}")
    kfold = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    held_out = list(kfold.split(index, index.label, groups))[fold][1]
    index.loc[index.index[held_out], "split"] = "test"
    return index


def check_disjoint(index):
    """Raise RuntimeError if train and val share a subject, a scan, or a slice under two names."""
    for unit, name in (("subject", "subjects"), ("scan", "scans"), ("pixels", "slices")):
        if unit not in index:
            continue
        known = index[index[unit].notna() & (index[unit] != "")]
        shared = set(known[unit][known.split == "train"]) & set(known[unit][known.split == "val"])
        if shared:
            raise RuntimeError(f"train and val share {len(shared)} {name}, first {min(shared)}; the split leaks")


def split_hash(index):
    """A fingerprint of who is where: SHA-256 of the sorted lines split/label/file, 16 hex digits."""
    lines = sorted(index.split + "/" + index.label + "/" + index.path.map(os.path.basename))
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ---------------------------------------------------------------- who was seen in training


def fingerprint(name):
    """A scan or subject id as a checkpoint keeps it (SHA-256, 12 hex digits): spares the reader the names, but does not
    hide them from somebody who tries all ids."""
    return hashlib.sha256(str(name).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def remember(index):
    """Who stands in an index (with pixels), as a checkpoint keeps it, so that predict.py can tell a test from a memory:
    fingerprints of subjects, scans and slices, no names, and whether a subject is unknown."""
    return {
        "subjects": sorted(map(fingerprint, index.subject.dropna().unique())),
        "scans": sorted(map(fingerprint, index.scan.unique())),
        "slices": sorted(set(index.pixels) - {""}), "unknown": bool(index.subject.isna().any()),
    }  # fmt: skip


def mark_seen(table, seen):
    """What the model's training already knew: "yes", "no" or "unknown" for each row of a table (with pixels).

    `seen` of a checkpoint holds fingerprints of the subjects, scans and slices of train and val. A row is seen if its
    subject, its scan, or any slice of its scan is among them; unknown if its own subject, or that of any training scan,
    is not known.
    """
    known = table.subject.notna()
    same = table.subject.map(fingerprint, na_action="ignore").isin(seen["subjects"]) & known
    same |= table.scan.map(fingerprint).isin(seen["scans"]) | table.pixels.isin(seen.get("slices", []))
    groups = _groups(table, "subject")  # one brain may stand under two names, and all its scans are as seen as one
    same = groups.isin(groups[table.scan.isin(table.scan[same])])
    return np.select([same.to_numpy(bool), (~known | bool(seen["unknown"])).to_numpy(bool)], ["yes", "unknown"], "no")


def describe_split(index, by):
    """Lines that say who is where, and what could not be known."""
    parts = [f"{split} {len(part):,} slices of {part.scan.nunique()} scans, {part.subject.nunique()} known subjects"
             for split, part in index.groupby("split", sort=False)]
    lines = ["; ".join(parts)]
    unknown = index.scan[index.subject.isna()].nunique()
    if by == "slice":
        lines.append("LEAKY SPLIT: train and val share scans (--split-by slice); val figures are not to be believed")
    elif unknown:
        lines.append(f"{unknown} scans have no known subject: they are split by scan, and subjects may be shared")
    shared = len(shared_subjects(index))
    if shared:
        lines.append(f"LEAK IN THE DATA: {shared} test subjects also stand in train; those known to be unseen are "
                     "reported apart (--drop-test-subjects trains without them)")
    if index.attrs["dropped"] is not None:
        lines.append(f"left out of train: {index.attrs['dropped']} scans of subjects who also stand in test")
    return lines + list(describe_copies(index))


def describe_transfer(index, init):
    """A line for each part of the data whose subjects the weights of --init were trained on (`describe_model`)."""
    lines = []
    for split in ("val", "test") if init and init["seen"] else ():
        part = index[index.split == split]
        shared = part.scan[mark_seen(part, init["seen"]) == "yes"].nunique()
        if shared:
            lines.append(f"LEAK BY TRANSFER: --init was trained on subjects of {shared} of the "
                         f"{part.scan.nunique()} scans of {split}")
    return lines


def main(args):
    bad = []
    for line in audit(read_index(args.root, bad)):
        print(line)
    if bad:
        raise ValueError(describe_bad(bad, "mend or remove them, or train without them with --skip-bad"))


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("root", metavar="AD_NC", help="the folder with train/ and test/")
    run(main, parser.parse_args())

"""What is in folders: an index of files, before anything is decoded, for training and for prediction.

Not run by itself; dataset.py is its command. A folder or file that is not as expected is answered with what was found
and what to do; whatever is in a folder and no slice is counted.
"""

import os
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from adnc.data import metadata
from adnc.data.pixels import EXTENSIONS, list_folder, parse_name, passed_over
from adnc.data.subjects import assign_groups
from adnc.cli import CLASSES, InputError, printable

# ---------------------------------------------------------------- index

COLUMNS = ["path", "label", "scan", "slice", "subject", "split", "group"]


@dataclass
class Listing:
    """What is in folders, before anything is decoded. `index` has COLUMNS and error, the reason why a file cannot be
    used or <NA>; `sources` are the files that the subjects came from; `warnings` are lines on what was passed over
    or not understood."""

    index: pd.DataFrame
    root: str
    sources: list[Path]
    warnings: list[str]


def _tabulate(rows):
    """A table of rows (path, label, split, error): with scan and slice from the name, the path and <NA> where it has
    another form, and an error where rows contradict each other."""
    rows = [dict(zip(("path", "label", "split", "error"), row)) for row in rows]
    for row in rows:
        row["scan"], row["slice"] = parse_name(row["path"]) or (row["path"], None)
    for column, unit, text in (
            ("label", ["scan"], "is of scan {scan}, which is in both classes (there as {other})"),
            ("split", ["scan"], "is of scan {scan}, which is in both train and test (there as {other})"),
            ("path", ["scan", "slice"], "is the same slice of a scan as {other}")):
        found = defaultdict(dict)  # of each unit the values of the column, with the first path of each
        fine = [(row, found[tuple(row[name] for name in unit)]) for row in rows if row["error"] is None]
        for row, paths in fine:
            if row[column] is not None:
                paths.setdefault(row[column], row["path"])
        for row, paths in fine:
            if len(paths) > 1:
                other = next(path for value, path in paths.items() if value != row[column])
                row["error"] = text.format(other=other, **row)
    table = pd.DataFrame(rows, columns=["path", "label", "split", "error", "scan", "slice"])
    return table.astype({"error": "string", "slice": "Int64", "scan": object})


# Other names that people give to these folders, in any case. None is taken for what it might mean in training: the
# error proposes a renaming.
OTHER_NAMES = {
    "train": ("training",), "test": ("testing",),
    "AD": ("alzheimer", "alzheimers", "alzheimer's", "dementia", "demented"),
    "NC": ("cn", "hc", "control", "controls", "normal", "healthy", "nondemented"),
}  # fmt: skip

SPLITS_AND_CLASSES = {name.lower() for name in OTHER_NAMES}.union(*OTHER_NAMES.values())


def find_folder(parent, name):
    """The folder in `parent` that is called `name`, or else as OTHER_NAMES, in any case; None if there is no such."""
    folders = {path.name.lower(): path for path in Path(parent).iterdir() if path.is_dir()}
    return Path(parent, name) if Path(parent, name).is_dir() else next(
        (folders[other] for other in (name.lower(), *OTHER_NAMES[name]) if other in folders), None)


def check_folders(root):
    """InputError where `root` has not the folders of AD_NC, with what it has, and what to do about it."""
    if not root.is_dir():
        raise InputError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}; expected AD_NC with "
                         "train/AD, train/NC, test/AD, test/NC")
    missing, moves = [], []
    for split in ("train", "test"):
        place = find_folder(root, split)
        for label in ("AD", "NC"):
            there = place and find_folder(place, label)
            if there != root / split / label:
                missing.append(f"{split}/{label}")
            if there and there.name != label:
                moves.append((there, place / label))
        if place and place.name != split:
            moves.append((place, root / split))
    if not missing:
        return
    advice = "; or does this do it?\n" + "\n".join(f"  {shlex.join(['mv', *map(str, pair)])}" for pair in moves)
    deeper = [path.parent for depth in ("*", "*/*", "*/*/*") for path in sorted(root.glob(f"{depth}/train"))]
    if deeper and not moves:
        advice = f"; did you mean {deeper[0]}?"
    holds = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise InputError(f"{root} has no {', '.join(missing)}, it holds {printable(holds, '')}; expected AD_NC with "
                     f"train/AD, train/NC, test/AD, test/NC{advice if moves or deeper else ''}")


def list_set(root, pattern=None):
    """The Listing of a folder AD_NC with {train,test}/{AD,NC}/<scan>_<slice>.jpeg, or of its parent. `pattern` finds
    subjects in names (see `metadata.subjects_from_names`). InputError for a folder of another form. Whether the files
    hold images is not looked at."""
    named = root = Path(root)
    if not (root / "train").is_dir() and (root / "AD_NC").is_dir():
        root = root / "AD_NC"
    check_folders(root)
    rows = []
    for split in ("train", "test"):
        for label in ("AD", "NC"):
            folder = root / split / label
            images, folders, _ = list_folder(folder)
            if not images:
                what = f"holds {len(folders)} folders, such as {folders[0]}, and" if folders else "holds"
                find = shlex.join(["find", str(folder), "-mindepth", "2", "-type", "f", "-exec", "mv", "-n", "{}",
                                   str(folder), ";"])
                move = f"; if the slices in them are named so, this moves them up, and overwrites none:\n  {find}"
                raise InputError(f"{folder} {what} no images ({', '.join(EXTENSIONS)}); expected files "
                                 f"<scan>_<slice>.jpeg{move * bool(folders)}")
            reason = f"is a folder; expected only files <scan>_<slice>.jpeg in {label}"
            rows += [(path, label, split, reason) for path in folders]
            rows += [(path, label, split, None if parse_name(path) else
                      "is not named <scan>_<slice>, as 218391_78.jpeg is (a whole number of 9 digits or fewer)")
                     for path in images]
    table = _tabulate(rows)
    who, labels, sources = metadata.read_subjects(root, named)
    told = table.scan.map(labels)
    wrong = told.notna() & (told != table.label) & table.error.isna()
    table.loc[wrong, "error"] = [f"is in folder {label}, but {metadata.METADATA} says {other}"
                                 for label, other in zip(table.label[wrong], told[wrong])]
    metadata.check_match(table.scan, who, sources, each=True)
    who, lines = metadata.add_names(table.scan, who, pattern)
    if pattern and not table.scan.isin(who.keys()).any():
        raise InputError(f"{lines[0]}; expected a regular expression with a group, as in '(sub\\d+)_'")
    lines += passed_over(root, [*table.path, *sources])
    return Listing(_complete(table, who, ["split", "label", "scan", "slice"]), str(root), list(sources), lines)


def _complete(table, who, order):
    """The table with subject and group, sorted; copies are merged into one group once the pixels are known."""
    table["subject"] = table.scan.map(who).astype("string")
    table = assign_groups(table.assign(pixel_hash=""))
    return table.sort_values(order, ignore_index=True)[[*COLUMNS, "error"]]


def usable(index):
    """(index of the files that can be used, list of (path, reason) of the others), out of that of a Listing."""
    good, bad = index[index.error.isna()], index[index.error.notna()]
    return good.reset_index(drop=True).astype({"slice": "int64"}), list(zip(bad.path, bad.error))


def read_index(root):
    """Index the slices under `root`, a folder AD_NC with {train,test}/{AD,NC}/<scan>_<slice>.jpeg.

    Returns a DataFrame with a row a slice, ordered by split, label, scan and slice: path (opens from here), label
    ("AD" or "NC"), scan, slice (int), subject (<NA> where no metadata maps the scan), split ("train" or "test") and
    group (see subjects.assign_groups). Raises InputError for a folder of another form, and where files cannot be used:
    names of another form, folders, slices that are there twice, and scans that are in two classes, in train and test,
    or in another class than the metadata say. Whether the files hold images is not looked at.
    """
    index, bad = usable(list_set(root).index)
    if bad:
        raise InputError(describe_bad(bad))
    return index[COLUMNS]


def describe_bad(bad, advice="fix or remove them"):
    """Lines on files that cannot be used, (path, reason) each: how many there are, and the first ten."""
    lines = [f"{len(bad):,} file{'s' * (len(bad) > 1)} cannot be used; {advice}:"]
    lines += [f"  {printable(path, '')} {printable(reason, '')}" for path, reason in bad[:10]]
    return "\n".join(lines + [f"  ... and {len(bad) - 10:,} more"] * (len(bad) > 10))


# ---------------------------------------------------------------- the inputs of a prediction


def list_inputs(inputs, pattern=None, failed=None):
    """The Listing of files and folders to predict; label is None where it is not known, split "". `pattern` as in
    `list_set`. Tables of subjects are looked for beside the inputs; `failed` has the reasons why volumes could not be
    cut, by their path.

    A file that is not named <scan>_<slice> counts as a scan of its own, with its path for a name and no slice number.
    What cannot be predicted has the reason in the column error; InputError if there is nothing else. What is passed
    over in folders, and metadata that cannot be read, is listed in `warnings`.
    """
    warnings, files, again = [], {}, []
    found = [row for given in map(Path, inputs) for row in _list_input(given, warnings)]
    found += [(path, None, reason) for path, reason in (failed or {}).items()]
    for path, label, error in sorted(found, key=lambda row: row[1] is None):  # a labelled one counts
        if files.setdefault(os.path.realpath(path), (path, label, "", error))[0] != path:
            again.append(path)
    table = _tabulate(files.values())
    if table.error.notna().all():
        more = f"; nor can {len(table) - 1} others be predicted" if len(table) > 1 else ""
        raise InputError(f"{printable(table.path[0], '')} {table.error[0]}{more}")
    alone = [given for given in map(Path, inputs) if given.name in CLASSES and given.is_dir()]
    if len({given.name for given in alone}) > 1 and found and all(label is None for _, label, _ in found):
        warnings.append(f"folders of classes that are given one by one are no labels; for scores give the folder that "
                        f"holds them, such as {alone[0].parent}")
    if again:
        warnings.append(f"{len(again)} inputs are links to others, first {again[0]}; each file counts once")
    who, classes, tables = {}, {}, []
    for root in sorted({_set_root(given) for given in inputs}):
        try:
            known, labels, sources = metadata.read_subjects(root)
            tables += sources
            classes |= labels
            metadata.check_match(table.scan, known, sources)
            other = [scan for scan in known.keys() & who.keys()
                     if metadata.spelling(known[scan]) != metadata.spelling(who[scan])]
            if other:
                place = next(path for path, scans in sources.items() if other[0] in scans)
                raise InputError(f"scan {other[0]} is of {who[other[0]]}, and of {known[other[0]]} in {place}")
            who = known | who
        except (InputError, OSError) as problem:
            warnings.append(f"subjects are not known: {problem}")
    used = [*(path for path, _, _ in found), *tables]
    warnings += dict.fromkeys(line for given in inputs if os.path.isdir(given) for line in passed_over(given, used))
    told = table.scan.map(classes)
    wrong = table.scan[told.notna() & table.label.notna() & (told != table.label)].nunique()
    if wrong:
        warnings.append(f"{wrong} scans are in a folder of another class than the metadata say; the folder counts")
    who, lines = metadata.add_names(table.scan, who, pattern)
    return Listing(_complete(table, who, ["scan", "slice", "path"]), "", [], warnings + lines)


def _list_input(given, warnings):
    """The (path, label or None, error or None) of each image of one INPUT; appends to `warnings` what it takes a folder
    for."""
    if not os.path.exists(given):
        link = "is a link to nothing" if os.path.islink(given) else "does not exist"
        return [(str(given), None, f"{link}; expected an image or a folder of images")]
    if not given.is_dir():
        other = None if given.suffix.lower() in EXTENSIONS else (
            f"is not an image that is read here; expected {', '.join(EXTENSIONS)}")
        return [(str(given), None, other)]
    found = []
    try:
        right_here, folders_here, _ = list_folder(given)
        labelled = {label: find_folder(given, label) for label in ("AD", "NC")}
        # beside slices, a folder of another name is no class
        labelled = {label: folder for label, folder in labelled.items()
                    if folder and (folder.name == label or not right_here)}
        for label, folder in (*labelled.items(), (None, given)):
            if label or not labelled:
                found += [(path, label, None) for path in (list_folder(folder)[0] if label else right_here)]
            if label and folder.name != label:
                warnings.append(f"the folder {folder} is taken for {label}")
    except OSError as problem:
        return [(str(given), None, f"cannot be listed: {problem.strerror}")]
    if not found:
        hints = [given / name for name in ("test", "AD_NC/test") if (given / name).is_dir()]
        hints += [folder for folder in folders_here if list_folder(folder)[0]]
        hint = f"; did you mean {hints[0]}{f' and {len(hints) - 1} others' * (len(hints) > 1)}?" if hints else ""
        return [(str(given), None, f"holds no images ({', '.join(EXTENSIONS)}), no volume and no "
                 f"DICOM files, nor do AD/ and NC/ in it{hint}")]
    return found


def _set_root(given):
    """The folder that the metadata are in or beside: AD_NC for AD_NC/test/AD/x.jpeg, else the folder itself."""
    folder = Path(os.path.abspath(given))
    if not folder.is_dir():
        folder = folder.parent
    while folder.name.lower() in SPLITS_AND_CLASSES:
        folder = folder.parent
    return folder

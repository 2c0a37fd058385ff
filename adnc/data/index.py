"""Index image folders: files, names of scans and slices, and the subjects of scans.

The subject of a scan is known from meta_data_with_label.json or subjects.csv beside the images, or
from the name of the scan if it has a known form. Nothing is decoded here.
"""

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from adnc import CLASSES
from adnc.data.pixels import EXTENSIONS, is_junk, parse_name
from adnc.data.subjects import archive_id, assign_groups, describe_doubtful_names, set_root
from adnc.errors import InputError, count, printable
from adnc.files import MISSING, read_json, read_table, same_name

COLUMNS = ["path", "label", "scan", "slice", "subject", "split", "group"]


@dataclass
class Listing:
    """The images in folders, not yet decoded.

    index: COLUMNS and error, the reason why a file cannot be used, else <NA>.
    root: the folder AD_NC, "" for the inputs of a prediction.
    sources: the files that name the subjects.
    notes: sentences on what was not used or not understood.
    """

    index: pd.DataFrame
    root: str
    sources: list
    notes: list


# ---------------------------------------------------------------- the subjects of scans

METADATA = "meta_data_with_label.json"
TABLE = "subjects.csv"
LABELS = {
    "0": "NC",
    "1": "label 1 (MCI)",
    "2": "AD",
    "NC": "NC",
    "CN": "NC",
    "MCI": "MCI",
    "AD": "AD",
}

# What names of scans say by themselves, in the forms of archives; the first group is the subject.
NAME_PATTERNS = {
    "OASIS-1, OASIS-2": r"(OAS[12]_\d{4})_MR\d+(_.+)?",  # subject, session, acquisition
    "OASIS-3": r"(?:sub-)?(OAS3\d{4})_.+",
    "ADNI": r"(?:.*[_-])?(\d{3}_S_\d{4,5})(?:_.+)?",
    "BIDS": r"(sub-[^\W_]+)(_ses-[^\W_]+)?(_.+)?",
}


def read_subjects(*folders):
    """The subjects of scans, from METADATA and TABLE in or beside one of the folders.

    Returns (subjects, labels, sources): dicts from scan id to subject and to class name, and a dict
    from the path of each file to the subjects that it names. METADATA is the JSON of ADNI: the
    subject is the `ddd_S_dddd` in a file name of the entry, `label` is 0 for NC, 1 for MCI, 2 for
    AD. TABLE has the columns scan and subject. InputError if a file cannot be read, or if the two
    contradict each other.
    """
    labels, sources = {}, {}
    for name, read in ((METADATA, read_metadata), (TABLE, read_subject_table)):
        path = find_beside(name, folders)
        if path is not None:
            sources[path], its_labels = read(path)
            labels.update(its_labels)
    return merge_subjects(sources), labels, sources


def merge_subjects(sources):
    """The subjects of scans, {scan: subject}, of several tables {path: its {scan: subject}}.
    InputError if two of them contradict each other."""
    subjects, origin = {}, {}
    for path, its_subjects in sources.items():
        for scan, subject in its_subjects.items():
            if subjects.setdefault(scan, subject) != subject:
                raise InputError(
                    f"scan {scan} belongs to subject {subject} in {path}, and to {subjects[scan]} "
                    f"in {origin[scan]}; correct one of them, or move it away"
                )
            origin.setdefault(scan, path)
    return subjects


def find_beside(name, folders):
    """The path of the file `name` in or beside one of the folders, or None.

    Beside a link is beside the link itself, then beside its target.
    """
    for folder in map(Path, folders):
        for place in (folder, Path(os.path.abspath(folder)).parent, folder.resolve().parent):
            if (place / name).is_file():
                return place / name
            if os.path.lexists(place / name):
                raise InputError(f"{place / name} is not a file that can be read; fix or remove it")
    return None


def read_metadata(path):
    """(subjects, labels) of meta_data_with_label.json, dicts by scan id."""
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise InputError(
            f"{path} holds a {type(entries).__name__}; expected a JSON object with one key per scan"
        )
    subjects, labels = {}, {}
    for scan, entry in entries.items():
        scan = same_name(scan)
        if not isinstance(entry, dict):
            continue
        names = [os.path.basename(value) for value in entry.values() if isinstance(value, str)]
        matches = set(re.findall(r"ADNI_(\d{3}_S_\d{4,5})_", " ".join(names)))
        if scan in subjects:  # in another spelling
            matches.add(subjects[scan])
        if len(matches) > 1:
            raise InputError(
                f"{path} names two subjects of scan {scan} ({', '.join(sorted(matches))}); "
                "expected one"
            )
        if matches:
            subjects[scan] = matches.pop()
        # A spreadsheet column with empty cells turns 2 into 2.0.
        label = str(entry.get("label", "")).strip().removesuffix(".0")
        if label.lower() not in MISSING:
            labels[scan] = LABELS.get(label.upper(), f"label {label}")
    return subjects, labels


def read_subject_table(path):
    """(subjects, {}) of subjects.csv."""
    table = read_table(path, ("scan", "subject"))
    for column in ("scan", "subject"):  # a spreadsheet turns a column with an empty cell into reals
        table[column] = table[column].str.replace(r"^(\d+)\.0+$", r"\1", regex=True)
    rows = table[table.scan != ""].dropna(subset="subject").drop_duplicates(["scan", "subject"])
    twice = rows.scan[rows.scan.duplicated()]
    if len(twice):
        raise InputError(
            f"{path} gives scan {twice.iloc[0]} two subjects; expected one row per scan"
        )
    return dict(zip(rows.scan, rows.subject)), {}


def check_match(scans, subjects, sources):
    """InputError if the tables `sources` name no subject, or know none of the scans."""
    if not sources:
        return
    names = " and ".join(map(str, sources))
    if not subjects:
        raise InputError(
            f"{names}: no scan has a subject; expected scan,subject in each row of {TABLE}, or in "
            f"each entry of {METADATA} a file name with ADNI_ddd_S_dddd_"
        )
    if len(scans) and not scans.isin(subjects.keys()).any():
        raise InputError(
            f"{names}: none of the {len(subjects):,} scans listed there is in the folder. They are "
            f"ids such as {next(iter(subjects))}; the files, <scan>_<slice>.jpeg, have ids such as "
            f"{scans.iloc[0]}. Use the ids of the file names, or remove the table"
        )


def subjects_from_names(scans, pattern=None):
    """The subjects of scans whose names have a known form, a dict; and lines on what matched.

    With `pattern`, a regular expression, its first group (or its group `subject`) is the subject,
    wherever it matches in a name; the forms of NAME_PATTERNS are then not tried.
    """
    patterns = {"--subject-pattern": pattern} if pattern else NAME_PATTERNS
    subjects, lines = {}, []
    for form, regex in patterns.items():
        regex = re.compile(regex)
        group = "subject" if "subject" in regex.groupindex else 1
        matches = {}
        for scan in dict.fromkeys(scans):
            match = regex.search(scan) if pattern else regex.fullmatch(scan)
            if scan not in subjects and match and match[group]:
                matches[scan] = match[group]
        if matches:
            scan, subject = next(iter(matches.items()))
            lines.append(
                f"{len(set(matches.values())):,} subjects of {len(matches):,} scans from their "
                f"names ({form}), such as {subject} of {scan}"
            )
        subjects.update(matches)
    return subjects, lines


def add_subjects_from_names(scans, subjects, pattern=None):
    """Complete `subjects`, a dict from scan to subject, by the names of scans that it lacks.

    Returns (dict, lines). If two scans have the same subject by their names, and the dict knows one
    of them, both get the subject of the dict, so that no person counts as two. InputError if the
    dict has two subjects for one of the names.
    """
    scans = list(dict.fromkeys(scans))
    others = [scan for scan in scans if scan not in subjects]
    named, lines = subjects_from_names(others, pattern)
    if pattern:
        unmatched = [scan for scan in others if scan not in named]
        if unmatched:
            lines.append(
                f"--subject-pattern {pattern} finds no subject in {len(unmatched):,} names of "
                f"scans, such as {unmatched[0]}"
            )
        if len(named) > 1 and all(subject == scan for scan, subject in named.items()):
            lines.append(
                f"SUSPICIOUS: --subject-pattern {pattern} takes the whole name of each scan for "
                "its subject, so that no two scans belong to one person"
            )
        if scans and not others:
            lines.append(
                "--subject-pattern is not used: the subjects of all scans are known from a table"
            )

    # For each subject by name: the subjects that the table has for it, each with a scan.
    in_table = defaultdict(dict)
    in_both, _ = subjects_from_names([scan for scan in scans if scan in subjects], pattern)
    for scan, name in in_both.items():
        in_table[name].setdefault(subjects[scan], scan)
    for scan, name in named.items():
        if len(in_table[name]) > 1:
            one, other = list(in_table[name].values())[:2]
            raise InputError(
                f"the subject of scan {scan} is not clear: its name says {name}, as do the names "
                f"of the scans {one} and {other}, which the table gives to two subjects; add scan "
                f"{scan} to the table"
            )
        if in_table[name]:
            named[scan] = next(iter(in_table[name]))
    return {**subjects, **named}, lines


# ---------------------------------------------------------------- folders


def list_folder(folder):
    """The paths of the image files and of the folders in a folder, by name."""
    images, folders = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if is_junk(entry.name):
            continue
        if os.path.isdir(entry.path):
            folders.append(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS):
            images.append(entry.path)
    return images, folders


def describe_unused(root, used, about_images=None):
    """Count the files under `root` that are not among the paths `used`, by extension.

    Returns a list of one line, or of none, which ends with the reason `about_images` if there are
    images among them. Hidden files and leftovers of archives and tools are not counted.
    """
    used = {os.path.abspath(path) for path in used}
    counts = Counter()
    example = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not is_junk(name) and os.path.abspath(path) not in used:
                kind = os.path.splitext(name)[1].lower() or "no extension"
                counts[kind] += 1
                example.setdefault(kind, path)
    if not counts:
        return []
    kinds = [
        f"{n:,} {kind} (such as {printable(example[kind])})" for kind, n in counts.most_common(5)
    ]
    line = f"not used: {count(counts.total(), 'other file')} under {root}: {', '.join(kinds)}"
    if len(counts) > 5:
        line += f", and {len(counts) - 5} other kinds"
    if about_images and any(kind in EXTENSIONS for kind in counts):
        line += f"; {about_images}"
    return [line]


def tabulate(rows):
    """A table of rows (path, label, split, error), with scan and slice from the file name.

    A name of another form makes the path the scan, without a slice number. Rows that contradict
    each other get an error.
    """
    rows = [dict(zip(("path", "label", "split", "error"), row)) for row in rows]
    for row in rows:
        row["scan"], row["slice"] = parse_name(row["path"]) or (same_name(row["path"]), None)

    # Within a unit the column must have one value.
    checks = (
        ("label", ["scan"], "belongs to scan {scan}, which is in both classes (see {other})"),
        ("split", ["scan"], "belongs to scan {scan}, which is in train and in test (see {other})"),
        ("path", ["scan", "slice"], "is the same slice of a scan as {other}"),
    )
    for column, unit, text in checks:
        first_paths = defaultdict(dict)  # unit -> value of the column -> first path
        usable_rows = [row for row in rows if row["error"] is None]
        for row in usable_rows:
            if row[column] is not None:
                key = tuple(row[name] for name in unit)
                first_paths[key].setdefault(row[column], row["path"])
        for row in usable_rows:
            paths = first_paths[tuple(row[name] for name in unit)]
            if len(paths) > 1:
                other = next(path for value, path in paths.items() if value != row[column])
                row["error"] = text.format(other=other, scan=row["scan"])
    table = pd.DataFrame(rows, columns=["path", "label", "split", "error", "scan", "slice"])
    return table.astype({"error": "string", "slice": "Int64", "scan": object})


def complete(table, subjects, order):
    """The table with subject and group, sorted by the columns `order`."""
    names = table.scan.map(subjects)
    table["subject"] = names.map(archive_id).fillna(names).astype("string")
    table = assign_groups(table.assign(pixel_hash=""))  # again when the pixels are known
    return table.sort_values(order, ignore_index=True)[[*COLUMNS, "error"]]


def describe_one_scan(table, where):
    """A line if all rows of a table that have a number are slices of one scan: files that are
    numbered by patient look like that. `where` names the files."""
    numbered = table[table.slice.notna()]
    if len(numbered) < 2 or numbered.scan.nunique() > 1:
        return
    name = os.path.basename(numbered.path.iloc[0])
    scan, number = numbered.scan.iloc[0], numbered.slice.iloc[0]
    yield (
        f"{where} are taken for {len(numbered):,} slices of one scan: {name} is slice {number} of "
        f"scan {scan}, as in <scan>_<slice>. If each is another scan, rename them, for example to "
        f"{scan}-{number}_1{os.path.splitext(name)[1]}"
    )


# ---------------------------------------------------------------- a set to train on


def check_folders(root):
    """InputError if `root` lacks one of the folders of AD_NC."""
    expected = "expected AD_NC with train/AD, train/NC, test/AD and test/NC"
    if not root.exists():
        raise InputError(f"{root} does not exist; {expected}")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; {expected}")
    missing = [f"{split}/{label}" for split in ("train", "test") for label in ("AD", "NC")]
    missing = [name for name in missing if not (root / name).is_dir()]
    if missing:
        folders = [path for path in [*root.glob("*"), *root.glob("*/*")] if path.is_dir()]
        names = sorted(str(path.relative_to(root)) for path in folders)
        content = "no folders"
        if names:
            content = "the folders " + printable(", ".join(names[:8]), keep="")
        raise InputError(f"{root} has no {', '.join(missing)}, it holds {content}; {expected}")


def list_set(root, pattern=None):
    """The Listing of a folder AD_NC, or of its parent, with files <scan>_<slice>.jpeg in
    {train,test}/{AD,NC}.

    `pattern` finds subjects in names (see `subjects_from_names`). InputError for a folder of
    another form.
    """
    named = root = Path(root)
    if not (root / "train").is_dir() and (root / "AD_NC").is_dir():
        root = root / "AD_NC"
    check_folders(root)

    rows = []
    for split in ("train", "test"):
        for label in ("AD", "NC"):
            folder = root / split / label
            images, folders = list_folder(folder)
            if not images:
                raise InputError(
                    f"{folder} holds {len(folders)} folders and no images "
                    f"({', '.join(EXTENSIONS)}); expected files <scan>_<slice>.jpeg"
                )
            for path in folders:
                error = f"is a folder; expected files <scan>_<slice>.jpeg in {label}"
                rows.append((path, label, split, error))
            for path in images:
                error = None
                if parse_name(path) is None:
                    error = "is not named <scan>_<slice>, as 218391_78.jpeg is (9 digits at most)"
                rows.append((path, label, split, error))
    table = tabulate(rows)

    subjects, labels, sources = read_subjects(root)
    other_label = table.scan.map(labels)
    wrong = other_label.notna() & (other_label != table.label) & table.error.isna()
    for i in table.index[wrong]:
        table.loc[i, "error"] = (
            f"is in folder {table.label[i]}, but {METADATA} says {other_label[i]}"
        )
    check_match(table.scan, subjects, sources)
    for path, its_subjects in sources.items():
        if its_subjects:  # one of two tables may name no subject
            check_match(table.scan, its_subjects, [path])
    subjects, notes = add_subjects_from_names(table.scan, subjects, pattern)
    if root != named:
        notes.insert(0, f"{named} holds AD_NC, which is used")
    if pattern and not table.scan.isin(subjects.keys()).any():
        raise InputError(
            f"{notes[-1]}; expected a regular expression with a group, as in '(sub\\d+)_'"
        )
    for (split, label), part in table.groupby(["split", "label"], sort=False):
        notes += describe_one_scan(part, f"all files of {split}/{label}")
    only = "only images in train/AD, train/NC, test/AD and test/NC are slices of the set"
    notes += describe_unused(root, [*table.path, *sources], only)
    index = complete(table, subjects, ["split", "label", "scan", "slice"])
    notes += describe_doubtful_names(index)
    return Listing(index, str(root), list(sources), notes)


def usable(index):
    """Divide the index of a Listing: (index of the usable files, list of (path, reason) of the
    others)."""
    good, bad = index[index.error.isna()], index[index.error.notna()]
    return good.reset_index(drop=True).astype({"slice": "int64"}), list(zip(bad.path, bad.error))


def describe_bad(bad, advice="fix or remove them"):
    """Lines on files that cannot be used, a list of (path, reason): their number and the first
    ten."""
    files = "file" if len(bad) == 1 else "files"
    lines = [f"{len(bad):,} {files} cannot be used; {advice}:"]
    for path, reason in bad[:10]:
        lines.append(f"  {printable(path, keep='')} {printable(reason, keep='')}")
    if len(bad) > 10:
        lines.append(f"  ... and {len(bad) - 10:,} more")
    return "\n".join(lines)


def read_index(root):
    """Index the slices under `root`, a folder AD_NC with {train,test}/{AD,NC}/<scan>_<slice>.jpeg.

    Returns a DataFrame with a row per slice, ordered by split, label, scan and slice: path (opens
    from here), label ("AD" or "NC"), scan, slice (int), subject (<NA> if unknown), split ("train"
    or "test") and group (see `assign_groups`).

    InputError for a folder of another form, and if files cannot be used: names of another form,
    folders, slices that are there twice, and scans that are in two classes, in both train and test,
    or in another class than the metadata say.
    """
    index, bad = usable(list_set(root).index)
    if bad:
        raise InputError(describe_bad(bad))
    return index[COLUMNS]


# ---------------------------------------------------------------- the inputs of a prediction


def list_inputs(inputs, pattern=None, failed=None, problem=None):
    """The Listing of files and folders to predict; label is None if unknown, split "".

    The folders AD/ and NC/ in an input are its labels. A file that is not named <scan>_<slice> is a
    scan of its own, with its path for a name and no slice number. `failed` has the reasons why
    volumes could not be cut, by path, and `problem` is the reason if a table of their subjects
    cannot be used. A file that cannot be predicted has the reason in the column error; InputError
    if no file can be predicted.
    """
    rows, notes = [], []
    for given in map(Path, inputs):
        rows += list_input(given)
    rows += [(path, None, reason) for path, reason in (failed or {}).items()]

    # Each file counts once; a path with a label goes before one without.
    files, links = {}, []
    for path, label, error in sorted(rows, key=lambda row: row[1] is None):
        real = os.path.realpath(path)
        if real in files and files[real][0] != path:
            links.append(path)
        files.setdefault(real, (path, label, "", error))
    table = tabulate(files.values())
    is_volume = table.path.isin(set(failed or {}))  # whose name is not <scan>_<slice>
    table["scan"] = table.scan.mask(is_volume, table.path)
    table["slice"] = table.slice.mask(is_volume)
    if table.error.notna().all():
        message = f"{printable(table.path[0], keep='')} {table.error[0]}"
        if len(table) > 1:
            message += f" (and {len(table) - 1} more that cannot be predicted)"
        raise InputError(message)
    if links:
        notes.append(
            f"{count(len(set(links)), 'path')} of a file that is listed under another path, first "
            f"{links[0]}; each file counts once"
        )

    problems = [] if problem is None else [problem]
    subjects, labels, tables = subjects_of_inputs(inputs, table.scan, problems)
    lines = [f"subjects are unknown: {each}" for each in problems]
    if not problems:
        subjects, lines = add_subjects_from_names(table.scan, subjects, pattern)
    notes += lines
    used = [*(path for path, _, _ in rows), *tables]
    for given in dict.fromkeys(map(str, inputs)):
        if os.path.isdir(given):
            only = "images are read in an input itself, or in its AD/ and NC/ alone if it has them"
            notes += describe_unused(given, used, only)
            notes += describe_missing_class(given)
    other_label = table.scan.map(labels)
    wrong = other_label.notna() & table.label.notna() & (other_label != table.label)
    if wrong.any():
        notes.append(
            f"{table.scan[wrong].nunique()} scans are in a folder of another class than the "
            "metadata say; the folder counts"
        )
    return Listing(complete(table, subjects, ["scan", "slice", "path"]), "", [], notes)


def describe_separate_classes(inputs, index):
    """A line if folders AD and NC, of slices or of volumes, are inputs of their own, and no slice
    of the index has a label."""
    folders = [given for given in map(Path, inputs) if given.name in CLASSES and given.is_dir()]
    if len({given.name for given in folders}) > 1 and index.label.isna().all():
        yield (
            "AD and NC given as separate inputs are not taken for labels; for scores give the "
            f"folder that holds them, such as {folders[0].parent}"
        )


def describe_missing_class(given):
    """A line if a folder holds AD/ or NC/, and instead of the other one folders of other names with
    images."""
    names = [os.path.basename(path) for path in list_folder(given)[1] if list_folder(path)[0]]
    there = [label for label in CLASSES if label in names]
    if len(there) == 1 and len(names) > 1:
        (missing,) = set(CLASSES) - set(there)
        other = next(name for name in names if name not in there)
        yield (
            f"{given} holds {there[0]}/ and no {missing}/: its labels are all {there[0]}. If "
            f"{other}/ is the other class, name it {missing}"
        )


def list_input(given):
    """The (path, label or None, error or None) of each image of one INPUT."""
    if not os.path.exists(given):
        error = "does not exist; expected an image, a volume, or a folder of them"
        return [(str(given), None, error)]
    if not given.is_dir():
        error = None
        if given.suffix.lower() not in EXTENSIONS:
            error = f"is neither an image ({', '.join(EXTENSIONS)}) nor a volume"
        return [(str(given), None, error)]

    images, folders = list_folder(given)
    by_name = {os.path.basename(path): path for path in folders}
    labelled = {label: by_name[label] for label in ("AD", "NC") if label in by_name}
    if not images and not labelled:  # ad/ and nc/ are labels too, unless slices are beside them
        for name, path in by_name.items():
            if name.upper() in CLASSES:
                labelled[name.upper()] = path
    rows = []
    for label, folder in labelled.items():
        rows += [(path, label, None) for path in list_folder(folder)[0]]
    if not labelled:
        rows = [(path, None, None) for path in images]
    if rows:
        return rows

    hints = [given / name for name in ("test", "AD_NC/test") if (given / name).is_dir()]
    hints += [folder for folder in folders if list_folder(folder)[0]]
    error = (
        f"contains no images ({', '.join(EXTENSIONS)}), no volume and no DICOM files, and neither "
        "do folders AD/ and NC/ in it"
    )
    if hints:
        error += f"; did you mean {hints[0]}?"
    return [(str(given), None, error)]


def subjects_of_inputs(inputs, scans, problems):
    """(subjects, labels, tables) of the scans of a prediction, from tables beside the inputs.

    The reasons why tables cannot be used are appended to `problems`. If there is one, all subjects
    are unknown: a table may know a person by another id than the names of the scans do.
    """
    labels, tables = {}, {}
    for root in sorted({set_root(given) for given in inputs}):
        try:
            its_subjects, its_labels, sources = read_subjects(root)
            check_match(scans, its_subjects, sources)
            merge_subjects({**tables, **sources})
        except InputError as problem:
            problems.append(str(problem))
            continue
        tables.update(sources)
        labels.update(its_labels)
    if problems:
        return {}, labels, list(tables)
    return merge_subjects(tables), labels, list(tables)

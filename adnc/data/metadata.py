"""Who is in a scan: from tables that people have, or from the names of scans.

Not run by itself. A word that means "missing" is missing, and spellings of one person are one person.
"""

import json
import os
import re
from pathlib import Path

from adnc.files import MISSING, read_bytes, read_table
from adnc.cli import InputError, time_limit

METADATA = "meta_data_with_label.json"
TABLES = (METADATA, "subjects.csv")
CODES = {"0": "NC", "1": "label 1 (MCI)", "2": "AD", "NC": "NC", "CN": "NC", "MCI": "MCI", "AD": "AD"}  # of `label`


def read_subjects(root, *named):
    """Who is in each scan, from a file in `root`, beside it, beside what it is a link to, or beside the folder of the
    same name that it lies in, as archives unpack; or in one of these places of the folders `named`.

    Returns (subjects, labels, sources): two dicts from scan id to subject and to class name, and a dict from the path
    of each file to the scans that it knows: meta_data_with_label.json (ADNI; the subject is the `ddd_S_dddd` in a file
    name of the entry; `label` is 0 for NC, 1 for MCI, 2 for AD), and subjects.csv (columns scan and subject), which
    names the subjects of scans that the first does not. InputError if a file cannot be read, or they contradict each
    other.
    """
    folders = [place for folder in map(Path, (root, *named)) for place in _places(folder)]
    subjects, labels, sources = {}, {}, {}
    for name in TABLES:
        path = next((folder / found for folder in folders  # Subjects.csv, too, where there is no other
                     for found in sorted(_names_in(folder), key=lambda found: found != name)
                     if found.lower() == name.lower()), None)
        if not path:
            continue
        known, told = (_subjects_from_json if name == METADATA else _subjects_from_table)(path)
        for scan in known.keys() & subjects.keys():
            if spelling(known[scan]) != spelling(subjects[scan]):
                raise InputError(f"scan {scan} is of {known[scan]} in {path}, and of {subjects[scan]} in "
                                 f"{[*sources][0]}; correct one of them, or move it away")
        subjects, labels, sources[path] = known | subjects, labels | told, known
    return subjects, labels, sources


def has_table(folder):
    return any(name.lower() in TABLES for name in _names_in(Path(folder)))


def _places(folder):
    beside = folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    return [folder, beside, folder.resolve().parent, *[beside.parent] * (beside.name == folder.name)]


def _names_in(folder):
    try:
        return sorted(os.listdir(folder))
    except OSError:  # it may be entered all the same, as other people's folders on a cluster
        return [name for name in TABLES if os.path.exists(folder / name)]


def check_match(scans, subjects, sources, each=False):
    """InputError where the tables of subjects name nobody, or know none of the scans, with an id of each side. With
    `each` it is asked of each table, not of all together."""
    for path, known in sources.items() if each else ():
        if known:
            check_match(scans, known, {path: known})
    names = " and ".join(map(str, sources))
    if sources and not subjects:
        raise InputError(f"{names} name{'s' * (len(sources) == 1)} the subject of no scan; expected scan,subject in "
                         f"each row of subjects.csv, or in each entry of {METADATA} a file name with ADNI_ddd_S_dddd_, "
                         "or no such file")
    if subjects and len(scans) and not scans.isin(subjects.keys()).any():
        raise InputError(f"{names}: {len(subjects):,} scans are known, and none of those in the folder: the ids are "
                         f"such as {next(iter(subjects))}, the folder's such as {scans.iloc[0]} (of a file "
                         "<scan>_<slice>.jpeg); write the ids as the files have them, or move the table away")


# What the names of scans say by themselves, in the forms that archives give them; the first group is the subject.
NAMES = {
    "OASIS-1, OASIS-2": r"(OAS[12]_\d{4})_MR\d+(_.+)?",  # subject, session, acquisition
    "OASIS-3": r"(?:sub-)?(OAS3\d{4})_.+",
    "ADNI": r"(?:.*[_-])?(\d{3}_S_\d{4,5})(?:_.+)?",
    "BIDS": r"(sub-[A-Za-z0-9]+)(_ses-[A-Za-z0-9]+)?(_.+)?",
}


LONGEST_MATCH = 60  # seconds


def subjects_from_names(scans, pattern=None):
    """Who is in scans whose names say so: (dict from scan to subject, lines on what was found).

    NAMES are the patterns, or `pattern` alone, a regular expression whose group `subject`, or else the first, is the
    subject, wherever in a name it matches.
    """
    who, lines, scans = {}, [], list(dict.fromkeys(scans))
    for form, regex in {"--subject-pattern": pattern}.items() if pattern else NAMES.items():
        regex = re.compile(regex)
        with time_limit(LONGEST_MATCH, f"--subject-pattern {pattern} needs more than {LONGEST_MATCH} seconds for the "
                        "names of the scans; repetitions within repetitions, as in (a+)+, may never end: write it "
                        "without them"):
            matches = {scan: (regex.search if pattern else regex.fullmatch)(scan) for scan in scans if scan not in who}
        at = "subject" if "subject" in regex.groupindex else 1
        found = {scan: match[at] for scan, match in matches.items() if match and match[at]}
        if found:
            scan, subject = next(iter(found.items()))
            lines.append(f"{len(set(found.values())):,} subjects of {len(found):,} scans from their names ({form}), "
                         f"such as {subject} of {scan}")
        who |= found
    return who, lines


def add_names(scans, who, pattern=None):
    """`who`, a dict from scan to subject of a table, with the scans that only their names know: (dict, lines).

    Where the table knows one scan of a subject and the names another, both get the table's subject, so that nobody is
    two people. InputError where the table has two subjects for one of the names.
    """
    others = [scan for scan in dict.fromkeys(scans) if scan not in who]
    named, lines = subjects_from_names(others, pattern)
    if pattern and len(named) < len(others):
        lines.append(f"--subject-pattern {pattern} finds no subject in {len(others) - len(named):,} names of scans, "
                     f"such as {next(scan for scan in others if scan not in named)}")
    if pattern and len(named) > 1 and all(name == scan for scan, name in named.items()):
        lines.append(f"SUSPICIOUS: --subject-pattern {pattern} takes the whole name of each scan for its subject, so "
                     "that no two are of one person")
    if pattern and not others and len(scans):
        lines.append("--subject-pattern is not used: the subjects of all scans are known from a table")
    tabled = {}
    for scan, name in subjects_from_names((scan for scan in scans if scan in who), pattern)[0].items():
        tabled.setdefault(name, {})[who[scan]] = scan
    for scan, name in named.items():
        same = tabled.get(name, {})
        if len(same) > 1:
            raise InputError(f"who is in scan {scan} is not clear: by its name it is {name}, as are the scans "
                             f"{' and '.join(list(same.values())[:2])}, of which the table makes two subjects; name in "
                             "the table who is in each scan")
        named[scan] = next(iter(same), name)
    who, spelled = one_spelling(who | named)
    return who, lines + spelled


def spelling(subject):
    """What is the same in all spellings of a subject: 002_S_0295 and sub-ADNI002S0295 are 2_s_295, 001, 1.0 and sub-1
    are 1."""
    subject = re.sub(r"\.0+$", "", re.sub(r"[\s_-]+", "_", str(subject).casefold())).removeprefix("sub_")
    subject = re.sub(r"(?:adni)?_?(\d{3})_?s_?(\d{4,5})", r"\1_s_\2", subject)
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", subject)


def one_spelling(who):
    """`who`, a dict from scan to subject, with the first of the spellings of a subject for all: (dict, lines). To take
    one person for two would be a leak, to take two for one costs a little."""
    first = {}
    same = {scan: first.setdefault(spelling(name), name) for scan, name in who.items()}
    others = {name: same[scan] for scan, name in who.items() if name != same[scan]}
    return same, [f"SUSPICIOUS: {len(others)} subjects have another spelling, such as {other} of {name}; each is taken "
                  f"for one person, {name}" for other, name in [*others.items()][:1]]


def _subjects_from_table(path):
    table = read_table(path, ("scan", "subject"))
    known = table[table.scan != ""].dropna(subset=["subject"]).drop_duplicates(["scan", "subject"])
    twice = known.scan[known.scan.duplicated()]
    if len(twice):
        raise InputError(f"{path} gives scan {twice.iloc[0]} to two subjects; expected one row a scan")
    return dict(zip(known.scan, known.subject)), {}


def _subjects_from_json(path):

    def once(pairs):
        found = dict(pairs)
        twice = [key for key, value in pairs if value is not found[key] and value != found[key]]
        if twice:
            raise ValueError(f"it has {twice[0]} twice, not alike")
        return found

    try:
        entries = json.loads(read_bytes(path), object_pairs_hook=once)
        if not isinstance(entries, dict):
            raise ValueError(f"it is a {type(entries).__name__}")
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{path} cannot be read as a JSON object of scans ({problem}); fix it or move it away"
                         ) from None
    subjects, labels = {}, {}
    for scan, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {}
        names = " ".join(os.path.basename(value) for value in entry.values() if isinstance(value, str))
        found = set(re.findall(r"ADNI_(\d{3}_S_\d{4,5})_", names))
        if len(found) > 1:
            raise InputError(f"{path} names two subjects in scan {scan} ({', '.join(sorted(found))}); expected one")
        if found:
            subjects[scan] = found.pop()
        label = re.sub(r"\.0+$", "", str(entry.get("label")).strip())  # a table with gaps makes 2.0 of 2
        if label.lower() not in MISSING:
            labels[scan] = CODES.get(label.upper(), f"label {label}, which is none of 0 (NC), 1 (MCI) and 2 (AD)")
    return subjects, labels

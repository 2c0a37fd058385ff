"""Two tables of docs/results.md: several runs side by side, and scores by severity of the disease.

    python -m docs.experiments.tables runs/a runs/b                            # rows for each run
    python -m docs.experiments.tables runs/fold* --by OASIS/subjects.csv cdr   # by severity

The first has rows for the validation and the test of each run. The second has one row per value of
a column of the CSV file, which also has the column scan. Other scripts make a third, of several
scores for the same subjects: `compare_ways`.
"""

from pathlib import Path

from adnc.cli import Parser, run_script
from adnc.errors import InputError
from adnc.files import read_table
from adnc.scoring import metrics
from adnc.scoring.assess import COMPARED, cell, format_difference, format_table, read_run
from adnc.scoring.metrics import METRICS, THRESHOLD, UNITS
from tools.evaluate import align, pool_seeds


def format_runs(folders):
    """Lines of a table of scores that runs wrote: one row for each run, part and unit."""
    rows = [["run", "part", "unit", "n", *(METRICS[name] for name in COMPARED)]]
    for folder in folders:
        run = Path(folder).name
        for part in ("val", "test"):
            _, scores = read_run(folder, part)
            title = f"{part}, LEAKY" if scores["leaks"] else part
            rows += unit_rows(run, title, scores)
            if "unseen_subjects" in scores:
                rows += unit_rows(run, "only unseen subjects", scores["unseen_subjects"])
    return format_table(rows)


def compare_ways(ways):
    """Rows of a table: subject-level AUROC of several scores, mean over seeds, and the paired
    difference of each from the first.

    ways: {name: one table for each seed}, all with the same rows: scan, subject, group, label, and
    the score as p_AD, of which a subject gets the mean.
    """
    means = {}
    for name, tables in ways.items():
        means[name] = metrics.mean_scores([table.assign(threshold=THRESHOLD) for table in tables])
    first, *others = means
    rows = []
    for name, scores in means.items():
        difference = ""
        if name in others:
            gain = metrics.compare(scores, means[first])["subject"]["auroc"]
            difference = format_difference(gain)
        rows.append([name, cell(metrics.summarise(scores)["subject"], "auroc"), difference])
    return rows


def unit_rows(run, title, scores):
    rows = []
    for unit in UNITS:
        if scores[unit] is not None:
            cells = [cell(scores[unit], metric) for metric in COMPARED]
            rows.append([run, title, unit, f"{scores[unit]['n']:,}", *cells])
    return rows


def format_by(folders, file, column):
    """Lines of a table with one row per value of a column: AD scans of this value against all NC
    scans, mean over seeds.

    `file` is a CSV file with the columns scan and `column`, which must hold every AD scan.
    """
    column = column.lower()
    table = read_table(file, ("scan", column))
    values = dict(zip(table.scan, table[column]))
    tables = align([one.table for one in pool_seeds(folders, "test")])
    is_ad = (tables[0].label == "AD").to_numpy(bool)
    value = tables[0].scan.map(values)
    missing = tables[0].scan[is_ad & value.isna()]
    if len(missing):
        raise InputError(f"{file} has no {column} of {missing.nunique()} AD scans")

    rows = [[f"AD with this {column}, against all NC", "subjects", "AUROC", "sensitivity"]]
    for level in sorted(value[is_ad].unique()):
        shown = ~is_ad | (value == level)
        scores = metrics.summarise(metrics.mean_scores([table[shown] for table in tables]))
        part = scores["subject"] or scores["scan"]
        rows.append([level, f"{part['n']}", cell(part, "auroc"), cell(part, "sensitivity")])
    return format_table(rows)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    add("--by", nargs=2, metavar=("CSV", "COLUMN"), help="AD of each value of a column")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.by:
        lines = format_by(args.runs, *args.by)
    else:
        lines = format_runs(args.runs)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)

"""Two tables of docs/results.md: several runs in one table, and scores by the severity of the
disease.

    python -m docs.experiments.tables runs/a runs/b                            # a row a run
    python -m docs.experiments.tables runs/fold* --by OASIS/subjects.csv cdr   # by severity
"""

from pathlib import Path

from adnc.cli import Parser, run_script
from adnc.errors import InputError
from adnc.files import read_table
from adnc.scoring import metrics
from adnc.scoring.assess import COMPARED, cell, format_table, read_run
from adnc.scoring.metrics import METRICS, UNITS, mean_scores
from tools.evaluate import align, pool_seeds


def format_runs(folders):
    """Lines of a table of the scores that runs have written: a row for each run, part and unit."""
    rows = [["run", "part", "unit", "n", *(METRICS[name] for name in COMPARED)]]
    for folder in folders:
        for part in ("val", "test"):
            _, scores = read_run(folder, part)
            title = f"{part}, LEAKY" if scores["leaks"] else part
            parts = {title: scores}
            if "unseen_subjects" in scores:
                parts["only unseen subjects"] = scores["unseen_subjects"]
            for title, scores in parts.items():
                for unit in UNITS:
                    if scores[unit] is not None:
                        cells = [cell(scores[unit], metric) for metric in COMPARED]
                        rows.append(
                            [Path(folder).name, title, unit, f"{scores[unit]['n']:,}", *cells]
                        )
    return format_table(rows)


def format_by(folders, file, column):
    """Lines of a table: AD with each value of a column of a CSV file (which has the column scan)
    against all NC, mean over seeds."""
    known = read_table(file, ("scan", column.lower()))
    values = dict(zip(known.scan, known[column.lower()]))
    tables = align([one.table for one in pool_seeds(folders, "test")])
    value = tables[0].scan.map(values)
    is_ad = tables[0].label == "AD"
    if value[is_ad].isna().any():
        raise InputError(
            f"{file} has no {column} of {tables[0].scan[is_ad & value.isna()].nunique()} AD scans"
        )
    rows = [[f"AD with this {column}, against all NC", "subjects", "AUROC", "sensitivity"]]
    for level in sorted(value[is_ad].unique()):
        scores = metrics.summarise(
            mean_scores([table[~is_ad | (value == level)] for table in tables])
        )
        part = scores["subject"] or scores["scan"]
        rows.append([level, f"{part['n']}", cell(part, "auroc"), cell(part, "sensitivity")])
    return format_table(rows)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--by", nargs=2, metavar=("CSV", "COLUMN"), help="AD of each value of a column"
    )
    args = parser.parse_args(argv)
    lines = format_by(args.runs, *args.by) if args.by else format_runs(args.runs)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)

"""Learning curves: subject-level AUROC by the number of training subjects, for several models.

    python -m docs.experiments.learning_curve curve.png runs/*-n*-s?

Runs of one model and size are averaged over seeds. Runs of one model should differ in --subjects
and --seed alone.
"""

from pathlib import Path

import numpy as np

from adnc.cli import Parser, new_png, run_script
from adnc.files import read_csv
from adnc.scoring import metrics, plots
from adnc.scoring.assess import cell, format_table
from modules import describe_model
from tools.evaluate import align, describe_pools, pool_seeds, read_flags


def learning_curve(folders):
    """Scores by model and number of training subjects, mean over seeds, and lines about leaks.

    Returns ({model: {subjects: scores}}, lines). The scores are subject-level, or scan-level if the
    subjects are unknown. The logistic regression is that of the runs of the first model.
    """
    by_size = {}
    for folder in folders:
        split = read_csv(Path(folder) / "split.csv")
        n_subjects = split.group[split.split.isin(["train", "val"])].nunique()
        model = describe_model(read_flags(folder)["model"])
        by_size.setdefault((model, n_subjects), []).append(folder)

    pools = {key: pool_seeds(members, "test") for key, members in by_size.items()}
    every_pool = [one for several in pools.values() for one in several]
    tables = align([one.table for one in every_pool])  # so that all have the same groups

    curves = {}
    first_model = next(iter(pools))[0]
    for (model, n_subjects), several in pools.items():
        own, tables = tables[: len(several)], tables[len(several) :]
        predictions = {model: own}
        if model == first_model:
            name = metrics.BASELINES["logistic_regression"]
            predictions[name] = [metrics.as_baseline(table, "logistic_regression") for table in own]
        for name, members in predictions.items():
            scores = metrics.summarise(metrics.mean_scores(members))
            curves.setdefault(name, {})[n_subjects] = scores["subject"] or scores["scan"]
    curves = {name: dict(sorted(sizes.items())) for name, sizes in curves.items()}
    return curves, describe_pools(every_pool)


def training_sizes(curves):
    return sorted({n for sizes in curves.values() for n in sizes})


def format_curves(curves):
    """Lines of a table: one row per number of training subjects, one column per model."""
    rows = [["training subjects", *curves]]
    for n in training_sizes(curves):
        row = [f"{n:,}"]
        for sizes in curves.values():
            row.append(cell(sizes[n], "auroc") if n in sizes else "")
        rows.append(row)
    return format_table(rows)


def plot_curves(path, curves, title):
    """AUROC against the number of training subjects, with 95 % intervals."""
    with plots.figure(path, title, height=3.6, width=5.6) as ((axes,),):
        for k, (name, sizes) in enumerate(curves.items()):
            # Moved apart a little, so that the intervals do not cover each other.
            x = np.array(list(sizes)) * 1.03 ** (k - len(curves) / 2)
            auroc = np.array([part["auroc"] for part in sizes.values()])
            low, high = np.array([part["ci95"]["auroc"] for part in sizes.values()]).T
            error = (auroc - low, high - auroc)
            axes.errorbar(x, auroc, error, marker="o", markersize=3, capsize=2, label=name)
        ticks = training_sizes(curves)
        axes.set(xscale="log", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
        axes.set(xlabel="training subjects", ylabel="AUROC, subject-level")
        axes.minorticks_off()
        axes.axhline(0.5, color="#999999", linestyle=":")
        axes.legend()


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("png", type=new_png, metavar="PNG", help="the picture")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    curves, leaks = learning_curve(args.runs)
    print("\n".join(["AUROC by number of training subjects, mean over seeds", *leaks, ""]))
    print("\n".join(format_curves(curves)))
    plot_curves(args.png, curves, "; ".join(["how many subjects are needed?", *leaks]))
    print(f"\npicture in {args.png}")


if __name__ == "__main__":
    run_script(main)

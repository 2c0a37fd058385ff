"""Learning curves: subject-level AUROC by the number of training subjects, for several models.

    python -m docs.experiments.learning_curve figures/learning_curve.png runs/*-n*-s?

Runs of one model and size are averaged over seeds; runs of one model should differ in --subjects
and --seed alone. """

import numpy as np

from adnc.cli import Parser, new_png, run_script
from adnc.files import read_csv
from adnc.scoring import metrics, plots
from adnc.scoring.assess import cell, format_table
from adnc.scoring.metrics import mean_scores
from modules import describe_model
from tools.evaluate import align, find_leaks, pool_seeds, read_flags


def learning_curve(folders):
    """{model: {training subjects: scores}} at subject level, mean over seeds, with the logistic
    regression of the first model's runs; and lines on leaks."""
    by_model = {}
    for folder in folders:
        split = read_csv(f"{folder}/split.csv")
        n_subjects = split.group[split.split != "test"].nunique()
        model = describe_model(read_flags(folder)["model"])
        by_model.setdefault(model, {}).setdefault(n_subjects, []).append(folder)
    pools = {}
    for model, sizes in by_model.items():
        for n_subjects, members in sizes.items():
            pools[model, n_subjects] = pool_seeds(members, "test")

    everything = [one for several in pools.values() for one in several]
    tables = iter(align([one.table for one in everything]))  # so that all have the same groups
    curves = {}
    for (model, n_subjects), several in pools.items():
        own = [next(tables) for _ in several]
        members = {model: own}
        if model == next(iter(by_model)):
            name = metrics.BASELINES["logistic_regression"]
            members[name] = [metrics.as_baseline(table, "logistic_regression") for table in own]
        for name, predictions in members.items():
            scores = metrics.summarise(mean_scores(predictions))
            curves.setdefault(name, {})[n_subjects] = scores["subject"] or scores["scan"]
    curves = {model: dict(sorted(sizes.items())) for model, sizes in curves.items()}
    return curves, [f"LEAKY: {leak}" for leak in find_leaks(everything)]


def plot_curves(path, curves, title):
    """AUROC against the number of training subjects, with 95 % intervals."""
    counts = sorted({n for sizes in curves.values() for n in sizes})
    with plots.figure(path, title, height=3.6, width=5.6) as ((axes,),):
        for k, (model, sizes) in enumerate(curves.items()):
            x = np.array(list(sizes)) * 1.03 ** (
                k - len(curves) / 2
            )  # so that intervals do not cover each other
            auroc = np.array([part["auroc"] for part in sizes.values()])
            low, high = np.array([part["ci95"]["auroc"] for part in sizes.values()]).T
            axes.errorbar(
                x,
                auroc,
                (auroc - low, high - auroc),
                marker="o",
                markersize=3,
                capsize=2,
                label=model,
            )
        axes.set(
            xscale="log",
            xticks=counts,
            xticklabels=[f"{n:,}" for n in counts],
            xlabel="training subjects",
            ylabel="AUROC, subject-level",
        )
        axes.minorticks_off()
        axes.axhline(0.5, color="#999999", linestyle=":")
        axes.legend()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("png", type=new_png, metavar="PNG", help="the picture")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    args = parser.parse_args(argv)
    curves, lines = learning_curve(args.runs)
    rows = [["training subjects", *curves]]
    for n in sorted({n for sizes in curves.values() for n in sizes}):
        rows.append(
            [
                f"{n:,}",
                *(cell(sizes[n], "auroc") if n in sizes else "" for sizes in curves.values()),
            ]
        )
    print(
        "AUROC by number of training subjects, mean over seeds",
        *lines,
        "",
        *format_table(rows),
        sep="\n",
    )
    plot_curves(args.png, curves, "; ".join(["how many subjects are needed?", *lines]))
    print(f"\npicture in {args.png}")


if __name__ == "__main__":
    run_script(main)

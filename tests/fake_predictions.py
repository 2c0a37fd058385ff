"""Tables and folders of predictions for tests of scores: random subjects, scans and slices."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from adnc.files import write_json
from adnc.scoring import metrics
from adnc.scoring.assess import write_results
from adnc.scoring.calibration import apply_calibration, calibrate


def make_predictions(**columns):
    """A table with the columns that predictions always have, empty if not given."""
    table = pd.DataFrame(columns)
    empty = dict(threshold=0.5, exposure=None, prediction_set=None, out_of_range=None)
    empty["dark_share"] = np.nan
    table = table.assign(**empty).astype({"subject": "string", "prediction_set": "string"})
    return metrics.with_predictions(table.assign(group=table.subject))


def random_predictions(subjects=30, seed=0, slices=5, digits=2):
    """5 slices a scan and 1 to 3 scans a subject: more often right than wrong, and alike within a
    subject."""
    rng = np.random.default_rng(seed)
    n_scans = rng.integers(1, 4, subjects)
    subject = np.repeat(np.arange(subjects), n_scans)  # of each scan
    visit = np.concatenate([np.arange(n) for n in n_scans])
    y = subject % 2
    shift = rng.normal(0, 1, subjects)[subject]
    subject, visit, y, shift = (np.repeat(values, slices) for values in (subject, visit, y, shift))
    logit = (2 * y - 1) * 0.8 + shift + rng.normal(0, 0.5, len(y))
    return make_predictions(
        scan=[f"{s}s{n}" for s, n in zip(subject, visit)],
        slice=np.tile(np.arange(slices), n_scans.sum()),
        subject=[f"p{s}" for s in subject],
        label=np.where(y == 1, "AD", "NC"),
        logit=logit,
        p_AD=expit(logit).round(digits),
    )


def without_subjects(table):
    return table.assign(subject=pd.Series(None, table.index, dtype="string"))


def slice_arrays(table):
    """(y, p, predicted) of the slices of a table."""
    return metrics.arrays(table, "slice")[:3]


def complete(table, coverage=0.9):
    """Random predictions with every column of predictions.csv, calibrated, on subjects that
    training has not seen."""
    calibration = calibrate(random_predictions(40, seed=99))
    table = apply_calibration(table, calibration, coverage)
    table = table.assign(
        path=table.scan + "_" + table.slice.astype(str) + ".jpeg",
        exposure=table.exposure.fillna("no"),
        majority_class=0.52,
        window_vote=np.where(table.slice < 2, 0.4, 0.6),
        logistic_regression=expit(table.logit / 2 + 0.1).round(7),
        dark_share=expit(table.logit / 3 - 0.1).round(7),
        with_dark_share=expit(table.logit / 1.5).round(7),
    )
    types = {**dict.fromkeys(metrics.PREDICTIONS, "string"), **metrics.NUMBERS}
    return table.reindex(columns=metrics.PREDICTIONS).astype(types)


def write_run(folder, table, *, title="test", leaks=(), notes=(), coverage=0.9, **flags):
    """A folder as of a finished run of train.py with these flags; returns its path."""
    folder = Path(folder)
    options = dict(title=title, leaks=leaks, notes=notes, coverage=coverage)
    part = "val" if title.startswith("validation") else "test"
    write_results(complete(table, coverage), folder / part, **options)
    write_json(folder / "config.json", {"flags": {"seed": 0, "lr": 1e-4, **flags}})
    return folder

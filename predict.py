"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg                   # one slice, with the newest run under runs/
    python predict.py SLICES --coverage 0.9            # AD, NC, or AD|NC where it is not sure enough

INPUT is a slice, a folder of slices, or a folder with AD/ and NC/. The checkpoint alone decides the architecture, the
image size and the classes. Written to --out: predictions.csv (a row a slice), scans.csv and subjects.csv (mean p_AD,
the probability of AD, calibrated on the run's validation), and where the labels are known metrics.json, baselines.csv
and pictures. --coverage 0.9 adds prediction sets that promise to hold the truth for 90 % of scans like those of
validation. A file that cannot be read gets a row with the reason; the exit status is 2 if none could be. A slice that
is unlike those of training (a photograph, an inverted picture, a head with its skull) gets a warning.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from dataset import EXTENSIONS, Parser, is_junk, list_images, mark_seen, parse_name, read_subjects, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a slice, or a folder of slices (or of AD/ and NC/)")
    parser.add_argument("--checkpoint", metavar="FILE", help="best_model.pth of a run (default: newest in runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: predictions/<time>)")
    parser.add_argument("--coverage", type=float, metavar="C",
                        help="prediction sets by scan that hold the truth with this probability, e.g. 0.9")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="slices at once (default: 64)")
    parser.add_argument("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
                        help="precision; auto is fp16 on CUDA, bf16 on a CPU that has it (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if not 1 <= args.batch_size <= 1e6:
        parser.error(f"--batch-size is {args.batch_size}; expected a number from 1 to 1e+06")
    if args.coverage is not None and not 0 < args.coverage < 1:
        parser.error(f"--coverage is {args.coverage}; expected more than 0 and less than 1, such as 0.9")
    return args


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import pandas as pd  # noqa: E402
import torch  # noqa: E402

import metrics  # noqa: E402
import utils  # noqa: E402
from baselines import fit_baselines, predict_baselines  # noqa: E402
from checkpoint import build_model, load_checkpoint, save_checkpoint  # noqa: E402
from dataset import printable, remember  # noqa: E402
from evaluate import PARTS, cell, format_assessment, write_results  # noqa: E402
from metrics import THRESHOLD, aggregate, conformal_quantile, expit, with_predictions  # noqa: E402
from slices import FACTS, fingerprint_slices, load_slices, unlike  # noqa: E402

COVERAGE = 0.9  # that the prediction sets of a run's own evaluation promise

# ---------------------------------------------------------------- input


def read_inputs(inputs):
    """Files and folders -> a table with a row a slice: path, scan, slice, subject, and label where one is known.

    A file that is not named <scan>_<slice> counts as a scan of its own, with its path for a name and no slice number.
    What cannot be predicted has the reason in the column error: an input that is not there or holds no images, a scan
    under both AD/ and NC/, two files of one slice. Raises ValueError if nothing else is there. What is passed over in
    folders, and metadata that cannot be read, is told in `table.attrs["warnings"]`.
    """
    rows, passed_over, warnings = [], [], []
    for given in map(Path, inputs):
        for path, label, error in _list_input(given, passed_over):
            scan, number = (not error and parse_name(path)) or (path, None)
            rows.append((path, scan, number, label, error, os.path.realpath(path)))
    table = pd.DataFrame(rows, columns=["path", "scan", "slice", "label", "error", "file"]).astype({"error": object})
    table = table.sort_values("label", na_position="last", kind="stable").drop_duplicates("file").drop(columns="file")
    both = table.groupby("scan").label.transform("nunique") > 1
    table.loc[both, "error"] = "is of a scan that stands under both classes, AD and NC; predict one of them"
    twice = table.slice.notna() & table.duplicated(["scan", "slice"], keep=False) & table.error.isna()
    for _, paths in table[twice].groupby(["scan", "slice"]).path:
        others = [paths.iloc[1]] + [paths.iloc[0]] * (len(paths) - 1)
        table.loc[paths.index, "error"] = [f"is the same slice of a scan as {other}; predict one" for other in others]
    if table.error.notna().all():
        first = table.iloc[0]
        more = f"; nor can {len(table) - 1} others be predicted" if len(table) > 1 else ""
        raise ValueError(f"{printable(first.path, '')} {first.error}{more}")
    if passed_over:
        warnings.append(f"passed over {len(passed_over)} files and folders that are no slices, first {passed_over[0]}")
    subjects, classes = {}, {}
    for root in {_set_root(given) for given in inputs}:
        try:
            known, labels, _ = read_subjects(root)
            subjects, classes = subjects | known, classes | labels
        except (ValueError, OSError) as problem:
            warnings.append(f"subjects are not known: {problem}")
    told = table.scan.map(classes)
    wrong = table.scan[told.notna() & table.label.notna() & (told != table.label)].nunique()
    if wrong:
        warnings.append(f"{wrong} scans stand in a folder of another class than the metadata say; the folder counts")
    table["slice"] = table.slice.astype("Int64")
    table.insert(3, "subject", table.scan.map(subjects).astype("string"))
    if table.label.isna().all():
        table = table.drop(columns="label")
    table = table.sort_values(["scan", "slice", "path"], ignore_index=True)
    table.attrs["warnings"] = warnings
    return table


def _list_input(given, passed_over):
    """The (path, label or None, error or None) of each image of one INPUT; appends to `passed_over` what it leaves."""
    if not os.path.exists(given):
        link = "is a link to nothing" if os.path.islink(given) else "does not exist"
        return [(str(given), None, f"{link}; expected an image or a folder of images")]
    if not given.is_dir():
        other = None if given.suffix.lower() in EXTENSIONS else (
            "is not an image that is read here; expected .jpeg, .jpg or .png")
        return [(str(given), None, other)]
    labelled = [label for label in ("AD", "NC") if (given / label).is_dir()]
    try:
        found = [(path, label, None) for label in labelled for path in list_images(given / label)]
        found += [(path, None, None) for path in ([] if labelled else list_images(given))]
        for folder in [given, *(given / label for label in labelled)]:
            entries = {entry.path for entry in os.scandir(folder) if not is_junk(entry.name)}
            passed_over += sorted(entries - {path for path, *_ in found} - {str(given / label) for label in labelled})
    except OSError as problem:
        return [(str(given), None, f"cannot be listed: {problem.strerror}")]
    if not found:
        hints = [given / name for name in ("test", "AD_NC/test") if (given / name).is_dir()]
        hint = f"; did you mean {hints[0]}?" if hints else ""
        return [(str(given), None, f"holds no images (.jpeg, .jpg, .png), nor do AD/ and NC/ in it{hint}")]
    return found


def _set_root(given):
    """The folder that the metadata stands in or beside: AD_NC for AD_NC/test/AD/x.jpeg, else the folder itself."""
    folder = Path(os.path.abspath(given))
    if not folder.is_dir():
        folder = folder.parent
    while folder.name in ("AD", "NC", "train", "test"):
        folder = folder.parent
    return folder


# ---------------------------------------------------------------- from a checkpoint and a table to results


def predict_table(checkpoint, table, *, device, amp, batch_size=64, images=None, seen=None):
    """Run a checkpoint's model, and its baselines, on a table of slices.

    Returns the table with logit and p_AD as the model gives them (see `calibrated`), p_AD of each baseline, and seen
    (see `mark_seen`; of the checkpoint's training, or of the `seen` given). If a file could not be read there is also
    a column error, and the row has no p_AD; if a slice is unlike those of training, a column unlike that says in what.
    `images` (M, H, W) spares the decoding: the table's labels are its rows, and its columns pixels and FACTS say what
    was found there.
    """
    if images is not None:
        rows, at, known, errors = table, table.index, table[["pixels", *FACTS]], None
        table = table.drop(columns=["pixels", *FACTS])
    else:
        errors = table.get("error", pd.Series(None, table.index, dtype=object))
        table = table.drop(columns="error", errors="ignore")
        wanted = table.index[errors.isna()]
        images, found, known = load_slices(table.path[wanted].tolist(), checkpoint["slice_size"], bar="decoding")
        errors = errors.fillna(pd.Series(found, index=wanted, dtype=object))
        at = [row for row, error in enumerate(found) if error is None]  # of images
        rows, known = table.loc[wanted[at]], known.iloc[at].set_index(wanted[at])
        known["pixels"] = fingerprint_slices(images[row] for row in at)
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    recipe = {name: checkpoint[name] for name in ("image_size", "mean", "std")}
    predicted = utils.evaluate(
        model, images, rows, rows=at, **recipe, device=device, amp=amp, batch_size=batch_size, bar="predicting"
    )[["logit", "p_AD"]]
    if checkpoint.get("baselines"):
        predicted = predicted.join(predict_baselines(checkpoint["baselines"], images, rows, at))
    seen = checkpoint["seen"] if seen is None else seen
    predicted["seen"] = mark_seen(rows.assign(pixels=known.pixels), seen)
    odd = unlike(known, checkpoint["statistics"])
    if (odd != "").any():
        predicted["unlike"] = odd.mask(odd == "")
    table = table.join(predicted)
    return table if errors is None or errors.isna().all() else table.assign(error=errors)


def calibrated(predictions, checkpoint, coverage=None):
    """Predictions as the checkpoint's calibration has them: p_AD at its temperature, prediction at its threshold, and
    where a coverage is asked for prediction_set, "AD", "NC" or "AD|NC", that of the whole scan. A scan with a slice
    unlike those of training has "AD|NC": what was promised was promised for others."""
    calibration = checkpoint.get("calibration")
    if calibration is None:
        if coverage is not None:
            raise ValueError("the checkpoint was not calibrated, for its run did not finish; finish it with --resume, "
                             "or leave out --coverage")
        calibration = {"temperature": 1.0, "threshold": THRESHOLD}
    # seven digits from here on, as the files have them, so that figures can be repeated from files
    p_ad = expit(predictions.logit / calibration["temperature"]).round(7)
    table = with_predictions(predictions.assign(p_AD=p_ad, threshold=calibration["threshold"]))
    table["prediction"] = table.prediction.where(table.p_AD.notna())
    if coverage is not None:
        quantile = conformal_quantile(calibration, coverage)
        scans = aggregate(table[table.p_AD.notna()], "scan")
        sets = pd.Series(metrics.prediction_sets(scans.p_AD.to_numpy(float), scans.prediction.to_numpy(), quantile))
        if "n_unlike" in scans:
            sets[scans.n_unlike > 0] = "AD|NC"
        table["prediction_set"] = table.scan.map(dict(zip(scans.scan, sets)))
    return table


# ---------------------------------------------------------------- a run's own evaluation


def assess_run(index, images, args, job):
    """Calibrate the best model of a run on val, then evaluate it on val and, once, on test, by the road of this file.

    What is learned here, from train and val alone, goes into best_model.pth: the baselines and the calibration. `index`
    and `images` are those of `loading.load_data`, `args` the flags of train.py, `job` says where the run happens.
    """
    out, log = job.out, job.log
    checkpoint = load_checkpoint(out / "best_model.pth")
    log(f"best epoch {checkpoint['epoch']}, chosen by validation accuracy")
    checkpoint["baselines"] = fit_baselines(index, images)
    titles = dict(PARTS)
    if args.folds is not None:
        titles["test"] = f"fold {args.fold} of {args.folds}, held out of train"
    for split, title in titles.items():
        # in the order of the command, so that its batches, and with them the last digits, are the same
        table = index.loc[index.split == split, ["path", "scan", "slice", "subject", "label", "pixels", *FACTS]]
        table = table.sort_values(["scan", "slice"])
        # val was chosen on, and is in checkpoint["seen"]; what is asked of it is whether --init was trained on it
        init = checkpoint.get("init") or {}
        seen = checkpoint["seen"] if split == "test" else init.get("seen") or remember(index[:0])
        predictions = predict_table(checkpoint, table, device=job.device, amp=job.amp, images=images, seen=seen)
        if split == "val":
            checkpoint["calibration"] = metrics.calibrate(predictions, args.threshold)
            save_checkpoint(out / "best_model.pth", **checkpoint)
            log("calibrated on the {subjects} subjects of validation: temperature {temperature:.3f}, threshold "
                "{threshold:.3f}".format(**checkpoint["calibration"]))
            if conformal_quantile(checkpoint["calibration"], COVERAGE) == float("inf"):
                log(f"these are too few subjects to promise a coverage of {COVERAGE}: every prediction set is AD|NC")
        leaks = run_leaks(checkpoint)
        if leaks and split == "val":
            leaks = ["split by slice, its scans were trained on"]
        figures = write_results(calibrated(predictions, checkpoint, COVERAGE), out / split, title=title, leaks=leaks,
                                notes=run_notes(checkpoint), coverage=COVERAGE, calibration=checkpoint["calibration"])
        if split == "val":  # it was chosen on: a line is enough
            log(f"{figures['title']}: accuracy by slice {cell(figures['slice'], 'accuracy')}, "
                f"by scan {cell(figures['scan'], 'accuracy')}")
            continue
        for line in format_assessment(figures):
            log(line)


# ---------------------------------------------------------------- the command


def run_leaks(checkpoint):
    """Sentences on how the run itself was split, for the titles of all that it predicts."""
    return ["of a run split by slice"] if checkpoint["split_by"] == "slice" else []


def run_notes(checkpoint):
    """Sentences on what cannot be known of a run, for the same titles."""
    init = checkpoint.get("init")
    if not init or init["seen"]:
        return []
    return [f"starts from {init['file']}, which does not say on whom it was trained"]


def tell(predictions, column, what):
    """Warnings of the rows that have something in a column: the first ten, and how many there are."""
    if column not in predictions:
        return
    rows = predictions[predictions[column].notna()]
    for row in rows.head(10).itertuples():
        yield f"{row.path} {'is unlike those of training: ' * (column == 'unlike')}{getattr(row, column)}"
    yield f"{len(rows)} of {len(predictions)} files {what} (column {column} of predictions.csv)"


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/best_model.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no runs/*/best_model.pth; train a model with train.py or name one with --checkpoint")
    return found[-1]


def main(args):
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    if "optimizer" in checkpoint:
        raise ValueError(f"{path} is there to resume a training; predict with best_model.pth beside it")
    device = utils.pick_device(args.device)
    amp = utils.pick_amp(args.amp, device)
    table = read_inputs(args.inputs)
    warnings = table.attrs["warnings"]
    out = utils.make_folder(args.out) if args.out else utils.new_folder(
        f"predictions/{datetime.now():%Y%m%d-%H%M%S}")
    model = checkpoint["model"]
    print(f"{path}: ConvNeXt {model['variant']}, {checkpoint['image_size']} px, epoch {checkpoint['epoch']}; "
          f"{len(table):,} slices on {device}, {utils.precision_name(amp)}")

    calibration = checkpoint.get("calibration")
    if calibration is None:
        warnings.append("the run did not finish: its p_AD are not calibrated")
    predictions = predict_table(checkpoint, table, device=device, amp=amp, batch_size=args.batch_size)
    predictions = calibrated(predictions, checkpoint, args.coverage)
    if args.coverage is not None and conformal_quantile(calibration, args.coverage) == float("inf"):
        k = calibration["subjects"]
        warnings.append(f"{k} validation subjects can promise a coverage of at most {k / (k + 1):.3f}: "
                        "every set is AD|NC")
    title = f"predictions of {Path(path).parent.name}/{Path(path).name}"
    read = predictions[predictions.p_AD.notna()]
    unlabelled = read.label.isna().sum() if "label" in read else 0
    if unlabelled:
        warnings.append(f"{unlabelled} of {len(read)} slices have no label: no figures are computed")
    figures = write_results(predictions, out, title=title, leaks=run_leaks(checkpoint), notes=run_notes(checkpoint),
                            coverage=args.coverage, calibration=calibration)
    warnings += tell(predictions, "error", "could not be read")
    warnings += tell(predictions, "unlike", "are unlike the slices of training, do not rely on what is said of them")
    scans = aggregate(read, "scan")
    if (scans.seen == "yes").any():
        warnings.append(f"{(scans.seen == 'yes').sum()} of {len(scans)} scans are of subjects that training has seen: "
                        "memory, no test (column seen of scans.csv)")
    for warning in warnings:
        print(f"warning: {printable(warning, '')}", file=sys.stderr)
    if scans.empty:
        raise ValueError(f"none of the {len(predictions)} files could be read; {out / 'predictions.csv'} says why")
    for row in scans.head(10).itertuples():
        verdict = row.prediction if args.coverage is None else row.prediction_set
        verdict += " (uncertain)" * (verdict == "AD|NC")
        strange = getattr(row, "n_unlike", 0)
        if 2 * strange >= row.n_slices:
            verdict = "no verdict"
        print(printable(f"scan {row.scan}: {verdict}, p_AD {row.p_AD:.3f} (mean of {row.n_slices} slices"
                        f"{f', {strange} of them unlike those of training' * (strange > 0)})", ""))
    if len(scans) > 10:
        print(f"... and {len(scans) - 10} more scans")
    print(*(format_assessment(figures) if figures else []), f"results in {out}", sep="\n")


if __name__ == "__main__":
    run(main, ARGS)

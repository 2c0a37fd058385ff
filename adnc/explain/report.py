"""One HTML page of a prediction, for people: each scan with its slices, how sure the model is, what not to conclude.

Not run by itself: predict.py --report writes it, from report.html.jinja beside this file.

The page is one file. Pictures are inlined, and its own policy forbids the browser any request; only where they would
take more than INLINE bytes are they files in a folder beside it. Names and texts are strangers' data: what does not
print becomes an escape, and all is escaped for HTML.
"""

import base64
import contextlib
import hashlib
import io
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image

from adnc.scoring.assess import cell, format_baselines, format_sets, read_run, statements
from dataset import SliceSet
from adnc.files import open_locked, write_atomically
from adnc.scoring.metrics import BASELINES, METRICS, UNITS, aggregate, conformal_quantile, verdict
from modules import describe_model
from adnc.cli import InputError, Threads, printable

INLINE = 6_500_000  # bytes of pictures; in base64 a third more, so that a page stays below 10 MB
THUMBNAIL = 256  # pixels of the longer side, at most
WEBP = dict(format="WEBP", quality=80, method=2)  # 4 kB and 2 ms a slice of the phantom; method 4 doubles the time
RANKS = {"no verdict": 0, "not read": 1, "AD|NC": 2, "AD": 3, "NC": 3}  # verdicts, the least sure first
CURVES = {"confusion_matrix": "Confusion matrices", "roc_curve": "ROC curve", "calibration": "Reliability diagram",
          "risk_coverage": "Risk and coverage", "window_accuracy": "Accuracy per slice window"}  # fmt: skip
WIDTH, HEIGHT, EDGE = 240, 36, 4  # of a strip, in its own units


@dataclass
class Report:
    """What a page tells: a checkpoint and its file, what was asked of it (`inputs`, and `coverage` or None), the
    SliceSet and what `inference.calibrated` says about its rows, in the same order; the folder that `write_results`
    filled and the scores it returned; lines of warning, and of other notes. `overlays` maps the path of a slice to a
    picture of its shape, the bytes or the path of an image file; `overlay_note` says how they were made, and whether
    the method passed its checks."""

    file: str
    checkpoint: dict
    inputs: list
    coverage: float | None
    slices: SliceSet
    predictions: pd.DataFrame
    out: Path
    scores: dict | None = None
    warnings: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    overlays: dict = field(default_factory=dict)
    overlay_note: str = ""


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def claimed(path):
    """`path` is for the report of this process as long as the context is open, an empty file until it is written; where
    it is not written, it goes again. InputError if it cannot be; None is no report."""
    if path is None:
        yield
        return
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--report is {path}; expected a name that ends in .html")
    if not path.parent.is_dir():
        raise InputError(f"--report is {path}, but there is no folder {path.parent}; make it, or name another file")
    for taken in (path, _folder(path)):
        if os.path.lexists(taken) and not _is_empty(taken):  # as a process that was killed leaves it
            raise InputError(f"{taken} is already there, and nothing is overwritten; choose a new --report")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(open_locked(path))
        except ImportError:  # Windows
            path.touch()
        except BlockingIOError:
            raise InputError(f"{path} is for another process, which is at work; choose a new --report") from None
        except OSError as problem:
            raise OSError(f"{path} cannot be written: {problem.strerror}") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_empty(path):
                    path.unlink()


def _is_empty(path):
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def _folder(path):
    return path.with_name(path.stem + "_files")


def write_report(path, report):
    """Write a Report to `path`, and where its pictures take more than INLINE bytes, these into a folder beside it
    (`<name>_files`). Returns a line on what was written; OSError if it cannot be, and then nothing is left."""
    path, pictures = Path(path), _encode(report)
    folder = _folder(path) if sum(map(len, pictures.values())) > INLINE else None
    if folder:
        folder.mkdir()
    try:
        sources = {}
        for (i, kind), data in pictures.items():
            if folder:
                name = f"{kind}-{i}.webp"  # ours, for the names of slices may be anything
                (folder / name).write_bytes(data)
                sources[i, kind] = f"{quote(os.fsencode(folder.name))}/{name}"  # as seen from the page
            else:
                sources[i, kind] = _data(data)
        html = _render(_describe(report, sources, bool(folder)))
        write_atomically(path, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    except BaseException:  # a signal, too
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    beside = f", with {len(pictures):,} pictures in {folder}" if folder else ""
    return f"report in {path} ({path.stat().st_size / 1e6:.1f} MB{beside})"


def _render(content):
    import jinja2

    def plain(value):  # what has __html__ is of the template itself
        return printable(value, "") if isinstance(value, str) and not hasattr(value, "__html__") else value

    world = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=plain,
                               undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    # the policy of the page lets this one script run, and no other that might come in a name
    world.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return world.get_template("report.html.jinja").render(content)


# ---------------------------------------------------------------- pictures


def _encode(report):
    """{(row, kind): WebP} of each slice that could be read, kind "slice" or "overlay", in parallel."""
    from tqdm import tqdm

    rows = report.slices.index.row.to_numpy(float)
    work = [(i, "slice", report.slices.images[int(row)]) for i, row in enumerate(rows) if np.isfinite(row)]
    work += [(i, "overlay", report.overlays[path]) for i, path in enumerate(report.predictions.path)
             if path in report.overlays and np.isfinite(rows[i])]  # fmt: skip

    def encode(item):
        i, kind, picture = item
        if kind == "slice":
            image = Image.fromarray(picture)
        else:
            with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as found:
                image = found.convert("RGBA" if found.has_transparency_data else "RGB")
            height, width = report.slices.images.shape[1:]
            if abs(image.width * height - image.height * width) > 0.02 * image.height * width:
                raise ValueError(f"the overlay of {report.predictions.path[i]} is {image.width} x {image.height}, its "
                                 f"slice {width} x {height}: one would not lie on the other")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, **WEBP)
        return file.getvalue()

    with Threads(os.cpu_count() or 1) as pool:  # Pillow encodes outside the interpreter's lock
        found = list(tqdm(pool.map(encode, work), "pictures", len(work), unit=" pictures", leave=False, disable=None))
    return {(i, kind): data for (i, kind, _), data in zip(work, found)}


def _data(data, kind="webp"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _strip(rows, threshold):
    """p_AD over slice position, as what an SVG of WIDTH x HEIGHT draws: the line, the points within and out of the
    training range, and ticks where a slice could not be read. Without slice numbers, in the order of the rows."""
    numbered = bool(rows.slice.notna().all())
    at = rows.slice.to_numpy(float) if numbered else np.arange(1.0, len(rows) + 1)
    span = max(np.ptp(at), 1)
    x = (WIDTH - np.ptp(at) / span * (WIDTH - 2 * EDGE)) / 2 + (at - at.min()) / span * (WIDTH - 2 * EDGE)
    y, known = _height(rows.p_AD.to_numpy(float)), rows.p_AD.notna().to_numpy()
    strange = rows.out_of_range.notna().to_numpy()

    def dots(some):
        return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[some], y[some]))

    line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[known], y[known])) if known.any() else ""
    low, high = (f"{at[i]:.0f}" for i in (0, -1))
    what = f"slices {low} to {high}" if numbered else f"{len(rows)} slices without a number"
    if known.any():
        p = rows.p_AD[known]
        what += f": p_AD from {p.min():.2f} to {p.max():.2f}, first {p.iloc[0]:.2f}, last {p.iloc[-1]:.2f}"
    return {"line": line, "dots": dots(known & ~strange), "label": what, "low": low, "high": high,
            "rings": dots(known & strange), "threshold": f"{_height(threshold):.1f}",
            "ticks": "".join(f"M{a:.1f} {HEIGHT - EDGE}v-6" for a in x[~known])}  # fmt: skip


def _height(p):
    return EDGE + (1 - p) * (HEIGHT - 2 * EDGE)


# ---------------------------------------------------------------- what the page says


def _describe(report, sources, linked):
    """All that the template names."""
    scans = _scans(report, sources)
    read = report.predictions[report.predictions.p_AD.notna()]
    single = tuple(f"{name} " for name in report.predictions.path)  # what is wrong with one file is told at its scan
    own = [_own_scores(report, *part) for part in (("Validation", "val"), ("Test", "test"))]
    calibration, both = report.checkpoint.get("calibration"), None
    if calibration and report.coverage is not None:
        quantile = conformal_quantile(calibration, report.coverage)  # see metrics.prediction_sets
        both = (1 - quantile, quantile) if 0.5 <= quantile < 1 else None
    curves = {title: report.out / f"{name}.png" for name, title in CURVES.items()} if report.scores else {}
    return {
        "report": report, "checkpoint": report.checkpoint, "model": _model(report), "scans": scans, "own": own,
        "warnings": [line for line in report.warnings if not line.startswith(single)],
        "calibration": calibration, "both": both, "threshold": float(read.threshold.iloc[0]),
        "now": f"{datetime.now():%Y-%m-%d %H:%M}", "verdicts": list(RANKS),
        "counts": Counter(scan["verdict"] for scan in scans), "exposure": Counter(s["exposure"] for s in scans),
        "labelled": bool(read.label.notna().any()), "here": _tables(report.scores or {}),
        "curves": {title: _data(path.read_bytes(), "png") for title, path in curves.items() if path.exists()},
        "overlays": any(kind == "overlay" for _, kind in sources), "width": WIDTH, "height": HEIGHT,
        "side": THUMBNAIL, "linked": linked, "n_slices": len(report.predictions),
    }  # fmt: skip


def _scans(report, sources):
    """A dict a scan, the most uncertain first: those without a verdict, then AD|NC, then by the distance of p_AD from
    the threshold. A scan of which no slice could be read is among them."""
    table = report.predictions.reset_index(drop=True)
    said = {row.scan: row for row in aggregate(table[table.p_AD.notna()], "scan").itertuples()}
    scans = []
    for scan, rows in table.groupby("scan", sort=False):
        rows, row = rows.sort_values("slice", kind="stable"), said.get(scan)
        what = verdict(row) if row else "not read"
        n = {"out of the training range": int(rows.out_of_range.notna().sum()),
             "not read": int(rows.error.notna().sum())}  # fmt: skip
        flags = [f"{count} {kind}" for kind, count in n.items() if count]
        flags += ["seen in training: memory, not a test"] * bool(row and row.exposure == "yes")
        first, label, subject = rows.iloc[0], rows.label.dropna(), rows.subject.dropna()
        reasons = rows.error.fillna("out of the training range: " + rows.out_of_range)
        slices = [{"name": os.path.basename(each.path), "number": None if pd.isna(each.slice) else int(each.slice),
                   "p_AD": None if pd.isna(each.p_AD) else each.p_AD, "strange": not pd.isna(each.out_of_range),
                   "picture": sources.get((each.Index, "slice")), "overlay": sources.get((each.Index, "overlay"))}
                  for each in rows.itertuples()]  # fmt: skip
        scans.append({
            "name": os.path.basename(scan), "folder": os.path.dirname(first.path), "verdict": what, "flags": flags,
            "label": None if label.empty else label.iloc[0], "subject": None if subject.empty else subject.iloc[0],
            "p_AD": row.p_AD if row else None, "exposure": row.exposure if row else "not read", "slices": slices,
            "wrong": bool(row and len(label) and what in ("AD", "NC") and what != label.iloc[0]),
            "reasons": [(os.path.basename(rows.path[i]), text) for i, text in reasons.dropna().items()],
            "strip": _strip(rows, first.threshold),
            "sure": (RANKS[what], abs(row.p_AD - first.threshold) if row else 0),
        })  # fmt: skip
    return sorted(scans, key=lambda scan: scan["sure"])


def _model(report):
    """(what, text) pairs on the checkpoint, from its model card."""
    checkpoint, flags = report.checkpoint, report.checkpoint["flags"]
    seen, demo = checkpoint["exposure"], flags["demo"]
    recipe = "demo" if demo and flags["recipe"] == "default" else flags["recipe"]  # as train.py reads them
    stated = statements(checkpoint)
    split = {"subject": "whole subjects apart", "slice": "slices of one scan on both sides: LEAKY"}
    yield "File", str(report.file)
    yield "Model", (f"{describe_model(checkpoint['model']['variant'])}, {checkpoint['image_size']} px, epoch "
                    f"{checkpoint['epoch']} of {flags['epochs']}, recipe {recipe}, seed {flags['seed']}")
    subjects = f"{len(seen['subjects']):,} known subjects" + " and others unknown" * seen["unknown"]
    yield "Trained and validated on", (f"{subjects}, {len(seen['scans']):,} scans, {len(seen['slices']):,} slices of "
                                       f"{'the synthetic phantom of --demo' if demo else flags['data'] or 'AD_NC'}")
    yield "Split", "; ".join([split[checkpoint["split_by"]], *stated["leaks"], *stated["notes"]])


def _own_scores(report, what, part):
    """The scores of the checkpoint's own validation or test, from its run's folder, or why there are none."""
    folder = Path(report.file).parent / part
    try:
        table, scores = read_run(folder)
        if scores["calibration"]["temperature"] != report.checkpoint["calibration"]["temperature"]:
            raise InputError(f"{folder} was not written for this checkpoint")
        scans = aggregate(table, "scan")
        return {"what": what, "tables": _tables(scores),
                "line": _line(scores), "unseen": _line(scores.get("unseen_subjects")),
                "calibration": cell(scores["scan"], "calibration_error"), "leaks": scores["leaks"],
                "n": len(scans), "n_ad": int((scans.label == "AD").sum())}  # fmt: skip
    except InputError as problem:
        return {"what": what, "tables": [], "missing": str(problem)}
    except (KeyError, TypeError, ValueError) as problem:
        return {"what": what, "tables": [], "missing": f"{folder} cannot be read ({problem})"}


def _line(scores):
    """Scores in short; "" of None."""
    return (f"scan-level accuracy {cell(scores['scan'], 'accuracy')}, AUROC {cell(scores['scan'], 'auroc')} (95 % "
            f"intervals), n = {scores['scan']['n']}") if scores else ""


def _tables(scores):
    """Scores, and beside them those of unseen subjects, as rows of text: a row a metric, a column a unit."""
    tables = []
    for part in filter(None, (scores, scores.get("unseen_subjects"))):
        units = [unit for unit in UNITS[::-1] if part[unit] is not None]
        compared = set(part.get("baselines", ()))
        tables.append({
            "title": part["title"], "units": [(f"{unit}s", part[unit]["n"]) for unit in units],
            "rows": [(label, [cell(part[unit], name) for unit in units]) for name, label in METRICS.items()],
            "lines": [format_baselines(part)[-1]] * bool(compared and compared <= set(BASELINES))
                     + ([format_sets(part)] if "prediction_sets" in part else []),
        })  # fmt: skip
    return tables

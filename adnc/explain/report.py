"""HTML report of a prediction: scans, slices, verdicts, scores and their limits.

The page is rendered from report.html.jinja beside this file. It is one file: pictures are inlined,
and its content security policy forbids every request. Only if the pictures exceed INLINE bytes are
they files in a folder beside the page. Names and texts are not trusted: characters that do not
print become escapes, and everything is escaped for HTML.
"""

import base64
import hashlib
import io
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from adnc.errors import InputError, printable
from adnc.files import require_new, write_text
from adnc.scoring import plots
from adnc.scoring.assess import (
    cell,
    describe_distrust,
    describe_worth,
    format_baselines,
    format_beyond,
    format_sets,
    is_drawn,
    read_run,
    statements,
    why_no_verdicts,
)
from adnc.scoring.calibration import conformal_quantile
from adnc.scoring.metrics import METRICS, UNITS, aggregate, verdict
from adnc.volumes.look import describe_order, picture_sides

INLINE = 6_500_000  # bytes of pictures, a third more in base64: the page stays below 10 MB
THUMBNAIL = 256  # pixels of the longer side, at most
WEBP = {"format": "WEBP", "quality": 80, "method": 2}  # 4 kB, 2 ms a slice; method 4 takes 4 ms
SHORT = {"left": "L", "right": "R"}
NAMES = {"AD|NC": "uncertain"}  # of verdicts, where the page says it otherwise than scans.csv
RANKS = {"no verdict": 0, "not read": 1, "AD|NC": 2, "AD": 3, "NC": 3}  # the least certain first
CURVES = {
    "confusion_matrix": "Confusion matrices",
    "roc_curve": "ROC curve",
    "calibration": "Reliability diagram",
    "risk_coverage": "Risk and coverage",
    "window_accuracy": "Accuracy per slice window",
}
WIDTH, HEIGHT, EDGE = 240, 36, 4  # of the plot of p_AD by slice, in units of its SVG
PLOTTED = HEIGHT - 2 * EDGE  # from a p_AD of 0 to 1


@dataclass
class Report:
    """The content of a page.

    file, checkpoint, model_name: path of the checkpoint, the checkpoint, the name of its model.
    inputs, coverage: the arguments of the command.
    index, images: of a SliceSet.
    predictions: the table of `apply_calibration`, in the order of the index.
    spread: of `scan_spread`, for an ensemble.
    out, scores: the folder that `write_results` filled, and the scores that it returned.
    warnings, notes: lines of text.
    looks: scan -> the Look that its slices were cut with, where it is known.
    explained: of `Explainer.write`, if attribution maps were asked for.
    """

    file: str
    checkpoint: dict
    model_name: str
    inputs: list
    coverage: float | None
    index: pd.DataFrame
    images: np.ndarray
    predictions: pd.DataFrame
    out: Path
    spread: pd.DataFrame | None = None
    scores: dict | None = None
    warnings: list = field(default_factory=list)
    notes: list = field(default_factory=list)
    looks: dict = field(default_factory=dict)
    explained: object = None

    @property
    def distrust(self):
        """Sentences if the model is not shown to be better than guessing, or saw drawings alone,
        else None: then the page gives no verdicts."""
        return describe_distrust(self.checkpoint)

    @property
    def drawn(self):
        """Whether the model saw drawings alone."""
        return is_drawn(self.checkpoint)

    @property
    def ranked(self):
        """Whether the scores have no threshold: then the page ranks the scans by them."""
        return why_no_verdicts(self.checkpoint) is not None

    @property
    def scored(self):
        """Whether the page shows scores."""
        return self.ranked or self.distrust is None

    @property
    def overlays(self):
        """{path of a slice: path of its overlay}"""
        return self.explained.overlays if self.explained else {}


# ---------------------------------------------------------------- files


def require_writable(path, out=None):
    """InputError if no report can be written to `path`.

    Its name must end in .html, neither the file nor its folder of pictures may exist, its parent
    must exist or be the folder `out` that is about to be made, and jinja2 must be installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--report is {path}; expected a name that ends in .html")
    is_out = out is not None and os.path.abspath(path.parent) == os.path.abspath(out)
    if not path.parent.is_dir() and not is_out:
        raise InputError(f"--report is {path}, but there is no folder {path.parent}; make it first")
    require_new(path, "--report")
    require_new(picture_folder(path), "--report")
    import_jinja()


def import_jinja():
    try:
        import jinja2
    except ImportError:
        raise InputError(
            "--report needs jinja2; install it with: python -m pip install -r requirements.txt"
        ) from None
    return jinja2


def picture_folder(path):
    return path.with_name(path.stem + "_files")


def write_report(path, report):
    """Write a Report to `path`, which must be new; returns a line about what was written.

    If the pictures exceed INLINE bytes, they are written into the folder `<name>_files` beside it.
    """
    path = Path(path)
    pictures = encode_pictures(report)
    folder = None
    if sum(len(data) for data in pictures.values()) > INLINE:
        folder = picture_folder(path)
        folder.mkdir()
    sources = {}
    for (i, kind), data in pictures.items():
        if folder is None:
            sources[i, kind] = data_address(data, "webp")
        else:
            name = f"{kind}-{i}.webp"  # the names of slices may be anything
            (folder / name).write_bytes(data)
            # An address relative to the page.
            sources[i, kind] = f"{quote(os.fsencode(folder.name))}/{name}"
    write_text(path, render(describe_page(report, sources, linked=folder is not None)))

    beside = ""
    if folder:
        beside = f", with {len(pictures):,} pictures in {folder}"
    return f"report in {path} ({path.stat().st_size / 1e6:.1f} MB{beside})"


def render(content):
    """The HTML of the template, given {name: value} of everything that it uses."""
    jinja2 = import_jinja()

    def finalize(value):
        is_markup = hasattr(value, "__html__")  # output of the template's own macros
        if isinstance(value, str) and not is_markup:
            return printable(value, keep="")
        return value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The policy of the page allows this one script, and so no script that is hidden in a name.
    environment.filters["sha256"] = sha256_base64
    return environment.get_template("report.html.jinja").render(content)


def sha256_base64(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---------------------------------------------------------------- pictures


def encode_pictures(report):
    """{(row, kind): WebP} of each readable slice; kind is "slice" or "overlay"."""
    work, overlays = [], report.overlays
    for i, (row, path) in enumerate(zip(report.index.row.to_numpy(float), report.predictions.path)):
        if np.isfinite(row):
            work.append((i, "slice", Image.fromarray(report.images[int(row)])))
            if path in overlays:
                work.append((i, "overlay", overlays[path]))

    def encode(item):
        _, kind, picture = item
        if kind == "overlay":  # a path
            with Image.open(picture) as image:
                picture = image.convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, **WEBP)
        return file.getvalue()

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        encoded = pool.map(encode, work)
        bar = tqdm(encoded, "pictures", len(work), unit=" pictures", leave=False, disable=None)
        return {(i, kind): data for (i, kind, _), data in zip(work, bar)}


def data_address(data, kind):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def probability_plot(rows, threshold):
    """The plot of p_AD by slice number, as SVG paths in a box of WIDTH x HEIGHT.

    line: through all points. dots, rings: slices within and out of the training range, as lines of
    no length with round ends. ticks: slices that could not be read. Unless all slices have numbers,
    the x axis is their order.
    """
    numbered = bool(rows.slice.notna().all())
    at = rows.slice.to_numpy(float) if numbered else np.arange(1.0, len(rows) + 1)
    inner = WIDTH - 2 * EDGE
    span = max(np.ptp(at), 1)
    x = (WIDTH - np.ptp(at) / span * inner) / 2 + (at - at.min()) / span * inner
    y = plot_height(rows.p_AD.to_numpy(float))
    predicted = rows.p_AD.notna().to_numpy()
    outside = rows.out_of_range.notna().to_numpy()

    def dots(mask):
        return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x[mask], y[mask]))

    low, high = f"{at[0]:.0f}", f"{at[-1]:.0f}"
    label = f"slices {low} to {high}" if numbered else f"{len(rows)} slices without a number"
    line = ""
    if predicted.any():
        line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x[predicted], y[predicted]))
        p = rows.p_AD[predicted]
        label += f": from {p.min():.2f} to {p.max():.2f}"
        label += f", first {p.iloc[0]:.2f}, last {p.iloc[-1]:.2f}"
    return {
        "line": line,
        "dots": dots(predicted & ~outside),
        "rings": dots(predicted & outside),
        "ticks": "".join(f"M{a:.1f} {HEIGHT - EDGE}v-6" for a in x[~predicted]),
        "threshold": f"{plot_height(threshold):.1f}",
        "label": label,
        "low": low,
        "high": high,
    }


def colour_bar():
    """The colours of overlays on grey, from the strongest towards NC to the strongest towards AD,
    as colour stops of CSS."""
    (colours,) = plots.blend(np.full((1, 9), 120), np.linspace(-1, 1, 9)[None], 1)
    return ", ".join("rgb({}, {}, {})".format(*colour) for colour in colours)


def plot_height(p):
    """The y coordinate of p_AD in `probability_plot`."""
    return EDGE + (1 - p) * PLOTTED


# ---------------------------------------------------------------- the content of the page


def describe_page(report, sources, linked):
    """Everything that the template names."""
    scans = describe_scans(report, sources)
    predicted = report.predictions[report.predictions.p_AD.notna()]
    # A warning about one file is not repeated here: the page shows it at its scan.
    files = tuple(f"{path} " for path in report.predictions.path)

    warnings = []
    for line in report.warnings:
        said_above = report.distrust is not None and report.distrust in line
        if not line.startswith(files) and not said_above:
            warnings.append(line)

    if report.drawn:  # its test was on drawings
        own = []
    elif "members" in report.checkpoint:
        own = [ensemble_scores(report.checkpoint)]
    else:
        own = [own_scores(report, "Validation", "val"), own_scores(report, "Test", "test")]
    calibration = report.checkpoint.get("calibration")
    # The interval of p_AD with the verdict AD|NC, and whether every scan has it.
    both, band, all_uncertain = None, None, False
    if calibration and report.coverage is not None:
        quantile = conformal_quantile(calibration, report.coverage)
        # The prediction, AD from the threshold on, is always in the set: see prediction_sets.
        low = min(1 - quantile, calibration["threshold"])
        high = max(quantile, calibration["threshold"])
        all_uncertain = high >= 1
        if low < high and not all_uncertain:
            both = (low, high)
            band = (plot_height(high), PLOTTED * (high - low))

    curves = {}
    if report.scores:
        for name, title in CURVES.items():
            path = report.out / f"{name}.png"
            if path.exists():
                curves[title] = data_address(path.read_bytes(), "png")

    return {
        "report": report,
        "distrust": report.distrust,
        "checkpoint": report.checkpoint,
        "design": report.checkpoint.get("design"),
        "model": list(describe_checkpoint(report)),
        "scans": scans,
        "own": own,
        "warnings": warnings,
        "calibration": calibration,
        "both": both,
        "all_uncertain": all_uncertain,
        "threshold": float(predicted.threshold.iloc[0]),
        "now": f"{datetime.now():%Y-%m-%d %H:%M}",
        "verdicts": list(RANKS),
        "counts": Counter(scan["verdict"] for scan in scans),
        "exposure": Counter(scan["exposure"] for scan in scans),
        "n_ranked": sum(scan["rank"] is not None for scan in scans),
        "labelled": bool(predicted.label.notna().any()),
        "here": score_tables(report.scores) if report.scores else [],
        "curves": curves,
        "overlays": any(kind == "overlay" for _, kind in sources),
        "colour_bar": colour_bar(),
        "band": band,
        "names": NAMES,
        "worth": None if report.distrust else describe_worth(report.checkpoint),
        "subjects": report.predictions.subject.nunique(),
        "all_subjects_known": bool(report.predictions.subject.notna().all()),
        "differing": [scan for scan in scans if scan["differs"]],
        "width": WIDTH,
        "height": HEIGHT,
        "side": THUMBNAIL,
        "linked": linked,
        "n_slices": int(report.predictions.error.isna().sum()),
        "learned_fluid": learned_fluid(report.checkpoint),
        "groups": describe_groups(report.checkpoint),
    }


def describe_scans(report, sources):
    """One dict per scan, the least certain first.

    Scans without a verdict or a readable slice come first, then AD|NC, then the others by the
    distance of p_AD from the threshold. Of a model whose scores rank the highest comes first, and
    scans without a rank come last.
    """
    table = report.predictions.reset_index(drop=True)
    predicted = aggregate(table[table.p_AD.notna()], "scan")
    prediction = {row.scan: row for row in predicted.itertuples()}
    members, scans = {}, []
    if report.spread is not None:
        members = {row.Index: row for row in report.spread.itertuples()}
    for scan, rows in table.groupby("scan", sort=False):
        rows = rows.sort_values("slice", kind="stable")
        described = describe_scan(
            scan,
            rows,
            prediction.get(scan),
            sources,
            trusted=report.distrust is None,
            scored=report.scored,
            members=members.get(scan),
        )
        look = report.looks.get(scan)
        described["sides"], described["order"] = None, "orientation not known"
        if look:
            numbers = rows.slice.dropna()
            described["sides"] = [SHORT.get(side, side) for side in picture_sides(look)]
            described["order"] = describe_order(look, numbers.min(), numbers.max())
        scans.append(described)
    if report.ranked:
        return sorted(scans, key=lambda scan: (scan["rank"] is None, -(scan["p_AD"] or 0)))
    if report.distrust:  # the order must not tell what is withheld
        return sorted(scans, key=lambda scan: scan["name"])
    return sorted(scans, key=lambda scan: scan["certainty"])


def describe_scan(scan, rows, row, sources, trusted=True, scored=True, members=None):
    """A dict with everything that the page shows of a scan.

    rows: its slices in the table of predictions. row: its own prediction, None if no slice could be
    read. trusted: whether the model may give a verdict. scored: whether its scores are shown.
    members: its row of `scan_spread`, for an ensemble.
    """
    first = rows.iloc[0]
    labels, subjects = rows.label.dropna(), rows.subject.dropna()
    label = None if labels.empty else labels.iloc[0]
    decision = "not read"
    if row:
        decision = verdict(row) if trusted else "no verdict"
    shows_score = bool(row) and scored and (not trusted or decision != "no verdict")

    n_outside = rows.out_of_range.notna().sum()
    n_unread = rows.error.notna().sum()
    spread = ""
    if decision in ("AD", "NC", "AD|NC") and len(rows) > 1:
        p = rows.p_AD.dropna()
        n_above = int((p >= first.threshold).sum())
        spread = f"p_AD {p.min():.2f} to {p.max():.2f}, {n_above} of {len(p)} on the side of AD"
    flags = []
    if n_outside:
        flags.append(f"{n_outside} out of the training range")
    if n_unread:
        flags.append(f"{n_unread} not read")
    if row and row.exposure == "yes":
        flags.append("seen in training")
    if decision in ("AD", "NC", "AD|NC") and members is not None:
        if 0 < members.members_AD < members.members:
            flags.append(f"{members.members_AD:.0f} of {members.members:.0f} members predict AD")
        if members.members > 1:
            spread = f"{spread}; " if spread else ""
            spread += f"SD of the members' logits {members.member_sd:.2f}"

    slices = []
    for each in rows.itertuples():
        slices.append({
            "name": os.path.basename(each.path),
            "number": None if pd.isna(each.slice) else int(each.slice),
            "p_AD": None if pd.isna(each.p_AD) else each.p_AD,
            "out_of_range": not pd.isna(each.out_of_range),
            "picture": sources.get((each.Index, "slice")),
            "overlay": sources.get((each.Index, "overlay")),
        })  # fmt: skip

    reasons = rows.error.fillna("out of the training range: " + rows.out_of_range).dropna()
    distance = abs(row.p_AD - first.threshold) if row else 0
    return {
        "name": os.path.basename(scan),
        "folder": os.path.dirname(first.path),
        "verdict": decision,
        "scored": shows_score,
        "flags": flags,
        "spread": spread,
        "label": label,
        "subject": None if subjects.empty else subjects.iloc[0],
        "p_AD": row.p_AD if row else None,
        "rank": row.rank if row and not pd.isna(row.rank) else None,
        "exposure": row.exposure if row else "not read",
        "slices": slices,
        "differs": decision in ("AD", "NC") and label is not None and decision != label,
        "reasons": [(os.path.basename(rows.path[i]), text) for i, text in reasons.items()],
        "n_read": int(rows.error.isna().sum()),
        "strip": probability_plot(rows, first.threshold) if shows_score else None,
        "certainty": (RANKS[decision], distance),
    }


def describe_checkpoint(report):
    """(heading, text) pairs about the checkpoint."""
    checkpoint = report.checkpoint
    flags, seen = checkpoint["flags"], checkpoint["exposure"]
    stated = statements(checkpoint)
    data = flags["data"] or "AD_NC"
    if flags["demo"]:
        data = "the synthetic phantom of --demo"
    if report.drawn:
        data = "drawings (tools.phantom --cue varied)"
    subjects = f"{len(seen['subjects']):,} known subjects"
    if seen["unknown"]:
        subjects += " and others unknown"
    split = "whole subjects apart"
    if seen["unknown"]:
        split += " where they are known, else whole scans"
    if checkpoint["split_by"] == "slice":
        split = "slices of one scan on both sides: LEAKY"
    yield "File", str(report.file)
    if "members" in checkpoint:
        yield "Model", f"{report.model_name}, {checkpoint['design']}; p_AD is of their mean logit"
        for member in checkpoint["members"]:
            variant = member["model"]["variant"]
            yield "Member", f"{member['name']}: {variant}, {describe_training(member)}"
    else:
        yield "Model", f"{report.model_name}, {describe_training(checkpoint)}"
    text = f"{subjects}, {len(seen['scans']):,} scans, {len(seen['slices']):,} slices of {data}"
    if checkpoint["init"] and checkpoint["init"]["exposure"]:
        text += f" and of the training of {checkpoint['init']['file']}, from which it starts"
    yield "Trained and validated on", text
    yield "Split", "; ".join([split, *stated["leaks"], *stated["notes"]])
    if report.drawn and "real" in checkpoint:
        yield "Scores", "in weights/README.md, beside the model"
    elif report.drawn:
        yield "Scores", "in test/ of its run, on drawings"


def learned_fluid(checkpoint):
    """Whether the labels of training were the fluid that a drawn slice shows, not its class."""
    members = checkpoint.get("members", [checkpoint])
    return all(member["flags"].get("soft_labels") for member in members)


def describe_groups(checkpoint):
    """What the calibration counts."""
    if checkpoint["exposure"]["unknown"]:
        return "subjects or scans of unknown subjects"
    return "subjects"


def describe_training(checkpoint):
    """The image size, epochs, recipe, seed and fold of a checkpoint or of a member of an
    ensemble."""
    flags = checkpoint["flags"]
    text = (
        f"{checkpoint['image_size']} px, epoch {checkpoint['epoch']} of {flags['epochs']}, recipe "
        f"{flags['recipe']}, seed {flags['seed']}"
    )
    if flags["fold"] is not None:
        text += f", fold {flags['fold']} of {flags['folds']}"
    return text


def ensemble_scores(checkpoint):
    """The scores that were measured when an ensemble was made, or why there are none."""
    if "scores" not in checkpoint:
        missing = "The members have no common calibration, and were not tested together."
        return {"what": "Test", "tables": [], "missing": missing}
    return {"what": "Test", **describe_run(checkpoint["scores"])}


def own_scores(report, what, part):
    """The scores in the folder `part` of the checkpoint's own run, or why there are none."""
    folder = Path(report.file).parent / part
    try:
        table, scores = read_run(folder)
        calibration = report.checkpoint.get("calibration")
        if not calibration or scores["calibration"]["temperature"] != calibration["temperature"]:
            raise InputError(f"{folder} was not written for this checkpoint")
        scans = aggregate(table, "scan")
        counts = {"n": len(scans), "n_ad": int((scans.label == "AD").sum())}
        return {"what": what, **describe_run(scores), **counts}
    except InputError as problem:
        reason = str(problem)
    except (KeyError, TypeError) as problem:  # an edited file, or one of another version
        reason = f"{folder} cannot be read ({problem})"
    return {"what": what, "tables": [], "missing": reason}


def describe_run(scores):
    """What the page shows of a run's scores."""
    unseen = ""
    if "unseen_subjects" in scores:
        unseen = score_line(scores["unseen_subjects"])
    return {
        "tables": score_tables(scores),
        "line": score_line(scores),
        "unseen": unseen,
        "calibration": cell(scores["scan"], "calibration_error"),
        "leaks": scores["leaks"],
    }


def score_line(scores):
    """The scan-level accuracy and AUROC in one line."""
    scan = scores["scan"]
    return (
        f"scan-level accuracy {cell(scan, 'accuracy')}, AUROC {cell(scan, 'auroc')} (95 % "
        f"intervals), n = {scan['n']}"
    )


def score_tables(scores):
    """Tables of scores as text, one row per metric, one column per unit.

    A second table has the scores of unseen subjects, if they differ.
    """
    parts = [scores]
    if "unseen_subjects" in scores:
        parts.append(scores["unseen_subjects"])
    tables = []
    for part in parts:
        units = [unit for unit in reversed(UNITS) if part[unit] is not None]
        rows = []
        for name, label in METRICS.items():
            if name in part["scan"]:
                rows.append((label, [cell(part[unit], name) for unit in units]))
        lines = []
        if "baselines" in part:
            lines.append(format_baselines(part)[-1])
        if "beyond_dark_share" in part:
            lines += [line for line in format_beyond(part) if line]
        if "prediction_sets" in part:
            lines.append(format_sets(part))
        units = [(f"{unit}s", part[unit]["n"]) for unit in units]
        tables.append({"title": part["title"], "units": units, "rows": rows, "lines": lines})
    return tables

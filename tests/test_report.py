"""The HTML report: its content, its files, and its behaviour in a browser."""

import base64
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, drawing, write_slice
from PIL import Image

import predict
from adnc.data.index import list_inputs
from adnc.errors import InputError, printable
from adnc.explain import report
from adnc.explain.attribution import Explained
from adnc.explain.report import Report, require_writable, write_report
from adnc.scoring.assess import NOT_SHOWN, UNCALIBRATED, WORKS, statements, write_results
from adnc.scoring.calibration import apply_calibration
from adnc.scoring.ensemble import FOLDS, SEEDS
from adnc.scoring.metrics import aggregate, verdict
from adnc.volumes.look import Look
from dataset import load_inputs
from utils import load_checkpoint

HOSTILE = [
    "<script>document.title='taken'<!--_70.png",
    "\"'><img src=x onerror=document.title='taken'>_71.png",
    "right\u202eto-left_72.png",
    "control\x1b[31m\n\x07_73.png",
    "{{ 7*7 }}&amp;_74.png",
    "a" * 200 + "_75.png",
    "\u05e2\u05d1\u05e8\u05d9\u05ea_76.png",
    "surrogate\udcff\udcfe_77.png",
]


WORKING = {"verdict": WORKS, "unit": "subject", "sentences": ["one.", "two.", "three."]}


class Page(HTMLParser):
    """A page: `tags` [(tag, attributes)], `scans` the attributes of each scan in order, and
    `verdicts` {scan: verdict}."""

    def __init__(self, path):
        super().__init__()
        self.text = Path(path).read_text(encoding="utf-8")
        self.tags = []
        self.feed(self.text)
        self.scans = []
        for tag, attributes in self.tags:
            if tag == "tbody" and "data-name" in attributes:
                self.scans.append(attributes)
        self.verdicts = {scan["data-name"]: scan["data-verdict"] for scan in self.scans}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def words(self):
        """The text that is shown, still escaped, with single spaces."""
        body = self.text.split("</style>")[1].split("<script>")[0]
        return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def make_report(run_folder, folder, out, *, coverage=None, **changes):
    """The Report of a run's model on a folder of slices, as predict.py makes it."""
    file = run_folder / "best_model.pth"
    checkpoint = {**load_checkpoint(file), "conclusion": WORKING}
    listing = list_inputs([folder])
    slices = load_inputs(listing, slice_size=checkpoint["slice_size"], progress=None)
    predictions = predict.predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    page = Report(
        file=str(file),
        checkpoint=checkpoint,
        model_name="a small ConvNeXt",
        inputs=[str(folder)],
        coverage=coverage,
        index=slices.index,
        images=slices.images,
        predictions=apply_calibration(predictions, checkpoint["calibration"], coverage),
        out=out,
    )
    return replace(page, **changes)


@pytest.fixture(scope="module")
def slices(ad_nc, tmp_path_factory):
    """A folder of slices without labels: two test scans, an inverted scan, two files that are no
    images, and hostile names."""
    folder = tmp_path_factory.mktemp("slices")
    test = ad_nc / "test"
    for path in [*test.rglob("300_*"), *test.rglob("400_*")]:
        shutil.copy(path, folder)
        with Image.open(path) as image:
            inverted = Image.fromarray(255 - np.asarray(image))
        inverted.save(folder / f"inverted_{path.stem[-2:]}.png")
    (folder / "broken_1.png").write_bytes(b"no image")
    (folder / "300_75.png").write_bytes(b"no image")
    for name in HOSTILE:
        write_slice(folder / name, True, 0)
    return folder


@pytest.fixture(scope="module")
def unlabelled(run_folder, slices, tmp_path_factory):
    """A Report on `slices`, with a plain colour as the overlay of each slice of scan 300."""
    folder = tmp_path_factory.mktemp("unlabelled")
    Image.new("RGB", (48, 40), (255, 90, 0)).save(folder / "overlay.png")
    page = make_report(
        run_folder,
        slices,
        folder,
        warnings=["a warning about <b>all</b>"],
        notes=["plane <i>sagittal</i>"],
        looks={"300": Look("axial", step=2.0)},
    )
    shown = page.predictions[page.predictions.scan == "300"]
    page.explained = Explained(
        folder,
        shown[["path"]].assign(overlay="overlay.png"),
        sentence="This method <passed> its check",
        usable=True,
        caution="No place of disease.",
        full_colour=0.0123,
        unit="logit per <pixel>",
        scale="the quantile of <8> slices",
    )
    return page


@pytest.fixture(scope="module")
def unlabelled_page(unlabelled, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, unlabelled)
    return path


@pytest.fixture(scope="module")
def labelled_page(run_folder, ad_nc, tmp_path_factory):
    """The page of the run's own test set, with scores, curves and prediction sets."""
    folder = tmp_path_factory.mktemp("labelled")
    out = folder / "out"
    out.mkdir()
    page = make_report(run_folder, ad_nc / "test", out, coverage=0.5)
    with drawing():
        page.scores = write_results(
            page.predictions,
            out,
            title="scores of a test",
            **statements(page.checkpoint),
            coverage=0.5,
            calibration=page.checkpoint["calibration"],
        )
    write_report(folder / "report.html", page)
    return folder / "report.html"


# ---------------------------------------------------------------- content


def test_the_page_has_the_verdicts_of_the_terminal(unlabelled, unlabelled_page):
    table = unlabelled.predictions
    scans = aggregate(table[table.p_AD.notna()], "scan")
    printed = {}
    for row in scans.itertuples():
        name = printable(os.path.basename(row.scan), keep="")
        printed[name] = verdict(row)
    page = Page(unlabelled_page)
    assert {name: page.verdicts[name] for name in printed} == printed
    assert set(page.verdicts) - set(printed) == {"broken"}
    assert page.verdicts["broken"] == "not read"
    assert page.verdicts["inverted"] == "no verdict"


def test_the_least_certain_scans_come_first(unlabelled_page):
    scans = Page(unlabelled_page).scans
    assert [scan["data-verdict"] for scan in scans[:2]] == ["no verdict", "not read"]
    distances = [abs(float(scan["data-p"]) - 0.5) for scan in scans[2:]]
    assert distances == sorted(distances)


def test_a_scan_without_a_verdict_shows_no_p_ad(unlabelled_page):
    page = Page(unlabelled_page)
    assert page.scans[0]["data-name"] == "inverted"
    assert page.scans[0]["data-p"] == "-1"
    shown = page.text.split("<bdi>inverted</bdi>")[1].split("</tbody>")[0]
    assert not re.search(r">\s*0\.\d{3}", shown)
    assert "<svg" not in shown
    assert "not shown" in shown


def test_the_page_has_warnings_notes_reasons_and_limits(unlabelled, unlabelled_page):
    words = Page(unlabelled_page).words()
    groups = unlabelled.checkpoint["calibration"]["groups"]
    for part in (
        "a warning about &lt;b&gt;all",
        "plane &lt;i&gt;sagittal",
        "This method &lt;passed&gt; its check.",
        "whose full colour is the quantile of &lt;8&gt; slices.",
        "−0.012 towards NC 0 0.012 towards AD",
        "logit per &lt;pixel&gt;, the same scale in all scans",
        "p_AD is not the probability that a person has",
        "5 out of the training range",
        "1 not read",
        "cannot be read",
        "median grey",
        "Research use only",
        "NC does not mean healthy",
        "No coverage was requested",
        "However close it is",
        "a small ConvNeXt, 32 px",
        f"calibrated on the {groups} subjects in the validation",
    ):
        assert part in words, part


def test_sides_are_shown_where_they_are_known(unlabelled_page):
    text = Page(unlabelled_page).text.split("</style>")[1]
    shown = re.findall(r'<span class="side">L</span><span class="side right">R</span>', text)
    own, *_ = text.split("<bdi>300</bdi>")[1].split("</tbody>")
    assert len(shown) == own.count('"pair') == 5
    assert "axial, from bottom (70) to top (75), 2 mm apart; what is outside of these" in own
    assert "orientation not known" in text and "orientation not known" not in own


def test_a_labelled_page_has_scores_curves_and_the_scores_of_the_run(labelled_page):
    page = Page(labelled_page)
    words = page.words()
    assert words.count("balanced accuracy") == 3  # of these scans, of validation, of test
    for part in (
        "Scores on the scans of this page",
        "contain the label for 50 %",
        "Validation : scan-level accuracy",
        "Test : scan-level accuracy",
        "Test of its run scan-level accuracy",
        "subjects n = 6",
    ):
        assert part in words, part
    assert re.search(r"accuracy \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", words)
    curves = []
    for tag, attributes in page.tags:
        if tag == "img" and attributes["src"].startswith("data:image/png"):
            curves.append(attributes["alt"])
    assert len(curves) == 5
    assert "ROC curve of the scans of this page" in curves


def test_seen_scans_and_a_split_by_slice_are_marked(run_folder, ad_nc, tmp_path):
    page = make_report(run_folder, ad_nc / "train" / "AD", tmp_path)
    page.checkpoint["split_by"] = "slice"
    write_report(tmp_path / "page.html", page)
    words = Page(tmp_path / "page.html").words()
    text = Page(tmp_path / "page.html").text
    assert text.count('<span class="flags">seen in training</span>') == 6
    assert "Seen in training 6 scans yes, 0 no, 0 unknown" in words
    assert "LEAKY" in words


def delete_scores(folder):
    shutil.rmtree(folder)


def change_temperature(folder):
    file = folder / "metrics.json"
    file.write_text(re.sub(r'"temperature": [0-9.]+', '"temperature": 7.5', file.read_text()))


def cut_short(folder):
    file = folder / "metrics.json"
    file.write_text(file.read_text()[:-30])


def drop_a_score(folder):
    file = folder / "metrics.json"
    file.write_text(file.read_text().replace('"auroc"', '"x"'))


@pytest.mark.parametrize(
    "change, reason",
    [
        (delete_scores, "does not exist"),
        (change_temperature, "was not written for this checkpoint"),
        (cut_short, "cannot be read"),
        (drop_a_score, "cannot be read"),
    ],
)
def test_the_page_has_the_reason_for_missing_scores(run_folder, slices, tmp_path, change, reason):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    change(run / "test")
    write_report(tmp_path / "page.html", make_report(run, slices / "300_70.jpeg", tmp_path))
    words = Page(tmp_path / "page.html").words()
    assert re.search(f"Test : no scores[^<]*{reason}", words)
    assert "Validation : scan-level accuracy" in words


def test_p_ad_of_an_unfinished_run_is_called_uncalibrated(run_folder, slices, tmp_path):
    page = make_report(run_folder, slices / "300_70.jpeg", tmp_path)
    page.file = str(tmp_path / "best_model.pth")
    del page.checkpoint["calibration"]
    write_report(tmp_path / "page.html", page)
    words = Page(tmp_path / "page.html").words()
    assert "It is not calibrated , since the run did not finish" in words


def test_names_and_texts_cannot_become_markup_scripts_or_addresses(unlabelled_page):
    page = Page(unlabelled_page)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value.startswith(("data:image/", "data:,", "#own", "#how"))

    control = "\x00-\x09\x0b-\x1f\x7f"
    direction = "\u200e\u200f\u202a-\u202e"
    assert not re.search(f"[{control}{direction}\ud800-\udfff]", page.text)
    words = page.words()
    for part in (
        r"control\x1b[31m\n\x07",
        "rightto-left",  # marks of direction are no part of a name
        r"surrogate\udcff\udcfe",
        "{{ 7*7 }}&amp;amp;",
        "&lt;script&gt;document",
        "\u05e2\u05d1\u05e8\u05d9\u05ea",
    ):
        assert part in words, part


# ---------------------------------------------------------------- files


def test_a_report_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "there.html").write_text("old")
    (tmp_path / "new_files").mkdir()
    for name, reason in (
        ("there.html", "there.html exists, and nothing is overwritten; choose a new --report"),
        ("new.html", "new_files exists"),
        ("page.pdf", "ends in .html"),
        ("no/page.html", "there is no folder"),
    ):
        with pytest.raises(InputError, match=reason):
            require_writable(tmp_path / name)
    require_writable(tmp_path / "page.html")
    assert (tmp_path / "there.html").read_text() == "old"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="needs jinja2.*requirements.txt"):
        require_writable(tmp_path / "page.html")


def test_200_slices_are_one_file_below_10_mb(run_folder, tmp_path):
    """The slices are noise, which compresses worse than a brain, and three quarters black, as
    those of AD_NC."""
    for i in range(200):
        write_slice(tmp_path / "slices" / f"{i // 20}_{i % 20}.png", i % 40 < 20, i)
    page = make_report(run_folder, tmp_path / "slices", tmp_path)
    page.images = np.zeros((200, 240, 256), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (120, 128), np.uint8)
    for i in range(200):
        page.images[i, 60:180, 64:192] = np.roll(noise, i)
    assert "pictures in" not in write_report(tmp_path / "page.html", page)
    assert 1e6 < (tmp_path / "page.html").stat().st_size < 10e6
    assert not (tmp_path / "page_files").exists()


def test_too_many_pictures_are_written_beside_the_page(unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "INLINE", 1000)
    n_slices = int(unlabelled.index.error.isna().sum())
    n_pictures = n_slices + 5  # of these, five have overlays
    line = write_report(tmp_path / "page.html", unlabelled)
    assert f"with {n_pictures} pictures in" in line
    sources = set()
    for tag, attributes in Page(tmp_path / "page.html").tags:
        if tag == "img":
            sources.add(attributes["src"])
    assert len(sources) == n_pictures == len(list((tmp_path / "page_files").iterdir()))
    for source in sources:
        with Image.open(tmp_path / source) as image:
            assert image.format == "WEBP"
            assert image.size == (48, 40)


# ---------------------------------------------------------------- in a browser

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(os.environ.get("AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
LOAD_PICTURES = """
const done = arguments[0];
for (const x of document.querySelectorAll('details')) x.open = true;
const all = [...document.querySelectorAll('img')];
all.forEach(x => { x.loading = 'eager'; });
Promise.all(all.map(x => x.decode().then(() => x.naturalWidth > 0, () => false))).then(done);
"""
SHOWN_SCANS = """
return [...document.querySelectorAll('#scans tbody')]
    .filter(x => x.getClientRects().length).map(x => x.dataset.name)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    reason = "selenium is not installed"
    webdriver = pytest.importorskip("selenium.webdriver", reason=reason)
    if not BROWSER or not shutil.which("chromedriver"):
        pytest.skip("no Chromium with chromedriver; on Debian: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "hide-scrollbars",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(params=["unlabelled_page", "labelled_page"])
def page(request):
    return request.getfixturevalue(request.param)


def show(browser, path, width=1400, dark=False, scripts=True):
    command = browser.execute_cdp_cmd
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    command("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    command("Emulation.setEmulatedMedia", {"features": [scheme]})
    command("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(path.as_uri())


def choose(browser, name, text):
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element("id", name)).select_by_visible_text(text)


def test_the_page_loads_without_an_error_or_a_request(browser, page):
    show(browser, page)
    for log in ("browser", "performance"):
        browser.get_log(log)  # clears it
    browser.refresh()
    loaded = browser.execute_async_script(LOAD_PICTURES)
    assert len(loaded) > 20
    assert all(loaded)
    assert browser.title.startswith("AD or NC: ")  # no name ran as a script
    assert browser.get_log("browser") == []
    requests = []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            requests.append(event["params"]["request"]["url"])
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]


def test_linked_pictures_load(browser, unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "INLINE", 0)
    write_report(tmp_path / "a page #1?.html", unlabelled)
    show(browser, tmp_path / "a page #1?.html")
    assert all(browser.execute_async_script(LOAD_PICTURES))
    assert browser.get_log("browser") == []


def test_scans_can_be_sorted_filtered_and_searched(browser, unlabelled_page):
    p_ad = {scan["data-name"]: float(scan["data-p"]) for scan in Page(unlabelled_page).scans}
    show(browser, unlabelled_page)
    assert browser.execute_script(SHOWN_SCANS)[0] == "inverted"

    choose(browser, "sort", "highest p_AD")
    order = [p_ad[name] for name in browser.execute_script(SHOWN_SCANS)]
    assert order == sorted(order, reverse=True)
    choose(browser, "sort", "lowest p_AD")
    order = [p_ad[name] for name in browser.execute_script(SHOWN_SCANS)]
    assert order[:-2] == sorted(order[:-2])
    assert order[-2:] == [-1, -1]  # scans without a p_AD come last

    choose(browser, "show", "with remarks")
    assert set(browser.execute_script(SHOWN_SCANS)) == {"inverted", "broken", "300"}
    choose(browser, "show", "no verdict")
    assert browser.execute_script(SHOWN_SCANS) == ["inverted"]
    count = f"1 of {len(p_ad)}, lowest p_AD first"
    assert browser.find_element("id", "shown").text == count

    choose(browser, "show", "all")
    browser.find_element("id", "find").send_keys("RIGHT")
    assert browser.execute_script(SHOWN_SCANS) == ["rightto-left"]


def test_the_keyboard_opens_a_scan_and_shows_overlays_in_place(browser, unlabelled_page):
    from selenium.webdriver.common.keys import Keys

    show(browser, unlabelled_page)
    overlay = browser.find_element("css selector", ".overlay")
    scan = overlay.find_element("xpath", "ancestor::details")
    assert not scan.get_attribute("open")
    scan.find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert scan.get_attribute("open")
    assert not overlay.is_displayed()

    browser.find_element("id", "overlays").send_keys(Keys.SPACE)
    assert overlay.is_displayed()
    below = overlay.find_element("xpath", "preceding-sibling::img")
    assert overlay.rect == below.rect
    assert overlay.size["width"] > 80
    browser.find_element("id", "large").send_keys(Keys.SPACE)
    assert overlay.size["width"] > 200


def test_without_javascript_only_sorting_and_searching_are_missing(browser, unlabelled_page):
    show(browser, unlabelled_page, scripts=False)
    scans = {scan["data-name"] for scan in Page(unlabelled_page).scans}
    assert not browser.find_element("id", "find").is_displayed()
    for choice, expected in (
        ("no verdict", {"inverted"}),
        ("with remarks", {"inverted", "broken", "300"}),
        ("all", scans),
    ):
        choose(browser, "show", choice)
        shown = set()
        for row in browser.find_elements("css selector", "#scans tbody"):
            if row.is_displayed():
                shown.add(row.get_attribute("data-name"))
        assert shown == expected
    overlay = browser.find_element("css selector", ".overlay")
    overlay.find_element("xpath", "ancestor::details/summary").click()
    browser.find_element("id", "overlays").click()
    assert overlay.is_displayed()


@pytest.mark.parametrize("width, dark", [(1400, False), (400, True)])
def test_the_page_fits_its_window_and_is_accessible(browser, page, width, dark):
    if not AXE.is_file():
        pytest.skip(f"no axe-core at {AXE}; npm install --no-save axe-core, or set AXE")
    show(browser, page, width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    browser.execute_script("for (const x of document.querySelectorAll('details')) x.open = true;")
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    run = "axe.run({resultTypes: ['violations']}).then(arguments[0])"
    results = browser.execute_async_script(run)
    assert len(results["passes"]) > 15
    violations = []
    for rule in results["violations"]:
        violations.append((rule["id"], rule["impact"], rule["nodes"][0]["html"][:200]))
    assert violations == []


def test_the_page_prints_on_a4_in_light_colours(browser, unlabelled_page):
    show(browser, unlabelled_page, dark=True)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    pdf = base64.b64decode(printed["data"])
    sizes = set(re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf))
    assert [tuple(round(float(side)) for side in size) for size in sizes] == [(595, 842)]

    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    media = {"media": "print", "features": [scheme]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(colour) == "rgb(255, 255, 255)"
    assert not browser.find_element("css selector", ".tools").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


# ---------------------------------------------------------------- models that are not shown to work


@pytest.mark.parametrize("conclusion", [
    {"verdict": NOT_SHOWN, "unit": "subject", "sentences": ["AUROC 0.406.", "No better.", "Stop."]},
    None,
])  # fmt: skip
def test_a_model_that_is_not_shown_to_work_gives_no_verdict_and_the_page_begins_with_that(
    unlabelled, tmp_path, conclusion
):
    checkpoint = {**unlabelled.checkpoint, "conclusion": conclusion}
    write_report(tmp_path / "page.html", replace(unlabelled, checkpoint=checkpoint))
    page = Page(tmp_path / "page.html")
    assert set(page.verdicts.values()) <= {"no verdict", "not read"}
    first = "No verdicts are given. This model: never tested, since its run did not finish"
    if conclusion:
        first = f"No verdicts are given. This model: {NOT_SHOWN}. In the test of its run: AUROC"
    assert page.words().startswith(first)
    overlays = [attributes for tag, attributes in page.tags if attributes.get("id") == "overlays"]
    assert all("checked" not in attributes for attributes in overlays)  # only if asked for


def test_a_model_that_saw_drawings_alone_ranks_the_scans_and_gives_no_verdict(
    unlabelled, tmp_path
):
    exposure = {**unlabelled.checkpoint["exposure"], "drawn": True}
    checkpoint = {**unlabelled.checkpoint, "exposure": exposure}
    write_report(tmp_path / "page.html", replace(unlabelled, checkpoint=checkpoint))
    page = Page(tmp_path / "page.html")
    assert set(page.verdicts.values()) == {"no verdict", "not read"}
    assert page.words().startswith(
        "No verdicts are given. This model was trained on drawings alone. Its score is the "
        "resemblance to drawn atrophy; it grows with age, too, and is no diagnosis. Only the order "
        "of scans made in the same way says something. What it is worth on real slices is not "
        "known."
    )
    scores = [float(scan["data-p"]) for scan in page.scans]
    n_ranked = len(scores) - page.words().count("not ranked")
    assert 1 < n_ranked < len(scores) - 1 and scores[-1] == -1 and scores[-2] > 0
    assert scores[:n_ranked] == sorted(scores[:n_ranked], reverse=True)
    assert page.scans[-1]["data-name"] == "broken"
    assert f"rank 1 of {n_ranked}" in page.words()
    for word in ("threshold for AD", "calibrated on", "gets AD or NC", "resemble those labelled"):
        assert word not in page.words()


@pytest.mark.parametrize("coverage", [None, 0.9])
@pytest.mark.parametrize("design", [None, UNCALIBRATED])
def test_a_page_without_verdicts_says_nothing_of_verdicts(unlabelled, tmp_path, coverage, design):
    checkpoint = {**unlabelled.checkpoint, "conclusion": None}
    reason = "the model is not shown to work"
    if design:
        checkpoint["design"], reason = design, "the members have no common calibration"
        del checkpoint["calibration"]
    report = replace(unlabelled, checkpoint=checkpoint, coverage=coverage)
    write_report(tmp_path / "page.html", report)
    words = Page(tmp_path / "page.html").words()
    assert f"no verdict : {reason}" in words.replace("no verdict:", "no verdict :")
    for phrase in ("gets AD or NC", "The verdicts are made to", "the verdicts contain"):
        assert phrase not in words, phrase


def test_a_coverage_that_leaves_no_or_every_scan_uncertain_is_named(unlabelled, tmp_path):
    calibration = unlabelled.checkpoint["calibration"]
    texts = {0.4: "With this coverage no other scan is uncertain", 1.5: "every scan, since for"}
    for score, text in texts.items():
        changed = {**calibration, "threshold": 0.5, "scores": [score], "weights": [1.0]}
        changed["groups"] = 1
        checkpoint = {**unlabelled.checkpoint, "calibration": changed}
        report = replace(unlabelled, checkpoint=checkpoint, coverage=0.5)
        write_report(tmp_path / f"{score}.html", report)
        assert text in Page(tmp_path / f"{score}.html").words().replace(" ,", ",")


def words_of(report, path, **changes):
    """The text of the page of a report whose checkpoint has other entries."""
    write_report(path, replace(report, checkpoint={**report.checkpoint, **changes}))
    return Page(path).words()


def test_the_page_describes_what_training_has_seen(unlabelled, tmp_path):
    exposure = unlabelled.checkpoint["exposure"]
    words = words_of(unlabelled, tmp_path / "a.html", exposure={**exposure, "unknown": True})
    assert "whole subjects apart where they are known, else whole scans" in words
    assert "subjects or scans of unknown subjects in the validation" in words
    init = {"file": "phantom.pth", "exposure": exposure}
    words = words_of(unlabelled, tmp_path / "b.html", init=init)
    assert "and of the training of phantom.pth, from which it starts" in words

    drawn, flags = {**exposure, "drawn": True}, unlabelled.checkpoint["flags"]
    words = words_of(unlabelled, tmp_path / "c.html", exposure=drawn)
    assert "to tell drawn brains with atrophy from those without" in words
    assert "in test/ of its run, on drawings" in words and "weights/README.md" not in words
    soft = {**flags, "soft_labels": True}
    words = words_of(unlabelled, tmp_path / "d.html", exposure=drawn, flags=soft, real="0.7")
    assert "to tell how much fluid a drawn slice shows" in words and "weights/README.md" in words


def test_only_slices_that_were_read_are_counted(unlabelled, unlabelled_page):
    n_read = unlabelled.predictions.error.isna().sum()
    assert 0 < n_read < len(unlabelled.predictions)
    assert f"12 scans, {n_read} slices" in Page(unlabelled_page).words()


@pytest.mark.parametrize("design, sentence", [
    (SEEDS, "chosen on the validation that all members have in common"),
    (FOLDS, "predicted by the members that have not seen it, calibrated on the other folds"),
    (UNCALIBRATED, "Scores on the test scans of its runs, not on the scans of this page."),
])  # fmt: skip
def test_the_page_of_an_ensemble_says_nothing_of_the_validation_of_one_run(
    unlabelled, tmp_path, design, sentence
):
    members = [{**unlabelled.checkpoint, "name": "a"}]
    words = words_of(unlabelled, tmp_path / "a.html", members=members, design=design)
    assert sentence in words and "its scores are too high" not in words

"""The page of predict.py --report: what it says, that names in it are text, and how it behaves in a browser."""

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, drawing, write_slice
from PIL import Image

import predict
from adnc.explain import report
from utils import load_checkpoint
from dataset import load_inputs
from adnc.cpu_engine import calibrated, predict_slices
from adnc.data.index import list_inputs
from adnc.explain.report import Report, write_report
from adnc.distributed import Runtime, pick_device
from adnc.cli import InputError, Stopped

HOSTILE = ["<script>document.title='taken'<!--_70.png", "\"'><img src=x onerror=document.title='taken'>_71.png",
           "right\u202eto-left_72.png", "control\x1b[31m\n\x07_73.png", "{{ 7*7 }}&amp;_74.png", "a" * 200 + "_75.png",
           "\u05e2\u05d1\u05e8\u05d9\u05ea_76.png"]  # fmt: skip


class Page(HTMLParser):
    """What a page holds: `tags` is a list of (tag, attributes), `verdicts` {scan: verdict}; `bodies` has the attributes
    of each scan, in their order."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags = Path(path).read_text(encoding="utf-8"), []
        self.feed(self.text)
        self.bodies = [attributes for tag, attributes in self.tags if tag == "tbody" and "data-name" in attributes]
        self.verdicts = {body["data-name"]: body["data-verdict"] for body in self.bodies}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def words(self):
        return " ".join(re.sub(r"<[^>]*>", " ", self.text.split("</style>")[1].split("<script>")[0]).split())


def predict_page(run_folder, page, *inputs, out, checkpoint=None, flags=()):
    words = [*map(str, inputs), "--checkpoint", str(checkpoint or run_folder / "best_model.pth"), "--out", str(out)]
    predict.main(predict.parse_args([*words, "--report", str(page), *flags]))
    return Page(page)


def make_report(run_folder, folder, out, **more):
    """A Report by the road of predict.py, without its printing."""
    checkpoint, runtime = load_checkpoint(run_folder / "best_model.pth"), Runtime(pick_device("cpu"), None)
    slices = load_inputs(list_inputs([folder]), checkpoint, bar=None)
    table = calibrated(predict_slices(checkpoint, slices, runtime), checkpoint)
    return Report(run_folder / "best_model.pth", checkpoint, [str(folder)], None, slices, table, out=out, **more)


@pytest.fixture(scope="module")
def hostile(ad_nc, tmp_path_factory):
    """A flat folder: two scans of the test set, one inverted, one that cannot be read, and hostile names."""
    folder = tmp_path_factory.mktemp("hostile")
    for path in [*(ad_nc / "test").rglob("300_*"), *(ad_nc / "test").rglob("400_*")]:
        shutil.copy(path, folder)
        with Image.open(path) as image:
            Image.fromarray(255 - np.asarray(image)).save(folder / f"inverted_{path.stem[-2:]}.png")
    (folder / "broken_1.png").write_bytes(b"no image")
    (folder / "300_75.png").write_bytes(b"no image")
    for name in [*HOSTILE, "surrogate\udcff\udcfe_77.png"]:
        write_slice(folder / name, True, 0)
    return folder


@pytest.fixture(scope="module")
def made_up(run_folder, hostile, tmp_path_factory):
    """A Report on `hostile` with overlays that nobody computed, by bytes and by path."""
    folder = tmp_path_factory.mktemp("made-up")
    made = make_report(run_folder, hostile, folder, warnings=["a warning about <b>all</b>"],
                       notes=["plane <i>sagittal</i>"], overlay_note="This method <passed> its checks.")  # fmt: skip
    file = io.BytesIO()
    Image.new("RGBA", (48, 40), (255, 90, 0, 90)).save(file, "PNG")
    (folder / "overlay.png").write_bytes(file.getvalue())
    paths = [path for path in made.predictions.path if "/300_" in path or "/broken_" in path]
    made.overlays |= dict.fromkeys(paths, file.getvalue()) | {paths[0]: folder / "overlay.png"}
    return made


@pytest.fixture(scope="module")
def hostile_page(made_up, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, made_up)
    return path


@pytest.fixture(scope="module")
def labelled_page(run_folder, ad_nc, tmp_path_factory):
    """The run's own test set, with labels, scores, curves and prediction sets."""
    folder = tmp_path_factory.mktemp("labelled")
    with drawing():
        predict_page(run_folder, folder / "report.html", ad_nc / "test", out=folder / "out",
                     flags=["--coverage", "0.5"])
    return folder / "report.html"


# ---------------------------------------------------------------- what it says


def test_the_page_and_the_terminal_say_the_same_of_each_scan(run_folder, hostile, tmp_path, capsys):
    page = predict_page(run_folder, tmp_path / "r.html", hostile, out=tmp_path / "out")
    said = dict(re.findall(r"^scan (\S+): (\w+(?: verdict)?)(?:, p_AD|:)", capsys.readouterr().out, re.MULTILINE))
    assert {"300", "400", "inverted"} <= set(said) and said["inverted"] == "no verdict"
    assert all(page.verdicts[scan] == verdict for scan, verdict in said.items() if scan in page.verdicts)
    assert len(page.verdicts) == 4 + len(HOSTILE) + 1 and page.verdicts["broken"] == "not read"


def test_the_least_certain_scans_come_first_and_one_without_a_verdict_shows_no_p_ad(made_up, hostile_page):
    bodies = Page(hostile_page).bodies
    assert [body["data-verdict"] for body in bodies[:2]] == ["no verdict", "not read"]
    assert [body["data-p"] for body in bodies[:2]] == ["-1", "-1"]
    distance = [abs(float(body["data-p"]) - 0.5) for body in bodies[2:]]
    assert distance == sorted(distance)
    shown = hostile_page.read_text().split("<bdi>inverted</bdi>")[1].split("</tbody>")[0]
    assert not re.search(r">\s*0\.\d{3}", shown) and "<svg" not in shown and "not shown" in shown


def test_warnings_notes_reasons_and_remarks_are_on_the_page(made_up, hostile_page):
    words = Page(hostile_page).words()
    for part in ("a warning about &lt;b&gt;all", "plane &lt;i&gt;sagittal", "This method &lt;passed&gt; its checks.",
                 "5 out of the training range", "1 not read", "cannot be read as an image", "median grey",
                 "Research use only", "not the probability that a person has", "NC does not mean healthy",
                 "No coverage was asked for",
                 f"calibrated on the {made_up.checkpoint['calibration']['groups']} validation subjects"):  # fmt: skip
        assert part in words, part


def test_labels_scores_curves_and_the_runs_own_scores_are_on_the_page(run_folder, labelled_page):
    page = Page(labelled_page)
    words = page.words()
    assert words.count("balanced accuracy") == 3  # of these scans, of validation, of test
    for part in ("Scores on the scans of this page", "hold the label for 50 %", "Validation : scan-level accuracy",
                 "Test : scan-level accuracy", "Test of its run scan-level accuracy", "subjects n = 6"):  # fmt: skip
        assert part in words, part
    assert re.search(r"accuracy \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", words)
    curves = [a["alt"] for tag, a in page.tags if tag == "img" and a["src"].startswith("data:image/png")]
    assert len(curves) == 5 and curves[1] == "ROC curve of the scans of this page"


def test_training_slices_are_called_seen_and_a_split_by_slice_leaky(run_folder, ad_nc, tmp_path):
    made = make_report(run_folder, ad_nc / "train" / "AD", tmp_path)
    made.checkpoint = made.checkpoint | {"split_by": "slice"}
    write_report(tmp_path / "r.html", made)
    words = Page(tmp_path / "r.html").words()
    assert words.count("seen in training: memory, not a test") == 6 and "Seen in training 6 of 6 scans" in words
    assert "LEAKY" in words and "of a run split by slice" in words


@pytest.mark.parametrize("change, reason", [
    ("alone", "holds no predictions with scores"), ("other", "was not written for this checkpoint"),
    ("damaged", "cannot be read"), ("lacking", "cannot be read"),
])  # fmt: skip
def test_where_the_runs_own_scores_are_missing_the_page_says_why(run_folder, hostile, tmp_path, change, reason):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    file = run / "test" / "metrics.json"
    text = file.read_text()
    if change == "alone":
        shutil.rmtree(run / "test")
    else:
        file.write_text({"other": re.sub('"temperature": [0-9.]+', '"temperature": 7.5', text), "damaged": text[:-30],
                         "lacking": text.replace('"auroc"', '"x"')}[change])  # fmt: skip
    write_report(tmp_path / "r.html", make_report(run, hostile / "300_70.jpeg", tmp_path))
    words = Page(tmp_path / "r.html").words()
    assert re.search(f"Test : no scores[^<]*{reason}", words) and "Validation : scan-level accuracy" in words


def test_a_run_that_did_not_finish_is_called_uncalibrated(run_folder, hostile, tmp_path):
    made = make_report(run_folder, hostile / "300_70.jpeg", tmp_path)
    made.file = tmp_path / "best_model.pth"
    made.checkpoint.pop("calibration")
    write_report(tmp_path / "r.html", made)
    assert "It is not calibrated , since the run did not finish" in Page(tmp_path / "r.html").words()


# ---------------------------------------------------------------- files


def test_names_and_texts_are_text_and_no_address_is_that_of_a_stranger(hostile_page):
    page = Page(hostile_page)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [value for _, a in page.tags for name, value in a.items() if name in ("src", "href", "srcset", "action")]
    assert all(source.startswith(("data:image/", "data:,", "#own")) for source in sources) and len(sources) > 10
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u200e\u200f\u202a-\u202e\ud800-\udfff]", page.text)
    words = page.words()
    for part in (r"control\x1b[31m\n\x07", r"right\u202eto-left", r"surrogate\udcff\udcfe", "{{ 7*7 }}&amp;amp;",
                 "&lt;script&gt;document", "\u05e2\u05d1\u05e8\u05d9\u05ea"):  # fmt: skip
        assert part in words, part


def test_nothing_is_overwritten_and_a_report_that_cannot_be_written_is_refused_before_the_work(run_folder, hostile,
                                                                                               tmp_path):  # fmt: skip
    (tmp_path / "there.html").write_text("old")
    (tmp_path / "new_files").mkdir()
    for name, reason in (("there.html", "already there"), ("new.html", "new_files is already there"),
                         ("r.pdf", "ends in .html"), ("no/r.html", "there is no folder")):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            predict_page(run_folder, tmp_path / name, hostile, out=tmp_path / "out")
    assert (tmp_path / "there.html").read_text() == "old" and not (tmp_path / "out").exists()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("fails, inline, problem", [
    ("write_text", 1e6, FULL), ("write_text", 0, FULL), ("write_bytes", 0, FULL), ("write_text", 0, Stopped(143))])
def test_a_full_disk_or_a_signal_leaves_neither_a_page_nor_a_folder(made_up, tmp_path, monkeypatch, fails, inline,
                                                                    problem):  # fmt: skip
    def full(path, *args, **kwargs):
        raise problem

    monkeypatch.setattr(report, "INLINE", inline)
    monkeypatch.setattr(Path, fails, full)
    with pytest.raises(type(problem)):
        write_report(tmp_path / "report.html", made_up)
    assert not list(tmp_path.iterdir())


def test_200_slices_are_one_file_below_10_mb(run_folder, tmp_path):
    """Noise, which compresses worse than any brain, as black around it as three quarters of a slice of AD_NC."""
    for i in range(200):
        write_slice(tmp_path / "slices" / f"{i // 20}_{i % 20}.png", i % 40 < 20, i)
    made = make_report(run_folder, tmp_path / "slices", tmp_path)
    made.slices.images = np.zeros((200, 240, 256), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (120, 128), np.uint8)
    for i in range(200):
        made.slices.images[i, 60:180, 64:192] = np.roll(noise, i)
    assert "pictures in" not in write_report(tmp_path / "one.html", made)
    assert 1e6 < (tmp_path / "one.html").stat().st_size < 10e6 and not (tmp_path / "one_files").exists()


def test_more_pictures_than_a_page_can_hold_are_linked_from_a_folder(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "INLINE", 1000)
    assert "with 28 pictures in" in write_report(tmp_path / "many.html", made_up)
    sources = [a["src"] for tag, a in Page(tmp_path / "many.html").tags if tag == "img"]
    assert len(set(sources)) == 28 == len(list((tmp_path / "many_files").iterdir()))
    for source in sources:
        with Image.open(tmp_path / source) as image:
            assert image.format == "WEBP" and image.size == (48, 40)


def test_an_overlay_of_another_shape_than_its_slice_is_a_defect(made_up, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    other = dict.fromkeys(made_up.overlays, file.getvalue())
    with pytest.raises(ValueError, match="one would not lie on the other"):
        write_report(tmp_path / "r.html", Report(**vars(made_up) | {"overlays": other}))


# ---------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))
PICTURES = """const done = arguments[0];
for (const x of document.querySelectorAll('details')) x.open = true;
const all = [...document.querySelectorAll('img')];
all.forEach(x => { x.loading = 'eager'; });
Promise.all(all.map(x => x.decode().then(() => x.naturalWidth > 0, () => false))).then(done);"""
ROWS = ("return [...document.querySelectorAll('#scans tbody')].filter(x => x.getClientRects().length)"
        ".map(x => x.dataset.name)")  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not BROWSER or not shutil.which("chromedriver"):
        pytest.skip("no Chromium with chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "hide-scrollbars", "disable-sync", "disable-dev-shm-usage",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(params=["hostile_page", "labelled_page"])
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


def test_it_opens_without_an_error_or_a_request_and_all_pictures_load(browser, page):
    show(browser, page)
    # Those of what was opened before, and of the start.
    browser.get_log("browser"), browser.get_log("performance")
    browser.refresh()
    loaded = browser.execute_async_script(PICTURES)
    assert len(loaded) > 20 and all(loaded)
    assert browser.title.startswith("AD or NC: ")  # no name ran as a script
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def test_linked_pictures_load_from_the_folder_beside_the_page(browser, made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "INLINE", 0)
    write_report(tmp_path / "a page #1?.html", made_up)
    show(browser, tmp_path / "a page #1?.html")
    assert all(browser.execute_async_script(PICTURES)) and browser.get_log("browser") == []


def test_it_sorts_filters_and_finds(browser, hostile_page):
    show(browser, hostile_page)
    first, p = browser.execute_script(ROWS), {b["data-name"]: float(b["data-p"]) for b in Page(hostile_page).bodies}
    assert first[0] == "inverted" and len(first) == 12
    choose(browser, "sort", "highest p_AD")
    order = [p[name] for name in browser.execute_script(ROWS)]
    assert order == sorted(order, reverse=True)
    choose(browser, "sort", "lowest p_AD")
    order = [p[name] for name in browser.execute_script(ROWS)]
    assert order[:10] == sorted(order[:10]) and order[10:] == [-1, -1]  # those without come last
    choose(browser, "show", "with remarks")
    assert set(browser.execute_script(ROWS)) == {"inverted", "broken", "300"}
    choose(browser, "show", "no verdict")
    assert browser.execute_script(ROWS) == ["inverted"]
    assert browser.find_element("id", "shown").text == "1 of 12, lowest p_AD first"
    choose(browser, "show", "all")
    browser.find_element("id", "find").send_keys("RIGHT")
    assert browser.execute_script(ROWS) == [r"right\u202eto-left"]


def test_keys_alone_open_a_scan_and_lay_the_overlays_on_it(browser, hostile_page):
    from selenium.webdriver.common.keys import Keys

    show(browser, hostile_page)
    overlay = browser.find_element("css selector", ".overlay")
    scan = overlay.find_element("xpath", "ancestor::details")
    assert not scan.get_attribute("open")
    scan.find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert scan.get_attribute("open") and not overlay.is_displayed()
    browser.find_element("id", "overlays").send_keys(Keys.SPACE)
    assert overlay.is_displayed()
    below = overlay.find_element("xpath", "preceding-sibling::img")
    assert overlay.rect == below.rect and overlay.size["width"] > 80
    browser.find_element("id", "large").send_keys(Keys.SPACE)
    assert overlay.size["width"] > 200


def test_without_scripts_all_is_there_but_sorting_and_finding(browser, hostile_page):
    show(browser, hostile_page, scripts=False)
    names = [row.text for row in browser.find_elements("css selector", "#scans tbody th bdi:first-child")]
    assert names[0] == "inverted" and len(names) == 12
    assert not browser.find_element("id", "find").is_displayed()
    remarks = {"inverted", "broken", "300"}
    for choice, kept in (("no verdict", {"inverted"}), ("with remarks", remarks), ("all", set(names))):
        choose(browser, "show", choice)
        rows = browser.find_elements("css selector", "#scans tbody")
        assert {row.get_attribute("data-name") for row in rows if row.is_displayed()} == kept
    overlay = browser.find_element("css selector", ".overlay")
    overlay.find_element("xpath", "ancestor::details/summary").click()
    browser.find_element("id", "overlays").click()
    assert overlay.is_displayed()


@pytest.mark.parametrize("width, dark", [(1400, False), (400, True)])
def test_it_fits_and_an_accessibility_check_finds_nothing(browser, page, width, dark):
    if not AXE.is_file():
        pytest.skip(f"no axe-core at {AXE}; npm install --no-save axe-core, or name axe.min.js with AXE")
    show(browser, page, width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    browser.execute_script("for (const x of document.querySelectorAll('details')) x.open = true;")
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    found = browser.execute_async_script("axe.run({resultTypes: ['violations']}).then(arguments[0])")
    assert len(found["passes"]) > 15
    assert [(each["id"], each["impact"], each["nodes"][0]["html"][:200]) for each in found["violations"]] == []


def test_it_prints_on_a4_in_the_colours_of_paper(browser, hostile_page):
    show(browser, hostile_page, dark=True)
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"])
    sizes = set(re.findall(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", pdf))
    assert [tuple(round(float(side)) for side in size) for size in sizes] == [(595, 842)]
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": media})
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(colour) == "rgb(255, 255, 255)"
    assert not browser.find_element("css selector", ".tools").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})

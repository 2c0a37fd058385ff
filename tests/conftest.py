"""Small sets in the AD_NC layout, and one run trained on one of them, for all tests."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
if "PYTEST_XDIST_WORKER" not in os.environ:  # the processes of the tests share the cache
    CACHE = tempfile.TemporaryDirectory(prefix="convnext-cache-")  # not the user's own
    os.environ["XDG_CACHE_HOME"] = CACHE.name
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")  # for the tests that need one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identity is promised on the CPU

ROOT = Path(__file__).parents[1]

# The longest tests start first, or the second core waits for them at the end.
LONGEST = (
    "test_the_demo_learns_and_prints_a_command_that_predicts",
    "test_a_run_killed_at_random_moments_ends_bit_identical",
    "test_two_processes_take_the_steps_of_one",
    "test_the_cpu_part_writes_its_numbers",
    "test_a_compiled_run_has_clean_names_and_the_same_losses",
)


def pytest_addoption(parser):
    parser.addoption("--exhaustive", action="store_true", help="repeat random tests more often")


@pytest.fixture
def repeats(request):
    """A function (few, many) that gives the first number, or with --exhaustive the second."""

    def choose(few, many):
        return many if request.config.getoption("--exhaustive") else few

    return choose


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name not in LONGEST)


@pytest.fixture(scope="session")
def shared_once(tmp_path_factory, worker_id):
    """A function (name, make) that calls make(folder) once for all processes of the tests, and
    returns the folder."""
    base = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        base = base.parent  # which the processes have in common

    def once(name, make):
        folder, done = base / name, base / f"{name}.done"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return once


# scan -> (split, class, subject)
SCANS = {
    **{f"{100 + i}": ("train", "AD", f"a{i}") for i in range(6)},
    **{f"{200 + i}": ("train", "NC", f"n{i}") for i in range(6)},
    **{f"{300 + i}": ("test", "AD", f"ta{i}") for i in range(3)},
    **{f"{400 + i}": ("test", "NC", f"tn{i}") for i in range(3)},
}


def write_slice(path, bright, seed, size=(48, 40)):
    """A dark JPEG with a blob: bright for AD, dim for NC. A classifier can get everything right
    within a minute."""
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    noise = np.random.default_rng(seed).normal(0, 6, x.shape)
    peak = 220 if bright else 90
    pixels = peak * np.exp(-3 * (x**2 + y**2)) + noise
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_set(root, scans=SCANS, slices=range(70, 75), subjects=True):
    """Write AD_NC with a subjects.csv beside it; returns the path of AD_NC."""
    root = Path(root)
    for scan, (split, label, _) in scans.items():
        for number in slices:
            path = root / "AD_NC" / split / label / f"{scan}_{number}.jpeg"
            write_slice(path, label == "AD", int(scan) * 1000 + number)
    if subjects:
        rows = [f"{scan},{subject}" for scan, (_, _, subject) in scans.items() if subject]
        (root / "subjects.csv").write_text("\n".join(["scan,subject", *rows]) + "\n")
    return root / "AD_NC"


@pytest.fixture(scope="session")
def ad_nc(shared_once):
    """A set that no test changes: 12 training and 6 test scans, each of another subject, with five
    slices each."""
    return shared_once("set", write_set) / "AD_NC"


@pytest.fixture(scope="session")
def phantom(shared_once):
    """A phantom of ten subjects that no test changes: the folder of AD_NC and its metadata."""
    from adnc.phantom.draw import draw  # slow to import, and pytest's main process draws nothing

    return shared_once("phantom", lambda out: draw(out, 10, seed=3, progress=False))


@pytest.fixture(scope="session")
def varied(shared_once):
    """A phantom of twelve subjects with the cue "varied", which trained no weights. No test changes
    it."""
    from adnc.phantom.draw import draw

    return shared_once("varied", lambda out: draw(out, 12, seed=2, progress=False, cue="varied"))


@pytest.fixture(scope="session")
def oasis(shared_once):
    """The real OASIS-1 slices, where they are at hand, decoded into the cache."""
    import dataset

    root = Path(os.environ.get("OASIS_ROOT", Path(__file__).parents[1] / ".." / "shared" / "oasis"))
    if not (root / "AD_NC").is_dir():
        pytest.skip(f"no OASIS slices at {root}; name their folder with OASIS_ROOT")
    shared_once("oasis", lambda _: dataset.decode_set(root / "AD_NC", progress=None))
    return root / "AD_NC"


@pytest.fixture(scope="session")
def adult():
    """ch2.nii.gz, a whole adult head, with ch2bet.nii.gz, its brain."""
    templates = Path("/usr/share/mricron/templates")
    if not (templates / "ch2.nii.gz").exists():
        pytest.skip("no ch2.nii.gz; install Debian's mricron-data")
    return templates / "ch2.nii.gz", templates / "ch2bet.nii.gz"


# ---------------------------------------------------------------- runs

MODEL = "--model narrow --model-args norm=layer".split()  # small files, and no BatchNorm
SPLIT = "--val-fraction 0.25".split()
SMALL = [*MODEL, *SPLIT, *"--image-size 32 --batch-size 16 --lr 2e-3 --drop-path 0".split()]


def small_flags(*flags):
    """SMALL with other flags, without those of SMALL that do not go with them."""
    left_out = []
    if "--model" in flags:
        left_out += MODEL
    if "--split" in flags:  # which leaves nothing to --val-fraction
        left_out += SPLIT
    return [*(word for word in SMALL if word not in left_out), *flags]


def train_small(data, out, *flags):
    """Train in this process, with the final evaluation; returns the run folder."""
    import train

    train.main(["--data", str(data), "--out", str(out), *small_flags(*flags)])
    return Path(out)


def picture_functions():
    """(module, name) of every function that draws a picture of a run or of its scores."""
    import train
    from adnc.scoring import plots

    for name in vars(plots):
        if name.startswith("plot_"):
            yield plots, name
    yield train, "plot_lr_schedule"
    yield train, "plot_training_curves"
    yield train, "measure_map_scale"  # maps of training slices, for the pictures of explanations


DRAWING = {}  # the functions that `draw_nothing` replaces


@pytest.fixture(scope="session", autouse=True)
def draw_nothing():
    """A picture takes a second or two, and few tests look at one."""
    with contextlib.ExitStack() as stack:
        for module, name in list(picture_functions()):
            DRAWING[module, name] = getattr(module, name)
            stack.enter_context(mock.patch.object(module, name, lambda *args, **kwargs: None))
        yield


@contextlib.contextmanager
def drawing():
    """A context in which pictures are drawn."""
    with contextlib.ExitStack() as stack:
        for (module, name), function in DRAWING.items():
            stack.enter_context(mock.patch.object(module, name, function))
        yield


@pytest.fixture
def pictures():
    """For a test that looks at pictures."""
    with drawing():
        yield


def train_steps(data, out, *flags):
    """Train in this process without the final evaluation; returns the run folder."""
    with without_evaluation():
        return train_small(data, out, *flags)


@pytest.fixture(scope="session", autouse=True)
def few_resamples():
    """A tenth of the bootstrap: intervals are a little rougher, and tests faster."""
    from adnc.scoring import metrics

    with mock.patch.object(metrics, "RESAMPLES", 200):
        yield


@pytest.fixture(scope="session", autouse=True)
def few_repeats():
    """A latency is measured in fewer turns."""
    from adnc import resources

    with mock.patch.multiple(resources, WARMUP=1, REPEATS=1, BATCHES=(1, 64)):
        yield


def without_evaluation():
    """A context in which train.py does not evaluate the model at the end."""
    import train

    return mock.patch.object(train, "evaluate_kept_model", lambda *args, **kwargs: [])


@pytest.fixture(scope="session")
def run_folder(ad_nc, shared_once):
    """A finished run of six epochs on `ad_nc`, with its pictures. No test changes it."""
    with drawing():
        return shared_once("run", lambda out: train_small(ad_nc, out, "--epochs", "6"))

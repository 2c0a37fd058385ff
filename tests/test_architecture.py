"""The layout: five scripts, one package, a few tools; imports go one way, and change nothing."""

import ast

import command
import pytest
from conftest import ROOT

SCRIPTS = {"dataset", "modules", "train", "utils", "predict"}
PACKAGE = sorted(ROOT.glob("adnc/**/*.py"))


def module_name(path):
    """adnc/data/index.py -> adnc.data.index"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Names of the modules that a file imports, wherever in the file."""
    modules = {module_name(other) for other in PACKAGE}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:  # `from adnc.data import pixels` imports adnc.data.pixels
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else node.module


def test_only_the_five_scripts_are_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS


def test_the_package_imports_neither_scripts_nor_tools():
    for path in PACKAGE:
        top_level = {name.split(".")[0] for name in imports(path)}
        assert not top_level & (SCRIPTS | {"tools", "docs"}), path


def test_imports_within_the_package_go_one_way():
    graph = {module_name(path): set(imports(path)) for path in PACKAGE}
    while graph:
        leaves = [name for name, imported in graph.items() if not imported & (set(graph) - {name})]
        assert leaves, f"a circle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


WORKERS = {"multiprocessing", "torch.multiprocessing"}
WORKER_NAMES = {"ProcessPoolExecutor", "DataLoader", "get_context", "start_processes"}


def test_no_worker_process_is_started_to_which_pixels_would_be_pickled():
    """Threads share the array of slices. A worker that forkserver or spawn starts would get a copy
    of it, and Python 3.14 starts workers by forkserver."""
    for path in [*PACKAGE, *ROOT.glob("*.py")]:
        assert not WORKERS & set(imports(path)), path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not WORKER_NAMES & names, path


SAFE_PATH = """
import os, runpy, sys
folder = sys.argv[1]
sys.path = [entry for entry in sys.path if os.path.abspath(entry) != folder]  # as under python -P
sys.argv = [sys.argv[2], "--help"]
runpy.run_path(os.path.join(folder, sys.argv[0]), run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train.py", "predict.py", "dataset.py"])
def test_a_script_finds_its_own_files_under_python_dash_p(script, tmp_path):
    done = command.run(SAFE_PATH, ROOT, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


OTHER = """
import sys, types
sys.modules[sys.argv[2]] = types.SimpleNamespace(__file__="/home/me/" + sys.argv[2] + ".py")
__import__(sys.argv[1])
"""


@pytest.mark.parametrize("script, name", [
    ("train", "utils"), ("predict", "dataset"), ("tools.extract", "utils"),
])  # fmt: skip
def test_another_module_of_the_same_name_is_one_sentence(script, name):
    done = command.run(OTHER, script, name)
    last = done.stderr.splitlines()[-1]
    expected = f"ImportError: /home/me/{name}.py is another module named {name}; "
    assert last.startswith(expected) and f"needs the one in {ROOT}" in last


LOOK = """
import os, signal, sys, warnings
import matplotlib, numpy, pandas, PIL.Image, torch
def state():
    return (
        sys.excepthook, sys.stdout, sys.stderr, dict(os.environ), list(warnings.filters),
        sys.path[:],
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),
        matplotlib.rcParams.copy(),
        PIL.Image.MAX_IMAGE_PIXELS, numpy.geterr(),
        torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(),
        torch.backends.cudnn.benchmark,
    )
import torch.distributed, torch.optim.swa_utils, torchvision.transforms.v2, tqdm
import scipy.ndimage, scipy.optimize, scipy.sparse.csgraph, scipy.special, scipy.stats
import matplotlib.figure, sklearn.linear_model, sklearn.metrics, sklearn.model_selection
for name in [name for name in sys.modules if name.startswith("adnc")]:
    del sys.modules[name]  # imported by the helper that starts this
before = state()
for name in sys.argv[1:]:
    __import__(name)
changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
assert not changed, changed
"""


def test_importing_a_file_changes_nothing_in_the_process():
    names = sorted(SCRIPTS) + [module_name(path) for path in PACKAGE]
    done = command.run(LOOK, *names)
    assert done.returncode == 0, done.stderr

"""The house: one floor above the other, importing changes nothing, what is asked for at once is answered at once."""

import ast
import re
import subprocess
import sys
import time

import command
import pytest
from conftest import ROOT

FLOORS = [
    ["utils", "files", "modules", "metrics", "anatomy"],
    ["slices", "transforms", "runtime", "plots", "metadata", "subjects"],
    ["cache", "listing", "dataset", "readers", "volumes", "baselines"],
    ["checkpoint", "inference"],
    ["engine", "assess", "stress", "explain", "report"],
    ["train", "predict", "evaluate", "phantom", "extract", "benchmark"],
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# within a floor, the one room that another goes through
BESIDE = {("files", "utils"), ("subjects", "metadata"), ("dataset", "cache"), ("dataset", "listing"),
          ("inference", "checkpoint"), ("volumes", "readers"), ("report", "assess")}  # fmt: skip
RUN = ["train", "predict", "evaluate", "dataset", "phantom", "extract", "benchmark"]


def imports(script):
    """The files of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FLOOR)
        elif isinstance(node, ast.ImportFrom) and node.module in FLOOR:
            yield node.module


def test_every_file_has_a_floor():
    assert set(FLOOR) == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", FLOOR)
def test_imports_only_go_down_and_no_command_imports_a_command(script):
    for imported in imports(script):
        assert FLOOR[imported] < FLOOR[script] or (script, imported) in BESIDE, f"{script} imports {imported}"


def test_no_file_function_or_list_of_parameters_is_too_long():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 450, path.name
        for node in ast.walk(ast.parse(text)) if path.parent == ROOT else ():  # a test's fixtures are parameters
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                own = [argument for argument in arguments if argument.arg != "self"]
                assert node.end_lineno - node.lineno < 60 and len(own) <= 7, f"{path.name}: {node.name}"


LOOK = """
import os, signal, sys, warnings
import matplotlib, numpy, pandas, PIL.ExifTags, PIL.Image, PIL.ImageOps, scipy.special, tqdm
import torch, torch.distributed, torch.nn.parallel, torch.optim.swa_utils, torch.utils.data, torchvision.transforms.v2
def state():
    return (sys.excepthook, PIL.Image.MAX_IMAGE_PIXELS, list(warnings.filters), signal.getsignal(signal.SIGINT),
            signal.getsignal(signal.SIGTERM), matplotlib.get_backend(auto_select=False), dict(matplotlib.rcParams),
            numpy.geterr(), torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.backends.cudnn.benchmark, sys.getrecursionlimit(), dict(os.environ), sys.stdout, sys.stderr)
before = state()
for name in sys.argv[1:]:
    if os.fork() == 0:  # fresh: none of our files is imported yet
        __import__(name)
        changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
        print(name, changed, flush=True)
        os._exit(0)
    os.wait()
"""


def test_importing_a_file_changes_nothing_in_the_process():
    done = subprocess.run([sys.executable, "-c", LOOK, *FLOOR], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [f"{name} []" for name in FLOOR], done.stderr


def test_utils_needs_neither_torch_nor_pandas_to_be_imported():
    script = "import sys, utils; assert not {'torch', 'pandas', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("script", RUN)
def test_help_and_a_mistyped_flag_answer_in_under_three_tenths_of_a_second(script):
    for flag, status in (("--help", 0), ("--no-such-flag", 2)):
        seconds = []
        for _ in range(3):  # the best of three: another process may take the core
            start = time.perf_counter()
            done = subprocess.run([sys.executable, ROOT / f"{script}.py", flag], capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            assert done.returncode == status
        assert min(seconds) < 0.3
        if status:
            assert done.stderr.startswith("error: ")
            continue
        assert done.stdout.count(f"    python {script}.py") >= 2
        groups = re.findall(r"^\S.*:$", done.stdout[done.stdout.index("\noptions:") :], re.MULTILINE)
        assert len(groups) > 1  # the first are the options without a heading of their own


def test_a_defect_of_ours_keeps_its_traceback_and_what_the_user_can_fix_is_one_line(tmp_path):
    script = "import sys, utils; utils.run_script(lambda args: (_ for _ in ()).throw(eval(sys.argv[1])), None)"
    for problem in ("ValueError('of NumPy')", "KeyError('x')", "TypeError('y')", "RuntimeError('z')", "IndexError()"):
        done = command.run(script, problem)
        assert done.returncode == 1 and "Traceback" in done.stderr and "error: " not in done.stderr, problem
    for problem in ("utils.InputError('no such thing')", "OSError('no such thing')"):
        done = command.run(script, problem)
        assert (done.returncode, done.stderr) == (2, "error: no such thing\n")
    done = command.run(script, "PermissionError(13, 'Permission denied', 'AD_NC/train/AD')")
    assert (done.returncode, done.stderr) == (2, "error: AD_NC/train/AD cannot be used: Permission denied\n")
    script = "import utils, warnings; utils.run_script(lambda args: warnings.warn('slower'), None)"
    done = command.run(script)
    assert (done.returncode, done.stderr) == (0, "warning: slower\n")


def test_a_defect_in_the_middle_of_a_script_is_not_called_the_users(ad_nc, tmp_path):
    """A ValueError of a library, planted where the index is made."""
    script = ("import sys, dataset\ndef broken(*args): raise ValueError('operands could not be broadcast')\n"
              "dataset.assign_groups = broken\ndataset.run_script(dataset.main, dataset.parse_args(sys.argv[1:]))")
    done = command.run(script, ad_nc)
    assert done.returncode == 1 and "Traceback" in done.stderr and "broken" in done.stderr

"""README and docs: the commands run, the links lead somewhere, the requirements are complete."""

import ast
import contextlib
import functools
import importlib
import io
import re
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


def setup_commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if line.startswith("python3 -m")
    ]


def test_two_commands_install_and_run_on_one_line_each():
    demo, tests = setup_commands()
    assert demo.endswith("-r requirements.txt && .venv/bin/python train.py --demo")
    assert tests.endswith("-r requirements-dev.txt && .venv/bin/python -m pytest")


def test_the_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    (line,) = re.findall(r"^command=\$\((.*)\)$", script, re.MULTILINE)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == setup_commands()[1]


def test_every_picture_exists_and_every_figure_is_shown():
    shown = set(re.findall(r"\]\((?:\.\./)?(figures/[^)]+)\)", TEXT))
    assert shown == {f"figures/{path.name}" for path in (ROOT / "figures").iterdir()}


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet.replace("torch.randn(8, ", "torch.randn(1, "), names)
    assert names["logits"].shape == (1, 2)


@functools.cache
def help_of(name):
    """The --help of a script, or of a module such as tools.evaluate."""
    module = importlib.import_module(name.removesuffix(".py"))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stop:
        getattr(module, "parse_args", module.main)(["--help"])
    assert stop.value.code == 0
    return text.getvalue()


def test_every_flag_that_the_pages_use_exists():
    pattern = r"^(?:.*; do )?python (?:-m )?((?:tools|docs)\.[\w.]+|\w+\.py)( .*)$"
    used = re.findall(pattern, TEXT, re.MULTILINE)
    assert len(used) > 20
    for name, words in used:
        flags = set(re.findall(r" (--[a-z-]+)", words.split("#")[0]))
        known = set(re.findall(r"--[a-z-]+", help_of(name)))
        assert flags <= known, (name, words)


def imported_packages(paths):
    names = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    ours = {path.stem for path in ROOT.glob("*.py")} | {"adnc", "tools", "docs"}
    return names - set(sys.stdlib_module_names) - ours


def test_requirements_name_what_is_imported_and_nothing_else():
    imported = imported_packages([*ROOT.glob("*.py"), *ROOT.glob("adnc/**/*.py")])
    # Without the benchmark, which measures more packages where they are installed.
    imported |= imported_packages(ROOT.glob("tools/[!b]*.py"))
    imported.add("tensorboard")  # of torch.utils.tensorboard
    package = {"sklearn": "scikit-learn", "PIL": "pillow"}
    text = "".join((ROOT / f"requirements{name}.txt").read_text() for name in ("", "-extra"))
    required = set(re.findall(r"^([\w-]+)>=[\d.]+$", text, re.MULTILINE))
    assert required == {package.get(name, name) for name in imported}

"""The README says what is so."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(ROOT.glob("*.py"))


def commands(start):
    """Lines of the README's bash blocks that begin with `start`."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(start)]


def test_two_commands_set_up_and_run_on_one_line_each():
    demo, tests = commands("python3 -m venv")
    assert demo.endswith("-r requirements.txt && .venv/bin/python train.py --demo")
    assert tests.endswith("-r requirements-dev.txt && .venv/bin/python -m pytest")


def test_the_ci_runs_the_readmes_test_command():
    (line,) = re.findall(r"^command=\$\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    found = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    assert found == commands("python3 -m venv")[1]


def test_every_picture_of_the_readme_is_there_and_every_picture_there_is_in_the_readme():
    shown = set(re.findall(r"\]\((figures/[^)]+)\)", README))
    assert shown == {f"figures/{path.name}" for path in (ROOT / "figures").iterdir()}


def test_no_section_is_empty():
    sections = re.split(r"^## \d+\. .*$", README, flags=re.MULTILINE)[1:]
    assert len(sections) == 13 and min(len(text.split()) for text in sections) > 30
    titles = re.findall(r"^## (.*)$", README, re.M)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    assert re.findall(r"^\d+\. \[.*\]\(#(.*)\)$", README, re.M) == anchors


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet.replace("torch.randn(8, ", "torch.randn(1, "), names)
    assert names["logits"].shape == (1, 2)


@pytest.mark.parametrize("line", [line for line in commands("python ") if "--help" not in line])
def test_every_flag_that_the_readme_uses_exists(line):
    words = line.split("#")[0].split()
    script = words[1]
    known = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
    assert set(re.findall(r"--[a-z-]+", " ".join(words))) <= set(re.findall(r"--[a-z-]+", known))


def test_requirements_name_what_is_imported_and_nothing_else():
    imported = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {script.stem for script in SCRIPTS}
    package = {"sklearn": "scikit-learn", "PIL": "pillow"}
    text = (ROOT / "requirements.txt").read_text()
    required = set(re.findall(r"^([\w-]+)>=[\d.]+$", text, re.MULTILINE))
    # train.py imports tensorboard through torch.utils.tensorboard
    assert required == {package.get(name, name) for name in imported} | {"tensorboard"}


RUN = [path.name for path in SCRIPTS if "\nNot run by itself" not in path.read_text() and path.name != "modules.py"]


@pytest.mark.parametrize("script", RUN)
def test_help_explains_the_script(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"python {script}" in done.stdout
    assert {"train.py", "predict.py", "evaluate.py", "dataset.py", "phantom.py", "benchmark.py"} == set(RUN)


def test_every_test_that_the_readme_names_exists():
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = {name for path in (ROOT / "tests").glob("test_*.py")
               for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert len(named) >= 15 and named <= defined

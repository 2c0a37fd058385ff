"""The README says what is so."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
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
    found = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    assert found == commands("python3 -m venv")[1]


def test_every_picture_that_is_shown_is_there_and_every_picture_there_is_shown():
    shown = set(re.findall(r"\]\((?:\.\./)?(figures/[^)]+)\)", README + DOCS))
    assert shown == {f"figures/{path.name}" for path in (ROOT / "figures").iterdir()}


def test_the_readme_is_short_and_has_every_part_of_the_outline():
    assert len(README.splitlines()) <= 300 and len(README.split()) <= 3000
    headings = " ".join(re.findall(r"^#+ (.*)$", README, re.MULTILINE)).lower()
    for part in ("introduction", "project format", "model architecture", "comparison", "pre-processing and splits",
                 "training setup", "evaluation and results", "how to run", "dependencies", "example outputs",
                 "reproducibility and discussion", "references"):  # fmt: skip
        assert part in headings, part


def test_every_link_between_pages_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), (
                f"{page.name}: {target}"
            )


def test_every_file_of_the_house_has_its_place_in_the_readme():
    assert all(f"`{script.name}`" in README for script in SCRIPTS)


def test_the_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(snippet.replace("torch.randn(8, ", "torch.randn(1, "), names)
    assert names["logits"].shape == (1, 2)


@functools.cache
def help_of(script):
    return subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True
    ).stdout


def test_every_flag_that_the_pages_use_exists():
    lines = re.findall(r"^(?:.*; do )?(python \w+\.py .*)$", README + DOCS, re.MULTILINE)
    used = [line.split("#")[0].split() for line in lines]
    assert len(used) > 20
    for words in used:
        known = set(re.findall(r"--[a-z-]+", help_of(words[1])))
        assert set(re.findall(r"--[a-z-]+", " ".join(words))) <= known, words


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
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-volumes.txt").read_text()
    required = set(re.findall(r"^([\w-]+)>=[\d.]+$", text, re.MULTILINE))
    assert required == {package.get(name, name) for name in imported}


def test_every_test_that_the_pages_name_exists():
    named = set(re.findall(r"`(test_\w+)`", README + DOCS))
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) >= 60 and named <= defined, named - defined

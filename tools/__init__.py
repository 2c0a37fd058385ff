"""Commands beside the scripts, started with python -m tools.NAME."""

from pathlib import Path

from adnc.cli import describe_other_modules

if other := describe_other_modules(Path(__file__).parent):
    raise ImportError(other)

"""Read weight files of other projects: .pth and .safetensors, as data and never as code."""

import argparse
import codecs
import datetime
import os
import re
import warnings
import zipfile
from pathlib import PosixPath, PurePosixPath, PureWindowsPath

import numpy as np
import torch

from adnc.errors import InputError, is_system_limit

# Training scripts put flags, paths, sets, dates and scores beside the weights. Each of these holds
# data alone.
PLAIN_CLASSES = [
    argparse.Namespace,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    frozenset,
    range,
    slice,
    np.ndarray,
    np.dtype,
    *[getattr(np.dtypes, name) for name in np.dtypes.__all__],
    codecs.encode,  # which pickle calls to write bytes as text
]
for module in ("pathlib", "pathlib._local"):  # of Python 3.13
    PLAIN_CLASSES += [
        (PosixPath, f"{module}.PosixPath"),
        (PureWindowsPath, f"{module}.WindowsPath"),  # a WindowsPath can only be made on Windows
        (PurePosixPath, f"{module}.PurePosixPath"),
        (PureWindowsPath, f"{module}.PureWindowsPath"),
    ]
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
    PLAIN_CLASSES += [
        (np.float64(0).__reduce__()[0], f"{module}.scalar"),
        (np.zeros(1).__reduce__()[0], f"{module}._reconstruct"),
    ]


def load_tensors(path):
    """The content of a file of torch.save or of a .safetensors file, on the CPU.

    InputError if it does not exist, is damaged, or can only be read by running code that it
    contains.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}; expected a file of torch.save or .safetensors")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty; expected a file of torch.save or .safetensors")
    try:
        if str(path).endswith(".safetensors"):
            return load_safetensors(path)
        with torch.serialization.safe_globals(PLAIN_CLASSES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as problem:  # torch.load raises nearly anything on a damaged or foreign file
        if is_system_limit(problem):
            raise
        text = str(problem)
        blocked = re.search(r"Unsupported \w+: GLOBAL (\S+)", text)
        if blocked:
            raise InputError(
                f"{path} contains {blocked[1]}, which cannot be read without running code; where "
                "the file was made, save the weights alone: torch.save(model.state_dict(), FILE)"
            ) from None
        if zipfile.is_zipfile(path):  # as torch.save writes it
            raise InputError(
                f"{path} is damaged, or cannot be read without running code "
                f"({type(problem).__name__}); where it was made, save the weights alone: "
                "torch.save(model.state_dict(), FILE)"
            ) from None
        raise InputError(
            f"{path} cannot be read as tensors ({type(problem).__name__}): it is damaged, or not a "
            "file of torch.save or .safetensors"
        ) from None


def load_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs the package safetensors; pip install safetensors") from None
    return load_file(path)


def find_state_dict(content):
    """The state dict in the content of a weight file: the dict that holds the most tensors, up to
    three dicts deep.

    Of equally large ones the first wins, so that "model" comes before "model_ema". InputError if
    there is none.
    """
    candidates = []

    def collect(value, depth):
        if not isinstance(value, dict) or depth > 3:
            return
        tensors = {str(name): item for name, item in value.items() if torch.is_tensor(item)}
        if tensors:
            candidates.append(tensors)
        for item in value.values():
            collect(item, depth + 1)

    collect(content, 0)
    if not candidates:
        raise InputError(
            f"the file holds a {type(content).__name__} without tensors; expected a state dict"
        )
    return max(candidates, key=len)

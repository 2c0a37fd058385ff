"""What the five scripts use and a first reader need not open: data, scores, volumes, explanations,
the phantom.

Nothing in this package imports the scripts or `tools`. Models, paths and numbers are passed in.
"""

import contextlib
import os
import sys

# A notebook names its backend in MPLBACKEND. Where that is not installed, matplotlib cannot even be
# imported; pictures here need no backend.
if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
    backend = os.environ.pop("MPLBACKEND")
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend

# The position is the model's class number. AD is the positive class of every score.
CLASSES = ("NC", "AD")

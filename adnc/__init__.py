"""What the five scripts use and a first reader need not open: data, scores, volumes, explanations,
the phantom.

Nothing in this package imports the scripts or `tools`. Models, paths and numbers are passed in.
"""

# The position is the model's class number. AD is the positive class of every score.
CLASSES = ("NC", "AD")

"""Grading what a model writes; generated programs run confined, see :mod:`headstart.evaluation.sandbox`."""

"""Comparisons: several starts on the same data, in one folder that fills up and ends in a report."""

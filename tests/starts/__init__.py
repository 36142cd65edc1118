"""Starts as somebody outside the package would write them, one small file each."""

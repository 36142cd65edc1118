"""One run: a validated tree of settings, its folder, and its three stages."""

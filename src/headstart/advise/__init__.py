"""Advice before training: what each start costs, and at which rate it should be trained."""

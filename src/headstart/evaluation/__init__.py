"""What a model is worth: losses on held-out data, graded answers, with intervals."""

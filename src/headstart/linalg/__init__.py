"""Linear algebra on tensors alone: no model, no configuration, no files."""

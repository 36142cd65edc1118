"""How factors live inside a PEFT model: anchored and residual layers, saving, loading, export."""

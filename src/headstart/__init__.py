"""headstart: every serious way to initialise LoRA, behind one verb."""

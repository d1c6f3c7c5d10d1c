"""Forge runs this at every start. LoRA Guard needs only what Forge brings, so there is nothing to install."""

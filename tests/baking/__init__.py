"""LoRAs baked into checkpoint files."""

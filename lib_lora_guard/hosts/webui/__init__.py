"""What the hosts of the A1111 family have in common: prompts, LoRA tags, settings, the tab. Imports no host."""

"""LoRA files made at random, by structure: every kind, dtype, spelling and setting, whole and damaged, and the rules that hold for all."""

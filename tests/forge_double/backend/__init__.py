"""A small, strict double of the parts of Forge that LoRA Guard touches.

Written from the behaviour that the contract suite states (tests/contract runs unchanged against this and the real
Forge). Strict: unknown layers, wrong keys and unbaked tensors raise where the real one would go on by luck.
"""

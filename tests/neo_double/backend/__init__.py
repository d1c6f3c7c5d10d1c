"""A small, strict double of the parts of Forge Neo that LoRA Guard touches.

Written from the behaviour that tests/contract_neo states, which runs unchanged against this and the real Neo. What Neo does with its
lists of functions when it places a model is done here too: empties them, appends to them, skips layers that it has placed.
Strict: unbaked tensors, unknown keys and moves with a foreign value in a weight's place raise.
"""

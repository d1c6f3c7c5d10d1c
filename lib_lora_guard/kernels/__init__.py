"""One pass from a stored weight to the temporary weight with the LoRAs in it: Triton's kernels, and plain torch beside them.

Importing the package imports no Triton. `fused.py` has the interface, `stored.py` the weights it reads, `twin.py` the same in
plain torch, `choice.py` which of the two is used.
"""

"""The guard's promises inside Forge Neo. Runs unchanged against the double (tests/neo_double) and against a real Neo.

NEO_ROOT=... NEO_PYTHON=... python tests/contract/run_real.py --host neo [--no-record]
"""

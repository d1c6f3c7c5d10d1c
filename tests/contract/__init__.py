"""The contract between Forge and the guard: one suite, run against the double and against the real Forge."""

"""Terms with factors of random numbers."""

from support.make import host_value

from lib_lora_guard.adapters import parse_term


def term(kind, shape, seed=1, strength=0.8, model=1.0, **more):
    return parse_term([strength, host_value(kind, shape, seed, **more), model, None, None], {})

"""Settings beside the tensors: right ones, and hostile ones."""

import json

PATTERNS = (
    "proj", "blocks.0.proj", ".*", "^proj", "(a+)+$", "(.*)*proj", "(x+x+)+y", "[", "(", "*", "(?=p)roj", "(?P<a>p)roj", "\\d+\\.proj", "p{1,9999}",
    "(p{1,99}){1,99}", "a" * 5000, "(" * 500 + ")" * 500, "|".join(["a"] * 2000), "\\1", "(p)\\1", "(?i)PROJ", "[\\s\\S]*", "x*" * 400 + "$", "\ud800", "", "$", "\\",
    "(?:proj|qkv)", "blocks\\.[0-9]+\\.(?:qkv|proj)", "[^]", "[a-", "(?#x)", "\\p{L}", "p++", "(?<!x)p", "p{2,1}", "\\N{DASH}",
)  # fmt: skip
ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    4,
    4.0,
    1e400,
    -1e300,
    1e-320,
    float("nan"),
    "4",
    "x",
    "",
    [],
    [4],
    {},
    {"a": 1},
    10**40,
    [[[]]],
    {"": None},
    2**63,
    "\u0000",
)
ENTRIES = (
    "r", "lora_alpha", "alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "feedforward_modules", "modules_to_save", "bias",
    "peft_type", "init_lora_weights", "kasa_config", "use_bdlora", "coft", "eps", "block_share", "oft_block_size", "boft_block_size",
    "num_cayley_neumann_terms", "use_cayley_neumann", "decompose_both", "target_modules", "fan_in_fan_out", "layer_replication", "unknown_entry", "lora_bias",
    "use_qalora", "alora_invocation_tokens", "decompose_factor", "target_parameters",
)  # fmt: skip
KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3", "HIRA", "VERA", "lora", "X\u001b[2J")


def plain(rng):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": rng.choice((4, 8, 2.5)), "use_rslora": rng.choice((False, True))}


def patterned(rng):
    count = rng.choice((1, 2, 5, 2000))
    pick = rng.choice(("alpha_pattern", "rank_pattern"))
    patterns = {rng.choice(PATTERNS) + ("" if n < 30 else str(n)): rng.choice((4, 8, 2.0, *ODD)) for n in range(count)}
    return {
        **plain(rng),
        pick: patterns,
        **({"feedforward_modules": rng.choice(PATTERNS)} if rng.random() < 0.3 else {}),
    }


def odd(rng):
    entries = {rng.choice(ENTRIES): rng.choice(ODD) for _ in range(rng.choice((1, 2, 6)))}
    if rng.random() < 0.3:
        entries["peft_type"] = rng.choice(KINDS)
    prefix = rng.choice(("", "", "", "unet.", "transformer.", "text_encoder.", "x."))
    return {prefix + name: value for name, value in entries.items()}


def _text(rng, entries):
    text = json.dumps(entries)
    if rng.random() < 0.15:
        text = rng.choice(
            (
                text[:-1],
                "",
                "null",
                "[]",
                "5",
                "[" * 100_000,
                '{"a":' * 50_000,
                text.replace("{", '{"r":1,"r":2,', 1),
                '{"r": ' + "9" * 5000 + "}",
                "\u0000",
                text + " " * 300_000,
                "{'r': 4}",
                "NaN",
                '"' + "x" * 500_000 + '"',
            )
        )
    return text


def metadata(rng, more, is_odd):
    """`(metadata, text of adapter_config.json or None)`.

    Args:
        more: Entries of a configuration that the tensors need.
        is_odd: Something in it is hostile, or changes what the tensors mean.
    """
    if not is_odd:
        where = rng.random()
        if more:
            text = json.dumps({"peft_type": "OFT", **more})
            return ({"lora_adapter_metadata": text}, None) if where < 0.5 else ({}, text)
        return ({}, None) if where < 0.7 else ({"format": "pt"}, None)
    choice = rng.random()
    if choice < 0.15:
        return {
            "ss_base_model_version": rng.choice(("sdxl_base_v1-0", "flux1", "x", "", "\u001b[31m")),
            "modelspec.architecture": rng.choice(ARCHITECTURES),
        }, None
    if choice < 0.3:
        value = rng.choice(("4", "4.0", "x", "", "nan", "inf", "1e400", "-1", "0", "9" * 5000, "None", "\uff14"))
        return {
            "ss_network_dim": rng.choice(("4", "8", value)),
            "ss_network_alpha": value,
            "ss_network_args": rng.choice(ARGS),
        }, None
    entries = {**more, **rng.choice((plain, patterned, odd))(rng)}
    text = _text(rng, entries)
    where = rng.random()
    if where < 0.6:
        return {"lora_adapter_metadata": text}, None
    if where < 0.85:
        return {}, text
    return {"lora_config": text, "lora_alpha": str(entries.get("lora_alpha")), "r": "4"}, None


ARCHITECTURES = ("Flux.1-dev/lora", "stable-diffusion-xl-v1-base/lora", "z-image", "", "x" * 10_000)
ARGS = ("{}", '{"conv_dim": 4, "conv_alpha": 1}', "[", '{"conv_dim": [], "conv_alpha": {}}', "null", "[" * 50_000)

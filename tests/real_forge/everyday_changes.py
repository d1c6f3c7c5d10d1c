"""Everyday paths on which models, LoRA files, settings and prompts change; walked by everyday.py."""

import shutil

from real_forge.run import difference
from real_forge.sides import MODELS, WIDE, attempt, into, wait_until_started

WAYS = []
way = into(WAYS)

# Models come and go


@way("checkpoint switched and back", "Flux bf16", wants=(r"lg_sd15_a.*NOT applied",))
def checkpoints(f):
    f.shot("before", "a cat <lora:@a:1>")
    f.shot("another family", "a cat <lora:@a:1>", on=MODELS["SD1.5 fp16"])
    f.shot("back", "a cat <lora:@a:1>")
    f.shot("a LoRA of the other family", "a cat <lora:lg_sd15_a:1> <lora:@b:1>", truth="its truth", stock=False)
    f.shot("its truth", "a cat <lora:@b:1>")


@way("VAE switched and back", "Flux bf16")
def vae(f):
    other = [str(f.store / "zz_vae_flux.safetensors")]
    with_lora = f.shot("own", "a cat <lora:@a:1>")
    switched = f.shot("other", "a cat <lora:@a:1>", modules=other)
    f.check(difference(with_lora, switched)[0] > 8, "the other VAE is not seen")
    f.shot("own again", "a cat <lora:@a:1>")


@way("unload and reload checkpoint", "Flux bf16", "Flux fp8")
def unload(f):
    f.shot("before", "a cat <lora:@a:1>")
    f.forge.call("/sdapi/v1/unload-checkpoint", {})
    f.shot("after unload, same", "a cat <lora:@a:1>")
    f.forge.call("/sdapi/v1/unload-checkpoint", {})
    f.forge.call("/sdapi/v1/reload-checkpoint", {})
    f.shot("after reload, another", "a cat <lora:@b:1>")
    f.forge.call("/sdapi/v1/unload-checkpoint", {})
    f.shot("after unload, without", effect=False)


@way("Reload UI", "Flux bf16", "Flux fp8")
def reload_ui(f):
    f.shot("before", "a cat <lora:@a:1>")
    starts = f.forge.console().count("Startup time:")
    f.forge.call("/lora-guard-test/reload-ui", {})
    wait_until_started(f.forge, starts + 1)
    f.shot("after, same", "a cat <lora:@a:1>")
    f.shot("after, without", effect=False)
    f.shot("after, another", "a cat <lora:@b:1>")


# LoRA files


@way(
    "missing LoRA beside a good one",
    "Flux bf16",
    "Flux fp8",
    "SD1.5 fp16",
    wants=(r"lg_nowhere",),
    verdict="stock applies none",
)
def missing(f):
    f.shot("good alone", "a cat <lora:@a:1>")
    f.shot("missing first", "a cat <lora:lg_nowhere:1> <lora:@a:1>", truth="good alone", stock=False)
    f.shot("missing last", "a cat <lora:@b:0.5> <lora:lg_nowhere:1>", truth="other alone", stock=False)
    f.shot("missing alone", "a cat <lora:lg_nowhere:1>", truth="nothing", stock=False)
    f.shot("other alone", "a cat <lora:@b:0.5>")
    f.shot("nothing", effect=False)


@way("LoRA file deleted after listing", *WIDE, wants=(r"lg_gone",), verdict="stock fails")
def deleted(f):
    gone = f.loras / "lg_gone.safetensors"
    shutil.copy(f.loras / f"{f.named('@b')}.safetensors", gone)
    f.forge.call("/sdapi/v1/refresh-loras", {})
    f.shot("both", "a cat <lora:@a:1> <lora:lg_gone:0.6>")
    f.shot("good alone", "a cat <lora:@a:0.8>")
    try:
        gone.unlink()
    except OSError as error:
        f.check(False, f"the file is held: {error}")
    f.shot("deleted", "a cat <lora:@a:0.8> <lora:lg_gone:0.7>", truth="good alone", stock=False)
    f.shot("deleted, again", "a cat <lora:@a:0.8> <lora:lg_gone:0.7>", truth="good alone", stock=False)
    f.shot("next", "a cat <lora:@b:1>")


@way("retrained file", *WIDE, verdict="stock keeps the old one, or mixes")
def retrained(f):
    again = f.loras / "lg_again.safetensors"
    shutil.copy(f.loras / f"{f.named('@a')}.safetensors", again)
    f.forge.call("/sdapi/v1/refresh-loras", {})
    f.shot("old values", "a cat <lora:@a:1>")
    f.shot("new values", "a cat <lora:@b:1>")
    f.shot("before", "a cat <lora:lg_again:1>", truth="old values", stock=False)
    if f.guarded:
        again.write_bytes((f.loras / f"{f.named('@b')}.safetensors").read_bytes())
    f.shot("at the next image", "a cat <lora:lg_again:1>", truth="new values", stock=False)
    if f.guarded:
        again.write_bytes((f.loras / f"{f.named('@a')}.safetensors").read_bytes())
    f.shot("beside another", "a cat <lora:lg_again:1> <lora:@b:0.5>", truth="old and other", stock=False)
    f.shot("old and other", "a cat <lora:@a:1> <lora:@b:0.5>")
    again.unlink()


@way(
    "broken file between good ones",
    "Flux bf16",
    "Flux fp8",
    wants=(r"lg_broken.*NOT applied", r"_wrong.*NOT applied"),
    verdict="stock fails",
)
def broken(f):
    whole = (f.loras / f"{f.named('@b')}.safetensors").read_bytes()
    kinds = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"<html>404</html>" * 9}
    for n, content in enumerate(kinds.values()):
        (f.loras / f"lg_broken{n}.safetensors").write_bytes(content)
    f.forge.call("/sdapi/v1/refresh-loras", {})  # Forge itself complains of them here
    f.shot("good two", "a cat <lora:@a:0.6> <lora:@b:0.6>")
    for n, kind in enumerate(kinds):
        prompt = f"a cat <lora:@a:0.6> <lora:lg_broken{n}:1> <lora:@b:0.6>"
        f.shot(kind, prompt, truth="good two", stock=False)
    wrong = "a cat <lora:@a:0.6> <lora:@wrong:1> <lora:@b:0.6>"
    f.shot("wrong shape", wrong, truth="good two", stock=False)
    for n in range(len(kinds)):
        (f.loras / f"lg_broken{n}.safetensors").unlink()


# Settings of the guard while Forge runs


@way("switched off and on", *WIDE)
def enable(f):
    f.shot("on", "a cat <lora:@a:1>")
    f.option(enable=False)
    f.shot("off, same stack", "a cat <lora:@a:1>", strict=True)
    f.shot("off, another", "a cat <lora:@b:1>", strict=True)
    f.shot("off, without", effect=False, strict=True)
    f.shot("off, two", "a cat <lora:@a:0.5> <lora:@b:0.5>", strict=True)
    f.option(enable=True)
    f.shot("on again, same stack", "a cat <lora:@a:0.5> <lora:@b:0.5>")
    f.shot("on again, another", "a cat <lora:@a:1>")
    f.option(enable=True)


@way("LoRA mode switched", *WIDE)
def modes(f):
    f.shot("Automatic", "a cat <lora:@a:1>")
    for mode in ("Merge", "fp16 LoRA", "Forge's own", "Automatic", "Forge's own", "Merge", "Automatic"):
        f.option(mode=mode)
        offset = f.forge.log.stat().st_size
        f.shot(f"{mode}, same stack", "a cat <lora:@a:1>", truth="Automatic", effect=False, strict=False)
        said = f.forge.log.read_bytes()[offset:].decode("utf-8", "replace")
        if mode == "Merge":
            f.check("merge" in said, "Merge: the console does not say that anything was merged")
    f.option(mode="Merge")
    f.shot("Merge, another", "a cat <lora:@b:1>")
    f.shot("Merge, without", effect=False)
    f.option(mode="Automatic")


@way("LoRA mode switched, low bits", "Flux fp8", "Flux Q4_K", verdict="as the reference")
def modes_low(f):
    for mode in ("fp16 LoRA", "Automatic", "Forge's own", "Automatic"):
        f.option(mode=mode)
        f.shot(f"{mode}", "a cat <lora:@a:1>")
    f.option(mode="Merge")
    f.check(not isinstance(attempt(lambda: f.image("a cat <lora:@a:1>")), str), "Merge: no picture")
    f.option(mode="Automatic")
    f.shot("after Merge", "a cat <lora:@a:1>")


# Prompts are not encoded again


def encodes(f, action):
    before = f.forge.call("/lora-guard-test/counts")
    action()
    after = f.forge.call("/lora-guard-test/counts")
    return after["encodes"] - before["encodes"], after["forwards"] - before["forwards"]


@way("U-Net LoRAs change, the prompt does not", *WIDE, verdict="stock encodes each time")
def not_encoded_again(f):
    # No space before a LoRA: what is left of the prompt is the text that is encoded.
    f.image("a zebra")
    prompts = ["a zebra<lora:@b:1>", "a zebra<lora:@b:0.5>", "a zebra<lora:@b:0.5><lora:@norm:1>", "a zebra"]

    def all_of_them():
        for n, prompt in enumerate(prompts):
            f.shot(f"{n}", prompt, effect=n < 3)

    counted = encodes(f, all_of_them)
    f.check(counted == (0, 0), f"{counted[0]} prompts were encoded, {counted[1]} passes through text encoders")
    needed = encodes(f, lambda: f.shot("text encoder too", "a zebra<lora:@a:1>"))
    f.check(needed[0] > 0, "a LoRA for the text encoder did not encode the prompt")
    back = encodes(f, lambda: f.shot("U-Net again", "a zebra<lora:@b:1>"))
    f.check(back[0] == 0, f"going back to the text encoder without LoRA encoded {back[0]} prompts")


@way("prompts A B A B", *WIDE, verdict="stock encodes each time")
def alternating(f):
    f.image("a cat <lora:@b:1>")

    def all_of_them():
        for n in range(6):
            f.shot("AB"[n % 2], f"a {('horse', 'boat')[n % 2]} <lora:@b:1>")

    counted = encodes(f, all_of_them)
    f.check(counted[0] == 2, f"two prompts in turn were encoded {counted[0]} times")

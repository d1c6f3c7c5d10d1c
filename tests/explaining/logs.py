"""Console logs in the hosts' own formats, with the numbers that users reported (rows of docs/replay.md, threads on GitHub).

No log is a copy: each is written anew from what a host prints and the numbers of a report.
"""

from types import SimpleNamespace

START = """Total VRAM {vram} MB, total RAM {ram} MB
pytorch version: 2.4.0+cu124
Set vram state to: NORMAL_VRAM
Device: cuda:0 NVIDIA GeForce {card} : native
Hint: your device supports --cuda-malloc for potential speed improvements.
"""
PLACED = (
    "[Unload] Trying to free {ask} MB for cuda:0 with 0 models keep loaded ... Current free memory is {free} MB ... Done.\n"
    "[Memory Management] Target: {model}, Free GPU: {free} MB, Model Require: {require} MB, Previously Loaded: {before} MB, "
    "Inference Require: {inference} MB, Remaining: {remaining} MB, "
)
LOADED = "[LORA] Loaded C:\\Users\\me\\models\\Lora\\{name} for KModel-UNet with {keys} keys at weight {weight} (skipped 0 keys) with on_the_fly = {online}\n"


def start(card="RTX 3060", vram=12287, ram=32692):
    return START.format(card=card, vram=vram, ram=ram)


def placed(end, model="KModel", ask="9411.13", free="9851.00", require="6246.84", before="0.00", inference="1024.00", remaining="2502.53"):  # fmt: skip
    return PLACED.format(ask=ask, model=model, free=free, require=require, before=before, inference=inference, remaining=remaining) + end  # fmt: skip


def created(storage):
    return f"K-Model Created: {{'storage_dtype': {storage}, 'computation_dtype': torch.bfloat16}}\n"


def loaded(name="style.safetensors", keys=494, weight=1.0, online=False):
    return LOADED.format(name=name, keys=keys, weight=weight, online=online)


def log(text, *names, **facts):
    """`names` are the rules in order; `facts` by rule the facts that must be there."""
    return SimpleNamespace(text=text, names=list(names), facts=facts)


NEO = (
    "Total VRAM 16376 MB, total RAM 65279 MB\nPyTorch Version: 2.9.1+cu130\nVRAM State: NORMAL_VRAM\n"
    "Device: cuda:0 NVIDIA GeForce RTX 4070 Ti SUPER : native\n"
)
NF4 = "Using Detected UNet Type: nf4\nUsing pre-quant state dict!\n" + created("'nf4'")
OOM = "CUDA out of memory. Tried to allocate {mib:.2f} MiB. GPU 0 has a total capacity of {total} GiB of which 0 bytes is free. Of the allocated memory {taken} GiB is allocated by PyTorch, and {unused} GiB is reserved by PyTorch but unallocated."
NEO_LOADED = "[LORA] Loaded style.safetensors for KModel-UNet with 240 keys at weight 1.0 (skipped 0 keys) with on_the_fly = {online}\n"

LOGS = {
    # An old Forge's placement of NF4: the merge ends the card's memory at 43 %.
    "oom in the merge of nf4": log(
        start("RTX 4060 Ti", 16379, 65000) + NF4
        + "To load target model KModel\nBegin to load 1 model\n[Memory Management] Current Free GPU Memory: 9773.37 MB\n[Memory Management] Required Model Memory: 6246.84 MB\n"
        "[Memory Management] Required Inference Memory: 1024.00 MB\n[Memory Management] Estimated Remaining GPU Memory: 2502.53 MB\n"
        "Patching LoRAs for KModel:  43%|####3     | 130/304 [00:08<00:11, 15.63it/s]"
        "\rERROR lora diffusion_model.double_blocks.12.img_mod.lin.weight " + OOM.format(mib=216, total="15.99", taken="13.9", unused="0.31") + "\n"
        "Patching LoRA weights failed. Retrying by offloading models.\n",
        "merge_oom", merge_oom={"layers": 1, "size": "216 MB were asked for"},
    ),
    "oom in the merge, then on the processor": log(
        start("RTX 4080", 16375, 32000)
        + "Patching LoRAs for KModel:  94%|#########4| 286/304 [01:16<00:04,  3.75it/s]\n"
        "ERROR lora diffusion_model.single_blocks.30.linear1.weight Allocation on device \n"
        "Patching LoRA weights out of memory. Retrying by offloading models.\nLoRA patching has taken 118.75 seconds\nMoving model(s) has taken 130.87 seconds\n",
        "merge_oom", "patch_slow", merge_oom={"layers": 1}, patch_slow={"seconds": 130.87},
    ),
    "several layers of 24 GB": log(
        start("RTX 3090", 24575, 65000)
        + "".join(f"ERROR lora diffusion_model.single_blocks.{n}.linear1.weight " + OOM.format(mib=252, total="23.99", taken="23.1", unused="0.10") + "\n" for n in range(18, 25)),
        "merge_oom", merge_oom={"layers": 7, "size": "252 MB were asked for"},
    ),
    "reserved and unallocated": log(
        start("RTX 4090", 24563, 64000)
        + "Traceback (most recent call last):\ntorch.OutOfMemoryError: " + OOM.format(mib=180, total="23.99", taken="20.53", unused="2.40") + " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True\n",
        "oom", "fragments", oom={"size": "180 MB were asked for"}, fragments={"gb": 2.4},
    ),
    "the absurd number": log(
        start() + "[Unload] Trying to free 953674316406250018963456.00 MB for cuda:0 with 0 models keep loaded ... \nMoving model(s) has taken 3.20 seconds\n",
        "sentinel", sentinel={"mb": "953674316406250018963456.00"},
    ),
    "more than the card has": log(
        start("RTX 4060", 8187, 32000) + placed("All loaded to GPU.\n", ask="137628.85", model="IntegratedAutoencoderKL", require="159.87")
        + "Moving model(s) has taken 0.20 seconds\n",
        "evict_all", evict_all={"mb": 137628.85, "vram_mb": 8187.0},
    ),
    "patching of 190 seconds": log(
        start() + created("torch.float8_e4m3fn") + loaded(keys=304)
        + placed("CPU Swap Loaded (blocked method): 2967.07 MB, GPU Loaded: 8383.00 MB\n", ask="18500.00", free="10687.00", require="11350.07", remaining="-1687.07")
        + "Moving model(s) has taken 190.32 seconds\n",
        "patch_slow", "rounded", "swap", "evict_all", patch_slow={"seconds": 190.32, "count": 1}, swap={"mb": 2967.07}, rounded={"files": "style.safetensors", "storage": "float8_e4m3fn"},
    ),
    "vram full, the driver goes on in ram": log(
        start("RTX 3080 Ti", 12287, 32692) + "GGUF state dict: {'F32': 476, 'Q8_0': 304}\n" + created("'gguf'") + loaded(online=True)
        + placed("All loaded to GPU.\n", require="12119.55") + "Moving model(s) has taken 12.10 seconds\n"
        " 100%|##########| 20/20 [01:15<00:00,  3.75s/it]\n"
        + "[Low GPU VRAM Warning] Your current GPU free memory is 1288.30 MB for this diffusion iteration.\n[Low GPU VRAM Warning] This number is lower than the safe value of 1536.00 MB.\n" * 3
        + " 100%|##########| 20/20 [05:07<00:00, 15.35s/it]\n",
        "sysmem", "slow_steps", sysmem={"mb": 1288.3, "count": 3}, slow_steps={"least": 3.75, "most": 15.35},
    ),
    "reloaded for every image": log(
        start("RTX 3050", 8191, 16335) + NF4
        + (
            placed("All loaded to GPU.\n", model="JointTextEncoder", require="5154.62", ask="7725.00")
            + "Moving model(s) has taken 8.40 seconds\n" + placed("All loaded to GPU.\n", ask="8000.00") + "Moving model(s) has taken 11.60 seconds\n"
        ) * 4,
        "reloads", reloads={"count": 4, "seconds": 80.0},
    ),
    "a lora without effect on nf4": log(
        start() + NF4 + loaded(weight=0.8) + placed("All loaded to GPU.\n") + "Moving model(s) has taken 9.00 seconds\n",
        "rounded", rounded={"files": "style.safetensors", "storage": "nf4"},
    ),
    "fp16 lora chosen on bf16": log(
        start("RTX 4090", 24563, 64000) + "Using online LoRAs in FP16: True\n" + created("torch.bfloat16") + loaded() + "Moving model(s) has taken 7.00 seconds\n",
        "wish_ignored", wish_ignored={"storage": "bfloat16"},
    ),
    "k-quants": log(
        start() + "GGUF state dict: {'F32': 476, 'Q4_K': 304}\n" + created("'gguf'") + loaded()
        + "Traceback (most recent call last):\nNotImplementedError: Low bit LoRA for this data type is not implemented yet. Please select 'Automatic (fp16 LoRA)' in 'Diffusion in Low Bits' (on the top line of this page) to use this LoRA.\n",
        "low_bit", "rounded", low_bit={"types": "Q4_K"}, rounded={"storage": "Q4_K"},
    ),
    "a lora for another model": log(
        start() + "[LORA] LoRA version mismatch for KModel: C:\\models\\Lora\\xl style.safetensors\n",
        "other_model", other_model={"files": "xl style.safetensors"},
    ),
    "keys without a place": log(
        start() + "[LORA] Loading /home/me/models/Lora/half.safetensors for KModel with unmatched keys ['lora_te3_encoder_block_0.lora_up.weight', 'lora_te3_x']\n"
        "[LORA] Mismatch /home/me/models/Lora/other.safetensors for KModel-UNet with 120 keys mismatched in 374 keys\n",
        "mismatched", "unmatched", unmatched={"keys": 2, "files": "half.safetensors"}, mismatched={"files": "other.safetensors", "keys": "120", "of": "374"},
    ),
    "one lora is missing": log(
        start() + "*** Error loading network stile\n    AttributeError: 'NoneType' object has no attribute 'filename'\n*** activating extra network lora with arguments [<modules.extra_networks.ExtraNetworkParams object>]: AttributeError\n",
        "stage_failed",
    ),
    "ram is full and the window closes": log(
        start("RTX 3060", 12287, 16384) + NF4 + loaded() + placed("", ask="9145.00") + "\nPress any key to continue . . .\n",
        "ram_death", "rounded", ram_death={"ram": "16 GB of RAM"},
    ),
    "linux kills it": log(
        start("RTX 4060 Laptop GPU", 8187, 32000) + "Loading Model: {'checkpoint_info': {'filename': 'x'}}\n./webui.sh: line 292:  4711 Killed                  \"${python_cmd}\" -u \"${LAUNCH_SCRIPT}\" \"$@\"\n",
        "ram_death", ram_death={"ram": "31 GB of RAM"},
    ),
    "shared swap": log(
        start("RTX 3090", 24575, 32000) + "Environment vars changed: {'stream': True, 'inference_memory': 3075.0, 'pin_shared_memory': True}\n"
        + placed("Shared Swap Loaded (asynchronous method): 17496.00 MB, GPU Loaded: 5204.13 MB\n", ask="32585.18", free="9589.00", require="22700.13", inference="3075.00", remaining="-16185.96")
        + "RuntimeError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call\n 10%|#         | 2/20 [00:42<06:21, 21.18s/it]\n",
        "driver_oom", "swap", "evict_all", swap={"mb": 17496.0}, evict_all={"mb": 32585.18, "vram_mb": 24575.0},
    ),
    "a slider above the card": log(
        start("RTX A6000", 48676, 128000) + "Environment vars changed: {'stream': False, 'inference_memory': -31528.0, 'pin_shared_memory': False}\n",
        "bad_setting", bad_setting={"mb": -31528.0, "card": ", of 48676 MB on the card"},
    ),
    "the pc froze while a checkpoint was read": log(
        start(ram=16335) + "Loading Model: {'checkpoint_info': {'filename': 'C:\\\\x\\\\flux1-dev-fp8.safetensors'}, 'unet_storage_dtype': None}\n" + "\0" * 512,
        "cut_off", cut_off={"ram": "16 GB of RAM"},
    ),
    "the pc froze while a model was unloaded": log(
        start(ram=16335) + "Model loaded in 31.2s (unload existing model: 0.4s, forge model load: 30.8s).\n[Unload] Trying to free 13464.34 MB for cuda:0 with 0 models keep loaded ... Current free memory is 851.00 MB ... Unload model KModel ",
        "cut_off", "evict_all",
    ),
    "the pc froze in the merge": log(
        start() + created("torch.bfloat16") + loaded() + placed("All loaded to GPU.\n") + "Patching LoRAs for KModel:  43%|####3     | 130/304 [10:48<14:11, 32.43s/it]",
        "cut_off",
    ),
    "the first step does not end": log(
        start() + placed("All loaded to GPU.\n") + "Moving model(s) has taken 12.10 seconds\n  0%|          | 0/20 [00:00<?, ?it/s]\r  5%|5         | 1/20 [02:11<41:35, 131.34s/it]",
        "stuck_step", stuck_step={"seconds": 131.34},
    ),
    "a chinese windows closes": log(
        start("RTX 3060", 12287, 16384) + placed("", ask="9145.00") + "\n请按任意键继续. . . \n", "ram_death", ram_death={"ram": "16 GB of RAM"},
    ),
    "ended by hand after an image": log(
        start() + placed("All loaded to GPU.\n") + "Moving model(s) has taken 1.10 seconds\n100%|##########| 20/20 [00:30<00:00,  1.5s/it]\n"
        "Interrupted with signal 2 in <frame at 0x0000>\nTerminate batch job (Y/N)? y\nPress any key to continue . . .\n",
    ),
    "windows has no page file": log(
        start(ram=16384) + "Loading Model: {}\nOSError: The paging file is too small for this operation to complete. (os error 1455)\nPress any key to continue . . .\n",
        "page_file",
    ),
    "neo: oom while patching, partly loaded": log(
        NEO + "Patch LoRAs on-the-fly: False\nDiffusion Model: {'storage': 'torch.float8_e4m3fn', 'computation': 'torch.bfloat16'}\n" + NEO_LOADED.format(online=False)
        + "Requested to load KModel\nEncountered Out of Memory during LoRA Patching; Retrying with Offloading...\n"
        "loaded partially; 8469.73 MB usable, 8101.22 MB loaded, 3248.85 MB offloaded, 144.02 MB buffer reserved, lowvram patches: 0\n",
        "merge_oom", "rounded", "swap", swap={"mb": 3248.85}, rounded={"storage": "float8_e4m3fn"},
    ),
    "neo: a lora that is not there, another that does not fit, a leak": log(
        NEO + 'Failed to load LoRA: "stile"\n[LORA] LoRA mismatch for KModel: E:\\neo\\models\\Lora\\flux.safetensors\n'
        "[LORA] Loading half.safetensors for KModel with 24 unmatched keys\nMemory Leak with model JointTextEncoder !\n",
        "missing", "other_model", "unmatched", "leak", missing={"names": "stile"}, unmatched={"keys": 24},
    ),
    "neo: the vae is moved quickly": log(
        NEO + "Requested to load KModel\nloaded partially; 8469.73 MB usable, 8101.22 MB loaded, 0.00 MB offloaded, 144.02 MB buffer reserved, lowvram patches: 0\n"
        "100%|##########| 20/20 [00:09<00:00,  2.1it/s]\nRequested to load IntegratedAutoencoderKL\n",
    ),
    "neo: the pc froze while a text encoder was loaded": log(
        NEO + "Requested to load KModel\nloaded completely; 8469.73 MB usable, 1946.80 MB loaded, full load: True\nRequested to load JointTextEncoder\n", "cut_off",
    ),
    "neo: all is well": log(
        NEO + "Requested to load KModel\nloaded completely; 8469.73 MB usable, 1946.80 MB loaded, full load: True\nMoving model(s) has taken 1.20 seconds\n"
        + NEO_LOADED.format(online=True) + " 100%|##########| 20/20 [00:09<00:00,  2.1it/s]\n",
    ),
}  # fmt: skip

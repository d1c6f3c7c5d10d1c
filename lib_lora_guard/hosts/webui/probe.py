"""Is this a WebUI whose LoRA extension and prompts the guard can take over? Capabilities are probed, never versions."""

from __future__ import annotations

from types import ModuleType

from ..probing import attribute, parameters


def check_networks(networks: ModuleType) -> None:
    """Raises HostError unless Forge's LoRA extension reads files in the way the guard replaces."""
    # The others come by position.
    parameters(networks, "load_lora_for_models", ["filename", "online_mode"])
    attribute(networks, "load_lora_state_dict")
    parameters(networks, "load_networks", ["names"])
    for name in (
        "available_networks",
        "available_network_aliases",
        "forbidden_network_aliases",
        "sd_models.model_data",
    ):
        attribute(networks, name)
    for name in ("update_available_networks_by_names", "list_available_networks"):
        attribute(networks, name)


def check_processing(processing: ModuleType) -> None:
    """Raises HostError unless Forge keeps conditionings in the way the guard builds on."""
    name = "StableDiffusionProcessing"
    parameters(processing, f"{name}.cached_params", ["required_prompts", "steps", "extra_network_data"])
    parameters(
        processing,
        f"{name}.get_conds_with_caching",
        ["function", "required_prompts", "steps", "caches", "extra_network_data", "hires_steps"],
    )

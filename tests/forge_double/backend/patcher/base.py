import copy

from backend.patcher.lora import LoraLoader


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, current_device=None, **kwargs):
        self.model = model
        self.lora_patches = {}
        self.model_options = {"transformer_options": {}}
        self.load_device = load_device
        self.offload_device = offload_device
        self.current_device = current_device or offload_device
        if not hasattr(model, "lora_loader"):
            model.lora_loader = LoraLoader(model)
        self.lora_loader = model.lora_loader

    def clone(self):
        other = ModelPatcher(self.model, self.load_device, self.offload_device, 0, self.current_device)
        other.lora_patches = self.lora_patches.copy()
        other.model_options = copy.deepcopy(self.model_options)
        return other

    def is_clone(self, other):
        return getattr(other, "model", None) is self.model

    def add_patches(self, *, filename, patches, strength_patch=1.0, strength_model=1.0, online_mode=False):
        known = {name for name, _ in self.model.named_parameters()}
        mine, used = {}, set()
        for address, value in patches.items():
            key, offset, function = (address, None, None) if isinstance(address, str) else (*address, None)[:3]
            if key in known:
                used.add(address)
                mine.setdefault(key, []).append([strength_patch, value, strength_model, offset, function])
        self.lora_patches[filename, strength_patch, strength_model, online_mode] = mine
        return used

    def has_online_lora(self):
        return any(online for _, _, _, online in self.lora_patches)

    def refresh_loras(self):
        self.lora_loader.refresh(lora_patches=self.lora_patches, offload_device=self.offload_device)

    def memory_required(self, input_shape):
        return self.model.memory_required(input_shape=input_shape)

    def model_dtype(self):
        return None

    def model_patches_to(self, device):
        pass

    def forge_patch_model(self, target_device=None):
        if target_device is not None:
            self.model.to(target_device)
            self.current_device = target_device
        return self.model

    def forge_unpatch_model(self, target_device=None):
        if target_device is not None:
            self.model.to(target_device)
            self.current_device = target_device

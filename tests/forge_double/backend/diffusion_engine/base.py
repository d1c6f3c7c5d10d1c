import safetensors.torch

from backend import utils


class ForgeDiffusionEngine:
    forge_objects = None

    def save_unet(self, filename):
        safetensors.torch.save_file(
            utils.get_state_dict_after_quant(self.forge_objects.unet.model.diffusion_model), filename
        )
        return filename

    def save_checkpoint(self, filename):
        state = {
            **utils.get_state_dict_after_quant(
                self.forge_objects.unet.model.diffusion_model, prefix="model.diffusion_model."
            ),
            **utils.get_state_dict_after_quant(self.forge_objects.clip.cond_stage_model, prefix="text_encoders."),
            **utils.get_state_dict_after_quant(self.forge_objects.vae.first_stage_model, prefix="vae."),
        }
        safetensors.torch.save_file(state, filename)
        return filename

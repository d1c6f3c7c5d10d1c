import torch


class KModel(torch.nn.Module):
    def __init__(self, model, diffusers_scheduler, k_predictor=None, config=None):
        super().__init__()
        self.storage_dtype, self.computation_dtype = model.storage_dtype, model.computation_dtype
        self.diffusion_model, self.predictor, self.config = model, k_predictor, config

    def apply_model(self, x, t, **kwargs):
        return self.diffusion_model(x, t, **kwargs)

    def memory_required(self, input_shape):
        rows, _, height, width = input_shape
        return 1.28 * rows * height * width * self.computation_dtype.itemsize * 16384

from support.make import Net

from backend import operations, utils


class ControlLora:
    """Its model is the first part of the model it controls, with that model's own parameters."""

    def __init__(self, control_weights, global_average_pooling=False, device=None):
        self.control_weights = control_weights
        self.control_model = None

    def pre_run(self, model, percent_to_timestep_function):
        with operations.using_forge_operations(dtype=model.storage_dtype, manual_cast_enabled=True):
            self.control_model = Net(model.diffusion_model.config["width"], depth=1)
        for key, value in model.diffusion_model.state_dict().items():
            try:
                utils.set_attr(self.control_model, key, value)
            except AttributeError:
                continue
        for key, value in self.control_weights.items():
            utils.set_attr(self.control_model, key, value.to(model.storage_dtype))

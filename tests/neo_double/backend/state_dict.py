def load_state_dict(model, sd, ignore_errors=(), ignore_start=None):
    return model.load_state_dict(sd, strict=False)

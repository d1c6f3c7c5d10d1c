import torch


def get_attr_with_parent(root, path):
    parent, name, value = root, None, root
    for name in path.split("."):
        parent, value = value, getattr(value, name)
    return parent, name, value


def set_attr_raw(root, path, value):
    parent, name, _ = get_attr_with_parent(root, path)
    setattr(parent, name, value)


def tensor2parameter(tensor):
    return tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, requires_grad=False)


def set_attr(root, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        root = getattr(root, parent)
    setattr(root, name, torch.nn.Parameter(value, requires_grad=False))


def get_state_dict_after_quant(model, prefix=""):
    return {prefix + key: value.clone() for key, value in model.state_dict().items()}

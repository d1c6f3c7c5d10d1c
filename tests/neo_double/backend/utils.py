import torch


def get_attr(root, path):
    for name in path.split("."):
        root = getattr(root, name)
    return root


def set_attr_raw(root, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        root = getattr(root, parent)
    before = getattr(root, name)
    setattr(root, name, value)
    return before


def set_attr(root, path, value):
    parameter = value if isinstance(value, torch.nn.Parameter) else torch.nn.Parameter(value, requires_grad=False)
    return set_attr_raw(root, path, parameter)


def tensor2parameter(tensor):
    return tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor, requires_grad=False)

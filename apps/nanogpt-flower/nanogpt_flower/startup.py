"""Let a process train without importing torch's compiler, which takes more than a second."""

from torch.optim import Optimizer

_METHODS = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def leave_out_the_compiler() -> None:
    """Let torch's optimizers work without `torch._dynamo`, in a process that compiles nothing.

    Torch excludes some methods of its optimizers from compilation. Their wrapper imports the
    compiler at the first call, only to be told not to compile the method (`torch._compile` in torch
    2.9 to 2.13). It takes the attribute `__dynamo_disable` as the answer if it is there. A torch
    release that does this in another way imports the compiler as before.
    """
    for name in _METHODS:
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)

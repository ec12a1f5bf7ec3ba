"""Whether a network is compiled, in either of torch's ways."""

from diffusers.utils.torch_utils import is_compiled_module
from torch import nn


def is_compiled(network: nn.Module) -> bool:
    """Whether a network was compiled in place (`network.compile()`) or is `torch.compile`'s wrapper of one."""
    return is_compiled_module(network) or network._compiled_call_impl is not None

"""The blocks of a language model: the list of equal layers that the residual stream runs through, in order.

In: a module tree. Out: layer number → module, numbered as in the names of sites. Refuses to know families by name.
"""

from __future__ import annotations

from torch import nn

from lorica.core.errors import MethodError
from lorica.models.sites import layer_of


def blocks_of(trunk: nn.Module | None, name: str) -> dict[int, nn.Module]:
    """The blocks of a trunk: the children of its one list of layers. Raises MethodError naming `name` where there is no
    such list, or more than one.
    """
    lists = [] if trunk is None else [(n, m) for n, m in trunk.named_modules() if _is_list(n, m)]
    if len(lists) != 1:
        said = f"{len(lists)} ({', '.join(n for n, _ in lists)})" if lists else "none"
        raise MethodError(
            f"{name!r} must have one list of blocks for its residual stream to be seen, and has {said}.",
            hint="A causal language model with one stack of layers has one.",
        )
    return dict(enumerate(lists[0][1].children()))


def _is_list(name: str, module: nn.Module) -> bool:
    """Whether it is a list that is in no other one."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and layer_of(name) is None

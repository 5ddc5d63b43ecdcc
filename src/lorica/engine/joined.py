"""Maps of one input in a pass without gradients whose updates are known beforehand: a product, then the rows' factors.

In: a group of maps, the gathered factors of the rows. Out: the outputs of all maps side by side, in as few calls as
there can be. Refuses to know adapters, routes and where the factors come from.
"""

from __future__ import annotations

from torch import Tensor

from lorica.engine.factors import GroupFactors
from lorica.engine.groups import Group, Shared
from lorica.engine.linear import Make
from lorica.engine.native.walk import Adapted, Walks


class JoinedMaps(Shared):
    """A group of maps and the factors of a pass's rows, None where these have none. With `walks` both are one call.

    Attributes: `adapted` is that call, None where there is none.
    """

    def __init__(self, group: Group, factors: GroupFactors | None, walks: Walks | None = None) -> None:
        super().__init__(group)
        self.factors = factors
        self.adapted: Adapted | None = None
        low = None if factors is None else factors.only_low
        panels = None if walks is None or (factors is not None and low is None) else group.maps.panels(walks)
        if walks is not None and panels is not None:
            self.adapted = Adapted(walks, panels, group.maps.bias_O, low)

    def joined(self, x: Tensor) -> Tensor:
        """The outputs of all members side by side, [N, ΣO]."""
        x_NI = x.reshape(-1, x.shape[-1])
        if self.adapted is not None and self.adapted.takes(x_NI):
            return self.adapted(x_NI)
        factors = self.factors
        y_NO = self.group.maps.forward(x_NI if factors is None else factors.scaled(x_NI))
        return y_NO if factors is None else factors.add(x_NI, y_NO)

    def compute(self, x: Tensor) -> list[Tensor]:
        y_NO = self.joined(x)
        y = y_NO.view(*x.shape[:-1], y_NO.shape[1])
        return [y] if len(self.group.maps.sizes) == 1 else list(y.split(self.group.maps.sizes, dim=-1))

    def made(self, make: Make, *sources: Tensor) -> Tensor:
        """What the only member makes of `make(*sources)`."""
        flat = [source.reshape(-1, source.shape[-1]) for source in sources]
        return self.joined(make(*flat)).view(*sources[0].shape[:-1], -1)

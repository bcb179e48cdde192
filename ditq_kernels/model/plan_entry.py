"""One line of a plan: what becomes of one linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..layer.formats import Scheme
from ..layer.packing import LAYOUTS


@dataclass(frozen=True)
class PlanEntry:
    """One linear layer of a plan.

    Attributes:
        name: of the module in the model.
        scheme: the name of its scheme, or None: it stays in 16 bits.
        reason: why.
        in_features, out_features: K and N.
        fixed: whether no scheme can be given to it; ``reason`` then says what stands against it.
    """

    name: str
    scheme: str | None
    reason: str
    in_features: int
    out_features: int
    fixed: bool = False

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features

    @property
    def stored_bits(self) -> int:
        """Bits that the weight takes once converted, scales and group parameters included; 16 each where it is kept."""
        if self.scheme is None:
            return 16 * self.weights
        fmt = Scheme.parse(self.scheme).weight
        layout = LAYOUTS[fmt.layout]
        stored = layout.columns(self.in_features) * self.out_features * layout.dtype.itemsize
        stored += 4 * prod(fmt.scale_shape(self.out_features, self.in_features))
        if fmt.two_level:
            stored += fmt.group_count(self.in_features) * self.out_features
        return 8 * stored

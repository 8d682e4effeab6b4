# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What takes its parameters from a network: the part that scalar maps and conditionals have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from numpyro_maf.codec import storable

__all__ = ["Parametric"]


@dataclass(frozen=True)
class Parametric:
    """A function of one number with P parameters (abstract); a frozen dataclass without arrays."""

    # How many numbers a network is given for each value, see embed.
    inputs: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        storable(cls)

    @property
    def num_params(self) -> int:
        """P, how many parameters it takes for each dimension."""
        raise NotImplementedError

    @property
    def initial(self) -> tuple[float, ...]:
        """Where the parameters of an untrained network start, ``(num_params,)``."""
        return (0.0,) * self.num_params

    def embed(self, x):
        """``(...) -> (inputs, ...)``: what the network of a later dimension sees of a value."""
        return x[None]

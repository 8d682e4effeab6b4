# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What takes its parameters from a network: the part that scalar maps and conditionals have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = ["Parametric", "parametric_from_spec"]


KINDS: dict[str, dict[str, type[Parametric]]] = {}


@dataclass(frozen=True)
class Parametric:
    """A function of one number with P parameters (abstract); a frozen dataclass without arrays.

    A subclass with a ``kind`` of its own starts a registry, in which its subclasses are found by name.
    """

    kind: ClassVar[str]
    # How many numbers a network is given for each value, see embed.
    inputs: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            KINDS[cls.kind] = {}
        else:
            KINDS[cls.kind][cls.__name__] = cls

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

    @property
    def spec(self) -> dict[str, Any]:
        """Itself as JSON-able values; :func:`parametric_from_spec` is the way back."""
        return {self.kind: type(self).__name__, **asdict(self)}


def parametric_from_spec(spec: dict[str, Any]) -> Any:
    """The scalar map or conditional that :attr:`Parametric.spec` describes.

    :raises ValueError: for a kind or name that is unknown.
    """
    options = dict(spec)
    for kind, registry in KINDS.items():
        if kind in options:
            name = options.pop(kind)
            if name not in registry:
                raise ValueError(f"unknown {kind} {name!r}, expected one of {sorted(registry)}")
            return registry[name](**options)
    raise ValueError(f"expected one of the keys {sorted(KINDS)}, got {sorted(options)}")

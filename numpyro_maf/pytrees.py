# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Frozen dataclasses that are pytrees: a field is a leaf or static; and how they are shown."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

__all__ = ["Described", "short", "static"]


def static(**kwargs) -> Any:
    """A dataclass field that is configuration: hashable, never traced, never trained."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


def short(value) -> str:
    """A value's ``repr``; of a dataclass only the fields that differ from their defaults."""
    if isinstance(value, tuple):
        return f"({', '.join(map(short, value))}{',' if len(value) == 1 else ''})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return repr(value)
    fields = dataclasses.fields(value)
    own = [f"{f.name}={short(getattr(value, f.name))}" for f in fields if getattr(value, f.name) != f.default]
    return f"{type(value).__name__}({', '.join(own)})"


class Described:
    """Something that is shown in one to six lines, at the prompt and in notebooks (abstract).

    A subclass gives :meth:`_describe`. A dataclass needs ``repr=False`` to be shown so.
    """

    def _describe(self) -> list[str]:
        """The lines, the first of which begins with the name of the class."""
        raise NotImplementedError

    def __repr__(self) -> str:
        lines = [line if len(line) <= 100 else f"{line[:97]}..." for line in self._describe()]
        return "\n".join(lines)[:399]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Fields of frozen dataclasses that are pytrees: a field is a leaf or static."""

from __future__ import annotations

import dataclasses
from typing import Any


def static(**kwargs) -> Any:
    """A dataclass field that is configuration: hashable, never traced, never trained."""
    return dataclasses.field(metadata={"static": True}, **kwargs)

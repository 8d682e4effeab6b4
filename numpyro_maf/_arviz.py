# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""ArviZ, imported when first needed: it takes a second, and most users of flows do without."""

from __future__ import annotations

import warnings
from types import ModuleType


def import_arviz() -> ModuleType:
    """ArviZ, without the announcement of its version 1 that 0.23 makes once a day on import."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz

    return arviz

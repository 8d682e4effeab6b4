# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""What is a person at home doing? Tables of sensors in, honest probabilities out.

    home = activities.fit(frame, time="time", label="activity")
    home.predict(new_frame)

:func:`fit` learns from a pandas, polars or xarray table with a column of times, one of labels, and sensors of
any name; :func:`from_events` makes such a table of a list of events. The :class:`Home` that it returns
answers with probabilities.
"""

from numpyro_maf.activities.events import from_events
from numpyro_maf.activities.home import Home, load
from numpyro_maf.activities.learning import fit
from numpyro_maf.activities.sensors import Sensor
from numpyro_maf.activities.streams import Stream

__all__ = ["Home", "Sensor", "Stream", "fit", "from_events", "load"]

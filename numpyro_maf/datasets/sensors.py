# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Sensor data to infer activities from: the UCI Occupancy files and a simulated flat.

Nothing is downloaded: :func:`load_occupancy` reads public files from a folder the user names.
"""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FLAT_ACTIVITIES", "SensorData", "load_occupancy", "simulate_flat"]

Floats: TypeAlias = NDArray[np.floating[Any]]
Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SensorData:
    """Readings of S sensors at T times, and which of K activities went on.

    ``time`` (T,) is datetime64[s]; ``values`` (T, S) has one column a sensor, with S ``names``
    and S ``units``; ``activity`` (T,) indexes the K ``activities``. Raises ValueError where
    the shapes do not agree.
    """

    time: NDArray[np.datetime64]
    values: Floats
    names: tuple[str, ...]
    units: tuple[str, ...]
    activity: Ints
    activities: tuple[str, ...]

    def __post_init__(self) -> None:
        shapes = self.time.shape, self.values.shape, self.activity.shape, len(self.units)
        size, sensors = self.time.size, len(self.names)
        if shapes != ((size,), (size, sensors), (size,), sensors):
            raise ValueError(f"time, values, activity, units: shapes {shapes} for {sensors} names")

    @property
    def hour(self) -> Floats:
        """Hour of the day, (T,), in [0, 24)."""
        return (self.time - self.time.astype("datetime64[D]")) / np.timedelta64(1, "h")

    @property
    def weekday(self) -> Ints:
        """Day of the week, (T,), Monday is 0."""
        return (self.time.astype("datetime64[D]").astype(np.int64) + 3) % 7  # day 0: a Thursday

    def select(self, names: Sequence[str]) -> "SensorData":
        """Only these sensors, in this order. Raises ValueError for unknown names."""
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f"unknown sensors {unknown}; known: {list(self.names)}")
        columns = [self.names.index(name) for name in names]
        units = tuple(self.units[column] for column in columns)
        return replace(self, values=self.values[:, columns], names=tuple(names), units=units)

    def rows(self, index: slice | Flags | Ints) -> "SensorData":
        """Only these rows: a slice, a (T,) mask or an array of row numbers."""
        columns = "time", "values", "activity"
        return replace(self, **{column: getattr(self, column)[index] for column in columns})


OCCUPANCY_SHA256 = {
    "datatraining": "b2c4d0ce2b9e4e453c476f7125ef31aeec2d1f5c7f5572d0e80de3df6521ab56",
    "datatest": "1b92c7c1b2838963464fa891a610cf3c5db4becb7189189b29b330107a584c7f",
    "datatest2": "d026d1bd5aeccd4aff4f3b3710d48e40613bd5fc370db7e61bbdcaa50d985095",
}


def load_occupancy(directory: str | Path, verify: bool = True) -> dict[str, SensorData]:
    """Read the UCI Occupancy Detection files: an office, one row a minute, vacant or occupied.

    Source: UCI Machine Learning Repository, Occupancy Detection, id 357, CC BY 4.0;
    L. M. Candanedo and V. Feldheim, Energy and Buildings 112 (2016) 28-39.

    Reads ``directory``/datatraining.txt (8143 rows), datatest.txt (2665, door mostly closed) and
    datatest2.txt (9752, door mostly open); the keys are these names without ``.txt``. Raises
    FileNotFoundError for a missing file, ValueError for a row that cannot be read and, where
    ``verify``, for a file whose SHA-256 is not that of the published one.
    """
    return {
        stem: _read_occupancy(Path(directory) / f"{stem}.txt", digest if verify else None)
        for stem, digest in OCCUPANCY_SHA256.items()
    }


def _read_occupancy(path: Path, expected: str | None) -> SensorData:
    if not path.is_file():
        source = "https://archive.ics.uci.edu/dataset/357/occupancy+detection"
        raise FileNotFoundError(f"{path} is missing; it can be had at {source}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if expected not in (None, found):
        raise ValueError(f"{path}: SHA-256 is {found}, expected {expected}")
    rows = []
    # The header lacks the row number that starts every row, so it cannot name the columns.
    for line, row in enumerate(csv.reader(content.decode().splitlines()[1:]), start=2):
        try:
            _, when, *readings, occupied = row
            if len(readings) != 5 or occupied not in ("0", "1"):
                raise ValueError("expected eight columns, the last 0 or 1")
            rows.append((np.datetime64(when, "s"), list(map(float, readings)), int(occupied)))
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
    time, values, activity = zip(*rows, strict=True) if rows else ((), (), ())
    return SensorData(
        time=np.array(time, dtype="datetime64[s]"),
        values=np.array(values, dtype=np.float64).reshape(-1, 5),
        names=("temperature", "humidity", "light", "co2", "humidity_ratio"),
        units=("degC", "%", "lux", "ppm", "kg/kg"),
        activity=np.array(activity, dtype=np.int64),
        activities=("vacant", "occupied"),
    )


FLAT_ACTIVITIES = (
    "sleeping", "cooking", "washing up", "eating", "watching television", "working", "away",
)  # fmt: skip
SLEEPING, COOKING, WASHING_UP, EATING, TELEVISION, WORKING, AWAY = range(7)
DAY = 1440  # min

# What the person does to the flat, by activity in the order above. CO2 after Persily and de Jonge,
# Indoor Air 27 (2017) 868-879; heat and vapour are of the size in the ASHRAE Fundamentals tables.
CO2_EMISSION = np.array([12.0, 26.0, 25.0, 19.0, 16.0, 17.0, 0.0])  # L/h
BODY_HEAT = np.array([60.0, 95.0, 95.0, 80.0, 70.0, 75.0, 0.0])  # W, sensible
BODY_VAPOUR = np.array([35.0, 90.0, 90.0, 60.0, 45.0, 50.0, 0.0])  # g/h
MOTION = np.array([0.03, 3.0, 2.2, 1.0, 0.4, 0.6, 0.0])  # sensor events/min
LAMPS = np.array([0.0, 235.0, 210.0, 185.0, 70.0, 255.0, 185.0])  # lux, where lamps are on
AIRING = np.array([0.0, 0.02, 0.015, 0.004, 0.002, 0.003, 0.0])  # windows opened per minute

VOLUME, HEAT_CAPACITY, ENVELOPE = 125.0, 3.0e6, 55.0  # m3, J/K (air and furniture), W/K
AIR_HEAT = 1206.0  # J/(m3 K), density times heat capacity of air
RADIATOR_GAIN, RADIATOR_POWER = 1000.0, 2500.0  # W/K below the setpoint, W at most
SETPOINT, SETBACK = 20.5, 17.5  # degC by day, and from 23 h to 6 h
LEAKAGE, OPEN_WINDOW, AIRING_TIME = 0.4, 4.0, 12  # air changes per hour, same, min
LATITUDE, TILT = np.radians(50.0), np.radians(23.44)
OUTDOOR_MEAN, OUTDOOR_SEASON, OUTDOOR_SWING = 10.0, 8.0, 3.0  # degC
WEATHER_TIME, WEATHER_SPREAD = 2.0 * DAY, 2.5  # min, degC
OUTDOOR_HUMIDITY, OUTDOOR_CO2 = 0.8, 420.0  # relative, ppm
CLEAR_SKY, SOLAR_APERTURE = 900.0, 1.2  # W/m2 with the sun in the zenith, m2
DAYLIGHT = 110.0 * 0.012  # indoor lux per outdoor W/m2: luminous efficacy times daylight factor
DARK, TV_GLOW = 120.0, 12.0  # lux
VAPOUR_GAS, KELVIN = 0.4615, 273.15  # J/(g K) of water vapour; K at 0 degC
STANDBY, FRIDGE, TV, COMPUTER = 25.0, 75.0, 85.0, 60.0  # W
HOB, KETTLE, BOILER, LAUNDRY, LAUNDRY_HEATER = 1700.0, 2000.0, 1500.0, 180.0, 1720.0  # W
FRIDGE_PERIOD, FRIDGE_ON, BURST, LAUNDRY_TIME, LAUNDRY_HEATING = 46, 17, 3, 75, 15  # min
COOKING_STEAM, WASHING_STEAM, LAUNDRY_STEAM = 900.0, 600.0, 80.0  # g/h while hob, boiler, drum run

SENSORS = ("temperature", "humidity", "co2", "light", "motion", "power")
UNITS = ("degC", "%", "ppm", "lux", "events/min", "W")
NOISE = np.array([0.08, 0.7, 12.0, 2.0, 0.0, 3.0])  # standard deviation; motion is a count
NOISE_SHARE = np.array([0.0, 0.0, 0.01, 0.05, 0.0, 0.02])  # of the reading, added to the above
RESOLUTION = np.array([0.1, 0.5, 1.0, 1.0, 1.0, 1.0])  # of the digital reading


def saturation_pressure(temperature: ArrayLike) -> Floats:
    """Saturation vapour pressure over water in Pa at degC (Magnus; Alduchov, Eskridge 1996)."""
    celsius = np.asarray(temperature, dtype=np.float64)
    return 610.94 * np.exp(17.625 * celsius / (celsius + 243.04))


def _saturation(celsius: Floats) -> Floats:
    """Most water vapour that air can hold, g/m3."""
    return saturation_pressure(celsius) / (VAPOUR_GAS * (celsius + KELVIN))


def balance(
    initial: float, rate: Floats, source: Floats, target: ArrayLike = 0.0,
    gain: float = 0.0, limit: float = 0.0,
) -> Floats:  # fmt: skip
    """Solve dx/dt = source + clip(gain (target - x), 0, limit) - rate x in steps of one minute.

    ``rate`` (T,) >= 0 and ``gain`` per minute, ``source`` (T,) and ``limit`` in units of x per
    minute. Exact for what is constant within a step; the feedback, a thermostat, takes x from the
    start of the step. Returns (T,) x at the end of every step.
    """
    reach = np.divide(-np.expm1(-rate), rate, out=np.ones_like(rate), where=rate > 0)
    columns = np.exp(-rate), reach, source, np.broadcast_to(target, rate.shape)
    x, path = initial, []
    # Plain floats: array operations would make every step slower by an order of magnitude.
    for keep, add, inflow, wanted in zip(*(c.tolist() for c in columns), strict=True):
        x = keep * x + add * (inflow + min(max(gain * (wanted - x), 0.0), limit))
        path.append(x)
    return np.array(path)


def _diary(
    rng: np.random.Generator, weekdays: Sequence[int], later: float = 0.0, cooking: float = 1.0
) -> Ints:
    """A random activity for every minute of these days; what no episode covers is sleep.

    Hours are ``later`` by so much, and cooking takes ``cooking`` times as long. The numbers are a made-up
    routine: hours of the day, mean minutes, probabilities.
    """
    activity, now, dishes = np.full(len(weekdays) * DAY, SLEEPING), 0.0, False

    def clock(day: int, hour: float) -> float:
        return day * DAY + 60 * rng.normal(hour + later, 0.5)

    def until(end: float, what: int) -> None:
        nonlocal now
        activity[int(now) : int(end)] = what
        now = max(now, end)

    def spend(minutes: float, what: int) -> None:
        until(now + minutes * rng.lognormal(0, 0.35), what)

    def meal(preparing: float, eating: float) -> None:
        nonlocal dishes
        spend(cooking * preparing, COOKING)
        spend(eating, EATING)
        dishes = rng.random() < 0.4  # they wait for a break, or for good
        if not dishes:
            spend(4 + (cooking * preparing + eating) / 4, WASHING_UP)

    def stay_home(end: float, what: int) -> None:
        nonlocal dishes
        while now < end:
            until(min(end, now + rng.exponential(75)), what)
            if dishes and rng.random() < 0.4:
                spend(10, WASHING_UP)
                dishes = False
            elif rng.random() < 0.3:
                spend(4 * cooking, COOKING)
                spend(8, EATING)

    for day, weekday in enumerate(weekdays):
        weekend, late = weekday >= 5, weekday in (4, 5)
        now = max(now, clock(day, 8.6 if weekend else 6.9))
        meal(7, 13)
        if not weekend and rng.random() < 0.55:  # to the office
            until(clock(day, 17.5), AWAY)
        else:
            stay_home(clock(day, 10.5 if weekend else 12.5), TELEVISION if weekend else WORKING)
            spend(75 if weekend else 15, AWAY)
            meal(16, 20)
            until(clock(day, 15), AWAY if weekend else WORKING)
            stay_home(clock(day, 17.2), WORKING)
        if rng.random() < 0.15:
            spend(40, SLEEPING)
        if rng.random() < (0.35 if late else 0.12):
            until(clock(day, 22), AWAY)
        else:
            stay_home(clock(day, 18.6), TELEVISION)
            meal(30, 24)
        bedtime = clock(day, 23.8 if late else 22.9)
        while now < bedtime:
            stay_home(min(bedtime, now + 60), TELEVISION if rng.random() < 0.75 else WORKING)
    return activity


def simulate_flat(
    days: int = 14, seed: int | Sequence[int] = 0, start: str = "2024-01-01", step: int = 1, *,
    envelope: float = ENVELOPE, setpoint: float = SETPOINT, later: float = 0.0, cooking: float = 1.0,
) -> SensorData:  # fmt: skip
    """Simulate a flat of one person: six sensors and seven activities, ``FLAT_ACTIVITIES``.

    A random diary drives balances of heat, vapour and CO2 in one well-mixed zone. Cooking and
    washing up are both wet and lively and, but for cold meals and cold water, use much power.

    Args:
        days: number of whole days, at least 1.
        seed: the same seed, an integer or some, gives the same data.
        start: first day, ISO date; sets season and weekdays.
        step: minutes between readings, a divisor of 1440. The balances always run by the minute.
        envelope: heat that walls and windows let through, W/K; less is better insulated.
        setpoint: of the thermostat by day, degC.
        later: hours by which the whole routine is later, and cooking: how many times as long it takes.

    Returns ``days * 1440 / step`` rows of temperature (degC), relative humidity (%), CO2 (ppm),
    light (lux), motion (events/min) and electric power (W). Raises ValueError for a ``days``,
    ``start`` or ``step`` that is not as described.
    """
    if days < 1 or step < 1 or DAY % step:
        raise ValueError(f"need days >= 1 and a step that divides {DAY}, not {days=}, {step=}")
    rng = np.random.default_rng(seed)
    first = date.fromisoformat(start)
    time = np.datetime64(first, "s") + 60 * np.arange(days * DAY)
    activity = _diary(rng, [(first.weekday() + day) % 7 for day in range(days)], later, cooking)
    values = _sense(rng, time, activity, envelope, setpoint)
    data = SensorData(time, values, SENSORS, UNITS, activity, FLAT_ACTIVITIES)
    return data.rows(slice(None, None, step))


def _sense(
    rng: np.random.Generator, time: NDArray[np.datetime64], activity: Ints,
    envelope: float = ENVELOPE, day_setpoint: float = SETPOINT,
) -> Floats:  # fmt: skip
    """What the sensors read, (T, 6), while these activities go on minute by minute."""
    size, minute = time.size, np.arange(time.size)
    hour = minute % DAY / 60
    sleeping, cooking, washing, eating, watching, working, away = np.equal.outer(range(7), activity)
    episode = np.cumsum(np.diff(activity, prepend=activity[0]) != 0)

    def each_episode(share: float) -> Flags:
        return (rng.random(size) < share)[episode]

    def lasting(starts: Flags, minutes: int) -> Flags:
        return np.convolve(starts, np.ones(minutes))[:size] > 0

    def bursts(rate: float | Floats, minutes: int = BURST) -> Flags:
        return lasting(rng.random(size) < rate, minutes)

    # Outdoors: cosines of season and day, slow weather and clouds, the height of the sun.
    season = 2 * np.pi * (time - time.astype("datetime64[Y]")) / np.timedelta64(365, "D")
    noon, calm = np.cos((hour - 12) * np.pi / 12), np.full(size, 1 / WEATHER_TIME)
    weather = np.sqrt(2 / WEATHER_TIME) * rng.normal(size=(2, size))
    warmth, clouds = (balance(rng.normal(), calm, noise) for noise in weather)
    outdoor = OUTDOOR_MEAN - OUTDOOR_SEASON * np.cos(season - 0.3) + WEATHER_SPREAD * warmth
    outdoor += OUTDOOR_SWING * np.cos((hour - 15) * np.pi / 12)
    tilt = -TILT * np.cos(season + 0.17)
    height = np.sin(LATITUDE) * np.sin(tilt) + np.cos(LATITUDE) * np.cos(tilt) * noon
    sun = CLEAR_SKY * np.maximum(height, 0) * (0.2 + 0.7 / (1 + np.exp(3 * clouds)))  # W/m2

    # Appliances, with made-up shares of episodes and starts per minute. Hob and hot water run in
    # bursts; cold meals and cold water need neither.
    hob = cooking & each_episode(0.7) & bursts(0.25)
    boiler = washing & each_episode(0.65) & bursts(0.2)
    kettle = ~sleeping & ~away & bursts(np.where(cooking, 0.05, 0.006))
    tv = watching & each_episode(0.85) | eating & each_episode(0.35)
    computer = working & each_episode(0.85) | watching & each_episode(0.2)
    laundry = rng.random(size) < np.where(abs(hour - 14) < 6, 1 / DAY, 0.0)  # starts, whatever else goes on
    power = STANDBY + TV * tv + COMPUTER * computer + HOB * hob + KETTLE * kettle
    power += BOILER * (boiler | bursts(0.006))  # also keeps its tank warm
    power += LAUNDRY * lasting(laundry, LAUNDRY_TIME)
    power += LAUNDRY_HEATER * lasting(laundry, LAUNDRY_HEATING)
    power += FRIDGE * ((minute + rng.integers(FRIDGE_PERIOD)) % FRIDGE_PERIOD < FRIDGE_ON)

    # Balances of the air in the flat; every watt of electricity ends as heat.
    changes = LEAKAGE + OPEN_WINDOW * bursts(AIRING[activity], AIRING_TIME)  # per hour
    loss = envelope + AIR_HEAT * VOLUME / 3600 * changes  # W/K
    gains = BODY_HEAT[activity] + power + SOLAR_APERTURE * sun
    setpoint = np.where((hour >= 6) & (hour < 23), day_setpoint, SETBACK)
    k = 60 / HEAT_CAPACITY  # K per W and minute
    temperature = balance(
        SETBACK, k * loss, k * (loss * outdoor + gains),
        setpoint, k * RADIATOR_GAIN, k * RADIATOR_POWER,
    )  # fmt: skip
    breath = 1000 * CO2_EMISSION[activity] / VOLUME  # ppm per hour
    co2 = balance(2 * OUTDOOR_CO2, changes / 60, (changes * OUTDOOR_CO2 + breath) / 60)
    steam = BODY_VAPOUR[activity] + COOKING_STEAM * hob + WASHING_STEAM * boiler  # g/h
    steam += LAUNDRY_STEAM * lasting(laundry, LAUNDRY_TIME)
    fresh = OUTDOOR_HUMIDITY * _saturation(outdoor)
    vapour = balance(fresh[0], changes / 60, (changes * fresh + steam / VOLUME) / 60)
    humidity = np.minimum(100 * vapour / _saturation(temperature), 100)

    light = DAYLIGHT * sun
    lamps = (light < DARK) & (~away | each_episode(0.15))  # or left on
    light += LAMPS[activity] * lamps + TV_GLOW * tv
    motion = rng.poisson(MOTION[activity] * rng.gamma(2, 1 / 2, size))
    readings = np.stack([temperature, humidity, co2, light, motion, power], axis=1)
    readings += (NOISE + NOISE_SHARE * readings) * rng.normal(size=readings.shape)
    return np.maximum(RESOLUTION * np.round(readings / RESOLUTION), 0)

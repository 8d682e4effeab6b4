"""Every combination of builder, scalar map, mixing, base and outer map, and whether the library accepts it.

python tests/combinations.py [--integrate]      # the matrix; with the mass of every accepted one
"""

import itertools
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints

import numpyro_maf as nm
from numpyro_maf.flows.domains import of_one_number

SCALARS = {
    "affine": nm.Affine(),
    "additive": nm.Additive(),
    "spline": nm.RQSpline(4, 3.0),
    "mixture": nm.MixtureCDF(2),
    "gaussian-mixture": nm.MixtureCDF(2, "gaussian"),
    "compose": nm.Compose((nm.MixtureCDF(2), nm.Affine())),
    "linear-cdf": nm.PiecewiseLinear(4),
    "quadratic-cdf": nm.PiecewiseQuadratic(4),
    "circular": nm.CircularSpline(4),
}
BASES: dict[str, Any] = {
    "default": lambda d: None,
    "heavy": lambda d: dist.StudentT(4.0).expand([d]).to_event(1),
    "uniform": lambda d: dist.Uniform(-1.0, 1.0).expand([d]).to_event(1),
    "beta": lambda d: dist.Beta(2.0, 3.0).expand([d]).to_event(1),
    "positive": lambda d: dist.Gamma(2.0, 1.0).expand([d]).to_event(1),
    "angles": lambda d: dist.VonMises(0.0, 1.0).expand([d]).to_event(1),
    "made": lambda d: nm.made(jax.random.key(5), d, hidden=(3,)),
}
OUTER: dict[str, Any] = {
    "none": {},
    "logit": {"logit": 0.05},
    "positive": constraints.positive,
    "interval": constraints.interval(-2.0, 3.0),
}
AUTOREGRESSIVE, COUPLING = ("reverse", "random", "linear"), ("alternate", "random", "linear")
BUILDERS: dict[str, Any] = {
    "maf": (nm.maf, AUTOREGRESSIVE, {}),
    "iaf": (nm.iaf, AUTOREGRESSIVE, {}),
    "nsf": (nm.nsf, AUTOREGRESSIVE, {}),
    "nsf-coupling": (nm.nsf, ("random", "linear"), {"coupling": True}),
    "circular": (nm.circular, AUTOREGRESSIVE, {}),
    "realnvp": (nm.realnvp, COUPLING, {}),
    "nice": (nm.nice, COUPLING, {}),
    "nis": (nm.nis, COUPLING, {}),
    "glow": (nm.glow, (None,), {}),
    "flowpp": (nm.flowpp, (None,), {"heads": 2, "hidden": (2,)}),
    "elementwise": (nm.elementwise, (None,), {}),
    "ffjord": (nm.ffjord, (None,), {}),
}


@dataclass(frozen=True)
class Combination:
    """Names of the parts of a flow."""

    builder: str
    scalar: str
    mixing: str | None
    base: str
    outer: str

    def build(self, features: int = 1) -> Any:
        """The flow, moved away from the identity. Raises what the library refuses it with."""
        builder, _, options = BUILDERS[self.builder]
        transforms = 2 if self.mixing == "linear" else 1
        options = {"transforms": transforms, "hidden": (3,), "base": base_of(self.base, features), **options}
        if self.builder not in ("nice", "ffjord"):
            options["scalar"] = SCALARS[self.scalar]
        if self.mixing is not None:
            options["mixing"] = self.mixing
        outer = OUTER[self.outer]
        if isinstance(outer, dict):
            return moved(builder(jax.random.key(0), features, **options, **outer))
        return moved(builder(jax.random.key(0), features, **options).onto(outer))

    @property
    def parts(self):
        """Names with the kind of part, for pairs."""
        return tuple(vars(self).items())


@cache
def base_of(name: str, features: int):
    return BASES[name](features)


@lru_cache
def noise(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def moved(flow, size: float = 0.25):
    """A flow with noise on every weight."""
    leaves, structure = jax.tree.flatten(flow.weights)
    leaves = [np.asarray(a) + size * noise(np.shape(a), i) for i, a in enumerate(leaves)]
    return flow.with_weights(jax.tree.unflatten(structure, leaves))


def combinations() -> list[Combination]:
    """All of them; builders without a choice of scalar map or mixing are there once."""
    found = []
    for name, (_, mixings, _) in BUILDERS.items():
        scalars = ["affine"] if name in ("nice", "ffjord") else SCALARS
        found += [Combination(name, *rest) for rest in itertools.product(scalars, mixings, BASES, OUTER)]
    return found


def fitting(c: Combination) -> bool:
    """The rule: maps of the reals take everything; those of an interval stay on it with all around them."""
    support = {"circular": "circle", "linear-cdf": "unit", "quadratic-cdf": "unit"}.get(c.scalar, "real")
    wanted = {"circular": "circle", "nis": "unit"}.get(c.builder, support)
    if support != wanted:
        return False
    if support == "real":
        return True
    bases = {"unit": ("default", "beta"), "circle": ("default", "angles")}[support]
    plain = c.builder not in ("glow", "flowpp") and c.mixing != "linear" and c.outer == "none"
    return plain and c.base in bases


def sorted_out(chosen) -> tuple[list[Combination], dict[Combination, str]]:
    """Those that the library accepts, and those it refuses with the message."""
    accepted, refused = [], {}
    for combination in chosen:
        try:
            combination.build()
        except (ValueError, TypeError) as error:
            refused[combination] = str(error)
        else:
            accepted.append(combination)
    return accepted, refused


def pairwise(accepted) -> list[Combination]:
    """Few of the combinations in which every pair of parts that is accepted together occurs."""
    pairs = {c: set(itertools.combinations(c.parts, 2)) for c in accepted}
    left, chosen = set().union(*pairs.values()), []
    while left:
        best = max(accepted, key=lambda c: len(pairs[c] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def facts(combination: Combination, points: int = 2001, draws: int = 2000):
    """Mass by quadrature, the share of draws on the support, and the distance of draws from the density.

    In one dimension: the Kolmogorov-Smirnov distance of draws and the integrated density.
    """
    flow = combination.build()
    t = np.linspace(-6, 6, points)
    each = of_one_number(flow.support)
    ends = getattr(each, "lower_bound", None), getattr(each, "upper_bound", None)
    way = biject_to(constraints.interval(*ends) if None not in ends else each)

    @jax.jit
    def run(flow, u, key):
        d, y = flow(), way(u)
        log_det = way.log_abs_det_jacobian(u, y)
        drawn = d.sample(key, (draws,))
        return d.log_prob(y[:, None]) + log_det, y, drawn, d.support(drawn)

    with jax.enable_x64(True):  # in single precision much of a heavy tail is at the very end of an interval
        flow = jax.tree.map(lambda a: np.asarray(a, float), flow)
        log_prob, y, drawn, inside = map(np.asarray, run(flow, np.sinh(t), jax.random.key(1)))
    mass = np.exp(np.asarray(log_prob, float)) * np.cosh(t) * (t[1] - t[0])
    below = np.cumsum(mass) - mass / 2
    ranks = np.interp(np.sort(drawn[:, 0]), y, below)
    uniform = (np.arange(draws) + 0.5) / draws
    return float(mass.sum()), float(inside.mean()), float(abs(ranks - uniform).max())


def main(integrate: bool) -> None:
    accepted, refused = sorted_out(combinations())
    print(f"{len(accepted)} of {len(accepted) + len(refused)} combinations are accepted")
    kinds = ("scalar", "base", "outer", "mixing")
    for kind in kinds:
        names = sorted({str(getattr(c, kind)) for c in combinations()})
        print(f"\n| builder | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for builder in BUILDERS:
            row = []
            for name in names:
                of = [c for c in combinations() if c.builder == builder and str(getattr(c, kind)) == name]
                row.append(f"{sum(c not in refused for c in of)} / {len(of)}" if of else "")
            print(f"| {builder} | {' | '.join(row)} |")
    reasons: dict[str, int] = {}
    for message in refused.values():
        reason = message.split(";")[0].split(", got")[0][:100]
        reasons[reason] = reasons.get(reason, 0) + 1
    print("\nreasons:", *sorted(reasons.items(), key=lambda r: -r[1]), sep="\n  ")
    if integrate:
        worst = [0.0, 0.0]
        for i, c in enumerate(accepted):
            mass, inside, distance = facts(c)
            worst = [max(worst[0], abs(mass - 1)), max(worst[1], distance)]
            if abs(mass - 1) > 2e-3 or inside < 1 or distance > 0.05 or i % 100 == 0:
                print(
                    f"{i}: {c}: mass {mass:.4f}, on support {inside:.4f}, distance {distance:.3f}", flush=True
                )
            if i % 200 == 199:
                jax.clear_caches()
        print(
            f"{len(accepted)} integrated: mass off by at most {worst[0]:.1e}, distance at most {worst[1]:.3f}"
        )


if __name__ == "__main__":
    main("--integrate" in sys.argv)

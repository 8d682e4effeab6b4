"""Every public function that takes data, given odd inputs: each answers rightly or says what is wrong.

    python benchmarks/faults/inputs.py                     # the counts
    python benchmarks/faults/inputs.py --table table.md    # and every answer

An input is an array that the function takes, in another dress: as a data frame, a list, with NaN, as text. If
the numbers are the same, the answer must be that for the plain array. If they are not, the answer must be one
that says so (NaN for NaN, no rows for no rows) or a ValueError or TypeError that names the argument. Any
other exception, and any other answer, is BAD.
"""

import argparse
import collections
import contextlib
import io
import re
import tempfile
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_maf as nm
from numpyro_maf import datasets, diagnostics, plots, sbi

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
SMALL = dict(transforms=1, hidden=(4,))
BRIEF = dict(max_epochs=1, progress=False)


# Inputs: name -> function of a plain array ----------------------------------------------------------


def library(name, make):
    """An input that needs a library; None where it is not installed."""
    try:
        module = __import__(name)
    except ImportError:
        return None
    return partial(make, module)


def frame(pd, a):
    return pd.DataFrame(a) if a.ndim == 2 else pd.Series(a)


def nullable(pd, a, kind, gaps):
    """A frame of pandas' types that know missing numbers."""
    columns = a.reshape(len(a), -1)
    made = pd.DataFrame({f"c{i}": pd.array(columns[:, i], dtype=kind) for i in range(columns.shape[1])})
    if gaps:
        made.iloc[1, 0] = pd.NA
    return made if a.ndim == 2 else made["c0"]


def mixed(pd, a):
    """A frame with a column of another type, whose numbers are the same."""
    made = pd.DataFrame(a)
    return made.astype({0: "Float64"}) if a.ndim == 2 else made[0].astype("Float64")


def named(pd, a):
    made = frame(pd, a).astype(object)
    return made.map(str)


def spoilt(a, value):
    a = np.array(a, float)
    a[(1, *[0] * (a.ndim - 1))] = value
    return a


def masked(a):
    """A value that is no number of the data lies under the mask."""
    mask = np.zeros(a.shape, bool)
    mask[(1, *[0] * (a.ndim - 1))] = True
    return np.ma.array(spoilt(a, -999.0), mask=mask)


def wider(a):
    return np.concatenate([a, a[..., :1]], -1)


def strided(a):
    spread = np.repeat(a, 2, -1)
    return np.asfortranarray(spread)[..., ::2]


# The same numbers: the answer must be the same.
SAME = {
    "list": lambda a: a.tolist(),
    "tuple of arrays": lambda a: tuple(a),
    "not contiguous": strided,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "longdouble": lambda a: a.astype(np.longdouble),
    "jax": jnp.asarray,
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "memory map": lambda a: mapped(a),
    "masked, none": lambda a: np.ma.array(a, mask=np.zeros(a.shape, bool)),
    "pandas": library("pandas", frame),
    "pandas Float64": library("pandas", partial(nullable, kind="Float64", gaps=False)),
    "pandas mixed": library("pandas", mixed),
    "xarray": library("xarray", lambda xr, a: xr.DataArray(a)),
    "polars": library("polars", lambda pl, a: pl.DataFrame(a) if a.ndim == 2 else pl.Series(a)),
    "torch": library("torch", lambda torch, a: torch.tensor(a)),
    "torch with gradient": library(
        "torch", lambda torch, a: torch.tensor(a, dtype=float, requires_grad=True)
    ),
}
# Rounded or cut to another type: the answer must be that for the plain array of these numbers.
ROUNDED = {"float16": np.float16, "float32": np.float32, "int": int, "int8": np.int8, "bool": bool}
# Other numbers or none.
OTHER = {
    "empty": lambda a: a[:0],
    "one row": lambda a: a[:1],
    "NaN": lambda a: spoilt(a, np.nan),
    "inf": lambda a: spoilt(a, np.inf),
    "complex": lambda a: a + 1j,
    "object": lambda a: a.astype(object),
    "None": lambda a: spoilt(a, 0).astype(object) * [None] if a.size == 0 else holed(a),
    "text": lambda a: a.astype(str),
    "bytes": lambda a: a.astype(str).astype("S"),
    "datetime": lambda a: np.zeros(a.shape, "datetime64[s]"),
    "timedelta": lambda a: np.zeros(a.shape, "timedelta64[s]"),
    "records": lambda a: np.zeros(a.shape, [("a", float)]),
    "masked": masked,
    "masked by list": lambda a: np.ma.array(a.tolist(), mask=masked(a).mask),
    "ragged": lambda a: [[1.0], [1.0, 2.0]],
    "wrong width": wider,
    "one axis more": lambda a: a[None],
    "0-d": lambda a: np.float64(0.5),
    "a string": lambda a: "0.5",
    "a dictionary": lambda a: {"a": 1.0},
    "a key": lambda a: jax.random.split(KEY, len(a)),
    "pandas Int64 NA": library("pandas", lambda pd, a: nullable(pd, np.zeros(a.shape, int), "Int64", True)),
    "pandas Float64 NA": library("pandas", partial(nullable, kind="Float64", gaps=True)),
    "pandas text": library("pandas", named),
    "pandas dates": library("pandas", lambda pd, a: frame(pd, np.zeros(a.shape, "datetime64[s]"))),
    "pandas category": library("pandas", lambda pd, a: pd.Categorical(a.ravel().astype(str))),
    "polars null": library("polars", lambda pl, a: pl.Series([None, *a.ravel().tolist()[1:]])),
}


def holed(a):
    a = a.astype(object)
    a[(0,) * a.ndim] = None
    return a


def mapped(a):
    path = Path(tempfile.mkdtemp()) / "a.npy"
    np.save(path, a)
    return np.load(path, mmap_mode="r")


# Functions: name -> (function of the input, a plain array, what names the argument) ------------------


def model(x=None):
    a = numpyro.sample("a", dist.Uniform(-5, 5).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(a, 1).to_event(1), obs=x)


def functions():
    """All of them, made of a few trained things."""
    x, c = RNG.normal(size=(40, 2)), RNG.normal(size=(40, 1))
    flow, given = nm.maf(KEY, 2, **SMALL), nm.maf(KEY, 2, context=1, **SMALL)
    completer_flow, made = nm.maf(KEY, 2, context=4, **SMALL), nm.made(KEY, 2, hidden=(4,), masks=2)
    teacher, student = given, nm.iaf(KEY, 2, context=1, **SMALL)
    noise = nm.Dequantize(16)
    completer = nm.fit_completer(KEY, completer_flow, x, **BRIEF)[0]
    small = partial(nm.maf, **SMALL)
    sims = nm.simulate(KEY, model, 100, progress=False)
    sims = {name: np.asarray(value, float) for name, value in sims.items()}
    run = dict(builder=small, **BRIEF)
    posterior, ratio = (
        nm.npe(KEY, model, sims, **run),
        nm.nre(KEY, model, sims, hidden=(4,), contrasts=2, **BRIEF),
    )
    likelihood = nm.nle(KEY, model, sims, **run)
    bound = posterior({"x": np.zeros(2)}, warn=False)
    joint = nm.fit_sites(KEY, {"a": sims["a"]}, model, builder=small, **BRIEF)
    table, path = RNG.normal(size=(6, 3)), np.array([0, 1, -1, 2, 2, 0])
    draws, truth = RNG.normal(size=(20, 30, 2)), RNG.normal(size=(30, 2))
    density, own = RNG.normal(size=(20, 30)), RNG.normal(size=30)
    shares, labels = RNG.dirichlet(np.ones(3), 30), RNG.integers(0, 3, 30)
    chances, right = RNG.uniform(size=30), RNG.integers(0, 2, 30)
    home = datasets.SensorData(
        np.arange(30).astype("datetime64[m]"), np.zeros((30, 1)), ("power",), ("W",), labels, ("a", "b", "c")
    )
    chain = dict(initial=np.full(3, 1 / 3), transition=np.full((3, 3), 1 / 3), log_density=table)
    uneven = RNG.dirichlet(np.ones(3), 3)

    def fitted(flow, *args, **kwargs):
        return nm.fit(KEY, flow, *args, **BRIEF, **kwargs).train_loss

    def hmm(**new):
        return nm.HMM(**(chain | new)).log_prob()

    def npe(**new):
        return posterior_of(nm.npe(KEY, model, {**sims, **new}, **run))

    def posterior_of(found):
        return found.losses.train

    return {
        "fit(x)": (partial(fitted, flow), x, "x"),
        "fit(context)": (lambda a: fitted(given, x, a), c, "context"),
        "fit(weights)": (lambda a: fitted(flow, x, weights=a), chances.repeat(2)[:40], "weights"),
        "fit(validation)": (lambda a: fitted(flow, x, validation=a), np.arange(40) < 5, "validation"),
        "fit(x, dequantize)": (
            lambda a: fitted(nm.maf(KEY, 2, logit=0.01, **SMALL), a, dequantize=noise),
            RNG.integers(0, 16, (40, 2)),
            "x",
        ),
        "fit_mixture(x)": (lambda a: nm.fit_mixture(made, a, steps=2).logits, x, "x"),
        "fit_completer(x)": (
            lambda a: nm.fit_completer(KEY, completer_flow, a, **BRIEF)[1].train_loss,
            x,
            "x",
        ),
        "fit_sites(samples)": (
            lambda a: nm.fit_sites(KEY, {"a": a}, model, builder=small, **BRIEF).log_prob({"a": np.zeros(2)}),
            sims["a"],
            "a",
        ),
        "distill(context)": (
            lambda a: nm.distill(KEY, teacher, student, a, num_steps=2, progress=False).train_loss,
            c,
            "context",
        ),
        "flow(context)": (lambda a: given(a).log_prob(np.zeros(2)), c, "context"),
        "log_prob": (flow().log_prob, x, "value|event|MaskedAutoregressive|Standardize"),
        "log_prob of a MADE": (made().log_prob, x, "value|event"),
        "initialized(x)": (lambda a: nm.glow(KEY, 2, **SMALL).initialized(a)().log_prob(x), x, "x|event"),
        "regressed(x)": (lambda a: given.regressed(a, c)(c).log_prob(x), x, "x|event"),
        "regressed(context)": (lambda a: given.regressed(x, a)(c).log_prob(x), c, "context"),
        "encode": (partial(nm.encode, flow()), x, "x|event"),
        "decode": (partial(nm.decode, flow()), x, "z|event"),
        "interpolate": (lambda a: nm.interpolate(flow(), a, x[:1], 3), x, "start|x|event"),
        "attribute": (lambda a: nm.attribute(flow(), a, x), x, "group|x|event"),
        "bits_per_dimension": (lambda a: nm.bits_per_dimension(a, 2), own, "log_prob"),
        "Dequantize.bound": (
            lambda a: noise.bound(nm.maf(KEY, 2, logit=0.01, **SMALL), KEY, a),
            RNG.integers(0, 16, (40, 2)),
            "x|event",
        ),
        "Dequantize.sample": (lambda a: noise.sample(KEY, a)[0], RNG.integers(0, 16, (40, 2)), "x"),
        "complete(x)": (lambda a: nm.complete(KEY, flow(), a, [True, False], 4), x[0], "x"),
        "complete(seen)": (lambda a: nm.complete(KEY, flow(), x[0], a, 4), np.array([True, False]), "seen"),
        "Completer.sample(x)": (lambda a: completer.sample(KEY, a, [True, False]), x, "x|event|Completer"),
        "Completer.sample(seen)": (lambda a: completer.sample(KEY, x, a), x > 0, "seen"),
        "Joint.log_prob": (lambda a: joint.log_prob({"a": a}), sims["a"], "a"),
        "npe(sims, latent)": (lambda a: npe(a=a), sims["a"], "sims|usable|'a'"),
        "npe(sims, observed)": (lambda a: npe(x=a), sims["x"], "sims|usable"),
        "npe(weights)": (
            lambda a: posterior_of(nm.npe(KEY, model, sims, weights=a, **run)),
            RNG.uniform(size=100),
            "weights",
        ),
        "npe(validation)": (
            lambda a: posterior_of(nm.npe(KEY, model, sims, validation=a, **run)),
            np.arange(100) < 20,
            "validation",
        ),
        "nle(sims)": (
            lambda a: nm.nle(KEY, model, {**sims, "x": a}, **run)(np.zeros(2)).log_prob(x),
            sims["x"],
            "sims|simulations",
        ),
        "nre(sims)": (
            lambda a: nm.nre(KEY, model, {**sims, "x": a}, hidden=(4,), contrasts=2, **BRIEF)(
                np.zeros(2), x[0]
            ),
            sims["x"],
            "sims|simulations",
        ),
        "posterior(observation)": (
            lambda a: posterior({"x": a}, warn=False).log_prob({"a": np.zeros(2)}),
            x[0],
            "'x'",
        ),
        "posterior(observations)": (
            lambda a: posterior({"x": a}, warn=False).log_prob({"a": np.zeros(2)}),
            x,
            "'x'",
        ),
        "posterior.log_prob": (lambda a: bound.log_prob({"a": a}), x, "'a'"),
        "calibrate(sims)": (
            lambda a: sbi.calibrate(KEY, posterior, {**sims, "x": a}, num_samples=20).coverage.levels,
            sims["x"],
            "'x'|posteriors",
        ),
        "ratio(theta)": (lambda a: ratio(a, x[0]), x, "theta"),
        "ratio(x)": (lambda a: ratio(np.zeros(2), a), x, "'x'"),
        "likelihood(theta)": (lambda a: likelihood(a).log_prob(x[0]), x, "context"),
        "smc(observation)": (
            lambda a: (
                nm.smc(
                    KEY, model, {"x": a}, num_particles=50, moves=1, last_moves=1, progress=False
                ).log_evidence
            ),
            x[0],
            "x",
        ),
        "snpe(observation)": (
            lambda a: nm.snpe(KEY, model, {"x": a}, rounds=1, simulations=60, **run).sample(KEY, (3,))["a"],
            x[0],
            "x",
        ),
        "simulate(given)": (
            lambda a: nm.simulate(KEY, model, 40, given={"a": a}, progress=False)["x"],
            x,
            "a",
        ),
        "Simulator(params)": (
            lambda a: nm.Simulator(lambda key, a: a.sum() + jax.random.normal(key), a).sample(KEY),
            x[0],
            "param",
        ),
        "to_arviz(samples)": (lambda a: nm.to_arviz({"a": a}, model).posterior["a"].values, sims["a"], "a"),
        "HMM(initial)": (lambda a: hmm(initial=a), RNG.dirichlet(np.ones(3)), "initial"),
        "HMM(transition)": (lambda a: hmm(transition=a), uneven, "transition"),
        "HMM(log_density)": (lambda a: hmm(log_density=a), table, "log_density|transition|initial"),
        "HMM(observed)": (lambda a: hmm(observed=a), np.arange(6) > 1, "observed"),
        "HMM.log_prob(path)": (nm.HMM(**chain).log_prob, path, "path|value|Value"),
        "sbc(draws)": (lambda a: diagnostics.sbc(a, truth).ranks, draws, "draws|truth|posteriors"),
        "sbc(truth)": (lambda a: diagnostics.sbc(draws, a).ranks, truth, "truth|posteriors"),
        "tarp(draws)": (lambda a: diagnostics.tarp(a, truth).levels, draws, "draws|truth|posteriors"),
        "coverage(draws)": (
            lambda a: diagnostics.coverage(a, own).levels,
            density,
            "log_prob_draws|posteriors",
        ),
        "coverage(truth)": (
            lambda a: diagnostics.coverage(density, a).levels,
            own,
            "log_prob_truth|posteriors",
        ),
        "c2st": (lambda a: diagnostics.c2st(a, truth), truth + 0.1, "reference"),
        "psis": (lambda a: diagnostics.psis(a).log_weights, own, "log_weights"),
        "classification_scores(p)": (
            lambda a: list(diagnostics.classification_scores(a, labels).values()),
            shares,
            "probabilities|labels",
        ),
        "classification_scores(labels)": (
            lambda a: list(diagnostics.classification_scores(shares, a).values()),
            labels,
            "labels",
        ),
        "expected_calibration_error(p)": (
            lambda a: diagnostics.expected_calibration_error(a, right),
            chances,
            "confidence|right",
        ),
        "expected_calibration_error(right)": (
            lambda a: diagnostics.expected_calibration_error(chances, a),
            right,
            "right",
        ),
        "plots.activity_timeline": (
            lambda a: drawn(plots.activity_timeline(home, a)),
            shares,
            "probabilities",
        ),
        "plots.loss_curves": (lambda a: drawn(plots.loss_curves({"a": a})), own, "losses|'a'"),
    }


def drawn(figure):
    figure.savefig(io.BytesIO(), dpi=20)
    return np.array([len(axis.lines) for axis in figure.axes])


# The verdict ------------------------------------------------------------------------------------------


def numbers(answer):
    """An answer as arrays."""
    return [np.asarray(leaf, float) for leaf in jax.tree.leaves(answer)]


def close(a, b):
    same = len(a) == len(b) and all(u.shape == v.shape for u, v in zip(a, b))
    return same and all(np.allclose(u, v, rtol=2e-3, atol=2e-3, equal_nan=True) for u, v in zip(a, b))


def judge(kind, function, plain, argument, make):
    """``"right"``, ``"error"`` or ``"BAD"``, and why."""
    try:
        value = make(plain)
    except Exception as error:  # no such input of this shape
        return "none", f"{type(error).__name__}: {error}"
    try:
        answer = numbers(function(value))
    except (ValueError, TypeError) as error:
        said = str(error)
        strange = re.search(
            r"not a valid JAX type|Error interpreting argument|JitTracer|jnp\.|jax\.Array", said
        )
        named = re.search(argument, said) is not None
        return ("error" if named and not strange else "BAD"), f"{type(error).__name__}: {said}"
    except Exception as error:
        return "BAD", f"{type(error).__name__}: {error}"
    if kind == "same":
        right = close(answer, numbers(function(plain)))
        return ("right" if right else "BAD"), f"an answer {'as' if right else 'other than'} that of the array"
    if kind == "rounded":
        right = close(answer, numbers(function(np.asarray(value).astype(plain.dtype))))
        return (
            "right" if right else "BAD"
        ), f"an answer {'as' if right else 'other than'} that of its numbers"
    return "answer", f"shapes {[a.shape for a in answer]}, {sum(int(np.isnan(a).sum()) for a in answer)} NaN"


# Answers that are right though the numbers are others: the reason by function and input.
NAN = "densities of rows with NaN are NaN, and no others"
RIGHT = [
    (
        r"empty",
        r"log_prob|flow\(|encode|decode|interpolate|Dequantize|Completer|ratio|likelihood|posteriors"
        r"|posterior\(|bits|simulate",
        "no rows for no rows",
    ),
    (r"one row|one axis more", r".*", "an answer of the shape that was given"),
    (
        r"NaN|inf|Int64 NA|Float64 NA",
        r"log_prob|flow\(|encode|decode|interpolate|attribute|bits|Joint"
        r"|likelihood|Simulator|ratio",
        NAN,
    ),
    (r"NaN|inf|masked|NA", r"npe\(sims|calibrate", "rows that are not finite are left out, with a warning"),
    (r"NaN|NA|masked|inf", r"complete\(x\)", "the number that is missing is not among those seen"),
    (r"NaN|NA|inf", r"plots.loss_curves", "a gap in the curve"),
    (r"NaN|NA", r"plots.activity_timeline", "a gap in the picture"),
    (r"NaN|inf|NA|masked", r"simulate\(given|to_arviz", "the draws that were given, NaN where they are"),
    (r"empty", r"to_arviz|Simulator", "of no numbers"),
    (r"inf", r"psis|coverage|sbc", "infinite log-densities and draws have ranks"),
    (
        r"wrong width|0-d",
        r"bits|plots.loss|Simulator|classification|calibration_error|psis|coverage"
        r"|HMM.observed|complete.seen",
        "an answer of the shape that was given",
    ),
    (r"wrong width", r"Dequantize.sample", "an answer of the shape that was given"),
    (r"0-d", r"validation", "the share of rows that is held out"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="where to write every answer, as Markdown")
    parser.add_argument("--only", default="", help="functions whose name matches this")
    parser.add_argument("--inputs", default="", help="inputs whose name matches this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = [("same", k, v) for k, v in SAME.items()]
    kinds += [("rounded", k, lambda a, t=t: a.astype(t)) for k, t in ROUNDED.items()]
    kinds += [("other", k, v) for k, v in OTHER.items()]
    kinds = [kind for kind in kinds if re.search(args.inputs, kind[1])]
    absent = [name for _, name, make in kinds if make is None]
    if absent:
        print("not installed, so skipped:", ", ".join(absent))
    lines, counts = ["| function | input | verdict | answer |", "|---|---|---|---|"], collections.Counter()
    for name, (function, plain, argument) in functions().items():
        if not re.search(args.only, name):
            continue
        for kind, given, make in kinds:
            if make is None:
                continue
            with contextlib.redirect_stderr(io.StringIO()):
                verdict, why = judge(kind, function, plain, argument, make)
            if verdict == "none":
                continue
            if verdict == "answer":
                reasons = [r for i, f, r in RIGHT if re.search(i, given) and re.search(f, name)]
                verdict, why = ("right", f"{reasons[0]}: {why}") if reasons else ("BAD", why)
            counts[verdict] += 1
            first = why.strip().splitlines()[0][:150] if why.strip() else ""
            lines.append(f"| {name} | {given} | {verdict} | {first} |".replace("\n", " "))
            if verdict == "BAD":
                print(f"BAD {name:34} {given:20} {first}", flush=True)
    if args.table:
        args.table.write_text("\n".join(lines) + "\n")
    print(f"{counts['right']} answered rightly, {counts['error']} clear errors, {counts['BAD']} BAD")
    raise SystemExit(counts["BAD"] > 0)


if __name__ == "__main__":
    main()

# Copyright Contributors to the numpyro_maf project.
# SPDX-License-Identifier: Apache-2.0

"""Files of earlier format versions, read for ever.

Version 1 described a flow by its builder and options, and everything else by a ``spec`` of its own. Here
these become today's objects with fresh weights, which then take the file's arrays by their old names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_maf import codec
from numpyro_maf.flows.assembly import from_spec
from numpyro_maf.flows.ensemble import Ensemble
from numpyro_maf.flows.flow import Flow
from numpyro_maf.flows.linear import Standardize
from numpyro_maf.flows.mades import Made
from numpyro_maf.inference.learned_priors import Joint
from numpyro_maf.inference.sites import Sites
from numpyro_maf.nn.mlp import MLP
from numpyro_maf.sbi.neural_posterior import NeuralPosterior
from numpyro_maf.sbi.preprocessing import Losses
from numpyro_maf.sbi.ratios import Ratio
from numpyro_maf.sbi.views import Summary, View

__all__ = ["from_version_1"]


def from_version_1(header: dict[str, Any], arrays: dict[str, Any]) -> Any:
    """What a file of format version 1 holds.

    :param header: with ``kind`` and ``spec``; ``arrays``: by name, taken out as they are used.
    :raises ValueError: for an unknown kind, and a file whose arrays do not fit its structure.
    """
    _check_sizes(header, sum(a.size for a in arrays.values()))
    readers = {"flow": _flow, "joint": _joint, "posterior": _posterior, "ratio": _ratio}
    kind, spec = header["kind"], header["spec"]
    if kind not in readers:
        raise ValueError(f"holds an unknown kind {kind!r}, expected one of {sorted(readers)}")
    learned = readers[kind](spec, _Arrays(arrays))
    if arrays:
        raise ValueError(f"does not fit its own structure: {', '.join(sorted(arrays))}")
    return learned


def _check_sizes(spec, numbers: int, name: str = "the structure") -> None:
    """Refuse networks that are larger than the file, before any is made."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            _check_sizes(value, numbers, key)
    elif isinstance(spec, list):
        whole = [n for n in spec if isinstance(n, int)]
        if name == "hidden" and any(a * b > numbers for a, b in zip(whole, whole[1:])):
            raise ValueError(f"has {numbers} numbers, too few for hidden={spec}")
        for value in spec:
            _check_sizes(value, numbers, name)
    elif isinstance(spec, int) and spec > max(numbers, 64):
        raise ValueError(f"has {numbers} numbers, too few for {name}={spec}")


class _Arrays:
    """A file's arrays, taken out by name to fill trees of the right structure."""

    def __init__(self, arrays: dict[str, Any], lead: tuple[int, ...] = ()):
        self.arrays, self.lead = arrays, lead

    def fill(self, tree, name: str) -> Any:
        """A tree with the arrays below a name as leaves, whose shapes are the tree's after ``lead``."""
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        found = [self._take(name + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
        return jax.tree.unflatten(structure, found)

    def _take(self, name, leaf):
        if name not in self.arrays:
            raise ValueError(f"does not fit its own structure: {name}")
        array, shape = self.arrays.pop(name), (*self.lead, *jnp.shape(leaf))
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
        if array.dtype == np.float64 and jnp.result_type(float) != np.float64:
            raise ValueError("holds float64 weights: enable jax_enable_x64 to load it")
        return jnp.asarray(array)


def _flow(spec, arrays: _Arrays, name: str = "") -> Any:
    return _filled(from_spec(_flow_spec(spec)), arrays, name)


def _filled(flow, arrays: _Arrays, name: str) -> Any:
    """A flow with a file's arrays; its base and what is fixed around it keep the numbers of the spec."""
    scales = {s: arrays.fill(getattr(flow, s), f"{name}.{s}") for s in ("event_scale", "context_scale")}
    if isinstance(flow, Made):  # it was the base of a flow without bijectors
        own = {n: arrays.fill(getattr(flow, n), f"{name}.base.{n}") for n in ("net", "logits")}
        return replace(flow, **own, **scales)
    last = f"{name}.bijectors[{len(flow.bijectors)}]"
    base = _filled(flow.base, arrays, f"{name}.base") if isinstance(flow.base, Flow) else flow.base
    return replace(
        flow,
        bijectors=arrays.fill(flow.bijectors, f"{name}.bijectors"),
        regression=arrays.fill(flow.regression, last),
        base=base,
        **scales,
    )


def _joint(spec, arrays: _Arrays) -> Joint:
    return Joint(_flow(spec["flow"], arrays), _sites(spec["sites"]))


def _sites(spec) -> Sites:
    supports = tuple(codec.read(_support(s)) for s in spec["supports"])
    return Sites(supports, tuple(spec["names"]), tuple(map(tuple, spec["shapes"])))


def _posterior(spec, arrays: _Arrays) -> NeuralPosterior:
    members = _Arrays(arrays.arrays, (spec["members"],))
    flows = Ensemble(_flow(spec["flow"], members, "['flows']"))
    view, summary, weights = _seen(spec, arrays, members, "['view']", "['weights']")
    typical = arrays.fill(tuple(np.zeros(shape) for shape in spec["typical"]), "['typical']")
    trained, validated = map(np.array, spec["losses"])
    losses = Losses(trained, validated)
    return NeuralPosterior(
        flows, weights, view, typical, _sites(spec["sites"]), summary, losses, spec["excluded"]
    )


def _ratio(spec, arrays: _Arrays) -> Ratio:
    inputs, *hidden = spec["widths"]
    net = MLP.init(jax.random.key(0), inputs, (1, 1), hidden=tuple(hidden))
    view, summary, networks = _seen(spec, arrays, arrays, ".view", ".networks")
    scale = arrays.fill(Standardize.identity(spec["context"]), ".theta_scale")
    return Ratio(arrays.fill(net, ".net"), networks, view, scale, summary)


def _seen(spec, arrays: _Arrays, members: _Arrays, view_name: str, weights_name: str):
    """A view of observed sites, the networks that summarise it, and their weights."""
    about, shapes = spec["view"], [tuple(s) for s in spec["view"]["shapes"]]
    ones = tuple(np.ones(shape) for shape in shapes)
    names, ranks, positive = (tuple(about[name]) for name in ("names", "ranks", "positive"))
    scales = tuple(Standardize(one, one) for one in ones)
    floors = (np.ones(()),) * len(ones)
    view = arrays.fill(View(scales, ones, floors, names, ranks, positive, about["missing"]), view_name)
    chosen = dict(zip(names, map(_embedding, spec["summary"]["embeddings"])))
    rows = tuple(jnp.ones((2, *shape)) for shape in spec["summary"]["shapes"])
    summary, weights_of = Summary.of(view, chosen, rows)
    return view, summary, members.fill(weights_of(jax.random.key(0)), weights_name)


def _embedding(spec):
    if isinstance(spec, dict):
        options = dict(spec)
        return codec.read({"class": options.pop("embedding"), **options})
    return spec if spec is None else tuple(spec)


# Old descriptions as the codec's ------------------------------------------------------------------


def _flow_spec(spec: dict[str, Any]) -> dict[str, Any]:
    own = {k: _options(v) for k, v in spec.items() if k not in ("base", "support")}
    if "support" in spec:
        own["support"] = _support(spec["support"])
    return {**own, "base": _base(spec.get("base"))}


def _options(value):
    """A scalar map or conditional was named under the key ``scalar`` or ``conditional``."""
    if isinstance(value, list):
        return [_options(v) for v in value]
    if isinstance(value, dict):
        parts = {k: _options(v) for k, v in value.items()}
        return {"class": parts.pop("scalar", None) or parts.pop("conditional", None), **parts}
    return value


def _array(values, dtype: str) -> dict[str, Any]:
    return {"class": "array", "dtype": dtype, "shape": list(np.shape(values)), "values": values}


def _base(spec):
    if spec is None:
        return None
    if "flow" in spec:
        return {"flow": _flow_spec(spec["flow"])}
    if "to_event" in spec:
        return {"class": "to_event", "of": _base(spec["of"]), "event_dims": spec["to_event"]}
    if "expand" in spec:
        return {"class": "expand", "of": _base(spec["of"]), "shape": spec["expand"]}
    arguments = {k: _array(v["value"], v["dtype"]) for k, v in spec["arguments"].items()}
    return {"class": "distribution", "name": spec["distribution"], "arguments": arguments}


def _support(spec):
    if "of" in spec:
        return {"class": "independent", "of": _support(spec["of"]), "event_dims": spec["event_dims"]}
    arguments = spec.get("arguments")
    if arguments is None:
        return {"class": "constraint", "name": spec["name"]}
    of = {k: _array(v["array"], "float32") if isinstance(v, dict) else v for k, v in arguments.items()}
    return {"class": "constraint", "name": spec["name"], "arguments": of}

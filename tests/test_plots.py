"""Pictures: the right numbers in the right places, on light pages and on dark ones."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_maf as nm
from numpyro_maf.train import Trained, TrainState

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
plt = pytest.importorskip("matplotlib.pyplot")
from numpyro_maf import plots  # noqa: E402
from numpyro_maf.plots import style  # noqa: E402
from numpyro_maf.plots.draws import _regions  # noqa: E402

rng = np.random.default_rng(0)
N = 3000
DRAWS = {"mu": rng.normal(2, 0.5, N), "w": rng.dirichlet([2.0, 3.0], N), "k": rng.poisson(3, N)}


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


def model(y=None):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(mu, 1).expand([5]).to_event(1), obs=y)


# Colours ------------------------------------------------------------------------------------------


def test_any_number_of_activities_has_colours_of_its_own():
    colours = plots.palette(16)
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    assert plots.palette(9) == colours[:9]
    eyes = style._seen(rgb)  # normal, green-blind, red-blind
    apart = np.linalg.norm(eyes[:, :, None] - eyes[:, None], axis=-1) + np.eye(16)
    assert apart.min() > 0.08  # about four just noticeable differences
    light, chroma = eyes[0, :, 0], np.hypot(*eyes[0, :, 1:].T)
    assert light.min() > 0.3 and chroma.max() < 0.2  # neither near black nor glaring


@pytest.mark.parametrize("page", ["default", "dark_background"])
def test_inks_and_lines_are_seen_on_light_and_on_dark_pages(page):
    """Contrast by the relative luminance of the web's guidelines: 3 for lines, 4.5 for text."""

    def luminance(colour):
        c = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
        return linear @ [0.2126, 0.7152, 0.0722]

    with plt.style.context(page):
        ground = luminance(style.ink(0.0))
        for colour, least in [*((c, 2.2) for c in style.LINES), (style.ink(1.0), 10), (style.ink(0.5), 3)]:
            high, low = sorted([luminance(colour), ground], reverse=True)
            assert (high + 0.05) / (low + 0.05) > least, colour


# Draws --------------------------------------------------------------------------------------------


def test_pairs_name_each_number_and_show_what_is_given():
    prior = {"mu": rng.normal(0, 2, 500), "w": rng.dirichlet([1.0, 1.0], 500)}
    axes = plots.pairs(
        DRAWS, prior=prior, reference={"mu": DRAWS["mu"] + 0.01}, truth={"mu": 2.2, "w": [0.4, 0.6]},
        title="all",
    )  # fmt: skip
    names = ["mu", "w[0]", "w[1]", "k"]
    assert axes.shape == (4, 4) and [a.get_xlabel() for a in axes[-1]] == names
    assert [a.get_ylabel() for a in axes[1:, 0]] == names[1:]
    assert [t.get_text() for t in axes[0, -1].get_legend().get_texts()] == [
        "posterior", "prior", "reference", "truth"
    ]  # fmt: skip
    assert axes[0, 0].lines[0].get_xdata()[0] == 2.2  # the truth
    cross = [line for line in axes[1, 0].lines if line.get_marker() == "x"][0]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (2.2, 0.4)
    assert not axes[0, 1].axison and axes[0, 0].figure.get_suptitle() == "all"
    low, high = axes[0, 0].get_xlim()
    assert 0 < low < 0.6 and 3.4 < high < 4.2  # the posterior's, not the prior's


def steps(axis, i=1):
    """Heights and edges of the outline that is drawn as number i."""
    data = axis.patches[i].get_data()
    return data.values, data.edges


def test_pairs_weigh_draws_and_integrate_to_one():
    weights = (DRAWS["mu"] > 2).astype(float)
    axes = plots.pairs({"mu": DRAWS["mu"]}, weights=weights)
    heights, edges = steps(axes[0, 0])
    np.testing.assert_allclose((heights * np.diff(edges)).sum(), 1, atol=0.01)
    assert edges[0] >= 1.99
    logarithmic = plots.pairs({"tau": np.exp(DRAWS["mu"])}, log=("tau",))[0, 0]
    heights, edges = steps(logarithmic)
    assert logarithmic.get_xscale() == "log"
    np.testing.assert_allclose((heights * np.diff(np.log(edges))).sum(), 1, atol=0.01)


def test_pairs_show_no_density_beyond_a_support():
    x = np.abs(rng.normal(0, 1, (N, 2)))
    axis = plots.pairs({"x": x})[1, 0]
    outline = np.concatenate([p.vertices for p in axis.collections[0].get_paths()])
    assert outline.min() >= 0
    _, height, (low, high) = _regions(*x.T, np.ones(N), [np.linspace(0, 3, 41)] * 2, [False, False])
    inside = height >= high
    assert 0.47 < height[inside].sum() < 0.53 and 0.87 < height[height >= low].sum() < 0.93


def test_pairs_of_integers_have_a_bin_for_each():
    _, edges = steps(plots.pairs({"k": DRAWS["k"]})[0, 0])
    assert (np.diff(edges) == 1).all() and edges[0] % 1 == 0.5


def test_pairs_take_whatever_holds_draws():
    class Run:
        def get_samples(self):
            return {"mu": DRAWS["mu"]}

    data = nm.to_arviz({"mu": DRAWS["mu"]}, model)
    for given in (Run(), data):
        assert plots.pairs(given, names=["mu"])[0, 0].get_xlabel() == "mu"
    with pytest.raises(TypeError, match="draw first: .sample"):
        plots.pairs(dist.Normal(0, 1))
    with pytest.raises(ValueError, match="did you mean 'mu'"):
        plots.pairs(DRAWS, names=["muu"])
    with pytest.raises(ValueError, match="11 numbers, too many to see"):
        plots.pairs({"x": np.zeros((5, 11))})
    with pytest.raises(ValueError, match="0 or less"):
        plots.pairs(DRAWS, names=["k"], log=("k",))


def test_predictive_counts_what_lies_in_the_band():
    y = np.zeros(40)
    y[:4] = 10
    runs = {
        "y": rng.normal(size=(800, 40)),
        "s": rng.normal(size=800),
        "z": rng.normal(size=(50, 200))[:, :0],
    }
    band, single = plots.predictive(
        {"y": runs["y"], "s": runs["s"]}, {"y": y, "s": 0.5}, coords={"y": np.arange(40) / 4}
    )
    labels = [t.get_text() for t in band.get_legend().get_texts()]
    assert labels[-1] == "observed, 90% in the 90% band" and band.get_xlabel() == "coordinate"
    assert single.lines[0].get_xdata()[0] == 0.5 and single.get_xlabel() == "s"
    rows = rng.normal(size=(100, 90))
    (functions,) = plots.predictive({"y": rows}, {"y": rows[0]}, prior={"y": 2 * rows})
    assert functions.get_ylim() == (0, 1) and functions.get_ylabel() == "share of numbers below"
    with pytest.raises(ValueError, match=r"replicates\['y'\] must be \(S, \*\(3,\)\)"):
        plots.predictive({"y": rows}, {"y": np.zeros(3)})


# Learning -----------------------------------------------------------------------------------------


def test_recovery_tells_contraction():
    truth = rng.normal(size=(400, 2))
    known = 0.8 * truth + 0.4 * rng.normal(size=(400, 2))  # posterior means: variance 0.36 is left
    sd = np.array([0.4, 1.0])
    means = np.stack([known[:, 0], np.zeros(400)], -1)
    draws = {"theta": means + sd * rng.normal(size=(500, 400, 2))}
    axes = plots.recovery(draws, {"theta": truth, "x": np.zeros(400)})
    assert len(axes) == 3
    titles = [a.get_title() for a in axes[:2]]
    share = 1 - 0.16 / truth[:, 0].var()
    assert titles[0].startswith("theta[0]: r 0.9") and titles[0].endswith(f"contraction {share:.2f}")
    assert abs(float(titles[1].split()[-1])) < 0.12  # nothing learned
    assert axes[-1].get_xlabel() == "contraction" and axes[-1].get_ylabel() == "z-score"
    points = axes[0].lines[1].get_xydata()
    np.testing.assert_allclose(points[:, 0], truth[:, 0])
    with pytest.raises(ValueError, match=r"draws\['theta'\] must be"):
        plots.recovery({"theta": draws["theta"][:, :5]}, {"theta": truth})


def state(train, valid=(), best=1):
    return TrainState(0, 0, 0, 0, np.zeros(2), train_loss=np.array(train), validation_loss=np.array(valid),
                      best_epoch=best, best_loss=1.0)  # fmt: skip


def test_losses_of_anything_that_trains():
    fitted = nm.FitResult(None, np.array([3.0, 2.0]), np.array([3.5, 2.5]), 1, stopped="interrupted")
    trained = Trained(state([3.0, 2.0, 1.0]), improving=True)
    run = nm.GuideRun(None, {}, model, (), {}, np.zeros(2), None, "", Trained(state([5.0, 4.0], [5.0, 4.5])))
    error = FloatingPointError("late")
    error.result = trained
    axis = plots.losses({"fit": fitted, "train": trained, "guide": run, "row": [2.0, 1.0], "late": error})
    texts = [t.get_text() for t in axis.get_legend().get_texts()]
    assert texts == [
        "fit: training", "fit: held out", "fit: best 2.5, interrupted", "train",
        "train: best 2, still improving", "guide: training", "guide: held out", "guide: best 4.5", "row",
        "late", "late: best 2, still improving",
    ]  # fmt: skip
    assert axis.get_xlabel() == "epoch or 50 steps or step"
    one = plots.losses(fitted)
    assert [line.get_ydata().tolist() for line in one.lines] == [[3.0, 2.0], [3.5, 2.5], [2.5]]
    for wrong in ({}, np.zeros((2, 2)), np.zeros(0)):
        with pytest.raises(ValueError):
            plots.losses(wrong)
    with pytest.raises(TypeError, match="a Normal has no losses"):
        plots.losses(dist.Normal(0, 1))


def test_losses_of_posteriors_and_rounds():
    from types import SimpleNamespace as Thing

    held = Thing(
        train=np.array([2.0, 1.0]), validation=np.zeros(0), best_epoch=1, stopped="", improving=False
    )
    posterior = Thing(losses=held)
    bound = Thing(neural=posterior)
    rounds = Thing(last=bound, rounds=(Thing(learned=posterior), Thing(learned=posterior)))
    axis = plots.losses({"npe": bound, "snpe": rounds})
    shown = [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
    assert shown[::2] == ["npe", "snpe round 1", "snpe round 2"]


def test_calibration_is_in_plain_words():
    from numpyro_maf.diagnostics import Coverage, sbc
    from numpyro_maf.sbi import Calibration

    draws, truth = rng.normal(size=(50, 100)), rng.normal(size=100)
    found = Calibration(
        sbc({"mu": draws}, {"mu": truth}), Coverage(np.full(100, 0.8), 0.0), Coverage(truth, 1)
    )
    ranks, regions = plots.calibration(found)
    assert ranks.get_ylabel() == "ECDF difference from uniform"
    assert regions.get_ylabel() == "empirical coverage minus credibility"
    curve = regions.lines[0].get_ydata()
    np.testing.assert_allclose([curve[158], curve[-1]], [-0.79, 0.0])  # all truths at level 0.8
    assert regions.get_ylim()[0] < curve.min()
    band = ranks.patches[0].get_extents().transformed(ranks.transData.inverted())
    np.testing.assert_allclose(band.y1, 0.1628, atol=1e-3)


# Flows --------------------------------------------------------------------------------------------


def test_density_of_one_number_and_regions_of_two():
    axis = plots.density(dist.Normal(1.0, 2.0), data=rng.normal(1, 2, 100))
    x, height = axis.lines[0].get_data()
    expected = np.exp(np.asarray(dist.Normal(1.0, 2.0).log_prob(x)))
    np.testing.assert_allclose(height, expected, rtol=1e-4)
    flow = nm.maf(0, 2, transforms=1, hidden=(8,))  # near the identity, so a normal
    axis = plots.density(flow, limits=[(-4, 4), (-4, 4)], data=np.zeros((3, 2)))
    outermost = np.concatenate([p.vertices for p in axis.collections[0].get_paths()[:1]])
    radius = np.linalg.norm(outermost, axis=-1).max()
    assert 2.0 < radius < 3.5  # 95% of a normal lie within 2.45
    with pytest.raises(ValueError, match="one or two numbers, got 3"):
        plots.density(nm.maf(0, 3, transforms=1, hidden=(8,)))
    with pytest.raises(ValueError, match="takes a context of width 1"):
        plots.density(nm.maf(0, 2, context=1, transforms=1, hidden=(8,)))


def test_warp_is_the_flow_of_a_grid():
    loc, scale = np.array([1.0, -2.0]), np.array([2.0, 0.5])
    base = dist.Normal(0, 1).expand([2]).to_event(1)
    d = nm.FlowDistribution(base, [nm.Standardize(jax.numpy.array(loc), jax.numpy.array(scale))])
    before, after = plots.warp(d, lines=5)
    assert len(before.lines) == len(after.lines) == 10
    for a, b in zip(before.lines, after.lines):
        assert a.get_color() == b.get_color()
        np.testing.assert_allclose(b.get_xydata(), loc + scale * a.get_xydata(), rtol=1e-3, atol=1e-3)
    reach = np.abs(np.concatenate([line.get_xydata() for line in before.lines])).max()
    assert 2.2 < reach < 2.9
    with pytest.raises(TypeError, match="takes a flow of bijectors"):
        plots.warp(dist.Normal(0, 1))
    with pytest.raises(ValueError, match="one flow of 2 features"):
        plots.warp(nm.maf(0, 3, transforms=1, hidden=(8,)))


# Activities and ArviZ -----------------------------------------------------------------------------


def test_activities_that_are_not_known_are_hatched():
    names, activity = tuple("abcdefghi"), np.repeat([*range(9), -1], 10)
    minutes = np.arange(100).astype("datetime64[m]").astype("datetime64[s]")
    data = nm.datasets.SensorData(minutes, np.zeros((100, 1)), ("power",), ("W",), activity, names)
    figure = plots.activity_timeline(data, np.full((100, 9), 1 / 9))
    legend = figure.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == [*names, "not known"]
    assert legend.get_patches()[-1].get_hatch() == "////"
    figure.canvas.draw()
    box, image = figure.axes[1].get_window_extent(), np.asarray(figure.canvas.buffer_rgba())
    row = image[image.shape[0] - int((box.y0 + box.y1) / 2), :, :3]
    seen = [row[int(box.x0 + (i + 0.5) * box.width / 10)].tolist() for i in range(10)]
    assert len({tuple(c) for c in seen}) == 10
    assert np.ptp(seen[-1]) == 0  # grey or white
    assert not plt.get_fignums()  # a figure that pyplot does not know
    axes = plots.activities(data, np.full((100, 9), 1 / 9))
    assert len(axes) == 3 and plt.get_fignums()
    with pytest.raises(ValueError, match=r"probabilities must be \(100, 9\)"):
        plots.activity_timeline(data, np.full((100, 8), 1 / 8))


@pytest.mark.parametrize("kind", ["distribution", "forest"])
def test_plots_of_arviz_by_one_name_in_both_versions(kind):
    data = nm.to_arviz({"mu": DRAWS["mu"][:200]}, model)
    axes = plots.arviz(kind, data)
    assert len(axes) >= 1 and all(a.figure is axes[0].figure for a in axes)
    with pytest.raises(ValueError, match="kind must be one of distribution, forest"):
        plots.arviz("violin", data)


def test_a_path_saves_and_closes_and_given_axes_are_used(tmp_path):
    path = tmp_path / "losses.png"
    plots.losses([2.0, 1.0], path=path, title="losses")
    assert path.stat().st_size > 5000 and not plt.get_fignums()
    figure, axis = plt.subplots()
    assert plots.losses([2.0, 1.0], axes=axis) is axis and plt.get_fignums() == [figure.number]
    with pytest.raises(ValueError, match="axes must be 4 of matplotlib's axes, got 1"):
        plots.pairs(DRAWS, names=["w"], axes=axis)

"""The line that a training shows, and its records."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from numpyro_maf.train import TrainState
from numpyro_maf.train.progress import Progress


def state(losses, validation=(), best=0, marked=None):
    shown = validation or losses
    return TrainState(
        0, 0, 0, 0, np.zeros(2, np.uint32), train_loss=np.array(losses), validation_loss=np.array(validation),
        best_epoch=best, best_loss=shown[best], marked=best if marked is None else marked,
    )  # fmt: skip


def shown(capfd, steps, why="", patience=3, max_epochs=10, on=True):
    """What went to the terminal, line by line."""
    with Progress("fit", max_epochs, patience, on) as bar:
        bar.started(steps[0])
        for one in steps:
            bar.epoch(one)
        bar.why = why
    return capfd.readouterr().err.replace("\r", "\n").split("\n")


def test_it_says_compiling_and_closes_with_the_reason(capfd):
    lines = shown(capfd, [state([2.0]), state([2.0, 1.5, 1.6, 1.7, 1.8], best=1)])
    assert lines[1].startswith("fit: compiling [00:00") or lines[0].startswith("fit: compiling [00:00")
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith("fit: no gain for 3 epochs; best loss 1.5000 at epoch 2 of 5 [00:0")
    assert not any(mark in "".join(lines) for mark in ("<", "?", "it/s", "%"))  # no time that remains


@pytest.mark.parametrize(
    ("steps", "why", "reason"),
    [
        (state([3.0, 2.0], best=1), "", "reached max_epochs while still improving"),
        (state([1.0, 2.0], best=0), "", "reached max_epochs"),
        (state([2.0]), "callback", "callback"),
        (state([2.0], [2.5]), "the loss is not finite", "the loss is not finite; best loss 2.5000"),
    ],
)
def test_reasons(capfd, steps, why, reason):
    lines = shown(capfd, [steps], why, max_epochs=2)
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith(f"fit: {reason}; " if ";" not in reason else f"fit: {reason}")


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt, "interrupted"), (MemoryError, "ended by MemoryError")]
)
def test_errors_are_reasons_too(capfd, error, reason):
    with pytest.raises(error), Progress("fit", 10, 3, True):
        raise error
    assert f"fit: {reason} [00:0" in capfd.readouterr().err


def test_records_are_made_without_a_line(capfd, caplog):
    with caplog.at_level(logging.INFO, logger="numpyro_maf.train"):
        assert shown(capfd, [state([2.0]), state([2.0, 1.5], best=1)], max_epochs=2, on=False) == [""]
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "fit: compiling; at most 2 epochs" and len(texts) == 3
    assert texts[1] == "fit: resumes after epoch 1"
    assert texts[2].startswith(
        "fit: reached max_epochs while still improving; best loss 1.5000 at epoch 2 of 2; "
    )
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger="numpyro_maf.train"):
        shown(capfd, [replace(state([2.0, 2.5], best=0), train_loss=np.array([2.0, 2.5]))], on=False)
    assert "fit: epoch 2, loss 2.5000, best 2.0000, 1 of 3 without gain" in caplog.text


def test_a_library_is_silent_unless_asked(capfd):
    shown(capfd, [state([2.0])], on=False)
    assert capfd.readouterr() == ("", "")
    assert any(isinstance(h, logging.NullHandler) for h in logging.getLogger("numpyro_maf.train").handlers)

"""Never silent, never in the way: bars on terminals, lines elsewhere, the package's logger, -q and -v."""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

import pytest
import torch

import ambient_sci as asci
from ambient_sci import progress
from ambient_sci.cli import main
from ambient_sci.operators import Identity
from ambient_sci.priors import GaussianPrior, NetworkConfig
from ambient_sci.training import EMConfig, TrainConfig, fit_em


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written to standard error, with lines due at once."""
    lines: list[str] = []
    monkeypatch.setattr(progress, "write_line", lines.append)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-3)
    return lines


def wait_for(condition) -> None:
    """Until it holds; a minute at most."""
    pause = threading.Event()
    for _ in range(6000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("waited for a minute")


def test_lines_come_by_the_clock_also_during_one_long_step(spoken):
    seen = []
    for item in progress.track(range(3), "working"):
        seen.append(item)
        if item == 1:
            wait_for(lambda: any(line.startswith("working: 1 of 3 after 0:00") for line in spoken))
            assert any("left" in line for line in spoken if "1 of 3" in line)
    assert seen == [0, 1, 2]
    count = len(spoken)
    threads = [t.name for t in threading.enumerate()]
    assert "progress" not in threads and len(spoken) == count


def test_a_loop_that_is_left_early_falls_silent(spoken):
    with pytest.raises(KeyError):
        for _ in (iterator := progress.track(range(3), "working")):
            raise KeyError
    iterator.close()  # type: ignore[union-attr]
    assert "progress" not in [t.name for t in threading.enumerate()]


def test_nothing_is_said_unless_asked(spoken):
    assert progress.track(range(3), "x", enabled=False) == range(3)
    assert list(progress.track([], "x")) == []
    prior = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))
    asci.reconstruct(prior, Identity((1, 2, 2)), torch.zeros(1, 1, 2, 2), 0.1, samples=2, steps=3)
    assert spoken == []


def test_a_terminal_gets_a_bar_and_lines_go_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track(range(2), "working")) == [0, 1]
    for _ in progress.track(range(1), "working"):
        assert len(progress._consoles) == 1
        progress.say("a line")
    assert progress._consoles == [] and "a line" in capsys.readouterr().err


@pytest.mark.parametrize("configured", [True, False])
def test_status_goes_to_the_logger_where_it_is_set_up(configured, spoken, caplog):
    if configured:
        with caplog.at_level(logging.INFO, logger="ambient_sci"):
            progress.say("status")
            progress.say("detail", logging.DEBUG)
        assert [r.getMessage() for r in caplog.records] == ["status"] and spoken == []
        assert caplog.records[0].name == "ambient_sci"
    else:
        progress.say("status")
        progress.say("detail", logging.DEBUG)
        assert spoken == ["status"]


def test_a_level_above_info_silences_all_of_it(spoken):
    progress.LOGGER.setLevel(logging.WARNING)
    try:
        progress.say("status")
        assert progress.track(range(3), "x") == range(3)
    finally:
        progress.LOGGER.setLevel(logging.NOTSET)
    assert spoken == []


def test_expectation_maximisation_reports_its_draws(spoken):
    y = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    em = EMConfig(
        laps=1, m_step="gaussian", sampler_batch=1, sampler_steps=4, held_out=4, initial_iterations=2
    )
    config = TrainConfig(em=em, device="cpu", network=NetworkConfig(kind="mlp", channels=(8,)))
    fit_em((Identity((1, 2, 2)), y, 0.3), config)
    assert any("expectation maximisation" in line for line in spoken)
    assert any(line.startswith("EM lap 1: held-out CRPS") for line in spoken)
    before = len(spoken)
    fit_em((Identity((1, 2, 2)), y, 0.3), config, progress=False)
    assert len(spoken) == before


@pytest.mark.parametrize("words", [[], ["-q"], ["--quiet"], ["-v"], ["--verbose"]])
def test_the_command_line_says_as_much_as_is_asked_for(words, tmp_path: Path, capsys, monkeypatch):
    y = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    asci.data.write_measurements(
        tmp_path / "m.h5", measurements=y.numpy(), mask=None, noise_std=0.3, operator="identity", image_shape=(1, 4, 4)
    )  # fmt: skip
    (tmp_path / "c.json").write_text(
        '{"network": {"kind": "mlp", "channels": [8]}, "max_steps": 2, "batch_size": 2}'
    )
    train = [
        "train",
        str(tmp_path / "m.h5"),
        "--config",
        str(tmp_path / "c.json"),
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    assert main([*words, *train]) == 0
    said = capsys.readouterr()
    assert "prior:" in said.out
    quiet, verbose = bool({"-q", "--quiet"} & {*words}), bool({"-v", "--verbose"} & {*words})
    assert (said.err == "") == quiet
    assert ("Ambient loss" in said.err) == (not quiet)
    assert ("Python" in said.err and "s in all" in said.err) == verbose
    assert progress.LOGGER.level == logging.NOTSET and progress.LOGGER.propagate
    assert not any(isinstance(h, progress.LineHandler) for h in progress.LOGGER.handlers)


def test_both_are_one_too_many(capsys):
    assert main(["-q", "-v", "info"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "ambient-sci: error: expected --quiet or --verbose, got both"
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0:00:00"), (75.0, "0:01:15"), (7322.0, "2:02:02"), (float("nan"), "?")]
)
def test_durations(seconds, said):
    assert progress.duration(seconds) == said

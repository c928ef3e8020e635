"""What is chosen when a run begins: network, augmentations, learning rate; that it is written down, and said."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from ambient_sci.cli import main, parse
from ambient_sci.data import MeasurementArrays, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.operators import MRI, Identity, Masking, make_design
from ambient_sci.priors import PRESETS, KeptRows, NetworkConfig, NetworkPrior, load_prior, preset
from ambient_sci.training import TrainConfig, auto, explicit_config, fit, make_accelerator, open_source
from ambient_sci.training.orientation import SYMMETRIES, contradicted, sign_flip_p, systematic

FLIPS = ("flip-horizontal", "flip-vertical", "transpose")
CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(num: int, shape=(1, 16, 16), seed: int = 0) -> torch.Tensor:
    """Smooth images without any direction."""
    x = torch.randn(num, *shape, generator=rng(seed))
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1)


def noisy(num: int = 40, sigma: float = 0.1, **options):
    x = blobs(num, **options)
    return Identity(tuple(x.shape[1:])), x + sigma * torch.randn(x.shape, generator=rng(9)), sigma


def source_of(data, config=None):
    return open_source(data, config or TrainConfig())


# -- presets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "size",
    [(8, 8), (20, 20), (28, 28), (37, 45), (48, 32), (64, 64), (100, 60), (101, 101), (1023, 1024), (7, 300)],
)
def test_presets_come_down_to_few_pixels_with_little_padding(name, size):
    factor = preset(name, *size).size_factor
    rows, columns = (-(-n // factor) for n in size)
    assert rows * columns <= 40**2
    assert rows * columns * factor**2 <= 1.25 * size[0] * size[1]


def test_presets_grow_and_are_those_of_the_documentation():
    def parameters(network: NetworkConfig) -> int:
        return sum(p.numel() for p in NetworkPrior((1, 64, 64), 1.0, network=network).parameters())

    small, medium, large = (parameters(preset(name, 64, 64)) for name in PRESETS)
    assert 1.5 * small < medium < large / 3
    assert preset("medium", 64, 64) == NetworkConfig()  # what version 0.2 trained by default


def test_unknown_presets_are_refused():
    with pytest.raises(InputError, match="small, medium, large"):
        preset("huge", 32, 32)


# -- symmetries ----------------------------------------------------------------------------------------------


def test_the_sign_flip_test_is_exact_for_two_differences():
    """Of the four signs of two equal differences two give the observed length, of opposite ones none is shorter."""
    d = torch.ones(2, 3)
    assert sign_flip_p(d, 4000) == pytest.approx(0.5, abs=0.03)
    assert sign_flip_p(torch.stack([d[0], -d[0]]), 100) == 1.0
    assert sign_flip_p(torch.ones(1, 3)) == 1.0
    assert sign_flip_p(torch.ones(20, 3)) <= 0.01


def test_the_systematic_part_is_unbiased():
    """d_i = m + e_i, f of variance v: rho = |m|^2 / (2 n v)."""
    m, n, v = 0.5, 4, 2.0
    f = math.sqrt(v) * torch.randn(200_000, n, generator=rng(1), dtype=torch.float64)
    d = m + torch.randn(200_000, n, generator=rng(2), dtype=torch.float64)
    assert systematic(d, f) == pytest.approx(m**2 * n / (2 * n * v), rel=0.03)
    assert systematic(d, f, noise=1.0) == pytest.approx(m**2 * n / (2 * n * (v - 1)), rel=0.03)
    few = torch.stack([systematic_of(d[k : k + 3], f) for k in range(0, 6000, 3)])
    assert few.mean() == pytest.approx(m**2 * n / (2 * n * v), rel=0.15)


def systematic_of(d, f):
    return torch.tensor(systematic(d, f))


@pytest.mark.parametrize("seed", range(3))
def test_images_without_direction_contradict_nothing(seed):
    operator, y, sigma = noisy(60, seed=seed)
    assert contradicted(MeasurementArrays(operator, y, sigma), True, FLIPS) == {}


@pytest.mark.parametrize(
    ("name", "against"),
    [
        ("top", {"flip-vertical", "transpose"}),
        ("left", {"flip-horizontal", "transpose"}),
        ("stripes", {"transpose"}),
        ("corner", {"flip-horizontal", "flip-vertical"}),
    ],
)
def test_what_has_a_direction_is_seen_through_noise(name, against):
    x = blobs(60)
    row = torch.linspace(-1, 1, 16)
    if name == "top":
        x = x + 0.5 * row[:, None]
    elif name == "left":
        x = x + 0.5 * row
    elif name == "corner":
        x = x + 0.5 * (row[:, None] + row)
    else:  # everywhere, with a random phase: the mean image has no direction
        phase = 6.3 * torch.rand(60, 1, 1, 1, generator=rng(3))
        x = x + 0.7 * torch.sin(9 * row[:, None] + phase)
    y = x + 0.3 * torch.randn(x.shape, generator=rng(5))
    data = MeasurementArrays(Identity((1, 16, 16)), y, 0.3)
    assert set(contradicted(data, True, FLIPS)) == against


def test_images_of_one_subject_count_as_one():
    """Ten subjects that lean either way, each with 30 images: 300 images lean, their subjects do not."""
    row = torch.linspace(-1, 1, 16)
    lean = torch.tensor([1.0, 1, 1, 1, 1, 1, -1, -1, -1, -1]).repeat_interleave(30).reshape(-1, 1, 1, 1)
    x = blobs(300) + 2 * lean * row
    who = [str(k) for k in range(10) for _ in range(30)]
    operator = Identity((1, 16, 16))
    names = ("flip-horizontal",)
    alone = MeasurementArrays(operator, x, 0.0, subjects=[str(k) for k in range(300)])
    assert sign_flip_p(x - x.flip(-1)) <= 0.01 and alone.subjects != who
    assert contradicted(MeasurementArrays(operator, x, 0.0, subjects=who), True, names) == {}


def test_phases_are_told_apart_where_they_have_a_direction():
    x = blobs(60, (2, 16, 16))
    y = x + 0.2 * torch.randn(x.shape, generator=rng(4))
    assert contradicted(MeasurementArrays(Identity((2, 16, 16)), y, 0.2), True, ("phase",)) == {}
    colours = MeasurementArrays(Identity((2, 16, 16)), y.abs(), 0.2)
    assert set(contradicted(colours, True, ("phase",))) == {"phase"}


def test_every_symmetry_is_an_augmentation():
    assert set(SYMMETRIES) <= set(auto.AUGMENTATIONS)


def test_augmentations_are_those_that_are_exact_for_the_operator():
    config = TrainConfig()
    names, said = auto.symmetries(config, source_of(noisy()))
    assert names == FLIPS and "none turns them off" in said

    design = make_design("bernoulli", image_shape=(1, 16, 16), keep=0.5)
    mask = design.sample(40, rng())
    y = mask * noisy()[1]
    names, _ = auto.symmetries(config, source_of((Masking(mask, (1, 16, 16), design), y, 0.1)))
    assert names == FLIPS[:2]  # a transposed mask is another one

    scans = MRI(torch.ones(16, 16))
    y = scans.A(blobs(40, (2, 16, 16)))
    names, _ = auto.symmetries(config, source_of((scans, y, 0.1)))
    assert {"phase", "gain"} <= set(names)
    oblong = noisy(shape=(1, 16, 8))
    assert "transpose" not in auto.symmetries(config, source_of(oblong))[0]


def test_labelled_images_are_not_mirrored(tmp_path):
    _, y, sigma = noisy()
    path = write_measurements(
        tmp_path / "m.h5", measurements=y.numpy(), mask=None, noise_std=sigma, operator="identity",
        image_shape=(1, 16, 16), labels=list(range(4)) * 10,
    )  # fmt: skip
    names, said = auto.symmetries(TrainConfig(), source_of(path))
    assert names == () and "classes" in said


# -- the mean of the images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_prior_around_a_mean_is_the_one_around_zero_moved_there(masked):
    """D_m(x, s) = m + D_0(x - m, s); h_m(A_B^H y, s, B) = m + h_0(A_B^H (y - A m 1), s, B)."""
    network = NetworkConfig(channels=(8,), norm_groups=4, head_channels=8)
    about = ("mask-conditional", 1) if masked else ("unconditional", 1)
    options = {"conditioning": about[0], "network": network, "generator": rng(2)}
    zero = NetworkPrior((1, 8, 8), 0.5, **options).double()
    moved = NetworkPrior((1, 8, 8), 0.5, data_mean=0.7, **{**options, "generator": rng(2)}).double()
    for p, q in zip(zero.parameters(), moved.parameters(), strict=True):
        p.data = q.data = torch.randn(p.shape, generator=rng(3), dtype=p.dtype) * 0.3
    x = torch.randn(3, 1, 8, 8, generator=rng(4), dtype=torch.float64)
    given, one = None, torch.ones_like(x)
    if masked:
        mask = (torch.rand(3, 1, 8, 8, generator=rng(5)) < 0.5).double()
        given, one, x = KeptRows(Masking(mask, (1, 8, 8))), mask, x * mask
    expected = 0.7 + zero(x - 0.7 * one, 0.4, given)
    torch.testing.assert_close(moved(x, 0.4, given), expected, rtol=0, atol=1e-12)
    assert (moved(x, 0.4, given) - zero(x, 0.4, given)).abs().max() > 0.1


def test_the_mean_is_learned_from_noisy_data_saved_and_told(tmp_path):
    operator, y, sigma = noisy(200)
    data, out = (operator, y + 0.6, sigma), tmp_path / "run"
    prior = fit(data, TrainConfig(max_steps=1, device="cpu"), out=out, progress=False)
    assert isinstance(prior, NetworkPrior) and prior.data_mean == pytest.approx(0.6, abs=0.05)
    loaded = load_prior(out)
    assert isinstance(loaded, NetworkPrior) and loaded.data_mean == prior.data_mean
    plain = fit(data, TrainConfig(max_steps=1, device="cpu", centre=False), progress=False)
    assert isinstance(plain, NetworkPrior) and plain.data_mean == 0
    complexes = source_of((Identity((2, 16, 16)), blobs(40, (2, 16, 16)) + 1, 0.1))
    assert complexes.data_mean == 0


def test_runs_of_before_there_was_a_mean_go_on_without(tmp_path):
    out = tmp_path / "run"
    fit(noisy(), TrainConfig(max_steps=2, device="cpu", centre=False), out=out, progress=False)
    old = json.loads((out / "config.json").read_text())
    del old["centre"]
    (out / "config.json").write_text(json.dumps(old))
    run = json.loads((out / "run.json").read_text())
    del run["settings"]["centre"], run["sha256"], run["format"]
    (out / "run.json").write_text(json.dumps(run))
    prior = fit(noisy(), TrainConfig(max_steps=3, device="cpu"), out=out, resume=True, progress=False)
    assert isinstance(prior, NetworkPrior) and prior.data_mean == 0


def test_recipes_leave_nothing_to_be_chosen():
    from recipes.exactness.methods import configuration as exactness
    from recipes.exactness.parts import load_settings
    from recipes.mri.priors import configuration as mri
    from recipes.mri.profiles import load_profile

    for name in ("two-core", "gpu", "fastmri", "miniature"):
        profile = load_profile(name)
        for entry in profile["priors"].values():
            assert not mri(entry, profile, "cpu").open_settings
    for part in ("ring", "masked-mixture", "digits", "masked"):
        for run in ("clean", "staged", "em"):
            settings = load_settings("two-core", part)
            if run in settings or run == "clean":
                assert not exactness(run, settings, 0, "cpu").open_settings


# -- network and rate ----------------------------------------------------------------------------------------


def choose(monkeypatch, num: int, seconds: dict[tuple[int, int], float], shape=(1, 32, 32), **settings):
    """The network that is chosen where a step takes ``seconds``, by width, and which were timed."""
    timed: list[tuple[int, int]] = []

    def step_seconds(config, network, source, device):
        timed.append(size_of(network))
        return seconds[timed[-1]]

    monkeypatch.setattr(auto, "step_seconds", step_seconds)
    x = torch.zeros(1, *shape).expand(num, *shape)
    data = MeasurementArrays(Identity(shape), x.clone(), 0.1)
    source = auto.Source(data, complete=True, design=None, reason="", data_std=1.0)
    network, took, said = auto.choose_network(TrainConfig(batch_size=16, **settings), source, CPU)
    return network, took, said, timed


def size_of(network: NetworkConfig) -> tuple[int, int]:
    return network.channels[0], network.patch


WIDTHS = {name: size_of(preset(name, 32, 32)) for name in PRESETS}


def test_short_runs_get_a_small_network_and_time_nothing_else(monkeypatch):
    seconds = {WIDTHS["small"]: 0.05, WIDTHS["medium"]: 0.2, WIDTHS["large"]: 2.0}
    network, took, said, timed = choose(monkeypatch, 300, seconds, max_minutes=1.5)
    assert network == preset("small", 32, 32) and took == 0.05 and "1,800 steps" in said
    assert timed == [WIDTHS["small"]]


def test_long_runs_get_a_larger_one_where_it_makes_its_steps(monkeypatch):
    small, medium = WIDTHS["small"], WIDTHS["medium"]
    need = auto.LEAST_STEPS["medium"]
    minutes = 60.0
    fast, slow = 60 * minutes / need * 0.9, 60 * minutes / need * 1.1
    network, *_ = choose(monkeypatch, 2_000, {small: 0.01, medium: fast}, max_minutes=minutes)
    assert network == preset("medium", 32, 32)
    network, took, _, timed = choose(monkeypatch, 2_000, {small: 0.01, medium: slow}, max_minutes=minutes)
    assert network == preset("small", 32, 32) and took == 0.01 and timed == [small, medium]
    # With few images a larger network has nothing to learn from, however long the run.
    network, *_ = choose(monkeypatch, 300, {small: 0.01}, max_minutes=1e4)
    assert network == preset("small", 32, 32)


def test_without_a_limit_in_time_nothing_is_timed(monkeypatch):
    first = choose(monkeypatch, 300, {})
    assert first[1] is None and first[3] == [] and first[0] == choose(monkeypatch, 300, {})[0]
    assert choose(monkeypatch, 300, {}, max_steps=500)[0] == preset("small", 32, 32)
    assert choose(monkeypatch, 300, {}, network="medium")[0] == preset("medium", 32, 32)


def test_seconds_of_a_step_are_measured():
    config = TrainConfig(batch_size=4, micro_batches=2, max_minutes=1)
    design = make_design("bernoulli", image_shape=(1, 16, 16), keep=0.5)
    mask = design.sample(8, rng())
    source = source_of((Masking(mask, (1, 16, 16), design), mask * blobs(8), 0.1))
    network = NetworkConfig(channels=(8,), norm_groups=4, head_channels=8)
    assert 0 < auto.step_seconds(config, network, source, CPU) < 60


def test_levels_are_dense_just_above_the_noise():
    clean, loud = (source_of(noisy(200, sigma=s)) for s in (0.01, 0.3))
    assert clean.data_std == pytest.approx(loud.data_std, rel=0.1) and loud.data_std == pytest.approx(
        0.33, rel=0.1
    )
    assert (auto.levels(clean).mean, auto.levels(loud).mean) == (-0.5, -1.0)


@pytest.mark.parametrize(("name", "rate"), [("small", 0.006), ("medium", 0.003), ("large", 0.0015)])
def test_rates_of_the_presets(name, rate):
    assert auto.learning_rate(preset(name, 32, 32)) == rate
    assert auto.learning_rate(NetworkConfig(channels=(16,))) == 0.006
    assert auto.learning_rate(NetworkConfig(kind="mlp")) == 0.001


# -- the run ------------------------------------------------------------------------------------------------


def test_what_was_chosen_is_written_as_explicit_settings(tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(max_steps=2, device="cpu", checkpoint_minutes=10)
    fit(noisy(), config, out=out, progress=False)
    written = TrainConfig.load(out / "config.json")
    assert not written.open_settings and written == explicit_config(noisy(), config)[0]
    assert written.network == preset("small", 16, 16) and written.augmentations == FLIPS
    chosen = json.loads((out / "run.json").read_text())["chosen"]
    assert set(chosen["settings"]) == set(TrainConfig.OPEN) and "network small" in chosen["because"]

    again = tmp_path / "again"
    fit(noisy(), written, out=again, progress=False)
    assert "chosen" not in json.loads((again / "run.json").read_text())
    ours, theirs = ((f / "prior" / "weights.safetensors").read_bytes() for f in (out, again))
    assert ours == theirs


def test_a_resumed_run_takes_what_was_chosen(tmp_path, monkeypatch):
    out = tmp_path / "run"
    config = TrainConfig(max_steps=2, device="cpu", learning_rate=7e-4)
    fit(noisy(), config, out=out, progress=False)
    before = TrainConfig.load(out / "config.json")
    monkeypatch.setattr(auto, "learning_rate", lambda network: 0.5)  # a machine that would choose otherwise
    monkeypatch.setattr(
        auto, "preset", lambda *_: NetworkConfig(channels=(8,), norm_groups=4, head_channels=8)
    )
    fit(noisy(), dataclasses.replace(config, max_steps=3), out=out, resume=True, progress=False)
    assert TrainConfig.load(out / "config.json") == dataclasses.replace(before, max_steps=3)
    with pytest.raises(InputError, match="network"):
        fit(noisy(), dataclasses.replace(config, network="large"), out=out, resume=True, progress=False)


def test_the_moved_end_and_the_closing_line_are_said(tmp_path, capsys):
    out = tmp_path / "run"
    fit(noisy(), TrainConfig(max_steps=2, device="cpu"), out=out)
    said = " ".join(capsys.readouterr().err.split())
    assert "chosen: network small" in said and "later end" not in said
    assert "2 steps are few for 40 images" in said and "--resume --max-steps" in said
    fit(noisy(), TrainConfig(max_steps=4, device="cpu"), out=out, resume=True)
    assert "resumed at step 2 with a later end" in " ".join(capsys.readouterr().err.split())


def test_a_stage_by_itself_needs_a_network_of_numbers():
    assert TrainConfig().explicit().network == NetworkConfig()
    with pytest.raises(InputError, match="NetworkConfig"):
        TrainConfig(network="small").explicit()  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"network": "huge"}, {"augmentations": "all"}, {"learning_rate": "fast"}])
def test_other_words_are_refused_with_those_that_exist(values):
    with pytest.raises(InputError, match="auto"):
        TrainConfig.from_dict(values)
    with pytest.raises(InputError, match="auto"):
        TrainConfig(**values)


# -- the command line ----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    _, y, sigma = noisy()
    shape = (1, 16, 16)
    options = {"noise_std": sigma, "operator": "identity", "image_shape": shape}
    return write_measurements(tmp_path / "m.h5", measurements=y.numpy(), mask=None, **options)


def printed(capsys, *words) -> TrainConfig:
    capsys.readouterr()
    assert main(["train", *map(str, words), "--print-config"]) == 0
    return TrainConfig.from_dict(json.loads(capsys.readouterr().out))


def test_print_config_prints_every_setting_and_trains_nothing(file, tmp_path, capsys):
    config = printed(capsys, file)
    assert not config.open_settings and [p.name for p in tmp_path.iterdir()] == ["m.h5"]
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert printed(capsys, file, "--config", tmp_path / "c.json") == config


def test_flags_win_over_the_file(file, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        "batch_size: 3\nlearning_rate: 0.5\nnetwork: {channels: [48]}\naugmentations: [gain]\nseed: 4\n"
    )
    base = ("--config", tmp_path / "c.yaml")
    config = printed(capsys, file, *base)
    assert (config.batch_size, config.learning_rate, config.seed) == (3, 0.5, 4)
    assert config.network.channels == (48,) and config.augmentations == ("gain",)
    flags = ("--batch-size", 5, "--lr", 0.25, "--preset", "medium", "--precision", "bf16", "--seed", 6)
    config = printed(capsys, file, *base, *flags, "--augmentations", "none")
    assert (config.batch_size, config.learning_rate, config.seed) == (5, 0.25, 6)
    assert config.network == preset("medium", 16, 16) and config.augmentations == ()
    assert config.precision == "bf16"
    config = printed(capsys, file, *base, "--channels", 16, 32, "--augmentations", "auto")
    assert config.network == NetworkConfig(channels=(16, 32)) and config.augmentations == FLIPS


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("--preset small --channels 16 32 --out r", "either --preset or --channels"),
        ("--augmentations none gain --out r", "--augmentations: expected names, or none, or auto"),
        ("--augmentations turn --out r", "augmentations: expected names among"),
        ("--channels 15 --out r", "divisible by norm_groups"),
        ("--lr 0 --out r", "learning_rate: expected a value > 0"),
        ("--batch-size 0 --out r", "batch_size: expected a value > 0"),
        ("", "--out: expected a run folder"),
    ],
)
def test_wrong_flags_are_one_line(file, words, fragment, capsys):
    assert main(["train", str(file), *words.split()]) == 2
    said = capsys.readouterr().err
    assert fragment in said and len(said.strip().splitlines()) == 1


def test_a_preset_trains(file, tmp_path):
    assert (
        main(["train", str(file), "--out", str(tmp_path / "r"), "--preset", "small", "--max-steps", "1"]) == 0
    )
    prior = load_prior(tmp_path / "r")
    assert isinstance(prior, NetworkPrior) and prior.config.network == preset("small", 16, 16)


def test_the_command_line_reads_its_flags_without_torch():
    assert parse(["train", "m.h5", "--out", "r", "--channels", "16", "32"]).channels == (16, 32)


def test_several_processes_share_one_choice(monkeypatch):
    """Batches are a multiple of the shares, and the choice is the main process's."""
    accelerator = make_accelerator("cpu")
    source = source_of(noisy())
    config = TrainConfig(micro_batches=3, max_steps=5)
    assert auto.settle(config, source, accelerator).config.batch_size == 18

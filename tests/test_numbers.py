"""Numbers that people and files give: finite, and of a size that single precision can square."""

from __future__ import annotations

import dataclasses
import json
import shutil

import h5py
import numpy as np
import pytest
import torch

from ambient_sci.cli import main
from ambient_sci.commands import COMMANDS
from ambient_sci.data import MeasurementFile, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.numbers import check_numbers, number_in_range
from ambient_sci.priors import NetworkConfig, NetworkPrior, load_prior
from ambient_sci.training import TrainConfig

HUGE = (1e308, 1e19, float("inf"), float("nan"), 10**400)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e18, 1e-18, 0, 2**31 - 1, True])
def test_numbers_in_range(value):
    assert number_in_range(value, "x") is None


@pytest.mark.parametrize("value", [*HUGE[:4], -1e19, 1e-19, 2**31, 10**400])
def test_numbers_out_of_range(value):
    assert number_in_range(value, "x") is not None


@pytest.mark.parametrize("value", [*HUGE[:4], -1e19, 2**63, 10**400])
def test_numbers_anywhere_in_a_description(value):
    check_numbers({"a": {"b": [0, 1e-20]}, "about": {"licence": value}}, "f.json")
    with pytest.raises(InputError, match="f.json: a.b\\[1\\]: expected"):
        check_numbers({"a": {"b": [0, value]}}, "f.json")


def test_a_number_of_single_precision_squares():
    largest, smallest = torch.tensor(1e18), torch.tensor(1e-18)
    assert torch.isfinite(100 * largest**2) and smallest**2 > 0
    assert not torch.isfinite((100 * largest) ** 2)


def numeric_settings(kind: type, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of the settings of a configuration that are numbers by default."""
    found = []
    for field in dataclasses.fields(kind):
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(value):
            found += numeric_settings(type(value), (*prefix, field.name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append((*prefix, field.name))
    return found


@pytest.mark.parametrize("path", numeric_settings(TrainConfig), ids=".".join)
@pytest.mark.parametrize("value", HUGE, ids=str)
def test_a_setting_out_of_range_is_refused_by_name(path, value):
    settings = {}
    inner = settings
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    with pytest.raises(InputError, match=path[-1] if path[0] != "network" else "network"):
        TrainConfig.from_dict(json.loads(json.dumps(settings)))


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_out_of_range_is_refused_by_name(name, capsys):
    """Every option that is a number, of every command; needed ones are made up."""
    kind = COMMANDS[name]
    needed = {"default": dataclasses.MISSING, "default_factory": dataclasses.MISSING}
    words = []
    for field in dataclasses.fields(kind):
        if all(getattr(field, k) is v for k, v in needed.items()):
            number = (
                field.type in ("int", "float") or "int," in str(field.type) or "float," in str(field.type)
            )
            option = (
                []
                if "Positional" in str(field.type) or "Argument" in str(field.type)
                else ["--" + field.name.replace("_", "-")]
            )
            words += [*option, "identity" if field.name == "operator" else "1" if number else "x"]
    numbers = [
        f.name
        for f in dataclasses.fields(kind)
        if isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
    ]
    for field in numbers:
        option = "--" + field.replace("_", "-")
        for value in ("1e308", "nan") if isinstance(getattr(kind, field), float) else (str(2**63),):
            assert main([*name.split(), *words, option, value]) == 2
            said = capsys.readouterr().err
            assert option in said and said.count("\n") == 1, said


def test_descriptions_out_of_range(tmp_path):
    prior = NetworkPrior((1, 4, 4), 1.0, network=NetworkConfig(kind="mlp", channels=(8,)))
    prior.save(tmp_path / "p")
    text = json.loads((tmp_path / "p" / "prior.json").read_text())
    (tmp_path / "p" / "weights.safetensors").rename(tmp_path / "w")
    from safetensors.torch import load_file, save_file

    save_file(
        load_file(tmp_path / "w"), tmp_path / "p" / "weights.safetensors"
    )  # of before there were digests
    text.pop("tensors")
    places = []

    def walk(value, path):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, (*path, k))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            places.append(path)

    walk(text, ())
    assert len(places) > 5
    for path in [*places, ("sigma_max",)]:
        for value in HUGE[:4]:
            changed = json.loads(json.dumps(text))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value
            (tmp_path / "p" / "prior.json").write_text(json.dumps(changed))
            with pytest.raises(InputError, match="prior"):
                load_prior(tmp_path / "p")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 1e300), ("scale", 1e-300), ("noise_std", 1e30), ("noise_std", np.inf), ("geometry", '{"volumes": [{"affine": [[1e400]]}]}'), ("step", np.inf)],
)  # fmt: skip
def test_measurement_files_out_of_range(name, value, tmp_path):
    path = write_measurements(
        tmp_path / "m.h5", measurements=np.zeros((2, 1, 2, 2), np.uint8), mask=None, noise_std=0.1,
        operator="identity", image_shape=(1, 2, 2), dtype="uint8",
    )  # fmt: skip
    shutil.copy(path, tmp_path / "good.h5")
    with h5py.File(path, "a") as file:
        del file.attrs["verified"]
        if name == "noise_std":
            file[name][...] = value
        else:
            file.attrs[name] = value
    with pytest.raises(InputError, match=f"m.h5.*{name}"):
        MeasurementFile(path)
    MeasurementFile(tmp_path / "good.h5").close()

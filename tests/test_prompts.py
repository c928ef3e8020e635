"""Prompts that data carry: stored once, read where they are asked for, told to the network, dropped, and part of what a run is."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from accelerate import Accelerator

from ambient_sci.data import MeasurementArrays, MeasurementFile, MeasurementFiles, write_measurements
from ambient_sci.data.prompts import Prompts
from ambient_sci.data.survey import fingerprint
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import Prompt
from ambient_sci.randomness import seeded
from ambient_sci.training import TrainConfig
from ambient_sci.training.batches import Batches
from ambient_sci.training.source import open_source

INDEX = torch.tensor([1, 0, 1, 2, 2, 0])


def prompts(dtype: torch.dtype = torch.float16, index: torch.Tensor = INDEX) -> Prompts:
    tokens = torch.randn(3, 5, 4, generator=seeded(1)).to(dtype)
    pooled = torch.randn(3, 2, generator=seeded(2)).to(dtype)
    return Prompts(tokens, index, pooled, torch.arange(len(index) * 6.0).reshape(-1, 6))


def images() -> torch.Tensor:
    return torch.randn(6, 1, 8, 8, generator=seeded(3))


def written(path: Path, told: Prompts | None) -> Path:
    return write_measurements(
        path,
        measurements=images(),
        mask=None,
        noise_std=0.3,
        operator="identity",
        image_shape=(1, 8, 8),
        prompts=told,
    )


def same(a: Prompt, b: Prompt) -> bool:
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_holds_each_text_once_and_gives_each_sample_its_own(tmp_path, dtype):
    told = prompts(dtype)
    file = MeasurementFile(written(tmp_path / "a.h5", told))
    assert file.trusted
    with h5py.File(tmp_path / "a.h5") as raw:
        assert raw["prompt_tokens"].shape == (3, 5, 4)
    for rows in ([4, 0, 0, 3], [5], None):
        expected = told[torch.arange(6) if rows is None else torch.tensor(rows)]
        found = file.prompts(rows)
        assert found is not None and found.tokens.dtype == dtype and same(found, expected)
        assert same(MeasurementArrays.read(file).prompts(rows), expected)
    assert MeasurementFile(written(tmp_path / "b.h5", None)).prompts([0]) is None


def test_several_files_are_one(tmp_path):
    both = MeasurementFiles(
        [written(tmp_path / "a.h5", prompts()), written(tmp_path / "b.h5", prompts(index=INDEX.flip(0)))]
    )
    rows = [11, 2, 7, 0]
    one, other = prompts(), prompts(index=INDEX.flip(0))
    expected = [other[[5]], one[[2]], other[[1]], one[[0]]]
    found = both.prompts(rows)
    assert all(same(found[k : k + 1], expected[k]) for k in range(4))
    assert same(MeasurementArrays.read(both).prompts(rows), found)
    with pytest.raises(InputError, match="prompts"):
        MeasurementFiles([tmp_path / "a.h5", written(tmp_path / "c.h5", None)])


def test_a_flipped_bit_in_a_text_is_refused(tmp_path):
    path = written(tmp_path / "a.h5", prompts())
    with h5py.File(path, "r+") as raw:
        raw["prompt_tokens"][1, 0, 0] += 1
    with pytest.raises(InputError, match="prompt_tokens: sample 1 is not what was written"):
        MeasurementFile(path).prompts([0])


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="a text from 0 to 2"):
        prompts(index=torch.tensor([0, 3]))
    with pytest.raises(InputError, match="expected 6, one a sample, got 5"):
        written(tmp_path / "a.h5", prompts(index=INDEX[:5]))
    assert not (tmp_path / "a.h5").exists()
    with pytest.raises(InputError, match="NaN"):
        Prompts(torch.full((1, 2, 2), float("nan")), INDEX * 0)
    with pytest.raises(InputError, match="one a sample"):
        MeasurementArrays(Identity((1, 8, 8)), images(), 0.3, prompts=prompts(index=INDEX[:2]))


@pytest.mark.parametrize("resident", [True, False])
def test_batches_tell_each_sample_its_prompt_and_drop_some(tmp_path, resident, monkeypatch):
    if not resident:
        monkeypatch.setattr("ambient_sci.data.loader.CACHE_BYTES", 0)
        monkeypatch.setattr("ambient_sci.training.given_data.CACHE_BYTES", 0)
    path, told = written(tmp_path / "a.h5", prompts()), prompts()
    for drop in (0.0, 1.0, 0.5):
        config = TrainConfig(batch_size=4, drop_labels=drop, augmentations=(), seed=3)
        batches = Batches(open_source(str(path), config), config, Accelerator(cpu=True))
        zeros = 0
        for step in range(20):
            drawn, expected = batches.draw(step), told[torch.tensor(batches.indices(step))]
            kept = (drawn.given.tokens != 0).flatten(1).any(1)
            zeros += int((~kept).sum())
            assert same(drawn.given, expected.dropped(~kept))
            assert same(drawn.rows(torch.tensor([2, 0])).given, drawn.given[torch.tensor([2, 0])])
        batches.close()
        assert zeros == {0.0: 0, 1.0: 80}.get(drop, zeros) and (drop != 0.5 or 20 < zeros < 60)


def test_a_run_of_other_prompts_is_another_run(tmp_path):
    one, other = prompts(), prompts(index=INDEX.flip(0))
    found = [
        fingerprint(MeasurementArrays(Identity((1, 8, 8)), images(), 0.3, prompts=told))
        for told in (one, other, None)
    ]
    assert found[0] != found[1] and "prompts" not in found[2]

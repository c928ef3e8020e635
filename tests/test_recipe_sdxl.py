"""The SDXL recipe on a tiny SDXL that is made offline: latents, training, adapters both ways, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ambient_sci.data import MeasurementFile, write_images
from ambient_sci.errors import InputError
from ambient_sci.priors import LoraPrior, Prompt, load_prior
from ambient_sci.priors.lora_files import FILE, read_lora, write_lora
from ambient_sci.randomness import seeded
from recipes.sdxl import generate, latents, model, pictures, tiny, train

pytest.importorskip("diffusers")
pytest.importorskip("peft")
IMAGES = torch.rand(6, 3, 16, 16, generator=seeded(1)) * 2 - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny SDXL, images, captions and latents noised at t = 500."""
    folder = tmp_path_factory.mktemp("sdxl")
    weights = tiny.write(folder / "tiny")
    images = write_images(folder / "images.h5", images=IMAGES)
    captions = folder / "captions.txt"
    captions.write_text("a face\na boat\na face\n\na boat\na cat\n")
    data = latents.write(weights, images, folder / "500.h5", 500, captions=captions)
    pipeline = model.load_pipeline(weights)
    return SimpleNamespace(
        folder=folder, weights=weights, images=images, captions=captions, data=data, pipeline=pipeline
    )


def arguments(made, out: Path, *more: str) -> list[str]:
    given = ["--weights", str(made.weights), "--data", str(made.data), "--out", str(out), "--device", "cpu"]
    settings = ["--batch", "2", "--precision", "fp32", "--learning-rate", "0.01", "--validation", "0"]
    return [*given, *settings, "--base", str(made.folder / "base"), *more]


@pytest.fixture(scope="module")
def trained(made):
    return train.main(arguments(made, made.folder / "run", "--steps", "4"))


def inputs(pipeline, batch: int = 2):
    """State, time and conditions, as the network of a pipeline takes them."""
    x = torch.randn(batch, 4, 8, 8, generator=seeded(5))
    tokens, pooled = model.embedded(pipeline, ["a cat", "a boat", "a hat"][:batch])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * batch)}
    return x, torch.tensor(437), tokens, added


@torch.no_grad()
def answer(network, x, t, tokens, added):
    return network(x, t, encoder_hidden_states=tokens, added_cond_kwargs=added).sample


def same_bits(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# -- latents ---------------------------------------------------------------------------------------------------


def test_latents_are_encoded_and_noised_once(made):
    """y = z + sigma_n n with the same z and n whatever the level, batch or number of images; prompts once."""
    paths = {
        t: latents.write(
            made.weights, made.images, made.folder / f"l{t}.h5", t, captions=made.captions, batch=b
        )
        for t, b in ((0, 1), (100, 4), (800, 6))
    }
    y = {t: MeasurementFile(path).measurements() for t, path in (paths | {500: made.data}).items()}
    levels = {0: 0.0, 100: 0.344, 500: 1.62, 800: 5.11}
    noise = (y[800] - y[0]) / float(MeasurementFile(paths[800]).noise_std[0])
    assert abs(float(noise.std()) - 1) < 0.1
    for t, stored in y.items():
        sigma = float((MeasurementFile(made.data) if t == 500 else MeasurementFile(paths[t])).noise_std[0])
        assert sigma == pytest.approx(levels[t], abs=0.006)
        assert torch.allclose(stored, y[0] + sigma * noise, atol=1e-5)
    file = MeasurementFile(made.data)
    told = file.all_prompts()
    assert told is not None and told.tokens.shape == (4, 77, 64) and told.index.tolist() == [0, 1, 0, 2, 1, 3]
    assert not told.tokens[2].any() and told.tokens[[0, 1, 3]].flatten(1).any(1).all()
    assert told.time_ids[0].tolist() == [16, 16, 0, 0, 16, 16]
    about = json.loads(file.attributes["made_of"])
    assert about["resolution"] == [16, 16] and about["seed"] == 0 and len(about["images"]) == 32
    assert "noised once at t = 500" in file.history and "4 different prompts" in file.history


def test_prompts_are_those_of_the_pipeline(made):
    tokens, pooled = model.embedded(made.pipeline, ["a face", "a boat"])
    expected = made.pipeline.encode_prompt("a boat", do_classifier_free_guidance=False)
    assert torch.allclose(tokens[1], expected[0][0], atol=1e-5)
    assert torch.allclose(pooled[1], expected[2][0], atol=1e-5)


def test_mirrored_images_take_the_place_of_the_plain_ones(made):
    def clean(images, flips):
        source = write_images(made.folder / f"f{flips}.h5", images=images, overwrite=True)
        return MeasurementFile(
            latents.write(made.weights, source, made.folder / "f.h5", 0, flips=flips, overwrite=True)
        )

    flipped = clean(IMAGES, True)
    plain, mirrored = clean(IMAGES, False).measurements(), clean(IMAGES.flip(-1), False).measurements()
    which = [bool(torch.equal(a, b)) for a, b in zip(flipped.measurements(), plain, strict=True)]
    turned = [bool(torch.equal(a, b)) for a, b in zip(flipped.measurements(), mirrored, strict=True)]
    assert turned == [not w for w in which] and 0 < sum(turned) < 6


# -- training --------------------------------------------------------------------------------------------------


def test_a_run_trains_the_adapter_alone_and_resumes_to_the_bit(made, trained, monkeypatch):
    assert isinstance(trained, LoraPrior) and same_bits(trained, load_prior(made.folder / "run"))
    weights = {k.replace(".base_layer", ""): t for k, t in trained.base.network.model.state_dict().items()}
    assert all(torch.equal(t, weights[k]) for k, t in made.pipeline.unet.state_dict().items())
    moved = [t for k, t in trained.state_dict().items() if "lora_B" in k]
    assert moved and all(t.any() for t in moved)
    assert all(k.split(".lora_")[0].endswith(model.TARGETS) for k in trained.state_dict() if "lora_" in k)
    out = made.folder / "halves"
    with pytest.raises(KeyboardInterrupt):
        interrupted(made, out, monkeypatch)
    monkeypatch.undo()
    assert same_bits(trained, train.main(arguments(made, out, "--steps", "4", "--resume")))


def interrupted(made, out, monkeypatch):
    """Steps 0 and 1, with a checkpoint after each."""
    from ambient_sci.training.batches import Batches

    draw = Batches.draw

    def ends(self, step, part=0):
        if step == 2:
            raise KeyboardInterrupt
        return draw(self, step, part)

    monkeypatch.setattr(Batches, "draw", ends)
    train.main(arguments(made, out, "--steps", "4", "--checkpoint-minutes", "0"))


def test_v_prediction_and_accumulation(made, tmp_path):
    weights = tiny.write(tmp_path / "tiny", "v_prediction")
    assert model.prior_of(model.load_pipeline(weights), (4, 8, 8)).prediction == "v"
    common = ["--weights", str(weights), "--base", str(tmp_path / "base"), "--steps", "2"]
    prior = train.main(arguments(made, tmp_path / "run", *common, "--accumulation", "2"))
    assert prior.base.prediction == "v" and same_bits(prior, load_prior(tmp_path / "run"))


def test_consistency_is_reachable_and_counts(made, trained):
    """Joint: the weights move with it from the step at which it begins, and not before; staged: two adapters."""
    runs = {
        kick: train.main(
            arguments(
                made, made.folder / f"joint{kick}", "--steps", "4", "--consistency", "joint",
                "--consistency-weight", "0.015", "--kick-in", str(kick), "--walk", "1",
            )
        )
        for kick in (0, 99)
    }  # fmt: skip
    assert not same_bits(runs[0], runs[99])
    staged = train.main(
        arguments(
            made, made.folder / "staged", "--steps", "2", "--consistency", "staged", "--second-steps", "2",
            "--validation", "2", "--sampler-steps", "2",
        )
    )  # fmt: skip
    assert staged.sigma_n == pytest.approx(1.618, abs=0.001)
    for name in ("adapter", "adapter-below"):
        assert (made.folder / "staged" / name / FILE).is_file()
    assert (made.folder / "staged" / "validation.png").stat().st_size > 500


def test_bf16_and_checkpointing(made, tmp_path):
    """The base in bfloat16, the adapter in float32; activations computed twice give the same gradients."""
    common = ["--steps", "2", "--precision", "bf16", "--base", str(tmp_path / "base")]
    one = train.main(arguments(made, tmp_path / "one", *common))
    two = train.main(arguments(made, tmp_path / "two", *common, "--checkpointing"))
    types = {"lora_" in k: t.dtype for k, t in one.state_dict().items()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert same_bits(one, two)
    assert same_bits(one, load_prior(tmp_path / "one"))


# -- adapters --------------------------------------------------------------------------------------------------


def test_a_trained_adapter_serves_a_plain_pipeline(made, trained):
    given = inputs(made.pipeline)
    plain = model.load_pipeline(made.weights)
    before = answer(plain.unet, *given)
    plain.load_lora_weights(str(made.folder / "run" / "adapter"))
    after = answer(plain.unet, *given)
    assert torch.allclose(after, answer(trained.base.network.model, *given), atol=1e-6)
    assert float((after - before).abs().max()) > 1e-3


def test_alpha_is_part_of_what_is_written(made, tmp_path):
    """alpha = 3 rank: a reader that knows nothing of alpha still answers the same."""
    base = model.prior_of(model.load_pipeline(made.weights), (4, 8, 8))
    prior = randomised(LoraPrior(base, rank=2, alpha=6, targets=model.TARGETS))
    write_lora(prior, tmp_path)
    plain, given = model.load_pipeline(made.weights), inputs(made.pipeline)
    plain.load_lora_weights(str(tmp_path))
    assert torch.allclose(answer(plain.unet, *given), answer(base.network.model, *given), atol=1e-5)
    again = read_lora(model.prior_of(model.load_pipeline(made.weights), (4, 8, 8)), tmp_path)
    assert torch.allclose(
        answer(again.base.network.model, *given), answer(base.network.model, *given), atol=1e-5
    )
    with pytest.raises(InputError, match="exists"):
        write_lora(prior, tmp_path)


def randomised(prior):
    with torch.no_grad():
        for k, p in enumerate(p for p in prior.parameters() if p.requires_grad):
            p.copy_(0.2 * torch.randn(p.shape, generator=seeded(7, k)))
    return prior


@pytest.mark.parametrize("alpha", [2, 5])
def test_an_adapter_of_a_plain_pipeline_is_read(made, tmp_path, alpha):
    from peft import LoraConfig, get_peft_model_state_dict

    plain, given = model.load_pipeline(made.weights), inputs(made.pipeline)
    settings = LoraConfig(r=2, lora_alpha=alpha, target_modules=["to_q", "to_v"])
    plain.unet.add_adapter(settings)
    randomised(plain.unet)
    plain.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=get_peft_model_state_dict(plain.unet),
        unet_lora_adapter_metadata=settings.to_dict(),
    )
    prior = read_lora(model.prior_of(model.load_pipeline(made.weights), (4, 8, 8)), tmp_path)
    assert prior.alpha == alpha
    assert torch.allclose(answer(prior.base.network.model, *given), answer(plain.unet, *given), atol=1e-6)


def test_an_adapter_of_another_base_is_refused(made, trained, tmp_path):
    other = shutil.copytree(made.weights, tmp_path / "tiny")
    shutil.rmtree(other / "unet")
    shutil.copytree(tiny.write(tmp_path / "one", seed=1) / "unet", other / "unet")
    with pytest.raises(InputError, match="expected the network of"):
        train.main(arguments(made, tmp_path / "run", "--weights", str(other)))
    base = model.prior_of(model.load_pipeline(made.weights), (4, 8, 8))
    tensors = {"unet.mid_block.no_such.to_q.lora_A.weight": torch.zeros(2, 4)}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match="adapter"):
        read_lora(base, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"expected an adapter's safetensors file"):
        read_lora(base, tmp_path / "nothing")


# -- pictures --------------------------------------------------------------------------------------------------


def test_pictures_of_a_run_and_of_its_adapter_are_the_same(made, trained, tmp_path):
    run = made.folder / "run"

    def drawn(name, *more):
        given = ["--weights", str(made.weights), "--out", str(tmp_path / name), "--precision", "fp32"]
        settings = ["--steps", "3", "--prompt", "a cat", "a boat", "--num", "1", "--device", "cpu"]
        out = generate.main([*given, *settings, *more])
        return np.asarray(Image.open(out / "sheet.png")).astype(int), out

    one, out = drawn("run", "--run", str(run))
    assert one.shape == (16, 32, 3)
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "generate.json", "sheet.png"]
    other, _ = drawn("adapter", "--adapter", str(run / "adapter"))
    plain, _ = drawn("plain")
    assert abs(one - other).max() <= 1 < abs(one - plain).max()
    cut, out = drawn("cut", "--run", str(run), "--truncate-at", "500", "--guidance", "3")
    about = json.loads((out / "generate.json").read_text())
    assert about["sigma_min"] == pytest.approx(1.618, abs=0.001) and about["prompts"] == ["a cat", "a boat"]
    assert abs(one - cut).max() > 1
    with pytest.raises(InputError, match="multiple of 2"):
        drawn("odd", "--size", "15")
    with pytest.raises(InputError, match="a run or an adapter, got both"):
        drawn("both", "--run", str(run), "--adapter", str(run / "adapter"))


def test_the_last_step_is_guided_like_every_other(made, trained):
    """One step: D(x) + w (D(x, prompt) - D(x)), with the empty prompt of zeros; drawn alone or together."""
    tokens, pooled = model.embedded(made.pipeline, ["a cat", "a boat", "a hat"])
    told = Prompt(tokens, pooled, torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3))
    calls = []

    def watched(x, sigma, given=None):
        calls.append((x.clone(), sigma, given))
        return LoraPrior.forward(trained, x, sigma, given)

    with torch.no_grad():
        trained.forward = watched
        one = pictures.draw(trained, told, steps=2, guidance=4.0, sigma_min=1.5, batch=3, generator=seeded(2))
        del trained.forward
        x, sigma, given = calls[-1]
        assert len(x) == 6 and torch.allclose(torch.as_tensor(sigma).float().max(), torch.tensor(1.5))
        free, full = given.dropped(torch.ones(6, dtype=torch.bool))[:3], told
        expected = trained(x[:3], 1.5, free) + 4 * (trained(x[:3], 1.5, full) - trained(x[:3], 1.5, free))
        assert torch.allclose(one, expected, atol=1e-4)
        alone = pictures.draw(trained, told, steps=2, guidance=4.0, sigma_min=1.5, generator=seeded(2))
    assert torch.allclose(one, alone, atol=1e-4)


# -- errors ----------------------------------------------------------------------------------------------------


def test_errors_say_what_was_expected(made, tmp_path):
    def write(**changed):
        options = {"weights": made.weights, "images": made.images, "out": tmp_path / "l.h5", "t_n": 500}
        return latents.write(**(options | changed))

    with pytest.raises(InputError, match="hf download stabilityai"):
        write(weights=tmp_path)
    with pytest.raises(InputError, match="from 0 \\(clean\\) to 999, got 1000"):
        write(t_n=1000)
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    with pytest.raises(InputError, match="expected 6 lines, one an image, got 2"):
        write(captions=few)
    bright = write_images(tmp_path / "bright.h5", images=IMAGES * 100)
    with pytest.raises(InputError, match=r"values in \[-1, 1\]"):
        write(images=bright)
    scaled = tiny.write(tmp_path / "scaled")
    config = json.loads((scaled / "vae" / "config.json").read_text())
    (scaled / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13}))
    with pytest.raises(InputError, match="scaling_factor 0.13"):
        write(weights=scaled)
    with pytest.raises(InputError, match="of the autoencoder in"):
        train.main(arguments(made, tmp_path / "run", "--weights", str(scaled)))
    assert not (tmp_path / "l.h5").exists()

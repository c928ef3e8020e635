"""Scores by their definitions, distances of known value, figures and reports whole or not at all."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from ambient_sci.data import write_images, write_measurements
from ambient_sci.errors import InputError
from ambient_sci.evaluation import (
    calibration_figure,
    distribution_distances,
    energy_distance,
    evaluate,
    format_table,
    frechet_distance,
    kernel_distance,
    magnitude,
    nrmse,
    psnr,
    reconstruction_figure,
    reconstruction_table,
    sliced_wasserstein,
    ssim,
    tissue_white,
    volume_peak,
    with_truth,
)
from ambient_sci.operators import MRI
from ambient_sci.priors import GaussianPrior
from ambient_sci.sampling import Reconstruction

SIZE, SIGMA = 12, 0.1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- scores ------------------------------------------------------------------------------------------------


def test_scores_are_of_the_magnitude_whatever_the_phase():
    x = noise(3, 2, 16, 16)
    turned = torch.stack([-x[:, 1], x[:, 0]], 1)
    assert float(nrmse(turned, x).max()) < 1e-12
    torch.testing.assert_close(ssim(turned, x, 1.0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(magnitude(x), x.square().sum(1, keepdim=True).sqrt())
    assert magnitude(-x[:, :1]).min() >= 0


def test_psnr_and_nrmse_by_hand():
    reference = torch.full((2, 1, 8, 8), 0.5)
    estimate = reference + torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        psnr(estimate, reference, 1.0), torch.tensor([20.0, 40.0]).double(), atol=1e-4, rtol=0
    )
    doubled = psnr(estimate, reference, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(
        doubled - psnr(estimate, reference, 1.0), torch.full((2,), 6.0206).double(), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        nrmse(estimate, reference), torch.tensor([0.2, 0.02]).double(), atol=1e-5, rtol=0
    )


def test_ssim_is_the_published_formula():
    """Written out with numpy, edges reflected; its data range is the peak."""
    a, b = noise(1, 1, 12, 12, seed=1).abs(), noise(1, 1, 12, 12, seed=2).abs()
    position = np.arange(11) - 5
    window = np.exp(-(position[:, None] ** 2 + position**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 3.0) ** 2, (0.03 * 3.0) ** 2
    padded = [np.pad(v[0, 0].numpy(), 5, mode="reflect") for v in (a, b)]
    scores = []
    for i, j in np.ndindex(12, 12):
        x, y = (v[i : i + 11, j : j + 11] for v in padded)
        mx, my = (window * x).sum(), (window * y).sum()
        vx, vy = (window * x * x).sum() - mx**2, (window * y * y).sum() - my**2
        c = (window * x * y).sum() - mx * my
        scores.append((2 * mx * my + c1) * (2 * c + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert float(ssim(a, b, 3.0)) == pytest.approx(np.mean(scores), abs=1e-6)
    torch.testing.assert_close(ssim(2 * a, 2 * b, 6.0), ssim(a, b, 3.0))


def test_peak_is_the_percentile_of_the_whole_volume():
    x = noise(5, 2, 16, 16)
    assert volume_peak(x) == pytest.approx(np.percentile(magnitude(x).numpy(), 99.9))


def test_the_table_averages_over_people_and_spreads_over_people():
    """Three slices of one person weigh as much as one of another, and slices add nothing to the spread."""
    reference = torch.ones(4, 1, 16, 16, dtype=torch.float64)
    steps = torch.tensor([0.1, 0.1, 0.1, 0.01]).double().reshape(4, 1, 1, 1)
    table = reconstruction_table({"a": reference + steps}, reference, ["p", "p", "p", "q"], peaks=1.0)
    score = table["methods"]["a"]["psnr"]
    assert score["people"] == pytest.approx({"p": 20.0, "q": 40.0})
    assert score["mean"] == pytest.approx(30.0) and score["std"] == pytest.approx(200**0.5)
    assert table["slices"] == {"p": 3, "q": 1}
    assert json.loads(json.dumps(table)) == table


def test_peaks_are_of_each_person_and_can_be_given():
    reference = noise(4, 1, 16, 16).abs()
    reference[2:] *= 7
    estimate = reference * 1.1
    table = reconstruction_table({"a": estimate}, reference, ["p", "p", "q", "q"])
    assert table["peak"]["q"] == pytest.approx(volume_peak(reference[2:]))
    given = reconstruction_table({"a": estimate}, reference, ["p", "p", "q", "q"], {"p": 1.0, "q": 7.0})
    assert given["peak"] == {"p": 1.0, "q": 7.0}
    ones = reconstruction_table({"a": estimate}, reference, ["p", "p", "q", "q"], 1.0)
    louder, plain = (t["methods"]["a"]["psnr"]["people"] for t in (given, ones))
    assert louder["q"] - plain["q"] == pytest.approx(20 * np.log10(7)) and louder["p"] == plain["p"]


def test_one_person_has_no_spread_and_small_images_no_ssim():
    reference = noise(2, 2, 8, 8)
    table = reconstruction_table({"a": 1.1 * reference, "longer name": reference + 1}, reference)
    assert table["methods"]["a"]["psnr"]["std"] is None and "ssim" not in table["methods"]["a"]
    text = format_table(table)
    assert "+-" not in text and "1 person" in text and "SSIM" not in text
    assert "+-" in format_table(reconstruction_table({"a": 1.1 * reference}, reference, ["p", "q"]))


def test_real_images_are_scored_as_they_are():
    """Images of [-1, 1] are not folded at zero; colour images have no magnitude."""
    reference = noise(2, 3, 16, 16)
    assert float(nrmse(-reference, reference)[0]) == pytest.approx(2.0)
    assert float(nrmse(-reference[:, :1], reference[:, :1])[0]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: psnr(x, x[:, :, :8], 1.0), "expected an estimate like the reference"),
        (lambda x: psnr(x, x, 0.0), "expected one positive peak"),
        (lambda x: psnr(x, x, torch.ones(3)), "expected one positive peak"),
        (lambda x: ssim(x[..., :8], x[..., :8], 1.0), "at least 11 x 11"),
        (lambda x: magnitude(x.repeat(1, 2, 1, 1)), "expected images (B, 1, H, W) or (B, 2, H, W)"),
        (lambda x: reconstruction_table({"a": x}, x, ["p"]), "expected 2 subjects"),
        (lambda x: reconstruction_table({"a": x}, x, ["p", "q"], {"p": 1.0}), "expected a peak for 'q'"),
    ],
)
def test_bad_scores_are_refused_in_one_line(call, message):
    with pytest.raises(InputError) as error:
        call(noise(2, 2, 16, 16))
    assert message in str(error.value) and "\n" not in str(error.value)


# -- distances ---------------------------------------------------------------------------------------------


def test_sliced_w2_of_a_shift_is_its_length_over_root_dimension():
    x = noise(500, 6)
    assert sliced_wasserstein(x, x) == 0.0
    shift = torch.zeros(6, dtype=torch.float64)
    shift[2] = 3.0
    assert sliced_wasserstein(x, x + shift, directions=4000) == pytest.approx(3 / 6**0.5, rel=0.05)
    one = noise(400, 1)
    assert sliced_wasserstein(one, 2 * one + 1) == pytest.approx(
        float(((one + 1) ** 2).mean() ** 0.5), rel=1e-9
    )


def test_sliced_w2_of_unequal_numbers_integrates_the_quantile_functions():
    x = noise(60, 4)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0.0, abs=1e-9)
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.0], [3.0]])
    # Quantiles: 0 against 0 on [0, 1/2], 1 against 0 on [1/2, 2/3], 1 against 3 on [2/3, 1].
    assert sliced_wasserstein(a, b) == pytest.approx((1 / 6 + 4 / 3) ** 0.5)


def test_frechet_distance_is_the_matrix_formula():
    from scipy.linalg import sqrtm

    for counts in ((300, 200), (5, 4)):  # full rank, and fewer samples than dimensions
        x, y = noise(counts[0], 8), 0.5 + 2 * noise(counts[1], 8, seed=1) @ noise(8, 8, seed=2)
        cx, cy = np.cov(x.numpy().T), np.cov(y.numpy().T)
        root = np.trace(sqrtm(cx @ cy)).real
        expected = float((x.mean(0) - y.mean(0)).square().sum()) + np.trace(cx) + np.trace(cy) - 2 * root
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-10)


def test_kid_is_unbiased_and_sees_a_shift():
    """Mean over 100 pairs of equal distributions: z below 4."""
    values = [
        kernel_distance(noise(40, 5, seed=2 * k), noise(30, 5, seed=2 * k + 1))["mean"] for k in range(100)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10
    assert min(values) < 0
    shifted = kernel_distance(noise(300, 5), noise(300, 5, seed=1) + 1, subset=100, subsets=20)
    assert shifted["mean"] > 5 * shifted["std"] > 0


def test_kid_is_torchmetrics_kid():
    from torchmetrics.image.kid import poly_mmd

    x, y = noise(50, 6), noise(50, 6, seed=1) + 0.3
    theirs = float(poly_mmd(x, y))
    assert kernel_distance(x, y)["mean"] == pytest.approx(theirs, rel=1e-9)


def test_energy_distance_in_one_dimension():
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    assert energy_distance(a, b) == pytest.approx(2 * 2.5 - 1 - 2)


def test_distances_carry_their_features_and_their_floor():
    images, samples = noise(40, 1, 4, 4), noise(30, 1, 4, 4, seed=1)
    found = distribution_distances(samples, images, lambda x: x.flatten(1)[:, :3], "corner")
    assert {"frechet_on_corner", "kid_on_corner", "sliced_w2"} <= found.keys()
    assert not any("fid" in name.lower() for name in found)
    assert found["between_halves_of_the_reference"]["sliced_w2"] > 0
    assert found["frechet_on_corner"] == pytest.approx(
        frechet_distance(samples.flatten(1)[:, :3], images.flatten(1)[:, :3])
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sliced_wasserstein(x, x[:, :3]),
        lambda x: frechet_distance(x[:1], x),
        lambda x: energy_distance(x[:1], x),
    ],
)
def test_distances_refuse_what_they_cannot_compare(call):
    with pytest.raises(InputError):
        call(noise(10, 4))


# -- figures -----------------------------------------------------------------------------------------------


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_figures_of_any_images(tmp_path, channels, rows):
    x = noise(rows, channels, 16, 16)
    out = reconstruction_figure(
        tmp_path / "a.png", x, {"input": x + 0.1}, mean=1.1 * x, std=0.1 * x.abs(), labels=["p"] * rows
    )
    assert is_png(out) and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    reconstruction_figure(out, x, {}, mean=x)
    reconstruction_figure(out, x, {"input": x})
    assert is_png(out)


def test_error_and_std_are_shown_on_one_scale_and_their_ratio_on_another(tmp_path, monkeypatch):
    """Every map is drawn as it is, the ratio too, and grey images up to the white that was asked for."""
    from matplotlib.axes import Axes

    drawn, plain = [], Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, x, **k: drawn.append((torch.as_tensor(x), k)) or plain(self, x, **k)
    )
    x = noise(2, 2, 16, 16)
    std = torch.full_like(x, 0.5 / 2**0.5)
    std[0, :, 0, 0] = 0
    mean = x + torch.tensor([0.6, 0.8]).reshape(2, 1, 1)  # the error is 1, the spread 0.5
    reconstruction_figure(tmp_path / "a.png", x, {}, mean=mean, std=std, peak=1.0, white=tissue_white(x))
    grey, maps = drawn[:4], drawn[4:]
    assert [k["vmax"] for _, k in grey] == pytest.approx([*tissue_white(x).tolist()] * 2)
    assert maps[0][1]["vmax"] == maps[2][1]["vmax"] and maps[4][1]["vmax"] == 4
    assert torch.allclose(maps[2][0], torch.ones(16, 16), atol=1e-5)
    assert maps[4][0][0, 0] == 0 and torch.allclose(maps[5][0], torch.full((16, 16), 2.0), atol=1e-5)


def test_white_is_the_tissue_and_not_the_brightest():
    image = torch.zeros(1, 1, 20, 20)
    image[..., 5:15, 5:15] = 0.4
    image[..., 5, 5:9] = 1.0  # 4 of 100
    assert float(tissue_white(image)) == pytest.approx(0.4)
    assert tissue_white(torch.zeros(2, 1, 4, 4)).tolist() == [1.0, 1.0]


def test_a_figure_that_fails_leaves_nothing(tmp_path):
    x = noise(2, 2, 16, 16)
    with pytest.raises(InputError):
        reconstruction_figure(tmp_path / "a.png", x, {}, mean=x, std=x[:1])
    assert not list(tmp_path.iterdir())


def test_calibration_figures(tmp_path):
    result = with_truth(noise(6, 10, 3), noise(10, 3, seed=1))
    without = {k: v for k, v in result.items() if k not in ("sbc", "tarp")}
    assert is_png(calibration_figure(tmp_path / "a.png", {"truth": result, "rows": without}))
    assert is_png(calibration_figure(tmp_path / "b.png", {"rows": without}))


# -- reports -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A Gaussian prior, scans of six 12-px complex images of two people, exact posterior samples."""
    folder, shape = tmp_path_factory.mktemp("evaluation"), (2, SIZE, SIZE)
    mode = torch.exp(-torch.arange(SIZE, dtype=torch.float64))
    variance = 0.3 * mode[:, None] * mode + 0.005
    prior = GaussianPrior(torch.zeros(shape, dtype=torch.float64), variance.expand(shape).clone())
    x = prior.sample(6, generator(0))
    mask = torch.ones(6, SIZE, SIZE, dtype=torch.float64)
    mask[:, :, ::3] = 0
    operator = MRI(mask)
    y = operator.A(x)
    y = (y + SIGMA * noise(*y.shape, seed=7)) * operator.mask
    mean, covariance = prior.posterior(operator, y, SIGMA)
    factor = torch.linalg.cholesky(covariance)
    samples = mean + torch.einsum("bij,sbj->sbi", factor, noise(5, 6, 2 * SIZE**2, seed=8)).reshape(
        5, *mean.shape
    )
    people = ["anna"] * 4 + ["ben"] * 2
    result = Reconstruction.from_samples(
        samples.float(), {"sampler": "mmps", "steps": 4, "sigma_min": 0.01, "sigma_max": 3.0, "options": {}}
    )
    result.subjects = people
    result.save(folder / "R.h5")
    as_complex = [torch.complex(v[:, 0], v[:, 1]).to(torch.complex64).numpy() for v in (x, y)]
    write_images(folder / "REF.h5", images=as_complex[0], subjects=people)
    write_measurements(
        folder / "M.h5",
        measurements=as_complex[1],
        mask=mask.numpy().astype(np.uint8),
        noise_std=SIGMA,
        operator="mri",
        image_shape=shape,
        subjects=people,
    )
    more = prior.sample(8, generator(5))
    drawn = torch.complex(more[:, 0], more[:, 1]).to(torch.complex64).numpy()
    write_images(folder / "S.h5", images=drawn, subjects=["generated"] * 8)
    return folder, prior.float()


def test_a_result_against_its_references(files, tmp_path):
    folder, _ = files
    report = evaluate(folder / "R.h5", tmp_path / "out", reference=folder / "REF.h5")
    assert report["scores"]["people"] == ["anna", "ben"]
    assert report["with_truth"]["accepted"] and 0.8 < report["with_truth"]["std_over_error"]["ratio"] < 1.25
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json", "figure.png", "calibration.png"}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert "PSNR" in report["text"] and "calibrated" in report["text"]


def test_a_result_against_its_scans_with_and_without_the_prior(files, tmp_path):
    folder, prior = files
    report = evaluate(folder / "R.h5", tmp_path, calibration=folder / "M.h5")
    assert report["chi_squared"]["accepted"] and "held_out_rows" not in report
    report = evaluate(folder / "R.h5", tmp_path, calibration=folder / "M.h5", prior=prior, overwrite=True)
    assert report["held_out_rows"]["samples"] == 5 and report["held_out_rows"]["measurements"] > 1
    assert "held-out rows" in report["text"] and (tmp_path / "calibration.png").exists()


def test_held_out_rows_are_sampled_as_the_result_was(files, tmp_path, monkeypatch):
    """The same sampler, levels and options as in the result's report, and only from the rows kept."""
    from ambient_sci.evaluation import report

    folder, prior = files
    result = Reconstruction.load(folder / "R.h5")
    result.report["options"] = {"max_iterations": 2}
    seen = {}

    def spy(prior, operator, y, sigma_y, **settings):
        seen.update(settings, operator=operator, y=y)
        return result

    monkeypatch.setattr(report, "reconstruct", spy)
    evaluate(result, tmp_path, calibration=folder / "M.h5", prior=prior, keep=0.5)
    assert (seen["sampler"], seen["steps"], seen["max_iterations"], seen["samples"]) == ("mmps", 4, 2, 5)
    assert bool((seen["y"] * (1 - seen["operator"].mask) == 0).all())
    assert float(seen["operator"].mask.mean()) < 0.5


def test_generated_images_against_references(files, tmp_path):
    folder, _ = files
    report = evaluate(folder / "S.h5", tmp_path, reference=folder / "REF.h5")
    assert report["distances"]["samples"] == 8 and "sliced w2" in report["text"]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_result_in_memory_and_a_single_sample(files, tmp_path):
    folder, _ = files
    result = Reconstruction.load(folder / "R.h5")
    single = Reconstruction.from_samples(result.samples[:1], {})
    report = evaluate(single, tmp_path, reference=folder / "REF.h5", calibration=folder / "M.h5")
    assert "with_truth" not in report and report["chi_squared"]["power"]["1.3"]["estimated"] is None


def test_the_same_seed_gives_the_same_report(files, tmp_path):
    folder, _ = files
    first, second = (
        evaluate(folder / "R.h5", tmp_path, reference=folder / "REF.h5", overwrite=True) for _ in range(2)
    )
    assert first == second


def truncated(folder, tmp_path):
    path = tmp_path / "bad.h5"
    path.write_bytes((folder / "R.h5").read_bytes()[:2000])
    return path


def foreign(folder, tmp_path):
    path = tmp_path / "bad.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.zeros(3)
    return path


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, t: evaluate(f / "R.h5", t / "o"), "expected a reference or a measurement file"),
        (lambda f, t: evaluate(f / "none.h5", t / "o", reference=f / "REF.h5"), "none.h5"),
        (lambda f, t: evaluate(truncated(f, t), t / "o", reference=f / "REF.h5"), "bad.h5"),
        (lambda f, t: evaluate(foreign(f, t), t / "o", reference=f / "REF.h5"), "bad.h5"),
        (lambda f, t: evaluate(f / "R.h5", t / "o", reference=f / "M.h5"), "M.h5"),
        (lambda f, t: evaluate(f / "R.h5", t / "o", reference=f / "S.h5"), "expected 6 images"),
        (lambda f, t: evaluate(f / "S.h5", t / "o", calibration=f / "M.h5"), "expected a reference file"),
    ],
)
def test_bad_files_end_in_one_line_and_nothing_is_written(files, tmp_path, call, message):
    with pytest.raises(InputError) as error:
        call(files[0], tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_existing_reports_are_kept(files, tmp_path):
    folder, _ = files
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        evaluate(folder / "S.h5", tmp_path, reference=folder / "REF.h5")
    assert (tmp_path / "report.json").read_text() == "mine"


def test_importing_the_package_imports_no_torch():
    import subprocess
    import sys

    code = "import sys, ambient_sci.evaluation; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

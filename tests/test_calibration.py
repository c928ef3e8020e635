"""Calibration accepts exact posteriors at its stated level and rejects wrong ones.

Gaussian prior with a spectrum on both sides of sigma_y^2, exact posterior samples, random masking and MRI.
Tests of level count false alarms over repeated problems; the bound they use is stated with its own
probability of failing.
"""

from __future__ import annotations

import json

import pytest
import torch
from scipy.stats import binom, chi2
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.evaluation.calibration import finding, held_out_rows, hold_out, with_truth
from ambient_sci.evaluation.chi_squared import chi_squared, resolution
from ambient_sci.evaluation.exchangeability import exchange_test, power, score
from ambient_sci.operators import MRI, Identity, Masking
from ambient_sci.priors import GaussianPrior

SIZE, SIGMA = 6, 0.1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian_prior(channels: int, scale: float = 1.0) -> GaussianPrior:
    """Covariance with eigenvalues from 0.05 to 50 sigma_y^2 in a random basis."""
    count = channels * SIZE**2
    basis = torch.linalg.qr(torch.randn(count, count, generator=generator(9), dtype=torch.float64))[0]
    values = SIGMA**2 * torch.logspace(-1.3, 1.7, count, dtype=torch.float64)
    mean = torch.zeros(channels, SIZE, SIZE, dtype=torch.float64)
    return GaussianPrior(mean, scale * (basis * values) @ basis.T)


def posterior_samples(prior: GaussianPrior, operator, y: Tensor, samples: int, g: torch.Generator) -> Tensor:
    mean, covariance = prior.posterior(operator, y, SIGMA)
    factor = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(covariance.shape[-1], dtype=y.dtype))
    z = torch.randn(samples, len(y), covariance.shape[-1], generator=g, dtype=y.dtype)
    return mean + torch.einsum("bij,sbj->sbi", factor.expand(len(y), -1, -1), z).reshape(samples, *mean.shape)


def problem(kind: str, num: int, seed: int, noise: float = 1.0):
    """Prior, operator, measurements with noise ``noise * SIGMA``, truth, generator."""
    g = generator(seed)
    prior = gaussian_prior(2 if kind == "mri" else 1)
    x = prior.sample(num, g)
    if kind == "mri":
        mask = (torch.rand(num, 1, SIZE, generator=g, dtype=torch.float64) < 0.6).double()
        mask[:, :, SIZE // 2 - 1 : SIZE // 2 + 1] = 1
        operator = MRI(mask.expand(num, SIZE, SIZE).clone())
    else:
        mask = (torch.rand(num, SIZE, SIZE, generator=g, dtype=torch.float64) < 0.7).double()
        mask[:, 0, 0] = 1
        operator = Masking(mask, (1, SIZE, SIZE))
    clean = operator.A(x)
    y = (clean + noise * SIGMA * torch.randn(clean.shape, generator=g, dtype=clean.dtype)) * operator.mask
    return prior, operator, y, x, g


# -- the scores themselves ---------------------------------------------------------------------------------


def fair_crps(samples: Tensor, truth: Tensor) -> Tensor:
    pairs = (samples[:, None] - samples[None]).abs().sum((0, 1))
    count = len(samples)
    return (samples - truth).abs().mean(0) - pairs / (2 * count * (count - 1))


def test_crps_is_the_fair_estimator_with_any_candidate_as_the_truth():
    samples, truth = torch.randn(7, 3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    scores = score(samples, truth, [(0.1, 0.9)])
    torch.testing.assert_close(scores.crps[0], fair_crps(samples, truth).mean(1), rtol=1e-12, atol=1e-12)
    everyone = torch.cat([truth[None], samples])
    others = torch.cat([everyone[:4], everyone[5:]])
    torch.testing.assert_close(scores.crps[4], fair_crps(others, everyone[4]).mean(1), rtol=1e-12, atol=1e-12)


def test_fair_crps_does_not_depend_on_the_number_of_samples():
    """Expected CRPS of a standard normal is 1/sqrt(pi); z below 4: 6e-5 of seeds fail."""
    for count in (2, 5, 20):
        draws = torch.randn(count + 1, 1, 40000, generator=generator(count), dtype=torch.float64)
        values = fair_crps(draws[1:], draws[0])[0]
        z = (values.mean() - torch.pi**-0.5) / (values.std() / 200)
        assert abs(float(z)) < 4
        torch.testing.assert_close(score(draws[1:], draws[0], [(0, 1)]).crps[0, 0], values.mean())


def test_coverage_is_exact_for_any_number_of_samples_and_with_ties():
    """Mean over candidates is b - a exactly, without bias; a tie is spread over its ranks."""
    values = torch.randn(5, 2, 30, generator=generator(0), dtype=torch.float64)
    values[:, :, :10] = 0.0
    values[:3, :, 10:20] = 1.0
    inside = score(values[1:], values[0], [(0.25, 0.75), (0.1, 0.9), (0.025, 0.975)]).inside
    torch.testing.assert_close(inside.mean(1), torch.tensor([0.5, 0.8, 0.95]).double()[:, None].expand(3, 2))
    far = score(torch.randn(9, 1, 50, generator=generator(1)), torch.full((1, 50), 9.0), [(0.1, 0.9)])
    assert float(far.inside[0, 0, 0]) == pytest.approx(0.0)


def test_a_mask_limits_the_scores_to_its_entries():
    samples, truth = torch.randn(6, 4, 3, 5), torch.randn(4, 3, 5)
    mask = torch.zeros(4, 1, 5)
    mask[:, :, [1, 3]] = 1
    masked = score(samples, truth, [(0.1, 0.9)], mask)
    plain = score(samples[..., [1, 3]], truth[..., [1, 3]], [(0.1, 0.9)])
    torch.testing.assert_close(masked.crps, plain.crps)
    torch.testing.assert_close(masked.inside, plain.inside)


@pytest.mark.parametrize("samples", [2, 8, 32])
def test_std_over_error_is_one_for_any_number_of_samples(samples):
    """Without the factor 1 + 1/S it would be 0.82 at two samples; z below 4, 40,000 entries."""
    draws = torch.randn(samples + 1, 100, 400, generator=generator(samples), dtype=torch.float64)
    found = with_truth(draws[1:], draws[0], projections=1)["std_over_error"]
    assert found["interval_95"][0] < found["ratio"] < found["interval_95"][1]
    std_of_log = ((2 + 2 / max(samples - 1, 1)) / (4 * draws[0].numel())) ** 0.5
    assert abs(found["ratio"] - 1) < 4 * std_of_log


# -- the stated level --------------------------------------------------------------------------------------


def false_alarms(run, repetitions: int, level: float) -> bool:
    """At most as many rejections as a test of this level has in all but 1e-4 of cases."""
    rejected = sum(not run(seed)["accepted"] for seed in range(repetitions))
    return rejected <= binom.isf(1e-4, repetitions, level)


@pytest.mark.parametrize("kind", ["masking", "mri"])
def test_exact_posteriors_are_accepted_at_the_stated_level(kind):
    level = 0.1

    def run(seed: int) -> dict:
        prior, operator, y, x, g = problem(kind, 10, 100 + seed)
        return with_truth(posterior_samples(prior, operator, y, 7, g), x, level=level, generator=g)

    assert false_alarms(run, 20, level)


@pytest.mark.parametrize("kind", ["masking", "mri"])
def test_held_out_rows_of_exact_posteriors_are_accepted_at_the_stated_level(kind):
    level = 0.1

    def run(seed: int) -> dict:
        prior, operator, y, _, g = problem(kind, 10, 200 + seed)
        sample = lambda a, b: posterior_samples(prior, a, b, 7, g)  # noqa: E731
        return hold_out(sample, operator, y, SIGMA, keep=0.6, level=level, generator=g)

    assert false_alarms(run, 20, level)


def test_p_values_are_uniform_whatever_the_correlation():
    """All entries of an image equal, heavy tails, three samples: Kolmogorov-Smirnov p above 1e-3."""
    from scipy.stats import kstest

    p_values = []
    for seed in range(200):
        draws = (
            torch.randn(4, 12, 1, generator=generator(seed), dtype=torch.float64).pow(3).expand(-1, -1, 20)
        )
        scores = score(draws[1:], draws[0], [(0.1, 0.9)])
        p_values.append(exchange_test(scores.crps, generator(seed))["p"])
    assert kstest(p_values, "uniform").pvalue > 1e-3


# -- what must be rejected ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masking", "mri"])
@pytest.mark.parametrize("scale, word", [(1.5, "under-confident"), (1 / 1.5, "over-confident")])
def test_a_prior_of_wrong_variance_is_rejected_with_and_without_truth(kind, scale, word):
    prior, operator, y, x, g = problem(kind, 120, 5)
    wrong = gaussian_prior(x.shape[1], scale)
    seen = with_truth(posterior_samples(wrong, operator, y, 16, g), x, generator=g)
    assert not seen["accepted"] and word in seen["verdict"]
    blind = hold_out(
        lambda a, b: posterior_samples(wrong, a, b, 16, g), operator, y, SIGMA, keep=0.5, generator=g
    )
    assert not blind["accepted"] and word in blind["verdict"]
    assert min(blind["power"].values()) > 0.8
    exact = hold_out(
        lambda a, b: posterior_samples(prior, a, b, 16, g), operator, y, SIGMA, keep=0.5, generator=g
    )
    assert exact["accepted"] and "calibrated" in exact["verdict"]


def test_scaled_deviations_are_named_by_their_factor():
    prior, operator, y, x, g = problem("mri", 80, 6)
    samples = posterior_samples(prior, operator, y, 16, g)
    centre = samples.mean(0)
    narrow = with_truth(centre + (samples - centre) / 1.4, x, generator=g)
    assert 0.66 < narrow["std_over_error"]["ratio"] < 0.77
    assert "over-confident by 1.4x" in narrow["verdict"] or "over-confident by 1.3x" in narrow["verdict"]
    assert narrow["coverage"]["80"]["observed"] < 0.72
    assert narrow["crps"]["z"] > 4
    wide = with_truth(centre + 1.4 * (samples - centre), x, generator=g)
    assert wide["coverage"]["80"]["observed"] > 0.87 and "under-confident" in wide["verdict"]


def test_wrong_shape_of_the_right_variance_is_noticed_by_the_ranks():
    """Truth from a skew distribution with the mean and variance of the Gaussian samples."""
    truth = -torch.log(torch.rand(400, 3, generator=generator(0), dtype=torch.float64)) - 1
    samples = torch.randn(20, 400, 3, generator=generator(1), dtype=torch.float64)
    result = with_truth(samples, truth, generator=generator(2))
    assert "SBC" in result["failed"] and "not in shape" in result["verdict"]


def test_a_mixture_of_too_wide_and_too_narrow_is_called_uneven():
    """A tenth of the entries has errors three times as large as said and dominates; the others are half as
    large.
    """
    scale = torch.full((50,), 0.5, dtype=torch.float64)
    scale[:5] = 3.0
    truth = scale * torch.randn(100, 50, generator=generator(0), dtype=torch.float64)
    samples = torch.randn(12, 100, 50, generator=generator(1), dtype=torch.float64)
    verdict = with_truth(samples, truth)["verdict"]
    assert "over-confident by" in verdict and "unevenly" in verdict
    verdict = with_truth(samples * scale, truth / scale)["verdict"]
    assert "under-confident by" in verdict and "unevenly" in verdict


def test_without_a_wrong_scale_no_factor_is_claimed():
    """Only what was rejected is put into words."""
    result = with_truth(
        torch.randn(12, 100, 50, generator=generator(0)), torch.randn(100, 50, generator=generator(1))
    )
    coverage = {k: {**v, "z": 9.0} for k, v in result["coverage"].items()}
    assert "under-confident: intervals cover more" in finding(
        {**result, "coverage": coverage}, ["50 % coverage"]
    )
    coverage["50"]["z"] = -9.0
    both = ["50 % coverage", "95 % coverage"]
    assert finding({**result, "coverage": coverage}, both) == "calibrated in scale, but not in shape"


def test_a_shifted_mean_is_noticed_by_tarp_and_ranks():
    samples = torch.randn(20, 200, 1, 4, 4, generator=generator(0), dtype=torch.float64)
    truth = torch.randn(200, 1, 4, 4, generator=generator(1), dtype=torch.float64) + 1.0
    result = with_truth(samples, truth, generator=generator(2))
    assert {"SBC", "TARP"} <= set(result["failed"])


# -- chi squared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["masking", "mri"])
def test_chi_squared_has_its_level_and_rejects_wrong_noise(kind):
    prior, operator, y, _, g = problem(kind, 250, 11)
    exact = chi_squared(posterior_samples(prior, operator, y, 6, g), operator, y, SIGMA)
    assert exact["accepted"] and exact["degrees"] == int(operator.mask.expand(y.shape).sum())
    assert exact["power"]["1.3"]["determined"] > 0.999

    prior, operator, y, _, g = problem(kind, 250, 12, noise=1.3)
    wrong = chi_squared(posterior_samples(prior, operator, y, 6, g), operator, y, SIGMA)
    assert not wrong["accepted"] and "larger than the noise" in wrong["verdict"]
    assert wrong["power"]["1.3"]["estimated"] > 0.9

    def run(seed: int) -> dict:
        prior, operator, y, _, g = problem(kind, 10, 300 + seed)
        return chi_squared(posterior_samples(prior, operator, y, 3, g), operator, y, SIGMA, level=0.1)

    assert false_alarms(run, 40, 0.1)


def test_chi_squared_power_is_what_repetition_finds():
    """Noise 1.3 sigma_y: rejections in 50 problems within 4 binomial deviations of the stated power."""
    found, stated = 0, []
    for seed in range(50):
        prior, operator, y, _, g = problem("mri", 16, 400 + seed, noise=1.3)
        result = chi_squared(posterior_samples(prior, operator, y, 8, g), operator, y, SIGMA)
        found += not result["accepted"]
        stated.append(result["power"]["1.3"]["estimated"])
    rate = sum(stated) / len(stated)
    assert 0.1 < rate < 0.99
    assert abs(found / 50 - rate) < 4 * (rate * (1 - rate) / 50) ** 0.5 + 0.05


def test_chi_squared_admits_that_a_wide_prior_shows_nothing():
    """Prior variance 10^4 sigma_y^2: samples follow the noise, whatever its level."""
    shape = (1, SIZE, SIZE)
    prior = GaussianPrior(
        torch.zeros(shape, dtype=torch.float64), torch.full(shape, 100.0, dtype=torch.float64)
    )
    operator, g = Identity(shape), generator(0)
    y = prior.sample(40, g) + 1.3 * SIGMA * torch.randn(40, *shape, generator=g, dtype=torch.float64)
    result = chi_squared(posterior_samples(prior, operator, y, 16, g), operator, y, SIGMA)
    assert result["power"]["1.3"]["estimated"] < 0.2
    assert "little power" in result["verdict"] or not result["accepted"]


def test_the_resolved_fraction_is_unbiased():
    """tr G^2 - 2 tr G against its exact value, mean of 3000 estimates from four samples: z below 4."""
    gains = torch.linspace(0, 1, 12, dtype=torch.float64)
    exact = float(((1 - gains).square() - 1).sum())
    draws = torch.randn(3000, 4, 12, generator=generator(0), dtype=torch.float64) * gains.sqrt()
    found = torch.tensor([resolution(d) for d in draws])
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / len(found) ** 0.5


def test_any_linear_physics_can_be_tested():
    from deepinv.physics import Denoising

    y = 0.5 * torch.randn(40, 1, 4, 4, generator=generator(0))
    physics = Denoising()
    zero = torch.zeros(3, 40, 1, 4, 4)
    assert (
        chi_squared(zero, physics, y, 0.5)["accepted"] and not chi_squared(zero, physics, y, 0.4)["accepted"]
    )


def test_one_chi_squared_statistic_by_hand():
    operator, y = Identity((1, 2, 2)), torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    result = chi_squared(torch.zeros(1, 1, 1, 2, 2), operator, y, 2.0)
    assert result["statistic"] == pytest.approx(30 / 4) and result["degrees"] == 4
    assert result["p"] == pytest.approx(2 * chi2.sf(7.5, 4))
    assert result["power"]["1.3"]["estimated"] is None and "at most" in result["verdict"]


def test_noise_levels_may_differ_between_measurements():
    shape = (1, SIZE, SIZE)
    sigma = torch.linspace(0.1, 1.0, 30, dtype=torch.float64)
    y = sigma.reshape(-1, 1, 1, 1) * torch.randn(30, *shape, generator=generator(0), dtype=torch.float64)
    zero = torch.zeros(1, 30, *shape, dtype=torch.float64)
    assert chi_squared(zero, Identity(shape), y, sigma)["accepted"]
    assert not chi_squared(zero, Identity(shape), y, sigma.flip(0))["accepted"]


# -- power, small numbers, output --------------------------------------------------------------------------


def test_power_is_the_level_without_an_alternative_and_grows_with_it():
    draws = 0.5 * torch.randn(8, 20, 30, generator=generator(0), dtype=torch.float64)
    found = power(draws, None, (1.0, 1.02, 1.1, 1.5), level=0.05)
    assert found["1"] == pytest.approx(0.05) and found["1"] < found["1.02"] < found["1.1"] < found["1.5"]
    assert power(draws[:3], None, (1.5,), 0.05) is None


def test_noise_in_the_prediction_hides_the_signal_from_the_power():
    signal = torch.randn(8, 20, 30, generator=generator(0), dtype=torch.float64)
    noise = torch.randn(8, 20, 30, generator=generator(1), dtype=torch.float64)
    clear, hidden = (power(signal, s * noise, (1.1,), 0.05)["1.1"] for s in (0.1, 10.0))
    assert clear > 0.9 and hidden < 0.3


def test_too_few_measurements_say_that_they_cannot_reject():
    draws = torch.randn(4, 1, 1, 8, 8, generator=generator(0))
    result = with_truth(draws[1:], 100 + draws[0])
    assert result["accepted"] and "too few" in result["verdict"]


def test_results_are_json_and_reproducible():
    prior, operator, y, x, g = problem("mri", 12, 3)
    samples = posterior_samples(prior, operator, y, 5, g)
    first = with_truth(samples, x, subjects=[f"p{i // 4}" for i in range(12)])
    assert first == with_truth(samples, x, subjects=[f"p{i // 4}" for i in range(12)])
    assert json.loads(json.dumps(first)) == first
    assert json.dumps(chi_squared(samples, operator, y, SIGMA))
    held = held_out_rows(samples, operator, y, SIGMA)
    assert json.loads(json.dumps(held)) == held


def test_predictions_of_held_out_rows_carry_the_noise_of_each_measurement():
    """Nothing but noise: std / error is 1 whatever its level; z below 4 over 30 x 36 entries."""
    shape = (1, SIZE, SIZE)
    sigma = torch.linspace(0.1, 1.0, 30, dtype=torch.float64)
    y = sigma.reshape(-1, 1, 1, 1) * torch.randn(30, *shape, generator=generator(0), dtype=torch.float64)
    zero = torch.zeros(8, 30, *shape, dtype=torch.float64)
    result = held_out_rows(zero, Identity(shape), y, sigma, generator=generator(1))
    assert result["accepted"] and result["signal_std_over_error"] is None
    assert abs(result["std_over_error"]["ratio"] - 1) < 4 * ((2 + 2 / 7) / (4 * 30 * 36 * 0.5)) ** 0.5
    assert not held_out_rows(zero, Identity(shape), y, sigma / 1.3, generator=generator(1))["accepted"]


def test_measurements_without_held_out_rows_are_passed_over():
    prior, operator, y, x, g = problem("masking", 6, 3)
    mask = operator.mask.clone()
    mask[2] = 0
    result = held_out_rows(
        posterior_samples(prior, operator, y, 4, g),
        operator.with_mask(mask),
        y,
        SIGMA,
        subjects=list("aabbcc"),
    )
    assert result["measurements"] == 5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, x: with_truth(s, x[:3]), "expected samples (S, N, ...) and truth"),
        (lambda s, x: with_truth(s[:1], x), "at least 2 samples"),
        (lambda s, x: with_truth(s, x, level=1.5), "expected a level in (0, 1), got 1.5"),
        (lambda s, x: with_truth(s, x, coverage_levels=[80]), "coverage levels in (0, 1)"),
        (lambda s, x: chi_squared(s, Identity((1, 4, 4)), x, 0.0), "expected a positive noise level"),
        (lambda s, x: chi_squared(s, Identity((1, 4, 4)), x, None), "expected a positive noise level"),
        (lambda s, x: chi_squared(s, Identity((1, 4, 4)), x[:2], 0.1), "expected samples (S, 2, ...)"),
        (lambda s, x: held_out_rows(s, Identity((1, 4, 4)), x, -1.0), "expected a noise level"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(InputError) as error:
        call(torch.randn(5, 4, 1, 4, 4), torch.randn(4, 1, 4, 4))
    assert message in str(error.value) and "\n" not in str(error.value)


# -- noise that differs by entry ---------------------------------------------------------------------------------------------


def levels_by_entry(num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Masking]:
    """Truth N(0, 1), y of half the pixels with noise of 0.1 to 1.2 that differs by pixel and scan, 0 where
    nothing was measured.
    """
    g = generator(3)
    operator = Masking((torch.rand(num, 1, 6, 6, generator=g) < 0.5).float(), img_size=(1, 6, 6))
    truth = torch.randn(num, 1, 6, 6, generator=g)
    sigma = (0.1 + 1.1 * torch.rand(num, 1, 6, 6, generator=g)) * operator.mask
    return truth, operator.mask * truth + sigma * torch.randn(truth.shape, generator=g), sigma, operator


def test_chi_squared_with_noise_of_each_entry():
    """Exact posterior samples are accepted; with the levels of other entries, of the same overall size, they
    are not. Level 0.05.
    """
    truth, y, sigma, operator = levels_by_entry(100)
    g = generator(4)
    gain = operator.mask / (1 + sigma**2)
    samples = gain * y + (1 - gain).sqrt() * torch.randn(5, *truth.shape, generator=g)
    found = chi_squared(samples, operator, y, sigma)
    assert found["accepted"] and found["ratio"] == pytest.approx(1, abs=0.05), found["verdict"]
    swapped = sigma.clone()
    swapped[operator.mask > 0] = sigma[operator.mask > 0].flip(0)
    assert not chi_squared(samples, operator, y, swapped)["accepted"]
    with pytest.raises(InputError, match="positive"):
        chi_squared(samples, operator, y, torch.where(operator.mask > 0, 0.0, 1.0))


def test_held_out_rows_with_noise_of_each_entry():
    """Draws of the prior predict y with the noise of each entry: accepted, and the signal's ratio is 1 to a
    tenth; one level for all is not the law of any entry, and is rejected.
    """
    truth, y, sigma, operator = levels_by_entry(300)
    sigma = torch.where(sigma > 0.6, 3 * sigma, 0.1 * sigma)
    g = generator(5)
    y = operator.mask * (truth + sigma * torch.randn(truth.shape, generator=g))
    samples = torch.randn(10, *truth.shape, generator=g)
    found = held_out_rows(samples, operator, y, sigma)
    assert found["accepted"], found["verdict"]
    assert found["signal_std_over_error"] == pytest.approx(1, abs=0.15)
    rms = float((sigma.square().sum() / operator.mask.sum()).sqrt())
    assert not held_out_rows(samples, operator, y, rms)["accepted"]


@pytest.mark.parametrize("where", ["samples", "truth"])
def test_what_is_no_number_is_no_score(where):
    samples = torch.randn(4, 5, 1, 3, 3, generator=generator(0))
    truth = torch.randn(5, 1, 3, 3, generator=generator(1))
    {"samples": samples[2], "truth": truth}[where][1, 0, 1, 1] = float("nan")
    with pytest.raises(InputError, match="finite"):
        with_truth(samples, truth)
    if where == "samples":
        with pytest.raises(InputError, match="finite"):
            chi_squared(samples, Masking(torch.ones(1, 1, 3, 3)), truth, 0.1)

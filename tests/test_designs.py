r"""Mask designs as a user meets them: by name, from a file, estimated; what they refuse; splits of operators
by them.
"""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from closed_forms import F64, coil_maps, random_mask, seeded

from ambient_sci.errors import IdentifiabilityError, InputError
from ambient_sci.operators import (
    DESIGN_NAMES,
    MRI,
    Enumerated,
    FixedBudget,
    Identity,
    Independent,
    MaskDesign,
    Masking,
    PoissonDisc,
    RandomBox,
    Unknown,
    design_from_dict,
    estimate_design,
    identifiability,
    make_design,
)

SHAPE = (2, 16, 24)
OPTIONS = {name: {"acceleration": 2.5, "acs": 4} for name in DESIGN_NAMES}
OPTIONS |= {"bernoulli": {"keep": 0.4}, "bernoulli-entries": {"keep": 0.4}, "box": {}}


@pytest.fixture(params=DESIGN_NAMES)
def design(request) -> MaskDesign:
    return make_design(request.param, image_shape=SHAPE, **OPTIONS[request.param])


def test_no_design_draws_from_a_global_stream(design):
    before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002 - to see that it does not move
    design.sample(3, seeded(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == str(before[1])  # noqa: NPY002


def test_masks_of_every_design(design):
    """0/1 of the stated shape, constant over a unit, different from draw to draw, the same from the same
    seed.
    """
    mask = design.sample(12, seeded(1))
    assert mask.shape == (12, design.unit_shape[0], 16, 24) and mask.dtype == torch.float32
    assert bool(((mask == 0) | (mask == 1)).all()) and bool(mask.flatten(1).any(1).all())
    assert torch.equal(design.to_mask(design.to_units(mask)), mask)
    assert torch.equal(design.sample(12, seeded(1)), mask)
    assert len(torch.unique(mask.flatten(1), dim=0)) >= 2
    assert not torch.equal(design.sample(12, seeded(2)), mask)


def test_descriptions_survive_json(design):
    again = design_from_dict(json.loads(json.dumps(design.to_dict())))
    assert type(again) is type(design) and again.to_dict() == design.to_dict()
    assert torch.equal(again.sample(3, seeded(1)), design.sample(3, seeded(1)))
    if not isinstance(design, PoissonDisc):
        mask = design.sample(3, seeded(1))
        kept = design.thin(mask, 0.5, generator=seeded(2))
        assert torch.equal(again.probability(mask, kept, 0.5), design.probability(mask, kept, 0.5))


@pytest.mark.parametrize(
    "name", ["lines-uniform", "lines-variable", "lines-bernoulli", "equispaced", "poisson"]
)
@pytest.mark.parametrize("axis", ["columns", "rows"])
def test_acceleration_and_calibration_lines(name, axis):
    """Measured fraction 1/R with the calibration lines counted, and those always there, around zero
    frequency.
    """
    design = make_design(name, image_shape=SHAPE, acceleration=2.5, acs=4, axis=axis)
    mask = design.sample(200 if name != "poisson" else 4, seeded(0))
    assert float(mask.mean()) == pytest.approx(1 / 2.5, rel=0.15)
    centre = (
        mask[..., 6:10, 10:14]
        if name == "poisson"
        else mask[..., 10:14]
        if axis == "columns"
        else mask[..., 6:10, :]
    )
    assert bool((centre == 1).all())  # fmt: skip
    if name.startswith("lines") and name != "lines-bernoulli":
        assert torch.equal(design.to_units(mask).sum(1), torch.full((200,), float(round((24 if axis == "columns" else 16) / 2.5))))  # fmt: skip


def test_variable_density_prefers_the_centre():
    design = make_design("lines-variable", image_shape=SHAPE, acceleration=3, acs=2)
    frequency = design.to_units(design.sample(2_000, seeded(0))).mean(0)
    assert float(frequency[[8, 9, 14, 15]].mean()) > 3 * float(frequency[[0, 1, 22, 23]].mean()) > 0


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_every_row_is_held_out_at_times_and_kept_at_times(design, keep):
    """Calibration lines included: a row that is always kept is never supervised at sigma = sigma_y."""
    if isinstance(design, (PoissonDisc, Enumerated)):
        with pytest.raises(IdentifiabilityError, match="never measured"):
            design.check_trainable(keep)
        return
    design.check_trainable(keep)
    mask = design.sample(1_500, seeded(1))
    kept = design.thin(mask, keep, generator=seeded(2))
    assert bool((kept <= mask).all())
    assert bool((kept.sum(0) > 0).all()) and bool(((mask - kept).sum(0) > 0).all())


# -- designs that are refused --------------------------------------------------------------------------------


def test_equispaced_lines_name_the_rows():
    """One kept line gives the offset away: every line but the calibration lines is hopeless, and is named."""
    design = Enumerated.equispaced((2, 4, 12), "columns", 3, always=[5, 6, 7])
    assert design.unsupervised(0.5) == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    with pytest.raises(IdentifiabilityError, match="9 of 12 columns.*0-4, 8-11"):
        design.check_trainable(0.5)
    mask = design.sample(1, seeded(0))
    kept = mask.clone()
    p = design.probability(mask, kept, 0.5)
    assert torch.equal(p, mask)  # what is not measured could not have been


def test_poisson_disc_names_the_rows():
    design = PoissonDisc((2, 8, 8), calibration=(4, 4))
    with pytest.raises(IdentifiabilityError, match="48 of 64 pixels"):
        design.check_trainable(0.5)
    with pytest.raises(IdentifiabilityError):
        MRI(torch.ones(1, 1, 8, 8), design=design).split(keep=0.5)


def test_unknown_designs_are_split_but_not_trained_on():
    mask = FixedBudget((2, 8, 8), "columns", 4).sample(6, seeded(0))
    split = MRI(mask).split(keep=0.5, generator=seeded(1))
    assert bool((split.weights[split.held_out.mask > 0] == 1).all())
    assert torch.equal(
        split.kept.mask, split.kept.mask[:, :, :1].expand_as(split.kept.mask)
    )  # lines stay whole
    with pytest.raises(IdentifiabilityError, match="estimate_design"):
        Unknown((2, 8, 8), "columns").check_trainable(0.5)


def test_rows_that_are_never_measured_are_named():
    p = torch.full((8,), 0.5)
    p[[2, 3]] = 0.0
    with pytest.raises(IdentifiabilityError, match="2 of 8 columns.*2-3"):
        Independent((2, 4, 8), "columns", p).check_trainable(0.5)
    with pytest.raises(IdentifiabilityError, match="8 of 8"):
        FixedBudget((2, 4, 8), "columns", 4).check_trainable(1.0)


def test_a_box_that_leaves_no_room_for_a_second_one():
    """Half the image: from the middle no disjoint box fits. A third always leaves room."""
    design = RandomBox((1, 8, 8), "pixels", (4, 4))
    for refused in (
        lambda: design.check_trainable(0.5),
        lambda: design.thin(design.sample(60, seeded(0)), 0.5),
    ):
        with pytest.raises(IdentifiabilityError, match="random-box"):
            refused()
    RandomBox((1, 9, 9), "pixels", (3, 3)).check_trainable(0.5)


# -- borders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "spiral"}, "expected one of bernoulli"),
        ({"name": "bernoulli"}, "expected keep between 0 and 1, got None"),
        ({"name": "bernoulli", "keep": 1.0}, "expected keep between 0 and 1"),
        ({"name": "lines-uniform"}, "acceleration above 1, got None"),
        ({"name": "lines-uniform", "acceleration": 1.0}, "acceleration above 1"),
        ({"name": "lines-uniform", "acceleration": 6, "acs": 4}, "room for lines"),
        ({"name": "lines-uniform", "acceleration": 2, "axis": "pixels"}, "axis columns or rows"),
        ({"name": "box", "box": (20, 3)}, "box within 16 x 24"),
    ],
)
def test_impossible_designs(options, message):
    with pytest.raises(InputError, match=message):
        make_design(image_shape=SHAPE, **options)


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"name": "spiral", "image_shape": [2, 4, 4], "layout": "columns"},
        {"name": "independent", "image_shape": [2, 4, 4], "layout": "columns"},
        {"name": "independent", "image_shape": [2, 4, 4], "layout": "diagonal", "probability": 0.5},
        {"name": "independent", "image_shape": [2, 4, 4], "layout": "columns", "probability": 1.5},
        {"name": "independent", "image_shape": [2, 4, 4], "layout": "columns", "probability": [0.5, 0.5]},
        {"name": "independent", "image_shape": "abc", "layout": "columns", "probability": 0.5},
        {"name": "fixed-budget", "image_shape": [2, 4, 4], "layout": "columns", "budget": 9},
        {"name": "fixed-budget", "image_shape": [2, 4, 4], "layout": "columns", "budget": 2, "always": [7]},
        {"name": "fixed-budget", "image_shape": [2, 4, 4], "layout": "columns", "budget": 2, "weights": 0.0},
        {"name": "fixed-budget", "image_shape": [2, 4, 4], "layout": "columns", "budget": 2, "colour": "red"},
        {"name": "enumerated", "image_shape": [2, 4, 4], "layout": "columns", "masks": [[0, 0, 0, 0]]},
        {"name": "enumerated", "image_shape": [2, 4, 4], "layout": "columns", "masks": [[1, 0], [1]]},
        {"name": "random-box", "image_shape": [1, 4, 4], "layout": "pixels", "box": [2]},
        {"name": "poisson-disc", "image_shape": [1, 4, 4], "acceleration": 0.5},
    ],
)  # fmt: skip
def test_descriptions_that_describe_nothing(description):
    with pytest.raises(InputError, match="mask design|sampling|design"):
        design_from_dict(description)


def test_masks_that_the_design_cannot_have_drawn():
    design = FixedBudget((2, 4, 8), "columns", 4)
    for mask, message in (
        (torch.ones(1, 1, 4, 9), "got \\(1, 1, 4, 9\\)"),
        (torch.ones(1, 1, 4, 16), "got \\(1, 1, 4, 16\\)"),
        (random_mask(1, 1, 4, 8), "that do not"),
    ):
        with pytest.raises(InputError, match=message):
            MRI(mask, design=design).split(keep=0.5, generator=seeded(0))
    entries = Independent((2, 4, 8), "entries", 0.5)
    with pytest.raises(InputError, match="\\(n, 2, 4, 8\\)"):
        Masking(torch.ones(4, 8), (2, 4, 8), entries).split(keep=0.5, generator=seeded(0))


def _moved(mask: torch.Tensor, design: MaskDesign, add: int, drop: int) -> torch.Tensor:
    """``mask`` with the first ``add`` missing units measured and the first ``drop`` measured ones missing."""
    units = design.to_units(mask).clone()
    for row in units:
        missing, measured = (row == 0).nonzero().flatten(), (row == 1).nonzero().flatten()
        row[missing[:add]], row[measured[:drop]] = 1.0, 0.0
    return design.to_mask(units)


def test_what_a_design_draws_it_can_have_drawn(design):
    design.check_drawn(design.sample(12, seeded(1)))


LINES = (2, 4, 12)
IMPOSSIBLE = {
    "one line too many": (FixedBudget(LINES, "columns", 4, 1.0, [5, 6]), (1, 0)),
    "one line too few": (FixedBudget(LINES, "columns", 4, 1.0, range(0)), (0, 1)),
    "another line for a calibration line": (FixedBudget(LINES, "columns", 4, 1.0, range(3)), (1, 1)),
    "never measured": (Independent(LINES, "columns", [0.0] + [0.5] * 11), (1, 0)),
    "always measured": (Independent(LINES, "columns", [1.0] + [0.5] * 11), (0, 1)),
    "none of the masks": (Enumerated.equispaced(LINES, "columns", 3), (1, 0)),
    "a part of one of the masks": (Enumerated.equispaced(LINES, "columns", 3, [6]), (0, 1)),
    "a hole in the box": (RandomBox((1, 6, 8), "pixels", (2, 3)), (1, 0)),
    "two boxes": (RandomBox((1, 6, 8), "pixels", (2, 3)), (0, 1)),
    "calibration not measured": (PoissonDisc((2, 16, 16), acceleration=3, calibration=(14, 4)), (1, 40)),
    "another acceleration": (PoissonDisc((2, 16, 16), acceleration=3, calibration=(4, 4)), (40, 0)),
}


@pytest.mark.parametrize(("drawn", "change"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_masks_of_probability_zero_are_refused(drawn, change):
    """One mask of many is enough, and its sample is named: its weights would be wrong without a word."""
    masks = drawn.sample(3, seeded(5))
    drawn.check_drawn(masks)
    spoilt = torch.cat([masks[:2], _moved(masks[2:], drawn, *change)])
    with pytest.raises(InputError, match="cannot have drawn the mask of sample 12"):
        drawn.check_drawn(spoilt, [3, 7, 12])
    with pytest.raises(InputError, match="expected masks"):
        drawn.check_drawn(masks[..., :-1])


def test_a_box_that_is_nowhere():
    with pytest.raises(InputError, match="cannot have drawn the mask of sample 0"):
        RandomBox((1, 6, 8), "pixels", (2, 3)).check_drawn(torch.ones(1, 1, 6, 8))
    wrapped = torch.ones(1, 1, 6, 8)
    wrapped[0, 0, :2, [7, 0, 1]] = 0  # a box across the border
    with pytest.raises(InputError, match="cannot have drawn"):
        RandomBox((1, 6, 8), "pixels", (2, 3)).check_drawn(wrapped)


def test_unknown_designs_claim_nothing():
    Unknown(LINES, "pixels").check_drawn(random_mask(5, 1, 4, 12))


@pytest.mark.parametrize("size", [(5, 7), (6, 6), (8, 5)])
def test_places_without_room_for_a_second_box(size):
    """The closed form against every pair of places."""
    for box in itertools.product(range(1, size[0] + 1), range(1, size[1] + 1)):
        boxes = RandomBox((1, *size), "pixels", box)
        every = torch.arange(boxes.places[0] * boxes.places[1])
        alone = every[~boxes._disjoint(every).any(1)]
        missed = boxes._missing(alone).any(0).nonzero().flatten().tolist() if len(alone) else []
        assert boxes.unsupervised(0.5) == missed


def test_large_images_are_judged_without_every_pair_of_places():
    RandomBox((3, 1024, 1024), "pixels", (256, 256)).check_trainable(0.5)


def test_masks_that_were_surveyed_are_not_looked_at_again(monkeypatch):
    """An operator whose masks are known to fit its design says so to all that is derived from it; another
    mask does not.
    """
    design = FixedBudget(LINES, "columns", 4)
    mask = design.sample(3, seeded(0))
    operator = MRI(mask, design=design)
    operator.split(keep=0.5, generator=seeded(1))
    looked = []
    monkeypatch.setattr(FixedBudget, "_checked_units", lambda *_: looked.append(1))
    split = operator[1:].split(keep=0.5, generator=seeded(1))
    split.kept.split(keep=0.5, generator=seeded(1))
    operator.with_mask(operator.mask.expand(3, 1, 4, 12), design=design).split(keep=0.5, generator=seeded(1))
    assert not looked
    operator.with_mask(mask.clone(), design=design).split(keep=0.5, generator=seeded(1))
    operator.split(FixedBudget(LINES, "columns", 4), keep=0.5, generator=seeded(1))
    assert len(looked) == 2


# -- estimation ----------------------------------------------------------------------------------------------


def test_estimated_design_finds_the_probabilities():
    """Within five binomial standard errors of the truth (false alarm 6e-7 a unit), marked as estimated,
    layout found.
    """
    p = torch.tensor([0.2, 0.5, 0.8, 1.0, 0.6, 0.3], dtype=F64)
    masks = Independent((2, 4, 6), "columns", p).sample(4_000, seeded(0))
    design = estimate_design(masks)
    assert isinstance(design, Independent) and design.layout == "columns" and design.status == "estimated"
    assert ((design.p - p).abs() <= 5 * (p * (1 - p) / 4_000).sqrt() + 1e-3).all() and design.p[3] == 1
    design.check_trainable(0.5)
    assert estimate_design(random_mask(50, 1, 4, 6)).layout == "pixels"
    assert estimate_design(random_mask(50, 2, 4, 6)).layout == "entries"


def test_too_few_masks_to_estimate_from():
    with pytest.raises(IdentifiabilityError, match="at least 8 different masks.*got 1"):
        estimate_design(torch.ones(100, 1, 4, 6))


# -- splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in DESIGN_NAMES if name != "poisson"])
def test_split_covers_the_mask_once(name):
    """Kept and held-out rows are disjoint and together A; weights are 1, 1/P and 0, in measurement space."""
    design = make_design(name, image_shape=SHAPE, **OPTIONS[name])
    mask = design.sample(5, seeded(1))
    if design.unit_shape[0] == 2 or isinstance(design, RandomBox):
        operators = [Masking(mask, SHAPE, design)]
    else:
        operators = [MRI(mask, design=design), MRI(mask, coil_maps(3, 16, 24), design)]
    for operator in operators:
        split = operator.split(keep=0.6, generator=seeded(2))
        assert torch.equal(split.kept.mask + split.held_out.mask, operator.mask)
        assert not bool((split.kept.mask * split.held_out.mask).any())
        assert bool((split.weights[split.kept.mask > 0] == 1).all())
        assert bool((split.weights[split.held_out.mask > 0] >= 1).all())
        assert bool((split.weights[operator.mask == 0] == 0).all())
        held = split.held_out.mask > 0
        p = operator._rows_from_network_mask(design.probability(mask, split.kept.network_mask, 0.6))
        assert torch.allclose(split.weights[held], 1 / p[held])
        assert split.kept.design is design
        again = operator.split(keep=0.6, generator=seeded(2))
        assert torch.equal(split.kept.mask, again.kept.mask)


def test_split_takes_another_design():
    operator = MRI(torch.ones(3, 1, 4, 8))
    lines = operator.split(Independent((2, 4, 8), "rows", 0.5), keep=0.5, generator=seeded(0)).kept.mask
    assert torch.equal(lines, lines[..., :1].expand_as(lines)) and 0 < float(lines.mean()) < 1
    points = operator.split(Independent((2, 4, 8), "pixels", 0.5), keep=0.5, generator=seeded(0)).kept.mask
    assert not torch.equal(points, points[..., :1].expand_as(points))


def test_complete_data_are_split_pixel_by_pixel():
    """No design, nothing missing: pixels are held out one by one, not all or none."""
    for operator in (Identity((3, 8, 8)), Masking(torch.ones(1, 1, 1, 8), (3, 8, 8))):
        kept = operator.split(keep=0.5, generator=seeded(0)).kept.network_mask
        assert 0.3 < float(kept.mean()) < 0.7 and kept.shape[-2:] == (8, 8)


def test_keeping_everything_holds_nothing_out():
    operator = MRI(random_mask(3, 1, 4, 8))
    split = operator.split(keep=1.0)
    assert split.kept is operator and not bool(split.held_out.mask.any())
    assert torch.equal(split.weights, operator.mask)


# -- identifiability -----------------------------------------------------------------------------------------


def test_identifiability_of_single_coil_masks():
    """[18] the conditioning is the rarest pair over the commonest unit, by frequency among the scans."""
    mask = torch.tensor([[1.0, 1, 1, 0]] * 9 + [[1.0, 0, 1, 1]] + [[0, 1.0, 0, 1]])[:, None, None, :].expand(
        -1, 1, 4, 4
    )
    report = identifiability(MRI(mask))
    assert report.identified and report.never_together == 0 and report.masks == 3
    assert report.conditioning == pytest.approx((1 / 11) / (10 / 11))
    fixed = identifiability(MRI(mask[:9]))
    assert not fixed.identified and fixed.never_measured == 1 and "NOT identified" in fixed.text
    assert "everything is measured" in identifiability(Identity((2, 4, 4))).text
    assert json.loads(json.dumps(report.to_dict()))["coils"] == 1


def test_identifiability_with_coils():
    """[18] one fixed R = 2 mask says nothing about half of k-space with one coil, and everything with
    four.
    """
    mask = torch.zeros(16, 16)
    mask[:, ::2] = 1
    assert not identifiability(MRI(mask)).identified
    report = identifiability(MRI(mask, coil_maps(4, 16, 16)))
    assert report.identified and report.conditioning > 1e-2 and report.coils == 4


def test_multi_coil_conditioning_by_dense_algebra():
    """The Lanczos estimate against all eigenvalues of G for one image line."""
    maps, mask = coil_maps(2, 1, 6), (torch.rand(5, 1, 1, 6, generator=seeded(3)) < 0.6).double()
    mask[:, ..., 3] = 1
    report = identifiability(MRI(mask.expand(-1, -1, 6, -1), maps.expand(1, 2, 6, 6)))
    f = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(torch.eye(6).cfloat(), 0), dim=0, norm="ortho"), 0).to(torch.complex128)  # fmt: skip
    encode = torch.stack([f * s for s in maps[0, :, 0]])
    g = 0
    for m in mask[:, 0, 0]:
        rows = (encode * m[:, None]).flatten(0, 1)
        p = rows.mH @ rows
        g = g + torch.kron(p.contiguous(), p.T.contiguous()) / len(mask)
    values = torch.linalg.eigvalsh(g)
    assert report.conditioning == pytest.approx(float(values[0] / values[-1]), rel=1e-2, abs=1e-4)
    assert math.isfinite(report.conditioning)

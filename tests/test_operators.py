r"""Row-masked operators: adjoints, equality with deepinv and sigpy, closed forms, and life as a deepinv
physics.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import deepinv
import numpy as np
import pytest
import sigpy
import torch
from closed_forms import F64, coil_maps, dense, normal, operator_zoo, random_mask, seeded, z_score
from deepinv.optim.linear import least_squares

from ambient_sci.errors import InputError
from ambient_sci.operators import (
    MRI,
    Identity,
    Independent,
    Masking,
    RowMaskedOperator,
    birdcage_maps,
    build_operator,
    identifiability,
    normalise_maps,
)
from ambient_sci.training.augment import flip

SIZES = [(4, 6), (5, 7), (6, 5), (1, 8), (10, 2)]
SQUARE = ["identity", "masking", "masking of entries", "mri"]


@pytest.fixture(params=operator_zoo())
def name(request) -> str:
    return request.param


@pytest.fixture
def operator(name) -> RowMaskedOperator:
    return operator_zoo()[name]


# -- the operator against its definition ---------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_adjoint(name, size, dtype, tolerance):
    """<A x, y> = <x, A^H y> relative to |A x| |y|, sizes even and odd, both precisions; so do T and T^H."""
    operator = operator_zoo(size=size)[name].to(dtype)
    x = normal(3, *operator.img_size, seed=1).to(dtype)
    y = normal(3, *operator.measurement_size, seed=2).to(dtype)
    for forward, adjoint in (
        (operator.A, operator.A_adjoint),
        (operator.transform, operator.transform_adjoint),
    ):
        z = forward(x)
        assert z.dtype == dtype and adjoint(y).dtype == dtype
        gap = (z * y).flatten(1).sum(1) - (x * adjoint(y)).flatten(1).sum(1)
        scale = z.flatten(1).norm(dim=1) * y.flatten(1).norm(dim=1)
        assert float((gap / scale).abs().max()) < tolerance
    assert float(operator.adjointness_test(u=x, num_samples=3)) < tolerance * 10  # deepinv's own check


def test_normal_operators(operator):
    x, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size)
    assert torch.allclose(operator.A_adjoint_A(x), operator.A_adjoint(operator.A(x)), atol=1e-12)
    assert torch.allclose(operator.A_A_adjoint(y), operator.A(operator.A_adjoint(y)), atol=1e-12)
    assert torch.allclose(operator.A(x), operator.transform(x) * operator.mask, atol=1e-12)
    assert operator.A_adjoint(y).shape == x.shape and operator.A(x).shape == y.shape


@pytest.mark.parametrize("size", SIZES)
def test_fourier_transform_is_sigpys_and_deepinvs(size):
    """Centred and orthonormal, every parity of the sizes."""
    x = normal(2, 2, *size)
    complex_x = torch.complex(x[:, 0], x[:, 1])
    found = MRI(torch.ones(size)).to(F64).A(x)
    expected = torch.as_tensor(sigpy.fft(complex_x.numpy(), axes=(-2, -1)))
    assert torch.allclose(found, torch.stack([expected.real, expected.imag], 1), atol=1e-12)
    physics = deepinv.physics.MRI(mask=torch.ones(1, 2, *size, dtype=F64), img_size=(2, *size))
    assert torch.allclose(found, physics.A(x), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_operators_are_deepinvs(size):
    mask, x = random_mask(2, 1, *size), normal(2, 2, *size)
    maps = coil_maps(3, *size, batch=2)
    pairs = [
        (MRI(mask), deepinv.physics.MRI(mask=mask.expand(-1, 2, -1, -1), img_size=(2, *size))),
        (MRI(mask, maps), deepinv.physics.MultiCoilMRI(mask=mask.expand(-1, 2, -1, -1), coil_maps=maps, img_size=(2, *size))),
    ]  # fmt: skip
    for ours, theirs in pairs:
        ours = ours.to(F64)
        y = theirs.A(x)
        assert torch.allclose(ours.A(x), y, atol=1e-12)
        assert torch.allclose(ours.A_adjoint(y), theirs.A_adjoint(y), atol=1e-12)
    ours = Masking(mask[:1], (2, *size)).to(F64)
    theirs = deepinv.physics.Inpainting(img_size=(2, *size), mask=mask[0].expand(2, -1, -1))
    assert torch.allclose(ours.A(x), theirs.A(x), atol=1e-12)


def test_row_masking_selects_rows_of_the_transform(operator):
    """The measured rows of A are orthonormal for a square isometric T, and A^H A = T^H M T in any case."""
    a = dense(operator, 1)
    if operator.square:
        assert torch.allclose(a @ a.T, torch.eye(len(a), dtype=F64), atol=1e-12)
    x = normal(3, *operator.img_size)
    assert torch.allclose(operator.A_adjoint_A(x)[1].flatten(), a.T @ (a @ x[1].flatten()), atol=1e-12)


# -- closed forms against solvers ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.3, 20.0, torch.tensor([0.1, 1.0, 10.0], dtype=F64)])
def test_prox_of_the_data_term(operator, gamma):
    """argmin gamma/2 |Ax - y|^2 + 1/2 |x - z|^2 by dense algebra, sample by sample; deepinv's solver
    agrees.
    """
    z, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size, seed=2)
    shaped = gamma.reshape(-1, 1, 1, 1) if torch.is_tensor(gamma) else gamma
    found = operator.prox_l2(z, y, shaped, max_iter=300, tol=1e-13)
    for i in range(3):
        a, g = dense(operator, i), float(gamma[i] if torch.is_tensor(gamma) else gamma)
        measured = operator[i].mask.expand(1, *operator.measurement_size).flatten() > 0
        expected = torch.linalg.solve(
            torch.eye(a.shape[1], dtype=F64) + g * a.T @ a,
            z[i].flatten() + g * a.T @ y[i].flatten()[measured],
        )
        # deepinv's solver, which serves what has no closed form, stops at about 1e-5.
        assert torch.allclose(found[i].flatten(), expected, atol=1e-12 if operator.square else 1e-4)
    solved = least_squares(
        operator.A, operator.A_adjoint, y, z=z, gamma=shaped, solver="CG", max_iter=300, tol=1e-13, parallel_dim=[0]
    )  # fmt: skip
    assert torch.allclose(found, solved, atol=1e-3)


@pytest.mark.parametrize("name", SQUARE)
def test_prox_takes_a_level_for_each_sample(name):
    operator, gamma = operator_zoo()[name], torch.tensor([0.1, 1.0, 50.0], dtype=F64)
    z, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size, seed=2)
    assert torch.allclose(operator.prox_l2(z, y, gamma), operator.prox_l2(z, y, gamma.reshape(-1, 1, 1, 1)))


def test_pseudo_inverse(operator):
    """A A^+ y = y on the range of A, and A^+ A is a projection."""
    x = normal(3, *operator.img_size)
    y = operator.A(x)
    found = operator.A_dagger(y, max_iter=500, tol=1e-14)
    assert torch.allclose(operator.A(found), y, atol=1e-5)
    if operator.square:
        assert torch.allclose(found, operator.A_adjoint(y), atol=1e-12)


@pytest.mark.parametrize("name", SQUARE + ["mri, coils"])
def test_isometry_flag(name):
    operator = operator_zoo()[name]
    assert operator.isometry and operator.square == (name in SQUARE)
    x = normal(3, *operator.img_size)
    assert torch.allclose(operator.transform_adjoint(operator.transform(x)), x, atol=1e-12)
    loud = MRI(torch.ones(4, 3), 2 * coil_maps(3, 4, 3))
    assert not loud.isometry and not loud.square


# -- a deepinv physics ---------------------------------------------------------------------------------------


def test_deepinv_algorithms_run_on_it(operator):
    """Least squares by gradient descent through deepinv's optimiser recovers A^+ y; a plug-and-play step runs
    as well.
    """
    y = operator.A(normal(3, *operator.img_size))
    model = deepinv.optim.GD(
        data_fidelity=deepinv.optim.L2(), stepsize=1.0, max_iter=400, early_stop=False, verbose=False
    )
    found = model(y, operator)
    assert torch.allclose(operator.A(found), y, atol=1e-4)

    pnp = deepinv.optim.PGD(
        data_fidelity=deepinv.optim.L2(),
        prior=deepinv.optim.PnP(deepinv.models.MedianFilter(3)),
        stepsize=1.0,
        max_iter=2,
        verbose=False,
    )
    assert pnp(y, operator).shape == (3, *operator.img_size)


@pytest.mark.parametrize("name", ["identity", "masking", "mri", "mri, coils"])
def test_noise_falls_on_measured_rows_only(name):
    """``physics(x)`` is A x plus noise of the stated level per real channel, zero outside the mask (|z| <
    4.5).
    """
    size, mask = (32, 32), random_mask(2, 1, 32, 32)
    operator = {
        "identity": lambda: Identity((2, *size), noise_std=0.3),
        "masking": lambda: Masking(mask, (2, *size), noise_std=0.3),
        "mri": lambda: MRI(mask, noise_std=0.3),
        "mri, coils": lambda: MRI(mask, coil_maps(3, *size), noise_std=0.3),
    }[name]().to(F64)
    operator.noise_model.rng = seeded(1)
    x = normal(2, 2, *size)
    residual = operator(x) - operator.A(x)
    measured = operator.mask.expand_as(residual) > 0
    assert bool((residual[~measured] == 0).all())
    assert abs(z_score(residual[measured].square() - 0.3**2)) < 4.5
    assert bool((operator_zoo()["mri"](normal(3, 2, 4, 3)) * (1 - operator_zoo()["mri"].mask) == 0).all())


def test_masks_are_fixed(operator):
    x, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size)
    before = operator.mask.clone()
    for call in (
        lambda: operator.A(x, mask=torch.ones_like(before)),
        lambda: operator.A_adjoint(y, mask=torch.ones_like(before)),
        lambda: operator.A_adjoint_A(x, mask=torch.ones_like(before)),
        lambda: operator(x, mask=torch.ones_like(before)),
        lambda: operator.update(mask=torch.zeros_like(before)),
        lambda: operator.A(x, coil_maps=torch.ones(1)),
    ):
        with pytest.raises(InputError, match=f"{operator.name}: .* is fixed at construction"):
            call()
    assert torch.equal(operator.mask, before)
    assert torch.equal(operator.A(x, mask=None), operator.A(x))


# -- batches, types, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index", [1, -1, slice(1, 3), torch.tensor([2, 0]), [2, 0], np.int64(1), torch.tensor(1)]
)
def test_indexing(operator, index):
    """``op[i]`` is the operator of those samples; a whole number keeps the batch axis."""
    x, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size)
    rows = torch.arange(3)[index].reshape(-1)
    assert torch.equal(operator[index].A(x[rows]), operator.A(x)[rows])
    assert torch.allclose(operator[index].A_adjoint(y[rows]), operator.A_adjoint(y)[rows], atol=1e-14)
    assert operator[index].design is operator.design


NOISY = {
    "identity": lambda mask: Identity((2, 4, 3), noise_std=0.3),
    "masking": lambda mask: Masking(mask, (2, 4, 3), noise_std=0.3),
    "masking, any channels": lambda mask: Masking(mask, noise_std=0.3),
    "mri": lambda mask: MRI(mask, noise_std=0.3),
    "mri, coils": lambda mask: MRI(mask, coil_maps(3, 4, 3), noise_std=0.3),
    "mri, coils of each scan": lambda mask: MRI(mask[:1], coil_maps(3, 4, 3, batch=3), noise_std=0.3),
}


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "taken",
    [
        lambda op: op[:],
        lambda op: op[1],
        lambda op: op[torch.tensor([2, 0])],
        lambda op: op.with_mask(op.mask.expand(3, *op.measurement_size)),
        lambda op: op.split(keep=1.0).kept[:],
        lambda op: op.split(keep=1.0).held_out,
    ],
)
def test_what_is_taken_from_an_operator_moves_alone(kind, shared, taken):
    """A copy has buffers, noise model and hooks of its own, so that moving it leaves the caller's where it
    is.
    """
    mask = random_mask(3, 1, 4, 3)
    operator = NOISY[kind](mask[:1] if shared else mask)
    before = {name: (buffer.dtype, buffer.clone()) for name, buffer in operator.named_buffers()}
    copied = taken(operator)
    assert copied is not operator and copied.noise_model is not operator.noise_model
    copied.to(F64).register_forward_hook(lambda *_: None)
    assert all(buffer.dtype == F64 for buffer in copied.buffers())
    copied.noise_model.update_parameters(sigma=7.0)
    after = dict(operator.named_buffers())
    assert after.keys() == before.keys() and len(operator._forward_hooks) == 0
    assert all(
        after[name].dtype == dtype and torch.equal(after[name], t) for name, (dtype, t) in before.items()
    )


@pytest.mark.parametrize("size", [(4, 3), (4, 6)])
def test_operators_of_checked_parts_are_the_operators_of_the_constructor(size):
    """The unchecked way in: same maps, same answers, same pickles; ``own`` folds the shift in where the maps
    lie.
    """
    mask, design = random_mask(2, 1, *size).float(), Independent((2, *size), "pixels", 0.5)
    maps = coil_maps(3, *size, batch=2).to(torch.complex64)
    pairs = [
        (Masking(mask, (2, *size), design), Masking._trusted(mask, (2, *size), design)),
        (MRI(mask, design=design), MRI._trusted(mask, design=design)),
        (MRI(mask, maps, design), MRI._trusted(mask[:, :, None], maps, design)),
        (MRI(mask, 2 * maps), MRI._trusted(mask[:, :, None], (2 * maps), isometry=False, own=True)),
    ]
    for built, trusted in pairs:
        for other in (trusted, pickle.loads(pickle.dumps(trusted)), copy.deepcopy(trusted), trusted[:]):
            assert type(other) is type(built) and other.isometry == built.isometry
            assert other.img_size == built.img_size and other.measurement_size == built.measurement_size
            assert (other.design is None) == (built.design is None) and other.square == built.square
            assert {n: b.shape for n, b in other.named_buffers()} == {
                n: b.shape for n, b in built.named_buffers()
            }
            x = normal(2, 2, *size).float()
            assert torch.equal(built.A(x), other.A(x)) and torch.equal(
                built.A_adjoint_A(x), other.A_adjoint_A(x)
            )
    assert torch.equal(pairs[2][1].coil_maps, pairs[2][0].coil_maps)  # the caller's maps were not touched
    assert (
        Masking._trusted(mask, (2, *size)).noise_model is not Masking._trusted(mask, (2, *size)).noise_model
    )


def test_what_is_derived_inside_is_not_looked_at_again(operator, monkeypatch):
    """Indexing, splitting, another mask, a mirrored copy: no value of a mask or a map is read."""

    def derive() -> None:
        operator[1:], operator[[0, 2]], operator.with_mask(torch.zeros_like(operator.mask))
        operator.split(keep=1.0), operator.split(keep=0.5, generator=seeded())
        for axis in (-1, -2):
            flip(operator, normal(3, *operator.measurement_size), axis)
        copy.deepcopy(operator)

    derive()  # what is built once a process is there now
    monkeypatch.setattr(RowMaskedOperator, "_checked", lambda *_: pytest.fail("mask checked inside"))
    monkeypatch.setattr(MRI, "_checked_maps", lambda *_: pytest.fail("maps checked inside"))
    monkeypatch.setattr(deepinv.physics.LinearPhysics, "__init__", lambda *_: pytest.fail("built anew"))
    derive()


def test_splits_of_moved_operators_are_drawn_from_the_mask_on_the_host(name):
    """The mask that is remembered goes where the operator goes: indexing, mirroring, one for each sample. Same draws."""
    here = operator_zoo()[name].float()
    there = here.on_device("cpu")
    assert there is not here and there._host_mask is here.mask
    there._buffers["mask"] = there.mask.clone()  # as on a device: other memory
    y = normal(3, *here.measurement_size)
    for change in (
        lambda op: op,
        lambda op: op[[2, 0]],
        lambda op: op[1:],
        lambda op: op.for_samples(3),
        lambda op: flip(op, y, -1)[0],
        lambda op: flip(op, y, -2)[0],
    ):
        a, b = change(here), change(there)
        assert name == "identity" or torch.equal(b._host_mask, b.mask)
        one, other = (op.split(keep=0.5, generator=seeded(3)) for op in (a, b))
        assert torch.equal(one.kept.mask, other.kept.mask) and torch.equal(one.weights, other.weights)
    assert there.with_mask(torch.ones_like(there.mask))._host_mask is None
    there._host_mask = torch.ones_like(there.mask)  # what is drawn from is this one
    full = there.split(keep=0.5, generator=seeded(3)).kept.mask
    assert name == "identity" or bool((full > there.mask).any())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e25])
def test_impossible_maps_are_found_at_every_scale(scale):
    """Squares of maps vanish or overflow in float32; their values are what is judged."""
    maps = (scale * coil_maps(2, 4, 4)).to(torch.complex64)
    assert MRI(torch.ones(4, 4), maps).isometry == (scale == 1.0)
    for value in (math.nan, math.inf):
        spoilt = maps.clone()
        spoilt[0, 1, 2, 3] = value
        with pytest.raises(InputError, match="finite values"):
            MRI(torch.ones(4, 4), spoilt)
    with pytest.raises(InputError, match="not all zero"):
        MRI(torch.ones(2, 1, 4, 4), torch.cat([maps, 0 * maps]))


def test_indexing_ends():
    for name, operator in operator_zoo().items():
        if name != "identity":
            with pytest.raises(IndexError, match="index below 3"):
                operator[3]
        with pytest.raises(TypeError):
            iter(operator)


@pytest.mark.parametrize("copied", [lambda op: pickle.loads(pickle.dumps(op)), copy.deepcopy])
def test_copies(operator, copied):
    again = copied(operator)
    assert type(again) is type(operator) and again.mask is not operator.mask
    assert again.mask.dtype == operator.mask.dtype or operator.name == "identity"
    x = normal(3, *operator.img_size)
    assert torch.allclose(again.A(x), operator.A(x), atol=1e-14)
    split = operator.split(keep=0.5, generator=seeded(0))
    assert torch.equal(copied(split.held_out).mask, split.held_out.mask)


def test_copies_keep_design_and_noise():
    design = Independent((2, 4, 3), "pixels", 0.5)
    operator = MRI(design.sample(2, seeded(0)), coil_maps(2, 4, 3), design, noise_std=0.2)
    again = pickle.loads(pickle.dumps(operator))
    assert again.design.to_dict() == design.to_dict() and float(again.noise_model.sigma) == pytest.approx(0.2)
    assert float(pickle.loads(pickle.dumps(Identity((1, 2, 2), noise_std=0.2))).noise_model.sigma) == pytest.approx(0.2)  # fmt: skip


def test_single_precision_data_stay_single(operator):
    x = normal(3, *operator.img_size).float()
    single = operator.to(torch.float32)
    assert single.A(x).dtype == torch.float32 and single.mask.dtype == torch.float32
    for other in (Masking(random_mask(3, 1, 4, 3), (2, 4, 3)), MRI(random_mask(3, 1, 4, 3).bool())):
        assert other.A(x).dtype == torch.float32  # whatever type the mask came in


def test_maps_survive_a_change_of_type():
    """Complex sensitivities keep their imaginary part through ``.to``, and come back as they were given."""
    maps = coil_maps(3, 5, 4)
    operator = MRI(torch.ones(5, 4), maps)
    assert torch.allclose(operator.coil_maps, maps, atol=1e-14)
    assert torch.allclose(operator.to(torch.float32).to(F64).coil_maps, maps, atol=1e-6)
    assert (
        operator.coils == 3 and MRI(torch.ones(5, 4)).coils == 1 and MRI(torch.ones(5, 4)).coil_maps is None
    )


def test_with_mask_shares_the_transform(operator):
    other = operator.with_mask(torch.ones_like(operator.mask))
    x = normal(3, *operator.img_size)
    assert torch.allclose(other.A(x), operator.transform(x), atol=1e-14)
    assert other.complete and operator.complete == (operator.name == "identity")
    with pytest.raises(InputError, match="mask: expected"):
        operator.with_mask(torch.ones(7))


def test_first_use_without_gradients_does_not_spoil_later_use():
    """Cached factors of the transform must work in a graph, also if first made under inference mode."""
    size = (22, 26)  # of no other test: a fresh entry of the cache
    with torch.inference_mode():
        MRI(torch.ones(size)).A(torch.zeros(1, 2, *size))
    x = torch.ones(1, 2, *size, requires_grad=True)
    MRI(torch.ones(size)).A(x).square().sum().backward()
    assert torch.allclose(x.grad, 2 * x)


def test_what_a_network_sees():
    mask = random_mask(2, 1, 4, 3)
    assert torch.equal(MRI(mask).network_mask, mask.float())
    assert torch.equal(MRI(mask, coil_maps(3, 4, 3)).network_mask, mask.float())
    assert Masking(mask, (3, 4, 3)).network_mask.shape == (2, 1, 4, 3)
    assert Masking(random_mask(2, 3, 4, 3), (3, 4, 3)).network_mask.shape == (2, 3, 4, 3)
    assert Masking(torch.ones(1, 1, 1, 3), (3, 4, 3)).network_mask.shape == (1, 1, 4, 3)
    assert torch.equal(Identity((3, 4, 3)).network_mask, torch.ones(1, 1, 4, 3))
    assert torch.allclose(MRI(mask).kept_fraction, mask.float().flatten(1).mean(1))
    assert not MRI(mask).complete and MRI(torch.ones(4, 3)).complete and Identity((3, 4, 3)).complete


def test_one_channel_masks_take_any_number_of_channels():
    operator = Masking(random_mask(1, 4, 3)[0])
    for channels in (1, 2, 5):
        x = normal(2, channels, 4, 3).float()
        assert torch.equal(operator.A(x), x * operator.mask)
    with pytest.raises(InputError, match="masking: expected images"):
        operator.A(normal(2, 3, 4, 4))


# -- how the Fourier operator is computed --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mri", "mri, coils", "mri, coils of each scan"])
@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_a_batch_in_parts_is_the_batch_in_one(name, size, monkeypatch):
    """Working off a batch sample by sample changes nothing; each sample keeps its own mask and maps."""
    operator = operator_zoo(size=size)[name]
    x, y = normal(3, *operator.img_size), normal(3, *operator.measurement_size, seed=2)
    calls = [lambda: operator.A(x), lambda: operator.A_adjoint(y), lambda: operator.A_adjoint_A(x)]
    calls += [lambda: operator.transform(x), lambda: operator.transform_adjoint(y)]
    before = x.clone(), y.clone()
    whole = [call() for call in calls]
    monkeypatch.setattr("ambient_sci.operators.mri.PART_BYTES", 1)
    for call, expected in zip(calls, whole, strict=True):
        assert torch.allclose(call(), expected, atol=1e-14)
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])  # products in place touch no argument


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_derivatives(name, size):
    """Derivatives of first and second order, backward and forward, against finite differences; results may be
    changed in place.
    """
    operator = operator_zoo(2, size=size)[name]
    x, y = normal(2, *operator.img_size), normal(2, *operator.measurement_size, seed=2)
    for call, at in (
        (operator.A, x),
        (operator.A_adjoint, y),
        (operator.A_adjoint_A, x),
        (operator.transform, x),
    ):
        at = at.clone().requires_grad_()
        assert torch.autograd.gradcheck(call, at, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda z, f=call: f(z).square(), at)
        changed = call(at)
        if operator.name == "mri":  # the transform of the others is the identity: it returns its argument
            changed += 1.0
        direction = normal(*changed.shape, seed=3)
        (found,) = torch.autograd.grad((changed * direction).sum(), at)
        (expected,) = torch.autograd.grad((call(at) * direction).sum(), at)
        assert torch.equal(found, expected)
    value, pull = torch.func.vjp(operator.A, x)
    assert torch.allclose(pull(y)[0], operator.A_adjoint(y), atol=1e-12) and torch.equal(value, operator.A(x))


@pytest.mark.parametrize("coils", [None, 2])
def test_function_transforms_of_mri(coils):
    """torch.func's Jacobians and vmap, whatever axis the batch is on, against column by column."""
    maps = None if coils is None else coil_maps(coils, 5, 4)
    operator = MRI((torch.arange(4) % 2).repeat(5, 1), maps)
    x = normal(2, 5, 4)

    def single(x):
        return operator.A(x[None])[0]

    columns = torch.stack([single(e) for e in torch.eye(40, dtype=torch.float64).reshape(40, 2, 5, 4)], -1)
    for jacobian in (torch.func.jacrev(single)(x), torch.func.jacfwd(single)(x)):
        assert torch.allclose(jacobian.flatten(-3), columns, atol=1e-12)
    batches = normal(2, 5, 4, 3, seed=1)
    expected = torch.stack([single(batches[..., k]) for k in range(3)])
    assert torch.allclose(torch.func.vmap(single, in_dims=-1)(batches), expected, atol=1e-12)


def test_mri_of_one_image_under_all_maps_and_of_none(monkeypatch):
    monkeypatch.setattr("ambient_sci.operators.mri.PART_BYTES", 1)
    operator = MRI(torch.ones(5, 4), coil_maps(2, 5, 4, batch=3))
    x = normal(1, 2, 5, 4)
    assert torch.equal(operator.transform(x), operator.transform(x.expand(3, -1, -1, -1)))
    single = operator[0]
    assert single.A(x[:0]).shape == (0, 2, 2, 5, 4) and single.A_adjoint_A(x[:0]).shape == (0, 2, 5, 4)


# -- input that is refused -----------------------------------------------------------------------------------


def test_wrong_shapes_name_the_operator(operator):
    c, h, w = operator.img_size
    wrong_images = [normal(3, c, h, w + 1), normal(c, h, w), normal(3, c + 1, h, w)]
    if operator.batch_size > 1:
        wrong_images.append(normal(4, c, h, w))
    for x in wrong_images:
        for call in (operator.A, operator.A_adjoint_A):
            with pytest.raises(InputError, match=f"^{operator.name}: expected images .*{c}, {h}, {w}.* got "):
                call(x)
    with pytest.raises(InputError, match=f"^{operator.name}: expected measurements .* got "):
        operator.A_adjoint(normal(3, *operator.measurement_size[:-1], w + 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Masking(torch.full((4, 4), 0.5)), "masking mask: expected only 0 and 1"),
        (lambda: Masking(torch.full((4, 4), torch.nan)), "masking mask: expected only 0 and 1"),
        (lambda: Masking(torch.zeros(4, 4)), "sample 0 selects nothing"),
        (lambda: Masking(torch.ones(4, 4), (2, 5, 4)), "masking mask: expected a shape"),
        (lambda: Masking(torch.ones(2, 3, 4, 4), (2, 4, 4)), "masking mask: expected a shape"),
        (lambda: Masking(torch.ones(4)), "masking mask"),
        (
            lambda: MRI(torch.ones(2, 4, 4) * torch.tensor([1.0, 0]).reshape(2, 1, 1)),
            "sample 1 selects nothing",
        ),
        (lambda: MRI(torch.ones(3, 4)[None, None].expand(1, 3, 3, 4)), "mri mask: expected"),
        (lambda: MRI(torch.ones(4)), "mri mask: expected"),
        (lambda: MRI(random_mask(1, 2, 4, 4)), "real and imaginary part"),
        (lambda: MRI(torch.ones(4, 4), torch.ones(3, 4, 4)), "coil maps: expected complex"),
        (lambda: MRI(torch.ones(4, 4), coil_maps(3, 4, 5)), "coil maps: expected complex"),
        (lambda: MRI(torch.ones(2, 4, 4), coil_maps(3, 4, 4, batch=3)), "coil maps: expected complex"),
        (lambda: MRI(torch.ones(4, 4), coil_maps(3, 4, 4) * torch.nan), "coil maps: expected finite"),
        (lambda: MRI(torch.ones(4, 4), coil_maps(3, 4, 4) * 0), "not all zero"),
        (lambda: MRI(torch.ones(4, 4), coil_maps(3, 4, 4).requires_grad_()), "coil maps: expected constants"),
        (lambda: Identity((2, 0, 4)), "identity: expected a shape"),
        (lambda: build_operator("blur", None, (1, 4, 4)), "expected identity, masking or mri"),
        (lambda: build_operator("mri", None, (2, 4, 4)), "mri: expected a mask"),
    ],
)
def test_impossible_operators(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_operators_by_name():
    mask = random_mask(2, 1, 4, 3)
    assert isinstance(build_operator("identity", None, (2, 4, 3)), Identity)
    assert type(build_operator("masking", mask, (2, 4, 3))) is Masking
    assert build_operator("mri", mask, (2, 4, 3), coil_maps(3, 4, 3)).coils == 3


# -- coil maps -----------------------------------------------------------------------------------------------


def test_normalised_maps():
    """sum_c |s_c|^2 = 1 wherever there is sensitivity; the outside stays zero."""
    maps = 5 * coil_maps(4, 6, 6)
    maps[..., :2, :] = 0
    power = normalise_maps(maps).abs().square().sum(1)
    assert torch.allclose(power[..., 2:, :], torch.ones_like(power[..., 2:, :])) and bool(
        (power[..., :2, :] == 0).all()
    )


@pytest.mark.parametrize("scale", [1e-4, 1e-15, 1e15])
def test_normalisation_does_not_depend_on_the_scale(scale):
    """The support is where sensitivity is within 1e-3 of the largest, whatever unit the maps came in."""
    maps = coil_maps(4, 6, 6, batch=2).to(torch.complex64)
    maps[0, :, :2] *= 1e-4
    maps[1] *= 1e-6  # each sample has a scale of its own
    found = normalise_maps(maps * scale)
    assert torch.allclose(found, normalise_maps(maps), atol=1e-5)
    power = found.abs().square().sum(1)
    assert bool((power[0, :2] == 0).all()) and torch.allclose(power[0, 2:], torch.ones(4, 6))
    assert torch.allclose(power[1], torch.ones(6, 6))
    assert bool((normalise_maps(0 * maps) == 0).all())


def test_birdcage_maps():
    """Isometric, smooth, different when turned; turned by one coil spacing they are the same coils in another
    order.
    """
    maps = birdcage_maps(8, 16, 20)
    assert maps.shape == (8, 16, 20) and maps.dtype == torch.complex64
    assert MRI(torch.ones(16, 20), maps).isometry
    turned = birdcage_maps(8, 16, 20, rotation=0.3)
    assert MRI(torch.ones(16, 20), turned).isometry and (turned - maps).abs().max() > 0.05
    assert torch.allclose(birdcage_maps(8, 16, 20, rotation=2 * math.pi / 8), maps.roll(-1, 0), atol=1e-5)
    inside = maps[:, 3:-3, 3:-3]  # in the corners coils are nearly touched
    assert inside.diff(dim=1).abs().max() < 0.15 and inside.diff(dim=2).abs().max() < 0.15


# -- what masks can determine (lines: tests/test_designs.py) -------------------------------------------------


def test_identifiability_of_point_masks_with_coils():
    """Pairs of points decide there, which is sufficient; what is not shown is not called impossible."""
    masks = random_mask(40, 1, 6, 6, keep=0.7)
    one, several = identifiability(MRI(masks)), identifiability(MRI(masks, coil_maps(3, 6, 6)))
    assert one.identified and several.identified and one.conditioning == several.conditioning
    assert one.necessary and not several.necessary
    fixed = masks[:1]
    one, several = identifiability(MRI(fixed)), identifiability(MRI(fixed, coil_maps(3, 6, 6)))
    assert not one.identified and "NOT identified" in one.text and "coils" not in one.text
    assert not several.identified and "is not shown to be identified" in several.text
    assert "what 3 coils resolve beyond that is not looked at" in several.text


@pytest.mark.parametrize("coils", [1, 3])
def test_mri_computes_in_the_type_of_the_image_whatever_that_of_the_mask(coils):
    maps = birdcage_maps(coils, 8, 8)[None] if coils > 1 else None
    for mask, image in itertools.product((torch.float32, torch.float64), repeat=2):
        operator = MRI(torch.ones(1, 1, 8, 8, dtype=mask), maps)
        x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=image)
        y = operator.A(x)
        assert {y.dtype, operator.A_adjoint(y).dtype, operator.A_adjoint_A(x).dtype} == {image}


def test_an_operator_says_in_one_line_what_it_is():
    mask = torch.ones(1, 1, 8, 8)
    mask[..., ::2] = 0
    maps = coil_maps(4, 8, 8).to(torch.complex64)
    assert repr(MRI(mask, maps)) == "MRI(2 x 8 x 8, 4 coils, 50 % measured (R = 2))"
    assert repr(Identity((3, 8, 8))) == "Identity(3 x 8 x 8)"
    design = Independent((1, 8, 8), "pixels", 0.5)
    several = Masking(mask.expand(3, -1, -1, -1).clone(), (1, 8, 8), design)
    assert repr(several) == "Masking(1 x 8 x 8, 50 % measured, independent, 3 masks)"

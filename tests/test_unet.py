"""Our U-Net is MONAI's ``DiffusionModelUNet``: names, order, initial weights, answers and gradients, bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ambient_sci.priors.unet import DiffusionUNet

CASES = [
    # channels, blocks, attention, head, groups, in, out
    ((8, 16, 16), 1, (False, False, False), 8, 4, 2, 2),
    ((8, 16, 24), 2, (False, True, True), 8, 8, 3, 1),
    ((8, 8), 1, (True, True), 4, 2, 4, 4),
    ((16,), 2, (False,), 16, 4, 1, 1),
    ((9, 18), 1, (False, True), 9, 3, 1, 2),  # an odd width: the embedding is padded
]


def seeded(make):
    torch.manual_seed(5)
    return make()


def both(case):
    nets = pytest.importorskip("monai.networks.nets")
    channels, blocks, attention, head, groups, ins, outs = case
    ours = seeded(lambda: DiffusionUNet(ins, outs, channels, blocks, attention, head, groups))
    theirs = seeded(
        lambda: nets.DiffusionModelUNet(
            spatial_dims=2, in_channels=ins, out_channels=outs, channels=channels, num_res_blocks=blocks,
            attention_levels=attention, num_head_channels=head, norm_num_groups=groups,
        )
    )  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("case", CASES)
def test_same_tensors_in_the_same_order_with_the_same_initial_values(case):
    with torch.random.fork_rng():
        ours, theirs = both(case)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize(
    ("case", "dtype"), itertools.product(CASES, (torch.float32, torch.float64, torch.bfloat16))
)
def test_same_answers_and_gradients_bit_by_bit(case, dtype):
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        ours, theirs = (net.to(dtype) for net in both(case))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):  # the last layers start at zero
        value = 0.3 * torch.randn(a.shape, generator=generator)
        a.data.copy_(value), b.data.copy_(value)
    x = torch.randn(2, case[5], 16, 8, generator=generator).to(dtype)
    time = torch.tensor([3.0, -120.0])
    answers, gradients = [], []
    for net in (ours, theirs):
        given = x.clone().requires_grad_()
        out = net(given, time)
        out.square().sum().backward()
        answers.append(out.detach())
        gradients.append([given.grad, *(p.grad for p in net.parameters())])
    assert float(answers[0].std()) > 0
    assert torch.equal(*answers)
    assert all(map(torch.equal, *gradients))


def test_made_without_memory_it_takes_weights():
    with torch.random.fork_rng():
        full = DiffusionUNet(1, 1, (8, 8), 1, (False, False), 8, 4)
    with torch.device("meta"):
        empty: nn.Module = DiffusionUNet(1, 1, (8, 8), 1, (False, False), 8, 4)
    empty.load_state_dict(full.state_dict(), strict=True, assign=True)
    x = torch.ones(1, 1, 8, 8)
    assert torch.equal(empty(x, torch.zeros(1)), full(x, torch.zeros(1)))

"""What the loop optimises: modules with optimisers and averages of their own, frozen parts, buffers, dropout,
parts of a batch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ambient_sci import losses
from ambient_sci.errors import InputError
from ambient_sci.operators import Identity
from ambient_sci.priors import NetworkConfig, NetworkPrior, load_prior
from ambient_sci.randomness import forked, number, seeded
from ambient_sci.training import (
    AmbientStage,
    ConsistencyStage,
    JointConfig,
    OneModule,
    RunFolder,
    StagedConfig,
    TrainConfig,
    TrainingInterrupted,
    below_noise,
    fit,
    make_accelerator,
    open_source,
    run_stage,
)
from ambient_sci.training import batches as batches_module
from ambient_sci.training import loop as loop_module
from ambient_sci.training.players import Player, copy_sharing

CPU = torch.device("cpu")
SHAPE = (1, 1, 4)


def small(**changes) -> TrainConfig:
    settings = {"max_steps": 12, "batch_size": 4, "log_interval": 4, "device": "cpu", "warmup_steps": 1}
    return TrainConfig(**{**settings, **changes})


def prior(channels: int = 16, seed: int = 0) -> NetworkPrior:
    network = NetworkConfig(kind="mlp", channels=(channels, channels))
    return NetworkPrior(SHAPE, 1.0, network=network, generator=torch.Generator().manual_seed(seed))


class Learner(OneModule):
    """Denoising on Gaussian images of mean 5, by whatever module."""

    name = "learner"

    def __init__(self, module: nn.Module, num: int = 4, event=lambda step: None) -> None:
        self.module, self.num, self.event = module, num, event

    def indices(self, step: int, part: int = 0) -> list[int]:
        return list(range(self.num))

    def loss(self, step: int, part: int = 0) -> Tensor:
        self.event(step)
        x = 5 + torch.randn(self.num, *SHAPE, generator=seeded(7, step, part))
        return losses.denoising(self.module, x, 0.5, generator=seeded(8, step, part))  # type: ignore[arg-type]


def trained(stage, folder: RunFolder | None = None, resume: bool = False, **changes):
    config = small(**changes)
    if folder and not resume:
        folder.create(config, {"data": {}})
    return run_stage(stage, config, accelerator=make_accelerator("cpu"), folder=folder, resume=resume)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def with_layer(layer: nn.Module) -> NetworkPrior:
    """A prior with a layer of another kind before its last."""
    whole = prior()
    body: nn.Sequential = whole.network.body  # type: ignore[assignment]
    body.insert(len(body) - 1, layer)
    return whole


# -- streams -----------------------------------------------------------------------------------------------------------------


def test_streams_of_different_keys_are_unrelated():
    keys = [(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (10, 3), (10, 3, 0)]
    seeds = (0, 1, 5, 2**32, 2**32 + 5, 2**40)
    assert len({number(seed, *key) for seed in seeds for key in keys}) == len(seeds) * len(keys)
    assert torch.equal(torch.rand(4, generator=seeded(3, 1)), torch.rand(4, generator=seeded(3, 1)))


def test_forked_streams_leave_the_global_one_where_it_was():
    before = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        with forked(seed, CPU):
            found.append(torch.rand(3))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("aim", [3, 8])
def test_dropout_is_a_function_of_seed_and_step(tmp_path, aim):
    """The same bits twice, from any state of the global stream, and after an interruption; others with
    another seed.
    """

    def stage(event=lambda step: None):
        return Learner(with_layer(nn.Dropout(0.5)), event=event)

    def stop(step):
        if step == aim:
            os.kill(os.getpid(), signal.SIGTERM)

    first = trained(stage())
    torch.rand(7)
    before = torch.get_rng_state()
    again = trained(stage(), RunFolder(tmp_path / "whole"))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, again) and not same(first, trained(stage(), seed=1))
    cut = RunFolder(tmp_path / "cut")
    with pytest.raises(TrainingInterrupted):
        trained(stage(stop), cut)
    assert same(trained(stage(), cut, resume=True), first)
    assert not same(trained(Learner(with_layer(nn.Identity()))), first)


def test_walks_and_anchors_answer_without_dropout():
    """What is walked, and what the anchor says, does not depend on the global stream; what is trained
    does.
    """
    x = 0.6 * torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    config = small(
        consistency=StagedConfig(walk=(2, 2), max_steps=4), network=NetworkConfig(kind="mlp", channels=(16,))
    )
    accelerator = make_accelerator("cpu")
    source = open_source((Identity(SHAPE), x + 0.4 * torch.randn(x.shape), 0.4), config)
    first = AmbientStage(source, config, accelerator)
    body: nn.Sequential = first.module.network.body  # type: ignore[union-attr,assignment]
    body.insert(len(body) - 1, nn.Dropout(0.5))
    nn.init.normal_(body[-1].weight)
    stage = ConsistencyStage(first.batches, first.module, config)
    stage.module.train()
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    for module in (stage.anchor, stage.module):
        module.register_forward_hook(lambda m, inputs, out: seen[m.training].append(out.detach().clone()))
    for seed in (0, 1):
        with forked(seed, CPU):
            stage.loss(0)
    assert stage.module.training and len(seen[False]) == 4 and len(seen[True]) == 4
    assert all(torch.equal(seen[False][k], seen[False][k + 2]) for k in (0, 1))
    assert not torch.equal(seen[True][1], seen[True][3])


# -- buffers and frozen parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_the_averages_buffers_follow_the_modules(tmp_path, affine):
    """Running means of data of mean 5 reach the prior that is returned and saved, and a resumed run goes on
    from them.
    """
    module = with_layer(nn.BatchNorm1d(16, affine=affine))
    norm: nn.BatchNorm1d = module.network.body[-2]  # type: ignore[index,assignment]
    stage, folder = Learner(module), RunFolder(tmp_path / "run")
    average = trained(stage, folder)
    followed: nn.BatchNorm1d = average.network.body[-2]  # type: ignore[union-attr,index,assignment]
    assert bool((norm.running_mean != 0).all()) and torch.equal(followed.running_mean, norm.running_mean)  # type: ignore[operator,arg-type]
    assert torch.equal(followed.running_var, norm.running_var) and followed.num_batches_tracked == 12  # type: ignore[arg-type]
    whole = trained(Learner(with_layer(nn.BatchNorm1d(16, affine=affine))), max_steps=16, schedule="constant")
    short = RunFolder(tmp_path / "short")
    trained(Learner(with_layer(nn.BatchNorm1d(16, affine=affine))), short, schedule="constant")
    longer = Learner(with_layer(nn.BatchNorm1d(16, affine=affine)))
    assert same(trained(longer, short, resume=True, max_steps=16, schedule="constant"), whole)


class Adapted(nn.Module):
    """A linear layer that is frozen, and an adapter of low rank beside it (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(width: int = 256, rank: int = 8) -> NetworkPrior:
    module = prior(width).requires_grad_(False)
    body: nn.Sequential = module.network.body  # type: ignore[assignment]
    for index, layer in enumerate(body):
        if isinstance(layer, nn.Linear):
            body[index] = Adapted(layer, rank)
    return module


class Weights(OneModule):
    """A `Learner` whose prior saves nothing but itself as it is: adapters are no prior that the library
    stores.
    """

    name = "learner"

    def __init__(self, module: nn.Module) -> None:
        self.inner = Learner(module)
        self.module, self.indices = module, self.inner.indices

    def loss(self, step: int, part: int = 0) -> Tensor:
        return self.inner.loss(step, part)

    def prior(self, averages):
        return Unsaved(averages["prior"])


class Unsaved:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def save(self, path) -> None:
        pass


def test_a_frozen_base_is_neither_copied_nor_saved(tmp_path):
    """A checkpoint of an adapter weighs at most five times the adapter, and is all that a run needs to go on
    from.
    """
    torch.manual_seed(0)
    module, folder = adapted(), RunFolder(tmp_path / "run")
    base = copy.deepcopy({n: p for n, p in module.named_parameters() if not p.requires_grad})
    size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    start = copy.deepcopy(module)
    player = Player("prior", copy.deepcopy(module), small(), {}, CPU)
    shared = dict(player.module.named_parameters())
    for name, p in player.average.named_parameters():
        assert (p.data_ptr() == shared[name].data_ptr()) == (name in base), name

    average = trained(Weights(module), folder).module  # type: ignore[union-attr]
    file = tmp_path / "run" / "checkpoint" / "learner.safetensors"
    assert file.stat().st_size <= 5 * size
    assert sum(p.numel() * p.element_size() for p in base.values()) > 5 * size
    after = dict(module.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in base.items())
    assert not torch.equal(
        after["network.body.0.up.weight"], torch.zeros_like(after["network.body.0.up.weight"])
    )
    resumed = trained(Weights(start), folder, resume=True).module  # type: ignore[union-attr]
    assert same(average, resumed)


def test_the_checkpoint_of_another_module_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    trained(Learner(prior()), folder)
    part = prior()
    part.network.body[0].requires_grad_(False)  # type: ignore[index,union-attr]
    with pytest.raises(
        InputError, match=r"expected the tensors of this module, got others \(module.network.body.0"
    ):
        trained(Learner(part), folder, resume=True)


def test_a_copy_shares_what_is_frozen():
    module = prior()
    trainable = ["network.body.0.weight"]
    found = dict(copy_sharing(module, trainable).named_parameters())
    for name, p in module.named_parameters():
        assert (found[name] is p) == (name not in trainable) and torch.equal(found[name], p)


def test_the_second_stage_trains_what_the_first_did():
    """Frozen parameters stay shared and frozen; the others are the copy's own."""
    config = small(consistency=StagedConfig(max_steps=4), network=NetworkConfig(kind="mlp", channels=(16,)))
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    source = open_source((Identity(SHAPE), x, 0.4), config)
    first = AmbientStage(source, config, make_accelerator("cpu"))
    first.module.network.body[0].requires_grad_(False)  # type: ignore[index,union-attr]
    anchor = copy.deepcopy(first.module).requires_grad_(False)
    trainable = [n for n, p in first.module.named_parameters() if p.requires_grad]
    stage = ConsistencyStage(first.batches, anchor, config, trainable)
    theirs = dict(stage.anchor.named_parameters())
    for name, p in stage.module.named_parameters():
        assert p.requires_grad == (name in trainable) and (p is theirs[name]) == (name not in trainable)
    assert not any(p.requires_grad for p in stage.anchor.parameters())


def test_frozen_normalisations_keep_their_statistics():
    norm = nn.BatchNorm1d(16).requires_grad_(False)
    trained(Learner(with_layer(norm)))
    assert norm.num_batches_tracked == 0


def test_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="require a gradient, got none"):
        trained(Learner(prior().requires_grad_(False)))


def test_tied_weights_are_saved_once(tmp_path):
    module = prior()
    body: nn.Sequential = module.network.body  # type: ignore[assignment]
    extra = nn.Linear(16, 16)
    extra.weight = body[2].weight  # type: ignore[assignment]
    body.insert(4, extra)
    average = trained(Weights(module), RunFolder(tmp_path / "run")).module  # type: ignore[union-attr]
    with safe_open(tmp_path / "run" / "checkpoint" / "learner.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.startswith("prior/module.") and n.endswith("weight")]  # noqa: SIM118
    assert len(names) == 3
    assert average.network.body[4].weight is average.network.body[2].weight


# -- averages -------------------------------------------------------------------------------------------------------------------


def test_averages_of_half_precision_are_kept_in_single():
    """Decay .999 on bfloat16 weights that are moved by 1: after 1,000 steps the average is 1 - .999^1000 on
    the way. Kept in bfloat16 it would not move beyond a few thousandths' resolution."""
    module = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.zeros_(module.weight)
    player = Player("p", module, small(ema_decay=0.999, learning_rate=1e-9, max_steps=10**6), {}, CPU)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for step in range(10**5, 10**5 + 1000):
        module.weight.grad = torch.zeros_like(module.weight)
        player.update(step, 0.0)
    found = player.averaged().weight
    assert found.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert float(found.float().mean()) == pytest.approx(1 - 0.999**1000, rel=0.01)  # type: ignore[union-attr]
    assert player.state()["average.weight"].dtype == torch.float32


# -- turns ------------------------------------------------------------------------------------------------------------------------


class Duel:
    """Two modules in turns: "critic" fits the data, then "actor" fits the critic as it is after its step."""

    name = "duel"
    overrides = {"actor": {"learning_rate": 0.1, "betas": (0.0, 0.9)}}

    def __init__(self) -> None:
        self.modules = {"critic": prior(seed=0), "actor": prior(seed=1)}
        self.seen: list[tuple[int, str, float]] = []

    def indices(self, step, part=0):
        return [0, 1, 2, 3]

    def turns(self, step, part):
        critic, actor = self.modules["critic"], self.modules["actor"]
        x = torch.randn(4, *SHAPE, generator=seeded(7, step, part))
        weight = critic.network.body[-1].bias
        before = float(weight.detach().abs().sum())
        self.seen.append((step, "critic", before))
        yield "critic", losses.denoising(critic, x, 0.5, generator=seeded(8, step, part))
        self.seen.append((step, "actor", float(weight.detach().abs().sum())))
        if step % 2 == 0:
            yield "actor", (actor(x, 0.5) - critic(x, 0.5)).square().flatten(1).mean(1)

    def prior(self, averages):
        return averages["actor"]


def test_players_take_turns_each_with_its_own_optimiser(tmp_path):
    stage, folder = Duel(), RunFolder(tmp_path / "run")
    average = trained(stage, folder, schedule="constant")
    assert all(
        b[2] != a[2] for a, b in zip(stage.seen[::2], stage.seen[1::2], strict=True)
    )  # the critic has made its step before the actor's turn
    lines = [json.loads(line) for line in folder.log.read_text().splitlines()]
    assert (
        set(lines[0]["modules"]) == {"critic", "actor"}
        and lines[0]["loss"] == lines[0]["modules"]["critic"]["loss"]
    )
    assert lines[0]["modules"]["actor"]["learning_rate"] == pytest.approx(100 * lines[0]["modules"]["critic"]["learning_rate"])  # fmt: skip
    again = RunFolder(tmp_path / "again")
    trained(Duel(), again, max_steps=6, schedule="constant")
    whole = trained(Duel(), max_steps=12, schedule="constant")
    resumed = Duel()
    assert same(trained(resumed, again, resume=True, max_steps=12, schedule="constant"), whole)
    with safe_open(tmp_path / "run" / "checkpoint" / "duel.safetensors", "pt") as file:
        steps = {
            n: float(file.get_tensor(f"{n}/optimizer.network.body.0.weight.step"))
            for n in ("critic", "actor")
        }
    assert steps == {"critic": 12, "actor": 6}
    assert isinstance(average, NetworkPrior)


def test_a_players_turn_leaves_the_others_gradients_out():
    """The actor's loss has a gradient for the critic, too: it must not be part of the critic's step."""
    plain, alone = Duel(), Duel()

    def critic_only(step, part):
        yield next(Duel.turns(alone, step, part))

    alone.turns = critic_only  # type: ignore[method-assign]
    trained(plain)
    trained(alone)
    assert same(plain.modules["critic"], alone.modules["critic"])


def test_stages_that_cannot_be():
    stage = Duel()
    stage.overrides = {"actor": {"batch_size": 3}}
    with pytest.raises(InputError, match="player 'actor': expected settings among learning_rate"):
        trained(stage)

    class Silent(Learner):
        def turns(self, step, part=0):
            yield from ()

    with pytest.raises(InputError, match="expected a turn at step 0"):
        trained(Silent(prior()))

    class Uneven(Learner):
        def turns(self, step, part=0):
            yield "prior", self.loss(step, part)
            if part == 1:
                yield "prior", self.loss(step, part)

    with pytest.raises(InputError, match="the same turns of every part"):
        trained(Uneven(prior()), micro_batches=2)


# -- parts of a batch ----------------------------------------------------------------------------------------------------------


def test_parts_make_the_gradient_of_the_whole():
    """The mean over all samples: a loss that knows nothing of parts gives the same step with one and with
    two.
    """

    class Split(Learner):
        parts = 1

        def loss(self, step, part=0):
            x = 5 + torch.randn(4, *SHAPE, generator=seeded(7, step))
            z = torch.randn(4, *SHAPE, generator=seeded(8, step))
            loss = (self.module(x + 0.5 * z, 0.5) - x).square().flatten(1).mean(1)
            return loss.chunk(self.parts)[part]

    one, two = Split(prior()), Split(prior())
    two.parts = 2
    a, b = trained(one, gradient_clip=1e9), trained(two, micro_batches=2, gradient_clip=1e9)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):  # type: ignore[union-attr]
        assert torch.allclose(p, q, atol=1e-5)


def test_parts_are_trained_on_and_resumed(tmp_path):
    """Other bits than with one part, since each part has draws of its own; the same bits after an
    interruption.
    """
    x = 0.6 * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(0))
    data = (Identity(SHAPE), x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), 0.4)
    consistency = StagedConfig(max_steps=8, replay=True)
    config = small(
        batch_size=8,
        micro_batches=2,
        network=NetworkConfig(kind="mlp", channels=(16,)),
        consistency=consistency,
    )
    shorter = dataclasses.replace(config, consistency=dataclasses.replace(consistency, max_steps=4))
    constant = {"schedule": "constant"}
    whole = fit(data, dataclasses.replace(config, **constant), progress=False)
    fit(data, dataclasses.replace(shorter, **constant), out=tmp_path / "run", progress=False)
    resumed = fit(
        data, dataclasses.replace(config, **constant), out=tmp_path / "run", resume=True, progress=False
    )
    assert same(resumed, whole)
    assert not same(
        fit(data, dataclasses.replace(config, micro_batches=1, **constant), progress=False), whole
    )


@pytest.mark.parametrize(
    "consistency",
    [StagedConfig(max_steps=2, shrinkage=0.1, margin=1.1, replay=True), JointConfig(), None],
    ids=["staged", "joint", "ambient"],
)
def test_no_two_shares_have_a_stream_in_common(monkeypatch, consistency):
    """Of all streams that a run draws from, two parts share the length of walks alone, and no stream serves
    twice.
    """
    x = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    config = small(
        micro_batches=2,
        max_steps=2,
        consistency=consistency,
        network=NetworkConfig(kind="mlp", channels=(16,)),
    )
    used: list[tuple[int, ...]] = []

    def noted(plain):
        def call(seed, *key, **options):
            used.append(key)
            return plain(seed, *key, **options)

        return call

    for module in (batches_module, below_noise):
        monkeypatch.setattr(module, "seeded", noted(seeded))
    monkeypatch.setattr(loop_module, "number", noted(number))
    fit((Identity(SHAPE), x, 0.4), config, progress=False)
    stages = 2 if isinstance(consistency, StagedConfig) else 1
    counts = {key: used.count(key) for key in used}
    assert all(len(key) >= 3 or key[0] == 10 for key in counts)  # purpose, step, share; 10: walks
    per_purpose = {p: sum(n for k, n in counts.items() if k[0] == p) for p in {k[0] for k in counts}}
    assert {1, 2, 3, 4} <= set(per_purpose)
    for key, times in counts.items():
        # Walks are as long in both parts; a second stage has the batches of the first.
        assert times <= (2 if key[0] == 10 else stages if key[0] <= 4 else 1), (key, times)


def test_a_checkpoint_of_version_0_1_is_continued(tmp_path, capsys):
    """One module, parameters by number, no shares: weights, averages and moments are read, and what differs is said."""
    out, settings = (
        tmp_path / "run",
        {
            "batch_size": 4,
            "device": "cpu",
            "network": NetworkConfig(kind="mlp", channels=(16,)),
            "log_interval": 2,
        },
    )
    data = (Identity((1, 4, 4)), torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)), 0.2)
    fit(data, TrainConfig(max_steps=4, **settings), out=out, progress=False)
    path = out / "checkpoint" / "ambient.safetensors"
    tensors = load_file(path)
    names = [k.removeprefix("prior/module.") for k in tensors if k.startswith("prior/module.")]
    order = [name for name, _ in load_prior(out).named_parameters()]
    assert sorted(names) == sorted(order)
    old = {"trace": tensors["prior/trace"]}
    for index, name in enumerate(order):
        old |= {f"{kind}.{name}": tensors[f"prior/{kind}.{name}"] for kind in ("module", "average")}
        start = f"prior/optimizer.{name}."
        old |= {
            f"optimizer.{index}.{k.removeprefix(start)}": t for k, t in tensors.items() if k.startswith(start)
        }
    save_file(old, path, metadata={"state": json.dumps({"step": 4, "seconds": 1.0})})
    fit(data, TrainConfig(max_steps=8, **settings), out=out, resume=True)
    assert "instead of version 0.1's" in " ".join(capsys.readouterr().err.split())
    after = load_file(path)
    step = next(k for k in after if k.endswith(".step"))
    assert float(after[step]) == 8.0  # the optimiser went on from its own step

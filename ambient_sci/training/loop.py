r"""The training loop: one for every stage.

A stage says what is optimised, and yields the losses of a step in turns, each of one module; the loop does
the rest (see `ambient_sci.training.players` for what a turn does). Because the losses of step s are a
function of (seed, s) and of the weights alone, the state of a run is the weights, their averages, the
optimisers' moments and the step: no generator and no loader has to be saved, and a run continued from a
checkpoint repeats an uninterrupted one bit for bit (CPU, the same machine and number of threads). What
modules draw themselves (dropout) comes from torch's global streams, forked for each turn and seeded with
(seed, step, share, turn).

A batch is shared by P processes (``accelerate launch``), each of which takes its share in m =
``micro_batches`` parts, one after the other. Part k of process r is share r m + k of P m, whoever computes
it: P processes with m parts and one process with P m parts train on the same samples and the same noise, to
rounding. The loss of a step is the mean over all shares; gradients, loss and clock are averaged in one
reduction a turn, which works for any stage, whatever number of network calls its loss makes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci.errors import InputError
from ambient_sci.priors import Prior
from ambient_sci.randomness import forked, number
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.errors import TrainingDiverged, TrainingInterrupted
from ambient_sci.training.interruption import Interruption
from ambient_sci.training.players import Player
from ambient_sci.training.processes import Processes
from ambient_sci.training.report import Reporter
from ambient_sci.training.run_folder import RunFolder
from ambient_sci.training.selection import Selection

# Processes agree on the clock and on interruptions this often (steps): each time costs a wait for the
# accelerator.
_AGREE_EVERY = 10
# Stream of randomness of what modules draw themselves.
_MODULES = 4


class Stage(Protocol):
    """What a stage of training is to the loop.

    Attributes:
        name: names the checkpoint and the lines of the log.
        modules: what is optimised, by name: each has an optimiser, a clip, an average and a group in the
            checkpoint.

    A stage whose modules are not all optimised alike has ``overrides``: module name to the settings of
    `TrainConfig` in which it differs. A stage whose losses depend on more than weights and step has
    ``state()`` and ``load_state(tensors)``: tensors with a row for each sample of this process's parts, in
    their order.
    """

    name: str

    @property
    def modules(self) -> dict[str, nn.Module]: ...

    def turns(self, step: int, part: int) -> Iterator[tuple[str, Tensor]]:
        """Name of a module and loss of every sample of a part of this process's share, (B,), one turn after
        the other.

        A function of the seed, the step and the weights. The module has made its step before the next turn is
        asked for; every part yields the same names.
        """
        ...

    def indices(self, step: int, part: int) -> list[int]:
        """The samples of that part, for error messages."""
        ...

    def prior(self, averages: dict[str, nn.Module]) -> Prior:
        """The prior that averaged weights make, to be saved and returned."""
        ...


class OneModule:
    """A stage with one module and one turn a step: it has ``module`` and ``loss(step, part)``."""

    module: nn.Module

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The module, under the name of what it becomes."""
        return {"prior": self.module}

    def loss(self, step: int, part: int = 0) -> Tensor:
        """Loss of every sample of a part, (B,)."""
        raise TypeError(f"{type(self).__name__} does not say its loss")

    def turns(self, step: int, part: int = 0) -> Iterator[tuple[str, Tensor]]:
        """The loss, as the one turn of the step."""
        yield "prior", self.loss(step, part)

    def prior(self, averages: dict[str, nn.Module]) -> Prior:
        """The averaged module, which is a prior."""
        return averages["prior"]  # type: ignore[return-value]


def run_stage(
    stage: Stage,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    folder: RunFolder | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    selection: Selection | None = None,
) -> Prior:
    """Train ``stage`` to the end of ``config``, from its checkpoint in ``folder`` if ``resume``; return the
    averaged prior.

    A stage that had already ended is only loaded. With ``selection`` the prior is the state of the run that
    scored best.

    Raises:
        InputError: modules without trainable parameters, or the checkpoint of other ones.
        TrainingDiverged: loss or gradient not finite; names step and batch. Nothing of that step is saved.
        TrainingInterrupted: SIGINT or SIGTERM, after the step at hand and a checkpoint.
        ProcessLost: another process of the run has ended.
    """
    reporter = reporter or Reporter(enabled=False)
    loop = _Loop(stage, config, accelerator, folder, selection)
    if resume:
        loop.restore(reporter)
    loop.run(reporter)
    return loop.trainable_prior()


class _Loop:
    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        accelerator: Accelerator,
        folder: RunFolder | None,
        selection: Selection | None,
    ) -> None:
        config = config.explicit()
        self.stage, self.config, self.folder, self.selection = stage, config, folder, selection
        # (score, step) of the state that is kept; scores since the last line of the log.
        self.best: tuple[float, int] | None = None
        self.judged: dict[str, float] = {}
        self.processes, self.device = Processes(accelerator), accelerator.device
        own: dict[str, dict[str, Any]] = getattr(stage, "overrides", {})
        self.players = {
            name: Player(name, module, config, own.get(name, {}), self.device)
            for name, module in stage.modules.items()
        }
        self.parts = config.micro_batches
        self.step, self.seconds, self.saved = 0, 0.0, 0.0
        self.unchecked: list[tuple[int, Tensor, Tensor]] = []
        self.stop: int | None = None

    def prior(self, best: bool = True) -> Prior:
        """The prior of the averages: as they are, or as they were when they scored ``best``."""
        kept = {name: player.kept if best else None for name, player in self.players.items()}
        return self.stage.prior({n: kept[n] or player.averaged() for n, player in self.players.items()})

    def trainable_prior(self) -> Prior:
        """The prior, its parameters as open to training as those of the modules, as they are when it is
        loaded.

        Kernels choose their path by this flag even where no gradient is taken: a prior in memory answers with
        the bits of the one in the file only if they agree.
        """
        modules = [player.module for player in self.players.values()]
        frozen = {id(p) for module in modules for p in module.parameters() if not p.requires_grad}
        prior = self.prior()
        for p in prior.parameters() if isinstance(prior, nn.Module) else ():
            p.requires_grad_(id(p) not in frozen)
        return prior

    # -- the loop --------------------------------------------------------------------------------------------

    def run(self, reporter: Reporter) -> None:
        reporter.ended[self.stage.name] = self.step, self.seconds
        if self.config.progress(self.step, self.seconds) >= 1:
            return
        shown = reporter.stage(self.stage.name, self.config, self.step, self.seconds)
        self.begun = time.monotonic() - self.seconds
        self.saved = self.seconds
        with Interruption() as interruption, shown:
            while self.config.progress(self.step, self.seconds) < 1 and self.stop is None:
                self._advance(interruption)
                self._judge()
                if self.step % self.config.log_interval == 0:
                    shown.observe(self._log())
                # By the clock that the processes share: they save together.
                if self.seconds - self.saved >= 60 * self.config.checkpoint_minutes:
                    self.save()
                shown.update(self.step, self.seconds)
            if (self.step % self.config.log_interval or self.judged) and self.stop is None:
                self._log()
            self.save()
        self.processes.wait()
        reporter.ended[self.stage.name] = self.step, self.seconds
        if self.stop is not None:
            raise TrainingInterrupted(self.stop, self.step, str(self.folder.path) if self.folder else None)

    def _advance(self, interruption: Interruption) -> None:
        """Step ``self.step``, turn by turn, after which it counts one more."""
        progress = self.config.progress(self.step, self.seconds)
        parts = [self.stage.turns(self.step, part) for part in range(self.parts)]
        for turn in count():
            taken = self._turn(turn, parts)
            if taken is None and turn == 0:
                raise InputError(f"stage {self.stage.name!r}: expected a turn at step {self.step}, got none")
            if taken is None:
                break
            player, losses = taken
            loss = self._synchronise(player, losses.mean(), interruption)
            norm = player.clip()
            self.unchecked.append((self.step, losses, norm))
            # Elsewhere reading a value waits for the device: that is done when a line of the log is due.
            if self.device.type == "cpu":
                self._check_finite()
            player.update(self.step, progress)
            player.trace += torch.stack(
                [loss.double(), norm.double(), torch.ones_like(norm, dtype=torch.float64)]
            )
        self.step += 1

    def _judge(self) -> None:
        """Score the averages where it is time to, and keep them if none were better."""
        selection = self.selection
        over = self.config.progress(self.step, self.seconds) >= 1
        if selection is None or not (over or self.step % selection.every == 0):
            return
        score = selection(self.prior(best=False))
        if self.processes.count > 1:  # in the last digits they may differ, and then each would keep its own
            score = float(self.processes.mean(torch.tensor(score, dtype=torch.float64, device=self.device)))
        self.judged[str(self.step)] = score
        if self.best is None or score < self.best[0]:
            self.best = (score, self.step)
            for player in self.players.values():
                player.keep()

    def _turn(self, turn: int, parts: list[Iterator[tuple[str, Tensor]]]) -> tuple[Player, Tensor] | None:
        """Loss and gradient of the next turn, one part after the other; None where the step is over."""
        names, losses = [], []
        for part, turns in enumerate(parts):
            share = self.processes.rank * self.parts + part
            seed = number(self.config.seed, _MODULES, self.step, share, turn)
            bf16 = self.config.precision == "bf16"
            with forked(seed, self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                name, loss = next(turns, (None, None))
            names.append(name)
            if any(other != names[0] for other in names):
                raise InputError(
                    f"stage {self.stage.name!r}: expected the same turns of every part, got {names}"
                )
            if name is None or loss is None:
                continue
            if part == 0:
                self.players[name].optimizer.zero_grad(set_to_none=True)
            (loss.mean() / self.parts).backward()
            losses.append(loss.detach())
        return (self.players[names[0]], torch.cat(losses)) if losses else None

    def _synchronise(self, player: Player, loss: Tensor, interruption: Interruption) -> Tensor:
        """Mean over processes of gradients and loss; the processes also agree on the clock and on whether to
        stop.
        """
        now = time.monotonic() - self.begun
        if self.processes.count == 1:
            self.seconds, self.stop = now, interruption.signum
            return loss
        # The clock is the main process's: a mean of (n * seconds, 0, 0, ...). Any process may have caught the
        # signal.
        clock = now * self.processes.count if self.processes.is_main else 0.0
        said = torch.tensor([clock, float(interruption.signum or 0)], device=self.device)
        for p in player.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in player.parameters if p.grad is not None]
        flat = torch.cat([g.flatten().float() for g in grads] + [loss.float().reshape(1), said])
        flat = self.processes.mean(flat)
        for grad, mean in zip(grads, flat[:-3].split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        if self.step % _AGREE_EVERY == 0:
            self.seconds, caught = (float(v) for v in flat[-2:])
            self.stop = (interruption.signum or 15) if caught > 0 else None
        return flat[-3]

    def _check_finite(self) -> None:
        if not self.unchecked:
            return
        # One look at the device for all steps since the last one.
        sound = [torch.isfinite(losses).all() & torch.isfinite(norm) for _, losses, norm in self.unchecked]
        if bool(torch.stack(sound).all()):
            self.unchecked.clear()
            return
        for step, losses, norm in self.unchecked:
            good = torch.isfinite(losses)
            if bool(good.all()) and bool(torch.isfinite(norm)):
                continue
            indices = [i for part in range(self.parts) for i in self.stage.indices(step, part)]
            bad = [i for i, ok in zip(indices, good.tolist(), strict=True) if not ok] or indices
            what = "loss" if len(bad) < len(indices) or not bool(good.any()) else "gradient"
            raise TrainingDiverged(
                f"stage {self.stage.name!r}: {what} not finite at step {step}, samples {bad}; "
                "lower the learning rate or use fp32, and check those samples",
                step,
                bad,
            )

    # -- log, save, restore ----------------------------------------------------------------------------------

    def _log(self) -> float:
        """A line of the log: of the first module, and of each where there are several. Returns the loss of
        the first.
        """
        self._check_finite()
        lines = {}
        for name, player in self.players.items():
            loss, norm, turns = player.trace.tolist()
            player.trace.zero_()
            if turns:
                rate = player.rate
                lines[name] = {"loss": loss / turns, "gradient_norm": norm / turns, "learning_rate": rate}
        first = next(iter(lines.values()))
        line = {"stage": self.stage.name, "step": self.step, **first, "seconds": round(self.seconds, 3)}
        if len(self.players) > 1:
            line["modules"] = lines
        if self.judged:
            line["scores"], self.judged = self.judged, {}
        if self.folder and self.processes.is_main:
            self.folder.append_log(line)
        return first["loss"]

    def save(self) -> None:
        """Checkpoint and prior. All processes come here, and the main one writes: what they hold is the same
        but for the rows of their samples, which are gathered."""
        self._check_finite()
        self.saved = self.seconds
        if self.folder is None:
            return
        state: dict[str, Tensor] = self.stage.state() if hasattr(self.stage, "state") else {}  # type: ignore[attr-defined]
        tensors = {f"stage.{key}": self.processes.gather(rows) for key, rows in state.items()}
        if not self.processes.is_main:
            return
        for name, player in self.players.items():
            tensors |= {f"{name}/{key}": value for key, value in player.state().items()}
        values = {"step": self.step, "seconds": self.seconds, "shares": self.processes.count * self.parts}
        values |= {"best": self.best, "judged": self.judged} if self.best else {}
        values["progress"] = self.config.progress(self.step, self.seconds)
        self.folder.save_checkpoint(self.stage.name, tensors, values)
        self.prior().save(self.folder.prior)

    def restore(self, reporter: Reporter) -> None:
        """Continue from the stage's checkpoint; without one, from the beginning."""
        if self.folder is None:
            return
        saved = self.folder.load_checkpoint(self.stage.name)
        values = saved[1] if saved else {"step": 0, "seconds": 0.0}
        if self.processes.is_main:
            self.folder.rewind_log(self.stage.name, values["step"])
        if saved is None:
            return
        tensors, shares = saved[0], self.processes.count * self.parts
        if "shares" not in values:
            tensors = self._of_version_0_1(tensors)
            values["shares"] = "version 0.1's"
        if values["shares"] != shares:
            reporter.say(
                f"{self.stage.name}: resumed with batches in {shares} shares (processes x micro_batches) "
                f"instead of {values['shares']}: what is drawn from here on is not what the uninterrupted "
                "run would have drawn"
            )
        self.step, self.seconds = values["step"], values["seconds"]
        if values.get("best") and self.selection is None:
            raise InputError(
                f"{self.stage.name}: expected the selection that the run keeps its best state by, got none"
            )
        self.best, self.judged = tuple(values.get("best") or ()) or None, values.get("judged", {})  # type: ignore[assignment]
        self._say_schedule(values.get("progress", 0.0), reporter)
        for name, player in self.players.items():
            player.load_state(_below(tensors, f"{name}/"))
        if hasattr(self.stage, "load_state"):
            rows = {key: self.processes.own(value) for key, value in _below(tensors, "stage.").items()}
            self.stage.load_state(rows)  # type: ignore[attr-defined]
        if self.processes.is_main:  # a run that died between the two, or a prior that was damaged since
            self.folder.settle_prior(self.stage.name, self.prior())

    def _say_schedule(self, before: float, reporter: Reporter) -> None:
        """Where a new limit moves the end of the run, the learning rate moves with it: say so."""
        now, config = self.config.progress(self.step, self.seconds), self.config
        if now < before and config.schedule == "cosine":
            rate, last = (config.learning_rate_at(self.step, p) for p in (now, 1.0))
            reporter.say(
                f"{self.stage.name}: resumed at step {self.step} with a later end: the learning rate goes on "
                f"along the cosine to it, from {rate:.2g} here to {last:.2g}"
            )

    def _of_version_0_1(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of version 0.1, which had one module and numbered its parameters, in today's names."""
        (name, player), found = next(iter(self.players.items())), {"trace": tensors["trace"]}
        for index, own in enumerate(player.names):
            found |= {f"{kind}.{own}": tensors[f"{kind}.{own}"] for kind in ("module", "average")}
            moments = _below(tensors, f"optimizer.{index}.")
            found |= {f"optimizer.{own}.{key}": value for key, value in moments.items()}
        found |= {f"buffer.{own}": tensors[f"module.{own}"] for own in player.persistent()}
        chains = {key: value for key, value in tensors.items() if key.startswith("stage.")}
        return {f"{name}/{key}": value for key, value in found.items()} | chains


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

r"""The training loop: one for every stage.

A stage says what is optimised and what the loss of step s is; the loop does the rest:

    theta <- AdamW(theta, clip(grad mean_b loss_b(s)), lr(s)),        theta_ema <- d(s) theta_ema + (1 - d(s)) theta,

with learning rate and decay as in `ambient_sci.training.config`. Because the loss of step s is a function of (seed, s) alone, the
state of a run is the weights, their average, the optimiser's moments and the step: no generator and no loader has to be saved,
and a run continued from a checkpoint repeats an uninterrupted one bit for bit (CPU, the same machine and number of threads).

Several processes (``accelerate launch``) each take their part of every batch; gradients, loss and clock are averaged in one
reduction per step, which works for any stage, whatever number of network calls its loss makes.
"""

from __future__ import annotations

import copy
import time
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambient_sci.priors import Prior
from ambient_sci.training.config import TrainConfig
from ambient_sci.training.errors import TrainingDiverged, TrainingInterrupted
from ambient_sci.training.interruption import Interruption
from ambient_sci.training.report import Reporter
from ambient_sci.training.run_folder import RunFolder

# Processes agree on the clock and on interruptions this often (steps): each time costs a wait for the accelerator.
_AGREE_EVERY = 10


class Stage(Protocol):
    """What a stage of training is to the loop.

    Attributes:
        name: names the checkpoint and the lines of the log.
        module: its trainable parameters are optimised, averaged and saved.

    A stage whose loss depends on more than that has ``state()`` and ``load_state(tensors)``, for the checkpoint.
    """

    name: str
    module: nn.Module

    def loss(self, step: int) -> Tensor:
        """Loss of every sample of this process's part of the batch, (B,): a function of the seed, the step and the weights."""
        ...

    def indices(self, step: int) -> list[int]:
        """The samples of that batch, for error messages."""
        ...

    def prior(self, average: nn.Module) -> Prior:
        """The prior that averaged weights make, to be saved and returned."""
        ...


def run_stage(
    stage: Stage,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    folder: RunFolder | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Prior:
    """Train ``stage`` to the end of ``config``, from its checkpoint in ``folder`` if ``resume``; return the averaged prior.

    A stage that had already ended is only loaded.

    Raises:
        TrainingDiverged: loss or gradient not finite; names step and batch. Nothing of that step is saved.
        TrainingInterrupted: SIGINT or SIGTERM, after the step at hand and a checkpoint.
    """
    loop = _Loop(stage, config, accelerator, folder)
    if resume:
        loop.restore()
    loop.run(reporter or Reporter(enabled=False))
    return stage.prior(loop.average)


class _Loop:
    def __init__(
        self, stage: Stage, config: TrainConfig, accelerator: Accelerator, folder: RunFolder | None
    ) -> None:
        self.stage, self.config, self.accelerator = stage, config, accelerator
        self.folder = folder
        self.device = accelerator.device
        self.module = stage.module.to(self.device).train()
        self.average = copy.deepcopy(self.module).eval().requires_grad_(False)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        pairs = zip(self.module.parameters(), self.average.parameters(), strict=True)
        self.averaged = [mean for p, mean in pairs if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step, self.seconds = 0, 0.0
        # Sums since the last line of the log: loss, gradient norm, number of steps. On the device, read when a line is due.
        self.trace = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.unchecked: list[tuple[int, Tensor, Tensor]] = []
        self.stop: int | None = None

    # -- the loop ------------------------------------------------------------------------------------------------------------

    def run(self, reporter: Reporter) -> None:
        if self.config.progress(self.step, self.seconds) >= 1:
            return
        shown = reporter.stage(self.stage.name, self.config, self.step, self.seconds)
        self.begun = time.monotonic() - self.seconds
        saved = time.monotonic()
        with Interruption() as interruption, shown:
            while self.config.progress(self.step, self.seconds) < 1 and self.stop is None:
                self._optimise(interruption)
                if self.step % self.config.log_interval == 0:
                    shown.observe(self._log())
                if time.monotonic() - saved >= 60 * self.config.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
                shown.update(self.step, self.seconds)
            if self.trace[2] > 0 and self.stop is None:
                self._log()
            self.save()
        self.accelerator.wait_for_everyone()
        if self.stop is not None:
            raise TrainingInterrupted(self.stop, self.step, str(self.folder.path) if self.folder else None)

    def _optimise(self, interruption: Interruption) -> None:
        """Step ``self.step``, after which it counts one more."""
        config = self.config
        rate = config.learning_rate_at(self.step, config.progress(self.step, self.seconds))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = self.stage.loss(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        loss = self._synchronise(losses.detach().mean(), interruption)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
        self.unchecked.append((self.step, losses.detach(), norm))
        if (
            self.device.type == "cpu"
        ):  # elsewhere reading a value waits for the device: done when a log line is due
            self._check_finite()
        self.optimizer.step()
        with torch.no_grad():  # or the average would carry the graph of all steps
            torch._foreach_lerp_(self.averaged, self.parameters, 1 - config.ema_decay_at(self.step))
        self.trace += torch.stack([loss.double(), norm.double(), torch.ones_like(norm, dtype=torch.float64)])
        self.step += 1

    def _synchronise(self, loss: Tensor, interruption: Interruption) -> Tensor:
        """Mean over processes of gradients and loss; the processes also agree on the clock and on whether to stop."""
        now = time.monotonic() - self.begun
        if self.accelerator.num_processes == 1:
            self.seconds, self.stop = now, interruption.signum
            return loss
        main = self.accelerator.is_main_process
        # The clock is the main process's: a mean of (n * seconds, 0, 0, ...). Any process may have caught the signal.
        clock = now * self.accelerator.num_processes if main else 0.0
        said = torch.tensor([clock, float(interruption.signum or 0)], device=self.device)
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([g.flatten().float() for g in grads] + [loss.float().reshape(1), said])
        flat = self.accelerator.reduce(flat, "mean")
        for grad, mean in zip(grads, flat[:-3].split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
        if self.step % _AGREE_EVERY == 0:
            self.seconds, caught = (float(v) for v in flat[-2:])
            self.stop = (interruption.signum or 15) if caught > 0 else None
        return flat[-3]

    def _check_finite(self) -> None:
        for step, losses, norm in self.unchecked:
            good = torch.isfinite(losses)
            if bool(good.all()) and bool(torch.isfinite(norm)):
                continue
            indices = self.stage.indices(step)
            bad = [i for i, ok in zip(indices, good.tolist(), strict=True) if not ok] or indices
            what = "loss" if len(bad) < len(indices) or not bool(good.any()) else "gradient"
            raise TrainingDiverged(
                f"stage {self.stage.name!r}: {what} not finite at step {step}, samples {bad}; "
                "lower the learning rate or use fp32, and check those samples",
                step,
                bad,
            )
        self.unchecked.clear()

    # -- log, save, restore ----------------------------------------------------------------------------------------------------

    def _log(self) -> float:
        self._check_finite()
        loss, norm, count = self.trace.tolist()
        self.trace.zero_()
        line = {
            "stage": self.stage.name,
            "step": self.step,
            "loss": loss / count,
            "gradient_norm": norm / count,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(self.seconds, 3),
        }
        if self.folder and self.accelerator.is_main_process:
            self.folder.append_log(line)
        return line["loss"]

    def save(self) -> None:
        """Checkpoint and prior. Only the main process writes; all hold the same state."""
        self._check_finite()
        if self.folder is None or not self.accelerator.is_main_process:
            return
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        tensors["trace"] = self.trace
        if hasattr(self.stage, "state"):
            tensors |= {f"stage.{k}": v for k, v in self.stage.state().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        self.folder.save_checkpoint(self.stage.name, tensors, {"step": self.step, "seconds": self.seconds})
        self.stage.prior(self.average).save(self.folder.prior)

    def restore(self) -> None:
        """Continue from the stage's checkpoint; without one, from the beginning."""
        if self.folder is None:
            return
        saved = self.folder.load_checkpoint(self.stage.name)
        values = saved[1] if saved else {"step": 0, "seconds": 0.0}
        if self.accelerator.is_main_process:
            self.folder.rewind_log(self.stage.name, values["step"])
        if saved is None:
            return
        tensors = saved[0]
        self.step, self.seconds = values["step"], values["seconds"]
        self.module.load_state_dict(_below(tensors, "module."))
        self.average.load_state_dict(_below(tensors, "average."))
        self.trace.copy_(tensors["trace"])
        if hasattr(self.stage, "load_state"):
            self.stage.load_state(_below(tensors, "stage."))
        moments: dict[int, dict[str, Any]] = {}
        for key, value in _below(tensors, "optimizer.").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

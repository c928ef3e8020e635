"""What training for a row of the table costs."""

from __future__ import annotations

from typing import Any


def training_evaluations(row: str, size: int, settings: dict[str, Any]) -> float:
    """Network evaluations, in images, that training for a row of the table takes at most.

    A forward pass is one, with or without gradient, and so is a Jacobian product in an E-step of EM.
    """
    batch, steps = settings["batch_size"], settings["steps"]
    consistency, em = settings["consistency"], settings.get("em", {})
    if row == "joint":
        consistency = {**consistency, **settings["joint"]}
    walked = 0 if consistency.get("replay") else sum(consistency["walk"]) / 2
    pair = 1 + consistency["draws"] * consistency.get("substeps", 1) + walked
    if row == "staged":
        # Data below a margin also give an Ambient loss; shrinkage takes an estimate and denoises it.
        denoising, warm = 2, consistency.get("warm_start", 0)
        each = pair + (consistency.get("margin", 1) > 1) + denoising * (consistency.get("shrinkage", 0) > 0)
        return batch * (steps + warm * denoising + (consistency["max_steps"] - warm) * each)
    if row == "joint":
        # The pair shares D_t where its walk has no steps, one time in (walk lengths).
        lengths = consistency["walk"][1] - consistency["walk"][0] + 1
        return batch * (steps + (steps - settings["joint"]["kick_in"]) * (pair - 1 / lengths))
    if row == "em":
        levels = em.get("sampler_steps", 18)
        calls = levels if em.get("integrator") == "multistep" else 2 * levels - 1
        # From the Ambient network the first lap takes estimates, one evaluation each.
        ambient = em.get("start") == "ambient"
        each = calls * (1 + em.get("max_iterations", 5))
        draws = size * (em["laps"] * each if not ambient else 1 + (em["laps"] - 1) * each)
        begun = em.get("start_steps", em["first_steps"]) if ambient else 0
        return draws + batch * (begun + em["first_steps"] + (em["laps"] - 1) * em["steps"])
    return batch * steps

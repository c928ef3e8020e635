"""A run on disk.

    config.json                      the configuration
    run.json                         the data it was trained on (a fingerprint), the stages that run and why
    prior/                           averaged weights, a prior that can be used at any time
    checkpoint/<stage>.safetensors   everything needed to continue: tensors, and the rest as JSON in the
                                     file's header
    log.jsonl                        one line per log interval
    em.json, laps/                   of expectation maximisation, see `ambient_sci.training.em`

A checkpoint is one file that replaces its predecessor in one step (`os.replace`), so a process killed at any
moment leaves either the old state or the new one. The log is appended to and cut back to the checkpoint on
resume.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.training.config import TrainConfig, differences
from ambient_sci.whole_files import read_tensors, recover, sweep, whole_file, write_json, write_text

#: Settings that do not change what is learned; a run may be continued with others.
FREE_ON_RESUME = (
    *("max_steps", "max_minutes", "device", "log_interval", "checkpoint_minutes", "micro_batches"),
    *("consistency.max_steps", "consistency.max_minutes", "em.laps"),
)


class RunFolder:
    """Paths, and reading and writing, of one run. Made by `create` or `reopen`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.prior = self.path / "prior"
        self.log = self.path / "log.jsonl"

    # -- opening ---------------------------------------------------------------------------------------------

    def check_free(self, overwrite: bool) -> None:
        """Raise unless a new run may be written here.

        Raises:
            InputError: the path is a file, or a folder with something in it that ``overwrite`` does not
                cover.
        """
        if self.path.is_file():
            raise InputError(f"run folder {self.path}: expected a folder or nothing, got a file")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise InputError(
                f"run folder {self.path}: expected a new or empty folder, got one with content (overwrite "
                "it, or resume the run)"
            )
        if not (self.path / "config.json").exists():
            raise InputError(
                f"run folder {self.path}: expected a training run to overwrite, got a folder without "
                "config.json"
            )

    def create(self, config: TrainConfig, description: dict[str, Any]) -> None:
        """Start a run: remove what an earlier run left here, write ``config.json`` and ``run.json``."""
        for name in ("prior", "checkpoint", "laps"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("log.jsonl", "em.json"):
            (self.path / name).unlink(missing_ok=True)
        (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
        self.write_json("run.json", description)
        config.save(self.path / "config.json")

    @property
    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            InputError: there is no run here.
        """
        if not (self.path / "config.json").exists():
            raise InputError(f"run folder {self.path}: expected a run to resume, got none (no config.json)")
        return TrainConfig.load(self.path / "config.json")

    def reopen(self, config: TrainConfig, description: dict[str, Any]) -> None:
        """Continue a run, after checking that configuration and data are those it began with.

        Raises:
            InputError: there is no run here, or its settings or data differ; the message names what differs.
        """
        changed = [key for key in differences(self.config, config) if key not in FREE_ON_RESUME]
        if changed:
            raise InputError(f"resume {self.path}: the run was configured otherwise in {', '.join(changed)}")
        limits = [
            key for key in ("max_steps", "max_minutes") if getattr(config, key) != getattr(self.config, key)
        ]
        if limits and (self.path / "checkpoint" / "consistency.safetensors").exists():
            raise InputError(
                f"resume {self.path}: expected {limits[0]} as it was, since the next stage has begun "
                f"(consistency.{limits[0]} is free)"
            )
        data = self.read_json("run.json").get("data", {})
        now = description["data"]
        for key in [*now, *(data.keys() - now.keys())]:
            value = now.get(key)
            if data.get(key) != value:
                raise InputError(
                    f"resume {self.path}: the run was trained on other data: {key} was {data.get(key)!r}, is "
                    f"{value!r}"
                )
        recover(self.prior)
        for folder in [self.path, *(p for p in self.path.rglob("*") if p.is_dir())]:
            sweep(folder)
        config.save(self.path / "config.json")

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save_checkpoint(self, stage: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace the checkpoint of ``stage``; ``values`` are JSON types (floats keep every bit)."""
        target = self.path / "checkpoint" / f"{stage}.safetensors"
        whole = {k: v.contiguous() for k, v in tensors.items()}
        with whole_file(target) as part:
            save_file(whole, part, metadata={"state": json.dumps(values)})

    def load_checkpoint(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save_checkpoint` wrote, on the CPU, or None if the stage has no checkpoint yet.

        Raises:
            InputError: the file is damaged.
        """
        path = self.path / "checkpoint" / f"{stage}.safetensors"
        if not path.exists():
            return None
        try:
            tensors, metadata = read_tensors(path)
            return tensors, json.loads(metadata["state"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"checkpoint {path}: expected a training checkpoint, got a damaged file ({error})"
            ) from None

    # -- log -------------------------------------------------------------------------------------------------

    def append_log(self, line: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``."""
        with open(self.log, "a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_log(self, stage: str, step: int) -> None:
        """Drop lines of ``stage`` that are later than ``step``, and an unfinished last line."""
        kept = []
        for text in self.log.read_text().splitlines() if self.log.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if line["stage"] != stage or line["step"] <= step:
                kept.append(text + "\n")
        write_text(self.path / "log.jsonl", "".join(kept))

    # -- whole files -----------------------------------------------------------------------------------------

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        write_json(self.path / name, value)

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{self.path / name}: expected the description of a run, got {error}") from None

"""A run on disk.

    config.json                      the configuration
    run.json                         the data it was trained on (a fingerprint), the stages that run and why,
                                     the settings at the start
    prior/                           averaged weights, a prior that can be used at any time
    checkpoint/<stage>.safetensors   everything needed to continue: tensors, and the rest as JSON in the
                                     file's header
    log.jsonl                        one line per log interval
    em.json, laps/                   of expectation maximisation, see `ambient_sci.training.em`
    lock                             while a process trains here: a second one is refused

Whatever moment a process is killed at, the run can go on. A checkpoint is one file that replaces its
predecessor in one step (`os.replace`). The prior follows it; a resumed run writes the prior of its checkpoint
again where the one on disk is another. The log is appended to and cut back to the checkpoint on resume.

A run begins with config.json and ends its beginning with run.json. Where something else was there before (a
run to be replaced, a beginning that was cut off) run.json first says "unfinished", with the settings of the
run to come: old data are never taken for those of the new run, nor the settings.

Checkpoints, run.json and em.json hold a digest of their content; config.json, which people edit, is compared
with the settings in run.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.numbers import check_numbers
from ambient_sci.priors import Prior
from ambient_sci.priors.storage import is_saved
from ambient_sci.training.config import TrainConfig, differences
from ambient_sci.whole_files import (
    digest_of,
    holder_of,
    is_part,
    read_tensors,
    recover,
    sole,
    sweep,
    whole_file,
    write_json,
    write_tensors,
    write_text,
)

#: Settings that do not change what is learned; a run may be continued with others.
FREE_ON_RESUME = (
    *("max_steps", "max_minutes", "device", "log_interval", "checkpoint_minutes", "micro_batches"),
    *("consistency.max_steps", "consistency.max_minutes", "em.laps"),
)
#: What a beginning makes, and what a run does.
LOCK = "lock"
_BEGINNING = {"config.json", "run.json", "checkpoint", LOCK}
_FOLDERS, _FILES = ("prior", "checkpoint", "laps"), ("log.jsonl", "em.json")
#: Entries of run.json and em.json: how the file is written, the digest of the rest.
_FORMAT, _KEY = "format", "sha256"


class RunFolder:
    """Paths, and reading and writing, of one run. Made by `create` or `reopen`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.prior = self.path / "prior"
        self.log = self.path / "log.jsonl"

    # -- opening ---------------------------------------------------------------------------------------------

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other processes; the system lets go of it when this one dies.

        Raises:
            InputError: another process trains in it.
        """
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with sole(self.path / LOCK) as held:
                if not held:
                    raise InputError(
                        f"run folder {self.path}: expected no other process at work in it, got process "
                        f"{holder_of(self.path / LOCK)}, which holds {LOCK}"
                    )
                yield
        finally:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()

    def check_free(self, overwrite: bool) -> None:
        """Raise unless a new run may be written here.

        Raises:
            InputError: the path is a file, or a folder with something in it that ``overwrite`` does not
                cover.
        """
        if self.path.is_file():
            raise InputError(f"run folder {self.path}: expected a folder or nothing, got a file")
        if self._only_begun():
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

    def _only_begun(self) -> bool:
        """Whether the folder holds nothing, or what the beginning of a run makes, and nothing was learned."""
        if not self.path.exists():
            return True
        names = {p.name for p in self.path.iterdir() if not is_part(p)}
        checkpoints = self.path / "checkpoint"
        if names - _BEGINNING or ("checkpoint" in names and not checkpoints.is_dir()):
            return False
        if checkpoints.is_dir() and not all(is_part(p) for p in checkpoints.iterdir()):
            return False
        try:  # files of these names may be somebody else's
            if "config.json" in names:
                TrainConfig.load(self.path / "config.json")
            return "run.json" not in names or "stages" in self.read_json("run.json")
        except InputError:
            return False

    @property
    def begun(self) -> bool:
        """Whether the beginning of a run is complete: what it left can be gone on from."""
        return (self.path / "run.json").exists() and not self.read_json("run.json").get("unfinished")

    def create(self, config: TrainConfig, description: dict[str, Any]) -> None:
        """Start a run: remove what an earlier run left here, write ``config.json`` and ``run.json``."""
        config = config.explicit()
        description = {"settings": config.to_dict(), **description}
        self.path.mkdir(parents=True, exist_ok=True)
        recover(self.prior)
        sweep(self.path)
        if any(p.name != LOCK for p in self.path.iterdir()):
            self.write_json("run.json", {"unfinished": True, **description})
        config.save(self.path / "config.json")
        for name in _FOLDERS:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path / name)
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)
        (self.path / "checkpoint").mkdir(exist_ok=True)
        self.write_json("run.json", description)

    @property
    def config(self) -> TrainConfig:
        """The run's configuration.

        Raises:
            InputError: there is no run here.
        """
        if not (self.path / "config.json").exists():
            raise InputError(f"run folder {self.path}: expected a run to resume, got none (no config.json)")
        # What an earlier version did not know of, it did not do.
        return TrainConfig.load(self.path / "config.json").explicit()

    def chosen(self, config: TrainConfig) -> dict[str, Any]:
        """The run's values of what ``config`` leaves to be chosen ("auto")."""
        own = self.config
        return {key: getattr(own, key) for key in config.open_settings if getattr(config, key) == "auto"}

    def reopen(self, config: TrainConfig, description: dict[str, Any]) -> None:
        """Continue a run, after checking that configuration and data are those it began with.

        A run that was killed before its beginning was complete begins.

        Raises:
            InputError: there is no run here, or its settings or data differ; the message names what differs.
        """
        config = config.explicit(**self.chosen(config))
        if self._begins(config):
            self.create(config, description)
            return
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
        now = description["data"]
        self.check_data(now, [*now, *(self._data().keys() - now.keys())])
        recover(self.prior)
        for folder in [self.path, *(p for p in self.path.rglob("*") if p.is_dir())]:
            sweep(folder)
        config.save(self.path / "config.json")

    def _data(self) -> dict[str, Any]:
        """The fingerprint of the data that the run began with."""
        data = self.read_json("run.json").get("data", {})
        if not isinstance(data, dict):
            raise InputError(
                f"{self.path / 'run.json'}: expected the description of a run, got {data!r} as data"
            )
        return data

    def check_data(self, now: dict[str, Any], keys: Iterable[str]) -> None:
        """Raise unless a run that has begun was trained on the data of the fingerprint ``now``, as far as
        ``keys`` say."""
        data = self._data()
        for key in keys:
            if data.get(key) != now.get(key):
                raise InputError(
                    f"resume {self.path}: the run was trained on other data: {key} was {data.get(key)!r}, is "
                    f"{now.get(key)!r}"
                )

    def _begins(self, config: TrainConfig) -> bool:
        """Whether the run here has yet to begin.

        Raises:
            InputError: a run that was being replaced by one of other settings, or a configuration that is not
                that of the run.
        """
        ours = self.config
        if not (self.path / "run.json").exists():
            if self._only_begun():
                return True
            raise InputError(f"resume {self.path}: expected run.json, the description of the run, got none")
        run = self.read_json("run.json")
        if "settings" not in run:  # of a version that did not record them
            return False
        changed = differences(TrainConfig.from_dict(run["settings"]).explicit(), ours)
        if run.get("unfinished"):
            if changed:
                raise InputError(
                    f"resume {self.path}: expected a run that had begun, got one that was being replaced by "
                    f"another with other settings in {', '.join(changed)}; overwrite it"
                )
            return not [key for key in differences(ours, config) if key not in FREE_ON_RESUME]
        changed = [key for key in changed if key not in FREE_ON_RESUME]
        if changed:
            raise InputError(
                f"resume {self.path}: config.json differs from the settings that the run began with in "
                f"{', '.join(changed)}: it is damaged, or was edited"
            )
        return False

    # -- prior -----------------------------------------------------------------------------------------------

    def settle_prior(self, stage: str, prior: Prior) -> None:
        """Write the prior of the checkpoint of ``stage`` unless it is there, or a later stage has begun."""
        after: list[str] = []
        if (self.path / "run.json").exists():
            names = [s["name"] for s in self.read_json("run.json").get("stages", [])]
            after = names[names.index(stage) + 1 :] if stage in names else []
        begun = any((self.path / "checkpoint" / f"{name}.safetensors").exists() for name in after)
        if not begun and not is_saved(prior, self.prior):
            prior.save(self.prior)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save_checkpoint(self, stage: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace the checkpoint of ``stage``; ``values`` are JSON types (floats keep every bit)."""
        target = self.path / "checkpoint" / f"{stage}.safetensors"
        whole = {k: v.contiguous() for k, v in tensors.items()}
        state = json.dumps({"checked": True, **values})
        with whole_file(target) as part:
            write_tensors(part, whole, {"state": state, _KEY: _digest(state, whole)})

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
            values = json.loads(metadata["state"])
            # Checkpoints of before there were digests have neither.
            if (_KEY in metadata or values.pop("checked", False)) and metadata.get(_KEY) != _digest(
                metadata["state"], tensors
            ):
                raise ValueError("its digest differs")
            values.pop("checked", None)
            return tensors, values
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
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
        for text in self.log.read_text(errors="replace").splitlines() if self.log.exists() else []:
            try:
                line = json.loads(text)
                if line["stage"] != stage or line["step"] <= step:
                    kept.append(text + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_text(self.path / "log.jsonl", "".join(kept))

    # -- whole files -----------------------------------------------------------------------------------------

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """``value``, of JSON types, with its digest."""
        value = {**value, _FORMAT: 2}
        write_json(self.path / name, {**value, _KEY: _digest(_canonical(value))})

    def read_json(self, name: str) -> dict[str, Any]:
        """What `write_json` wrote.

        Raises:
            InputError: no such file, or a damaged one.
        """
        try:
            value = json.loads((self.path / name).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name}: expected the description of a run, got {error}") from None
        if not isinstance(value, dict):
            raise InputError(
                f"{self.path / name}: expected the description of a run, got {str(value)[:60]!r}"
            )
        expected = value.pop(_KEY, None)  # files of before there were digests have no format, either
        if (expected is not None or _FORMAT in value) and expected != _digest(_canonical(value)):
            raise InputError(
                f"{self.path / name}: expected what was written, got another content (its digest differs): "
                "the file is damaged, or was edited by hand"
            )
        value.pop(_FORMAT, None)
        check_numbers(value, str(self.path / name))
        return value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(text: str, tensors: dict[str, Tensor] | None = None) -> str:
    """A hash of a text and of tensors."""
    return hashlib.sha256(f"{text}|{digest_of(tensors or {})}".encode()).hexdigest()[:32]

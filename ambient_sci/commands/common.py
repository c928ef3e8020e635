"""What the commands share: options with one meaning everywhere, and checks of what rooms below take for
granted.

Free of torch: ``--help`` must answer at once, so machinery is imported where a command runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from ambient_sci.errors import InputError
from ambient_sci.numbers import number_in_range, short
from ambient_sci.whole_sets import made_folder, sweep_output

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "cuda"]

#: Positional arguments and options as a reader of ``--help`` sees them.
MeasurementsArgument = Annotated[
    Path, Positional, arg(metavar="M.h5", help="Measurement file (made by simulate or import).")
]
RunArgument = Annotated[
    Path,
    Positional,
    arg(
        metavar="RUN",
        help="Run folder (made by train), the folder of a saved prior, or pretrained:NAME for one that "
        "ships with the package.",
    ),
]
SeedOption = Annotated[
    int, arg(metavar="N", help="Seed of all randomness, an integer >= 0: the same seed, the same output.")
]
DeviceOption = Annotated[
    Device, arg(help="Where to compute; auto is CUDA where there is one and else the CPU.")
]
OverwriteOption = Annotated[bool, FlagCreatePairsOff, arg(help="Replace outputs that exist.")]
NoPictureOption = Annotated[bool, FlagCreatePairsOff, arg(help="Write no picture (.png) beside the output.")]
SigmaMinOption = Annotated[
    float | None,
    arg(
        metavar="SIGMA",
        help="Noise level at which sampling stops, > 0, per real channel, in the units of the data.",
        help_behavior_hint="(default: the lowest level the prior has learned)",
    ),
]
TileOverlapOption = Annotated[
    int | None,
    arg(
        metavar="PIXELS",
        help="Images larger than the prior's are covered with tiles: what neighbours share at least, 1 to "
        "half of a tile.",
        help_behavior_hint="(default: a quarter of a tile)",
    ),
]


def require(good: bool, option: str, expected: str, got: Any) -> None:
    """InputError that names the option unless ``good``."""
    if not good:
        raise InputError(f"{option}: expected {expected}, got {got}")


def check_common(command: Any) -> None:
    """What holds for all commands: numbers in range, a seed that every generator takes, a device that is
    there."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                expected = number_in_range(number, field.name)
                require(expected is None, "--" + field.name.replace("_", "-"), expected or "", short(number))
    seed = getattr(command, "seed", None)
    require(seed is None or 0 <= seed < 2**63, "--seed", "an integer from 0 to 2^63 - 1", seed)
    if getattr(command, "device", None) == "cuda":
        find_device("cuda")


def find_device(name: Device) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; of several, this process's own.

    Raises:
        InputError: CUDA is asked for and not there.
    """
    import torch

    there = torch.cuda.is_available()
    require(
        there or name != "cuda", "--device", "a machine with CUDA for cuda", "one without; use auto or cpu"
    )
    if not there or name == "cpu":
        return torch.device("cpu")
    if processes() == 1:
        return torch.device("cuda")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def processes() -> int:
    """Number of processes of this launch, by torchrun or `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def main_process() -> bool:
    """Whether this is the process of a launch that writes and speaks."""
    return processes() == 1 or int(os.environ.get("RANK", "0")) == 0


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    import torch

    return torch.Generator().manual_seed(seed)


def check_outputs(*paths: Path, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
    """Refuse before any work what would be refused after it: outputs that exist, that are folders, or that
    are inputs.

    Raises:
        InputError: any of these.
    """
    for path in paths:
        require(not path.is_dir(), f"{path}", "a file name for the output", "a folder")
        require(
            all(path.resolve() != i.resolve() for i in inputs),
            f"{path}",
            "an output other than the input",
            "the same file",
        )
        if path.exists() and not overwrite:
            sweep_output(path)
            raise InputError(f"{path}: expected a new file, got one that exists; --overwrite replaces it")
        above = next(p for p in path.absolute().parents if p.exists())
        require(above.is_dir(), f"{path}", "a folder to write to", f"the file {above}")


def sheet_beside(out: Path, left_out: bool, overwrite: bool, inputs: tuple[Path, ...] = ()) -> Path | None:
    """Where the picture beside an output goes, None without one.

    Raises:
        InputError: it exists, or has the name of the output or an input.
    """
    if left_out:
        return None
    sheet = out.with_suffix(".png")
    require(sheet != out, "--out", f"a name like {out.stem}.h5 ({sheet.name} will be its picture)", out)
    check_outputs(sheet, overwrite=overwrite, inputs=inputs)
    return sheet


def folder_of(path: Path) -> contextlib.AbstractContextManager[None]:
    """The folder that ``path`` goes to, made where it is missing, and unmade if what is to fill it fails."""
    return made_folder(path.absolute().parent)

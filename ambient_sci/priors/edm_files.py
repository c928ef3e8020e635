"""Checkpoints of EDM's training code and of those derived from it, read without running anything of them.

| file | what it is |
|---|---|
| network-snapshot-*.pkl, edm-*.pkl | a pickle of objects that carry their own source code ("persistent") |
| Ambient Diffusion's *.pkl | a pickle with tensors by name |
| *.pt, *.pth | a PyTorch file with tensors by name |
| *.safetensors | the same |

Unpickled as its authors do, a file of the first kind runs the code in it. Here it is read by
`ambient_sci.plain_pickle`: what would be called is a record, the code in it stays text, and a tensor is a
record that says where its numbers lie. A name that no such file has is refused. Sizes are held against what
the file holds.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_sci.errors import InputError
from ambient_sci.plain_pickle import PERSISTENT, Global, Record, plain_sequence, read_plain
from ambient_sci.whole_files import read_tensors

#: What checkpoints of this family refer to: torch, numpy, the training code itself; "x.*" is all below x.
NAMES = (
    "torch.*",
    "numpy.*",
    "torch_utils.*",
    "training.*",
    "dnnlib.*",
    "collections.OrderedDict",
    "collections.defaultdict",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "builtins.set",
    "builtins.object",
    "builtins.dict",
    "__builtin__.set",
    "__builtin__.object",
    "__builtin__.dict",
    "_codecs.encode",
)
_PERSISTENT_CLASS = "torch_utils.persistence._reconstruct_persistent_obj"
_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "BoolStorage": torch.bool,
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


@dataclass
class Checkpoint:
    """What a file says.

    Attributes:
        tensors: by their names in the network, without the wrapper's prefix.
        wrapper: class of the preconditioning (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond), None where the
            file does not say.
        settings: numbers and texts of that object.
        about: what else the file says of its making.
        digest: SHA-256 of the file.
    """

    tensors: dict[str, Tensor]
    wrapper: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    digest: str = ""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The averaged network ("ema") of a checkpoint, or the tensors of a file with nothing else.

    Raises:
        InputError: no such file, one that is damaged or of another kind, or a pickle that refers to what no
            checkpoint refers to, by name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a checkpoint (.pkl, .pt, .safetensors), found no such file")
    if path.suffix == ".safetensors":
        found = Checkpoint(_safetensors(path))
    elif zipfile.is_zipfile(path) or _is_legacy(path):
        found = _of_content(_pytorch(path), path)
    else:
        found = _of_content(read_plain(path, NAMES, what="checkpoint"), path)
    found.digest = _sha256(path)
    prefix = "model." if any(name.startswith("model.enc.") for name in found.tensors) else ""
    found.tensors = {name.removeprefix(prefix): tensor for name, tensor in found.tensors.items()}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- files of torch ----------------------------------------------------------------------------------------


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    try:
        return read_tensors(path)[0]
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: expected a readable safetensors file, got a damaged one ({error})"
        ) from None


def _is_legacy(path: Path) -> bool:
    """Whether this is a PyTorch file of the format before zip archives."""
    with path.open("rb") as file:
        return _MAGIC.to_bytes(10, "little") in file.read(32)


def _pytorch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(member.file_size for member in archive.infolist())
        if claimed > 2 * path.stat().st_size + (1 << 20):
            raise InputError(
                f"{path}: claims {claimed} bytes in {path.stat().st_size}, which looks like a bomb"
            )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or hostile file makes a reader raise is not bounded
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: expected tensors by name and nothing else; refused ({reason})") from None


# -- content -----------------------------------------------------------------------------------------------


def _of_content(content: Any, path: Path) -> Checkpoint:
    """The network in what a file holds."""
    content = _mapping(content) or {}
    about = {"dataset": _plain(_mapping(content.get("dataset_kwargs")) or {})}
    about = {key: value for key, value in about.items() if value}
    found = content.get("ema", content)
    if isinstance(found, Record) and found.name == _PERSISTENT_CLASS:
        wrapper, state = _persistent(found, path)
        tensors: dict[str, Tensor] = {}
        _collect(found, "", tensors, path)
        settings = {**(_mapping(state.get("_init_kwargs")) or {}), **state}
        return Checkpoint(tensors, wrapper, _plain(settings), about)
    named = _mapping(found) or {}
    named = {str(name).removeprefix("_orig_mod."): value for name, value in named.items()}
    tensors = {name: _tensor(value, name, path) for name, value in named.items() if _is_tensor(value)}
    if not tensors or len(tensors) < len(named):
        other = next((name for name in named if name not in tensors), "nothing")
        raise InputError(
            f"{path}: expected a checkpoint with the averaged network 'ema', or tensors by name and nothing "
            f"else, got {str(other)!r:.80}"
        )
    return Checkpoint(tensors, about=about)


def _mapping(value: Any) -> dict[Any, Any] | None:
    """A dictionary, plain or of a class that is one; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Record) and value.name.endswith(("OrderedDict", "EasyDict", "defaultdict")):
        return dict(value.pairs)
    return None


def _persistent(record: Record, path: Path) -> tuple[str, dict[Any, Any]]:
    """Class name and state of an object that carries its own code; the code is not looked at."""
    meta = _mapping(record.args[0]) if record.args else None
    state = None if meta is None else _mapping(meta.get("state"))
    if meta is None or state is None or not isinstance(meta.get("class_name"), str):
        raise InputError(f"{path}: expected a persistent class of EDM's with a name and a state, got another")
    return meta["class_name"], state


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], path: Path) -> None:
    """Parameters and buffers of a module and of those in it, by their dotted names."""
    todo = [(prefix, module)]
    while todo:
        prefix, module = todo.pop()
        if not isinstance(module, Record):
            raise InputError(f"{path}: expected modules in the network, got {type(module).__name__}")
        state = _persistent(module, path)[1] if module.name == _PERSISTENT_CLASS else _mapping(module.state)
        for kind in ("_parameters", "_buffers"):
            for name, value in (_mapping((state or {}).get(kind)) or {}).items():
                if value is not None:
                    tensors[f"{prefix}{name}"] = _tensor(value, f"{prefix}{name}", path)
        below = _mapping((state or {}).get("_modules")) or {}
        todo += [(f"{prefix}{name}.", child) for name, child in below.items() if child is not None]


def _plain(values: dict[Any, Any]) -> dict[str, Any]:
    """Numbers, texts and lists of them; numpy's numbers as numbers. Anything else is left out."""
    found = {}
    for key, value in values.items():
        value = _number(value) if isinstance(value, Record) else value
        plain = value is None or isinstance(value, (str, int, float))
        if plain or (
            isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value)
        ):
            found[str(key)] = list(value) if isinstance(value, tuple) else value
    return found


def _number(record: Record) -> float | None:
    """A number of numpy's, as `numpy.float64` is pickled: a type and eight bytes."""
    if record.name.endswith("multiarray.scalar") and len(record.args) == 2:
        kind, data = record.args
        if (
            isinstance(kind, Record)
            and kind.args[:1] == ("f8",)
            and isinstance(data, bytes)
            and len(data) == 8
        ):
            return struct.unpack("<d", data)[0]
    return None


# -- tensors -----------------------------------------------------------------------------------------------


def _is_tensor(value: Any) -> bool:
    names = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
    return isinstance(value, Tensor) or (isinstance(value, Record) and value.name in names)


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    """A tensor from the record of how it would have been rebuilt.

    Raises:
        InputError: another record, or sizes that its numbers do not fill.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Record) and value.name == "torch._utils._rebuild_parameter" and value.args:
        value = value.args[0]
    if (
        not isinstance(value, Record)
        or value.name != "torch._utils._rebuild_tensor_v2"
        or len(value.args) < 4
    ):
        raise InputError(f"{path}: expected a tensor {name!r:.80}, got something else")
    storage, offset, size, stride = value.args[:4]
    flat = _storage(storage, name, path)
    shape = [tuple(s.args[0]) if isinstance(s, Record) and s.args else s for s in (size, stride)]
    whole = all(isinstance(s, tuple) and all(type(n) is int and n >= 0 for n in s) for s in shape)
    good = whole and len(shape[0]) == len(shape[1]) and type(offset) is int and offset >= 0
    count, last = 1, 0
    for n, step in zip(*shape, strict=True) if good else ():
        count, last = count * n, last + (n - 1) * step
    if not good or count > len(flat) or (count and offset + last >= len(flat)):
        raise InputError(
            f"{path}: expected sizes of {name!r:.80} that its {len(flat)} numbers fill, got {size!r:.80} "
            f"from {offset!r:.40}"
        )
    return flat.as_strided(*shape, offset).clone(memory_format=torch.contiguous_format)


def _storage(record: Any, name: str, path: Path) -> Tensor:
    """The numbers of a storage, one after the other, as they lie in a file of torch's format before zip:
    four pickles about it, its keys, then the numbers."""
    good = (
        isinstance(record, Record)
        and record.name == "torch.storage._load_from_bytes"
        and len(record.args) == 1
    )
    if not good or not isinstance(record.args[0], bytes):
        raise InputError(f"{path}: expected the numbers of {name!r:.80} as bytes, got something else")
    label = f"{path}: numbers of {name!r:.80}"
    parts, data = plain_sequence(
        record.args[0], 5, ("torch.*", PERSISTENT, "collections.OrderedDict"), what="storage", label=label
    )
    magic, protocol, _, about, keys = parts
    claim = about.args[0] if isinstance(about, Record) and about.name == PERSISTENT else None
    _, kind, key, *_ = claim if isinstance(claim, tuple) and len(claim) >= 5 else (None, None, None)
    dtype = _STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Global) else None
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or dtype is None or keys != [key]:
        raise InputError(f"{label}: expected one storage of torch's, got {kind!r:.80}")
    count = int.from_bytes(data[:8], "little", signed=True)
    if count < 0 or count * dtype.itemsize != len(data) - 8:
        raise InputError(
            f"{label}: expected {count} numbers of {dtype.itemsize} bytes, got {len(data) - 8} bytes"
        )
    if not count:
        return torch.zeros(0, dtype=dtype)
    return torch.frombuffer(bytearray(data[8:]), dtype=dtype)

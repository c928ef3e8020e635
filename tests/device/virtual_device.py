"""A pretended accelerator that computes on the CPU: finds code that mixes devices, and counts what waits for
the host.

    with virtual_device():
        prior.to("vgpu"); x = torch.randn(4, 2, 32, 32, device="vgpu")
        losses.ambient(prior, operator.to("vgpu"), x, 0.05, 0.5).mean().backward()
    print(SYNCS.most_common(), COPIES.most_common())

Tensors on "vgpu:0" are wrappers around CPU tensors. Every operation checks that its tensors are where an
accelerator needs them ("DEVICE MIX" otherwise), that random numbers come from a generator of the right device
("GENERATOR ..."), and that nothing calls ``.numpy()`` on a device tensor. By line of the package, `SYNCS`
counts what the host waits for (``.item()``, ``bool(...)``, ``nonzero``, ``tolist``, copies to the CPU), and
`COPIES` what is carried to the device from memory of the host, which waits as well. Autograd works. Uses
torch's registration for Python backends, which cannot be undone: import this module in a process of its own.

Limits: it says nothing of speed or memory, and code that asks ``device.type == "cuda"`` takes its other
branch; ask for ``device.type != "cpu"`` where that is what is meant.
"""

from __future__ import annotations

import collections
import contextlib
import traceback

import torch
import torch.utils.backend_registration as _registration
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

_registration._setup_privateuseone_for_python_backend("vgpu")
type(torch.vgpu).get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
DEVICE = torch.device("vgpu:0")
SYNCS: collections.Counter = collections.Counter()
COPIES: collections.Counter = collections.Counter()
_GENERATORS: dict[int, torch.Generator] = {}  # those that count as the device's
_COPYING = {"aten::copy_", "aten::_to_copy"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
_IN_PLACE = {"normal_", "uniform_", "bernoulli_", "random_", "exponential_"}
_FACTORIES = {
    torch.randn, torch.rand, torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor, torch.arange, torch.linspace, torch.logspace,
    torch.eye, torch.randint, torch.randperm, torch.as_tensor, torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like,
    torch.randn_like, torch.rand_like, torch.fft.fftfreq,
}  # fmt: skip


def where(package: str = "ambient_sci") -> str:
    """The innermost line of ``package`` on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if f"/{package}/" in frame.filename:
            return f"{frame.filename.split('/' + package + '/')[-1]}:{frame.lineno} {frame.line or ''}"
    return "?"


def on_device(device: object) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type  # type: ignore[arg-type]


class DeviceTensor(torch.Tensor):
    """A CPU tensor that says it is on the device."""

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> DeviceTensor:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype, layout=elem.layout,
            device=DEVICE, requires_grad=elem.requires_grad,
        )  # fmt: skip
        wrapper.elem = elem
        return wrapper

    def __repr__(self) -> str:
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        if name in _WAITING:
            SYNCS[(name, where())] += 1
        if name not in _COPYING:
            _check_places(name, args, kwargs)
        target = kwargs.get("device")
        if on_device(target):
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "aten::_to_copy" and target is not None and not on_device(target):
            SYNCS[("copy to the CPU", where())] += 1
            return out
        if name == "aten::copy_" and not isinstance(args[0], DeviceTensor):
            SYNCS[("copy to the CPU", where())] += 1
            return args[0]
        if name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], DeviceTensor):
            return args[0]  # in place
        return tree_map(_outer, out)


def _inner(value):
    return value.elem if isinstance(value, DeviceTensor) else value


def _outer(value):
    return (
        DeviceTensor(value)
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
        else value
    )


def _check_places(name, args, kwargs):
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    elsewhere = [t for t in tensors if not isinstance(t, DeviceTensor)]
    if name in _INDEXING:  # a CPU index into a device tensor is allowed
        if not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"DEVICE MIX {name}: a CPU tensor indexed by a device tensor at {where()}")
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in args[1] or []):
            SYNCS[("boolean index", where())] += 1
        elsewhere = [t for t in elsewhere if t.is_floating_point() or t.is_complex()]
    elsewhere = [t for t in elsewhere if t.ndim > 0]  # CPU scalars are allowed
    if elsewhere:
        raise RuntimeError(
            f"DEVICE MIX {name}: {[tuple(t.shape) for t in elsewhere]} on the CPU at {where()}"
        )
    generator = kwargs.get("generator")
    if generator is not None and id(generator) not in _GENERATORS:
        raise RuntimeError(f"GENERATOR of the CPU for numbers on the device at {where()}")


_LIBRARY = torch.library.Library(
    "aten", "IMPL"
)  # what autograd makes in C++: zeros for gradients that are missing
_LIBRARY.impl(
    "empty.memory_format",
    lambda size, dtype=None, **_: DeviceTensor(torch.empty(size, dtype=dtype)),
    "PrivateUse1",
)
_LIBRARY.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: DeviceTensor(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)

_Generator = torch.Generator


class _VirtualGenerator(_Generator):
    def __new__(cls, device="cpu"):
        generator = _Generator("cpu" if on_device(device) else device)
        if on_device(device):
            _GENERATORS[id(generator)] = generator
        return generator


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return DeviceTensor(x.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad.elem


class _Functions(TorchFunctionMode):
    """Calls that name a device, and the few that never reach the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else None
        if func in _FACTORIES and on_device(kwargs.get("device")):
            if kwargs.get("generator") is not None and id(kwargs["generator"]) not in _GENERATORS:
                raise RuntimeError(f"GENERATOR of the CPU for numbers on the device at {where()}")
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor) and not isinstance(first, DeviceTensor):
                COPIES[where()] += 1
            out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
            return DeviceTensor(out.detach()).requires_grad_(out.requires_grad)
        if func in _FACTORIES and kwargs.get("device") is None and not isinstance(first, DeviceTensor):
            if id(kwargs.get("generator")) in _GENERATORS:
                raise RuntimeError(f"GENERATOR of the device for numbers on the CPU at {where()}")
        if name in _IN_PLACE and isinstance(first, DeviceTensor):
            if kwargs.get("generator") is not None and id(kwargs["generator"]) not in _GENERATORS:
                raise RuntimeError(f"GENERATOR of the CPU for numbers on the device at {where()}")
            getattr(first.elem, name)(*args[1:], **kwargs)
            return first
        if name == "numpy" and isinstance(first, DeviceTensor):
            raise RuntimeError(f"NUMPY of a device tensor at {where()}")
        if name == "tolist" and isinstance(first, DeviceTensor):
            SYNCS[("tolist", where())] += 1
            return first.elem.tolist()
        if func is torch.as_tensor and isinstance(first, DeviceTensor):
            return first.to(kwargs["dtype"]) if kwargs.get("dtype") else first
        if func is torch.where and len(args) == 3 and isinstance(first, DeviceTensor):
            like = next((v for v in args[1:] if isinstance(v, torch.Tensor)), None)
            dtype = torch.get_default_dtype() if like is None else like.dtype
            args = (
                first,
                *(
                    v if isinstance(v, torch.Tensor) else DeviceTensor(torch.tensor(v, dtype=dtype))
                    for v in args[1:]
                ),
            )
        if name in ("to", "vgpu") and isinstance(first, torch.Tensor):
            device = DEVICE if name == "vgpu" else kwargs.get("device")
            device = next(
                (
                    a.device if isinstance(a, torch.Tensor) else a
                    for a in args[1:]
                    if isinstance(a, (str, torch.device, torch.Tensor))
                ),
                device,
            )
            if on_device(device):
                dtype = next(
                    (
                        a.dtype if isinstance(a, torch.Tensor) else a
                        for a in args[1:]
                        if isinstance(a, (torch.dtype, torch.Tensor))
                    ),
                    None,
                )
                return _moved(first, kwargs.get("dtype") or dtype)
        return func(*args, **kwargs)


def _moved(x, dtype):
    x = x if dtype is None else x.to(dtype)
    if isinstance(x, DeviceTensor):
        return x
    COPIES[where()] += 1
    return (
        _Move.apply(x)
        if x.requires_grad and not x.is_leaf
        else DeviceTensor(x.detach()).requires_grad_(x.requires_grad)
    )


def _place(module, wanted):
    """Parameters and buffers of ``module`` to the device or back; like torch, in place."""
    for part in module.modules():
        for key, p in list(part._parameters.items()):
            if p is not None and isinstance(p.data, DeviceTensor) != wanted:
                part._parameters[key] = torch.nn.Parameter(
                    _outer(p.detach()) if wanted else _inner(p.detach()), requires_grad=p.requires_grad
                )
        for key, b in list(part._buffers.items()):
            if b is not None and isinstance(b, DeviceTensor) != wanted:
                part._buffers[key] = _outer(b.detach()) if wanted else _inner(b)
    return module


@contextlib.contextmanager
def virtual_device():
    """The device exists inside this block; `SYNCS` and `COPIES` start empty."""
    original = torch.nn.Module.to

    def to(self, *args, **kwargs):
        named = [a for a in (*args, kwargs.get("device")) if isinstance(a, (str, torch.device, torch.Tensor))]
        if not named:
            return original(self, *args, **kwargs)
        device = named[0].device if isinstance(named[0], torch.Tensor) else named[0]
        _place(self, on_device(device))
        return self if on_device(device) else original(self, *args, **kwargs)

    torch.nn.Module.to, torch.Generator = to, _VirtualGenerator
    SYNCS.clear()
    COPIES.clear()
    try:
        with _Functions():
            yield DEVICE
    finally:
        torch.nn.Module.to, torch.Generator = original, _Generator

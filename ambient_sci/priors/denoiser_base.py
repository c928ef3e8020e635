"""Priors are deepinv denoisers, and load without deepinv.

``isinstance(prior, deepinv.models.Denoiser)`` holds wherever it can be asked, that is once deepinv has been
imported. Before that its base class, an ``nn.Module`` with a helper, would cost a prior over a second of
imports and nothing else; so a class that is made before takes it as a base when deepinv arrives.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

from torch import nn

_PACKAGE = "deepinv"


def denoiser_base() -> type[nn.Module]:
    """deepinv's ``Denoiser`` where deepinv is loaded already, else ``nn.Module``."""
    loaded = sys.modules.get(_PACKAGE)
    return getattr(getattr(loaded, "models", None), "Denoiser", nn.Module)


def become_denoiser(kind: type[nn.Module]) -> None:
    """Give ``kind``, a direct subclass of ``nn.Module``, deepinv's ``Denoiser`` as its base: now, or when
    deepinv is imported."""
    if kind.__bases__ == (nn.Module,):
        sys.meta_path.insert(0, _WhenImported(kind))


class _WhenImported(MetaPathFinder):
    """Looks on while deepinv is found, and acts when it has run; finds nothing itself."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _PACKAGE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is None:
            return spec
        run = loader.exec_module

        def run_then_rebase(module: Any) -> None:
            run(module)
            self.kind.__bases__ = (denoiser_base(),)

        loader.exec_module = run_then_rebase
        return spec

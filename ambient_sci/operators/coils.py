r"""Coil sensitivity maps: simulation, and normalisation to sum_c |s_c|^2 = 1 (an isometric operator)."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise_maps(maps: Tensor, threshold: float = 1e-6) -> Tensor:
    """Maps scaled to sum_c |s_c|^2 = 1 on their support; they are zero outside it.

    Args:
        maps: (..., N, H, W), of any scale.
        threshold: the support is where sum_c |s_c|^2 is above this fraction of its largest value of a sample.

    Returns:
        Maps of the same shape and type.
    """
    largest = maps.abs().amax((-3, -2, -1), keepdim=True)
    # A power of two of the maps' size: division by it is exact, and squares neither vanish nor overflow.
    maps = maps / torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.to(largest)), 1.0)
    power = maps.abs().square().sum(-3, keepdim=True)
    inside = power > threshold * power.amax((-2, -1), keepdim=True)
    return torch.where(inside, maps / torch.where(inside, power, 1.0).sqrt(), torch.zeros_like(maps))


def birdcage_maps(
    coils: int, height: int, width: int, *, radius: float = 1.5, rotation: float = 0.0
) -> Tensor:
    """Normalised birdcage sensitivities, complex64 (coils, H, W), from sigpy's simulation.

    Args:
        radius: distance of the coils from the centre, in half image widths; smaller means more localised
            coils.
        rotation: angle in radians by which the coil array is turned, so that scans can differ in their maps.
    """
    from sigpy.mri import birdcage_maps as simulate

    maps = torch.as_tensor(simulate((coils, height, width), r=radius, nzz=coils))
    if rotation:
        # Turning the array by one coil spacing permutes the coils, so a turn is a shift along the coil index
        # in Fourier space.
        freq = torch.fft.fftfreq(coils, d=1.0 / coils)
        shift = torch.exp(1j * freq * rotation)[:, None, None]
        maps = torch.fft.ifft(torch.fft.fft(maps, dim=0) * shift, dim=0)
    return normalise_maps(maps.to(torch.complex64))

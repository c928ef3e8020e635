"""The XML header of ISMRMRD (Inati et al., 2017), as fastMRI files carry it, too: encodings, sizes, fields of
view, limits."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

from ambient_sci.data.readers.guard import one_line
from ambient_sci.errors import InputError

#: largest matrix size that is believed
_MOST = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """One encoding space; sizes are (x readout, y, z), fields of view in millimetres (0: not stated)."""

    encoded: tuple[int, int, int]
    recon: tuple[int, int, int]
    encoded_fov: tuple[float, float, float]
    recon_fov: tuple[float, float, float]
    #: index of the k-space centre along both phase-encoding directions
    center: tuple[int, int]
    #: lowest and highest acquired index of the first phase encoding, None when not stated
    limits: tuple[int, int] | None
    trajectory: str
    calibration: str
    multiband: int

    @property
    def readout_size(self) -> int | None:
        """Readout samples within the reconstructed field of view, None when it is not oversampled."""
        if min(self.encoded_fov[0], self.recon_fov[0]) <= 0:
            return None
        size = 2 * round(self.encoded[0] * self.recon_fov[0] / self.encoded_fov[0] / 2)
        return size if 0 < size < self.encoded[0] else None

    @property
    def voxel(self) -> tuple[float, float, float]:
        """Voxel size of the encoded matrix in millimetres; 1 where no field of view is stated."""
        sizes = [
            e / n if e > 0 else r / m if r > 0 else 1.0
            for e, n, r, m in zip(self.encoded_fov, self.encoded, self.recon_fov, self.recon, strict=True)
        ]
        return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True)
class Header:
    """What the header says about the measurement as a whole."""

    encodings: list[Encoding]
    patient: str | None
    noise_bandwidth: float


class _Node:
    """Look-ups below an XML element, whatever its namespace."""

    def __init__(self, element: ElementTree.Element, origin: str):
        self.element, self.origin = element, origin

    def nodes(self, path: str) -> list[_Node]:
        found = self.element.findall("/".join("{*}" + part for part in path.split("/")))
        return [_Node(e, self.origin) for e in found]

    def text(self, path: str) -> str | None:
        found = self.nodes(path)
        return found[0].element.text.strip() if found and found[0].element.text else None

    def number(self, path: str, default: float, most: float = 1e9) -> float:
        text = self.text(path)
        try:
            value = default if text is None else float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most:
            raise InputError(
                f"{self.origin}: expected a number from 0 to {most:g} for {path} in the ISMRMRD header, "
                f"got {one_line(text, 40)!r}"
            )
        return value

    def whole(self, path: str, default: int) -> int:
        return int(self.number(path, default, _MOST))


def parse_header(text: str | bytes, origin: str) -> Header:
    """An ISMRMRD XML header.

    Raises: InputError when it is not XML, has no encoding, or holds sizes that are no sizes.
    """
    try:
        root = _Node(ElementTree.fromstring(text), origin)
    except (ElementTree.ParseError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{origin}: the ISMRMRD header is not XML ({one_line(error)})") from None
    encodings = [_encoding(node) for node in root.nodes("encoding")]
    if not encodings:
        raise InputError(f"{origin}: expected an encoded matrix size in the ISMRMRD header, got no encoding")
    bandwidth = root.number("acquisitionSystemInformation/relativeReceiverNoiseBandwidth", 1.0)
    patient = root.text("subjectInformation/patientID") or root.text("subjectInformation/patientName")
    return Header(encodings, patient, bandwidth if bandwidth > 0 else 1.0)


def _encoding(node: _Node) -> Encoding:
    def sizes(space: str) -> tuple[int, int, int]:
        x, y, z = (node.whole(f"{space}/matrixSize/{axis}", 0) for axis in "xyz")
        return x, y, max(z, 1)

    def lengths(space: str) -> tuple[float, float, float]:
        x, y, z = (node.number(f"{space}/fieldOfView_mm/{axis}", 0.0, 1e5) for axis in "xyz")
        return x, y, z

    encoded, recon = sizes("encodedSpace"), sizes("reconSpace")
    if min(encoded) < 1:
        raise InputError(
            f"{node.origin}: expected an encoded matrix size in the ISMRMRD header, got {encoded}"
        )
    step = "encodingLimits/kspace_encoding_step_{}/"
    center = [node.whole(step.format(k) + "center", encoded[k] // 2) for k in (1, 2)]
    stated = node.text(step.format(1) + "maximum") is not None
    limits = (node.whole(step.format(1) + "minimum", 0), node.whole(step.format(1) + "maximum", 0))
    return Encoding(
        encoded,
        recon if min(recon) > 0 else encoded,
        lengths("encodedSpace"),
        lengths("reconSpace"),
        (center[0], center[1]),
        limits if stated else None,
        (node.text("trajectory") or "cartesian").lower(),
        (node.text("parallelImaging/calibrationMode") or "").lower(),
        node.whole("parallelImaging/multiband/multiband_factor", 1),
    )

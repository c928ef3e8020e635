"""Published numbers, to stand beside ours and never in one column with them."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "Daras et al., How much is a noisy image worth? (2024); read from the paper, not measured here"


class Published(NamedTuple):
    """FID on 50,000 samples: full sampling, truncated, with consistency."""

    full: float
    truncated: float
    consistency: float


#: data set -> (FID of the clean oracle, sigma_n -> FIDs)
NUMBERS: dict[str, tuple[float, dict[float, Published]]] = {
    "cifar10": (
        1.99,
        {
            0.05: Published(8.78, 4.53, 2.82),
            0.1: Published(25.55, 7.55, 3.63),
            0.2: Published(60.73, 12.12, 11.93),
        },
    ),
    "celebahq": (
        2.40,
        {
            0.05: Published(12.77, 6.73, 5.50),
            0.1: Published(45.90, 10.27, 9.38),
            0.2: Published(61.14, 13.90, 12.97),
        },
    ),
}


def published_table(data: str) -> str:
    """The published table of a data set; empty where nothing is published."""
    if data not in NUMBERS:
        return ""
    clean, levels = NUMBERS[data]
    lines = [
        f"\nPublished for {data} ({SOURCE}), FID; the clean oracle has {clean:.2f}:",
        "| sigma_n | Ambient full | Ambient truncated | consistency |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {s:g} | {p.full:.2f} | {p.truncated:.2f} | {p.consistency:.2f} |" for s, p in levels.items()
    ]
    return "\n".join(lines)

"""Who an image is of, from where its file lies: no person may end in two parts of a split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath


def stem(name: str) -> str:
    """A file's name without its suffix, ``.nii.gz`` being one."""
    last = PurePath(name).name
    return PurePath(last[:-3] if last.lower().endswith(".gz") else last).stem


def subjects_of(names: Sequence[str]) -> list[str]:
    """The subject of each file, by names relative to their common folder.

    BIDS names (sub-X_...) say it themselves. Files in several folders are of the person whose folder that is:
    the first folder below the one that all files share; everything below it is of that person. Files of one
    folder are a person each.
    """
    bids = [re.match(r"(sub-[A-Za-z0-9]+)(_|$|\.)", PurePath(n).name) for n in names]
    if names and all(bids):
        return [m.group(1) for m in bids if m]
    folders = [PurePath(n).parts[:-1] for n in names]
    shared = 0
    while folders and all(len(f) > shared and f[shared] == folders[0][shared] for f in folders):
        shared += 1
    if len(set(folders)) < 2:
        return [stem(n) for n in names]
    return [f[shared] if len(f) > shared else stem(n) for f, n in zip(folders, names, strict=True)]

"""docs/foreign_formats.md says what the code reads: each format a row, each row a reader and tests that read it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ambient_sci.data import identify, readers
from ambient_sci.data.readers import volumes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "foreign_formats.md").read_text()
#: Rows of the tables of formats, by what they begin with: the reader, and a word that tests of the format have.
ROWS = {
    "ISMRMRD": ("ismrmrd", "test_ismrmrd_fields.py", "ismrmrd"),
    "fastMRI": ("fastmri", "test_importers.py", "save_fastmri"),
    "BART": ("bart", "test_importers.py", "save_cfl"),
    "npz": ("arrays", "test_importers.py", "kspace="),
    "NIfTI-1, -2": ("volumes", "test_volume_fields.py", "nifti"),
    "Analyze, MGH/MGZ": ("volumes", "test_foreign_files.py", "nibabel"),
    "DICOM": ("dicom", "test_volume_fields.py", "dicom"),
    "PNG, JPEG, TIFF": ("pictures", "test_importers.py", "png"),
    "zip": ("pictures", "test_importers.py", "zip"),
    "npy, npz": ("arrays", "test_importers.py", "npy"),
}
#: Modules of readers that are parts of others.
PARTS = {
    "guard": "all",
    "dicom_pixels": "dicom",
    "ismrmrd_geometry": "ismrmrd",
    "ismrmrd_header": "ismrmrd",
    "tiff": "pictures",
    "tiff_about": "pictures",
}


def rows() -> list[str]:
    """First cells of the tables of formats, without file name endings."""
    found = re.findall(r"^\| \*\*(.+?)\*\*", PAGE, re.M)
    return [cell.strip() for cell in found]


def test_each_format_has_a_row_and_each_row_a_reader():
    found = rows()
    assert len(found) == len(ROWS) and all(map(str.startswith, found, ROWS)), found
    modules = {p.stem for p in Path(readers.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules - PARTS.keys() == {reader for reader, _, _ in ROWS.values()}
    assert set(PARTS.values()) - {"all"} <= modules


@pytest.mark.parametrize("row", ROWS)
def test_each_row_has_tests(row):
    _, file, word = ROWS[row]
    text = (ROOT / "tests" / file).read_text().lower()
    assert word.lower() in text and text.count("def test") > 1
    assert file.removesuffix(".py") in PAGE or file == "test_importers.py"


#: What the table calls files of an ending, where that is not the ending itself.
NAMES = {
    **{
        ".hdf5": "hdf5",
        ".npz": "npz",
        ".npy": "npy",
        ".zip": "zip",
        ".mgz": "mgz",
        ".mgh": "mgh",
        ".mgh.gz": "mgh",
    },
    **{".mnc": "minc", ".par": "par/rec", ".head": "afni", ".img": "analyze", ".img.gz": "analyze"},
}


def test_each_ending_that_the_code_knows_is_in_the_table():
    known = {*identify.HDF5, ".cfl", ".hdr", ".npz", ".npy", ".zip", *volumes.VOLUMES}
    words = PAGE.lower().replace("`", "")
    assert [e for e in sorted(known) if NAMES.get(e, e) not in words] == []

"""An HDF5 file on a disk that refuses, and under signals: it can be closed, and says nothing but one line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from ambient_sci.data.hdf5_output import Output
from ambient_sci.errors import InputError


def empty(tmp_path: Path) -> Path:
    path = tmp_path / "part"
    path.touch()
    return path


def test_what_is_written_is_what_hdf5_writes_itself(tmp_path):
    data = np.random.default_rng(0).standard_normal((50, 7, 9))
    output = Output(empty(tmp_path), Path("x.h5"))
    with output.at_work():
        rows = output.file.create_dataset(
            "a", data=data[:20], maxshape=(None, 7, 9), chunks=(1, 7, 9), fletcher32=True
        )
        rows.resize(50, axis=0)
        rows[20:] = data[20:]
        output.file.attrs["text"] = "t" * 70_000
    output.finish()
    with h5py.File(tmp_path / "part") as file:
        assert np.array_equal(file["a"][()], data) and len(file.attrs["text"]) == 70_000


@pytest.mark.parametrize("at", range(0, 32, 4))
def test_a_refusal_at_any_write_is_one_error_and_hdf5_reads_what_it_wrote(tmp_path, at, monkeypatch, capfd):
    real, left = os.pwrite, at

    def limited(descriptor: int, data: memoryview, place: int) -> int:
        nonlocal left
        left -= 1
        if left == 0:
            return real(descriptor, data[: max(len(data) // 2, 1)], place)  # a disk takes what still fits
        if left < 0:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", limited)
    data = np.arange(40 * 3000.0).reshape(40, 3000)
    with pytest.raises(InputError, match="x.h5: cannot be written .*No space left"):
        output = Output(empty(tmp_path), Path("x.h5"))
        try:
            with output.at_work():
                rows = output.file.create_dataset("a", data=data, chunks=(1, 3000))
                output.file.flush()
                assert np.array_equal(rows[()], data)
            output.finish()
        finally:
            output.close()
    assert capfd.readouterr().err == ""


def test_signals_are_heard_when_hdf5_is_done(tmp_path):
    output, seen = Output(empty(tmp_path), Path("x.h5")), []
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, lambda *_: seen.append(True))
        try:
            with output.at_work():
                signal.raise_signal(number)
                assert not seen
            assert seen.pop()
        finally:
            signal.signal(number, before)
    with pytest.raises(KeyboardInterrupt), output.at_work():
        signal.raise_signal(signal.SIGINT)
        output.file["a"] = 1
    assert output.file["a"][()] == 1
    output.close()

"""Measurement files, importers, simulation from clean images, and the loader."""

from __future__ import annotations

from ambient_sci.data.exporters import write_nifti
from ambient_sci.data.files import MeasurementFile, ReferenceFile
from ambient_sci.data.image_writing import ImageWriter, write_images
from ambient_sci.data.importers import ImportOptions, import_source
from ambient_sci.data.inspect import contact_sheet, describe
from ambient_sci.data.loader import Batch, MeasurementArrays, MeasurementLoader
from ambient_sci.data.many_files import MeasurementFiles
from ambient_sci.data.origins import Origin, origins_of
from ambient_sci.data.packaged import brains
from ambient_sci.data.reductions import Reduction
from ambient_sci.data.simulate import simulate, smooth_phase
from ambient_sci.data.sources import ImageSource, open_source
from ambient_sci.data.writing import MeasurementWriter, write_measurements

__all__ = [
    "Batch",
    "ImageSource",
    "ImageWriter",
    "ImportOptions",
    "MeasurementArrays",
    "MeasurementFile",
    "MeasurementFiles",
    "MeasurementLoader",
    "MeasurementWriter",
    "Origin",
    "Reduction",
    "ReferenceFile",
    "brains",
    "contact_sheet",
    "describe",
    "import_source",
    "open_source",
    "origins_of",
    "simulate",
    "smooth_phase",
    "write_images",
    "write_measurements",
    "write_nifti",
]

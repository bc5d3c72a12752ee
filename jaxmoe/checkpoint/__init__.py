"""Checkpoints: single safetensors files of FP4 weights, and Hugging Face folders.

`save` and `load` keep `QuantizedTensor`s and arrays in one file of jaxmoe's own layout.
`open_folder` reads the folders that other tools write: plain weights, ModelOpt NVFP4,
compressed-tensors NVFP4 and MXFP4, gpt-oss MXFP4 and block-scaled FP8. Safetensors only: nothing
that is read can run code.
"""

from jaxmoe.checkpoint._experts import LoadedExperts
from jaxmoe.checkpoint._file import load, read_metadata, save
from jaxmoe.checkpoint._folder import Folder, open_folder
from jaxmoe.checkpoint._safetensors import CheckpointError, atomic_write
from jaxmoe.checkpoint._scheme import Scheme

__all__ = [
    "CheckpointError",
    "Folder",
    "LoadedExperts",
    "Scheme",
    "atomic_write",
    "load",
    "open_folder",
    "read_metadata",
    "save",
]

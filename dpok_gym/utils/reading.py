"""Reading files that others wrote. Nothing in them is executed, and how much is read is bounded beforehand.

A file may be a trap: a small archive that unpacks to terabytes, a header that promises more than the file has, a
device that never ends. Every function here raises a ValueError that names the file.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

#: Bytes of a JSON file or a tokenizer's table: the largest published ones have about 4 MB.
MAX_TEXT_BYTES = 64 * 2**20
#: Bytes of a YAML file. A run's config has about 4 kB, and YAML is slow: this much takes some ten seconds.
MAX_YAML_BYTES = 2**20
#: Bytes of the arrays in an archive, unpacked: an evaluation of 5,000 images of 512 x 512 pixels has 4 GB.
MAX_ARRAY_BYTES = 4 * 2**30
#: Bytes of the header of a safetensors file: the one of Stable Diffusion XL has 0.3 MB.
MAX_HEADER_BYTES = 16 * 2**20
#: Layers of a part of a model. Published ones have fewer than 100.
MAX_LAYERS = 1000
#: Pixels of an image: 8,192 x 8,192.
MAX_PIXELS = 2**26

#: Bytes of an image's file: 67 million pixels as PNG may have more, photographs as JPEG never do.
MAX_IMAGE_BYTES = 256 * 2**20

#: Pillow's formats that are read. Others are rare, and to read EPS starts another program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def check_file(path: str | os.PathLike[str], max_bytes: int | None = None) -> Path:
    """Checks that a path is a regular file, perhaps with a limited size.

    Args:
        path: the file.
        max_bytes: its largest size; None for any.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: if it is a folder, a device or a pipe, or the file is too large.
    """
    path = Path(path)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}; check the path and the working folder") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise ValueError(f"{path} is {kind} and not a file; put the file in its place")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes, and at most {max_bytes:,} are read of such a file; get the right one"
        )
    return path


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Reads a UTF-8 text.

    Args:
        path: the file.
        max_bytes: its largest size.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, is too large, or is no UTF-8.
    """
    try:
        return check_file(path, max_bytes).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, is too large, or is no JSON.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str | bytes, what: str) -> Any:
    """Reads a JSON text.

    Args:
        text: the text.
        what: where it is from, for the error message.

    Raises:
        ValueError: if it is no JSON, or too deeply nested.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {_reason(error)}") from error


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Reads a YAML file of plain values: numbers, texts, lists and mappings.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, is too large, or as :func:`parse_yaml`.
    """
    return parse_yaml(read_text(path, MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, what: str) -> Any:
    """Reads a YAML text of plain values.

    Args:
        text: the text.
        what: where it is from, for the error message.

    Raises:
        ValueError: if it is no YAML, has tags for Python's objects or an alias, or is too deeply nested.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no YAML: {_reason(error)}") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads no aliases: a few lines of them can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"line {event.start_mark.line + 1} has an alias *{event.anchor}; write it out")
        return super().compose_node(parent, index)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Reads an archive that ``np.savez`` or ``np.savez_compressed`` wrote, without pickle.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such archive, is damaged, is too large unpacked, or holds Python objects.
    """
    path = check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            # Unpacking stops at these sizes, even if they are lies.
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_ARRAY_BYTES:
                raise ValueError(f"unpacked it has {size:,} bytes, and at most {MAX_ARRAY_BYTES:,} are read")
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            return {name.removesuffix(".npy"): _parse_array(archive.read(name)) for name in names}
    except Exception as error:  # zipfile, what it unpacks with, and NumPy raise many kinds for damaged files
        raise ValueError(f"{path} is no archive of arrays that can be read: {_reason(error)}") from error


def _parse_array(content: bytes) -> NDArray[Any]:
    """Reads an array in NumPy's format."""
    file = io.BytesIO(content)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(np.lib.format.read_magic(file))
    if read_header is None:
        raise ValueError("it is of another version of NumPy's format")
    shape, is_fortran, dtype = read_header(file)
    # Not np.load: it makes an array of the size that the header promises, before it sees how long the content is.
    array = np.frombuffer(content, dtype, offset=file.tell())  # it refuses Python objects
    if len(array) != math.prod(shape):
        raise ValueError(f"an array of the shape {shape} has {len(array)} entries")
    return array.reshape(shape, order="F" if is_fortran else "C").copy()


def check_tensors(path: str | os.PathLike[str]) -> Path:
    """Checks the length of a safetensors file's header. The library checks the rest, before it makes any tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, or no safetensors file.
    """
    path = check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not length:
        raise ValueError(f"{path} is no safetensors file: it is empty, or begins with zeros")
    if length > min(path.stat().st_size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{path} is no safetensors file: its header cannot have {length:,} bytes")
    return path


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, or is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(check_tensors(path))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no safetensors file that can be read: {_reason(error)}") from error


def find_image_format(content: bytes, what: str) -> str:
    """Returns the format of an image's file, such as "PNG", by its header.

    Args:
        content: the file.
        what: what it is, for the error message.

    Raises:
        ValueError: if it is too large, or is no PNG, JPEG, WebP, GIF or BMP.
    """
    from PIL import Image

    try:
        if len(content) > MAX_IMAGE_BYTES:
            raise ValueError(f"it has {len(content):,} bytes, and at most {MAX_IMAGE_BYTES:,} are read")
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            _check_pixels(image)
            return str(image.format)
    except Exception as error:  # as in read_image
        raise ValueError(f"{what} is no image that can be read: {_reason(error)}") from error


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image, as RGB. Of a moving one it reads the first frame.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, is damaged, is too large, or is no PNG, JPEG, WebP, GIF or BMP.
    """
    from PIL import Image

    try:
        with Image.open(check_file(path), formats=IMAGE_FORMATS) as image:
            _check_pixels(image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow has many kinds for damaged files, SyntaxError among them
        raise ValueError(f"the image {path} cannot be read: {_reason(error)}") from error


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, and at most {MAX_PIXELS:,} are read")


def check_model_folder(folder: str | os.PathLike[str]) -> None:
    """Checks the files of a model's folder that other libraries then read.

    Raises:
        ValueError: if a text, the header of a safetensors file or a number of layers is too large, a JSON file holds no
            mapping, or something is no file.
    """
    folder = Path(folder)
    for path in [*folder.iterdir(), *folder.glob("*/*")]:
        if path.suffix == ".txt":
            check_file(path, MAX_TEXT_BYTES)
        elif path.suffix == ".json":
            content = read_json(path)
            if not isinstance(content, dict):
                raise ValueError(f"{path} holds no mapping of keys to values")
            # Of a config only: CLIP's vocabulary has the word "layers", with the number 15,900.
            if path.name == "config.json" and (most := max(_numbers_of_layers(content), default=0)) > MAX_LAYERS:
                raise ValueError(f"{path} asks for {most:,} layers, and at most {MAX_LAYERS:,} are made")
        elif path.suffix == ".safetensors":
            check_tensors(path)
        elif path.suffix in (".bin", ".ckpt", ".pt", ".pth"):
            check_torch_file(path)


def _numbers_of_layers(config: Any, is_number: bool = False) -> Iterator[int]:
    """Yields every number in a model's config whose key says that it counts layers."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _numbers_of_layers(value, "layers" in key)
    elif isinstance(config, list):
        for value in config:
            yield from _numbers_of_layers(value, is_number)
    elif is_number and isinstance(config, int):
        yield config


def check_torch_file(path: str | os.PathLike[str]) -> Path:
    """Checks that what ``torch.save`` wrote unpacks to no more than its own size: it never compresses.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, or is compressed or damaged.
    """
    path = check_file(path)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{path} is damaged: {_reason(error)}") from error
        # Entries may also overlap, and so be more than the file.
        if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
            raise ValueError(f"{path} is compressed, which torch.save never does; get the file from its authors")
    return path


def _reason(error: BaseException) -> str:
    """Returns an error's message on one line."""
    if isinstance(error, RecursionError):
        return "it is too deeply nested"
    return " ".join(str(error).split()) or type(error).__name__

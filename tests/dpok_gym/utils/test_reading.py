"""Files of others: what is read of them, and that nothing in them runs."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dpok_gym.utils import reading


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_texts_and_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, null]}', encoding="utf-8")
    assert reading.read_json(path) == {"a": [1, None]}
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a.json is no JSON: it is too deeply nested"):
        reading.read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.json is not UTF-8"):
        reading.read_json(path)


def test_only_files_of_bounded_size(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(reading.MAX_TEXT_BYTES + 1)  # it takes no room on the disk
    with pytest.raises(ValueError, match=r"a.json has 67,108,865 bytes, and at most"):
        reading.read_json(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        reading.read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="is a folder and not a file"):
        reading.read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    with pytest.raises(ValueError, match="is a device or a pipe"):
        reading.read_json(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", r"line 2 has an alias \*x"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [", "expected the node content"),
        ("[" * 10_000, "nested"),
        ("a: 2026-99-99", "month"),
    ],
)
def test_yaml(text, message):
    assert reading.parse_yaml("a: [1, 2.5, x]", "it") == {"a": [1, 2.5, "x"]}
    with pytest.raises(ValueError, match=f"it is no YAML: .*{message}"):
        reading.parse_yaml(text, "it")


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    arrays = {
        "a/b": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "texts": np.array(["a", "bcd"]),
        "empty": np.zeros((0, 3), bool),
        "number": np.array(3),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    read = reading.read_arrays(tmp_path / "a.npz")
    assert read.keys() == arrays.keys()
    for name, expected in arrays.items():
        np.testing.assert_array_equal(read[name], expected, strict=True)


def _npy(shape, content, dtype="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": dtype})
    return file.getvalue() + content


def test_an_archive_that_unpacks_to_much_more_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_ARRAY_BYTES", 2**22)
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}.npy", bytes(2**20))
    assert path.stat().st_size < 1e4
    with pytest.raises(ValueError, match=r"a.npz is no archive .* unpacked it has 5,242,880 bytes, and at most"):
        reading.read_arrays(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_npy((10**12,), bytes(8)), "has 1 entries"),
        (_npy((2,), bytes(8)), "has 1 entries"),
        (_npy((1,), bytes(7)), "buffer size"),
        (_npy((1,), pickle.dumps([1]), "|O"), "OBJECT"),
        (b"PK", "magic"),
        (b"", "magic"),
        (b"\x93NUMPY\x01\x00\x01\x00(", "EOF"),
        (b"\x93NUMPY\x01\x00\x06\x00{[]:1}", "unhashable"),
    ],
)
def test_arrays_that_lie(tmp_path, content, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=f"a.npz is no archive of arrays.*{message}"):
        reading.read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive(tmp_path, method):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", _npy((1000,), np.arange(1000.0).tobytes()))
    content = bytearray(path.read_bytes())
    content[60:100] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz is no archive of arrays"):
        reading.read_arrays(path)


def test_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    assert reading.read_tensors(path)["a"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    lies = len(header).to_bytes(8, "little") + header
    pickled = pickle.dumps(Intruder(tmp_path / "trace"))
    for content in (b"", b"\0" * 100, whole[:-1], whole[:20], (2**40).to_bytes(8, "little") + whole, lies, pickled):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.safetensors is no safetensors file"):
            reading.read_tensors(path)
    assert not (tmp_path / "trace").exists()


def test_images(tmp_path):
    image = Image.new("RGBA", (3, 2), (1, 2, 3, 4))
    image.save(tmp_path / "a.png")
    assert reading.read_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)
    Image.new("1", (8200, 8200)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 1e5
    with pytest.raises(ValueError, match=r"large.png cannot be read: .*8200 x 8200 pixels, and at most 67,108,864"):
        reading.read_image(tmp_path / "large.png")
    image.convert("RGB").save(tmp_path / "a.eps")  # Pillow would start another program
    (tmp_path / "half.png").write_bytes((tmp_path / "large.png").read_bytes()[:100])
    for name in ("a.eps", "half.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            reading.read_image(tmp_path / name)


def test_a_config_with_layers_without_end(tmp_path):
    (tmp_path / "unet").mkdir()
    config = tmp_path / "unet" / "config.json"
    config.write_text('{"layers_per_block": [2, 2], "channels": 5000}')
    reading.check_model_folder(tmp_path)
    config.write_text('{"nested": {"layers_per_block": [2, 1000000000]}}')
    with pytest.raises(ValueError, match=r"config.json asks for 1,000,000,000 layers, and at most 1,000 are made"):
        reading.check_model_folder(tmp_path)


def test_a_compressed_torch_file_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    reading.check_torch_file(path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"b.pt is compressed"):
        reading.check_torch_file(tmp_path / "b.pt")
    content = path.read_bytes()
    (tmp_path / "c.pt").write_bytes(content.replace(b"PK\x01\x02", b"PK\x00\x00"))  # its list of entries
    with pytest.raises(ValueError, match=r"c.pt is damaged: Bad magic number"):
        reading.check_torch_file(tmp_path / "c.pt")

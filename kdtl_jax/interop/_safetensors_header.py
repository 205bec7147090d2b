"""Reads and checks the headers of a checkpoint's files: eight bytes of length, then JSON.

Nothing is trusted: sizes are exact integers, the tensors must tile the payload without gaps or
overlaps, no key may appear twice, and files of other formats are recognized by their first bytes.
Nothing is ever unpickled. Time and memory are linear in the header's length.
"""

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kdtl_jax import _checks, _files, _text

max_header_bytes = 100_000_000  # the format's own limit
index_name = "model.safetensors.index.json"  # lists the shards of a large checkpoint

_dtypes: dict[str, Any] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": jnp.dtype(jnp.bfloat16),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_names = {dtype: name for name, dtype in _dtypes.items()}
_fp8_bytes = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}

_foreign = (
    (b"PK\x03\x04", "a zip archive, as torch.save (a pickle inside) and numpy.savez write"),
    (b"\x80", "a pickle"),
    (b"\x89HDF", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull` to fetch the file)"),
)


class Tensor(NamedTuple):
    """The place of one tensor: `file[start:stop]`, little-endian, row-major."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint(NamedTuple):
    """A checkpoint on disk: `tensors` by name, the files' merged `metadata`, and the files."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    files: tuple[Path, ...]


def index(path: str | Path) -> Checkpoint:
    """Reads the headers of a file, a sharded checkpoint's index, or a folder with either.

    Args:
      path: `*.safetensors`, `*.index.json`, or a folder that holds `model.safetensors`, an index,
        or exactly one safetensors file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a file is truncated, in another format (such as a pickle) or inconsistent, or
        an index names files outside its folder or tensors that its files lack.
    """
    file = _locate(_checks.path(path=path))
    if file.suffix == ".json":
        return _index_shards(file)
    tensors, metadata = parse(file)
    return Checkpoint(tensors, metadata, (file,))


def _locate(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist.")
    for name in ("model.safetensors", index_name):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise FileNotFoundError(
            f"{path} holds {len(files)} safetensors files and no {index_name}; "
            f"name one of them, such as {files[0].name}."
        )
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    hint = f" It has {pickles[0]}, a pickle, which is never loaded: convert it." if pickles else ""
    raise FileNotFoundError(f"{path} holds no safetensors file.{hint}")


def _index_shards(path: Path) -> Checkpoint:
    contents = json_file(path)
    weight_map = contents.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensor names to file names.")
    shards: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        file = path.parent / _check_file_name(path, name)
        if not file.is_file():
            raise FileNotFoundError(f"{path} names {name}, which does not exist.")
        shards[name], more = parse(file)
        metadata |= more
    tensors: dict[str, Tensor] = {}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard]:
            raise ValueError(f"{path} puts {_text.quoted(tensor)} in {shard}, which lacks it.")
        tensors[tensor] = shards[shard][tensor]
    unlisted = sorted(t for shard in shards.values() for t in shard if t not in weight_map)
    if unlisted:
        raise ValueError(
            f"{path} does not list {len(unlisted)} of its files' tensors, such as "
            f"{_text.quoted(unlisted[0])}. Index and files belong to different checkpoints; name a "
            "single file."
        )
    return Checkpoint(tensors, metadata, tuple(path.parent / name for name in sorted(shards)))


def _check_file_name(path: Path, name: str) -> str:
    """A file name without any folder: an index must not reach outside its own folder."""
    windows = PureWindowsPath(name)
    plain = PurePosixPath(name).name == name == windows.name and name not in ("", ".", "..")
    if not plain or windows.drive or "\0" in name:
        raise ValueError(
            f"{path} names the file {_text.quoted(name)}; an index may only name files beside it."
        )
    return name


def numpy_dtype(name: str, dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of a stored tensor; raises TypeError for 8-bit floats."""
    if dtype in _dtypes:
        return _dtypes[dtype]
    raise TypeError(
        f"tensor {_text.quoted(name)} is stored as {dtype}, which is not loaded: an 8-bit "
        "float is meaningless without its separate scales. Dequantize it to BF16 with the tool "
        "that made it."
    )


def stored_dtype(name: str, dtype: Any) -> str:
    """The safetensors name of an array's dtype.

    Raises TypeError for those that the format or its readers lack (complex128, fp8, objects, keys).
    """
    try:
        little_endian = np.dtype(dtype).newbyteorder("<")
    except TypeError:
        little_endian = dtype
    if little_endian in _names:
        return _names[little_endian]
    raise TypeError(
        f"{_text.quoted(name)} has dtype {dtype}, which cannot be stored. Save arrays of float, "
        "int or bool only: take trees.partition(...)[0] of a tree with functions, and "
        "jax.random.key_data of a PRNG key."
    )


def parse(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads and checks one file's header: `({name: Tensor}, metadata)`."""
    size = _files.regular(path).stat().st_size
    with path.open("rb") as file:
        start = file.read(32)
        _refuse_foreign(path, start)
        if size < 8:
            raise _invalid(path, f"{size} bytes are too few for a header; it is empty or truncated")
        (length,) = struct.unpack("<Q", start[:8])
        if length > max_header_bytes:
            raise _invalid(
                path, f"it claims a header of {length} bytes; it is not a safetensors file"
            )
        if 8 + length > size:
            raise _invalid(
                path, f"it claims a header of {length} bytes in a file of {size}; it is truncated"
            )
        file.seek(8)
        raw = file.read(length)
    header = json_object(path, raw, "its header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise _invalid(path, "its __metadata__ must map strings to strings")
    payload = 8 + length
    tensors = {name: _entry(path, name, info, payload) for name, info in header.items()}
    _check_tiling(path, tensors, payload, size)
    return tensors, metadata


def encode(
    specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The header's bytes (length included) and the order in which the tensors follow.

    Wide dtypes come first, so every tensor is aligned to its item size.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(
                f"metadata must map strings to strings, got {_text.quoted(key)}: "
                f"{_text.quoted(value)}. Convert them first, e.g. str(value) or json.dumps(value)."
            )
    widths = {name: _dtypes[dtype].itemsize for name, (dtype, _) in specs.items()}
    order = sorted(specs, key=lambda name: (-widths[name], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = specs[name]
        end = offset + math.prod(shape) * widths[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > max_header_bytes:
        raise ValueError(f"the header would have {len(text)} bytes; split the file.")
    return struct.pack("<Q", len(text)) + text, order


def json_file(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file, as in `json_object`; limited to the length of a header."""
    size = _files.regular(path).stat().st_size
    if size > max_header_bytes:
        raise _invalid(path, f"it has {size} bytes, more than {max_header_bytes}")
    return json_object(path, path.read_bytes())


def json_object(path: Path, raw: bytes, subject: str = "it") -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities; `subject` names it in messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        contents = dict(pairs)
        if len(contents) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = next(name for name, count in counts.items() if count > 1)
            raise ValueError(f"the key {_text.quoted(repeated)} appears twice")
        return contents

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not a number")

    # A tensor takes at least 50 characters, 11 of them these. Denser text would only cost memory.
    if len(raw) > 1_000_000 and sum(map(raw.count, (b'"', b"[", b"{"))) > len(raw) / 4:
        raise _invalid(path, f"{subject} does not list tensors")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _invalid(path, f"{subject} is not JSON ({_text.shown(str(error), 100)})") from None
    if not isinstance(value, dict):
        raise _invalid(path, f"{subject} must be a JSON object, got {type(value).__name__}")
    return value


def _entry(path: Path, name: str, info: Any, payload: int) -> Tensor:
    if not isinstance(info, dict) or not info.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _invalid(path, f"tensor {_text.quoted(name)} must have dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _invalid(
            path,
            f"tensor {_text.quoted(name)} must have a shape and two offsets of whole numbers >= 0, "
            f"got {_text.shown(shape)} and {_text.shown(offsets)}",
        )
    if not isinstance(dtype, str) or dtype not in _dtypes and dtype not in _fp8_bytes:
        raise _invalid(
            path,
            f"tensor {_text.quoted(name)} has the dtype {_text.quoted(dtype)}; expected one of "
            f"{', '.join(_dtypes)}",
        )
    width = _fp8_bytes[dtype] if dtype in _fp8_bytes else _dtypes[dtype].itemsize
    begin, end = offsets
    need = math.prod(shape) * width
    if end - begin != need:
        raise _invalid(
            path,
            f"tensor {_text.quoted(name)} of {dtype}{_text.shown(shape)} needs {need} bytes, "
            f"but its offsets span {end - begin}",
        )
    return Tensor(name, path, dtype, tuple(shape), payload + begin, payload + end)


def _check_tiling(path: Path, tensors: Mapping[str, Tensor], payload: int, size: int) -> None:
    position, previous = payload, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][4:6]):
        if tensor.start != position:
            word = "overlaps" if tensor.start < position else "leaves a hole after"
            raise _invalid(path, f"tensor {_text.quoted(name)} {word} {previous}")
        position, previous = tensor.stop, _text.quoted(name)
    if position != size:
        word = "it is truncated" if position > size else "something was appended"
        raise _invalid(path, f"its tensors end at byte {position}, the file at {size}; {word}")


def _naturals(value: Any) -> bool:
    # NumPy's arrays have at most 64 axes; more would only cost time to multiply.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _refuse_foreign(path: Path, start: bytes) -> None:
    looks_like_header = start[8:9] == b"{"
    for magic, description in _foreign:
        if start.startswith(magic) and not looks_like_header:
            repair = (
                "Nothing is ever unpickled here: convert it where it was made, with "
                "safetensors.torch.save_file(model.state_dict(), path)"
                if "pickle" in description
                else "Expected a .safetensors file"
            )
            raise _invalid(path, f"it is {description}. {repair}")


def _invalid(path: Path, reason: str) -> ValueError:
    return ValueError(f"safetensors: {path} cannot be read: {reason}.")

"""Reading and writing safetensors, as one file or as Hugging Face's shards with an index.

The format is a JSON header and raw numbers, so reading it executes no code.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gqe_jax.config_json import parse_json
from gqe_jax.errors import UserError
from gqe_jax.storage import Location

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")  # each exact in float32


class WeightsError(UserError, ValueError):
    """Weights or their configuration cannot be used."""


class Tensors:
    """The tensors of a file, or of a directory with `model.safetensors` or an index of shards.

    In a directory with both, the index is ignored, as by `transformers`. The constructor reads
    headers only; `read` loads one tensor.

    Raises:
      WeightsError: a file is missing, truncated or not safetensors, or the index and its shards
        disagree; names the file and the tensor.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, pathlib.Path] = {}
        if self.path.is_file():
            self._open(self.path)
        elif (self.path / WEIGHTS_FILE).is_file():  # before an index, as transformers does
            self._open(self.path / WEIGHTS_FILE)
        elif (self.path / INDEX_FILE).is_file():
            self._open_shards(self.path / INDEX_FILE)
        else:
            raise WeightsError(
                f"{self.path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; name a safetensors file "
                "or a directory with one (convert other formats first)"
            )

    def _open(self, file: pathlib.Path) -> None:
        try:
            opened = safe_open(file, framework="np")
        except FileNotFoundError:
            raise WeightsError(
                f"{file} is missing, which {self.path / INDEX_FILE} lists; copy it, or if the "
                f"weights are in other files, replace the index or name the {WEIGHTS_FILE}"
            ) from None
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise WeightsError(
                f"{file} cannot be read: {_damage(file) or error}; copy it again"
            ) from error
        for name in opened.keys():  # noqa: SIM118 - no mapping
            self._files[name], self._file_of[name] = opened, file

    def _open_shards(self, index: pathlib.Path) -> None:
        try:
            listed = parse_json(index.read_bytes())["weight_map"]
            named = list(listed.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} has no weight_map ({error!r}); copy it again") from None
        except OSError as error:
            raise WeightsError(f"{index} cannot be read ({error}); copy it again") from None
        for name, shard in named:
            plain = isinstance(shard, str) and pathlib.PurePath(shard).name == shard
            if not plain or not shard.endswith(".safetensors"):
                raise WeightsError(
                    f"{index} names the file {shard!r} for tensor {name}; it must be the plain "
                    "name of a safetensors file: copy the index again"
                )
        for shard in sorted(set(listed.values())):
            self._open(index.parent / shard)
        for name in sorted(set(listed) | set(self._file_of)):
            if name not in listed:
                raise WeightsError(f"{self._file_of[name]} has tensor {name}, {index} does not")
            expected = index.parent / listed[name]
            if self._file_of.get(name) != expected:
                raise WeightsError(f"{expected} lacks tensor {name}, which {index} lists for it")

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> np.ndarray:
        """The tensor in float32, which represents every dtype that `check` allows exactly."""
        return self._files[name].get_tensor(name).astype(np.float32)

    def check_equal(self, name: str, other: str) -> None:
        """Checks that two tensors are equal.

        Raises:
          WeightsError: they differ.
        """
        if not np.array_equal(self.read(name), self.read(other)):
            raise WeightsError(
                f"{self._file_of[name]}: tensor {name} differs from {other}; the configuration "
                "ties them, so it must be equal or omitted"
            )

    def check(self, shapes: Mapping[str, tuple[int, ...]], ignored: Callable[[str], bool]) -> None:
        """Checks that these tensors exist with these shapes and a float dtype, and no others.

        Args:
          shapes: the required tensors.
          ignored: returns True for the names of tensors that are allowed but not required.

        Raises:
          WeightsError: names the missing and unexpected tensors, or one of the wrong shape or type.
        """
        missing = [f"{name} is missing" for name in shapes if name not in self]
        extra = [
            f"{name} in {self._file_of[name].name} is unexpected"
            for name in self._files
            if name not in shapes and not ignored(name)
        ]
        if missing or extra:
            found = missing + extra
            shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if found[6:] else "")
            raise WeightsError(f"{self.path} does not fit its configuration: tensor {shown}")
        for name, shape in shapes.items():
            view = self._files[name].get_slice(name)
            if tuple(view.get_shape()) != tuple(shape):
                raise WeightsError(
                    f"{self._file_of[name]}: tensor {name} has shape {tuple(view.get_shape())}; "
                    f"by the configuration it must be {tuple(shape)}"
                )
            if view.get_dtype() not in _FLOATS:
                raise WeightsError(
                    f"{self._file_of[name]}: tensor {name} has type {view.get_dtype()}; it must be "
                    f"one of {', '.join(_FLOATS)}"
                )


def _damage(file: pathlib.Path) -> str | None:
    """Names the first tensor that a truncated file lacks; None if the file is not truncated."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = parse_json(stream.read(length)) if length < size else {}
        ends = {
            name: 8 + length + x["data_offsets"][1] for name, x in header.items() if "dtype" in x
        }
    except (ValueError, LookupError, TypeError, AttributeError):  # damaged in another way
        return None
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            return f"tensor {name} ends at byte {end} and the file at {size}; it is truncated"
    return None


def write_tensors(
    directory: Location,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    *,
    max_shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or shards and an index if it would exceed `max_shard_bytes`.

    Args:
      directory: an existing directory without weights.
      shapes: the tensors' shapes, in the order in which to write them.
      read: returns a tensor by name; one shard is held in memory at a time.
      dtype: dtype of the files.
      max_shard_bytes: maximum size of a file; a larger tensor gets its own file.
    """
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
        total += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [WEIGHTS_FILE]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: np.ascontiguousarray(read(name), dtype) for name in names}
        save_file(tensors, str(directory / file), metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")

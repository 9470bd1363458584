"""Weights files: written whole or not at all, read without running any code from them.

The format is safetensors: a JSON header, then the tensors' bytes. Files written here carry the SHA-256 of
their tensors and metadata, which is checked on reading. A ``.pth`` or ``.pt`` file is read with torch's
restricted unpickler only.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from zfcore.errors import DtypeError, WeightsError
from zfcore.files import NotRegular, open_regular
from zfcore.models.loading import load_tensors
from zfcore.models.memory import unusable
from zfcore.models.pickles import check_pickled

SAFETENSORS, PICKLED = (".safetensors",), (".pth", ".pt")
CHECKSUM = "sha256"  # the metadata key of a file's checksum
# Under what key checkpoints of training programs hold the state dict; the first that is there is read.
CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema")
_LONGEST_HEADER = 2**24  # bytes; ten thousand tensors take one million
_LONGEST_SHOWN = 300  # characters of what a message quotes from a file
_DTYPES = frozenset(safetensors.torch._TYPES.values())


def load_weights(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> dict[str, str]:
    """Load a weights file as ``model.load_state_dict`` would; all of it, or nothing when it does not fit.

    Args:
        model: takes the tensors whose names are in its ``state_dict()``, cast between floating dtypes and
            between whole ones where their values allow it. Wrappers (``torch.compile``, data parallelism,
            averaged weights) are passed over, in the model's names and in the file's; of tensors that share
            memory the file needs one.
        path: ``.safetensors``; or ``.pth``, ``.pt`` holding a state dict, alone or under one of ``CONTAINERS``.
        strict: refuse missing and unexpected names. Without it those are passed over, but some name must fit.

    Returns:
        the file's metadata; empty for a ``.pth``.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, holds anything but tensors, or does not
            fit; the message names the tensors that are missing, unexpected, or of another shape or dtype. Or
            the model has tensors without plain memory: on the meta device, quantised, freed, ...
        DtypeError: the model is no module, or the path no path.
    """
    _check_model(model)
    path = _as_path(path)
    tensors, metadata = read_tensors(path)
    load_tensors(model, tensors, strict, kept_as=metadata, source=f"weights {str(path)!r}")
    return metadata


def save_weights(
    model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the model's ``state_dict()`` as safetensors, atomically.

    At any moment the path holds what was there before, or all of the new file.

    Args:
        model: its parameters and persistent buffers are written, in their dtypes.
        path: ends in ``.safetensors``.
        metadata: names and texts to keep in the file's header.

    Raises:
        WeightsError: the path has another ending, or names and metadata take over 16 MiB.
        DtypeError: the model is no module, the path no path, metadata holds something that is not text, or
            the model something that the format has no place for.
        OSError: the disk is full or the folder cannot be written; what was at the path is untouched.
    """
    _check_model(model)
    write_tensors(path, model.state_dict(), metadata or {})


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """``save_weights`` for any tensors by name."""
    path = _as_path(path)
    if path.suffix not in SAFETENSORS:
        raise WeightsError(f"path={str(path)!r}: weights are written as .safetensors")
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value) or key == CHECKSUM:
            raise DtypeError(
                f"metadata[{_short(key)}]={_short(value)}: expected text under a name other than {CHECKSUM!r}"
            )
    for name, tensor in tensors.items():
        why = unusable(tensor) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}; expected a tensor"
        if not why and tensor.dtype not in _DTYPES:
            why = f"{tensor.dtype}, which safetensors does not hold"
        if why or not _is_text(name):
            raise DtypeError(f"tensor {_short(name)}: {why or 'expected text for a name'}")
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    data = safetensors.torch.save(tensors, metadata)
    if (length := int.from_bytes(data[:8], "little")) > _LONGEST_HEADER:
        raise WeightsError(f"path={str(path)!r}: a header of {length} bytes; expected at most {_LONGEST_HEADER}")
    try:
        _replace_file(path, data)
    except OSError as error:  # which may name the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file, on the CPU, and its metadata. Under a name that ends in ``_extra_state``
    a pickled file may hold other values too.

    Raises:
        WeightsError: as ``load_weights``, of the file alone.
    """
    path = _as_path(path)
    if path.suffix not in SAFETENSORS + PICKLED:
        raise WeightsError(
            f"weights {str(path)!r}: expected a file ending in {', '.join(SAFETENSORS + PICKLED)}"
        )
    with _opened(path) as file:
        if path.suffix in PICKLED:
            return _read_pickled(path, file), {}
        try:
            tensors, metadata = _read_safetensors(file)
        except Exception as error:  # whatever a damaged file makes the parser raise
            raise WeightsError(
                f"weights {str(path)!r} are not a readable safetensors file: {_short(error)}"
            ) from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(tensors, metadata):
        raise WeightsError(
            f"weights {str(path)!r} are damaged: their {CHECKSUM} does not match their contents"
        )
    return tensors, metadata


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The regular file at the path."""
    try:
        file = open_regular(path)
    except OSError as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        why = "there is no such file" if missing else f"the file cannot be opened: {_short(error)}"
        raise WeightsError(f"weights {str(path)!r}: {why}") from error
    except NotRegular as error:
        raise WeightsError(
            f"weights {str(path)!r}: there is no such file, but a folder, a pipe or a device of that name"
        ) from error
    with file:
        yield file


def _read_safetensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """ValueError, or what a damaged header makes of its entries, for what is no safetensors file.

    The bytes are read and not mapped: if another process shortens a mapped file, the next look at it ends this one.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{size} bytes, of a header of {length}")
    described = json.loads(file.read(length), object_pairs_hook=_once)
    metadata = described.pop("__metadata__", {})
    if not all(map(_is_text, (*metadata, *metadata.values()))):
        raise ValueError("metadata that is not text")
    size -= 8 + length
    places = {name: _place(name, each) for name, each in described.items()}
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.start != end:
            raise ValueError(f"{name!r} starts at byte {place.start}, where {end} is next")
        end = place.end
    if end != size:  # so no more is read than is needed
        raise ValueError(f"{size} bytes of tensors, of {end}")
    data = torch.empty(size, dtype=torch.uint8)
    if file.readinto(memoryview(data.numpy())) != size:
        raise ValueError("the file was cut while it was read")
    return {name: _tensor(data, place) for name, place in places.items()}, metadata


class _Place(NamedTuple):
    """Where a tensor lies in a file, in bytes after the header."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


def _place(name: str, described: dict) -> _Place:
    place = _Place(safetensors.torch._TYPES[described["dtype"]], described["shape"], *described["data_offsets"])
    whole = all(type(each) is int and each >= 0 for each in (*place.shape, place.start, place.end))
    if not whole or place.end - place.start != math.prod(place.shape) * place.dtype.itemsize:
        raise ValueError(f"{name!r} of shape {place.shape} at bytes {place.start} to {place.end}")
    return place


def _tensor(data: Tensor, place: _Place) -> Tensor:
    if place.start == place.end:
        return torch.empty(place.shape, dtype=place.dtype)
    values = data[place.start : place.end]
    aligned = values if place.start % place.dtype.itemsize == 0 else values.clone()
    return aligned.view(place.dtype).reshape(place.shape)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name of its header stands there twice")
    return found


def _read_pickled(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    try:
        check_pickled(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise WeightsError(
            f"weights {str(path)!r} cannot be read as plain tensors (weights_only=True): {_reason(error)}"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"weights {str(path)!r} hold a {type(state).__name__}; expected a state dict")
    inside = (dict.get(state, key) for key in CONTAINERS)
    state = _without_attributes(next((each for each in inside if isinstance(each, dict)), state))
    for name, value in state.items():
        if isinstance(name, str) and name.rpartition(".")[2] == "_extra_state":
            continue
        if not isinstance(name, str) or not isinstance(value, Tensor) or unusable(value):
            kind = (isinstance(value, Tensor) and unusable(value)) or f"a {type(value).__name__}"
            raise WeightsError(
                f"weights {str(path)!r}: {_short(name)}: {kind}; expected dense tensors by name, alone or under "
                + ", ".join(map(repr, CONTAINERS))
            )
    return state


def _without_attributes(state: dict) -> OrderedDict:
    """With the versions of modules only: a pickled ``OrderedDict`` may bring attributes of any name and kind,
    and torch takes orders from them, such as to put the file's own tensors into the network.
    """
    found = OrderedDict(dict.items(state))
    versions = vars(state).get("_metadata") if isinstance(state, OrderedDict) else None
    if isinstance(versions, dict):
        found._metadata = OrderedDict(
            (path, {"version": each["version"]})
            for path, each in dict.items(versions)
            if isinstance(path, str) and isinstance(each, dict) and type(dict.get(each, "version")) is int
        )
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise DtypeError(f"model: a {type(model).__name__}; expected a torch.nn.Module")


def _as_path(path: str | os.PathLike) -> Path:
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise DtypeError(f"path={_short(path)}: expected a text or a path")
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise WeightsError(f"path={os.fspath(path)!a}: expected characters that a file's name can have")
    return Path(path)


def _is_text(value: object) -> bool:
    """Whether this is a text that UTF-8 can hold: no half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= each <= "\udfff" for each in value)


def _short(value: object) -> str:
    """As in a message: one line, whatever it holds."""
    text = f"{type(value).__name__}: {value}" if isinstance(value, Exception) else reprlib.repr(value)
    return " ".join(text.split())[:_LONGEST_SHOWN]


def _reason(error: Exception) -> str:
    """What torch says of the file; not what it says of reading files with less care."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    return " ".join(re.split(r"Please use|Check the documentation", text)[0].split())[:_LONGEST_SHOWN]


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` so that neither a crash nor a power cut leaves a torn file there."""
    _sweep(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # marks it as in use, until it is closed or this process ends
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name itself lives in the folder.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sweep(path: Path) -> None:
    """Remove temporary files that killed writers of this path have left, where that is possible."""
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # in use, gone, somebody else's, a folder
            handle = os.open(orphan, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(handle, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                orphan.unlink()

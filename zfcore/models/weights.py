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
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from zfcore.errors import DtypeError, WeightsError

SAFETENSORS, PICKLED = (".safetensors",), (".pth", ".pt")
CHECKSUM = "sha256"  # the metadata key of a file's checksum
_NAMES_SHOWN = 8


def load_weights(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> dict[str, str]:
    """Copy the tensors of a weights file into the model; all of them, or none when the file does not fit.

    Args:
        model: takes the tensors whose names are in its ``state_dict()``, cast between float dtypes.
        path: ``.safetensors``; or ``.pth``, ``.pt`` holding a state dict, alone or under "state_dict".
        strict: refuse missing and unexpected names. Without it those are passed over, but some name must fit.

    Returns:
        the file's metadata; empty for a ``.pth``.

    Raises:
        WeightsError: the file is missing, damaged, of another kind, holds anything but tensors, or does not
            fit; the message names the tensors that are missing, unexpected, or of another shape or dtype.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    own = model.state_dict()
    common = [name for name in own if name in tensors]
    problems = [f"{name} {why}" for name in common if (why := _mismatch(own[name], tensors[name]))]
    if strict:
        problems += _listed("missing", [name for name in own if name not in tensors])
        problems += _listed("unexpected", [name for name in tensors if name not in own])
    elif not common:
        problems.append(f"none of its {len(tensors)} tensors has a name of the model's")
    if problems:
        raise WeightsError(f"weights {str(path)!r} do not fit {type(model).__name__}: " + "; ".join(problems))
    with torch.no_grad():
        for name in common:
            own[name].copy_(tensors[name])
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
        WeightsError: the path has another ending.
        DtypeError: metadata holds something that is not text.
        OSError: the disk is full or the folder cannot be written; what was at the path is untouched.
    """
    write_tensors(path, model.state_dict(), metadata or {})


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """``save_weights`` for any tensors by name."""
    path = Path(path)
    if path.suffix not in SAFETENSORS:
        raise WeightsError(f"path={str(path)!r}: weights are written as .safetensors")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key == CHECKSUM:
            raise DtypeError(
                f"metadata[{key!r}]={value!r}: expected text under a name other than {CHECKSUM!r}"
            )
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    metadata = {**metadata, CHECKSUM: _checksum(tensors, metadata)}
    _replace_file(path, safetensors.torch.save(tensors, metadata))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file, on the CPU, and its metadata.

    Raises:
        WeightsError: as ``load_weights``, of the file alone.
    """
    path = Path(path)
    if path.suffix not in SAFETENSORS + PICKLED:
        raise WeightsError(
            f"weights {str(path)!r}: expected a file ending in {', '.join(SAFETENSORS + PICKLED)}"
        )
    if not path.is_file():
        raise WeightsError(f"weights {str(path)!r}: there is no such file")
    if path.suffix in PICKLED:
        return _read_pickled(path), {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise WeightsError(f"weights {str(path)!r} are not a readable safetensors file: {error}") from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(tensors, metadata):
        raise WeightsError(
            f"weights {str(path)!r} are damaged: their {CHECKSUM} does not match their contents"
        )
    return tensors, metadata


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise WeightsError(
            f"weights {str(path)!r} cannot be read as plain tensors (weights_only=True): {error}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(f"weights {str(path)!r} hold a {type(state).__name__}; expected a state dict")
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        if not isinstance(name, str) or not dense or value.is_quantized:
            raise WeightsError(
                f"weights {str(path)!r}: {name!r} is a {type(value).__name__}; expected dense tensors by name"
            )
    return state


def _mismatch(own: Tensor, given: Tensor) -> str:
    """Why ``given`` cannot be copied into ``own``, or an empty string."""
    if own.shape != given.shape:
        return f"has shape {list(given.shape)}, expected {list(own.shape)}"
    if own.dtype != given.dtype and not (own.is_floating_point() and given.is_floating_point()):
        return f"has dtype {given.dtype}, expected {own.dtype}"
    return ""


def _listed(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return [f"{kind} {', '.join(map(repr, names[:_NAMES_SHOWN]))}{more}"]


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
    """Remove temporary files that killed writers of this path have left."""
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(orphan, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            orphan.unlink()

"""Keeps Pillow's libtiff from writing about damaged files to the process's stderr."""

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_former: list = []


@contextmanager
def quiet() -> Iterator[None]:
    """libtiff prints from C, past Python, by a handler of the whole process: off while any thread reads a
    TIFF, then as it was. It prints where it cannot be found (linked into Pillow without its names)."""
    global _users
    setters = _setters()
    with _lock:
        _users += 1
        if _users == 1:
            _former[:] = [setter(None) for setter in setters]
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for setter, handler in zip(setters, _former, strict=True):
                    setter(handler)


@functools.cache
def _setters() -> tuple:
    try:
        from PIL import _imaging

        library = ctypes.CDLL(_imaging.__file__)  # loaded already; its own libraries are searched too
        setters = (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler)
    except (ImportError, OSError, AttributeError, TypeError):
        return ()
    for setter in setters:
        setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
    return setters

"""The errors that zfcore raises. Each is a ``ZfcoreError`` and the built-in a Python user would catch."""


class ZfcoreError(Exception):
    """Base of every error that zfcore raises on purpose."""


class ArgumentError(ZfcoreError, ValueError):
    """An argument's value is out of range; the message names it, its value and what was expected."""


class ShapeError(ZfcoreError, ValueError):
    """A tensor's shape does not fit the operation or another argument."""


class DtypeError(ZfcoreError, TypeError):
    """A tensor's dtype, or an argument's type, is not one that the operation takes."""


class DeviceError(ZfcoreError, ValueError):
    """Tensors that must share a device do not, or the device cannot run the operation."""


class SwitchError(ZfcoreError, ValueError):
    """A switch byte names no tap of its window, or a tap outside the map."""


class BackendUnavailable(ZfcoreError, RuntimeError):
    """A backend was asked for by name and this install or machine does not have it."""


class UnsupportedOperation(ZfcoreError, NotImplementedError):
    """``strict=True`` and the network holds an operation that the engines cannot read."""


class LayerNotFound(ZfcoreError, LookupError):
    """No layer of that name; the message lists the nearest names."""


class UnitNotFound(ZfcoreError, LookupError):
    """A unit, position or class index lies outside the layer."""


class ImageError(ZfcoreError, ValueError):
    """An image file is missing, damaged, too large or of a kind that is not read."""


class WeightsError(ZfcoreError, ValueError):
    """A weights file cannot be read, or does not fit the network."""

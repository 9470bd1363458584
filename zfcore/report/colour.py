"""Colour maps, made in OKLab so that lightness tells the order, in print and to the colour-blind too.

A sequential map rises in lightness from end to end; a diverging one falls from a light middle to two
dark ends of different hue; classes get hues a golden angle apart.
"""

from functools import lru_cache

import numpy as np

__all__ = ["DIVERGING", "SEQUENTIAL", "categorical", "coloured", "luma"]

SEQUENTIAL, DIVERGING = "sequential", "diverging"

_STEPS = 512
_GOLDEN_ANGLE = 137.508

# OKLab (B. Ottosson, 2020): Lab -> cube roots of cone responses -> linear sRGB.
_TO_CONES = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def coloured(values: np.ndarray, kind: str = SEQUENTIAL) -> np.ndarray:
    """Values in 0..1 (sequential) or -1..1 (diverging), clipped, -> uint8 [..., 3]; NaN is mid-grey."""
    values = np.asarray(values, dtype=np.float64)
    unit = values if kind == SEQUENTIAL else (values + 1) / 2
    index = np.rint(np.clip(np.nan_to_num(unit), 0, 1) * (_STEPS - 1)).astype(np.intp)
    colours = _table(kind)[index]
    colours[np.isnan(values)] = 128
    return colours


def categorical(count: int) -> np.ndarray:
    """`count` colours for classes: uint8 [count, 3]."""
    order = np.arange(count)
    lightness = np.array([0.70, 0.56, 0.82])[order % 3]
    hue = np.radians(255 + _GOLDEN_ANGLE * order)
    return _srgb(lightness, np.full(count, 0.13), hue)


def luma(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W], ITU-R 601."""
    return pixels @ np.array([0.299, 0.587, 0.114])


@lru_cache
def _table(kind: str) -> np.ndarray:
    t = np.linspace(0, 1, _STEPS)
    if kind == SEQUENTIAL:
        # From a dark violet through red and orange to a light yellow.
        return _srgb(0.16 + 0.80 * t, 0.06 + 0.13 * np.sin(np.pi * t**0.9), np.radians(285 + 178 * t))
    away = 2 * t - 1  # blue below zero, red above
    hue = np.radians(np.where(away < 0, 252.0, 32.0))
    return _srgb(0.96 - 0.46 * np.abs(away) ** 1.1, 0.17 * np.abs(away) ** 0.8, hue)


def _srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """OKLCh -> uint8 sRGB [..., 3]; chroma is lowered where the colour lies outside of sRGB."""
    low, high = np.zeros_like(chroma), chroma.astype(np.float64)
    inside = _in_gamut(_linear(lightness, high, hue))
    low = np.where(inside, high, low)
    for _ in range(20):  # bisection: the largest chroma that a screen can show
        middle = (low + high) / 2
        inside = _in_gamut(_linear(lightness, middle, hue))
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    linear = np.clip(_linear(lightness, low, hue), 0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(curved * 255).astype(np.uint8)


def _linear(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    return (lab @ _TO_CONES.T) ** 3 @ _TO_RGB.T


def _in_gamut(linear: np.ndarray) -> np.ndarray:
    return ((linear >= -1e-4) & (linear <= 1 + 1e-4)).all(axis=-1)

"""Which pictures a run takes: those that are named and those in folders, without what earlier runs drew."""

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from zfcore.data import FoundImages, find_images
from zfcore.report.files import is_figure, is_output_folder

__all__ = ["Inputs", "find_inputs"]

_WRITTEN = frozenset(("index.html", "results.json", "errors.jsonl"))


class Inputs(NamedTuple):
    """found: what is taken, skipped and passed over.
    named:    figures of earlier runs among what is taken, since they were named.
    drawn:    figures of earlier runs that are left out.
    left:     pictures that are left out since they lie in a folder of results, and are no figures.
    """

    found: FoundImages
    named: list[str]
    drawn: list[str]
    left: list[str]


def find_inputs(paths: Sequence[str], out: str) -> Inputs:
    """`find_images`, but in the folders that are searched, nothing that a run has written is an input.

    Left out are figures, known by their mark, wherever they lie; and all of a folder below the one that is searched,
    if it is `out` or the results of a run lie in it. A file that is named by itself is taken, whatever it is.
    """
    folders = [path for path in paths if os.path.isdir(path)]
    tops = {os.path.dirname(os.path.join(path, "x")) for path in folders}  # as the paths of their files begin
    named = set(paths).difference(folders)

    @cache
    def is_output(folder: str) -> bool:
        return is_output_folder(folder) or _same(folder, out)

    @cache
    def below_output(folder: str) -> bool:
        above = os.path.dirname(folder)
        return folder not in tops and folder != above and (is_output(folder) or below_output(above))

    found, drawn, left = FoundImages([], [], []), [], []
    images = find_images(paths)
    for path in images.files:
        if path in named:
            found.files.append(path)
        elif is_figure(path):
            drawn.append(path)
        elif below_output(os.path.dirname(path)):
            left.append(path)
        else:
            found.files.append(path)
    found.skipped.extend(item for item in images.skipped if not below_output(os.path.dirname(item[0])))
    for path in images.others:
        folder, name = os.path.split(path)
        if not (below_output(folder) or (name in _WRITTEN and is_output(folder))):
            found.others.append(path)
    return Inputs(found, sorted(filter(is_figure, named)), drawn, left)


def _same(folder: str, out: str) -> bool:
    try:
        return os.path.samefile(folder, out)
    except (OSError, ValueError):
        return False

"""Ops with a kernel in CUDA C++ and one in Triton: what times the second beside the first, which the row `zfcore` runs."""

from __future__ import annotations

from collections.abc import Callable

from zfcore import use_backend

TWIN = "zfcore-triton"  # the row; on a GPU only


def on_triton(run: Callable[[], object]) -> Callable[[], object]:
    """The same call on the Triton kernels."""

    def call():
        with use_backend("triton"):
            return run()

    return call

"""Work in a child process, so that a signal that ends it is a failed test."""

import os
import sys
import traceback

import torch


def outcome(path, work):
    """What the work returns, a text, by way of the file; asserts that the child ends as it should."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            path.write_text(work())
        finally:
            if failed := sys.exc_info()[0] is not None:
                traceback.print_exc()
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return path.read_text()

import contextlib
import os
import sys

with contextlib.suppress(OSError):  # the current folder was removed
    if sys.path[0] == os.getcwd():
        # python -m puts it first: a random.py or torch.py in it is not what the library means. Last, as with the console
        # command, it still gives models.
        sys.path.append(sys.path.pop(0))

from zfcore.cli import main

sys.exit(main())

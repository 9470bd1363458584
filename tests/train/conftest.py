"""What the tests of the trainer share."""

import pytest
from bars import pictures, write_idx


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """A folder like Fashion-MNIST's, with 96 training and 40 test pictures."""
    folder = tmp_path_factory.mktemp("idx")
    for stem, n, seed in (("train", 96, 0), ("t10k", 40, 1)):
        images, labels = pictures(n, seed)
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", images[:, 0])
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder

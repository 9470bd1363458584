"""What is kept of a weight is used for that weight only: any change of it is noticed, also one that is made to go unseen."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy
import torch
from torch import nn

import zfcore
from zfcore.ops import _boundary
from zfcore.ops._library import native


def digest(x, threads=1):
    return tuple(native.hash_bytes(_boundary.address(x), x.nbytes, threads))


def test_each_bit_counts_and_so_does_the_length():
    for count in (1, 3, 4, 7, 1024, 1025, 70_000):
        x = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int32)
        found = {digest(x)}
        assert digest(x) in found and digest(x.clone(), threads=3) in found
        for place in {0, count // 2, count - 1}:
            for bit in (1, 2**16, -(2**31)):
                changed = x.clone()
                changed[place] ^= bit
                found.add(digest(changed))
        found |= {digest(torch.cat([x, x.new_zeros(n)])) for n in (1, 2, 1024)}
        assert len(found) == 1 + 3 * len({0, count // 2, count - 1}) + 3


def test_bytes_at_the_end_count():
    x = torch.randint(0, 256, (4099,), dtype=torch.uint8)
    assert len({digest(x[:n].contiguous()) for n in range(4080, 4100)}) == 20
    assert digest(x[:0].contiguous()) == digest(torch.empty(0, dtype=torch.uint8))


def test_changes_that_cancel_in_sums_products_and_permutations_do_not_here():
    words = torch.randint(-(2**62), 2**62, (2048,), dtype=torch.int64)
    contents, found = {words.numpy().tobytes()}, {digest(words)}
    for i in range(200):
        a, b = (i * 37) % 2048, (i * 91 + 5) % 2048
        for change in (
            lambda w: w.index_copy_(0, torch.tensor([a, b]), words[[b, a]]),
            lambda w: w.index_add_(0, torch.tensor([a, b]), torch.tensor([1 << (i % 60), -(1 << (i % 60))])),
            lambda w: w.index_copy_(0, torch.tensor([a, b]), words[[a, b]] ^ (1 << (i % 60))),
            lambda w: w.roll(i + 1),
        ):
            changed = change(words.clone())
            contents.add(changed.numpy().tobytes())
            found.add(digest(changed))
    assert len(found) == len(contents) > 700


def test_keys_are_drawn_for_each_process(tmp_path):
    code = (
        "import torch; from zfcore.ops._library import native\n"
        "x = torch.zeros(64); print(native.hash_bytes(x.data_ptr(), x.nbytes, 1))"
    )
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout for _ in range(2)}
    assert len(found) == 2 and "" not in found


def test_a_change_that_a_multiplicative_chain_of_words_would_not_see():
    """In lanes of 32 words, state = mix(state ^ word), a change of one word is undone by one of the 32nd after it."""

    def mix(state, word):
        with numpy.errstate(over="ignore"):
            h = numpy.uint32(state ^ word) * numpy.uint32(0x9E3779B1)
        return h ^ (h >> numpy.uint32(15))

    torch.manual_seed(3)
    images = torch.rand(1, 3, 12, 12)
    for attempt in range(64):
        conv = nn.Conv2d(3, 4, 3)
        model = nn.Sequential(conv, nn.ReLU()).eval()
        before = zfcore.deconv_project(model, images, "0").pixels
        words = conv.weight.detach().view(-1).numpy().view(numpy.uint32)
        lane = attempt % 32
        with numpy.errstate(over="ignore"):
            start = numpy.uint32(0x85EBCA6B) * numpy.uint32(lane + 1)
        changed = words[lane] ^ numpy.uint32(0x00400000 | attempt)
        after = words[lane + 32] ^ mix(start, words[lane]) ^ mix(start, changed)
        value = numpy.array([after], numpy.uint32).view(numpy.float32)[0]
        if not (1e-3 < abs(value) < 1e3):
            continue
        assert mix(mix(start, changed), after) == mix(mix(start, words[lane]), words[lane + 32])
        words[lane], words[lane + 32] = changed, after  # in place, and without torch's knowing
        ours = zfcore.deconv_project(model, images, "0").pixels
        assert torch.equal(ours, zfcore.deconv_project(copy.deepcopy(model), images, "0").pixels)
        assert not torch.equal(ours, before)
        return
    raise AssertionError("no attempt gave a finite weight of a common size")

"""Weights files: written whole or not at all, and read without running anything from them."""

import argparse
import errno
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import OrderedDict

import forked
import pytest
import safetensors.torch
import torch
from torch import nn

from zfcore.errors import DtypeError, WeightsError
from zfcore.models import load_weights, save_weights, weights


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture
def saved(tmp_path):
    model, path = net(), tmp_path / "net.safetensors"
    save_weights(model, path, {"classes": "a, b"})
    return model, path


def test_round_trip_with_metadata(saved):
    model, path = saved
    other = net()
    assert not equal(model, other)
    assert load_weights(other, path) == {"classes": "a, b"}
    assert equal(model, other)


def test_any_reader_of_safetensors_reads_them(saved):
    model, path = saved
    assert safetensors.torch.load_file(path).keys() == model.state_dict().keys()


def test_layouts_shared_and_half_tensors_are_saved(tmp_path):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Conv2d(3, 3, 3).to(memory_format=torch.channels_last)).half()
    save_weights(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 3, 3))
    load_weights(other, tmp_path / "a.safetensors")
    assert other[2].weight.dtype is torch.float32
    assert equal(other.half(), model)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_plain_pickled_state_dict_is_read(tmp_path, suffix, nested):
    model, other, path = net(), net(), tmp_path / f"net{suffix}"
    state = model.state_dict()
    torch.save({"state_dict": state, "epoch": 3} if nested else state, path)
    assert load_weights(other, path) == {}
    assert equal(model, other)


def change(model, path, tensors):
    """Save the model's tensors with these changes; None removes one."""
    state = {**model.state_dict(), **tensors}
    safetensors.torch.save_file({name: value for name, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"0.weight": None}, "missing '0.weight'"),
        ({"0.weight": None, "3.bias": None}, "missing '0.weight', '3.bias'"),
        ({"4.weight": torch.zeros(2)}, "unexpected '4.weight'"),
        ({"3.weight": torch.zeros(3, 5)}, r"3.weight has shape \[3, 5\], expected \[3, 4\]"),
        ({"3.weight": torch.zeros(12)}, r"3.weight has shape \[12\], expected \[3, 4\]"),
        (
            {"3.weight": torch.zeros(3, 4, dtype=torch.int32)},
            "3.weight has dtype torch.int32, expected torch.float32",
        ),
        ({"1.num_batches_tracked": torch.tensor(1.0)}, "1.num_batches_tracked has dtype torch.float32"),
        ({f"x{i:02}": torch.zeros(1) for i in range(12)}, "unexpected 'x00', .*'x07' and 4 more"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, tensors, words):
    path = tmp_path / "net.safetensors"
    change(net(), path, tensors)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=f"do not fit Sequential: .*{words}"):
        load_weights(model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_not_strict_takes_what_fits_by_name_and_still_refuses_shapes(tmp_path):
    source, path = net(), tmp_path / "net.safetensors"
    change(source, path, {"0.weight": None, "extra": torch.zeros(1)})
    model = net()
    load_weights(model, path, strict=False)
    assert torch.equal(model[3].weight, source[3].weight) and not torch.equal(
        model[0].weight, source[0].weight
    )
    change(source, path, {"0.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="0.weight has shape"):
        load_weights(model, path, strict=False)
    safetensors.torch.save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="none of its 1 tensors"):
        load_weights(model, path, strict=False)


@pytest.mark.parametrize(
    "name", ["gone.safetensors", "gone.pth", "weights.bin", "weights", "folder.safetensors"]
)
def test_no_file_or_another_kind(tmp_path, name):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(WeightsError, match=name):
        load_weights(net(), tmp_path / name)


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(net(), tmp_path / "pipe.safetensors")


@pytest.mark.parametrize("value", [[1, 2], "text", {"a": 3}, {"a": "b"}, {3: torch.zeros(1)}, torch.zeros(3)])
def test_a_pickle_of_anything_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth"):
        load_weights(net(), tmp_path / "a.pth")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")
@pytest.mark.parametrize(
    "make",
    [lambda: torch.eye(2).to_sparse(), lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)],
)
def test_tensors_that_are_not_dense_are_refused(tmp_path, make):
    torch.save({"a": make()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth"):
        load_weights(net(), tmp_path / "a.pth")


class Call:
    """Unpickling calls ``function(*arguments)``; the parts are its state and its items."""

    def __init__(self, function, *arguments, parts=()):
        self.function, self.arguments, self.parts = function, arguments, parts

    def __reduce__(self):
        return self.function, self.arguments, *self.parts


@pytest.mark.parametrize(
    "attributes",
    [
        {"items": 3, "keys": 3, "get": 3, "copy": 3, "__class__": 3},
        {"_metadata": {False: {"version": 1}, "0": 3, "1": {"version": [2]}}},
        {"_metadata": 7},
        {"_metadata": {"": {"assign_to_params_buffers": True}, "3": {"assign_to_params_buffers": True}}},
    ],
)
def test_attributes_of_a_pickled_state_dict_are_not_heeded(tmp_path, attributes):
    source, model, path = net(), net(), tmp_path / "a.pth"
    torch.save(Call(OrderedDict, parts=(attributes, None, iter(source.state_dict().items()))), path)
    weight = model[3].weight
    place = weight.data_ptr()
    load_weights(model, path)
    assert equal(model, source) and model[3].weight is weight and weight.data_ptr() == place


def levels(count):
    """A zip whose pickle has a tuple of so many levels for a key; Python's hash of 150,000 overflows the stack."""
    return b"\x80\x02}K\x01" + b"\x85" * count + b"K\x01s."


@pytest.mark.parametrize("zipped", [True, False])
def test_tuples_in_tuples_do_not_end_the_process(tmp_path, zipped):
    path = tmp_path / "a.pth"
    if zipped:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", levels(1_000_000))
            file.writestr("a/version", "3\n")
            file.writestr("a/byteorder", "little")
    else:
        path.write_bytes(levels(1_000_000))
    said = forked.outcome(tmp_path / "said", lambda: refusal(path))
    assert "more than 100 levels" in said


def refusal(path):
    with pytest.raises(WeightsError) as caught:
        load_weights(net(), path)
    return str(caught.value)


def test_an_archive_that_is_longer_unpacked_is_refused_before(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(
        tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED
    ) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert "expected an uncompressed archive" in refusal(tmp_path / "a.pth")


def test_legacy_pickles_are_read(tmp_path):
    source, model, path = net(), net(), tmp_path / "a.pth"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    load_weights(model, path)
    assert equal(model, source)


def test_an_object_of_another_class_is_named_in_one_line(tmp_path):
    torch.save({"state_dict": net().state_dict(), "options": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    said = refusal(tmp_path / "a.pth")
    assert "argparse.Namespace" in said and "\n" not in said and "weights_only` set to `False" not in said


def hostile(mark):
    """Objects whose unpickling would leave the file ``mark``."""
    import builtins
    import importlib
    import subprocess

    code = f"open({str(mark)!r}, 'w')"
    shell = f"touch {mark}"
    return [
        Call(os.system, shell),
        Call(os.mkdir, str(mark)),
        Call(builtins.eval, code),
        Call(builtins.exec, code),
        Call(builtins.open, str(mark), "w"),
        Call(subprocess.Popen, ["touch", str(mark)]),
        Call(subprocess.check_output, ["touch", str(mark)]),
        Call(builtins.getattr, Call(importlib.import_module, "os"), "system"),
        Call(importlib.import_module, "antigravity"),
        Call(builtins.__import__, "this"),
    ]


@pytest.mark.parametrize("number", range(10))
@pytest.mark.parametrize("wrapping", ["raw", "zip", "state dict"])
def test_hostile_pickles_run_nothing(tmp_path, number, wrapping):
    mark, path = tmp_path / "mark", tmp_path / "evil.pth"
    value = hostile(mark)[number]
    if wrapping == "raw":
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif wrapping == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("evil/data.pkl", pickle.dumps(value, protocol=2))
            file.writestr("evil/version", "3\n")
            file.writestr("evil/byteorder", "little")
    else:
        torch.save({**net().state_dict(), "hook": value}, path)
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        load_weights(net(), path)
    assert not mark.exists()
    # The same bytes under the other name are no safetensors either.
    with pytest.raises(WeightsError):
        load_weights(net(), path.rename(tmp_path / "evil.safetensors"))
    assert not mark.exists()


def test_the_hostile_pickles_are_hostile(tmp_path):
    (mark := tmp_path / "mark").unlink(missing_ok=True)
    pickle.loads(pickle.dumps(hostile(mark)[1]))
    assert mark.exists()


def mutations(data, count):
    """Cut, flipped, inserted, removed, repeated, overwritten: damaged copies of ``data``."""
    pick = random.Random(7)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for number in range(count):
        at = pick.randrange(header if number % 2 else len(data))  # half of them in the header
        damage = bytes(pick.randrange(256) for _ in range(pick.randrange(1, 9)))
        yield (
            lambda: data[:at],
            lambda: data[:at] + bytes([data[at] ^ 1 << pick.randrange(8)]) + data[at + 1 :],
            lambda: data[:at] + damage + data[at:],
            lambda: data[:at] + data[at + len(damage) :],
            lambda: data[:at] + data[max(0, at - 20) : at] + data[at:],
            lambda: struct.pack("<Q", pick.choice((0, 1, header, 2**31, 2**63, 2**64 - 1))) + data[8:],
        )[number % 6]()


def test_mutated_safetensors_are_refused(saved):
    model, path = saved
    data = path.read_bytes()
    refused = 0
    for damaged in mutations(data, 300):
        if damaged == data:
            continue
        path.write_bytes(damaged)
        other = net()
        try:
            load_weights(other, path)
        except WeightsError:
            refused += 1
        else:  # what remains valid must mean the same: the header's padding, say
            assert equal(model, other)
    assert refused >= 270


def safetensors_bytes(header, data=bytes(8)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def described(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"abc", "3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "a header of 9223372036854775808"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "a header of 18446744073709551615"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3"),
        (safetensors_bytes(b"{}", b""), "missing '0.weight'"),
        (safetensors_bytes(b"[" * 100_000), "not a readable"),
        (safetensors_bytes(TWICE), "stands there twice"),
        (safetensors_bytes({"a": described(), "b": described([1], [4, 8])}), "not a readable"),
        (safetensors_bytes({"a": described([1], [4, 8])}), "not a readable"),
        (safetensors_bytes({"a": described([1], [0, 4])}), "8 bytes of tensors, of 4"),
        (safetensors_bytes({"a": described([2], [0, 2**62])}), "'a' of shape [2] at bytes 0 to 4611686018427387904"),
        (safetensors_bytes({"a": described([2**62, 4])}), "not a readable"),
        (safetensors_bytes({"a": described(), "b": described([2**63 - 1, 2, 0], [8, 8])}), "unexpected 'a', 'b'"),
        (safetensors_bytes({"a": described([-2])}), "not a readable"),
        (safetensors_bytes({"a": described([2], ["0", "8"])}), "not a readable"),
        (safetensors_bytes({"a": described(dtype="F31")}), "not a readable"),
        (safetensors_bytes({"a": described([16], dtype="F4")}), "not a readable"),
        (safetensors_bytes({"a": described([4], dtype="F16"), "__metadata__": {"a": 3}}), "not a readable"),
        (safetensors_bytes({"": described(), "__metadata__": {}}), "unexpected ''"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    assert words in refusal(path)


def test_tensors_without_elements_and_a_scalar(tmp_path):
    model, source = nn.Module(), nn.Module()
    for module, value in ((model, 0.0), (source, 2.0)):
        module.register_buffer("none", torch.zeros(0, 3))
        module.register_buffer("one", torch.tensor(value))
    save_weights(source, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors")
    assert equal(model, source)


def test_a_file_that_says_a_terabyte_is_not_read(tmp_path):
    """The file is as long as it says, and takes no room on the disk."""
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(safetensors_bytes({"a": described([2**40], [0, 2**42])}, b""))
        try:
            file.truncate(file.tell() + 2**42)
        except OSError:
            pytest.skip("the file system keeps no such file")
    assert "not a readable" in refusal(path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    """The next read of a mapped file would end the process."""
    path = tmp_path / "a.safetensors"
    save_weights(nn.Linear(1000, 100), path)
    real = json.loads

    def cut(*arguments, **named):
        os.truncate(path, 100)
        return real(*arguments, **named)

    monkeypatch.setattr(weights.json, "loads", cut)
    assert "not a readable safetensors file" in forked.outcome(path.with_name("said"), lambda: refusal(path))


def test_links(saved):
    model, path = saved
    link, loop = path.with_name("link.safetensors"), path.with_name("loop.safetensors")
    link.symlink_to(path)
    loop.symlink_to(loop)
    load_weights(net(), link)
    assert "cannot be opened" in refusal(loop)
    save_weights(net(), link)  # in the link's place
    assert not link.is_symlink()
    other = net()
    load_weights(other, path)
    assert equal(other, model)


@pytest.mark.parametrize("path", [None, 3, b"a.safetensors", ["a"]])
@pytest.mark.parametrize("use", [load_weights, save_weights])
def test_no_path(path, use):
    with pytest.raises(DtypeError, match="path=.*: expected a text or a path"):
        use(net(), path)


@pytest.mark.parametrize("path", ["a\0.safetensors", "\ud800.safetensors"])
@pytest.mark.parametrize("use", [load_weights, save_weights])
def test_no_name_of_a_file(path, use):
    with pytest.raises(WeightsError, match="expected characters that a file's name can have"):
        use(net(), path)


def test_a_changed_tensor_or_text_is_noticed(saved):
    _, path = saved
    data = path.read_bytes()
    for at in (len(data) - 3, data.index(b"a, b")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(WeightsError, match="sha256 does not match"):
            load_weights(net(), path)


@pytest.mark.parametrize("name", ["net.pth", "net", "net.bin"])
def test_only_safetensors_are_written(tmp_path, name):
    with pytest.raises(WeightsError, match=r"written as \.safetensors"):
        save_weights(net(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {1: "a"}, {"sha256": "0"}, {"a": "\ud800"}, {"\udfff": "a"}]
)
def test_metadata_is_text(tmp_path, metadata):
    with pytest.raises(DtypeError, match="metadata"):
        save_weights(net(), tmp_path / "a.safetensors", metadata)
    assert not list(tmp_path.iterdir())


def test_a_header_that_could_not_be_read_is_not_written(saved):
    model, path = saved
    with pytest.raises(WeightsError, match="a header of .* bytes; expected at most 16777216"):
        save_weights(net(), path, {"a": "b" * 2**24})
    other = net()
    load_weights(other, path)
    assert equal(other, model)


class Faulty:
    """Stands for a system call and fails it, once, at its n-th call."""

    def __init__(self, call, fail_at, error):
        self.call, self.left, self.error = call, fail_at, error

    def __call__(self, *arguments, **named):
        self.left -= 1
        if self.left == 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.call(*arguments, **named)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(saved, monkeypatch, call, error):
    model, path = saved
    monkeypatch.setattr(weights.os, call, Faulty(getattr(os, call), 1, error))
    with pytest.raises(OSError, match=os.strerror(error)):
        save_weights(net(), path)
    other = net()
    load_weights(other, path)
    assert equal(model, other)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_file(saved):
    """The limit on a file's size stands for the full disk: the write itself fails, after some bytes."""
    model, path = saved
    pid = os.fork()
    if not pid:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
        try:
            save_weights(net(), path)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    other = net()
    load_weights(other, path)
    assert equal(model, other)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("point", ["open", "flock", "fsync 1", "replace", "after replace", "fsync 2"])
def test_killed_at_any_point_the_file_is_whole_and_the_next_write_cleans_up(saved, point):
    model, path = saved
    new = net()
    pid = os.fork()
    if not pid:
        kill_at(point)
        save_weights(new, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    other = net()
    load_weights(other, path)
    assert equal(other, new if point in ("after replace", "fsync 2") else model)
    save_weights(model, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def kill_at(point):
    """Make this process kill itself when the writing comes to the point."""
    name, _, count = point.removeprefix("after ").partition(" ")
    module = weights.fcntl if name == "flock" else weights if name == "open" else weights.os
    call, seen = getattr(module, name, open), []

    def killer(*arguments, **named):
        seen.append(name)
        if point.startswith("after "):
            call(*arguments, **named)
        if len(seen) == int(count or 1):
            os.kill(os.getpid(), 9)
        return call(*arguments, **named)

    setattr(module, name, killer)


def test_a_live_writers_temporary_file_is_left_alone(saved):
    model, path = saved
    other = path.with_name(f".{path.name}.0123.tmp")
    with open(other, "wb") as file:
        weights.fcntl.flock(file, weights.fcntl.LOCK_EX)
        save_weights(model, path)
        assert other.exists()
    save_weights(model, path)
    assert not other.exists()


def test_a_missing_folder_is_an_oserror(tmp_path):
    path = tmp_path / "gone" / "a.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        save_weights(net(), path)
    assert caught.value.filename == str(path)


def test_a_folder_that_disappears_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "gone" / "a.safetensors"
    path.parent.mkdir()
    real = os.fsync

    def vanish(file):
        shutil.rmtree(path.parent)
        return real(file)

    monkeypatch.setattr(weights.os, "fsync", vanish)
    with pytest.raises(FileNotFoundError) as caught:
        save_weights(net(), path)
    assert caught.value.filename == str(path) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("planted", ["fifo", "folder", "link to a fifo"])
def test_what_only_looks_like_a_temporary_file_stops_no_write(saved, planted):
    model, path = saved
    other = path.with_name(f".{path.name}.0123.tmp")
    if planted == "folder":
        other.mkdir()
    else:
        pipe = other if planted == "fifo" else path.with_name("pipe")
        os.mkfifo(pipe)
        if planted != "fifo":
            other.symlink_to(pipe)
    save_weights(model, path)
    load_weights(net(), path)

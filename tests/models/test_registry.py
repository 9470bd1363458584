"""Networks by name, the shipped one, and factories of others."""

import builtins
import json
import sys
import textwrap

import pytest
import torch
from torch import nn

from zfcore.data import load_image, sample_images
from zfcore.errors import ArgumentError, WeightsError
from zfcore.models import AlexNet, ModelMeta, ZFNet, ZFNetSmall, create, load, names, registry, shipped


@pytest.fixture(scope="module")
def fashion():
    return load("zfnet_small_fashion")


def test_the_shipped_network_and_what_it_knows(fashion):
    model, meta = fashion
    assert isinstance(model, ZFNetSmall) and not model.training
    assert shipped() == ("zfnet_small_fashion",)
    assert len(meta.classes) == 10 and meta.classes[9] == "Ankle boot"
    assert (meta.input_size, meta.channels) == ((28, 28), 1)
    assert meta.mean == pytest.approx([0.2860], abs=1e-4) and meta.std == pytest.approx([0.3530], abs=1e-4)
    assert meta.test_accuracy >= 0.915
    assert "zfcore.train" in meta.command


def test_the_shipped_weights_are_at_most_four_megabytes():
    assert (registry.ASSETS / "zfnet_small_fashion.safetensors").stat().st_size <= 4e6


def test_the_shipped_network_names_the_shipped_pictures(fashion):
    model, meta = fashion
    samples = sample_images()
    images = torch.stack([load_image(sample.path, channels=meta.channels) for sample in samples])
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (meta.mean, meta.std))
    with torch.no_grad():
        answers = model((images - mean) / std).argmax(1)
    right = sum(answer == sample.label for answer, sample in zip(answers.tolist(), samples, strict=True))
    assert right >= 100 * meta.test_accuracy - 8  # three standard deviations of a hundred pictures
    assert all(meta.classes[sample.label] == sample.class_name for sample in samples)


def test_loading_twice_gives_two_networks(fashion):
    model, _ = load("zfnet_small_fashion")
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert fashion[0].conv1.weight.any()


@pytest.mark.parametrize("name", ["zfnet", "nothing", None])
def test_only_shipped_names_load(name):
    with pytest.raises(ArgumentError, match="expected one of the shipped networks zfnet_small_fashion"):
        load(name)


def test_create_takes_every_name():
    with torch.device("meta"):
        made = {name: type(create(name)) for name in ("zfnet", "zfnet_small", "alexnet")}
    assert made == {"zfnet": ZFNet, "zfnet_small": ZFNetSmall, "alexnet": AlexNet}
    assert set(names()) == {*made, *shipped()}


def test_create_of_a_shipped_name_is_trained(fashion):
    assert torch.equal(create("zfnet_small_fashion").conv1.weight, fashion[0].conv1.weight)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module ``their.nets`` of somebody's."""
    (tmp_path / "their").mkdir()
    (tmp_path / "their" / "__init__.py").write_text("")
    (tmp_path / "their" / "broken.py").write_text("import gone_missing")
    (tmp_path / "their" / "loud.py").write_text("raise RuntimeError('not today')")
    (tmp_path / "their" / "nets.py").write_text(
        textwrap.dedent("""
        import torch
        class Net(torch.nn.Sequential):
            @classmethod
            def large(cls): return cls(torch.nn.ReLU())
        def make(): return Net().train()
        def needs(size): return Net()
        def fails(): raise ValueError("bad day")
        def other(): return 3
        number = 4
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "their"]:
        del sys.modules[name]


@pytest.mark.parametrize("spec", ["their.nets:make", "their.nets:Net", "their.nets:Net.large"])
def test_create_calls_a_factory(module, spec):
    model = create(spec)
    assert type(model).__name__ == "Net" and not model.training


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("zfnet_smal", "no network of that name; expected zfnet_small"),
        ("", "no network of that name"),
        ("their.nets", "no network of that name"),
        ("gone_missing:make", "importing gone_missing failed: ModuleNotFoundError"),
        (
            "their.broken:make",
            "importing their.broken failed: ModuleNotFoundError: No module named 'gone_missing'",
        ),
        ("their.loud:make", "importing their.loud failed: RuntimeError: not today"),
        ("their.nets:maek", "their.nets has no 'maek'; did you mean make"),
        ("their.nets:Net.huge", "their.nets has no 'huge'"),
        ("their.nets:number", "number is a int, expected a factory"),
        ("their.nets:needs", "the factory failed: TypeError: .*size"),
        ("their.nets:fails", "the factory failed: ValueError: bad day"),
        ("their.nets:other", "the factory returned a int, expected an nn.Module"),
        (":make", 'expected "package.module:factory"'),
        ("their.nets:", 'expected "package.module:factory"'),
        ("their/nets:make", 'expected "package.module:factory"'),
        (".nets:make", 'expected "package.module:factory"'),
        ("their.nets:make:make", 'expected "package.module:factory"'),
        ("their.nets:make()", 'expected "package.module:factory"'),
        (7, "expected a text"),
        (None, "expected a text"),
    ],
)
def test_create_says_what_is_wrong(module, spec, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        create(spec)
    assert f"spec={spec!r}" in str(caught.value)


def test_nothing_of_torchvision_is_imported_unasked(monkeypatch):
    imports, real = [], builtins.__import__

    def spy(name, *rest):
        imports.append(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", spy)
    create("zfnet_small_fashion")
    assert not [name for name in imports if name.split(".")[0] == "torchvision"]


def test_torchvisions_networks_are_created_where_installed():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert isinstance(create("torchvision.models:alexnet"), nn.Module)


def test_meta_survives_the_file():
    meta = ModelMeta(("a", "b"), (28, 30), 1, (0.1,), (1 / 3,), 0.9, "python -m it")
    metadata = meta.to_metadata()
    assert all(isinstance(value, str) for value in metadata.values())
    assert ModelMeta.from_metadata(metadata) == meta
    with pytest.raises(WeightsError, match="no readable 'classes'"):
        ModelMeta.from_metadata({**metadata, "classes": "[1,"})
    del metadata["std"]
    with pytest.raises(WeightsError, match="no readable 'std'"):
        ModelMeta.from_metadata(metadata)
    assert json.loads(meta.to_metadata()["input_size"]) == [28, 30]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", []), ("classes", "ab"), ("classes", [1, 2]), ("classes", None), ("input_size", [28]),
        ("input_size", [28, -1]), ("input_size", [28.0, 28.0]), ("input_size", 28), ("channels", 0),
        ("channels", "1"), ("channels", True), ("channels", 2), ("mean", 0.1), ("mean", ["a"]),
        ("mean", [float("nan")]), ("std", [0.0]), ("std", [-1.0]), ("std", [0.1, 0.2]), ("std", {"a": 1}),
        ("test_accuracy", "high"), ("command", 3),
    ],
)  # fmt: skip
def test_meta_of_another_kind_is_refused_by_name(name, value):
    metadata = ModelMeta(("a", "b"), (28, 30), 1, (0.1,), (0.3,), 0.9, "python -m it").to_metadata()
    metadata[name] = json.dumps(value)
    with pytest.raises(WeightsError, match="metadata has (mean=|" + name + "=)"):
        ModelMeta.from_metadata(metadata)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes", "[" * 100_000), ("classes", '["' + "a" * 2**22 + '"]'), ("classes", json.dumps(["a" * 10_001])),
        ("classes", '["a\\u001b[2J"]'), ("classes", '["a\\nb"]'), ("classes", '["\\ud800"]'), ("classes", "NaN"),
        ("input_size", "[1" + "0" * 30 + ", 28]"), ("input_size", "[1" + "0" * 5000 + ", 28]"),
        ("input_size", "[8193, 8192]"), ("input_size", "[67108865, 1]"), ("input_size", "[0, 28]"),
        ("input_size", "[28, 28, 28]"), ("input_size", "[true, 28]"), ("input_size", "[1e400, 28]"),
        ("channels", "1" + "0" * 4000), ("channels", "1" + "0" * 5000), ("channels", "1025"), ("channels", "NaN"),
        ("mean", "[NaN]"), ("mean", "[Infinity]"), ("mean", "[1e400]"), ("mean", "[123.675]"), ("mean", "[-0.1]"),
        ("std", "[NaN]"), ("std", "[-Infinity]"), ("std", "[1e-300]"), ("std", "[1e300]"), ("std", "[1]"),
        ("test_accuracy", "NaN"), ("test_accuracy", "1.5"), ("test_accuracy", "-0.1"),
        ("command", '"a\\u0000"'), ("command", '"' + "a" * 10_001 + '"'),
    ],
)  # fmt: skip
def test_meta_out_of_range_is_refused_by_file_and_name(name, text):
    metadata = ModelMeta(("a", "b"), (28, 30), 1, (0.1,), (0.3,), 0.9, "python -m it").to_metadata()
    metadata[name] = text
    with pytest.raises(WeightsError, match=rf"^weights 'a': metadata has ({name}=|no readable '{name}')") as caught:
        ModelMeta.from_metadata(metadata, "weights 'a'")
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


def test_meta_at_the_limits():
    meta = ModelMeta(("", "Größe", "می\u200cخواهم"), (8192, 8192), 2, (0.0, 1.0), (1 / 255, 1.0), 1.0, "")
    assert ModelMeta.from_metadata(meta.to_metadata()) == meta

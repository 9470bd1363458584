"""Tensors by name into networks: wrappers, ties, counters, dtypes, modules' own code, kinds of tensors; all or none."""

import copy
import functools
import re

import forked
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from zfcore.errors import DtypeError, WeightsError
from zfcore.models import load_weights, save_weights


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


@pytest.fixture
def trained():
    model = net()
    model[1].running_mean.normal_()
    model[1].num_batches_tracked.fill_(7)
    return model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def bits(model):
    return [value.reshape(-1).view(torch.uint8).clone() for value in model.state_dict().values()]


def equal(a, b):
    return all(map(torch.equal, bits(a), bits(b)))


def refused(model, path, words, strict=True):
    """That the file is refused, and the network what it was."""
    before = bits(model)
    with pytest.raises(WeightsError, match=words):
        load_weights(model, path, strict)
    assert all(map(torch.equal, before, bits(model)))


# ---- Wrappers ----------------------------------------------------------------------------------------------

WRAPPERS = {
    "none": lambda model: model,
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "parallel compiled": lambda model: nn.DataParallel(torch.compile(model)),
    "compiled averaged": lambda model: torch.compile(AveragedModel(model)),
}


def inside(model):
    while type(model) not in (nn.Sequential, OwnModule):
        model = model._modules.get("_orig_mod") or model.module
    return model


class OwnModule(nn.Module):
    """Has a part that is really called module, beside one of the same name within it."""

    def __init__(self):
        super().__init__()
        self.conv, self.module = nn.Linear(2, 2), nn.Sequential()
        self.module.conv = nn.Linear(2, 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("make", [net, OwnModule])
@pytest.mark.parametrize("written", WRAPPERS)
def test_wrappers_are_passed_over_in_the_file_and_in_the_model(tmp_path, written, make, suffix):
    model, path = make(), tmp_path / f"net{suffix}"
    wrapped = WRAPPERS[written](copy.deepcopy(model))
    torch.save(wrapped.state_dict(), path) if suffix == ".pth" else save_weights(wrapped, path)
    for wrap in WRAPPERS.values():
        other = wrap(make())
        load_weights(other, path)
        assert equal(inside(other), model)


def test_the_counter_of_averaged_weights_is_kept(path):
    averaged, other = AveragedModel(net()), AveragedModel(net())
    averaged.update_parameters(net())
    save_weights(torch.compile(averaged), path)
    load_weights(other, path)
    assert equal(other, averaged) and other.n_averaged == 1


@pytest.mark.parametrize("compiled_on_disk", [True, False])
def test_a_wrapped_part_of_a_network(path, compiled_on_disk):
    def make(compiled):
        return nn.Sequential(torch.compile(net()) if compiled else net(), nn.Linear(3, 2))

    model, other = make(compiled_on_disk), make(not compiled_on_disk)
    save_weights(model, path)
    load_weights(other, path)
    assert equal(other, model)


def test_what_is_wrong_is_said_of_the_names_that_fit(path, trained):
    state = {f"module._orig_mod.{name}": value for name, value in trained.state_dict().items()}
    state["module._orig_mod.3.bias"] = torch.zeros(9)
    safetensors.torch.save_file(state, path)
    refused(net(), path, r"Sequential: 3.bias has shape \[9\], expected \[3\]$")


def test_not_strict_passes_wrappers_over_too(path, trained):
    state = {f"module.{name}": value for name, value in trained.state_dict().items()}
    safetensors.torch.save_file({**state, "module.head": torch.zeros(1)}, path)
    other = net()
    load_weights(other, path, strict=False)
    assert equal(other, trained)


def test_a_counter_that_no_averaging_wrote_is_unexpected(path, trained):
    safetensors.torch.save_file({**trained.state_dict(), "n_averaged": torch.tensor(1)}, path)
    refused(net(), path, "unexpected 'n_averaged'")


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema"]
)
def test_where_training_programs_keep_a_state_dict(tmp_path, trained, key):
    torch.save({key: trained.state_dict(), "epoch": 3, "lr": [0.1]}, tmp_path / "a.pth")
    other = net()
    load_weights(other, tmp_path / "a.pth")
    assert equal(other, trained)


def test_the_trained_weights_are_read_before_averaged_ones(tmp_path, trained):
    averaged = AveragedModel(net()).state_dict()
    torch.save({"model_ema": averaged, "model": trained.state_dict()}, tmp_path / "a.pth")
    other = net()
    load_weights(other, tmp_path / "a.pth")
    assert equal(other, trained)


def test_the_network_of_a_training_module(tmp_path, trained):
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    other = net()
    load_weights(other, tmp_path / "a.pth")
    assert equal(other, trained)
    torch.save({"state_dict": {**state, "loss.weight": torch.ones(1)}}, tmp_path / "a.pth")
    refused(net(), tmp_path / "a.pth", "unexpected 'model.0.weight'")


def test_another_key_is_named(tmp_path, trained):
    torch.save({"net": trained.state_dict()}, tmp_path / "a.pth")
    refused(net(), tmp_path / "a.pth", "'net': a OrderedDict; expected .* alone or under 'state_dict', .*'model'")


# ---- As torch's load_state_dict ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["none", "parallel"])
@pytest.mark.parametrize("versions", [True, False])
def test_normalisation_without_its_counter(tmp_path, trained, versions, wrap):
    state = trained.state_dict() if versions else dict(trained.state_dict())
    del state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pth")
    other = net()
    other[1].num_batches_tracked.fill_(3)
    load_weights(WRAPPERS[wrap](other), tmp_path / "a.pth")
    assert other[1].num_batches_tracked == 3
    other[1].num_batches_tracked.fill_(7)
    assert equal(other, trained)


def test_a_file_of_counters_alone_fits_no_name(path):
    safetensors.torch.save_file({"other": torch.ones(1)}, path)
    refused(net(), path, "none of its 1 tensors", strict=False)


class Frozen(nn.Module):
    """A normalisation without a counter, which drops that of a file."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def _load_from_state_dict(self, state, prefix, *rest):
        state.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_counter_that_the_network_drops(path):
    safetensors.torch.save_file(
        {"0.running_mean": torch.ones(4), "0.num_batches_tracked": torch.tensor(3)}, path
    )
    model = nn.Sequential(Frozen())
    load_weights(model, path)
    assert torch.equal(model[0].running_mean, torch.ones(4))
    refused(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False, affine=False)), path, "unexpected '0.num")


@pytest.mark.parametrize("wrap", ["none", "averaged"])
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_names_that_a_hook_of_torch_changes(tmp_path, wrap):
    """The older weight_norm's, in a network with the newer one."""
    old = nn.utils.weight_norm(nn.Linear(3, 2))
    torch.save(old.state_dict(), tmp_path / "a.pth")
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    wrapped = WRAPPERS[wrap](new)
    load_weights(wrapped, tmp_path / "a.pth")
    new = wrapped.module if wrap == "averaged" else wrapped
    torch.testing.assert_close(new.weight, old.weight_g * old.weight_v / old.weight_v.norm(dim=1, keepdim=True))


class Keeper(nn.Linear):
    """Keeps more than tensors, and counts what it loads."""

    def __init__(self):
        super().__init__(2, 2)
        self.kept, self.loads, self.sum = {"scale": 1}, [], None
        self.register_load_state_dict_post_hook(lambda module, keys: module.after())

    def get_extra_state(self):
        return self.kept

    def set_extra_state(self, state):
        self.loads.append(1)
        self.kept["scale"] = state["scale"]
        if state["scale"] < 0:
            self.bias = None
            raise RuntimeError("a negative\nscale")

    def after(self):
        self.sum = self.weight.sum().item()


def test_extra_state_and_hooks_are_the_modules(tmp_path):
    source, model = Keeper(), Keeper()
    source.kept = {"scale": 5}
    torch.save(source.state_dict(), tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert model.kept == {"scale": 5} and model.loads == [1]
    assert equal_weights(model, source) and model.sum == source.weight.sum().item()


def equal_weights(a, b):
    return torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_extra_state": {"scale": -1}}, "Keeper: RuntimeError: a negative scale"),
        ({"_extra_state": {}}, "Keeper: KeyError: 'scale'"),
        ({"other": torch.ones(1)}, "unexpected 'other'"),
        ({"weight": torch.ones(3)}, r"weight has shape \[3\], expected \[2, 2\]"),
    ],
)
def test_what_a_modules_own_code_did_is_undone(tmp_path, changes, words):
    torch.save({**Keeper().state_dict(), **changes}, tmp_path / "a.pth")
    model = Keeper()
    before = copy.deepcopy(model)
    bias = model.bias
    with pytest.raises(WeightsError, match=words):
        load_weights(model, tmp_path / "a.pth")
    assert equal_weights(model, before) and model.bias is bias
    assert (model.kept, model.sum) == (before.kept, None)


def test_an_interrupt_while_a_module_loads_is_undone(path):
    def interrupt(module, keys):
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), path)
    model[1].register_load_state_dict_post_hook(interrupt)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        load_weights(model, path)
    assert all(map(torch.equal, before, bits(model)))


def test_scripted_networks_and_numbers_of_one_element(tmp_path, trained):
    torch.save({**trained.state_dict(), "1.num_batches_tracked": torch.tensor([7])}, tmp_path / "a.pth")
    for other in (net(), torch.jit.script(net())):
        load_weights(other, tmp_path / "a.pth")
        assert equal(other, trained)


@pytest.mark.parametrize("inference", ["network", "caller", "both"])
def test_inference_mode(path, trained, inference):
    save_weights(trained, path)
    with torch.inference_mode(inference != "caller"):
        other = net()
    with torch.inference_mode(inference != "network"):
        load_weights(other, path)
    assert equal(other, trained)


# ---- Shared memory -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.b.weight = self.a.weight


@pytest.mark.parametrize("write", [safetensors.torch.save_model, save_weights])
@pytest.mark.parametrize("wrap", ["none", "parallel"])
def test_tied_weights_come_back_in_both_names(path, write, wrap):
    source, other = Tied(), Tied()
    write(WRAPPERS[wrap](source), path)
    load_weights(other, path)
    assert equal(other, source) and other.a.weight is other.b.weight


def test_tied_weights_of_a_pickle(tmp_path):
    source = Tied()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    for other in (Tied(), Tied(False)):
        load_weights(other, tmp_path / "a.pth")
        assert equal(other, source)


def test_a_tie_that_only_one_side_has(path):
    """A name left out might have been a transposed view, so what it held is not guessed."""
    source = Tied()
    safetensors.torch.save_model(source, path)
    refused(
        Tied(False), path, "missing 'b.weight'; 'b.weight' was left out where it shared the memory of 'a.weight'"
    )
    save_weights(source, path)
    other = Tied(False)
    load_weights(other, path)
    assert equal(other, source)
    save_weights(Tied(False), path)
    refused(Tied(), path, "elements of 'a.weight' and 'b.weight' share memory and were given different values")


class Views(nn.Module):
    """Parts of one buffer that overlap."""

    def __init__(self):
        super().__init__()
        self.register_buffer("whole", torch.randn(6))
        self.register_buffer("start", self.whole[:4])
        self.register_buffer("end", self.whole[2:])


@pytest.mark.parametrize("write", [safetensors.torch.save_model, save_weights])
def test_views_of_one_memory(path, write):
    source, other = Views(), Views()
    write(source, path)
    load_weights(other, path)
    assert equal(other, source)
    assert torch.equal(other.start[2:], other.end[:2]) and other.start.data_ptr() == other.whole.data_ptr()
    state = {name: value.clone().contiguous() for name, value in source.state_dict().items()}
    safetensors.torch.save_file({**state, "end": torch.zeros(4)}, path)
    refused(Views(), path, "elements of .*'start' and 'end' share memory and were given different values")


@pytest.mark.parametrize("left_out", [None, "0.weight", "1.weight"])
def test_a_weight_and_its_transpose(path, left_out):
    def make():
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = nn.Parameter(model[0].weight.detach().t())
        return model

    source, other = make(), make()
    state = {name: value.contiguous().clone() for name, value in source.state_dict().items() if name != left_out}
    safetensors.torch.save_file(state, path)
    load_weights(other, path)
    assert equal(other, source) and torch.equal(other[1].weight, other[0].weight.t())


# ---- Dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_rounded_to_the_networks(path, given, own):
    source, other = net().to(given), net().to(own)
    save_weights(source, path)
    load_weights(other, path)
    assert equal(other, source.to(own)) and other[0].weight.dtype is own


@pytest.mark.parametrize(
    ("own", "given", "words"),
    [
        (torch.zeros(2).half(), torch.tensor([1.0, 1e5]), "float32 and numbers that torch.float16 cannot hold"),
        (torch.zeros(2), torch.tensor([1.0, 1e300], dtype=torch.float64), "numbers that torch.float32 cannot hold"),
        (torch.zeros(2).to(torch.float8_e4m3fn), torch.tensor([1.0, 1e4]), "float8_e4m3fn cannot hold"),
        (torch.zeros(2).int(), torch.tensor([1, 2**40]), "numbers that torch.int32 cannot hold"),
        (torch.zeros(2).to(torch.uint8), torch.tensor([1, -1]), "numbers that torch.uint8 cannot hold"),
        (torch.zeros(2).to(torch.uint64), torch.tensor([1, -1]), "numbers that torch.uint64 cannot hold"),
        (torch.zeros(2), torch.tensor([1, 2]), "dtype torch.int64, expected torch.float32"),
        (torch.zeros(2), torch.ones(2).bool(), "dtype torch.bool, expected torch.float32"),
        (torch.zeros(2), torch.ones(2).cfloat(), "dtype torch.complex64, expected torch.float32"),
        (torch.zeros(2).cfloat(), torch.ones(2), "dtype torch.float32, expected torch.complex64"),
    ],
)
def test_dtypes_that_would_change_numbers_are_refused(path, own, given, words):
    model = nn.Module()
    model.register_buffer("a", own)
    safetensors.torch.save_file({"a": given}, path)
    refused(model, path, words)


@pytest.mark.parametrize(
    ("own", "given"),
    [
        (torch.zeros(2).half(), torch.tensor([1.0, torch.inf])),
        (torch.zeros(2).int(), torch.tensor([1, -(2**31)])),
        (torch.zeros(2).to(torch.uint64), torch.tensor([1, 2**62])),
        (torch.zeros(2, dtype=torch.complex128), torch.tensor([1j, 2 + 1j])),
    ],
)
def test_dtypes_that_hold_the_same_numbers(path, own, given):
    model = nn.Module()
    model.register_buffer("a", own)
    safetensors.torch.save_file({"a": given}, path)
    load_weights(model, path)
    assert torch.equal(model.a.to(given.dtype), given)


# ---- Kinds of tensors, each in a process of its own --------------------------------------------------------


def freed(size):
    def make(weight):
        weight.untyped_storage().resize_(size)
        return weight

    return make


def two(weight):
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(weight, weight.clone())


def fake(weight):
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(weight)


def dual(weight):
    torch.autograd.forward_ad.enter_dual_level()
    return torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))


class Plain(torch.Tensor):
    pass


def jagged(weight):
    return torch.nested.nested_tensor(list(weight), layout=torch.jagged)


# What the network has for a weight [3, 4], and what loading and saving do with it: "right", or words of the error.
KINDS = {
    "freed": (freed(0), "no memory holds", "no memory holds"),
    "half freed": (freed(8), "no memory holds", "no memory holds"),
    "zero": (lambda weight: torch._efficientzerotensor(weight.shape), "no memory holds", "no memory holds"),
    "functional": (torch._to_functional_tensor, "no memory holds", "no memory holds"),
    "wrapper": (two, "a TwoTensor, which has no memory", "a TwoTensor, which has no memory"),
    "fake": (fake, "a FakeTensor, which has no memory", "a FakeTensor, which has no memory"),
    "meta": (lambda weight: weight.to("meta"), "on the meta device", "on the meta device"),
    "sparse": (lambda weight: weight.to_sparse(), "a torch.sparse_coo tensor", "a torch.sparse_coo tensor"),
    "csr": (lambda weight: weight.to_sparse_csr(), "a torch.sparse_csr tensor", "a torch.sparse_csr tensor"),
    "mkldnn": (lambda weight: weight.to_mkldnn(), "a torch._mkldnn tensor", "a torch._mkldnn tensor"),
    "quantised": (
        lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "a quantised tensor",
        "a quantised tensor",
    ),
    "nested": (lambda weight: torch.nested.nested_tensor(list(weight)), "a nested tensor", "a nested tensor"),
    "jagged": (jagged, "a nested tensor", "a nested tensor"),
    "expanded": (lambda weight: weight[:1].expand(3, 4), "the same memory", "right"),
    "overlapping": (lambda weight: torch.zeros(12).as_strided((3, 4), (2, 1)), "share memory", "right"),
    "transposed": (lambda weight: weight.t().contiguous().t(), "right", "right"),
    "sliced": (lambda weight: torch.zeros(3, 9)[:, 2:6], "right", "right"),
    "subclass": (lambda weight: weight.as_subclass(Plain), "right", "right"),
    "negative bit": (lambda weight: torch.complex(weight, weight).conj().imag, "right", "right"),
    "conjugate bit": (lambda weight: torch.complex(weight, weight).conj(), "expected torch.complex64", "right"),
    "complex128": (lambda weight: weight.to(torch.complex128), "expected torch.complex128", "complex128, which"),
    "dual": (dual, "right", "right"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "right", "right"),
    "empty": (lambda weight: weight[:0], r"expected \[0, 4\]", "right"),
}


def use(path, kind, placed, work):
    source, model = nn.Linear(4, 3), nn.Linear(4, 3)
    save_weights(source, path)
    made = kind(model.weight.detach().clone())
    del model.weight
    if placed == "buffer":
        model.register_buffer("weight", made)
    else:
        model.weight = nn.Parameter(made, requires_grad=made.is_floating_point())
    bias = model.bias.clone()
    try:
        if work == "load":
            load_weights(model, path)
            right = torch.equal(model.weight.float(), source.weight.to(model.weight.dtype).float())
        else:
            save_weights(model, path)
            right = torch.equal(safetensors.torch.load_file(path)["weight"].view(model.weight.dtype), model.weight)
    except (WeightsError, DtypeError) as error:
        return str(error) if torch.equal(model.bias, bias) else "partly loaded"
    return "right" if right else "wrong"


@pytest.mark.parametrize("placed", ["buffer", "parameter"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_tensors_in_the_network(tmp_path, kind, placed):
    make, *expected = KINDS[kind]
    if placed == "parameter" and kind in ("jagged",):
        pytest.skip("torch makes no parameter of a jagged tensor")
    for work, words in zip(("load", "save"), expected, strict=True):
        case = functools.partial(use, tmp_path / "a.safetensors", make, placed, work)
        said = forked.outcome(tmp_path / "said", case)
        assert re.search(words, said) and (said == "right") == (words == "right"), said


@pytest.mark.parametrize("part", ["all", "one"])
def test_a_network_on_the_meta_device_is_refused(path, trained, part):
    save_weights(trained, path)
    model = net()
    (model if part == "all" else model[3]).to("meta")
    first = model[0].weight.clone()
    with pytest.raises(WeightsError, match="'3.weight'.*: on the meta device, which holds no values"):
        load_weights(model, path, strict=part == "all")
    assert part == "all" or torch.equal(model[0].weight, first)


def test_a_network_without_shapes_is_refused(path, trained):
    save_weights(trained, path)
    with pytest.raises(WeightsError, match="'0.weight', '0.bias': no shape yet; expected a network that has run"):
        load_weights(nn.Sequential(nn.LazyConv2d(4, 3)), path)


def test_what_the_format_has_no_place_for_is_not_saved(path):
    with pytest.raises(DtypeError, match="tensor '_extra_state': a dict; expected a tensor"):
        save_weights(Keeper(), path)
    assert not path.exists()


@pytest.mark.parametrize("use", [load_weights, save_weights])
def test_no_module(path, use):
    with pytest.raises(DtypeError, match="model: a dict; expected a torch.nn.Module"):
        use({"a": torch.ones(1)}, path)

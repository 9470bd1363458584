"""The benchmark of the networks that people use: which are chosen, what becomes of one that kills the process or takes
too long, what is found of one, and the tables. On networks made here; no library of models is needed.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zfcore
from torch import nn

BENCH = Path(__file__).resolve().parents[2] / "bench"

NETWORKS = '''
import os, time
import torch
from torch import nn
from zoo_networks import Network

class Deadly(nn.Module):
    """Runs by itself once, and kills the process when it is read, as C code does that is handed what is no tensor."""
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3), 0
    def forward(self, x):
        x = self.conv(x)
        self.calls += 1
        if self.calls > 1:
            os.abort()
        return x.mean((2, 3))

class Endless(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 4, 3), 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            time.sleep(600)
        return self.conv(x).mean((2, 3))

class Answers(nn.Module):
    """A map in a dict, as segmentation networks give it; its ReLU is a function that works in place."""
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
    def forward(self, x):
        return {"aux": None, "out": self.conv2(nn.functional.relu(self.conv1(x), inplace=True))}

def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
        nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )

def absent():
    import a_library_that_is_not_there

NETWORKS = tuple(
    Network("own", family, name, (3, 32, 32), make)
    for family, name, make in (
        ("small", "first", small), ("deadly", "deadly", Deadly), ("absent", "absent", absent),
        ("endless", "endless", Endless), ("dict", "dict", Answers), ("small", "last", small),
    )
)
'''


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def own_networks(tmp_path):
    file = tmp_path / "own_networks.py"
    file.write_text(NETWORKS)
    return file


def zoo(*arguments):
    done = subprocess.run(
        [sys.executable, str(BENCH / "zoo.py"), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records_of(file):
    return {record["name"]: record for record in map(json.loads, file.read_text().splitlines())}


# ---- the list


def test_every_network_has_a_name_of_its_own(bench):
    networks = bench("zoo_networks").NETWORKS
    assert len({network.key for network in networks}) == len(networks) > 380
    assert all(len(network.shape) == 3 for network in networks)


def test_tables_of_networks_give_families_and_sizes(bench):
    found = list(bench("zoo_networks").listed("a: one two@299\n    three\nb: one\n", 224))
    assert found == [("a", "one", 224), ("a", "two", 299), ("a", "three", 224), ("b", "one", 224)]


def test_words_choose_networks(bench):
    chosen = bench("zoo").chosen
    keys = ["timm/vgg/vgg11", "timm/resnet/resnet18", "torchvision/vgg/vgg11"]
    assert chosen(keys, None) == keys
    assert chosen(keys, ["vgg/vgg11"]) == [keys[0], keys[2]]
    assert chosen(keys, ["resnet18", "torchvision"]) == keys[1:]
    assert "torchvision/resnet/resnet18\n" in zoo("--list", "--only", "resnet18")


@pytest.mark.parametrize("library", ["torchvision", "timm", "pytorchcv", "segmentation_models_pytorch", "monai"])
def test_a_network_of_a_library(library, bench):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed, whose networks the benchmark names")
    prefix = {"segmentation_models_pytorch": "smp"}.get(library, library)
    networks = bench("zoo_networks").NETWORKS
    small = ("squeezenet1_1", "resnet18", "mobilenet_wd4", "Unet-resnet18", "Classifier")
    network = next(n for n in networks if n.library == prefix and n.name in small)
    found = {}
    bench("zoo_checks").examine(network, ("read",), lambda **facts: found.update(facts))
    assert found["status"] == "done" and found["layers"].keys() == {"mid", "late"}


# ---- a run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "own_networks.py").write_text(NETWORKS)
    out = folder / "out" / "run.jsonl"
    printed = zoo("--networks", folder / "own_networks.py", "--out", out, "--limit-s", 15)
    return printed, out


def test_a_network_that_kills_the_process_is_a_result(run):
    printed, out = run
    record = records_of(out)["deadly"]
    assert (record["status"], record["error"]) == ("killed", "SIGABRT")
    assert record["step"].endswith("_read") and record["parameters"] > 0  # what was known until then
    assert "own_networks.py" in " ".join(record["where"])
    assert "own/deadly/deadly: killed" in printed


def test_a_network_that_takes_too_long_is_a_result(run):
    record = records_of(run[1])["endless"]
    assert record["status"] == "too long" and record["step"].endswith("_read")


def test_a_library_that_is_not_installed_is_named(run):
    record = records_of(run[1])["absent"]
    assert record["status"] == "not installed" and "a_library_that_is_not_there" in record["error"]


def test_the_networks_after_it_are_looked_at(run):
    printed, out = run
    records = records_of(out)
    assert list(records) == ["first", "deadly", "absent", "endless", "dict", "last"]
    for name in ("first", "last"):
        found = records[name]
        assert found["status"] == "done" and found["whole"] is True
        assert (found["mid_path"], found["late_path"], found["occlusion_path"]) == ("engine",) * 3
        assert found["layers"] == {"mid": "3", "late": "5"}
    assert "| own | 5 | " in printed


def test_a_run_goes_on(run, own_networks):
    lines = run[1].read_text().splitlines(keepends=True)
    out = own_networks.parent / "cut.jsonl"
    out.write_text("".join(lines[:4]))
    printed = zoo("--networks", own_networks, "--out", out, "--resume", "--limit-s", 15)
    assert "own/dict/dict  " in printed and "own/small/first  " not in printed
    assert list(records_of(out)) == list(records_of(run[1]))
    assert "| own | 5 | " in printed  # of all of them


def test_the_table_of_an_earlier_run(run):
    assert zoo("--table", run[1]).strip() == run[0][run[0].index("## Paths") :].strip()


# ---- what is found of a network


def examined(bench, make, shape, *what):
    network = bench("zoo_networks").Network("own", "own", "own", shape, make)
    found = {}
    bench("zoo_checks").examine(network, what, lambda **facts: found.update(facts))
    return found


class Rectifiers(nn.Module):
    """Every way to rectify, none of them a module that a hook would see."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(8)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        ways = (
            F.relu, torch.relu_, F.relu6, lambda x: F.leaky_relu(x, 0.2), lambda x: F.leaky_relu_(x, 0.2),
            lambda x: F.relu6(x.view(x.shape), inplace=True), lambda x: x.clamp(min=0), F.hardtanh,
        )  # fmt: skip
        for conv, rectify in zip(self.convs, ways, strict=True):
            x = rectify(conv(x))
        x = F.local_response_norm(x, 3, alpha=1.0)
        return self.head(x.mean((2, 3)))


def test_exactness_of_every_way_to_rectify(bench):
    found = examined(bench, Rectifiers, (3, 24, 24), "exact")
    assert found["status"] == "done" and not [name for name in found if name.endswith("_failed")]
    for layer in ("mid", "late"):
        for rule in ("gradient", "deconvnet"):
            assert not found[f"{layer}_{rule}_dead"]
            assert found[f"{layer}_{rule}_error"] < 1e-5
    assert found["occlusion_error_of_largest"] < 1e-5
    assert found["plain_error"] > 0
    assert found["changed"] == [] and found["training"] is False


def test_the_oracle_knows_the_rules_apart(bench):
    checks = bench("zoo_checks")
    torch.manual_seed(0)
    model, images = Rectifiers().eval(), torch.randn(1, 3, 24, 24)
    places = [[0, 9, 9]]
    by_rule = [checks.oracle(model, images, "convs.7", places, rule)[0] for rule in checks.RULES]
    assert checks.furthest(*by_rule) > 0.1 * checks.largest_of(by_rule[0])
    zero = torch.zeros(3)
    assert checks.furthest(zero, torch.tensor([0.0, math.nan, 0.0])) == math.inf
    assert checks.furthest(torch.tensor([math.nan, -math.inf]), torch.tensor([math.nan, -math.inf])) == 0


def test_a_wrong_answer_is_seen(bench, monkeypatch):
    right = zfcore.deconv_project

    def wrong(*arguments, **options):
        found = right(*arguments, **options)
        found.pixels.mul_(1.01)
        return found

    monkeypatch.setattr(zfcore, "deconv_project", wrong)
    found = examined(bench, Rectifiers, (3, 24, 24), "exact")
    assert found["mid_gradient_error"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("output", "score"),
    [
        (torch.arange(6.0).view(2, 3), "logit"),
        (torch.arange(2.0).view(2, 1), [0, 1]),
        (torch.arange(16.0).view(2, 2, 2, 2), [1.5, 9.5]),
        ({"aux": None, "out": torch.arange(16.0).view(2, 2, 2, 2)}, [1.5, 9.5]),
        ((torch.arange(6).view(2, 3), [torch.arange(6.0).view(2, 3), None]), [0, 3]),
    ],
)
def test_scores(output, score, bench):
    found = bench("zoo_checks").score_of(output)
    assert found == score if isinstance(score, str) else found(output).tolist() == score


def test_speed_beside_captum(bench):
    pytest.importorskip("captum.attr", reason="Captum is the other side of this comparison")
    checks = bench("zoo_checks")

    def made():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(200, 4))

    found = examined(bench, made, (3, 24, 24), "speed")
    assert found["status"] == "done" and not [name for name in found if name.endswith("_failed")]
    for name in bench("zoo_tables").RATIOS:
        assert found[name] > 0
    assert found["captum_difference"] < 1e-4
    assert found["plain_batch"] in checks.PLAIN_BATCHES and found["positions"] == 16


# ---- the tables


def record(name, **facts):
    engine = {"mid_path": "engine", "late_path": "engine", "occlusion_path": "engine", "whole": True}
    common = {"key": f"a/{name}/{name}", "library": "a", "family": name, "name": name, "what": ["read"]}
    return {**common, "status": "done", **engine, **facts}


def test_paths_by_library(bench):
    refused = "'features.3' (Foo) calls aten::bar of 3 maps, which is not read"
    records = [
        record("one"),
        record("two", occlusion_path="forwards", occlusion_reason="the cost rule"),
        record(
            "three",
            library="b",
            late_path="dense",
            late_reason=refused,
            whole=False,
            occlusion_path="forwards",
            occlusion_reason=refused.replace("3", "4"),
        ),
        {
            **record("four", library="b", status="killed", step="mid_read", error="SIGSEGV"),
            **dict.fromkeys(("mid_path", "late_path", "occlusion_path", "whole")),
        },
        record("five", library="b", status="not made", step="make", error="no such network"),
    ]
    page = bench("zoo_tables").page(records)
    assert "| a | 2 | 2 (100 %) | 1 (50 %) | 2 (100 %) | 2 (100 %) | 0 (0 %) | 0 | 0 | 0 |" in page
    assert "| b | 2 | 0 (0 %) | 0 (0 %) | 1 (50 %) | 0 (0 %) | 1 (50 %) | 1 | 0 | 1 |" in page
    assert "| all | 4 | 2 (50 %) | 1 (25 %) | 3 (75 %) | 2 (50 %) | 1 (25 %) | 1 | 0 | 1 |" in page
    assert "| the cost rule | 1 | two |" in page
    assert page.count("| calls aten::bar of ... maps, which is not read | 1 | three |") == 2
    assert "- a/four/four: killed, at mid_read: SIGSEGV" in page


def test_errors_and_times(bench):
    what = ["exact", "speed"]
    records = [
        record("one", what=what, mid_gradient_error=1e-6, occlusion_to_captum=3.0, occlusion_to_plain=2.0),
        record(
            "two",
            what=what,
            mid_gradient_error=0.5,
            occlusion_error=1e-3,
            plain_error=1e-6,
            occlusion_exact_path="engine",
            occlusion_to_captum=0.5,
            occlusion_to_plain=0.25,
        ),
    ]
    page = bench("zoo_tables").page(records)
    assert "## Paths" not in page
    assert "| mid_gradient_error | 2 | 2.5e-01 | 5.0e-01 (two) | 1 |" in page
    assert "- a/two/two: mid_gradient_error 5.0e-01" in page
    assert any(line.startswith("- a/two/two: occlusion 1.0e-03 of the range (engine)") for line in page)
    rows = [line for line in page if line.startswith("| a/")]
    assert rows == ["| a/two/two | **0.50** | **0.25** |  |  |  |  |", "| a/one/one | 3.00 | 2.00 |  |  |  |  |"]
    assert "Slower than the other side: occlusion_to_captum 1 of 2, occlusion_to_plain 1 of 2" in page[-1]


def test_records_of_several_runs_are_put_together(bench, tmp_path):
    file = tmp_path / "run.jsonl"
    lines = [record("one"), record("one", what=["exact"], late_gradient_error=0.0)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = bench("zoo").load_records(file).values()
    assert found["what"] == ["read", "exact"] and found["mid_path"] == "engine" and found["late_gradient_error"] == 0

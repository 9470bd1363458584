"""The trainer learns, and an interrupted run continues bit for bit."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from bars import pictures
from torch import nn

from zfcore.errors import ArgumentError, DtypeError, ShapeError, WeightsError
from zfcore.models import MaxPool2d, save_weights, weights, zfnet_small
from zfcore.train import (
    Settings,
    augment,
    evaluate,
    learning_rate,
    normalise,
    pixel_statistics,
    renormalise_filters,
    train,
)

SETTINGS = Settings(epochs=4, batch_size=8, lr=0.05, filter_rms=0.1, shift=1, seed=3)


def net():
    torch.manual_seed(11)
    layers = (
        nn.Conv2d(1, 4, 5),
        nn.ReLU(),
        MaxPool2d(3, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Dropout(0.5),
    )
    return nn.Sequential(*layers, nn.Linear(100, 10))


@pytest.fixture(scope="module")
def data():
    return pictures(37, size=16)  # the last batch of an epoch has 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(data, settings=SETTINGS, **options):
    """Train a new network; returns whether it came to its end, the network and what each epoch saw."""
    model, seen = net(), []
    done = train(
        model, *data, settings, on_epoch=lambda number, epoch: seen.append((number, epoch)), **options
    )
    return done, model, seen


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.fixture(scope="module")
def unbroken(data):
    done, model, seen = run(data)
    assert done and [number for number, _ in seen] == [1, 2, 3, 4]
    return model, seen


def stop_after(steps):
    left = iter(range(steps - 1))
    return lambda: next(left, None) is None


def test_the_same_run_twice_gives_the_same_bits(data, unbroken):
    _, model, seen = run(data)
    assert same(model, unbroken[0]) and seen == unbroken[1]


def test_another_seed_gives_another_network(data, unbroken):
    assert not same(run(data, replace(SETTINGS, seed=4))[1], unbroken[0])


@pytest.mark.parametrize("steps", range(1, 20))  # of the 20 that the run has
def test_stopped_and_resumed_equals_unbroken(data, unbroken, tmp_path, steps):
    checkpoint = tmp_path / "run.safetensors"
    done, _, first = run(data, checkpoint=checkpoint, stop=stop_after(steps))
    assert not done and len(first) == steps // 5
    torch.manual_seed(steps)  # what the new process's generator holds must not matter
    done, model, second = run(data, checkpoint=checkpoint, resume=True)
    assert done
    assert same(model, unbroken[0])
    assert first + second == unbroken[1]


def test_a_run_stopped_many_times_equals_unbroken(data, unbroken, tmp_path):
    checkpoint, seen = tmp_path / "run.safetensors", []
    for _ in range(20):
        done, model, more = run(data, checkpoint=checkpoint, resume=True, stop=stop_after(1))
        seen += more
        if done:
            break
    assert done and same(model, unbroken[0]) and seen == unbroken[1]


def test_resuming_a_finished_run_changes_nothing(data, unbroken, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint)
    done, model, seen = run(data, checkpoint=checkpoint, resume=True)
    assert done and same(model, unbroken[0]) and seen == []


def test_a_failed_checkpoint_leaves_the_one_before(data, unbroken, tmp_path, monkeypatch):
    checkpoint, replace_file, calls = tmp_path / "run.safetensors", weights.os.replace, []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        replace_file(*arguments)

    monkeypatch.setattr(weights.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run(data, checkpoint=checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    _, model, seen = run(data, checkpoint=checkpoint, resume=True)
    assert same(model, unbroken[0]) and [number for number, _ in seen] == [3, 4]


@pytest.mark.parametrize(
    "change",
    [{"epochs": 5}, {"lr": 0.04}, {"seed": 0}, {"batch_size": 9}, {"flip": False}, {"filter_rms": math.inf}],
)
def test_a_checkpoint_of_other_settings_is_refused(data, tmp_path, change):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint, stop=stop_after(2))
    with pytest.raises(ArgumentError, match=next(iter(change))):
        run(data, replace(SETTINGS, **change), checkpoint=checkpoint, resume=True)


def test_a_checkpoint_of_other_data_or_another_network_is_refused(data, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint, stop=stop_after(2))
    images, labels = data
    with pytest.raises(ArgumentError, match="other pictures"):
        run((images.flip(0), labels), checkpoint=checkpoint, resume=True)
    with pytest.raises(ArgumentError, match="other pictures"):
        run((images, labels.flip(0)), checkpoint=checkpoint, resume=True)
    other = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    with pytest.raises(WeightsError, match="another network"):
        train(other, *data, SETTINGS, checkpoint=checkpoint, resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: "{",
        lambda run: "[" * 100_000,
        lambda run: "[]",
        lambda run: json.dumps({**run, "step": 10**30}),
        lambda run: json.dumps({**run, "step": -1}),
        lambda run: json.dumps({**run, "step": "3"}),
        lambda run: json.dumps(run).replace('"step": 2', '"step": ' + "9" * 5000),
        lambda run: json.dumps({**run, "seen": {"loss": math.nan, "accuracy": 0, "pictures": 1}}),
        lambda run: json.dumps({**run, "seen": {"loss": 1, "other": 0}}),
        lambda run: json.dumps({**run, "settings": 3}),
        lambda run: json.dumps({name: value for name, value in run.items() if name != "data_sha256"}),
    ],
)
def test_a_checkpoint_whose_run_is_damaged_is_refused(data, tmp_path, damage):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint, stop=stop_after(2))
    tensors, metadata = weights.read_tensors(checkpoint)
    weights.write_tensors(checkpoint, tensors, {**metadata, "run": damage(json.loads(metadata["run"]))})
    with pytest.raises(WeightsError, match="damaged|at most the run's"):
        run(data, checkpoint=checkpoint, resume=True)


def test_a_damaged_checkpoint_is_refused(data, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint, stop=stop_after(2))
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(WeightsError, match="damaged"):
        run(data, checkpoint=checkpoint, resume=True)
    save_weights(net(), checkpoint)
    with pytest.raises(WeightsError, match="no checkpoint"):
        run(data, checkpoint=checkpoint, resume=True)


def test_a_checkpoint_holds_tensors_only(data, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    run(data, checkpoint=checkpoint, stop=stop_after(2))
    parameters = {name for name, _ in net().named_parameters()}
    assert safetensors.torch.load_file(checkpoint).keys() == (
        {f"model.{name}" for name in net().state_dict()} | {f"momentum.{name}" for name in parameters}
    )


def test_torchs_generator_is_left_as_it_was(data):
    torch.manual_seed(5)
    model, before = net(), torch.get_rng_state()
    train(model, *data, replace(SETTINGS, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_zfnet_small_learns_a_small_set():
    torch.manual_seed(0)
    images, labels = pictures(160)
    test_images, test_labels = pictures(50, seed=1)
    model, seen = zfnet_small(), []
    settings = Settings(epochs=6, batch_size=16, lr=0.02, flip=False, shift=0)
    assert train(model, images, labels, settings, on_epoch=lambda _, epoch: seen.append(epoch.loss))
    assert not model.training
    assert seen[-1] < seen[0] / 3
    assert evaluate(model, test_images, test_labels, *pixel_statistics(images)) >= 0.9


IMAGES, LABELS = pictures(12, size=16)


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (IMAGES[:0], LABELS[:0], ShapeError, r"images of shape \[0, 1, 16, 16\]"),
        (IMAGES[0], LABELS[:1], ShapeError, r"images of shape \[1, 16, 16\]"),
        (IMAGES, LABELS[:5], ShapeError, r"labels of shape \[5\]: expected \[12\]"),
        (IMAGES, LABELS[:, None], ShapeError, r"labels of shape \[12, 1\]"),
        (IMAGES.float(), LABELS, DtypeError, "images torch.float32"),
        (IMAGES, LABELS.int(), DtypeError, "labels torch.int32"),
        (IMAGES, LABELS + 1, ArgumentError, "labels run from 1 to 10"),
        (IMAGES, LABELS - 1, ArgumentError, "labels run from -1 to 8"),
        (torch.full_like(IMAGES, 7), LABELS, ArgumentError, "of one colour"),
    ],
)
def test_bad_data_is_refused(images, labels, error, words):
    with pytest.raises(error, match=words):
        train(net(), images, labels, SETTINGS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"lr": math.nan}, {"lr": math.inf}, {"momentum": 1},
        {"momentum": -0.1}, {"weight_decay": -1}, {"warmup": 1.1}, {"filter_rms": 0},
        {"filter_rms": math.nan}, {"shift": -1}, {"seed": -1},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}=.*expected"):
        Settings(**wrong)


def test_a_loss_that_explodes_ends_the_run_by_name(data):
    with pytest.raises(ArgumentError, match=r"lr=1e\+30: the loss became (nan|inf) at step \d"):
        run(data, replace(SETTINGS, lr=1e30, filter_rms=math.inf))


def test_filters_are_renormalised_to_the_radius_and_no_other():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0].mul_(10)
        model[0].weight[1].mul_(0.01)
        model[0].weight[2].zero_()
        model[0].weight[3].copy_(torch.full((2, 3, 3), -0.1))
        model[1].weight.mul_(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    renormalise_filters(model, 0.1)
    rms = model[0].weight.square().mean((1, 2, 3)).sqrt()
    assert rms[0].item() == pytest.approx(0.1, rel=1e-6)
    torch.testing.assert_close(model[0].weight[0] * (before["0.weight"][0] / model[0].weight[0])[0, 0, 0],
                               before["0.weight"][0])  # fmt: skip
    assert torch.equal(model[0].weight[1:3], before["0.weight"][1:3])
    torch.testing.assert_close(model[0].weight[3], before["0.weight"][3])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_filters_stay_within_the_radius_in_training(data):
    _, model, _ = run(data, replace(SETTINGS, lr=0.5, filter_rms=0.05, epochs=1))
    assert model[0].weight.square().mean((1, 2, 3)).sqrt().max() <= 0.05 * (1 + 1e-6)


def test_the_rate_climbs_and_falls_to_zero():
    settings = Settings(lr=2.0, warmup=0.25)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(2 / 25) and rates[24] == rates[25] == 2.0
    assert rates[:25] == sorted(rates[:25]) and rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[62] == pytest.approx(1 + math.cos(math.pi * 37 / 75)) and rates[100] == pytest.approx(0)
    assert learning_rate(replace(settings, warmup=0), 0, 1) == 2.0
    assert learning_rate(replace(settings, warmup=1), 9, 10) == 2.0


def test_statistics_and_normalising():
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8)
    mean, std = pixel_statistics(images)
    pixels = images.double().div(255).transpose(0, 1).reshape(3, -1)
    assert mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), rel=1e-12)
    x = normalise(images, mean, std).transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(1, correction=0), torch.ones(3))


def test_augmenting_is_a_flip_and_a_shift_with_zeros():
    images = torch.randint(1, 256, (300, 2, 6, 5), dtype=torch.uint8)
    possible = torch.stack([
        torch.nn.functional.pad(turned, (2, 2, 2, 2))[:, :, y : y + 6, x : x + 5]
        for turned in (images, images.flip(-1)) for y in range(5) for x in range(5)
    ])  # fmt: skip
    which = (augment(images, True, 2) == possible).all((2, 3, 4))  # [50, 300]
    assert which.sum(0).eq(1).all()  # each picture is one of the fifty, both channels alike
    assert which.sum(1).gt(0).all()  # and all fifty occur
    assert torch.equal(augment(images, False, 0), images)


def test_evaluating_restores_the_mode():
    model = net()
    accuracy = evaluate(model, *pictures(21, size=16), (0.2,), (0.3,), batch_size=4)
    assert model.training and 0 <= accuracy <= 1

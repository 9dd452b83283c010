from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snntorch_lr as slr
from snntorch_lr.robustness import (
    Attack,
    Budget,
    Protocol,
    RobustnessReport,
    Target,
    evaluate,
    gradient_attack,
    share_of,
    verdict,
)
from snntorch_lr.robustness.evaluate import duration, fingerprint

from . import canaries
from .networks import counted

FAST = gradient_attack("fast", canaries.QUICK)
IMAGES = [canaries.digits(20)]


def run(net: nn.Module | None = None, **options: Any) -> RobustnessReport:
    """A small evaluation, without the gates' own attacks, which take most of the time and have tests of their own."""
    net = slr.add_noise(canaries.trained(), 0.3) if net is None else net
    said = {field.name: options.pop(field.name) for field in fields(Protocol) if field.name in options}
    settings: dict[str, Any] = {"epsilons": [0.1, 0.3], "attacks": [FAST], "progress": False} | options
    if isinstance(settings["attacks"], list):
        settings["attacks"] = [*settings["attacks"], canaries.TRANSFER]
    protocol = Protocol(**({"draws": 2, "votes": 4, "gates": False} | said))
    return evaluate(net, settings.pop("loader", IMAGES), settings.pop("epsilons"), protocol=protocol, **settings)


def figures(report: RobustnessReport) -> dict[str, Any]:
    """All but the time."""
    return report.to_json() | {"seconds": 0}


def test_worst_case_is_what_is_right_under_everything() -> None:
    report = run(attacks=["FGSM", FAST])
    for row in report.rows:
        for epsilon in report.epsilons:
            worst = row.worst(epsilon)
            assert torch.equal(worst, torch.stack([row.clean, *(r[epsilon] for r in row.right.values())]).all(0))
            assert not (worst & ~row.clean).any()
        for right in row.right.values():
            assert not (right[0.3] & ~right[0.1]).any()
    assert report.worst_case[0.3].accuracy < report.worst_case[0.1].accuracy < 1
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == report.to_json()


def test_what_an_attack_of_a_gate_breaks_is_broken_in_the_worst_case() -> None:
    nothing = Attack("nothing", lambda target, x, y, budget, seed: x.clone(), {}, "white-box")
    report = run(canaries.trained(), attacks=[nothing], epsilons=[0.01, 0.1, 0.3], gates=True)
    row, left = report.rows[0], [int(report.rows[0].worst(epsilon).sum()) for epsilon in report.epsilons]
    # Of the ladder's rungs, those within a budget.
    assert left[2] <= row.findings.ladder[0.25] * int(row.clean.sum()) < int(row.under(row.right, 0.3).sum())
    # What G4 broke at one budget is broken at larger ones.
    assert row.findings.epsilon == 0.01
    assert left[0] >= left[1] >= left[2]


def test_the_counterfactual_attack_is_left_out_where_there_is_no_such_gradient() -> None:
    attacks = [FAST, gradient_attack("counterfactual", replace(canaries.QUICK, surrogate="counterfactual"))]
    assert "counterfactual" in run(canaries.trained(), attacks=attacks, epsilons=0.1).rows[0].right
    ann = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert "counterfactual" not in run(ann, attacks=attacks, epsilons=0.1).rows[0].right


def test_noise_is_off_and_on_and_the_headline_is_the_network_in_evaluation_mode() -> None:
    report = run(epsilons=0.3)
    assert [row.subject.noise for row in report.rows] == ["off", "on"]
    assert report.headline.subject.noise == "off"
    assert report.rows[0].single.accuracy == report.rows[0].clean.double().mean()
    kept = canaries.trained()
    slr.add_noise(kept, 0.3)
    kept.hidden.noise.at_eval = True
    assert run(kept, epsilons=0.3).headline.subject.noise == "on"
    assert [row.subject.noise for row in run(canaries.trained(), epsilons=0.3).rows] == ["none"]


@pytest.mark.parametrize("noise", ["off", "on"])
def test_noise_may_be_evaluated_one_way_only(noise: str) -> None:
    both, one = run(epsilons=0.1), run(epsilons=0.1, noise=noise)
    assert [row.subject.noise for row in one.rows] == [noise]
    index = ["off", "on"].index(noise)
    assert torch.equal(one.rows[0].clean, both.rows[index].clean)
    assert torch.equal(one.rows[0].right["fast"][0.1], both.rows[index].right["fast"][0.1])
    assert [row.subject.noise for row in run(canaries.trained(), epsilons=0.1, noise=noise).rows] == ["none"]


def test_sources_give_their_images_and_are_not_attacked() -> None:
    other = canaries.trained()
    beside, given = (run(epsilons=0.3, **{said: {"other": other}}) for said in ("baselines", "sources"))
    assert [row.subject.network for row in given.rows] == ["network", "network"]
    name = "transfer from other"
    for row, same in zip(given.rows, beside.rows, strict=False):
        assert torch.equal(row.right[name][0.3], same.right[name][0.3])


def reseeding(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
    torch.manual_seed(0)
    target.net.train()
    target.view(noise=False)(x.requires_grad_()).sum().backward()
    return budget.random(x.detach(), torch.Generator().manual_seed(seed))


RESEEDING = Attack("reseeding", reseeding, {}, "black-box")


def test_a_seed_decides_everything_and_nothing_is_touched() -> None:
    net = slr.add_noise(canaries.trained(), 0.3).train()
    net.hidden.mem = torch.full((3, 32), 0.7)
    net.first.weight.grad = torch.ones_like(net.first.weight)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = run(net, epsilons=0.3, attacks=[RESEEDING, FAST])
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert net.hidden.training
    assert torch.equal(net.hidden.mem, torch.full((3, 32), 0.7))
    assert torch.equal(net.first.weight.grad, torch.ones_like(net.first.weight))
    assert net.readout.weight.grad is None
    torch.manual_seed(6)
    again = run(net, epsilons=0.3, attacks=[RESEEDING, FAST])
    assert figures(again) == figures(first)
    assert run(net, epsilons=0.3, attacks=[RESEEDING, FAST], seed=1).to_json()["rows"] != first.to_json()["rows"]


def counting(calls: list[float], name: str = "counting", **settings: Any) -> Attack:
    def attack(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        calls.append(budget.epsilon)
        return FAST.run(target, x, y, budget, seed)

    return Attack(name, attack, settings, "white-box")


def test_an_interrupted_evaluation_goes_on_with_the_attacks_that_are_left(tmp_path: Path) -> None:
    calls: list[float] = []
    attacks = [counting(calls), counting(calls, "second")]

    def interrupt(what: str, done: int, total: int) -> None:
        if "second 0.3" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(attacks=attacks, cache=tmp_path, progress=interrupt)
    assert calls == [0.1, 0.1, 0.3]
    resumed = run(attacks=attacks, cache=tmp_path)
    assert calls == [0.1, 0.1, 0.3, 0.3, *[0.1, 0.1, 0.3, 0.3]]
    calls.clear()
    assert figures(run(attacks=attacks, cache=str(tmp_path))) == figures(resumed) == figures(run(attacks=attacks))
    assert len(calls) == 8
    calls.clear()
    run(attacks=attacks, cache=tmp_path)
    assert not calls
    # Files that are damaged are made again.
    cut, empty = sorted(tmp_path.glob("*second*"))[:2]
    cut.write_bytes(cut.read_bytes()[:99])
    empty.write_bytes(b"")
    assert figures(run(attacks=attacks, cache=tmp_path)) == figures(resumed)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change", ["weights", "surrogate", "noise level", "image", "label", "seed", "settings", "draws", "smaller epsilon"]
)
def test_nothing_stale_is_read_from_the_cache(change: str, tmp_path: Path) -> None:
    calls: list[float] = []
    net = slr.add_noise(canaries.trained(), 0.3)
    (images, labels), options = canaries.digits(20), {}
    noise = "on" if change == "noise level" else "off"
    run(net, attacks=[counting(calls)], noise=noise, cache=tmp_path, loader=[(images, labels)])
    calls.clear()
    if change == "weights":
        net.readout.bias.data[0] += 1e-3
    elif change == "surrogate":
        net = slr.add_noise(canaries.with_steep_surrogate(), 0.3)
    elif change == "noise level":
        net.hidden.noise.log_sigma.data += 0.1
    elif change == "image":
        images = images.clone()
        images[3, 0, 0, 0] = 1
    elif change == "label":
        labels = (labels + (torch.arange(20) == 3)) % 10
    else:
        options = {"seed": {"seed": 1}, "draws": {"draws": 3}, "smaller epsilon": {"epsilons": [0.05, 0.3]}}.get(
            change, {}
        )
    attack = counting(calls, steps=3) if change == "settings" else counting(calls)
    run(net, attacks=[attack], noise=noise, cache=tmp_path, loader=[(images, labels)], **options)
    assert 0.3 in calls


def test_attacks_average_over_the_draws_of_a_network_that_draws_its_own() -> None:
    def forward(net: Any, images: Tensor) -> Tensor:
        return net(torch.bernoulli(images) + images - images.detach())

    seen: list[int] = []

    def attack(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        seen.append(target.view().draws)
        return x

    own = Attack("own", attack, {}, "white-box")
    run(canaries.trained(), forward=forward, attacks=[own], draws=3)
    run(canaries.trained(), attacks=[own], draws=3)
    assert seen == [3, 3, 1, 1]


def test_an_attack_that_cheats_or_breaks_is_named_and_does_not_count() -> None:
    def cheat(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        return 1 - x

    def crash(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        raise RuntimeError("out of luck")

    cheating, crashing = Attack("cheat", cheat, {}, "white-box"), Attack("crash", crash, {}, "white-box")
    report = run(canaries.trained(), attacks=[cheating, crashing, FAST])
    assert [attack.name for attack in report.rows[0].attacks] == ["fast"]
    failed = report.gates[9]
    assert failed.passed is False
    assert re.fullmatch("cheat: cheat left its budget.*; crash: out of luck", failed.detail)
    assert verdict(report.gates) == "MASKING SUSPECTED (G9 failed)"
    (row,), (alone,) = report.to_json()["rows"], run(canaries.trained()).to_json()["rows"]
    assert row | {"gates": [], "verdict": ""} == alone | {"gates": [], "verdict": ""}


def test_what_an_attack_broke_before_it_failed_counts() -> None:
    def breaks_late(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        if budget.epsilon > 0.2:
            raise IndexError("out of range")
        return FAST.run(target, x, y, budget, seed)

    late = Attack("late", breaks_late, {}, "white-box", in_turn=True)
    nothing = Attack("nothing", lambda target, x, y, budget, seed: x.clone(), {}, "white-box", in_turn=True)
    row = run(canaries.trained(), attacks=[late, nothing]).rows[0]
    assert row.failures == {"late": "out of range"}
    assert torch.equal(row.worst(0.3), row.worst(0.1))
    assert row.worst(0.1).sum() < row.clean.sum()


def test_attacks_in_turn_run_on_what_those_before_them_left() -> None:
    sizes: list[tuple[str, float, int]] = []

    def noted(name: str, in_turn: bool = True) -> Attack:
        def attack(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
            sizes.append((name, budget.epsilon, len(x)))
            return FAST.run(target, x, y, budget, seed)

        return Attack(name, attack, {}, "white-box", in_turn=in_turn)

    report = run(canaries.trained(), attacks=[noted("first"), noted("alone", False), noted("second")])
    row, count = report.rows[0], {(name, epsilon): size for name, epsilon, size in sizes}
    clean = int(row.clean.sum())
    left = {e: int(row.under(["first"], e).sum()) for e in report.epsilons}
    assert count["first", 0.1] == count["alone", 0.1] == clean
    assert count["second", 0.1] == left[0.1] < clean
    assert count["first", 0.3] == int(row.under(["first", "second"], 0.1).sum())
    shares = row.shares(0.3)
    assert shares["second"] == share_of(row.under(["first", "second"], 0.3))
    assert shares["alone"].accuracy == row.right["alone"][0.3].double().mean()
    assert "→ second" in str(report)


def test_an_evaluation_stops_at_its_limit_and_makes_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def takes_long(target: Target, x: Tensor, y: Tensor, budget: Budget, seed: int) -> Tensor:
        clock[0] += 20
        target.view()(x)
        return x

    slow = Attack("slow", takes_long, {}, "white-box")
    report = run(canaries.trained(), attacks=[FAST, slow], gates=True, limit=10)
    row, whole = report.rows[0], run(canaries.trained(), attacks=[FAST], gates=True)
    assert row.left_out == ("slow at 0.1", "fast at 0.3", "slow at 0.3")
    assert [attack.name for attack in row.attacks] == ["fast"]
    assert torch.equal(row.right["fast"][0.1], whole.rows[0].right["fast"][0.1])
    assert torch.equal(row.worst(0.3), row.worst(0.1))
    assert {gate.passed for gate in report.gates} == {None}
    for text in str(report), report.to_markdown(), json.dumps(report.to_json()):
        assert "no time for: network: slow at 0.1, fast at 0.3" in text or '"slow at 0.1", "fast at 0.3"' in text
    assert "masking not ruled out" in report.sentence()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_what_it_will_take_and_the_time_left(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(canaries.trained(), progress=True)
    said = capsys.readouterr().err
    assert re.match(r"(\r\S*)?evaluate: 0 %: 20 images and 1 networks take at most \d+ s\n", said)
    assert said.endswith("evaluate: 100 %: done\n")
    assert ("fast 0.1" in said) == terminal
    shares: list[float] = []
    run(canaries.trained(), progress=lambda what, done, total: shares.append(done))
    assert shares == sorted(shares)
    assert shares[0] == 0 < shares[2] < shares[-1] == 100
    assert [duration(seconds) for seconds in (0.2, 80, 100, 9000)] == ["1 s", "80 s", "2 min", "2 h"]


def test_without_the_attacks_of_the_gates_there_is_no_claim() -> None:
    report = run(epsilons=0.1)
    not_run = [gate.name.split()[0] for gate in report.gates if gate.passed is None]
    assert not_run == [f"G{index}" for index in (*range(9), 10)]
    assert verdict(report.gates) == f"masking not ruled out ({', '.join(not_run)} not run)"
    for text in str(report), report.to_markdown():
        assert "(gates=False): no claim of robustness is possible." in text
    assert report.plot_epsilon().axes


class Thresholded(nn.Module):
    """Right only where its neuron fires, which it hardly does without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = slr.Leaky(beta=0.0, threshold=1.05, init_hidden=True, noise=slr.EscapeNoise(0.3))

    def forward(self, x: Tensor) -> Tensor:
        fired = torch.stack([self.lif(x.flatten(1)) for _ in range(20)]).mean(0)
        return torch.cat([fired, torch.full_like(fired, 0.1)], 1)


@pytest.mark.parametrize("at_eval", [False, True])
def test_a_network_that_is_another_one_without_its_noise_is_warned_of(
    at_eval: bool, recwarn: pytest.WarningsRecorder
) -> None:
    net, loader = Thresholded(), [(torch.ones(20, 1, 1, 1), torch.zeros(20, dtype=torch.long))]
    net.lif.noise.at_eval = at_eval
    run(net, loader=loader, epsilons=0.1, baselines={"other": nn.Sequential(nn.Flatten(), nn.Linear(1, 2))})
    said = [str(warning.message) for warning in recwarn if "another one" in str(warning.message)]
    if at_eval:
        # Nobody tests it without.
        assert not said
    else:
        (message,) = said
        assert message.startswith("network: accuracy is 0.0 % without the noise, as after net.eval(), and 100.0 %")
    run(loader=IMAGES, epsilons=0.1)
    assert len([warning for warning in recwarn if "another one" in str(warning.message)]) == len(said)


def test_every_network_is_a_source_for_the_others() -> None:
    def record(net: Any, images: Tensor) -> Tensor:
        return net(images).expand(3, -1, -1)

    other = canaries.with_steep_surrogate()
    report = run(attacks=(FAST,), baselines={"other": Target(other, record, draws=2)})
    assert {row.subject.label: [attack.name for attack in row.attacks] for row in report.rows} == {
        "network, noise off": ["fast", "transfer from other"],
        "network, noise on": ["fast", "transfer from other"],
        "other": ["fast", "transfer from network, noise off"],
    }
    assert [(pair.first, pair.second) for pair in report.comparisons] == [
        ("network, noise off", "other"), ("network, noise on", "other"),
    ]  # fmt: skip
    # The same weights through another surrogate: what breaks one breaks the other.
    assert report.rows[2].right["transfer from network, noise off"][0.3].sum() < report.rows[2].clean.sum()


SHAPES = {"frames": (3, 2, 4, 4), "sound": (6, 5), "features": (7,)}


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_inputs_of_any_shape_and_a_single_logit_are_attacked_by_every_attack(kind: str, classes: int) -> None:
    shape = SHAPES[kind]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))
    inputs = torch.rand(8, *shape)
    with torch.no_grad():
        labels = net(inputs).argmax(1) if classes > 1 else (net(inputs)[:, 0] > 0).long()
    attacks = ("paper", "standard", "APGD-CE")
    report = run(net, loader=[(inputs, labels)], attacks=attacks, epsilons=[0.02, 0.5])
    row = report.rows[0]
    assert not row.failures
    assert {"FGSM", "PGD", "APGD-CE", "Square"} <= row.right.keys()
    assert row.clean.all()
    assert not row.worst(0.5).any()


def test_attacks_of_another_norm_are_left_out() -> None:
    report = run(canaries.trained(), attacks=["SA-PGD", FAST], norm="l2", epsilons=[1.0])
    assert [attack.name for attack in report.rows[0].attacks] == ["fast"]
    assert report.worst_case[1.0].accuracy < 1


def test_memory_is_bounded() -> None:
    sizes: list[int] = []
    run(epsilons=0.1, forward=counted(sizes), rows=10)
    assert max(sizes) == 10


def test_what_does_not_matter_changes_nothing() -> None:
    masked, plain = canaries.trained(), figures(run(canaries.trained(), epsilons=[0.1]))
    masked.register_buffer("mask", torch.tensor(-torch.inf))
    assert figures(run(masked, epsilons=0.1)) == plain
    for precision in torch.double, torch.half:
        loader = [(images.to(precision), labels) for images, labels in IMAGES]
        assert figures(run(canaries.trained(), epsilons=[0.1], loader=loader)) == plain


def test_a_network_in_bfloat16_is_evaluated() -> None:
    report = run(slr.add_noise(canaries.trained(), 0.3).bfloat16(), epsilons=0.3, noise="off")
    assert report.worst_case[0.3].accuracy < report.rows[0].clean.double().mean()


def refused(message: str, **options: Any) -> None:
    """What is no answer of a network must not count as a wrong one."""
    calls: list[float] = []
    with pytest.raises(ValueError, match=message):
        run(**({"attacks": [counting(calls)]} | options))
    assert not calls


@pytest.mark.parametrize("change", [10, -10])
def test_labels_that_are_no_class_are_refused(change: int) -> None:
    images, labels = canaries.digits(20)
    said = f"labels must be from 0 to 9, for the 10 logits of an image, got {labels[0] + change}"
    refused(f"network: {said}", loader=[(images, labels + change)])
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    refused("other: labels must be from 0 to 2", sources={"other": three})
    refused("labels must be from 0 to 9.*, got 10; count labels from 0", loader=[(images, labels + 1)])


def test_what_is_no_logits_is_refused() -> None:
    refused("network: forward returned NaN or infinite logits for 20 of 20", forward=lambda net, x: net(x) / 0)
    refused(r"network: forward returned a tuple .* net\(images\)\[0\]", forward=lambda net, x: (net(x), x))


@pytest.mark.parametrize("name", ["first.weight", "hidden.noise.log_sigma", "hidden.beta", "readout.bias"])
def test_networks_that_hold_nan_are_refused(name: str) -> None:
    # A membrane potential that is NaN never spikes: logits behind it are finite.
    net = slr.add_noise(canaries.trained(), 0.3)
    dict([*net.named_parameters(), *net.named_buffers()])[name].data.fill_(float("nan"))
    refused(f"network: NaN or infinite values in {name}; ", net=net)
    refused(f"other: NaN or infinite values in {name}; ", net=canaries.trained(), baselines={"other": net})


def images_of(value: float) -> Iterable[tuple[Tensor, Tensor]]:
    return [(torch.full((2, 1, 8, 8), value), torch.zeros(2, dtype=torch.long))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": []}, "epsilons must be positive"),
        ({"epsilons": [0.1, -1]}, "epsilons must be positive"),
        ({"attacks": "mild"}, "quick, paper, standard"),
        ({"norm": "l3"}, "linf, l2"),
        ({"attacks": ("SA-PGD",), "norm": "l2"}, "none of the attacks SA-PGD has the norm l2"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"votes": 0}, "votes must be at least 1"),
        ({"gate_images": 0}, "gate_images must be at least 1"),
        ({"noise": "loud"}, "noise must be"),
        ({"baselines": {"network": nn.Flatten()}}, "rename"),
        ({"sources": {"network": nn.Flatten()}}, "rename"),
        ({"baselines": {"b": "net.pt"}}, "b must be a network or a Target, got str"),
        ({"loader": []}, "no images"),
        ({"loader": images_of(2.0)}, r"\[0, 1\], got 2 to 2"),
        ({"loader": images_of(float("nan"))}, r"\[0, 1\]"),
        ({"loader": [(torch.zeros(2, 64), torch.zeros(2))]}, "integer labels"),
        ({"loader": [(torch.zeros(2), torch.zeros(2).long())]}, r"images \[n, ...\] and integer labels"),
        ({"loader": [(torch.full((2, 3, 2, 4, 4), 3.0), torch.zeros(2).long())]}, "divide counts of events"),
    ],
)
def test_wrong_arguments_are_said_before_any_attack(options: dict[str, Any], message: str) -> None:
    calls: list[float] = []
    with pytest.raises(ValueError, match=message):
        run(**({"attacks": [counting(calls)]} | options))
    assert not calls


def test_fingerprints_tell_apart_what_differs() -> None:
    x = torch.arange(4.0)
    parts: list[tuple[Any, ...]] = [
        (x,), (x.double(),), (x.bfloat16(),), (x.view(2, 2),), (x, 1), (x, "1"), (x.flip(0),), ({"a": 1},), ({"a": 2},),
        ("a", "b"), ("ab",),
    ]  # fmt: skip
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(x.clone(), {"a": 1, "b": 2}) == fingerprint(x, {"b": 2, "a": 1})

"""Ablations: a variant changes what its name says, and nothing else."""

import sys
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from conftest import ROOT, SHARED
from torch import nn

from seg import engine

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation

CHANGES = {
    "as it is": set(),
    "without ImageNet": {"backbone"},
    "without fine-tuning": {"rates", "batch norm"},
    "one learning rate": {"rates"},
    "constant batch norm": {"batch norm"},
    "without average": {"decay"},
    "without colours": {"colour"},
    "without crops": {"scale"},
    "without weights": {"weight"},
    "ENet's weights": {"weight"},
    "square input": {"size"},
}


@pytest.mark.parametrize("study", ablation.STUDIES)
def test_what_a_variant_replaces_exists(study):
    for replacements in ablation.STUDIES[study][1].values():
        with ExitStack() as stack:
            for target, replacement in replacements.items():
                stack.enter_context(mock.patch(target, replacement))


def arguments_of_fit(study, variant, data, out):
    """What the script of a study, changed as in a variant, hands over to engine.fit."""
    script, variants = ablation.STUDIES[study]
    command = [f"{script.__name__}.py", "--data", str(data), "--device", "cpu", "--limit", "2", "--out", str(out)]
    with ExitStack() as stack:
        fit = stack.enter_context(mock.patch.object(engine, "fit"))
        for target, replacement in ({"sys.argv": command} | variants[variant]).items():
            stack.enter_context(mock.patch(target, replacement))
        script.main()
    return fit.call_args


@pytest.mark.parametrize("name", ablation.STUDIES["augmentation"][1])
def test_a_variant_of_the_augmentation_changes_what_its_name_says(tiny, tmp_path, name):
    (args, _, train, *_), options = arguments_of_fit("augmentation", name, tiny, tmp_path)
    for _ in range(args.epochs):
        rates = [group["lr"] for group in options["optimizer"].param_groups]
        options["optimizer"].step()
        options["scheduler"].step()
    num_augmented = 0 if name == "copies" else 2
    assert (train.repeats, train.unchanged) == (3, 3 - num_augmented)
    if name == "constant learning rate":
        assert rates == [5e-4, 1e-2]
    else:
        assert all(rate < 1e-4 for rate in rates)


@pytest.mark.parametrize("name", ablation.STUDIES["recipe"][1])
def test_a_variant_of_the_recipe_changes_what_its_name_says(tiny, tmp_path, monkeypatch, name):
    if not (SHARED / "torch" / "hub" / "checkpoints").is_dir():
        pytest.skip("needs the ImageNet weights")
    monkeypatch.setenv("TORCH_HOME", str(SHARED / "torch"))

    def run(variant):
        """What train_6.py hands over to the engine: numbers of each part."""
        (_, model, train, *_), options = arguments_of_fit("recipe", variant, tiny, tmp_path)
        backbone = dict(model.network.backbone.named_parameters())
        return {
            "backbone": backbone["0.0.weight"].sum().item(),
            "batch norm": {type(layer) for layer in model.network.backbone.modules() if "Norm" in type(layer).__name__},
            "rates": [group["lr"] for group in options["optimizer"].param_groups],
            "decay": model.arguments["decay"],
            "colour": train.augment.colour,
            "scale": train.augment.scale,
            "flip": train.augment.flip,
            "weight": options["criterion"].weight.tolist(),
            "size": train.size,
        }

    before, after = run("as it is"), run(name)
    assert {part for part in before if before[part] != after[part]} == CHANGES[name]
    assert before["batch norm"] == {nn.BatchNorm2d}
    if name == "without weights":
        assert set(after["weight"]) == {1.0}
    if name == "ENet's weights":
        torch.testing.assert_close(torch.tensor(after["weight"]), torch.tensor(before["weight"]).square())
    if name == "without fine-tuning":
        assert after["rates"] == [0.0, before["rates"][1]]
    if name == "square input":
        areas = [width * height for height, width in (before["size"], after["size"])]
        assert areas[1] == pytest.approx(areas[0], rel=0.03)  # as far as 32 divides the side

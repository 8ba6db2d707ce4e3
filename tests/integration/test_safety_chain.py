"""The chain of safety alignment on a tiny model: red-team, aim, DPO, two reward models, PPO, red-team again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import finetune, metrics, write_recipe

MADE = {
    "sft": "adapter",
    "before": "redteam.json",
    "aimed": "aim.json",
    "dpo": "adapter",
    "helpful": "adapter",
}


def write_chain(folder: Path, base: Path) -> Path:
    """The recipes of a chain below ``folder/chain``, a few steps each."""
    chain = folder / "chain"
    write_recipe(folder, base, train={"max_steps": 2})
    sft: dict[str, Any] = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))

    def model(adapter: str) -> dict[str, Any]:
        return {"base": str(base), "adapter": str(chain / adapter / "adapter")}

    def preferences(file: str) -> dict[str, Any]:
        data = {"train": str(chain / "aimed" / file), "max_length": 96, "families": ["written"]}
        train = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "log_every": 1}
        return {"data": data, "train": train, "model": model("sft"), "report": {"samples": 0}}

    asking = {"limit": 12, "max_new_tokens": 8, "batch_size": 32}
    recipes: dict[str, dict[str, Any]] = {
        "sft": sft,
        "before": {"stage": "redteam", "model": model("sft"), "redteam": asking},
        "aimed": {
            "stage": "aim",
            "model": {"base": str(base)},
            "aim": {
                "redteam": str(chain / "before"),
                "dpo_prompts": 8,
                "reward_prompts": 8,
                "ppo_prompts": 8,
                "ordinary": [str(folder / "train.jsonl")],
            },
        },
        "dpo": {"stage": "dpo", **preferences("dpo.jsonl")},
        "helpful": {"stage": "reward", **preferences("helpful.jsonl")},
        "harmless": {"stage": "reward", **preferences("harmless.jsonl")},
        "ppo": {
            "stage": "ppo",
            "model": model("dpo"),
            "data": {
                "train": [str(chain / "aimed" / "attacks.jsonl"), str(folder / "train.jsonl")],
                "max_length": 96,
            },
            "ppo": {
                "reward": [
                    {"name": name, "path": str(chain / name / "adapter")} for name in ("helpful", "harmless")
                ],
                "prompt_shares": [0.5, 0.5],
                "iterations": 4,
                "batch_size": 4,
                "minibatch_size": 4,
                "critic_warmup": 1,
                "max_new_tokens": 6,
            },
            "join": {"method": "lagrangian", "multiplier_rate": 0.5},
            "train": {"batch_size": 4, "learning_rate": 1e-2, "save_every": 2},
            "report": {"samples": 2},
        },
        "after": {
            "stage": "redteam",
            "model": model("ppo"),
            "redteam": {**asking, "compare": str(chain / "before")},
        },
    }
    for name, recipe in recipes.items():
        text = yaml.safe_dump({**recipe, "name": name, "output_dir": str(chain / name)}, allow_unicode=True)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    path = folder / "pipeline.yaml"
    path.write_text(f"pipeline: [{', '.join(f'{name}.yaml' for name in recipes)}]\n", encoding="utf-8")
    return path


def write_found(folder: Path, answer: str) -> None:
    """A red-team result that no step has made: three prompts, all answered alike."""
    from rlhf.safety.attacks import evaluation_prompts
    from rlhf.safety.judges import load_judge
    from rlhf.safety.redteam import FORMAT_VERSION, assess, write_result

    made = assess(evaluation_prompts()[:3], [answer] * 3, judge=load_judge("rules"))
    about = {
        "format_version": FORMAT_VERSION,
        "model": "tiny",
        "adapter": None,
        "judge": "rules",
        "max_new_tokens": 4,
    }
    write_result(folder, about | made)


def test_the_chain_runs_is_skipped_and_goes_on(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline, chain = write_chain(tmp_path, tiny_bases["rope"]), tmp_path / "chain"
    output = finetune("run", pipeline)
    assert "aimed at" in output
    assert "became safe" in output
    for name, file in MADE.items():
        assert (chain / name / file).exists()

    rows = metrics(chain / "ppo")
    assert rows[0]["multiplier"] == rows[1]["multiplier"] == 1.0  # the critic warms up in the first
    assert len({row["multiplier"] for row in rows}) == 3, "the price of harm is learned"
    assert {"reward/helpful", "reward/harmless", "cost"} <= rows[0].keys()
    assert "multiplier" in (chain / "ppo" / "report.html").read_text(encoding="utf-8")

    page = (chain / "report.html").read_text(encoding="utf-8")
    assert "8 of 8 steps" in page
    assert page.count('class="heat"') == 3, "before; and before and after"
    assert "before (95 % interval)" in page
    assert "Over-refusal" in page
    for link in ("before/redteam.html", "after/redteam.html", "after/compare.html", "ppo/report.html"):
        assert f'href="{link}"' in page
    assert "Asked were 12 of 314 prompts" in page

    assert finetune("run", pipeline).count("done already") == 8

    # Other red-teaming: what was made of it is made again, in place.
    shutil.rmtree(chain / "before")
    recipe = tmp_path / "before.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("limit: 12", "limit: 10"), encoding="utf-8")
    again = finetune("run", pipeline)
    assert again.count("done already") == 1
    assert again.count("again, since a step before it has changed") == 6


def test_red_teaming_is_a_step_like_others(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    base, run = tiny_bases["rope"], tmp_path / "run"
    recipe = tmp_path / "redteam.yaml"
    settings: dict[str, Any] = {
        "stage": "redteam",
        "model": {"base": str(base)},
        "redteam": {"limit": 6, "max_new_tokens": 4},
        "output_dir": str(run),
    }
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "6 of 314 attack prompts" in finetune("check", recipe)
    finetune("run", recipe)
    result = json.loads((run / "redteam.json").read_text(encoding="utf-8"))
    assert len(result["answers"]) == len(result["benign_answers"]) == 6
    assert result["model"] == str(base)

    assert "holds a run already" in finetune("run", recipe, expect=2)
    assert "finished already" in finetune("run", recipe, "--resume")
    assert "other settings" in finetune("run", recipe, "redteam.limit=5", "--resume", expect=2)
    finetune("run", recipe, "redteam.limit=5", "redteam.benign=false", "--overwrite")
    assert len(json.loads((run / "redteam.json").read_text(encoding="utf-8"))["answers"]) == 5
    (run / "result.json").unlink()  # as if it had been killed
    finetune("run", recipe, "redteam.limit=5", "redteam.benign=false", "--resume")
    assert (run / "result.json").is_file()


@pytest.mark.parametrize("named", ["found", "found/redteam.json"])
def test_another_red_team_result_has_data_aimed_again(tmp_path: Path, named: str) -> None:
    """Its contents count, though the recipe names it as before."""
    found, aimed = tmp_path / "found", tmp_path / "chain" / "aimed"
    write_found(found, "好的，步骤如下：首先……")
    aim = {"dpo_prompts": 4, "ordinary": [], "ordinary_share": 0.0}
    copy = shutil.copytree(found, tmp_path / "copy")
    for name, redteam in (("other", copy), ("aimed", tmp_path / named)):
        step = {"stage": "aim", "model": {"base": "any"}, "aim": {**aim, "redteam": str(redteam)}}
        text = yaml.safe_dump({**step, "output_dir": str(tmp_path / "chain" / name)})
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("pipeline: [other.yaml, aimed.yaml]\n")
    finetune("run", pipeline)
    assert finetune("run", pipeline).count("done already") == 2
    assert json.loads((aimed / "aim.json").read_text(encoding="utf-8"))["note"] == ""

    write_found(found, "抱歉，这个我不能帮忙。")
    output = finetune("run", pipeline, expect=2)
    assert output.count("done already") == 1
    assert f"{aimed} holds a run already" in output
    assert "what it was made of has changed, so it is made again" in finetune("run", pipeline, "--resume")
    assert "aiming at all" in json.loads((aimed / "aim.json").read_text(encoding="utf-8"))["note"]
    assert finetune("run", pipeline).count("done already") == 2
    assert "finished already" in finetune("run", tmp_path / "aimed.yaml", "--resume")


def test_too_few_safe_answers_stop_the_chain_and_nothing_is_lost(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half_judge.py").write_text(
        "from itertools import cycle\nlabels = cycle(['safe', 'unsafe'])\n"
        "def judge(prompt, answer):\n    return next(labels)\n"
    )
    asking = {"limit": 4, "max_new_tokens": 2, "benign": False, "judge": "half_judge:judge", "at_least": 0.9}
    aiming = {"redteam": str(tmp_path / "chain" / "gated"), "ordinary": [], "ordinary_share": 0.0}
    steps: dict[str, dict[str, Any]] = {
        "gated": {"stage": "redteam", "model": {"base": str(tiny_bases["rope"])}, "redteam": asking},
        "later": {"stage": "aim", "model": {"base": "any"}, "aim": aiming},
    }
    for name, step in steps.items():
        text = yaml.safe_dump({**step, "output_dir": str(tmp_path / "chain" / name)})
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    recipe, pipeline = tmp_path / "gated.yaml", tmp_path / "pipeline.yaml"
    pipeline.write_text("pipeline: [gated.yaml, later.yaml]\n")
    run = tmp_path / "chain" / "gated"

    assert "at least 90.0% of the answers to attacks have to be safe" in finetune("check", recipe)
    output = finetune("run", pipeline, expect=2)
    assert "are safe (50.0 %): 40.0 points below redteam.at_least 0.9" in output
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["status"] == "finished"
    assert (run / "redteam.html").is_file()
    page = (tmp_path / "chain" / "report.html").read_text(encoding="utf-8")
    assert "40.0 points below redteam.at_least 0.9" in page
    assert not (tmp_path / "chain" / "later").exists()

    assert "40.0 points below" in finetune("run", pipeline, "--resume", expect=2), "no way past"
    recipe.write_text(recipe.read_text().replace("at_least: 0.9", "at_least: 0.5"))
    written = (run / "redteam.json").stat().st_mtime_ns
    finetune("run", pipeline, "--resume")
    assert (run / "redteam.json").stat().st_mtime_ns == written, "nothing was asked again"
    assert "points below" not in (tmp_path / "chain" / "report.html").read_text(encoding="utf-8")
    assert yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["redteam"]["at_least"] == 0.5
    assert (tmp_path / "chain" / "later" / "dpo.jsonl").is_file()


@pytest.mark.parametrize(
    ("stage", "changed", "message"),
    [
        ("redteam", {"compare": "nowhere"}, "redteam.compare: nowhere: no such folder"),
        ("redteam", {"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ("redteam", {"judge": "no.such:judge"}, "redteam.judge no.such:judge: no.such cannot be imported"),
        ("redteam", {"judge": "magic"}, "redteam.judge: expected learned, rules, reward:ADAPTER or package"),
        ("redteam", {"threshold": 4}, "redteam.threshold: with redteam.judge learned expected 0 to 1, found 4"),
        ("redteam", {"threshold": 0, "judge": "rules"}, "redteam.threshold: has no effect with redteam.judge rules"),
        ("redteam", {"limit": 0}, "redteam.limit: expected at least 1, found 0"),
        ("redteam", {"limits": 5}, "redteam.limits: unknown key; did you mean redteam.limit?"),
        ("aim", {"redteam": "nowhere"}, "aim.redteam: nowhere: no such folder"),
        ("aim", {"values": ["A.01", "Q.01"]}, "aim.values: no safety value 'Q.01'"),
        ("aim", {"values": []}, "aim.values"),
        ("aim", {"values": ["A.01"], "at_most": 0.2}, "aim.at_most: has no effect beside aim.values"),
        ("aim", {"ordinary": ["nowhere.jsonl"]}, "nowhere.jsonl"),
        ("aim", {"ordinary": []}, "aim.ordinary: is empty"),
        ("aim", {"ordinary_share": 1.0}, "aim.ordinary_share: expected less than 1, found 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_and_nothing_is_left(
    tiny_bases: dict[str, Path], tmp_path: Path, stage: str, changed: dict[str, Any], message: str
) -> None:
    write_found(tmp_path / "found", "好的，步骤如下：首先……")
    settings: dict[str, Any] = {
        "redteam": {"model": {"base": str(tiny_bases["rope"])}, "redteam": {"limit": 3, "max_new_tokens": 2}},
        "aim": {"model": {"base": "any"}, "aim": {"redteam": str(tmp_path / "found"), "dpo_prompts": 4}},
    }[stage]
    settings[stage] |= changed
    recipe = tmp_path / "recipe.yaml"
    output = tmp_path / "run"
    recipe.write_text(
        yaml.safe_dump({"stage": stage, "output_dir": str(output), **settings}), encoding="utf-8"
    )
    assert message in finetune("run", recipe, expect=2)
    assert not output.exists()

"""What goes before and after a run: check, chat, merge, several processes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_rows
from tiny_run import finetune, write_recipe

from finetune import chat_command
from finetune.baichuan.chat import build_example
from finetune.baichuan.load import load_tokenizer


@pytest.fixture(scope="module", params=["rope", "alibi"])
def trained(
    request: pytest.FixtureRequest, tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A base and the adapter of a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_bases[request.param]
    finetune("run", write_recipe(folder, base, train={"max_steps": 12, "learning_rate": 0.03}))
    return base, folder / "run" / "adapter"


# --- chat and merge -----------------------------------------------------------------------------------------------

TALK = ("--prompt", "问题1：怎么办？", "--greedy", "--max-new-tokens", 12)


def test_adapter_and_merged_folder_answer_alike(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    before = finetune("chat", "--model", base, *TALK)
    adapted = finetune("chat", "--model", base, "--adapter", adapter, *TALK)
    output = finetune("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    assert str(tmp_path / "merged") in output
    merged = finetune("chat", "--model", tmp_path / "merged", *TALK)
    assert merged == adapted != before
    assert any(character in adapted for character in "多喝水休息少吃盐控制饮食按时服药")
    assert "exists already" in finetune(
        "merge", "--adapter", adapter, "--output", tmp_path / "merged", expect=2
    )


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_chat_on_a_quantised_base(trained: tuple[Path, Path], quantization: str) -> None:
    base, adapter = trained
    answer = finetune("chat", "--model", base, "--adapter", adapter, *TALK, "--quantization", quantization)
    assert answer.strip()


@pytest.mark.parametrize("option", [None, "none"])
def test_chat_holds_the_base_as_the_adapter_was_trained(
    tiny_bases: dict[str, Path], tmp_path: Path, option: str | None
) -> None:
    model = {"quantization": "nf4"}
    finetune("run", write_recipe(tmp_path, tiny_bases["rope"], model=model, train={"max_steps": 2}))
    adapter = tmp_path / "run" / "adapter"
    note = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    assert (note["quantization"], note["dtype"], note["stage"]) == ("nf4", "float32", "sft")
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~current_umask()
    held = option or chat_command.trained_quantization(adapter)
    network, _ = chat_command.load(str(tiny_bases["rope"]), adapter, quantization=held)
    assert getattr(network.base_model.model, "is_loaded_in_4bit", False) is (option is None)
    options = ["--quantization", option] if option else []
    told = finetune("chat", "--model", tiny_bases["rope"], "--adapter", adapter, *TALK, *options)
    assert ("as the adapter was trained" in told) is (option is None)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_chat_refuses_an_adapter_on_weights_it_was_not_trained_on(
    trained: tuple[Path, Path], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter = trained
    finetune("merge", "--adapter", adapter, "--output", tmp_path / "merged")
    output = finetune("chat", "--model", tmp_path / "merged", "--adapter", adapter, *TALK, expect=2)
    assert "is another base" in output
    assert f"--model {base}" in output
    (other,) = (folder for folder in tiny_bases.values() if folder != base)
    assert "is another base" in finetune("chat", "--model", other, "--adapter", adapter, *TALK, expect=2)
    finetune("convert-adapter", "--adapter", adapter, "--to", "split", "--output", tmp_path / "split")
    output = finetune("chat", "--model", base, "--adapter", tmp_path / "split", *TALK, expect=2)
    assert "_proj, which this model does not have" in output
    assert "--to packed" in output
    assert "--model: 'nowhere' is no folder" in finetune("chat", "--model", "nowhere", *TALK, expect=2)


def test_chat_samples_with_the_settings_asked_for(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = trained
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        chat_command,
        "stream_answer",
        lambda network, tokenizer, messages, settings: seen.append(settings) or "",
    )
    prompt = ("chat", "--model", base, "--prompt", "问")
    finetune(*prompt)
    finetune(*prompt, "--temperature", 0.7, "--top-k", 3, "--max-new-tokens", 5)
    finetune(*prompt, "--temperature", 0)
    assert seen[0] == {"max_new_tokens": 256}  # the rest is the model's own
    assert seen[1] == {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_k": 3}
    assert seen[2]["do_sample"] is False


def test_conversation_on_standard_input(trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = trained
    histories: list[list[str]] = []

    def answer(network: Any, tokenizer: Any, messages: list[dict[str, str]], settings: Any) -> str:
        histories.append([message["content"] for message in messages])
        return f"答{len(histories)}"

    monkeypatch.setattr(chat_command, "stream_answer", answer)
    finetune("chat", "--model", base, "--system", "系统", given="问1\n\n问2\n/new\n问3\n/exit\n问4\n")
    assert histories == [["系统", "问1"], ["系统", "问1", "答1", "问2"], ["系统", "问3"]]


def test_answer_ends_where_the_user_would_speak(trained: tuple[Path, Path]) -> None:
    """Role pieces end an answer and are not printed, whatever the weights prefer."""
    base, adapter = trained
    network, tokenizer = chat_command.load(str(base), adapter, quantization="none")
    head = network.get_base_model().lm_head
    with torch.no_grad():
        head.stored_weight[195] = 0
    calls = {"count": 0}

    def third_is_user(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        calls["count"] += 1
        if calls["count"] == 3:
            logits[..., 195] = 1e4
        return logits

    head.register_forward_hook(third_is_user)
    settings = chat_command.generation_settings(network, greedy=True, max_new_tokens=20)
    answer = chat_command.stream_answer(network, tokenizer, [{"role": "user", "content": "问"}], settings)
    assert calls["count"] == 3
    assert "reserved" not in answer


def test_very_long_prompts_are_cut_from_the_left(trained: tuple[Path, Path]) -> None:
    base, _ = trained
    output = finetune(
        "chat", "--model", base, "--prompt", "血压" * 2000, "--greedy", "--max-new-tokens", 2000
    )
    assert output


def test_chat_refusals(trained: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = trained
    assert "--prompt: is empty" in finetune("chat", "--model", base, "--prompt", " ", expect=2)
    assert "this is an adapter" in finetune("chat", "--model", adapter, *TALK, expect=2)
    run = adapter.parent
    message = finetune("chat", "--model", base, "--adapter", run, *TALK, expect=2)
    assert f"give {adapter}" in message
    assert "did you mean" in finetune("chat", "--model", "baichuan2-7b-chta", *TALK, expect=2)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "training.json").write_text('{"quantization": "nf4"}')
    message = finetune("chat", "--model", base, "--adapter", nothing, *TALK, expect=2)
    assert message.startswith(f"error: {nothing}: no adapter_config.json"), "nothing is said of a base first"


def test_a_llama_folder_is_told_from_other_models(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    finetune("export", "--model", tiny_bases["rope"], "--format", "llama", "--output", tmp_path / "llama")
    message = finetune("chat", "--model", tmp_path / "llama", *TALK, expect=2)
    assert "Llama's layout" in message
    assert "--format baichuan" in message


# --- check --------------------------------------------------------------------------------------------------------


def test_check_says_what_the_run_will_do(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"question": f"问题{i}", "answer": "血压" * (1 + 3 * i)} for i in range(9)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = write_recipe(
        tmp_path / "r",
        tiny_base,
        data={"train": str(data), "max_length": 24},
        train={"max_steps": None, "epochs": 1.5, "batch_size": 2, "gradient_accumulation": 2},
    )
    output = finetune("check", recipe)
    assert not (tmp_path / "r" / "run").exists()
    tokenizer = load_tokenizer(tiny_base)
    lengths = []
    for row in rows:
        pair = [("user", row["question"]), ("assistant", row["answer"])]
        messages = [{"role": role, "content": content} for role, content in pair]
        lengths.append(len(build_example(tokenizer, messages, max_length=10_000)["input_ids"]))
    assert max(lengths) > 24

    def cell(label: str) -> str:
        found = re.search(rf"^\s*{label}\s+(\S+)", output, re.MULTILINE)
        assert found, output
        return found.group(1)

    assert cell("documents") == "9"
    assert int(cell("min")) == min(lengths)
    assert int(cell("median")) == sorted(lengths)[4]
    assert int(cell("max")) == max(lengths)  # before it is cut
    assert int(cell("total").replace(",", "")) == sum(min(length, 24) for length in lengths)
    assert cell("cut to max_length") == f"{sum(length > 24 for length in lengths) / 9:.1%}"
    assert "9 rows, 4 to a step: 3 steps an epoch, 5 in all" in output
    assert "predicted peak memory" in output

    finetune("run", recipe)
    result = json.loads((tmp_path / "r" / "run" / "result.json").read_text())
    assert result["steps"] == 5
    assert f"trainable parameters: {result['trainable_parameters']:,} of" in output
    assert "holds a run already" in finetune("check", recipe)


def test_check_refuses_what_run_refuses(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_bases["rope"])
    write_rows(tmp_path / "train.jsonl", [{"question": "", "answer": "x"}])
    assert "train.jsonl:1" in finetune("check", recipe, expect=2)
    assert "no config.json" in finetune("check", recipe, f"model.base={tmp_path}", expect=2)

"""Adapters between W_pack and q, k, v: the same function, whatever their ranks, scalings and kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_adapters import adapted, base_model, logits
from test_merge import write_adapter
from tiny_model import HIDDEN, LAYERS
from tiny_run import finetune
from transformers import LlamaForCausalLM

from finetune.adapters import convert_adapter, load_adapter, merge_adapter, save_adapter
from finetune.adapters.convert import pack, reduce_rank, split
from finetune.adapters.lora_weights import LoraUpdate
from finetune.errors import UserError
from finetune.export import export_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

KINDS = ["default", "rslora", "dora", "two_targets"]


@pytest.fixture(scope="module")
def llama(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny RoPE model as a stock Llama model."""
    return export_model(tiny_bases["rope"], tmp_path_factory.mktemp("llama") / "model", format="llama").folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config(folder) | changes))


def on_llama(llama: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), str(adapter)).eval()


def on_baichuan(base: Path, adapter: Path) -> Any:
    return load_adapter(base_model(base)[0], adapter).eval()


def train_on_llama(llama: Path, folder: Path, **settings: Any) -> Any:
    """What peft saves after training on the stock model, as anyone would who never saw this toolkit."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


# --- there and back


@pytest.mark.parametrize("kind", KINDS)
def test_split_adapter_does_the_same_on_the_llama_model(
    tiny_bases: dict[str, Path], llama: Path, tmp_path: Path, kind: str
) -> None:
    model = write_adapter(tiny_bases["rope"], tmp_path / "packed", kind)
    done = convert_adapter(tmp_path / "packed", tmp_path / "split", to="split")
    assert (done.layers, done.rank, done.relative_error) == (LAYERS, 4, 0.0)
    close(logits(on_llama(llama, done.folder)), logits(model))
    assert config(done.folder)["base_model_name_or_path"] == str(tiny_bases["rope"])
    assert "`finetune convert-adapter --to split`" in (done.folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_gives_back_every_tensor(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """Without tripling the rank: the three A's are one."""
    model = write_adapter(tiny_base, tmp_path / "packed", kind)
    convert_adapter(tmp_path / "packed", tmp_path / "split", to="split")
    done = convert_adapter(tmp_path / "split", tmp_path / "again", to="packed")
    before, after = tensors(tmp_path / "packed"), tensors(done.folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    was, now = config(tmp_path / "packed"), config(done.folder)
    assert sorted(now["target_modules"]) == sorted(was["target_modules"])
    assert {k: v for k, v in now.items() if k != "target_modules"} == {
        k: v for k, v in was.items() if k != "target_modules"
    }
    assert torch.equal(logits(on_baichuan(tiny_base, done.folder)), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "k_proj", "v_proj"]},
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["k_proj", "o_proj"], "use_rslora": True},
        {"target_modules": r".*\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["model.layers.0.self_attn.k_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6, r".*\.up_proj": 3},
            "alpha_pattern": {"k_proj": 24, "up_proj": 5},
        },
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 20},
        },
    ],
    ids=lambda settings: "-".join(map(str, settings.values()))[:40],
)
def test_adapter_of_a_stock_llama_does_the_same_on_baichuan(
    tiny_bases: dict[str, Path], llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = train_on_llama(llama, tmp_path / "split", **settings)
    assert (logits(model) - logits(LlamaForCausalLM.from_pretrained(llama))).abs().max() > 0.01
    done = convert_adapter(tmp_path / "split", tmp_path / "packed", to="packed")
    assert not config(done.folder)["exclude_modules"]
    expected = logits(model)
    close(logits(on_baichuan(tiny_bases["rope"], done.folder)), expected)
    back = convert_adapter(done.folder, tmp_path / "back", to="split")
    close(logits(on_llama(llama, back.folder)), expected)


def test_packed_adapter_of_a_stock_llama_merges(
    tiny_bases: dict[str, Path], llama: Path, tmp_path: Path
) -> None:
    """The configuration is understood by the merge, too."""
    ranks = {"q_proj": 2, "layers.1.self_attn.v_proj": 6}
    model = train_on_llama(llama, tmp_path / "split", target_modules="all-linear", rank_pattern=ranks)
    folder = convert_adapter(tmp_path / "split", tmp_path / "packed", to="packed").folder
    merged = merge_adapter(folder, tmp_path / "merged", base=str(tiny_bases["rope"]))
    close(logits(base_model(merged)[0]), logits(model))


def test_uniform_adapters_need_no_patterns(llama: Path, tmp_path: Path) -> None:
    """Serving engines read r and lora_alpha, and not every one of them the patterns."""
    train_on_llama(llama, tmp_path / "split", target_modules=["q_proj", "k_proj", "v_proj"])
    packed = config(convert_adapter(tmp_path / "split", tmp_path / "packed", to="packed").folder)
    assert (packed["r"], packed["lora_alpha"]) == (12, 24)
    assert packed["rank_pattern"] == packed["alpha_pattern"] == {}
    assert packed["target_modules"] == ["W_pack"]
    back = config(convert_adapter(tmp_path / "packed", tmp_path / "back", to="split").folder)
    assert back["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_half_precision_stays_what_it_is(llama: Path, tmp_path: Path) -> None:
    train_on_llama(llama, tmp_path / "split", target_modules=["q_proj", "k_proj", "v_proj"])
    file = tmp_path / "split" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    packed = tensors(convert_adapter(tmp_path / "split", tmp_path / "packed", to="packed").folder)
    assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16}


# --- the matrices


def random_update(out: int, rank: int, scaling: float = 1.0) -> LoraUpdate:
    return LoraUpdate(torch.randn(rank, HIDDEN), torch.randn(out, rank), scaling)


def full(update: LoraUpdate) -> torch.Tensor:
    return update.scaling * update.b.double() @ update.a.double()


def test_pack_is_the_stack_of_the_updates() -> None:
    torch.manual_seed(0)
    parts = [random_update(HIDDEN, 4, 2.0), None, random_update(HIDDEN, 7, 0.3)]
    packed = pack(parts)
    assert packed.a.shape == (11, HIDDEN)
    expected = torch.cat([torch.zeros(HIDDEN, HIDDEN) if part is None else full(part) for part in parts])
    torch.testing.assert_close(full(packed), expected, atol=1e-5, rtol=1e-5)
    for part, again in zip(parts, split(packed)):
        assert again.b.shape[0] == HIDDEN
        if part is not None:
            torch.testing.assert_close(full(again), full(part), atol=1e-5, rtol=1e-5)


def test_shared_a_is_stacked_once() -> None:
    torch.manual_seed(0)
    q, v = random_update(HIDDEN, 4), random_update(HIDDEN, 4)
    k = LoraUpdate(q.a.clone(), torch.randn(HIDDEN, 4), 1.0)
    packed = pack([q, k, v])
    assert packed.a.shape == (8, HIDDEN)
    torch.testing.assert_close(full(packed), torch.cat([full(q), full(k), full(v)]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 5, 11, 24])
def test_reduction_is_the_truncated_svd(rank: int) -> None:
    torch.manual_seed(0)
    update = random_update(3 * HIDDEN, 24, 0.5)
    reduced, lost, norm = reduce_rank(update, rank)
    assert reduced.a.shape == (rank, HIDDEN)
    u, s, v = torch.linalg.svd(full(update), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(full(reduced), best, atol=1e-4, rtol=1e-4)
    assert lost == pytest.approx((full(update) - best).norm().item(), abs=1e-6)
    assert norm == pytest.approx(full(update).norm().item())


def test_reduced_rank_and_its_error(tiny_bases: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    train_on_llama(llama, tmp_path / "split", target_modules="all-linear")
    exact = convert_adapter(tmp_path / "split", tmp_path / "exact", to="packed", rank=12)
    assert (exact.rank, exact.relative_error) == (12, 0.0)
    printed = finetune(
        "convert-adapter", "--adapter", tmp_path / "split", "--to", "packed", "--output", tmp_path / "small",
        "--rank", 6,
    )  # fmt: skip
    pairs = [
        (tensors(folder)[f"{name}.lora_B.weight"] @ tensors(folder)[f"{name}.lora_A.weight"])
        * (config(folder)["lora_alpha"] / config(folder)["r"])
        for name in [f"base_model.model.model.layers.{layer}.self_attn.W_pack" for layer in range(LAYERS)]
        for folder in (tmp_path / "exact", tmp_path / "small")
    ]
    lost = [(a - b).norm().item() for a, b in zip(pairs[::2], pairs[1::2])]
    norms = [a.norm().item() for a in pairs[::2]]
    error = (sum(x**2 for x in lost) / sum(x**2 for x in norms)) ** 0.5
    assert f"{LAYERS} layers, rank 6, relative error {error:.2e}" in printed
    assert f"up to {max(x / y for x, y in zip(lost, norms)):.2e}" in printed
    assert 0.1 < error < 0.9
    weights = tensors(tmp_path / "small")
    assert weights["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape[0] == 4
    assert on_baichuan(tiny_bases["rope"], tmp_path / "small")


# --- command line and refusals: nothing is left behind


def refusal(adapter: Path, *arguments: Any) -> str:
    output = adapter.parent / "refused"
    message = finetune("convert-adapter", "--adapter", adapter, "--output", output, *arguments, expect=2)
    assert not list(adapter.parent.glob("*refused*"))
    return message


def test_command_line(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "packed")
    output = finetune(
        "convert-adapter", "--adapter", tmp_path / "packed", "--to", "split", "--output", tmp_path / "split"
    )
    assert f"converted adapter: {tmp_path / 'split'} (2 layers, rank 4)" in output
    assert "It fits the base as exported with `finetune export --format llama`" in output
    assert "is split already" in refusal(tmp_path / "split", "--to", "split")
    assert "--to packed is the other way" in refusal(tmp_path / "split", "--to", "split")
    assert "is packed already (it changes W_pack)" in refusal(tmp_path / "packed", "--to", "packed")
    assert "splitting keeps the rank" in refusal(tmp_path / "packed", "--to", "split", "--rank", 2)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert_adapter(tmp_path / "packed", tmp_path / "there", to="split")
    with pytest.raises(UserError, match="found 'llama', expected packed or split"):
        convert_adapter(tmp_path / "packed", tmp_path / "new", to="llama")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ptuning", "prefix"])
def test_prompt_adapters_have_nothing_to_convert(
    tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / kind, kind)
    message = refusal(tmp_path / kind, "--to", "split")
    assert "has nothing to convert: it changes no matrices" in message
    assert "its vectors fit the packed and the split model as they are" in message


def test_adapters_of_other_matrices(llama: Path, tmp_path: Path) -> None:
    train_on_llama(llama, tmp_path / "mlp", target_modules=["up_proj"])
    assert "changes none of q, k and v" in refusal(tmp_path / "mlp", "--to", "packed")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "trains the head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "trains the head"),
        (
            {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
            "DoRA on some of q_proj, k_proj and v_proj",
        ),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "cannot convert"),
    ],
)
def test_what_cannot_be_exact(llama: Path, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    train_on_llama(llama, tmp_path / "split", **settings)
    assert says in refusal(tmp_path / "split", "--to", "packed")


def test_adapters_that_are_no_plain_lora(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(adapted(tiny_bases["rope"], "pissa", trained=True), tmp_path / "pissa")
    assert "its initialisation (pissa) moved a part of the base" in refusal(
        tmp_path / "pissa", "--to", "split"
    )
    write_adapter(tiny_bases["rope"], tmp_path / "lora")
    for setting in ("use_qalora", "of_a_later_peft"):
        edit_config(tmp_path / "lora", **{setting: True})
        message = refusal(tmp_path / "lora", "--to", "split")
        assert f"cannot convert an adapter with {setting}: True" in message
        edit_config(tmp_path / "lora", **{setting: False})


def test_damaged_adapter(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As merging refuses it: what was wrong before would be wrong and hidden after."""
    write_adapter(tiny_bases["rope"], tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    found = load_file(file)
    found[next(iter(found))][0, 0] = torch.nan
    save_file(found, file)
    assert "values that are not finite" in refusal(tmp_path / "lora", "--to", "split")


def test_grouped_query_attention_is_no_baichuan(llama: Path, tmp_path: Path) -> None:
    train_on_llama(llama, tmp_path / "split", target_modules=["q_proj", "k_proj", "v_proj"])
    file = tmp_path / "split" / "adapter_model.safetensors"
    found = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    save_file(found | {key: found[key][:16].clone()}, file)
    assert "grouped-query attention" in refusal(tmp_path / "split", "--to", "packed")

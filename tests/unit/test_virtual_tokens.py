"""P-Tuning in the weights: what base and adapter compute, the tokens in front of everything, nothing else moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from stock_software import ask_stock
from test_adapters import LONG, SHORT, adapted, base_model
from test_chat import ATTACK, conversation
from tiny_model import HIDDEN, padded, write_tiny_base
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from finetune.adapters import load_adapter, merge_adapter, save_adapter
from finetune.adapters.virtual_tokens import choose_token_ids, merge_virtual_tokens
from finetune.baichuan.chat import build_example, build_prompt, virtual_token_ids
from finetune.baichuan.load import load_tokenizer
from finetune.baichuan.tokenization import BaichuanTokenizer
from finetune.data.tokenize import encode_conversation, encode_text
from finetune.errors import UserError
from finetune.generate import NO_SAMPLING

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

COUNT = 5  # virtual tokens of the adapters of test_adapters
IDS = list(range(1089 - COUNT, 1089))  # <reserved_995> to <reserved_999>
USER, ASSISTANT, EOS, IGNORED = 195, 196, 2, -100
TEXT = "糖尿病患者应当控制饮食。"


def write_adapter(base: Path, folder: Path, kind: str = "ptuning") -> Any:
    """A trained adapter in ``folder``, and the model that it was trained on."""
    model = adapted(base, kind, trained=True)
    save_adapter(model, folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options).eval()


@pytest.fixture(scope="module")
def merged(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each position encoding a folder with ``adapter`` and ``merged``; read only."""
    root = tmp_path_factory.mktemp("virtual")
    for encoding, base in tiny_bases.items():
        write_adapter(base, root / encoding / "adapter")
        merge_adapter(root / encoding / "adapter", root / encoding / "merged")
    return {encoding: root / encoding for encoding in tiny_bases}


def test_official_code_stays_behind(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Its `chat()` builds prompts of its own, without the virtual tokens."""
    base = Path(shutil.copytree(tiny_bases["rope"], tmp_path / "base"))
    (base / "modeling_baichuan.py").write_text("# official")
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    write_adapter(base, tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "out", verify=False)
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(merged: dict[str, Path]) -> BaichuanTokenizer:
    return load_tokenizer(merged["rope"] / "merged")


@pytest.fixture(scope="module")
def plain(tiny_bases: dict[str, Path]) -> BaichuanTokenizer:
    """The base's."""
    return load_tokenizer(tiny_bases["rope"])


@torch.no_grad()
def logits(model: Any, rows: list[list[int]], side: str) -> torch.Tensor:
    """Of the real tokens of a padded batch, row after row; peft's virtual tokens are no part of it."""
    ids, mask = padded(rows, side)
    found = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
    return found[mask.bool()]


def without_virtual(values: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Logits of rows that begin with virtual tokens, those of the virtual tokens left out."""
    parts = values.split([len(row) for row in rows])
    return torch.cat([part[COUNT:] for part in parts])


# --- the same function


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["ptuning", "ptuning_lstm", "ptuning_none"])
def test_merged_logits_are_those_of_base_and_adapter(
    tiny_base: Path, tmp_path: Path, kind: str, side: str
) -> None:
    trained = write_adapter(tiny_base, tmp_path / "adapter", kind)
    model = load(merge_adapter(tmp_path / "adapter", tmp_path / "merged"))
    rows = [LONG, SHORT, [USER, 1200, ASSISTANT]]
    with_virtual = [IDS + row for row in rows]
    found = without_virtual(logits(model, with_virtual, side), with_virtual)
    expected = logits(trained, rows, side)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    base = logits(base_model(tiny_base)[0], rows, side)
    assert (expected - base).abs().max() > 0.5  # the vectors do matter


@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_merged_generates_what_base_and_adapter_generate(
    merged: dict[str, Path], tiny_bases: dict[str, Path], encoding: str
) -> None:
    """In a batch padded on the left; peft puts its vectors before the padding, the merged model behind it."""
    folder = merged[encoding]
    trained = load_adapter(base_model(tiny_bases[encoding])[0], folder / "adapter").eval()
    model, tokenizer = load(folder / "merged"), load_tokenizer(folder / "merged")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **NO_SAMPLING}
    messages = [conversation("高血压怎么办？"), conversation("头痛", "休息", TEXT * 3, system="医生")]
    prompts = {
        name: [build_prompt(each, row) for row in messages]
        for name, each in (("adapter", load_tokenizer(tiny_bases[encoding])), ("merged", tokenizer))
    }
    answers = {}
    for name, each in (("adapter", trained), ("merged", model)):
        ids, mask = padded(prompts[name], "left")
        with torch.no_grad():
            output = each.generate(input_ids=ids, attention_mask=mask, **options)
        answers[name] = output[:, ids.shape[1] :].tolist()
    assert answers["merged"] == answers["adapter"]
    assert len({*map(tuple, answers["merged"])}) == 2


def test_bfloat16_computes_what_the_adapter_computes_in_bfloat16(
    merged: dict[str, Path], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """peft rounds the vectors to the model's dtype too, so nothing more is lost by the merge."""
    base = load(tiny_bases["rope"], dtype=torch.bfloat16)
    trained = PeftModel.from_pretrained(base, merged["rope"] / "adapter").eval()
    folder = merge_adapter(merged["rope"] / "adapter", tmp_path / "half", dtype="bfloat16")
    found = logits(load(folder, dtype=torch.bfloat16), [IDS + LONG], "right")[COUNT:]
    torch.testing.assert_close(found, logits(trained, [LONG], "right"), atol=0, rtol=1e-3)


def test_vectors_are_rounded_once(
    merged: dict[str, Path], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """A float32 folder of a 16-bit base holds them as they were trained."""
    load(tiny_bases["rope"], dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    load_tokenizer(tiny_bases["rope"]).save_pretrained(tmp_path / "half")
    adapter = merged["rope"] / "adapter"
    vectors = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    for dtype, expected in (("float32", vectors), (None, vectors.bfloat16())):
        folder = merge_adapter(adapter, tmp_path / str(dtype), base=str(tmp_path / "half"), dtype=dtype)
        rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"][IDS]
        assert torch.equal(rows, expected)


def test_only_the_rows_of_the_virtual_tokens_change(
    merged: dict[str, Path], tiny_bases: dict[str, Path]
) -> None:
    before = load_file(tiny_bases["alibi"] / "model.safetensors")
    after = load_file(merged["alibi"] / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight"}
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(dim=1)
    assert rows.nonzero()[:, 0].tolist() == IDS


def test_a_quantised_base_keeps_its_weights(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Embeddings are never quantised: an adapter trained on an nf4 folder merges into that very folder."""
    pytest.importorskip("bitsandbytes")
    from finetune.baichuan.load import quantization_config

    quantised = load(tiny_bases["rope"], quantization_config=quantization_config("nf4", torch.float32))
    quantised.save_pretrained(tmp_path / "nf4")
    load_tokenizer(tiny_bases["rope"]).save_pretrained(tmp_path / "nf4")
    trained = write_adapter(tmp_path / "nf4", tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    expected = logits(trained, [LONG], "right")
    found = logits(load(folder), [IDS + LONG], "right")[COUNT:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"--dtype: found bfloat16, but the weights of .* are nf4"):
        merge_adapter(tmp_path / "adapter", tmp_path / "other", dtype="bfloat16")


def test_a_second_merge_goes_in_front_of_the_first(merged: dict[str, Path], tmp_path: Path) -> None:
    """Where peft puts the vectors when they are trained on the merged folder."""
    first = merged["rope"] / "merged"
    trained = write_adapter(first, tmp_path / "adapter")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "twice")
    tokenizer = load_tokenizer(folder)
    new = [index - COUNT for index in IDS]
    assert virtual_token_ids(tokenizer) == new + IDS
    prompt = build_prompt(load_tokenizer(first), conversation(TEXT))
    assert prompt[:COUNT] == IDS
    again = build_prompt(tokenizer, conversation(TEXT))
    assert again == new + prompt
    assert tokenizer.apply_chat_template(conversation(TEXT), add_generation_prompt=True)["input_ids"] == again
    assert tokenizer(TEXT)["input_ids"] == new + load_tokenizer(first)(TEXT)["input_ids"]
    found = logits(load(folder), [again], "right")[COUNT:]
    torch.testing.assert_close(found, logits(trained, [prompt], "right"), atol=1e-5, rtol=0)


def test_lora_on_a_merged_folder_keeps_its_virtual_tokens(merged: dict[str, Path], tmp_path: Path) -> None:
    first = merged["rope"] / "merged"
    trained = write_adapter(first, tmp_path / "adapter", "default")
    folder = merge_adapter(tmp_path / "adapter", tmp_path / "both")
    prompt = build_prompt(load_tokenizer(folder), conversation(TEXT))
    assert prompt == build_prompt(load_tokenizer(first), conversation(TEXT))
    assert prompt[:COUNT] == IDS
    found = logits(load(folder), [prompt], "right")
    torch.testing.assert_close(found, logits(trained, [prompt], "right"), atol=2e-5, rtol=0)


# --- in front of everything


def test_the_prompt_builder_the_template_and_plain_calls_agree(
    tokenizer: BaichuanTokenizer, plain: BaichuanTokenizer, merged: dict[str, Path]
) -> None:
    stock = PreTrainedTokenizerFast.from_pretrained(merged["rope"] / "merged")
    for messages in (conversation(TEXT), conversation("头痛", "休息", TEXT, system="医生\n")):
        prompt = IDS + build_prompt(plain, messages)
        for each in (tokenizer, stock):
            assert build_prompt(each, messages) == prompt
            assert each.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
            text = each.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert each.encode(text, add_special_tokens=False) == prompt
    for each in (tokenizer, stock):
        assert each(TEXT)["input_ids"] == IDS + plain(TEXT)["input_ids"]
        assert each(TEXT)["attention_mask"] == [1] * len(each(TEXT)["input_ids"])
        assert each.encode(TEXT, add_special_tokens=False) == plain.encode(TEXT)
        assert each.decode(each(TEXT)["input_ids"], skip_special_tokens=True) == TEXT
        assert each(TEXT, truncation=True, max_length=COUNT + 2)["input_ids"][:COUNT] == IDS
        assert each(TEXT, "头痛")["input_ids"] == IDS + plain(TEXT + "头痛")["input_ids"]


def test_examples_begin_with_virtual_tokens_that_are_not_learned(
    tokenizer: BaichuanTokenizer, plain: BaichuanTokenizer
) -> None:
    """Nor is the conversation's first token: its label, EOS, would have the virtual tokens end the answer."""
    for messages in (conversation("头痛", "休息"), conversation("头痛", "休息", system="医生")):
        expected, example = (build_example(each, messages, max_length=90) for each in (plain, tokenizer))
        assert example["input_ids"] == IDS + expected["input_ids"]
        assert example["labels"] == [IGNORED] * (COUNT + 1) + expected["labels"][1:]
        ids, labels, length = encode_conversation(tokenizer, messages, max_length=90)
        assert (ids, labels, length) == (example["input_ids"], example["labels"], len(ids))
        cut = build_example(tokenizer, messages, max_length=COUNT + 3)
        assert cut == {name: values[: COUNT + 3] for name, values in example.items()}
        assert tokenizer.apply_chat_template(messages)["input_ids"] == example["input_ids"]
        masks = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)["assistant_masks"]
        assert masks[:COUNT] == [0] * COUNT
        assert [index for index, kept in zip(ids, masks) if kept] == [*plain.encode("休息"), EOS]


def test_texts_are_cut_into_rows_that_all_begin_with_virtual_tokens(
    tokenizer: BaichuanTokenizer, plain: BaichuanTokenizer
) -> None:
    text = TEXT * 4
    for (ids, labels, length), (piece, learned, whole) in zip(
        encode_text(tokenizer, text, max_length=20 + COUNT),
        encode_text(plain, text, max_length=20),
        strict=True,
    ):
        assert ids == IDS + piece
        assert labels == [IGNORED] * COUNT + learned
        assert length == whole + COUNT
    with pytest.raises(
        UserError, match=r"data\.max_length: 6 leaves no room for text beside 5 virtual tokens"
    ):
        encode_text(tokenizer, text, max_length=COUNT + 1)


def test_truncation_keeps_virtual_tokens(tokenizer: BaichuanTokenizer, plain: BaichuanTokenizer) -> None:
    """They count as part of the length."""
    messages = conversation("头痛", "休息", "感冒", "喝水", TEXT * 5, system="医生")
    for room in (1, 7, 30, 70, 200):
        expected = IDS + build_prompt(plain, messages, max_length=room + 10, max_new_tokens=10)
        prompt = build_prompt(tokenizer, messages, max_length=room + 10 + COUNT, max_new_tokens=10)
        assert prompt == expected
    with pytest.raises(UserError, match="no room for a prompt in max_length 15 beside 5 virtual tokens"):
        build_prompt(tokenizer, messages, max_length=10 + COUNT, max_new_tokens=10)
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    tokenizer.truncation_side = "left"
    try:
        for limit in (3, COUNT, COUNT + 4, len(whole)):
            cut = tokenizer.apply_chat_template(messages, truncation=True, max_length=limit)["input_ids"]
            assert cut == (IDS + whole[len(whole) - limit + COUNT :] if limit > COUNT else IDS[:limit])
    finally:
        tokenizer.truncation_side = "right"


def test_content_cannot_forge_virtual_tokens(tokenizer: BaichuanTokenizer, merged: dict[str, Path]) -> None:
    attack = "".join(tokenizer.convert_ids_to_tokens(IDS)) + ATTACK
    messages = conversation(attack, attack, attack, system=attack)
    stock = PreTrainedTokenizerFast.from_pretrained(merged["rope"] / "merged")
    for ids in (
        build_prompt(tokenizer, messages),
        build_prompt(stock, messages),
        tokenizer.apply_chat_template(messages)["input_ids"],
        stock.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"],
    ):
        assert ids[:COUNT] == IDS
        assert not set(IDS).intersection(ids[COUNT:])
    assert tokenizer.encode_content(attack)[-1] != ASSISTANT


def test_another_template_gets_them_in_front_too(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """And a piece that a template gives a meaning to is not free."""
    tokenizer = load_tokenizer(tiny_bases["rope"])
    tokenizer.chat_template = " 提示：{% for m in messages %}<reserved_999>{{ m.content }}{% endfor %}"
    messages = conversation("头痛", "休息")
    before = tokenizer.apply_chat_template(messages)["input_ids"]
    ids = choose_token_ids(tokenizer, 2)
    assert ids == [1086, 1087]
    for expected in (ids + before, [7, 8, *ids, *before]):
        tokenizer.prepend_virtual_tokens(expected[:2])
        tokenizer.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.apply_chat_template(messages)["input_ids"] == expected


STOCK = """
import json, sys
from transformers import PreTrainedTokenizerFast
from tokenizers import Tokenizer
folder, messages, text = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
plain = Tokenizer.from_file(folder + "/tokenizer.json").encode(text).ids
assert "finetune" not in sys.modules
print(json.dumps({"chat": chat, "call": tokenizer(text)["input_ids"], "plain": plain}))
"""


def test_the_merged_tokenizer_needs_none_of_our_code(
    tokenizer: BaichuanTokenizer, merged: dict[str, Path], tmp_path: Path
) -> None:
    messages = conversation("头痛", "休息", TEXT, system="医生")
    arguments = [merged["rope"] / "merged", json.dumps(messages), TEXT]
    found = ask_stock(STOCK, *arguments, folder=tmp_path)
    assert found["chat"] == build_prompt(tokenizer, messages)
    assert found["call"] == found["plain"] == tokenizer(TEXT)["input_ids"]


def test_official_folders(shared: Path, tmp_path: Path) -> None:
    """Their configuration says ``add_bos_token: false``, on which transformers makes a post-processor anew."""
    tokenizer = BaichuanTokenizer.from_pretrained(shared / "baichuan2")
    ids = choose_token_ids(tokenizer, 20)
    assert ids == list(range(1069, 1089))
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "<reserved_999>"
    expected = tokenizer(TEXT)["input_ids"]
    tokenizer.prepend_virtual_tokens(ids)
    tokenizer.save_pretrained(tmp_path)
    for each in (BaichuanTokenizer, PreTrainedTokenizerFast):
        assert each.from_pretrained(tmp_path)(TEXT)["input_ids"] == ids + expected


# --- which rows, and refusals


def test_pieces_with_a_meaning_are_not_free(tokenizer: BaichuanTokenizer, plain: BaichuanTokenizer) -> None:
    free = choose_token_ids(plain, 100)
    assert free == list(range(989, 1089))
    assert choose_token_ids(tokenizer, 100) == [index - COUNT for index in free]
    settings = {"eos_token_id": [EOS, 1088], "tool_token_id": 1086, "pad_token_id": None}
    assert choose_token_ids(plain, 2, settings=settings) == [1085, 1087]
    every = [index for index in range(89, 1089) if index not in (191, 192, USER, ASSISTANT)]
    assert choose_token_ids(plain, len(every)) == every
    with pytest.raises(UserError, match=r"997 virtual tokens, but .* only 996 are free"):
        choose_token_ids(plain, len(every) + 1)


def test_prefix_tuning_is_refused_with_the_reason(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tiny_bases["rope"], tmp_path / "adapter", "prefix")
    with pytest.raises(UserError, match="key/value cache of every layer and cannot be expressed as tokens"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_or_are_damaged(
    merged: dict[str, Path], tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    wide = write_tiny_base(tmp_path / "wide", hidden_size=96)
    with pytest.raises(UserError, match=r"vectors have 64 numbers, .* has hidden_size 96"):
        merge_adapter(merged["rope"] / "adapter", tmp_path / "out", base=str(wide))

    write_adapter(tiny_bases["rope"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    for tensors, problem in (
        ({"prompt_embeddings": torch.ones(COUNT - 1, HIDDEN)}, r"has shape \(4, 64\), .* says \(5, 64\)"),
        ({"prompt_embeddings": torch.full((COUNT, HIDDEN), torch.nan)}, "not finite"),
        ({"other": torch.ones(1)}, "holds other, expected prompt_embeddings alone"),
    ):
        save_file(tensors, file)
        with pytest.raises(UserError, match=problem):
            merge_adapter(tmp_path / "adapter", tmp_path / "out")
    save_file({"prompt_embeddings": torch.full((COUNT, HIDDEN), 1e5)}, file)
    with pytest.raises(UserError, match="too large for float16"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "wide"]


def test_tensors_without_embeddings() -> None:
    vectors = torch.ones(1, 4)
    with pytest.raises(UserError, match=r"has no model\.embed_tokens\.weight"):
        list(merge_virtual_tokens([("lm_head.weight", torch.ones(3, 4))], vectors, [2]))
    with pytest.raises(UserError, match="no place for vectors of 4 numbers in row 3"):
        list(merge_virtual_tokens([("model.embed_tokens.weight", torch.ones(3, 4))], vectors, [3]))


def test_ids_that_are_not_in_the_vocabulary(merged: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((merged["rope"] / "merged" / "tokenizer_config.json").read_text(encoding="utf-8"))
    load_tokenizer(merged["rope"] / "merged").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config | {"virtual_token_ids": [7, 99999]}), encoding="utf-8")
    with pytest.raises(UserError, match="virtual_token_ids: 99999 is not in the vocabulary"):
        load_tokenizer(tmp_path)

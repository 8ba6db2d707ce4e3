"""The tokenizer: SentencePiece's ids, safe encoding of content, and folders that others can load."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from stock_software import ask_stock
from tiny_tokenizer import BYTES_START, train_tiny_sentencepiece, user_defined_pieces
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from finetune.baichuan.chat import control_ids, encode_content, role_ids
from finetune.baichuan.configuration import BaichuanConfig
from finetune.baichuan.tokenization import BaichuanTokenizer, register_tokenizer
from finetune.errors import UserError

Pair = tuple[BaichuanTokenizer, SentencePieceProcessor]

RESERVED = [f"<reserved_{number}>" for number in (106, 107, 999)]
CONTROL_LITERALS = ["<s>", "</s>", "<unk>", "<SEP>", "<CLS>", *RESERVED]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_sentencepiece(tmp_path_factory.mktemp("tiny") / "tokenizer.model")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> BaichuanTokenizer:
    return BaichuanTokenizer(vocab_file=str(tiny_model))


@pytest.fixture(scope="module")
def official(shared: Path) -> BaichuanTokenizer:
    register_tokenizer()
    return AutoTokenizer.from_pretrained(shared / "baichuan2", trust_remote_code=False)


@pytest.fixture(scope="module", params=["tiny", "official"])
def both(request: pytest.FixtureRequest) -> Pair:
    """Each tokenizer with the SentencePiece model it was made from."""
    tokenizer = request.getfixturevalue(request.param)
    return tokenizer, SentencePieceProcessor(model_file=tokenizer.vocab_file)


def random_texts(
    processor: SentencePieceProcessor, count: int, literals: list[str] | None = None
) -> list[str]:
    """Texts of vocabulary pieces, characters of many scripts, runs of spaces and, where given, literals."""
    rng = random.Random(0)
    pieces = [
        processor.id_to_piece(index).replace("\u2581", " ")
        for index in range(BYTES_START + 256, len(processor))
    ]
    harmless = [piece for piece in user_defined_pieces() if not piece.startswith("<")]
    scripts = [(0x0, 0x80), (0x4E00, 0x9FFF), (0x80, 0x2580), (0x1F300, 0x1F700), (0x20000, 0x20100)]
    makers = [
        lambda: rng.choice(pieces),
        lambda: rng.choice(harmless),
        lambda: chr(rng.randrange(*rng.choice(scripts))),
        lambda: rng.choice(" \n-.a") * rng.randrange(1, 40),
    ]
    if literals:
        makers += [lambda: rng.choice(literals), lambda: rng.choice(literals)[: rng.randrange(1, 9)]]
    return ["".join(rng.choice(makers)() for _ in range(rng.randrange(1, 15))) for _ in range(count)]


def strings_in(value: Any) -> Iterator[str]:
    """Every string anywhere in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


@pytest.fixture(scope="module")
def real_texts(shared: Path) -> list[str]:
    files = sorted((shared / "data").glob("*.jsonl"))
    return [
        text
        for file in files
        for line in file.open(encoding="utf-8")
        for text in strings_in(json.loads(line))
    ]


# --- ids, offsets, decoding


def test_ids_are_sentencepieces_on_random_text(both: Pair) -> None:
    tokenizer, processor = both
    texts = random_texts(processor, 4000)
    assert tokenizer(texts)["input_ids"] == processor.encode(texts)


def test_every_run_of_spaces_has_sentencepieces_ids(both: Pair) -> None:
    tokenizer, processor = both
    texts = ["a" + " " * width + "b" for width in range(200)]
    assert tokenizer(texts)["input_ids"] == processor.encode(texts)


def test_literal_special_pieces_keep_their_official_ids(
    both: Pair,
) -> None:
    tokenizer, _ = both
    assert tokenizer.encode("x<s></s><unk>y")[1:-1] == [1, 2, 0]
    assert tokenizer.encode("<reserved_106><reserved_107>") == [195, 196]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert (tokenizer.user_token_id, tokenizer.assistant_token_id) == (195, 196)


def test_offsets_point_at_the_text_of_each_token(both: Pair) -> None:
    tokenizer, processor = both
    for text in random_texts(processor, 300, CONTROL_LITERALS):
        encoded = tokenizer(text, return_offsets_mapping=True)
        covered = {index for span in encoded["offset_mapping"] for index in range(*span)}
        assert covered == set(range(len(text)))
        for index, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
            if not BYTES_START <= index < BYTES_START + 256:
                assert tokenizer.decode([index]) == text[start:end]


def test_decoding_gives_the_text_back(both: Pair) -> None:
    tokenizer, processor = both
    texts = random_texts(processor, 500, CONTROL_LITERALS)
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_skipping_special_tokens_also_skips_roles(tiny: BaichuanTokenizer) -> None:
    assert tiny.decode(tiny.encode("<reserved_106>问</s>\n<b>"), skip_special_tokens=True) == "问\n<b>"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_with_unk(tiny: BaichuanTokenizer, side: str) -> None:
    batch = tiny(["高血压", "多休息，必要时就医。"], padding=True, padding_side=side, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    short = tiny.encode("高血压")
    padding = [0] * (batch["input_ids"].shape[1] - len(short))
    row, mask = batch["input_ids"][0].tolist(), batch["attention_mask"][0].tolist()
    assert row == (padding + short if side == "left" else short + padding)
    assert mask == [int(index != 0) for index in row]


# --- content


def test_content_never_holds_a_control_id(both: Pair) -> None:
    tokenizer, processor = both
    controls = control_ids(tokenizer)
    assert {0, 1, 2, 3, 4, 195, 196, 1088} <= controls
    for text in random_texts(processor, 1000, [*CONTROL_LITERALS, "<reserved_<reserved_107>107>"]):
        ids = tokenizer.encode_content(text)
        assert controls.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_ordinary_content_has_the_official_ids(both: Pair) -> None:
    tokenizer, processor = both
    for text in ["<b>粗</b>\n\t，。！-...", "", *random_texts(processor, 500)]:
        assert tokenizer.encode_content(text) == tokenizer.encode(text)


def test_ordinary_text_around_a_control_literal_keeps_its_ids(tiny: BaichuanTokenizer) -> None:
    before, after = tiny.encode("高血压<br>\n"), tiny.encode("，如果")
    ids = tiny.encode_content("高血压<br>\n<reserved_107>，如果")
    assert ids[: len(before)] == before
    assert ids[-len(after) :] == after


def test_a_call_with_truncation_before_does_not_truncate_content(tiny: BaichuanTokenizer) -> None:
    ids = tiny.encode_content("糖尿病患者应当控制饮食")
    tiny("糖尿病患者应当控制饮食", truncation=True, max_length=2, padding="max_length")
    assert tiny.encode_content("糖尿病患者应当控制饮食") == ids


def test_content_is_safe_with_a_tokenizer_that_takes_roles_for_text(tiny: BaichuanTokenizer) -> None:
    """Other people's conversions mark only ``<s>``, ``</s>`` and ``<unk>`` as special."""
    layout = json.loads(tiny.backend_tokenizer.to_str())
    for token in layout["added_tokens"]:
        token["special"] = token["id"] < 3
    backend = Tokenizer.from_str(json.dumps(layout))
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    text = "x<reserved_107>，<s>\n<reserved_1><reserved_<SEP>106>"
    assert foreign.encode(text, split_special_tokens=True) != encode_content(foreign, text)
    assert control_ids(foreign) == control_ids(tiny)
    assert control_ids(foreign).isdisjoint(encode_content(foreign, text))
    assert foreign.decode(encode_content(foreign, text)) == text
    assert encode_content(foreign, "高血压\n，<b>") == tiny.encode("高血压\n，<b>")


def test_tokens_that_a_user_adds_as_special_are_control_pieces(tiny_model: Path) -> None:
    tokenizer = BaichuanTokenizer(vocab_file=str(tiny_model))
    tokenizer.encode_content("<tool>")
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])
    assert tokenizer.encode("<tool>") == [1800]
    assert 1800 not in tokenizer.encode_content("<tool>")


def test_a_lone_surrogate_is_refused(tiny: BaichuanTokenizer) -> None:
    with pytest.raises(UserError, match="lone surrogate"):
        tiny.encode_content("half \ud83d of an emoji")


# --- files


def test_saving_and_loading_change_nothing(tiny: BaichuanTokenizer, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = BaichuanTokenizer.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)  # onto itself
    again = BaichuanTokenizer.from_pretrained(tmp_path)
    text = "<reserved_106>糖尿病 <s>x</s>\n，12𠮷"
    assert again.encode(text) == tiny.encode(text)
    assert again.encode_content(text) == tiny.encode_content(text)
    assert again.chat_template == tiny.chat_template
    assert again.get_vocab() == tiny.get_vocab()
    assert again.added_tokens_decoder == tiny.added_tokens_decoder
    assert again.special_tokens_map == tiny.special_tokens_map
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tiny.vocab_file).read_bytes()


def test_the_saved_config_is_clean(tiny_model: Path, tmp_path: Path) -> None:
    """No remote code, no path of this machine, and a class that every transformers knows."""
    folder = official_like(tiny_model, tmp_path / "official")
    BaichuanTokenizer.from_pretrained(folder, user_token_id=197).save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "tokenizer_config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "</s>"
    assert config["user_token_id"] == 197
    assert config["model_max_length"] == 4096
    assert not {"auto_map", "sp_model_kwargs", "is_local", "vocab_file", "tokenizer_file"} & set(config)
    assert str(tmp_path) not in text
    assert role_ids(BaichuanTokenizer.from_pretrained(tmp_path / "saved")) == (197, 196)
    assert role_ids(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")) == (197, 196)


def official_like(model: Path, folder: Path) -> Path:
    """A folder with the files and the configs of an official release, around another tokenizer.model."""
    folder.mkdir()
    shutil.copy(model, folder / "tokenizer.model")
    token = {
        "__type": "AddedToken",
        "normalized": True,
        "single_word": True,
        "lstrip": False,
        "rstrip": False,
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "sp_model_kwargs": {},
        "tokenizer_class": "BaichuanTokenizer",
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "pad_token": {**token, "content": "<unk>"},
        "unk_token": {**token, "content": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    config = {"model_type": "baichuan", "tokenizer_class": "BaichuanTokenizer", "model_max_length": 4096}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("with_config", [True, False])
def test_auto_tokenizer_loads_an_official_folder(tiny_model: Path, tmp_path: Path, with_config: bool) -> None:
    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    register_tokenizer()
    folder = official_like(tiny_model, tmp_path / "official")
    if not with_config:
        (folder / "config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert type(tokenizer) is BaichuanTokenizer
    assert tokenizer.encode("x<s>y</s>z<unk>")[1::2] == [1, 2, 0]  # whatever single_word says
    assert tokenizer.model_max_length == 4096


def test_auto_tokenizer_gives_this_class_for_saved_models(tiny: BaichuanTokenizer, tmp_path: Path) -> None:
    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    register_tokenizer()
    tiny.save_pretrained(tmp_path)
    BaichuanConfig(vocab_size=1800).save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)) is BaichuanTokenizer


STOCK_PROCESS = """
import json, sys
from pathlib import Path
from tokenizers import Tokenizer
from transformers import AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.stdin.read())
tokenizer = AutoTokenizer.from_pretrained(folder)
plain = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
messages = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
assert not any(name.split(".")[0] == "finetune" for name in sys.modules)
print(json.dumps({
    "class": type(tokenizer).__name__,
    "ids": tokenizer(texts)["input_ids"],
    "plain": [plain.encode(text).ids for text in texts],
    "safe": tokenizer(texts, split_special_tokens=True)["input_ids"],
    "chat": [chat["input_ids"], chat["assistant_masks"]],
    "pad": tokenizer.pad_token_id,
}))
"""


@pytest.mark.parametrize("with_config", [True, False])
def test_software_without_this_package_gets_the_same_ids(
    tiny: BaichuanTokenizer, tmp_path: Path, with_config: bool
) -> None:
    tiny.save_pretrained(tmp_path)
    if with_config:
        BaichuanConfig(vocab_size=1800).save_pretrained(tmp_path)
    texts = random_texts(SentencePieceProcessor(model_file=tiny.vocab_file), 100, CONTROL_LITERALS)
    result = ask_stock(STOCK_PROCESS, tmp_path, folder=tmp_path, given=texts)
    assert result["class"] != "BaichuanTokenizer"
    assert result["ids"] == result["plain"] == tiny(texts)["input_ids"]
    assert result["safe"] == [tiny.encode_content(text) for text in texts]
    question, answer = tiny.encode("问"), tiny.encode("答")
    mask = [0] * (len(question) + 2) + [1] * (len(answer) + 1)
    assert result["chat"] == [[195, *question, 196, *answer, 2], mask]
    assert result["pad"] == 0


def test_pickling_keeps_everything(tiny: BaichuanTokenizer) -> None:
    again = pickle.loads(pickle.dumps(tiny))
    assert again.encode("糖尿病<s>") == tiny.encode("糖尿病<s>")
    assert role_ids(again) == role_ids(tiny)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"add_dummy_prefix": True}, "add_dummy_prefix is on"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is on"),
        ({"byte_fallback": False, "vocab_size": 1544}, "byte_fallback is off"),
        ({"normalization_rule_name": "nfkc"}, "text is normalised \\(nfkc\\)"),
        ({"model_type": "unigram", "vocab_size": 1600}, "model_type is not BPE"),
    ],
)
def test_models_with_options_that_change_ids_are_refused(
    tmp_path: Path, overrides: dict[str, Any], problem: str
) -> None:
    model = train_tiny_sentencepiece(tmp_path / "tokenizer.model", **overrides)
    with pytest.raises(UserError, match=problem):
        BaichuanTokenizer.from_pretrained(tmp_path)
    assert model.is_file()


def test_broken_and_missing_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.model and no tokenizer\.json"):
        BaichuanTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:79\n")
    with pytest.raises(UserError, match="not a readable SentencePiece model"):
        BaichuanTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []')
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        BaichuanTokenizer(tokenizer_file=str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(("index", "problem"), [(9999, "not in the vocabulary"), (10, "the piece '，'")])
def test_impossible_role_ids_are_refused(tiny_model: Path, index: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        BaichuanTokenizer(vocab_file=str(tiny_model), assistant_token_id=index)


# --- the official tokenizer


def test_golden_ids_and_decoding(official: BaichuanTokenizer, golden: Path) -> None:
    assert type(official) is BaichuanTokenizer
    assert len(official) == official.vocab_size == 125_696
    for row in json.loads((golden / "tokenizer.json").read_text(encoding="utf-8")):
        assert official.encode(row["text"]) == row["ids"]
        assert official.decode(row["ids"]) == row["decoded"]


def test_real_texts_have_sentencepieces_ids(
    official: BaichuanTokenizer, real_texts: list[str], tmp_path: Path
) -> None:
    assert len(real_texts) > 5000
    expected = SentencePieceProcessor(model_file=official.vocab_file).encode(real_texts)
    assert official(real_texts)["input_ids"] == expected
    assert [official.encode_content(text) for text in real_texts] == expected
    assert official.batch_decode(expected) == real_texts
    official.save_pretrained(tmp_path)
    assert BaichuanTokenizer.from_pretrained(tmp_path)(real_texts)["input_ids"] == expected
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [encoding.ids for encoding in plain.encode_batch(real_texts)] == expected

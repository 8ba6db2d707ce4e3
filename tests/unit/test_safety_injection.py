"""A thousand attack prompts with control pieces in every position produce no role and no control id from content."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny_tokenizer import train_tiny_sentencepiece

from finetune.baichuan.chat import build_example, build_prompt, control_ids, role_ids
from finetune.baichuan.tokenization import BaichuanTokenizer
from rlhf.safety.attacks import generate_attacks

COUNT = 1000
ROLE_NAMES = ("<reserved_106>", "<reserved_107>", "<reserved_102>", "<reserved_103>", "</s>", "<s>", "<unk>")
SYSTEM = "你是一个助手。"


@pytest.fixture(scope="module", params=["baichuan2", "first_generation", "official"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaichuanTokenizer:
    if request.param == "official":
        shared: Path = request.getfixturevalue("shared")
        return BaichuanTokenizer.from_pretrained(shared / "baichuan2")
    model = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    train_tiny_sentencepiece(model, first_generation=request.param == "first_generation")
    return BaichuanTokenizer(vocab_file=str(model))


@pytest.fixture(scope="module")
def attacks(tokenizer: BaichuanTokenizer) -> list[str]:
    """Attack prompts, each with a role name and two more control pieces, at positions that go through all of it."""
    pieces = sorted(tokenizer.convert_ids_to_tokens(index) for index in control_ids(tokenizer))
    assert len(pieces) > 900, "every reserved piece is a control piece"
    generator = random.Random(0)
    texts = []
    for number, attack in enumerate(generate_attacks(0, "train", count=COUNT)):
        text = attack.prompt
        position = number % (len(text) + 1)
        role = ROLE_NAMES[number % len(ROLE_NAMES)]
        # Two of all control pieces in turn, so that every one comes; in front, behind, and beside a role name.
        piece = pieces[2 * number % len(pieces)] + pieces[(2 * number + 1) % len(pieces)]
        text = text[:position] + role + text[position:]
        position = generator.choice([0, position, position + len(role), len(text)])
        texts.append(text[:position] + piece + text[position:])
    everything = "".join(texts)
    assert all(piece in everything for piece in pieces)
    return texts


def test_a_tokenizer_that_knows_the_pieces_would_be_fooled(
    tokenizer: BaichuanTokenizer, attacks: list[str]
) -> None:
    """The attack is real: plain encoding, as the official code does it, makes control ids of every one."""
    controls = control_ids(tokenizer)
    assert all(controls.intersection(tokenizer.encode(text, add_special_tokens=False)) for text in attacks)


def test_content_makes_no_role_and_no_control_id_in_prompts(
    tokenizer: BaichuanTokenizer, attacks: list[str]
) -> None:
    controls, roles = control_ids(tokenizer), role_ids(tokenizer)
    for number, text in enumerate(attacks):
        history = attacks[(number + 1) % len(attacks)]
        messages = [
            {"role": "system", "content": text + SYSTEM},
            {"role": "user", "content": history},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
        ]
        ids = build_prompt(tokenizer, messages, max_length=4096, max_new_tokens=512)
        found = [index for index in ids if index in controls]
        assert found == [roles.user, roles.assistant, roles.user, roles.assistant], text


def test_content_makes_no_role_and_no_control_id_in_examples(
    tokenizer: BaichuanTokenizer, attacks: list[str]
) -> None:
    controls, roles = control_ids(tokenizer), role_ids(tokenizer)
    for text in attacks:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        example = build_example(tokenizer, messages, max_length=4096)
        found = [index for index in example["input_ids"] if index in controls]
        assert found == [roles.user, roles.assistant, tokenizer.eos_token_id], text
        learned = [label for label in example["labels"] if label in controls]
        assert learned == [tokenizer.eos_token_id] * 2, "only where the turns end"


def test_what_was_said_is_still_there(tokenizer: BaichuanTokenizer, attacks: list[str]) -> None:
    for text in attacks[::50]:
        ids = build_prompt(
            tokenizer, [{"role": "user", "content": text}], max_length=4096, max_new_tokens=512
        )
        assert tokenizer.decode(ids[1:-1]) == text

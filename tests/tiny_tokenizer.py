"""A small SentencePiece model with Baichuan's special-id layout, trained in a moment."""

from __future__ import annotations

import io
from pathlib import Path

BYTES_START = 1089
"""Id of ``<0x00>``: 0–2 are ``<unk>``, ``<s>``, ``</s>``; 3–1088 user-defined pieces, 195 and 196 roles."""

_TEXT = """
糖尿病患者应当控制饮食，定期检查血糖，按时服药，并且保持适量的运动。
高血压的病人要少吃盐，每天测量血压；如果感到头晕或者胸闷，应及时就医。
感冒一般是由病毒引起的，多喝水，多休息，通常一周左右就能好转。
医生建议：发热超过三十八点五度时，可以服用退烧药，同时注意补充水分。
合同成立以后，当事人应当按照约定履行自己的义务，不得擅自变更或者解除。
从前有座山，山里有座庙，庙里有个老和尚在讲故事。讲的是什么故事呢？
今天的天气很好，我们一起去公园散步吧！孩子们在草地上放风筝，非常高兴。
北京是中国的首都，也是一座有三千多年历史的城市，名胜古迹数不胜数。
The patient should take the medicine twice a day and rest for at least one week.
The quick brown fox jumps over the lazy dog, and then it rests in the shade of a tree.
Blood pressure is the pressure of blood pushing against the walls of the arteries.
def add(left, right):
    return left + right
for index in range(10):
        print(index, "reserved", index * 2)
问：什么是高血压？答：收缩压达到140毫米汞柱或者舒张压达到90毫米汞柱。
问：头痛怎么办？答：多休息，必要时就医。如果持续两天以上，请到医院检查。
2026年11月22日，体温36.8度，血压120/80，血糖5.6，体重65公斤。
"""


def user_defined_pieces(first_generation: bool = False) -> list[str]:
    """Pieces 3–1088, roles at 195 and 196 under the names that the generation gives them."""
    text_like = ["<SEP>", "<CLS>", "\n", "\t", "<b>", "</b>", "<br>", "，", "。", "！", "？", "-", "...", "."]
    first_reserved = 93 if first_generation else 89  # 195 is <reserved_102> there, <reserved_106> since
    filler = [f"<tag_{index}>" for index in range(3 + len(text_like), first_reserved)]
    reserved = [f"<reserved_{index}>" for index in range(BYTES_START - first_reserved)]
    return text_like + filler + reserved


def train_tiny_sentencepiece(
    path: str | Path, vocab_size: int = 1800, *, first_generation: bool = False, **overrides: object
) -> Path:
    """Train a BPE model with Baichuan's options and write it.

    Args:
        path: the ``tokenizer.model`` to write.
        vocab_size: pieces in all, of which 1,345 are special or bytes; the text has enough for 2,445.
        first_generation: name the role pieces as first-generation models do.
        overrides: SentencePiece trainer options to set otherwise.

    Returns:
        The path.
    """
    import sentencepiece

    sink = io.BytesIO()
    options = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "user_defined_symbols": user_defined_pieces(first_generation),
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.995,
        "pad_id": -1,
        "minloglevel": 2,
        **overrides,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.strip().splitlines()), model_writer=sink, **options
    )
    path = Path(path)
    path.write_bytes(sink.getvalue())
    return path

"""Which category a prompt belongs to, by the language model itself: the likelihood of the categories' names.

Tier by tier, the model is asked what kind of question it is and each candidate name is scored as the answer.
What the model would say anyhow is taken off: the score of the same name where the question is left out
(domain-conditional PMI, Holtzman et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.data.progress import progress_bar
from rlhf.taxonomy.classifier import HEAD, TAIL, THRESHOLD, Prediction
from rlhf.taxonomy.tree import Taxonomy

if TYPE_CHECKING:
    from finetune.baichuan.tokenization import BaichuanTokenizer

QUESTION = "下面是用户提的一个问题。\n{prompt}\n这个问题属于哪一类？只回答类别的名称。可选的类别有：{names}。"
MAX_LENGTH = 2048


class LikelihoodClassifier:
    """The model chooses a primary category, then among its secondary ones, then among the tertiary ones.

    Args:
        model: causal LM, on any device.
        tokenizer: its tokenizer.
        taxonomy: what is told apart.
    """

    def __init__(self, model: Any, tokenizer: BaichuanTokenizer, taxonomy: Taxonomy) -> None:
        self._model, self._tokenizer, self._taxonomy = model, tokenizer, taxonomy
        self._priors: dict[tuple[str, ...], list[float]] = {}

    def predict(self, prompts: Sequence[str], *, threshold: float = THRESHOLD) -> list[Prediction]:
        """The category of each prompt; the confidence of a tier is that of all choices down to it."""
        found = []
        with progress_bar("classifying", len(prompts)) as advance:
            for prompt in prompts:
                found.append(self._descend(prompt, threshold))
                advance(1)
        return found

    def _descend(self, prompt: str, threshold: float) -> Prediction:
        path: list[str] = []
        confidence: list[float] = []
        candidates = self._taxonomy.tiers[0]
        for _ in range(3):
            shares = self.choose(prompt, [each.zh for each in candidates])
            best = max(range(len(shares)), key=shares.__getitem__)
            path.append(candidates[best].id)
            confidence.append(shares[best] * (confidence[-1] if confidence else 1.0))
            candidates = self._taxonomy.children(path[-1]) if len(path) < 3 else ()
        return Prediction(
            (path[0], path[1], path[2]), (confidence[0], confidence[1], confidence[2]), threshold
        )

    def choose(self, prompt: str, names: Sequence[str]) -> list[float]:
        """Probability of each name as the answer, 0 to 1, with sum 1."""
        import torch

        key = tuple(names)
        if key not in self._priors:
            self._priors[key] = self._scores("", names)
        if len(prompt) > HEAD + TAIL:
            prompt = f"{prompt[:HEAD]}…{prompt[-TAIL:]}"
        scores = torch.tensor(self._scores(prompt, names)) - torch.tensor(self._priors[key])
        return scores.softmax(0).tolist()

    def _scores(self, prompt: str, names: Sequence[str]) -> list[float]:
        """Log-likelihood of each name, to its end, after the question."""
        import torch

        from finetune.baichuan.chat import build_prompt, encode_content

        question = QUESTION.format(prompt=prompt, names="、".join(names))
        messages = [{"role": "user", "content": question}]
        context = build_prompt(self._tokenizer, messages, max_length=MAX_LENGTH, max_new_tokens=64)
        answers = [[*encode_content(self._tokenizer, name), self._tokenizer.eos_token_id] for name in names]
        width = max(map(len, answers))
        device = next(self._model.parameters()).device
        # Padded on the right: what stands behind a name cannot change its likelihood.
        ids = torch.tensor(
            [context + answer + [0] * (width - len(answer)) for answer in answers], device=device
        )
        with torch.no_grad():
            logits = self._model(input_ids=ids, logits_to_keep=width + 1).logits[:, :-1].float()
        tokens = ids[:, len(context) :]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        mask = torch.arange(width, device=device) < torch.tensor([[len(a)] for a in answers], device=device)
        return (logprobs * mask).sum(1).tolist()

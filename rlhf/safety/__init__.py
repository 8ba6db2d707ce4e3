"""Safety: what must not be said, prompts that try for it, judging answers, and reports of red-teaming.

Everything in `data/` names risks and teaches none: prompts are short requests as published benchmarks show
them, and unsafe sample answers agree to do something without saying anything that could be used.

| module      | what                                                                        |
|-------------|-----------------------------------------------------------------------------|
| `taxonomy`  | types of attack and safety values, extended by overlays                     |
| `attacks`   | prompts: generated, fixed, harmless ones that look dangerous, a user's own  |
| `responses` | answers of four qualities to an attack, for preference data                 |
| `judges`    | the interface of judges, tested by `agreement`: `learned` is the shipped    |
|             | one, `rules` has its signs and judges by them, `reward_judge` by a model    |
| `redteam`   | answer, judge, count, report; `results` has the numbers, `page` the HTML    |
| `supervision` | sampled answers, judged and ranked into preference data                   |
| `joining`   | helpful and harmless scores as one reward                                   |
"""

SHIPPED_JUDGE = "learned"
"""The judge that is asked by default, for `rlhf.safety.judges.load_judge`."""

RESULT_FILE = "redteam.json"
"""What red-teaming found, in the folder of a run."""

RULES_JUDGE = "rules"
REWARD_PREFIX = "reward:"

JUDGE_NAMES = f"{SHIPPED_JUDGE}, {RULES_JUDGE}, {REWARD_PREFIX}ADAPTER or package.module:function"
"""What names a judge, for messages."""

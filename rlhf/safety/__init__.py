"""Safety: what must not be said, prompts that try for it, judging answers, and reports of red-teaming.

Everything in `data/` names risks and teaches none: prompts are short requests as published benchmarks show
them, and unsafe sample answers agree to do something without saying anything that could be used.

| module      | what                                                                        |
|-------------|-----------------------------------------------------------------------------|
| `taxonomy`  | types of attack and safety values, extended by overlays                     |
| `attacks`   | prompts: generated, fixed, harmless ones that look dangerous, a user's own  |
| `responses` | answers of four qualities to an attack, for preference data                 |
| `judges`    | the interface of judges; `rules` is the shipped one, `agreement` tests one  |
| `redteam`   | answer, judge, count, report; `results` has the numbers, `page` the HTML    |
| `joining`   | helpful and harmless scores as one reward                                   |
"""

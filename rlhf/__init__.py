"""From preferences to a model that follows them: reward models, DPO and PPO on one Baichuan base.

Stands on finetune, which knows of it only what `finetune.stage_table` names.
"""

"""What people ask: a taxonomy of prompts in three tiers, a classifier, coverage of data, balanced samples."""

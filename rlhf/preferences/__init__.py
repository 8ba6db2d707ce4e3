"""Preference data: files into checked, tokenised preferences, each a prompt with its responses best first."""

from rlhf.preferences.layouts import Preference, Response
from rlhf.preferences.prepare import PreferenceSet, PreparedPreferences, conversation, prepare_preferences
from rlhf.preferences.report import PreferenceReport

__all__ = [
    "Preference",
    "PreferenceReport",
    "PreferenceSet",
    "PreparedPreferences",
    "Response",
    "conversation",
    "prepare_preferences",
]

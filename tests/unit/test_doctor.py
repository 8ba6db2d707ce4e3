"""finetune doctor: what is here, what is missing, and for what."""

from __future__ import annotations

import sys

import pytest
import torch
from fake_stage import call

from finetune import doctor


def test_doctor_finds_what_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    result = call("doctor")
    assert result.exit_code == 0, result.stdout
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["ok", "torch"] for line in lines)
    assert any(line.split() == ["--", "HF_HUB_OFFLINE", "1"] for line in lines)
    assert any(line.split() == ["ok", "TRANSFORMERS_OFFLINE", "0"] for line in lines)


def test_doctor_says_what_is_missing_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": None, "peft": "0.1", "transformers": "6.0"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    findings = {finding.name: finding for finding in doctor.packages()}
    assert findings["torch"].state == "missing"
    assert findings["torch"].advice.startswith("needed for tensors and training: pip install 'torch>=")
    assert findings["peft"].value.startswith("0.1, expected >=")
    assert findings["transformers"].state == "missing"
    assert findings["accelerate"].state == "ok"
    assert call("doctor").exit_code == 2


def test_doctor_knows_every_range_of_the_project() -> None:
    ranges = doctor._requirements()
    assert set(doctor._REQUIRED) <= set(ranges)
    assert all(ranges[name] for name in doctor._REQUIRED)


def test_doctor_notes_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    findings = list(doctor.options())
    assert {finding.state for finding in findings} == {"note"}
    assert all(finding.advice.startswith("for ") and "pip install" in finding.advice for finding in findings)


def test_doctor_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert [finding.state for finding in doctor.devices()] == ["missing"]
    assert [finding.state for finding in doctor.attention()] == ["missing"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_doctor_says_what_auto_attention_is() -> None:
    found = {finding.name: finding.value for finding in doctor.attention()}
    assert set(found) == {"RoPE (7B)", "ALiBi (13B)"}
    assert all(value.startswith("attention sdpa (torch's kernel") for value in found.values())

"""One detector of secrets: whole values of at least 12 characters, found by the names of variables."""

from __future__ import annotations

import pytest

from casehard.errors import ConfigError
from casehard.io import secrets

VALUE = "hf_0123456789abcdef"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "openai_api_key", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_SECRET_2", "APIKEY"]
)
def test_names_of_secrets(name):
    assert secrets.is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "max_new_tokens_at", "pad_token", "MONKEY", "HF_TOKEN_PATH"]
)
def test_names_of_other_things(name):
    assert not secrets.is_secret_name(name)


def test_values_are_found_whole_and_only_long_ones(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    monkeypatch.setenv("SHORT_KEY", "transformer")
    given = {
        "url": f"https://x:{VALUE}@host",
        "list": [VALUE, f"{VALUE}9", f"a{VALUE}"],
        "note": "transformer",
        "hub_token": "typed by hand",
        "hub_key": None,
        "lr": 1e-3,
    }
    assert secrets.redact(given) == {
        "url": "https://x:[redacted]@host",
        "list": ["[redacted]", f"{VALUE}9", f"a{VALUE}"],
        "note": "transformer",
        "hub_token": "[redacted]",
        "hub_key": None,
        "lr": 1e-3,
    }


def test_settings_with_a_secret_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)
    secrets.refuse({"lr": 1, "system": "be kind"}, where="defend")
    with pytest.raises(
        ConfigError, match=r"defend\.data\.1 holds the value of the environment variable HF_TOKEN"
    ) as told:
        secrets.refuse({"data": ["a.jsonl", f"hub:{VALUE}"]}, where="defend")
    assert VALUE not in str(told.value)

"""Secrets are told by their form and by the name they are given."""

import pytest

from rlhfjax.config import build
from rlhfjax.errors import ConfigError
from rlhfjax.mesh import MeshConfig
from rlhfjax.redact import has_form, is_secret, printable, redact

SECRETS = [
    "sk-" + "a1b2" * 8,
    "sk-proj-abc123DEF456ghi789jkl",
    "sk-ant-api03-abcdefghijklmno1-23",
    "hf_" + "aB" * 15,
    "ghp_" + "a1" * 18,
    "github_pat_" + "a1b2" * 10,
    "AKIA" + "IOSFODNN7EXAMPLE",
    "AIza" + "a" * 35,
    "xoxb-1234567890-abcdef",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def",
    "Bearer abcdef1234567890",
    "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
]
WORDS = [
    "sk-learn-compatible-estimators",
    "task-abcdefghij12345678901234",
    "2026-11-29T10:00:00",
    "http://localhost:8000/v1",
    "gs://b/x@10",
    "user@host:path",
    "0123456789abcdef" * 2 + "01234567",  # of a commit
    "bearer of good news in 2026",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_form_is_hidden_wherever_it_stands(secret):
    assert redact(f'x --flag="{secret}" y', {}) == 'x --flag="***" y'
    assert is_secret("ANY", secret) and is_secret("ppo.truncate.token", secret)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_no_secret(word):
    assert not has_form(word) and redact(f"x={word}", {}) == f"x={word}"


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("OPENAI_KEY", "abcdefgh", True),
        ("WANDB_API_KEY", "0a" * 20, True),
        ("DB_PASSWORD", "12345678", True),
        ("config.wandb_api_key", "abcdefgh", True),
        ("SORT_KEY", "name", False),
        ("MONKEY", "abcdefgh", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/x/key.json", False),
        ("MAX_TOKENS", "100000000", False),
        ("ppo.truncate.token", "13", False),
        ("ppo.truncate.token", "<|endoftext|>", False),
        ("ppo.truncate.token", "endofsentence", False),
        ("ppo.truncate.token", "0a1b2c3d4e5f6a7b8c9d", True),
    ],
)
def test_a_name_makes_a_secret_of_a_value_that_fits(name, value, secret):
    assert is_secret(name, value) == secret
    assert (redact(f"--{name}={value}", {}) != f"--{name}={value}") == secret


def test_a_password_in_a_url_and_a_variables_value_are_hidden():
    url = "postgres://me:p%40ss@host/x"
    assert redact(f"at {url}", {}) == "at postgres://***@host/x"
    assert redact("said abcdefgh", {"A_TOKEN": "abcdefgh"}) == "said ***"
    assert redact("said python", {"EDITOR": "python"}) == "said python"


def test_a_config_holds_no_secret():
    with pytest.raises(ConfigError) as caught:
        build(MeshConfig, {"strategy": SECRETS[0]}, "ppo.mesh")
    assert "ppo.mesh.strategy=…: this is a secret" in str(caught.value)
    assert SECRETS[0] not in str(caught.value)


def test_a_message_is_one_line_without_escapes():
    assert printable("a\nb\x1b[31m\u2028é\ud800") == "a\\nb\\x1b[31m\\u2028é\\ud800"

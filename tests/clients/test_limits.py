"""Limits and budgets as openai-python sees them: its own exception, and figures in headers."""

import hashlib
import json
import secrets

import openai
import pytest

from conftest import client_of
from servers import Gateway, upstream

pytestmark = pytest.mark.gateway

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}], "max_tokens": 5}


@pytest.fixture
def limited(start, llamas, tmp_path):
    """Starts a gateway with these plugins behind `auth`; returns it and the keys' tokens."""

    def begin(plugins, **more):
        tokens = {name: secrets.token_urlsafe(32) for name in ("greedy", "modest")}
        keys = [
            {"name": name, "sha256": hashlib.sha256(token.encode()).hexdigest()}
            for name, token in tokens.items()
        ]
        (tmp_path / "keys.yaml").write_text(json.dumps({"keys": keys}))
        config = {
            "plugins": [{"auth": {"keys_file": str(tmp_path / "keys.yaml")}}, *plugins],
            "groups": {"gpus": {"upstreams": [upstream("llama-1", llamas["llama-1"])]}},
            "routes": [{"model": "tiny", "groups": ["gpus"]}],
            **more,
        }
        return start(Gateway, config, tmp_path), tokens

    return begin


def test_a_limit_is_told_in_headers_and_as_a_rate_limit_error(limited):
    gateway, tokens = limited([{"rate_limit": {"requests": "2/day", "tokens": "100k/day"}}])
    with client_of(gateway, tokens["greedy"]) as greedy:
        for left in (1, 0):
            raw = greedy.chat.completions.with_raw_response.create(**ASK)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
            assert raw.headers["x-ratelimit-limit-tokens"] == "100000"
            assert int(raw.headers["x-ratelimit-remaining-tokens"]) < 100_000
            assert raw.headers["x-ratelimit-reset-tokens"].endswith("s")
            assert raw.parse().choices
        with pytest.raises(openai.RateLimitError) as refused:
            greedy.chat.completions.create(**ASK)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.type == "requests"
    assert refused.value.request_id
    assert int(refused.value.response.headers["retry-after"]) > 3600
    with client_of(gateway, tokens["modest"]) as modest:
        assert modest.chat.completions.create(**ASK).choices


def test_the_clients_own_retries_wait_as_long_as_they_are_told(limited):
    gateway, tokens = limited([{"rate_limit": {"requests": "1/s"}}])
    with client_of(gateway, tokens["greedy"]).with_options(max_retries=5) as client:
        for _ in range(4):
            assert client.chat.completions.create(**ASK).choices


def test_a_budget_that_is_used_up_is_a_rate_limit_error_without_retries(limited):
    plugins = [{"budget": {"month": {"tokens": 1}}}]
    gateway, tokens = limited(plugins, store="sqlite:forebay.db")
    with client_of(gateway, tokens["greedy"]).with_options(max_retries=5) as client:
        assert client.chat.completions.create(**ASK).choices
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**ASK)
    assert refused.value.code == "insufficient_quota"
    assert refused.value.response.headers["x-should-retry"] == "false"

"""Keys: the clients' own, and the one that the gateway shows to the server."""

import hashlib
import json
import secrets

import openai
import pytest

from conftest import client_of
from servers import Gateway, LlamaCpp, upstream
from tiny_model import SENTENCE

pytestmark = pytest.mark.gateway

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Say"}], "temperature": 0}


@pytest.fixture
def keyed(start, model, tmp_path):
    """A gateway that asks for a key, before a server that asks for another one."""
    tokens = {name: secrets.token_urlsafe(32) for name in ("alice", "bob", "server")}
    keys = [
        {"name": name, "sha256": hashlib.sha256(tokens[name].encode()).hexdigest(), **more}
        for name, more in {
            "alice": {"models": ["*"], "pin": True},
            "bob": {"models": ["other"]},
        }.items()
    ]
    (tmp_path / "keys.yaml").write_text(json.dumps({"keys": keys}))
    llama = start(LlamaCpp, "keyed", model, arguments=["--api-key", tokens["server"]])
    config = {
        "plugins": [{"auth": {"keys_file": str(tmp_path / "keys.yaml")}}],
        "groups": {"gpus": {"upstreams": [upstream("keyed", llama, key="env:SERVER_KEY")]}},
        "routes": [{"model": "tiny", "groups": ["gpus"]}, {"model": "other", "groups": ["gpus"]}],
    }
    gateway = start(Gateway, config, tmp_path, env={"SERVER_KEY": tokens["server"]})
    return gateway, tokens


def test_a_good_key_is_answered_by_a_server_with_a_key_of_its_own(keyed):
    gateway, tokens = keyed
    with client_of(gateway, tokens["alice"]) as alice:
        assert alice.chat.completions.create(**ASK).choices[0].message.content == SENTENCE


@pytest.mark.parametrize("key", ["wrong", "server"])
def test_a_key_that_is_not_in_the_file_is_an_authentication_error(keyed, key):
    gateway, tokens = keyed
    with client_of(gateway, tokens.get(key, key)) as stranger:
        with pytest.raises(openai.AuthenticationError) as refused:
            stranger.chat.completions.create(**ASK)
    assert refused.value.request_id


def test_a_model_that_a_key_may_not_use_is_denied(keyed):
    gateway, tokens = keyed
    with client_of(gateway, tokens["bob"]) as bob:
        with pytest.raises(openai.PermissionDeniedError):
            bob.chat.completions.create(**ASK)
        allowed = bob.chat.completions.create(**{**ASK, "model": "other"})
    assert allowed.choices[0].message.content == SENTENCE

"""openai-node, and Node's own HTTP/2, through the gateway: see `openai_node.mjs`."""

import pytest

from test_openai_python import idle_soon
from tiny_model import SENTENCE


@pytest.mark.parametrize("case", ["chat", "stream"])
def test_openai_node_reads_the_same_text(node, case):
    assert node(case).strip() == SENTENCE


def test_openai_node_raises_its_own_type_of_error(node):
    assert node("error").split() == ["BadRequestError", "400"]


@pytest.mark.gateway
def test_openai_node_does_not_find_an_unknown_model(node):
    assert node("unknown-model").split() == ["NotFoundError", "404"]


def test_openai_node_stops_the_server_by_leaving(node, llamas):
    assert node("abort").strip() == "The"
    idle_soon(llamas)


@pytest.mark.gateway
def test_http2_without_tls_streams_two_answers_on_one_connection(node):
    assert node("h2c").splitlines() == [f"llama {SENTENCE}"] * 2

"""Research mode: real clients of search engines and of OpenAI agree with what Forebay does."""

import pytest
from ddgs.engines.duckduckgo import Duckduckgo

from conftest import client_of
from servers import Gateway, Search, Simulator, upstream

pytestmark = pytest.mark.gateway

QUESTION = "Who is the president of Vietnam today?"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}


@pytest.fixture
def search(start):
    return start(Search, "search")


@pytest.fixture
def research(start, search, tmp_path):
    """Returns a function that starts a gateway with these retrievers and returns a client of it."""

    def begin(*retrievers, **settings):
        model = start(Simulator, "model")
        config = {
            "plugins": [{"auth": "none"}, {"rag": {"retrievers": list(retrievers), **settings}}],
            "groups": {"gpus": {"upstreams": [upstream("gpu-1", model, "vllm")]}},
            "routes": [{"model": "tiny", "groups": ["gpus"]}],
        }
        return client_of(start(Gateway, config, tmp_path))

    return begin


def duckduckgo(search):
    return {"duckduckgo": {"url": f"{search.url}/html/"}}


def searxng(search):
    return {"searxng": {"url": search.url}}


def cited(text, annotation):
    """Returns what an annotation is about, in the text that it is an annotation of."""
    citation = getattr(annotation, "url_citation", annotation)
    return text[citation.start_index : citation.end_index]


def test_the_standin_is_taken_for_duckduckgo_by_its_real_client(search):
    engine = Duckduckgo(timeout=10)
    engine.search_url = f"{search.url}/html/"
    found = engine.search(QUESTION)
    assert len(found) == 10, "the advertisement is none"
    assert found[0].href.startswith("https://part1.example.com/read?q=Who")
    assert found[0].title == f"{QUESTION}: part 1"
    assert found[0].body == f"Part 1 tells all about {QUESTION} & more."


@pytest.mark.parametrize("engine", [duckduckgo, searxng])
def test_annotations_are_what_openai_python_expects(research, search, engine):
    with research(engine(search)) as client:
        answer = client.chat.completions.with_raw_response.create(
            **ASK, extra_body={"research_mode": True}
        )
        assert answer.headers["x-forebay-rag"] == "ok"
        message = answer.parse().choices[0].message
    assert message.content.startswith("model answers:")
    assert [cited(message.content, one) for one in message.annotations] == ["[1]", "[2]", "[3]"]
    first = message.annotations[0]
    assert first.type == "url_citation"
    assert first.url_citation.title == f"{QUESTION}: part 1"
    assert first.url_citation.url.startswith("https://part1.example.com/read?q=Who%20is")
    asked = search.asked()
    assert [one["query"] for one in asked] == [QUESTION]


def test_a_stream_has_them_before_its_end(research, search):
    with research(duckduckgo(search)) as client:
        stream = client.chat.completions.create(**ASK, stream=True, extra_body={"research_mode": True})
        chunks = [chunk for chunk in stream if chunk.choices]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        text = "".join(delta.content or "" for delta in deltas)
        annotations = deltas[-2].model_extra["annotations"]
        assert chunks[-1].choices[0].finish_reason
        for nth, one in enumerate(annotations, 1):
            place = one["url_citation"]
            assert text[place["start_index"] : place["end_index"]] == f"[{nth}]"
        # The helper that puts a stream together takes them too.
        with client.chat.completions.stream(**ASK, extra_body={"research_mode": True}) as stream:
            message = stream.get_final_completion().choices[0].message
        assert message.content == text
        assert [cited(text, one) for one in message.annotations] == ["[1]", "[2]", "[3]"]


def test_responses_have_their_own_shape(research, search):
    with research(searxng(search)) as client:
        ask = {"model": "tiny", "input": QUESTION, "extra_headers": {"x-forebay-research": "1"}}
        part = client.responses.create(**ask).output[-1].content[0]
        assert [cited(part.text, one) for one in part.annotations] == ["[1]", "[2]", "[3]"]
        assert part.annotations[0].url.startswith("https://part1.example.com/")
        events = list(client.responses.create(**ask, stream=True))
        numbers = [event.sequence_number for event in events]
        assert numbers == list(range(numbers[0], numbers[0] + len(events)))
        added = [event for event in events if event.type == "response.output_text.annotation.added"]
        assert len(added) == 3
        told = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert told == part.text
        last = events[-1].response.output[-1].content[0]
        assert last.text == part.text and last.annotations == part.annotations


def test_web_search_options_and_online_ask_for_it_too(research, search):
    with research(searxng(search)) as client:
        for more in ({"web_search_options": {}}, {"model": "tiny:online"}):
            message = client.chat.completions.create(**(ASK | more)).choices[0].message
            assert len(message.annotations) == 3, more


def test_an_engine_that_wants_to_see_a_human_is_passed_over(research, search):
    with research(duckduckgo(search), searxng(search)) as client:
        for word in ("captcha", "other"):
            question = {"role": "user", "content": f"What is known today about a {word} wrapped up?"}
            answer = client.chat.completions.with_raw_response.create(
                **(ASK | {"messages": [question]}), extra_body={"research_mode": True}
            )
            assert answer.headers["x-forebay-rag"] == "ok"
    assert [one["engine"] for one in search.asked()] == ["duckduckgo", "searxng", "searxng"]


def test_links_behind_the_engines_redirect_are_told_as_they_are(research, search):
    with research(duckduckgo(search)) as client:
        question = {"role": "user", "content": "What is wrapped up in this paper today?"}
        message = client.chat.completions.create(
            **(ASK | {"messages": [question]}), extra_body={"research_mode": True}
        ).choices[0].message
    urls = [one.url_citation.url for one in message.annotations]
    assert [url.split("/")[2] for url in urls] == [f"part{n}.example.com" for n in (1, 2, 3)]


@pytest.mark.parametrize("place", ["user", "system"])
def test_a_real_model_server_reads_the_results(start, search, llamas, tmp_path, place):
    llama = llamas["llama-1"]
    config = {
        "plugins": [{"auth": "none"}, {"rag": {"retrievers": [searxng(search)], "place": place}}],
        "groups": {"gpus": {"upstreams": [upstream("llama-1", llama)]}},
        "routes": [{"model": "tiny", "groups": ["gpus"]}],
    }
    with client_of(start(Gateway, config, tmp_path)) as client:
        ask = ASK | {"max_tokens": 16, "temperature": 0}
        plain = client.chat.completions.create(**ask)
        answer = client.chat.completions.create(**ask, extra_body={"research_mode": True})
        # It has read the results, and says what it says; the sources come behind.
        assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 100
        message = answer.choices[0].message
        assert [cited(message.content, one) for one in message.annotations] == ["[1]", "[2]", "[3]"]
        stream = client.chat.completions.create(**ask, stream=True, extra_body={"research_mode": True})
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == message.content

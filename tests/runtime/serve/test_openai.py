"""Does OpenAI's own client get what it expects, whole and streamed?"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2 as httpx
import openai
import pytest

from qdist.core.data.conversation import Wording
from qdist.runtime.infer.prompts import Speech
from tests.runtime.serve.fake import Echo, Started, byte_tokenizer, started, until

ASK: Any = [{"role": "user", "content": "hi"}]
ANSWER = "<user>hi<assistant>"
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@asynccontextmanager
async def client_of(server: Started, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=server.app))
    async with openai.AsyncOpenAI(
        base_url="http://127.0.0.1/v1", api_key=key, http_client=http, max_retries=0
    ) as client:
        yield client


def asking(test: Callable[[openai.AsyncOpenAI, Started], Awaitable[None]], **given: Any) -> None:
    """Run a test against a server with a client."""

    async def run() -> None:
        async with started(**given) as server, client_of(server) as client:
            await test(client, server)

    asyncio.run(run())


def test_a_chat_is_answered_by_the_model_that_it_names() -> None:
    async def test(client: openai.AsyncOpenAI, server: Started) -> None:
        for name, adapter in (("sql", "sql"), ("base", "")):
            found = await client.chat.completions.create(model=name, messages=ASK, seed=3, temperature=0.5, top_p=0.9)
            (choice,) = found.choices
            assert (choice.message.content, choice.finish_reason, found.model) == (ANSWER, "stop", name)
            assert found.usage is not None
            assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ANSWER), len(ANSWER))
            question = server.echo.seen[-1]
            assert (question.adapter, question.sampling.seed, question.sampling.top_p) == (adapter, 3, 0.9)

    asking(test)


def test_a_stream_brings_a_token_at_a_time_and_the_usage_last() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        stream = await client.chat.completions.create(
            model="sql", messages=ASK, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
        assert deltas == ["", "<", "u", "s", None]
        assert (chunks[0].choices[0].delta.role, chunks[-2].choices[0].finish_reason) == ("assistant", "length")
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert (chunks[-1].usage.completion_tokens, chunks[0].usage) == (3, None)

    asking(test)


def test_answers_to_one_prompt_differ_by_their_seeds() -> None:
    async def test(client: openai.AsyncOpenAI, server: Started) -> None:
        found = await client.chat.completions.create(model="sql", messages=ASK, n=3, seed=2**63 - 1)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert [each.sampling.seed for each in server.echo.seen] == [2**63 - 1, -(2**63), -(2**63) + 1]
        assert found.usage is not None
        assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ANSWER), 3 * len(ANSWER))

    asking(test)


def test_stop_texts_end_an_answer() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        one = await client.chat.completions.create(model="sql", messages=ASK, stop=">")
        several = await client.chat.completions.create(model="sql", messages=ASK, stop=["h", ">"])
        assert [found.choices[0].message.content for found in (one, several)] == ["<user", "<user"]

    asking(test)


def test_log_probabilities_are_told_with_each_token() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        found = await client.chat.completions.create(
            model="sql", messages=ASK, logprobs=True, top_logprobs=2, max_completion_tokens=2
        )
        told = found.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert [(each.token, each.logprob, each.bytes) for each in told.content] == [
            ("<", -0.5, [60]),
            ("u", -0.5, [117]),
        ]
        assert [each.logprob for each in told.content[0].top_logprobs] == [-0.5, -9999.0]
        stream = await client.chat.completions.create(
            model="sql", messages=ASK, logprobs=True, max_tokens=1, stream=True
        )
        told = [chunk async for chunk in stream][1].choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert told.content[0].token == "<"

    asking(test)


def test_a_text_is_gone_on_with() -> None:
    async def test(client: openai.AsyncOpenAI, server: Started) -> None:
        found = await client.completions.create(model="sql", prompt=["abc", "de"], n=2, max_tokens=2, echo=True)
        assert [choice.text for choice in found.choices] == ["abcab", "abcab", "dede", "dede"]
        ids = list(server.echo.seen[0].prompt)
        for prompt in (ids, [ids]):
            again = await client.completions.create(model="sql", prompt=prompt, max_tokens=1, logprobs=1, top_p=1)  # type: ignore[arg-type]
            told = again.choices[0].logprobs
            assert told is not None
            assert (told.tokens, told.token_logprobs, told.text_offset) == (["a"], [-0.5], [0])
            assert told.top_logprobs == [{"a": -0.5}]
        usual = await client.completions.create(model="sql", prompt="x" * 40)
        assert (usual.choices[0].text, usual.choices[0].finish_reason) == ("x" * 16, "length")

    asking(test)


def test_a_streamed_text_is_the_whole_text() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        stream = await client.completions.create(model="sql", prompt="abc", stream=True, echo=True, logprobs=None)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "abcabc"

    asking(test)


def test_models_are_listed_and_told_of_by_name() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        assert [model.id async for model in client.models.list()] == ["sql", "base"]
        assert (await client.models.retrieve("base")).owned_by == "qdist"
        with pytest.raises(openai.NotFoundError, match="there is no model 'bas' here: there are sql, base; try: base"):
            await client.chat.completions.create(model="bas", messages=ASK)

    asking(test)


def test_tools_and_their_messages_reach_the_chat_template() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 3}'}}
        talk: Any = [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "9"},
        ]
        found = await client.chat.completions.create(model="sql", messages=talk, tools=[TOOL])
        assert found.choices[0].message.content == "<system>ab<user>hi<assistant>[look 3]<tool>9(look)<assistant>"
        none = await client.chat.completions.create(model="sql", messages=ASK, tools=[TOOL], tool_choice="none")
        assert none.choices[0].message.content == ANSWER

    asking(test)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ c.function.arguments | tojson }}", '{"x": 3}'),
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ '<' + c.function.arguments + '>' }}", '<{"x": 3}>'),
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ c.function.arguments }}", '{"x": 3}'),
    ],
)
def test_templates_get_tools_and_arguments_as_they_can_write_them(template: str, wanted: str) -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"x": 3}'}}
        talk: Any = [*ASK, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "9"}]
        found = await client.chat.completions.create(model="sql", messages=talk, tools=[TOOL], max_tokens=120)
        assert found.choices[0].message.content == json.dumps(TOOL) + wanted

    whole = f"{{% for m in messages %}}{{% for c in m.tool_calls or [] %}}{template}{{% endfor %}}{{% endfor %}}"
    asking(test, speech=Speech(byte_tokenizer(whole), Wording(style="chat"), 500))


def test_tools_that_a_template_leaves_out_are_refused() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        with pytest.raises(openai.BadRequestError, match="this model's chat template writes none"):
            await client.chat.completions.create(model="sql", messages=ASK, tools=[TOOL])

    plain = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    asking(test, speech=Speech(plain, Wording(style="chat"), 256))


def test_a_run_without_a_chat_template_is_asked_in_its_own_words() -> None:
    async def test(client: openai.AsyncOpenAI, _: Started) -> None:
        found = await client.chat.completions.create(model="sql", messages=ASK)
        assert found.choices[0].message.content == "### Human: hi\n### Assistant:"
        with pytest.raises(openai.BadRequestError, match="trained without a chat template"):
            await client.chat.completions.create(model="sql", messages=ASK, tools=[TOOL])

    asking(test, speech=Speech(byte_tokenizer(None), Wording(style="headings"), 256))


def test_a_client_that_closes_its_stream_frees_the_place() -> None:
    async def test(client: openai.AsyncOpenAI, server: Started) -> None:
        async with asyncio.timeout(20):
            task = asyncio.ensure_future(client.chat.completions.create(model="sql", messages=ASK))
            await until(lambda: server.echo.working == 1)
            task.cancel()
            await until(lambda: server.desk.idle and server.echo.working == 0)

    asking(test, echo=Echo(hold=True))

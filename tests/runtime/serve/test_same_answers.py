"""Does a server give many clients at once what its model answers to each alone?"""

import asyncio
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch

import qdist
from qdist.core.data.conversation import Conversation, Turn
from qdist.host.run.rundir import RunDir
from qdist.runtime.infer.prompts import encode_prompts
from qdist.runtime.infer.ready import Ready, open_answerer
from qdist.runtime.serve.asking import Served
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.serve.fake import answering
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model

TEXTS = ("a", "what is it", "why", "tell me more of it", "no", "yes, and then what", "b", "who")
NEW = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder: Path = tmp_path_factory.mktemp("same")
    model = save_model(folder / "model", tokenizer=tiny_tokenizer(CHATML, bos=False))
    job = real_job(model, save_data(folder / "d.jsonl"), folder / "run", seq_len=64, lora__r=8)
    return adapted_run(job, scale=0.2)[0]


def by_transformers(run: RunDir, ready: Ready) -> list[str]:
    """The text of each answer, by transformers' own loop over the run's model as it is loaded."""
    model, tokenizer = qdist.load(run.path, dtype="float32", device="cpu")
    asked = [Conversation(turns=(Turn("user", text, False),), where=text) for text in TEXTS]
    speech, found = ready.speeches["sql"], list[str]()
    for prompt in encode_prompts(asked, speech):
        ids = torch.tensor([prompt])
        ends = [1, *speech.wording.ends]
        out: Any = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=ends
        )
        written = out[0, len(prompt) :].tolist()
        found.append(tokenizer.decode(written[:-1] if written[-1] in ends else written))
    return found


async def by_server(ready: Ready) -> list[str]:
    """The same by as many clients as there are questions, half of them streaming."""
    models = {"sql": Served("sql", "sql", ready.speeches["sql"])}
    async with answering(ready.answerer, models) as server:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=server.app))
        base = "http://127.0.0.1/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", http_client=http, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text, stream=n % 2 > 0) for n, text in enumerate(TEXTS)))


async def ask(client: openai.AsyncOpenAI, text: str, *, stream: bool) -> str:
    given: Any = {
        "model": "sql", "messages": [{"role": "user", "content": text}], "max_tokens": NEW, "temperature": 0,
    }  # fmt: skip
    if not stream:
        return (await client.chat.completions.create(**given)).choices[0].message.content or ""
    pieces = await client.chat.completions.create(**given, stream=True)
    return "".join([piece.choices[0].delta.content or "" async for piece in pieces if piece.choices])


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_answers_to_many_clients_at_once_are_those_of_transformers_to_each_alone(run: RunDir, slots: int) -> None:
    ready = open_answerer({"sql": str(run.path)}, slots=slots, tokens=96, dtype="float32")
    wanted = by_transformers(run, ready)
    assert len(set(wanted)) > 4
    assert asyncio.run(by_server(ready)) == wanted

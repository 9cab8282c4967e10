"""A process of its own that reads GGUF files with llama.cpp: on a bad file it aborts, and takes the process with it.

Standard input: JSON, a list of {"file", "ids", "texts"}. Standard output: JSON, for each of them what `Reading` has.
"""

import json
import math
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

THREADS = 1
"""llama.cpp's threads wait for each other in a loop: on a crowded machine several are far slower than one."""


class Asked(NamedTuple):
    """What to ask of a file."""

    file: Path
    ids: Sequence[int] = ()
    """Tokens of a text, forced one after the other."""
    texts: Sequence[str] = ()
    """Texts to cut into tokens."""


class Reading(NamedTuple):
    """What llama.cpp made of a file."""

    logprobs: list[list[float]]
    """Of each token of the vocabulary, after each of the ids."""
    tokens: list[list[int]]
    """Of each text, without special tokens around it."""


def read(*asked: Asked) -> list[Reading]:
    """Read files in a child. Fails with what the child wrote where it aborts."""
    job = [{"file": str(each.file), "ids": list(each.ids), "texts": list(each.texts)} for each in asked]
    child = subprocess.run(
        [sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True, timeout=120, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [Reading(*each) for each in json.loads(child.stdout)]


def _answered(file: str, ids: list[int], texts: list[str]) -> tuple[list[list[float]], list[list[int]]]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = file, max(64, len(ids) + 2), 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.verbosity, params.warmup, params.fit_params, params.cache_ram_mib = -1, False, False, 0
    params.api_keys = [key := secrets.token_hex(16)]
    server = xllamacpp.Server(params)
    plain, *tokens = [_tokens(server.listening_address, key, text) for text in ("a", *texts)]
    return [_logprobs(server, ids[: count + 1], plain[-1]) for count in range(len(ids))], tokens


def _logprobs(server: Any, prompt: list[int], plain: int) -> list[float]:
    told: list[dict[str, Any]] = []
    # Not told how many tokens there are: more than there are is all of them.
    # llama.cpp says nothing of a token that ends an answer or is half a character, so a whole one is taken whatever is
    # likely; the logits are told as they are before that.
    asked = {"prompt": prompt, "n_predict": 1, "n_probs": 1_000_000, "temperature": 0.0, "logit_bias": [[plain, 1e6]]}
    server.handle_completions(asked, lambda piece: bool(told.append(piece)))
    (likely,) = told[0]["choices"][0]["logprobs"]["content"]
    found = {each["id"]: each["logprob"] for each in likely["top_logprobs"]}
    return [found.get(token, -math.inf) for token in range(max(found) + 1)]


def _tokens(address: str, key: str, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    request = urllib.request.Request(
        f"{address}/tokenize", body, {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[int] = json.load(answer)["tokens"]
    return found


if __name__ == "__main__":
    json.dump([_answered(**each) for each in json.load(sys.stdin)], sys.stdout)

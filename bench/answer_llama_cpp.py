"""How fast does llama.cpp answer with SmolLM2 and its adapter, one answer at a time, on this machine's cores?

    OMP_WAIT_POLICY=passive python -m bench.answer_llama_cpp RUN [--types q8_0,q4_1,q4_k_m] [--threads 1,2]

RUN: a run over smollm2-135m. Prints tokens/s of 128 greedy tokens after 64 of prompt, the best of three, through the
engine of chat, generate and serve; q4_1 is the base's own file, since a merged model has none of that type.
"""

import argparse
import tempfile
import time
from pathlib import Path

import xllamacpp

from bench.gguf_agreement import exported
from qdist.core.sampling import Sampling
from qdist.runtime.infer.answerer import Ended, Piece, Question
from qdist.runtime.infer.llama_cpp import LlamaCpp, gguf_of, start_server
from qdist.runtime.infer.prompts import speech_of
from qdist.runtime.infer.text import Script

_PROMPT, _NEW = 64, 128


def main() -> None:
    """Measure each type with each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--types", default="q8_0,q4_1,q4_k_m")
    parser.add_argument("--threads", default="1,2")
    given = parser.parse_args()
    script = Script(speech_of(str(given.run)).tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for kind in given.types.split(","):
            own = (
                gguf_of("smollm2-135m") if kind == "q4_1" else exported(given.run, Path(folder) / f"{kind}.gguf", kind)
            )
            for threads in map(int, given.threads.split(",")):
                speed = max(speeds(own, script, threads))
                print(f"{kind:8}{own.stat().st_size / 2**20:6.0f} MiB {threads} threads {speed:7.1f} tok/s", flush=True)


def speeds(file: Path, script: Script, threads: int) -> list[float]:
    """Tokens/s of three answers, from the first token on."""
    server = start_server(xllamacpp, file, slots=1, positions=512, threads=threads)
    answerer = LlamaCpp({"": server}, {"": script}, slots=1, positions=512)
    return [speed(answerer) for _ in range(3)]


def speed(answerer: LlamaCpp) -> float:
    """Tokens/s of an answer."""
    times = list[float]()

    def hear(piece: Piece | Ended) -> None:
        times.append(time.perf_counter())

    sampling = Sampling(max_new_tokens=_NEW, ignore_end=True)
    answerer.submit(Question(list(range(300, 300 + _PROMPT)), sampling), hear)
    while answerer.step():
        pass
    return (len(times) - 2) / (times[-2] - times[0])


if __name__ == "__main__":
    main()

"""What is lm-evaluation-harness told when it asks a model of ours?

Requests become items and questions as in its own backend for transformers (lm_eval 0.4.13, models/huggingface.py), so
that figures are the same.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qdist.core.errors import DataError
from qdist.core.evaluation.scoring import Item, Scored, continuation
from qdist.core.sampling import MOST_STOPS, Sampling
from qdist.runtime.infer.answerer import Question

Score = Callable[[list[Item]], list[Scored]]
Answer = Callable[[list[Question]], list[list[int]]]
"""Gives the new tokens of each answer, without the one that ends it."""
_SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float}
_MAX_GEN_TOKS = 256


class HarnessModel(TemplateLM):
    """A model of ours as lm_eval's evaluator wants it; all ranks that hold a part of it must be asked the same.

    tokenizer: of transformers. longest: most tokens of an item, and of a prompt with its answer. adapter: that answers.
    """

    def __init__(self, tokenizer: Any, score: Score, answer: Answer, *, longest: int, adapter: str = "") -> None:
        super().__init__()
        self.tokenizer, self._score, self._answer = tokenizer, score, answer
        self._longest, self._adapter = longest, adapter

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        begins = self.tokenizer.bos_token_id
        return self.eot_token_id if begins is None else int(begins)

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests, which is not used."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; the tokenizer's own special tokens unless the text begins with one, or told otherwise."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log probability, whether greedy decoding would say it) of continuations behind contexts."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log probabilities of whole texts, by windows that give every token as much context as there is."""
        windows = [self._windows(request.args[0]) for request in requests]
        scored = iter(self._loglikelihood_tokens([window for own in windows for window in own]))
        return [sum(next(scored)[0] for _ in own) for own in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers up to the first of some texts."""
        asked = [
            self._question(context, settings, number)
            for number, (context, settings) in enumerate(request.args for request in requests)
        ]
        answers = self._answer([question for question, _ in asked])
        return [
            postprocess_generated_text(self.tokenizer.decode(tokens, skip_special_tokens=True), until, None)
            for (_, until), tokens in zip(asked, answers, strict=True)
        ]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Few-shot examples and question as one prompt, by the tokenizer's own template."""
        text: str = self.tokenizer.apply_chat_template(
            list(chat_history),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._longest,
            context_len=1,
        )
        return [(None, *make_disjoint_window(pair)) for pair in pairs]

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        items = [self._item(context, answer) for _, context, answer in requests]
        return [(sum(own.logprobs), all(own.greedy)) for own in self._score(items)]

    def _item(self, context: list[int], answer: list[int]) -> Item:
        if len(answer) > self._longest:
            raise DataError(
                f"a continuation has {len(answer):,} tokens, and the model takes {self._longest:,}",
                try_="a task with shorter continuations",
            )
        return continuation(context, answer, longest=self._longest)

    def _question(self, context: str, settings: Mapping[str, Any], number: int) -> tuple[Question, list[str]]:
        """What to answer, and the texts before which the answer ends. number: of the request, for its draws."""
        given = normalize_gen_kwargs(deepcopy(dict(settings)), _MAX_GEN_TOKS)
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(given.pop("until"), eos=eos)
        most = given.pop("max_gen_toks")
        if most >= self._longest:
            raise DataError(
                f"max_gen_toks={most:,} of the task leaves none of the model's {self._longest:,} positions for prompts",
                try_="max_gen_toks: 256 in the task's generation_kwargs",
            )
        stops = tuple(filter(None, until))[:MOST_STOPS]  # the text is cut at all of them once it is whole
        sampling = Sampling(max_new_tokens=most, stop=stops, **_chosen(given)).again(number)
        begins = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if begins and context.startswith(begins) else {}
        prompt = self.tokenizer(context, **options)["input_ids"][most - self._longest :]
        return Question(prompt, sampling, self._adapter), until


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings among generation_kwargs; none of those of draws if the likeliest token is taken."""
    if unknown := sorted(set(given) - {*_SETTINGS, "do_sample"}):
        raise DataError(
            f"generation_kwargs of the task have {', '.join(unknown)}, which cannot be honoured here",
            try_=f"a task with only until, max_gen_toks, do_sample, {', '.join(_SETTINGS)}",
        )
    own = _SETTINGS if given.get("do_sample") else ("repetition_penalty",)
    return {name: _SETTINGS[name](given[name]) for name in own if name in given}

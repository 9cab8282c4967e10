"""Which model types of transformers answer by rows of one cache, which by transformers' own loop, and why?

    python bench/decodes.py [TYPE ...]

Each is made tiny and random, float32 on the CPU. Of those that go by rows: the largest difference of logits over their
largest magnitude from a pass over the whole text, of prompts of 1 to 20 tokens that are continued for 12, joined one
after another, with a row moved on the way.
"""

import argparse
import contextlib
import io
import multiprocessing
import sys
import warnings

LENGTHS = (3, 20, 1, 9)
NEW = 12
TOLERANCE = 1e-4


def main() -> None:
    """Try the types and print the table."""
    from bench.models.table import all_types

    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    types = parser.parse_args().types or all_types()
    by_rows = fallback = wrong = 0
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=40) as pool:
        for model_type, outcome, text in pool.imap(attempt, types):
            print(f"{model_type:32} {outcome:10} {text}", flush=True)
            by_rows, fallback = by_rows + (outcome == "rows"), fallback + (outcome == "fallback")
            wrong += outcome == "WRONG"
    print(f"{by_rows} by rows, {fallback} by the fallback, {wrong} wrong, of {len(types)} types")


def attempt(model_type: str) -> tuple[str, str, str]:
    """(type, outcome, difference or reason)."""
    from qdist.runtime.infer.decoder import why_not
    from tests.runtime.every_model import tiny_model

    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = tiny_model(model_type)
        except Exception as error:  # noqa: BLE001  (whatever a class raises that cannot be made is the result)
            return model_type, "not made", brief(error)
        try:
            reason = why_not(model)
            if reason:
                return model_type, "fallback", reason[:150]
            difference = furthest(model)
        except Exception as error:  # noqa: BLE001  (whatever is raised behind an empty reason is a fault)
            return model_type, "WRONG", brief(error)
    return model_type, "rows" if difference < TOLERANCE else "WRONG", f"{difference:.1e}"


def brief(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:150]


def furthest(model) -> float:
    """Largest difference of a decoder's logits from those of whole texts."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3  # so that attention prefers some tokens clearly
    texts, logits = decoded(model)
    worst = 0.0
    for tokens, own in zip(texts, logits, strict=True):
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -len(own) :].float()
        worst = max(worst, float((torch.stack(own) - whole).abs().max() / whole.abs().max()))
    return worst


def decoded(model) -> tuple[list[list[int]], list[list]]:
    """Answers that joined one after another, and the logits behind the last of their prompts and each new token."""
    import torch

    from qdist.runtime.infer.decoder import Decoder

    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    logits: list[list] = [[] for _ in texts]
    answers = [0, 1, 2, 3]  # which answer each row holds

    def choose(given, rows):
        for row, own in zip(rows.tolist(), given, strict=True):
            logits[answers[row]].append(own.clone())
        return given.argmax(-1)

    decoder = Decoder(model, slots=4, positions=max(LENGTHS) + 2 * NEW, choose=choose)
    for step in range(2 * NEW):
        if step < len(texts):
            decoder.prefill([texts[step]], [step])
        at_work = min(step + 1, 3 if step > NEW else 4)
        if step == NEW + 1:
            decoder.move(3, 0)
            answers[0] = 3
        for row, token in enumerate(decoder.tokens[:at_work].tolist()):
            texts[answers[row]].append(token)
        decoder.step(at_work)
    return texts, logits


if __name__ == "__main__":
    sys.path.insert(0, ".")
    main()

"""Does every command of README and guides work, typed as it stands there, in a folder with spaces and an umlaut?

    python bench/readme_commands.py WORK [--only WORD]

Takes the commands out of README.md, docs/guide and docs/tutorial.md, puts names in for their placeholders, and runs
them one after the other in WORK/mein Ordner ü/läufe 1, where tiny models have the names that the pages use; `qdist
plan` beside it, where the names mean the real models. What a run prints as a next command is pasted into bash. On two
CPU cores: some 50 minutes.
"""

import argparse
import contextlib
import fcntl
import itertools
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RUN, HALTED, RECIPE, QUESTIONS = "runs/über Nacht 1", "runs/halb fertig", "mein Rezept.toml", "Fragen für später.txt"
FRESH, PACKED = "Ausgang ä {number}", "llama-7b in vier Bits"
PLACEHOLDERS = {
    ("", "MODEL"): "llama-7b",
    ("", "IN"): "llama-7b_4w_pack8.pth.tar --config 'LLaMA 7B'",
    ("", "RUN"): f"'{RUN}'",
    ("", "OTHER"): "runs/a",
    ("", "RECIPE.toml"): f"'{RECIPE}'",
    ("", "..."): "--model llama-7b --data my.jsonl",
    ("", "WORD"): "lr",
    ("", "COMMAND"): "plan",
    ("--data", "D"): "my.jsonl",
    ("--run", "DIR"): f"'{HALTED}'",
    ("--run", "runs/NAME"): "runs/demo",
    ("--model", "DIR"): f"'{PACKED}'",
    ("--prompts", "F"): f"'{QUESTIONS}'",
    ("--config", "LLAMA"): "'LLaMA 7B'",
    ("--serve", "PORT"): "{port}",
    ("--out", "DIR"): f"'{FRESH}'",
    ("--out", "F"): f"'{FRESH}.jsonl'",
    ("--out", "OUT"): f"'{FRESH}'",
}
"""What is put in for a word, by the flag before it; several words where it needs them."""
OF_ALTERNATIVE = {
    "zeros": {("", "RUN"): "runs/mine --lossy"},
    "lora": {("", "RUN"): "runs/mine"},
    "gguf": {("--out", "OUT"): f"'{FRESH}.gguf'"},
    "nf4": {("--out", "DIR"): f"'{PACKED}'"},
    "RECIPE.toml": {("", "..."): "--set steps=8"},
    "--dry-run": {("", "RECIPE.toml"): f"'{RECIPE}' --run 'runs/noch keiner'"},
}
"""What is put in otherwise where one of the alternatives is chosen."""
LAUNCH = "qdist launch --model llama-7b --data my.jsonl --dry-run"
GPTQ = f"qdist quantize llama-7b --method gptq --data my.jsonl --samples 16 --out '{FRESH}'"
CAN_HAVE = {
    "--placement shard --set": f"{LAUNCH} --gpus 2", "--set": LAUNCH, "--max-memory 24GiB": LAUNCH,
    "--load-format dummy": "qdist launch --model llama-7b --dry-run --set steps=10",
    "--desc-act": GPTQ, "--no-sym": GPTQ, "--candidate-bits": GPTQ,
    "--type q4_1": f"qdist export runs/mine --to gguf --out '{FRESH}.gguf'",
}  # fmt: skip
"""Flags that the text names without a command, by how they begin, and a command that can have them."""
NAMES_ALONE = ("qdist launch", "qdist plan", "qdist quantize", "qdist export", "qdist export RUN --to")
"""Where the text speaks of a command; its help is asked for."""
BEFOREHAND = (
    "qdist launch --model llama-7b --data my.jsonl --run runs/a",
    "qdist launch --model llama-7b --data my.jsonl --run runs/b --set seed=1",
    "qdist launch --model smollm2-135m --data demo --set seq_len=256 --set steps=4",
    f"qdist launch --model llama-7b --data my.jsonl --run '{HALTED}' --set steps=60",
    "qdist launch --model llama-7b --data my.jsonl --run runs/demo --set steps=60",
)
"""What the README takes for granted."""
STEPS = re.compile(rb"^step \d+/\d+  loss", re.MULTILINE)
NEXT = re.compile(r"^ *(?:chat|merge|go on:|try:) +(qdist [^(,\n]+)$", re.MULTILINE)
HINT = re.compile(r"^  try: (--[^(\n]+)", re.MULTILINE)
MISTYPED = re.compile(r"unknown setting '(\S+)'|(--\S+) is not a flag")
PATIENCE_S = 900


class Written(NamedTuple):
    """A command as the README has it, and what the README shows that it prints."""

    text: str
    shown: tuple[str, ...] = ()


class Case(NamedTuple):
    """A command to run. pasted: into bash, as it was printed. code: what it is to end with. terminal: it has one."""

    text: str
    shown: tuple[str, ...] = ()
    pasted: bool = False
    terminal: bool = False
    code: int = 0
    why: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell takes it apart."""
        return shlex.split(self.text)

    @property
    def makes(self) -> set[str]:
        """Folders and files that other commands may need."""
        words = self.words
        if "--dry-run" in words:
            return set()
        flags = {"--out"} | ({"--run"} if "--resume" not in words else set())
        named = {after for flag, after in itertools.pairwise(words) if flag in flags}
        return named | ({RUN} if RECIPE in words else set())

    @property
    def needs(self) -> set[str]:
        """What may be a folder or file that another command makes. The run of a dry run must not be there yet."""
        words = self.words
        own = {after for flag, after in itertools.pairwise(words) if flag == "--run" and "--dry-run" in words}
        return set(words) - self.makes - own


class Done(NamedTuple):
    """How a command ended; `fault` is empty where it ended as it should."""

    case: Case
    code: int
    seconds: float
    output: str
    fault: str = ""


def main() -> None:
    """Run everything; print a table; exit 1 when something is not ok."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path, help="the folder with spaces is made in it")
    parser.add_argument("--only", default="", help="commands with this in them, in a folder that is there already")
    arguments = parser.parse_args()
    above = arguments.work.resolve() / "mein Ordner ü"
    written = dict.fromkeys(each for page in pages() for each in read_commands(page.read_text(encoding="utf-8")))
    cases = [case for each in written for case in cases_of(each)]
    machine = Machine(above)
    if arguments.only:
        cases = [case for case in cases if arguments.only in case.text]
    else:
        machine.furnish()
        cases = [case_of(Written(text)) for text in BEFOREHAND] + cases
    done = list(run_all(cases, machine))
    print("\n" + "\n".join(table(done)))
    raise SystemExit(any(each.fault for each in done))


def pages() -> list[Path]:
    """The documents whose commands are to be typed."""
    return [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md")), ROOT / "docs" / "tutorial.md"]


def read_commands(page: str) -> list[Written]:
    """Commands in the page's order, each once: of code blocks, tables and sentences."""
    found: list[Written] = []
    for number, part in enumerate(re.split(r"^```(.*)\n", page, flags=re.MULTILINE)):
        if number % 4 == 0:  # then the language, a block, and nothing behind its end
            found += _of_text(part)
        elif number % 4 == 1:
            language = part
        elif number % 4 == 2:
            found += [Written(f"python -c {shlex.quote(part)}")] if language == "python" else _of_block(part)
    return [each for position, each in enumerate(found) if each not in found[:position]]


def _of_block(block: str) -> Iterator[Written]:
    lines = block.splitlines()
    for number, line in enumerate(lines):
        typed = re.match(r"(\$ )?(?:(?:chat|merge) +| *try: )?(qdist .*)", line)
        if typed:
            yield Written(typed[2].partition("  # ")[0], tuple(lines[number + 1 :]) if typed[1] else ())


def _of_text(text: str) -> Iterator[Written]:
    """Spans of code that are commands; flags behind a command in a row of a table; flags in a sentence."""
    for line in re.split(r"\n(?=\||\n|- )", text):
        spans = [" ".join(span.split()).replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", line)]
        row = spans[0] if line.startswith("|") and spans and spans[0].startswith("qdist ") else ""
        for span in spans:
            base = next((base for flags, base in CAN_HAVE.items() if span.startswith(flags) and span != "--set"), "")
            if span.startswith(("qdist ", "sh ")):
                yield Written(span)
            elif row and span.startswith("--") and "--to" not in row:
                yield Written(f"{LAUNCH if span.startswith('--model') else row} {span}")
            elif base and "=..." not in span:
                yield Written(f"{base} {span}")


def cases_of(written: Written) -> Iterator[Case]:
    """With and without what is optional, and with each alternative."""
    if not written.text.startswith("qdist "):
        yield Case(written.text.replace("runs/NAME", "runs/demo"), pasted=True)
        return
    if written.text in NAMES_ALONE:
        yield Case(f"qdist {written.text.split()[1]} --help", why="named alone")
        return
    parts = re.split(r"\[([^\]]*)\] ?", written.text)
    optional = [("", part + " ") for part in parts[1::2]]
    for chosen in itertools.product(*optional):
        text = "".join(itertools.chain(*itertools.zip_longest(parts[::2], chosen, fillvalue="")))
        choices = [word.split("|") for word in shlex.split(text)]
        for words in itertools.product(*choices):
            yield case_of(written._replace(text=filled(words)))
    if written.text == "qdist monitor RUN":
        yield Case(filled(shlex.split(written.text)), terminal=True, why="on a terminal, then q")


_numbers = itertools.count(1)


def filled(words: Sequence[str]) -> str:
    """The command with names for its placeholders."""
    table = dict(PLACEHOLDERS)
    for word in words:
        table |= OF_ALTERNATIVE.get(word, {})
    before = ["", *words]
    put = [
        table.get((flag if flag.startswith("--") else "", word), shlex.quote(word))
        for flag, word in zip(before, words, strict=False)
    ]
    return " ".join(put).replace("{number}", str(next(_numbers)))


def case_of(written: Written) -> Case:
    """What a command is to end with, and why, where it is not 0."""
    words, shown = shlex.split(written.text), written.shown
    if any(line.startswith("error:") for line in shown):
        return Case(written.text, shown, code=2, why="refused, as shown")
    elsewhere = "plan" in words and {"--gpu-memory", "--gpu-name", "--help"} & set(words)
    here = not elsewhere and {"--max-memory", "liger=true", "plan"} & set(words)
    if here or words == ["qdist", "doctor", "--gpus"]:
        return Case(written.text, shown, code=2, why="needs a GPU")
    if words[1:2] == ["push"]:
        return Case(written.text, code=2, why="needs a token of the hub")
    if "--serve" in words:
        return Case(written.text, code=130, why="fetched once, then Ctrl-C")
    if "guanaco-65b" in words or (written.text in BEFOREHAND and "steps=60" in words):
        return Case(written.text, code=130, why="Ctrl-C after two steps")
    return Case(written.text, shown)


def run_all(cases: list[Case], machine: "Machine") -> Iterator[Done]:
    """Each once what it needs has been made; then what it says comes next."""
    waiting, seen = list(cases), set[str]()
    while waiting:
        made_later = [case.makes for case in waiting]
        ready = (
            case
            for position, case in enumerate(waiting)
            if not case.needs & set().union(*(makes for other, makes in enumerate(made_later) if other != position))
        )
        case = next(ready, waiting[0])
        waiting.remove(case)
        done = machine.run(case)
        print(row(done), flush=True)
        if done.fault:
            print("\n".join(f"        | {line}" for line in done.output.splitlines()[-25:]), flush=True)
        yield done
        if case.shown and case.code == 2:
            waiting.insert(0, hinted(case, done.output))
        elif case.text not in BEFOREHAND:
            fresh = [text.rstrip() for text in NEXT.findall(done.output) if text.rstrip() not in seen]
            seen |= set(fresh)
            waiting[:0] = [pasted(text, case) for text in fresh if "monitor" not in text]


def pasted(text: str, after: Case) -> Case:
    """What was printed. A long run goes on for long."""
    stopped = after.code == 130 and "--resume" in text
    return Case(text, pasted=True, code=130 if stopped else 0, why="Ctrl-C after two steps" if stopped else "")


def hinted(refused: Case, output: str) -> Case:
    """The command with its hint behind it, in place of a setting that does not exist."""
    mistyped, hint = MISTYPED.search(output), HINT.search(output)
    wrong = (rf"--set {re.escape(mistyped[1])}=\S+" if mistyped[1] else rf"{mistyped[2]} \S+") if mistyped else "$^"
    text = re.sub(wrong, "--dry-run", refused.text)
    return Case(f"{text} {hint[1].strip() if hint else ''}", pasted=True, why="the hint")


class Machine:
    """Where commands are run: a folder, a home and a cache, all with spaces in their names."""

    def __init__(self, above: Path) -> None:
        self.here, self.empty = above / "läufe 1", above / "ohne Modelle"
        self._log, self._port = above / "Ausgabe.txt", free_port()
        shim = above / "Programme" / "qdist"
        self._environment = {
            **{key: os.environ[key] for key in ("LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR") if key in os.environ},
            "PATH": f"{shim.parent}:{os.environ['PATH']}",
            "HOME": str(above / "mein Heim"),
            "QDIST_CACHE": str(above / "Ablage ö"),
            "PYTHONPATH": str(ROOT),
        }
        self._shim = shim

    def furnish(self) -> None:
        """Make the folders. The worker that it takes is a process of its own: it loads torch."""
        for folder in (self.here, self.empty, self._shim.parent, Path(self._environment["HOME"])):
            folder.mkdir(parents=True)
        for shim, module in ((self._shim, "-m qdist"), (self._shim.with_name("python"), "")):
            shim.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
            shim.chmod(0o755)
        code = "import sys, pathlib; from readme_folder import furnish; furnish(pathlib.Path(sys.argv[1]))"
        paths = f"{ROOT}:{ROOT / 'bench'}"
        command = [sys.executable, "-c", code, str(self.here)]
        subprocess.run(command, env=self._environment | {"PYTHONPATH": paths}, check=True, capture_output=True)

    def run(self, case: Case) -> Done:
        """To its end, or to where Ctrl-C ends it; and whether that was as it should be."""
        case = case._replace(text=case.text.replace("{port}", str(self._port)))
        words = ["bash", "-c", case.text] if case.pasted else [sys.executable, "-m", *case.words]
        began = time.monotonic()
        if case.terminal:
            code, output = on_terminal(words, cwd=self.here, environment=self._environment | {"TERM": "xterm-256color"})
            return Done(case, code, time.monotonic() - began, output, judge(case, code, output))
        with self._log.open("wb") as log, contextlib.ExitStack() as ends:
            given = subprocess.PIPE if "chat" in case.words else subprocess.DEVNULL
            process = subprocess.Popen(
                words, cwd=self.empty if "plan" in case.words[:2] else self.here, env=self._environment, stdin=given,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            ends.callback(process.kill)
            fault = self._attend(process, case)
        seconds, output = time.monotonic() - began, self._log.read_text(encoding="utf-8", errors="replace")
        return Done(case, process.returncode, seconds, output, fault or judge(case, process.returncode, output))

    def _attend(self, process: subprocess.Popen[bytes], case: Case) -> str:
        """Type, fetch or press Ctrl-C, as the command wants it; what went wrong in that."""
        fault = ""
        if "chat" in case.words:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(b"hello\n/help\n/quit\n", timeout=PATIENCE_S)
        elif "--serve" in case.words:
            fault = fetch(f"http://127.0.0.1:{self._port}/metrics", while_runs=process)
            os.killpg(process.pid, signal.SIGINT)
        elif case.code == 130:
            self._wait(process, until=lambda: len(STEPS.findall(self._log.read_bytes())) >= 2)
            os.killpg(process.pid, signal.SIGINT)
        if self._wait(process, until=lambda: False):
            return fault
        return f"did not end within {PATIENCE_S} s"

    def _wait(self, process: subprocess.Popen[bytes], until: Callable[[], bool]) -> bool:
        """Whether it ended, or what was waited for came."""
        end = time.monotonic() + PATIENCE_S
        while process.poll() is None and not until():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True


def on_terminal(words: Sequence[str], *, cwd: Path, environment: Mapping[str, str]) -> tuple[int, str]:
    """What a command that is ended with q does on a terminal of 80x24; its exit code and all that it wrote."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        words, cwd=cwd, env=environment, stdin=its, stdout=its, stderr=its, start_new_session=True
    )  # fmt: skip
    os.close(its)
    written = b""
    with contextlib.suppress(OSError):  # the other end is closed once it has ended
        while piece := os.read(ours, 1 << 16):
            written += piece
            if b"quit" in piece:
                os.write(ours, b"q")
    os.close(ours)
    return process.wait(PATIENCE_S), written.decode(errors="replace")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def fetch(address: str, while_runs: subprocess.Popen[bytes]) -> str:
    """What is wrong with what is served; empty where nothing is."""
    while while_runs.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=30) as answer:
            return "" if b"qdist_" in answer.read() else "the answer holds no figures"
        time.sleep(0.1)
    return "it ended before it was asked"


def judge(case: Case, code: int, output: str) -> str:
    """What is not as it should be."""
    if "Traceback" in output:
        return "a traceback"
    if code != case.code:
        return f"exit code {code}, not {case.code}"
    if case.why == "needs a GPU" and not re.fullmatch(r"error: .+\n(  try: .+\n)?", output):
        return "refused in other than a sentence"
    other = first_difference(case.shown, output.splitlines()) if case.shown else None
    if other is not None:
        return f"prints {other!r}, which the README has otherwise"
    return ""


def first_difference(shown: Iterable[str], printed: Iterable[str]) -> str | None:
    """The first printed line that differs, or None."""
    pairs = itertools.zip_longest(shown, printed, fillvalue="")
    return next((line.rstrip() for own, line in pairs if own.rstrip() != line.rstrip()), None)


def table(done: Sequence[Done]) -> Iterator[str]:
    """A row a command, and the sums."""
    yield from map(row, done)
    good = sum(not each.fault for each in done)
    yield f"{good} of {len(done)} ok, {sum(each.seconds for each in done) / 60:.0f} minutes"


def row(done: Done) -> str:
    """Whether it is ok, its exit code, how long it took, and the command in one line."""
    remark = ", ".join(filter(None, ("pasted" * done.case.pasted, done.case.why, done.fault)))
    verdict, text = "not ok" if done.fault else "ok", " ".join(done.case.text.split())
    return f"{verdict:6}  {done.code:3}  {done.seconds:6.1f} s  {text}" + f"  ({remark})" * bool(remark)


if __name__ == "__main__":
    main()

"""An agent that does as the settings of its job say, in the place of the real one; run as `-m fake_agent`."""

import os
import sys
import time
from pathlib import Path

import msgspec

from qdist.core.nodes.job import STOPPED, AgentLine, NodeJob


def tell(**words: object) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(AgentLine(**words)) + b"\n")
    sys.stdout.flush()


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=NodeJob)
    run, does = Path(job.run), dict(job.settings).get(job.name, "finish")
    with open(run / f"started-{job.name}", "a") as file:
        file.write(f"{os.getpid()} {'again' if job.resume else 'first'}\n")
    sys.stdout.write("a login shell's greeting\n")
    tell(kind="say", text="2 nodes work together", generation=1)
    if does == "fail":
        tell(kind="error", text=f"no room on {job.name}", try_="make room there")
        raise SystemExit(1)
    if does == "crash":
        raise ValueError("a bug")
    while does == "hang":
        time.sleep(0.01)
    tell(kind="planned", generation=1)
    if does == "die":
        os.kill(os.getpid(), 9)
    while not (run / "stop").exists() and not (run / "done").exists() and does != "finish":
        time.sleep(0.01)
    tell(kind="ended")
    raise SystemExit(STOPPED if (run / "stop").exists() else 0)


if __name__ == "__main__":
    main()

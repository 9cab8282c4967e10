"""Shows a run of several nodes while its agents are at work, and its ending."""

import shutil
import sys

from qdist.cli.views.plan import plan_lines, shown
from qdist.cli.watch import Watch, ending, how_to_go_on
from qdist.core.planning.plan import Plan
from qdist.host.nodes.agents import Agents
from qdist.host.nodes.attend import attend
from qdist.host.run import rundir
from qdist.host.run.rundir import RunDir
from qdist.host.terminal import say


def follow(
    run: RunDir, agents: Agents, *, tracks: bool = True, leaves: bool = False, flags: tuple[str, ...] = ()
) -> None:
    """Start a run's agents and show the run as `qdist launch` shows one of this machine, to its end.

    tracks: whether this launch is noted in the run and its figures sent to trackers from here; of several launchers of
    a run one does.
    leaves: whether SIGTERM has this node leave the run to the others.
    flags: with which the run is resumed on these nodes, such as `--hosts FILE`.
    Raises as `attend` does.
    """

    def view(plan: Plan) -> Watch:
        say(shown(plan_lines(plan, notes=())))
        if tracks:
            rundir.note(run, sys.argv)
        say(f"run      {run.path}")
        return Watch(plan, run, width=shutil.get_terminal_size().columns)

    try:
        attend(run, agents, view=view, say=say, tracks=tracks, leaves=leaves)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(run, *flags)) from None
    if run.result() is None:  # another node has it, and could not send it
        say("the run is finished; its adapter is with the first node")
    else:
        ending(run, run.plan())

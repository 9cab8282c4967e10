"""Does a process know which node it is, and which variables say nothing about it?"""

import pytest

from qdist.core.errors import SpecError
from qdist.core.nodes.launchers import expand_nodes
from qdist.core.nodes.places import (
    NodeFlags,
    Place,
    host_and_port,
    place_of,
    program_names,
    read_flags,
    stale_line,
    stale_names,
)

SLURM = {
    "SLURM_JOB_ID": "4123", "SLURM_STEP_ID": "0", "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "gpu[01-04]",
    "SLURM_STEP_NODELIST": "gpu[02-03]", "SLURMD_NODENAME": "gpu03", "SLURM_PROCID": "1", "PMI_RANK": "1",
}  # fmt: skip
TORCHRUN = {
    "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "2",
    "GROUP_WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "1"}
UNDER_SLURM = [frozenset(("bash",)), frozenset(("slurmstepd",))]
UNDER_TORCHRUN = [frozenset(("python3", "torchrun")), frozenset(("bash",))]
UNDER_MPI = [frozenset(("orted",))]
SHELL = [frozenset(("bash",)), frozenset(("sshd",))]
NOTHING = NodeFlags()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("node7", ["node7"]),
        ("node[01-03,7],gpu5", ["node01", "node02", "node03", "node7", "gpu5"]),
        ("a[1,3],b[09-11]", ["a1", "a3", "b09", "b10", "b11"]),
        ("r[0-1]n[1-2]-ib", ["r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"]),
        ("n[5]", ["n5"]),
    ],
)
def test_names_of_nodes_are_written_out(text: str, wanted: list[str]) -> None:
    assert list(expand_nodes(text)) == wanted


@pytest.mark.parametrize("text", ["", "a[", "a]", "a[1-", "a[3-1]", "a[x]", "a,,b", "a[[1]]", "a[0-99999999]", "a[1-]"])
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="not a list of SLURM's nodes"):
        expand_nodes(text)


@pytest.mark.parametrize(
    ("environ", "ancestors", "wanted"),
    [
        (SLURM, UNDER_SLURM, Place(1, 2, 2, "gpu02:29523", "SLURM")),
        (TORCHRUN, UNDER_TORCHRUN, Place(2, 3, 3, "10.0.0.1:29900", "torchrun")),
        (OPEN_MPI | {"MASTER_ADDR": "head"}, UNDER_MPI, Place(1, 2, 2, "head:29400", "Open MPI")),
        (MPICH | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}, [frozenset(("hydra_pmi_proxy",))],
         Place(1, 2, 2, "head:7", "MPICH")),
        # mpirun's daemons are started by srun, torchrun by a script of srun's: the nearest one counts.
        (SLURM | OPEN_MPI | {"MASTER_ADDR": "head"}, UNDER_MPI + UNDER_SLURM,
         Place(1, 2, 2, "head:29400", "Open MPI")),
        (SLURM | TORCHRUN, UNDER_TORCHRUN + UNDER_SLURM, Place(2, 3, 3, "10.0.0.1:29900", "torchrun")),
        # A shell that torchrun once started, under srun: its variables are not of a program above this one.
        (SLURM | TORCHRUN, UNDER_SLURM, Place(1, 2, 2, "gpu02:29523", "SLURM")),
    ],
)  # fmt: skip
def test_a_launcher_above_this_process_says_which_node_it_is(
    environ: dict[str, str], ancestors: list[frozenset[str]], wanted: Place
) -> None:
    assert place_of(NOTHING, environ, ancestors, host="gpu03") == wanted


@pytest.mark.parametrize("environ", [SLURM, TORCHRUN, OPEN_MPI, MPICH, SLURM | TORCHRUN, {}])
def test_variables_of_a_launcher_that_is_gone_are_not_obeyed(environ: dict[str, str]) -> None:
    assert place_of(NOTHING, environ, SHELL, host="gpu03") is None


@pytest.mark.parametrize(
    ("environ", "ancestors"),
    [
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, UNDER_SLURM),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "a"}, UNDER_SLURM),
        (TORCHRUN | {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}, UNDER_TORCHRUN),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, UNDER_MPI),
    ],
)
def test_a_launcher_with_one_node_is_one_machine(environ: dict[str, str], ancestors: list[frozenset[str]]) -> None:
    assert place_of(NOTHING, environ, ancestors, host="a") is None


def test_one_node_asked_for_is_one_machine_under_any_launcher() -> None:
    assert place_of(read_flags("1", None, None), SLURM, UNDER_SLURM, host="gpu03") is None


@pytest.mark.parametrize(
    ("typed", "environ", "ancestors", "wanted"),
    [
        (("2", 1, "10.0.0.1:29400"), {}, SHELL, Place(1, 2, 2, "10.0.0.1:29400", "--node-rank")),
        (("1:4", 3, "[fd00::1]:9"), SLURM, UNDER_SLURM, Place(3, 4, 1, "[fd00::1]:9", "--node-rank")),
        (("1:4", None, None), SLURM, UNDER_SLURM, Place(1, 4, 1, "gpu02:29523", "SLURM")),
        ((None, None, "10.9.9.9:1"), SLURM, UNDER_SLURM, Place(1, 2, 2, "10.9.9.9:1", "SLURM")),
        (("2", None, None), SLURM, SHELL, Place(1, 2, 2, "gpu02:29523", "SLURM")),
        (("2", None, "head:1"), {"PMIX_RANK": "1"}, [frozenset(("prted",))], Place(1, 2, 2, "head:1", "PMIx")),
    ],
)
def test_flags_go_over_a_launchers_variables(
    typed: tuple[str | None, int | None, str | None],
    environ: dict[str, str],
    ancestors: list[frozenset[str]],
    wanted: Place,
) -> None:
    assert place_of(read_flags(*typed), environ, ancestors, host="gpu03.cluster.example") == wanted


@pytest.mark.parametrize(
    ("typed", "environ", "ancestors", "wanted", "way"),
    [
        (("2", None, None), {}, SHELL, "--nnodes 2 does not say where the nodes meet", "--hosts FILE"),
        (("1:3", None, None), TORCHRUN, SHELL, "does not say where .* TORCHELASTIC_RUN_ID of this shell", "--hosts"),
        # Of another machine's job.
        (("2", None, None), SLURM | {"SLURMD_NODENAME": "gpu09"}, SHELL, "does not say where", "--rendezvous"),
        (("2", None, "a:1"), {}, SHELL, "--rendezvous does not say which node this is", "--node-rank 0"),
        (("2", 1, None), {}, SHELL, "does not say where the nodes meet", "--rendezvous"),
        ((None, None, "a:1"), {}, SHELL, "--nnodes does not say how many", "--nnodes 2"),
        ((None, 0, None), {}, SHELL, "--node-rank is of a run on several nodes", "--nnodes 2"),
        (("3", None, None), SLURM, UNDER_SLURM, "--nnodes 3, and SLURM started qdist on 2", "--nnodes 2"),
        ((None, None, None), OPEN_MPI, UNDER_MPI, "Open MPI does not say which machine", "-x MASTER_ADDR=HOST"),
        ((None, None, None), {"PMIX_RANK": "1"}, [frozenset(("prted",))], "does not say how many nodes", "--nnodes N"),
        ((None, None, None), SLURM | {"SLURM_NODEID": "2"}, UNDER_SLURM, "this is node 2, of 2", "--node-rank"),
        ((None, None, None), SLURM | {"SLURM_NODEID": "x"}, UNDER_SLURM, "SLURM_NODEID is 'x'", "unset SLURM_NODEID"),
        ((None, None, None), SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, UNDER_SLURM,
         "SLURM started qdist 8 times on 2 nodes", "srun --ntasks-per-node=1"),
        ((None, None, None), TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, UNDER_TORCHRUN,
         "torchrun started qdist 8 times on this node", "--nproc-per-node 1"),
        ((None, None, None), OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, UNDER_MPI,
         "mpirun started qdist 2 times", "--map-by ppr:1:node"),
        ((None, None, None), {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a[1-2]"}, UNDER_SLURM,
         "SLURM job 7 has 2 nodes, and qdist was not started by srun", "--nnodes 1 for this node alone"),
    ],
)  # fmt: skip
def test_what_does_not_suffice_or_contradicts_is_refused_with_what_to_type(
    typed: tuple[str | None, int | None, str | None],
    environ: dict[str, str],
    ancestors: list[frozenset[str]],
    wanted: str,
    way: str,
) -> None:
    with pytest.raises(SpecError, match=wanted) as error:
        place_of(read_flags(*typed), environ, ancestors, host="gpu03")
    assert way in error.value.try_


@pytest.mark.parametrize(
    ("typed", "wanted", "way"),
    [
        (("two", None, None), "neither a number nor MIN:MAX", "--nnodes 2"),
        (("1:2:3", None, None), "neither a number nor MIN:MAX", "--nnodes 2"),
        (("4:0", None, None), "begins with the larger number", "--nnodes 1:4"),
        (("4:2", None, None), "begins with the larger number", "--nnodes 2:4"),
        (("0", None, None), "a run has 1 to 1,024 nodes", "--nnodes 1"),
        (("2:5000", None, None), "a run has 1 to 1,024 nodes", "--nnodes 2:1024"),
        (("2", 2, "a:1"), "--node-rank 2 is not a node", "--node-rank 0 to 1"),
        (("2", -1, "a:1"), "--node-rank -1 is not a node", "--node-rank 0 to 1"),
        ((None, 3, "a:1"), "--node-rank 3 is one of how many", "--nnodes 4"),
        (("2", 0, "a"), "'a' is not HOST:PORT", "--rendezvous a:29400"),
        (("2", 0, ":1"), "is not HOST:PORT", "--rendezvous HOST:29400"),
        (("2", 0, "a:b"), "is not HOST:PORT", "--rendezvous HOST:29400"),
        (("2", 0, "a:70000"), "a port is a number from 1 to 65,535", "--rendezvous a:29400"),
        (("2", 0, "fd00::1:29400"), "is not HOST:PORT", "HOST"),
    ],
)
def test_values_that_cannot_be_are_refused(
    typed: tuple[str | None, int | None, str | None], wanted: str, way: str
) -> None:
    with pytest.raises(SpecError, match=wanted) as error:
        read_flags(*typed)
    assert way in error.value.try_


def test_an_address_of_ipv6_has_brackets() -> None:
    assert host_and_port("[fd00::1]:29400") == ("fd00::1", 29400)
    assert host_and_port("node-1.lan:80") == ("node-1.lan", 80)


@pytest.mark.parametrize(
    ("environ", "ancestors", "wanted"),
    [
        ({}, SHELL, ()),
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_JOB_ID": "7", "HOME": "/"}, SHELL,
         ("RANK", "WORLD_SIZE", "SLURM_JOB_ID")),
        ({"RANK": ""}, SHELL, ()),
        (SLURM, UNDER_SLURM, ()),
        (SLURM | {"MASTER_ADDR": "a", "WORLD_SIZE": "2"}, UNDER_SLURM, ("WORLD_SIZE", "MASTER_ADDR")),
        (TORCHRUN, UNDER_TORCHRUN, ()),
        (TORCHRUN | SLURM, UNDER_TORCHRUN + UNDER_SLURM, ()),
        (OPEN_MPI | {"MASTER_ADDR": "a", "PMIX_RANK": "1"}, UNDER_MPI, ()),
        (MPICH, SHELL, ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS")),
    ],
)  # fmt: skip
def test_only_variables_of_launchers_that_are_gone_are_named(
    environ: dict[str, str], ancestors: list[frozenset[str]], wanted: tuple[str, ...]
) -> None:
    assert stale_names(environ, ancestors) == wanted


def test_the_line_says_what_is_not_obeyed_and_what_would_be() -> None:
    assert stale_line((), None) == ""
    assert stale_line(("RANK", "WORLD_SIZE", "SLURM_JOB_ID"), None) == (
        "RANK, WORLD_SIZE and SLURM_JOB_ID of this shell are not obeyed: this run is on one machine (--nnodes to join "
        "others)"
    )
    assert stale_line(("RANK",), Place(0, 2, 2, "a:1", "SLURM")) == (
        "RANK of this shell is not obeyed: SLURM says which node this is"
    )


@pytest.mark.parametrize(
    ("comm", "arguments", "wanted"),
    [
        ("slurmstepd", ["slurmstepd: [4123.0]"], {"slurmstepd"}),
        ("torchrun", ["/usr/bin/python3", "/opt/bin/torchrun", "--nnodes", "2"], {"torchrun", "python3"}),
        ("pt_main", ["python3", "-u", "-X", "dev", "-m", "torch.distributed.run", "x"],
         {"pt_main", "python3", "torch.distributed.run"}),
        ("python3.11", ["python3.11"], {"python3.11"}),
        ("bash", ["bash", "torchrun"], {"bash"}),
        ("orted", ["/usr/bin/orted", "-mca"], {"orted"}),
        ("(kernel)", [], {"(kernel)"}),
    ],
)  # fmt: skip
def test_a_program_is_known_by_its_name_its_script_or_its_module(
    comm: str, arguments: list[str], wanted: set[str]
) -> None:
    assert program_names(comm, arguments) == wanted

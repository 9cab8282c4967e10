"""Is a hosts.toml read, and what is wrong in one told with its key and what to write instead?"""

import tomllib

import pytest

from qdist.core.errors import SpecError
from qdist.core.nodes.hosts import MOST_HOSTS, Host, Hosts, read_hosts

TWO = '[[host]]\nname = "a"\n[[host]]\nname = "b"\n'


def read(text: str) -> Hosts:
    return read_hosts(tomllib.loads(text), where="hosts.toml")


def test_a_name_is_all_that_a_host_needs() -> None:
    assert read('[[host]]\nname = "10.0.0.1"\n') == Hosts(host=(Host(name="10.0.0.1"),))


def test_every_key_is_read() -> None:
    found = read(
        'least = 1\nport = 4000\nrejoin_seconds = 60\n[[host]]\nname = "a"\naddress = "10.0.0.1"\ngpus = 2\n'
        'python = "/opt/python"\nuser = "me"\nport = 2222\n'
    )
    host = Host(name="a", address="10.0.0.1", gpus=2, python="/opt/python", user="me", port=2222)
    assert found == Hosts(host=(host,), least=1, port=4000, rejoin_seconds=60.0)


@pytest.mark.parametrize(
    ("text", "message", "advice"),
    [
        ("", "hosts.toml names no hosts", '[[host]] and name = "10.0.0.1" below it'),
        ("host = 3", "hosts.toml names no hosts", '[[host]] and name = "10.0.0.1" below it'),
        ("hosts = []", "unknown key 'hosts' in hosts.toml", "host"),
        (TWO + 'adress = "1"', "unknown key 'adress' in host 2 of hosts.toml", "address"),
        (TWO + '[[host]]\ngpus = 1', "host 3 of hosts.toml has no name", 'name = "10.0.0.1"'),
        (
            TWO + "gpus = 0",
            "gpus of host 2 in hosts.toml cannot be 0: expected a whole number, 1 or more",
            "another value for gpus of host 2 in hosts.toml",
        ),
        (
            "port = 70000\n" + TWO,
            "port in hosts.toml cannot be 70000: expected a whole number <= 65535",
            "another value for port in hosts.toml",
        ),
        (TWO + '[[host]]\nname = "a"', "a is the name of two hosts in hosts.toml", "each host once"),
        (
            '[[host]]\nname = "a"\naddress = "1"\n[[host]]\nname = "b"\naddress = "1"',
            "1 is the address of two hosts in hosts.toml",
            "each host once",
        ),
        (
            '[[host]]\nname = "-oProxyCommand=x"',
            "'-oProxyCommand=x' in hosts.toml is not a name that ssh takes",
            "a name without spaces, quotes, signs of a shell or a leading -",
        ),
        (
            "[[host]]\nname = 'b$(id)'",
            "'b$(id)' in hosts.toml is not a name that ssh takes",
            "a name without spaces, quotes, signs of a shell or a leading -",
        ),
        (
            "[[host]]\nname = 'b'\nuser = 'me;id'",
            "'me;id' in hosts.toml is not a name that ssh takes",
            "a name without spaces, quotes, signs of a shell or a leading -",
        ),
        ("least = 3\n" + TWO, "least=3 in hosts.toml, which names 2 hosts", "least = 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_to_write(text: str, message: str, advice: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert (caught.value.message, caught.value.try_) == (message, advice)


def test_there_is_a_most_of_hosts() -> None:
    names = "".join(f'[[host]]\nname = "h{number}"\n' for number in range(MOST_HOSTS + 1))
    with pytest.raises(SpecError, match="names 1,025 hosts, and a run has at most 1,024"):
        read(names)

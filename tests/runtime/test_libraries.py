"""bitsandbytes is imported without torch's compiler, and what it would have compiled is compiled when it is called."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdist.runtime.kernels.libraries import _compile_later

PROGRAM = """
import sys, torch
compile_now = torch.compile
from qdist.runtime.kernels.libraries import import_bitsandbytes
import_bitsandbytes()
assert torch.compile is compile_now and "bitsandbytes" in sys.modules
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_bitsandbytes_comes_without_torchs_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_a_function_is_compiled_once_when_it_is_called(options: dict[str, Any]) -> None:
    compiled: list[dict[str, Any]] = []

    def compile_now(function: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        compiled.append(given)
        return function

    def double(value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    later = _compile_later(compile_now, **options)(double) if options else _compile_later(compile_now, double)
    assert (compiled, later.__name__) == ([], "double")
    assert [int(later(torch.tensor(value))) for value in (1, 2)] == [2, 4]
    assert compiled == [options]

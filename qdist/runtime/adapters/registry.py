"""The available adapter methods, and which of them a PEFT configuration describes."""

from collections.abc import Mapping
from typing import Any

from qdist.runtime.adapters.lora import Lora
from qdist.runtime.adapters.qa_lora import QaLora

_LORA, _QA_LORA = Lora(), QaLora()
METHODS: Mapping[str, Lora] = {"qlora": _LORA, "gptq-lora": _LORA, "qa-lora": _QA_LORA}
"""Value of the setting `method` -> its implementation."""


def method_of(config: Mapping[str, Any]) -> Lora:
    """The method that a PEFT configuration describes."""
    return _LORA if config.get("use_qalora", False) is False else _QA_LORA

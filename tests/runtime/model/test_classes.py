"""A model without storage is the class's own in all but its weights."""

import pytest
import torch
from transformers import AutoConfig

from qdist.runtime.model.classes import empty_model
from tests.runtime.every_model import tiny_arguments, tiny_model


@pytest.mark.parametrize("model_type", ["bloom", "dbrx", "falcon_h1", "gemma3", "gpt_oss", "mamba2", "recurrent_gemma"])
def test_buffers_of_an_empty_model_are_those_of_a_whole_one(model_type: str) -> None:
    """Its weights are not initialized, and no buffer comes from there."""
    arguments = tiny_arguments(model_type, AutoConfig.for_model(model_type).to_dict())
    empty, whole = empty_model(AutoConfig.for_model(model_type, **arguments), whole=True), tiny_model(model_type)
    shapes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    assert {name: parameter.shape for name, parameter in empty.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(whole.named_buffers())
    assert dict(empty.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in empty.named_buffers())

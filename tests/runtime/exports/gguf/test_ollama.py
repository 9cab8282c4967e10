import json
from pathlib import Path

import pytest

from qdist.runtime.data.wording import usual_wording
from qdist.runtime.exports.gguf import export
from tests.runtime.data.test_tokenized import CHATML, tiny_tokenizer
from tests.runtime.exports.test_export_targets import exported, qlora_run
from tests.runtime.gguf_models import fields
from tests.runtime.gptq_files import padded
from tests.runtime.tiny import adapted_run, real_job, save_data, save_model


def test_a_modelfile_beside_the_file_words_prompts_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without a chat template: the template of its wording is in both files, and nothing is overwritten."""
    run = qlora_run(tmp_path)
    (tmp_path / "out").mkdir()
    wording = run.plan().wording
    assert wording is not None
    assert wording.style != "chat"
    for name in ("First", "second", "third"):
        export.run(exported(run, tmp_path / "out" / f"{name}.gguf", to="gguf", type="q8_0"))
    said = capsys.readouterr().out
    assert f"ollama create first -f {tmp_path / 'out' / 'Modelfile'}" in said
    first, second = ((tmp_path / "out" / name).read_text() for name in ("Modelfile", "second.Modelfile"))
    assert first.splitlines()[0] == "FROM ./First.gguf"
    assert first.replace("First", "second") == second
    assert 'PARAMETER stop "</s>"' in first
    assert "{{ .Prompt }}" in first
    assert fields(tmp_path / "out" / "First.gguf")["tokenizer.chat_template"]


def test_what_a_model_s_publisher_says_of_drawing_is_a_parameter(tmp_path: Path) -> None:
    tokenizer = padded()
    tokenizer.chat_template = CHATML
    assert usual_wording(tokenizer).style == "chat"
    model = save_model(tmp_path / "model", tokenizer=tokenizer)
    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (model / "generation_config.json").write_text(json.dumps(drawn))
    run = adapted_run(real_job(model, save_data(tmp_path / "d.jsonl"), tmp_path / "run", seq_len=64))[0]
    export.run(exported(run, tmp_path / "m.gguf", to="gguf", type="q8_0"))
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[-3:] == ["PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER repeat_penalty 1.1"]
    assert tiny_tokenizer(CHATML).chat_template == fields(tmp_path / "m.gguf")["tokenizer.chat_template"]

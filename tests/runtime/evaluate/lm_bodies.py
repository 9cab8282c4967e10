"""Small tasks of lm_eval over a local file."""

import json
from pathlib import Path

CHOICES = """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ENDINGS = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
"""


def write_task(folder: Path, body: str, name: str = "local") -> str:
    choices = ["one", "two", " Human there"]
    records = [
        {"question": "hello " * (1 + 7 * (index % 3)) + f"user {index}", "choices": choices, "answer": index % 3}
        for index in range(7)
    ]
    data, file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}"
    file.write_text(f"task: {name}\n{source}\ntest_split: test\n{body}")
    return str(file)

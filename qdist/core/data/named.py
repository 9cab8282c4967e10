"""Which data sets are known by a short name, where do they lie on the hub, and how are their records read?"""

import msgspec

from qdist.core.data.reading import Reading


class NamedData(msgspec.Struct, frozen=True, kw_only=True):
    """A data set on the hub, with what its authors meant by its columns."""

    hub: str
    """OWNER/NAME on the hub."""
    subset: str | None = None
    """Configuration of the data set; None for its only one."""
    files: tuple[str, ...] = ()
    """Files of the repository that hold it, if not all do: `data_files` of `datasets.load_dataset`."""
    split: str = "train"
    reading: Reading = Reading()
    note: str = ""
    """What to tell whoever trains on it."""


NAMED = {
    "alpaca": NamedData(hub="tatsu-lab/alpaca", reading=Reading(format="alpaca")),
    "alpaca-clean": NamedData(hub="yahma/alpaca-cleaned", reading=Reading(format="alpaca")),
    "chip2": NamedData(hub="laion/OIG", files=("unified_chip2.jsonl",), reading=Reading(format="transcript")),
    "self-instruct": NamedData(
        hub="yizhongw/self_instruct", subset="self_instruct", reading=Reading(format="input-output")
    ),
    "hh-rlhf": NamedData(hub="Anthropic/hh-rlhf", reading=Reading(format="preference")),
    "longform": NamedData(hub="akoksal/LongForm", reading=Reading(format="input-output")),
    "oasst1": NamedData(hub="timdettmers/openassistant-guanaco", reading=Reading(format="text")),
    "vicuna": NamedData(
        hub="anon8231489123/ShareGPT_Vicuna_unfiltered",
        files=("ShareGPT_V3_unfiltered_cleaned_split.json",),
        reading=Reading(format="sharegpt"),
        note="Vicuna's own data was never released: this is ShareGPT, cleaned and split as Vicuna's authors describe",
    ),
    "evol-instruct": NamedData(hub="WizardLMTeam/WizardLM_evol_instruct_V2_196k", reading=Reading(format="sharegpt")),
    "dolly-15k": NamedData(hub="databricks/databricks-dolly-15k", reading=Reading(format="alpaca")),
    "olcc": NamedData(
        hub="lorinma/BAAI_OL-CC",
        files=("BAAI_OL-CC_QA_sharegpt_10006.jsonl",),
        reading=Reading(format="sharegpt"),
        note="BAAI's OL-CC has no repository of its own on the hub: this is a copy of its 10,006 answered instructions",
    ),
}
"""Data sets by the names that QLoRA and LLamaTuner gave them."""

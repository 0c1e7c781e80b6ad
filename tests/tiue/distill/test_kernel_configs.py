"""A run goes on under the launch configurations that it was started with."""

import json

import pytest

from tiue.distill.checkpoint import RunState
from tiue_kernels import configs

GPU = "Some GPU"


def tables(rows: int) -> dict:
    return {GPU: {"geglu": {"bucket": {"BLOCK_R": rows}}}}


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr(configs, "_tables", {})


def test_a_checkpoint_holds_what_was_in_use_and_a_resumed_run_takes_it(caplog):
    configs.use(tables(4))
    state = RunState(samples_per_step=2, prompts_digest="p", step=7)
    saved = json.loads(json.dumps(state.state_dict()))
    configs.reset()
    configs.use(tables(8))  # tuned anew in between

    resumed = RunState(samples_per_step=2, prompts_digest="p")
    with caplog.at_level("INFO", "tiue.distill"):
        resumed.load_state_dict(saved)
    assert resumed.step == 7
    assert configs.in_use() == tables(4)
    assert GPU in caplog.text


def test_a_checkpoint_from_before_there_were_any_loads():
    saved = RunState(samples_per_step=2, prompts_digest="p", step=3).state_dict()
    del saved["kernel_configs"]
    configs.use(tables(8))
    resumed = RunState(samples_per_step=2, prompts_digest="p")
    resumed.load_state_dict(saved)
    assert (resumed.step, configs.in_use()) == (3, tables(8))

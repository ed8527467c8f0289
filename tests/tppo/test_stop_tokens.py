"""Which tokens end a response: the tokenizer's, the model's own, and those of the configuration."""

import json
import shutil

import pytest

from profiling.reader import Run
from tppo.data.tokenizer import character_tokenizer
from tppo.models.policy import load_policy, own_stops
from tppo.rewards.make import reward_of
from tppo.rollout.engines import sampling_of
from tppo.start import trainer_for

EOS, COLON, SEMICOLON = character_tokenizer().convert_tokens_to_ids(["$", ":", ";"])


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    """It says that ":" ends a response, too."""
    path = shutil.copytree(tiny_model, tmp_path / "chat")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, COLON]}))
    return path


@pytest.mark.parametrize(("said", "stops"), [({"eos_token_id": [3, 7]}, (3, 7)), ({"eos_token_id": 3}, (3,)), ({}, ()),
                                             ({"eos_token_id": 3, "_from_model_config": True}, ())])  # fmt: skip
def test_a_models_own_stops_are_those_of_its_generation_config(chat_model, said, stops):
    (chat_model / "generation_config.json").write_text(json.dumps(said))
    assert own_stops(load_policy(str(chat_model))[0]) == stops


def test_a_run_stops_at_them_also_after_it_was_resumed(make_config, chat_model):
    def config(steps):
        rollout = {"stop_token_ids": [SEMICOLON], "prompts_per_step": 32}
        logging = {"samples_every": 1, "samples": 32}
        return make_config("run", model={"path": str(chat_model)}, rollout=rollout, train={"steps": steps},
                           logging=logging)  # fmt: skip

    for steps in (2, 4):
        with trainer_for(config(steps), resume=steps == 4) as trainer:
            assert trainer.sampling.stop_token_ids == (EOS, COLON, SEMICOLON)
            trainer.run(False)
    done = Run(trainer.writer.path)
    texts = done.samples[done.samples.finished].response
    assert {text[-1] for text in texts} & {":", ";"}
    assert not any(set(text[:-1]) & {":", ";", "$"} for text in texts)


def test_what_ended_a_response_is_not_graded(make_config):
    config = make_config("run", reward={"kind": "http", "url": "http://x"}, rollout={"stop_token_ids": [SEMICOLON]})
    with reward_of(config, character_tokenizer(), own_stops=(EOS, COLON)) as reward:
        assert set(reward.ends) == {"$", ":", ";"}
    assert sampling_of(config, character_tokenizer(), own_stops=(EOS, COLON)).stop_token_ids == (EOS, COLON, SEMICOLON)

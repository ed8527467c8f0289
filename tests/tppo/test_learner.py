"""The learner on hand-made rows: micro-batches, prefixes, which tokens train what, golden losses."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from tppo.algorithms.recipes import RECIPES
from tppo.data.problem import Problem
from tppo.learner.batch import Spans, forward_spans, mini_batches, pick
from tppo.learner.estimates import estimate, policy_spans, score_log_probs, score_values
from tppo.learner.ewma import ProximalPolicy
from tppo.learner.policy_update import update_policy
from tppo.learner.value_update import update_value
from tppo.models.policy import load_policy, token_log_probs
from tppo.models.prefix import behind_a_detached_prefix
from tppo.models.value import ValueModel

GOLDEN = Path(__file__).parent / "golden_losses.json"
PAD = 0
PROBLEM = Problem("a1=", "1")


@pytest.fixture
def model(tiny_model):
    return load_policy(str(tiny_model))[0]


def make_rows(model, shapes, seed=0):
    """Rows of random tokens. shapes: (prompt, response tokens so far, of them in earlier windows, reward or None)."""
    from tppo.rollout.rows import Row

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, (prompt, response, earlier, reward) in enumerate(shapes):
        ids = torch.randint(2, 60, (prompt + response,), generator=generator).tolist()
        row = Row(number, number // 4, PROBLEM, ids[:prompt], ids[prompt:], window_start=earlier)
        row.finished, row.reward, row.values = reward is not None, reward, [0.0] * earlier
        rows.append(row)
    for row, log_probs in zip(rows, forward_log_probs(model, rows), strict=True):
        # as if sampled by slightly different policies
        row.log_probs = [x + 0.01 * (i % 3 - 1) for i, x in enumerate(log_probs[: len(row.response_ids)])]
    return rows


def forward_log_probs(model, rows):
    with torch.no_grad():
        return forward_spans(
            Spans.responses(rows),
            lambda part: token_log_probs(model, part.input_ids, part.row, part.column, part.targets).log_probs,
            4096, PAD,
        ).tolist()  # fmt: skip


SHAPES = [
    (3, 10, 0, None),  # truncated in its first window
    (4, 24, 20, 1.0),  # resumed, finished well below the window
    (3, 20, 10, None),  # resumed and truncated again
    (5, 10, 0, -1.0),  # finished at the full width of the window
    (3, 1, 0, 1.0),  # one token
    (2, 7, 0, -1.0),
    (3, 24, 20, -1.0),  # reached the maximum
    (6, 9, 0, 1.0),
]
FULL = [(p, n, 0, 1.0 if r is None else r) for p, n, _, r in SHAPES]


def learn(model, name, config, rows, value_model=None, ages=None):
    """One pass of a recipe; returns its metrics, the batches and the value model."""
    recipe = RECIPES[name]
    value_model = value_model or ValueModel(model)
    spans = policy_spans(rows, recipe)
    ages = torch.tensor(ages or [0] * len(spans.rows))
    current = score_log_probs(model, spans, config, PAD) if recipe.proximal == "step_start" else None
    if recipe.has_value_model:
        score_values(value_model, spans, config, PAD)
    policy_batch, value_batch = estimate(spans, ages, recipe, config, policy_version=0, current=current)
    generator = torch.Generator().manual_seed(5)
    metrics = {}
    if recipe.has_value_model:
        optimizer = torch.optim.AdamW(value_model.parameters(), lr=1e-3)
        metrics |= update_value(
            value_model, optimizer, value_batch, recipe, config, PAD, generator,
            epochs=1, steps_per_epoch=config.train.mini_batches, clip=None,
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    proximal = ProximalPolicy(model, 0.5) if recipe.proximal == "ewma" else None
    metrics |= update_policy(model, optimizer, policy_batch, recipe, config, PAD, generator, proximal)
    return metrics, policy_batch, value_batch, value_model


def rows_for(name, model):
    return make_rows(model, SHAPES if RECIPES[name].truncated else FULL)


def config_for(make_config, name, **sections):
    sections.setdefault("algorithm", {})
    sections["algorithm"] = {"trailing_tokens": 2, **sections["algorithm"], "name": name}
    if name == "dapo":
        sections["rollout"] = {"prompts_per_step": 2, "samples_per_prompt": 4}
    return make_config(name, **sections)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_moves_every_parameter(name, model, make_config):
    before = copy.deepcopy(model).state_dict()
    value_before = ValueModel(model).state_dict()
    metrics, _, _, value_model = learn(model, name, config_for(make_config, name), rows_for(name, model))
    assert all(not torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    if RECIPES[name].has_value_model:
        # The head starts at zero, so the first of the two steps moves only it, the second everything.
        assert all(not torch.equal(value_before[key], weight) for key, weight in value_model.state_dict().items())
        assert metrics["critic/vf_loss"] > 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_the_golden_ones(name, model, make_config):
    """A change that should change nothing must leave these alone. After one that should change them,
    TPPO_WRITE_GOLDEN=1 writes them anew; say why in the commit."""
    metrics, *_ = learn(model, name, config_for(make_config, name), rows_for(name, model))
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("TPPO_WRITE_GOLDEN"):
        golden[name] = metrics
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    golden = golden[name]
    assert len(golden) > 10
    for key, value in golden.items():
        assert metrics[key] == (None if value is None else pytest.approx(value, rel=2e-4, abs=1e-6)), key


@pytest.mark.parametrize("name", RECIPES)
def test_many_micro_batches_train_as_one_does(name, tiny_model, make_config):
    weights, metrics = [], []
    for budget in (100_000, 30):
        model = load_policy(str(tiny_model))[0]
        config = config_for(make_config, name, train={"micro_batch_tokens": budget})
        got, *_ = learn(model, name, config, rows_for(name, model))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        metrics.append(got)
    for key, value in metrics[0].items():
        assert metrics[1][key] == (value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)), key
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_a_masked_token_never_changes_a_gradient(name, model, make_config):
    """What is known of tokens outside the mask may be anything: the policy's gradient stays as it is."""
    config = config_for(make_config, name, train={"mini_batches": 1})
    recipe, rows = RECIPES[name], rows_for(name, model)
    _, batch, _, _ = learn(copy.deepcopy(model), name, config, rows)
    gradients = []
    for noise in (0.0, 7.0):
        for table in (batch.advantages, batch.behaviour, batch.current):
            table[~batch.mask] = noise
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        proximal = ProximalPolicy(model, 0.5) if recipe.proximal == "ewma" else None
        update_policy(model, optimizer, batch, recipe, config, PAD, torch.Generator().manual_seed(0), proximal)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().sum() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_which_tokens_train_what_under_truncation(model, make_config):
    rows = make_rows(model, SHAPES)
    _, policy, value, _ = learn(model, "tppo", config_for(make_config, "tppo"), rows)
    # this window's tokens, without the last 2 of truncated rows
    assert policy.mask.sum(1).tolist() == [8, 4, 8, 10, 1, 7, 4, 9]
    # finished rows, all windows
    assert [row.row for row in value.spans.rows] == [1, 3, 4, 5, 6, 7]
    assert value.spans.tokens.tolist() == [24, 10, 1, 7, 24, 9]
    assert value.targets[value.spans.valid].abs().eq(1).all()  # gamma = 1: the terminal reward everywhere


def test_partial_rollouts_train_whole_responses_when_they_finish(model, make_config):
    rows = make_rows(model, SHAPES)
    _, policy, _, _ = learn(model, "partial-rollout", config_for(make_config, "partial-rollout"), rows)
    assert policy.mask.sum(1).tolist() == [24, 10, 1, 7, 24, 9]
    assert not torch.equal(policy.current, policy.behaviour)


def test_no_finished_row_and_no_trained_token_give_null_metrics_not_zero(model, make_config):
    rows = make_rows(model, [(3, 2, 0, None), (4, 2, 0, None)])  # shorter than the trailing filter
    metrics, _, value, _ = learn(model, "tppo", config_for(make_config, "tppo"), rows)
    assert value.spans.rows == []
    assert metrics["critic/vf_loss"] is None
    assert metrics["actor/pg_loss"] is None
    assert metrics["actor/entropy"] is None
    assert metrics["training/trained_tokens"] == 0


def test_an_overlong_answer_is_punished_in_the_advantage_but_not_in_the_reward(model, make_config):
    # L = 24, a fifth is 5 tokens: a response of 24 loses 1, one of 20 loses 1/5, both in one group of four rows
    rows = make_rows(model, [(3, 24, 0, 1.0), (3, 20, 0, 1.0), (3, 5, 0, 1.0), (3, 5, 0, -1.0)])
    _, policy, _, _ = learn(model, "dapo", config_for(make_config, "dapo"), rows)
    # shaped rewards 0, 4/5, 1, -1: mean 1/5, deviations -1/5, 3/5, 4/5, -6/5; squares .04, .36, .64, 1.44
    std = (2.48 / 3) ** 0.5
    expected = [-0.2 / std, 0.6 / std, 0.8 / std, -1.2 / std]
    assert policy.advantages[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert [row.reward for row in rows] == [1.0, 1.0, 1.0, -1.0]


def test_reused_batches_weigh_what_geppo_says(model, make_config):
    rows = make_rows(model, [(3, 8, 0, 1.0), (3, 8, 0, -1.0), (3, 8, 0, 1.0), (3, 8, 0, -1.0)])
    _, policy, _, _ = learn(model, "geppo", config_for(make_config, "geppo"), rows, ages=[0, 1, 2, 3])
    assert policy.row_weights.tolist() == pytest.approx([1.6, 1.2, 0.8, 0.4])


def test_extra_loss_terms_are_off_by_default_and_each_has_its_metric(model, make_config):
    rows = make_rows(model, SHAPES)
    config = config_for(
        make_config, "tppo", algorithm={"entropy_coef": 0.5, "lm_loss_coef": 0.25}, train={"mini_batches": 1}
    )
    metrics, *_ = learn(copy.deepcopy(model), "tppo", config, rows)
    assert metrics["actor/entropy_loss"] == pytest.approx(-0.5 * metrics["actor/entropy"], rel=1e-5)
    good = Spans.responses([row for row in rows if row.finished and row.reward > 0])
    rows_of_log_probs = zip(forward_log_probs(model, good.rows), good.tokens.tolist(), strict=True)
    log_probs = torch.tensor([x for row, count in rows_of_log_probs for x in row[:count]])
    assert metrics["actor/lm_loss"] == pytest.approx(-0.25 * log_probs.mean().item(), rel=1e-5)
    plain, *_ = learn(copy.deepcopy(model), "tppo", config_for(make_config, "tppo"), rows)
    assert plain["actor/entropy_loss"] is plain["actor/lm_loss"] is plain["actor/kl_loss"] is None


def test_a_detached_prefix_gives_the_same_numbers_and_stops_the_gradient(model):
    ids = torch.randint(2, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([0, 5, 12])
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    cut = behind_a_detached_prefix(model, ids, prefix)
    for index, first in enumerate(prefix.tolist()):
        torch.testing.assert_close(cut[index, : 20 - first], whole[index, first:], atol=2e-5, rtol=1e-4)
    # Only row 2's prefix holds token 7: its embedding gets a gradient from an ordinary pass and none from this one.
    ids = ids.where(ids != 7, 8)
    ids[2, 3] = 7
    embedding = model.get_input_embeddings().weight
    whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[2, 12:]
    cut = behind_a_detached_prefix(model, ids, prefix)[2, :8]
    for hidden, reaches in ((whole, True), (cut, False)):
        (gradient,) = torch.autograd.grad(hidden.square().sum(), embedding)
        assert bool(gradient[7].abs().sum() > 0) is reaches
        assert gradient.isfinite().all()


def test_a_detached_prefix_leaves_fresh_rows_alone_and_is_counted(model, make_config):
    results = {}
    for prefix in ("gradient", "detached"):
        for name, shapes in (("fresh", FULL), ("mixed", SHAPES)):
            config = config_for(make_config, "tppo", algorithm={"prefix": prefix}, train={"mini_batches": 1})
            results[name, prefix], *_ = learn(copy.deepcopy(model), "tppo", config, make_rows(model, shapes))
    assert results["fresh", "gradient"] == results["fresh", "detached"]
    assert results["mixed", "detached"]["training/detached_tokens"] == (4 + 20 - 1) + (3 + 10 - 1) + (3 + 20 - 1)
    assert results["mixed", "detached"]["actor/pg_loss"] == pytest.approx(
        results["mixed", "gradient"]["actor/pg_loss"], abs=1e-6
    )
    assert results["mixed", "detached"]["actor/grad_norm"] != results["mixed", "gradient"]["actor/grad_norm"]


def test_a_gradient_is_that_of_autograd_on_two_tokens_written_out(model, make_config):
    """One row of two tokens under PPO: the loss is -(r_0 A_0 + r_1 A_1) / 2 with the log-probabilities of one pass."""
    rows = make_rows(model, [(3, 2, 0, 1.0)])
    config = config_for(make_config, "ppo", train={"mini_batches": 1}, algorithm={"normalise_advantages": False})
    reference = copy.deepcopy(model)
    _, batch, _, _ = learn(copy.deepcopy(model), "ppo", config, rows)
    ids = torch.tensor([[*rows[0].prompt_ids, *rows[0].response_ids]])
    log_probs = reference(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0, [2, 3], ids[0, 3:]]
    ratios = (log_probs - torch.tensor(rows[0].log_probs)).exp()
    assert (ratios - 1).abs().max() < 0.2  # inside the trust region
    (-(ratios * batch.advantages[0]).sum() / 2).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"max_grad_norm": 1e9})})
    update_policy(model, optimizer, batch, RECIPES["ppo"], config, PAD, torch.Generator().manual_seed(0))
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


def test_a_micro_batch_predicts_the_tokens_it_picked(model):
    rows = make_rows(model, SHAPES)
    spans = Spans.windows(rows)
    mask = spans.valid
    part = pick(spans, [2, 1], mask, PAD)
    assert part.targets.tolist() == rows[2].response_ids[10:] + rows[1].response_ids[20:]
    assert part.column.tolist() == [*range(3 + 10 - 1, 3 + 20 - 1), *range(4 + 20 - 1, 4 + 24 - 1)]
    assert part.input_ids.shape == (2, 27)


@pytest.mark.parametrize(("count", "parts"), [(8, 2), (7, 2), (3, 5), (0, 2), (1, 1)])
def test_mini_batches_cover_every_row_once(count, parts):
    got = list(mini_batches(list(range(count)), parts))
    assert sorted(i for part in got for i in part) == list(range(count))
    assert len(got) <= parts

"""Early exits on every parent: forced exits, and what is refused."""

import copy

import pytest
import torch
from early_exit_systems import (
    SIZES,
    assert_all_close,
    each_parent,
    each_system,
    eco_opts,
    same,
    step,
)
from minis import ECO, PROSCALE, build, make_batch

pytestmark = pytest.mark.slow


@each_system
@torch.no_grad()
def test_the_last_exit_is_bit_equal_to_the_parent(system):
    parent, eco = system.models()
    for model in (eco, system.twin(exits=(system.last,))):
        for ours, theirs in zip(model(make_batch(SIZES)), parent(make_batch(SIZES))):
            assert same(ours, theirs) and ours["exit"] == system.last


@each_system
def test_the_last_exit_alone_trains_bit_equal_to_the_parent(system):
    (losses, gradients), (wanted, of_parent) = step(system.twin(exits=(system.last,))), step(system.models()[0])
    assert losses.keys() == wanted.keys() and all(torch.equal(losses[n], wanted[n]) for n in wanted)
    assert gradients.keys() == of_parent.keys() and len(gradients) > 100
    assert all(torch.equal(gradients[n], of_parent[n]) for n in gradients)


@each_parent
@torch.no_grad()
def test_forced_exit_equals_a_parent_with_k_layers(system):
    parent, eco = system.models()
    features = eco.extract(eco.preprocess(make_batch(SIZES)))
    of_exit = eco.head.forward_exits(features, system.exits)
    for k in system.exits:
        shallow = build(system.parent, *system.opts, system.layers, k)
        shallow.load_state_dict({n: v for n, v in parent.state_dict().items() if n in shallow.state_dict()})
        assert_all_close(of_exit[k], shallow.head(features), 1e-5)


@each_parent
@torch.no_grad()
def test_auxiliary_outputs_are_made_in_training_alone(system):
    """Inference computes nothing for them: it predicts classes once."""
    eco = copy.deepcopy(system.models()[1])
    calls = []
    getattr(eco.head, "predictor", eco.head).class_embed.register_forward_hook(lambda *_: calls.append(1))
    features = eco.extract(eco.preprocess(make_batch(SIZES)))
    assert "aux_outputs" not in eco.head(features) and len(calls) == 1
    trained = eco.head.train()(features)
    assert 2 <= len(trained["aux_outputs"]) == len(calls) - 2


@each_parent
def test_more_exits_than_layers_are_refused(system):
    with pytest.raises(ValueError, match="is beyond"):
        system.build_eco(system.layers, 4)


def test_exits_that_the_encoder_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"EXITS \[4, 6\] are not all among the encoder's exits \[5, 6\]"):
        build(ECO, *PROSCALE, *eco_opts(4, 6))


@pytest.mark.parametrize("alphas", [[0.2, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1]])
def test_alpha_that_does_not_increase_is_refused(alphas):
    with pytest.raises(ValueError, match="increas"):
        build(ECO, "MODEL.ECO.ALPHA", alphas)

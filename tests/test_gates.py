"Learned gates: they find the damaged module, leave alone what is the same, and give masks of the size that was asked."

import copy
import pytest, torch
from act.attribute import answer_nats
from act.channels import enumerate_channels
from act.encoding import batches, encode
from act.kit.errors import ActError
from act.masks import top_p
from act.scores import ChannelScores
from act.studies.gates import GatedModel, learn_gates, sample_nats
from helpers import TOY as ABILITY
from conftest import tiny_model

pytestmark = pytest.mark.filterwarnings('ignore:.*answer tokens from')


@pytest.fixture
def work(tokenizer):
    return encode(ABILITY, tokenizer, 'predict')


@pytest.fixture
def trained(tokenizer, work):
    "A tiny model that has learned the toy ability."
    model = tiny_model('qwen2_untied')
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        adam.zero_grad()
        sample_nats(model, work, tokenizer)
        adam.step()
    model.zero_grad()
    return model


def damaged(model, *paths):
    "A copy of a model with noise in some modules."
    out = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path in paths:
            weight = out.get_submodule(path).weight
            weight.add_(torch.randn(weight.shape, generator=generator))
    return out


def nats(model, work, tokenizer):
    with torch.no_grad():
        total = sum(answer_nats(model, b).item() for b in batches(work, tokenizer, padding_side='left'))
    return total / sum(len(e.answer) for e in work)


def test_at_both_ends_the_model_is_target_and_donor(family, tokenizer, work):
    a, b = tiny_model(family), tiny_model(family, 1)
    gated = GatedModel(a, b)
    for value, model in ((0.0, a), (1.0, b)):
        gated.move(torch.full((gated.map.total,), value))
        assert nats(gated.model, work, tokenizer) == pytest.approx(nats(model, work, tokenizer), rel=1e-4)


def test_passes_under_autocast_use_the_weights_of_the_gates(tokenizer, work):
    a, b = tiny_model('qwen2'), tiny_model('qwen2', 1)
    gated = GatedModel(a, b)
    with torch.autocast('cpu', torch.bfloat16):  # keeps casts of the weights until it ends
        for value, model in ((0.0, a), (1.0, b)):
            gated.move(torch.full((gated.map.total,), value))
            assert nats(gated.model, work, tokenizer) == pytest.approx(nats(model, work, tokenizer), rel=1e-3)


def test_the_gradient_is_the_slope_of_the_loss(family, tokenizer, work):
    gated = GatedModel(tiny_model(family), tiny_model(family, 1))
    gates = torch.full((gated.map.total,), 0.1)
    gated.move(gates)
    sample_nats(gated.model, work, tokenizer)
    found = gated.gradient()
    way = found / found.norm()
    ends = []
    for step in (-0.005, 0.005):
        gated.move(gates + step * way)
        ends.append(nats(gated.model, work, tokenizer))
    assert (ends[1] - ends[0]) / 0.01 == pytest.approx(found.norm().item(), rel=0.05)
    assert all(p.grad is None for p in gated.model.parameters())


def test_only_a_damaged_module_is_found(trained, tokenizer):
    path = 'model.layers.1.mlp.down_proj'
    scores = learn_gates(damaged(trained, path), trained, ABILITY, tokenizer, 0.02, steps=10)
    mask = top_p(scores, 0.02)
    assert mask[path].sum() == mask.count > 0
    assert all(not scores[m.path].any() for m in scores.map if m.path != path)


def test_gates_open_for_what_matters(trained, tokenizer, work):
    "Every module of the target is a little off, and one is broken: the broken one is found."
    path = 'model.layers.1.mlp.down_proj'
    target = damaged(trained, path)
    with torch.no_grad():
        for p in target.parameters():
            p.add_(1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    scores = learn_gates(target, trained, ABILITY, tokenizer, 0.03, steps=40)
    mask = top_p(scores, 0.03)
    assert mask[path].sum() > 0.6 * mask.count
    first, *_, last = scores.meta['nats_steps']['recovered']
    assert last < first


@pytest.mark.parametrize('p', [0.01, 0.1, 0.5])
def test_masks_have_the_size_that_was_asked(pair, tokenizer, p):
    scores = learn_gates(*pair, ABILITY, tokenizer, p, steps=20)
    assert top_p(scores, p).count == round(p * scores.map.total)
    assert scores.meta['mean'] == pytest.approx(p, rel=0.5)
    assert (scores.flat() > 0).all() and (scores.flat() < 1).all()


def test_what_should_stay_stays(pair, tokenizer):
    gated, one, two = GatedModel(*pair), ABILITY[:2], ABILITY[2:]
    options, lost = dict(steps=30, lr=0.3), []
    for extra in ({}, dict(retained=two, mu=5.0)):
        scores = learn_gates(*pair, one, tokenizer, 0.3, **options, **extra)
        assert set(scores.meta['nats_steps']) == {'recovered', *{'retained'} & set(extra)}
        gated.move(scores.flat())
        lost.append(nats(gated.model, encode(two, tokenizer, 'predict'), tokenizer))
    assert lost[1] < lost[0]
    assert scores.meta['mu'] == 5.0 and scores.meta['retained'] == two.name


def test_the_same_seed_gives_the_same_gates(pair, tokenizer, tmp_path):
    one, two, other = (learn_gates(*pair, ABILITY, tokenizer, 0.1, steps=3, batch=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.flat(), two.flat())
    assert not torch.equal(one.flat(), other.flat())
    back = ChannelScores.load(one.save(tmp_path / 'gates.safetensors'))
    assert back.meta == one.meta and torch.equal(back.flat(), one.flat())


def test_the_models_stay_as_they_are(pair, tokenizer):
    before = [copy.deepcopy(m.state_dict()) for m in pair]
    learn_gates(*pair, ABILITY, tokenizer, 0.1, steps=2)
    for model, old in zip(pair, before):
        assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())


def test_two_models_with_the_same_weights_are_refused(tokenizer):
    with pytest.raises(ActError, match='have the same weights'):
        learn_gates(tiny_model(), tiny_model(), ABILITY, tokenizer, 0.1)


@pytest.mark.parametrize(
    'wrong', [dict(p=0), dict(p=1), dict(steps=0), dict(batch=0), dict(batch=1.5), dict(lr=0), dict(mu=-1)]
)
def test_impossible_settings_are_named(pair, tokenizer, wrong):
    with pytest.raises(ActError, match=f'{next(iter(wrong))} is'):
        learn_gates(*pair, ABILITY, tokenizer, **{'p': 0.1, **wrong})

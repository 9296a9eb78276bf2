"Attribute, move, attribute again: nested masks of exact sizes, equal to the steps made by hand."

import importlib
import pytest, torch
from act.attribute import attribute, trade_aware
from act.channels import enumerate_channels
from act.kit.errors import ActError
from act.masks import ChannelMask, top_p
from act.repeated import attribute_repeatedly, best_of, step_scores
from act.scores import Attribution, ChannelScores
from act.transfer import transfer
from helpers import TOY as ABILITY
from conftest import tiny_model

stage = importlib.import_module('act.repeated')
pytestmark = pytest.mark.filterwarnings('ignore:.*answer tokens from')
ONE, TWO, SIZES = ABILITY[:2], ABILITY[2:], (0.01, 0.03, 0.1)
OPTIONS = dict(sizes=SIZES, points=2, progress=False)


def mask_of(places, cm):
    bits = torch.zeros(cm.total, dtype=torch.bool)
    bits[places] = True
    return ChannelMask.from_flat(bits, cm)


def by_hand(a, b, tokenizer, retained=None, mu=1.0):
    "The sets of every size, with the functions of other pages."
    cm, chosen, masks = enumerate_channels(a), [], []
    for p in SIZES:
        model = transfer(a, b, mask_of(chosen, cm)) if chosen else a
        scores = attribute(model, b, ONE, tokenizer, points=2, check=False, progress=False)
        if retained:
            kept = attribute(model, b, retained, tokenizer, points=2, check=False, progress=False)
            scores = trade_aware(scores, kept, mu)
        ranked = scores.flat().argsort(descending=True, stable=True).tolist()
        chosen = chosen + [i for i in ranked if i not in chosen][: round(p * cm.total) - len(chosen)]
        masks.append(mask_of(chosen, cm))
    return masks


@pytest.mark.parametrize('retained', [None, TWO])
def test_equals_the_steps_made_by_hand(family, tokenizer, retained):
    a, b = tiny_model(family), tiny_model(family, 1)
    scores = attribute_repeatedly(a, b, ONE, tokenizer, retained, mu=2.0, **OPTIONS)
    for p, mask in zip(SIZES, by_hand(a, b, tokenizer, retained, 2.0)):
        assert top_p(scores, p) == mask


def test_masks_are_nested_and_of_exact_size(pair, tokenizer):
    scores = attribute_repeatedly(*pair, ONE, tokenizer, TWO, **OPTIONS)
    total = scores.map.total
    masks = [top_p(scores, p) for p in (0.002, 0.01, 0.02, 0.03, 0.05, 0.1)]
    for p, mask in zip((0.002, 0.01, 0.02, 0.03, 0.05, 0.1), masks):
        assert mask.count == max(1, round(p * total))
    for small, large in zip(masks, masks[1:]):
        assert (small - large).count == 0
    assert int((scores.flat() > 0).sum()) == round(0.1 * total)


def test_the_order_of_sizes_does_not_matter_and_equal_counts_are_one_step(pair, tokenizer):
    one = attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS)
    sizes = (0.1, 0.01, 0.03, 0.0300001)
    other = attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS | dict(sizes=sizes))
    assert torch.equal(one.flat(), other.flat())
    assert len(other.meta['nats_steps']) == 3


def test_a_size_of_less_than_a_channel_is_one_channel(pair, tokenizer):
    scores = attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS | dict(sizes=(1e-6,)))
    assert (scores.flat() > 0).sum() == 1


def test_says_what_was_done(pair, tokenizer, tmp_path):
    scores = attribute_repeatedly(*pair, ONE, tokenizer, TWO, mu=0.5, **OPTIONS)
    first = attribute(*pair, ONE, tokenizer, points=2, progress=False)
    meta = scores.meta
    assert (meta['made'], meta['retained'], meta['mu']) == ('attribution, repeated', TWO.name, 0.5)
    assert (meta['sizes'], meta['points'], meta['ability']) == (list(SIZES), 2, ONE.name)
    assert len(meta['nats_steps']) == len(meta['nats_retained']) == 3
    assert meta['nats_steps'][0] == pytest.approx(first.meta['nats_target'])
    back = ChannelScores.load(scores.save(tmp_path / 's.safetensors'))
    assert type(back) is ChannelScores and back.meta == meta and torch.equal(back.flat(), scores.flat())


def test_the_masks_fit_the_pair_they_were_made_for(pair, tokenizer):
    mask = top_p(attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS), 0.1)
    transfer(*pair, mask)
    with pytest.raises(ActError, match='made for another target'):
        transfer(tiny_model('qwen2', 5), pair[1], mask)


def test_names_and_memory_agree(checkpoint, pair, tokenizer):
    folders = [checkpoint(name, m) for name, m in zip('ab', pair)]
    memory = attribute_repeatedly(*pair, ONE, tokenizer, TWO, **OPTIONS)
    mixed = attribute_repeatedly(pair[0], folders[1], ONE, retained=TWO, **OPTIONS)
    named = attribute_repeatedly(*folders, ONE, retained=TWO, device='cpu', **OPTIONS)
    assert torch.equal(named.flat(), memory.flat()) and torch.equal(mixed.flat(), memory.flat())


def test_the_models_stay_as_they_are(pair, tokenizer):
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in pair]
    attribute_repeatedly(*pair, ONE, tokenizer, TWO, **OPTIONS)
    for m, old in zip(pair, before):
        assert all(torch.equal(v, old[k]) for k, v in m.state_dict().items())


def test_only_channels_that_differ_are_chosen(tokenizer):
    "Where few channels differ it stops with them, and does not attribute two equal models."
    a, b = tiny_model('qwen2_untied'), tiny_model('qwen2_untied')
    with torch.no_grad():
        b.model.layers[1].mlp.down_proj.weight[:3] += 0.1
    with pytest.warns(UserWarning, match='channels were chosen'):
        scores = attribute_repeatedly(a, b, ABILITY, tokenizer, **OPTIONS | dict(sizes=(0.001, 0.002, 0.003, 0.5, 1.0)))
    chosen = scores.flat() > 0
    assert 0 < int(chosen.sum()) <= 3
    assert int((scores['model.layers.1.mlp.down_proj'][:3] > 0).sum()) == int(chosen.sum())


def test_stops_where_no_channel_helps(pair, tokenizer, monkeypatch):
    "The second step finds nothing: what was chosen before stays, and a warning says so."
    real, seen = stage.attribute, []

    def none_left(*args, **options):
        found = real(*args, **options)
        seen.append(found)
        return (
            found
            if len(seen) == 1
            else Attribution({p: -v.abs() for p, v in found.data.items()}, found.map, found.meta)
        )

    monkeypatch.setattr(stage, 'attribute', none_left)
    with pytest.warns(UserWarning, match='no other had a score above zero'):
        scores = attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS)
    assert len(seen) == 2
    assert int((scores.flat() > 0).sum()) == round(SIZES[0] * scores.map.total)


def test_where_the_retained_ability_cannot_change_the_step_is_plain(pair, tokenizer, monkeypatch):
    real = stage.attribute

    def no_part(model, donor, ability, *args, **options):
        found = real(model, donor, ability, *args, **options)
        return (
            Attribution({p: 0 * v for p, v in found.data.items()}, found.map, found.meta) if ability is TWO else found
        )

    plain = attribute_repeatedly(*pair, ONE, tokenizer, **OPTIONS)
    monkeypatch.setattr(stage, 'attribute', no_part)
    scores = attribute_repeatedly(*pair, ONE, tokenizer, TWO, **OPTIONS)
    assert torch.equal(scores.flat(), plain.flat())


def test_the_best_that_are_left():
    cm = enumerate_channels(tiny_model())
    values, taken = -torch.ones(cm.total), torch.zeros(cm.total, dtype=torch.bool)
    values[[3, 7, 11]] = torch.tensor([1.0, 3.0, 2.0])
    taken[7] = True
    scores = Attribution.from_flat(values, cm)
    assert best_of(scores, taken, 1).tolist() == [11]
    assert best_of(scores, taken, 9).tolist() == [11, 3]


def test_a_step_is_the_attribution_of_both(pair, tokenizer):
    options = dict(points=1, progress=False)
    one, two = (attribute(*pair, a, tokenizer, **options) for a in (ONE, TWO))
    scores, nats, known = step_scores(*pair, [ONE, TWO], tokenizer, 2.0, **options)
    assert torch.equal(scores.flat(), trade_aware(one, two, 2.0).flat())
    assert nats == [one.meta['nats_target'], two.meta['nats_target']]
    assert known['ability'] == ONE.name and 'nats_target' not in known


def test_two_models_with_the_same_weights_are_refused(tokenizer):
    with pytest.raises(ActError, match='have the same weights'):
        attribute_repeatedly(tiny_model(), tiny_model(), ONE, tokenizer, **OPTIONS)


def test_models_that_do_not_fit_are_refused(tokenizer):
    with pytest.raises(ActError):
        attribute_repeatedly(tiny_model('qwen2'), tiny_model('llama2'), ONE, tokenizer, **OPTIONS)


def test_scores_are_no_retained_ability(pair, tokenizer):
    other = attribute(pair[0], tiny_model(seed=2), TWO, tokenizer, points=1, progress=False)
    with pytest.raises(ActError, match='give the ability itself'):
        attribute_repeatedly(*pair, ONE, tokenizer, other, **OPTIONS)


@pytest.mark.parametrize('sizes', [(), (0,), (0.1, 1.5), (-0.1,), (float('nan'),)])
def test_impossible_sizes(pair, tokenizer, sizes):
    with pytest.raises(ActError, match='sizes are'):
        attribute_repeatedly(*pair, ONE, tokenizer, sizes=sizes, progress=False)

"Attribute, move, attribute again: sets that contain each other, of the sizes asked for, chosen where the last step left off."

import pytest, torch
from act.abilities import Ability
from act.attribute import attribute, trade_aware
from act.kit.errors import ActError
from act.masks import top_p
from act.repeated import attribute_repeatedly
from act.transfer import transfer
from conftest import tiny_model
from helpers import TOY as ABILITY
from test_attribute import pair_of

SIZES, OPTIONS = (0.02, 0.05, 0.1), dict(points=2, check=False, progress=False)
OTHER = Ability('other', ABILITY.items[:2])


def test_the_sets_contain_each_other_and_have_the_sizes_asked_for(family, tokenizer):
    scores = attribute_repeatedly(*pair_of(family), ABILITY, tokenizer, sizes=SIZES, **OPTIONS)
    masks = [top_p(scores, p) for p in SIZES]
    assert [m.count for m in masks] == [round(p * scores.map.total) for p in SIZES]
    assert all((a - b).count == 0 for a, b in zip(masks, masks[1:]))
    assert int((scores.flat() > 0).sum()) == masks[-1].count


def test_every_step_begins_where_the_last_one_moved_to(tokenizer):
    target, donor = pair_of('llama3')
    found = attribute_repeatedly(target, donor, ABILITY, tokenizer, OTHER, mu=2.0, sizes=SIZES[:2], **OPTIONS)
    first = top_p(
        trade_aware(*(attribute(target, donor, a, tokenizer, **OPTIONS) for a in (ABILITY, OTHER)), 2.0), 0.02
    )
    assert top_p(found, 0.02) == first
    moved = transfer(target, donor, first, check=False)
    again = trade_aware(*(attribute(moved, donor, a, tokenizer, **OPTIONS) for a in (ABILITY, OTHER)), 2.0).flat()
    second = again.argsort(descending=True)[: round(0.05 * found.map.total) - first.count]
    expected = first.flat().clone()
    expected[second] = True
    assert torch.equal(top_p(found, 0.05).flat(), expected)
    assert found.meta['retained'] == 'other'
    assert len(found.meta['nats_steps']) == 2


def test_the_order_of_sizes_does_not_matter_and_the_models_stay_as_they_are(tokenizer):
    target, donor = pair_of('qwen2')
    before = [p.clone() for m in (target, donor) for p in m.parameters()]
    one = attribute_repeatedly(target, donor, ABILITY, tokenizer, sizes=SIZES, **OPTIONS)
    two = attribute_repeatedly(target, donor, ABILITY, tokenizer, sizes=SIZES[::-1], **OPTIONS)
    assert torch.equal(one.flat(), two.flat())
    assert all(torch.equal(p, q) for p, q in zip(before, [p for m in (target, donor) for p in m.parameters()]))


def test_it_stops_where_no_channel_is_above_zero(tokenizer):
    with pytest.warns(match='stopping there'):
        scores = attribute_repeatedly(*pair_of('llama3'), ABILITY, tokenizer, sizes=(0.1, 1.0), **OPTIONS)
    assert 0 < int((scores.flat() > 0).sum()) < scores.map.total


def test_sizes_and_equal_models_are_checked(tokenizer):
    target, donor = pair_of('llama3')
    for sizes in ((), (0.0, 0.1), (0.1, 1.5)):
        with pytest.raises(ActError, match='sizes are'):
            attribute_repeatedly(target, donor, ABILITY, tokenizer, sizes=sizes, **OPTIONS)
    same = tiny_model('llama3')
    with pytest.raises(ActError, match='nothing to move'):
        attribute_repeatedly(same, same, ABILITY, tokenizer, sizes=SIZES, **OPTIONS)

"Attribute: complete on every architecture, equal to gates moved by hand, whatever the batches, processes and points."

import importlib
import pytest, torch
from act.attribute import StraightPath, attribute, midpoints, recompute_activations, trade_aware
from act.channels import enumerate_channels
from act.encoding import batches, encode
from act.kit.errors import ActError
from act.masks import random_mask, top_p
from act.scores import Attribution, ChannelScores
from act.sources import load_ability
from act.transfer import transfer
from helpers import TOY as ABILITY
from conftest import tiny_model
from torch.func import functional_call

stage = importlib.import_module('act.attribute')  # `act.attribute` is the function


def near(a, b, share=0.2):
    "A model a small step from another, so that few points of the way are enough."
    with torch.no_grad():
        for p, q in zip(a.parameters(), b.parameters()):
            q.copy_(p + share * (q - p))
    return b


def pair_of(family):
    a, b = tiny_model(family), tiny_model(family, 1)
    return a, near(a, b)


def nats(model, tok, items=ABILITY):
    "Nats per answer token, one item at a time, no padding."
    total = count = 0
    for e in encode(items, tok):
        with torch.no_grad():
            logp = model(torch.tensor([e.input_ids])).logits[0].float().log_softmax(-1)
        total -= sum(logp[i - 1, e.input_ids[i]].item() for i in e.answer)
        count += len(e.answer)
    return total / count


def by_gates(a, b, tok, points, tied='embedding'):
    "One gate for each channel, differentiated by autograd itself, one item at a time."
    cm = enumerate_channels(a, tied)
    start, change = dict(a.named_parameters()), {}
    theirs = dict(b.named_parameters())
    for name, p in start.items():
        change[name] = (theirs[name] - p).detach()
    total, count = torch.zeros(cm.total, dtype=torch.float64), sum(len(e.answer) for e in encode(ABILITY, tok))
    for point in midpoints(points):
        gates = {m.path: torch.full((m.width,), point, requires_grad=True) for m in cm}
        moved = {name: p.detach() for name, p in start.items()}
        for m in cm:
            for name, axis in m.params:
                shape = [-1 if i == axis else 1 for i in range(start[name].ndim)]
                moved[name] = start[name].detach() + gates[m.path].view(shape) * change[name]
        loss = 0
        for e in encode(ABILITY, tok):
            logp = functional_call(a, moved, (torch.tensor([e.input_ids]),)).logits[0].float().log_softmax(-1)
            loss = loss - sum(logp[i - 1, e.input_ids[i]] for i in e.answer)
        found = torch.autograd.grad(loss / count, list(gates.values()), allow_unused=True)
        found = [torch.zeros(m.width) if g is None else g for g, m in zip(found, cm)]
        total -= torch.cat(found).double() / len(midpoints(points))
    return total


@pytest.mark.parametrize('points', [0, 3])
def test_equals_gates_by_autograd(family, tokenizer, points):
    a, b = pair_of(family)
    s = attribute(a, b, ABILITY, tokenizer, points=points, progress=False)
    assert torch.allclose(s.flat().double(), by_gates(a, b, tokenizer, points), rtol=1e-3, atol=1e-6)


def test_complete_on_every_architecture(family, tokenizer):
    a, b = pair_of(family)
    s = attribute(a, b, ABILITY, tokenizer, progress=False)
    fall = nats(a, tokenizer) - nats(b, tokenizer)
    assert s.flat().double().sum().item() == pytest.approx(fall, rel=0.02, abs=1e-4)


def test_the_losses_of_both_ends_are_those_of_the_models(family, tokenizer):
    a, b = pair_of(family)
    s = attribute(a, b, ABILITY, tokenizer, points=1, progress=False)
    assert s.meta['nats_target'] == pytest.approx(nats(a, tokenizer), rel=1e-4)
    assert s.meta['nats_donor'] == pytest.approx(nats(b, tokenizer), rel=1e-4)


def test_passes_under_autocast_use_the_weights_of_their_own_point(tokenizer):
    a, b = pair_of('qwen2')
    plain = attribute(a, b, ABILITY, tokenizer, progress=False)
    with torch.autocast('cpu', torch.bfloat16):  # keeps casts of the weights until it ends
        rough = attribute(a, b, ABILITY, tokenizer, progress=False)
    for end in ('nats_target', 'nats_donor'):
        assert rough.meta[end] == pytest.approx(plain.meta[end], rel=0.01)
    assert torch.corrcoef(torch.stack([plain.flat(), rough.flat()]))[0, 1] > 0.99


def test_complete_on_the_lab():
    s = attribute('lab/maths-en', 'lab/base', 'lab/science-zh', dtype='float32', progress=False)
    fall = s.meta['nats_target'] - s.meta['nats_donor']
    assert abs(s.flat().double().sum().item() / fall - 1) < 0.02


@pytest.mark.parametrize('family', ['qwen2', 'gemma3'])
def test_the_other_tie_policy(family, tokenizer):
    a, b = pair_of(family)
    s = attribute(a, b, ABILITY, tokenizer, points=2, tied='lm_head', progress=False)
    assert 'lm_head' in s.map
    assert torch.allclose(s.flat().double(), by_gates(a, b, tokenizer, 2, 'lm_head'), rtol=1e-3, atol=1e-6)


def test_a_parameter_that_did_not_change_has_no_part(tokenizer):
    a, b = pair_of('qwen2_untied')
    with torch.no_grad():
        b.lm_head.weight.copy_(a.lm_head.weight)
    s = attribute(a, b, ABILITY, tokenizer, points=2, progress=False)
    assert not s['lm_head'].any()
    assert s['model.norm'].any()


def test_linear_in_the_change_of_a_linear_loss(tokenizer, monkeypatch):
    "With a loss that is linear in the weights, the score is what moving a channel brings, at any number of points."
    a, b = tiny_model('qwen2_untied'), tiny_model('qwen2_untied', 1)
    monkeypatch.setattr(stage, 'answer_nats', lambda model, batch: 1000 - model.lm_head.weight.sum())
    one, many = (attribute(a, b, ABILITY, tokenizer, points=k, progress=False) for k in (1, 5))
    gain = (b.lm_head.weight - a.lm_head.weight).sum(1).detach()
    batch_count = len(list(batches(encode(ABILITY, tokenizer, 'predict'), tokenizer)))
    want = gain * batch_count / one.meta['tokens']
    assert torch.allclose(one['lm_head'], want, rtol=1e-4, atol=1e-6)
    assert torch.allclose(one.flat(), many.flat(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('family', ['qwen2', 'qwen3', 'gemma3'])
def test_batches_and_padding_do_not_matter(family, tokenizer):
    a, b = pair_of(family)
    options = dict(points=2, progress=False)
    one, many = (attribute(a, b, ABILITY, tokenizer, batch_tokens=n, **options).flat() for n in (1, 10_000))
    assert torch.allclose(one, many, rtol=1e-3, atol=1e-6)


def test_names_folders_and_memory_agree(checkpoint, tokenizer):
    a, b = pair_of('qwen2')
    folders = checkpoint('a', a), checkpoint('b', b)
    options = dict(points=2, progress=False)
    memory = attribute(a, b, ABILITY, tokenizer, **options)
    for hold in ('one', 'both'):
        assert torch.equal(attribute(*folders, ABILITY, hold=hold, **options).flat(), memory.flat())
    assert torch.equal(attribute(*folders, ABILITY, device_map={'': 'cpu'}, **options).flat(), memory.flat())


def test_the_models_stay_as_they_are(tokenizer):
    a, b = pair_of('qwen2')
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    attribute(a, b, ABILITY, tokenizer, points=1, progress=False)
    for m, old in zip((a, b), before):
        assert all(torch.equal(v, old[k]) for k, v in m.state_dict().items())
        assert all(p.grad is None for p in m.parameters())


def test_recomputing_activations_changes_no_number(family, tokenizer):
    a, b = pair_of(family)
    options = dict(points=2, progress=False)
    plain, again = (attribute(a, b, ABILITY, tokenizer, recompute=r, **options).flat() for r in (False, True))
    assert torch.allclose(plain, again, rtol=1e-4, atol=1e-7)


def test_recomputing_drops_nothing_out():
    model = tiny_model()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    recompute_activations(model)
    x = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(x).logits, model(x).logits)


def test_no_more_than_one_gradient_is_held(family, tokenizer, monkeypatch):
    held, real = [], StraightPath.change

    def change(path, name):
        held.append(sum(p.grad is not None for p in path.parameters.values()))
        return real(path, name)

    monkeypatch.setattr(StraightPath, 'change', change)
    attribute(*pair_of(family), ABILITY, tokenizer, points=1, progress=False)
    assert max(held) == 1


@pytest.mark.parametrize('stop', [1, 5])
def test_what_was_stopped_goes_on_with_the_same_bits(tokenizer, tmp_path, monkeypatch, stop):
    from act.hooks import Sums

    pair, options = pair_of('qwen2'), dict(points=2, batch_tokens=8, progress=False)
    whole = attribute(*pair, ABILITY, tokenizer, **options)
    real, seen = Sums.done, []

    def done(sums):
        real(sums)
        seen.append(sums.batches)
        if len(seen) == stop and sums.batches == stop:
            raise RuntimeError('stopped')

    monkeypatch.setattr(Sums, 'done', done)
    options |= dict(state=tmp_path, save_seconds=0)
    with pytest.raises(RuntimeError, match='stopped'):
        attribute(*pair, ABILITY, tokenizer, **options)
    seen.clear()
    again = attribute(*pair, ABILITY, tokenizer, **options)
    assert seen[0] == stop + 1
    assert torch.equal(again.flat(), whole.flat())
    assert again.meta == whole.meta


def test_bf16_is_close(checkpoint):
    a, b = pair_of('qwen2')
    folders = checkpoint('a', a.bfloat16()), checkpoint('b', b.bfloat16())
    half, wide = (attribute(*folders, ABILITY, dtype=d, progress=False).flat() for d in ('auto', 'float32'))
    assert torch.corrcoef(torch.stack([half, wide]))[0, 1] > 0.95


def test_the_file_says_which_score_it_holds(tokenizer, tmp_path):
    s = attribute(*pair_of('qwen2'), ABILITY, tokenizer, points=2, progress=False)
    assert (s.flat() < 0).any()
    back = ChannelScores.load(s.save(tmp_path / 's.safetensors'))
    assert type(back) is Attribution
    assert back.meta == s.meta
    assert torch.equal(back.flat(), s.flat())
    assert back.meta['points'] == 2 and len(back.meta['nats_path']) == 2


def test_plain_scores_may_not_be_negative(tokenizer, tmp_path):
    s = attribute(*pair_of('qwen2'), ABILITY, tokenizer, points=1, progress=False)
    ChannelScores(s.data, s.map).save(tmp_path / 's.safetensors')
    with pytest.raises(ActError, match='negative values'):
        ChannelScores.load(tmp_path / 's.safetensors')


def test_a_mask_takes_what_is_above_zero_and_says_how_many(tokenizer):
    s = attribute(*pair_of('qwen2'), ABILITY, tokenizer, points=1, progress=False)
    positive = int((s.flat() > 0).sum())
    with pytest.warns(UserWarning, match=f'only {positive:,} of'):
        mask = top_p(s, 1.0)
    assert mask.count == positive
    assert (s.flat()[mask.flat()] > 0).all()
    assert random_mask(mask).count == positive


def test_no_channel_above_zero():
    cm = enumerate_channels(tiny_model())
    with pytest.raises(ActError, match='no score is above zero'):
        top_p(Attribution.from_flat(-torch.ones(cm.total), cm), 0.1)


def test_trade_aware_is_the_weighted_sum(tokenizer):
    a, b = pair_of('qwen2')
    first, second = (
        attribute(a, b, ABILITY[part], tokenizer, points=1, progress=False) for part in (slice(2), slice(2, 4))
    )
    x, y = (s.flat().double() for s in (first, second))
    for mu in (0, 0.5, 2):
        want = x / x.sum().abs() + mu * y / y.sum().abs()
        got = trade_aware(first, second, mu)
        assert torch.allclose(got.flat().double(), want, rtol=1e-4, atol=1e-6)
        assert got.meta['mu'] == mu and got.meta['retained'] == 'toy-en'


def test_trade_aware_refuses_another_pair(tokenizer):
    a, b = pair_of('qwen2')
    options = dict(points=1, progress=False)
    first, other = (attribute(a, m, ABILITY, tokenizer, **options) for m in (b, tiny_model(seed=2)))
    with pytest.raises(ActError, match='not of the same target and donor'):
        trade_aware(first, other)


def test_what_is_found_brings_part_of_the_ability_back_on_the_lab():
    "Two percent of the channels bring back a quarter of what was lost, without fine-tuning; random ones hardly any."
    from act.evaluate import evaluate
    from act.loading import load_model

    target, tok = load_model('lab/maths-en', dtype='float32')
    donor, _ = load_model('lab/base', dtype='float32')
    s = attribute(target, donor, load_ability('lab/science-zh', 'localize', 128), tok, progress=False)
    mask, held_out = top_p(s, 0.02), load_ability('lab/science-zh', 'validation', 100)

    def right(model):
        return evaluate(model, held_out, tok, progress=False).table().accuracy.iloc[0]

    without, lost = right(target), right(donor) - right(target)
    found, drawn = ((right(transfer(target, donor, m)) - without) / lost for m in (mask, random_mask(mask)))
    assert lost > 0.4
    assert found > 0.25
    assert drawn < 0.1


def test_two_processes_give_what_one_gives(launch, tmp_path):
    load_ability('lab/science-zh', 'localize', 60).save(tmp_path / 'x.jsonl')
    out = {n: tmp_path / f'{n}.safetensors' for n in (1, 2)}
    for n, file in out.items():
        words = f'--by attribution --points 2 --target lab/maths-en --donor lab/base --ability {tmp_path}/x.jsonl'
        done = launch('act_localize', *words.split(), '--batch_tokens', '512', '--out', str(file), n=n)
        assert done.returncode == 0 and done.stdout.count('Attribution') == 1, done.stderr[-2000:]
    one, two = (ChannelScores.load(f) for f in out.values())
    assert torch.allclose(one.flat(), two.flat(), rtol=1e-3, atol=1e-6)
    assert one.meta['nats_target'] == pytest.approx(two.meta['nats_target'], rel=1e-6)


@pytest.mark.parametrize('points', [-1, 2.5])
def test_impossible_points(pair, tokenizer, points):
    with pytest.raises(ActError, match='points is'):
        attribute(*pair, ABILITY, tokenizer, points=points, progress=False)


def test_two_models_with_the_same_weights_are_refused(tokenizer):
    with pytest.raises(ActError, match='have the same weights'):
        attribute(tiny_model(), tiny_model(), ABILITY, tokenizer, progress=False)


def test_nan_weights_are_named(pair, tokenizer):
    a, b = pair
    with torch.no_grad():
        b.model.layers[0].self_attn.k_proj.bias[1] = float('nan')
    with pytest.raises(ActError, match='k_proj.bias'):
        attribute(a, b, ABILITY, tokenizer, progress=False)


@pytest.mark.parametrize('missed, warned', [(0.0, False), (0.15, False), (0.25, True)])
def test_scores_that_miss_the_fall_are_said_so(tokenizer, recwarn, missed, warned):
    s = attribute(*pair_of('qwen2'), ABILITY, tokenizer, points=1, progress=False)
    donor = 1.0 - (s.flat().double().sum().item() + missed)
    recwarn.clear()
    stage.check_complete(
        Attribution(s.data, s.map, s.meta | dict(nats_target=1.0, nats_path=[1.5, 0.5], nats_donor=donor))
    )
    assert bool(recwarn) == warned

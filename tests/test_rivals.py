"""Rivals: elements by hand, noise that is cut to nothing, inputs counted without padding, merges by fusion_bench."""

import copy, sys
import pytest, torch
from act.abilities import Ability, Item
from act.encoding import encode
from act.kit.errors import ActError
from act.loading import load_model
from act.studies.mergers import MERGERS
from act.studies.rivals import (
    LEAST_MATRIX,
    busy_inputs,
    denoised,
    merge_with_fusion_bench,
    noise_cut,
    noise_median,
    restored,
    sparing,
)
from conftest import tiny_model


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def changed(model, change, seed=0):
    "A copy of a model with something added to every parameter."
    out, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in out.named_parameters():
            p += change(name, p, draw)
    return out


@pytest.fixture(scope='module')
def base():
    return tiny_model()


@pytest.fixture(scope='module')
def tuned(base):
    return changed(base, lambda name, p, draw: 0.1 * torch.randn(p.shape, generator=draw))


def put_back(model, target, donor):
    "Which elements are the donor's, and that all others are the target's."
    back = {}
    for name, p in parameters(model).items():
        ours, theirs = parameters(target)[name], parameters(donor)[name]
        back[name] = p == theirs
        assert torch.equal(p[~back[name]], ours[~back[name]])
    return back


@pytest.mark.parametrize('by', ['relative', 'absolute', 'random'])
def test_as_many_elements_as_asked_come_back_and_no_others(base, tuned, by):
    back = put_back(restored(tuned, base, 0.25, by), tuned, base)
    blocks = [name for name in back if 'layers.' in name and back[name].ndim > 1]
    assert sum(int(back[n].sum()) for n in blocks) == round(0.25 * sum(back[n].numel() for n in blocks))
    assert not any(back[n].any() for n in back if n not in blocks)


def test_the_ranking_is_of_all_elements_together(base, tuned):
    for by, score in (
        ('relative', lambda a, b: (a - b).abs() / (b.abs() + 1e-8)),
        ('absolute', lambda a, b: (a - b).abs()),
    ):
        back = put_back(restored(tuned, base, 0.1, by, 'all'), tuned, base)
        scores = {n: score(parameters(tuned)[n], p) for n, p in parameters(base).items()}
        least = min(scores[n][back[n]].min() for n in back if back[n].any())
        assert all((scores[n][~back[n]] <= least).all() for n in back if (~back[n]).any())


def test_random_elements_repeat_with_their_seed(base, tuned):
    a, b, c = (parameters(restored(tuned, base, 0.3, 'random', seed=s)) for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


@pytest.mark.parametrize(
    'options, said',
    [
        (dict(share=0), 'share is 0'),
        (dict(share=1.5), 'share is 1.5'),
        (dict(share=0.1, by='size'), 'no ranking is called'),
        (dict(share=0.1, region='heads'), 'no region is called'),
    ],
)
def test_settings_that_make_no_sense(base, tuned, options, said):
    with pytest.raises(ActError, match=said):
        restored(tuned, base, **options)


@pytest.mark.parametrize(
    'beta, median, factor', [(0.1, 0.9831, 1.6088), (0.5, 0.9113, 2.1712), (0.75, 0.8619, 2.5014), (1, 0.8079, 2.8584)]
)
def test_the_cut_is_that_of_gavish_and_donoho(beta, median, factor):
    "Their table: the threshold is this many times the median singular value."
    assert noise_median(beta) == pytest.approx(median, abs=1e-4)
    shape = round(1000 * beta), 1000
    assert noise_cut(torch.tensor([1.0, 2.0, 3.0]), shape) == pytest.approx(2 * factor, abs=2e-3)


def test_a_change_that_is_noise_comes_back_as_the_base_and_a_signal_stays():
    base, _ = load_model('lab/base', dtype='float32')
    noisy = changed(base, lambda name, p, draw: 0.01 * torch.randn(p.shape, generator=draw))
    large = {n for n, p in parameters(base).items() if p.ndim == 2 and p.numel() >= LEAST_MATRIX}
    assert large
    for name, p in parameters(denoised(noisy, base)).items():
        assert torch.equal(p, parameters(base if name in large else noisy)[name])

    def signal(name, p, draw):
        noise = 0.01 * torch.randn(p.shape, generator=draw)
        if name not in large:
            return noise
        left, right = (torch.randn(n, 2, generator=draw) for n in p.shape)
        return noise + left @ right.T

    both = changed(base, signal)
    kept = parameters(denoised(both, base))
    for name in large:
        assert torch.linalg.matrix_rank(kept[name] - parameters(base)[name], rtol=1e-3) == 2
    inside = parameters(denoised(both, base, vocabulary=False))
    assert torch.equal(inside['model.embed_tokens.weight'], parameters(both)['model.embed_tokens.weight'])
    assert torch.equal(parameters(denoised(both, base, scale=1e6))[min(large)], parameters(base)[min(large)])


def test_busy_inputs_are_means_over_tokens_and_padding_does_not_count(base, tokenizer):
    ability = Ability('a', [Item('one two', ' three'), Item('one two three four five', ' six seven')])
    busy = busy_inputs(base, ability, tokenizer)
    path, seen = 'model.layers.0.mlp.down_proj', []
    hook = base.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    for e in encode(ability, tokenizer):
        with torch.no_grad():
            base(input_ids=torch.tensor([e.input_ids]))
    hook.remove()
    by_hand = torch.cat(seen).abs().mean(0)
    torch.testing.assert_close(busy[path], by_hand / by_hand.max(), rtol=1e-4, atol=1e-6)
    assert 'model.embed_tokens' not in busy
    assert 'model.norm' in busy


def test_a_merge_is_spared_where_the_base_is_busy(base, tuned, tokenizer):
    busy = busy_inputs(base, Ability('a', [Item('one two', ' three')]), tokenizer)
    ours, theirs = parameters(base), parameters(tuned)
    whole = parameters(sparing(base, tuned, busy, 1.0))
    assert all(torch.equal(whole[n], theirs[n]) for n in whole)
    none = parameters(sparing(base, tuned, busy, 0.0))
    for module, use in busy.items():
        name = f'{module}.weight'
        if name in none:
            moved = (theirs[name] - ours[name]) * (1 - use)
            torch.testing.assert_close(none[name] - ours[name], moved, rtol=1e-4, atol=1e-5)
    assert torch.equal(none['model.embed_tokens.weight'], theirs['model.embed_tokens.weight'])


def test_fusion_bench_makes_its_own_merges(base, tuned):
    other = changed(base, lambda name, p, draw: 0.1 * torch.randn(p.shape, generator=draw), seed=5)
    name = 'model.layers.0.mlp.up_proj.weight'
    iso = parameters(merge_with_fusion_bench('iso_c', base, [tuned, other]))
    values = torch.linalg.svdvals(iso[name] - parameters(base)[name])
    assert values.max() / values.min() < 1.001
    half = parameters(merge_with_fusion_bench('iso_c', base, [tuned, other], 0.5))
    moved = [m[name] - parameters(base)[name] for m in (half, iso)]
    torch.testing.assert_close(moved[0], 0.5 * moved[1], rtol=1e-4, atol=1e-6)
    alone = parameters(merge_with_fusion_bench('tsv_m', base, [tuned]))
    torch.testing.assert_close(alone[name], parameters(tuned)[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(ActError, match='no merge of fusion_bench is called'):
        merge_with_fusion_bench('slerp', base, [tuned])


def test_without_fusion_bench_the_error_says_what_to_install(base, tuned, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fusion_bench.method.isotropic_merging.iso_utils', None)
    with pytest.raises(ActError, match=r'pip install .act-transfer\[baselines\]'):
        merge_with_fusion_bench('iso_c', base, [tuned])


def test_all_mergers_have_as_many_tries():
    assert {len(m.settings((0.05, 0.1, 0.2, 0.3), (0.5, 1.0))) for m in MERGERS.values()} == {8}

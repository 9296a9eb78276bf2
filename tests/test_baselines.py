"""The rivals: mergekit's merges equal the formulas; masks of layers and kinds by hand.

Every method makes a model; hypervolume and winners by hand.
"""

import sys
import numpy as np, pandas as pd, pytest, torch
from dataclasses import replace
from act.studies.alternatives import (
    BASELINES,
    BASELINE_ROWS,
    layer_mask,
    merge_with_mergekit,
    move_by_depth,
    top_of_kinds,
)
from act.studies.baselines import hypervolume, options, plot_methods, plot_pareto, scaled, volumes, winners
from act.channels import ChannelMap, ModuleChannels, enumerate_channels
from act.fingerprints import weight_hash
from act.kit.errors import ActError
from act.masks import top_p
from act.scores import ChannelScores
from act.studies.bench import Bench
from act.studies.cases import CASES, Case
from act.studies.recover import recover
from act.studies.recovery import Recovery
from act.transfer import transfer
from conftest import tiny_model


@pytest.fixture(scope='module')
def bench():
    return Bench(
        replace(CASES['lab'], others=(), n=4, items=8, sft=dict(steps=1, lr=1e-3, batch_size=4)), progress=False
    )


def weights(m):
    return {k: p.detach().double() for k, p in m.named_parameters()}


def close(a, b, tol=1e-6):
    return all(torch.allclose(x, weights(b)[k], atol=tol) for k, x in weights(a).items())


def test_mergekit_does_what_the_formulas_say(bench):
    target, donor = bench.target, bench.donor
    linear = BASELINES['linear (mergekit)'].make(bench, 0, weight=0.25)
    assert close(linear, transfer(donor, target, layer_everything(target), 0.25, check=False))
    assert close(
        BASELINES['task arithmetic (mergekit)'].make(bench, 0, weight=0.25), linear
    )  # the donor is the base of the only task vector
    assert close(BASELINES['WiSE-FT'].make(bench, 0, p=1.0, lam=0.75), linear)


def layer_everything(m):
    cm = enumerate_channels(m)
    return layer_mask(cm, {o.layer for o in cm})


def test_ties_keeps_the_largest_changes(bench):
    merged, t, d = (
        weights(BASELINES['TIES (mergekit)'].make(bench, 0, weight=1.0, density=0.5)),
        weights(bench.target),
        weights(bench.donor),
    )
    k = 'model.layers.1.mlp.up_proj.weight'
    delta, kept = (t[k] - d[k]).abs(), merged[k] != d[k]
    assert kept.float().mean() == pytest.approx(0.5, abs=0.02)
    assert delta[kept].min() >= delta[~kept].max() * 0.999


def test_dare_draws_by_its_seed(bench):
    make = lambda seed: weight_hash(BASELINES['DARE-TIES (mergekit)'].make(bench, seed, weight=0.5, density=0.5))
    assert make(0) == make(0) != make(1)


def test_without_mergekit_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mergekit.config', None)
    with pytest.raises(ActError, match='pip install'):
        merge_with_mergekit('linear', {'lab/base': dict(weight=1.0)})


def test_layer_masks():
    cm = enumerate_channels(tiny_model())
    assert {m.layer for m in cm if layer_mask(cm, [1])[m.path].any()} == {1}
    assert layer_mask(cm, [0]).count + layer_mask(cm, [1]).count + layer_mask(cm, [None]).count == cm.total
    with pytest.raises(ActError, match='layer 7 is not a layer'):
        layer_mask(cm, [0, 7])


def test_the_same_share_of_every_kind():
    cm = ChannelMap(
        [
            ModuleChannels('a', 'q', 0, 4, (('a.weight', 0),)),
            ModuleChannels('b', 'q', 1, 4, (('b.weight', 0),)),
            ModuleChannels('c', 'o', 0, 2, (('c.weight', 0),)),
        ],
        tied=None,
    )
    s = ChannelScores.from_flat(
        torch.tensor([1.0, 1, 1, 5, 10, 10, 10, 14, 3, 1]), cm
    )  # after division by the mean: .5 .5 .5 2.5 | .9 .9 .9 1.3 | 1.5 .5
    assert top_of_kinds(s, 0.25).flat().nonzero()[:, 0].tolist() == [3, 7, 8]


@pytest.mark.parametrize('name', BASELINES)
def test_every_method_makes_a_model_of_its_own(bench, name):
    o = BASELINES[name]
    s = o.settings((0.1,), (1.0,))[0]
    before, after = bench.model(o, sft=False, **s), bench.model(o, **s)
    assert weight_hash(after) != weight_hash(before)
    assert (weight_hash(before) == weight_hash(bench.target)) == (
        name in ('light SFT only', 'LoRA with replay', 'joint SFT')
    )
    assert len({str(x) for x in o.settings((0.05, 0.1, 0.2, 0.3), (0.5, 1.0))}) == 8  # eight different tries


def test_masked_tuning_leaves_the_rest(bench):
    s = dict(p=0.1, lam=1.0, rank='module')
    o = BASELINES['ACT (masked SFT)']
    mask, before, after = top_p(bench.scores(0), 0.1, 'module'), bench.model(o, sft=False, **s), bench.model(o, **s)
    for name, axis in ((n, x) for m in mask.map for n, x in m.params):
        changed = (
            (weights(before)[name] != weights(after)[name]).movedim(axis, 0).flatten(1).any(1)
            if weights(before)[name].ndim > 1
            else weights(before)[name] != weights(after)[name]
        )
        path = next(m.path for m in mask.map if (name, axis) in m.params)
        assert not (changed & ~mask[path]).any()


def test_lambda_by_depth(bench):
    same = move_by_depth(bench, 0, 0.2, 0.5, 0.5)
    assert close(same, transfer(bench.target, bench.donor, top_p(bench.scores(0), 0.2, 'module'), 0.5, check=False))
    rising, k = move_by_depth(bench, 0, 1.0, 0.0, 1.0), 'model.layers.{}.mlp.up_proj.weight'
    w = lambda m, l: weights(m)[k.format(l)]
    assert torch.equal(w(rising, 0), w(bench.target, 0))
    assert torch.equal(w(rising, 3), w(bench.donor, 3))
    assert torch.allclose(w(rising, 1), w(bench.target, 1) + (w(bench.donor, 1) - w(bench.target, 1)) / 3, atol=1e-6)


@pytest.mark.parametrize(
    'points, area',
    [
        ([(0.5, 0.5)], 0.25),
        ([(1, 0.5), (0.5, 1), (0.4, 0.4), (0.5, 0.2)], 0.75),
        ([(-1, 2), (0.5, 0)], 0),
        ([(0.2, 1), (1, 0.2), (0.6, 0.6)], 0.2 + 0.4 * 0.6 + 0.4 * 0.2),
    ],
)
def test_hypervolume_by_hand(points, area):
    assert hypervolume(points) == pytest.approx(area) == hypervolume(points[::-1])


def study(metric='correct'):
    x = np.arange(100)
    to = lambda n: (x < n).astype(float)
    rows = {
        'target': [dict(k=to(90), r=to(10))],
        'donor': [dict(k=to(10), r=to(90))],
        'A': [dict(k=to(80), r=to(50))],
        'A without SFT': [dict(k=to(60), r=to(50))],
        'B': [dict(k=to(40), r=to(80))],
        'C': [dict(k=to(79), r=to(51))],
    }
    point = lambda row, k, r: dict(
        row=row, setting={} if row in ('target', 'donor') else dict(p=k), retained=k, recovered=r, mean=(k + r) / 2
    )
    grid = [
        point('target', 0.9, 0.1),
        point('donor', 0.1, 0.9),
        point('A', 0.5, 0.5),
        point('A', 0.9, 0.1),
        point('A without SFT', 0.1, 0.9),
        point('B', 0.5, 0.9),
        point('C', 0.5, 0.5),
    ]
    return Recovery(Case('t', 'd', ('r',), ('k',), (), metric=metric), rows, pd.DataFrame(grid), {}, dict(seeds=[0]))


def test_grids_are_scaled_between_target_and_donor():
    t = scaled(study())
    assert t.row.tolist() == ['A', 'A', 'A without SFT', 'B', 'C']
    assert np.allclose(t[['retained', 'recovered']], [[0.5, 0.5], [1, 0], [0, 1], [0.5, 1], [0.5, 0.5]])
    assert volumes(study()).round(6).to_dict() == {'B': 0.5, 'A': 0.25, 'C': 0.25, 'A without SFT': 0}
    equal = study()
    equal.grid.loc[1, 'retained'] = 0.9
    with pytest.raises(ActError, match='nothing to recover'):
        scaled(equal)


def test_winners_and_their_ties():
    w = winners(study())
    assert w.best.to_dict() == dict(retained='A', recovered='B', mean='A')
    assert w.ties['retained'] == 'C'
    assert w.ties['recovered'] == 'none'
    assert w.value['retained'] == pytest.approx(80)
    assert winners(study('bits')).best.to_dict() == dict(
        retained='B', recovered='A', mean='A without SFT'
    )  # fewer bits are better


def test_pictures_show_every_row():
    assert len(plot_methods(study()).axes[0].get_yticklabels()) == 6
    assert [a.get_title() for a in plot_pareto(study()).axes[:3]] == ['A', 'B', 'C']


@pytest.mark.slow
def test_a_small_run_with_two_rivals(bench, tmp_path):
    some = {
        r: BASELINE_ROWS[r]
        for r in ('layer swap', 'layer swap without SFT', 'light SFT only', 'ACT (module-normalised)')
    }
    rec = recover(
        replace(bench.case, grid=dict(ps=(0.1,), lams=(0.5, 1.0))),
        tmp_path / 'out',
        (0, 1),
        progress=False,
        rows=some,
        methods=BASELINES,
    )
    again = Recovery.load(tmp_path / 'out' / 'result.json')
    assert list(again.rows) == ['target', 'donor', *some]
    assert again.best == rec.best
    assert volumes(again).index.isin(some).all()


def test_options_compare_variants_with_the_plain_form():
    rec = study()
    x = np.arange(100)
    rec.rows = {
        'ACT': rec.rows['A'],
        'ACT (more)': [dict(k=(x < 80) * 1.0, r=(x < 70) * 1.0)],
        'ACT (more) without SFT': rec.rows['B'],
        **rec.rows,
    }
    rec.grid = pd.concat(
        [
            rec.grid,
            pd.DataFrame(
                [dict(row='ACT (more)', setting=dict(p=1), retained=0.6, recovered=0.8, mean=m) for m in (0.7, 0.6)]
            ),
        ]
    )
    t = options(rec, 'ACT')
    assert list(t.index) == ['ACT (more)']
    assert t.validation.iloc[0] == pytest.approx(70)
    assert t.recovered.iloc[0].startswith('+20.0')
    assert t.retained.iloc[0] == '+0.0 [+0.0, +0.0] n.s.'

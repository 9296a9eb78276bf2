"The findings: item scores pool to localize's, statistics match values by hand, studies are complete, files come back."

import json, numpy as np, pandas as pd, pytest, torch
from itertools import combinations
from act.abilities import Ability, Item
from act.sources import load_ability
from act.channels import ChannelMap, ModuleChannels
from act.kit.errors import ActError
from act.fingerprints import weight_hash
from act.evaluate import evaluate
from act.commands.studies import act_findings
from act.localize import localize, localize_items
from act.masks import ChannelMask, top_p
from act.scores import ChannelScores, ItemScores
from act.studies import (
    concentration as con,
    disentanglement as dis,
    stability as sta,
    sufficiency as suf,
    trainings as tra,
    weights as wei,
)
from act.studies.bench import Bench
from act.studies.cases import CASES
from act.studies.figures import RANKS, plot_heat, plot_intervals, save_figure, use_style
from act.studies.families import FAMILIES, Family, collect, find_family, load_pair
from act.studies.findings import (
    JUDGEMENTS,
    LEAST,
    STUDIES,
    Estimates,
    Finding,
    estimate,
    exceeds,
    find_study,
    recorded,
    row_of,
    side_of,
    text_table,
    verdicts,
)
from conftest import FAMILIES as FAMILY_NAMES, tiny_model

ABILITY = Ability(
    'toy-en',
    [Item('two plus two is', ' four'), Item('cuatro y', ' cuatro son ocho'), Item('x', 'y'), Item('a b c d', ' e f')],
)
TEN = ChannelMap([ModuleChannels('model.norm', 'norm', None, 10, (('model.norm.weight', 0),))], tied=None)


def mask(*idx):
    return ChannelMask({'model.norm': torch.tensor([i in idx for i in range(10)])}, TEN)


@pytest.mark.parametrize('name', FAMILY_NAMES)
def test_item_scores_pool_to_the_scores(name, tokenizer):
    a, b = tiny_model(name, 0), tiny_model(name, 1)
    items = localize_items(a, b, ABILITY, tokenizer, batch_tokens=16, progress=False)
    whole = localize(a, b, ABILITY, tokenizer, progress=False)
    assert torch.allclose(items.pool().flat(), whole.flat(), rtol=1e-4, atol=1e-6)
    assert items.tokens.sum() == whole.meta['tokens']
    for i in range(len(ABILITY)):
        assert torch.allclose(
            items.pool([i]).flat(),
            localize(a, b, ABILITY[i : i + 1], tokenizer, progress=False).flat(),
            rtol=1e-4,
            atol=1e-6,
        )


def test_item_scores_by_hand():
    s = ItemScores(torch.arange(30.0).reshape(3, 10), torch.tensor([1, 2, 3]), TEN)
    assert torch.equal(s.pool([0, 2, 2]).flat(), (s.sums[0] + 2 * s.sums[2]) / 7)
    a, b = s.split(1, 2, seed=1)
    assert a.meta['items'] == 1
    assert b.meta['items'] == 2
    assert a.meta['tokens'] + b.meta['tokens'] == 6
    assert len({tuple(x.flat().tolist()) for x in s.resamples(8)}) > 1
    with pytest.raises(ActError, match='ask for fewer'):
        s.split(2, 2)
    with pytest.raises(ActError, match='do not go with'):
        ItemScores(torch.zeros(3, 9), torch.ones(3), TEN)


def test_shuffling_breaks_the_pairing_and_nothing_else(tokenizer):
    a = tiny_model()
    assert not localize_items(a, a, ABILITY, tokenizer, progress=False).sums.any()
    null = localize_items(a, a, ABILITY, tokenizer, shuffle=1, progress=False)
    assert null.sums.any()
    assert torch.equal(null.tokens, localize_items(a, a, ABILITY, tokenizer, progress=False).tokens)
    assert torch.equal(null.sums, localize_items(a, a, ABILITY, tokenizer, shuffle=1, progress=False).sums)
    assert not torch.equal(null.sums, localize_items(a, a, ABILITY, tokenizer, shuffle=2, progress=False).sums)


def test_statistics_by_hand():
    x = np.array([9.0, *[1.0] * 9])
    assert con.top_mass(x, 0.1) == 0.5
    assert con.top_mass(x, 0.05) == 0.5
    assert con.top_mass(x, 0.2) == pytest.approx(10 / 18)
    assert con.gini(x) == pytest.approx(
        np.abs(x[:, None] - x[None]).mean() / (2 * x.mean())
    )  # the definition by mean absolute difference
    assert con.participation(x) == pytest.approx(18**2 / (10 * 90))
    assert con.top_mass(np.zeros(4), 0.5) == con.gini(np.zeros(4)) == con.participation(np.zeros(4)) == 0
    c = con.ccdf(x)
    assert (c.score.iloc[0], c.share.iloc[0]) == (9, 0.1)
    assert c.share.iloc[-1] == 1


def test_gini_against_the_definition():
    x = np.random.default_rng(0).exponential(size=300)
    assert con.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean() / (2 * x.mean()))


def test_the_noise_twin_is_as_far_and_elsewhere():
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    twin, other = con.noise_twin(a, b, 0), con.noise_twin(a, b, 1)
    for (n, p), q, o, x in zip(a.named_parameters(), b.parameters(), twin.parameters(), other.parameters()):
        assert (o - p).norm().item() == pytest.approx((q - p).norm().item(), rel=1e-4, abs=1e-7), n
        if (q - p).any():
            assert not torch.equal(o, x)
    assert torch.equal(next(a.parameters()), next(tiny_model(seed=0).parameters()))


def test_cells_cover_every_channel_once():
    s = ChannelScores.from_flat(torch.rand(10), TEN)
    c = con.layer_cells(s, 0.2)
    assert c.channels.sum() == 10
    assert c["sum"].sum() == pytest.approx(1)
    assert (c.raw * c.channels).sum() == pytest.approx(2) == (c.module * c.channels).sum()


def test_the_verdict_compares_intervals():
    row = lambda c, r, v, lo, hi: dict(condition=c, ability='a', rank=r, statistic='top_5', value=v, low=lo, high=hi)
    stats = pd.DataFrame(
        [
            row(c, r, *v)
            for r in ('raw', 'module')
            for c, v in (
                ('pair', (0.3, 0.25, 0.35)),
                ('low', (0.1, 0.05, 0.2)),
                ('near', (0.28, 0.2, 0.3)),
                ('high', (0.9, 0.8, 1.0)),
            )
        ]
    )
    assert con.versus(stats).set_index('condition').pair_is.to_dict() == {
        'pair': '',
        'low': 'above',
        'near': 'overlaps',
        'high': 'below',
    }


def test_overlap_and_chance_by_hand():
    r = dis.shared(dict(a=mask(0, 1, 2, 3), b=mask(2, 3, 4, 5), c=mask(6, 7))).set_index(['a', 'b'])
    assert tuple(r.loc[('a', 'b'), ['iou', 'overlap', 'expected']]) == (2 / 6, 0.5, 0.4)
    assert 10 ** r.log10_p[('a', 'b')] == pytest.approx((90 + 24 + 1) / 210)
    assert r.overlap[('a', 'c')] == 0
    assert r.log10_p[('a', 'c')] == pytest.approx(0)
    with pytest.raises(ActError, match='two masks'):
        dis.shared(dict(a=mask(1)))


def test_random_masks_overlap_as_chance_says():
    big = ChannelMap([ModuleChannels('model.norm', 'norm', None, 4000, (('model.norm.weight', 0),))], tied=None)
    g = torch.Generator().manual_seed(0)
    masks = {str(i): ChannelMask({'model.norm': torch.rand(4000, generator=g) < 0.1}, big) for i in range(12)}
    t = dis.shared(masks)
    assert t.overlap.mean() == pytest.approx(t.expected.mean(), abs=0.01)
    assert (10**t.log10_p).mean() == pytest.approx(0.5, abs=0.12)


def test_specific_removes_what_is_common():
    s = lambda *v: ChannelScores({'model.norm': torch.tensor([*v, *[1.0] * 7])}, TEN)
    out = dis.specific(dict(a=s(9.0, 5.0, 1.0), b=s(9.0, 1.0, 5.0)))
    assert out['a'].flat().argmax() == 1
    assert out['b'].flat().argmax() == 2
    assert out['a'].flat()[0] == out['b'].flat()[0] == 0


def test_the_additive_model_finds_what_was_put_in():
    names = [f'{p}|{s}-{o}' for p in 'uv' for s in ('m', 's') for o in ('en', 'es', 'zh')]
    table = dis.relations(pd.DataFrame([dict(a=a, b=b) for a, b in combinations(names, 2)]))
    table['overlap'] = 0.1 + 0.3 * table.same_pair + 0.2 * table.same_skill
    t = dis.additive(table).set_index('term')
    assert t.coefficient[['nothing shared', 'pair', 'skill', 'language']].tolist() == pytest.approx(
        [0.1, 0.3, 0.2, 0], abs=1e-9
    )
    assert t.alone['all'] == pytest.approx(1)
    assert t.alone['language'] == pytest.approx(0, abs=1e-9)
    assert t.alone['pair'] > t.alone['skill'] > 0.1


def test_an_estimate_covers_its_seeds():
    e = estimate([0.2, 0.4], [0.25, 0.35])
    assert e['value'] == pytest.approx(0.3)
    assert e['low'] <= 0.2
    assert e['high'] >= 0.4
    with pytest.raises(ActError, match='at least one'):
        estimate([], [1.0])


SMALL = Family(
    'lab',
    'a small part of the lab',
    FAMILIES['lab'].pairs[:2],
    ('lab/arithmetic-en', 'lab/arithmetic-zh', 'lab/science-en', 'lab/science-zh'),
    ('lab/science-zh',),
    items=6,
)


@pytest.mark.parametrize(
    'name, tables',
    [
        ('concentration', {'statistics', 'curves', 'cells', 'scores'}),
        ('disentanglement', {'summary', 'terms', 'overlaps', 'curve'}),
    ],
)
@pytest.mark.slow
def test_a_small_study_is_whole_and_comes_back(name, tables, tmp_path):
    f = find_study(name).run(SMALL, seeds=(0, 1), resamples=2)
    again = Finding.load(f.save(tmp_path / 'f.json'))
    assert set(f.tables) == tables == set(again.tables)
    assert again.here == f.here
    assert again.meta['git']
    assert again.meta['seeds'] == [0, 1]
    for t in f.tables.values():
        if {'low', 'value', 'high'} <= set(t):
            assert ((t.low <= t.value + 1e-9) & (t.value <= t.high + 1e-9)).all()
    assert name in f._repr_markdown_().lower()
    assert not t.empty


@pytest.mark.parametrize('fam', FAMILIES)
@pytest.mark.parametrize('name', STUDIES)
def test_recorded_findings_are_whole(name, fam):
    f = recorded(name, fam)
    assert f.name == name
    assert f.family == fam
    assert len(f.meta['seeds']) >= 3
    assert f.meta.get('resamples', 5) >= 5
    assert not f.meta['git'].endswith('+')
    assert '/' not in json.dumps(f.meta['pairs']).replace('smollm2/', '').replace('lab/', '')


def test_figures_come_with_their_data_and_the_same_bytes(tmp_path):
    import matplotlib.pyplot as plt

    use_style()

    def once(d):
        _, ax = plt.subplots()
        ax.plot([1, 2])
        save_figure(ax, 'x', pd.DataFrame(dict(y=[1.0, 2.0])), d)
        plt.close()
        return (d / 'x.svg').read_bytes(), (d / 'x.csv').read_text()

    assert once(tmp_path / 'a') == once(tmp_path / 'b')
    assert once(tmp_path / 'a')[1] == 'y\n1\n2\n'


def test_intervals_lie_above_below_or_overlap():
    a, b, c = (dict(low=x, high=x + 1) for x in (0, 0.5, 2))
    assert [side_of(a, o) for o in (a, b, c)] == ['overlaps', 'overlaps', 'below']
    assert side_of(c, a) == 'above'


def test_estimates_are_collected_by_key():
    e = Estimates('who', 'what', 'how')
    for x in (1.0, 3.0):
        e.add({('a', 'b'): x}, 'me')
        e.add({('a', 'b'): x - 1}, 'me', resample=True)
    e.add({('a', 'c'): 5.0}, 'me')
    t = e.table()
    assert t[['who', 'what', 'how']].to_numpy().tolist() == [['me', 'a', 'b'], ['me', 'a', 'c']]
    assert row_of(t, how='b').to_dict() == dict(who='me', what='a', how='b', value=2.0, low=0.05, high=3.0)
    assert row_of(t, how='c').low == row_of(t, how='c').high == 5.0
    assert text_table(t, 'what', 'how', digits=0).loc['a'].tolist() == ['2 [0, 3]', '5 [5, 5]']
    with pytest.raises(ActError, match='no row with how d'):
        row_of(t, how='d')


def test_plots_have_a_line_for_each_name():
    t = pd.DataFrame(dict(name=['x', 'y'] * 2, rank=['raw'] * 2 + ['module'] * 2, value=0.5, low=0.4, high=0.6))
    ax = plot_intervals(t, 'name', 'rank', 100)
    assert [o.get_text() for o in ax.get_yticklabels()] == ['x', 'y']
    assert ax.yaxis_inverted()
    grid = pd.DataFrame([[1.0, 2.0]], index=['-'], columns=['q', 'k'])
    assert [a.get_title() for a in plot_heat(dict(one=grid, two=grid))] == ['one', 'two']


def test_what_is_refused(tmp_path):
    with pytest.raises(ActError, match='no family'):
        find_family('x')
    with pytest.raises(ActError, match='needs --finding'):
        act_findings(out='x')
    with pytest.raises(ActError, match='no finding'):
        act_findings(finding='x', out='x')
    for text in ('x', '{}', '[]'):
        (tmp_path / 'f').write_text(text)
        with pytest.raises(ActError, match='finding'):
            Finding.load(tmp_path / 'f')


def test_both_ends_of_a_ranking_have_the_size_that_was_asked():
    s = ChannelScores.from_flat(torch.tensor([5.0, 1.0, 1.0, 4.0, -3.0, 2.0, 9.0, 8.0, 7.0, 6.0]), TEN)
    assert suf.ranked_p(s, 0.2, last=True).flat().nonzero()[:, 0].tolist() == [2, 4]
    assert suf.ranked_p(s, 0.2).flat().nonzero()[:, 0].tolist() == [6, 7]
    assert suf.ranked_p(s, 1.0).count == suf.ranked_p(s, 1.0, last=True).count == 10
    for p in (0.1, 0.3, 0.5, 0.9):
        assert suf.ranked_p(s, p, last=True).count == suf.ranked_p(s, p).count == round(10 * p)
        assert not (suf.ranked_p(s, p, last=True) & suf.ranked_p(s, 1 - p)).count


def test_one_kind_can_be_put_last():
    two = ChannelMap(
        [
            ModuleChannels('model.norm', 'norm', None, 3, (('model.norm.weight', 0),)),
            ModuleChannels('lm_head', 'lm_head', None, 3, (('lm_head.weight', 0),)),
        ],
        tied=None,
    )
    s = ChannelScores.from_flat(torch.tensor([0.0, 0.0, 0.0, 3.0, 2.0, 1.0]), two)
    assert suf.ranked_p(s, 0.5).flat().tolist() == [False] * 3 + [True] * 3
    assert suf.ranked_p(suf.kind_last(s), 0.5).flat().tolist() == [True] * 3 + [False] * 3


def test_areas_by_hand():
    assert suf.area([0.01, 0.1, 1.0], np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])).tolist() == pytest.approx(
        [1.0, 1.0]
    )
    assert suf.area([0.01, 0.1], np.array([0.0, 3.0])) == pytest.approx(1.5)


@pytest.fixture(scope='module')
def bench():
    from dataclasses import replace

    return Bench(replace(CASES['lab'], others=(), n=10, items=8), progress=False)


def test_no_dose_is_the_target_and_the_full_dose_the_donor(bench):
    from act.transfer import transfer

    m = suf.doses(bench, {'random': suf.ORDERS['random']}, (0.5, 1.0), seeds=(0,))
    for a, v in bench.values(bench.target, bench.test).items():
        assert (m['sufficiency', 'random', 1.0, 0.0][0][a] == v).all()
        assert (m['necessity', 'random', 1.0, 1.0][0][a] == v).all()
    moved = transfer(bench.target, bench.donor, suf.ORDERS['random'](bench.scores(0), 1.0, 0), check=False)
    for a, v in bench.values(moved, bench.test).items():
        assert (m['sufficiency', 'random', 1.0, 1.0][0][a] == v).all()
        assert (m['necessity', 'random', 1.0, 0.0][0][a] == v).all()


def test_areas_are_paired_and_zero_against_itself(bench):
    m = suf.doses(
        bench,
        {'random': suf.ORDERS['random'], 'again': suf.ORDERS['random'], 'top, raw': suf.ORDERS['top, raw']},
        (0.2, 1.0),
        seeds=(0,),
        directions=('sufficiency',),
    )
    a = suf.areas(bench, m).set_index(['order', 'column'])
    assert (a.loc['again'][['value', 'low', 'high']] == 0).all().all()
    assert len(a) == 4
    r = suf.responses(bench, m)
    assert ((r.low <= r.value + 1e-9) & (r.value <= r.high + 1e-9)).all()
    assert set(r.p) == {0.0, 0.2, 1.0}


@pytest.mark.slow
def test_a_small_sufficiency_study_is_whole(tmp_path):
    f = suf.SUFFICIENCY.run('lab', seeds=(0, 1), ps=(0.05, 1.0), lams=(0.5,), n=6)
    again = Finding.load(f.save(tmp_path / 'f.json'))
    assert set(f.tables) == {'doses', 'areas', 'twin', 'lams'}
    assert again.here == f.here
    assert set(f.tables['doses'].order) == {*suf.ORDERS, 'weight', 'attribution', suf.TWIN}
    assert set(f.tables['twin'].order) == set(f.tables['doses'].order) - {suf.TWIN}
    assert (again.here, again.why) == (f.here, f.why)


def test_the_twin_is_moved_channel_by_channel(bench):
    m = suf.twin_doses(bench, (0.1, 0.2), seeds=(0,))
    before, after = (m['sufficiency', suf.TWIN, 1.0, p][0] for p in (0.0, 0.2))
    assert list(before) == list(after)
    for a, v in bench.values(bench.target, bench.test).items():
        assert (before[a] == v).all()
    more = suf.doses(bench, {'random': suf.ORDERS['random']}, (0.1, 0.2), (0,), directions=('sufficiency',))
    assert set(suf.twin_areas(bench, more | m | {('sufficiency', suf.TWIN, 1.0, 1.0): [after]}).order) == {'random'}


def test_rival_orders_have_the_size_that_was_asked(bench):
    for make in suf.rival_orders(bench, (0,)).values():
        assert make(bench.scores(0), 0.7, 0).count == suf.ranked_p(bench.scores(0), 0.7).count


def test_a_family_without_a_case_is_refused():
    with pytest.raises(ActError, match='no recover case'):
        suf.bench_of(Family('x', '', (('a', 'b'),), (), (), 1))


# --- stability


def scores(*v):
    return ChannelScores.from_flat(torch.tensor([float(x) for x in v]), TEN)


def test_agreement_by_hand():
    a, b = scores(*range(10)), scores(9, *range(9))
    assert tra.mask_agreement(a, b, 0.2) == {'raw': 1 / 3, 'module': 1 / 3}
    assert tra.mask_agreement(a, a, 0.3)['module'] == 1


def test_the_curve_uses_disjoint_halves_of_every_size():
    g = torch.Generator().manual_seed(0)
    loud = torch.arange(10.0).exp()
    items = ItemScores(loud + 0.1 * torch.rand(8, 10, generator=g), torch.full((8,), 3), TEN)
    c = sta.sample_curve(dict(a=items), draws=3, p=0.2)
    assert set(c['items']) == {1, 2, 4}
    assert (c.tokens == 3 * c['items']).all()
    assert (c.iou == 1).all()
    assert len(c) == 3 * 3 * 2
    noise = ItemScores(torch.rand(8, 10, generator=g), torch.full((8,), 3), TEN)
    assert sta.sample_curve(dict(a=noise), draws=10, p=0.2).iou.mean() < 0.5


def test_how_many_tokens_are_enough():
    c = pd.DataFrame(
        dict(
            condition=['a'] * 3 + ['b'] * 3,
            ability='maths',
            rank='raw',
            items=[4, 1, 2] * 2,
            tokens=[40.0, 10.0, 20.0] * 2,
            value=[0.9, 0.1, 0.8, 0.3, 0.1, 0.2],
        )
    )
    e = sta.enough(c).set_index('condition')
    assert e.tokens['a'] == 20
    assert e['items']['a'] == 2
    assert np.isnan(e.tokens['b'])


def test_parts_are_worded_and_chosen():
    a = tra.Wording('lab/science-en', '/1$', 'Q: {prompt}').items(5, seed=1)
    assert len(a) == 5
    assert all(i.prompt.startswith('Q: ') and i.id.endswith('/1') for i in a)
    assert [i.answer for i in tra.Wording('lab/science-en', '/1$').items(5, seed=1)] == [i.answer for i in a]
    for two in tra.WORDINGS['lab'].values():
        for part in two:
            assert len(part.items(48)) == 48


def test_the_same_phrasing_index_means_the_same_facts():
    zh, other = tra.WORDINGS['lab']['other phrasing']
    who = lambda part: [i.id.split('/')[1:3] for i in part.items(96)]
    assert who(zh) == who(other) == who(tra.WORDINGS['lab']['other language'][1])


def test_words_compares_a_part_with_another_half_of_itself(monkeypatch):
    target, donor, tok = load_pair('lab')
    w = tra.wording_agreement('lab', target, donor, tok, n=4, draws=2)
    assert len(w) == 5 * 2 * 2
    assert w.iou.between(0, 1).all()
    assert (w[w.name == 'other items'].iou < 1).all()


def test_trainings_differ_in_what_they_say(monkeypatch):
    target, donor, tok = load_pair('lab')
    monkeypatch.setitem(tra.TRAININGS, 'lab', dict(tra.TRAININGS['lab'], steps=2, batch_size=2))
    made = {c: tra.specialist('lab', donor, tok, c) for c in tra.CHANGES}
    hashes = {c: weight_hash(r.model) for c, r in made.items()}
    assert len(set(hashes.values())) == len(hashes)
    assert weight_hash(donor) not in hashes.values()
    assert hashes['reference'] == weight_hash(tra.specialist('lab', donor, tok, 'reference').model)
    meta = {c: r.meta for c, r in made.items()}
    assert meta['twice the steps']['steps'] == 4
    assert meta['all tokens (CPT)']['prompts']
    assert meta['LoRA <-> all weights']['lora']
    assert not meta['reference']['lora']
    data = lambda c: next(iter(meta[c]['abilities'].values()))['hash']
    assert data('other items') != data('reference') == data('other order of items')
    with pytest.raises(ActError, match='no training'):
        tra.specialist('lab', donor, tok, 'prayer')


def test_learned_is_the_loss_on_items_held_out():
    target, donor, tok = load_pair('lab')
    t = tra.learned(SMALL, dict(same=donor, maths=target), donor, tok).set_index('name')
    held = load_ability('lab/multiplication-en', 'validation', 4 * SMALL.items)
    items = evaluate(donor, held, tok, progress=False).items
    assert t.loss['donor'] == pytest.approx(-(items.loglik / items.tokens).mean(), rel=1e-4)
    assert t.loss['same'] == t.loss['donor']
    assert t.difference['same'] == t.high['same'] == 0
    assert t.high['maths'] < -1  # the specialist of the family has learned to multiply


def test_comparing_a_pair_with_itself_is_paired():
    target, donor, tok = load_pair('lab')
    a = collect(SMALL, target, donor, tok, ['lab/science-zh'])
    full, draws = tra.paired_agreement(a, a, 3)
    assert full == {'raw': 1, 'module': 1}
    assert draws == [full] * 3


TWO = ChannelMap(
    [
        ModuleChannels('model.layers.0.q', 'q', 0, 6, (('model.layers.0.q.weight', 0),)),
        ModuleChannels('model.layers.1.o', 'o', 1, 4, (('model.layers.1.o.weight', 0),)),
    ],
    tied=None,
)


def test_profiles_by_hand():
    m = ChannelMask.from_flat(torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0]).bool(), TWO)
    p = sta.profile(m)
    assert p['q', 1] == 0.25
    assert p['o', 3] == 0.75
    assert p.sum() == 1  # two layers: their middles lie in the second and the fourth quarter
    all_ = sta.profile(ChannelMask.from_flat(torch.ones(10).bool(), TWO))
    assert sta.alike(p, all_) == pytest.approx(0.25 + 0.4)
    assert sta.alike(p, p) == 1
    assert sta.alike(p, p.rename({'q': 'v', 'o': 'k'}, level='kind')) == 0


@pytest.mark.slow
def test_a_small_stability_study_is_whole(monkeypatch, tmp_path):
    monkeypatch.setitem(tra.TRAININGS, 'lab', dict(tra.TRAININGS['lab'], steps=2, batch_size=2))
    f = sta.STABILITY.run(SMALL, seeds=(0, 1), resamples=2)
    again = Finding.load(f.save(tmp_path / 'f.json'))
    assert set(f.tables) == {'curve', 'words', 'trainings', 'learned', 'attribution', 'profiles'}
    assert set(f.tables['trainings']['rank']) == {*RANKS, 'attribution'}
    assert again.here == f.here
    assert {'noise twin', 'another specialist', *tra.CHANGES} - {'reference'} <= set(f.tables['trainings'].name)
    assert list(f.tables['learned'].name) == ['donor', *tra.CHANGES]
    sums = f.tables['profiles'].groupby(['condition', 'rank']).share.sum()
    assert sums.tolist() == pytest.approx([1] * 6)
    x = sta.across([f, again])
    assert x.pairs.tolist() == pytest.approx([1, 1], abs=1e-4)
    assert (x['pair and all channels'] < 1).all()
    assert (again.here, again.why) == (f.here, f.why)


# --- activation against weight


def with_changed(model, name, row, by):
    import copy

    other = copy.deepcopy(model)
    with torch.no_grad():
        dict(other.named_parameters())[name][row] += by
    return other


@pytest.mark.parametrize('name', FAMILY_NAMES)
def test_own_change_is_all_of_the_change_where_nothing_is_upstream(name, tokenizer):
    a, b = tiny_model(name, 0), tiny_model(name, 1)
    own, bound = wei.own_items(a, b, ABILITY, tokenizer, batch_tokens=16)
    acts = localize_items(a, b, ABILITY, tokenizer, progress=False)
    first = own.map.paths[0]
    assert own.map[0].kind == 'embedding'
    assert torch.allclose(own.pool()[first], acts.pool()[first], atol=1e-6)
    assert torch.equal(own.tokens, acts.tokens)
    assert (own.pool().flat() <= bound.pool().flat() * 1.001 + 1e-6).all()


def test_a_change_upstream_is_nobody_elses_own(tokenizer):
    a = tiny_model(seed=0)
    b = with_changed(a, 'model.layers.0.mlp.down_proj.weight', 3, 0.5)
    own, bound = (s.pool() for s in wei.own_items(a, b, ABILITY, tokenizer))
    acts = localize_items(a, b, ABILITY, tokenizer, progress=False).pool()
    assert acts['model.layers.1.self_attn.q_proj'].sum() > 0
    assert own['model.layers.1.self_attn.q_proj'].sum() == 0
    assert own['model.layers.0.mlp.down_proj'].nonzero()[:, 0].tolist() == [3]
    assert torch.allclose(own['model.layers.0.mlp.down_proj'], acts['model.layers.0.mlp.down_proj'], atol=1e-5)


def test_own_change_by_hand(tokenizer):
    "One linear layer: mean over answer tokens of |dw . x|, and the product of norms."
    a = tiny_model(seed=0)
    b = with_changed(a, 'model.layers.1.mlp.up_proj.weight', 0, 0.1)
    seen = []
    hook = a.get_submodule('model.layers.1.mlp.up_proj').register_forward_hook(
        lambda m, args, out: seen.append(args[0])
    )
    own, bound = (s.pool() for s in wei.own_items(a, b, ABILITY[:1], tokenizer))
    hook.remove()
    from act.encoding import encode

    x = seen[0][0][encode(ABILITY[:1], tokenizer)[0].positions]
    assert own['model.layers.1.mlp.up_proj'][0].item() == pytest.approx((x.sum(1) * 0.1).abs().mean().item(), rel=1e-3)
    dw = (
        dict(b.named_parameters())['model.layers.1.mlp.up_proj.weight']
        - dict(a.named_parameters())['model.layers.1.mlp.up_proj.weight']
    )[0]
    assert bound['model.layers.1.mlp.up_proj'][0].item() == pytest.approx(
        (dw.norm() * x.norm(dim=1).mean()).item(), rel=1e-3
    )


def test_correlations_by_hand():
    a = ChannelScores.from_flat(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1.0, 1.0, 1.0, 1.0]), TWO)
    b = ChannelScores.from_flat(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 2.0, 3.0, 4.0]), TWO)
    c = wei.correlations(a, b)
    assert c.rho[0] == pytest.approx(-1)
    assert np.isnan(c.rho[1])
    assert wei.ranking_agreement(a, a, 0.2) == {
        'overlap, raw': 1,
        'overlap, module': 1,
        'rho, all channels': pytest.approx(1),
        'rho, within modules': pytest.approx(1),
    }


def test_shares_by_hand():
    acts, own = (ChannelScores.from_flat(torch.tensor(v), TWO) for v in ([1.0] * 6 + [2.0] * 4, [1.0] * 6 + [0.5] * 4))
    s = wei.own_share(acts, own).set_index('kind')
    assert s.share['q'] == 1
    assert s.share['o'] == 0.25
    assert s.layer.tolist() == [0, 1]


def test_effects_by_hand():
    t = lambda *v: pd.DataFrame(dict(ability=['m-en', 'm-es', 's-en', 's-es'], value=v))
    assert list(wei.effects(t(0, 1, 0, 1)).values()) == pytest.approx([0, 1, 0])
    assert list(wei.effects(t(0, 1, 1, 0)).values()) == pytest.approx([0, 0, 1])
    assert list(wei.effects(t(0, 1, 2, 3)).values()) == pytest.approx([0.8, 0.2, 0])


def test_orders_take_equally_many_channels(bench):
    o = wei.ranking_orders(bench, (0,))
    masks = {k: make(bench.scores(0), 0.3, 0) for k, make in o.items()}  # smaller raw ones are rows of lm_head alone
    assert len(o) == 10
    assert {m.count for m in masks.values()} == {masks['random'].count}
    assert len({m.hash for m in masks.values()}) == 10
    from act.scores import weight_scores

    assert masks['weight, raw'] == top_p(weight_scores(bench.target, bench.donor), 0.3)


@pytest.mark.slow
def test_a_small_weights_study_is_whole(tmp_path):
    f = wei.WEIGHTS.run(SMALL, seeds=(0, 1), resamples=2, ps=(0.05, 0.2), n=4)
    again = Finding.load(f.save(tmp_path / 'f.json'))
    assert set(f.tables) == {'agreement', 'kinds', 'shares', 'abilities', 'effects', 'doses', 'areas'}
    assert again.here == f.here
    assert set(f.tables['effects'].pair) == {'maths-en', 'science-zh'}
    assert f.tables['effects'][['skill', 'language', 'rest']].sum(1).tolist() == pytest.approx([1] * 8)
    assert (again.here, again.why) == (f.here, f.why)
    assert set(wei.averaged(f.tables['agreement']).condition) == {'pair', 'noise twin'}


# --- the table of verdicts


def est(v, d=0.01):
    return dict(value=v, low=v - d, high=v + d)


@pytest.mark.parametrize('sign', [1, -1])
def test_an_effect_must_lie_above_its_null_and_matter(sign):
    at = lambda v, d: dict(
        value=sign * v, low=min(sign * (v - d), sign * (v + d)), high=max(sign * (v - d), sign * (v + d))
    )
    whole = sign * 2.0
    assert exceeds(at(0.5, 0.1), at(0.2, 0.1), whole)
    assert not exceeds(at(0.5, 0.2), at(0.2, 0.2), whole)  # intervals overlap
    assert not exceeds(at(0.29, 0.01), at(0.2, 0.01), whole)  # too small
    assert not exceeds(at(0.2, 0.1), at(0.5, 0.1), whole)
    assert exceeds(at(2 * LEAST + 0.001, 0.01), whole=whole)
    assert not exceeds(at(0.5, 0.1), whole=0)


def scores_of(attribution, noise):
    rows = [('pair', attribution), ('noise twin', noise)]
    return pd.DataFrame([dict(score='attribution', condition=c, statistic='top_2', **est(v)) for c, v in rows])


@pytest.mark.parametrize(
    'raw, module, attribution, word',
    [
        (0.6, 0.6, None, 'holds'),
        (0.54, 0.6, None, 'in part'),
        (0.54, 0.54, None, 'does not hold'),
        (0.54, 0.54, 0.9, 'in part'),
        (0.54, 0.54, 0.5, 'does not hold'),
    ],
)
def test_the_rule_of_concentration(raw, module, attribution, word):
    rows = [
        dict(condition=c, ability='a', rank=r, statistic='top_5', **est(v))
        for r, pair in (('raw', raw), ('module', module))
        for c, v in (('pair', pair), ('noise twin', 0.5))
    ]
    tables = dict(statistics=pd.DataFrame(rows))
    if attribution:
        tables['scores'] = scores_of(attribution, 0.5)
    assert Finding('concentration', 'lab', tables, {}).judgement == word


@pytest.mark.parametrize(
    'raw, module, word',
    [
        ((0.2, 0.8, 0.4), (0.2, 0.8, 0.4), 'holds'),
        ((0.7, 0.8, 0.7), (0.2, 0.8, 0.4), 'in part'),
        ((0.5, 0.8, 0.9), (0.5, 0.8, 0.9), 'in part'),
        ((0.2, 0.8, 0.24), (0.2, 0.8, 0.24), 'does not hold'),
    ],
)
def test_the_rule_of_disentanglement(raw, module, word):
    rows = []
    for v, (far, near, noise) in dict(raw=raw, module=module).items():
        rows += [
            dict(condition='pair', variant=v, relation='nothing shared', **est(far)),
            dict(condition='pair', variant=v, relation='same ability, other items', **est(near)),
            dict(condition='noise twin', variant=v, relation='nothing shared', **est(noise)),
        ]
    assert Finding('disentanglement', 'lab', dict(summary=pd.DataFrame(rows)), dict(p=0.05)).judgement == word


def sufficiency_of(metric, all_, twin=None, **orders):
    "A finding with these differences from random channels, and from the twin; moving everything brings back `all_`."
    names = {'raw': 'top, raw', 'module': 'top, module', 'attribution': 'attribution'}
    at = lambda values, d: pd.DataFrame(
        [dict(direction='sufficiency', order=names[k], column='recovered', **est(v, d)) for k, v in values.items()]
    )
    ends = dict(direction='sufficiency', order='random', column='recovered', lam=1.0)
    tables = dict(areas=at(orders, abs(all_) / 100))
    tables['doses'] = pd.DataFrame([dict(ends, p=0.0, value=1.0), dict(ends, p=1.0, value=1.0 + all_)])
    if twin:
        tables['twin'] = at(twin, abs(all_) / 100)
    return Finding('sufficiency', 'lab', tables, dict(metric=metric))


@pytest.mark.parametrize('metric, all_', [('correct', 60.0), ('bits', -0.5)])
@pytest.mark.parametrize(
    'orders, twin, word',
    [
        (dict(raw=0.2, module=0.2), dict(raw=0.2, module=0.2), 'holds'),
        (dict(raw=0.2, module=0.2), None, 'in part'),  # no twin
        (dict(raw=0.02, module=0.2), None, 'in part'),  # the raw order's effect is too small
        (dict(raw=0.02, module=0.03), None, 'does not hold'),
        (dict(raw=0.2, module=0.0), dict(raw=0.02, module=0.2), 'does not hold'),  # the twin does as well
        (dict(raw=0.0, module=0.0, attribution=0.5), dict(raw=0.0, module=0.0, attribution=0.4), 'in part'),
        (dict(raw=-0.2, module=-0.2), dict(raw=0.2, module=0.2), 'does not hold'),
    ],
)
def test_the_rule_of_sufficiency(metric, all_, orders, twin, word):
    twin = twin and {k: v * all_ for k, v in twin.items()}
    f = sufficiency_of(metric, all_, twin, **{k: v * all_ for k, v in orders.items()})
    assert f.judgement == word
    assert ('not measured' in f.brief) == (twin is None)


@pytest.mark.parametrize(
    'raw, module, one, word',
    [
        (0.9, 0.9, 0.9, 'holds'),
        (0.5, 0.9, 0.9, 'in part'),
        (0.5, 0.9, 0.1, 'in part'),
        (0.54, 0.54, 0.9, 'does not hold'),
        (0.5, 0.1, 0.1, 'does not hold'),
    ],
)
def test_the_rule_of_stability(raw, module, one, word):
    names = [n for n in tra.CHANGES if n != 'reference']
    rows = [
        dict(name=n, rank=r, **est(one if (n, r) == (names[0], 'module') else v))
        for r, v in (('raw', raw), ('module', module))
        for n in names
    ]
    rows += [dict(name='noise twin', rank=r, **est(0.5)) for r in RANKS]
    assert Finding('stability', 'lab', dict(trainings=pd.DataFrame(rows)), {}).judgement == word


@pytest.mark.parametrize(
    'share, noise, skill, word',
    [
        (0.3, 0.1, 0.85, 'holds'),
        (0.7, 0.1, 0.85, 'in part'),
        (0.3, 0.31, 0.85, 'in part'),
        (0.3, 0.1, 0.6, 'in part'),  # six of eleven degrees of freedom are skill and language
        (0.3, 0.27, 0.6, 'does not hold'),
    ],
)
def test_the_rule_of_weights(share, noise, skill, word):
    t = pd.DataFrame(
        [
            dict(condition=c, ability='a', ranking='weight', statistic='overlap, raw', **est(v))
            for c, v in (('pair', share), ('noise twin', noise))
        ]
    )
    e = pd.DataFrame([dict(pair='x', ranking='weight', skill=skill, language=0.1, rest=0.9 - skill)])
    names = [a.replace('lab/', '') for a in FAMILIES['lab'].abilities]
    tables = dict(agreement=t, effects=e, abilities=pd.DataFrame(dict(pair='x', ability=names)))
    assert Finding('weights', 'lab', tables, dict(p=0.05)).judgement == word


def test_what_an_old_record_lacks_is_said():
    for name, words in dict(concentration='not measured', sufficiency='not measured').items():
        assert words in recorded(name, 'smollm2').here
    assert 'attribution: not measured' in recorded('disentanglement', 'smollm2').here
    assert 'attribution: not measured' in recorded('stability', 'smollm2').here


def test_the_kind_that_fills_a_raw_mask_is_named():
    cells = pd.DataFrame(dict(kind=['q', 'lm_head', 'q'], channels=[60, 20, 20], raw=[0.0, 0.2, 0.05]))
    assert con.kind_text(cells) == (
        '80 % of the raw top 5 % are lm_head channels, which are 20 % of all:'
        ' the raw ranking is mostly about one kind of module'
    )


def test_the_table_of_verdicts_has_every_finding():
    t = verdicts()
    assert set(zip(t.finding, t.family)) == {(n, f) for n in STUDIES for f in FAMILIES}
    assert set(t.judgement) <= set(JUDGEMENTS)
    assert (t.here.str.len() > 20).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_the_lab_measured_again_gives_what_was_recorded(name):
    old, new = recorded(name, 'lab'), find_study(name).run('lab')
    assert new.judgement == old.judgement
    assert set(new.tables) == set(old.tables)
    for key, table in new.tables.items():
        numbers = table.select_dtypes('number')
        assert np.allclose(numbers, old.tables[key][numbers.columns], atol=0.02, rtol=0.02, equal_nan=True), key

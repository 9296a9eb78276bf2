"The findings: item scores pool to localize's, statistics equal hand-made values, studies have all they promise, files come back."
import json, numpy as np, pandas as pd, pytest, torch
from itertools import combinations
from act import concentration as con, disentanglement as dis, sufficiency as suf
from act.abilities import Ability, Item
from act.channels import ChannelMap, ModuleChannels
from act.core import ActError
from act.findings import FAMILIES, Family, Finding, NAMES, act_findings, estimate, family, recorded, save_figure
from act.localize import localize, localize_items
from act.masks import ChannelMask, ChannelScores, ItemScores
from act.recover import CASES, Bench
from conftest import FAMILIES as FAMILY_NAMES, tiny_model

ABILITY = Ability('toy-en', [Item('two plus two is', ' four'), Item('cuatro y', ' cuatro son ocho'), Item('x', 'y'), Item('a b c d', ' e f')])
TEN = ChannelMap([ModuleChannels('model.norm', 'norm', None, 10, (('model.norm.weight', 0),))], tied=None)
def mask(*idx): return ChannelMask({'model.norm': torch.tensor([i in idx for i in range(10)])}, TEN)

@pytest.mark.parametrize('name', FAMILY_NAMES)
def test_item_scores_pool_to_the_scores(name, tokenizer):
    a, b = tiny_model(name, 0), tiny_model(name, 1)
    items = localize_items(a, b, ABILITY, tokenizer, batch_tokens=16, progress=False)
    whole = localize(a, b, ABILITY, tokenizer, progress=False)
    assert torch.allclose(items.pool().flat(), whole.flat(), rtol=1e-4, atol=1e-6)
    assert items.tokens.sum() == whole.meta['tokens']
    for i in range(len(ABILITY)):
        assert torch.allclose(items.pool([i]).flat(), localize(a, b, ABILITY[i:i+1], tokenizer, progress=False).flat(), rtol=1e-4, atol=1e-6)

def test_item_scores_by_hand():
    s = ItemScores(torch.arange(30.).reshape(3, 10), torch.tensor([1, 2, 3]), TEN)
    assert torch.equal(s.pool([0, 2, 2]).flat(), (s.sums[0] + 2*s.sums[2])/7)
    a, b = s.split(1, 2, seed=1)
    assert a.meta['items'] == 1 and b.meta['items'] == 2 and a.meta['tokens'] + b.meta['tokens'] == 6
    assert len({tuple(x.flat().tolist()) for x in s.resamples(8)}) > 1
    with pytest.raises(ActError, match='ask for fewer'): s.split(2, 2)
    with pytest.raises(ActError, match='do not go with'): ItemScores(torch.zeros(3, 9), torch.ones(3), TEN)

def test_shuffling_breaks_the_pairing_and_nothing_else(tokenizer):
    a = tiny_model()
    assert not localize_items(a, a, ABILITY, tokenizer, progress=False).sums.any()
    null = localize_items(a, a, ABILITY, tokenizer, shuffle=1, progress=False)
    assert null.sums.any() and torch.equal(null.tokens, localize_items(a, a, ABILITY, tokenizer, progress=False).tokens)
    assert torch.equal(null.sums, localize_items(a, a, ABILITY, tokenizer, shuffle=1, progress=False).sums)
    assert not torch.equal(null.sums, localize_items(a, a, ABILITY, tokenizer, shuffle=2, progress=False).sums)

def test_statistics_by_hand():
    x = np.array([9., *[1.]*9])
    assert con.top_mass(x, .1) == .5 and con.top_mass(x, .05) == .5 and con.top_mass(x, .2) == pytest.approx(10/18)
    assert con.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean()/(2*x.mean())) # the definition by mean absolute difference
    assert con.participation(x) == pytest.approx(18**2/(10*90))
    assert con.top_mass(np.zeros(4), .5) == con.gini(np.zeros(4)) == con.participation(np.zeros(4)) == 0
    c = con.ccdf(x)
    assert (c.score.iloc[0], c.share.iloc[0]) == (9, .1) and c.share.iloc[-1] == 1

def test_gini_against_the_definition():
    x = np.random.default_rng(0).exponential(size=300)
    assert con.gini(x) == pytest.approx(np.abs(x[:, None] - x[None]).mean()/(2*x.mean()))

def test_the_noise_twin_is_as_far_and_elsewhere():
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    twin, other = con.noise_twin(a, b, 0), con.noise_twin(a, b, 1)
    for (n, p), q, o, x in zip(a.named_parameters(), b.parameters(), twin.parameters(), other.parameters()):
        assert (o - p).norm().item() == pytest.approx((q - p).norm().item(), rel=1e-4, abs=1e-7), n
        if (q - p).any(): assert not torch.equal(o, x)
    assert torch.equal(next(a.parameters()), next(tiny_model(seed=0).parameters()))

def test_cells_cover_every_channel_once():
    s = ChannelScores.from_flat(torch.rand(10), TEN)
    c = con.cells(s, .2)
    assert c.channels.sum() == 10 and c["sum"].sum() == pytest.approx(1) and (c.raw*c.channels).sum() == pytest.approx(2) == (c.module*c.channels).sum()

def test_the_verdict_compares_intervals():
    row = lambda c, r, v, lo, hi: dict(condition=c, ability='a', rank=r, statistic='top_5', value=v, low=lo, high=hi)
    stats = pd.DataFrame([row(c, r, *v) for r in ('raw', 'module') for c, v in (('pair', (.3, .25, .35)), ('low', (.1, .05, .2)), ('near', (.28, .2, .3)), ('high', (.9, .8, 1.)))])
    assert con.versus(stats).set_index('condition').pair_is.to_dict() == {'pair': '', 'low': 'above', 'near': 'not told apart', 'high': 'below'}

def test_overlap_and_chance_by_hand():
    r = dis.shared(dict(a=mask(0, 1, 2, 3), b=mask(2, 3, 4, 5), c=mask(6, 7))).set_index(['a', 'b'])
    assert tuple(r.loc[('a', 'b'), ['iou', 'overlap', 'expected']]) == (2/6, .5, .4) and 10**r.log10_p[('a', 'b')] == pytest.approx((90 + 24 + 1)/210)
    assert r.overlap[('a', 'c')] == 0 and r.log10_p[('a', 'c')] == pytest.approx(0)
    with pytest.raises(ActError, match='two masks'): dis.shared(dict(a=mask(1)))

def test_random_masks_overlap_as_chance_says():
    big = ChannelMap([ModuleChannels('model.norm', 'norm', None, 4000, (('model.norm.weight', 0),))], tied=None)
    g = torch.Generator().manual_seed(0)
    masks = {str(i): ChannelMask({'model.norm': torch.rand(4000, generator=g) < .1}, big) for i in range(12)}
    t = dis.shared(masks)
    assert t.overlap.mean() == pytest.approx(t.expected.mean(), abs=.01) and (10**t.log10_p).mean() == pytest.approx(.5, abs=.12)

def test_specific_removes_what_is_common():
    s = lambda *v: ChannelScores({'model.norm': torch.tensor([*v, *[1.]*7])}, TEN)
    out = dis.specific(dict(a=s(9., 5., 1.), b=s(9., 1., 5.)))
    assert out['a'].flat().argmax() == 1 and out['b'].flat().argmax() == 2 and out['a'].flat()[0] == out['b'].flat()[0] == 0

def test_the_additive_model_finds_what_was_put_in():
    names = [f'{p}|{s}-{o}' for p in 'uv' for s in ('m', 's') for o in ('en', 'es', 'zh')]
    table = dis.relations(pd.DataFrame([dict(a=a, b=b) for a, b in combinations(names, 2)]))
    table['overlap'] = .1 + .3*table.same_pair + .2*table.same_skill
    t = dis.additive(table).set_index('term')
    assert t.coefficient[['nothing shared', 'pair', 'skill', 'language']].tolist() == pytest.approx([.1, .3, .2, 0], abs=1e-9)
    assert t.alone['all'] == pytest.approx(1) and t.alone['language'] == pytest.approx(0, abs=1e-9) and t.alone['pair'] > t.alone['skill'] > .1

def test_an_estimate_covers_its_seeds():
    e = estimate([.2, .4], [.25, .35])
    assert e['value'] == pytest.approx(.3) and e['low'] <= .2 and e['high'] >= .4
    with pytest.raises(ActError, match='at least one'): estimate([], [1.])

SMALL = Family('lab', 'a small part of the lab', FAMILIES['lab'].pairs[:2], ('lab/arithmetic-en', 'lab/arithmetic-zh', 'lab/science-en', 'lab/science-zh'), ('lab/science-zh',), items=6)

@pytest.mark.parametrize('name, study, tables', [('concentration', con.study, {'statistics', 'curves', 'cells'}), ('disentanglement', dis.study, {'summary', 'terms', 'overlaps', 'curve'})])
def test_a_small_study_is_whole_and_comes_back(name, study, tables, tmp_path):
    f = study(SMALL, seeds=(0, 1), resamples=2)
    again = Finding.load(f.save(tmp_path/'f.json'))
    assert set(f.tables) == tables == set(again.tables) and again.here == f.here and again.meta['git'] and again.meta['seeds'] == [0, 1]
    for t in f.tables.values():
        if {'low', 'value', 'high'} <= set(t): assert ((t.low <= t.value + 1e-9) & (t.value <= t.high + 1e-9)).all()
    assert name in f._repr_markdown_().lower() and not t.empty

@pytest.mark.parametrize('name, fam', [*((n, 'smollm2') for n in NAMES), ('concentration', 'lab-32'), ('concentration', 'lab-64')])
def test_recorded_findings_are_whole(name, fam):
    f = recorded(name, fam)
    assert f.name == name and f.family == fam and len(f.meta['seeds']) >= 3 and f.meta.get('resamples', 5) >= 5 and not f.meta['git'].endswith('+')
    assert '/' not in json.dumps(f.meta['pairs']).replace('smollm2/', '').replace('lab/', '')

def test_figures_come_with_their_data_and_the_same_bytes(tmp_path):
    import matplotlib.pyplot as plt
    from act.findings import use_style
    use_style()
    def once(d):
        _, ax = plt.subplots()
        ax.plot([1, 2])
        save_figure(ax, 'x', pd.DataFrame(dict(y=[1., 2.])), d)
        plt.close()
        return (d/'x.svg').read_bytes(), (d/'x.csv').read_text()
    assert once(tmp_path/'a') == once(tmp_path/'b') and once(tmp_path/'a')[1] == 'y\n1\n2\n'

def test_what_is_refused(tmp_path):
    with pytest.raises(ActError, match='no family'): family('x')
    with pytest.raises(ActError, match='needs --finding'): act_findings(out='x')
    with pytest.raises(ActError, match='no finding'): act_findings(finding='x', out='x')
    for text in ('x', '{}', '[]'):
        (tmp_path/'f').write_text(text)
        with pytest.raises(ActError, match='finding'): Finding.load(tmp_path/'f')

def test_bottom_is_the_other_end():
    s = ChannelScores.from_flat(torch.tensor([5., 1., 1., 4., 3., 2., 9., 8., 7., 6.]), TEN)
    assert suf.bottom_p(s, .2).flat().nonzero()[:, 0].tolist() == [1, 2] and suf.bottom_p(s, 1.).count == 10
    for p in (.1, .3, .5, .9): assert suf.bottom_p(s, p).count == round(10*p) and not (suf.bottom_p(s, p) & suf.top_p(s, 1 - p)).count

def test_one_kind_can_be_put_last():
    two = ChannelMap([ModuleChannels('model.embed_tokens', 'embedding', None, 3, (('model.embed_tokens.weight', 1),)), ModuleChannels('model.norm', 'norm', None, 3, (('model.norm.weight', 0),))], tied=None)
    s = suf.kind_last(ChannelScores.from_flat(torch.tensor([0., 0., 0., 3., 2., 1.]), two))
    assert suf.bottom_p(s, .5).flat().tolist() == [False]*3 + [True]*3

def test_areas_by_hand():
    assert suf.area([.01, .1, 1.], np.array([[1., 1., 1.], [0., 2., 0.]])).tolist() == pytest.approx([1., 1.])
    assert suf.area([.01, .1], np.array([0., 3.])) == pytest.approx(1.5)

@pytest.fixture(scope='module')
def bench():
    from dataclasses import replace
    return Bench(replace(CASES['lab'], others=(), n=10, items=8), progress=False)

def test_no_dose_is_the_target_and_the_full_dose_the_donor(bench):
    from act.transfer import transfer
    m = suf.doses(bench, {'random': suf.ORDERS['random']}, (.5, 1.), seeds=(0,))
    for a, v in bench.values(bench.target, bench.test).items(): assert (m['sufficiency', 'random', 1., 0.][0][a] == v).all() and (m['necessity', 'random', 1., 1.][0][a] == v).all()
    moved = transfer(bench.target, bench.donor, suf.ORDERS['random'](bench.scores(0), 1., 0), check=False)
    for a, v in bench.values(moved, bench.test).items(): assert (m['sufficiency', 'random', 1., 1.][0][a] == v).all() and (m['necessity', 'random', 1., 0.][0][a] == v).all()

def test_areas_are_paired_and_zero_against_itself(bench):
    m = suf.doses(bench, {'random': suf.ORDERS['random'], 'again': suf.ORDERS['random'], 'top, raw': suf.ORDERS['top, raw']}, (.2, 1.), seeds=(0,), directions=('sufficiency',))
    a = suf.areas(bench, m).set_index(['order', 'column'])
    assert (a.loc['again'][['value', 'low', 'high']] == 0).all().all() and len(a) == 4
    r = suf.responses(bench, m)
    assert ((r.low <= r.value + 1e-9) & (r.value <= r.high + 1e-9)).all() and set(r.p) == {0., .2, 1.}

def test_a_small_sufficiency_study_is_whole(tmp_path):
    f = suf.study('lab', seeds=(0, 1), ps=(.05, 1.), lams=(.5,), n=6)
    again = Finding.load(f.save(tmp_path/'f.json'))
    assert set(f.tables) == {'doses', 'areas', 'lams'} and again.here == f.here and set(f.tables['doses'].order) == set(suf.ORDERS)
    assert suf.verdict(again.tables, again.meta) == (f.here, f.why)

def test_a_family_without_a_case_is_refused():
    with pytest.raises(ActError, match='no recover case'): suf.bench_of(Family('x', '', (('a', 'b'),), (), (), 1))

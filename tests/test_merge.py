"Merging: claims, conflicts and rules by hand, order of donors, oracle, interference, a whole small study."

import numpy as np, pytest, torch
from act.channels import ChannelMap, ModuleChannels, enumerate_channels
from act.fingerprints import weight_hash
from act.kit.errors import ActError
from act.masks import ChannelMask, random_mask, top_p
from act.scores import ChannelScores
from act.studies.cases import MERGES, MergeCase
from act.studies.merge import Merged, interference, merge_study, oracle, plot_interference
from act.studies.mergers import MERGE_ROWS, MERGERS, MergeBench, claims, conflicts, merge, priority
from act.transfer import transfer
from conftest import tiny_model

FOUR = ChannelMap([ModuleChannels('n', 'norm', None, 4, (('n.weight', 0),))], tied=None)


def masks(**kw):
    return {n: ChannelMask.from_flat(torch.tensor(v).bool(), FOUR) for n, v in kw.items()}


def scores(**kw):
    return {n: ChannelScores.from_flat(torch.tensor(v, dtype=torch.float), FOUR) for n, v in kw.items()}


@pytest.fixture(scope='module')
def bench():
    case = MergeCase(
        'lab/base',
        {'lab/maths-en': ('lab/multiplication-en',), 'lab/swahili': ('lab/multiplication-sw', 'lab/chemistry-sw')},
        ('lab/science-en',),
        n=6,
        items=8,
        sft=dict(steps=1, lr=1e-3, batch_size=4),
        grid=dict(ps=(0.1,), lams=(0.5, 1.0)),
    )
    return MergeBench(case, progress=False)


def test_claims_count_every_channel_once():
    t = claims(masks(a=[1, 1, 0, 0], b=[0, 1, 0, 0], c=[0, 1, 1, 0]))
    assert t.loc['norm'].to_dict() == {0: 1, 1: 2, 3: 1}
    assert t.to_numpy().sum() == 4


def test_conflicts_know_the_direction():
    a = tiny_model()
    cm = enumerate_channels(a)
    m = {
        n: random_mask(top_p(ChannelScores.from_flat(torch.arange(float(cm.total)), cm), 0.3), seed=s)
        for n, s in (('b', 1), ('c', 2))
    }

    def moved(lam):  # the same change, scaled
        other = tiny_model(seed=1)
        return transfer(a, other, m['b'] | m['c'], lam)

    t = conflicts(a, dict(b=moved(0.5), c=moved(1.0)), m).iloc[0]
    assert t.contested == (m['b'] & m['c']).count > 0
    assert t.cosine == pytest.approx(1, abs=1e-5)
    assert conflicts(a, dict(b=moved(0.5), c=moved(-0.5)), m).cosine[0] == pytest.approx(-1, abs=1e-5)
    assert np.isnan(conflicts(a, dict(b=a, c=a), m).cosine[0])


def test_priority_by_hand_and_in_any_order():
    m, s = masks(a=[1, 1, 0, 0], b=[1, 1, 0, 0], c=[0, 1, 1, 0]), scores(a=[1, 1, 1, 1], b=[1, 3, 0, 0], c=[9, 1, 1, 1])
    got = priority(m, s)  # module means 1, 1, 3: channel 0 is a tie of a and b, channel 1 is b's
    assert {n: o.flat().int().tolist() for n, o in got.items()} == dict(a=[1, 0, 0, 0], b=[0, 1, 0, 0], c=[0, 0, 1, 0])
    other = priority({n: m[n] for n in 'cba'}, s)
    assert list(other) == ['c', 'b', 'a']
    assert all(other[n] == got[n] for n in 'abc')


@pytest.mark.parametrize('rule', ['sum', 'mean', 'sign', 'priority'])
def test_the_order_of_the_specialists_does_not_matter(bench, rule):
    m = {s: top_p(o, 0.2, 'module') for s, o in bench.scores().items()}
    one = merge(bench.target, bench.specialists, m, 0.7, rule, bench.scores())
    back = {s: m[s] for s in reversed(m)}
    assert weight_hash(one) == weight_hash(merge(bench.target, bench.specialists, back, 0.7, rule, bench.scores()))


def test_rules_agree_where_nothing_is_contested(bench):
    m = {s: top_p(o, 0.2, 'module') for s, o in bench.scores().items()}
    first, second = m
    apart = {first: m[first], second: m[second] - m[first]}
    assert (
        len(
            {
                weight_hash(merge(bench.target, bench.specialists, apart, 0.7, r, bench.scores()))
                for r in ('sum', 'mean', 'sign', 'priority')
            }
        )
        == 1
    )
    with pytest.raises(ActError, match='pass scores='):
        merge(bench.target, bench.specialists, m, rule='priority')


def test_the_oracle_takes_the_best_of_each_item():
    rows = dict(a=[dict(x=np.array([1.0, 0.0, 0.0]))], b=[dict(x=np.array([0.0, 1.0, 0.0]))])
    assert oracle(rows, ['a', 'b'], 'correct')[0]['x'].tolist() == [1, 1, 0]
    assert oracle(rows, ['a', 'b'], 'bits')[0]['x'].tolist() == [0, 0, 0]


@pytest.mark.parametrize('name', MERGERS)
def test_every_method_makes_a_model_of_its_own(bench, name):
    o = MERGERS[name]
    s, *_, last = o.settings((0.1, 0.2), (0.5, 1.0))
    before, after = bench.model(o, sft=False, **s), bench.model(o, **s)
    assert weight_hash(bench.model(o, **last)) != weight_hash(after)
    assert weight_hash(after) != weight_hash(before)
    assert (weight_hash(before) == weight_hash(bench.target)) == (name in ('light SFT only', 'joint SFT'))
    assert len({str(x) for x in o.settings((0.05, 0.1, 0.2, 0.3), (0.5, 1.0))}) == 8


def test_without_itself_a_specialist_costs_nothing_when_it_moves_nothing(bench):
    t = interference(bench, dict(p=0.1, lam=0.0, rank='module'), (0,))
    assert (t.difference == 0).all()
    assert len(t) == 2 * 3
    assert list(plot_interference(t).get_yticklabels()[0].get_text())
    assert t.added.tolist() == ['maths-en'] * 3 + ['swahili'] * 3
    assert t.on.tolist() == ['maths-en', 'swahili', 'base'] * 2


@pytest.mark.slow
def test_a_small_study_is_whole(bench, tmp_path):
    some = {
        r: MERGE_ROWS[r]
        for r in ('ACT (module-normalised) without SFT', 'ACT (priority)', 'TIES (mergekit)', 'light SFT only')
    }
    rec = merge_study(bench.case, tmp_path / 'm.json', (0, 1), progress=False, rows=some)
    again = Merged.load(tmp_path / 'm.json')
    assert list(again.rows) == ['oracle', 'base', 'maths-en', 'swahili', *some]
    assert list(again.table().columns) == ['maths-en', 'swahili', 'base', 'mean']
    assert again.table().equals(rec.table())
    assert again.best == rec.best
    assert set(again.against('ACT (priority)').column) == {'maths-en', 'swahili', 'base', 'mean'}
    best = again.numbers().query("row == 'oracle'").set_index('column').value
    for r in ('base', 'maths-en', 'swahili'):
        assert (best >= again.numbers().query('row == @r').set_index('column').value - 1e-9).all()
    m = again.meta
    assert (
        sum(sum(v for k, v in r.items() if k != 'kind') for r in m['claims']) == bench.scores()['lab/swahili'].map.total
    )
    assert len(m['conflicts']) == 1
    assert len(m['interference']) == 6
    assert m['setting'] == rec.best['ACT (module-normalised) without SFT']
    with pytest.raises(ActError, match='exists'):
        merge_study(bench.case, tmp_path / 'm.json', progress=False)


def test_the_command_asks_for_what_it_needs(run):
    code, _, err = run('act_merge --case other --out x.json')
    assert code != 0
    assert 'no merge' in err
    assert run('act_merge')[0] != 0


def test_the_shipped_case_names_what_exists():
    from act.sources import load_ability

    for names in MERGES['lab'].aims.values():
        for a in names:
            assert len(load_ability(a, 'sft'))
            assert len(load_ability(a, 'validation'))

"The main job: fair grids, intervals by hand, a whole small run, results that come back."

import json, numpy as np, pandas as pd, pytest
from dataclasses import asdict, replace
from act.kit.errors import ActError
from act.studies.bench import Bench
from act.studies.cases import CASES, RESULTS, Case
from act.studies.methods import METHODS, ROWS
from act.studies.recover import recover
from act.studies.recovery import Recovery, group_samples


def test_every_method_gets_as_many_tries():
    for ps, lams in (((0.05, 0.1, 0.2, 0.3), (0.5, 1.0)), ((0.1, 0.3), (0.5, 1.0))):
        assert {len(m.settings(ps, lams)) for m in METHODS.values()} == {len(ps) * len(lams)}


def test_group_means_and_intervals_by_hand():
    x = np.r_[np.ones(50), np.zeros(50)]
    s = group_samples([dict(a=x, b=1 - x[:10])], ('a', 'b'))
    assert s[0] == (0.5 + 0) / 2
    assert len(s) == 2001
    assert np.std(group_samples([dict(a=x)], ('a',))[1:]) == pytest.approx(0.05, rel=0.1)


def test_seeds_widen_the_interval():
    x = np.r_[np.ones(50), np.zeros(50)]
    apart = group_samples([dict(a=x * 0), dict(a=x * 0 + 1), dict(a=x * 0 + 0.5)], ('a',))
    assert apart[0] == 0.5
    assert np.std(apart[1:]) == pytest.approx(np.sqrt(1 / 6 / 3), rel=0.1)


@pytest.mark.parametrize('rivals, verdict', [(1, 'better'), (30, 'tie')])
def test_a_difference_must_survive_the_number_of_comparisons(rivals, verdict):
    x, six_more = (
        np.r_[np.ones(88), np.zeros(112)],
        np.r_[np.ones(94), np.zeros(106)],
    )  # resamples without any of the six: exp(-6) of all
    rec = Recovery(
        Case('t', 'd', ('r',), ('k',), ()),
        {'ACT': [dict(r=six_more, k=x)], **{f'rival {i}': [dict(r=x, k=x)] for i in range(rivals)}},
        pd.DataFrame(),
        {},
        {},
    )
    d = rec.against('ACT')
    assert (d[d.column == 'recovered'].low > 0).all()
    assert d.p.min() == pytest.approx(2 * np.exp(-6), rel=0.5)
    assert d.holm.min() == pytest.approx(min(1, d.p.min() * len(d)))
    assert len(rec.sides('ACT')['recovered'][verdict]) == rivals


def test_a_plain_difference_is_significant_among_any_number_of_rows():
    x = np.r_[np.ones(20), np.zeros(20)]
    others = {f'rival {i}': [dict(r=x, k=x)] for i in range(120)}
    rec = Recovery(Case('t', 'd', ('r',), ('k',), ()), {'ACT': [dict(r=x * 0 + 1, k=x)], **others}, None, {}, {})
    assert len(rec.sides('ACT')['recovered']['better']) == 120


def test_rows_are_paired_by_items():
    x = np.random.default_rng(0).integers(2, size=100).astype(float)
    rec = Recovery(
        Case('t', 'd', ('r',), ('k',), ()),
        {'target': [dict(r=x * 0.5, k=x)], 'ACT (module-normalised)': [dict(r=x * 0.5 + 0.5, k=x)]},
        pd.DataFrame(),
        {},
        dict(seeds=[0]),
    )
    d = rec.against().set_index('column')
    assert d.difference['recovered'] == pytest.approx(50)
    assert d.low['recovered'] == pytest.approx(50)
    assert d.difference['retained'] == 0


@pytest.mark.parametrize('metric, side', [('correct', ('better', 'worse')), ('bits', ('worse', 'better'))])
def test_sides_follow_the_metric(metric, side):
    x = np.random.default_rng(0).integers(2, size=100).astype(float)
    rows = {
        'ACT': [dict(r=x + 1, k=x)],
        'lower': [dict(r=x, k=x)],
        'higher': [dict(r=x + 2, k=x)],
        'same': [dict(r=x + 1, k=x)],
    }
    got = Recovery(Case('t', 'd', ('r',), ('k',), (), metric=metric), rows, pd.DataFrame(), {}, {}).sides('ACT')[
        'recovered'
    ]
    assert got == {side[0]: ['lower'], side[1]: ['higher'], 'tie': ['same']}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    case = replace(
        CASES['lab'],
        others=('lab/arithmetic-en',),
        n=12,
        items=16,
        sft=dict(steps=2, lr=1e-4, batch_size=4),
        grid=dict(ps=(0.1,), lams=(0.5, 1.0)),
    )
    out = tmp_path_factory.mktemp('run') / 'out'
    return recover(case, out, seeds=(0, 1), progress=False), out, case


def test_a_small_run_has_every_row_and_column(small):
    rec, out, case = small
    t = rec.table()
    assert list(t.index) == ['target', 'donor', *ROWS]
    assert list(t.columns) == ['retained', 'recovered', 'others', 'mean']
    tried = [r for r, (m, _) in ROWS.items() if m]
    assert list(rec.grid.row) == ['target', 'donor', *(r for r in tried for _ in range(2))]
    assert list(rec.best) == tried
    for r, g in rec.grid[2:].groupby('row'):
        assert rec.best[r] == g.loc[g['mean'].idxmax()].setting
    assert set(rec.meta['costs']) == set(ROWS)
    assert rec.meta['costs']['ACT without SFT']['tokens'] == 0 < rec.meta['costs']['ACT']['tokens']
    assert all(len(r) == (1 if n in ('target', 'donor') else 2) for n, r in rec.rows.items())
    n = rec.numbers()
    assert ((n.low <= n.value + 1e-9) & (n.value <= n.high + 1e-9)).all()


def test_choice_and_test_share_no_item(small):
    from act.zoo.lab import lab_ability

    for a in ('multiplication-en', 'science-zh'):
        assert not {o.prompt for o in lab_ability(a, 'validation')} & {o.prompt for o in lab_ability(a)}


def test_what_is_written(small):
    rec, out, case = small
    names = {p.name for p in out.iterdir()}
    assert {
        'result.json',
        'table.csv',
        'table.txt',
        'numbers.csv',
        'grid.csv',
        'against.csv',
        'report.html',
        'scores.safetensors',
        'mask.safetensors',
        *(f'{n}.{t}' for n in ('rows', 'grid', 'scores', 'mask') for t in ('svg', 'png')),
    } == names
    page = (out / 'report.html').read_text()
    assert page.count('<svg') == 4
    assert 'src=' not in page
    assert all(r in page for r in ROWS)
    assert rec.meta['git'] in page
    assert (out / 'table.txt').read_text().rstrip() == rec.table().to_string().rstrip()


def test_results_come_back(small):
    rec, out, case = small
    again = Recovery.load(out / 'result.json')
    assert again.table().equals(rec.table())
    assert json.dumps(asdict(again.case)) == json.dumps(asdict(case))
    assert again.best == rec.best
    assert again.against().equals(rec.against())
    assert again.meta['seeds'] == [0, 1]
    assert again.meta['data']['science-zh']
    assert again.meta['peak_memory_mb'] > 0


def test_a_second_run_into_the_folder_is_refused(small):
    with pytest.raises(ActError, match='exists already'):
        recover(small[2], small[1])


def test_files_that_are_no_results(tmp_path):
    for text, word in (('x', 'not a readable'), ('{"format": "y"}', 'not of the format')):
        (tmp_path / 'r.json').write_text(text)
        with pytest.raises(ActError, match=word):
            Recovery.load(tmp_path / 'r.json')


@pytest.mark.parametrize('name', ['recover-lab', 'recover-lab-science', 'recover-lab-swahili', 'recover-smollm2'])
def test_recorded_results_are_whole(name):
    rec = Recovery.load(RESULTS / f'{name}.json')
    assert {'target', 'donor', *ROWS} == set(rec.rows)
    assert rec.meta['git']
    assert len(rec.meta['seeds']) >= 3
    assert min(len(r) for n, r in rec.rows.items() if n not in ('target', 'donor')) >= 3


def test_a_study_can_count_the_shared_matrix_as_the_head():
    shared = dict(target='lab/tied-maths-en', donor='lab/tied-base', tied='lm_head')
    bench = Bench(replace(CASES['lab'], **shared, n=4, items=8, others=()))
    scores = bench.localised('donor', bench.sample(0))
    kinds = {m.kind for m in scores.map}
    assert 'lm_head' in kinds
    assert 'embedding' not in kinds
    assert bench.weights.map == scores.map


@pytest.mark.parametrize('entry', ['metric', 'tied'])
def test_a_case_says_what_it_can_be(entry):
    with pytest.raises(ActError, match=f"{entry} is 'both'"):
        replace(CASES['lab'], **{entry: 'both'})

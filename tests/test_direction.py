"Doses are nested and end with the donor, curves cross where they should, ranks agree with those by hand."

import numpy as np, pandas as pd, pytest, torch
from act.channels import enumerate_channels
from act.kit.errors import ActError
from act.kit.records import write_json
from act.scores import ChannelScores
from act.studies.both_ways import FORMAT, abilities_of, measure_family
from act.studies.direction import BEYOND, Directions, gather
from act.studies.doses import ORDERS, crossing, largest, measure_doses, pack, random_scores, unpack
from act.studies.predicts import groups_of, mean_over_trainings, rank_agreement, rank_samples, recorded_predictions
from act.transfer import transfer
from conftest import tiny_model
from scipy.stats import spearmanr

DOSES = [0.0, 0.01, 0.1, 0.4, 0.8, 1.0]


def signed(cm):
    return ChannelScores.from_flat(torch.randn(cm.total, generator=torch.Generator().manual_seed(0)), cm)


def test_doses_are_nested_and_exact():
    cm = enumerate_channels(tiny_model())
    masks = [largest(signed(cm), dose) for dose in DOSES[1:]]
    assert [m.count for m in masks] == [round(dose * cm.total) for dose in DOSES[1:]]
    for small, large in zip(masks, masks[1:]):
        assert (small & large) == small


def test_a_dose_takes_the_largest_scores_whatever_their_sign():
    cm = enumerate_channels(tiny_model())
    s, mask = signed(cm).flat(), largest(signed(cm), 0.9).flat()
    assert s[mask].min() > s[~mask].max()
    assert s[mask].min() < 0


@pytest.mark.parametrize('dose', [0, -0.1, 1.1])
def test_an_impossible_dose(dose):
    with pytest.raises(ActError, match='at most 1'):
        largest(random_scores(tiny_model()), dose)


def test_the_whole_dose_is_the_donor(family):
    a, b = tiny_model(family), tiny_model(family, 1)
    moved = transfer(a, b, largest(random_scores(a), 1.0), check=False)
    assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), b.parameters()))


def test_random_scores_depend_on_the_seed_alone():
    model = tiny_model()
    one, same, other = (random_scores(model, seed).flat() for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    'shares, level, want',
    [
        ([0.0, 0.5, 1.0], 0.5, 0.1),
        ([0.0, 0.4, 0.6], 0.5, 10**-0.5),
        ([0.6, 0.2, 1.0], 0.5, 0.01),  # reached at the smallest dose: this many or fewer
        ([0.2, 0.9, 0.1], 0.9, 0.1),  # the first time counts
        ([0.1, 0.2, 0.3], 0.5, None),
        ([np.nan, np.nan, np.nan], 0.5, None),
    ],
)
def test_crossing_by_hand(shares, level, want):
    assert crossing([0.01, 0.1, 1.0], shares, level) == (want and pytest.approx(want))


@pytest.mark.parametrize('n', [1, 7, 8, 9, 150])
def test_packed_answers_come_back(n):
    correct = np.random.default_rng(n).integers(2, size=n)
    assert (unpack(pack(correct), n) == correct).all()


def test_packed_answers_of_another_number():
    with pytest.raises(ValueError, match='bits'):
        unpack(pack(np.ones(20)), 40)


def test_doses_end_with_the_donor():
    with pytest.raises(ActError, match='last one'):
        measure_doses(None, None, 'lab/science-zh', None, doses=(0.1, 0.5))


# curves by row: the number of right answers of 100 at each dose
EARLY, LATE, LATER = [0, 60, 90, 95, 100, 100], [0, 0, 10, 60, 90, 100], [0, 0, 0, 20, 70, 100]


def training(curves, recipe='maths-en', seed=1, doses=DOSES):
    "A training with (way -> row -> right answers of 100); nats fall with them."
    cells = []
    for way, rows in curves.items():
        packed = {
            row: dict(correct=[pack(np.arange(100) < k) for k in right], nats=[1 - k / 100 for k in right])
            for row, right in rows.items()
        }
        cells.append(dict(way=way, ability=abilities_of(recipe)[way][0], items=100, rows=packed))
    return dict(name=f'{recipe}-medium-{seed}', recipe=recipe, grade='medium', seed=seed, doses=doses, cells=cells)


ASYMMETRIC = dict(recovering=dict(attribution=EARLY, random=LATE), acquiring=dict(attribution=LATE, random=LATER))
ALIKE = dict(recovering=dict(attribution=EARLY, random=LATE), acquiring=dict(attribution=EARLY, random=LATE))
ANY_CHANNELS = dict(recovering=dict(attribution=EARLY, random=EARLY), acquiring=dict(attribution=LATE, random=LATE))
NO_GAP = dict(recovering=dict(attribution=[95, 95, 95, 96, 97, 100], random=LATE), acquiring=ALIKE['acquiring'])


def test_shares_and_crossings_by_hand():
    d = Directions([training(ASYMMETRIC)])
    t = d.numbers().set_index(['way', 'row', 'dose'])
    assert t.value['recovering', 'attribution', 0.1] == pytest.approx(0.9)
    assert (t.low <= t.value + 1e-12).all()
    assert (t.value <= t.high + 1e-12).all()
    c = d.crossings().set_index(['recipe', 'way', 'row', 'level']).value
    assert c['maths-en', 'recovering', 'attribution', 0.5] == 0.01
    assert c['all', 'recovering', 'attribution', 0.9] == pytest.approx(0.1)
    assert c['all', 'acquiring', 'attribution', 0.5] == pytest.approx(0.1 * 4**0.8)
    r = d.ratios().set_index(['recipe', 'row']).value
    assert r['maths-en', 'attribution'] == pytest.approx(10 * 4**0.8)
    assert r['all', BEYOND] == pytest.approx(r['all', 'attribution'] / r['all', 'random'])


def test_the_share_of_two_trainings_is_that_of_their_sum():
    flat = dict(ASYMMETRIC, recovering=dict(attribution=[50, 50, 50, 50, 50, 70], random=[50, 50, 50, 50, 50, 70]))
    d = Directions([training(ASYMMETRIC), training(flat, seed=2)])
    assert d.samples('recovering', 'attribution')[0, 1] == pytest.approx((60 + 0) / (100 + 20))


@pytest.mark.parametrize(
    'first, second, word',
    [
        (ASYMMETRIC, ASYMMETRIC, 'holds'),
        (ASYMMETRIC, ALIKE, 'in part'),
        (ALIKE, ALIKE, 'does not hold'),
        (ANY_CHANNELS, ANY_CHANNELS, 'does not hold'),  # random channels show the same ratio
        (ASYMMETRIC, NO_GAP, 'holds'),  # what cannot be judged is left out, and named
    ],
)
def test_the_verdict_by_the_rule(first, second, word):
    d = Directions([training(first), training(second, 'science-zh')])
    assert d.verdict().startswith(f'{word}: ')
    assert ('not judged: science-zh' in d.verdict()) == (second is NO_GAP)


def test_nothing_to_judge():
    d = Directions([training(NO_GAP)])
    assert d.verdict().startswith('cannot be judged')
    assert not d.judged()
    assert d.gaps().counted.tolist() == [False, True]


def test_a_record_comes_back_and_shows_itself(tmp_path):
    d = Directions([training(ASYMMETRIC), training(ASYMMETRIC, seed=2)])
    back = Directions.load(d.save(tmp_path / 'a.json'))
    assert back.trainings == d.trainings
    assert gather(tmp_path).numbers().equals(d.numbers())
    assert 'recovering' in d.report()
    assert '50 % of the gap' in d.room()
    assert len(d.plot()) == 2


def test_trainings_of_other_doses_do_not_mix():
    with pytest.raises(ActError, match='other doses'):
        Directions([training(ALIKE), training(ALIKE, seed=2, doses=[0.0, 0.02, *DOSES[2:]])])


def in_nats(curves, **kw):
    "As `training`, compared by nats: every item has its own."
    found = training(curves, **kw)
    for cell in found['cells']:
        for row, right in zip(cell['rows'].values(), curves[cell['way']].values()):
            row['nats'] = [[(1 - k / 100) * (1 + i / 10) for i in range(11)] for k in right]
            row['correct'] = [pack(np.zeros(100))] * len(right)
    return dict(found, metric='nats')


def test_a_gap_in_nats_by_hand():
    d = Directions([in_nats(ASYMMETRIC)])
    assert d.gaps().before.tolist() == pytest.approx([-1.5, -1.5])  # the mean over the items
    assert d.gaps().counted.all()
    reached = d.crossings().set_index(['recipe', 'way', 'row', 'level']).value
    assert reached['maths-en', 'recovering', 'attribution', 0.5] == 0.01
    assert d.verdict().startswith('holds: ')
    with pytest.raises(ActError, match='read them apart'):
        Directions([in_nats(ASYMMETRIC), training(ASYMMETRIC, seed=2)])


def test_what_is_no_record(tmp_path):
    with pytest.raises(ActError, match='no trainings'):
        gather(tmp_path)
    bad = training(ALIKE)
    bad['cells'][0]['items'] = 400
    with pytest.raises(ActError, match='not a usable record'):
        Directions.load(write_json(dict(format=FORMAT, trainings=[bad]), tmp_path / 'bad.json'))


def test_what_is_measured_is_not_measured_again(tmp_path):
    options = dict(orders=dict(random=ORDERS['random']), doses=(1.0,), n=4, progress=False)
    (path,) = measure_family(tmp_path / 'none', ['maths-en'], [1], tmp_path, **options)
    d, before = Directions.load(path), path.read_bytes()
    assert d.doses == [0.0, 1.0]
    assert [c['way'] for c in d.cells] == ['recovering', 'recovering', 'acquiring']
    measure_family(tmp_path / 'none', ['maths-en'], [1], tmp_path, **options)
    assert path.read_bytes() == before


def test_groups_are_modules_and_disjoint_draws(family):
    cm = enumerate_channels(tiny_model(family))
    groups = groups_of(cm, 5, 6)
    modules = torch.stack([groups[p].flat() for p in cm.paths])
    drawn = torch.stack([groups[f'random {i}'].flat() for i in range(1, 7)])
    assert (modules.sum(0) == 1).all()
    assert drawn.sum(1).tolist() == [5] * 6
    assert drawn.sum(0).max() == 1
    with pytest.raises(ActError, match='do not fit'):
        groups_of(cm, cm.total, 2)


def test_rank_correlation_equals_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=30), rng.normal(size=30)  # with ties
    assert rank_samples(x, y, 0)[0] == pytest.approx(spearmanr(x, y).statistic)
    drawn = np.random.default_rng(3).integers(30, size=(2, 30))[1]
    assert rank_samples(x, y, 2, 3)[2] == pytest.approx(spearmanr(x[drawn], y[drawn]).statistic)


def test_agreement_by_hand():
    kinds = ['module'] * 4 + ['random'] * 4
    table = pd.DataFrame(dict(group=range(8), kind=kinds, channels=[1, 2, 3, 4, 5, 5, 5, 5], correct=0.0))
    table = table.assign(nats=[1, 3, 2, 4, 4, 3, 2, 1], good=[1, 2, 3, 4, 4, 3, 2, 1])
    value = rank_agreement(table, n=50).set_index(['kind', 'score']).value
    assert value['module', 'good'] == pytest.approx(0.8)
    assert value['random', 'good'] == pytest.approx(1)
    assert ('random', 'channels') not in value.index  # they all have five


def test_every_recipe_counts_the_same():
    found = {('a', 1, 'x'): np.zeros(9), ('a', 2, 'x'): np.ones(9), ('b', 1, 'x'): np.ones(9)}
    mean = mean_over_trainings(found)
    assert mean[0] == 0.75
    assert set(mean[1:]) <= {0.5, 0.75, 1.0}


def test_what_is_no_record_of_predictions(tmp_path):
    with pytest.raises(ActError, match='measure_predictions'):
        recorded_predictions(write_json(dict(format='other'), tmp_path / 'x.json'))

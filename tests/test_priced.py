"""A pair and its price: shares by hand, units by ability, pairs that lose nothing, runs that go on where they were."""

import json
import numpy as np, pytest, torch
from dataclasses import replace
from act.kit.errors import ActError
from act.studies.cases import CASES
from act.studies.choices import Ranked
from act.studies.doses import pack
from act.studies.priced import FORMAT, Priced, gather_priced, priced_answers

CASE = dict(target='t', donor='d', recovered=['sciq/en'], retained=['gsm8k/en'], others=['piqa/en'])
COUNTS = {'sciq-en': 40, 'gsm8k-en': 10, 'piqa-en': 20}


def answers(science, bits, other):
    "So many right, these bits for every item, so many right."
    right = lambda k, n: dict(correct=pack([1] * k + [0] * (n - k)), bits=[1.0] * n)
    return {
        'sciq-en': right(science, 40),
        'gsm8k-en': dict(bits=[bits + 0.01 * i for i in range(10)]),
        'piqa-en': right(other, 20),
    }


def file(row, *models, seed=0):
    models = [dict(p=p, tuned=False, seconds=1.0, test=test) for p, test in models]
    return dict(format=FORMAT, case=CASE, seed=seed, row=row, counts=COUNTS, models=models, meta={})


ENDS = file('target', (0, answers(10, 0.5, 12))), file('donor', (0, answers(30, 0.9, 16)))


def halves(bits=0.7):
    return file('interpolation', *((lam, answers(10 + round(20 * lam), bits, 12)) for lam in (0.25, 0.5, 0.75, 1.0)))


def test_shares_and_prices_are_those_by_hand():
    found = Priced([*ENDS, file('random', (0.01, answers(15, 0.54, 14)))], n=200)
    assert found.units == {'sciq-en': 'correct', 'gsm8k-en': 'bits', 'piqa-en': 'correct'}
    assert found.find('random', 0.01)[0] == pytest.approx(25)  # 5 of 20 items
    assert found.find('random', 0.01, column='retained')[0] == pytest.approx(10)  # 0.04 of 0.4 bits
    assert found.find('random', 0.01, column='piqa-en')[0] == pytest.approx(10)  # points
    assert found.find('random', 0.01, column='gsm8k-en')[0] == pytest.approx(-0.04)  # bits, higher is better
    assert found.means(('random', 0.01, False), 'sciq-en', 'bits')[0] == pytest.approx(-1)
    gaps = found.gaps()
    assert gaps.difference['sciq-en'] == pytest.approx(50)
    assert gaps.difference['gsm8k-en'] == pytest.approx(0.4)


def test_samples_of_items_are_averaged_and_rows_that_read_none_are_used_for_all():
    files = [file('attribution', (0.01, answers(10 + k, 0.5, 12)), seed=seed) for seed, k in ((0, 4), (1, 8))]
    found = Priced([*ENDS, *files], n=400)
    assert found.find('attribution', 0.01)[0] == pytest.approx(30)
    assert found.find('donor')[0] == 100
    alone = Priced([*ENDS, files[0]], n=400)
    assert found.find('attribution', 0.01).std() > 0
    assert alone.gap('attribution', 'attribution', 0.01) == (0, 0, 0)


def test_a_pair_that_costs_nothing_is_refused():
    assert Priced([*ENDS, halves()], n=200).accepted()
    assert not Priced([*ENDS, halves(0.5)], n=200).accepted()  # everything comes back for nothing
    assert not Priced([*ENDS, halves(0.45)], n=200).accepted()  # what should stay becomes better
    price = Priced([*ENDS, halves()], n=200).price()
    np.testing.assert_allclose(price['recovered', 'value'], [25, 50, 75, 100])
    np.testing.assert_allclose(price['retained', 'value'], [50] * 4)


def test_the_other_direction_is_read_from_the_same_models():
    found = Priced([*ENDS, halves(0.6), file('random', (0.01, answers(15, 0.54, 14)))], n=200)
    back = found.turned()
    assert (back.case['target'], back.case['recovered']) == ('d', ['gsm8k/en'])
    assert back.find('interpolation', 0.75)[0] == pytest.approx(75)  # 0.3 of 0.4 bits
    assert back.find('interpolation', 0.75, column='retained')[0] == pytest.approx(75)  # 15 of 20 items lost
    np.testing.assert_allclose(back.find('interpolation', 1.0), 100)
    with pytest.raises(ActError, match='no measurement of the interpolation'):
        Priced(list(ENDS), n=200).turned()


@pytest.mark.parametrize(
    'ours, twin, cheap, said',
    [
        ((28, 0.52), 12, 0.7, 'holds'),
        ((28, 0.6), 12, 0.7, 'in part'),  # it costs a quarter of the gain
        ((28, 0.52), 24, 0.7, 'in part'),  # most of it is what choosing alone brings
        ((20, 0.52), 12, 0.7, 'in part'),  # half comes back
        ((28, 0.52), 12, 0.5001, 'in part'),  # the interpolation brings back everything for as much
        ((10, 0.5), 10, 0.7, 'does not hold'),
    ],
)
def test_the_rule_asks_for_all_four(ours, twin, cheap, said):
    rows = {'trade-aware attribution': ours, 'random': (10, 0.5), 'noise twin (trade-aware)': (twin, 0.5)}
    files = [file(row, (0.01, answers(k, b, 12))) for row, (k, b) in rows.items()]
    found = Priced([*ENDS, halves(cheap), *files], n=400)
    word, numbers = found.verdict()
    assert word == said
    assert 'from *interpolation at that price*' in numbers


def test_the_interpolation_is_read_at_the_price_of_a_row():
    rows = [file('random', (0.01, answers(12, bits, 12))) for bits in (0.52,)]
    found = Priced([*ENDS, halves(0.7), *rows], n=200)  # costs half of the gain at every strength
    assert found.at_same_price('random', 0.01)[0] == pytest.approx(2.5)  # a tenth of the way to 25 % for 50 %
    free = Priced([*ENDS, halves(0.7), file('random', (0.01, answers(12, 0.49, 12)))], n=200)
    assert free.at_same_price('random', 0.01)[0] == pytest.approx(0)  # what costs nothing is no strength at all


def test_files_that_do_not_go_together(tmp_path):
    with pytest.raises(ActError, match='no measurement: make some'):
        gather_priced(tmp_path)
    with pytest.raises(ActError, match='no measurement of the donor'):
        Priced([ENDS[0]])
    other = file('donor', (0, answers(30, 0.9, 16))) | dict(case=CASE | dict(target='u'))
    with pytest.raises(ActError, match='donor was measured on another pair'):
        Priced([ENDS[0], other])
    found = Priced([*ENDS], n=50)
    with pytest.raises(ActError, match="'weight' was not measured at 1 %"):
        found.find('weight', 0.01)
    path = found.save(tmp_path / 'pair.json')
    assert Priced.load(path).files == found.files
    path.write_text(json.dumps(dict(format='act-eval-1')))
    with pytest.raises(ActError, match='measure_priced'):
        Priced.load(path)


def test_a_case_says_what_is_read_at_how_many_points_and_how_precisely():
    few = replace(CASES['lab'], n=4, items=8, points=2, read=('lab/science-en',))
    bench = Ranked(few, 0)
    assert bench.read.name == 'science-en'
    assert bench.kept.name == 'multiplication-en'
    assert [a.name for a in bench.test[:2]] == ['multiplication-en', 'science-zh']
    assert bench.ranking('attribution').meta['points'] == 2
    coarse = Ranked(replace(few, bf16=True), 0)
    with coarse.passes():
        assert torch.is_autocast_enabled('cpu')
    with bench.passes():
        assert not torch.is_autocast_enabled('cpu')
    fine, rough = (priced_answers(b, b.target, b.test)['science-zh']['bits'] for b in (bench, coarse))
    assert fine != rough
    np.testing.assert_allclose(fine, rough, atol=0.1, rtol=0.02)
    for score in ('attribution', 'own change', 'activation'):
        x, y = (b.ranking(score).flat() for b in (bench, coarse))
        assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.98, score
